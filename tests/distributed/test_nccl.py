"""CuPy arrays pooled by NCCL: the arguments it receives without a GPU; results with one or two.

The CuPy package is the real one in all cases; NCCL is installed with a GPU's other libraries.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import time
import types
import warnings
from pathlib import Path

import cupy
import numpy as np
import pytest

from groupnorm import GroupNorm, bind_axis, group_norm, group_norm_vjp
from groupnorm.dispatch import adapter_named
from groupnorm.errors import AxisNameError
from groupnorm.testing import oracle
from tests.cupy.test_cupy import count_devices, on_gpu
from tests.portable.test_dtypes import assert_rounded
from tests.rows import CONTRACT, CONTRACT_64, GRADIENT, assert_close, assert_gradient
from tests.sharding import cases, check, data

CHANNELS, GROUPS = 8, 4
SECONDS = 240
# NCCL's own constants.
FLOAT32, FLOAT64, SUM = 7, 8, 0
STREAM = 1234


# Without a GPU ------------------------------------------------------------------------------------


class MissingMethod:
    """Not a communicator: it has no allReduce."""

    def rank_id(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@pytest.mark.parametrize("wrong", [object(), 3, MissingMethod(), np.ones(3), cupy.cuda])
@pytest.mark.parametrize("how", ["itself", "by name", "in a tuple"])
def test_something_else_than_a_communicator_raises(wrong, how):
    with bind_axis(wrong=wrong):
        axis_name = {"itself": wrong, "by name": "wrong", "in a tuple": (FakeNccl([]), wrong)}[how]
        with pytest.raises(AxisNameError) as caught:
            adapter_named("cupy").replicas(axis_name)
    given = (f"axis_name={wrong!r}", type(wrong).__name__)
    for part in (*given, "NcclCommunicator", "cupyx.distributed", "bind_axis"):
        assert part in str(caught.value)


def test_unbound_name():
    with pytest.raises(AxisNameError, match=r"axis_name='rows' is not bound.*bind_axis\(rows="):
        adapter_named("cupy").replicas("rows")


class FakeNccl:
    """A communicator of two ranks in host memory; the other rank's values are given."""

    def __init__(self, others: list[np.ndarray], rank: int = 1) -> None:
        self.others, self.rank, self.calls = others, rank, []

    def rank_id(self) -> int:
        return self.rank

    def size(self) -> int:
        return 2

    def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
        """Add in memory order, as NCCL does."""
        number = {FLOAT32: ctypes.c_float, FLOAT64: ctypes.c_double}[datatype]
        other = self.others[len(self.calls)]
        # First, because the code below reads and writes at raw addresses.
        assert (other.dtype, other.size) == (np.dtype(number), count)
        mine, total = (
            np.ctypeslib.as_array((number * count).from_address(a)) for a in (sendbuf, recvbuf)
        )
        total[:] = mine + other.ravel()
        self.calls.append((op, stream))


