// The chat: conversations, and answers as they stream in.

import { Composer } from "./composer.js";
import { Conversations } from "./conversations.js";
import { button, byId, count, el, keep, on, say } from "./dom.js";
import { Kept } from "./kept.js";
import { MessageView } from "./message.js";
import { stream } from "./server.js";

const NEAR_END_PX = 80; // who reads higher up isn't scrolled down

export class Chat {
  constructor(onUnauthorized) {
    this.onUnauthorized = onUnauthorized;
    this.answering = new Map(); // conversation id -> { conversation, abort }
    this.views = new Map(); // message -> MessageView, of the conversation that is shown
    this.box = byId("messages");
    this.composer = new Composer(() => this.send());
    on("stop", "click", () => this.stop());
    on("new-chat", "click", () => this.begin());
    addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    // A browser may keep a page that was left, and go on reading for nobody.
    addEventListener("pagehide", () => this.stopAll());
    byId("conversations").open = matchMedia("(min-width: 52rem)").matches;
  }

  // Whoever signed in: their conversations. Who was here last goes on where they were.
  enter(status) {
    const isBack = status.tenant === this.tenant;
    const kept = new Kept(status.tenant);
    this.status = status;
    this.conversations = new Conversations(kept);
    this.composer.enter(kept);
    if (!isBack) this.leave();
    this.tenant = status.tenant;
    this.showList();
  }

  // Nothing of whoever was here stays.
  leave() {
    this.stopAll();
    this.tenant = null;
    this.composer.clear();
    say(byId("announcer"), "");
    this.open(this.conversations.begin());
  }

  update(status) {
    this.status = status;
    byId("attach").hidden = !status.takes_images;
    this.showEmpty();
  }

  focus() {
    this.composer.focus();
  }

  begin() {
    this.open(this.conversations.begin());
    this.focus();
  }

  open(conversation) {
    this.conversation = conversation;
    this.views.clear();
    this.box.replaceChildren();
    conversation.messages.forEach((message) => this.add(message));
    this.showEmpty();
    this.showList();
  }

  // Asking

  send() {
    const { conversation } = this;
    const question = !this.answering.has(conversation.id) && this.composer.take();
    if (!question) return;
    conversation.title ||= question.text.slice(0, 60) || "An image";
    conversation.messages.push(question);
    this.add(question);
    this.answer(conversation);
  }

  retry(failed) {
    const { conversation } = this;
    if (this.answering.has(conversation.id)) return;
    const question = conversation.messages[conversation.messages.indexOf(failed) - 1];
    const others = conversation.messages.filter((message) => message !== failed && message !== question);
    conversation.messages = [...others, question];
    this.views.get(failed).node.remove();
    this.box.append(this.views.get(question).node);
    this.answer(conversation);
  }

  stop() {
    this.answering.get(this.conversation?.id)?.abort.abort();
  }

  stopAll() {
    for (const { abort } of this.answering.values()) abort.abort();
  }

  // Ask for an answer and show it as it comes; whatever happens, it gets an end.
  async answer(conversation) {
    const { conversations } = this;
    const message = { role: "assistant", text: "", thought: "", calls: [], times: {} };
    const abort = new AbortController();
    const request = this.request(conversation);
    conversations.save(conversation);
    conversation.messages.push(message);
    this.answering.set(conversation.id, { conversation, abort });
    this.add(message);
    this.showList();
    say(byId("announcer"), "The model answers.");
    try {
      await this.read(stream("v1/chat/completions", request, abort.signal), message);
      message.ending ??= "stop";
    } catch (error) {
      if (error.name === "AbortError") message.ending = "stopped";
      else message.error = sentenceOf(error);
      if (error.status === 401 && conversations === this.conversations) this.onUnauthorized();
    }
    this.answering.delete(conversation.id);
    if (conversations.get(conversation.id)) conversations.save(conversation); // else it was removed
    this.show(message);
    this.showList();
    if (this.views.has(message)) say(byId("announcer"), message.error ?? (message.text || "The answer has ended."));
  }

