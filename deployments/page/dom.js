// Elements without markup: what a model or a server says is only ever text.

// An element with attributes, listeners (onclick: …) and children, which are nodes or texts.
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const byId = (id) => document.getElementById(id);

// Set a text only where it is new, so that a selection in it stays.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Make the children of a node those of `items`, keeping a child as long as its key is there: focus
// and selection survive an update. `make(item)` returns a function that shows an item, with the
// child as its `node`.
export function keep(parent, items, keyOf, make) {
  parent.shown ??= new Map();
  const keys = new Set(items.map(keyOf));
  for (const [key, show] of parent.shown) {
    if (keys.has(key)) continue;
    show.node.remove();
    parent.shown.delete(key);
  }
  items.forEach((item, index) => {
    const key = keyOf(item);
    if (!parent.shown.has(key)) parent.shown.set(key, make(item));
    const show = parent.shown.get(key);
    if (parent.children[index] !== show.node) parent.insertBefore(show.node, parent.children[index] ?? null);
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
