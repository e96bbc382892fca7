"""Fixtures, and the options ``--backends`` and ``--jax-devices``.

``--backends all`` (the default) runs every row of `tests.rows.ROWS` but ``toy``; a library that
cannot be imported then fails the run instead of being skipped. ``--backends numpy`` (or
``numpy,torch:compile``) runs only these rows and imports no other library: test files with a
top-level import of another library are not collected, and tests marked ``needs("flax")`` are
skipped with that reason. ``--backends jax,flax`` has no row more than ``jax`` and may import flax.

A test selects its rows by the name of its argument:

- ``backend``: all rows except those that are too slow to run everywhere: torch:compile, dask, and
  eager JAX, which recompiles each operation for each shape (jax:jit is included);
- ``wide_backend``: the same, plus dask and eager JAX;
- ``any_backend``: every row;
- ``quick_backend``: eager rows that do not compile for each new shape, for hypothesis;
- ``autodiff_backend``: torch and jax:jit, whose libraries have automatic differentiation.

``--interpret`` runs the GPU kernels in Triton's interpreter and uses them for PyTorch's CPU
tensors.

``--backends-only`` deselects the tests that use none of the selected libraries (no row, no
``needs``, no import of one), for a second run under other conditions that should not repeat them.

JAX sees four devices by default; its arrays then use the portable implementation.
``--jax-devices 1`` tests the kernels and primitives that are used with a single device.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from tests.interpreter import WARNINGS, interpret
from tests.rows import ROWS, TOY, Row

# The same examples in every run, so that failures are reproducible. No deadline: a shared machine
# would exceed it occasionally.
hypothesis.settings.register_profile(
    "reproducible",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("reproducible")

LIBRARIES = {row.library for row in ROWS.values()}
PEERS = {
    *("brainstate", "dask", "equinox", "flax", "haiku", "keras", "mpi4py", "optax"),
    *("onnx", "onnxruntime", "orbax", "safetensors"),
}
ROWS_OF = {
    "backend": lambda row: row.name not in ("torch:compile", "dask", "jax"),
    "wide_backend": lambda row: row.name != "torch:compile",
    "any_backend": lambda row: True,
    "quick_backend": lambda row: row.name in ("numpy", "torch", "array_api_strict"),
    "autodiff_backend": lambda row: (
        "autodiff" not in row.cannot and row.name not in ("torch:compile", "jax")
    ),
}


def pytest_addoption(parser):
    parser.addoption(
        "--backends",
        default="all",
        help="'all', or a comma-separated list of rows, libraries and packages without rows: "
        + ", ".join([*ROWS, *sorted(PEERS - LIBRARIES)]),
    )

    parser.addoption(
        "--backends-only",
        action="store_true",
        help="deselect tests that use none of the libraries selected by --backends",
    )

    parser.addoption(
        "--jax-devices",
        type=int,
        choices=(1, 4),
        default=4,
        help="JAX devices on the host: 4, for pmap and shard_map, with the portable code, "
        "or 1, as most users have, with the kernels and primitives",
    )

    parser.addoption(
        "--interpret",
        action="store_true",
        help="use the GPU kernels for PyTorch's CPU tensors, run in Triton's interpreter",
    )


def pytest_configure(config):
    if config.getoption("--interpret"):
        interpret()
        for warning in WARNINGS:
            config.addinivalue_line("filterwarnings", f"ignore:{warning}:RuntimeWarning")
    # JAX reads this only once, at start-up.
    devices = config.getoption("--jax-devices")
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    config.addinivalue_line("markers", "several_jax_devices: skipped if --jax-devices is 1")
    config.addinivalue_line("markers", "one_jax_device: skipped unless --jax-devices is 1")
    config.addinivalue_line(
        "markers", "needs(*libraries): skipped if --backends excludes one of these"
    )
    config.addinivalue_line(
        "markers", "every_library: uses all installed libraries, whatever --backends selects"
    )
    # inductor itself still uses it for the first compilation for a CPU.
    config.addinivalue_line(
        "filterwarnings", "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    )
    config.stash[SELECTED] = select(config.getoption("--backends"))


SELECTED = pytest.StashKey[list[Row]]()


def names_of(option: str) -> list[str]:
    return [name.strip() for name in option.split(",")]


def select(option: str) -> list[Row]:
    """Return the rows selected by the option; an unknown name ends the run."""
    if option == "all":
        # Nobody can be expected to install a GPU: without one, its rows do not exist. The toy runs
        # in `nox -s quick`.
        rows = (row for row in ROWS.values() if row is not TOY)
        return [row for row in rows if not row.needs_gpu or row.why_absent is None]
    names = names_of(option)
    known = LIBRARIES | PEERS | set(ROWS)
    for name in names:
        if name not in known:
            raise pytest.UsageError(
                f"--backends: {name!r} is not one of all, {', '.join(sorted(known))}"
            )
    # Rows named in full, and those of a library named: of its rows on a GPU, if there is one.
    return [
        row
        for row in ROWS.values()
        if row.name in names
        or (row.library in names and (not row.needs_gpu or row.why_absent is None))
    ]


def importable(config) -> set[str]:
    """Return the libraries a test may import under this selection."""
    if config.getoption("--backends") == "all":
        every = LIBRARIES | PEERS
        if config.getoption("markexpr") == "gpu":  # a machine with a GPU may lack the peers
            return {name for name in every if importlib.util.find_spec(name) is not None}
        return every
    named = set(names_of(config.getoption("--backends")))
    return {row.library for row in config.stash[SELECTED]} | named & PEERS


def pytest_report_header(config):
    chosen = config.stash[SELECTED]
    absent = [name for name, row in ROWS.items() if row not in chosen]
    lines = [f"backends: {', '.join(map(str, chosen))}"]
    if absent:
        lines.append(f"not run (not selected, or no such device): {', '.join(absent)}")
    return lines


def pytest_ignore_collect(collection_path: Path, config):
    """Do not collect test files with a top-level import of a library that is not selected."""
    if collection_path.suffix != ".py":
        return None
    others = (LIBRARIES | PEERS) - importable(config) - {"numpy"}  # which is always installed
    missing = top_level_imports(collection_path) & others
    return True if missing else None


@functools.cache
def top_level_imports(path: Path) -> set[str]:
    roots = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            roots.add(node.module.partition(".")[0])
    return roots


def pytest_generate_tests(metafunc):
    chosen = metafunc.config.stash[SELECTED]
    for argument, wanted in ROWS_OF.items():
        if argument not in metafunc.fixturenames:
            continue
        rows = [
            pytest.param(row, id=row.name, marks=[pytest.mark.gpu] if row.needs_gpu else [])
            for row in chosen
            if wanted(row)
        ]
        reason = f"--backends selects no row for {argument!r}"
        none = pytest.param(None, id="none", marks=pytest.mark.skip(reason=reason))
        metafunc.parametrize(argument, rows or [none])


def uses(item, libraries: set[str]) -> bool:
    """Whether a test uses one of the libraries, by its row, its markers or its file's imports."""
    rows = {value.library for value in _parameters(item) if isinstance(value, Row)}
    needed = {name for marker in item.iter_markers("needs") for name in marker.args}
    return (
        item.get_closest_marker("every_library") is not None
        or bool(libraries & (rows | needed))
        or bool(libraries & top_level_imports(item.path))
    )


