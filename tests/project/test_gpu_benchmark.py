"""The scripts for GPUs on a machine without one: the benchmark measures nothing, a dry run all."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.api.test_imports import without

SCRIPTS = ROOT / "benchmarks"
COMMITTED = SCRIPTS / "results" / "h200-2026-11-27-quick.json"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be used")


@pytest.fixture
def module(monkeypatch):
    """Return a function that imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module


def environment(**others: str) -> dict[str, str]:
    """Return the environment without what this run of pytest and its options put there."""
    own = ("PYTEST_", "XLA_", "JAX_", "TRITON_")
    return {k: v for k, v in os.environ.items() if not k.startswith(own)} | others


def script(name: str, *arguments: object, hidden: str = "") -> subprocess.CompletedProcess:
    """Run a script, as where a package is not installed if one is `hidden`."""
    command = [sys.executable, SCRIPTS / name, *arguments]
    if hidden:
        run = f"import runpy; sys.argv[:] = sys.argv[1:]; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        run += "runpy.run_path(sys.argv[0], run_name='__main__')"
        command[1:1] = ["-c", without(hidden) + run]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def gpu_py(*arguments: object) -> subprocess.CompletedProcess:
    return script("gpu.py", *arguments)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("gpu_instructions.py", "triton"),
        ("gpu_host_time.py", "triton"),
        ("gpu_host_time.py", "torch"),
    ],
)
def test_a_missing_package_is_named_in_one_line(name, hidden):
    done = script(name, hidden=hidden)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f"{name} needs ")
    assert f"No module named '{hidden}'" in line
    assert "pip install '.[" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("gpu_instructions.py", "--against", "nonsense"), "'nonsense' is no commit"),
        (("gpu_instructions.py", "--against", "HEAD; exit"), "'HEAD; exit' is no commit"),
        (("gpu_host_time.py", "--rounds", "0"), "--rounds: 0 is not positive"),
        (("gpu_host_time.py", "--calls", "-1"), "--calls: -1 is not positive"),
        (("gpu.py", "--from-json", "nowhere.json"), "No such file"),
        (("gpu.py", "--from-json", SCRIPTS), "Is a directory"),
        (
            ("gpu.py", "--from-json", SCRIPTS / "results" / "onnx-2026-11-27.json"),
            "neither figures nor records of gpu.py",
        ),
        (
            ("gpu.py", "--from-json", SCRIPTS / "results" / "gpu-h200-2026-11-27" / "facts.jsonl"),
            "neither figures nor records of gpu.py",
        ),
        (("gpu.py", "--from-json", COMMITTED.with_suffix(".png")), "neither figures nor records"),
    ],
)
def test_a_wrong_argument_is_an_error_in_one_line(arguments, said):
    pytest.importorskip("triton")
    done = script(*arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@no_gpu
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = gpu_py("--only", "torch", "--into", tmp_path)
    assert done.returncode == 2
    assert "there is no GPU here for any of the libraries" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_committed_figures_are_shown_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    shutil.copy(COMMITTED, tmp_path / "h200.json")
    done = gpu_py("--from-json", tmp_path / "h200.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "h200.png").exists()  # it may be a committed figure
    done = gpu_py("--from-json", tmp_path / "h200.json", "--into", tmp_path / "new")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "57 of 57 checks passed" in done.stdout
    assert (tmp_path / "new" / "h200.png").read_bytes().startswith(b"\x89PNG")
    row = next(line for line in done.stdout.splitlines() if " fwd " in line)
    assert [text in row for text in ("51.1", "96%", "2.4x", "0.9x", "52.6x")] == [True] * 5


# By hand, at 4.3 TB/s: microseconds of a forward pass that reads x once or twice, of both passes.
FLOORS = {
    "UNet 16x320@64x64": (19.5, 29.3, 48.8),
    "VAE 1x512@256x256": (31.2, 46.8, 78.0),
    "UNet 16x320@64x64 float32": (39.0, 58.5, 97.5),
}


@pytest.mark.parametrize("shape", FLOORS)
def test_lower_bounds_follow_from_memory_bandwidth(shape, module):
    cases, report = module("_gpu_cases"), module("_gpu_report")
    forward, both = (cases.Case("torch", task, shape, cases.FIRST) for task in cases.PASSES)
    reads = [{"one_read": 2, "plan": 3}, {"one_read": 5, "plan": 8}]
    rows = [{"bytes": forward.bytes, "reads": counts, "times": {}} for counts in reads]
    report.add_floors(rows, {str(forward.bytes): 4.3e12})
    found = *rows[0]["floors_us"].values(), rows[1]["floors_us"]["one_read"]
    assert found == pytest.approx(FLOORS[shape], rel=0.01)
    for case, counts in ((forward, reads[0]), (both, reads[1])):
        assert counts["one_read"] == cases.reads(case)["one_read"] <= cases.reads(case)["plan"]


def test_forward_rows_of_the_quick_shapes_come_first(module):
    cases = module("_gpu_cases")
    rows = cases.plan("torch")
    first = [(shape, False) for shape in list(cases.SHAPES)[:3]]
    assert [(row.shape, row.both) for row in rows[:6:2]] == first
    assert {row.shape for row in rows} == set(cases.SHAPES)
    assert len(rows) == len({row.name for row in rows}) == 4 * len(cases.SHAPES)


CHECK = {"kind": "check", "library": "torch", "name": "a check", "passed": True, "failure": None}
PROBED = {"kind": "probe", "library": "torch", "why": None, "gpu": "Some GPU"}


@no_gpu
def test_records_of_a_killed_run_are_kept_and_shown(module, tmp_path):
    """They are in DIR while the run goes on; the last line may be incomplete."""
    gpu, work = module("gpu"), module("_gpu_work")
    records = tmp_path / "records.jsonl"
    options = gpu.argparse.Namespace(seconds=1, only=["torch"], without=[])
    for record in (gpu.about(options), PROBED, CHECK):
        work.append(records, record)
    # A child without a GPU says why, and does nothing else.
    request = {"library": "torch", "without": [], "begin": 0}
    status, made = work.run_child(request, 30, records)
    assert (status, [record["kind"] for record in made]) == (0, ["probe"])
    assert made[0]["why"]
    with records.open("a") as file:
        file.write(json.dumps({"kind": "begun", "name": "a row"}) + '\n{"kind": "row", "libra')
    done = gpu_py("--from-json", records)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 checks passed" in done.stdout
    assert "Some GPU" in done.stdout


def test_a_failing_test_is_written_at_once(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it():\n    assert 1 == 2\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "_gpu_failures", "test_it.py"]
    where = environment(OUT=str(tmp_path), PYTHONPATH=str(SCRIPTS))
    subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, timeout=60)
    written = (tmp_path / "failures.txt").read_text()
    assert written.startswith("==== test_it.py::test_it (call)\n")
    assert "assert 1 == 2" in written


def first_run(out, *arguments: str, seconds: float = 120, **others: str):
    """Run the script with the steps of `STEPS` or all of them; PY is this Python."""
    where = environment(OUT=str(out), PY=sys.executable, **others)
    return subprocess.run(
        ["bash", SCRIPTS / "gpu_first_run.sh", *arguments], cwd=ROOT, env=where,
        capture_output=True, text=True, timeout=seconds,
    )  # fmt: skip


no_bash = pytest.mark.skipif(
    sys.platform != "linux", reason="the script is for bash, Triton for Linux"
)


@no_gpu
@no_bash
@pytest.mark.parametrize("steps", ["", "own"])
def test_without_a_gpu_the_first_run_says_so_and_ends(steps, tmp_path):
    done = first_run(tmp_path, STEPS=steps)
    assert done.returncode == 2, done.stdout + done.stderr
    *reasons, last = done.stdout.splitlines()
    assert last == "no GPU here; DRY=1 tries the steps without one"
    assert [reason.partition(":")[0] for reason in reasons] == ["cupy", "torch", "jax"]
    assert (tmp_path / "log.txt").read_text() == done.stdout
    assert (tmp_path / "steps.txt").read_text() == ""


@no_bash
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "LIMIT is for all of it"),
        (["-h"], 0, "LIMIT is for all of it"),
        (["torch"], 2, "LIMIT is for all of it"),
    ],
)
def test_arguments_of_the_first_run(arguments, status, said, tmp_path):
    done = first_run(tmp_path / "out", *arguments)
    assert (done.returncode, done.stderr) == (status, "")
    assert said in done.stdout
    assert "set -u" not in done.stdout
    assert not (tmp_path / "out").exists()


