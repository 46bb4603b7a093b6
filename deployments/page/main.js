// The page's frame: sign-in, the two views, the theme, and the status that both are shown.

import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import { byId, say } from "./dom.js";
import { ask, key } from "./server.js";

const PERIOD_MS = 1000; // between two looks at the cluster

const cluster = new Cluster();
const chat = new Chat({ onUnauthorized: () => signIn("The key isn't valid any more. Sign in again.") });
let isIn = false;

// Sign-in

function signIn(why = "") {
  isIn = false;
  for (const id of ["views", "chat", "cluster", "sign-out"]) byId(id).hidden = true;
  byId("sign-in").hidden = false;
  say(byId("sign-in-error"), why);
  say(byId("state"), "");
  byId("state").className = "";
  byId("key").focus();
}

async function tryKey(event) {
  event.preventDefault();
  key.set(byId("key").value.trim(), byId("remember").checked);
  say(byId("sign-in-error"), "");
  await look();
  if (isIn) byId("key").value = "";
}

function signOut() {
  key.forget();
  chat.leave();
  cluster.leave();
  look();
}

function goIn(status) {
  isIn = true;
  byId("sign-in").hidden = true;
  byId("views").hidden = false;
  byId("sign-out").hidden = !key.get();
  chat.enter(status);
  showView();
}

// The views

function showView() {
  if (!isIn) return;
  const view = location.hash === "#cluster" ? "cluster" : "chat";
  for (const link of byId("views").children) {
    const isCurrent = link.hash === `#${view}`;
    byId(link.hash.slice(1)).hidden = !isCurrent;
    if (isCurrent) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = view === "chat" ? "Chat · Briolette" : "Cluster · Briolette";
  if (view === "chat") chat.focus();
  else cluster.show();
}

// The status, once a second while somebody looks

async function look() {
  try {
    const status = await ask("api/status", { signal: AbortSignal.timeout(5000) });
    if (!isIn) goIn(status);
    showState(status.ready ? "ready" : "unready", status.ready ? "Serving" : "Not serving");
    chat.update(status);
    cluster.update(status);
  } catch (error) {
    if (error.status === 401) {
      const isWrong = key.get() !== null;
      key.forget();
      signIn(isWrong ? `Wrong key. ${error.message}` : "");
    } else if (error.status === 403) {
      signIn(error.message);
    } else {
      say(byId("sign-in-error"), error.message);
      showState("away", "No connection");
      cluster.lose(error.message);
    }
  }
}

function showState(kind, words) {
  byId("state").className = kind;
  say(byId("state"), words);
}

async function lookOn() {
  const isSigningIn = !byId("sign-in").hidden;
  if (!document.hidden && !isSigningIn) await look();
  setTimeout(lookOn, PERIOD_MS);
}

// The theme

const THEMES = { auto: "light", light: "dark", dark: "auto" };

function showTheme() {
  const theme = document.documentElement.dataset.theme;
  say(byId("theme"), `Theme: ${theme}`);
  cluster.draw();
}

function changeTheme() {
  const next = THEMES[document.documentElement.dataset.theme] ?? "auto";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("briolette.theme", next);
  showTheme();
}

byId("sign-in").addEventListener("submit", tryKey);
byId("sign-out").addEventListener("click", signOut);
byId("theme").addEventListener("click", changeTheme);
addEventListener("hashchange", showView);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
showTheme();
lookOn();
