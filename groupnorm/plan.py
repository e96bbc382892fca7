"""All shape and axis decisions, in plain integers: making or testing one needs no array library.

A `Plan` describes how arrays of one shape are normalized. The array is reshaped to its *work
shape*, in which adjacent axes of the same kind are merged:

kept
    axes that are not reduced (the batch);
positions
    axes reduced together with the features (space, time);
channels
    the features.

Statistics are computed in two stages, which is fast in every memory layout: first per channel,
over the positions (the `inner` axes); then the statistics of a group's channels are merged. Only
the small results of the first stage take the *grouped shape*, in which the channel axis is split
into (num_groups, group_size), the second of them called `members`: loops over full-size arrays
run along whole rows. With very few positions there is only one stage, and the work shape is the
grouped shape.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from groupnorm.errors import ArgumentValueError

__all__ = ["Plan", "make_plan", "make_plan_uncached", "product", "resolve_groups", "same_shape"]

Shape = tuple[int, ...]

# Below this many positions a sum per channel is hardly shorter than the data itself, so the members
# of a group are reduced together with the positions in one stage.
FEW_POSITIONS = 16
# A pivot is the mean of at least this many positions. A single element or position fails if it is
# an outlier; with about sixty, errors were at rounding level on every data set tried.
PIVOT_SAMPLES = 64


class Plan(NamedTuple):
    """How arrays of one shape are normalized; see the module's docstring for the terms."""

    shape: Shape
    permutation: Shape | None
    permuted_shape: Shape
    inverse_permutation: Shape | None
    merged: tuple[tuple[int, ...], ...]
    merged_shape: Shape  # the work shape, but always with a single channel axis
    work_shape: Shape
    channel: int  # the channel axis of the work shape; the group axis of the grouped shape
    kept: Shape  # in the grouped shape
    positions: Shape  # in the work shape
    inner: Shape  # in the work shape
    two_stages: bool
    sample: tuple[slice, ...] | None
    parameter_shape: Shape  # grouped
    feature_shape: Shape
    channels: int
    inner_count: float
    group_count: int
    static: bool
    blocked: bool

    @property
    def empty(self) -> bool:
        """Whether there are no elements, for which reductions such as min raise.

        Dask's raise for a batch without samples too.
        """
        return self.group_count == 0 or (self.static and 0 in self.shape)

    @property
    def members(self) -> int:
        """The axis of a group's channels in the grouped shape."""
        return self.channel + 1

    @property
    def kept_axes(self) -> frozenset[int]:
        """The axes of x that are not reduced."""
        order = self.permutation or range(len(self.shape))
        return frozenset(
            order[axis]
            for i, axes in enumerate(self.merged)
            if i + (i > self.channel) in self.kept
            for axis in axes
        )

    @property
    def feature_axes(self) -> frozenset[int]:
        """The axes of x that hold the channels."""
        order = self.permutation or range(len(self.shape))
        return frozenset(order[axis] for axis in self.merged[self.channel])

    @property
    def roles(self) -> str:
        """A letter for each merged axis: C channels, P positions, K kept."""
        kept = {axis - (axis > self.channel) for axis in self.kept}
        return "".join(
            "C" if i == self.channel else "K" if i in kept else "P"
            for i in range(len(self.merged_shape))
        )

    @property
    def statistics_shape(self) -> Shape:
        """The shape of public statistics: the kept axes, then the groups."""
        before, after = self._kept_sizes
        return (*before, *after, self.parameter_shape[self.channel])

    @property
    def grouped_statistics_shape(self) -> Shape:
        """The grouped shape of one value per group."""
        sizes = [1] * len(self.parameter_shape)
        sizes[self.channel] = self.parameter_shape[self.channel]
        for axis in self.kept:
            sizes[axis] = self.merged_shape[axis - (axis > self.channel)]
        return tuple(sizes)

    @property
    def groups_among_kept(self) -> Shape:
        """The shape of one value per group, with all kept axes and the groups as channel axis."""
        before, after = self._kept_sizes
        return (*before, self.parameter_shape[self.channel], *after)

    @property
    def kept_before(self) -> int:
        """The number of kept axes before the channels."""
        return len(self._kept_sizes[0])

    @property
    def _kept_sizes(self) -> tuple[Shape, Shape]:
        """The lengths of the kept axes before and after the channels."""
        merged = [axis - (axis > self.channel) for axis in self.kept]
        before = [
            self.permuted_shape[a] for i in merged if i < self.channel for a in self.merged[i]
        ]
        after = [self.permuted_shape[a] for i in merged if i > self.channel for a in self.merged[i]]
        return tuple(before), tuple(after)

    def grouped(self, shape: Shape) -> Shape:
        """Split the channel axis of a shape."""
        if not self.two_stages:
            return shape
        split = self.parameter_shape[self.channel : self.channel + 2]
        return (*shape[: self.channel], *split, *shape[self.channel + 1 :])

    def ungrouped(self, shape: Shape) -> Shape:
        """Undo `grouped`."""
        if not self.two_stages:
            return shape
        return (*shape[: self.channel], self.channels, *shape[self.channel + 2 :])

    def mask_shapes(self, mask_shape: Shape) -> tuple[Shape, Shape, Shape]:
        """Return how to bring a mask to the work shape while expanding it as little as possible.

        Returns
        -------
        full : tuple of int
            The mask's shape with leading ones added; permute it next.
        broadcast : tuple of int
            The shape to broadcast the permuted mask to; a merged axis of ones stays 1.
        work : tuple of int
            The shape to reshape it to; broadcasts against `work_shape`.

        Raises
        ------
        ArgumentValueError
            If the mask does not broadcast to the plan's shape.
        """
        full = (1,) * (len(self.shape) - len(mask_shape)) + mask_shape
        # Not `m not in (1, s)`: with symbolic sizes, torch.compile looks for the same objects.
        if len(mask_shape) > len(self.shape) or any(
            m != 1 and m != s for m, s in zip(full, self.shape, strict=True)
        ):
            raise ArgumentValueError(
                f"mask has shape {mask_shape}, which does not broadcast to x of shape "
                f"{self.shape}: each axis, counted from the last, must have x's length or 1. Give "
                "the mask x's shape, or add axes of length 1, as in mask[..., None]."
            )
        permuted = full if self.permutation is None else tuple(full[a] for a in self.permutation)
        broadcast: list[int] = []
        work: list[int] = []
        for axes in self.merged:
            sizes = [self.permuted_shape[a] for a in axes]
            if all(permuted[a] == 1 for a in axes):
                broadcast += [1] * len(axes)
                work.append(1)
            else:
                broadcast += sizes
                work.append(product(sizes))
        if not self.two_stages:
            at = slice(self.channel, self.channel + 1)
            work[at] = (
                [1, 1] if work[self.channel] == 1 else self.work_shape[at.start : at.stop + 1]
            )
        return full, tuple(broadcast), tuple(work)


