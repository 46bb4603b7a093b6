// Markdown as DOM nodes: model text never becomes markup, whatever stands in it.

import { button, el } from "./dom.js";

const DEEPEST = 8; // lists and quotes in each other; deeper ones stay text

// Show a text in a node. Called again with a longer text, it only makes anew what has changed.
export function showMarkdown(node, text) {
  const blocks = split(text.replaceAll("\r\n", "\n"), 0);
  const before = node.blocks ?? [];
  let same = 0;
  while (same < before.length && before[same] === blocks[same]?.source) same++;
  while (node.childNodes.length > same) node.lastChild.remove();
  node.append(...blocks.slice(same).map(({ make }) => make()));
  node.blocks = blocks.map(({ source }) => source);
}

const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const ROW = /\|/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

// The blocks of a text, each with its source and a function that makes its element.
function split(text, depth) {
  const lines = text.split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const [end, make] = lines[at].trim() ? block(lines, at, depth) : [at + 1];
    if (make) blocks.push({ source: lines.slice(at, end).join("\n"), make });
    at = end;
  }
  return blocks;
}

const nodes = (text, depth) => split(text, depth).map(({ make }) => make());

// The block that begins at a line: where it ends, and how to make it.
function block(lines, at, depth) {
  const line = lines[at];
  const isDeep = depth >= DEEPEST;
  let match;
  if ((match = FENCE.exec(line))) return fence(lines, at, match);
  if ((match = HEADING.exec(line))) {
    const level = Math.min(6, match[1].length + 1); // the page has a title of its own
    return [at + 1, () => el(`h${level}`, {}, ...inline(match[2]))];
  }
  if (RULE.test(line)) return [at + 1, () => el("hr")];
  if (QUOTE.test(line) && !isDeep) {
    const end = endOf(lines, at, (next) => next.trim());
    const inner = lines.slice(at, end).map((next) => next.replace(QUOTE, "")).join("\n");
    return [end, () => el("blockquote", {}, ...nodes(inner, depth + 1))];
  }
  if (ITEM.test(line) && !isDeep) return list(lines, at, depth);
  if (ROW.test(line) && DIVIDER.test(lines[at + 1] ?? "")) {
    const end = endOf(lines, at + 2, (next) => ROW.test(next));
    return [end, () => table(lines.slice(at, end))];
  }
  const end = endOf(lines, at + 1, (next) => next.trim() && !(beginsBlock(next) && !isDeep));
  return [end, () => el("p", {}, ...inline(lines.slice(at, end).join("\n").trim()))];
}

const beginsBlock = (line) => [FENCE, HEADING, RULE, QUOTE, ITEM].some((pattern) => pattern.test(line));

function endOf(lines, from, goesOn) {
  let end = from;
  while (end < lines.length && goesOn(lines[end], end)) end++;
  return end;
}

function fence(lines, at, [, marks, language]) {
  const closes = (line) => line.trim().length >= marks.length && !line.trim().replaceAll(marks[0], "");
  const end = endOf(lines, at + 1, (line) => !closes(line));
  const code = lines.slice(at + 1, end).join("\n");
  return [Math.min(end + 1, lines.length), () => codeBlock(code, language)];
}

export function codeBlock(code, language) {
  const copy = button("Copy", copied, { class: "quiet" });
  async function copied() {
    copy.textContent = (await navigator.clipboard?.writeText(code).then(() => "Copied", () => "Not allowed")) ?? "Not allowed";
    setTimeout(() => (copy.textContent = "Copy"), 2000);
  }
  const head = el("div", { class: "code-head" }, el("span", {}, language), copy);
  return el("div", { class: "code" }, head, el("pre", { tabindex: 0 }, el("code", {}, code)));
}

