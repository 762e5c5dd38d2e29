"""Unit tests: `python3 -m unittest discover -s bench/league/tests -t bench/league`."""
