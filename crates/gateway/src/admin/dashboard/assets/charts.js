// The charts of the fleet, and the past that they show.

import { Chart } from "./chart.js";
import { byId, el } from "./dom.js";
import { percent, rate, seconds, short } from "./format.js";
import { get } from "./connection.js";

const RANGES = [["10 min", 600, "seconds"], ["1 h", 3600, "minutes"], ["12 h", 43_200, "minutes"]];
const RECENT_SECONDS = 60;
const LIMITS = { seconds: 600, minutes: 720 };

const CHARTS = [
  { title: "Requests", format: short, note: "Requests at the workers, and those queued in the router",
    series: [{ key: "running", label: "running" }, { key: "queued", label: "queued", dash: true }] },
  { title: "Completed requests", format: rate, note: "Requests per second that ended with a whole response",
    series: [{ key: "ok", label: "ok" }, { key: "client_left", label: "client left", dash: true }] },
  { title: "Refusals and failures", format: rate, note: "Requests per second: refused (a 4xx, or a limit), no worker available, answered by a worker with an error, failed by a worker",
    series: [{ key: "refused", label: "refused" }, { key: "unavailable", label: "no worker", dash: true },
      { key: "worker_error", label: "error" }, { key: "worker_failed", label: "failed", dash: true }] },
  { title: "Time to first token", format: seconds, note: "Of the requests that ended",
    series: [{ key: "ttft_p50", label: "p50" }, { key: "ttft_p99", label: "p99", dash: true }] },
  { title: "Between tokens", format: seconds, note: "Mean time between output tokens of each request that ended (ITL)",
    series: [{ key: "itl_p50", label: "p50" }, { key: "itl_p99", label: "p99", dash: true }] },
  { title: "Predicted wait", format: seconds, note: "Predicted time until a prompt that arrives starts prefill",
    series: [{ key: "wait_mean", label: "mean" }, { key: "wait_max", label: "longest", dash: true }] },
  { title: "Output tokens", format: rate, note: "Output tokens per second", series: [{ key: "output_tokens", label: "tokens" }] },
  { title: "KV memory in use", format: percent, note: "Active blocks divided by the capacity",
    series: [{ key: "kv_mean", label: "all workers" }, { key: "kv_max", label: "fullest", dash: true }] },
  { title: "Cache hits", format: percent, note: "Fraction of prompt blocks",
    series: [{ key: "hits_actual", label: "reported" }, { key: "hits_predicted", label: "predicted", dash: true }] },
];

export class Charts {
  constructor() {
    this.history = null;
    this.range = RANGES[0];
    this.charts = CHARTS.map((options) => {
      const figure = el("figure", { class: "card chart" });
      byId("chart-grid").append(figure);
      return new Chart(figure, options);
    });
    for (const range of RANGES) {
      const input = el("input", { type: "radio", name: "range", checked: range === this.range });
      input.addEventListener("change", () => {
        this.range = range;
        this.draw();
      });
      byId("ranges").append(el("label", {}, input, el("span", {}, range[0])));
    }
  }

  // Reads the past from the router, and returns the past of the workers.
  async load() {
    this.history = await get("history");
    this.draw();
    return this.history.workers;
  }

  // Returns the latest value of a series in the last minute; `null` if there is none.
  latest(key) {
    const known = (this.history?.seconds[key] ?? []).slice(-RECENT_SECONDS).filter((value) => value !== null);
    return known.at(-1) ?? null;
  }

  // Adds the sample of a second. Minutes are read again as they end.
  push(sample) {
    const columns = this.history?.seconds;
    if (!columns || sample.time <= (columns.time.at(-1) ?? 0)) return;
    for (const [key, column] of Object.entries(columns)) {
      column.push(sample[key]);
      if (column.length > LIMITS.seconds) column.shift();
    }
    if (++this.sinceMinute >= 60) this.loadMinutes();
    this.draw();
  }

  sinceMinute = 0;

  async loadMinutes() {
    this.sinceMinute = 0;
    const { minutes } = this.history;
    const since = minutes.time.at(-1) ?? 0;
    const later = (await get(`history?since=${since}`).catch(() => null))?.minutes;
    if (!later) return;
    for (const [key, column] of Object.entries(minutes)) {
      column.push(...later[key]);
      column.splice(0, Math.max(0, column.length - LIMITS.minutes));
    }
  }

  draw() {
    if (!this.history) return;
    const [, span, part] = this.range;
    const end = this.history.seconds.time.at(-1) ?? 0;
    for (const chart of this.charts) chart.draw(this.history[part], end, span);
  }

  redraw() {
    for (const chart of this.charts) chart.redraw();
  }
}
