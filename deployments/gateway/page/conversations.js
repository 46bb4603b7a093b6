// Conversations, kept in this browser: an entry for each, so that two tabs don't quarrel.

export class Conversations {
  constructor(kept) {
    this.kept = kept;
  }

  // The last used one first.
  all() {
    return this.kept.all("chat/").sort((a, b) => b.used - a.used);
  }

  get(id) {
    return this.kept.get(`chat/${id}`);
  }

  begin() {
    return { id: crypto.getRandomValues(new Uint32Array(2)).join("-"), title: "", messages: [] };
  }

  // Where the browser has no room left, the oldest other ones go.
  save(conversation) {
    const messages = conversation.messages.map(withoutImages);
    const others = this.all().filter(({ id }) => id !== conversation.id);
    for (;;) {
      try {
        this.kept.set(`chat/${conversation.id}`, { ...conversation, messages, used: Date.now() });
        return;
      } catch {
        if (!others.length) return;
        this.remove(others.pop().id);
      }
    }
  }

  remove(id) {
    this.kept.remove(`chat/${id}`);
  }
}

// They are too large to keep; `lost` tells how many there were.
const withoutImages = ({ images, ...rest }) => ({ ...rest, lost: images?.length || rest.lost });
