"""The tests, by subject; `tests.rows` defines the backends they run on."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
