#!/usr/bin/env python3
"""Floods a router with one greedy tenant among twenty, and prints what each tenant gets.

Two mock engines stand behind one router with keys, the queue order `fair` and a bounded queue. The
capacity is measured first: what one tenant gets that floods the router alone. Then all tenants send
at once, in an open loop: the modest ones a part of their fair share each, and the greedy one the rest
of the overload. All of these requests have a deadline for the first byte. The router's access log
shows whether a request was sent to an engine, or got its first token, after its deadline.

    cargo build --release && bench/overload/overload.py target/release/foresee
"""

import argparse
import collections
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request

API, ADMIN, ENGINES = 18080, 18081, (18101, 18102)
WORKLOAD = ("--workload", "shared-prefix-isl", "--isl", "1500", "--osl", "100", "--prefixes", "0")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", help="the program foresee")
    parser.add_argument("--tenants", type=int, default=20)
    parser.add_argument("--overload", type=float, default=3.0, help="load in multiples of the capacity")
    parser.add_argument("--modest", type=float, default=0.95, help="load of a modest tenant, in fair shares")
    parser.add_argument("--deadline", type=float, default=20, help="time for the first byte, in seconds of the engines")
    parser.add_argument("--queue-limit", type=int, default=512)
    parser.add_argument("--flood", type=float, default=60, help="requests per second that exceed the capacity by far")
    parser.add_argument("--duration", type=float, default=30, help="seconds of sending, in real time")
    parser.add_argument("--speedup", type=float, default=4, help="speed of the engines")
    return parser.parse_args()


def fetch(url):
    with urllib.request.urlopen(url, timeout=5) as response:
        return response.read().decode()


def wait_for(url):
    deadline = time.monotonic() + 20
    while True:
        try:
            return fetch(url)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def new_key(program, tenant):
    """Returns the table of a new key, and the key."""
    made = subprocess.run([program, "key", "new", "--id", tenant], capture_output=True, text=True, check=True)
    return made.stdout, made.stderr.strip().rsplit(" ", 1)[-1]


