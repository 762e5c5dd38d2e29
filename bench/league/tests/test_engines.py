"""Engines that run already: their metrics and the reset of their caches."""

import threading
import unittest
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from engines import Fleet
from processes import LeagueError

VLLM_METRICS = """
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
vllm:prompt_tokens_total{model_name="a model"} 900.0
vllm:prefix_cache_hits_total{model_name="a model"} 300.0
vllm:num_requests_running{model_name="a model"} 0.0
vllm:num_requests_waiting{model_name="a model"} 0.0
"""

SGLANG_METRICS = """
sglang:prompt_tokens_total{is_streaming="false"} 500.0
sglang:prompt_tokens_total{is_streaming="true"} 400.0
sglang:cached_tokens_total{cache_source="device"} 200.0
sglang:num_running_reqs{tp_rank="0"} 0.0
sglang:num_queue_reqs{tp_rank="0"} 0.0
"""


class RunningEngine(unittest.TestCase):
    def start(self, metrics: str, reset_path: str) -> Fleet:
        """Starts an engine that only knows its metrics and one path of POST."""
        self.metrics = metrics
        self.resets = 0
        test = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.respond(200, test.metrics)

            def do_POST(self) -> None:
                is_known = self.path == reset_path
                test.resets += is_known
                self.respond(200 if is_known else 404, "")

            def respond(self, status: int, text: str) -> None:
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return Fleet.running((f"http://127.0.0.1:{server.server_port}",), Path())

    def test_the_tokens_of_a_run_are_those_after_the_reset(self) -> None:
        for metrics, reset_path, old, new, computed in [
            (VLLM_METRICS, "/reset_prefix_cache", "900.0", "1500.0", 600),
            (SGLANG_METRICS, "/flush_cache", "400.0", "450.0", 50),
        ]:
            with self.subTest(reset_path):
                fleet = self.start(metrics, reset_path)
                fleet.start()
                self.assertEqual(self.resets, 1)
                self.assertEqual(fleet.engines[0].computed_tokens(), 0)
                self.metrics = metrics.replace(old, new)
                self.assertEqual(fleet.engines[0].computed_tokens(), computed)

    def test_an_engine_is_idle_without_running_and_waiting_requests(self) -> None:
        for metrics, gauge in [
            (VLLM_METRICS, 'waiting{model_name="a model"}'),
            (SGLANG_METRICS, 'num_running_reqs{tp_rank="0"}'),
        ]:
            with self.subTest(gauge):
                engine = self.start(metrics, "/").engines[0]
                self.assertTrue(engine.is_idle())
                self.metrics = metrics.replace(f"{gauge} 0.0", f"{gauge} 2.0")
                self.assertFalse(engine.is_idle())

    def test_a_refused_reset_names_the_remedy(self) -> None:
        fleet = self.start(VLLM_METRICS, "/other")
        with self.assertRaisesRegex(LeagueError, "start vLLM with VLLM_SERVER_DEV_MODE=1"):
            fleet.start()


if __name__ == "__main__":
    unittest.main()
