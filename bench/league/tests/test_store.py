"""Saved runs, resumption and the order of runs."""

import tempfile
import unittest
from pathlib import Path

from store import RunKey, Store, order


class Order(unittest.TestCase):
    def test_routers_take_turns_and_the_first_one_rotates(self) -> None:
        keys = order(["x", "y"], ["a", "b", "c"], [1, 2])
        self.assertEqual(len(set(keys)), 12)
        groups = [keys[start : start + 3] for start in range(0, 12, 3)]
        for group in groups:
            self.assertEqual(len({(key.row, key.seed) for key in group}), 1)
        self.assertEqual([group[0].router for group in groups], ["a", "b", "c", "a"])


class Resumption(unittest.TestCase):
    def setUp(self) -> None:
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.store = Store(Path(directory.name))

    def test_saved_runs_are_not_missing(self) -> None:
        keys = order(["x"], ["a", "b"], [1, 2])
        self.assertEqual(self.store.missing(keys), keys)
        self.store.save(keys[1], {"row": "x"})
        self.assertEqual(self.store.missing(keys), [keys[0], *keys[2:]])
        self.assertEqual(self.store.load(keys[1]), {"row": "x"})
        self.assertEqual(self.store.all(), [{"row": "x"}])

    def test_void_and_failed_runs_are_repeated_on_request(self) -> None:
        keys = order(["x"], ["a", "b", "c"], [1])
        self.store.save(keys[0], {"void": False, "error": None})
        self.store.save(keys[1], {"void": True, "error": None})
        self.store.save(keys[2], {"void": False, "error": "the router did not start"})
        self.assertEqual(self.store.missing(keys), [])
        self.assertEqual(self.store.missing(keys, repeat_invalid=True), keys[1:])

    def test_an_interrupted_write_leaves_the_run_missing(self) -> None:
        key = RunKey("x", "a", 1)
        path = self.store.path(key)
        path.parent.mkdir(parents=True)
        path.with_suffix(".json.part").write_text('{"row": "x"')
        self.assertEqual(self.store.missing([key]), [key])
        path.write_text('{"row": "x"')
        self.assertEqual(self.store.missing([key]), [key])
        self.assertEqual(self.store.all(), [])


if __name__ == "__main__":
    unittest.main()