def product(sizes: Iterable[int]) -> int:
    """Multiply sizes; unlike `math.prod` this can be traced with symbolic sizes."""
    result = 1
    for size in sizes:
        result = result * size
    return result


def same_shape(shape: Shape, other: Shape) -> bool:
    """Compare elementwise: tuples of symbolic sizes never compare equal."""
    return len(shape) == len(other) and all(a == b for a, b in zip(shape, other, strict=True))


def resolve_groups(channels: int, num_groups: int | None, group_size: int | None) -> int:
    """Return the number of groups that `channels` channels are split into.

    Raises
    ------
    ArgumentValueError
        If the channels cannot be split evenly.
    """
    argument, divisor = (
        ("num_groups", num_groups) if num_groups is not None else ("group_size", group_size or 1)
    )
    if channels % divisor:
        raise ArgumentValueError(
            f"{argument}={divisor} does not divide the {channels} channels: every group must have "
            f"the same number of channels. Choose a divisor of {channels}"
            f"{_nearest(channels, divisor)}."
        )
    return channels // divisor if group_size is not None else divisor


def _nearest(channels: int, wanted: int) -> str:
    divisors = [d for d in range(1, min(channels, 65536) + 1) if channels % d == 0]
    return f", such as {min(divisors, key=lambda d: abs(d - wanted))}" if divisors else ""


