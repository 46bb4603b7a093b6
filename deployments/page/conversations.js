// Conversations and settings, kept in this browser: one entry each, so that two tabs don't quarrel.

const SETTINGS = "briolette.settings";

// The conversations of one tenant.
export class Conversations {
  constructor(tenant) {
    this.prefix = `briolette.chat.${tenant}.`;
  }

  // The last used one first.
  all() {
    return Object.keys(localStorage)
      .filter((name) => name.startsWith(this.prefix))
      .map(read)
      .filter((conversation) => conversation !== null)
      .sort((a, b) => b.used - a.used);
  }

  get(id) {
    return read(this.prefix + id) ?? this.begin();
  }

  begin() {
    return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", used: 0, messages: [] };
  }

  // Keep a conversation; where the browser has no room left, the oldest other ones go.
  save(conversation) {
    conversation.used = Date.now();
    const messages = conversation.messages.map(({ images, ...rest }) => rest); // too large to keep
    const text = JSON.stringify({ ...conversation, messages });
    const others = this.all().filter((other) => other.id !== conversation.id);
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

  // Keep what was added, unless it was removed meanwhile.
  update(conversation) {
    if (read(this.prefix + conversation.id)) this.save(conversation);
  }

  remove(id) {
    localStorage.removeItem(this.prefix + id);
  }
}

export const settings = {
  get: () => read(SETTINGS) ?? {},
  set: (values) => localStorage.setItem(SETTINGS, JSON.stringify(values)),
};

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // not ours
  }
}
