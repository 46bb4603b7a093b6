// The heat of the expert groups over time: a history kept here, drawn as a row for each group.

import { byId, count, el, keep, muted, say } from "./dom.js";

const SECONDS = 120; // that are shown
const STEPS = { ArrowLeft: [0, 1], ArrowRight: [0, -1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, SECONDS], End: [0, -SECONDS] };

export class Heat {
  constructor() {
    this.clear();
    this.groups = []; // { id, hosts }
    this.cursor = null; // { row, back }: a group, and how many seconds ago
    this.map = byId("map");
    this.map.addEventListener("pointermove", (event) => this.point(event));
    this.map.addEventListener("keydown", (event) => this.step(event));
    for (const end of ["pointerleave", "blur"]) this.map.addEventListener(end, () => this.read(null));
    new ResizeObserver(() => this.draw()).observe(this.map);
  }

  clear() {
    this.samples = []; // { since, until, rates }: choices per second by group, between two times
    this.most = 0; // of all rates
    this.last = undefined;
  }

  // Take in a status. A group that nobody holds has no hosts.
  push({ measured_at: until, group_load: load, expert_hosts: hosts }) {
    this.groups = load.map(({ group_id: id }) => ({
      id,
      hosts: hosts.filter((host) => host.group_ids.includes(id)).map((host) => host.host_id),
    }));
    const now = load.map((group) => group.choices);
    const last = this.last ?? { until, now };
    this.last = { until, now };
    const elapsed = until - last.until;
    const grown = now.map((n, i) => n - last.now[i]);
    if (!(elapsed > 0 && grown.every((n) => n >= 0))) return; // the same, or another decoder's
    this.samples.push({ since: last.until, until, rates: grown.map((n) => n / elapsed) });
    while (this.samples[0].until < until - SECONDS) this.samples.shift();
    this.most = Math.max(0, ...this.samples.flatMap(({ rates }) => rates));
  }

  // Choices per second of each group, as seen last.
  get rates() {
    return this.samples.at(-1)?.rates ?? [];
  }

  draw() {
    byId("heat").hidden = !this.groups.length;
    say(byId("most-heat"), `${count(this.most)} choices/s`);
    keep(this.map, [...this.groups.entries()], ([row]) => row, ([row, { id }]) => this.makeRow(row, id));
    if (this.cursor) this.read(this.cursor);
  }

  makeRow(row, id) {
    const where = muted();
    const canvas = el("canvas");
    const rate = el("span", { class: "rate" });
    const show = ([, { hosts }]) => {
      say(where, hosts.join(", "));
      say(rate, `${count(this.rates[row] ?? 0)}/s`);
      this.paint(canvas, row);
    };
    return [el("div", { class: "row" }, el("span", {}, `group ${id} `, where), canvas, rate), show];
  }

  paint(canvas, row) {
    const { clientWidth: width, clientHeight: height } = canvas;
    const { color, caretColor } = getComputedStyle(canvas);
    const context = canvas.getContext("2d");
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    context.scale(devicePixelRatio, devicePixelRatio);
    context.fillStyle = color;
    const { most } = this;
    const end = this.last?.until ?? 0;
    const x = (time) => width * (1 - (end - time) / SECONDS);
    for (const { since, until, rates } of this.samples) {
      const share = most ? rates[row] / most : 0;
      const tall = share ? Math.max(2, share * height) : 0; // can be read without colour
      context.globalAlpha = 0.2 + 0.8 * share;
      context.fillRect(x(since), height - tall, Math.max(1, x(until) - x(since) - 0.75), tall);
    }
    if (this.cursor?.row !== row) return;
    context.globalAlpha = 1;
    context.fillStyle = caretColor;
    context.fillRect(x(end - this.cursor.back) - 1, 0, 2, height);
  }

  // Reading numbers

  point({ clientX, target }) {
    const line = target.closest(".row");
    if (!line) return;
    const { right, width } = line.querySelector("canvas").getBoundingClientRect();
    this.move([...this.map.children].indexOf(line), ((right - clientX) / width) * SECONDS);
  }

  step(event) {
    const [down, earlier] = STEPS[event.key] ?? [];
    if (down === undefined) return;
    event.preventDefault();
    if (this.cursor) this.move(this.cursor.row + down, this.cursor.back + earlier);
    else this.move(0, 0.5);
  }

  move(row, back) {
    const within = (value, most) => Math.min(most, Math.max(0, value));
    this.read({ row: within(row, this.groups.length - 1), back: within(back, SECONDS) });
  }

  read(cursor) {
    this.cursor = cursor;
    [...this.map.querySelectorAll("canvas")].forEach((canvas, row) => this.paint(canvas, row));
    say(byId("reading"), cursor ? this.words(cursor) : "");
  }

  words({ row, back }) {
    const time = (this.last?.until ?? 0) - back;
    const sample = this.samples.find(({ since, until }) => since <= time && time <= until);
    const when = back < 1 ? "now" : `${Math.round(back)} s ago`;
    return `group ${this.groups[row].id}, ${when}: ${sample ? `${count(sample.rates[row])} choices/s` : "not seen"}`;
  }
}
