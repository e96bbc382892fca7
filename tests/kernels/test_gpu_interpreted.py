"""The kernels for GPUs, interpreted, against the oracle: every plan, on arrays of every library.

Run with ``--interpret`` (``nox -s tests`` does, together with other files of tests, whose PyTorch
rows are computed by the kernels then). Limits are made small here, so that small arrays take the
ways of large ones.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from unittest import mock

import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp
from groupnorm.adapter import Unsupported
from groupnorm.arguments import validate
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu import tiling as gpu_tiles
from groupnorm.dispatch import adapter_named
from groupnorm.testing import oracle
from tests import interpreter
from tests.rows import CONTRACT, GRADIENT, GRADIENT_FAR, assert_close, assert_gradient

ACTIVATIONS = (None, "relu", "silu", "gelu")
DTYPES = ("float32", "float16", "bfloat16")


@pytest.fixture(autouse=True)
def interpreted(request):
    if not request.config.getoption("--interpret"):
        pytest.skip("Triton interprets with --interpret only, which nox -s tests passes")


# What makes small arrays take the ways of large ones.
PLANS = {
    "small": {"SMALL": 1 << 30, "SMALL_FIRST": 1 << 30},
    "group": {"SMALL": 0, "SMALL_FIRST": 0, "SLAB_WARPS": 1},
    "slabs": {"SMALL": 0, "SMALL_FIRST": 0, "CACHED_BYTES": 0, "SLAB_WARPS": 1, "UNROLL": 2},
}
MORE = {
    "chunks": {**PLANS["slabs"], "FEWEST": 10**6, "MERGED_AT_ONCE": 16},
    "rows": {
        **PLANS["slabs"], "FEWEST": 10**6, "MANY_ROWS": 2, "ROWS_OF_A_BLOCK": 3,
        "ROWS_AT_ONCE": 2,
    },
}  # fmt: skip


@pytest.fixture(params=PLANS)
def plan(request, monkeypatch):
    for name, value in {**PLANS, **MORE}[request.param].items():
        for module in (gpu, gpu_tiles):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    clear()
    yield request.param
    clear()


def clear():
    """Forget what was planned, and what was prepared of it."""
    caches = [
        gpu.forward, gpu.backward, gpu_tiles.tiles_of_small_groups, gpu_tiles.slabs_of,
        gpu_tiles.slabs_of_whole_groups,
    ]  # fmt: skip
    for library in ("torch", "cupy"):
        module = sys.modules.get(f"groupnorm.backends.{library}.gpu")
        if module is not None:
            caches.append(module._prepared)
    for cached in caches:
        cached.cache_clear()


# Shapes, feature axis, groups: groups that no power of two divides, an odd number of positions,
# one position, channels wider than a tile, one group, groups of one channel.
SHAPES = {
    "last, D=10, P=49": ((3, 7, 7, 40), -1, 4),
    "first, D=10, P=49": ((3, 40, 7, 7), 1, 4),
    "last, even": ((2, 8, 8, 16), -1, 2),
    "first, even": ((2, 16, 8, 8), 1, 2),
    "last, wide": ((2, 5, 900), -1, 3),
    "first, long": ((2, 6, 900), 1, 3),
    "channels alone": ((5, 30), -1, 3),
    "one group": ((1, 31, 24), -1, 1),
    "size 1": ((2, 33, 8), -1, 8),
}


def arguments(name, rng, offset=0.0, dtype="float32"):
    torch = importlib.import_module("torch")
    shape, axis, groups = SHAPES[name]
    keywords = {"num_groups": groups, "feature_axis": axis}

    def tensor(values):
        return torch.from_numpy(values).to(getattr(torch, dtype))

    x, dy = tensor(rng.normal(size=shape) + offset), tensor(rng.normal(size=shape))
    scale, bias = (
        torch.from_numpy(a.astype("f"))
        for a in (rng.uniform(0.5, 1.5, shape[axis]), rng.normal(size=shape[axis]))
    )
    return x, dy, scale, bias, keywords


def wide(tensor):
    return tensor.double().numpy()


def check(x, dy, scale, bias, keywords, rtol=GRADIENT, **others):
    y, pullback = group_norm_vjp(x, scale, bias, **keywords, **others, implementation="fused")
    assert y.stride() == x.stride()
    want = oracle.group_norm(wide(x), wide(scale), wide(bias), **keywords, **others)
    assert_close(y.numpy(), want, tolerance=CONTRACT)
    found = pullback(dy)
    want = oracle.group_norm_gradients(
        wide(x), wide(dy), wide(scale), wide(bias), **keywords, **others
    )
    assert found.x.stride() == x.stride()
    for ours, reference in zip(found, want, strict=True):
        assert_gradient(ours.numpy(), reference, rtol=rtol)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("offset", [0.0, 1e3], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(plan, name, offset, rng):
    check(*arguments(name, rng, offset), rtol=GRADIENT_FAR if offset else GRADIENT)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("plan", MORE, indirect=True)
@pytest.mark.parametrize("name", ["last, even", "first, D=10, P=49", "first, long"])
def test_many_tiles_and_rows(plan, name, rng):
    check(*arguments(name, rng))


@pytest.mark.needs("torch")
@pytest.mark.parametrize("one", [True, False], ids=["one mask", "one each"])
@pytest.mark.parametrize("name", ["last, D=10, P=49", "first, D=10, P=49", "first, long"])
def test_masks(plan, name, one, rng):
    x, dy, scale, bias, keywords = arguments(name, rng, 10.0)
    shape = list(x.shape)
    shape[keywords["feature_axis"]] = 1
    mask = rng.random([1, *shape[1:]] if one else shape) < 0.6
    mask[-1] &= one  # one sample has nothing that counts
    out = ~np.broadcast_to(mask, x.shape)
    x.numpy()[out] = np.resize(np.float32([np.nan, np.inf, 7]), out.sum())
    check(x, dy, scale, bias, keywords, GRADIENT_FAR, mask=mask)


def far_first(shape, axis, rng):
    """Return data whose first positions of all channels are far from the others."""
    x = rng.normal(size=shape)
    np.moveaxis(x, axis, -1).reshape(shape[0], -1, shape[axis])[:, :3] += 1e4
    return x


HARD = {
    "far first positions": far_first,
    "a spike at the first element": lambda shape, axis, rng: np.where(
        np.indices(shape).sum(0) == 0, 1e6, rng.normal(size=shape)
    ),
    "means of channels far apart": lambda shape, axis, rng: (
        rng.normal(size=shape)
        + np.expand_dims(
            np.resize([1e5, -1e5, 3.0], shape[axis]),
            tuple(a for a in range(len(shape)) if a != axis % len(shape)),
        )
    ),
    "sorted": lambda shape, axis, rng: np.sort(rng.lognormal(size=shape), axis=None).reshape(shape),
    "two values": lambda shape, axis, rng: 1e5 + rng.integers(0, 2, shape),
}


@pytest.mark.needs("torch")
@pytest.mark.parametrize("mask", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("name", ["last, wide", "first, long", "first, D=10, P=49"])
def test_hard_data(plan, name, kind, mask, rng):
    """Also where a mask leaves none of the first positions, from which pivots are taken."""
    torch = importlib.import_module("torch")
    x, _, scale, bias, keywords = arguments(name, rng)
    shape, axis, _ = SHAPES[name]
    x = torch.from_numpy(HARD[kind](shape, axis, rng).astype("f"))
    others = {}
    if mask:
        valid = np.ones((*shape[:axis], 1, *shape[axis:][1:]), bool)
        np.moveaxis(valid, axis, -1).reshape(shape[0], -1)[:, : 5 if "last" in name else 45] = False
        others["mask"] = valid
    y = group_norm(x, scale, bias, implementation="fused", **keywords, **others)
    want = oracle.group_norm(wide(x), wide(scale), wide(bias), **keywords, **others)
    assert_close(y.numpy(), want, tolerance=CONTRACT)


@pytest.fixture
def long_slabs(monkeypatch):
    """Slabs as long as those of large arrays, in which threads add up many elements."""
    monkeypatch.setattr(gpu, "FEWEST", 1)
    clear()
    yield
    clear()


@pytest.mark.needs("torch")
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("part", [32, 8])
def test_steps_in_long_slabs(long_slabs, part, first, rng):
    """Two values, of which a thread adds up so many equal ones that roundings do not cancel."""
    torch = importlib.import_module("torch")
    shape, axis = ((1, 64, 2048), 1) if first else ((1, 1024, 64), 2)
    for value in (142.33, 182.77):
        x = torch.full(shape, float(value))
        if first:
            x[:, :, : shape[2] // part] = 0
        else:
            x[:, : shape[1] // part] = 0
        y = group_norm(x, num_groups=2, feature_axis=axis, implementation="fused")
        want = oracle.group_norm(wide(x), num_groups=2, feature_axis=axis)
        assert_close(y.numpy(), want, tolerance=CONTRACT)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("plan", MORE, indirect=True)
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("factor", [1 - 2.0**-23, 1 + 2.0**-23])
def test_masked_constants_by_approximate_divisions(plan, factor, epsilon, rng, monkeypatch):
    """Where the first part of a group has nothing that counts, and a division is not exact."""
    torch = importlib.import_module("torch")
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    divide = builder.create_fdiv

    def approximate(self, a, b):
        found = divide(self, a, b)
        if found.data.dtype == np.float32:
            found.data = found.data * np.float32(factor)
        return found

    monkeypatch.setattr(builder, "create_fdiv", approximate)
    _, _, scale, bias, keywords = arguments("last, D=10, P=49", rng)
    valid = np.ones((3, 7, 7, 1), bool)
    valid[:, :2] = False
    x = torch.full((3, 7, 7, 40), 0.7)
    y = group_norm(x, scale, bias, mask=valid, epsilon=epsilon, implementation="fused", **keywords)
    assert torch.equal(y, bias.expand_as(y))


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", ["last, D=10, P=49", "first, D=10, P=49", "first, long"])
def test_parameters_of_each_sample(plan, name, rng):
    torch = importlib.import_module("torch")
    x, dy, scale, bias, keywords = arguments(name, rng)
    rows = [1 + torch.arange(len(x))[:, None] * 0.25 + p for p in (scale, bias)]
    y, pullback = group_norm_vjp(x, *rows, implementation="fused", activation="silu", **keywords)
    found = pullback(dy)
    for i in range(len(x)):
        given = [a.double().requires_grad_() for a in (x[i : i + 1], *(row[i] for row in rows))]
        axis = keywords["feature_axis"]
        z = torch.nn.functional.group_norm(
            given[0].movedim(axis, 1), keywords["num_groups"], *given[1:], 1e-6
        ).movedim(1, axis)
        want = torch.nn.functional.silu(z)
        assert_close(y[i : i + 1].numpy(), want.detach().numpy(), tolerance=CONTRACT)
        gradients = torch.autograd.grad(want, given, dy[i : i + 1].double())
        for ours, reference in zip(
            (found.x[i : i + 1], found.scale[i], found.bias[i]), gradients, strict=True
        ):
            assert_gradient(ours.numpy(), reference.numpy(), rtol=GRADIENT)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(plan, activation, rng):
    """Values and gradients of the activation are those of PyTorch's own, in float64."""
    check_activation(activation, rng)


