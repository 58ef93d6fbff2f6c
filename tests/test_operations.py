"""The tables of docs/operations.md: each row names tests that exist."""

import re

from tests import ROOT


def test_every_row_of_what_may_fail_names_tests_that_exist():
    text = (ROOT / "docs" / "operations.md").read_text()
    rows = [line for line in text.split("## What happens when")[1].splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| event ")]
    named = {row: re.findall(r"`(test_\w+)`", row) for row in rows}
    assert len(rows) > 15 and not [row for row, tests in named.items() if not tests]
    there = {
        name for path in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert {name for tests in named.values() for name in tests} <= there
