// The table of workers. Rows that are in view are updated at every tick, all others a few at a time.

import { arrange, byId, el, setAttribute, setHidden, textWriter } from "./dom.js";
import { NONE, count, percent, seconds, short } from "./format.js";
import { Chart, drawSparkline } from "./chart.js";
import { get } from "./connection.js";
import { severity } from "./overview.js";

const SPARKLINE = 30;
const STEP = 10;
const UNSEEN_PER_TICK = 32;

const ICONS = { healthy: "●", unhealthy: "✕", ejected: "▲", draining: "◌" };
const EVENTS_BAD = ["silent", "faulty", "untrusted"];

const used = (worker) => worker.active_blocks / Math.max(1, worker.capacity_blocks);

const COLUMNS = [
  { id: "name", label: "Worker", help: "Name of the worker", text: true, sort: (w) => w.name },
  { id: "state", label: "State", help: "Whether the worker gets requests", text: true, sort: (w) => severity(w), show: (w) => w.state },
  { id: "running", label: "Running", help: "Requests at the worker", sort: (w) => w.running, show: (w) => count(w.running) },
  { id: "queued", label: "Queued", help: "Requests that wait in the router for the worker", sort: (w) => w.queued, show: (w) => count(w.queued) },
  { id: "blocks", label: "Active blocks", help: "KV blocks that running requests pin (solid), queued ones will pin (striped), and the capacity", sort: used,
    show: (w) => `${short(w.active_blocks)} of ${short(w.capacity_blocks)}` },
  { id: "backlog", label: "Backlog", help: "Prompt tokens that are booked and not computed yet", sort: (w) => w.backlog_tokens, show: (w) => `${short(w.backlog_tokens)} tok` },
  { id: "wait", label: "Wait", help: "Predicted time until a prompt that arrives now starts prefill", sort: (w) => w.wait_seconds, show: (w) => seconds(w.wait_seconds) },
  { id: "hits", label: "Prefix hits", help: "Prompt blocks of the last minutes that were predicted to be cached → those that the engine reported as cached",
    sort: (w) => w.hits_actual ?? w.hits_predicted ?? -1, show: (w) => `${percent(w.hits_predicted)} → ${percent(w.hits_actual)}` },
  { id: "events", label: "KV events", help: "State of the worker's KV events; without events the cache is estimated", text: true, sort: (w) => w.events ?? "~",
    show: (w) => (w.events === null || w.events === "off" ? "estimated" : w.events) },
  { id: "failures", label: "Failures", help: "Failed results among the latest, and recent ejections", sort: (w) => w.failure_rate + 10 * w.ejections,
    show: (w) => (w.failure_rate === 0 && w.ejections === 0 ? "none" : `${percent(w.failure_rate)}${w.ejections ? `, ${w.ejections} ej.` : ""}`) },
  { id: "error", label: "TTFT error", help: "Mean relative error of the predicted times to first token", sort: (w) => w.ttft_error ?? -1, show: (w) => (w.ttft_error === null ? NONE : `±${percent(w.ttft_error)}`) },
  { id: "load", label: "Load, 5 min", help: "Requests on the worker in the last five minutes", text: true },
];

export class Fleet {
  constructor() {
    this.rows = new Map();
    this.sort = { column: COLUMNS[1], descending: false };
    this.opened = null;
    this.body = byId("fleet-body");
    this.filter = byId("fleet-filter");
    this.filter.addEventListener("input", () => this.order());
    this.headings = COLUMNS.map((column) => {
      const button = el("button", { title: column.help, onclick: () => this.sortBy(column) }, column.label);
      const cell = el("th", { role: "columnheader", class: `c-${column.id}${column.text ? "" : " num"}` });
      cell.append(column.sort ? button : el("span", { title: column.help }, column.label));
      byId("fleet-head").append(cell);
      if (column.sort) byId("fleet-sort").append(el("option", { value: column.id }, column.label));
      return { column, cell };
    });
    byId("fleet-sort").addEventListener("change", (event) => {
      this.sortBy(COLUMNS.find((column) => column.id === event.target.value));
    });
    this.observer = new IntersectionObserver((entries) => {
      for (const entry of entries) {
        const row = entry.target.row;
        row.inView = entry.isIntersecting;
        if (row.inView) this.show(row);
      }
    }, { rootMargin: "100px" });
    this.markSorted();
  }

  sortBy(column) {
    const isSame = this.sort.column === column;
    const descending = isSame ? !this.sort.descending : !column.text;
    this.sort = { column, descending };
    this.markSorted();
    this.order();
  }

  markSorted() {
    for (const { column, cell } of this.headings) {
      if (column !== this.sort.column) cell.removeAttribute("aria-sort");
      else setAttribute(cell, "aria-sort", this.sort.descending ? "descending" : "ascending");
    }
    byId("fleet-sort").value = this.sort.column.id;
  }

  // Replaces all workers.
  reset(workers) {
    const names = new Set(workers.map((worker) => worker.name));
    this.update(workers, [...this.rows.keys()].filter((name) => !names.has(name)));
  }

