"""Group normalization, written once against the array API: equally accurate in every library.

See `GroupNorm` for the layer, `group_norm` for the function.
"""

import importlib
from typing import Any

from groupnorm import errors, initializers
from groupnorm.discovery import BackendInfo, available_backends
from groupnorm.distributed.axis_names import bind_axis
from groupnorm.files import load, save
from groupnorm.functional import group_norm, group_norm_vjp
from groupnorm.layer import GroupNorm
from groupnorm.num_threads import get_num_threads, set_num_threads
from groupnorm.portable.merge import GroupStatistics
from groupnorm.tiled import group_statistics, merge_statistics, normalize

__version__ = "0.1.0.dev0"

__all__ = [
    "BackendInfo",
    "GroupNorm",
    "GroupStatistics",
    "available_backends",
    "bind_axis",
    "errors",
    "get_num_threads",
    "group_norm",
    "group_norm_vjp",
    "group_statistics",
    "initializers",
    "load",
    "merge_statistics",
    "normalize",
    "save",
    "set_num_threads",
]


# Modules for one library each, which are imported when they are first used.
_MODULES = ("brainstate", "equinox", "flax", "haiku", "keras", "mlx", "onnx", "torch")


def __getattr__(name: str) -> Any:
    """Import a module for one library when it is first used, such as `groupnorm.torch`."""
    if name in _MODULES:
        return importlib.import_module(f"groupnorm.{name}")
    raise AttributeError(f"module 'groupnorm' has no attribute {name!r}")
