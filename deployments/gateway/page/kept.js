// What is kept in this browser of one tenant: for good where the key is, else for this tab.

import { key } from "./server.js";

export class Kept {
  // Also removes what an earlier tenant left in this tab.
  constructor(tenant) {
    this.prefix = `briolette/${tenant}/`;
    this.store = key.isRemembered() ? localStorage : sessionStorage;
    for (const name of Object.keys(sessionStorage)) {
      if (name.startsWith("briolette/") && !name.startsWith(this.prefix)) sessionStorage.removeItem(name);
    }
  }

  // Under names that begin so.
  all(start) {
    return Object.keys(this.store)
      .filter((name) => name.startsWith(this.prefix + start))
      .map((name) => JSON.parse(this.store.getItem(name)));
  }

  get(name) {
    return JSON.parse(this.store.getItem(this.prefix + name));
  }

  // Throws where the browser has no room left.
  set(name, value) {
    this.store.setItem(this.prefix + name, JSON.stringify(value));
  }

  remove(name) {
    this.store.removeItem(this.prefix + name);
  }
}
