// Recent decisions; one that is opened shows the cost of every worker, term by term.

import { byId, el, setAttribute, setHidden, textWriter } from "./dom.js";
import { NONE, clock, count, error, percent, seconds, short } from "./format.js";
import { get } from "./connection.js";

const MAX_ROWS = 40;
const MAX_KEPT = 300;
const FIRST_CANDIDATES = 12;

const TERMS = {
  queue_wait: ["Wait", "Prefill of the prompts before this one"],
  prefill: ["Prefill", "Prefill of this prompt"],
  decode: ["Decode", "Decode of this output on an otherwise idle worker"],
  decode_slowdown: ["Slowed", "Slowdown of this output by the others"],
  prefill_stall_caused: ["Stalls others", "Time that other outputs stall during this prefill"],
  decode_slowdown_caused: ["Slows others", "Slowdown of the other outputs by this one"],
  busy_extension: ["Keeps busy", "Later prefills while this output keeps a worker busy that would be idle"],
  future_arrivals: ["Future", "Delay of requests that will arrive"],
  failure_charge: ["Failures", "Charge for requests that the worker failed recently"],
};

const HEADINGS = ["Time", "Model", "Prompt", "Chosen worker", "Cost", "Next best", "First token", "Cached", "Output", "Outcome"];
const OUTCOMES = { ok: "ok", client_left: "client left", no_response: "no response" };

const pair = (predicted, actual) => `${predicted} → ${actual}`;

export class Decisions {
  constructor(onChange) {
    this.onChange = onChange;
    this.known = new Map();
    this.rows = [];
    this.opened = null;
    this.isPaused = false;
    this.body = byId("decisions-body");
    this.scroll = byId("decisions-scroll");
    for (const name of HEADINGS) byId("decisions-head").append(el("th", { role: "columnheader" }, name));
    byId("decisions-pause").addEventListener("click", () => this.pause(!this.isPaused));
    byId("decisions-new").addEventListener("click", () => {
      this.close();
      this.scroll.scrollTop = 0;
      this.pause(false);
    });
    this.scroll.addEventListener("pointerenter", () => { this.isPointed = true; });
    this.scroll.addEventListener("pointerleave", () => { this.isPointed = false; this.show(); });
  }

  pause(isPaused) {
    this.isPaused = isPaused;
    setAttribute(byId("decisions-pause"), "aria-pressed", String(isPaused));
    byId("decisions-pause").textContent = isPaused ? "Resume" : "Pause";
    this.show(true);
  }

  reset(decisions) {
    this.known.clear();
    this.close();
    this.rows = [];
    this.body.replaceChildren();
    this.update(decisions, true);
  }

  update(decisions, isForced = false) {
    if (!decisions.length && !isForced) return;
    for (const decision of decisions) {
      this.known.set(decision.id, decision);
      if (this.opened?.id === decision.id && decision.outcome) this.showOutcome(decision);
    }
    for (const id of this.known.keys()) {
      if (this.known.size <= MAX_KEPT) break;
      this.known.delete(id);
    }
    this.show(isForced);
    this.onChange(this.known);
  }

  // Shows the latest decisions, unless they are being read: then only outcomes appear.
  show(isForced = false) {
    const isRead = this.isPaused || this.opened || this.isPointed || this.scroll.scrollTop > 4
      || this.scroll.contains(document.activeElement) && document.activeElement !== this.scroll;
    const latest = [...this.known.values()].slice(-MAX_ROWS).reverse();
    if (isRead && !isForced) {
      for (const row of this.rows) if (this.known.has(row.id)) this.write(row, this.known.get(row.id));
    } else {
      // New decisions get the rows of the oldest ones, so that all other rows stay as they are.
      const first = latest.at(-1)?.id ?? 0;
      this.rows.forEach((row) => this.known.has(row.id) && this.write(row, this.known.get(row.id)));
      for (const decision of latest.filter(({ id }) => id > (this.rows[0]?.id ?? 0)).reverse()) {
        const isFree = this.rows.length >= MAX_ROWS || this.rows.at(-1)?.id < first;
        const row = isFree ? this.rows.pop() : this.createRow();
        this.write(row, decision);
        this.body.prepend(row.node);
        this.rows.unshift(row);
      }
      while (this.rows.at(-1)?.id < first) this.rows.pop().node.remove();
    }
    const unseen = latest.filter(({ id }) => id > (this.rows[0]?.id ?? 0)).length;
    setHidden(byId("decisions-new"), unseen === 0);
    byId("decisions-new").textContent = `Show ${unseen}${unseen === MAX_ROWS ? "+" : ""} new`;
    setHidden(byId("decisions-empty"), this.known.size > 0);
  }

