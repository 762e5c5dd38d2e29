// Line charts and sparklines on a canvas.

import { byId, el, setAttribute, textWriter } from "./dom.js";
import { NONE, clock } from "./format.js";

const MARGIN = { left: 52, right: 10, top: 8, bottom: 20 };
const HEIGHT = 150;

let style = null;

// Returns a colour of the style sheet. Read once, because reading computes the style of the page.
export function colour(name) {
  style ??= new Map([["font", `11px ${getComputedStyle(document.body).fontFamily}`]]);
  if (!style.has(name)) style.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return style.get(name);
}

// Reads the colours again, because the scheme has changed.
export const forgetColours = () => { style = null; };

// Prepares a canvas for drawing in units of CSS pixels.
export function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [pixelWidth, pixelHeight] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== pixelWidth) canvas.width = pixelWidth;
  if (canvas.height !== pixelHeight) canvas.height = pixelHeight;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

export function drawSparkline(canvas, values) {
  const [width, height] = [120, 22];
  const context = prepare(canvas, width, height);
  if (values.length < 2) return;
  const top = Math.max(4, ...values);
  const x = (i) => width - 1 - (values.length - 1 - i) * ((width - 2) / Math.max(9, values.length - 1));
  const y = (value) => height - 2 - (value / top) * (height - 4);
  context.beginPath();
  values.forEach((value, i) => context.lineTo(x(i), y(value)));
  context.strokeStyle = colour("--series-1");
  context.lineWidth = 1.5;
  context.stroke();
  context.lineTo(x(values.length - 1), height);
  context.lineTo(x(0), height);
  context.fillStyle = colour("--series-1");
  context.globalAlpha = 0.12;
  context.fill();
  context.globalAlpha = 1;
}

// Returns a round number that is at least `value`.
export function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * scale).find((step) => step >= value * 0.999);
}

const SPANS = [60, 120, 300, 600, 1200, 2400, 3600, 7200, 14_400, 28_800];
const STEPS = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400];

