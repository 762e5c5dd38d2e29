// Numbers with their units.

export const NONE = "–";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function digits(value) {
  const size = Math.abs(value);
  if (size >= 100) return whole.format(value);
  return size >= 10 ? value.toFixed(1) : value.toFixed(2);
}

const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);

export const count = (value) => (isKnown(value) ? whole.format(value) : NONE);

// A number of at most about four characters: 950, 9.5 k, 1.2 M.
export function short(value) {
  if (!isKnown(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 999_500) return `${digits(value / 1e6)} M`;
  if (size >= 10_000) return `${(value / 1e3).toFixed(size >= 99_950 ? 0 : 1)} k`;
  return size > 0 && size < 10 && value % 1 ? value.toFixed(1) : whole.format(value);
}

export function seconds(value) {
  if (!isKnown(value)) return NONE;
  if (value === 0) return "0 s";
  if (Math.abs(value) < 0.0005) return `${(value * 1e6).toFixed(0)} µs`;
  if (Math.abs(value) < 0.00995) return `${(value * 1e3).toFixed(1)} ms`;
  if (Math.abs(value) < 0.9995) return `${(value * 1e3).toFixed(0)} ms`;
  return Math.abs(value) < 600 ? `${digits(value)} s` : `${whole.format(value / 60)} min`;
}

export const percent = (value) => (isKnown(value) ? `${(value * 100).toFixed(0)} %` : NONE);

export const rate = (value) => (isKnown(value) ? `${short(value)}/s` : NONE);

// The relative error of a prediction, with its sign.
export function error(predicted, actual) {
  if (!isKnown(predicted) || !isKnown(actual) || actual === 0) return NONE;
  const relative = (predicted - actual) / actual;
  return `${relative > 0 ? "+" : ""}${(relative * 100).toFixed(0)} %`;
}

const pad = (value) => String(value).padStart(2, "0");

// A time of day: of seconds since the epoch, in the time zone of the browser.
export function clock(time, withSeconds = true) {
  const date = new Date(time * 1000);
  const minutes = `${pad(date.getHours())}:${pad(date.getMinutes())}`;
  return withSeconds ? `${minutes}:${pad(date.getSeconds())}` : minutes;
}

export function duration(value) {
  if (value < 60) return `${Math.floor(value)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min`;
  if (value < 172_800) return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
  return `${Math.floor(value / 86_400)} days`;
}
