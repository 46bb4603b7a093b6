// The cluster: how warm the expert groups are, where its parts run, who uses it, what is kept.

import { ago, button, byId, bytes, count, el, keep, muted, say, seconds } from "./dom.js";
import { Heat } from "./heat.js";
import { partCard, partsOf } from "./parts.js";
import { ask } from "./server.js";

const SESSIONS_MS = 5000; // between two looks at them
const TENANT = ["Tenant", "Running", "Waiting", "Tokens/s", "Tokens read", "Tokens written", "KV in use", "In Redis"];
const SESSION = ["Session", "Tokens", "Size", "Used", "Where", ""];
const NO_STORE = "This cluster keeps none: it has no store.";
const NO_SESSIONS = "There are none yet. Begin one: briolette chat --session NAME";

export class Cluster {
  constructor() {
    this.heat = new Heat();
    this.leave();
  }

  leave() {
    this.heat.clear();
    this.status = null;
    this.lost = ""; // why nobody answers, while nobody does
    this.meters = new Map(); // tenant -> { tokens, at, rate }
    this.stored = {}; // bytes of Redis by tenant
    this.sessionsAt = -Infinity; // when they were looked at
    this.hasStore = false; // as far as is known
    this.showSessions([], "");
    say(byId("failure"), "");
  }

  show() {
    this.draw();
    if (this.status) this.lookAtSessions();
  }

  // A new status; also while nobody looks, for the history.
  update(status) {
    this.status = status;
    this.lost = "";
    this.hasStore ||= Boolean(status.kv_store.address);
    this.heat.push(status);
    status.tenants.forEach((tenant) => this.meter(tenant));
    this.draw();
    if (!byId("cluster").hidden && performance.now() > this.sessionsAt + SESSIONS_MS) this.lookAtSessions();
  }

  // Nobody answers: what is shown is from before.
  lose(sentence) {
    this.lost = `${sentence} What stands here is from before.`;
    this.draw();
  }

  draw() {
    const { status } = this;
    if (!status || byId("cluster").hidden) return;
    say(byId("model"), status.model || "No model yet");
    say(byId("about"), [status.kind, status.experts, `context ${count(status.context_tokens)}`].filter(Boolean).join(", "));
    const reason = this.lost || status.reason;
    byId("cluster").classList.toggle("stale", Boolean(this.lost));
    byId("reason").hidden = !reason;
    say(byId("reason"), reason);
    keep(byId("numbers"), numbersOf(status), ([name]) => name, numberTile);
    this.heat.draw();
    keep(byId("parts"), partsOf(status, this.heat.rates, this.heat.most), ({ title }) => title, partCard);
    showRows("tenants", TENANT, status.tenants.map((tenant) => this.tenantRow(tenant)));
  }

  meter({ tenant, output_tokens: tokens }) {
    const { measured_at: at } = this.status;
    const before = this.meters.get(tenant) ?? { tokens, at: 0 };
    if (before.at === at) return;
    const rate = Math.max(0, tokens - before.tokens) / (at - before.at);
    this.meters.set(tenant, { tokens, at, rate });
  }

  tenantRow(tenant) {
    const { tenant: key, num_running, num_waiting, prompt_tokens, output_tokens, kv_bytes } = tenant;
    const counts = [num_running, num_waiting, this.meters.get(key).rate, prompt_tokens, output_tokens];
    const stored = key in this.stored ? bytes(this.stored[key]) : "–";
    return { key, cells: [key, ...counts.map(count), bytes(kv_bytes), stored] };
  }

  async lookAtSessions() {
    if (!this.hasStore) return this.showSessions([], this.status.ready ? NO_STORE : "");
    this.sessionsAt = performance.now();
    const { meters } = this;
    try {
      const { sessions, stored_bytes: stored } = await ask("api/sessions");
      if (meters !== this.meters) return; // somebody else is here now
      this.stored = stored;
      this.showSessions(sessions, sessions.length ? "" : NO_SESSIONS);
    } catch (error) {
      this.showSessions([], error.message);
    }
  }

  showSessions(sessions, words) {
    say(byId("no-sessions"), words);
    byId("sessions").hidden = !sessions.length;
    showRows("sessions", SESSION, sessions.map((session) => this.sessionRow(session)));
  }

  sessionRow(session) {
    const { name: key, tokens_in_memory: inMemory, missing_values: missing } = session;
    const where = inMemory ? `memory, ${count(inMemory)} tokens` : inMemory === 0 ? "Redis (parked)" : "Redis";
    const lack = missing ? `; ${count(missing)} values are missing` : "";
    const used = ago(Date.now() / 1000 - session.last_used);
    return {
      key,
      cells: [key, count(session.num_tokens), bytes(session.num_bytes), used, where + lack],
      actions: { Park: () => this.change("PUT", "api/sessions/parked", key), Delete: () => this.remove(key) },
      isDone: { Park: inMemory === 0 },
    };
  }

  async remove(name) {
    if (!confirm(`Delete the session “${name}”? Nothing brings it back.`)) return;
    await this.change("DELETE", "api/sessions", name);
  }

  async change(method, path, name) {
    say(byId("failure"), "");
    try {
      await ask(`${path}?name=${encodeURIComponent(name)}`, { method });
      await this.lookAtSessions();
    } catch (error) {
      say(byId("failure"), error.message);
    }
  }
}

// A table of { key, cells, actions, isDone }.
function showRows(id, columns, rows) {
  const table = byId(id);
  if (!table.tHead) {
    const heads = columns.map((name) => el("th", { scope: "col" }, name));
    table.append(el("thead", {}, el("tr", {}, ...heads)), el("tbody"));
  }
  keep(table.tBodies[0], rows, ({ key }) => key, ({ key, cells, actions = {} }) => {
    const fields = cells.map((_, i) => (i ? el("td") : el("th", { scope: "row" })));
    const row = el("tr", {}, ...fields);
    const buttons = Object.entries(actions).map(([words, act]) => button(words, act, { "aria-label": `${words} ${key}` }));
    if (buttons.length) row.append(el("td", {}, ...buttons));
    const show = ({ cells: now, isDone = {} }) => {
      fields.forEach((field, i) => say(field, now[i]));
      for (const one of buttons) one.disabled = Boolean(isDone[one.textContent]);
    };
    return [row, show];
  });
}

function numbersOf({ load, expert_calls: calls }) {
  const share = (part, all) => `${all ? Math.round((100 * part) / all) : 0} %`;
  const numbers = [
    ["Running", count(load.num_running)],
    ["Waiting", count(load.num_waiting)],
    ["Tokens/s", count(load.decode_tokens_per_s), "when last busy"],
    ["Prefixes found", share(load.prefix_hits, load.prefix_queries), `${count(load.cached_tokens)} tokens not computed again`],
  ];
  if (calls.num_calls) {
    numbers.push(["Expert call", seconds(calls.p50_s), `p99 ${seconds(calls.p99_s)}, ${count(calls.num_retries)} retried`]);
    numbers.push(["Hidden", share(calls.hidden_share, 1), "of the experts’ time"]);
  }
  return numbers;
}

function numberTile([name]) {
  const value = el("span", { class: "value" });
  const more = muted();
  const show = ([, number, words = ""]) => {
    say(value, number);
    say(more, words);
  };
  return [el("div", {}, el("dt", {}, name), el("dd", {}, value, more)), show];
}
