"""The router: what callers can do with it, and what they get for wrong arguments."""

import gc
import tempfile
import sys
import threading
import time
import unittest
import weakref
from array import array
from pathlib import Path
from typing import Any

import foresee_router
from foresee_router import Router, Worker

from traces import RECORDED, recorded_messages

TINY_MODEL = Path(__file__).parents[2] / "crates/engine/tests/tiny_model"


class Clock:
    """A clock that tests set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bookings(unittest.TestCase):
    def setUp(self) -> None:
        self.clock = Clock()
        self.router = Router(["a", "b"], clock=self.clock)

    def load(self) -> list[int]:
        return [worker["requests"] for worker in self.router.snapshot()]

    def test_a_booking_counts_until_it_ends(self) -> None:
        booking = self.router.route(tokens=range(100))
        self.assertEqual(sum(self.load()), 1)
        booking.first_token()
        booking.tokens(20)
        (loaded,) = [worker for worker in self.router.snapshot() if worker["requests"]]
        self.assertEqual(loaded["name"], booking.worker)
        self.assertEqual(loaded["active_blocks"], 8)  # 120 tokens in blocks of 16
        self.assertEqual(loaded["context_tokens"], 120)
        booking.complete()
        self.assertEqual(self.load(), [0, 0])
        self.assertEqual(self.router.booking_count, 0)

    def test_the_overlap_and_the_costs_are_those_of_the_choice(self) -> None:
        prompt = list(range(160))
        with self.router.route(tokens=prompt) as first:
            first.tokens(1)
        second = self.router.route(tokens=prompt + [7] * 16, explain=True)
        self.assertEqual(second.worker, first.worker)
        self.assertEqual((second.overlap_blocks, second.overlap_tokens), (10, 160))
        self.assertEqual(second.costs["overlap_blocks"], 10)
        self.assertEqual(second.costs["prefill_blocks"], 1)
        self.assertEqual(second.costs["best_overlap_blocks"], 10)
        self.assertGreaterEqual(second.predicted_ttft, 0.0)
        explanation = second.explanation
        assert explanation is not None
        self.assertEqual(explanation["choice"], second.worker)
        self.assertEqual({c["worker"] for c in explanation["candidates"]}, {"a", "b"})
        self.assertIsNone(first.explanation)
        second.release()

    def test_explain_books_nothing(self) -> None:
        explanation = self.router.explain(text="hello", model="m")
        self.assertEqual(explanation["policy"], "marginal-delay")
        self.assertEqual(len(explanation["candidates"]), 2)
        self.assertEqual(self.router.booking_count, 0)

    def test_an_exception_in_the_block_releases_and_is_raised(self) -> None:
        with self.assertRaisesRegex(RuntimeError, "client left"):
            with self.router.route(tokens=range(50)) as booking:
                self.assertEqual(self.router.booking_count, 1)
                raise RuntimeError("client left")
        self.assertTrue(booking.ended)
        self.assertEqual(self.load(), [0, 0])

    def test_a_block_can_end_its_booking_itself(self) -> None:
        with self.router.route(tokens=range(50)) as booking:
            booking.complete()
        with self.router.route(tokens=range(50)) as booking:
            booking.release()
        self.assertEqual(self.router.booking_count, 0)

    def test_release_is_idempotent_and_other_calls_after_the_end_fail(self) -> None:
        booking = self.router.route(tokens=range(50))
        booking.release()
        booking.release()
        for call in (
            booking.first_token,
            booking.complete,
            booking.reroute,
            lambda: booking.tokens(1),
            lambda: booking.usage(completion_tokens=1),
            lambda: booking.report("failure"),
            lambda: booking.predicted_ttft,
        ):
            with self.assertRaisesRegex(foresee_router.BookingEndedError, "the booking has ended"):
                call()
        self.assertIn(booking.worker, ("a", "b"))
        self.assertIn("ended", repr(booking))

    def test_a_lost_booking_is_released_by_the_garbage_collector(self) -> None:
        booking = self.router.route(tokens=range(50))
        self.assertEqual(self.router.booking_count, 1)
        del booking
        gc.collect()
        self.assertEqual(self.router.booking_count, 0)

    def test_a_booking_outlives_its_worker_and_its_router(self) -> None:
        booking = self.router.route(tokens=range(50))
        self.router.remove_worker(booking.worker)
        booking.tokens(3)
        self.assertEqual(self.load(), [0])
        router = self.router
        del self.router
        booking.complete()
        self.assertEqual(router.booking_count, 0)
        orphan = Router(["a"]).route(tokens=range(50))
        gc.collect()
        orphan.tokens(1)
        orphan.complete()

    def test_a_failed_worker_is_left(self) -> None:
        booking = self.router.route(tokens=range(50))
        first = booking.worker
        booking.report("failure")
        booking.reroute(exclude=[first])
        self.assertNotEqual(booking.worker, first)
        with self.assertRaisesRegex(foresee_router.NoWorkerError, "no worker is available"):
            booking.reroute(exclude=["a", "b"])
        self.assertFalse(booking.ended)
        booking.complete()

    def test_backpressure_says_when_to_try_again(self) -> None:
        for _ in range(2):
            booking = self.router.route(tokens=range(50))
            booking.report("backpressure", retry_after=30)
            booking.release()
        with self.assertRaises(foresee_router.BackpressureError) as raised:
            self.router.route(tokens=range(50))
        self.assertAlmostEqual(raised.exception.retry_after, 30.0)
        self.assertIn("retry after 30 s", str(raised.exception))
        self.clock.now = 31.0
        self.router.route(tokens=range(50)).complete()

    def test_cached_output_extends_the_prompt(self) -> None:
        prompt, output = list(range(160)), list(range(500, 533))
        with self.router.route(tokens=prompt) as booking:
            booking.tokens(len(output))
            booking.output(output[:-1])
        with self.router.route(tokens=prompt + output + [1] * 20) as next_turn:
            self.assertEqual(next_turn.overlap_blocks, 12)  # 160 + 32 tokens
            self.assertEqual(next_turn.worker, booking.worker)
        with self.router.route(text="no tokens") as booking:
            with self.assertRaisesRegex(ValueError, "not routed by its tokens"):
                booking.output(output)

    def test_a_body_with_several_outputs_has_a_booking_for_each(self) -> None:
        body = b'{"model": "m", "prompt": "hello", "n": 3, "stream": true}'
        booking = self.router.route(body=body, path="/v1/completions")
        self.assertEqual((booking.choices, self.router.booking_count), (3, 3))
        booking.tokens(2, choice=2)
        booking.complete(choice=1)
        self.assertEqual(self.router.booking_count, 2)
        for choice in (1, 3):
            with self.assertRaises(IndexError):
                booking.tokens(1, choice=choice)
        booking.complete()
        self.assertEqual(self.router.booking_count, 0)


class Prompts(unittest.TestCase):
    def overlap(self, router: Router, first: dict[str, Any], second: dict[str, Any]) -> int:
        with router.route(**first) as booking:
            booking.tokens(1)
        with router.route(**second) as booking:
            return booking.overlap_blocks

    def test_all_kinds_of_token_sequences_are_the_same_prompt(self) -> None:
        ids = list(range(320))
        for kind in (tuple(ids), range(320), array("I", ids), array("i", ids), array("q", ids)):
            with self.subTest(type(kind)):
                overlap = self.overlap(Router(["a"]), {"tokens": ids}, {"tokens": kind})
                self.assertEqual(overlap, 19)  # the last token must be computed

    def test_model_and_salt_separate_prompts(self) -> None:
        text = {"text": "the same long text " * 50}
        self.assertGreater(self.overlap(Router(["a"]), text, text), 5)
        self.assertEqual(self.overlap(Router(["a"]), {**text, "model": "m"}, {**text, "model": "n"}), 0)
        self.assertEqual(self.overlap(Router(["a"]), text, {**text, "cache_salt": "x"}), 0)

    def test_a_tokenizer_turns_texts_and_chats_into_tokens(self) -> None:
        router = Router(["a"], tokenizer=TINY_MODEL)
        completion = b'{"prompt": "Hello world, how are you doing today?"}'
        booking = router.route(body=completion, path="/v1/completions")
        same = router.route(text="Hello world, how are you doing today?")
        self.assertEqual(booking.prompt_tokens, same.prompt_tokens)
        chat = router.route(body=b'{"messages": [{"role": "user", "content": "Hi"}]}')
        rendered = router.route(text="<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
        self.assertAlmostEqual(chat.prompt_tokens, rendered.prompt_tokens, delta=2)
        self.assertNotEqual(chat.prompt_tokens, len("Hi"))

    def test_the_ratio_of_bytes_per_token_is_learned_from_usage(self) -> None:
        router = Router(["a"])
        text = "x" * 800
        self.assertEqual(router.route(text=text).prompt_tokens, 200)
        for _ in range(20):
            with router.route(text=text) as booking:
                booking.usage(prompt_tokens=400, completion_tokens=3, cached_tokens=0)
        self.assertEqual(router.route(text=text).prompt_tokens, 400)


class Events(unittest.TestCase):
    MESSAGES = recorded_messages("full_report/full.stream.bin")

    def router(self, **settings: Any) -> Router:
        return Router([Worker("w", models=["m"], **settings), Worker("v", models=["m"])])

    def apply(self, router: Router, number: int, **settings: bool) -> int | None:
        _, sequence, payload = self.MESSAGES[number]
        return router.apply_events("w", payload, int.from_bytes(sequence, "big"), **settings)

    def test_events_replace_the_estimate(self) -> None:
        router = self.router()
        self.assertEqual(router.snapshot()[0]["cache_source"], "estimated")
        for number in range(len(self.MESSAGES)):
            self.assertIsNone(self.apply(router, number))
        worker = router.snapshot()[0]
        self.assertEqual((worker["cache_source"], worker["events_exact"]), ("events", True))
        self.assertGreater(worker["cached_blocks"], 0)
        self.assertIsNone(self.apply(router, 3), "a known batch is ignored")
        router.stop_events("w")
        worker = router.snapshot()[0]
        self.assertEqual((worker["cache_source"], worker["cached_blocks"]), ("estimated", 0))

    def test_a_gap_is_reported_and_can_be_replayed_or_skipped(self) -> None:
        router = self.router()
        self.assertEqual(self.apply(router, 2), 0)
        self.apply(router, 0)
        self.assertEqual(self.apply(router, 3), 1)
        self.assertIsNone(self.apply(router, 1, replayed=True))
        self.assertTrue(router.snapshot()[0]["events_exact"])
        self.assertIsNone(self.apply(router, 3, skip_missing=True))
        self.assertFalse(router.snapshot()[0]["events_exact"])

    def test_events_without_numbers_follow_each_other(self) -> None:
        router = self.router()
        for _, _, payload in self.MESSAGES:
            self.assertIsNone(router.apply_events("w", payload))
        self.assertTrue(router.snapshot()[0]["events_exact"])

    def test_unreadable_and_unusable_events_are_errors(self) -> None:
        router = self.router()
        with self.assertRaisesRegex(foresee_router.EventsError, "cannot be decoded"):
            router.apply_events("w", b"\xc1 no batch")
        self.apply(router, 1)
        with self.assertRaisesRegex(foresee_router.WorkerError, "the model of worker `x`"):
            Router(["x"]).apply_events("x", self.MESSAGES[0][2])
        unusable = Router([Worker("w", models=["m"])], block_size=48)
        with self.assertRaisesRegex(foresee_router.EventsError, "engine block size 32 is not a multiple"):
            for number in range(5):
                self.apply(unusable, number)
        self.assertEqual(unusable.snapshot()[0]["cache_source"], "estimated")

    def test_recorded_streams_of_all_layouts_are_read(self) -> None:
        streams = sorted(RECORDED.glob("*/*.stream.bin"))
        self.assertGreater(len(streams), 2)
        for stream in streams:
            router = Router([Worker("w", models=["m"])], block_size=1)
            for _, sequence, payload in recorded_messages(str(stream.relative_to(RECORDED))):
                router.apply_events("w", payload, int.from_bytes(sequence, "big"), skip_missing=True)
            self.assertEqual(router.snapshot()[0]["cache_source"], "events", stream)


class Workers(unittest.TestCase):
    def test_workers_can_be_changed(self) -> None:
        router = Router()
        with self.assertRaises(foresee_router.NoWorkerError):
            router.route(tokens=[1])
        router.add_worker(Worker("a", models=["m"], capacity_blocks=64, eviction="radix"))
        with self.assertRaisesRegex(foresee_router.WorkerError, "a worker named `a` exists already"):
            router.add_worker("a")
        worker = router.snapshot()[0]
        self.assertEqual((worker["capacity_blocks"], worker["eviction"]), (64, "radix"))
        with self.assertRaisesRegex(foresee_router.UnknownModelError, "no worker serves the model `n`"):
            router.route(tokens=[1], model="n")
        for change in (router.set_draining, router.set_healthy):
            change("a", change == router.set_draining)
            with self.assertRaises(foresee_router.NoWorkerError):
                router.route(tokens=[1])
            change("a", change != router.set_draining)
        router.set_capacity("a", 128)
        self.assertEqual(router.snapshot()[0]["capacity_source"], "reported")
        router.route(tokens=[1]).complete()
        router.clear_cache("a")
        router.remove_worker("a")
        self.assertEqual(router.snapshot(), [])

    def test_an_unknown_worker_is_named(self) -> None:
        router = Router(["a"])
        for call in (
            lambda: router.remove_worker("x"),
            lambda: router.set_healthy("x", True),
            lambda: router.apply_events("x", b""),
            lambda: router.route(tokens=[1], exclude=["x"]),
        ):
            with self.assertRaisesRegex(foresee_router.UnknownWorkerError, "no worker named `x`") as raised:
                call()
            self.assertIsInstance(raised.exception, LookupError)


class Arguments(unittest.TestCase):
    def test_settings_are_checked(self) -> None:
        for settings, message in (
            ({"policy": "best"}, "unknown policy `best`: use marginal-delay, kv"),
            ({"temperature": -1.0}, "`temperature` is -1"),
            ({"overlap_weight": float("nan")}, "`overlap-weight` is NaN"),
            ({"block_size": 0}, "`block_size` is `0`"),
            ({"engine": "tgi"}, "`engine` is `tgi`: use one of vllm, sglang"),
            ({"workers": [Worker("a", eviction="lru")]}, "use one of queue, radix"),  # type: ignore[arg-type]
            ({"tokenizer": "/nowhere"}, "no tokenizer.json in /nowhere"),
        ):
            with self.subTest(message), self.assertRaisesRegex(ValueError, message) as raised:
                Router(**settings)
            self.assertIsInstance(raised.exception, foresee_router.ForeseeError)

    def test_contents_are_checked(self) -> None:
        router: Any = Router(["a"])
        for arguments, error, message in (
            ({}, ValueError, "exactly one of `tokens`, `text` and `body`"),
            ({"tokens": [1], "text": "x"}, ValueError, "exactly one of"),
            ({"tokens": [1, -1]}, ValueError, "`tokens` contains a number that is not a token id"),
            ({"tokens": [2**32]}, ValueError, "not a token id"),
            ({"tokens": array("q", [-1])}, ValueError, "not a token id"),
            ({"tokens": "text"}, TypeError, ""),
            ({"tokens": [1.5]}, TypeError, ""),
            ({"text": b"bytes"}, TypeError, ""),
            ({"body": b"{}", "path": "/v1/files"}, ValueError, "`/v1/files` is not a path"),
            ({"body": b"[]"}, foresee_router.BodyError, ""),
            ({"tokens": [1], "max_tokens": -1}, OverflowError, ""),
            ({"tokens": [1], "polcy": "x"}, TypeError, "polcy"),
        ):
            with self.subTest(arguments), self.assertRaisesRegex(error, message):
                router.route(**arguments)
        self.assertEqual(router.booking_count, 0)
        booking: Any = router.route(tokens=[1])
        with self.assertRaisesRegex(ValueError, "`result` is `bad`"):
            booking.report("bad")
        with self.assertRaisesRegex(ValueError, "`retry_after` is -1"):
            booking.report("backpressure", retry_after=-1.0)

    def test_the_clock_must_return_seconds(self) -> None:
        with self.assertRaisesRegex(ValueError, "the clock says -1"):
            Router(["a"], clock=lambda: -1.0).route(tokens=[1])

        def broken() -> float:
            raise KeyError("clock")

        router = Router(["a"], clock=broken)
        with self.assertRaises(KeyError):
            router.route(tokens=[1])
        self.assertEqual(router.booking_count, 0)


class StateFiles(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.path = Path(folder.name) / "state.json"

    def taught(self) -> Router:
        """Return a router that has seen a slow worker."""
        clock = Clock()
        router = Router([Worker("a", models=["m"])], clock=clock)
        for number in range(40):
            with router.route(tokens=range(number * 10_000, number * 10_000 + 4_000)) as booking:
                clock.now += 2.0
                booking.first_token()
                for _ in range(10):
                    clock.now += 0.1
                    booking.tokens(1)
        return router

    def test_a_new_router_starts_with_what_was_learned(self) -> None:
        taught = self.taught()
        taught.save(self.path)
        prompt = range(4_000)
        fresh = Router([Worker("a", models=["m"])]).route(tokens=prompt).predicted_ttft
        learned = taught.route(tokens=range(900_000, 904_000)).predicted_ttft
        restored = Router([Worker("a", models=["m"])], state=self.path).route(tokens=prompt)
        loaded = Router()
        loaded.load(str(self.path))
        loaded.add_worker(Worker("a", models=["m"]))
        self.assertGreater(learned, 3 * fresh)
        self.assertAlmostEqual(restored.predicted_ttft, learned, delta=learned * 0.2)
        self.assertEqual(loaded.route(tokens=prompt).predicted_ttft, restored.predicted_ttft)

    def test_files_are_checked(self) -> None:
        self.assertEqual(Router(state=self.path).snapshot(), [], "a missing state is no error")
        with self.assertRaises(FileNotFoundError):
            Router().load(self.path)
        with self.assertRaises(OSError):
            Router().save("/nowhere/state.json")
        for content, message in (
            ("{", ""),
            ('{"version": 99, "router": {}, "bytes_per_token": {}}', ""),
        ):
            self.path.write_text(content)
            with self.assertRaisesRegex(foresee_router.StateFileError, message):
                Router().load(self.path)
        self.taught().save(self.path)
        self.path.write_text(self.path.read_text().replace('"version":1', '"version":99'))
        with self.assertRaisesRegex(foresee_router.StateFileError, "version 99"):
            Router(state=self.path)
        with self.assertRaisesRegex(foresee_router.StateFileError, "before workers are added"):
            Router(["a"]).load(self.path)


class Threads(unittest.TestCase):
    def test_other_threads_run_while_a_prompt_is_hashed(self) -> None:
        router = Router(["a"])
        prompt = array("I", range(1000)) * 30_000  # 30 million tokens, far more than a scheduler slice
        started, stop = threading.Event(), threading.Event()
        turns: list[float] = []

        def count() -> None:
            while not stop.is_set():
                turns.append(time.perf_counter())
                started.set()
                time.sleep(0.0001)  # gives the lock up

        counter = threading.Thread(target=count)
        # No thread is made to give up the interpreter's lock: each must do so by itself.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(60.0)
        try:
            counter.start()
            started.wait(10)
            begin = time.perf_counter()
            booking = router.route(tokens=prompt)
            end = time.perf_counter()
        finally:
            stop.set()
            sys.setswitchinterval(interval)
            counter.join(10)
        booking.release()
        self.assertGreater(sum(begin < turn < end for turn in turns), 0)

    def test_a_clock_that_refers_to_its_router_is_collected(self) -> None:
        clock: Any = Clock()
        clock.router = Router(["a"], clock=clock)
        clock.booking = clock.router.route(tokens=[1])
        reference = weakref.ref(clock)
        del clock
        gc.collect()
        self.assertIsNone(reference())

    def test_threads_book_and_release_together(self) -> None:
        router = Router([f"w{index}" for index in range(4)])
        errors: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for number in range(200):
                    with router.route(tokens=range(seed, seed + 500), max_tokens=number) as booking:
                        booking.first_token()
                        booking.tokens(5)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(errors, [])
        self.assertEqual(router.booking_count, 0)
        self.assertTrue(all(worker["active_blocks"] == 0 for worker in router.snapshot()))


if __name__ == "__main__":
    unittest.main()