class FakeArray(np.ndarray):
    """An array in host memory with CuPy's attributes for its address."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    @property
    def device(self):
        return contextlib.nullcontext()


@pytest.fixture
def host_memory(monkeypatch):
    """Patch the CuPy functions that the adapter needs for a sum to work on the host."""
    fake = types.SimpleNamespace(NCCL_FLOAT32=FLOAT32, NCCL_FLOAT64=FLOAT64, NCCL_SUM=SUM)
    monkeypatch.setattr(cupy.cuda, "nccl", fake, raising=False)

    def on_host(function):
        return lambda *a, **k: function(*a, **k).view(FakeArray)

    for function in (np.ascontiguousarray, np.empty):
        monkeypatch.setattr(cupy, function.__name__, on_host(function))
    stream = types.SimpleNamespace(ptr=STREAM)
    monkeypatch.setattr(cupy.cuda, "get_current_stream", lambda: stream)


LAYOUTS = {
    "in order": np.ascontiguousarray,
    "Fortran order": np.asfortranarray,
    "permuted": lambda a: np.ascontiguousarray(a.transpose(1, 2, 0)).transpose(2, 0, 1),
    "strided": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "backwards": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "empty": lambda a: a[:0],
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "cupyx.distributed"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.usefixtures("host_memory")
def test_arguments_of_nccl(dtype, layout, wrapped, rng):
    """NCCL adds the elements in memory order, on the stream that it receives."""
    mine, other = rng.normal(size=(2, 3, 4, 5)).astype(dtype)
    mine, other = LAYOUTS[layout](mine), LAYOUTS[layout](other)
    nccl = FakeNccl([other])
    communicator = types.SimpleNamespace(_comm=nccl) if wrapped else nccl
    replicas = adapter_named("cupy").replicas(communicator)
    assert (replicas.index, replicas.size) == (1, 2)
    before = mine.copy()
    total = replicas.add(mine.view(FakeArray))
    assert nccl.calls == [(SUM, STREAM)]
    assert total.dtype == dtype
    np.testing.assert_array_equal(total, mine + other)
    np.testing.assert_array_equal(mine, before)


@pytest.mark.usefixtures("host_memory")
def test_two_communicators_in_turn(rng):
    """Rank (1, 0) of a grid of two rows and two columns."""
    mine, below, right = rng.normal(size=(3, 2, 4)).astype(np.float32)
    rows, columns = FakeNccl([below]), FakeNccl([right], rank=0)
    with bind_axis(rows=rows, columns=columns):
        replicas = adapter_named("cupy").replicas(("rows", "columns"))
    assert (replicas.index, replicas.size) == (2, 4)
    np.testing.assert_array_equal(replicas.add(mine.view(FakeArray)), mine + below + right)


# One GPU ------------------------------------------------------------------------------------------


class Wrapped:
    """Wraps a communicator as the objects returned by cupyx.distributed do."""

    def __init__(self, communicator) -> None:
        self._comm = communicator


def load_nccl():
    """Import NCCL's module, which warns if the library is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    if not nccl.available:
        pytest.skip("NCCL is not installed: pip install nvidia-nccl-cu13")
    return nccl


@pytest.fixture(params=["bare", "cupyx.distributed"])
def alone(request):
    """Yield a communicator of one rank."""
    nccl = load_nccl()
    communicator = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    yield communicator if request.param == "bare" else Wrapped(communicator)
    communicator.destroy()


@on_gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("offset", [0, 1e3])
def test_one_rank_pools_its_own_data(alone, offset, fast, masked, rng):
    x, dy = rng.normal(size=(2, 3, 40, CHANNELS)).astype(np.float32)
    x += np.float32(offset)
    scale, bias = rng.normal(size=(2, CHANNELS)).astype(np.float32)
    mask = rng.random((3, 40, 1)) < 0.7 if masked else None
    arrays = [cupy.asarray(a) for a in (x, scale, bias)]
    keywords = {"num_groups": GROUPS, "use_fast_variance": fast, "mask": mask}
    plain, plain_pullback = group_norm_vjp(*arrays, **keywords)
    for _ in range(2):  # the second call does not check again that all ranks agree
        y, pullback = group_norm_vjp(*arrays, axis_name=alone, **keywords)
        forward = group_norm(*arrays, axis_name=alone, **keywords)
        assert isinstance(y, cupy.ndarray)
        assert y.device == arrays[0].device
        for result in (y, forward):
            assert_close(result.get(), plain.get().astype(np.float64), tolerance=CONTRACT)
        got = pullback(cupy.asarray(dy))
        for one, other in zip(got, plain_pullback(cupy.asarray(dy)), strict=True):
            assert_gradient(one.get(), other.get().astype(np.float64), rtol=GRADIENT)
    oracle_keywords = {"num_groups": GROUPS, "mask": mask}
    want = oracle.group_norm(x, scale, bias, **oracle_keywords)
    assert_close(y.get(), want, tolerance=2 * CONTRACT)
    want = oracle.group_norm_gradients(x, dy, scale, bias, **oracle_keywords)
    assert_gradient(got.x.get(), want.x, rtol=1e-4 if offset else GRADIENT)


