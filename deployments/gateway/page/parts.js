// The processes as cards: where each runs and what lives on it.

import { bytes, count, el, keep, muted, say } from "./dom.js";

// What the cards show, of a status and of the groups' choices per second.
export function partsOf({ load, group_load: groupLoad, expert_hosts: hosts, ...status }, rates, most) {
  const groups = new Map(groupLoad.map(({ group_id: id }, i) => [id, { id, rate: rates[i] ?? 0, most }]));
  const parts = [
    {
      title: "Decoder",
      role: "attention, dense MLPs, KV cache, sampler",
      facts: processFacts(status.decoder),
      bars: load.kv_blocks.map(kvBar),
      groups: hosts.length ? [] : [...groups.values()],
    },
    ...hosts.map((host) => hostPart(host, groups)),
    { title: "Gateway", role: "gRPC, HTTP, this page", facts: processFacts(status.gateway) },
  ];
  if (status.kv_store.address) parts.push(storePart(status.kv_store));
  return parts;
}

function hostPart({ host_id: title, part, link, group_ids: ids, visible_devices: card }, groups) {
  const problem = !part.pid ? "not running" : link ? "" : "link down";
  // What a host has that doesn't answer, another one computes.
  const ours = ids.map((id) => (problem ? { id } : groups.get(id) ?? { id }));
  const facts = [...processFacts(part), ...(card ? [["Card", card]] : [])];
  return { title, role: "experts", tag: link, problem, facts, groups: ours };
}

function processFacts({ pid, device, kernels, metrics_port: port }) {
  const facts = [["Device", device], ["Process", pid], ["Kernels", kernels], ["Metrics", port && `port ${port}`]];
  return facts.filter(([, value]) => value);
}

function kvBar({ group, used, cached, total }) {
  const words = `${count(used)} used, ${count(cached)} cached, ${count(total - used - cached)} free`;
  return { name: `KV ${group}`, shares: [used / total, cached / total], words };
}

function storePart({ address, up, writable, used_bytes: used, max_bytes: most, queue_bytes: queue, fetched, recomputed }) {
  return {
    title: "Redis",
    role: "contexts and sessions",
    problem: !up ? "doesn’t answer" : writable ? "" : "refuses to store more",
    facts: [
      ["Address", address],
      ["Waits to be written", bytes(queue)],
      ["Prefixes", `${count(fetched)} fetched, ${count(recomputed)} computed instead`],
    ],
    bars: [{ name: "Memory", shares: [most && used / most], words: bytes(used) + (most ? ` of ${bytes(most)}` : "") }],
  };
}

// A card, for `keep`.
export function partCard({ title }) {
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
    keep(bars, part.bars ?? [], ({ name }) => name, bar);
    keep(groups, part.groups ?? [], ({ id }) => id, groupChip);
  };
  return [el("article", { class: "card" }, el("h3", {}, title, tag, problem), role, groups, bars, facts), show];
}

function fact([name]) {
  const value = el("dd");
  return [el("div", {}, el("dt", {}, name), value), ([, words]) => say(value, String(words))];
}

function bar({ name, shares }) {
  const words = muted();
  const parts = shares.map((_, i) => el("span", { class: i ? "cached" : "used" }));
  const show = (now) => {
    say(words, now.words);
    parts.forEach((part, i) => (part.style.width = `${100 * now.shares[i]}%`));
  };
  return [el("div", { class: "bar" }, el("p", {}, `${name} `, words), el("div", {}, ...parts)), show];
}

function groupChip({ id }) {
  const rate = muted();
  const node = el("li", {}, `group ${id} `, rate);
  const show = (group) => {
    say(rate, group.rate === undefined ? "" : `${count(group.rate)}/s`);
    node.style.setProperty("--heat", `${(100 * group.rate) / group.most || 0}%`);
  };
  return [node, show];
}
