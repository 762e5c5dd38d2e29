// Starts Chromium, and watches its pages for errors and for requests to other origins.

import { chromium } from "playwright-core";

const ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync"];

export function launch() {
  return chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ARGUMENTS });
}

// Opens a page. Its `problems` are errors in the console and requests to another origin; errors of
// requests that match `expected` are none.
export async function open(browser, url, { width = 1440, height = 900, scheme = "light", expected = null } = {}) {
  const context = await browser.newContext({
    viewport: { width, height }, colorScheme: scheme, deviceScaleFactor: 1, isMobile: width < 700, hasTouch: width < 700,
  });
  const page = await context.newPage();
  page.problems = [];
  const { origin } = new URL(url);
  page.on("console", (message) => {
    const isError = message.type() === "error" || message.type() === "warning";
    if (isError && !expected?.test(message.text())) page.problems.push(`console: ${message.text()}`);
  });
  page.on("pageerror", (error) => page.problems.push(`exception: ${error.message}`));
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== origin) page.problems.push(`request to ${request.url()}`);
  });
  await page.addInitScript(() => {
    window.ticks = [];
    new PerformanceObserver((list) => window.ticks.push(...list.getEntries().map(({ name, duration }) => ({ name, duration }))))
      .observe({ entryTypes: ["measure"] });
  });
  if (process.env.ASSETS) {
    // For work on the page: takes its files from a folder in place of the program.
    const { readFileSync } = await import("node:fs");
    const types = { js: "text/javascript", css: "text/css", svg: "image/svg+xml" };
    await page.route("**/dashboard/*", (route) => {
      const name = new URL(route.request().url()).pathname.split("/").pop();
      route.fulfill({ body: readFileSync(`${process.env.ASSETS}/${name}`), contentType: types[name.split(".").pop()] });
    });
    await page.route("**/dashboard", (route) => route.fulfill({
      body: readFileSync(`${process.env.ASSETS}/index.html`), contentType: "text/html",
      headers: { "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'" },
    }));
  }
  await page.goto(url);
  return page;
}
