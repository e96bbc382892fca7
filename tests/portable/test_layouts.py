"""Memory layouts: results do not depend on strides or order; no argument is written to."""

import functools
import importlib

import numpy as np
import pytest

from groupnorm import (
    GroupStatistics,
    group_norm,
    group_norm_vjp,
    group_statistics,
    merge_statistics,
    normalize,
)
from groupnorm.errors import ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import (
    CONTRACT,
    GRADIENT,
    ROWS,
    assert_close,
    assert_gradient,
    assert_gradients,
)

VIEWS = {
    "fortran order": lambda x: np.asfortranarray(x),
    "transposed": lambda x: np.ascontiguousarray(x.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1),
    "every other row": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "every other channel": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "a window": lambda x: np.pad(x, 2)[2:-2, 2:-2, 2:-2, 2:-2],
    "reversed": lambda x: np.ascontiguousarray(x[:, ::-1, :, ::-1])[:, ::-1, :, ::-1],
}
SHAPE = (2, 9, 10, 12)


def draw(rng, offset=1e3):
    return (offset + rng.normal(size=SHAPE)).astype(np.float32)


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
@pytest.mark.parametrize("feature_axis", [-1, 1])
@pytest.mark.parametrize("view", VIEWS)
def test_numpy_views(view, feature_axis, fast, rng):
    x = draw(rng)
    given = VIEWS[view](x)
    assert not given.flags.c_contiguous
    keywords = {"num_groups": 3, "feature_axis": feature_axis}
    y = group_norm(given, use_fast_variance=fast, **keywords)
    assert y.dtype == np.float32
    assert_close(y, oracle.group_norm(x, **keywords), tolerance=CONTRACT)


@pytest.mark.parametrize("feature_axis", [-1, 1])
@pytest.mark.parametrize("view", VIEWS)
def test_gradients_of_numpy_views(view, feature_axis, rng):
    """The cotangent is as non-contiguous as the input."""
    x, dy = draw(rng, 0), rng.normal(size=SHAPE).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, size=SHAPE[feature_axis]).astype(np.float32)
    keywords = {"num_groups": 3, "feature_axis": feature_axis}
    _, pullback = group_norm_vjp(VIEWS[view](x), scale, None, **keywords)
    want = oracle.group_norm_gradients(x, dy, scale, **keywords)
    assert_gradients(pullback(VIEWS[view](dy)), want, rtol=GRADIENT)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_arguments_are_not_modified(backend, masked, rng):
    """Every argument keeps its bits, even where the result could share its memory."""
    x, dy = draw(rng), rng.normal(size=SHAPE).astype(np.float32)
    scale, bias = rng.normal(size=(2, 12)).astype(np.float32)
    mask = rng.random((2, 9, 10, 1)) < 0.7
    if masked:
        x[0, 0] = np.nan
        mask[0, 0] = False
    hosts = [x, scale, bias, dy, mask]
    given = [backend.asarray(a) for a in hosts]
    y, pullback = group_norm_vjp(*given[:3], num_groups=3, mask=given[4] if masked else None)
    pullback(given[3])
    for before, after in zip(hosts, given, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(after), before)
    assert y is not given[0]


@pytest.mark.parametrize("epsilon", [1e-6, 0])
def test_the_result_does_not_share_memory_with_the_input(epsilon, rng):
    for x in (draw(rng), np.zeros(SHAPE, np.float32), np.zeros((2, 0, 12), np.float32)):
        y = group_norm(x, num_groups=3, epsilon=epsilon)
        assert not np.shares_memory(x, y)
        assert y.flags.writeable


def test_gradients_do_not_change_when_the_cotangent_is_overwritten(rng):
    x, dy = draw(rng, 0), rng.normal(size=SHAPE).astype(np.float32)
    _, pullback = group_norm_vjp(x, num_groups=3)
    first = pullback(dy).x.copy()
    kept = pullback(dy).x
    dy[...] = 0
    np.testing.assert_array_equal(kept, first)


