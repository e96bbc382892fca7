"""The command `groupnorm`: what it lists, what it checks, and how it ends."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest

import groupnorm
from groupnorm import __main__ as command
from groupnorm.backends.kernels.cpu.build_report import why_not_built
from groupnorm.discovery import BackendInfo, backend_info
from groupnorm.dispatch import adapter_named
from groupnorm.errors import BackendImportError
from groupnorm.testing.report import Report
from groupnorm.text_tables import print_table
from tests.api.test_imports import CORE, python, without


@pytest.mark.every_library
@pytest.mark.slow
def test_table():
    done = python("-m", "groupnorm")
    backends = ("numpy", "jax", "torch", "cupy", "mlx")
    for name in (*backends, "implementation", "In agreement with float64"):
        assert name in done.stdout
    assert "checking numpy:cpu" in done.stderr


@pytest.mark.parametrize("columns", [80, 200])
def test_cells_of_wide_tables_are_not_cut(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    print_table(["a" * 40, "b" * 40], [["c" * 40, "d" * 40]])
    printed = capsys.readouterr().out
    for letter in "abcd":
        assert letter * 40 in printed


def test_it_says_why_the_core_is_missing():
    program = without(CORE, "jax", "torch", "cupy", "mlx", "rich") + (
        "import sys, groupnorm.__main__ as m\nsys.exit(m.main([]))"
    )
    lines = python("-W", "error", "-c", program).stdout.splitlines()
    assert lines[1].split() == ["backend", "version", "devices", "implementation", "status"]
    assert lines[3].split() == ["numpy", np.__version__, "cpu", "portable", "agrees"]
    assert lines[4].split() == ["jax", "-", "-", "-", "not", "installed"]
    assert f"numpy on cpu: not fused, {why_not_built()}" in " ".join(lines)


def test_the_instructions_in_use_are_shown(capsys, monkeypatch):
    monkeypatch.setattr(command, "instructions", lambda: "avx2")
    command._print([backend_info("numpy")], None)
    assert "instructions of the kernels for CPUs: avx2" in capsys.readouterr().out


def test_libraries_that_see_no_gpu_are_named(capsys):
    def info(name, *devices):
        return BackendInfo(
            name, True, "1", devices, None, dict.fromkeys(devices, ("portable",)), {}
        )

    on_cpu = [info("numpy", "cpu"), info("jax", "cpu:0", "cpu:1"), info("torch", "cpu")]
    command._print(on_cpu, None)
    line = "jax, torch: no GPU, because there is none or the installed build is one for CPUs"
    assert line in capsys.readouterr().out
    command._print([info("numpy", "cpu"), info("torch", "cpu", "cuda:0"), info("jax")], None)
    assert "no GPU" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "compiles"), [("numpy:cpu", False), ("jax:cpu:0", False), ("torch:cuda:0", True)]
)
def test_only_for_a_gpu_it_says_that_kernels_are_compiled(row, compiles, capsys, monkeypatch):
    monkeypatch.setattr(command, "rows_of_backend", lambda info: [types.SimpleNamespace(name=row)])
    monkeypatch.setattr(command, "backend_names", lambda: ["numpy"])
    monkeypatch.setattr(
        command, "check_backends", lambda rows, say: say(*rows) or Report([], [], "mixed")
    )
    command.main([])
    said = f"groupnorm: checking {row}"
    said += "; the first call compiles kernels" if compiles else ""
    assert said in capsys.readouterr().err.splitlines()


def test_devices_are_listed_separately_if_implementations_differ(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    info = BackendInfo(
        name="torch",
        installed=True,
        version="1",
        devices=("cpu", "cuda:0", "cuda:1"),
        error=None,
        implementations={
            "cpu": ("fused", "portable", "native"),
            "cuda:0": ("portable", "native"),
            "cuda:1": ("portable", "native"),
        },
        why_not_fused={"cuda:0": "no kernels", "cuda:1": "no kernels"},
    )
    command._print([info], None)
    lines = capsys.readouterr().out.splitlines()
    assert "fused (cpu), portable (cuda:0, cuda:1)" in lines[3]
    # One line per reason.
    assert [line for line in lines if "no kernels" in line] == [
        "torch on cuda:0, torch on cuda:1: not fused, no kernels"
    ]


@pytest.mark.every_library
@pytest.mark.slow
def test_json():
    made = json.loads(python("-m", "groupnorm", "check", "--json").stdout)
    assert made["agree"] is True
    backends = {entry["name"]: entry for entry in made["backends"]}
    assert list(backends) == ["numpy", "jax", "torch", "cupy", "mlx"]
    checked = {finding["row"].partition(":")[0] for finding in made["check"]["findings"]}
    for info in groupnorm.available_backends()[: len(backends)]:  # not the one of these tests
        entry = backends[info.name]
        assert entry["version"] == info.version
        assert entry["implementations"] == {d: list(n) for d, n in info.implementations.items()}
        assert entry["why_not_fused"] == info.why_not_fused
        assert (info.name in checked) == bool(info.devices)
    what = {finding["what"] for finding in made["check"]["findings"]}
    assert what == {"value", "gradient"}


def test_info_checks_nothing(capsys):
    assert command.main(["info", "--json"]) == 0
    out, err = capsys.readouterr()
    made = json.loads(out)
    assert "check" not in made
    assert made["backends"][0]["status"] == "usable"
    assert made["instructions"] in (None, "baseline", "avx2", "avx512")
    assert (made["instructions"] is None) == ("cpu" in made["backends"][0]["why_not_fused"])
    assert (
        err.splitlines()[0] == "groupnorm: importing numpy, if it is installed, to list its devices"
    )


@pytest.mark.needs("jax")
@pytest.mark.parametrize(
    ("raised", "reason"),
    [(AssertionError(), "AssertionError"), (RuntimeError("no plugin\nfor it"), "no plugin")],
)
def test_jax_without_a_device_is_listed_and_raises_one_kind_of_error(raised, reason, monkeypatch):
    """As with JAX_PLATFORMS=cuda, which is an AssertionError without text in a build for CPUs."""
    jax = importlib.import_module("jax")

    def devices(platform=None):
        raise raised

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(jax, "config", types.SimpleNamespace(jax_platforms="cuda"))
    info = {info.name: info for info in groupnorm.available_backends()}
    assert info["numpy"].devices == ("cpu",)
    assert (info["jax"].installed, info["jax"].devices) == (True, ())
    for device in (None, "gpu"):
        with pytest.raises(BackendImportError) as error:
            groupnorm.GroupNorm(64, backend="jax", device=device)
        assert f"no device to compute on ({reason}; JAX_PLATFORMS is 'cuda': " in str(error.value)
        assert info["jax"].error == str(error.value)


def test_an_error_without_text_has_its_type(monkeypatch):
    def devices():
        raise OSError

    monkeypatch.setattr(adapter_named("numpy"), "devices", devices)
    assert backend_info("numpy").error == "OSError"


def test_output_that_nobody_reads_is_no_error():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "groupnorm", "info"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("groupnorm ")


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        "m.selfcheck.group_norm = lambda *a, **k: right(*a, **k) * 1.001",
        "m.selfcheck.group_norm_vjp = lambda *a, **k: (0, lambda dy: (dy, a[1], a[2]))",
        "m.rows_of_backend = lambda info: []",
    ],
    ids=["value", "gradient", "nothing checked"],
)
def test_it_fails_if_a_backend_is_wrong(wrong):
    program = (
        "import sys, groupnorm.__main__ as m, groupnorm.selfcheck\n"
        "m.selfcheck = groupnorm.selfcheck; right = m.selfcheck.group_norm\n"
        f"{wrong}\nsys.exit(m.main(['--json']))"
    )
    done = python("-c", program, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["agree"] is False