def make_plan_uncached(
    shape: Shape,
    feature: Shape,
    num_groups: int | None,
    group_size: int | None,
    reduction: Shape | None,
    expected: Shape | None = None,
    *,
    sampled: bool,
    static: bool = True,
    blocked: bool = True,
    merging: bool = True,
) -> Plan:
    """Make the plan for arrays of `shape`.

    Parameters
    ----------
    shape : tuple of int
        The input's shape.
    feature : tuple of int
        Its feature axes; negative ones count from the end.
    num_groups, group_size : int or None
        Exactly one is given.
    reduction : tuple of int or None
        The axes to reduce; None is all but the batch.
    expected : tuple of int or None
        The lengths the feature axes must have; None accepts any.
    sampled : bool
        Whether the pivot may be computed from a sample of the positions.
    static : bool
        False while a compiler traces with symbolic sizes: then no decision may specialize the
        program to the current sizes.
    blocked : bool
        Whether to sum in blocks of fixed size, or in the library's own order.
    merging : bool
        Whether to merge adjacent axes of the same kind. It is fastest in NumPy and PyTorch, but an
        axis that is sharded over devices must stay separate.

    Raises
    ------
    ArgumentValueError
        If the axes do not match the shape, or the groups do not divide the channels.
    """
    ndim = len(shape)
    features = _normalize_axes("feature_axis", feature, shape)
    reduced = _reduction_axes(reduction, features, shape)
    feature_shape = tuple(shape[a] for a in features)
    channels = product(feature_shape)
    if expected is not None and not same_shape(feature_shape, expected):
        raise ArgumentValueError(
            f"x of shape {shape} has feature axes of length {feature_shape}, and this layer was "
            f"created for {expected}: pass x with these lengths, or create the layer with the "
            "in_size and feature_axis of this x (for channels on axis 1, in_size=(C, ...) and "
            "feature_axis=0)."
        )
    groups = resolve_groups(channels, num_groups, group_size)

    order = tuple(range(ndim))
    permutation = None
    if features != tuple(range(features[0], features[-1] + 1)):
        rest = [a for a in order if a not in features]
        at = sum(a < features[-1] for a in rest)
        permutation = (*rest[:at], *features, *rest[at:])
        order = permutation
    kinds = ["F" if a in features else "P" if a in reduced else "K" for a in order]
    permuted_shape = tuple(shape[a] for a in order)

    merged: list[list[int]] = []
    for axis, kind in enumerate(kinds):
        if merged and kinds[merged[-1][-1]] == kind and (merging or kind == "F"):
            merged[-1].append(axis)
        else:
            merged.append([axis])

    sizes = [product(permuted_shape[a] for a in axes) for axes in merged]
    roles = [kinds[axes[0]] for axes in merged]
    channel = roles.index("F")
    group_size = channels // groups
    position_count = product(n for n, role in zip(sizes, roles, strict=True) if role == "P")
    two_stages = group_size > 1 and (not static or position_count >= FEW_POSITIONS)
    # The group axis and the members replace the channel axis.
    grouped = [i + (i > channel) for i in range(len(sizes))]
    work_axes = list(range(len(sizes))) if two_stages else grouped
    positions = tuple(i for i, role in zip(work_axes, roles, strict=True) if role == "P")
    work = list(sizes)
    if not two_stages:
        work[channel : channel + 1] = [groups, group_size]
    inner = positions if two_stages else tuple(sorted([*positions, channel + 1]))
    inner_count = product(work[a] for a in inner)
    parameter_shape = [1] * (len(sizes) + 1)
    parameter_shape[channel : channel + 2] = [groups, group_size]
    return Plan(
        shape=shape,
        permutation=permutation,
        permuted_shape=permuted_shape,
        inverse_permutation=None if permutation is None else _inverse(permutation),
        merged=tuple(tuple(axes) for axes in merged),
        merged_shape=tuple(sizes),
        work_shape=tuple(work),
        channel=channel,
        kept=tuple(i for i, role in zip(grouped, roles, strict=True) if role == "K"),
        positions=positions,
        inner=inner,
        two_stages=two_stages,
        sample=_sample(work, inner, inner_count) if sampled and static else None,
        parameter_shape=tuple(parameter_shape),
        feature_shape=feature_shape,
        channels=channels,
        # A float from the start, since a large int overflows some libraries' default integer; but
        # converting a symbolic size to float would specialize the program to it.
        inner_count=float(inner_count) if static else inner_count,
        group_count=position_count * group_size,
        static=static,
        blocked=blocked,
    )


# Plans are made once per shape and option set. A compiler that traces Python ignores the cache,
# with a warning, so callers choose between the two functions.
make_plan = lru_cache(maxsize=4096)(make_plan_uncached)


def _normalize_axes(argument: str, axes: Sequence[int], shape: Shape) -> Shape:
    ndim = len(shape)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ArgumentValueError(
                f"{argument}={axis} is out of range for x of shape {shape}: it must be in "
                f"[{-ndim}, {ndim - 1}]. Give x at least "
                f"{-axis if axis < 0 else axis + 1} axes, or another axis."
            )
    normalized = tuple(sorted(axis % ndim for axis in axes))
    if len(set(normalized)) != len(normalized):
        raise ArgumentValueError(
            f"{argument}={tuple(axes)} names an axis of x of shape {shape} twice: "
            "give every axis once."
        )
    return normalized


def _reduction_axes(reduction: Shape | None, features: Shape, shape: Shape) -> Shape:
    if reduction is None:  # axis 0 is the batch, or a feature axis
        return tuple(range(1, len(shape)))
    reduced = _normalize_axes("reduction_axes", reduction, shape)
    missing = [a for a in features if a not in reduced]
    if missing:
        raise ArgumentValueError(
            f"reduction_axes={reduction} leaves out the feature axis {missing[0]} of x of shape "
            f"{shape}: a group's statistics run over its channels, so reduction_axes must contain "
            f"every feature axis. Add {missing[0] - len(shape)}."
        )
    return reduced


def _inverse(permutation: Shape) -> Shape:
    return tuple(permutation.index(a) for a in range(len(permutation)))


def _sample(work: list[int], inner: Shape, count: int) -> tuple[slice, ...] | None:
    """Slices that select the positions for the pivot; None selects all of them.

    At least sqrt(count) are selected: then an outlier in the sample moves the pivot by at most
    about one standard deviation, whatever its size. The stride is coprime to the axis length, else
    it could select a single image column, such as the border. Below twice `PIVOT_SAMPLES` there is
    nothing to skip.
    """
    longest = max(inner, key=lambda a: work[a])
    length = work[longest]
    stride = min(count // max(PIVOT_SAMPLES, math.isqrt(count)), length // 8)
    while stride > 1 and math.gcd(stride, length) > 1:
        stride -= 1
    if stride <= 1:
        return None
    return tuple(
        slice(None, None, stride) if a == longest else slice(None) for a in range(len(work))
    )
