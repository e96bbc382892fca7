"""Import timm where torchvision is not installed, as beside a PyTorch that it was not built for.

timm's models use two names of torchvision, both for what is not done here: ``FrozenBatchNorm2d`` of
``torchvision.ops.misc``, which it compares modules with, and ``torchvision.models.
feature_extraction``, which it may do without. Its data sets and image transforms use more.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

__all__ = ["import_timm"]


class _Attributes(type):
    """A class with every attribute."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    """A module in which every name is a class without a purpose."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Attributes(name, (), {})


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `_Stub` for torchvision and all its modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.util.spec_from_loader(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def import_timm() -> ModuleType:
    """Import timm, with a stand-in for torchvision during the import if that is not installed."""
    if "timm" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module("timm")
    stubs = _Stubs()
    sys.meta_path.append(stubs)
    try:
        return importlib.import_module("timm")
    finally:
        sys.meta_path.remove(stubs)
        # Other packages look for torchvision and would use it.
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
