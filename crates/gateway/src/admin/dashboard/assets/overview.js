// What is wrong now, and the numbers of the whole fleet.

import { arrange, byId, el, Tiles } from "./dom.js";
import { count, percent, rate, seconds, short } from "./format.js";

const MAX_LISTED = 6;

const TILES = [
  ["Requests", "Requests at the workers, and those queued in the router"],
  ["Throughput", "Requests that ended, output tokens and prompt tokens, per second"],
  ["Time to first token", "Median and 99th percentile of the requests that ended in the last minute with output"],
  ["Between tokens", "Mean time between output tokens of a request: median and 99th percentile"],
  ["KV memory in use", "Blocks pinned by running requests: all workers, and the fullest"],
  ["Cache hits", "Prompt blocks reported as cached by the engines, and predicted for the same prompts"],
];

const SEVERITY = { unhealthy: 0, ejected: 1, draining: 3 };

// Returns a number by which workers sort: those that need attention first.
export function severity(worker) {
  return SEVERITY[worker.state] ?? (worker.problems.length ? 2 : 4);
}

export class Overview {
  constructor(openWorker) {
    this.openWorker = openWorker;
    this.tiles = new Tiles(byId("tiles"), TILES);
    this.shown = null;
  }

  // Shows the latest sample, `last` known values of series, and what is wrong with the workers and with the router.
  update(workers, notices, sample, last) {
    const failing = (sample.refused ?? 0) + (sample.unavailable ?? 0) + (sample.worker_error ?? 0)
      + (sample.worker_failed ?? 0);
    this.tiles.set(0, count(sample.running), `${count(sample.queued)} queued`);
    this.tiles.set(1, rate(sample.ok), `${short(sample.output_tokens)} tok/s out, ${short(sample.prompt_tokens)} in`);
    this.tiles.set(2, seconds(last("ttft_p50")), `p99 ${seconds(last("ttft_p99"))}`);
    this.tiles.set(3, seconds(last("itl_p50")), `p99 ${seconds(last("itl_p99"))}`);
    this.tiles.set(4, percent(sample.kv_mean), `fullest ${percent(sample.kv_max)}`);
    const hits = last("hits_actual");
    const predicted = last("hits_predicted");
    this.tiles.set(5, percent(hits ?? predicted), hits === null ? "predicted" : `${percent(predicted)} predicted`);
    this.problems(workers, notices, failing);
  }

  problems(workers, notices, failing) {
    const lines = notices.map((text) => ({ bad: true, text }));
    const troubled = [...workers.values()].filter((worker) => worker.problems.length)
      .sort((a, b) => severity(a) - severity(b));
    if (!workers.size) lines.push({ bad: true, text: "The router has no workers." });
    for (const worker of troubled.slice(0, MAX_LISTED)) {
      const bad = severity(worker) <= 1;
      lines.push({ bad, name: worker.name, text: worker.problems.join("; "), state: worker.state });
    }
    if (troubled.length > MAX_LISTED) {
      lines.push({ bad: false, text: `${troubled.length - MAX_LISTED} more workers need attention: see the fleet below.` });
    }
    if (failing > 0.05) lines.push({ bad: true, text: `${rate(failing)} requests are refused or fail now.` });
    const key = JSON.stringify(lines) + workers.size;
    if (key === this.shown) return;
    this.shown = key;
    const nodes = lines.map((line) => el("p", { class: line.bad ? "problem bad" : "problem warn" },
      el("span", { class: "icon", "aria-hidden": "true" }, line.bad ? "✕" : "!"),
      el("span", { class: "visually-hidden" }, line.bad ? "Problem: " : "Warning: "),
      line.name ? el("button", { class: "link", onclick: () => this.openWorker(line.name) }, line.name) : null,
      line.name ? el("span", {}, ` ${line.state === "healthy" || line.text.startsWith(line.state) ? "" : `is ${line.state}: `}${line.text}`)
        : el("span", {}, line.text)));
    if (!nodes.length) {
      const all = workers.size === 1 ? "The worker is healthy." : `All ${workers.size} workers are healthy.`;
      nodes.push(el("p", { class: "problem good" },
        el("span", { class: "icon", "aria-hidden": "true" }, "✓"), el("span", {}, all)));
    }
    arrange(byId("problems"), nodes);
    const bad = lines.filter((line) => line.bad).length;
    byId("problems").dataset.level = bad ? "bad" : "";
    document.title = bad ? `(${bad}) Foresee` : "Foresee";
  }
}
