"""Group normalization, written once against the array API: the same accurate numbers everywhere.

See `GroupNorm` for the layer, `group_norm` for the function.
"""

from groupnorm import errors, initializers
from groupnorm.discovery import BackendInfo, available_backends
from groupnorm.functional import group_norm, group_norm_vjp
from groupnorm.layer import GroupNorm

__version__ = "0.1.0.dev0"

__all__ = [
    "BackendInfo",
    "GroupNorm",
    "available_backends",
    "errors",
    "group_norm",
    "group_norm_vjp",
    "initializers",
]
