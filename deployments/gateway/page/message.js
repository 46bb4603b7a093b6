// One message as it is shown, and shown again while its answer streams in.

import { button, count, el, keep, say, seconds } from "./dom.js";
import { codeBlock, showMarkdown } from "./markdown.js";

// `message` has role, text and, of an answer: thought, calls, ending, error, times.
export class MessageView {
  constructor(message, onRetry) {
    const isUser = message.role === "user";
    this.message = message;
    this.onRetry = onRetry;
    this.thought = el("div", { class: "prose" });
    this.thinking = el("details", { class: "thought" }, el("summary", {}, "Thoughts"), this.thought);
    this.text = el("div", { class: isUser ? "said" : "prose" });
    this.images = el("div", { class: "images" });
    this.calls = el("div");
    this.error = el("div", { class: "error" });
    this.foot = el("p", { class: "muted foot" });
    this.node = el("article", { class: message.role, "aria-label": isUser ? "You" : "The model" },
      this.thinking, this.images, this.text, this.calls, this.error, this.foot);
    this.show();
  }

  show() {
    const { role, text, thought, calls = [], images = [], ending, error } = this.message;
    if (role === "user") say(this.text, text);
    else showMarkdown(this.text, text);
    this.text.hidden = !text && Boolean(ending || error || role === "user");
    this.thinking.hidden = !thought;
    if (thought) showMarkdown(this.thought, thought);
    keep(this.calls, [...calls.entries()], ([index]) => index, toolCall);
    keep(this.images, images, (src) => src, (src) => [el("img", { src, alt: "An image that you sent" }), () => {}]);
    this.error.hidden = !error;
    if (error && !this.error.childElementCount) {
      this.error.append(el("p", {}, error), button("Try again", () => this.onRetry(this.message)));
    }
    say(this.foot, footOf(this.message));
  }
}

function toolCall() {
  const name = el("code");
  const code = el("div");
  const show = ([, call]) => {
    say(name, call.name);
    if (code.shown !== call.arguments) code.replaceChildren(codeBlock(call.arguments, "json"));
    code.shown = call.arguments;
  };
  return [el("div", { class: "call" }, el("p", {}, "Asks for the tool ", name), code), show];
}

const ENDINGS = { length: "cut off: as long as it may be", stopped: "stopped", tool_calls: "waits for a tool" };

function footOf({ lost, ending, times: { tokens, perSecond, first } = {} }) {
  return [
    lost && (lost === 1 ? "an image, not kept" : `${lost} images, not kept`),
    tokens && `${count(tokens)} token${tokens === 1 ? "" : "s"}`,
    perSecond && `${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`,
    first && `first after ${seconds(first)}`,
    ENDINGS[ending],
  ].filter(Boolean).join(" · ");
}
