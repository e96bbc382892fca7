"""What importing loads, what a missing library says, the command line, docstrings' examples."""

from __future__ import annotations

import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import groupnorm

PROGRAM = Path(__file__).parent / "programs" / "imported_modules.py"
HEAVY = {
    "array_api_strict",
    "brainstate",
    "cupy",
    "dask",
    "equinox",
    "flax",
    "jax",
    "jaxlib",
    "keras",
    "ml_dtypes",
    "numba",
    "optax",
    "rich",
    "scipy",
    "torch",
    "triton",
}
# Hides one library from every finder, as if it were not installed.
HIDE = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] == {library!r}
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a fresh interpreter, warnings being errors, in this one's working directory."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (os.getcwd(), *sys.path[1:]) if p)
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def loaded_by(statements: str) -> set[str]:
    return set(python("-W", "error", str(PROGRAM), statements).stdout.split())


IMPORTS = {
    "import": "import groupnorm",
    "its modules": "import groupnorm.errors, groupnorm.initializers, groupnorm.backends",
    "a layer": "import groupnorm; groupnorm.GroupNorm(8, num_groups=2)",
    "a call": "import groupnorm, numpy; groupnorm.group_norm(numpy.ones((2, 8)), num_groups=2)",
    "a gradient": (
        "import groupnorm, numpy; x = numpy.ones((2, 8)); groupnorm.group_norm_vjp("
        "x, num_groups=2)[1](x)"
    ),
    "an error": (
        "import groupnorm\n"
        "try: groupnorm.group_norm([[1.0]])\n"
        "except groupnorm.errors.ArgumentTypeError: pass"
    ),
}


@pytest.mark.parametrize("statements", IMPORTS.values(), ids=IMPORTS)
def test_nothing_heavy_is_loaded(statements):
    loaded = loaded_by(statements)
    assert "groupnorm" in loaded
    assert not loaded & HEAVY


def test_a_call_that_a_kernel_serves_loads_its_compiler_alone():
    code = (
        "import groupnorm, numpy; x = numpy.ones((2, 8), 'float32');"
        "groupnorm.group_norm(x, num_groups=2)"
    )
    # numba looks for SciPy.
    assert loaded_by(code) & HEAVY <= {"numba", "scipy"}


@pytest.mark.parametrize(
    "library",
    [pytest.param(n, marks=pytest.mark.needs(n)) for n in ("jax", "torch", "cupy", "dask")],
)
def test_the_test_above_can_fail(library):
    """The control: a library that is loaded is seen."""
    assert library in loaded_by(f"import groupnorm, {library}") & HEAVY


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        pytest.param("jax", "torch", marks=pytest.mark.needs("jax")),
        pytest.param("torch", "jax", marks=pytest.mark.needs("torch")),
    ],
)
def test_a_backend_loads_its_own_library_alone(wanted, other):
    made = f"import groupnorm; groupnorm.GroupNorm(8, num_groups=2, backend={wanted!r})"
    loaded = loaded_by(made)
    assert wanted in loaded
    assert other not in loaded


@pytest.mark.parametrize("library", ["jax", "torch", "cupy"])
@pytest.mark.parametrize(
    "how", ["GroupNorm(8, num_groups=2, backend={0!r})", "{1}.to_backend({0!r})"]
)
def test_a_missing_library_is_named_with_its_extra(library, how):
    call = how.format(library, "GroupNorm(8, num_groups=2)")
    program = HIDE.format(library=library) + (
        "from groupnorm import GroupNorm, errors\n"
        f"try: {call}\n"
        "except errors.BackendImportError as error: print(isinstance(error, ImportError), error)\n"
    )
    said = python("-W", "error", "-c", program).stdout
    assert said.startswith("True ")
    for part in (f"backend={library!r}", f"groupnorm[{library}]", "pip install"):
        assert part in said


@pytest.mark.parametrize("library", ["jax", "torch", "cupy"])
def test_a_missing_library_is_reported_as_not_installed(library):
    program = HIDE.format(library=library) + (
        "from groupnorm import available_backends\n"
        f"print(*next(b for b in available_backends() if b.name == {library!r}))\n"
    )
    assert python("-c", program).stdout.split() == [library, "False", "None", "()", "None"]


