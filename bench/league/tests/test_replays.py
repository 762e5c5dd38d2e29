"""Flags of the replay of a run."""

import unittest
from pathlib import Path

import replays
import rows

LEAGUE = rows.read(Path(__file__).parent.parent / "rows.toml")


def result(row: str, router: str) -> dict[str, object]:
    return {"row": row, "router": router, "seed": 3, "error": None, "void": False, "lost": 0}


class Flags(unittest.TestCase):
    def test_a_replay_has_the_traffic_the_seed_and_the_fleet_of_the_run(self) -> None:
        row = LEAGUE.row("slowing")
        flags = " ".join(replays.replay_flags(row, result("slowing", "smg"), Path("traces")))
        self.assertIn("--rps 30", flags)
        self.assertIn("--engine l40s-8b", flags)
        self.assertIn("--policy smg --seed 3", flags)
        # After 8 s of real time, at four times real speed.
        self.assertIn("--fleet-change 3:speed=0.5@32s", flags)
        row = LEAGUE.row("joining")
        flags = " ".join(replays.replay_flags(row, result("joining", "nginx"), Path("traces")))
        self.assertIn("--fleet-change 7:join@32s", flags)
        row = LEAGUE.row("mooncake")
        flags = replays.replay_flags(row, result("mooncake", "foresee"), Path("traces"))
        self.assertEqual(flags[:2], ["--trace", "traces/mooncake_conversation_trace.jsonl"])

    def test_runs_that_the_simulator_cannot_imitate_are_left_out(self) -> None:
        self.assertTrue(replays.can_replay(LEAGUE, result("agent", "smg")))
        self.assertFalse(replays.can_replay(LEAGUE, result("leaving", "smg")))
        self.assertFalse(replays.can_replay(LEAGUE, result("failing", "smg")))
        self.assertFalse(replays.can_replay(LEAGUE, result("agent", "smg-least-load")))
        self.assertFalse(replays.can_replay(LEAGUE, result("agent", "smg") | {"void": True}))


if __name__ == "__main__":
    unittest.main()
