"""The tests, by subject; `tests.rows` has the backends they run on."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