  // Adds and changes workers, and removes others. The order changes only if a worker comes, goes or
  // changes its state, so that rows do not move while they are read.
  update(workers, removed) {
    let isReordered = false;
    for (const name of removed) {
      const row = this.rows.get(name);
      if (!row) continue;
      isReordered = true;
      this.observer.unobserve(row.node);
      if (this.opened?.row === row) this.close();
      row.node.remove();
      this.rows.delete(name);
    }
    for (const worker of workers) {
      let row = this.rows.get(worker.name);
      if (!row) {
        row = this.create(worker);
        this.rows.set(worker.name, row);
        isReordered = true;
      } else if (severity(row.worker) !== severity(worker)) {
        isReordered = true;
      }
      row.worker = worker;
      row.isStale = true;
    }
    let unseen = UNSEEN_PER_TICK;
    for (const row of this.rows.values()) {
      if (row.isStale && (row.inView || unseen-- > 0)) this.show(row);
    }
    if (isReordered) this.order();
  }

  create(worker) {
    const row = { worker, isStale: true, inView: false, cells: {}, history: [] };
    const cells = COLUMNS.map((column) => {
      const cell = el("td", { role: "cell", class: `c-${column.id}${column.text ? "" : " num"}`, "data-label": column.label });
      if (column.id === "name") {
        row.button = el("button", { class: "link", "aria-expanded": "false", onclick: () => this.toggle(row) }, worker.name);
        cell.append(row.button);
        cell.title = worker.name;
      } else if (column.id === "load") {
        row.canvas = el("canvas", { class: "spark", role: "img", "aria-label": "Requests in the last five minutes" });
        cell.append(row.canvas);
      } else {
        if (column.id === "state") row.icon = textWriter(cell.appendChild(el("span", { class: "icon", "aria-hidden": "true" })));
        const line = cell.appendChild(el("span", { class: "text" }));
        row.cells[column.id] = textWriter(line);
        if (column.id === "blocks") {
          row.active = el("div", { class: "active" });
          row.queued = el("div", { class: "queued" });
          cell.append(el("div", { class: "bar", "aria-hidden": "true" }, row.queued, row.active));
        }
        if (column.id === "events") row.events = line;
      }
      return cell;
    });
    row.node = el("tr", { role: "row" }, ...cells);
    row.node.row = row;
    this.observer.observe(row.node);
    return row;
  }

  // Writes a worker's state into its row.
  show(row) {
    const worker = row.worker;
    if (row.isStale) {
      row.isStale = false;
      for (const column of COLUMNS) if (column.show) row.cells[column.id](column.show(worker));
      row.icon(worker.problems.length && worker.state === "healthy" ? "!" : ICONS[worker.state] ?? "●");
      const level = ["bad", "bad", "warn", "quiet", "good"][severity(worker)];
      setAttribute(row.node, "data-level", level);
      const capacity = Math.max(1, worker.capacity_blocks);
      const fill = (value) => `scaleX(${Math.min(1, value / capacity).toFixed(3)})`;
      row.active.style.transform = fill(worker.active_blocks);
      row.queued.style.transform = fill(worker.active_blocks + worker.queued_blocks);
      setAttribute(row.events, "class", EVENTS_BAD.includes(worker.events) ? "text warn" : "text");
    }
    if (row.drawn !== row.history) {
      row.drawn = row.history;
      drawSparkline(row.canvas, row.history);
    }
  }

  // Sets the past of all workers.
  setHistory(series) {
    for (const one of series) {
      const row = this.rows.get(one.name);
      if (row) row.history = one.requests.slice(-SPARKLINE);
    }
    this.drawVisible();
  }

  // Adds the present load to the past, every ten seconds.
  extendHistory(time) {
    const step = Math.floor(time / STEP);
    if (step === this.step) return;
    this.step = step;
    for (const row of this.rows.values()) {
      row.history = [...row.history, row.worker.running + row.worker.queued].slice(-SPARKLINE);
    }
    this.drawVisible();
    if (this.opened) this.load(this.opened);
  }

  drawVisible() {
    for (const row of this.rows.values()) if (row.inView) this.show(row);
  }

  redraw() {
    for (const row of this.rows.values()) row.drawn = null;
    this.drawVisible();
    this.opened?.charts?.forEach((chart) => chart.redraw());
  }

