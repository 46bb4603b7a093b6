// Elements without markup: what a model or a server says is only ever text.

// An element with attributes, listeners (onclick: …) and children, which are nodes or texts.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const button = (words, onclick, attributes = {}) =>
  el("button", { type: "button", onclick, ...attributes }, words);

export const muted = () => el("span", { class: "muted" });

export const byId = (id) => document.getElementById(id);

export const on = (id, event, listener) => byId(id).addEventListener(event, listener);

// Set a text only where it is new, so that a selection in it stays.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Make the children of a node those of `items`. A child stays as long as its key is there, and with
// it focus and selection. `make(item)` returns a child and a function that shows an item in it.
export function keep(parent, items, keyOf, make) {
  parent.kept ??= new Map();
  const keys = new Set(items.map(keyOf));
  for (const [key, [node]] of parent.kept) {
    if (keys.has(key)) continue;
    node.remove();
    parent.kept.delete(key);
  }
  items.forEach((item, index) => {
    const key = keyOf(item);
    if (!parent.kept.has(key)) parent.kept.set(key, make(item));
    const [node, show] = parent.kept.get(key);
    const there = parent.children[index];
    if (there !== node) parent.insertBefore(node, there ?? null);
    show(item);
  });
}

const whole = new Intl.NumberFormat("en");
export const count = (number) => whole.format(Math.round(number));

export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; number >= 999.5 && unit < 4; unit++) number /= 1000;
  return `${unit ? Number(number.toPrecision(3)) : number} ${units[unit]}`;
}

export function seconds(number) {
  if (number < 0.9995e-3) return `${Math.round(number * 1e6)} µs`;
  if (number < 0.9995) return `${(number * 1e3).toFixed(number < 0.00995 ? 1 : 0)} ms`;
  return `${number.toFixed(number < 10 ? 1 : 0)} s`;
}

export function ago(number) {
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (number >= size) return `${Math.floor(number / size)} ${unit} ago`;
  }
  return `${Math.max(0, Math.floor(number))} s ago`;
}
