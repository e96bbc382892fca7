"""The fused CPU kernels compared with the oracle: memory layouts, masks, dtypes, ranges, threads.

If the compiled core is installed, all other tests on NumPy use them as well.
"""

from __future__ import annotations

import multiprocessing
import threading

import numpy as np
import pytest

from groupnorm import GroupNorm, group_norm, group_norm_vjp, num_threads
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import oracle
from tests.kernels.core import needs_core
from tests.rows import (
    CONTRACT,
    GRADIENT,
    GRADIENT_FAR,
    assert_close,
    assert_gradient,
    host_dtype,
)

needs_core()

ACTIVATIONS = (None, "relu", "silu", "gelu")
# Shapes, feature axis, groups: rows longer and shorter than blocks and bands, odd sizes, one
# position, one channel per group, one group.
SHAPES = {
    "last": ((2, 9, 7, 12), -1, 4),
    "first": ((2, 12, 9, 7), 1, 4),
    "last, long": ((2, 3000, 6), -1, 2),
    "first, long": ((2, 6, 5000), 1, 2),
    "last, wide": ((3, 40, 1500), -1, 5),
    "first, wide": ((3, 1500, 3), 1, 5),
    "last, one sample": ((70000, 4), None, 2),
    "first, one sample": ((4, 70000), 0, 2),
    "channels alone": ((5, 30), -1, 3),
    "size 1": ((2, 50, 8), -1, 8),
    "one group": ((2, 50, 8), -1, 1),
}


def arguments(name, rng, offset=0.0):
    shape, axis, groups = SHAPES[name]
    keywords = {"num_groups": groups, "feature_axis": -1 if axis is None else axis}
    if axis is None:
        keywords["reduction_axes"] = (0, 1)
    channels = shape[keywords["feature_axis"]]
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, channels).astype(np.float32)
    return x, dy, scale, rng.normal(size=channels).astype(np.float32), keywords


def fused(*arrays, **keywords):
    return group_norm(*arrays, implementation="fused", **keywords)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("name", SHAPES)
def test_forward_and_backward(name, offset, rng):
    x, dy, scale, bias, keywords = arguments(name, rng, offset)
    y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **keywords)
    assert y.dtype == np.float32
    assert y.flags.c_contiguous
    assert_close(y, oracle.group_norm(x, scale, bias, **keywords), tolerance=CONTRACT)
    got = pullback(dy)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
    if offset <= 1e3:
        rtol = GRADIENT if offset == 0 else GRADIENT_FAR
        assert_gradient(got.x, want.x, rtol=rtol)
        assert_gradient(got.scale, want.scale, rtol=rtol)
    assert_gradient(got.bias, want.bias, rtol=GRADIENT)


ORDERS = [(0, 1, 2, 3), (0, 3, 1, 2), (0, 2, 3, 1), (3, 0, 1, 2), (1, 2, 3, 0), (2, 0, 3, 1)]


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_every_order_in_memory(order, rng):
    """The kernels need channels and positions to be contiguous in order; all orders work."""
    dense = rng.normal(size=(4, 5, 6, 8)).astype(np.float32)
    x = dense.transpose(order)
    for axis in (1, -1):
        groups = next(n for n in (4, 3, 2, 5) if x.shape[axis] % n == 0)
        keywords = {"num_groups": groups, "feature_axis": axis}
        y, pullback = group_norm_vjp(x, **keywords)
        assert_close(y, oracle.group_norm(x, **keywords), tolerance=CONTRACT)
        dy = rng.normal(size=x.shape).astype(np.float32)
        want = oracle.group_norm_gradients(x, dy, None, None, **keywords)
        assert_gradient(pullback(dy).x, want.x, rtol=GRADIENT)


def test_the_error_names_an_unsupported_memory_order(rng):
    x = rng.normal(size=(2, 6, 8, 6, 4)).astype(np.float32)
    with pytest.raises(ArgumentValueError, match="the order is KPCPC "):
        fused(x, num_groups=2, feature_axis=(2, 4))


def test_the_memory_order_is_kept(rng):
    x = rng.normal(size=(2, 5, 6, 8)).astype(np.float32).transpose(0, 3, 1, 2)
    y = fused(x, num_groups=4, feature_axis=1)
    assert y.strides == x.strides
    assert_close(y, oracle.group_norm(x, num_groups=4, feature_axis=1), tolerance=CONTRACT)


@pytest.mark.parametrize("view", ["strided", "backwards", "read-only", "broadcast"])
def test_views(view, rng):
    x = rng.normal(size=(4, 30, 8)).astype(np.float32)
    x.flags.writeable = view != "read-only"
    x = {
        "strided": x[::2, 1::3],
        "backwards": x[:, ::-1, ::-1],
        "read-only": x,
        "broadcast": np.broadcast_to(x[:1], (3, 30, 8)),
    }[view]
    before = x.copy()
    y = fused(x, num_groups=2)
    assert_close(y, oracle.group_norm(before, num_groups=2), tolerance=CONTRACT)
    np.testing.assert_array_equal(x, before)