def check_activation(activation, rng):
    torch = importlib.import_module("torch")
    x, dy, scale, bias, keywords = arguments("first, D=10, P=49", rng, dtype="float32")
    y, pullback = group_norm_vjp(
        x, 4 * scale, bias, activation=activation, implementation="fused", **keywords
    )
    given = [a.double().requires_grad_() for a in (x, 4 * scale, bias)]
    z = torch.nn.functional.group_norm(given[0], 4, given[1], given[2], 1e-6)
    want = z if activation is None else getattr(torch.nn.functional, activation)(z)
    assert_close(y.numpy(), want.detach().numpy(), tolerance=CONTRACT)
    for ours, reference in zip(
        pullback(dy), torch.autograd.grad(want, given, dy.double()), strict=True
    ):
        assert_gradient(ours.numpy(), reference.numpy(), rtol=GRADIENT)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("plan", ["small", "slabs"], indirect=True)
@pytest.mark.parametrize("error", [3 * 2.0**-23, -3 * 2.0**-23], ids=["above", "below"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_by_approximate_instructions(plan, activation, error, rng, monkeypatch):
    """With the largest errors of a GPU's exponential and reciprocal together, of one sign."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder

    def approximate(self, argument):
        return self.unary_op(argument, lambda a: np.exp2(a) * np.float32(1 + error))

    monkeypatch.setattr(builder, "create_exp2", approximate)
    check_activation(activation, rng)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("plan", ["small", "slabs"], indirect=True)
@pytest.mark.parametrize("parameter", DTYPES)
@pytest.mark.parametrize("result", DTYPES)
@pytest.mark.parametrize("given", DTYPES)
def test_dtypes(plan, given, result, parameter, rng):
    torch = importlib.import_module("torch")
    x, dy, scale, bias, keywords = arguments("last, D=10, P=49", rng, dtype=given)
    scale, bias = (p.to(getattr(torch, parameter)) for p in (scale, bias))
    y, pullback = group_norm_vjp(x, scale, bias, dtype=result, implementation="fused", **keywords)
    assert y.dtype is getattr(torch, result)
    want = oracle.group_norm(wide(x), wide(scale), wide(bias), **keywords)
    last = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}[result]
    error = np.abs(wide(y) - want) / np.maximum(np.abs(want), 1e-2)
    assert error.max() <= 1.5 * last + CONTRACT * 100
    found = pullback(dy)
    assert (found.x.dtype, found.scale.dtype) == (x.dtype, scale.dtype)
    reference = oracle.group_norm_gradients(wide(x), wide(dy), wide(scale), wide(bias), **keywords)
    for ours, true in zip(found, reference, strict=True):
        assert_gradient(wide(ours), true, rtol=2.0**-8 if "float16" in str(ours.dtype) else 2e-6)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
@pytest.mark.parametrize("size", [1e20, 1e-20])
def test_squares_neither_overflow_nor_vanish(plan, size, epsilon, rng):
    x, _, scale, bias, keywords = arguments("last, even", rng)
    x = (x.double() * size).float()
    y = group_norm(x, scale, bias, epsilon=epsilon, implementation="fused", **keywords)
    want = oracle.group_norm(wide(x), wide(scale), wide(bias), epsilon=epsilon, **keywords)
    assert_close(y.numpy(), want, tolerance=CONTRACT)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("value", [0.1, 1e5, -3e-20, 3e37])
def test_constants_give_exactly_the_bias(plan, value, rng):
    torch = importlib.import_module("torch")
    x, _, scale, bias, keywords = arguments("last, D=10, P=49", rng)
    y = group_norm(torch.full_like(x, value), scale, bias, implementation="fused", **keywords)
    assert torch.equal(y, bias.expand_as(y))


@pytest.mark.needs("torch")
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(("value", "epsilon"), [(1e36, 1e-6), (1e10, 0.0)])
@pytest.mark.parametrize("name", ["last, D=10, P=49", "first, D=10, P=49"])
def test_gradients_of_large_constants_are_finite(plan, name, value, epsilon, activation, rng):
    """Of what a tile has beside the elements nothing must overflow."""
    torch = importlib.import_module("torch")
    x, dy, scale, bias, keywords = arguments(name, rng)
    _, pullback = group_norm_vjp(
        torch.full_like(x, value), scale, bias, epsilon=epsilon, activation=activation,
        implementation="fused", **keywords,
    )  # fmt: skip
    assert all(torch.isfinite(a).all() for a in pullback(dy))


@pytest.mark.needs("torch")
def test_sums_do_not_overflow(plan, rng):
    torch = importlib.import_module("torch")
    x, _, scale, bias, keywords = arguments("last, D=10, P=49", rng)
    x = torch.full_like(x, 3e37)
    x[..., ::10] = 2.9e37
    y = group_norm(x, scale, bias, implementation="fused", **keywords)
    want = oracle.group_norm(wide(x), wide(scale), wide(bias), **keywords)
    assert_close(y.numpy(), want, tolerance=CONTRACT)


@pytest.mark.needs("torch")
def test_torch_func_maps_masks_and_cotangents(rng):
    """What has no values of its own is left to portable code."""
    torch = importlib.import_module("torch")
    x, dy, scale, bias, keywords = arguments("last, even", rng)
    masks = torch.from_numpy(rng.random((3, 2, 8, 8, 1)) < 0.7)
    found = torch.func.vmap(lambda mask: group_norm(x, mask=mask, **keywords))(masks)
    for y, mask in zip(found, masks, strict=True):
        want = oracle.group_norm(wide(x), mask=mask.numpy(), **keywords)
        assert_close(y.numpy(), want, tolerance=CONTRACT)
    _, pullback = group_norm_vjp(x, scale, bias, **keywords)
    mapped = torch.func.vmap(lambda dy: pullback(dy).x)(torch.stack([dy, 2 * dy]))
    want = oracle.group_norm_gradients(wide(x), wide(dy), wide(scale), wide(bias), **keywords)
    assert_gradient(mapped[1].numpy() / 2, want.x, rtol=GRADIENT)


@pytest.mark.needs("torch")
def test_the_same_bits_again(plan, rng):
    x, dy, scale, bias, keywords = arguments("first, long", rng)
    runs = []
    for _ in range(2):
        y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **keywords)
        runs.append([a.numpy().tobytes() for a in (y, *pullback(dy))])
    assert runs[0] == runs[1]


# Arrays of other libraries ------------------------------------------------------------------------


class HostDevice(contextlib.nullcontext):
    """What CuPy's arrays say where they are, and are computed within."""

    id = 0


class HostArray(np.ndarray):
    """An array of NumPy that stands for one of CuPy."""

    device = HostDevice()


class HostArrays:
    """NumPy in CuPy's place, as far as calls of the kernels ask for it."""

    ndarray, empty, ascontiguousarray = HostArray, np.empty, np.ascontiguousarray

    @staticmethod
    def asarray(a):
        return np.asarray(a).view(HostArray)


@pytest.fixture
def cupy_on_the_host(monkeypatch):
    """Return the module of CuPy's calls, which are computed by the interpreter."""
    module = importlib.import_module("groupnorm.backends.cupy.gpu")
    monkeypatch.setattr(module, "cupy", HostArrays)
    monkeypatch.setattr(module, "why_unavailable", lambda device: None)
    monkeypatch.setattr(
        module,
        "prepare",
        lambda sequence, dtypes, device: interpreter.interpreted(
            sequence, dtypes, lambda n: np.empty(n, np.float32), interpreter.Pointer
        ),
    )
    # What was prepared with other limits of plans, or for another test, is not used.
    module._prepared.cache_clear()
    yield module
    module._prepared.cache_clear()


def options(keywords, **others):
    settings = {
        "feature_axis": -1, "num_groups": 32, "group_size": None, "reduction_axes": None,
        "epsilon": 1e-6, "dtype": None, "axis_name": None, "axis_index_groups": None,
        "use_fast_variance": True, "implementation": "fused",
    }  # fmt: skip
    return validate(**{**settings, **keywords, **others})


def drawn(name, rng):
    """Return x, dy, scale, bias and a mask of NumPy, and the keywords of a call."""
    shape, axis, groups = SHAPES[name]
    x, dy = rng.normal(size=(2, *shape)).astype("f")
    scale, bias = rng.normal(size=(2, shape[axis])).astype("f")
    mask_shape = list(shape)
    mask_shape[axis] = 1
    mask = rng.random(mask_shape) < 0.7
    return x, dy, scale, bias, mask, {"num_groups": groups, "feature_axis": axis}


@pytest.mark.needs("cupy")
@pytest.mark.parametrize("name", ["last, D=10, P=49", "first, D=10, P=49", "channels alone"])
def test_calls_of_cupy(plan, cupy_on_the_host, name, rng):
    x, dy, scale, bias, valid, keywords = drawn(name, rng)
    for mask in (None, valid):
        adapter = numpy_as_cupy()
        x, dy, scale, bias = (HostArrays.asarray(a) for a in (x, dy, scale, bias))
        y, pullback = cupy_on_the_host.CupyKernels(adapter).vjp(
            x, scale, bias, mask, options(keywords, activation=None)
        )
        assert_close(
            y, oracle.group_norm(x, scale, bias, mask=mask, **keywords), tolerance=CONTRACT
        )
        want = oracle.group_norm_gradients(x, dy, scale, bias, mask=mask, **keywords)
        for ours, reference in zip(pullback(dy), want, strict=True):
            assert_gradient(ours, reference, rtol=GRADIENT)
        np.testing.assert_array_equal(
            y,
            cupy_on_the_host.CupyKernels(adapter).forward(x, scale, bias, mask, options(keywords)),
        )


def of_each_sample(x, dy, scale, bias, keywords):
    """Return the result and gradients, with a row of parameters for each sample."""
    parts = [
        (
            oracle.group_norm(x[i : i + 1], scale[i], bias[i], **keywords),
            *oracle.group_norm_gradients(
                x[i : i + 1], dy[i : i + 1], scale[i], bias[i], **keywords
            ),
        )
        for i in range(len(x))
    ]
    y, dx, dscale, dbias = zip(*parts, strict=True)
    return np.concatenate(y), np.concatenate(dx), np.stack(dscale), np.stack(dbias)


@pytest.mark.needs("cupy")
@pytest.mark.parametrize("name", ["last, D=10, P=49", "first, D=10, P=49"])
def test_parameters_of_each_sample_in_cupy(plan, cupy_on_the_host, name, rng):
    x, dy, scale, bias, _, keywords = drawn(name, rng)
    scale, bias = (p + np.arange(len(x), dtype="f")[:, None] for p in (scale, bias))
    given = [HostArrays.asarray(a) for a in (x, scale, bias)]
    y, pullback = cupy_on_the_host.CupyKernels(numpy_as_cupy()).vjp(
        *given, None, options(keywords, activation=None)
    )
    want, *gradients = of_each_sample(x, dy, scale, bias, keywords)
    assert_close(y, want, tolerance=CONTRACT)
    for ours, reference in zip(pullback(HostArrays.asarray(dy)), gradients, strict=True):
        assert_gradient(ours, reference, rtol=GRADIENT)


@pytest.mark.needs("cupy", "torch")
def test_what_is_of_another_library_is_not_for_cupy(cupy_on_the_host, rng):
    torch = importlib.import_module("torch")
    x = HostArrays.asarray(rng.normal(size=(2, 5, 8)).astype("f"))
    foreign = torch.ones(8)
    for scale, mask in ((foreign, None), ([1.0] * 8, None), (None, torch.ones(8) > 0)):
        found = cupy_on_the_host.CupyKernels(numpy_as_cupy()).forward(
            x, scale, None, mask, options({"num_groups": 2})
        )
        assert isinstance(found, Unsupported)


def numpy_as_cupy():
    """Return NumPy's adapter: CuPy's asks its arrays for what NumPy's do not have."""
    return adapter_named("numpy")


@pytest.fixture
def jax_by_callback():
    """Have JAX's launcher call back, to arrays of NumPy that the interpreter computes."""
    jax = importlib.import_module("jax")
    jax_gpu = importlib.import_module("groupnorm.backends.jax.gpu")

    def launch(step, operands, results):
        def host(*arrays):
            written = [np.full(r.shape, 7, r.dtype) for r in results]
            interpreter.run(step, [*(np.array(a) for a in arrays), *written])
            return written

        return jax.pure_callback(host, results, *operands)

    with mock.patch.multiple(
        jax_gpu, chosen_launcher=lambda: launch, compute_capability=lambda: 90
    ):
        yield jax_gpu


@pytest.mark.needs("jax")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["last, D=10, P=49", "first, D=10, P=49", "channels alone"])
def test_calls_of_jax(plan, jax_by_callback, name, masked, rng):
    jax = importlib.import_module("jax")
    if jax.device_count() > 1:
        pytest.skip("with several devices the portable code computes; --jax-devices 1 leaves one")
    jax_kernels = importlib.import_module("groupnorm.backends.jax.kernels")
    x, dy, scale, bias, valid, keywords = drawn(name, rng)
    shape, axis, _ = SHAPES[name]
    mask = valid if masked else None
    given = [jax.numpy.asarray(a) for a in (x, scale, bias)]
    spec, arrays = jax_kernels._bind(adapter_named("jax"), *given, mask, options(keywords))
    work = [a for a in jax_kernels._work_arrays(spec, *arrays) if a is not None]

    y, saved = jax.jit(lambda *a: jax_by_callback.normalize(*a, spec=spec))(*work)
    want = oracle.group_norm(x, scale, bias, mask=mask, **keywords)
    assert_close(np.asarray(y).reshape(shape), want, tolerance=CONTRACT)

    def pull(dy, *arguments):
        return jax_by_callback.pull_back(dy, *arguments, spec=spec, batches=shape[0])

    dx, dscale, dbias = jax.jit(pull)(dy.reshape(work[0].shape), *work, saved)
    want = oracle.group_norm_gradients(x, dy, scale, bias, mask=mask, **keywords)
    assert_gradient(np.asarray(dx).reshape(shape), want.x, rtol=GRADIENT)
    assert dscale.shape == (shape[0], shape[axis])
    assert_gradient(np.asarray(dscale).sum(0), want.scale, rtol=GRADIENT)
    assert_gradient(np.asarray(dbias).sum(0), want.bias, rtol=GRADIENT)


@pytest.mark.needs("jax")
@pytest.mark.parametrize("name", ["last, D=10, P=49", "first, D=10, P=49"])
def test_parameters_of_each_sample_in_jax(plan, jax_by_callback, name, rng):
    jax = importlib.import_module("jax")
    if jax.device_count() > 1:
        pytest.skip("with several devices the portable code computes; --jax-devices 1 leaves one")
    jax_kernels = importlib.import_module("groupnorm.backends.jax.kernels")
    x, dy, scale, bias, _, keywords = drawn(name, rng)
    scale, bias = (p + np.arange(len(x), dtype="f")[:, None] for p in (scale, bias))
    given = [jax.numpy.asarray(a) for a in (x, scale, bias)]
    spec, arrays = jax_kernels._bind(adapter_named("jax"), *given, None, options(keywords))
    work = [a for a in jax_kernels._work_arrays(spec, *arrays) if a is not None]
    assert work[1].ndim == 2
    y, saved = jax.jit(lambda *a: jax_by_callback.normalize(*a, spec=spec))(*work)
    found = jax.jit(lambda dy, *a: jax_by_callback.pull_back(dy, *a, spec=spec, batches=len(x)))(
        dy.reshape(work[0].shape), *work, saved
    )
    want, *gradients = of_each_sample(x, dy, scale, bias, keywords)
    assert_close(np.asarray(y).reshape(x.shape), want, tolerance=CONTRACT)
    for ours, reference in zip(found, gradients, strict=True):
        assert_gradient(np.asarray(ours).reshape(reference.shape), reference, rtol=GRADIENT)
