"""README and docs/: all Python examples and programs run as written, and all links work."""

import itertools
import os
import re
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from groupnorm.testing import registry
from tests import ROOT
from tests.rows import CONTRACT, ROWS

DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING = [*DOCS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
HEADING_OR_BLOCK = re.compile(r"^#+ ([^\n]+)$|^```(\w*)\n(.*?)^```$", re.M | re.S)
LIBRARIES = ("jax", "torch", "cupy", "dask", "mlx", "mpi4py", "onnx", "onnxruntime")
SECONDS = 120


class Block(NamedTuple):
    file: str
    heading: str
    language: str
    code: str


def blocks():
    for path in DOCS:
        heading = ""
        for title, language, code in HEADING_OR_BLOCK.findall(path.read_text("utf-8")):
            heading = title or heading
            if not title:
                yield Block(path.name, heading, language, code)


def libraries(code: str) -> list[str]:
    return [n for n in LIBRARIES if re.search(rf"^(import|from) (.*\b)?{n}\b", code, re.M)]


def examples():
    for block in blocks():
        if block.language != "python":
            continue
        used = libraries(block.code)
        if "groupnorm.save(" in block.code:
            used.append("safetensors")
        marks = [pytest.mark.needs(*used)] if used else []
        if "cupy" in used:
            marks.append(pytest.mark.gpu)
        if "torch.onnx" in block.code:  # PyTorch's exporter itself gives them
            marks.append(pytest.mark.filterwarnings("ignore::FutureWarning"))
            marks.append(pytest.mark.filterwarnings("ignore::DeprecationWarning"))
        yield pytest.param(block, id=f"{block.file}: {block.heading}", marks=marks)


def test_there_are_examples_for_every_backend():
    found = {example.values[0].heading for example in examples()}
    expected = {"NumPy", "JAX", "PyTorch", "CuPy", "Masks", "Tiles", "Dask"}
    assert expected | {"JAX: one process, several devices"} <= found


def test_every_block_is_of_a_known_kind():
    assert {block.language for block in blocks()} <= {"python", "py", "sh"}
    run = {param.values[0].code for param in programs()}
    rest = [b for b in blocks() if b.language == "py" and b.code not in run]
    # These need names that the reader defines, or GPUs.
    headings = [b.heading for b in rest]
    assert headings == ["PyTorch: torchrun", "CuPy: NCCL", "In pytest"]
    for block in rest:
        compile(block.code, block.file, "exec")


@pytest.mark.parametrize("block", list(examples()))
def test_example_runs(block, request, monkeypatch, tmp_path):
    if request.node.get_closest_marker("gpu") and ROWS["cupy"].why_absent is not None:
        pytest.skip("no GPU here")
    monkeypatch.chdir(tmp_path)  # an example writes files
    module = types.ModuleType("readme")
    monkeypatch.setattr(registry, "_rows", dict(registry._rows))  # an example adds to it
    monkeypatch.setitem(sys.modules, "readme", module)  # where torch.compile looks names up
    exec(compile(block.code, block.file, "exec"), module.__dict__)


class Program(NamedTuple):
    """A program and its command line, as given in a section."""

    file: str
    code: str
    command: str


def programs():
    for block, start in itertools.pairwise(blocks()):
        found = re.match(r"# (\w+\.py)\n", block.code)
        if block.language == "py" and found and start.language == "sh":
            marks = [pytest.mark.slow, pytest.mark.needs(*libraries(block.code))]
            program = Program(found[1], block.code, start.code)
            yield pytest.param(program, id=block.heading, marks=marks)


# The number of processes of each program; all of them print their deviation from the whole.
PROCESSES = {"rows_jax.py": 2, "rows_torch.py": 4, "rows_mpi.py": 4}


def test_there_is_a_program_for_every_engine():
    assert {param.values[0].file for param in programs()} == set(PROCESSES)


@pytest.mark.parametrize("program", list(programs()))
def test_every_process_of_a_program_computes_its_part_of_the_whole(program, tmp_path):
    port = r"localhost:\d+"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        code = re.sub(port, f"localhost:{free.getsockname()[1]}", program.code)
    (tmp_path / program.file).write_text(code)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("XLA_FLAGS", None)  # one device per process, as outside the tests
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
    # Lines of different processes may be interleaved.
    errors = [float(number) for number in re.findall(r"\d\.\d+(?:e-\d\d)?", run.stdout)]
    assert len(errors) == PROCESSES[program.file], run.stdout + run.stderr
    # Both sides of the comparison are within the contract.
    assert np.max(errors) <= 2 * CONTRACT * 6, "no value of these images is above 6"


def anchors(path: Path) -> set[str]:
    """Return the anchors GitHub gives the headings of a file."""
    titles = [title for title, *_ in HEADING_OR_BLOCK.findall(path.read_text("utf-8")) if title]
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)


@pytest.mark.parametrize("path", LINKING, ids=lambda path: path.name)
def test_links_resolve(path):
    for target in map("".join, links(path)):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            there = path.parent / file if file else path
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


def test_readme_is_short_and_names_every_document():
    assert len(DOCS[0].read_text("utf-8").splitlines()) <= 200
    linked = {"".join(target).partition("#")[0] for target in links(DOCS[0])}
    index = {"".join(target) for target in links(ROOT / "docs" / "index.md")}
    documents = {path.name for path in DOCS[1:]} - {"index.md"}
    assert documents <= index
    assert {f"docs/{name}" for name in documents} <= linked
