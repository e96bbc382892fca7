"""PyTorch DTensors: every rank computes on its own shard, and pools statistics where it must.

The adapter of `groupnorm.backends.torch` hands calls with a DTensor over to `over_shards`. What is
done depends on the axis that a dimension of the device mesh shards:

an axis statistics are separate for (the batch)
    nothing: the shards have nothing to do with each other;
an axis that is reduced (height, width, time)
    statistics are pooled over the ranks of that mesh dimension;
a feature axis
    nothing either where every shard holds whole groups; statistics are pooled, over sets of ranks,
    where every shard lies within one group, or has a part of every group. Any other split is
    undone: that mesh dimension is gathered first, and its ranks all compute the same.

A pending sum (`Partial`) is taken first. The result is sharded as the input was, and a pending sum
becomes `Replicate`.

Parameters may be DTensors, or plain tensors that every rank has the same of. Their gradients are
those of the whole on every rank: the shards' shares are added up in one collective for each mesh
dimension that shards x, as they are wanted in backward.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from groupnorm.arguments import CallOptions
from groupnorm.errors import ArgumentValueError
from groupnorm.plan import Plan, product
from groupnorm.portable.inputs import WorkInputs, prepare

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from groupnorm.adapter import Adapter

__all__ = ["DTensor", "over_shards"]

IndexGroups = tuple[tuple[int, ...], ...] | None


class _ChannelShards(NamedTuple):
    """How the groups lie in shards of a feature axis."""

    num_groups: int  # in this rank's
    pooled: bool
    index_groups: IndexGroups


class _ShardPlan(NamedTuple):
    """What is computed where."""

    mesh: "DeviceMesh"
    placements: tuple[Placement, ...]  # of x as it is computed on
    pooled: tuple[int, ...]  # mesh dimensions
    channel: int | None  # the mesh dimension that shards the channels
    channel_shards: _ChannelShards | None
    shape: tuple[int, ...]  # of the whole x
    features: tuple[int, ...]  # axes of x

    @property
    def sharded(self) -> tuple[int, ...]:
        """The mesh dimensions whose ranks have different parts of x."""
        return tuple(
            d
            for d, placement in enumerate(self.placements)
            if isinstance(placement, Shard) and self.mesh.size(d) > 1
        )

    def groups(self, dimensions: Sequence[int]) -> tuple[Any, ...]:
        """Return the process groups of mesh dimensions."""
        return tuple(self.mesh.get_group(d) for d in dimensions)


def over_shards(
    apply: Callable[..., Any],
    adapter: "Adapter",
    x: Any,
    scale: Any,
    bias: Any,
    mask: Any,
    options: CallOptions,
) -> Any:
    """Normalize a DTensor by computing on its shards.

    Parameters
    ----------
    apply : callable
        `groupnorm.portable.group_norm.apply`, for plain tensors.
    adapter : Adapter
        PyTorch's.
    x : DTensor
        Of any placements, uneven and empty shards among them.
    scale, bias : DTensor, tensor, NumPy array or None
        Whole, but for DTensors.
    mask : DTensor, tensor, NumPy array, nested list or None
        Broadcasts to the whole x.
    options : CallOptions
        For the whole x; `axis_name` is not among them.

    Returns
    -------
    DTensor
        Of x's shape, strides and placements, but `Replicate` for `Partial`.

    Raises
    ------
    ArgumentValueError, ArgumentTypeError
        As for plain tensors, on every rank alike; and if there is an `axis_name`.
    """
    if options.axis_name is not None:
        raise ArgumentValueError(
            f"axis_name={options.axis_name!r} is given with a DTensor: its device mesh says "
            "already which ranks share statistics, and they would be pooled twice. Leave "
            "axis_name out, or pass x.to_local()."
        )
    # Checks everything against the whole, so that all ranks raise alike and none waits for another.
    whole = prepare(
        adapter,
        _without_data(x),
        _without_data(scale),
        _without_data(bias),
        _without_data(mask),
        options,
    )
    mesh = x.device_mesh
    result_placements = tuple(Replicate() if p.is_partial() else p for p in x.placements)
    if mesh.get_coordinate() is None:  # this rank has no part in x
        y = x.to_local().to(whole.result_dtype)
        return DTensor.from_local(
            y, mesh, result_placements, shape=x.shape, stride=_dense_stride(x)
        )
    layout = _layout(x, whole.plan, options)
    if layout.placements != tuple(x.placements):
        x = x.redistribute(placements=layout.placements)
    x_local = x.to_local(grad_placements=layout.placements)
    y = apply(
        adapter,
        x_local,
        *_local_parameters(adapter, (scale, bias), x_local, layout),
        _local_mask(mask, layout),
        _local_options(options, whole, layout),
    )
    y = DTensor.from_local(y, mesh, layout.placements, shape=x.shape, stride=_dense_stride(x))
    # Even if this changes nothing: from_local's own backward cannot be differentiated again where a
    # gradient comes with other placements.
    return y.redistribute(placements=result_placements)


def _without_data(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _dense_stride(x: Any) -> tuple[int, ...]:
    """Return the strides of what is computed from x, element by element."""
    if x.is_contiguous():
        return tuple(x.stride())
    whole = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.empty_like(whole).stride()


# What is computed where ---------------------------------------------------------------------------


def _layout(x: Any, plan: Plan, options: CallOptions) -> _ShardPlan:
    mesh, shape = x.device_mesh, tuple(x.shape)
    features = tuple(sorted(axis % len(shape) for axis in options.feature))
    kept = plan.kept_axes
    # A strided shard, which flattening makes, is no range of indices: it is gathered.
    axes = [p.dim if type(p) is Shard else None for p in x.placements]
    pooled = [
        d
        for d, axis in enumerate(axes)
        if axis is not None and axis not in features and axis not in kept and mesh.size(d) > 1
    ]
    channel, channel_shards = None, None
    placements: list[Placement] = []
    for d, axis in enumerate(axes):
        placement = x.placements[d]
        if axis is None:
            placement = Replicate()
        elif axis in features:
            shards = None
            if channel is None:
                shards = _channel_shards(plan, features, axis, mesh.size(d), mesh.get_local_rank(d))
            if shards is None or (shards.index_groups is not None and pooled):
                placement = Replicate()
            else:
                channel, channel_shards = d, shards
        placements.append(placement)
    if channel is not None and channel_shards is not None and channel_shards.pooled:
        pooled.append(channel)
    return _ShardPlan(
        mesh, tuple(placements), tuple(pooled), channel, channel_shards, shape, features
    )


def _channel_shards(
    plan: Plan, features: tuple[int, ...], axis: int, ranks: int, rank: int
) -> _ChannelShards | None:
    """Say how groups lie in the shards of one feature axis; None if they are cut unevenly.

    Channels are numbered row by row: one index along the sharded axis stands for `step` channels in
    a row of them, and the feature axes before it repeat such rows.
    """
    length = plan.shape[axis]
    step = product(plan.shape[a] for a in features if a > axis)
    row = length * step
    if row == 0:
        return None
    groups, group_size = plan.parameter_shape[plan.channel : plan.channel + 2]
    if group_size % row == 0:  # of every row, and so of every group, each shard has a part
        return _ChannelShards(groups, ranks > 1, None)
    if row % group_size:
        return None
    bounds = [_range(length, ranks, rank) for rank in range(ranks)]
    if all(stop * step % group_size == 0 for _, stop in bounds):
        start, stop = bounds[rank]
        # An empty shard has one group, of nothing.
        return _ChannelShards(
            max(plan.channels // length * (stop - start) // group_size, 1), False, None
        )
    sets: dict[int, list[int]] = {}
    for member, (start, stop) in enumerate(bounds):
        group = min(start, length - 1) * step // group_size  # an empty shard may go anywhere
        if start < stop and (stop * step - 1) // group_size != group:
            return None
        sets.setdefault(group, []).append(member)
    index_groups = tuple(tuple(members) for members in sets.values())
    return _ChannelShards(
        plan.channels // row, True, index_groups if len(index_groups) > 1 else None
    )


def _range(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return where a shard starts and stops, as torch.chunk cuts: the last are short or empty."""
    size = -(-length // ranks)
    return min(rank * size, length), min((rank + 1) * size, length)


def _local_options(options: CallOptions, whole: WorkInputs, layout: _ShardPlan) -> CallOptions:
    # Parameters were widened, so what the result's dtype comes to must be said.
    options = options._replace(dtype=str(whole.result_dtype).removeprefix("torch."))
    if layout.pooled:
        options = options._replace(axis_name=layout.groups(layout.pooled))
    shards = layout.channel_shards
    if shards is not None:
        options = options._replace(
            num_groups=shards.num_groups,
            group_size=None,
            axis_index_groups=shards.index_groups,
            feature_shape=None,  # checked already, against the whole
        )
    return options


def _slice(a: Any, axis: int, ranks: int, rank: int) -> Any:
    start, stop = _range(a.shape[axis], ranks, rank)
    return a[(slice(None),) * axis + (slice(start, stop),)]


# Parameters ---------------------------------------------------------------------------------------


def _local_parameters(
    adapter: "Adapter", parameters: Sequence[Any], x: torch.Tensor, layout: _ShardPlan
) -> list[Any]:
    """Return every parameter as this rank's channels need it."""
    results: list[Any] = []
    cut: list[bool] = []
    shared: dict[tuple[int, ...], list[int]] = {}  # by the mesh dimensions to add gradients over
    for i, value in enumerate(parameters):
        dimensions = layout.sharded
        if isinstance(value, np.ndarray):
            value = adapter.from_host(value, x)
        cut.append(_is_cut_as_x(value, layout))
        if cut[i]:
            dimensions = tuple(d for d in layout.sharded if d != layout.channel)
            placements = [
                Shard(0) if d == layout.channel else Replicate() for d in range(layout.mesh.ndim)
            ]
            value = value.redistribute(placements=placements)
            value = value.to_local(grad_placements=placements)
        elif isinstance(value, DTensor):
            value = value.full_tensor()
        results.append(value)
        if value is not None and value.requires_grad and dimensions:
            shared.setdefault(dimensions, []).append(i)
    if torch.is_grad_enabled():
        for dimensions, indices in shared.items():
            values = _spread([results[i] for i in indices], layout.groups(dimensions))
            for i, value in zip(indices, values, strict=True):
                results[i] = value
    return [
        value if value is None or done else _own_channels(value, layout)
        for value, done in zip(results, cut, strict=True)
    ]


def _is_cut_as_x(value: Any, layout: _ShardPlan) -> bool:
    """Whether this rank's part of a parameter is that of its channels."""
    return (
        isinstance(value, DTensor)
        and layout.channel is not None
        and len(layout.features) == 1
        and value.device_mesh == layout.mesh
        and value.placements[layout.channel] == Shard(0)
    )


def _own_channels(value: Any, layout: _ShardPlan) -> Any:
    if layout.channel is None:
        return value
    placement = layout.placements[layout.channel]
    assert isinstance(placement, Shard)
    value = value.reshape([layout.shape[axis] for axis in layout.features])
    ranks, rank = layout.mesh.size(layout.channel), layout.mesh.get_local_rank(layout.channel)
    return _slice(value, layout.features.index(placement.dim), ranks, rank)


def _spread(values: Sequence[torch.Tensor], groups: tuple[Any, ...]) -> list[torch.Tensor]:
    """Use what all ranks have in each rank's own way: gradients are added, in one collective."""
    # In float32 at least: the shares of a gradient are added before it is rounded.
    wide = [v.to(torch.float32) if v.dtype.itemsize < 4 else v for v in values]
    packed = _Spread.apply(torch.cat([v.reshape(-1) for v in wide]), groups)  # type: ignore[no-untyped-call]
    parts = torch.split(packed, [v.numel() for v in values])
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


class _Spread(torch.autograd.Function):
    """Go from what all ranks of some groups have to what each rank does with it."""

    @staticmethod
    def forward(ctx: Any, x: Any, groups: Any) -> Any:
        ctx.groups = groups
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Collect.apply(gradients[0], ctx.groups), None  # type: ignore[no-untyped-call]


class _Collect(torch.autograd.Function):
    """Add over groups; all ranks have the sum. Each of the two is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, groups: Any) -> Any:
        ctx.groups = groups
        total = x.clone(memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Spread.apply(gradients[0], ctx.groups), None  # type: ignore[no-untyped-call]


# Masks --------------------------------------------------------------------------------------------


def _local_mask(mask: Any, layout: _ShardPlan) -> Any:
    """Return the part of a mask that belongs to this rank's x."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        mask = np.asarray(mask)
    # The axis of the mask each mesh dimension shards; what is of length 1 broadcasts.
    before = len(layout.shape) - mask.ndim
    axes: list[int | None] = []
    for placement in layout.placements:
        axis = placement.dim - before if isinstance(placement, Shard) else -1
        cut = axis >= 0 and mask.shape[axis] == layout.shape[axis + before]
        axes.append(axis if cut else None)
    if isinstance(mask, DTensor):
        if mask.device_mesh == layout.mesh:
            wanted = [Replicate() if axis is None else Shard(axis) for axis in axes]
            return mask.redistribute(placements=wanted).to_local()
        mask = mask.full_tensor()
    for d, axis in enumerate(axes):
        if axis is not None:
            mask = _slice(mask, axis, layout.mesh.size(d), layout.mesh.get_local_rank(d))
    return mask
