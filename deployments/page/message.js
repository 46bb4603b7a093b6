// One message as it is shown, and shown again while its answer streams in.

import { count, el, keep, say, seconds } from "./dom.js";
import { codeBlock, showMarkdown } from "./markdown.js";

// `message` has role, text and, of an answer: thought, calls, ending, error, times.
export class MessageView {
  constructor(message, onRetry) {
    this.message = message;
    this.onRetry = onRetry;
    this.thought = el("div", { class: "prose" });
    this.thinking = el("details", { class: "thought", hidden: true }, el("summary", {}, "Thoughts"), this.thought);
    this.text = el("div", { class: message.role === "user" ? "said" : "prose" });
    this.images = el("div", { class: "thumbnails" });
    this.calls = el("div");
    this.error = el("div", { class: "error", hidden: true });
    this.foot = el("p", { class: "muted foot" });
    const name = message.role === "user" ? "You" : "The model";
    this.node = el("article", { class: message.role, "aria-label": name },
      this.thinking, this.images, this.text, this.calls, this.error, this.foot);
    this.show();
  }

  show() {
    const { role, text, thought, calls = [], images = [], error } = this.message;
    if (role === "user") say(this.text, text);
    else showMarkdown(this.text, text);
    this.node.classList.toggle("waiting", role === "assistant" && this.isOpen && !text);
    this.thinking.hidden = !thought;
    if (thought) showMarkdown(this.thought, thought);
    keep(this.calls, calls.map((call, index) => ({ ...call, index })), (call) => call.index, toolCall);
    if (this.images.childElementCount !== images.length) {
      this.images.replaceChildren(...images.map((src) => el("img", { src, alt: "An image that you sent" })));
    }
    this.showError(error);
    say(this.foot, footOf(this.message));
  }

  // Whether its answer is still to come, or coming.
  get isOpen() {
    return this.message.ending === undefined && !this.message.error;
  }

  showError(error) {
    this.error.hidden = !error;
    if (!error || this.error.childElementCount) return;
    const retry = el("button", { type: "button", onclick: () => this.onRetry(this.message) }, "Try again");
    this.error.append(el("p", {}, error), retry);
  }
}

function toolCall() {
  const name = el("code");
  const code = el("div");
  const node = el("div", { class: "call" }, el("p", {}, "Asks for the tool ", name), code);
  const show = (call) => {
    say(name, call.name);
    if (code.textContent.includes(call.arguments) && code.childElementCount) return;
    code.replaceChildren(codeBlock(call.arguments, "json"));
  };
  show.node = node;
  return show;
}

const ENDINGS = { length: "cut off: as long as it may be", stopped: "stopped", tool_calls: "waits for a tool" };

function footOf({ role, ending, times }) {
  if (role === "user" || !times) return "";
  const parts = [];
  if (times.tokens) parts.push(`${count(times.tokens)} token${times.tokens === 1 ? "" : "s"}`);
  if (times.perSecond) parts.push(`${times.perSecond.toFixed(times.perSecond < 10 ? 1 : 0)} tokens/s`);
  if (times.first) parts.push(`first after ${seconds(times.first)}`);
  if (ENDINGS[ending]) parts.push(ENDINGS[ending]);
  return parts.join(" · ");
}
