"""Every Python example of the README runs as it stands."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.backends import Backend

README = Path(__file__).parent.parent / "README.md"
GPU = find_spec("cupy") is not None and Backend.CUPY.gpu_present()
LIBRARIES = ("jax", "torch", "cupy")


def examples():
    for heading, code in re.findall(
        r"^### ([^\n]+)\n(?:(?!^### ).)*?^```python\n(.*?)^```",
        README.read_text("utf-8"),
        re.M | re.S,
    ):
        used = [name for name in LIBRARIES if re.search(rf"^import {name}\b", code, re.M)]
        marks = [pytest.mark.needs(*used)] if used else []
        if "cupy" in used:
            marks += [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU here")]
        yield pytest.param(code, id=heading, marks=marks)


def test_there_are_examples_for_every_backend():
    found = {example.id for example in examples()}
    assert {"NumPy", "JAX", "PyTorch", "CuPy", "Masks", "Several devices"} <= found


@pytest.mark.parametrize("code", list(examples()))
def test_example_runs(code):
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