def unaligned(a):
    """Return the same values at an address that is no multiple of their size."""
    found = np.frombuffer(b"." + a.tobytes(), a.dtype, offset=1).reshape(a.shape)
    assert not found.flags.aligned
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["last", "first"])
def test_unaligned_arrays(name, dtype, rng):
    """Which compiled code may not read: `nox -s sanitize` finds out."""
    x, dy, scale, bias, keywords = arguments(name, rng)
    x, dy = (a.astype(host_dtype(dtype)) for a in (x, dy))
    y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **keywords)
    x, dy, scale, bias, want = *map(unaligned, (x, dy, scale, bias)), (y, *pullback(dy))
    y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **keywords)
    for a, b in zip((y, *pullback(dy)), want, strict=True):
        np.testing.assert_array_equal(a, b)


MASKS = {
    "positions": (2, 9, 7, 1),
    "rows": (9, 1, 1),
    "one for all samples": (1, 9, 7, 1),
    "samples": (2, 1, 1, 1),
    "scalar": (),
}


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["last", "first"])
def test_masks(name, mask, activation, rng):
    x, dy, scale, bias, keywords = arguments(name, rng, 100.0)
    valid = rng.random(MASKS[mask]) < (0.7 if MASKS[mask] else 2)
    if name == "first":
        full = valid.reshape((1,) * (4 - valid.ndim) + valid.shape)
        valid = full.transpose(0, 3, 1, 2)
    everywhere = np.broadcast_to(valid, x.shape)
    x[~everywhere] = np.resize(np.float32([np.nan, np.inf, 3.4e38, 7]), (~everywhere).sum())
    y, pullback = group_norm_vjp(
        x, scale, bias, mask=valid, activation=activation, implementation="fused", **keywords
    )
    z = oracle.group_norm(x, scale, bias, mask=valid, **keywords)
    ordinary = everywhere | (np.abs(np.nan_to_num(x, posinf=np.inf)) < 1e3)
    sigmoid = 1 / (1 + np.exp(-np.clip(z, -700, 700)))
    want = z if activation is None else z * sigmoid
    assert_close(y[ordinary], want[ordinary], tolerance=CONTRACT)
    assert np.isfinite(y[np.isfinite(x)]).all()
    # Masked-out elements have no cotangent.
    dy = np.where(everywhere, dy, np.float32(0))
    slope = 1 if activation is None else sigmoid * (1 + z * (1 - sigmoid))
    got = pullback(dy)
    clean = np.where(ordinary, x, np.float32(0))
    gradients = oracle.group_norm_gradients(clean, dy * slope, scale, bias, mask=valid, **keywords)
    assert_gradient(got.x, gradients.x, rtol=GRADIENT_FAR)
    assert_gradient(got.scale, gradients.scale, rtol=GRADIENT_FAR)
    assert_gradient(got.bias, gradients.bias, rtol=GRADIENT_FAR)


@pytest.mark.parametrize("name", ["last", "first"])
def test_groups_without_a_valid_element(name, rng):
    x, dy, scale, bias, keywords = arguments(name, rng, 10.0)
    mask = np.ones((2, 1, 1, 1), bool)
    mask[1] = False
    y, pullback = group_norm_vjp(x, scale, bias, mask=mask, implementation="fused", **keywords)
    assert_close(y, oracle.group_norm(x, scale, bias, mask=mask, **keywords), tolerance=CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, mask=mask, **keywords)
    assert_gradient(pullback(dy).x, want.x, rtol=GRADIENT_FAR)