@pytest.mark.parametrize("implementation", [None, "portable"])
def test_gradients_do_not_change_with_parameters_and_masks(implementation, rng):
    """The pullback uses the values of the call."""
    x, dy = draw(rng, 0), rng.normal(size=SHAPE).astype(np.float32)
    scale, bias = rng.normal(size=(2, SHAPE[-1])).astype(np.float32)
    mask = rng.random((*SHAPE[:-1], 1)) < 0.7
    want = oracle.group_norm_gradients(x, dy, scale, bias, num_groups=3, mask=mask)
    _, pullback = group_norm_vjp(
        x, scale, bias, num_groups=3, mask=mask, implementation=implementation
    )
    scale *= 3
    bias += 1
    mask[...] = True
    assert_gradients(pullback(dy), want, rtol=GRADIENT)


def test_read_only_broadcast_input(rng):
    """A broadcast array has stride 0 and is read-only: twelve equal channels."""
    column = rng.normal(size=(2, 9, 10, 1)).astype(np.float32)
    x = np.broadcast_to(column, SHAPE)
    y = group_norm(x, num_groups=3)
    assert_close(y, oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)


def test_memory_mapped_input(tmp_path, rng):
    x = draw(rng)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert_close(
        group_norm(mapped, num_groups=3), oracle.group_norm(x, num_groups=3), tolerance=CONTRACT
    )


@pytest.mark.parametrize(
    "scale",
    [np.ones(8, "f")[::-1], np.ones(8, ">f4"), np.ones(16)[::2], np.ones(8)],
    ids=["reversed", "big-endian", "strided", "float64"],
)
def test_host_parameters_of_every_layout_work_with_every_library(quick_backend, scale, rng):
    x = rng.normal(size=(2, 9, 8)).astype(np.float32)
    y = group_norm(quick_backend.asarray(x), scale, num_groups=2)
    want = oracle.group_norm(x, scale, num_groups=2)
    np.testing.assert_allclose(quick_backend.to_numpy(y), want, atol=5e-6)


