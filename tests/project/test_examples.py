"""The examples that need no models work at a small size, and detect wrong results."""

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

# One wrong thing for each check of digits_ring.py, at three stops.
WRONG = """
import sys
import digits_ring_models as models

# Both ways, so that weights come back as they were.
models.channels_first_dense = models.channels_last_dense = lambda dense: dense.T

def one_bit(model, read=models.Haiku.read):
    weights = read(model)
    weights.dense[0, 0] = models.np.nextafter(weights.dense[0, 0], models.np.float32(9))
    return weights

def another_epsilon(weights, build=models.Keras.build):
    net = build(weights)
    for layer in net.layers:
        if isinstance(layer, models.keras.layers.GroupNormalization):
            layer.epsilon = 0.1
    return net

models.Haiku.read, models.Keras.build = one_bit, another_epsilon
import digits_ring
sys.exit(digits_ring.main())
"""

pytestmark = pytest.mark.needs("torch", "jax")
ring = pytest.mark.needs("flax", "equinox", "haiku", "keras", "optax")


def run(name: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"} | variables,
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


@ring
@pytest.mark.slow
def test_digits_ring():
    """Keras with its other libraries: tests/frameworks."""
    printed = run("digits_ring.py", "--epochs", "3", KERAS_BACKEND="jax", COLUMNS="80")
    row = r"^(\S.*?)  .*  ([\d.e+-]+)  +([\d.e+-]+)  +(equal|WRONG)  +([\d.]+)%  +[\d.]+ s$"
    stops = [(name, *values) for name, *values in re.findall(row, printed, re.M)]
    names = ["flax nnx", "flax linen", "equinox", "haiku", "keras (jax)", "PyTorch"]
    assert [name for name, *_ in stops] == [*names, "flax nnx"], printed
    for _, to_first, to_float64, bits, accuracy in stops:
        assert np.max([float(to_first), float(to_float64)]) <= 1e-5, printed
        assert bits == "equal"
        assert float(accuracy) > 85
    # A stop that computed with what another had computed would prove nothing.
    assert any(float(to_first) > 0 for _, to_first, *_ in stops)


@ring
@pytest.mark.slow
def test_wrong_weights_in_the_ring_are_detected():
    """The control: wrong logits alone, wrong bits alone, and both."""
    done = subprocess.run(
        [sys.executable, "-c", WRONG, "--epochs", "1"],
        env=os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": str(EXAMPLES)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    said = re.findall(r"^  (.*?): (logits|other bits)", done.stderr, re.M)
    found = {stop: {what for name, what in said if name == stop} for stop, _ in said}
    after = ("keras (jax)", "PyTorch", "flax nnx")
    expected = {"equinox": {"logits"}, "haiku": {"other bits"}}
    assert found == expected | {name: {"logits", "other bits"} for name in after}, done.stderr
    assert "the state of the last model" in done.stderr


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
