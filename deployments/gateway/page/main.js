// The page's frame: sign-in, the two views, the theme, and the status that both are shown.

import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import { byId, on, say } from "./dom.js";
import { ask, key } from "./server.js";

const PERIOD_MS = 1000; // between two looks at the cluster
const ENDED = "The key isn’t valid any more. Sign in again.";
const THEMES = { auto: "light", light: "dark", dark: "auto" }; // by what goes before

const cluster = new Cluster();
const chat = new Chat(() => isIn && refuse({ status: 401 }));
let isIn = false;

function signIn(why = "") {
  isIn = false;
  cluster.leave();
  for (const id of ["views", "chat", "cluster", "sign-out"]) byId(id).hidden = true;
  byId("sign-in").hidden = false;
  say(byId("sign-in-error"), why);
  showState("", "");
  byId("key").select();
}

async function tryKey(event) {
  event.preventDefault();
  key.set(byId("key").value.trim(), byId("remember").checked);
  await look();
  if (isIn) byId("key").value = "";
}

// Also while nobody answers. What is kept only for this tab is gone.
function signOut() {
  key.forget();
  sessionStorage.clear();
  chat.leave();
  signIn();
}

function goIn(status) {
  isIn = true;
  byId("sign-in").hidden = true;
  byId("views").hidden = false;
  byId("sign-out").hidden = !key.get();
  chat.enter(status);
  showView();
}

function showView() {
  if (!isIn) return;
  const view = location.hash === "#cluster" ? "cluster" : "chat";
  for (const link of byId("views").children) {
    const isCurrent = link.hash === `#${view}`;
    byId(link.hash.slice(1)).hidden = !isCurrent;
    link.ariaCurrent = isCurrent ? "page" : null;
    if (isCurrent) document.title = `${link.textContent} · Briolette`;
  }
  if (view === "chat") chat.focus();
  else cluster.show();
}

async function look() {
  const used = key.get();
  const isLate = () => key.get() !== used; // somebody signed out or in meanwhile
  const status = await ask("api/status", { signal: AbortSignal.timeout(5000) })
    .catch((error) => void (isLate() || refuse(error)));
  if (status && !isLate()) show(status);
}

function show(status) {
  if (!isIn) goIn(status);
  if (status.ready) showState("ready", "Serving");
  else showState("bad", "Not serving");
  chat.update(status);
  cluster.update(status);
}

function refuse({ status, message }) {
  const isAsking = !byId("sign-in").hidden;
  if (status === 401 || status === 403) {
    const why = status === 403 ? message : key.get() === null ? "" : isAsking ? `Wrong key. ${message}` : ENDED;
    key.forget();
    signIn(why);
  } else if (isAsking) {
    signIn(message);
  } else {
    showState("bad", "No connection");
    cluster.lose(message);
  }
}

function showState(kind, words) {
  byId("state").className = kind;
  say(byId("state"), words);
}

// While somebody looks.
async function lookOn() {
  try {
    if (!document.hidden && byId("sign-in").hidden) await look();
  } finally {
    setTimeout(lookOn, PERIOD_MS);
  }
}

function showTheme(theme) {
  document.documentElement.dataset.theme = theme;
  say(byId("theme"), `Theme: ${theme}`);
  cluster.draw();
}

function changeTheme() {
  const next = THEMES[document.documentElement.dataset.theme] ?? "auto";
  localStorage.setItem("briolette.theme", next);
  showTheme(next);
}

on("sign-in", "submit", tryKey);
on("sign-out", "click", signOut);
on("theme", "click", changeTheme);
addEventListener("hashchange", showView);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => cluster.draw());
showTheme(document.documentElement.dataset.theme);
lookOn();
