// How good the predictions are, and the configuration in force.

import { byId, el, setHidden, Tiles } from "./dom.js";
import { NONE, clock, count, percent, seconds, short } from "./format.js";
import { colour, prepare } from "./chart.js";
import { get, post } from "./connection.js";

const TILES = [
  ["Time to first token", "Mean relative error of the predicted times"],
  ["Prefill time", "Mean relative error of the latency model of prefills"],
  ["Decode step", "Mean relative error of the latency model of decode steps"],
  ["Output length", "Mean error of the predicted output lengths, relative to their mean"],
  ["Output bias", "Observed tokens divided by predicted ones; 1 is unbiased"],
  ["Hits predicted exactly", "Requests whose cached blocks were predicted exactly, where the engine reports them"],
];
const HEIGHT = 260;
const DECADES = [1e-3, 1e-2, 1e-1, 1, 10, 100];

export class Quality {
  constructor() {
    this.tiles = new Tiles(byId("quality-tiles"), TILES);
    this.points = [];
    this.canvas = el("canvas", { role: "img" });
    byId("scatter").append(el("figcaption", {}, el("span", { class: "title" }, "Time to first token: predicted and actual"),
      el("span", { class: "legend" }, "recorded decisions; on the line, both are equal")), this.canvas);
    new ResizeObserver(([entry]) => {
      this.width = entry.contentRect.width;
      this.draw();
    }).observe(byId("scatter"));
  }

  update(quality) {
    const set = (i, { samples, mean_error: error }) => this.tiles.set(i, samples ? `±${percent(error)}` : NONE, samples ? `${short(samples)} samples` : "no samples yet");
    set(0, quality.time_to_first_token);
    set(1, quality.prefill);
    set(2, quality.decode_step);
    const { outputs, expected_tokens: expected, bias, mean_error: error } = quality.output_lengths;
    this.tiles.set(3, outputs ? `±${percent(error)}` : NONE, `${short(outputs)} outputs`);
    this.tiles.set(4, outputs ? bias.toFixed(2) : NONE, outputs ? `${short(expected)} tokens expected` : "");
    const all = quality.overlap_exact + quality.overlap_over + quality.overlap_under;
    this.tiles.set(5, all ? percent(quality.overlap_exact / all) : NONE,
      all ? `${percent(quality.overlap_over / all)} too many, ${percent(quality.overlap_under / all)} too few` : "not reported by the engines");
  }

  // Shows the decisions whose outcome is known.
  decisions(known) {
    this.points = [];
    for (const { predicted, outcome } of known.values()) {
      if (predicted.ttft_seconds && outcome?.ttft_seconds) this.points.push([predicted.ttft_seconds, outcome.ttft_seconds]);
    }
    this.draw();
  }

  draw() {
    if (!this.width) return;
    const { width } = this;
    const context = prepare(this.canvas, width, HEIGHT);
    context.font = colour("font");
    const all = this.points.flat();
    const low = Math.min(0.01, ...all) / 1.3;
    const high = Math.max(1, ...all) * 1.3;
    const part = (value) => Math.log(value / low) / Math.log(high / low);
    const x = (value) => 52 + part(value) * (width - 64);
    const y = (value) => HEIGHT - 34 - part(value) * (HEIGHT - 44);
    context.strokeStyle = colour("--grid");
    context.fillStyle = colour("--muted");
    for (const value of DECADES) {
      if (value < low || value > high) continue;
      context.beginPath();
      context.moveTo(52, y(value));
      context.lineTo(width - 12, y(value));
      context.moveTo(x(value), 10);
      context.lineTo(x(value), HEIGHT - 34);
      context.stroke();
      context.textAlign = "right";
      context.fillText(seconds(value), 46, y(value) + 4);
      context.textAlign = "center";
      context.fillText(seconds(value), x(value), HEIGHT - 20);
    }
    context.fillText("predicted", (width + 40) / 2, HEIGHT - 4);
    context.strokeStyle = colour("--muted");
    context.setLineDash([4, 4]);
    context.beginPath();
    context.moveTo(x(low), y(low));
    context.lineTo(x(high), y(high));
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = colour("--series-1");
    context.globalAlpha = 0.55;
    for (const [predicted, actual] of this.points) {
      context.beginPath();
      context.arc(x(predicted), y(actual), 3, 0, 7);
      context.fill();
    }
    context.globalAlpha = 1;
    const close = this.points.filter(([predicted, actual]) => Math.abs(predicted - actual) <= 0.25 * actual).length;
    this.canvas.setAttribute("aria-label", `${count(this.points.length)} decisions; ${count(close)} predicted within 25 % of the actual time.`);
  }
}

export class Configuration {
  constructor() {
    this.settings = [];
    byId("config-changed").addEventListener("change", () => this.show());
    byId("reload").addEventListener("click", () => this.reload());
  }

  async load() {
    this.settings = (await get("config")).settings;
    this.show();
  }

  show() {
    const shown = this.settings.filter((setting) => setting.is_changed || !byId("config-changed").checked);
    byId("config-body").replaceChildren(...shown.map(({ key, value, is_changed: isChanged, is_live: isLive }) =>
      el("tr", { role: "row" },
        el("th", { role: "rowheader", scope: "row" }, key, isChanged ? el("span", { class: "tag" }, "changed") : null),
        el("td", { role: "cell" }, value), el("td", { role: "cell" }, isLive ? "with a reload" : "after a restart"))));
    setHidden(byId("config-empty"), shown.length > 0);
  }

  async reload() {
    const button = byId("reload");
    const result = byId("reload-result");
    button.disabled = true;
    result.textContent = "Reloading…";
    try {
      const report = await post("reload");
      const names = { changed: "changed", needs_restart: "needs a restart", workers_added: "workers added", workers_replaced: "workers replaced", workers_removed: "workers removed" };
      const parts = Object.entries(names).filter(([key]) => report[key].length).map(([key, name]) => `${name}: ${report[key].join(", ")}`);
      result.textContent = `Reloaded at ${clock(Date.now() / 1000)}. ${parts.join("; ") || "Nothing has changed"}.`;
      await this.load();
    } catch (problem) {
      result.textContent = problem.message;
    } finally {
      button.disabled = false;
    }
  }
}
