"""The guide, docs/testing.md, says what is found."""

from __future__ import annotations

import re

import numpy as np
import pytest

from groupnorm import testing
from tests import ROOT

pytestmark = pytest.mark.needs("jax", "torch")


def test_the_textbook_is_caught_where_the_guide_says():
    text = (ROOT / "docs" / "testing.md").read_text("utf-8")
    first = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names: dict = {}
    exec(first.partition("inputs =")[0], names)
    inputs = testing.hard_inputs((4, 64), names=("normal", "offset 1e2", "offset 1e4"))
    report = testing.check(names["layer_norm"], inputs=inputs, rows="numpy,jax,torch")
    wrong = {(finding.row, finding.input) for finding in report.wrong}
    assert wrong == {(r, n) for r in report.rows for n in ("offset 1e2", "offset 1e4")}
    lost = [f.error for f in report.wrong if f.input == "offset 1e2" and f.what == "value"]
    assert 1e-5 < np.max(lost) < 1e-1
