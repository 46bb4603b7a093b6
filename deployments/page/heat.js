// The heat of the expert groups over time: a history kept here, drawn as a row for each group.

import { byId, count, el, keep, say } from "./dom.js";

const SECONDS = 120; // that are shown
const ROW_PX = 26;

export class Heat {
  constructor() {
    this.samples = []; // { since, until, rates }: choices per second by group, between two times
    this.groups = []; // { id, hosts }
    this.cursor = null; // { row, back }: a group and how many seconds ago
    this.map = byId("map");
    this.map.addEventListener("pointermove", (event) => this.point(event));
    this.map.addEventListener("pointerleave", () => this.read(null));
    this.map.addEventListener("keydown", (event) => this.step(event));
    this.map.addEventListener("blur", () => this.read(null));
    new ResizeObserver(() => this.draw()).observe(this.map);
  }

  // Take in a status. Groups that nobody holds have no hosts.
  push({ measured_at: until, group_load: load, expert_hosts: hosts }) {
    this.groups = load.map(({ group_id: id }) => ({
      id,
      hosts: hosts.filter((host) => host.group_ids.includes(id)).map((host) => host.host_id),
    }));
    const now = load.map((group) => group.choices);
    const { last } = this;
    this.last = { until, now };
    if (!last || last.until === until) return;
    const elapsed = until - last.until;
    const isGoingOn = elapsed > 0 && now.length === last.now.length && now.every((n, i) => n >= last.now[i]);
    if (!isGoingOn) return; // another decoder
    this.samples.push({ since: last.until, until, rates: now.map((n, i) => (n - last.now[i]) / elapsed) });
    while (this.samples[0].until < until - SECONDS) this.samples.shift();
  }

  clear() {
    this.samples = [];
    this.last = undefined;
  }

  // Choices per second of each group, as seen last.
  get rates() {
    return this.samples.at(-1)?.rates ?? this.groups.map(() => 0);
  }

  get most() {
    return Math.max(0, ...this.samples.flatMap((sample) => sample.rates));
  }

  draw() {
    byId("heat").hidden = !this.groups.length;
    const { rates, most } = this;
    say(byId("most"), `${count(most)} choices/s`);
    const rows = this.groups.map((group, row) => ({ ...group, row, rate: rates[row] ?? 0 }));
    keep(this.map, rows, ({ id }) => id, (group) => this.makeRow(group));
    if (this.cursor) this.read(this.cursor);
  }

  makeRow({ id }) {
    const where = el("span", { class: "muted" });
    const canvas = el("canvas", { height: ROW_PX });
    const rate = el("span", { class: "rate" });
    const show = ({ hosts, row, rate: now }) => {
      say(where, hosts.join(", "));
      say(rate, `${count(now)}/s`);
      this.paint(canvas, row);
    };
    show.node = el("div", { class: "heat-row" }, el("span", {}, `group ${id} `, where), canvas, rate);
    return show;
  }

  paint(canvas, row) {
    const { clientWidth: width, clientHeight: height } = canvas;
    const scale = devicePixelRatio;
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    context.fillStyle = getComputedStyle(canvas).color;
    const { most } = this;
    const end = this.samples.at(-1)?.until ?? 0;
    const x = (time) => width * (1 - (end - time) / SECONDS);
    for (const { since, until, rates } of this.samples) {
      const share = most ? rates[row] / most : 0;
      context.globalAlpha = 0.2 + 0.8 * share;
      const tall = rates[row] ? Math.max(2, share * height) : 0; // readable without colour
      context.fillRect(x(since), height - tall, Math.max(1, x(until) - x(since) - 0.75), tall);
    }
    if (this.cursor?.row === row) {
      context.globalAlpha = 1;
      context.fillStyle = getComputedStyle(canvas).caretColor;
      context.fillRect(x(end - this.cursor.back) - 1, 0, 2, height);
    }
  }

  // Reading numbers

  point({ clientX, target }) {
    const line = target.closest(".heat-row");
    if (!line) return;
    const box = line.querySelector("canvas").getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (box.right - clientX) / box.width));
    this.read({ row: [...this.map.children].indexOf(line), back: share * SECONDS });
  }

  step(event) {
    const moves = { ArrowLeft: [0, 1], ArrowRight: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, SECONDS], End: [0, -SECONDS] };
    const move = moves[event.key];
    if (!move) return;
    event.preventDefault();
    const { row, back } = this.cursor ?? { row: 0, back: 0.5 };
    const within = (value, most) => Math.min(most, Math.max(0, value));
    const [down, earlier] = this.cursor ? move : [0, 0];
    this.read({ row: within(row + down, this.groups.length - 1), back: within(back + earlier, SECONDS) });
  }

  read(cursor) {
    this.cursor = cursor;
    for (const [row, line] of [...this.map.children].entries()) this.paint(line.querySelector("canvas"), row);
    say(byId("reading"), cursor ? this.words(cursor) : "");
  }

  words({ row, back }) {
    const time = (this.samples.at(-1)?.until ?? 0) - back;
    const sample = this.samples.find(({ since, until }) => since <= time && time <= until);
    const { id } = this.groups[row];
    const when = back < 1 ? "now" : `${Math.round(back)} s ago`;
    return `group ${id}, ${when}: ${sample ? `${count(sample.rates[row])} choices/s` : "not seen"}`;
  }
}