  // Sorts and filters the rows.
  order() {
    const { column, descending } = this.sort;
    const wanted = this.filter.value.trim().toLowerCase();
    const rows = [...this.rows.values()].filter(({ worker }) =>
      !wanted || worker.name.toLowerCase().includes(wanted) || worker.state.includes(wanted));
    const sign = descending ? -1 : 1;
    const names = new Intl.Collator("en", { numeric: true });
    rows.sort((a, b) => {
      const [x, y] = [column.sort(a.worker), column.sort(b.worker)];
      const order = typeof x === "string" ? names.compare(x, y) : x - y;
      return sign * order || names.compare(a.worker.name, b.worker.name);
    });
    const nodes = [];
    for (const row of rows) {
      nodes.push(row.node);
      if (this.opened?.row === row) nodes.push(this.opened.node);
    }
    const focused = document.activeElement;
    arrange(this.body, nodes);
    // A row that is moved loses the focus.
    if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
    const all = this.rows.size;
    byId("fleet-scroll").classList.toggle("many", all > 14);
    const healthy = [...this.rows.values()].filter((row) => row.worker.state === "healthy").length;
    byId("fleet-count").textContent = all ? `${healthy} of ${all} healthy` : "";
    const empty = byId("fleet-empty");
    setHidden(empty, rows.length > 0);
    if (!rows.length) {
      empty.textContent = all ? "No worker matches the filter."
        : "The router has no workers. Start it with --worker URL, or add one with POST /admin/workers.";
    }
  }

  open(name) {
    const row = this.rows.get(name);
    if (!row) return;
    if (this.filter.value) {
      this.filter.value = "";
      this.order();
    }
    if (this.opened?.row !== row) this.toggle(row);
    row.node.scrollIntoView({ block: "center" });
    row.button.focus({ preventScroll: true });
  }

  close() {
    this.opened?.row.button.setAttribute("aria-expanded", "false");
    this.opened?.node.remove();
    this.opened = null;
    byId("fleet-scroll").classList.remove("open");
  }

  // Opens or closes the details of a worker.
  async toggle(row) {
    const isOpen = this.opened?.row === row;
    this.close();
    if (isOpen) return;
    const content = el("div", { class: "details" }, el("p", { class: "muted" }, "Loading…"));
    const node = el("tr", { role: "row", class: "detail-row" }, el("td", { role: "cell", colSpan: COLUMNS.length }, content));
    const opened = { row, node, content, charts: [] };
    this.opened = opened;
    byId("fleet-scroll").classList.add("open");
    row.button.setAttribute("aria-expanded", "true");
    row.node.after(node);
    await this.load(opened);
  }

  // Loads the details of an opened worker.
  async load(opened) {
    const { row, content } = opened;
    const name = encodeURIComponent(row.worker.name);
    try {
      const [worker, history] = await Promise.all([get(`workers/${name}`),
        get(`history?worker=${name}`).catch(() => ({ workers: [] }))]);
      if (this.opened === opened) opened.charts = showDetails(content, worker, history.workers[0]);
    } catch (error) {
      content.replaceChildren(el("p", { class: "bad" }, `The details cannot be shown: ${error.message}`));
    }
  }
}

// Shows all that the router knows about a worker, and returns its charts.
function showDetails(content, worker, series) {
  const { forecast, health, kv_events: events, outlier } = worker;
  const accuracy = ({ mean_error: error, samples }) => (samples ? `±${percent(error)} of ${short(samples)} samples` : "no samples yet");
  const facts = [
    ["URL", worker.url ?? "being removed"],
    ["Models", worker.models.join(", ") || "not known yet"],
    ["Health check", health ? `${health.last_check_seconds_ago === null ? "none yet" : `${seconds(health.last_check_seconds_ago)} ago`}, ${health.consecutive_failures} failed in a row` : NONE],
    ["Last error", health?.last_error ?? "none"],
    ["Cache", `${worker.cache_source === "events" ? "known from KV events" : `estimated (${worker.eviction})`}, ${count(worker.cached_blocks)} blocks cached`],
    ["KV events", events ? `${events.state} at ${events.source}; ${count(events.batches)} batches, ${events.gaps} gaps, ${events.lost} lost, untrusted ${events.untrusted} times` : "no event source"],
    ["Capacity", `${count(worker.capacity_blocks)} blocks, ${worker.capacity_source}`],
    ["Prefill", `${short(worker.prefill_tokens_per_second)} tokens/s; model ${accuracy(forecast.prefill)}`],
    ["Between tokens", `${seconds(worker.inter_token_latency_seconds)} at the present load; model ${accuracy(forecast.decode_step)}`],
    ["Failures", `${percent(outlier.failure_rate)} of the latest results; adds ${seconds(outlier.charge_seconds)} to its cost`],
  ];
  content.replaceChildren(el("dl", { class: "facts" }, ...facts.map(([name, value]) =>
    el("div", {}, el("dt", {}, name), el("dd", {}, value)))));
  if (!series) return [];
  const time = series.requests.map((_, i) => series.end - (series.requests.length - 1 - i) * series.step);
  const pair = content.appendChild(el("div", { class: "chart-pair" }));
  const draw = (title, values, format) => {
    const figure = pair.appendChild(el("figure", { class: "chart" }));
    const chart = new Chart(figure, { title, format, series: [{ key: "values", label: "last hour" }] });
    chart.draw({ time, values }, series.end, 3600);
    return chart;
  };
  return [draw("Requests", series.requests, count),
    draw("KV memory in use", series.active_permille.map((value) => value / 1000), percent)];
}
