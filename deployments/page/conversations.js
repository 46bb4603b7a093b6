// Conversations, kept in this browser: an entry for each, so that two tabs don't quarrel.

export class Conversations {
  constructor(tenant) {
    this.prefix = `briolette.chat.${tenant}.`;
  }

  // The last used one first.
  all() {
    return Object.keys(localStorage)
      .filter((name) => name.startsWith(this.prefix))
      .map((name) => JSON.parse(localStorage.getItem(name)))
      .sort((a, b) => b.used - a.used);
  }

  get(id) {
    return JSON.parse(localStorage.getItem(this.prefix + id));
  }

  begin() {
    return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", messages: [] };
  }

  // Where the browser has no room left, the oldest other ones go.
  save(conversation) {
    const messages = conversation.messages.map(({ images, ...rest }) => rest); // too large to keep
    const text = JSON.stringify({ ...conversation, messages, used: Date.now() });
    const others = this.all().filter(({ id }) => id !== conversation.id);
    for (;;) {
      try {
        localStorage.setItem(this.prefix + conversation.id, text);
        return;
      } catch {
        if (!others.length) return;
        this.remove(others.pop().id);
      }
    }
  }

  remove(id) {
    localStorage.removeItem(this.prefix + id);
  }
}
