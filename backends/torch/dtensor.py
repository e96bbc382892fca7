"""PyTorch DTensors: every rank computes on its own shard, and pools statistics where needed.

The adapter of `groupnorm.backends.torch` passes calls with a DTensor to `over_shards`. The method
depends on the axis that a dimension of the device mesh shards:

a kept axis, with separate statistics (the batch)
    no communication: the shards are independent;
a reduced axis (height, width, time)
    statistics are pooled over the ranks of that mesh dimension;
a feature axis
    no communication if every shard holds whole groups; statistics are pooled, over sets of ranks,
    if every shard is within one group, or has a part of every group. For any other split, that
    mesh dimension is gathered first, and all its ranks compute the same.

A pending sum (`Partial`) is computed first. The result is sharded as the input, and a pending sum
becomes `Replicate`.

Parameters may be DTensors, or plain tensors that are equal on every rank. Every rank receives their
full gradients: in backward the shards' contributions are summed in one collective for each mesh
dimension that shards x.
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
from groupnorm.portable.per_sample import PerSample, is_per_sample, scale_and_shift

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from groupnorm.adapter import Adapter

__all__ = ["DTensor", "over_shards"]

IndexGroups = tuple[tuple[int, ...], ...] | None


class _ChannelShards(NamedTuple):
    """How groups are distributed over the shards of a feature axis."""

    num_groups: int  # in this rank's shard
    pooled: bool
    index_groups: IndexGroups


class _ShardPlan(NamedTuple):
    """How a DTensor is computed: placements, and where statistics are pooled."""

    mesh: "DeviceMesh"
    placements: tuple[Placement, ...]  # of x for the computation
    pooled: tuple[int, ...]  # mesh dimensions
    channel: int | None  # the mesh dimension that shards the channels
    channel_shards: _ChannelShards | None
    shape: tuple[int, ...]  # of the global x
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
        `groupnorm.dispatch.compute_local`, for plain tensors.
    adapter : Adapter
        PyTorch's.
    x : DTensor
        Any placements, including uneven and empty shards.
    scale, bias : DTensor, tensor, NumPy array or None
        Global values; DTensors may be sharded.
    mask : DTensor, tensor, NumPy array, nested list or None
        Broadcasts to the global x.
    options : CallOptions
        For the global x; `axis_name` must be None.

    Returns
    -------
    DTensor
        With x's shape, strides and placements, but `Replicate` instead of `Partial`.

    Raises
    ------
    ArgumentValueError, ArgumentTypeError
        As for plain tensors, on every rank alike; also if an `axis_name` is given.
    """
    if options.axis_name is not None:
        raise ArgumentValueError(
            f"axis_name={options.axis_name!r} is given with a DTensor: its device mesh "
            "already defines which ranks share statistics, and they would be pooled twice. Leave "
            "axis_name out, or pass x.to_local()."
        )
    without_data = (
        _without_data(x), _without_data(scale), _without_data(bias), _without_data(mask)
    )  # fmt: skip
    if is_per_sample(x, scale, bias, options):
        call = PerSample.of(adapter, *without_data, options)
        y = over_shards(apply, adapter, x, None, None, mask, call.without_parameters)
        scale, bias = (_as_dtensor(p, y, adapter) for p in (scale, bias))
        scaled = scale_and_shift(adapter, y, scale, bias, call.checked, options)
        # PyTorch gathers uneven shards for such a product.
        return scaled.redistribute(placements=y.placements)
    # Checks everything against the global x, so that all ranks raise alike and none waits in vain.
    whole = prepare(adapter, *without_data, options)
    mesh = x.device_mesh
    result_placements = tuple(Replicate() if p.is_partial() else p for p in x.placements)
    if mesh.get_coordinate() is None:  # this rank is not in x's mesh
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
    # Even if this changes nothing: the backward of from_local cannot be differentiated again if a
    # gradient has other placements.
    return y.redistribute(placements=result_placements)


def _without_data(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device="meta")


def _dense_stride(x: Any) -> tuple[int, ...]:
    """Return the strides of an elementwise result of x."""
    if x.is_contiguous():
        return tuple(x.stride())
    whole = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    return torch.empty_like(whole).stride()


# Planning -----------------------------------------------------------------------------------------