  createRow() {
    const row = { id: null, cells: [] };
    const cells = HEADINGS.map((name, i) => {
      const cell = el("td", { role: "cell", "data-label": name });
      if (i === 0) {
        row.button = el("button", { class: "link", "aria-expanded": "false", onclick: () => this.toggle(row) });
        cell.append(row.button);
      }
      row.cells.push(textWriter(i === 0 ? row.button : cell));
      return cell;
    });
    row.node = el("tr", { role: "row" }, ...cells);
    return row;
  }

  write(row, decision) {
    if (row.decision === decision) return;
    row.decision = decision;
    row.id = decision.id;
    const { predicted, outcome } = decision;
    const unit = (cost) => (decision.policy === "marginal-delay" ? seconds(cost) : short(cost));
    const served = outcome?.worker && outcome.worker !== decision.chosen ? ` (served by ${outcome.worker})` : "";
    const actual = (value, format) => (outcome ? format(value) : "…");
    const texts = [
      clock(decision.time),
      decision.model || "any",
      `${short(decision.prompt_tokens)} tok${decision.prompts > 1 ? ` × ${decision.prompts}` : ""}`,
      decision.chosen + (decision.reason ? ` (${decision.reason})` : "") + served,
      unit(decision.cost),
      decision.runner_up ? `${decision.runner_up_cost < decision.cost ? "−" : "+"}${unit(Math.abs(decision.runner_up_cost - decision.cost))} ${decision.runner_up}` : NONE,
      pair(seconds(predicted.ttft_seconds), actual(outcome?.ttft_seconds, seconds)),
      pair(short(predicted.cached_tokens), actual(outcome?.cached_tokens, short)),
      pair(short(predicted.output_tokens), actual(outcome?.output_tokens, short)),
      outcome ? `${OUTCOMES[outcome.outcome] ?? outcome.outcome.replace("_", " ")} in ${seconds(outcome.total_seconds)}` : "running",
    ];
    texts.forEach((text, i) => row.cells[i](text));
    setAttribute(row.node, "data-level", !outcome ? "quiet" : outcome.outcome === "ok" ? "good" : "bad");
  }

  close() {
    this.opened?.row.button.setAttribute("aria-expanded", "false");
    this.opened?.node.remove();
    this.opened = null;
    this.scroll.classList.remove("open");
  }

  async toggle(row) {
    const isOpen = this.opened?.row === row;
    this.close();
    if (isOpen) {
      this.show();
      return;
    }
    const content = el("div", { class: "details" }, el("p", { class: "muted" }, "Loading…"));
    const node = el("tr", { role: "row", class: "detail-row" }, el("td", { role: "cell", colSpan: HEADINGS.length }, content));
    row.node.after(node);
    row.button.setAttribute("aria-expanded", "true");
    const opened = { row, node, id: row.id };
    this.opened = opened;
    this.scroll.classList.add("open");
    try {
      const decision = await get(`decisions/${row.id}`);
      if (this.opened !== opened) return;
      opened.outcome = el("div", {});
      content.replaceChildren(opened.outcome, ...this.explain(decision));
      this.showOutcome(decision);
    } catch (problem) {
      content.replaceChildren(el("p", { class: "bad" }, `The decision cannot be shown: ${problem.message}`));
    }
  }

