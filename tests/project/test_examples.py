"""The multi-device examples work at a small size, and detect wrong results."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests import ROOT
from tests.rows import CONTRACT

EXAMPLES = ROOT / "examples"
SECONDS = 300
PNG = b"\x89PNG\r\n"

pytestmark = pytest.mark.needs("torch", "jax")


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_tiled_image():
    printed = run("tiled_image.py", "--enlarge", "1")
    # NumPy reports it for y; the other two for their gradients too.
    assert {"NumPy", "PyTorch", "JAX"} <= set(re.findall(r"^\w+(?=,)", printed, re.M))
    for name, times, bound in (("y", 3, CONTRACT), ("dx", 2, 1e-5), ("dscale", 2, 1e-5)):
        found = [float(v) for v in re.findall(rf"\b{name} ([\d.e-]+)", printed)]
        assert len(found) == times, printed
        assert np.max(found) <= bound, printed
    # Independently normalized tiles are far off; otherwise equality with the whole proves nothing.
    assert float(re.search(r"wrong by ([\d.]+)", printed)[1]) > 1


@pytest.mark.slow
def test_spatial_parallel_training(tmp_path):
    printed = run("spatial_parallel_training.py", "--steps", "20", "--out", str(tmp_path))
    rows = re.findall(r"^  (.*?)  +([\d.]+)  ([\d.]+)  ([\d.e+-]+)$", printed, re.M)
    difference = {title: float(apart) for title, _, _, apart in rows}
    assert difference["4 bands, pooled statistics"] <= 1e-5, printed
    assert difference["4 bands, their own statistics"] > 1e-2, printed
    picture = tmp_path / "spatial_parallel_training.png"
    assert picture.read_bytes().startswith(PNG)


def test_wrong_results_are_detected():
    """The control: each example's own check, applied to wrong or missing values."""
    tiled = load("tiled_image")
    fine = {"y": 1e-6, "dx": 1e-6}
    assert tiled.say("fine", fine)
    for name in fine:
        for wrong in (1e-4, float("nan")):
            assert not tiled.say("wrong", fine | {name: wrong})
    curves = load("spatial_parallel_training").Curves([2.0, 1.0], [2.0, 1.5], [2.0, np.nan])
    assert curves.difference("pooled") == 0.25
    assert np.isnan(curves.difference("alone"))