def test_available_backends():
    found = groupnorm.available_backends()
    assert [info.name for info in found] == ["numpy", "jax", "torch", "cupy"]
    numpy = found[0]
    assert numpy == ("numpy", True, importlib.import_module("numpy").__version__, ("cpu",), None)


@pytest.mark.needs("jax", "torch")
def test_available_backends_of_other_libraries():
    found = {info.name: info for info in groupnorm.available_backends()}
    for name in ("jax", "torch"):
        assert found[name].installed
        assert found[name].version == importlib.import_module(name).__version__
        assert any(device.startswith("cpu") for device in found[name].devices)
        assert found[name].error is None


def test_public_names():
    expected = {
        *("GroupNorm", "group_norm", "group_norm_vjp", "available_backends", "bind_axis"),
        *("GroupStatistics", "group_statistics", "merge_statistics", "normalize"),
    }
    assert expected <= set(groupnorm.__all__)
    for name in groupnorm.__all__:
        thing = getattr(groupnorm, name)
        assert thing.__doc__, f"{name} has no docstring"


def test_every_error_is_of_the_package_and_of_the_usual_kind():
    errors = groupnorm.errors
    kinds = {
        errors.ArgumentValueError: ValueError,
        errors.ArgumentTypeError: TypeError,
        errors.BackendImportError: ImportError,
        errors.AxisNameError: NameError,
    }
    for error, kind in kinds.items():
        assert issubclass(error, errors.GroupNormError)
        assert issubclass(error, kind)
    assert set(errors.__all__) == {"GroupNormError", *(error.__name__ for error in kinds)}


@pytest.mark.slow
def test_command_line_table():
    done = python("-m", "groupnorm")
    for name in ("numpy", "jax", "torch", "cupy"):
        assert name in done.stdout


@pytest.mark.slow
def test_command_line_json():
    report = json.loads(python("-m", "groupnorm", "--json").stdout)
    assert report["agree"] is True
    backends = {entry["name"]: entry for entry in report["backends"]}
    assert list(backends) == ["numpy", "jax", "torch", "cupy"]
    for info in groupnorm.available_backends():
        entry = backends[info.name]
        assert entry["version"] == info.version
        if info.devices:
            assert entry["checks"]
            assert all(check["agrees"] for check in entry["checks"])


@pytest.mark.slow
def test_command_line_fails_when_a_backend_is_wrong():
    """The control: one wrong number of NumPy's, and the exit status is not 0."""
    program = (
        "import sys, groupnorm.selfcheck as s, groupnorm.__main__ as m\n"
        "right = s.group_norm\n"
        "s.group_norm = lambda *a, **k: right(*a, **k) * 1.001\n"
        "sys.exit(m.main(['--json']))"
    )
    done = python("-c", program, check=False)
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["agree"] is False


PUBLIC_MODULES = [
    "groupnorm",
    "groupnorm.base",
    "groupnorm.binding",
    "groupnorm.by_parts",
    "groupnorm.discovery",
    "groupnorm.functional",
    "groupnorm.initializers",
    "groupnorm.layer",
    "groupnorm.merging",
]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert failed == 0


def test_there_are_examples():
    """So that the test above has something to run."""
    finder = doctest.DocTestFinder()
    for thing in (
        groupnorm.GroupNorm,
        groupnorm.group_norm,
        groupnorm.group_norm_vjp,
        groupnorm.available_backends,
        groupnorm.bind_axis,
        groupnorm.GroupStatistics,
        groupnorm.group_statistics,
        groupnorm.merge_statistics,
        groupnorm.normalize,
    ):
        found = finder.find(thing)
        assert any(test.examples for test in found), f"{thing.__name__} has no example"


@pytest.mark.needs("jax", "torch", "cupy")
def test_examples_in_docstrings_of_adapters():
    for name in ("numpy", "jax", "torch", "torch_distributed", "cupy", "generic"):
        failed, _ = doctest.testmod(importlib.import_module(f"groupnorm.backends.{name}"))
        assert failed == 0
