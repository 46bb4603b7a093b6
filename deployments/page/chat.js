// The chat: conversations, the composer, answers as they stream in.

import { Conversations, settings } from "./conversations.js";
import { byId, el, keep, say } from "./dom.js";
import { MessageView } from "./message.js";
import { stream } from "./server.js";

const NEAR_END_PX = 80; // who reads higher up isn't scrolled down

export class Chat {
  constructor({ onUnauthorized }) {
    this.onUnauthorized = onUnauthorized;
    this.answering = new Map(); // conversation id -> { conversation, abort }
    this.views = new Map(); // message -> MessageView, of the conversation that is shown
    this.images = []; // data URLs to go with the next question
    this.status = null;
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), this.send()));
    byId("question").addEventListener("keydown", (event) => this.onKey(event));
    byId("question").addEventListener("input", grow);
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.begin());
    byId("image").addEventListener("change", (event) => this.attach(event.target));
    byId("chat").addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    // A browser may keep a page that was left, and go on reading for nobody.
    addEventListener("pagehide", () => this.stopAll());
    this.bindSettings();
    byId("conversations").open = matchMedia("(min-width: 52rem)").matches;
  }

  // Whoever signed in: their conversations.
  enter(status) {
    this.status = status;
    this.conversations = new Conversations(status.tenant);
    this.open(this.conversations.begin());
  }

  leave() {
    this.stopAll();
    byId("messages").replaceChildren();
    byId("conversations").lastElementChild.replaceChildren();
  }

  update(status) {
    this.status = status;
    byId("attach").hidden = !status.takes_images;
    if (this.empty) this.showEmpty();
  }

  focus() {
    byId("question").focus({ preventScroll: true });
  }

  begin() {
    this.open(this.conversations.begin());
    this.focus();
  }

  open(conversation) {
    this.conversation = conversation;
    this.views.clear();
    byId("messages").replaceChildren();
    this.empty = null;
    conversation.messages.forEach((message) => this.add(message));
    if (!conversation.messages.length) this.showEmpty();
    this.showList();
    this.showButtons();
    scrollToEnd();
  }

  // Asking

  send() {
    const text = byId("question").value.trim();
    if ((!text && !this.images.length) || this.answering.has(this.conversation.id)) return;
    const { conversation } = this;
    const question = { role: "user", text, images: this.images };
    if (!conversation.messages.length) conversation.title = text.slice(0, 60) || "An image";
    conversation.messages.push(question);
    byId("question").value = "";
    this.images = [];
    this.showImages();
    grow();
    this.add(question);
    this.conversations.save(conversation);
    this.answer(conversation);
  }

  retry(failed) {
    const { conversation } = this;
    if (this.answering.has(conversation.id)) return;
    conversation.messages = conversation.messages.filter((message) => message !== failed);
    this.views.get(failed).node.remove();
    this.answer(conversation);
  }

  stop() {
    this.answering.get(this.conversation.id)?.abort.abort();
  }

  stopAll() {
    for (const { abort } of this.answering.values()) abort.abort();
  }

  // Ask for an answer and show it as it comes; whatever happens, it gets an end.
  async answer(conversation) {
    const message = { role: "assistant", text: "", thought: "", calls: [], times: {} };
    const request = this.request(conversation);
    const abort = new AbortController();
    conversation.messages.push(message);
    this.answering.set(conversation.id, { conversation, abort });
    this.add(message);
    this.announce("The model answers.");
    this.showList();
    this.showButtons();
    try {
      await this.read(stream("v1/chat/completions", request, abort.signal), message);
      message.ending ??= "stop";
    } catch (error) {
      if (error.name === "AbortError") message.ending = "stopped";
      else message.error = sentenceOf(error);
      if (error.status === 401) this.onUnauthorized();
    }
    this.answering.delete(conversation.id);
    this.conversations.update(conversation);
    this.show(message);
    this.showButtons();
    this.showList();
    this.announce(message.error ?? (message.text || "The answer has ended."));
  }

  async read(events, message) {
    const started = performance.now();
    let first = 0;
    for await (const event of events) {
      const choice = event.choices?.[0];
      if (choice) {
        if (take(message, choice) && !first) first = performance.now();
      }
      if (event.usage) message.times.tokens = event.usage.completion_tokens;
      if (first) message.times.first = (first - started) / 1000;
      const since = (performance.now() - first) / 1000;
      if (event.usage && first && message.times.tokens > 1 && since > 0) {
        message.times.perSecond = (message.times.tokens - 1) / since;
      }
      this.showSoon(message);
    }
  }

  request({ messages }) {
    const { system, temperature, maxTokens, thinking } = settings.get();
    const said = messages.filter((message) => !message.error || message.text).map(toOpenAI);
    if (system) said.unshift({ role: "system", content: system });
    const request = { model: this.status.model, messages: said, stream: true, stream_options: { include_usage: true } };
    if (Number.isFinite(temperature)) request.temperature = temperature;
    if (Number.isFinite(maxTokens)) request.max_tokens = maxTokens;
    if (thinking) request.reasoning_effort = "medium";
    return request;
  }

  // Showing

  add(message) {
    this.empty?.remove();
    this.empty = null;
    const view = new MessageView(message, (failed) => this.retry(failed));
    this.views.set(message, view);
    byId("messages").append(view.node);
    scrollToEnd();
  }

  // At most once a frame, however many tokens come.
  showSoon(message) {
    if (this.isDue) return;
    this.isDue = true;
    requestAnimationFrame(() => {
      this.isDue = false;
      this.show(message);
    });
  }

  show(message) {
    const box = byId("messages");
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PX;
    this.views.get(message)?.show();
    if (isAtEnd) scrollToEnd();
  }

  showEmpty() {
    const { model, context_tokens: context } = this.status;
    const words = model ? `${model} reads up to ${context.toLocaleString("en")} tokens.` : "";
    this.empty ??= el("div", { class: "empty" }, el("h1", {}, "What would you like to know?"), el("p", { class: "muted" }));
    say(this.empty.lastElementChild, words);
    if (!this.empty.isConnected) byId("messages").append(this.empty);
  }

  showButtons() {
    const isAnswering = this.answering.has(this.conversation.id);
    const hadFocus = document.activeElement?.closest("#stop, #send");
    byId("stop").hidden = !isAnswering;
    byId("send").hidden = isAnswering;
    if (hadFocus) byId(isAnswering ? "stop" : "question").focus();
  }

  showList() {
    const all = this.conversations.all();
    byId("conversations").hidden = !all.length;
    keep(byId("conversations").lastElementChild, all, ({ id }) => id, (conversation) => this.entry(conversation));
  }

  entry({ id }) {
    // While its answer comes in, what is kept is older than what is here.
    const find = () => this.answering.get(id)?.conversation ?? this.conversations.get(id);
    const open = el("button", { type: "button", class: "quiet", onclick: () => this.open(find()) });
    const remove = el("button", { type: "button", class: "quiet remove", onclick: () => this.remove(id) }, "×");
    const show = ({ title }) => {
      say(open, title);
      open.toggleAttribute("aria-current", id === this.conversation.id);
      remove.setAttribute("aria-label", `Remove ${title}`);
    };
    show.node = el("li", {}, open, remove);
    return show;
  }

  remove(id) {
    this.answering.get(id)?.abort.abort();
    this.conversations.remove(id);
    if (id === this.conversation.id) this.begin();
    else this.showList();
  }

  announce(words) {
    say(byId("announcer"), words);
  }

  // Input

  onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.send();
  }

  async attach(input) {
    this.images.push(...(await Promise.all([...input.files].map(dataUrl))));
    input.value = "";
    this.showImages();
    this.focus();
  }

  showImages() {
    byId("images").hidden = !this.images.length;
    byId("images").replaceChildren(...this.images.map((src) => {
      const drop = () => {
        this.images = this.images.filter((other) => other !== src);
        this.showImages();
      };
      const button = el("button", { type: "button", class: "quiet remove", "aria-label": "Don't send this image", onclick: drop }, "×");
      return el("li", {}, el("img", { src, alt: "" }), button);
    }));
  }

  bindSettings() {
    const { system = "", temperature, maxTokens, thinking = false } = settings.get();
    byId("system").value = system;
    byId("temperature").value = temperature ?? "";
    byId("max-tokens").value = maxTokens ?? "";
    byId("thinking").checked = thinking;
    const number = (id) => (byId(id).value === "" ? undefined : byId(id).valueAsNumber);
    byId("settings").addEventListener("input", () =>
      settings.set({
        system: byId("system").value.trim(),
        temperature: number("temperature"),
        maxTokens: number("max-tokens"),
        thinking: byId("thinking").checked,
      }));
  }
}

// Add what a piece brings; whether it brought something of the answer.
function take(message, { delta = {}, finish_reason: ending }) {
  message.thought += delta.reasoning_content ?? "";
  message.text += delta.content ?? "";
  for (const { index, function: called = {} } of delta.tool_calls ?? []) {
    const call = (message.calls[index] ??= { name: "", arguments: "" });
    call.name += called.name ?? "";
    call.arguments += called.arguments ?? "";
  }
  if (ending) message.ending = ending;
  return Boolean(delta.reasoning_content || delta.content || delta.tool_calls);
}

function toOpenAI({ role, text, images = [] }) {
  if (!images.length) return { role, content: text };
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: [...parts, ...(text ? [{ type: "text", text }] : [])] };
}

function sentenceOf({ message, retryAfter }) {
  return retryAfter ? `${message} Try again in ${Math.ceil(retryAfter)} s.` : message;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function grow() {
  const box = byId("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, innerHeight * 0.4)}px`; // 2: its borders
}

function scrollToEnd() {
  byId("messages").scrollTop = byId("messages").scrollHeight;
}
