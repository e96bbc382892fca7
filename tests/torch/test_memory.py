"""Tensors that are not simply memory: moved, freed, batched, zero, dual or changed in place.

Whatever is read, in any direction, gives right numbers or a clear error.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from groupnorm import bind_axis, group_norm, group_norm_vjp
from groupnorm.errors import ArgumentStateError, ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

# torch's own forward-mode formulas still use torch.jit.script, and warn about it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

SHAPE = (3, 8, 5, 4)
OPTIONS = {"num_groups": 4, "feature_axis": 1, "epsilon": 1e-5}
NAMES = ("x", "scale", "bias")
IMPLEMENTATIONS = [None, "portable"]


@pytest.fixture
def arrays(rng):
    x, dy = rng.normal(size=(2, *SHAPE)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
    return {"x": 3 + x, "scale": scale, "bias": bias, "dy": dy}


def leaves(arrays, memory_format=torch.contiguous_format):
    x = torch.tensor(arrays["x"]).to(memory_format=memory_format)
    return [a.requires_grad_() for a in (x, *(torch.tensor(arrays[n]) for n in NAMES[1:]))]


def expected(arrays, mask=None, dy=None):
    return oracle.group_norm_gradients(
        arrays["x"], arrays["dy"] if dy is None else dy, arrays["scale"], arrays["bias"],
        mask=mask, **OPTIONS,
    )  # fmt: skip


def assert_all(found, want):
    for a, b in zip(found, want, strict=True):
        assert_gradient(a.detach().numpy(), b, rtol=GRADIENT)


# What saved tensors come back as ------------------------------------------------------------------


class Marked(torch.Tensor):
    """A subclass without behaviour of its own."""


RETURNED = {
    "contiguous": lambda t: t.contiguous().clone(),
    "in another order": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "a view with gaps": lambda t: torch.stack([t, t + 9], -1)[..., 0],
    "of an offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape),
    "negative view": lambda t: torch._neg_view(-t),
    "subclass": lambda t: t.clone().as_subclass(Marked),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "float64": lambda t: t.double(),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("returned", RETURNED)
def test_saved_tensors_may_come_back_changed(returned, last, masked, implementation, arrays, rng):
    given = leaves(arrays, torch.channels_last if last else torch.contiguous_format)
    mask = rng.random((3, 1, 5, 1)) < 0.7 if masked else None
    with saved_tensors_hooks(lambda t: RETURNED[returned](t.detach()), lambda t: t):
        y = group_norm(
            *given, mask=None if mask is None else torch.tensor(mask),
            implementation=implementation, **OPTIONS,
        )  # fmt: skip
    found = torch.autograd.grad(y, given, torch.tensor(arrays["dy"]))
    assert_all(found, expected(arrays, mask))
    assert [g.dtype for g in found] == [torch.float32] * 3


def test_a_saved_tensor_of_another_shape_is_refused(arrays):
    given = leaves(arrays)
    with saved_tensors_hooks(lambda t: t.detach()[:1], lambda t: t):
        y = group_norm(*given, **OPTIONS)
    with pytest.raises(ArgumentValueError, match="shape"):
        torch.autograd.grad(y, given, torch.tensor(arrays["dy"]))


# Freed memory -------------------------------------------------------------------------------------


def freed(t, left=0):
    t.untyped_storage().resize_(left)
    return t


@pytest.mark.parametrize("implementation", [None, "portable", "native"])
@pytest.mark.parametrize("left", [0, 16], ids=["all", "a part"])
@pytest.mark.parametrize("name", [*NAMES, "mask"])
def test_freed_memory_is_an_error(name, left, implementation, arrays):
    if implementation == "native" and name == "mask":
        return
    given = {n: torch.tensor(arrays[n]) for n in NAMES}
    if implementation != "native":
        given["mask"] = torch.ones(3, 1, 5, 4, dtype=torch.bool)
    freed(given[name], left)
    for call in (group_norm, group_norm_vjp):
        if call is group_norm_vjp and implementation == "native":
            continue
        with pytest.raises(ArgumentStateError, match=f"^{name} .* memory was freed"):
            call(**given, implementation=implementation, **OPTIONS)
    if implementation is None and left == 0:
        torch._dynamo.reset()
        run = torch.compile(lambda given: group_norm(**given, **OPTIONS), backend="aot_eager")
        with pytest.raises(ArgumentStateError, match=f"^{name} "):
            run(given)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", [*NAMES[:2], "dy"])
def test_memory_freed_before_the_backward_pass_is_an_error(name, implementation, arrays):
    given = dict(zip(NAMES, leaves(arrays), strict=True))
    y = group_norm(**given, implementation=implementation, **OPTIONS)
    dy = torch.tensor(arrays["dy"])
    freed({**given, "dy": dy}[name])
    for graph in (False, True):
        with pytest.raises(ArgumentStateError, match=f"^{name} .* memory was freed"):
            torch.autograd.grad(y, list(given.values()), dy, create_graph=graph, retain_graph=True)


def strided(a):
    return torch.stack([a, a], dim=-1)[..., 0]


# Each holds the values of forward, up to rounding; assigned to `data`, it leaves the version as is.
REPLACED = {"float64": torch.Tensor.double, "strided": strided, "float32": torch.clone}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", REPLACED)
@pytest.mark.parametrize("name", NAMES[1:])
def test_other_memory_of_a_parameter_before_the_backward_pass(kind, name, implementation, arrays):
    x, scale, bias = leaves(arrays)
    # Autograd accepts no gradient of another dtype than the parameter had.
    changed = {"scale": scale, "bias": bias}[name].requires_grad_(kind != "float64")
    y = group_norm(x, scale, bias, activation="silu", implementation=implementation, **OPTIONS)
    changed.data = REPLACED[kind](changed.data)
    (dx,) = torch.autograd.grad(y, x, torch.tensor(arrays["dy"]))
    want = torch.tensor(arrays["x"], dtype=torch.float64, requires_grad=True)
    s, b = (torch.tensor(arrays[n], dtype=torch.float64) for n in NAMES[1:])
    z = torch.nn.functional.group_norm(want, 4, s, b, OPTIONS["epsilon"])
    torch.nn.functional.silu(z).backward(torch.tensor(arrays["dy"], dtype=torch.float64))
    assert_gradient(dx.numpy(), want.grad.numpy(), rtol=GRADIENT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("name", NAMES[1:])
def test_another_size_of_a_parameter_before_the_backward_pass(name, size, implementation, arrays):
    x, scale, bias = leaves(arrays)
    y = group_norm(x, scale, bias, activation="silu", implementation=implementation, **OPTIONS)
    {"scale": scale, "bias": bias}[name].data = torch.ones(size)
    with pytest.raises(ArgumentValueError, match=f"{name} has shape"):
        torch.autograd.grad(y, x, torch.tensor(arrays["dy"]))


@pytest.mark.parametrize("name", ["x", "dy"])
def test_memory_freed_before_the_pullback_is_an_error(name, arrays):
    given = {n: torch.tensor(arrays[n]) for n in (*NAMES, "dy")}
    dy = given.pop("dy")
    pullback = group_norm_vjp(**given, **OPTIONS)[1]
    freed(dy if name == "dy" else given["x"])
    with pytest.raises(ArgumentStateError, match=f"^{name} "):
        pullback(dy)


# Batched, zero and dual tensors -------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_cotangents_at_once(implementation, arrays, rng):
    given = leaves(arrays)
    y = group_norm(*given, implementation=implementation, **OPTIONS)
    vectors = rng.normal(size=(4, *SHAPE)).astype(np.float32)
    batched = torch.tensor(vectors)

    def one(v, graph=False):
        return torch.autograd.grad(y, given, v, retain_graph=True, create_graph=graph)

    for found in (
        torch.autograd.grad(y, given, batched, is_grads_batched=True, retain_graph=True),
        torch.autograd.grad(
            y, given, batched, is_grads_batched=True, retain_graph=True, create_graph=True
        ),
        torch.func.vmap(one)(batched),
    ):
        for i, v in enumerate(vectors):
            assert_all([g[i] for g in found], expected(arrays, dy=v))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vectorized_jacobians(implementation, strategy, arrays, rng):
    given = leaves(arrays)

    def weighted(x, scale, bias):
        y = group_norm(x, scale, bias, implementation=implementation, **OPTIONS)
        return torch.stack([(y * torch.tensor(v)).sum() for v in vectors])

    vectors = rng.normal(size=(3, *SHAPE)).astype(np.float32)
    found = torch.autograd.functional.jacobian(
        weighted, tuple(given), vectorize=True, strategy=strategy
    )
    for i, v in enumerate(vectors):
        assert_all([g[i] for g in found], expected(arrays, dy=v))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tangents_of_the_backward_pass(implementation, arrays, rng):
    given = leaves(arrays)
    y = group_norm(*given, implementation=implementation, **OPTIONS)
    tangent = rng.normal(size=SHAPE).astype(np.float32)
    pullback = group_norm_vjp(
        *(a.detach() for a in given), implementation=implementation, **OPTIONS
    )[1]
    for of in (lambda dy: torch.autograd.grad(y, given, dy), pullback):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.tensor(arrays["dy"]), torch.tensor(tangent))
            parts = [forward_ad.unpack_dual(g) for g in of(dual)]
            assert_all([p.primal for p in parts], expected(arrays))
            assert_all([p.tangent for p in parts], expected(arrays, dy=tangent))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_and_negative_tensors(implementation, arrays):
    given = leaves(arrays)
    y = group_norm(*given, implementation=implementation, **OPTIONS)
    for dy, values in (
        (torch._efficientzerotensor(SHAPE), np.zeros(SHAPE, np.float32)),
        (torch._neg_view(torch.tensor(-arrays["dy"])), arrays["dy"]),
        (torch.ones(()).expand(SHAPE), np.ones(SHAPE, np.float32)),
    ):
        want = expected(arrays, dy=values)
        assert_all(torch.autograd.grad(y, given, dy, retain_graph=True), want)
        values = [a.detach() for a in given]
        pullback = group_norm_vjp(*values, implementation=implementation, **OPTIONS)[1]
        assert_all(pullback(dy), want)
    zero = torch._efficientzerotensor((8,))
    x = given[0].detach()
    for scale, bias in ((zero, None), (None, zero), (zero, zero)):
        y = group_norm(x, scale, bias, implementation=implementation, **OPTIONS)
        want = oracle.group_norm(
            arrays["x"], None if scale is None else np.zeros(8), None, **OPTIONS
        )
        assert_close(y.numpy(), want, tolerance=CONTRACT)
    y = group_norm(
        torch._efficientzerotensor(SHAPE), given[1], given[2], implementation=implementation,
        **OPTIONS,
    )  # fmt: skip
    assert torch.equal(y, given[2].reshape(-1, 1, 1).expand(SHAPE))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("requiring", ["parameters", "dy"])
def test_pullbacks_can_be_differentiated(requiring, implementation, arrays, rng):
    """The gradient of <dx(dy), v> with respect to dy is the tangent of y in the direction v."""
    given, v = leaves(arrays), torch.tensor(rng.normal(size=SHAPE).astype(np.float32))
    dy = torch.tensor(arrays["dy"], requires_grad=True)
    if requiring == "dy":
        given = [a.detach() for a in given]
    y, pullback = group_norm_vjp(*given, implementation=implementation, **OPTIONS)
    assert y.requires_grad == (requiring == "parameters")
    (found,) = torch.autograd.grad(pullback(dy).x, dy, v)
    _, want = torch.func.jvp(
        lambda x: group_norm(x, *(a.double() for a in given[1:]), **OPTIONS),
        (given[0].double(),), (v.double(),),
    )  # fmt: skip
    assert_gradient(found.numpy(), want.detach().numpy(), rtol=GRADIENT)


# Changes in place ---------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("host", [False, True], ids=["tensors", "NumPy arrays"])
def test_changed_parameters_and_masks_do_not_matter_to_a_pullback(host, implementation, arrays):
    convert = np.array if host else torch.tensor
    scale, bias = convert(arrays["scale"]), convert(arrays["bias"])
    mask = convert(np.arange(20).reshape(1, 1, 5, 4) % 3 > 0)
    x = torch.tensor(arrays["x"])
    pullback = group_norm_vjp(x, scale, bias, mask=mask, implementation=implementation, **OPTIONS)[
        1
    ]
    want = expected(arrays, np.arange(20).reshape(1, 1, 5, 4) % 3 > 0)
    scale *= 3
    bias += 1
    mask[:] = True
    assert_all(pullback(torch.tensor(arrays["dy"])), want)


def test_a_changed_x_is_an_error_for_kernels_and_does_not_matter_to_portable_code(arrays):
    x = torch.tensor(arrays["x"])
    pullbacks = {i: group_norm_vjp(x, implementation=i, **OPTIONS)[1] for i in IMPLEMENTATIONS}
    dy, before = torch.tensor(arrays["dy"]), pullbacks["portable"](torch.tensor(arrays["dy"])).x
    x.mul_(2)
    assert torch.equal(pullbacks["portable"](dy).x, before)
    with pytest.raises(ArgumentStateError, match=r"x, of shape .* was changed in place"):
        pullbacks[None](dy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_host_constants_and_masks_keep_the_values_of_forward(implementation, arrays, rng):
    """In the first and in the second backward pass; the latter against float64."""
    v = rng.normal(size=SHAPE).astype(np.float32)
    results = []
    for change, dtype in ((True, np.float32), (False, np.float64)):
        x = torch.tensor(arrays["x"].astype(dtype), requires_grad=True)
        scale, bias = (arrays[n].astype(dtype) for n in NAMES[1:])
        mask = torch.tensor(np.arange(20).reshape(1, 1, 5, 4) % 3 > 0)
        y = group_norm(x, scale, bias, mask=mask, implementation=implementation if change else None,
                       **OPTIONS)  # fmt: skip
        if change:
            scale *= 3
            mask[:] = True
        dy = torch.tensor(arrays["dy"].astype(dtype))
        (first,) = torch.autograd.grad(y, x, dy, create_graph=True, retain_graph=True)
        (plain,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        (second,) = torch.autograd.grad(first, x, torch.tensor(v.astype(dtype)))
        results.append((first, plain, second))
    for found, want in zip(*results, strict=True):
        assert_gradient(found.detach().numpy(), want.detach().numpy(), rtol=4 * GRADIENT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", NAMES[:2])
def test_changed_tensors_that_autograd_saved_are_an_error(name, implementation, arrays):
    given = dict(zip(NAMES, leaves(arrays), strict=True))
    y = group_norm(**given, implementation=implementation, **OPTIONS)
    with torch.no_grad():
        given[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# Memory formats -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_parts_of_channels_last_tensors_stay_channels_last(implementation, rng):
    last, deep = torch.channels_last, torch.channels_last_3d
    wide = torch.tensor(rng.normal(size=(2, 16, 8, 7)).astype(np.float32)).to(memory_format=last)
    volume = torch.tensor(rng.normal(size=(2, 16, 3, 4, 5)).astype(np.float32))
    volume = volume.to(memory_format=deep)
    theirs = torch.nn.GroupNorm(4, 8)
    for x, form in (
        (wide[:, :8], last), (wide[:, 8:], last), (wide[:, ::2], last),
        (wide[:, :8].contiguous(memory_format=last)[:, :, 1:-1, 1:-1], last),
        (wide[:, :8, :, 2:], last), (wide[1:, :8], last), (volume[:, 4:12], deep),
    ):  # fmt: skip
        want = theirs(x)
        assert want.is_contiguous(memory_format=form)
        y = group_norm(x, implementation=implementation, **OPTIONS)
        assert y.is_contiguous(memory_format=form)
        reference = oracle.group_norm(x.numpy(), **OPTIONS)
        assert_close(y.numpy(), reference, tolerance=CONTRACT)
        pullback = group_norm_vjp(x, implementation=implementation, **OPTIONS)[1]
        dy = torch.tensor(rng.normal(size=x.shape).astype(np.float32))
        gradients = oracle.group_norm_gradients(x.numpy(), dy.numpy(), **OPTIONS)
        assert_gradient(pullback(dy).x.numpy(), gradients.x, rtol=GRADIENT)


# Checkpoints and bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("host", [False, True], ids=["tensors", "host"])
def test_every_implementation_saves_the_same_tensors(masked, host, arrays):
    mask = torch.ones(3, 1, 5, 4, dtype=torch.bool) if masked else None
    x, scale, bias = leaves(arrays)
    counts = []
    for mode in (FlopCounterMode(display=False), nullcontext()):
        for implementation in IMPLEMENTATIONS:
            saved = []
            with mode, saved_tensors_hooks(saved.append, lambda t: t):
                group_norm(x, arrays["scale"] if host else scale, bias, mask=mask,
                           implementation=implementation, **OPTIONS)  # fmt: skip
            counts.append([t.shape for t in saved])
    assert all(c == counts[0] for c in counts)
    assert len(counts[0]) == (2 if host else 3)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_checkpoints_of_which_one_pass_is_under_a_mode(backward, arrays):
    given = leaves(arrays)
    with nullcontext() if backward else FlopCounterMode(display=False):
        y = checkpoint(lambda *a: group_norm(*a, **OPTIONS), *given, use_reentrant=False)
    with FlopCounterMode(display=False) if backward else nullcontext():
        found = torch.autograd.grad(y, given, torch.tensor(arrays["dy"]))
    assert_all(found, expected(arrays))


def test_selective_checkpoints_that_save_everything(arrays):
    given = leaves(arrays)

    def contexts():
        policy = lambda *_, **__: CheckpointPolicy.MUST_SAVE  # noqa: E731
        return create_selective_checkpoint_contexts(policy)

    y = checkpoint(
        lambda *a: group_norm(*a, **OPTIONS), *given, use_reentrant=False, context_fn=contexts
    )
    assert_all(torch.autograd.grad(y, given, torch.tensor(arrays["dy"])), expected(arrays))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 117532), (1, 96, 64, 50), (2, 6, 9001), (1, 40000, 3)])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_gradients_have_the_same_bits_for_any_number_of_threads(last, shape, implementation, rng):
    assert_same_bits(shape, rng, last=last, implementation=implementation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_derivatives_of_activations_have_the_same_bits(implementation, activation, dtype, rng):
    """PyTorch's own round elements at the end of a thread's share differently."""
    for shape in ((1, 1, 117532), (2, 6, 9001), (1, 40000, 3)):
        assert_same_bits(
            shape, rng, dtype=dtype, activation=activation, implementation=implementation
        )


def assert_same_bits(shape, rng, last=False, dtype=torch.float32, **options):
    x, dy = torch.tensor(rng.normal(size=(2, *shape))).to(dtype)
    if last:
        x, dy = (a.movedim(1, -1).contiguous().movedim(-1, 1) for a in (x, dy))
    parameters = torch.ones(shape[1], dtype=dtype), torch.zeros(shape[1], dtype=dtype)
    given = [a.requires_grad_() for a in (x, *parameters)]
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            y = group_norm(*given, num_groups=1, feature_axis=1, **options)
            results.append((y.detach(), *torch.autograd.grad(y, given, dy)))
    finally:
        torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


# Replicas, in one process -------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("shape", [(1, 1, 117532), (2, 6, 9001), (1, 40000, 3)])
def test_gradients_with_replicas_have_the_same_bits(shape, activation, masked, world, rng):
    mask = torch.tensor(rng.random((shape[0], 1, shape[2])) < 0.7) if masked else None
    assert_same_bits(shape, rng, axis_name=world, activation=activation, mask=mask)


def sums_over_ranks(function):
    """Return the number of collectives of a call."""
    with CommDebugMode() as counted:
        function()
    return counted.get_total_counts()


def test_backward_pools_if_dx_is_needed(arrays, world):
    """As autograd decides: dx alone depends on the sums of the other ranks."""
    options = {**OPTIONS, "axis_name": world}
    dy = torch.tensor(arrays["dy"])
    x, scale, bias = leaves(arrays)
    want = expected(arrays)
    group_norm(x, scale, bias, **options)  # the first call compares signatures
    y = group_norm(x, scale, bias, **options)
    found = []
    count = sums_over_ranks(lambda: found.extend(torch.autograd.grad(y, (x, scale, bias), dy)))
    assert_all(found, want)
    assert count == 1
    y = group_norm(x.detach(), scale, bias, **options)
    found = []
    count = sums_over_ranks(lambda: found.extend(torch.autograd.grad(y, (scale, bias), dy)))
    for got, reference in zip(found, want[1:], strict=True):
        assert_gradient(got.numpy(), reference, rtol=GRADIENT)
    assert count == 0


@pytest.mark.parametrize("graph", [False, True], ids=["first", "second order"])
def test_backward_where_the_name_is_no_longer_bound(graph, arrays, world):
    x, scale, bias = leaves(arrays)
    with bind_axis(here=world):
        y = group_norm(x, scale, bias, **OPTIONS, axis_name="here")
    dy = torch.tensor(arrays["dy"])
    found = torch.autograd.grad(y, (x, scale, bias), dy, create_graph=graph)
    assert_all([a.detach() for a in found], expected(arrays))
    if graph:
        wide = [a.detach().double().requires_grad_() for a in (x, scale, bias)]
        alone = torch.nn.functional.group_norm(wide[0], 4, *wide[1:], eps=1e-5)
        exact = torch.autograd.grad(alone, wide, dy.double(), create_graph=True)
        second = torch.autograd.grad(sum((a**2).sum() for a in found), (x, scale))
        want = torch.autograd.grad(sum((a**2).sum() for a in exact), wide[:2])
        for got, reference in zip(second, want, strict=True):
            assert_gradient(got.numpy(), reference.numpy(), rtol=10 * GRADIENT)
