// Start of the page: follows the stream, and gives each part what it shows.

import { byId, setHidden } from "./dom.js";
import { clock, duration } from "./format.js";
import { follow, setKey } from "./connection.js";
import { forgetColours } from "./chart.js";
import { Overview } from "./overview.js";
import { Fleet } from "./fleet.js";
import { Charts } from "./charts.js";
import { Decisions } from "./decisions.js";
import { Configuration, Quality } from "./quality.js";

const fleet = new Fleet();
const overview = new Overview((name) => fleet.open(name));
const charts = new Charts();
const quality = new Quality();
const decisions = new Decisions((known) => quality.decisions(known));
const configuration = new Configuration();

const workers = new Map();
let router = null;
let lastSeen = null;

function setConnection(state, text) {
  if (byId("connection").dataset.state === state) return;
  byId("connection").textContent = text;
  byId("connection").dataset.state = state;
  document.body.dataset.connection = state;
}

function showAbout(time) {
  const { version, policy, queue, models } = router;
  const about = [`${version}`, policy, `queue ${queue ?? "off"}`, models.slice(0, 2).join(", ") + (models.length > 2 ? ` and ${models.length - 2} more` : ""),
    `up ${duration(time - router.started)}`].filter(Boolean).join(" · ");
  if (byId("about").textContent !== about) byId("about").textContent = about;
}

async function start(snapshot) {
  const isNew = !router;
  const isOther = router && router.started !== snapshot.started;
  router = snapshot;
  workers.clear();
  for (const worker of snapshot.workers) workers.set(worker.name, worker);
  fleet.reset(snapshot.workers);
  // A stream that begins again after some minutes does not disturb the reader of a decision.
  if (isNew || isOther) decisions.reset(snapshot.decisions);
  else decisions.update(snapshot.decisions);
  quality.update(snapshot.quality);
  if (isOther) fleet.close();
  show(snapshot);
  try {
    fleet.setHistory(await charts.load());
    await configuration.load();
    show(snapshot);
  } catch { /* The stream shows that the connection is lost. */ }
}

function tick(change) {
  for (const worker of change.workers) workers.set(worker.name, worker);
  for (const name of change.removed) workers.delete(name);
  fleet.update(change.workers, change.removed);
  fleet.extendHistory(change.time);
  decisions.update(change.decisions);
  if (change.quality) quality.update(change.quality);
  charts.push(change.sample);
  show(change);
}

function show({ time, notices, sample }) {
  lastSeen = time;
  overview.update(workers, notices, sample, (key) => charts.latest(key));
  showAbout(time);
}

const handlers = {
  event(name, data) {
    performance.mark("tick-start");
    setHidden(byId("unlock"), true);
    setHidden(byId("content"), false);
    setHidden(byId("lost"), true);
    setConnection("live", "Live");
    if (name === "snapshot") start(data);
    else if (name === "tick" && router) tick(data);
    // Style and layout of the change count, too.
    document.documentElement.getBoundingClientRect();
    performance.clearMeasures();
    performance.mark("tick-end");
    performance.measure(`foresee-${name}`, "tick-start", "tick-end");
    performance.clearMarks();
  },
  lost() {
    setConnection("lost", "Disconnected");
    byId("lost").textContent = lastSeen === null ? "The router cannot be reached. Trying again."
      : `No connection to the router since ${clock(lastSeen)}: the values below are old. Trying again.`;
    setHidden(byId("lost"), false);
  },
  refused(problem) {
    setConnection("locked", "Locked");
    byId("unlock-reason").textContent = byId("key").value || problem.status === 403 ? problem.message : "";
    setHidden(byId("unlock"), false);
    setHidden(byId("content"), true);
    byId("key").focus();
  },
};

const wake = follow(handlers);

byId("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value);
  wake();
});

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  forgetColours();
  fleet.redraw();
  charts.redraw();
  quality.draw();
});
