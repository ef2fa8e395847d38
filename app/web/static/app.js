// What every page has: times that move on, colours, confirmations, and the page kept up to date.
import { morph } from "./morph.js";
import { listen } from "./events.js";

const $ = (selector, root = document) => root.querySelector(selector);

// --- times ---------------------------------------------------------------------------------------------------------

// Of the server: the viewer's clock may be wrong.
const ahead = Date.parse(document.documentElement.dataset.now) - Date.now();

function ago(moment) {
  const seconds = (Date.now() + ahead - Date.parse(moment)) / 1000;
  if (Math.abs(seconds) < 1) return "now";
  const [size, unit] = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]].find(([s]) => Math.abs(seconds) >= s);
  const text = `${Math.floor(Math.abs(seconds) / size)} ${unit}`;
  return seconds > 0 ? `${text} ago` : `in ${text}`;
}

function showTimes() {
  for (const time of document.querySelectorAll("time[data-ago]")) {
    const text = ago(time.dateTime);
    if (time.textContent !== text) time.textContent = text;
  }
  for (const time of document.querySelectorAll("time[data-clock]")) {
    const moment = new Date(time.dateTime);
    const old = Date.now() - moment > 12 * 3600e3;
    time.textContent = old ? moment.toLocaleString() : moment.toLocaleTimeString();
  }
}

showTimes();
setInterval(showTimes, 1000);

// --- the page as the server has it now -----------------------------------------------------------------------------

async function refresh() {
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (answer.redirected && new URL(answer.url).pathname === "/login") return location.assign(answer.url);
  if (!answer.ok) throw new Error(answer.status);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  morph($("#main"), $("#main", fresh));
  document.title = fresh.title;
  // A job that is over has no more events; one that was started again does.
  follow(fresh.body.dataset.events);
  showTimes();
}

let due = Infinity;
let timer = null;
let busy = false;

// One at a time, and one more if something happened meanwhile. The 250 ms: see `first_look` in routes.py.
function refreshIn(wait = 250) {
  due = Math.min(due, Date.now() + wait);
  clearTimeout(timer);
  if (!busy) timer = setTimeout(refreshNow, due - Date.now());
}

async function refreshNow() {
  busy = true;
  due = Infinity;
  let wait = Infinity;
  await refresh().catch(() => (wait = 2000));
  busy = false;
  if (Math.min(due, wait) < Infinity) refreshIn(wait);
}

// The schedule goes on every other second, which is no news to anybody else.
setInterval(() => location.pathname === "/schedule" && live.dataset.state === "live" && refreshIn(), 5000);

let jobs = null;
// What else is in an overview is worth a look now and then: numbers move on, and many may be watching.
function jobsChanged(overview) {
  const before = jobs;
  jobs = JSON.stringify([overview.jobs_version, overview.queues.map(({ queued, running }) => [queued, running])]);
  return jobs !== before;
}

function showProgress(job) {
  const card = $("#progress");
  if (!card || card.dataset.status !== job.status || card.dataset.attempt !== String(job.attempt)) return false;
  if (!job.progress) return true;
  const { current, total, message } = job.progress;
  const bar = $("progress", card);
  if (total) {
    bar.max = total;
    bar.value = Math.min(current, total);
  }
  $(".percent", card).textContent = total ? `${Math.floor((100 * current) / total)} %` : "";
  $(".message", card).textContent = message ?? "";
  return true;
}

// --- live ----------------------------------------------------------------------------------------------------------

const connection = $("#connection");
const live = $("#live");
let stream = null;
let followed = null;

function say(state) {
  if (connection.dataset.state === state) return;
  connection.dataset.state = live.dataset.state = state;
  const since = new Date().toLocaleTimeString();
  connection.textContent = state === "lost" ? `The connection is lost. This is how it was at ${since}. Trying again …` : "";
  live.textContent = { live: "Live", lost: "Not connected", none: "" }[state];
}

function follow(path) {
  if (path === followed) return;
  stream?.stop();
  followed = path;
  stream = null;
  if (!path) return say("none");
  stream = listen(path, {
    state: say,
    event(name, data) {
      if (name === "overview") refreshIn(jobsChanged(data) ? 250 : 5000);
      else if (!showProgress(data)) refreshIn();
    },
  });
}

follow(document.body.dataset.events);

// --- what people do ------------------------------------------------------------------------------------------------

export async function send(method, path, body, headers = {}) {
  const json = body === undefined ? {} : { body: JSON.stringify(body), headers: { "Content-Type": "application/json", ...headers } };
  const answer = await fetch(path, { method, ...json });
  if (answer.status === 401) location.assign(`/login?next=${encodeURIComponent(location.pathname + location.search)}`);
  const result = await answer.json().catch(() => ({ detail: `The server answered ${answer.status}.` }));
  if (!answer.ok) throw result;
  return result;
}

export const reason = (error) => error.detail ?? "The server does not answer. Try again in a moment.";

const dialog = $("#confirm");
let wanted = null;

function confirm(button) {
  const { title, text, yes } = button.dataset;
  wanted = button.dataset.post;
  $("h2", dialog).textContent = title;
  $("p", dialog).textContent = text;
  $(".primary", dialog).textContent = yes;
  $(".wrong", dialog).hidden = true;
  dialog.showModal();
}

dialog.addEventListener("submit", async (event) => {
  if (event.submitter?.value !== "yes") return;
  event.preventDefault();
  event.submitter.disabled = true;
  try {
    await send("POST", wanted);
    await refresh();
    dialog.close();
    $("#main").focus();
  } catch (error) {
    const wrong = $(".wrong", dialog);
    wrong.textContent = reason(error);
    wrong.hidden = false;
  } finally {
    event.submitter.disabled = false;
  }
});

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-post], button[data-start], button[data-copy]");
  if (!button) return;
  if (button.dataset.post) return confirm(button);
  if (button.dataset.copy) {
    await navigator.clipboard.writeText($(button.dataset.copy).textContent);
    button.textContent = "copied";
    return;
  }
  button.disabled = true;
  try {
    const job = await send("POST", "/api/jobs", JSON.parse(button.dataset.start));
    location.assign(`/jobs/${job.id}`);
  } catch (error) {
    button.textContent = reason(error);
  }
});

// Filters work at once; where no script runs there is their button.
document.addEventListener("change", (event) => {
  if (event.target.matches("form[data-auto] select")) event.target.form.requestSubmit();
});

// --- colours -------------------------------------------------------------------------------------------------------

const themes = { system: "as the system", light: "light", dark: "dark" };
const toggle = $("#theme");
const named = () => document.documentElement.dataset.theme ?? "system";
const label = () => toggle.setAttribute("aria-label", `Colours: ${themes[named()]}`);

toggle.addEventListener("click", () => {
  const names = Object.keys(themes);
  const next = names[(names.indexOf(named()) + 1) % names.length];
  if (next === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("theme");
  } else {
    document.documentElement.dataset.theme = next;
    localStorage.setItem("theme", next);
  }
  label();
});
label();
