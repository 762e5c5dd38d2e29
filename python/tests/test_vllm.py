"""Predicted cache hits next to those that two real vLLM report, with their KV events.

FORESEE_TEST_VLLM_URL has the URLs of the engines, FORESEE_TEST_VLLM_EVENTS the endpoints of their
events, in the same order, and FORESEE_TEST_MODEL is the folder of their model. FORESEE_BLOCK_SIZE is
their block size. Needs pyzmq.
"""

import importlib.util
import json
import os
import time
import unittest
import urllib.request
from typing import Any

from foresee_router import Router, Worker

URLS = os.environ.get("FORESEE_TEST_VLLM_URL", "").split()
ENDPOINTS = os.environ.get("FORESEE_TEST_VLLM_EVENTS", "").split()
BLOCK_SIZE = int(os.environ.get("FORESEE_BLOCK_SIZE", "32"))
MODEL = "tiny"


@unittest.skipUnless(importlib.util.find_spec("zmq"), "pyzmq is not installed")
@unittest.skipUnless(URLS and ENDPOINTS, "FORESEE_TEST_VLLM_EVENTS is not set")
class Vllm(unittest.TestCase):
    def setUp(self) -> None:
        import zmq

        context = zmq.Context()
        self.addCleanup(context.destroy, 0)
        self.sockets: dict[str, Any] = {}
        for url, endpoint in zip(URLS, ENDPOINTS, strict=True):
            self.sockets[url] = socket = context.socket(zmq.SUB)
            socket.connect(endpoint)
            socket.subscribe("")
            socket.setsockopt(zmq.RCVTIMEO, 500)
        self.router = Router(
            [Worker(url, models=[MODEL]) for url in URLS],
            block_size=BLOCK_SIZE,
            tokenizer=os.environ["FORESEE_TEST_MODEL"],
        )
        # An empty cache, and subscriptions that have reached the engines.
        for url in URLS:
            deadline = time.monotonic() + 30
            while not self.receive(url):
                self.assertLess(time.monotonic(), deadline, "no events arrive")
                self.post(url, "/v1/completions", {"model": MODEL, "prompt": "x " * 90 + url, "max_tokens": 2})
                urllib.request.urlopen(urllib.request.Request(url + "/reset_prefix_cache", method="POST"))

    def post(self, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(url + path, content, headers)) as response:
            result: dict[str, Any] = json.load(response)
            return result

    def receive(self, url: str) -> int:
        """Apply the events that have arrived, and return the number of their messages."""
        import zmq

        count = 0
        while True:
            try:
                _topic, sequence, payload = self.sockets[url].recv_multipart()
            except zmq.Again:
                return count
            number = int.from_bytes(sequence, "big")
            if self.router.apply_events(url, payload, number) is not None:
                self.router.apply_events(url, payload, number, skip_missing=True)
            count += 1

    def test_predicted_hits_are_those_of_the_engines(self) -> None:
        predicted, reported, workers = [], [], set()
        for turn in range(1, 4):
            for topic in range(6):
                content = " ".join(f"topic {topic} says {index}" for index in range(30 * turn))
                body = {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": 4,
                    "ignore_eos": True,
                }
                with self.router.route(body=json.dumps(body).encode(), stream=False) as booking:
                    usage = self.post(booking.worker, "/v1/chat/completions", body)["usage"]
                    cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
                    booking.usage(
                        prompt_tokens=usage["prompt_tokens"],
                        completion_tokens=usage["completion_tokens"],
                        cached_tokens=cached,
                    )
                    self.assertEqual(booking.prompt_tokens, usage["prompt_tokens"])
                predicted.append(booking.overlap_tokens)
                reported.append(cached)
                workers.add(booking.worker)
                self.receive(booking.worker)
        self.assertEqual(predicted, reported)
        self.assertEqual(workers, set(URLS))
        self.assertGreater(sum(reported), 0)
        for worker in self.router.snapshot():
            self.assertEqual((worker["cache_source"], worker["requests"]), ("events", 0))


if __name__ == "__main__":
    unittest.main()