@pytest.mark.needs("torch")
class TestTorch:
    """PyTorch's memory formats and views."""

    @staticmethod
    def channels_last(x):
        torch = importlib.import_module("torch")
        given = torch.from_numpy(x).contiguous(memory_format=torch.channels_last)
        assert not given.is_contiguous()
        return given

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("fast", [True, False], ids=["fast", "two-pass"])
    def test_channels_last_memory_format(self, fast, compiled, rng):
        """The values do not depend on it, and the result has it too."""
        torch = importlib.import_module("torch")
        row = ROWS["torch:compile"] if compiled else ROWS["torch"]
        call = row.compiled(
            lambda x: group_norm(x, num_groups=4, feature_axis=1, use_fast_variance=fast)
        )
        noise = rng.normal(size=(2, 16, 21, 22))
        try:
            for offset in (0, 1e2, 1e3, 1e4, 1e5):
                x = (offset + noise).astype(np.float32)
                y = call(self.channels_last(x))
                assert y.is_contiguous(memory_format=torch.channels_last)
                reference = oracle.group_norm(x, num_groups=4, feature_axis=1)
                assert_close(y.numpy(), reference, tolerance=CONTRACT)
        finally:
            torch._dynamo.reset()

    def test_the_memory_format_changes_nothing(self, rng):
        """torch: errors of 1.2e3 in channels_last at an offset of 1e4."""
        torch = importlib.import_module("torch")
        x = torch.from_numpy((rng.normal(size=(2, 8, 10, 10)) + 1e4).astype(np.float32))
        want = oracle.group_norm(x.numpy(), num_groups=4, feature_axis=1)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            given = x.contiguous(memory_format=memory_format)
            y = group_norm(given, num_groups=4, feature_axis=1)
            assert_close(y.numpy(), want, tolerance=CONTRACT)

    @pytest.mark.parametrize("how", ["vjp", "autograd"])
    def test_channels_last_gradients(self, how, rng):
        torch = importlib.import_module("torch")
        x, dy = rng.normal(size=(2, 2, 16, 21, 22)).astype(np.float32)
        scale, bias = rng.uniform(0.5, 1.5, size=(2, 16)).astype(np.float32)
        given = [self.channels_last(x), torch.from_numpy(scale), torch.from_numpy(bias)]
        keywords = {"num_groups": 4, "feature_axis": 1}
        if how == "vjp":
            grads = group_norm_vjp(*given, **keywords)[1](self.channels_last(dy))
        else:
            leaves = [a.requires_grad_() for a in given]
            y = group_norm(*leaves, **keywords)
            grads = oracle.Gradients(*torch.autograd.grad(y, leaves, self.channels_last(dy)))
        got = oracle.Gradients(*(g.numpy() for g in (grads.x, grads.scale, grads.bias)))
        want = oracle.group_norm_gradients(x, dy, scale, bias, **keywords)
        assert_gradients(got, want, rtol=GRADIENT)

    def test_expanded_and_transposed_tensors(self, rng):
        torch = importlib.import_module("torch")
        x = torch.from_numpy(rng.normal(size=(2, 30, 12)).astype(np.float32))
        views = {
            "expanded": x[:, :, :1].expand(2, 30, 12),
            "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
            "strided": x.repeat_interleave(3, dim=1)[:, ::3],
            "offset": torch.cat([x, x])[1:3],
        }
        for name, view in views.items():
            y = group_norm(view, num_groups=3)
            reference = oracle.group_norm(view.numpy(), num_groups=3)
            assert_close(y.numpy(), reference, tolerance=CONTRACT)
            assert y.shape == view.shape, name

    def test_tensors_under_no_grad_and_inference_mode(self, rng):
        torch = importlib.import_module("torch")
        x = rng.normal(size=(2, 30, 12)).astype(np.float32)
        reference = oracle.group_norm(x, num_groups=3)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = group_norm(torch.from_numpy(x).requires_grad_(), num_groups=3)
            assert not y.requires_grad
            assert_close(y.numpy(), reference, tolerance=CONTRACT)

    def test_conjugate_views(self, rng):
        torch = importlib.import_module("torch")
        x = (rng.normal(size=(2, 30, 12)) + 1j * rng.normal(size=(2, 30, 12))).astype(np.complex64)
        y = group_norm(torch.from_numpy(x).conj(), num_groups=3)
        assert_close(
            y.resolve_conj().numpy(), oracle.group_norm(x.conj(), num_groups=3), tolerance=CONTRACT
        )


@pytest.mark.needs("dask")
def test_dask_stays_lazy_and_chunked(rng):
    """Chunks split groups, positions and the batch; nothing is computed before `compute`."""
    dask_array = importlib.import_module("dask.array")
    dask = importlib.import_module("dask")
    x = draw(rng)

    def refuse(*args, **kwargs):
        raise AssertionError("computed while the graph was built")

    given = dask_array.from_array(x, chunks=(1, 4, 10, 5))
    with dask.config.set(scheduler=refuse):
        y = group_norm(given, num_groups=3)
    assert_close(y.compute(), oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)


@pytest.mark.needs("dask")
@pytest.mark.parametrize("masked", [False, True])
def test_empty_dask_chunks(masked, rng):
    from_array = importlib.import_module("dask.array").from_array
    x, dy = (rng.normal(size=(2, 9, 8)).astype(np.float32) for _ in range(2))
    mask = rng.random((2, 9, 1)) < 0.7 if masked else None
    chunks = ((0, 2), (4, 0, 3, 2), (5, 3, 0))
    given, cotangent = (from_array(a, chunks=chunks) for a in (x, dy))
    y, pullback = group_norm_vjp(given, num_groups=4, mask=mask)
    want = oracle.group_norm(x, num_groups=4, mask=mask)
    assert_close(y.compute(), want, tolerance=CONTRACT)
    gradients = oracle.group_norm_gradients(x, dy, None, None, num_groups=4, mask=mask)
    assert_gradient(pullback(cotangent).x.compute(), gradients.x, rtol=GRADIENT)
    # Arrays without elements, in empty chunks.
    for empty in (given[:, 4:4], given[:0]):
        y, pullback = group_norm_vjp(empty, num_groups=4)
        assert y.compute().shape == pullback(empty).x.compute().shape == empty.shape