@no_bash
@pytest.mark.parametrize("limit", ["abc", "08", "-3", "1.5"])
def test_a_limit_that_is_no_number_is_an_error(limit, tmp_path):
    done = first_run(tmp_path / "out", LIMIT=limit)
    assert done.returncode == 2
    assert done.stdout + done.stderr == f"LIMIT={limit}: give whole seconds, such as 520\n"


@pytest.mark.parametrize(
    ("body", "dry", "status"),
    [("pytest.skip('no GPU')", "", 5), ("pytest.skip('no GPU')", "1", 0), ("pass", "", 0)],
)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_that_skips_every_test_is_no_success(body, dry, status, workers, tmp_path):
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    {body}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "_gpu_failures"]
    where = environment(OUT=str(tmp_path), PYTHONPATH=str(SCRIPTS), DRY=dry)
    done = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, timeout=60)
    assert done.returncode == status, done.stdout


STEPS = ["versions", "torch", "cupy", "jax", "sanitize", "own", "rows", "all", "bench"]
FACTS = {
    "torch": ["copy, ", "host, ", "UNet 16x320@64x64 channels-last backward, us"],
    "cupy": ["right CUDA graph", "right other stream"],
    "jax": ["launchers", "right eager", "right vmap", "right grad", "right jvp"],
}  # fmt: skip


@no_gpu
@pytest.mark.slow
@pytest.mark.needs("torch", "jax", "cupy")
@no_bash
def test_a_dry_run_executes_every_step(tmp_path):
    done = first_run(tmp_path, DRY="1", STEPS=" ".join(STEPS), seconds=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    steps = (tmp_path / "steps.txt").read_text().splitlines()
    assert [step.partition(":")[0] for step in steps] == STEPS
    assert all(": status 0 after" in step for step in steps), steps
    assert (tmp_path / "failures.txt").read_text() == ""
    lines = (tmp_path / "facts.jsonl").read_text().splitlines()
    facts = [(fact["library"], fact["fact"]) for fact in map(json.loads, lines)]
    for library, names in FACTS.items():
        mine = [fact for name, fact in facts if name == library]
        assert sum("float" in fact for fact in mine) >= 4  # compared with float64
        for name in ("imported", "device", *names):
            assert any(fact.startswith(name) for fact in mine), (library, name)
    assert not [fact for _, fact in facts if fact.startswith(("WRONG", "FAILED"))]
    log = (tmp_path / "log.txt").read_text()
    assert f"'torch': '{torch.__version__}'" in log
    assert "passed" in log
    [result] = (tmp_path / "bench").glob("*.json")
    found = json.loads(result.read_text())
    assert {row["library"] for row in found["rows"]} == {"torch", "jax", "cupy"}
    assert all(len(row["shares"]) >= 2 for row in found["rows"])
    assert not found["failures"]
