"""Tests, and what they share: each module that is no test is named for what it makes. Run them from the root by ``python -m pytest``."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
