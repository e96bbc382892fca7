"""`bind_axis`: names for communicators, and what happens without them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from groupnorm import GroupNorm, bind_axis, group_norm
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, AxisNameError


class Alone:
    """A communicator of one rank, as NumPy's adapter asks for it."""

    is_inter = False

    def __init__(self):
        self.attributes = {}

    def Allreduce(self, sent, received):
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


def test_one_rank_is_the_whole(x):
    with bind_axis(rows=Alone()):
        np.testing.assert_allclose(pooled(x), group_norm(x, num_groups=2), atol=1e-6)


def test_a_call_binds_until_it_is_unbound(x):
    binding = bind_axis(rows=Alone())
    pooled(x)
    binding.unbind()
    binding.unbind()
    with pytest.raises(AxisNameError, match="'rows' is not bound"):
        pooled(x)


def test_a_context_restores_what_was_bound_before(x):
    outer, inner = Alone(), Alone()
    with bind_axis(rows=outer):
        with bind_axis(rows=inner):
            pooled(x)
            assert inner.attributes
            assert not outer.attributes
        pooled(x)
        assert outer.attributes
    with pytest.raises(AxisNameError):
        pooled(x)


def test_an_error_inside_unbinds(x):
    with pytest.raises(ZeroDivisionError), bind_axis(rows=Alone()):
        raise ZeroDivisionError
    with pytest.raises(AxisNameError):
        pooled(x)


def test_the_error_says_what_is_bound(x):
    with (
        bind_axis(columns=Alone()),
        pytest.raises(AxisNameError, match=r"'rows'.*'columns'.*bind_axis\(rows=group\)"),
    ):
        pooled(x)


@pytest.mark.parametrize("value", [None, "rows"])
def test_no_communicator(value):
    with pytest.raises(ArgumentTypeError, match=f"rows={value!r} is no communicator"):
        bind_axis(rows=value)


def test_nothing_to_bind():
    with pytest.raises(ArgumentValueError, match="no name"):
        bind_axis()
    with pytest.raises(ArgumentTypeError, match="no DeviceMesh with named dimensions"):
        bind_axis(object())


def test_a_communicator_of_another_kind(x):
    with bind_axis(rows=object()), pytest.raises(AxisNameError, match=r"mpi4py\.MPI\.Intracomm"):
        pooled(x)
    with pytest.raises(AxisNameError, match="names no axis"):
        group_norm(x, num_groups=2, axis_name=())


def test_a_layer_with_a_name_is_copied_and_pickled(x):
    layer = GroupNorm(4, num_groups=2, axis_name="rows")
    assert "axis_name='rows'" in repr(layer)
    with bind_axis(rows=Alone()):
        want = layer(x)
        for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            np.testing.assert_array_equal(same(x), want)


def test_a_pullback_outlives_its_binding(x, rng):
    layer = GroupNorm(4, num_groups=2, axis_name="rows")
    dy = rng.normal(size=x.shape).astype(np.float32)
    with bind_axis(rows=Alone()):
        _, pullback = layer.vjp(x)
    _, alone = GroupNorm(4, num_groups=2).vjp(x)
    np.testing.assert_allclose(pullback(dy).x, alone(dy).x, atol=1e-5)


@pytest.mark.needs("torch")
def test_numpy_and_torch_want_communicators_of_their_own(x):
    import torch

    with bind_axis(rows=Alone()), pytest.raises(AxisNameError, match="ProcessGroup"):
        pooled(torch.from_numpy(x))
