"""What is packaged, and that the private names of libraries stay in one file each."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.skipif(
    not (ROOT / "groupnorm").is_dir(), reason="the installed wheel is tested, without the sources"
)

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def folders(top: str) -> set[str]:
    """Return the dotted names of the folders of Python files below a folder, itself included."""
    files = (p for p in (ROOT / top).rglob("*.py") if "__pycache__" not in p.parts)
    return {".".join(p.parent.relative_to(ROOT).parts) for p in files}


def test_every_folder_is_packaged():
    """A folder that the list forgets is missing from the wheel, silently."""
    found = {name for name in folders("groupnorm") if ".backends" not in name}
    found |= {f"groupnorm.{name}" for name in folders("backends")}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == listed
    assert set(listed) == found
    assert len(found) > 10


def test_every_package_has_its_init_file():
    for name in PYPROJECT["tool"]["setuptools"]["packages"]:
        path = Path(*name.removeprefix("groupnorm.").split("."))
        path = path if name.startswith("groupnorm.backends") else Path(*name.split("."))
        assert (ROOT / path / "__init__.py").is_file(), name


# Modules of JAX without a promise of stability, and attributes of what they pass.
UNSTABLE = ("jax.core", "jax.interpreters", "jax.extend", "jax._src")
ATTRIBUTES = {"avals_in", "avals_out", "module_context", "for_export", "manual_axis_type", "vma"}
LIBRARIES = {"torch", "jax", "jaxlib", "forward_ad", "mlir", "ad", "batching"}


def private_names(path: Path) -> set[str]:
    """Return the private names of PyTorch and JAX that a file imports or reads."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Attribute):
            names = [ast.unparse(node)]
            if node.attr in ATTRIBUTES:
                found.add(node.attr)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            root, *parts = name.split(".")
            underscored = any(p.startswith("_") and not p.startswith("__") for p in parts)
            if root in LIBRARIES and (underscored or name.startswith(UNSTABLE)):
                found.add(name)
    return found


def test_private_names_stand_in_internals():
    for library in ("torch", "jax"):
        for path in (ROOT / "backends" / library).glob("*.py"):
            if path.name != "internals.py":
                assert private_names(path) == set(), path


def test_private_names_are_found(tmp_path):
    """So that the test above can fail."""
    file = tmp_path / "module.py"
    file.write_text(
        "import torch\nfrom torch._C import x\ntorch._C._get_tracing_state()\n"
        "from jax.interpreters import ad\ncontext.avals_in\nself._own\n"
    )
    assert private_names(file) == {
        "torch._C", "torch._C.x", "torch._C._get_tracing_state", "jax.interpreters.ad", "avals_in"
    }  # fmt: skip
