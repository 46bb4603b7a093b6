// Where a question is written: its text, its images, and the settings of what is asked.

import { button, byId, el, on } from "./dom.js";

const SETTINGS = "settings"; // the name that they are kept under

export class Composer {
  constructor(onSend) {
    this.box = byId("question");
    this.images = []; // data URLs
    on("composer", "submit", (event) => (event.preventDefault(), onSend()));
    on("image", "change", (event) => this.attach(event.target));
    this.box.addEventListener("input", () => this.grow());
    this.box.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      onSend();
    });
    this.form = byId("settings-form");
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", () =>
      this.kept.set(SETTINGS, Object.fromEntries(new FormData(this.form))));
  }

  // Whoever signed in: their settings.
  enter(kept) {
    this.kept = kept;
    this.form.reset();
    for (const [name, value] of Object.entries(kept.get(SETTINGS) ?? {})) {
      const field = this.form.elements[name] ?? {};
      if (field.type === "checkbox") field.checked = true;
      else field.value = value;
    }
  }

  focus() {
    this.box.focus({ preventScroll: true });
  }

  // What was written, which is then gone from here; undefined where nothing was.
  take() {
    const text = this.box.value.trim();
    const { images } = this;
    if (!text && !images.length) return undefined;
    this.clear();
    return { role: "user", text, images };
  }

  clear() {
    this.box.value = "";
    this.grow();
    this.show([]);
  }

  // What the settings add to a request.
  asked() {
    const { system, temperature, max_tokens: most, thinking } = this.kept.get(SETTINGS) ?? {};
    return {
      system: system?.trim(),
      parameters: {
        ...(temperature && { temperature: Number(temperature) }),
        ...(most && { max_tokens: Number(most) }),
        ...(thinking && { reasoning_effort: "medium" }),
      },
    };
  }

  grow() {
    this.box.style.height = "auto";
    const height = this.box.scrollHeight + 2; // its borders
    this.box.style.height = `${Math.min(height, innerHeight * 0.4)}px`;
  }

  async attach(input) {
    this.show([...this.images, ...(await Promise.all([...input.files].map(dataUrl)))]);
    input.value = "";
    this.focus();
  }

  show(images) {
    this.images = images;
    const drop = (image) => this.show(this.images.filter((other) => other !== image));
    byId("images").hidden = !images.length;
    byId("images").replaceChildren(...images.map((src) =>
      el("li", {}, el("img", { src, alt: "" }), button("×", () => drop(src), { class: "quiet", "aria-label": "Don’t send this image" }))));
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
