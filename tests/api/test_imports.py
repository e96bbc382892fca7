"""Imported modules, errors for missing libraries, the command line, examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import groupnorm
from groupnorm.arguments import IMPLEMENTATIONS
from groupnorm.backends.kernels.cpu.build_report import why_not_built
from groupnorm.dispatch import adapter_named
from tests import ROOT

PROGRAM = ROOT / "tests" / "programs" / "imported_modules.py"
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
    "mlx",
    "onnx",
    "onnxscript",
    "optax",
    "orbax",
    "rich",
    "safetensors",
    "scipy",
    "torch",
    "triton",
}
# Hides one library, or one module, from all finders, as if it were not installed.
HIDE = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        hidden = f"{{name}}.".startswith({library!r} + ".")
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


def python(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a new interpreter, with warnings as errors, in the current working directory."""
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


def test_a_call_of_a_kernel_loads_nothing_heavy():
    code = (
        "import groupnorm, numpy; x = numpy.ones((2, 8), 'float32');"
        "groupnorm.group_norm_vjp(x, num_groups=2)[1](x)"
    )
    loaded = loaded_by(code)
    assert "groupnorm" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "library",
    [pytest.param(n, marks=pytest.mark.needs(n)) for n in ("jax", "torch", "cupy", "dask", "mlx")],
)
def test_loaded_libraries_are_detected(library):
    """The control: a loaded library is detected."""
    assert library in loaded_by(f"import groupnorm, {library}") & HEAVY


@pytest.mark.parametrize(
    ("wanted", "other"),
    [
        pytest.param("jax", "torch", marks=pytest.mark.needs("jax")),
        pytest.param("torch", "jax", marks=pytest.mark.needs("torch")),
        pytest.param("mlx", "jax", marks=pytest.mark.needs("mlx")),
    ],
)
def test_a_backend_loads_only_its_own_library(wanted, other):
    made = f"import groupnorm; groupnorm.GroupNorm(8, num_groups=2, backend={wanted!r})"
    loaded = loaded_by(made)
    assert wanted in loaded
    assert other not in loaded


@pytest.mark.parametrize("library", ["jax", "torch", "cupy", "mlx"])
@pytest.mark.parametrize(
    "how", ["GroupNorm(8, num_groups=2, backend={0!r})", "{1}.to_backend({0!r})"]
)
def test_a_missing_library_raises_naming_its_extra(library, how):
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


@pytest.mark.parametrize("library", ["jax", "torch", "cupy", "mlx"])
def test_a_missing_library_is_reported_as_not_installed(library):
    program = HIDE.format(library=library) + (
        "from groupnorm import available_backends\n"
        f"print(*next(b for b in available_backends() if b.name == {library!r}))\n"
    )
    said = python("-c", program).stdout.split()
    assert said == [library, "False", "None", "()", "None", "{}", "{}"]


@pytest.mark.every_library
def test_available_backends():
    found = groupnorm.available_backends()
    assert [info.name for info in found][:5] == ["numpy", "jax", "torch", "cupy", "mlx"]
    numpy = found[0]
    assert numpy[:5] == ("numpy", True, np.__version__, ("cpu",), None)
    if importlib.util.find_spec(CORE):
        assert numpy.implementations == {"cpu": ("fused", "portable")}
        assert numpy.why_not_fused == {}
    else:
        assert numpy.implementations == {"cpu": ("portable",)}
        assert numpy.why_not_fused["cpu"] == why_not_built()


@pytest.mark.needs("jax", "torch")
def test_available_backends_of_other_libraries():
    found = {info.name: info for info in groupnorm.available_backends()}
    for name in ("jax", "torch"):
        assert found[name].installed
        assert found[name].version == importlib.import_module(name).__version__
        assert any(device.startswith("cpu") for device in found[name].devices)
        assert found[name].error is None
    assert found["torch"].implementations["cpu"][-1] == "native"


@pytest.mark.every_library
def test_listed_implementations_are_those_that_work():
    for info in groupnorm.available_backends():
        assert set(info.implementations) == set(info.devices)
        for device, names in info.implementations.items():
            # implementation=None uses the first one, which is never "native".
            assert names[0] == ("fused" if "fused" in names else "portable")
            assert ("fused" in names) == (device not in info.why_not_fused)
            assert set(names) == {n for n in IMPLEMENTATIONS if can_compute(info.name, device, n)}


