"""How the compiled core is built and packaged, and what remains if it cannot be built."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from groupnorm.backends.kernels.cpu import build_report
from tests import ROOT

setuptools = pytest.importorskip("setuptools", reason="the build needs setuptools")

CORE = Path("backends/kernels/cpu/core")
PACKAGE = Path("groupnorm/backends/kernels/cpu")
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
SETTINGS = ("GROUPNORM_BUILD_CORE", "GROUPNORM_SANITIZE", "GROUPNORM_CXXFLAGS", "CC", "CXX")
COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)

needs_sources = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file() or not (ROOT / "backends").is_dir(),
    reason="the installed wheel is tested, without the sources",
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

MODULE = """
#include <Python.h>
#include "value.hpp"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_core", nullptr, 0};
PyMODINIT_FUNC PyInit__core() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "value", value());
  return module;
}
"""


@pytest.fixture
def arguments(monkeypatch):
    """Return a function that runs setup.py with variables, and returns what it passes to setup."""
    monkeypatch.chdir(ROOT)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)

    def run(**variables):
        found = {}
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            patch.setattr(setuptools, "setup", lambda **given: found.update(given))
            runpy.run_path("setup.py")
        return found

    return run


@needs_sources
def test_the_core_has_the_stable_abi_and_all_sources(arguments):
    found = arguments()
    [core] = found["ext_modules"]
    assert core.name == "groupnorm.backends.kernels.cpu._core"
    assert core.py_limited_api is LIMITED_API
    assert core.define_macros == ([("Py_LIMITED_API", "0x030B0000")] if LIMITED_API else [])
    want = {"py_limited_api": "cp311"} if LIMITED_API else {}
    assert found["options"]["bdist_wheel"] == want
    assert set(core.sources) == set(map(str, CORE.glob("*.cpp")))
    assert set(core.depends) == set(map(str, CORE.glob("*.hpp")))
    assert core.sources
    assert core.depends


@needs_sources
@pytest.mark.skipif(os.name == "nt", reason="the flags are those of gcc and clang")
def test_sanitizers_and_more_flags(arguments):
    usual = arguments()
    assert not any("sanitize" in flag for flag in usual["ext_modules"][0].extra_compile_args)
    assert usual["options"]["build"] == {}
    found = arguments(GROUPNORM_SANITIZE="address,undefined", GROUPNORM_CXXFLAGS="-O0 -DX='a b'")
    [core] = found["ext_modules"]
    flags = core.extra_compile_args
    assert flags[-6:] == [
        "-fsanitize=address,undefined", "-g", "-O1", "-fno-omit-frame-pointer", "-O0", "-DX=a b",
    ]  # fmt: skip
    assert "-fsanitize=address,undefined" in core.extra_link_args
    # The next wheel contains everything in the folder of the usual builds.
    assert found["options"]["build"] == {"build_base": "build/sanitize-address-undefined"}


@needs_sources
def test_a_wrong_request_is_refused(arguments):
    with pytest.raises(SystemExit, match="GROUPNORM_BUILD_CORE='yes': it must be 0, 1 or not set"):
        arguments(GROUPNORM_BUILD_CORE="yes")


class Checkout:
    """A copy of the sources whose core is a module of one line, compiled in a second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.folder.mkdir()
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.folder)
        shutil.copy(ROOT / "pytest_groupnorm.py", self.folder)
        unwanted = shutil.ignore_patterns("__pycache__", "core", "*.so", "*.pyd", "build_error.txt")
        for name in ("groupnorm", "backends"):
            shutil.copytree(ROOT / name, self.folder / name, symlinks=True, ignore=unwanted)
        self.core = self.folder / CORE
        self.core.mkdir()
        (self.core / "module.cpp").write_text(MODULE)
        (self.core / "value.hpp").write_text("int value();\n")
        (self.core / "value.cpp").write_text('#include "value.hpp"\nint value() { return 1; }\n')
        self.environment = {k: v for k, v in os.environ.items() if k not in SETTINGS}
        # Python's own setting may name a compiler that is not installed.
        self.environment |= {"CXX": COMPILER} if COMPILER else {}
        self.installed = folder / "installed"
        self.package = self.installed / PACKAGE

    def run(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
        )

    def build(self, **variables: str) -> subprocess.CompletedProcess:
        return self.run("setup.py", "build", "--build-lib", str(self.installed), **variables)

    def files(self, pattern: str) -> set[str]:
        return {path.name for path in self.package.glob(pattern)}

    def value(self) -> int:
        [core] = self.package.glob("_core.*")
        program = (
            "import sys, importlib.machinery as m, importlib.util as u\n"
            "spec = u.spec_from_file_location('_core', sys.argv[1])\n"
            "print(u.module_from_spec(spec).value)"
        )
        result = self.run("-c", program, str(core))
        assert result.returncode == 0, result.stderr
        return int(result.stdout)


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@needs_sources
@needs_compiler
def test_an_edit_rebuilds_what_it_concerns(checkout):
    def objects():
        return set((checkout.folder / "build" / "objects").rglob("*.o*"))

    def edit(name, old, new):
        path = checkout.core / name
        path.write_text(path.read_text().replace(old, new))
        before = objects()
        result = checkout.build()
        assert result.returncode == 0, result.stderr
        return {path.stem for path in objects() - before if path.is_file()}

    assert edit("value.hpp", "\n", "\n") == {"module", "value"}
    assert checkout.value() == 1
    assert edit("value.hpp", "\n", "\n") == set()
    assert edit("value.cpp", "return 1", "return 2") == {"value"}
    assert checkout.value() == 2
    assert edit("value.hpp", "int value()", "inline int other() { return 3; }\nint value()") == {
        "module", "value"
    }  # fmt: skip
    assert edit("value.cpp", "return 2", "return other()") == {"value"}
    assert checkout.value() == 3


