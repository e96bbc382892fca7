"""`bind_axis`: names for communicators, and calls with unbound names."""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from groupnorm import GroupNorm, bind_axis, group_norm, group_norm_vjp, group_statistics
from groupnorm.dispatch import adapter_named
from groupnorm.distributed.replicas import Replicas, Signature
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, AxisNameError
from groupnorm.portable.collectives import gather_checked
from groupnorm.testing import oracle
from tests import ROOT
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient


class SingleRank:
    """A communicator of one rank, with the interface NumPy's adapter requires."""

    is_inter = False

    def __init__(self):
        self.attributes = {}
        self.calls = 0

    def Allreduce(self, sent, received):
        self.calls += 1
        received[...] = sent

    def Get_rank(self):
        return 0

    def Get_size(self):
        return 1

    @staticmethod
    def Create_keyval():
        return 0

    def Get_attr(self, key):
        return self.attributes.get(key)

    def Set_attr(self, key, value):
        self.attributes[key] = value


@pytest.fixture
def x(rng):
    return rng.normal(size=(2, 5, 4)).astype(np.float32)


def pooled(x):
    return group_norm(x, num_groups=2, axis_name="rows")


def stands_for(name, x, *choices):
    """Return which of the communicators a name is bound to."""
    before = [choice.calls for choice in choices]
    group_norm(x, num_groups=2, axis_name=name)
    (found,) = (c for c, calls in zip(choices, before, strict=True) if c.calls > calls)
    return found


def assert_not_bound(name, x):
    with pytest.raises(AxisNameError, match=f"{name!r} is not bound"):
        group_norm(x, num_groups=2, axis_name=name)


def test_one_rank_pools_its_own_data(x):
    with bind_axis(rows=SingleRank()):
        np.testing.assert_allclose(pooled(x), group_norm(x, num_groups=2), atol=1e-6)


def test_a_call_binds_until_unbind(x):
    binding = bind_axis(rows=SingleRank())
    pooled(x)
    binding.unbind()
    binding.unbind()
    with pytest.raises(AxisNameError, match="'rows' is not bound"):
        pooled(x)


def test_a_context_restores_the_previous_binding(x):
    outer, inner = SingleRank(), SingleRank()
    with bind_axis(rows=outer):
        with bind_axis(rows=inner):
            pooled(x)
            assert inner.attributes
            assert not outer.attributes
        pooled(x)
        assert outer.attributes
    with pytest.raises(AxisNameError):
        pooled(x)


def test_a_second_unbind_keeps_later_bindings(x):
    first, second = SingleRank(), SingleRank()
    binding = bind_axis(rows=first)
    binding.unbind()
    with bind_axis(rows=second):
        binding.unbind()
        assert stands_for("rows", x, first, second) is second


@pytest.mark.parametrize("same", [False, True], ids=["two", "one twice"])
def test_unbinding_in_the_order_of_binding(same, x):
    """Released bindings do not come back, and the remaining ones stay."""
    first = SingleRank()
    second = first if same else SingleRank()
    # A separate name: if it stayed bound, it would be bound in all following tests.
    earlier, later = bind_axis(queue=first), bind_axis(queue=second)
    earlier.unbind()
    assert stands_for("queue", x, *{first, second}) is second
    later.unbind()
    assert_not_bound("queue", x)


def test_names_are_bound_and_unbound_together(x):
    a, b, c = SingleRank(), SingleRank(), SingleRank()
    with bind_axis(columns=c):
        with bind_axis(rows=a, columns=b):
            assert stands_for("rows", x, a, b, c) is a
            assert stands_for("columns", x, a, b, c) is b
        assert_not_bound("rows", x)
        assert stands_for("columns", x, a, b, c) is c


def test_any_string_is_a_valid_name(x):
    a, b = SingleRank(), SingleRank()
    with bind_axis(mesh=a, **{"the rows": b}):
        assert stands_for("mesh", x, a, b) is a
        assert stands_for("the rows", x, a, b) is b


def test_names_of_a_mesh(x):
    dimensions = {"data": SingleRank(), "rows": SingleRank()}

    class Mesh:
        mesh_dim_names = ("data", "rows")

        def __getitem__(self, name):
            return dimensions[name]

    other = SingleRank()
    everything = (*dimensions.values(), other)
    with bind_axis(Mesh(), rows=other, more=dimensions["rows"]):
        assert stands_for("data", x, *everything) is dimensions["data"]
        assert stands_for("rows", x, *everything) is other  # explicit keywords take precedence
        assert stands_for("more", x, *everything) is dimensions["rows"]
    assert_not_bound("data", x)


