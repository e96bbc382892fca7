"""The GPU benchmark on a machine without a GPU: it reports that and measures nothing."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
import torch

from tests import ROOT

SCRIPTS = ROOT / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the benchmark would run")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    command = [sys.executable, SCRIPTS / "gpu.py", "--only", "torch", "--into", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "there is no GPU here for any of the libraries" in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


# By hand, at 4.3 TB/s: microseconds of a forward pass that reads x once or twice, of both passes.
FLOORS = {
    "UNet 16x320@64x64": (19.5, 29.3, 48.8),
    "VAE 1x512@512x512": (125, 187, 312),
    "ResNet-50 256x64@112x112": (191, 287, 478),
}


@pytest.mark.parametrize("shape", FLOORS)
def test_lower_bounds_follow_from_memory_bandwidth(shape, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    cases = importlib.import_module("_gpu_cases")
    [case, *_] = [c for c in cases.plan("torch", quick=False) if c.shape == shape]
    forward = cases.floors(case.bytes, cases.FORWARD, {"forward": "B"}, 4.3e12)
    both = cases.floors(case.bytes, cases.BOTH, {}, 4.3e12)
    found = (forward["one_read"], forward["two_read"], both["one_read"])
    assert found == pytest.approx(FLOORS[shape], rel=0.01)
    assert forward["plan"] == forward["two_read"]


CHECK = {"kind": "check", "library": "torch", "name": "a check", "passed": True, "failure": None,
         "errors": {}, "repeats": True}  # fmt: skip
PROBED = {"kind": "probe", "library": "torch", "why": None, "gpu": "Some GPU"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so the child would go on")
def test_records_of_a_killed_run_are_kept_and_shown(monkeypatch, tmp_path, capsys):
    """They are in DIR while the run goes on, not in a temporary folder that is deleted with it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    work = importlib.import_module("_gpu_work")
    records = tmp_path / "records.jsonl"
    begun = {"kind": "begun", "name": "a row"}
    records.write_text(json.dumps(PROBED) + "\n" + json.dumps(CHECK) + "\n")
    # Without a GPU the child records that its first check raised, and that the device is lost.
    _, made = work.run_child({"library": "torch", "quick": True, "begin": 1}, 30, records)
    kept = [json.loads(line) for line in records.read_text().splitlines()]
    assert kept == [PROBED, CHECK, *made]
    assert made[0]["kind"] == "begun"
    with records.open("a") as file:
        file.write(json.dumps(begun) + "\n" + '{"kind": "row", "libra')
    gpu = importlib.import_module("gpu")
    result = gpu.read(records)
    assert result["gpu"] == "Some GPU"
    assert result["checks"] == [r for r in kept if r["kind"] == "check"]
    gpu.show(result)
    assert f"of {len(result['checks'])} checks passed" in capsys.readouterr().out
