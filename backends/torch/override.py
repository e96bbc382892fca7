"""A context in which every call of `torch.nn.functional.group_norm` is computed by this library."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from groupnorm.arguments import validate
from groupnorm.backends.torch.native import is_autocast_to_float32, laid_out_as_pytorch

__all__ = ["override"]


class _Override(TorchFunctionMode):
    """Computes what `torch.nn.functional.group_norm` is called with."""

    def __init__(self, implementation: str | None) -> None:
        super().__init__()
        self._implementation = implementation

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # fmt: skip
        kwargs = kwargs or {}
        if func is torch.nn.functional.group_norm:
            return _group_norm(self._implementation, *args, **kwargs)
        return func(*args, **kwargs)


def _group_norm(
    implementation: str | None, input: Any, num_groups: int, weight: Any = None, bias: Any = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    from groupnorm.functional import group_norm

    dtype = "float32" if is_autocast_to_float32(input) else "input"
    y = group_norm(
        input, weight, bias, num_groups=num_groups, feature_axis=1, epsilon=eps, dtype=dtype,
        implementation=implementation,
    )  # fmt: skip
    return laid_out_as_pytorch(y)


def override(*, implementation: str | None = None) -> AbstractContextManager[Any]:
    """Return a context in which `torch.nn.functional.group_norm` is computed by this library.

    It reaches `torch.nn.GroupNorm` and all other code in Python that calls this function, in the
    thread that enters the context, with x's dtype as the result's. It does not reach scripted
    modules, calls of `torch.group_norm`, and what activation checkpointing computes again. All
    calls of PyTorch's functions pass through it, which takes about a microsecond each;
    `groupnorm.torch.replace` has no such limits and no such cost.

    Parameters
    ----------
    implementation : {"portable", "fused", "native"}, optional
        As for `groupnorm.group_norm`.

    Returns
    -------
    context manager
        Can be used several times, and nested.

    Raises
    ------
    groupnorm.errors.ArgumentValueError
        If the implementation is not known.

    Examples
    --------
    >>> import torch
    >>> import groupnorm.torch
    >>> x = 1e4 + torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> with groupnorm.torch.override():
    ...     y = torch.nn.GroupNorm(2, 8)(x)
    >>> bool(abs(y.mean()) < 1e-6)
    True
    """
    validate(
        feature_axis=1, num_groups=1, group_size=None, reduction_axes=None, epsilon=1e-5,
        dtype=None, axis_name=None, axis_index_groups=None, use_fast_variance=True,
        implementation=implementation,
    )  # fmt: skip
    return _Override(implementation)