@pytest.mark.parametrize("several", [tuple, list])
def test_several_names(several, x):
    names = several(("rows", "columns"))
    a, b = SingleRank(), SingleRank()
    with bind_axis(rows=a, columns=b):
        y = group_norm(x, num_groups=2, axis_name=names)
    assert a.calls
    assert b.calls
    assert_close(y, oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)
    with bind_axis(rows=a), pytest.raises(AxisNameError, match="'columns' is not bound"):
        group_norm(x, num_groups=2, axis_name=names)


def test_names_hold_in_all_threads(x):
    """Autograd, for example, runs in its own threads."""
    rows, seen = SingleRank(), []
    with bind_axis(rows=rows):
        thread = threading.Thread(target=lambda: seen.append(stands_for("rows", x, rows)))
        thread.start()
        thread.join(60)
    assert seen == [rows]


def test_an_error_inside_unbinds(x):
    with pytest.raises(ZeroDivisionError), bind_axis(rows=SingleRank()):
        raise ZeroDivisionError
    with pytest.raises(AxisNameError):
        pooled(x)


def test_the_error_lists_the_bound_names(x):
    with (
        bind_axis(columns=SingleRank()),
        pytest.raises(AxisNameError, match=r"'rows'.*'columns'.*bind_axis\(rows=group\)"),
    ):
        pooled(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: group_norm(x, num_groups=2, axis_name="rows"),
        lambda x: group_norm_vjp(x, num_groups=2, axis_name="rows"),
        lambda x: group_statistics(x, num_groups=2, axis_name="rows"),
        GroupNorm(4, num_groups=2, axis_name="rows"),  # created while unbound, as models are
        GroupNorm(4, num_groups=2, axis_name="rows").vjp,
    ],
    ids=["group_norm", "group_norm_vjp", "group_statistics", "layer", "layer.vjp"],
)
def test_a_call_with_an_unbound_name_raises(call, x):
    message = r"axis_name='rows' is not bound \(bound names: .*\).*bind_axis\(rows=group\)"
    with pytest.raises(AxisNameError, match=message):
        call(x)


@pytest.mark.parametrize("value", [None, "rows"])
def test_binding_something_else_than_a_communicator(value):
    with pytest.raises(ArgumentTypeError, match=f"rows={value!r} is not a communicator"):
        bind_axis(rows=value)


@pytest.mark.parametrize("values_readable", [True, False])
def test_ranks_that_exchange_mismatched_statistics(values_readable, monkeypatch):
    """Different statistics of equal size: an error, or NaN where values cannot be read."""
    adapter = adapter_named("numpy")
    mine, theirs = (Signature(shape, "float32", None) for shape in ((2, 4), (4, 2)))
    assert mine.code != theirs.code
    row = np.stack([np.ones((2, 4), np.float32), np.full((2, 4), theirs.code, np.float32)])

    def add(rows):
        rows[1] = row
        return rows

    def exchange(signature):
        replicas = Replicas(0, 2, add, signature=signature)
        return gather_checked((np.zeros((2, 4), np.float32),), adapter, replicas, None)[0]

    if not values_readable:
        monkeypatch.setattr(adapter, "value_if_ready", lambda x: None)
        assert np.isnan(exchange(mine)[1]).all()
    else:
        with pytest.raises(ArgumentValueError, match="on rank 0, and rank 1 exchanges others"):
            exchange(mine)
    np.testing.assert_array_equal(exchange(theirs)[1], 1)


def test_all_names_or_none(x):
    rows = SingleRank()
    with pytest.raises(ArgumentTypeError, match="columns=None is not a communicator"):
        bind_axis(rows=rows, columns=None)
    assert_not_bound("rows", x)


def test_nothing_to_bind():
    with pytest.raises(ArgumentValueError, match="no name"):
        bind_axis()
    for mesh in (object(), "rows", types.SimpleNamespace(mesh_dim_names=None)):
        with pytest.raises(ArgumentTypeError, match="not a DeviceMesh with named dimensions"):
            bind_axis(mesh)


def test_a_communicator_of_another_kind(x):
    with bind_axis(rows=object()), pytest.raises(AxisNameError, match=r"mpi4py\.MPI\.Intracomm"):
        pooled(x)
    with pytest.raises(AxisNameError, match="names no axis"):
        group_norm(x, num_groups=2, axis_name=())