// A line chart of columns: `time`, and one for each of `series`.
export class Chart {
  // `series` has entries with `key`, `label` and `dash`; `format` writes a value.
  constructor(figure, { title, note, series, format }) {
    Object.assign(this, { figure, title, series, format, data: { time: [] }, end: 0, span: 600, cursor: null });
    const legend = el("span", { class: "legend" });
    this.values = series.map((one, i) => {
      const value = el("b", {});
      legend.append(el("span", { class: `key s${i + 1}${one.dash ? " dash" : ""}` }, `${one.label} `, value));
      return textWriter(value);
    });
    this.canvas = el("canvas", { tabIndex: 0, role: "img", height: HEIGHT });
    figure.append(el("figcaption", { title: note ?? "" }, el("span", { class: "title" }, title), legend), this.canvas);
    this.isVisible = true;
    new IntersectionObserver(([entry]) => {
      this.isVisible = entry.isIntersecting;
      if (this.isVisible) this.redraw();
    }).observe(figure);
    new ResizeObserver(([entry]) => {
      this.width = entry.contentRect.width;
      this.redraw();
    }).observe(figure);
    this.canvas.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.canvas.addEventListener("pointerleave", () => this.unpoint());
    this.canvas.addEventListener("blur", () => this.unpoint());
    this.canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!by || !this.data.time.length) return;
      event.preventDefault();
      const last = this.data.time.length - 1;
      this.cursor = Math.min(last, Math.max(0, (this.cursor ?? last + 1) + by));
      this.redraw();
      this.tell();
    });
  }

  // Draws the last `span` seconds before `end`.
  draw(data, end, span) {
    Object.assign(this, { data, end, span });
    if (this.cursor === null || this.cursor >= data.time.length) this.tellLatest();
    this.redraw();
  }

  redraw() {
    if (!this.isVisible || !this.width) return;
    const { width, end } = this;
    const context = prepare(this.canvas, width, HEIGHT);
    const { time } = this.data;
    const plotWidth = width - MARGIN.left - MARGIN.right;
    const plotHeight = HEIGHT - MARGIN.top - MARGIN.bottom;
    // A past that is shorter than the range is shown larger.
    const known = end - (time[0] ?? end);
    const span = SPANS.find((one) => one >= known && one <= this.span) ?? this.span;
    const start = end - span;
    let first = 0;
    while (first < time.length && time[first] < start) first++;
    let peak = 0;
    for (const { key } of this.series) {
      const column = this.data[key];
      for (let i = first; i < time.length; i++) if (column[i] > peak) peak = column[i];
    }
    const top = niceCeiling(peak);
    const x = (at) => MARGIN.left + ((at - start) / span) * plotWidth;
    const y = (value) => MARGIN.top + plotHeight - (value / top) * plotHeight;
    this.x = x;

    context.font = colour("font");
    context.lineWidth = 1;
    context.fillStyle = colour("--muted");
    context.strokeStyle = colour("--grid");
    context.textAlign = "right";
    context.textBaseline = "middle";
    for (const part of [0, 0.5, 1]) {
      const at = Math.round(y(part * top)) + 0.5;
      context.beginPath();
      context.moveTo(MARGIN.left, at);
      context.lineTo(width - MARGIN.right, at);
      context.stroke();
      context.fillText(this.format(part * top), MARGIN.left - 6, at);
    }
    context.textAlign = "center";
    context.textBaseline = "bottom";
    const step = STEPS.find((one) => (plotWidth / span) * one >= 56) ?? STEPS.at(-1);
    for (let at = Math.ceil(start / step) * step; at <= end; at += step) {
      if (x(at) > MARGIN.left + 14 && x(at) < width - 28) context.fillText(clock(at, step < 60), x(at), HEIGHT - 2);
    }

    context.lineWidth = 1.6;
    context.lineJoin = "round";
    const gap = 8 * (time.length > 1 ? time.at(-1) - time.at(-2) : 1);
    this.series.forEach(({ key, dash }, number) => {
      const column = this.data[key];
      context.strokeStyle = colour(`--series-${number + 1}`);
      context.setLineDash(dash ? [4, 3] : []);
      context.beginPath();
      let before = null;
      for (let i = first; i < time.length; i++) {
        const value = column[i];
        if (value === null || value === undefined) continue;
        const [px, py] = [x(time[i]), y(value)];
        if (before === null || time[i] - before > gap) context.moveTo(px - 0.8, py);
        context.lineTo(px, py);
        before = time[i];
      }
      context.stroke();
    });
    context.setLineDash([]);
    if (this.cursor !== null && this.cursor < time.length) {
      const at = x(time[this.cursor]);
      context.lineWidth = 1;
      context.strokeStyle = colour("--muted");
      context.beginPath();
      context.moveTo(at, MARGIN.top);
      context.lineTo(at, HEIGHT - MARGIN.bottom);
      context.stroke();
    }
    if (!time.length) {
      context.textAlign = "center";
      context.fillText("No samples yet", width / 2, HEIGHT / 2);
    }
  }

  // Moves the cursor to the sample next to a place on the canvas.
  point(px) {
    const { time } = this.data;
    if (!time.length || !this.x) return;
    let nearest = 0;
    for (let i = 1; i < time.length; i++) {
      if (Math.abs(this.x(time[i]) - px) < Math.abs(this.x(time[nearest]) - px)) nearest = i;
    }
    this.cursor = nearest;
    this.redraw();
    this.tell();
  }

  unpoint() {
    this.cursor = null;
    byId("tip").hidden = true;
    this.tellLatest();
    this.redraw();
  }

  // Writes the values at the cursor.
  tell() {
    const tip = byId("tip");
    const at = this.data.time[this.cursor];
    tip.replaceChildren(clock(at));
    tip.hidden = false;
    const box = this.canvas.getBoundingClientRect();
    tip.style.left = `${Math.min(box.left + this.x(at), window.innerWidth - 80)}px`;
    tip.style.top = `${box.top + 4}px`;
    this.write(this.cursor, clock(at));
  }

  // Writes the latest values.
  tellLatest() {
    this.write(this.data.time.length - 1, "now");
  }

  write(index, when) {
    const said = this.series.map(({ key, label }, i) => {
      const value = index < 0 ? null : this.data[key]?.[index];
      const text = value === null || value === undefined ? NONE : this.format(value);
      this.values[i](text);
      return `${label} ${text}`;
    });
    setAttribute(this.canvas, "aria-label", `${this.title}, ${when}: ${said.join(", ")}. Arrow keys move through time.`);
  }
}
