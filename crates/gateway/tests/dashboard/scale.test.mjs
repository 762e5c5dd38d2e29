// 512 workers: the time of each tick and the memory of the page.

import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { launch, open } from "./browser.mjs";
import { Fleet, eventually } from "./fleet.mjs";

const WORKERS = 512;
// Milliseconds of script, style and layout of a tick.
const LIMIT = 16;
const TICKS = Number(process.env.TICKS ?? 30);

let browser;
before(async () => { browser = await launch(); });
after(() => browser?.close());

// Records the processor time between the marks of each tick, in milliseconds. The page's own measure is
// longer if other programs use the processors.
async function traceTicks() {
  const session = await browser.newBrowserCDPSession();
  const marks = [];
  session.on("Tracing.dataCollected", ({ value }) => marks.push(...value.filter(({ name }) => name.startsWith("tick-"))));
  const complete = new Promise((resolve) => session.on("Tracing.tracingComplete", resolve));
  await session.send("Tracing.start", { traceConfig: { includedCategories: ["blink.user_timing"] } });
  return async () => {
    await session.send("Tracing.end");
    await complete;
    marks.sort((a, b) => a.ts - b.ts);
    return marks.flatMap((mark, i) => (mark.name === "tick-end" && marks[i - 1]?.name === "tick-start" ? [(mark.tts - marks[i - 1].tts) / 1000] : []));
  };
}

const spread = (values) => `median ${quantile(values, 0.5).toFixed(1)} ms, 90 % ${quantile(values, 0.9).toFixed(1)} ms, longest ${Math.max(...values).toFixed(1)} ms`;

const quantile = (values, part) => [...values].sort((a, b) => a - b)[Math.min(values.length - 1, Math.floor(part * values.length))];

test("each tick of 512 workers is short, and the memory stays the same", async (context) => {
  // Four engines, each under many names.
  const fleet = await Fleet.start({ engines: 4, engineFlags: ["--speedup", "2"] });
  try {
    await fleet.router.stop();
    const list = Array.from({ length: WORKERS }, (_, i) =>
      `[[worker]]\nurl = "http://127.0.0.1:${fleet.engines[i % 4].port}"\nname = "worker-${i + 1}"\n`).join("");
    fleet.flags = ["--config", fleet.file("workers.toml", list), "--policy", "least-requests", "--probe-interval", "20s"];
    const { engines } = fleet;
    fleet.engines = [];
    fleet.startRouter();
    fleet.engines = engines;
    await eventually("all workers", async () => (await fleet.admin("snapshot")).workers.filter(({ state }) => state === "healthy").length === WORKERS, 60_000);
    fleet.load("--workload", "agent", "--requests", "100000", "--rps", "40");
    const page = await open(browser, fleet.page);
    await page.locator("#connection[data-state=live]").waitFor();
    await page.waitForFunction((count) => document.querySelectorAll("#fleet-body > tr").length === count, WORKERS);
    await page.waitForFunction(() => window.ticks.length > 5);
    const session = await page.context().newCDPSession(page);
    await session.send("Performance.enable");
    const measure = async () => {
      await session.send("HeapProfiler.collectGarbage");
      const { metrics } = await session.send("Performance.getMetrics");
      const of = (name) => metrics.find((metric) => metric.name === name).value;
      return { heap: of("JSHeapUsedSize"), nodes: of("Nodes") };
    };
    const before = await measure();
    await page.evaluate(() => { window.ticks.length = 0; });
    const stopTrace = await traceTicks();
    await page.waitForFunction((count) => window.ticks.filter(({ name }) => name === "foresee-tick").length >= count, TICKS, { timeout: 4000 * TICKS });
    const ticks = (await page.evaluate(() => window.ticks)).filter(({ name }) => name === "foresee-tick").map(({ duration }) => duration);
    const processor = await stopTrace();
    const after = await measure();
    const report = `${ticks.length} ticks: ${spread(ticks)}; processor time ${spread(processor)}; heap ${(before.heap / 1e6).toFixed(2)} to ${(after.heap / 1e6).toFixed(2)} MB, ${before.nodes} to ${after.nodes} nodes`;
    context.diagnostic(report);
    console.log(report);
    assert.ok(after.heap < before.heap * 1.15 + 1e6, "the heap grows");
    assert.ok(after.nodes < before.nodes * 1.15 + 500, "the number of nodes grows");
    assert.ok(processor.length >= TICKS - 1, "the trace has all ticks");
    assert.ok(quantile(processor, 0.95) <= LIMIT, `a tick takes ${quantile(processor, 0.95)} ms`);
    await page.screenshot({ path: new URL("results/512.png", import.meta.url).pathname });
    assert.deepEqual(page.problems, []);
  } finally {
    await fleet.stop();
  }
});
