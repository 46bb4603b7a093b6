// The processes as cards: where each runs and what lives on it.

import { bytes, count, el, keep, say } from "./dom.js";

// What the cards show, of a status and of the groups' choices per second.
export function partsOf(status, rates, most) {
  const heats = new Map(status.group_load.map(({ group_id: id }, index) => [id, { id, rate: rates[index] ?? 0, most }]));
  const groupsOf = (ids) => ids.map((id) => heats.get(id) ?? { id, rate: 0, most: 0 });
  const hosts = status.expert_hosts;
  const parts = [
    {
      id: "decoder",
      title: "Decoder",
      role: "attention, dense MLPs, KV cache, sampler",
      facts: processFacts(status.decoder),
      bars: status.load.kv_blocks.map(kvBar),
      groups: hosts.length ? [] : groupsOf([...heats.keys()]),
    },
    ...hosts.map((host) => hostPart(host, groupsOf(host.group_ids))),
    { id: "gateway", title: "Gateway", role: "gRPC, HTTP, this page", facts: processFacts(status.gateway), bars: [], groups: [] },
  ];
  if (status.kv_store.address) parts.push(storePart(status.kv_store));
  return parts;
}

function hostPart(host, groups) {
  const problem = !host.part.pid ? "not running" : host.link ? "" : "link down";
  if (problem) groups = groups.map(({ id }) => ({ id })); // another copy answers
  const facts = processFacts(host.part);
  if (host.visible_devices) facts.push(["Card", host.visible_devices]);
  return { id: `host ${host.host_id}`, title: host.host_id, role: "experts", tag: host.link, problem, facts, bars: [], groups };
}

function processFacts({ pid, device, kernels, metrics_port: port }) {
  const facts = [["Device", device || "–"], ["Process", pid ? String(pid) : "–"]];
  if (kernels) facts.push(["Kernels", kernels]);
  if (port) facts.push(["Metrics", `port ${port}`]);
  return facts;
}

function kvBar({ group, used, cached, total }) {
  const free = total - used - cached;
  return {
    name: `KV ${group}`,
    shares: [used / total, cached / total],
    words: `${count(used)} used, ${count(cached)} cached, ${count(free)} free`,
  };
}

function storePart(store) {
  const problem = !store.up ? "doesn’t answer" : store.writable ? "" : "refuses to store more";
  const size = store.max_bytes ? `${bytes(store.used_bytes)} of ${bytes(store.max_bytes)}` : bytes(store.used_bytes);
  return {
    id: "redis",
    title: "Redis",
    role: "contexts and sessions",
    problem,
    facts: [
      ["Address", store.address],
      ["Waits to be written", bytes(store.queue_bytes)],
      ["Prefixes", `${count(store.fetched)} fetched, ${count(store.recomputed)} computed instead`],
    ],
    bars: [{ name: "Memory", shares: [store.max_bytes ? store.used_bytes / store.max_bytes : 0], words: size }],
    groups: [],
  };
}

// A card, for `keep`.
export function partCard({ id, title }) {
  const tag = el("span", { class: "tag" });
  const problem = el("span", { class: "tag bad" });
  const role = el("p", { class: "muted" });
  const facts = el("dl", { class: "facts" });
  const bars = el("div");
  const groups = el("ul", { class: "groups", "aria-label": "Expert groups" });
  const show = (part) => {
    say(role, part.role);
    say(tag, part.tag ?? "");
    say(problem, part.problem ?? "");
    keep(facts, part.facts, ([name]) => name, fact);
    keep(bars, part.bars, ({ name }) => name, bar);
    keep(groups, part.groups, (group) => group.id, groupChip);
    groups.hidden = !part.groups.length;
  };
  show.node = el("article", { class: "card part", "data-part": id }, el("h3", {}, title, tag, problem), role, groups, bars, facts);
  return show;
}

function fact([name]) {
  const value = el("dd");
  const show = ([, words]) => say(value, words);
  show.node = el("div", {}, el("dt", {}, name), value);
  return show;
}

function bar({ name, shares }) {
  const words = el("span", { class: "muted" });
  const parts = shares.map((_, index) => el("span", { class: index ? "cached" : "used" }));
  const show = (now) => {
    say(words, now.words);
    parts.forEach((part, index) => (part.style.width = `${100 * now.shares[index]}%`));
  };
  show.node = el("div", { class: "bar" }, el("p", {}, `${name} `, words), el("div", { "aria-hidden": "true" }, ...parts));
  return show;
}

function groupChip({ id }) {
  const rate = el("span", { class: "muted" });
  const node = el("li", {}, `group ${id} `, rate);
  const show = (group) => {
    say(rate, group.rate === undefined ? "" : `${count(group.rate)}/s`);
    node.style.setProperty("--heat", `${Math.round((100 * group.rate) / group.most) || 0}%`);
  };
  show.node = node;
  return show;
}
