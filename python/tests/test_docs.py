"""The examples of the manual run."""

import contextlib
import io
import re
import unittest
from pathlib import Path
from typing import Any

MANUAL = Path(__file__).parents[2] / "docs" / "python.md"


class Manual(unittest.TestCase):
    def test_examples_run(self) -> None:
        examples = re.findall(r"```python\n(.*?)```", MANUAL.read_text(), re.DOTALL)
        self.assertGreaterEqual(len(examples), 3)
        names: dict[str, Any] = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for example in examples:
                exec(compile(example, str(MANUAL), "exec"), names)
        self.assertIn("http://gpu1:8000 draining", printed.getvalue())


if __name__ == "__main__":
    unittest.main()
