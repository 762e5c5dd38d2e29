"""The example proxy in front of two engines: mock engines, or those of FORESEE_TEST_VLLM_URL.

FORESEE is the path of the program `foresee`, which serves the mock engines. The example needs aiohttp.
FORESEE_TEST_MODEL is the folder of the model of real engines.
"""

import http.client
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import unittest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

PROXY = Path(__file__).parents[1] / "examples" / "proxy.py"
FORESEE = os.environ.get("FORESEE", "")
REAL_ENGINES = os.environ.get("FORESEE_TEST_VLLM_URL", "").split()
MODEL = "tiny" if REAL_ENGINES else "model"
SENTENCES = 40 if REAL_ENGINES else 1000
"""Length of a prompt. The real engines of the tests have a short context; for the mock engines,
computing a prompt takes so long that the noise of a busy machine decides nothing."""
SECONDS = 60.0
"""Time after which a wait has failed."""


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def eventually(condition: Callable[[], bool], message: str) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(message)
        time.sleep(0.02)


def accepts(port: int) -> bool:
    """Return whether a server listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@unittest.skipUnless(importlib.util.find_spec("aiohttp"), "aiohttp is not installed")
@unittest.skipUnless(FORESEE or REAL_ENGINES, "neither FORESEE nor FORESEE_TEST_VLLM_URL is set")
class Proxy(unittest.TestCase):
    def start(self, *command: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.terminate)
        return process

    def setUp(self) -> None:
        self.engines: dict[str, subprocess.Popen[bytes]] = {}
        for _ in () if REAL_ENGINES else range(2):
            port = free_port()
            listen = f"127.0.0.1:{port}"
            self.engines[f"http://{listen}"] = self.start(
                FORESEE, "mock-engine", "--listen", listen, "--speedup", "10"
            )
            eventually(lambda: accepts(port), "the mock engine does not listen")
        self.urls = REAL_ENGINES or list(self.engines)
        self.port = free_port()
        model = ["--model-folder", os.environ["FORESEE_TEST_MODEL"]] if REAL_ENGINES else []
        self.start(sys.executable, str(PROXY), "--port", str(self.port), *model, *self.urls)
        eventually(lambda: accepts(self.port), "the proxy does not listen")

    def connect(self) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        self.addCleanup(connection.close)
        return connection

    def send(self, path: str, **body: Any) -> http.client.HTTPResponse:
        connection = self.connect()
        content = json.dumps({"model": MODEL, "ignore_eos": True, **body})
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        return connection.getresponse()

    def workers(self) -> list[dict[str, Any]]:
        connection = self.connect()
        connection.request("GET", "/workers")
        workers: list[dict[str, Any]] = json.loads(connection.getresponse().read())
        return workers

    def idle(self) -> bool:
        return all(worker["requests"] == worker["active_blocks"] == 0 for worker in self.workers())

    def prompt(self, number: int) -> str:
        return " ".join(f"word{number} of sentence {index}" for index in range(SENTENCES))

    def test_conversations_stay_with_their_worker_and_all_workers_are_used(self) -> None:
        def chat(number: int, turn: int) -> str:
            response = self.send(
                "/v1/chat/completions",
                messages=[{"role": "user", "content": self.prompt(number)}] * turn,
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
            self.assertEqual(response.status, 200)
            events = response.read()
            self.assertTrue(events.strip().endswith(b"data: [DONE]"), events[-200:])
            self.assertEqual(re.findall(rb'"completion_tokens": ?(\d+)', events), [b"5"])
            return response.headers["x-foresee-worker"]

        # Requests that arrive together are spread; later ones follow their prefix.
        with ThreadPoolExecutor(6) as pool:
            homes = list(pool.map(chat, range(6), [1] * 6))
        self.assertEqual(set(homes), set(self.urls))
        workers = [(chat(number, turn), homes[number]) for turn in (2, 3) for number in range(6)]
        self.assertGreaterEqual(sum(worker == home for worker, home in workers), 10, workers)
        eventually(self.idle, "bookings are left")

    def test_a_complete_response_passes(self) -> None:
        response = self.send("/v1/completions", prompt=self.prompt(1), max_tokens=4)
        self.assertEqual(json.load(response)["usage"]["completion_tokens"], 4)
        eventually(self.idle, "bookings are left")

    def test_a_client_that_leaves_releases_its_booking(self) -> None:
        connection = self.connect()
        body = {"model": MODEL, "prompt": self.prompt(2), "max_tokens": 1000, "stream": True}
        content = json.dumps({**body, "ignore_eos": True})
        connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.readline()
        self.assertFalse(self.idle())
        response.close()
        connection.close()
        eventually(self.idle, "the booking of a client that left is not released")

    def test_errors_have_the_library_s_messages(self) -> None:
        connection = self.connect()
        connection.request("POST", "/v1/chat/completions", "[]", {"Content-Type": "application/json"})
        response = connection.getresponse()
        self.assertEqual(response.status, 400)
        self.assertIn("object", json.load(response)["error"]["message"])
        self.assertEqual(self.send("/v1/unknown", prompt="x").status, 400)
        unknown = self.send("/v1/completions", prompt=self.prompt(3), model="unknown")
        self.assertEqual(unknown.status, 404)
        eventually(self.idle, "bookings are left")

    @unittest.skipIf(REAL_ENGINES, "the engines are not ours to stop")
    def test_requests_of_a_lost_worker_go_to_the_other(self) -> None:
        lost, left = self.urls
        self.engines[lost].kill()
        self.engines[lost].wait(10)
        for number in range(8):
            response = self.send("/v1/completions", prompt=self.prompt(number), max_tokens=2)
            self.assertEqual(response.status, 200)
            self.assertEqual(response.headers["x-foresee-worker"], left)
            response.read()
        eventually(self.idle, "bookings are left")
        self.engines[left].kill()
        self.engines[left].wait(10)
        response = self.send("/v1/completions", prompt="x", max_tokens=2)
        self.assertIn(response.status, (502, 503))
        eventually(self.idle, "bookings are left")


if __name__ == "__main__":
    unittest.main()
