// The cluster: where its parts run, how warm the expert groups are, who uses it, what is kept.

import { ago, byId, bytes, count, el, keep, say, seconds } from "./dom.js";
import { Heat } from "./heat.js";
import { partCard, partsOf } from "./parts.js";
import { ask } from "./server.js";

const SESSIONS_MS = 5000; // between two looks at them

export class Cluster {
  constructor() {
    this.heat = new Heat();
    this.rates = new Map(); // tenant -> { tokens, at, perSecond }
    this.stored = {}; // bytes of Redis by tenant
    this.nextSessions = 0;
  }

  leave() {
    this.heat.clear();
    this.rates.clear();
    this.nextSessions = 0;
    keepRows("sessions", [], []);
  }

  show() {
    this.nextSessions = 0;
    this.draw();
  }

  // A new status; also while nobody looks, for the history.
  update(status) {
    this.status = status;
    this.heat.push(status);
    this.meter(status);
    this.draw();
    if (this.isShown && performance.now() > this.nextSessions) this.lookAtSessions();
  }

  lose(sentence) {
    this.showReason(sentence);
  }

  get isShown() {
    return !byId("cluster").hidden;
  }

  draw() {
    if (!this.status || !this.isShown) return;
    const { status } = this;
    const experts = status.experts ? `, ${status.experts}` : "";
    say(byId("model"), status.model || "No model yet");
    say(byId("about"), `${status.kind}${experts}, context ${count(status.context_tokens)}`);
    this.showReason(status.reason);
    keep(byId("numbers"), numbersOf(status), ([name]) => name, numberTile);
    const { rates, most } = this.heat;
    keep(byId("parts"), partsOf(status, rates, most), ({ id }) => id, partCard);
    this.heat.draw();
    keepRows("tenants", TENANT_COLUMNS, status.tenants.map((tenant) => this.tenantRow(tenant)));
  }

  showReason(sentence) {
    byId("reason").hidden = !sentence;
    say(byId("reason"), sentence);
  }

  // Tenants

  meter({ tenants, measured_at: at }) {
    for (const { tenant, output_tokens: tokens } of tenants) {
      const before = this.rates.get(tenant);
      if (before?.at === at) continue;
      const perSecond = before && tokens >= before.tokens ? (tokens - before.tokens) / (at - before.at) : 0;
      this.rates.set(tenant, { tokens, at, perSecond });
    }
  }

  tenantRow(tenant) {
    return {
      key: tenant.tenant,
      cells: [
        tenant.tenant,
        count(tenant.num_running),
        count(tenant.num_waiting),
        count(this.rates.get(tenant.tenant)?.perSecond ?? 0),
        count(tenant.prompt_tokens),
        count(tenant.output_tokens),
        bytes(tenant.kv_bytes),
        tenant.tenant in this.stored ? bytes(this.stored[tenant.tenant]) : "–",
      ],
    };
  }

  // Sessions

  async lookAtSessions() {
    this.nextSessions = performance.now() + SESSIONS_MS;
    try {
      const { sessions, stored_bytes: stored } = await ask("api/sessions");
      this.stored = stored;
      this.showSessions(sessions);
    } catch (error) {
      this.showSessions([], error.message);
    }
  }

  showSessions(sessions, why = "There are none. One begins with the field “session” of a request, or with briolette chat --session NAME.") {
    byId("sessions").hidden = !sessions.length;
    byId("no-sessions").hidden = sessions.length > 0;
    say(byId("no-sessions"), sessions.length ? "" : why);
    keepRows("sessions", SESSION_COLUMNS, sessions.map((session) => this.sessionRow(session)));
  }

  sessionRow(session) {
    const { name, tokens_in_memory: inMemory } = session;
    const isParked = inMemory === 0;
    const where = inMemory === null ? "Redis" : isParked ? "Redis (parked)" : `memory, ${count(inMemory)} tokens`;
    const lack = session.missing_values ? `; ${count(session.missing_values)} values are missing` : "";
    return {
      key: name,
      cells: [name, count(session.num_tokens), bytes(session.num_bytes), ago(Date.now() / 1000 - session.last_used), where + lack],
      actions: [
        ["Park", `Park ${name}: free the memory that holds it`, () => this.change("PUT", "api/sessions/parked", name), isParked],
        ["Delete", `Delete ${name}`, () => this.remove(name)],
      ],
    };
  }

  async remove(name) {
    say(byId("confirm-text"), `Delete the session “${name}” from memory and from Redis? Nothing brings it back.`);
    byId("confirm").returnValue = "no";
    byId("confirm").showModal();
    await new Promise((resolve) => byId("confirm").addEventListener("close", resolve, { once: true }));
    if (byId("confirm").returnValue === "yes") await this.change("DELETE", "api/sessions", name);
  }

  async change(method, path, name) {
    try {
      await ask(`${path}?name=${encodeURIComponent(name)}`, { method });
      await this.lookAtSessions();
    } catch (error) {
      this.showReason(error.message);
    }
  }
}

const TENANT_COLUMNS = ["Tenant", "Running", "Waiting", "Tokens/s", "Tokens read", "Tokens written", "KV in memory", "KV in Redis"];
const SESSION_COLUMNS = ["Session", "Tokens", "Size", "Used", "Where", ""];

// A table whose rows stay while their key is there: { key, cells, actions }.
function keepRows(id, columns, rows) {
  const table = byId(id);
  if (!table.tHead) {
    table.append(
      el("thead", {}, el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody"),
    );
  }
  keep(table.tBodies[0], rows, ({ key }) => key, ({ cells, actions = [] }) => {
    const fields = cells.map((_, index) => el(index ? "td" : "th", index ? {} : { scope: "row" }));
    const buttons = actions.map(([words, label, act]) => el("button", { type: "button", "aria-label": label, onclick: act }, words));
    const node = el("tr", {}, ...fields, ...(buttons.length ? [el("td", { class: "actions" }, ...buttons)] : []));
    const show = (row) => {
      fields.forEach((field, index) => say(field, row.cells[index]));
      buttons.forEach((button, index) => (button.disabled = row.actions[index][3] === true));
    };
    show.node = node;
    return show;
  });
}

function numbersOf({ load, expert_calls: calls }) {
  const found = load.prefix_queries ? Math.round((100 * load.prefix_hits) / load.prefix_queries) : 0;
  const numbers = [
    ["Running", count(load.num_running), ""],
    ["Waiting", count(load.num_waiting), ""],
    ["Tokens/s", count(load.decode_tokens_per_s), "when last busy"],
    ["Prefixes found", `${found} %`, `${count(load.cached_tokens)} tokens not computed again`],
  ];
  if (calls.num_calls) {
    numbers.push(["Expert call", seconds(calls.p50_s), `p99 ${seconds(calls.p99_s)}, ${count(calls.num_retries)} retried`]);
    numbers.push(["Hidden", `${Math.round(100 * calls.hidden_share)} %`, "of the experts’ time"]);
  }
  return numbers;
}

function numberTile([name]) {
  const value = el("span", { class: "value" });
  const more = el("span", { class: "muted" });
  const show = ([, number, words]) => {
    say(value, number);
    say(more, words);
  };
  show.node = el("div", {}, el("dt", {}, name), el("dd", {}, value, more));
  return show;
}
