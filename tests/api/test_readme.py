"""Every Python example of the README runs as it stands, and every program as it says to start."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests import ROOT
from tests.rows import CONTRACT, Backend

README = ROOT / "README.md"
LIBRARIES = ("jax", "torch", "cupy", "dask", "mpi4py")
SECONDS = 120


def sections():
    """Return the text below each heading of the third level, up to any next one."""
    text = README.read_text("utf-8")
    return re.findall(r"^### ([^\n]+)\n(.*?)(?=^#{2,3} |\Z)", text, re.M | re.S)


def libraries(code: str) -> list[str]:
    return [n for n in LIBRARIES if re.search(rf"^(import|from) (.*\b)?{n}\b", code, re.M)]


def examples():
    for heading, text in sections():
        found = re.search(r"^```python\n(.*?)^```", text, re.M | re.S)
        if found is None:
            continue
        used = libraries(found[1])
        marks = [pytest.mark.needs(*used)] if used else []
        if "cupy" in used:
            marks.append(pytest.mark.gpu)
        yield pytest.param(found[1], id=heading, marks=marks)


def test_there_are_examples_for_every_backend():
    found = {example.id for example in examples()}
    expected = {"NumPy", "JAX", "PyTorch", "CuPy", "Masks", "Tiles", "Dask"}
    assert expected | {"JAX: one process, several devices"} <= found


@pytest.mark.parametrize("code", list(examples()))
def test_example_runs(code, request):
    if request.node.get_closest_marker("gpu") and not Backend.CUPY.gpu_present():
        pytest.skip("no GPU here")
    exec(compile(code, str(README), "exec"), {"__name__": "readme"})


class Program(NamedTuple):
    """What a section tells its reader to save, and to start."""

    file: str
    code: str
    command: str


def programs():
    for heading, text in sections():
        found = re.search(r"^```py\n(# (\w+\.py)\n.*?)^```\n\n```sh\n(.*?)\n```", text, re.M | re.S)
        if found:
            code, file, command = found.groups()
            marks = [pytest.mark.slow, pytest.mark.needs(*libraries(code))]
            yield pytest.param(Program(file, code, command), id=heading, marks=marks)


# How many processes each starts, all of which print how far they are from the whole.
PROCESSES = {"rows_jax.py": 2, "rows_torch.py": 4, "rows_mpi.py": 4}


def test_there_is_a_program_for_every_engine():
    assert {param.values[0].file for param in programs()} == set(PROCESSES)


@pytest.mark.parametrize("program", list(programs()))
def test_program_gives_every_process_its_part_of_the_whole(program, tmp_path):
    port = r"localhost:\d+"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        code = re.sub(port, f"localhost:{free.getsockname()[1]}", program.code)
    (tmp_path / program.file).write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("XLA_FLAGS", None)  # one device a process, as without the tests
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    run = subprocess.run(
        ["bash", "-c", program.command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert run.returncode == 0, run.stderr
    # Processes may write into each other's lines.
    errors = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d\d)?", run.stdout)]
    assert len(errors) == PROCESSES[program.file], run.stdout + run.stderr
    # Both sides of the comparison are within the contract.
    assert np.max(errors) <= 2 * CONTRACT * 6, "no value of these images is above 6"
