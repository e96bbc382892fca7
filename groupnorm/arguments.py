"""The options of a group normalization, validated once and kept as plain hashable values."""

import math
import numbers
import operator
import sys
from collections.abc import Sequence
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np

from groupnorm.dtypes import dtype_name
from groupnorm.errors import ArgumentTypeError, ArgumentValueError

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "CallOptions",
    "InSize",
    "check_epsilon",
    "check_in_size",
    "flag",
    "positive",
    "validate",
]

ACTIVATIONS = ("relu", "silu", "gelu")
IMPLEMENTATIONS = ("portable", "fused", "native")


class CallOptions(NamedTuple):
    """All arguments but arrays. Axes are as given: negative ones count from the end."""

    feature: tuple[int, ...]
    num_groups: int | None
    group_size: int | None
    reduction: tuple[int, ...] | None
    epsilon: float
    dtype: str | None
    axis_name: Any
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    fast: bool
    activation: str | None
    implementation: str | None
    feature_shape: tuple[int, ...] | None  # of the layer; None accepts any

    def __deepcopy__(self, memo: Any) -> "CallOptions":
        """Return self: it is immutable, and a process group cannot be copied."""
        return self


def validate(
    *,
    feature_axis: int | Sequence[int],
    num_groups: int | None,
    group_size: int | None,
    reduction_axes: int | Sequence[int] | None,
    epsilon: float,
    dtype: Any,
    axis_name: Any,
    axis_index_groups: Sequence[Sequence[int]] | None,
    use_fast_variance: bool,
    activation: str | None = None,
    implementation: str | None = None,
    feature_shape: tuple[int, ...] | None = None,
) -> CallOptions:
    """Validate the arguments that the layer and the function have in common.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming the argument, its value, the rule and the fix.
    """
    num_groups, group_size = _groups(num_groups, group_size)
    features = _ints("feature_axis", feature_axis)
    if not features:
        raise ArgumentValueError(
            f"feature_axis={feature_axis!r} names no axis: groups are groups of channels, so give "
            "at least one feature axis, such as -1."
        )
    return CallOptions(
        feature=features,
        num_groups=num_groups,
        group_size=group_size,
        reduction=None if reduction_axes is None else _ints("reduction_axes", reduction_axes),
        epsilon=check_epsilon("epsilon", epsilon),
        dtype=None if dtype is None else dtype_name("dtype", dtype, extra=("input",)),
        axis_name=tuple(axis_name) if isinstance(axis_name, list) else axis_name,
        axis_index_groups=_index_groups(axis_index_groups, axis_name),
        fast=flag("use_fast_variance", use_fast_variance),
        activation=None
        if activation is None
        else _one_of(
            "activation",
            activation,
            ACTIVATIONS,
            " To apply a function, call it on the layer's output.",
        ),
        implementation=None
        if implementation is None
        else _one_of("implementation", implementation, IMPLEMENTATIONS),
        feature_shape=feature_shape,
    )


def _groups(num_groups: Any, group_size: Any) -> tuple[int | None, int | None]:
    if (num_groups is None) == (group_size is None):
        both = "both are given" if num_groups is not None else "neither is given"
        raise ArgumentValueError(
            f"num_groups={num_groups!r} and group_size={group_size!r}: {both}, and exactly one is "
            "required. Pass num_groups=None together with group_size=, or num_groups= alone."
        )
    if num_groups is not None:
        return positive("num_groups", num_groups), None
    return None, positive("group_size", group_size)


def _integer(argument: str, value: Any) -> int:
    # bool is a subclass of int: num_groups=True would silently mean 1.
    if isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(
            f"{argument}={value!r} is a bool: an integer is required. Write {int(value)} if "
            "that is intended."
        )
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentTypeError(
            f"{argument}={value!r} is of type {type(value).__name__}: it must be a Python or "
            "NumPy integer."
        ) from None


def positive(argument: str, value: Any) -> int:
    """Check that an argument is a positive integer."""
    number = _integer(argument, value)
    if number <= 0:
        raise ArgumentValueError(
            f"{argument}={value!r} is not positive: give an integer of at least 1."
        )
    return number


def _ints(argument: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_integer(argument, v) for v in value)
    if isinstance(value, np.ndarray) and value.ndim == 1:
        return tuple(_integer(argument, v) for v in value)
    return (_integer(argument, value),)


def _one_of(argument: str, value: Any, names: tuple[str, ...], hint: str = "") -> str:
    known = ", ".join(map(repr, names))
    if not isinstance(value, str):
        raise ArgumentTypeError(
            f"{argument}={value!r} is of type {type(value).__name__}: it must be one of the "
            f"names {known}, or None.{hint}"
        )
    if value not in names:
        raise ArgumentValueError(f"{argument}={value!r} is not known: choose {known}, or None.")
    return value


