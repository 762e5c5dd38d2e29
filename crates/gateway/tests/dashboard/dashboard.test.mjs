// The dashboard in Chromium, in front of a running router, mock engines and load.

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { after, before, describe, test } from "node:test";
import { launch, open } from "./browser.mjs";
import { Fleet, eventually } from "./fleet.mjs";

const RESULTS = new URL("results/", import.meta.url).pathname;
const AXE = readFileSync(new URL("node_modules/axe-core/axe.min.js", import.meta.url), "utf8");

mkdirSync(RESULTS, { recursive: true });

let browser;
before(async () => { browser = await launch(); });
after(() => browser?.close());

const live = (page) => page.locator("#connection[data-state=live]").waitFor();

// Returns the texts of a worker's row, by column.
function row(page, name) {
  return page.locator("#fleet-body > tr:not(.detail-row)", { has: page.getByRole("button", { name, exact: true }) });
}

const cell = async (page, name, column) => (await row(page, name).locator(`.c-${column} .text`).textContent()).trim();

// Fails if the page has logged an error or asked another origin.
async function close(page) {
  assert.deepEqual(page.problems, []);
  await page.context().close();
}

// Returns the serious violations of accessibility rules.
async function violations(page) {
  await page.evaluate(AXE);
  const { violations: found } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
  return found.filter(({ impact }) => impact === "serious" || impact === "critical")
    .map(({ id, nodes }) => `${id}: ${nodes.slice(0, 3).map(({ html }) => html.slice(0, 160)).join(" | ")}`);
}

