// Starts and stops the program: mock engines, the router, and load.

import { spawn } from "node:child_process";
import { createServer } from "node:net";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const ROOT = new URL("../../../..", import.meta.url).pathname;
const PROGRAM = process.env.FORESEE ?? join(ROOT, "target/debug/foresee");

// Returns a port that is free now.
export function freePort() {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.on("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address();
      server.close(() => resolve(port));
    });
  });
}

// Polls until `check` returns a value that is true, and returns it. Fails after `limit` milliseconds.
export async function eventually(what, check, limit = 15_000) {
  const until = Date.now() + limit;
  let problem = "";
  for (;;) {
    try {
      const value = await check();
      if (value) return value;
    } catch (error) {
      problem = `: ${error.message}`;
    }
    if (Date.now() > until) throw new Error(`timed out waiting for ${what}${problem}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

// A running process of the program.
class Process {
  constructor(args) {
    this.log = "";
    const environment = { PATH: process.env.PATH, HOME: process.env.HOME, NO_COLOR: "1" };
    this.child = spawn(PROGRAM, args, { env: environment, stdio: ["ignore", "pipe", "pipe"] });
    const note = (data) => { this.log = (this.log + data).slice(-20_000); };
    this.child.stdout.on("data", note);
    this.child.stderr.on("data", note);
    this.ended = new Promise((resolve) => this.child.on("exit", resolve));
  }

  async stop(signal = "SIGKILL") {
    this.child.kill(signal);
    await this.ended;
  }
}

// Mock engines and a router in front of them.
export class Fleet {
  constructor() {
    this.folder = mkdtempSync(join(tmpdir(), "foresee-dashboard-"));
    this.engines = [];
    this.loads = [];
    this.flags = [];
  }

  // Starts engines and the router. `flags` are those of the router, and `engineFlags` those of each
  // engine.
  static async start({ engines = 4, flags = [], engineFlags = [] } = {}) {
    const fleet = new Fleet();
    for (let number = 1; number <= engines; number++) await fleet.addEngine(number, engineFlags);
    [fleet.port, fleet.adminPort] = [await freePort(), await freePort()];
    fleet.flags = flags;
    fleet.startRouter();
    await eventually("the router", () => fleet.snapshotOrNull());
    return fleet;
  }

  async addEngine(number, engineFlags) {
    const port = await freePort();
    const process = new Process(["mock-engine", "--listen", `127.0.0.1:${port}`, "--seed", `${number}`, ...engineFlags]);
    this.engines.push({ process, name: `engine-${number}`, port });
  }

  startRouter() {
    const workers = this.engines.flatMap(({ port, name }) => ["--worker", `http://127.0.0.1:${port},name=${name}`]);
    this.router = new Process(["serve", "--listen", `127.0.0.1:${this.port}`, "--admin-listen", `127.0.0.1:${this.adminPort}`,
      "--probe-interval", "300ms", "--shutdown-delay", "0s", ...workers, ...this.flags]);
  }

  get page() {
    return `http://127.0.0.1:${this.adminPort}/dashboard`;
  }

  async admin(path, options) {
    const response = await fetch(`http://127.0.0.1:${this.adminPort}/admin/${path}`, options);
    if (!response.ok) throw new Error(`${path}: ${response.status} ${await response.text()}`);
    return response.json();
  }

  async snapshotOrNull() {
    const snapshot = await this.admin("snapshot").catch(() => null);
    const healthy = snapshot?.workers.filter(({ state }) => state === "healthy").length;
    return healthy >= this.engines.length ? snapshot : null;
  }

  // Sends a workload to the router in the background.
  load(...flags) {
    const load = new Process(["load", `http://127.0.0.1:${this.port}`, "--model", "model", ...flags]);
    this.loads.push(load);
    return load;
  }

  // Sends one request and returns its response.
  async request(content, maxTokens = 8) {
    const body = { model: "model", max_tokens: maxTokens, messages: [{ role: "user", content }] };
    return fetch(`http://127.0.0.1:${this.port}/v1/chat/completions`, {
      method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
    });
  }

  file(name, content) {
    const path = join(this.folder, name);
    writeFileSync(path, content, { mode: 0o600 });
    return path;
  }

  async stop() {
    const all = [...this.loads, this.router, ...this.engines.map(({ process }) => process)];
    await Promise.all(all.map((process) => process.stop()));
    rmSync(this.folder, { recursive: true });
  }
}
