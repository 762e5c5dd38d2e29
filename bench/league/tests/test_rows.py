"""Parsing of rows and routers."""

import unittest
from pathlib import Path

import rows

ROUTERS = """
[[router]]
name = "a"
kind = "smg"
command = ["run", "{port}"]
evidence = [{ what = "loads", source = "log", pattern = "loads" }]
"""

VALID = """
[league]
engines = 2
seeds = 3
max_seeds = 10
max_client_delay_ms = 5

[[row]]
name = "r"
description = "d"
engine = ["--engine", "l40s-8b"]
speedup = 4
load = ["--workload", "agent"]
speeds = { 1 = 0.5 }
event = [{ at = 9, action = "slow", engine = 0, slowdown = 2.0 }, { at = 3, action = "join", engine = 1 }]
"""


class Parsing(unittest.TestCase):
    def test_a_valid_file_has_every_entry(self) -> None:
        league = rows.parse(VALID, ROUTERS)
        row = league.row("r")
        self.assertEqual(row.engine_speedups(2), [4.0, 2.0])
        self.assertEqual([event.at for event in row.events], [3.0, 9.0])
        self.assertEqual(row.late, frozenset({1}))
        self.assertEqual(row.quick, ())
        self.assertTrue(league.router("a").default)
        self.assertFalse(league.router("a").evidence[0].ready)

    def test_an_invalid_file_is_refused_with_the_entry(self) -> None:
        for old, new, message in [
            ("seeds = 3\n", "", "league: field seeds is missing"),
            ('kind = "smg"', 'kind = "smg"\nfast = 1', "router a: unknown field fast"),
            ("speedup = 4", 'speedup = "4"', "row r: speedup must be a float"),
            ('"slow"', '"stop"', "event of row r: action must be one of"),
            ("engine = 1 }", "engine = 2 }", "engines are numbered from 0 to 1"),
            ('"log"', '"ear"', "source must be log or metrics"),
            ("[league]", "[league", "not TOML"),
            (VALID, VALID + VALID[VALID.index("[[row]]") :], "row r occurs twice"),
        ]:
            with self.subTest(message), self.assertRaisesRegex(rows.RowsError, message):
                rows.parse(VALID.replace(old, new), ROUTERS.replace(old, new))

    def test_a_quick_league_has_the_quick_loads_and_other_fingerprints(self) -> None:
        text = VALID.replace("speedup = 4", 'speedup = 4\nquick = ["--requests", "9"]')
        league = rows.parse(text, ROUTERS)
        quick = league.shortened()
        self.assertEqual(quick.row("r").load, ("--requests", "9"))
        self.assertNotEqual(league.fingerprint("r", "a"), quick.fingerprint("r", "a"))
        self.assertEqual(rows.parse(VALID, ROUTERS).shortened().rows, ())

    def test_an_unknown_name_is_refused(self) -> None:
        with self.assertRaisesRegex(rows.RowsError, "no row is named x; known: r"):
            rows.parse(VALID, ROUTERS).row("x")

    def test_the_rows_of_the_league_are_valid(self) -> None:
        league = rows.read(Path(__file__).parent.parent / "rows.toml")
        self.assertGreaterEqual(len(league.rows), 12)
        self.assertEqual(len(league.shortened().rows), 4)
        self.assertEqual(league.router("foresee").kind, "foresee")
        real = rows.read(Path(__file__).parent.parent / "real.toml")
        self.assertEqual(len(real.rows), 3)


if __name__ == "__main__":
    unittest.main()