describe("a fleet under load", () => {
  let fleet;
  before(async () => {
    fleet = await Fleet.start({ engines: 4, engineFlags: ["--speedup", "4"] });
    fleet.load("--workload", "agent", "--requests", "4000", "--rps", "12");
    await eventually("decisions with outcomes", async () =>
      (await fleet.admin("decisions")).decisions.filter(({ outcome }) => outcome?.outcome === "ok").length >= 3);
  });
  after(() => fleet?.stop());

  test("shows every worker, and the load that the router knows", async () => {
    const page = await open(browser, fleet.page);
    await live(page);
    assert.equal(await page.locator("#fleet-body > tr").count(), 4);
    assert.equal(await page.locator("#fleet-count").textContent(), "4 of 4 healthy");
    await eventually("running requests", async () => Number(await page.locator("#tiles .value").first().textContent()) > 0);
    await eventually("a time to first token", async () => /ms|s/.test(await page.locator("#tiles .value").nth(2).textContent()));
    await close(page);
  });

  test("has the last minutes when it is opened", async () => {
    const page = await open(browser, fleet.page);
    await live(page);
    const history = await fleet.admin("history");
    assert.ok(history.seconds.time.length >= 5);
    const chart = page.locator("#chart-grid canvas").first();
    await eventually("the chart to have values", async () => /running \d/.test(await chart.getAttribute("aria-label")));
    // The keyboard moves the cursor into the past, to samples from before the page was opened.
    await chart.focus();
    for (let i = 0; i < 5; i++) await page.keyboard.press("ArrowLeft");
    assert.match(await chart.getAttribute("aria-label"), /Requests, \d\d:\d\d:\d\d: running \d/);
    assert.equal(await page.locator("#tip").isVisible(), true);
    await close(page);
  });

  test("shows the cost of every worker of a decision, and the outcome", async () => {
    const page = await open(browser, fleet.page);
    await live(page);
    const done = page.locator("#decisions-body > tr[data-level=good]").first();
    await done.waitFor();
    await page.locator("#decisions-pause").click();
    await done.getByRole("button").click();
    const table = page.getByRole("table", { name: "Cost of every worker" });
    await table.waitFor();
    const lines = table.locator("tbody tr");
    assert.equal(await lines.count(), 4);
    assert.equal(await table.locator("tr.chosen").count(), 1);
    const shown = await lines.evaluateAll((rows) => rows.map((line) => ({
      worker: line.querySelector("th").textContent.replace("✓ ", "").replace(" (chosen)", ""),
      sum: [...line.querySelectorAll(".term")].reduce((sum, term) => sum + Number(term.dataset.value), 0),
    })));
    const { decisions } = await fleet.admin("decisions");
    const same = decisions.find(({ candidates }) => candidates.every((candidate) => {
      const line = shown.find(({ worker }) => worker === candidate.worker);
      return line && Math.abs(line.sum - candidate.policy_cost) <= 1e-9 * candidate.policy_cost;
    }));
    assert.ok(same, `the terms are those of a decision: ${JSON.stringify(shown)}`);
    assert.match(await table.locator("tr.chosen th").textContent(), new RegExp(`^✓ ${same.chosen} `));
    const outcome = page.getByRole("table", { name: "Predicted and actual" });
    assert.match(await outcome.locator("tbody tr").first().textContent(), /Time to first token.*s.*%/);
    await close(page);
  });

  test("moves nothing while ticks arrive", async () => {
    const page = await open(browser, fleet.page);
    await live(page);
    await page.locator("#decisions-body > tr").nth(5).waitFor();
    await page.waitForFunction(() => window.ticks.length > 4);
    const shift = await page.evaluate(() => new Promise((resolve) => {
      let sum = 0;
      const seen = window.ticks.length;
      new PerformanceObserver((list) => { for (const entry of list.getEntries()) sum += entry.value; })
        .observe({ type: "layout-shift" });
      const wait = () => (window.ticks.length >= seen + 6 ? resolve(sum) : setTimeout(wait, 100));
      wait();
    }));
    assert.ok(shift < 0.01, `cumulative layout shift ${shift}`);
    await close(page);
  });

  test("can be used with the keyboard", async () => {
    const page = await open(browser, fleet.page);
    await live(page);
    const running = page.getByRole("columnheader", { name: "Running" });
    await running.getByRole("button").focus();
    await page.keyboard.press("Enter");
    assert.equal(await running.getAttribute("aria-sort"), "descending");
    await page.keyboard.press("Enter");
    assert.equal(await running.getAttribute("aria-sort"), "ascending");
    const name = page.getByRole("button", { name: "engine-2", exact: true });
    await name.focus();
    await page.keyboard.press("Enter");
    assert.equal(await name.getAttribute("aria-expanded"), "true");
    await page.locator("#fleet-body .facts").waitFor();
    assert.match(await page.locator("#fleet-body .facts").textContent(), /http:\/\/127\.0\.0\.1/);
    await page.keyboard.press("Enter");
    assert.equal(await page.locator("#fleet-body .facts").count(), 0);
    await page.locator("#fleet-filter").fill("engine-3");
    assert.equal(await page.locator("#fleet-body > tr").count(), 1);
    await close(page);
  });

  for (const [width, height] of [[1440, 900], [390, 844]]) {
    for (const scheme of ["light", "dark"]) {
      test(`is accessible and has its picture taken at ${width} px, ${scheme}`, async () => {
        const page = await open(browser, fleet.page, { width, height, scheme });
        await live(page);
        await page.locator("#decisions-body > tr[data-level=good]").first().waitFor();
        await page.waitForFunction(() => window.ticks.length > 2);
        await page.screenshot({ path: `${RESULTS}${width}-${scheme}.png` });
        const overflow = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
        assert.ok(overflow <= 0, `the page is ${overflow} px wider than the window`);
        await page.locator("#fleet-body").getByRole("button").first().click();
        await page.locator("#decisions-body").getByRole("button").first().click();
        await page.locator("table.terms").waitFor();
        // High enough for the whole page: what is out of sight is not rendered.
        await page.setViewportSize({ width, height: width > 700 ? 3200 : 5600 });
        assert.deepEqual(await violations(page), []);
        await page.waitForFunction((seen) => window.ticks.length > seen + 1, await page.evaluate(() => window.ticks.length));
        await page.screenshot({ path: `${RESULTS}${width}-${scheme}-whole.png` });
        await close(page);
      });
    }
  }
});

test("the values are those of the snapshot", async () => {
  const fleet = await Fleet.start({ engines: 3, engineFlags: ["--speedup", "0.02"] });
  try {
    // Long outputs of slow engines: the load stays as it is.
    const content = "a long prompt ".repeat(200);
    const running = Array.from({ length: 6 }, () => fleet.request(content, 400).catch(() => null));
    await eventually("the load", async () => (await fleet.admin("snapshot")).workers.reduce((sum, worker) => sum + worker.running + worker.queued, 0) === 6);
    const page = await open(browser, fleet.page);
    await live(page);
    await eventually("the page to show the snapshot", async () => {
      const { workers } = await fleet.admin("snapshot");
      for (const worker of workers) {
        const shown = {};
        for (const column of ["state", "running", "queued", "blocks", "events", "failures"]) shown[column] = await cell(page, worker.name, column);
        const count = (value) => (value < 10_000 ? value.toLocaleString("en") : `${(value / 1000).toFixed(1)} k`);
        assert.deepEqual(shown, {
          state: worker.state, running: String(worker.running), queued: String(worker.queued),
          blocks: `${count(worker.active_blocks)} of ${count(worker.capacity_blocks)}`, events: "estimated", failures: "none",
        });
      }
      return true;
    });
    await close(page);
    await fleet.router.stop();
    await Promise.all(running);
  } finally {
    await fleet.stop();
  }
});

