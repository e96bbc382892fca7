"""Every Python example of the README runs as it stands."""

import re
from pathlib import Path

import pytest

from tests.backends import Backend

README = Path(__file__).parent.parent / "README.md"
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
            marks.append(pytest.mark.gpu)
        yield pytest.param(code, id=heading, marks=marks)


def test_there_are_examples_for_every_backend():
    found = {example.id for example in examples()}
    assert {"NumPy", "JAX", "PyTorch", "CuPy", "Masks", "Several devices"} <= found


@pytest.mark.parametrize("code", list(examples()))
def test_example_runs(code, request):
    if request.node.get_closest_marker("gpu") and not Backend.CUPY.gpu_present():
        pytest.skip("no GPU here")
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})