  async read(events, message) {
    const { times } = message;
    const started = performance.now();
    let first = 0;
    for await (const { choices: [choice], usage } of events) {
      const now = performance.now();
      if (choice && take(message, choice)) first ||= now;
      if (first) times.first = (first - started) / 1000;
      if (usage) times.tokens = usage.completion_tokens;
      if (times.tokens > 1 && now > first) times.perSecond = ((times.tokens - 1) / (now - first)) * 1000;
      this.showSoon(message);
    }
  }

  request({ messages }) {
    const { system, parameters } = this.composer.asked();
    const said = [...messages.flatMap(answered), messages.at(-1)].map(toOpenAI);
    if (system) said.unshift({ role: "system", content: system });
    const streamed = { stream: true, stream_options: { include_usage: true } };
    return { model: this.status.model, messages: said, ...streamed, ...parameters };
  }

  // Showing

  add(message) {
    this.empty?.remove();
    const view = new MessageView(message, (failed) => this.retry(failed));
    this.views.set(message, view);
    this.box.append(view.node);
    this.box.scrollTop = this.box.scrollHeight;
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
    const { box } = this;
    const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PX;
    this.views.get(message)?.show();
    if (isAtEnd) box.scrollTop = box.scrollHeight;
  }

  showEmpty() {
    if (this.conversation.messages.length) return;
    const { model, context_tokens: context } = this.status;
    this.empty ??= el("div", { class: "empty" }, el("h1", {}, "What would you like to know?"), el("p", { class: "muted" }));
    say(this.empty.lastElementChild, model ? `${model} reads up to ${count(context)} tokens.` : "");
    if (!this.empty.isConnected) this.box.append(this.empty);
  }

  // The conversations, and whether this one is being answered.
  showList() {
    const all = this.conversations.all();
    byId("conversations").hidden = !all.length;
    keep(byId("conversations").lastElementChild, all, ({ id }) => id, (conversation) => this.entry(conversation));
    const isAnswering = this.answering.has(this.conversation.id);
    const hadFocus = document.activeElement?.closest("#stop, #send");
    byId("stop").hidden = !isAnswering;
    byId("send").hidden = isAnswering;
    if (hadFocus) byId(isAnswering ? "stop" : "question").focus();
  }

  entry({ id }) {
    // While its answer comes in, what is kept is older than what is here.
    const find = () => this.answering.get(id)?.conversation ?? this.conversations.get(id);
    const open = button("", () => this.open(find()), { class: "quiet" });
    const remove = button("×", () => this.remove(id), { class: "quiet" });
    const show = ({ title }) => {
      say(open, title);
      open.ariaCurrent = id === this.conversation.id ? "true" : null;
      remove.setAttribute("aria-label", `Remove ${title}`);
    };
    return [el("li", {}, open, remove), show];
  }

  remove(id) {
    this.answering.get(id)?.abort.abort();
    this.conversations.remove(id);
    if (id === this.conversation.id) this.begin();
    else this.showList();
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
  message.ending = ending ?? undefined;
  return Boolean(delta.reasoning_content || delta.content || delta.tool_calls);
}

// A question and its answer; nothing where it has none, so that what failed isn't asked again.
function answered(question, index, messages) {
  const answer = messages[index + 1];
  const isWhole = question.role === "user" && answer?.role === "assistant" && answer.text && !answer.error;
  return isWhole ? [question, answer] : [];
}

function toOpenAI({ role, text, images = [] }) {
  if (!images.length) return { role, content: text || "(an image)" };
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: [...parts, ...(text ? [{ type: "text", text }] : [])] };
}

const sentenceOf = ({ message, retryAfter }) =>
  retryAfter ? `${message} Try again in ${retryAfter} s.` : message;