class Fleet:
    """The engines, the router, and the clients of all tenants."""

    def __init__(self, options, folder):
        self.options, self.folder, self.processes = options, folder, []
        for port in ENGINES:
            # All tenants send the same prompts, so a cache would make the engines faster with each of them.
            self.start(
                "mock-engine", "--listen", f"127.0.0.1:{port}", "--speedup", str(options.speedup),
                "--prefix-caching", "off",
            )
        tables, self.environment = [], dict(os.environ)
        for tenant in range(options.tenants):
            table, key = new_key(options.program, f"tenant-{tenant}")
            tables.append(table)
            self.environment[f"KEY_{tenant}"] = key
        keys = os.path.join(folder, "keys.toml")
        with open(os.open(keys, os.O_CREAT | os.O_WRONLY, 0o600), "w") as file:
            file.write("\n".join(tables))
        self.router = self.start(
            "serve", "--listen", f"127.0.0.1:{API}", "--admin-listen", f"127.0.0.1:{ADMIN}",
            "--key-file", keys, "--queue", "fair", "--queue-limit", str(options.queue_limit), "--shutdown-delay", "1ms",
            "--access-log", os.path.join(folder, "access"),
            *(f"--worker=http://127.0.0.1:{port},prefix-caching=off" for port in ENGINES),
        )
        wait_for(f"http://127.0.0.1:{ADMIN}/health/ready")

    def start(self, *command):
        with open(os.path.join(self.folder, "log"), "a") as log:
            process = subprocess.Popen([self.options.program, *command], stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def send(self, tenant, *flags):
        """Starts a client. Returns a function that waits for it and returns its outcome."""
        report = os.path.join(self.folder, f"{tenant}.json")
        client = subprocess.Popen(
            [self.options.program, "load", f"http://127.0.0.1:{API}", "--api-key-env", f"KEY_{tenant}",
             *WORKLOAD, "--speedup", str(self.options.speedup), "--seed", str(tenant), "--json", report, *flags],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )

        def outcome():
            client.wait()
            with open(report) as file:
                return json.load(file)["outcome"]

        return outcome

    def requests_with_deadline(self):
        """Returns the lines of the access log about requests with a deadline."""
        with open(os.path.join(self.folder, "access")) as file:
            lines = [json.loads(line) for line in file]
        return [line for line in lines if "deadline_seconds" in line]

    def resident_megabytes(self):
        with open(f"/proc/{self.router.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            process.wait()


def main():
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        fleet = Fleet(options, folder)
        try:
            run(options, fleet)
        finally:
            fleet.stop()


def open_loop(rate, seconds):
    """Returns the flags of a client that sends at a rate, whatever the responses."""
    return "--rps", str(rate), "--duration", f"{seconds}s", "--requests", "1000000"


def run(options, fleet):
    seconds = options.duration * options.speedup
    flood = fleet.send(0, *open_loop(options.flood, seconds))()
    # The queue is full when the flood ends, and its requests are served after that.
    capacity = (flood["finished"] - options.queue_limit) / seconds
    fair_share = capacity / options.tenants
    modest = options.modest * fair_share
    greedy = options.overload * capacity - modest * (options.tenants - 1)
    print(f"capacity {capacity:.1f} requests/s, fair share {fair_share:.2f}, in the engines' time")
    clients = []
    for tenant in range(options.tenants):
        rate = greedy if tenant == 0 else modest
        deadline = f"x-foresee-deadline-ms: {options.deadline / options.speedup * 1000:.0f}"
        clients.append(fleet.send(tenant, *open_loop(rate, seconds), "--header", deadline))
    before = fleet.resident_megabytes()
    time.sleep(options.duration)
    sent_all = fleet.resident_megabytes()
    outcomes = [client() for client in clients]
    print(f"memory of the router: {before:.0f} MB at the start, {sent_all:.0f} MB at the end of sending")
    print("tenant      sent  finished  refused")
    for tenant, outcome in enumerate(outcomes):
        name = "greedy" if tenant == 0 else f"modest {tenant}"
        refused = sum(failure["count"] for failure in outcome["failed"].values())
        print(f"{name:9} {outcome['sent']:6} {outcome['finished']:9} {refused:8}")
    modest_outcomes = outcomes[1:]
    finished = sum(outcome["finished"] for outcome in modest_outcomes)
    sent = sum(outcome["sent"] for outcome in modest_outcomes)
    # A tenant that sends more than its fair share by chance is owed its share.
    owed = [min(outcome["sent"], fair_share * seconds) for outcome in modest_outcomes]
    worst = min(outcome["finished"] / share for outcome, share in zip(modest_outcomes, owed))
    served = sum(outcome["finished"] for outcome in outcomes) / max(outcome["makespan"] for outcome in outcomes)
    total = sum(outcome["sent"] for outcome in outcomes) / seconds / capacity
    print(f"offered: {total:.2f} x the capacity; served: {served:.1f} requests/s")
    print(f"modest tenants: {finished} of {sent} requests finished, of the worst-off tenant {worst:.1%} of its fair share or of what it sent")
    lines = fleet.requests_with_deadline()
    started_late = [line for line in lines if line.get("queue_seconds", 0) > line["deadline_seconds"]]
    responded_late = [line for line in lines if line.get("ttft_seconds", 0) > line["deadline_seconds"]]
    reasons = collections.Counter(line.get("error_code", line["outcome"]) for line in lines)
    print(f"{len(lines)} requests with a deadline of {options.deadline:g} s: {dict(reasons)}")
    print(f"sent to an engine after it: {len(started_late)}; first token after it: {len(responded_late)}")
    metrics = fetch(f"http://127.0.0.1:{ADMIN}/metrics").splitlines()
    print("left at the end:", *(line for line in metrics if line.startswith("foresee_bookings ")))


if __name__ == "__main__":
    main()