@on_gpu
@pytest.mark.parametrize("dtype", ["float16", "float64", "complex64"])
def test_one_rank_of_other_dtypes(alone, dtype, rng):
    x = rng.normal(size=(3, 40, CHANNELS))
    x = (x + 1j * rng.normal(size=x.shape) if dtype == "complex64" else x).astype(dtype)
    y = group_norm(cupy.asarray(x), num_groups=GROUPS, axis_name=alone)
    assert y.dtype == dtype
    want = oracle.group_norm(x, num_groups=GROUPS)
    if dtype == "float16":
        assert_rounded(y.get(), want, dtype)
    else:
        assert_close(y.get(), want, tolerance=CONTRACT_64 if dtype == "float64" else CONTRACT)


@on_gpu
def test_one_rank_by_name_with_groups_and_out_of_order(alone, rng):
    layer = GroupNorm(
        (CHANNELS, ...),
        num_groups=GROUPS,
        feature_axis=0,
        backend="cupy",
        axis_name="ranks",
        axis_index_groups=[[0]],
    )
    x, dy = rng.normal(size=(2, 3, CHANNELS, 40)).astype(np.float32)
    given = cupy.asfortranarray(cupy.asarray(x))
    with bind_axis(ranks=alone):
        y, pullback = layer.vjp(given)
    assert_close(
        y.get(), oracle.group_norm(x, num_groups=GROUPS, feature_axis=1), tolerance=CONTRACT
    )
    want = oracle.group_norm_gradients(x, dy, num_groups=GROUPS, feature_axis=1)
    # After the binding has ended: the pullback does not need it.
    assert_gradient(pullback(cupy.asarray(dy)).x.get(), want.x, rtol=GRADIENT)
    with pytest.raises(AxisNameError, match="'ranks' is not bound"):
        layer(given)


# Two GPUs -----------------------------------------------------------------------------------------


def compute_shard(rank: int, unique_id, folder: str) -> None:
    """Run one of two ranks, in a separate process: write its results for every case."""
    nccl = load_nccl()
    with cupy.cuda.Device(rank):
        communicator = nccl.NcclCommunicator(2, unique_id, rank)
        for number, case in enumerate(cases(2)):
            whole = data(case)
            x, dy = (cupy.asarray(case.split(a)[rank]) for a in (whole.x, whole.dy))
            mask = None if whole.mask is None else case.split(whole.mask)[rank]
            y, pullback = group_norm_vjp(
                x,
                whole.scale,
                whole.bias,
                mask=mask,
                axis_name=communicator,
                axis_index_groups=case.groups_as_lists,
                **case.keywords,
            )
            gradients = pullback(dy)
            results = {"y": y.get(), "dx": gradients.x.get()}
            for name, gradient in (("dscale", gradients.scale), ("dbias", gradients.bias)):
                results[name] = gradient.get().astype(np.float64)
            np.savez(Path(folder) / f"{number}.{rank}.npz", **results)


@on_gpu
@pytest.mark.slow
@pytest.mark.skipif(count_devices() < 2, reason="fewer than two GPUs that CuPy can use")
def test_two_ranks_equal_the_whole(tmp_path, subtests):
    unique_id = load_nccl().get_unique_id()
    processes = multiprocessing.get_context("spawn")
    ranks = [
        processes.Process(target=compute_shard, args=(rank, unique_id, str(tmp_path)))
        for rank in range(2)
    ]
    deadline = time.monotonic() + SECONDS
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(max(0.1, deadline - time.monotonic()))
        assert [rank.exitcode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.kill()
                rank.join()
    for number, case in enumerate(cases(2)):
        with subtests.test(case.name):
            shards = [np.load(tmp_path / f"{number}.{rank}.npz") for rank in range(2)]
            y, dx = (np.concatenate([s[k] for s in shards], axis=1) for k in ("y", "dx"))
            check(case, y, dx, *(sum(s[k] for s in shards) for k in ("dscale", "dbias")))