def test_a_layer_with_a_name_is_copied_and_pickled(x):
    layer = GroupNorm(4, num_groups=2, axis_name="rows")
    assert "axis_name='rows'" in repr(layer)
    with bind_axis(rows=SingleRank()):
        want = layer(x)
        for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            np.testing.assert_array_equal(same(x), want)


def test_a_pullback_outlives_its_binding(x, rng):
    layer = GroupNorm(4, num_groups=2, axis_name="rows")
    dy = rng.normal(size=x.shape).astype(np.float32)
    with bind_axis(rows=SingleRank()):
        _, pullback = layer.vjp(x)
    _, alone = GroupNorm(4, num_groups=2).vjp(x)
    np.testing.assert_allclose(pullback(dy).x, alone(dy).x, atol=1e-5)


@pytest.mark.needs("torch")
def test_numpy_and_torch_require_their_own_communicators(x):
    import torch

    with bind_axis(rows=SingleRank()), pytest.raises(AxisNameError, match="ProcessGroup"):
        pooled(torch.from_numpy(x))


@pytest.mark.needs("jax")
def test_jax_uses_only_its_own_axis_names(x):
    import jax

    with bind_axis(rows=SingleRank()):
        with pytest.raises(AxisNameError, match=r"'rows' is not bound here.*jax\.shard_map"):
            pooled(jax.numpy.asarray(x))
        y = jax.vmap(pooled, axis_name="rows")(x[None])[0]
    assert_close(np.asarray(y), oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)


@pytest.mark.needs("array_api_strict")
def test_a_library_without_replicas(x):
    import array_api_strict

    with bind_axis(rows=SingleRank()), pytest.raises(AxisNameError, match="no replicas"):
        pooled(array_api_strict.asarray(x))


@pytest.mark.needs("torch")
def test_a_layer_with_a_name_is_converted(x):
    layer = GroupNorm(4, num_groups=2, axis_name=("rows", "columns"), backend="torch")
    assert "axis_name=('rows', 'columns')" in repr(layer)
    moved = layer.to_backend("numpy")
    assert moved.axis_name == ("rows", "columns")
    with bind_axis(rows=SingleRank(), columns=SingleRank()):
        assert_close(moved(x), oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)


ALONE = """
import sys

import numpy as np
from mpi4py import MPI

from groupnorm import GroupNorm, bind_axis, group_norm_vjp

x, dy = np.load(sys.argv[1])
out = {}
layer = GroupNorm(4, num_groups=2, axis_name="rows")
with bind_axis(rows=MPI.COMM_SELF):
    out["a name"] = layer(x)
    out["the default"] = GroupNorm(4, num_groups=2)(x)
keywords = {"num_groups": 2, "axis_name": MPI.COMM_SELF, "axis_index_groups": [[0]]}
out["y"], pullback = group_norm_vjp(x, **keywords)
out["dx"] = pullback(dy).x
np.savez(sys.argv[2], **out)
"""


@pytest.mark.slow
@pytest.mark.needs("numpy")
def test_a_single_mpi_process(x, rng, tmp_path, pytestconfig):
    """mpi4py's own communicator, in a separate process, because importing it initializes MPI."""
    if pytestconfig.getoption("--backends") != "all" and not importlib.util.find_spec("mpi4py"):
        pytest.skip("--backends excludes mpi4py, and it is not installed")
    dy = rng.normal(size=x.shape).astype(np.float32)
    np.save(tmp_path / "in.npy", np.stack([x, dy]))
    arguments = (tmp_path / "in.npy", tmp_path / "out.npz")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(tmp_path / "out.npz") as out:
        for name in ("a name", "the default", "y"):
            assert out[name].dtype == np.float32
            assert_close(out[name], oracle.group_norm(x, num_groups=2), tolerance=CONTRACT)
        want = oracle.group_norm_gradients(x, dy, num_groups=2)
        assert_gradient(out["dx"], want.x, rtol=GRADIENT)


def test_bindings_are_released_before_modules_are_unloaded():
    """A torch process group that is kept until then aborts the process at exit."""
    code = """if True:
        import atexit, weakref

        class Communicator:
            pass

        communicator = Communicator()
        reference = weakref.ref(communicator)
        # Runs after the handlers that groupnorm registers.
        atexit.register(lambda: print("held" if reference() else "released"))
        from groupnorm import bind_axis

        bind_axis(rows=communicator)
        del communicator
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "released\n"