@pytest.mark.parametrize("result", ["input", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["last", "first, long"])
def test_half_precision(name, dtype, result, rng):
    x, dy, scale, bias, keywords = arguments(name, rng, 3.0)
    x, dy = (a.astype(host_dtype(dtype)) for a in (x, dy))
    y, pullback = group_norm_vjp(x, scale, bias, dtype=result, implementation="fused", **keywords)
    expected = host_dtype(dtype if result == "input" else result)
    assert y.dtype == expected
    want = oracle.group_norm(x.astype(np.float64), scale, bias, **keywords)
    # Rounded to the dtype, to within one additional ulp.
    units = np.spacing(np.abs(want).astype(expected)).astype(np.float64)
    assert (np.abs(y.astype(np.float64) - want) <= 1.5 * units + CONTRACT).all()
    got = pullback(dy.astype(expected))
    wide = dy.astype(expected).astype(np.float64)
    gradients = oracle.group_norm_gradients(x.astype(np.float64), wide, scale, bias, **keywords)
    assert got.x.dtype == x.dtype
    assert_gradient(
        got.x.astype(np.float64), gradients.x, rtol=2e-2 if dtype == "bfloat16" else 2e-3
    )
    assert_gradient(got.scale, gradients.scale, rtol=1e-5)


def test_every_half_is_converted_exactly():
    """All 65536 values of both dtypes, each in its own group, applied with scale 1 and mean 0."""
    for name in ("float16", "bfloat16"):
        every = np.arange(1 << 16, dtype=np.uint16).view(host_dtype(name))
        mask = np.zeros((), bool)  # mean 0, variance 1
        y = fused(every[:, None], num_groups=1, epsilon=0, dtype="float32", mask=mask)
        # Masked-out non-finite values count as 0.
        want = np.where(np.isfinite(every.astype(np.float32)), every.astype(np.float32), 0)
        np.testing.assert_array_equal(y[:, 0], np.clip(want, -5e33, 5e33).astype(np.float32))
        back = fused(
            want[:, None].astype(np.float32), num_groups=1, epsilon=0, dtype=name, mask=mask
        )
        clipped = np.clip(want, -5e33, 5e33).astype(np.float32).astype(host_dtype(name))
        np.testing.assert_array_equal(back[:, 0].view(np.uint16) << 1, clipped.view(np.uint16) << 1)


@pytest.mark.parametrize("size", [1e20, 1e-20, 1e30])
@pytest.mark.parametrize("name", ["last", "first", "first, long"])
def test_range(name, size, rng):
    """Squares exceed float32's range here; results do not."""
    x, _, scale, bias, keywords = arguments(name, rng, 0.5)
    x = (x * size).astype(np.float32)
    for epsilon in (0.0, 1e-6):
        y = fused(x, scale, bias, epsilon=epsilon, **keywords)
        want = oracle.group_norm(x, scale, bias, epsilon=epsilon, **keywords)
        assert_close(y, want, tolerance=CONTRACT)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3e7, 1e-30, 1e30, 0.1])
@pytest.mark.parametrize("name", SHAPES)
def test_constants_give_exactly_the_bias(name, value, rng):
    x, _, scale, bias, keywords = arguments(name, rng)
    axis = keywords["feature_axis"]
    x[:] = value
    for epsilon in (0.0, 1e-6):
        y = np.moveaxis(fused(x, scale, bias, epsilon=epsilon, **keywords), axis, -1)
        np.testing.assert_array_equal(y, np.broadcast_to(bias, y.shape))