test("a worker that dies is shown as down within seconds", async () => {
  const fleet = await Fleet.start({ engines: 3 });
  try {
    const page = await open(browser, fleet.page);
    await live(page);
    assert.match(await page.locator("#problems").textContent(), /All 3 workers are healthy/);
    const started = Date.now();
    await fleet.engines[1].process.stop();
    await page.locator("#problems").getByText("engine-2").waitFor();
    await eventually("the row", async () => (await cell(page, "engine-2", "state")) === "unhealthy", 5000);
    assert.ok(Date.now() - started < 5000, `took ${Date.now() - started} ms`);
    assert.equal(await page.locator("#fleet-count").textContent(), "2 of 3 healthy");
    // What is wrong comes first, and leads to the worker.
    assert.equal(await page.locator("#fleet-body > tr").first().getAttribute("data-level"), "bad");
    await page.locator("#problems").getByRole("button", { name: "engine-2" }).click();
    await page.locator("#fleet-body .facts").waitFor();
    assert.deepEqual(await violations(page), []);
    await page.screenshot({ path: `${RESULTS}down.png` });
    await close(page);
  } finally {
    await fleet.stop();
  }
});

test("the page reconnects after a restart of the router", async () => {
  const fleet = await Fleet.start({ engines: 2 });
  try {
    const page = await open(browser, fleet.page, { expected: /ERR_CONNECTION_REFUSED|ERR_INCOMPLETE_CHUNKED|ERR_CONNECTION_RESET/ });
    await live(page);
    await fleet.router.stop();
    await page.locator("#connection[data-state=lost]").waitFor();
    assert.match(await page.locator("#lost").textContent(), /No connection to the router since/);
    assert.deepEqual(await violations(page), []);
    await page.screenshot({ path: `${RESULTS}lost.png` });
    fleet.startRouter();
    await live(page);
    assert.equal(await page.locator("#lost").isVisible(), false);
    await eventually("the workers", async () => (await page.locator("#fleet-count").textContent()) === "2 of 2 healthy");
    await close(page);
  } finally {
    await fleet.stop();
  }
});

test("a router with keys asks for one and keeps it in memory", async () => {
  const { createHash } = await import("node:crypto");
  const entry = (id, scope) => `[[key]]\nid = "${id}"\nhash = "sha256:${createHash("sha256").update(id).digest("hex")}"\nscopes = ["${scope}"]\n`;
  const keys = entry("reader", "admin-read") + entry("admin", "admin");
  const fleet = new Fleet();
  const started = await Fleet.start({ engines: 1 });
  try {
    await started.router.stop();
    started.flags = ["--key-file", fleet.file("keys.toml", keys)];
    started.startRouter();
    await eventually("the router", async () => (await fetch(started.page)).ok);
    const page = await open(browser, started.page, { expected: /status of 40[13]/ });
    await page.locator("#unlock").waitFor();
    assert.equal(await page.locator("#content").isVisible(), false);
    assert.deepEqual(await violations(page), []);
    await page.screenshot({ path: `${RESULTS}locked.png` });
    await page.keyboard.type("wrong");
    await page.keyboard.press("Enter");
    await page.getByText("key of the `Authorization` header is wrong").waitFor();
    await page.locator("#key").fill("reader");
    await page.keyboard.press("Enter");
    await live(page);
    await page.locator("#fleet-body > tr").waitFor();
    const stored = await page.evaluate(() => [localStorage.length, sessionStorage.length, document.cookie]);
    assert.deepEqual(stored, [0, 0, ""]);
    await page.locator("#config-body tr").first().waitFor();
    assert.match(await page.locator("#config-body").textContent(), /keyreader, admin|keychangedreader, admin/);
    await page.getByRole("button", { name: "Reload the configuration" }).click();
    await eventually("the refusal", async () => /scope|does not open|may not/i.test(await page.locator("#reload-result").textContent()));
    // A key that is forgotten with the page.
    await page.reload();
    await page.locator("#unlock").waitFor();
    await page.locator("#key").fill("admin");
    await page.keyboard.press("Enter");
    await live(page);
    await page.getByRole("button", { name: "Reload the configuration" }).click();
    await page.getByText("Nothing has changed").waitFor();
    await close(page);
  } finally {
    await started.stop();
  }
});
