"""Process groups of torch.distributed: differentiable sums over ranks."""

import weakref
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from groupnorm.distributed.axis_names import bound
from groupnorm.distributed.replicas import Agreement, Engine, Replicas, over_all
from groupnorm.errors import AxisNameError

__all__ = ["replicas_of", "sum_gradients"]


def replicas_of(communicator: Any) -> Replicas:
    """Return the ranks of a process group, or of a one-dimensional mesh.

    Raises
    ------
    AxisNameError
        If it is neither, or this rank is not a member.
    """
    group = communicator
    if isinstance(communicator, DeviceMesh):
        if communicator.ndim != 1:
            raise AxisNameError(
                f"axis_name={communicator!r} is a mesh of {communicator.ndim} dimensions: "
                "select the dimensions to pool statistics over. Give one, as in mesh['rows'], or "
                "several as a tuple."
            )
        if communicator.get_coordinate() is None:
            raise AxisNameError(_no_member(repr(communicator)))
        group = communicator.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise AxisNameError(_no_member("what new_group() returned"))
    if not isinstance(group, dist.ProcessGroup):
        raise AxisNameError(
            f"axis_name={communicator!r} is a {type(communicator).__name__}: for PyTorch "
            "tensors it must be a torch.distributed.ProcessGroup, such as "
            "torch.distributed.group.WORLD after init_process_group, a DeviceMesh of one "
            "dimension, or a name bound to one of them by groupnorm.bind_axis."
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise AxisNameError(_no_member(repr(group)))
    size = dist.get_world_size(group)
    engines: tuple[Engine, ...] = ()
    if not torch.compiler.is_compiling():  # compiled programs cannot read values
        agreement = _agreements.get(group) or _agreements.setdefault(group, Agreement())
        engines = (Engine(partial(_add_table, group), agreement),)
    return Replicas(rank, size, lambda x: _add_over_ranks(x, group), engines)


_agreements: "weakref.WeakKeyDictionary[Any, Agreement]" = weakref.WeakKeyDictionary()


def _add_table(group: Any, table: list[list[int]], like: torch.Tensor) -> list[list[int]]:
    total = torch.tensor(table, dtype=torch.int64, device=like.device)
    dist.all_reduce(total, group=group)
    rows: list[list[int]] = total.tolist()
    return rows


def _no_member(axis_name: str) -> str:
    return (
        f"axis_name={axis_name} is a group that this rank is not a member of: call the layer on "
        "the group's members only, or make it with this rank's own group."
    )


class _AddOverRanks(torch.autograd.Function):
    """All-reduce that is exact in backward and in double backward, and that can be compiled.

    `torch.distributed.nn.functional.all_reduce` does not trace, the functional collectives drop
    forward-mode tangents, and a bare in-place all_reduce gives a wrong gradient.
    """

    @staticmethod
    def forward(x: Any, group: Any) -> Any:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _add_over_ranks(gradients[0], ctx.group), None


class _AddOverRanksDual(_AddOverRanks):
    """The same for forward mode and torch.vmap, which the compiler cannot trace."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _add_over_ranks(tangents[0], ctx.group)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        # Elementwise: the whole batch is added at once.
        return _add_over_ranks(*args), in_dims[0]


def _add_over_ranks(x: Any, group: Any) -> Any:
    function = _AddOverRanks if torch.compiler.is_compiling() else _AddOverRanksDual
    return function.apply(x, group)  # type: ignore[no-untyped-call]


def sum_gradients(parameters: Any, axis_name: Any) -> None:
    """Sum the parameters' gradients over the ranks of an axis, in place.

    If ranks hold parts of the same samples (rows of an image, steps of a clip), each rank's
    gradient is its part's contribution, for every parameter of a network, and the sum is the
    gradient. `DistributedDataParallel` and FSDP average instead, which is right only over ranks
    that hold different samples. So give them the data-parallel group, and call this with the other
    group after every backward pass, before the optimizer's step.

    Parameters
    ----------
    parameters : torch.Tensor or iterable of torch.Tensor
        Such as `model.parameters()`. Those without a gradient on any rank are left alone; those
        with one on some ranks only get the sum on all. `DTensor` parameters (FSDP2) work too.
    axis_name : str, ProcessGroup, DeviceMesh or tuple of these
        As for `groupnorm.group_norm`.

    Raises
    ------
    groupnorm.errors.AxisNameError
        If the name is not bound, or bound to something other than a process group.

    Examples
    --------
    A single rank:

    >>> import torch, torch.distributed as dist
    >>> from groupnorm.backends.torch import sum_gradients
    >>> store = dist.HashStore()
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> weight = torch.ones(3, requires_grad=True)
    >>> (2 * weight).sum().backward()
    >>> sum_gradients([weight], dist.group.WORLD)
    >>> weight.grad
    tensor([2., 2., 2.])
    >>> dist.destroy_process_group()
    """
    replicas = over_all([replicas_of(communicator) for communicator in bound(axis_name)])
    given = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
    trained = [p for p in given if p.requires_grad]
    if not trained:
        return
    with torch.no_grad():
        # Ranks may differ in which parameters have a gradient; all must sum the same ones.
        local = [_local(p) for p in trained]
        has = torch.tensor([float(p.grad is not None) for p in trained], device=local[0].device)
        anywhere = replicas.add(has) > 0
        for p, wanted in zip(trained, anywhere.tolist(), strict=True):
            if wanted and p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [_local(p.grad) for p in trained if p.grad is not None]
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            same = [g for g in gradients if g.dtype == dtype]
            flat = replicas.add(torch.cat([g.reshape(-1) for g in same]))
            for g, total in zip(same, flat.split([g.numel() for g in same]), strict=True):
                g.copy_(total.view_as(g))


def _local(x: Any) -> Any:
    """Return the local shard of a DTensor, or a plain tensor itself."""
    return x.to_local() if hasattr(x, "to_local") else x
