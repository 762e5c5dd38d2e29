#!/usr/bin/env python3
"""Routes requests by itself with Foresee's selection API (docs/api.md), with the standard library only.

    foresee mock-engine --listen 127.0.0.1:8000 --speedup 20 &
    foresee mock-engine --listen 127.0.0.1:8001 --speedup 20 &
    foresee serve --worker http://127.0.0.1:8000 --worker http://127.0.0.1:8001 &
    python3 docs/examples/selection_client.py

For each request: select a worker, send the request to it, report progress while its stream arrives,
and delete the reservation. Some requests are abandoned on purpose, after the selection or in the middle
of the stream; the router releases them when their time has passed. At the end the router's gauges are
printed. All of them are zero.
"""

import argparse
import http.client
import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

PATH = "/v1/chat/completions"
GAUGES = (
    "foresee_reservations",
    "foresee_bookings",
    "foresee_worker_requests",
    "foresee_worker_queued_requests",
    "foresee_worker_active_blocks",
    "foresee_worker_queued_blocks",
    "foresee_worker_prefill_tokens",
    "foresee_worker_context_tokens",
)
# Output tokens between two reports of progress.
REPORT_EVERY = 16

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--admin", default="http://127.0.0.1:8081", help="address of the admin listener")
parser.add_argument("--requests", type=int, default=1000)
parser.add_argument("--concurrency", type=int, default=32)
parser.add_argument("--abandoned", type=float, default=0.05, help="fraction of requests that are abandoned")
parser.add_argument("--ttl", type=float, default=3.0, help="seconds for which a reservation is held")
parser.add_argument("--model", default="model")
parser.add_argument("--key", help="admin key, if the router has one")
arguments = parser.parse_args()

connections = threading.local()


def admin(method, path, body=None):
    """Sends a request to the admin listener on this thread's connection; returns status and body."""
    headers = {}
    if body is not None:
        headers["content-type"] = "application/json"
        body = json.dumps(body)
    if arguments.key:
        headers["authorization"] = f"Bearer {arguments.key}"
    for attempt in range(2):
        if not hasattr(connections, "admin"):
            connections.admin = http.client.HTTPConnection(urlsplit(arguments.admin).netloc, timeout=60)
        try:
            connections.admin.request(method, path, body, headers)
            response = connections.admin.getresponse()
            return response.status, response.read()
        except (http.client.HTTPException, ConnectionError):
            # The router closed the idle connection. No request was lost: a selection that was made
            # but never seen expires.
            connections.admin.close()
            del connections.admin
            if attempt:
                raise
    raise AssertionError


def stream_from(worker, body):
    """Sends a request to a worker and yields the events of its stream."""
    url = urlsplit(worker["url"])
    connection = http.client.HTTPConnection(url.netloc, timeout=60)
    try:
        headers = {"content-type": "application/json"}
        if worker["rank"] is not None:
            headers["x-data-parallel-rank"] = str(worker["rank"])
        connection.request("POST", url.path.rstrip("/") + PATH, json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{worker['name']} responded with {response.status}")
        for line in response:
            if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
                yield json.loads(line[6:])
    finally:
        connection.close()


def route(number):
    """Routes one request; returns the worker's name and how the request ended."""
    choose = random.Random(number)
    # Sixteen conversations share long beginnings, so that prefix caches matter.
    beginning = f"conversation {number % 16}: " + "the quick brown fox jumps over the lazy dog " * 60
    body = {
        "model": arguments.model,
        "messages": [{"role": "user", "content": f"{beginning} question {number}"}],
        "max_tokens": choose.randint(8, 64),
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    abandons_at = None
    if choose.random() < arguments.abandoned:
        abandons_at = choose.choice(["selection", "stream"])
    selection = {"path": PATH, "body": body, "ttl": f"{int(arguments.ttl * 1000)}ms", "explain": False}
    status, text = admin("POST", "/admin/select", selection)
    if status != 200:
        return None, f"refused with {status}: {text.decode()}"
    selected = json.loads(text)
    worker, reservation = selected["worker"], f"/admin/reservations/{selected['reservation']}"
    if abandons_at == "selection":
        return worker["name"], "abandoned"
    tokens, reported, usage = 0, 0, {}
    try:
        for event in stream_from(worker, body):
            tokens += sum(1 for choice in event.get("choices", []) if choice["delta"].get("content"))
            usage = event.get("usage") or usage
            if reported == 0 and tokens > 0 or tokens >= reported + REPORT_EVERY:
                status, text = admin("POST", f"{reservation}/progress", {"output_tokens": tokens})
                if status != 200:
                    return worker["name"], f"progress failed with {status}: {text.decode()}"
                reported = tokens
                if abandons_at == "stream":
                    return worker["name"], "abandoned"
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        admin("DELETE", f"{reservation}?outcome=failed")
        return worker["name"], f"failed: {error}"
    query = f"outcome=completed&output_tokens={usage.get('completion_tokens', tokens)}"
    if "prompt_tokens" in usage:
        query += f"&prompt_tokens={usage['prompt_tokens']}"
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    if cached is not None:
        query += f"&cached_tokens={cached}"
    status, text = admin("DELETE", f"{reservation}?{query}")
    return worker["name"], "completed" if status == 200 else f"delete failed with {status}: {text.decode()}"


def gauges():
    """Returns the router's gauges of load, and the number of expired reservations."""
    _, text = admin("GET", "/metrics")
    values, expired = {}, 0.0
    for line in text.decode().splitlines():
        name = line.split("{")[0].split(" ")[0]
        if name in GAUGES:
            values[line.rsplit(" ", 1)[0]] = float(line.rsplit(" ", 1)[1])
        if name == "foresee_reservations_expired_total":
            expired = float(line.rsplit(" ", 1)[1])
    return values, expired


def main():
    started = time.monotonic()
    workers, ends = {}, {}
    with ThreadPoolExecutor(arguments.concurrency) as pool:
        for worker, end in pool.map(route, range(arguments.requests)):
            workers[worker] = workers.get(worker, 0) + 1
            ends[end] = ends.get(end, 0) + 1
    print(f"{arguments.requests} requests in {time.monotonic() - started:.1f} s")
    print("by worker:", json.dumps(workers))
    print("by end:", json.dumps(ends))
    print("gauges at the last response:")
    values, _ = gauges()
    for series, value in sorted(values.items()):
        print(f"  {series} {value:g}")
    deadline = time.monotonic() + arguments.ttl + 5
    while any(values.values()) and time.monotonic() < deadline:
        time.sleep(0.1)
        values, _ = gauges()
    print("gauges when all reservations have expired:")
    for series, value in sorted(values.items()):
        print(f"  {series} {value:g}")
    print(f"expired reservations: {gauges()[1]:g}")
    return 1 if any(values.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
