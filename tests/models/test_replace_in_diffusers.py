"""examples/replace_in_diffusers.py prints its table and draws it, and detects wrong results."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch  # noqa: F401, so that the file is collected with PyTorch only, which zoo imports

from tests.models.zoo import package
from tests.project.test_examples import EXAMPLES, PNG, SECONDS


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import replace_in_diffusers

    return replace_in_diffusers


@pytest.mark.slow
def test_the_table(tmp_path):
    package("diffusers")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "replace_in_diffusers.py", "--quick", "--seconds", "0.1",
         "--only", "UNet", "Auto", "poolformer", "--out", str(tmp_path)],
        capture_output=True, text=True, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^(\w+) (\S+) +(\d+) +(\d+) +(\d+) .* equal ", done.stdout, re.M)
    assert [row[:2] for row in rows] == [
        ("diffusers", "UNet2DConditionModel"), ("diffusers", "AutoencoderKL"),
        ("timm", "poolformerv2_s12"),
    ]  # fmt: skip
    assert all(found == replaced for _, _, found, replaced, _ in rows)
    theirs, ours = re.findall(r"^ +(?:PyTorch|groupnorm) +\S+ .* (\S+)$", done.stdout, re.M)
    assert float(ours) < 1e-5 < float(theirs)
    assert (tmp_path / "replace_in_diffusers.png").read_bytes().startswith(PNG)


def test_wrong_results_are_detected(example):
    """The control: its own check, applied to wrong or missing values."""
    fine = example.Errors(1e-6, 1e-6)
    row = example.Row(example.MODELS[0], {}, set(), fine, fine, unchanged=True, times={})
    assert example.is_fine(row)
    assert not example.is_fine(row._replace(unchanged=False))
    for name in fine._fields:
        for wrong in (1e-3, float("nan")):
            assert not example.is_fine(row._replace(ours=fine._replace(**{name: wrong})))