@pytest.mark.parametrize("name", ["last", "first"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_affect_only_their_group(name, bad, rng):
    x, _, scale, bias, keywords = arguments(name, rng)
    x[0].flat[0] = bad
    y = fused(x, scale, bias, **keywords)
    groups = np.moveaxis(y, keywords["feature_axis"], 1).reshape(2, 4, -1)
    assert np.isnan(groups[0, 0]).all()
    assert np.isfinite(groups.reshape(8, -1)[1:]).all()


@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_the_number_of_threads(name, rng, monkeypatch):
    x, dy, scale, bias, keywords = arguments(name, rng)
    if SHAPES[name][1] not in (None, 0):  # enough for several threads
        x, dy = (np.concatenate([a] * -(-300_000 // a.size)) for a in (x, dy))

    def run():
        y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **keywords)
        return y, *pullback(dy)

    results = []
    for count in (1, 2, 5):
        monkeypatch.setattr(num_threads, "_set", count)
        results.append(run())
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_many_python_threads_at_once(rng):
    x = rng.normal(size=(8, 64, 64, 16)).astype(np.float32)
    want = fused(x, num_groups=4)
    wrong = []

    def work():
        results = [fused(x, num_groups=4) for _ in range(5)]
        wrong.extend(y for y in results if not np.array_equal(y, want))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def _in_child(x, queue):
    queue.put(fused(x, num_groups=4))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_a_forked_process(rng):
    """As a data loader's workers are; the parent's threads do not exist in it."""
    x = rng.normal(size=(8, 64, 64, 16)).astype(np.float32)
    want = fused(x, num_groups=4)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(x, queue))
    child.start()
    np.testing.assert_array_equal(queue.get(timeout=60), want)
    child.join()
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("x", "keywords", "reason"),
    [
        (np.ones((2, 3, 4)), {}, "x of float64"),
        (np.ones((2, 3, 4), np.complex64), {}, "real floating"),
        (np.ones((2, 3, 4), int), {}, "real floating"),
        (np.ones((2, 3, 4), np.float32), {"axis_name": "rows"}, "replicas"),
        (np.ones((0, 3, 4), np.float32), {}, "x has no elements"),
        (
            np.ones((2, 3, 4), np.float32),
            {"mask": np.ones(4, bool)},
            "varies along the feature axes",
        ),
        (np.ones((2, 3, 4, 5), np.float32), {"feature_axis": 2}, "order is KPCP"),
    ],
)
def test_unsupported_calls_raise_with_a_reason(x, keywords, reason):
    keywords = {"num_groups": 2, **keywords}
    message = f"implementation='fused' cannot compute this call: .*{reason}.*implementation=None"
    if "axis_name" in keywords:
        message = reason
        with pytest.raises(ArgumentValueError, match=message):
            group_norm(x, implementation="fused", **keywords)
        return
    with pytest.raises(ArgumentValueError, match=message):
        group_norm(x, implementation="fused", **keywords)
    assert group_norm(x, **keywords).shape == x.shape


def test_argument_errors_equal_those_of_portable_calls():
    x = np.ones((2, 3, 4), np.float32)
    for keywords, word in (
        ({"scale": np.ones(5, np.float32)}, "scale has shape"),
        ({"mask": np.ones((2, 7, 1), bool)}, "mask has shape"),
        ({"num_groups": 3}, "num_groups=3 does not divide"),
    ):
        with pytest.raises(ArgumentValueError, match=word):
            fused(x, **{"num_groups": 2, **keywords})
    _, pullback = group_norm_vjp(x, num_groups=2, implementation="fused")
    with pytest.raises(ArgumentValueError, match="dy has shape"):
        pullback(x[:1])
    with pytest.raises(ArgumentTypeError, match="dy is of type list"):
        pullback(x.tolist())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layer(activation, rng):
    layer = GroupNorm(8, num_groups=2, activation=activation, implementation="fused")
    x = rng.normal(size=(2, 50, 8)).astype(np.float32)
    portable = GroupNorm(8, num_groups=2, activation=activation, implementation="portable")
    assert_close(layer(x), portable(x).astype(np.float64), tolerance=CONTRACT)


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("channels", "positions"), [(1, 65536), (2, 9000), (8, 65536), (16, 4097)])
def test_sums_under_masks_do_not_lose_digits(channels, positions, dtype, layout, rng):
    """The addends have the same sign, and rounding errors do too: sums in sequence lose digits."""
    dtype = host_dtype(dtype)
    x = np.where(rng.random((1, positions, channels)) < 0.5, 0.75, -0.75).astype(dtype)
    dy = np.full(x.shape, 0.1).astype(dtype) * (1 + (x > 0)).astype(dtype)
    mask = rng.random((1, positions, 1)) < 0.95
    scale = rng.uniform(0.5, 1.5, channels).astype(np.float32)
    keywords = {"num_groups": 1}
    want = oracle.group_norm(x.astype(np.float64), scale, mask=mask, **keywords)
    gradients = oracle.group_norm_gradients(
        x.astype(np.float64), dy.astype(np.float64), scale, scale, mask=mask, **keywords
    )
    back = (lambda a: a) if layout == "last" else (lambda a: np.moveaxis(a, 1, -1))
    if layout == "first":
        x, dy, mask = (np.ascontiguousarray(np.moveaxis(a, -1, 1)) for a in (x, dy, mask))
        keywords["feature_axis"] = 1
    y, pullback = group_norm_vjp(
        x, scale, scale, mask=mask, dtype="float32", implementation="fused", **keywords
    )
    assert_close(back(y), want + scale, tolerance=1e-6)
    got = pullback(dy.astype(np.float32))
    assert_gradient(got.scale, gradients.scale, rtol=1e-6, at_least=abs(gradients.bias).max())
    assert_gradient(got.bias, gradients.bias, rtol=1e-6)
    if dtype == np.float32:
        assert_gradient(back(got.x), gradients.x, rtol=GRADIENT)


@pytest.mark.parametrize("epsilon", [0.0, 1e-90])
@pytest.mark.parametrize("feature_axis", [-1, 1])
def test_subnormal_data_without_an_epsilon_is_constant(feature_axis, epsilon, rng):
    """Factors of 1e40 do not exist in float32; before, results had any size, or were NaN."""
    x = (1e-40 * rng.normal(size=(2, 4, 50) if feature_axis == 1 else (2, 50, 4))).astype("f4")
    scale, bias = rng.normal(size=(2, 4)).astype(np.float32)
    y, pullback = group_norm_vjp(
        x, scale, bias, num_groups=2, feature_axis=feature_axis, epsilon=epsilon,
        implementation="fused",
    )  # fmt: skip
    y = np.moveaxis(y, feature_axis, -1)
    np.testing.assert_allclose(y, np.broadcast_to(bias, y.shape), rtol=1e-6)
    assert np.isfinite(pullback(np.ones_like(x)).x).all()