def can_compute(backend: str, device: str, implementation: str) -> bool:
    """Whether this implementation computes an ordinary call, which is tried out."""
    adapter = adapter_named(backend)
    x = adapter.place(adapter.from_host(np.ones((2, 8, 50), np.float32)), device)
    try:
        groupnorm.group_norm(x, num_groups=2, feature_axis=1, implementation=implementation)
    except groupnorm.errors.ArgumentValueError as error:
        if "cannot compute this call" not in str(error):
            raise
        return False
    return True


CORE = "groupnorm.backends.kernels.cpu._core"


# The core has to be hidden if it is there; the others only take time to import.
def without(*libraries: str) -> str:
    return "".join(HIDE.format(library=library) for library in libraries)


@pytest.mark.parametrize(
    ("library", "others", "left"),
    [
        ("numpy", ("jax", "torch", "cupy", "mlx"), ("portable",)),
        pytest.param(
            "torch",
            ("jax", "cupy", "mlx"),
            ("portable", "native"),
            marks=pytest.mark.needs("torch"),
        ),
    ],
)
def test_available_backends_says_why_the_core_is_missing(library, others, left):
    program = without(CORE, *others) + (
        "import json, groupnorm\n"
        f"info = next(b for b in groupnorm.available_backends() if b.name == {library!r})\n"
        "print(json.dumps([info.error, info.implementations['cpu'], info.why_not_fused['cpu']]))\n"
    )
    error, names, why = json.loads(python("-W", "error", "-c", program).stdout)
    assert error is None
    assert tuple(names) == left
    assert why == why_not_built()
    for part in ("the compiled core", "install"):
        assert part in why


@pytest.mark.needs("torch")
def test_cpu_kernels_are_unavailable_on_other_devices():
    why = adapter_named("torch").kernels.why_unavailable("cuda:0")
    assert why is not None
    assert "cuda" in why.reason


def test_public_names():
    expected = {
        *("GroupNorm", "group_norm", "group_norm_vjp", "available_backends", "bind_axis"),
        *("save", "load"),
        *("GroupStatistics", "group_statistics", "merge_statistics", "normalize"),
    }
    assert expected <= set(groupnorm.__all__)
    for name in groupnorm.__all__:
        thing = getattr(groupnorm, name)
        assert thing.__doc__, f"{name} has no docstring"


def test_every_error_derives_from_a_package_and_a_builtin_error():
    errors = groupnorm.errors
    kinds = {
        errors.ArgumentValueError: ValueError,
        errors.ArgumentTypeError: TypeError,
        errors.BackendImportError: ImportError,
        errors.AxisNameError: NameError,
        errors.FileFormatError: ValueError,
        errors.ArgumentStateError: RuntimeError,
    }
    for error, kind in kinds.items():
        assert issubclass(error, errors.GroupNormError)
        assert issubclass(error, kind)
    assert set(errors.__all__) == {"GroupNormError", *(error.__name__ for error in kinds)}


@pytest.mark.parametrize(
    ("library", "package"),
    [
        *((name, name) for name in ("brainstate", "equinox", "flax", "keras", "mlx", "torch")),
        ("haiku", "dm-haiku"),
    ],
)
def test_a_missing_framework_is_named(library, package):
    program = without(library) + (
        "import groupnorm\n"
        f"try:\n    groupnorm.{library}\n"
        "except groupnorm.errors.BackendImportError as error:\n    print(error)\n"
    )
    printed = python("-W", "error", "-c", program).stdout
    assert f"groupnorm.{library} needs {library}" in printed
    assert f'pip install "{package}"' in printed


PUBLIC_MODULES = [
    "groupnorm",
    "groupnorm.distributed.axis_names",
    "groupnorm.tiled",
    "groupnorm.discovery",
    "groupnorm.functional",
    "groupnorm.initializers",
    "groupnorm.layer",
    "groupnorm.parameters",
    "groupnorm.portable.merge",
    "groupnorm.testing.oracle",
]


@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name), raise_on_error=False)
    assert failed == 0


def test_docstrings_contain_examples():
    """Otherwise the test above would run nothing."""
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


@pytest.mark.needs("jax", "torch", "cupy", "mlx")
def test_examples_in_docstrings_of_adapters():
    for name in (
        "numpy.adapter",
        "jax.adapter",
        "torch.adapter",
        "torch.fusion",
        "torch.override",
        "torch.process_groups",
        "torch.replacement",
        "cupy.adapter",
        "mlx.adapter",
        "mlx.layer",
        "array_api",
    ):
        failed, _ = doctest.testmod(importlib.import_module(f"groupnorm.backends.{name}"))
        assert failed == 0