def check_epsilon(argument: str, value: Any) -> float:
    """Check that an argument is a number that can be added to the variance."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(
            f"{argument}={value!r} is of type {type(value).__name__}: it must be a real number, "
            "such as 1e-6."
        )
    epsilon = float(value)
    # Not math.isfinite, which torch.compile cannot trace with dynamic=True; NaN fails this too.
    if not 0 <= epsilon < math.inf:
        raise ArgumentValueError(
            f"{argument}={value!r} must be finite and not negative: it is added to the variance. "
            "The default is 1e-6; PyTorch's is 1e-5."
        )
    return epsilon


def flag(argument: str, value: Any) -> bool:
    """Check that an argument is a bool."""
    if not isinstance(value, bool | np.bool_):
        raise ArgumentTypeError(
            f"{argument}={value!r} is of type {type(value).__name__}: it must be True or False."
        )
    return bool(value)


def _index_groups(groups: Any, axis_name: Any) -> tuple[tuple[int, ...], ...] | None:
    if groups is None:
        return None
    if axis_name is None:
        raise ArgumentValueError(
            f"axis_index_groups={groups!r} is given without axis_name: it splits the replicas of a "
            "named axis. Give axis_name too, or leave both out."
        )
    try:
        table = tuple(tuple(_integer("axis_index_groups", i) for i in group) for group in groups)
    except TypeError as error:
        if isinstance(error, ArgumentTypeError):
            raise
        raise ArgumentTypeError(
            f"axis_index_groups={groups!r} is not a sequence of sequences of integers, such as "
            "[[0, 1], [2, 3]]."
        ) from None
    members = sorted(i for group in table for i in group)
    if not members or members != list(range(len(members))):
        raise ArgumentValueError(
            f"axis_index_groups={groups!r} must hold every index of the axis, 0, 1, 2 ..., exactly "
            "once, since each replica belongs to one group: for instance [[0, 1], [2, 3]]."
        )
    return table


class InSize(NamedTuple):
    """An input size, and its feature axes in `x`."""

    in_size: "tuple[int | EllipsisType, ...]"
    feature_axis: int | tuple[int, ...]  # as given
    feature: tuple[int, ...]  # axes of x
    feature_shape: tuple[int, ...]


def check_in_size(in_size: Any, feature_axis: Any) -> InSize:
    """Check a layer's input size and resolve its feature axes.

    Axes before a ``...`` count from the front, after one batch axis; all others from the end.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        Naming the argument, its value, the rule and the fix.
    """
    if isinstance(in_size, np.ndarray):
        in_size = in_size.tolist()
    several = isinstance(in_size, Sequence) and not isinstance(in_size, str)
    entries = tuple(in_size) if several else (in_size,)
    ellipses = [i for i, e in enumerate(entries) if e is ...]
    if len(ellipses) > 1:
        raise ArgumentValueError(
            f"in_size={in_size!r} contains '...' {len(ellipses)} times: it stands for any number "
            "of axes and may appear only once."
        )
    size = tuple(e if e is ... else _integer("in_size", e) for e in entries)
    if not size or any(e is not ... and e < 0 for e in size):
        raise ArgumentValueError(
            f"in_size={in_size!r} must hold at least one length, none of them negative: it is the "
            "shape of the input without the batch axis, such as (28, 28, 64) or just 64."
        )
    if math.prod(e for e in size if e is not ...) > sys.maxsize:
        raise ArgumentValueError(
            f"in_size={in_size!r} holds more elements than any array can: check the order of its "
            "axes, and that they are lengths."
        )
    dots = ellipses[0] if ellipses else -1
    features: list[int] = []
    given = _ints("feature_axis", feature_axis)
    for axis in given:
        if not -len(size) <= axis < len(size):
            raise ArgumentValueError(
                f"feature_axis={axis} is out of range for in_size={in_size!r}: it is an index into "
                f"in_size, so it must be in [{-len(size)}, {len(size) - 1}]. (PyTorch's "
                "GroupNorm(groups, channels) is GroupNorm(channels, num_groups=groups) here.)"
            )
        features.append(axis % len(size))
    features.sort()
    if len(set(features)) != len(features):
        raise ArgumentValueError(
            f"feature_axis={feature_axis!r} names an axis of in_size={in_size!r} twice: give every "
            "axis once."
        )
    if dots in features:
        raise ArgumentValueError(
            f"feature_axis={feature_axis!r} selects the '...' of in_size={in_size!r}, whose "
            "length is unknown: select one of its integers."
        )
    shape = tuple(e for i in features if (e := size[i]) is not ...)
    if any(n == 0 for n in shape):
        raise ArgumentValueError(
            f"in_size={in_size!r} has no channels along feature_axis={feature_axis!r}: give at "
            "least 1."
        )
    return InSize(
        in_size=size,
        feature_axis=given[0] if len(given) == 1 else given,
        feature=tuple(i + 1 if i < dots else i - len(size) for i in features),
        feature_shape=shape,
    )
