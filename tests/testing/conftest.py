"""These tests check functions that are wrong on purpose, which the closing table need not show."""

from __future__ import annotations

import pytest

from groupnorm.testing import report


@pytest.fixture(autouse=True)
def own_record(monkeypatch):
    monkeypatch.setattr(report, "record", {})