@needs_sources
@needs_compiler
def test_an_error_leaves_a_report_instead_of_a_stale_core(checkout):
    assert checkout.build().returncode == 0
    assert len(checkout.files("_core.*")) == 1
    assert not checkout.files("build_error.txt")

    good = (checkout.core / "value.cpp").read_text()
    (checkout.core / "value.cpp").write_text("int value() { return undefined_name; }\n")
    failed = checkout.build()
    assert failed.returncode == 0
    assert not checkout.files("_core.*")
    report = (checkout.package / "build_error.txt").read_text()
    first, *rest = report.splitlines()
    assert first.startswith(f"{COMPILER} failed: ")
    assert "value.cpp" in first
    assert "undefined_name" in first
    assert "return undefined_name" in "\n".join(rest)
    assert len(rest) < 15
    assert "undefined_name" in failed.stderr  # all that the compiler said

    # In a wheel, as a CI builds it, an error is one.
    assert checkout.build(GROUPNORM_BUILD_CORE="1").returncode != 0

    (checkout.core / "value.cpp").write_text(good)
    assert checkout.build(GROUPNORM_BUILD_CORE="1").returncode == 0
    assert len(checkout.files("_core.*")) == 1
    assert not checkout.files("build_error.txt")

    assert checkout.build(GROUPNORM_BUILD_CORE="0").returncode == 0
    assert not checkout.files("_core.*")
    left_out = (checkout.package / "build_error.txt").read_text()
    assert left_out == "GROUPNORM_BUILD_CORE=0 was set\n"