@pytest.mark.needs("dask")
@pytest.mark.parametrize("axis", [0, 1, 2], ids=["batch", "positions", "channels"])
@pytest.mark.parametrize("which", ["x", "dy", "mask", "scale", "bias"])
def test_empty_dask_chunks_of_one_argument(which, axis, rng):
    """Whatever is done to x on the way in is done to all other arrays."""
    from_array = importlib.import_module("dask.array").from_array
    host = {name: rng.normal(size=(2, 1, 8)).astype(np.float32) for name in ("x", "dy")}
    host["mask"] = rng.random((2, 1, 8)) < 0.8
    host |= {name: rng.normal(size=8).astype(np.float32) for name in ("scale", "bias")}
    given = {name: from_array(a) for name, a in host.items()}
    chunks = [(n,) for n in host[which].shape]
    axis = min(axis, len(chunks) - 1)
    chunks[axis] = (0, *chunks[axis], 0)
    given[which] = from_array(host[which], chunks=tuple(chunks))
    dy, cotangent = host.pop("dy"), given.pop("dy")
    y, pullback = group_norm_vjp(**given, num_groups=2)
    assert_close(y.compute(), oracle.group_norm(**host, num_groups=2), tolerance=2 * CONTRACT)
    want = oracle.group_norm_gradients(dy=dy, **host, num_groups=2)
    for got, reference in zip(pullback(cotangent), want, strict=True):
        assert got.shape == reference.shape
        assert_gradient(got.compute(), reference, rtol=2 * GRADIENT)


@pytest.mark.needs("dask")
@pytest.mark.parametrize("field", GroupStatistics._fields)
def test_empty_dask_chunks_of_statistics(field, rng):
    dask_array = importlib.import_module("dask.array")
    x = rng.normal(size=(2, 9, 8)).astype(np.float32)
    given = dask_array.from_array(x)
    parts = [group_statistics(part, num_groups=4) for part in (given[:, :4], given[:, 4:])]
    chunked = getattr(parts[1], field).rechunk(((2, 0), (0, 4)))
    parts[1] = parts[1]._replace(**{field: chunked})
    merged = merge_statistics(*parts)
    merged = merged._replace(**{field: getattr(merged, field).rechunk(((0, 2), (4, 0)))})
    y = normalize(given, merged, num_groups=4)
    assert_close(y.compute(), oracle.group_norm(x, num_groups=4), tolerance=CONTRACT)


@pytest.mark.needs("dask")
@pytest.mark.parametrize("argument", ["x", "mask"])
def test_unknown_dask_chunk_sizes_raise(argument, rng):
    dask_array = importlib.import_module("dask.array")
    x = draw(rng)
    given = {"x": dask_array.from_array(x, chunks=(1, 4, 10, 5))}
    given["mask"] = dask_array.ones((len(x), 1, 1, 1), dtype=bool, chunks=1)
    # The number of samples of the result is the number of True values, which Dask does not know.
    given[argument] = given[argument][given["x"][:, 0, 0, 0] > -np.inf]
    call = functools.partial(group_norm, num_groups=3)
    rule = rf"^{argument} has shape \(nan, .*{argument}.compute_chunk_sizes\(\)"
    with pytest.raises(ArgumentValueError, match=rule):
        call(**given)
    given[argument].compute_chunk_sizes()
    assert_close(call(**given).compute(), oracle.group_norm(x, num_groups=3), tolerance=CONTRACT)
