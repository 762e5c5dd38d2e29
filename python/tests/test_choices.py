"""The library chooses as the Rust library does, on the same trace."""

import os
import unittest
from pathlib import Path

import foresee_router

from replay import REFERENCE, reference_choices, replay
from traces import Operation, conversations, header, mooncake, recorded_events

POLICIES = (
    "marginal-delay",
    "kv",
    "lmetric",
    "least-requests",
    "power-of-two",
    "consistent-hash",
    "round-robin",
    "random",
)


@unittest.skipUnless(REFERENCE, "FORESEE_REFERENCE names no reference program: run check")
class Choices(unittest.TestCase):
    def assert_equal(self, head: Operation, operations: list[Operation]) -> None:
        ours, theirs = replay(head, operations), reference_choices(head, operations)
        routed = sum(operation["op"] == "route" for operation in operations)
        self.assertEqual(len(ours), routed)
        self.assertEqual(ours, theirs)

    def test_conversations_under_every_policy(self) -> None:
        operations = conversations(400)
        for policy in POLICIES:
            with self.subTest(policy):
                self.assert_equal(header(5, policy=policy), operations)

    def test_random_choices_of_the_same_seed(self) -> None:
        operations = conversations(300)
        head = header(5, temperature=0.5, seed=11)
        self.assert_equal(head, operations)
        self.assertNotEqual(replay(head, operations), replay(header(5, temperature=0.5, seed=12), operations))

    def test_recorded_kv_events(self) -> None:
        head, operations = header(3), recorded_events()
        self.assert_equal(head, operations)
        without = [operation for operation in operations if operation["op"] != "events"]
        self.assertNotEqual(replay(head, operations), replay(head, without), "events change choices")

    @unittest.skipUnless("FORESEE_TEST_TRACE" in os.environ, "FORESEE_TEST_TRACE names no trace")
    def test_a_trace_of_production(self) -> None:
        path = Path(os.environ["FORESEE_TEST_TRACE"])
        self.assert_equal(header(8), mooncake(path, 1500))


class Package(unittest.TestCase):
    def test_the_package_is_typed_and_complete(self) -> None:
        folder = Path(foresee_router.__file__).parent
        self.assertTrue((folder / "py.typed").exists())
        self.assertTrue((folder / "_foresee_router.pyi").exists())
        for name in foresee_router.__all__:
            self.assertIsNotNone(getattr(foresee_router, name))


if __name__ == "__main__":
    unittest.main()