  // Shows what was predicted for the chosen worker, and what happened.
  showOutcome(decision) {
    if (!this.opened?.outcome) return;
    const { predicted, outcome } = decision;
    const lines = [
      ["Time to first token", predicted.ttft_seconds, outcome?.ttft_seconds, seconds],
      ["Time to the end", predicted.total_seconds, outcome?.total_seconds, seconds],
      ["Cached prompt tokens", predicted.cached_tokens, outcome?.cached_tokens, count],
      ["Output tokens", predicted.output_tokens, outcome?.output_tokens, count],
    ].map(([name, expected, actual, format]) => el("tr", { role: "row" },
      el("th", { role: "rowheader", scope: "row" }, name), el("td", { role: "cell" }, format(expected)),
      el("td", { role: "cell" }, outcome ? format(actual) : "running"), el("td", { role: "cell" }, error(expected, actual))));
    const headings = ["Prediction", "Predicted", "Actual", "Error"].map((name) => el("th", { role: "columnheader" }, name));
    this.opened.outcome.replaceChildren(el("table", { class: "outcome", role: "table", "aria-label": "Predicted and actual" },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...headings)), el("tbody", { role: "rowgroup" }, ...lines)));
  }

  // Returns the table of the costs of all candidates, the least first.
  explain(decision) {
    const isDelay = decision.policy === "marginal-delay";
    const weighted = decision.ttft_weight === 1 ? "" : ` Wait and prefill are multiplied by the ttft-weight ${decision.ttft_weight}.`;
    const intro = isDelay ? `The cost of a worker is the sum of its terms: the time that the request takes there, and the delay that it causes to others.${weighted}`
      : `The policy ${decision.policy} compares the cost in its own unit. The terms of the predicted delay are shown for comparison.`;
    const names = Object.keys(TERMS).filter((name) => decision.candidates?.some(({ terms }) => terms.some(([term, value]) => term === name && value !== 0)));
    const sorted = [...decision.candidates ?? []].sort((a, b) => (a.policy_cost ?? Infinity) - (b.policy_cost ?? Infinity));
    const longest = Math.max(1e-9, ...sorted.map(({ delay }) => delay));
    const headings = [["Worker"], ...(isDelay ? [] : [["Policy cost"]]), [isDelay ? "Cost" : "Delay", "Sum of the terms"], ["", "Terms as parts of a bar"],
      ...names.map((name) => TERMS[name]), ["Cached", "Blocks of the prompt that are cached there"], ["Chance", "Probability that the policy chooses the worker"]];
    const swatches = Object.fromEntries(names.map((name) => [TERMS[name][0], name]));
    const table = el("table", { class: "terms", role: "table", "aria-label": "Cost of every worker" },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...headings.map(([label, help]) =>
        el("th", { role: "columnheader", title: help ?? "" }, swatches[label] ? el("i", { class: `swatch t-${swatches[label]}` }) : "",
          label || el("span", { class: "visually-hidden" }, help))))));
    const body = el("tbody", { role: "rowgroup" });
    table.append(body);
    const lineOf = (candidate) => {
      const isChosen = candidate.worker === decision.chosen;
      const value = Object.fromEntries(candidate.terms);
      const cell = (text, properties = {}) => el("td", { role: "cell", ...properties }, text);
      const bar = el("div", { class: "stack", "aria-hidden": "true" });
      for (const name of names) {
        const part = el("i", { class: `t-${name}`, title: `${TERMS[name][0]} ${seconds(value[name])}` });
        part.style.width = `${(100 * Math.max(0, value[name])) / longest}%`;
        bar.append(part);
      }
      return el("tr", { role: "row", class: isChosen ? "chosen" : "" },
        el("th", { role: "rowheader", scope: "row" }, isChosen ? "✓ " : "", candidate.worker, isChosen ? " (chosen)" : ""),
        ...(isDelay ? [] : [cell(short(candidate.policy_cost))]), cell(seconds(candidate.delay), { class: "sum" }), el("td", { role: "cell" }, bar),
        ...names.map((name) => cell(value[name] ? seconds(value[name]) : "0", { class: "term", "data-term": name, "data-value": value[name] })),
        cell(`${count(candidate.overlap_blocks)} of ${count(candidate.overlap_blocks + candidate.prefill_blocks)}`), cell(percent(candidate.probability)));
    };
    body.append(...sorted.slice(0, FIRST_CANDIDATES).map(lineOf));
    const rest = sorted.slice(FIRST_CANDIDATES);
    const chosen = rest.find(({ worker }) => worker === decision.chosen);
    if (chosen) body.append(lineOf(chosen));
    const more = rest.length ? el("button", { onclick: () => { body.replaceChildren(...sorted.map(lineOf)); more.remove(); } },
      `Show all ${sorted.length} workers`) : null;
    const passed = decision.passed_over ? el("p", { class: "muted" }, `Passed over: ${decision.passed_over.map(({ worker, reason }) => `${worker} (${reason.replace("_", " ")})`).join(", ")}.`) : null;
    return [el("p", { class: "muted" }, intro), el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Costs" }, table), more, passed].filter(Boolean);
  }
}