function list(lines, at, depth) {
  const isOrdered = (match) => /\d/.test(match[2]);
  const first = ITEM.exec(lines[at]);
  const items = [];
  let end = at;
  for (let match; (match = ITEM.exec(lines[end] ?? "")) && isOrdered(match) === isOrdered(first); ) {
    const [stop, inner] = item(lines, end, match);
    items.push([lines[end].slice(match[0].length), ...inner].join("\n"));
    end = stop;
  }
  const [tag, attributes] = isOrdered(first) ? ["ol", { start: parseInt(first[2], 10) }] : ["ul", {}];
  return [end, () => el(tag, attributes, ...items.map((text) => itemElement(text, depth + 1)))];
}

// The lines of an item after its first one: those that are indented, and those that just go on.
function item(lines, at, [marker, margin]) {
  const end = endOf(lines, at + 1, (line, index) => {
    if (!line.trim() || line.search(/\S/) >= margin.length + 2) return true;
    return lines[index - 1].trim() && !beginsBlock(line);
  });
  const indent = new RegExp(`^ {0,${marker.length}}`);
  return [end, lines.slice(at + 1, end).map((line) => line.replace(indent, ""))];
}

function itemElement(text, depth) {
  const [first, ...rest] = nodes(text, depth);
  // A tight item is a line, not a paragraph.
  return el("li", {}, ...(first?.tagName === "P" ? first.childNodes : first ? [first] : []), ...rest);
}

function table([head, divider, ...rows]) {
  const cells = (row) =>
    row.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const sides = cells(divider).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "middle" : "right") : "left");
  const line = (tag, row) =>
    el("tr", {}, ...sides.map((side, i) => el(tag, { class: side }, ...inline(cells(row)[i] ?? ""))));
  const body = el("tbody", {}, ...rows.map((row) => line("td", row)));
  return el("div", { class: "scroll", tabindex: 0 }, el("table", {}, el("thead", {}, line("th", head)), body));
}

// What can stand in a line; each pattern is tried where its first character is. No span is longer
// than 2,000 characters: a mark that is never closed costs little.
const SPANS = [
  [/\\([\\`*_{}[\]()#+\-.!|~<>])/y, (match) => match[1]],
  [/(`+)(?!`)([\s\S]{0,2000}?[^`])\1(?!`)/y, (match) => el("code", {}, match[2].replace(/^ (.*) $/, "$1"))],
  [/(\*\*|__)(?=\S)([\s\S]{0,2000}?\S)\1(?!\*)/y, (match) => el("strong", {}, ...inline(match[2]))],
  [/\*(?![\s*])([^*]{0,2000}[^\s*])\*/y, (match) => el("em", {}, ...inline(match[1]))],
  [/(?<!\w)_(?![\s_])([^_]{0,2000}[^\s_])_(?!\w)/y, (match) => el("em", {}, ...inline(match[1]))],
  [/!?\[([^[\]]{0,2000})\]\(\s*<?([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/y, (match) => link(match[2], match[1], match[0])],
  [/(?<!\w)https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_]/y, (match) => link(match[0], match[0], match[0])],
];
const SPECIAL = /[\\`*_![]|https?:\/\//g;

function inline(text) {
  const made = [];
  let plain = 0; // from here on nothing is made yet
  SPECIAL.lastIndex = 0;
  for (let found; (found = SPECIAL.exec(text)); ) {
    const { index } = found;
    for (const [pattern, make] of SPANS) {
      pattern.lastIndex = index;
      const match = pattern.exec(text);
      if (!match) continue;
      const end = pattern.lastIndex; // before `make` looks for spans in this one
      made.push(text.slice(plain, index), make(match));
      plain = end;
      break;
    }
    SPECIAL.lastIndex = Math.max(plain, index + 1);
  }
  return [...made, text.slice(plain)].filter((part) => part !== "");
}

// A link out of the page; as it was written where it leads anywhere else.
function link(address, text, source) {
  const url = URL.canParse(address) ? new URL(address) : undefined;
  if (!["http:", "https:", "mailto:"].includes(url?.protocol)) return source;
  return el("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, text || address);
}