def _parameters(item) -> list:
    return list(item.callspec.params.values()) if hasattr(item, "callspec") else []


def pytest_collection_modifyitems(config, items):
    allowed = importable(config)
    if config.getoption("--backends-only"):
        config.hook.pytest_deselected(items=[item for item in items if not uses(item, allowed)])
        items[:] = [item for item in items if uses(item, allowed)]
    for item in items:
        for marker in item.iter_markers("needs"):
            missing = set(marker.args) - allowed
            if missing:
                reason = f"--backends excludes {', '.join(sorted(missing))}"
                item.add_marker(pytest.mark.skip(reason=reason))
        devices = config.getoption("--jax-devices")
        other = "several_jax_devices" if devices == 1 else "one_jax_device"
        if item.get_closest_marker(other):
            number = other.partition("_")[0]
            reason = f"needs {number} JAX device{'s' * (devices == 1)}; --jax-devices is {devices}"
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng(request) -> np.random.Generator:
    """Random generator seeded by the test's name: the same on every backend and in every run."""
    return np.random.default_rng(zlib.crc32(request.node.originalname.encode()))


@pytest.fixture
def needs_bfloat16(request):
    """Skip if only some backends are selected and NumPy has no bfloat16."""
    if request.config.getoption("--backends") != "all":
        pytest.importorskip("ml_dtypes", reason="NumPy's bfloat16 comes from ml_dtypes")