@needs_sources
@pytest.mark.slow
def test_without_a_compiler_the_installation_computes_portably(checkout):
    no = shutil.which("false")
    if no is None:
        pytest.skip("there is no command `false`")
    pip = ("-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index")
    result = checkout.run(*pip, "--target", str(checkout.installed), ".", CC=no, CXX=no)
    assert result.returncode == 0, result.stderr
    assert not checkout.files("_core.*")
    program = (
        "import numpy as np, groupnorm\n"
        "x = np.arange(64, dtype=np.float32).reshape(2, 4, 8)\n"
        "y = groupnorm.group_norm(x, num_groups=2)\n"
        "portable = groupnorm.group_norm(x, num_groups=2, implementation='portable')\n"
        "assert np.array_equal(y, portable)\n"
        "info = groupnorm.available_backends()[0]\n"
        "assert info.implementations['cpu'] == ('portable',)\n"
        "print(groupnorm.__file__)\n"
        "print(info.why_not_fused['cpu'])"
    )
    elsewhere = {"PYTHONPATH": str(checkout.installed), "PYTHONSAFEPATH": "1"}
    result = checkout.run("-c", program, **elsewhere)
    assert result.returncode == 0, result.stderr
    file, why = result.stdout.splitlines()
    assert Path(file).is_relative_to(checkout.installed)
    assert f"could not be built during the installation: {no} failed: exit status 1" in why
    assert "install a C++17 compiler" in why
    command = checkout.run("-m", "groupnorm", "info", **elsewhere)
    assert why in command.stdout


@needs_sources
def test_sdist_and_wheel(checkout, tmp_path):
    """The sources of the core are in the sdist only, and what was built in neither's place."""
    for name in ("_core.abi3.so", "build_error.txt"):
        (checkout.core.parent / name).write_text("of the checkout")
    command = ("setup.py", "sdist", "-d", str(tmp_path), "bdist_wheel", "-d", str(tmp_path))
    result = checkout.run(*command, GROUPNORM_BUILD_CORE="0")
    assert result.returncode == 0, result.stderr
    [sdist] = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(CORE / file.name) for file in checkout.core.iterdir()}
    assert len(sources) == 3
    assert sources | {"setup.py", "backends/kernels/cpu/build_report.py"} <= names
    assert not {name for name in names if name.endswith((".so", "build_error.txt"))}

    [wheel] = tmp_path.glob("*.whl")
    if LIMITED_API:
        assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        report = archive.read(str(PACKAGE / "build_error.txt")).decode()
    assert report == "GROUPNORM_BUILD_CORE=0 was set\n"
    assert not {name for name in names if name.endswith((".so", ".cpp", ".hpp"))}
    assert "groupnorm/py.typed" in names


@pytest.fixture
def report(tmp_path, monkeypatch):
    path = tmp_path / "build_error.txt"
    monkeypatch.setattr(build_report, "_REPORT", path)
    return path


def test_report_of_an_error_names_the_compiler_the_error_and_what_to_install(report, monkeypatch):
    report.write_text(
        "g++ failed: a.cpp:1:10: fatal error: Python.h: No such file\n 1 | #include\n"
    )
    for platform, package in (
        ("linux", "apt install g++ python3-dev"),
        ("darwin", "xcode-select --install"),
        ("win32", "Microsoft C++ Build Tools"),
        ("freebsd14", "such as g++ or clang"),
    ):
        monkeypatch.setattr(sys, "platform", platform)
        why = build_report.why_not_built()
        assert "could not be built during the installation: g++ failed: a.cpp:1:10: fatal" in why
        assert f"(more in {report})" in why
        assert "#include" not in why
        assert "install a C++17 compiler" in why
        assert package in why
        assert "install groupnorm again, with pip's options --force-reinstall" in why
        assert "\n" not in why


def test_report_of_a_core_left_out_on_purpose(report):
    report.write_text("GROUPNORM_BUILD_CORE=0 was set\n")
    why = build_report.why_not_built()
    assert "left out, because GROUPNORM_BUILD_CORE=0 was set" in why
    assert "compiler" not in why


@pytest.mark.parametrize("text", [b"", b"\xff failed\n"])
def test_a_damaged_report_is_no_error(report, text):
    report.write_bytes(text)
    assert "could not be built" in build_report.why_not_built()


def test_a_missing_report_means_a_checkout_that_was_not_installed(report):
    why = build_report.why_not_built()
    assert "hides an installed package" in why
    assert "pip install -e ." in why