def _layout(x: Any, plan: Plan, options: CallOptions) -> _ShardPlan:
    mesh, shape = x.device_mesh, tuple(x.shape)
    features = tuple(sorted(axis % len(shape) for axis in options.feature))
    kept = plan.kept_axes
    # A strided shard, which flattening makes, is not a range of indices: it is gathered.
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
    """Return how groups are distributed over shards of a feature axis; None if the split is uneven.

    Channels are in row-major order: one index along the sharded axis stands for `step` channels of
    a row, and the feature axes before it repeat such rows.
    """
    length = plan.shape[axis]
    step = product(plan.shape[a] for a in features if a > axis)
    row = length * step
    if row == 0:
        return None
    groups, group_size = plan.parameter_shape[plan.channel : plan.channel + 2]
    if group_size % row == 0:  # each shard has a part of every row, so of every group
        return _ChannelShards(groups, ranks > 1, None)
    if row % group_size:
        return None
    bounds = [_range(length, ranks, rank) for rank in range(ranks)]
    if all(stop * step % group_size == 0 for _, stop in bounds):
        start, stop = bounds[rank]
        # An empty shard has one empty group.
        return _ChannelShards(
            max(plan.channels // length * (stop - start) // group_size, 1), False, None
        )
    sets: dict[int, list[int]] = {}
    for member, (start, stop) in enumerate(bounds):
        group = min(start, length - 1) * step // group_size  # an empty shard may join any
        if start < stop and (stop * step - 1) // group_size != group:
            return None
        sets.setdefault(group, []).append(member)
    index_groups = tuple(tuple(members) for members in sets.values())
    return _ChannelShards(
        plan.channels // row, True, index_groups if len(index_groups) > 1 else None
    )


def _range(length: int, ranks: int, rank: int) -> tuple[int, int]:
    """Return a shard's start and stop, as of torch.chunk: the last may be short or empty."""
    size = -(-length // ranks)
    return min(rank * size, length), min((rank + 1) * size, length)


def _local_options(options: CallOptions, whole: WorkInputs, layout: _ShardPlan) -> CallOptions:
    # Parameters were widened, so the result's dtype must be explicit.
    options = options._replace(dtype=str(whole.result_dtype).removeprefix("torch."))
    if layout.pooled:
        options = options._replace(axis_name=layout.groups(layout.pooled))
    shards = layout.channel_shards
    if shards is not None:
        options = options._replace(
            num_groups=shards.num_groups,
            group_size=None,
            axis_index_groups=shards.index_groups,
            feature_shape=None,  # already checked, against the global x
        )
    return options


def _slice(a: Any, axis: int, ranks: int, rank: int) -> Any:
    start, stop = _range(a.shape[axis], ranks, rank)
    return a[(slice(None),) * axis + (slice(start, stop),)]


# Parameters ---------------------------------------------------------------------------------------


def _local_parameters(
    adapter: "Adapter", parameters: Sequence[Any], x: torch.Tensor, layout: _ShardPlan
) -> list[Any]:
    """Return the part of every parameter that belongs to this rank's channels."""
    results: list[Any] = []
    cut: list[bool] = []
    shared: dict[tuple[int, ...], list[int]] = {}  # by the mesh dimensions to sum gradients over
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


def _as_dtensor(value: Any, x: Any, adapter: "Adapter") -> Any:
    """Return a parameter that is equal on all ranks as a DTensor on x's mesh.

    Its gradient is placed as it is.
    """
    if value is None:
        return None
    if isinstance(value, DTensor):
        return value.redistribute(placements=value.placements)
    if isinstance(value, np.ndarray):
        value = adapter.from_host(value, x)
    replicated = [Replicate()] * x.device_mesh.ndim
    return DTensor.from_local(value, x.device_mesh, replicated, run_check=False)


def _is_cut_as_x(value: Any, layout: _ShardPlan) -> bool:
    """Whether a parameter is sharded like x's channels."""
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
    """Return replicated tensors whose gradients are summed over ranks, in one collective."""
    # In float32 at least: a gradient's contributions are summed before it is rounded.
    wide = [v.to(torch.float32) if v.dtype.itemsize < 4 else v for v in values]
    packed = _Spread.apply(torch.cat([v.reshape(-1) for v in wide]), groups)  # type: ignore[no-untyped-call]
    parts = torch.split(packed, [v.numel() for v in values])
    return [part.reshape(v.shape) for part, v in zip(parts, values, strict=True)]


class _Spread(torch.autograd.Function):
    """Identity on replicated tensors; the backward pass sums gradients over groups."""

    @staticmethod
    def forward(ctx: Any, x: Any, groups: Any) -> Any:
        ctx.groups = groups
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Collect.apply(gradients[0], ctx.groups), None  # type: ignore[no-untyped-call]


class _Collect(torch.autograd.Function):
    """Sum over groups, on all ranks. `_Spread` and `_Collect` are each other's gradients."""

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
    # The axis of the mask that each mesh dimension shards; axes of length 1 broadcast.
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
