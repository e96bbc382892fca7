"""The plan: all decisions that depend on shapes, in plain ints, without an array library."""

import math
import pickle
import subprocess
import sys

import pytest

from groupnorm.errors import ArgumentValueError
from groupnorm.plan import make_plan


def plan(shape, feature=(-1,), groups=2, size=None, reduction=None, *, sampled=False, static=True):
    return make_plan(
        shape, feature, groups, size, reduction, sampled=sampled, static=static, blocked=static
    )


# shape, feature axes, reduction axes -> the work shape with its channels split into groups, and the
# lengths of its kept axes and of its reduced axes other than the features.
WORK_SHAPES = [
    ((8, 5, 7, 64), (-1,), None, (8, 35, 2, 32), (8,), (35,)),
    ((8, 64, 5, 7), (1,), None, (8, 2, 32, 35), (8,), (35,)),
    ((64,), (0,), None, (2, 32), (), ()),
    ((5, 64), (-1,), None, (5, 2, 32), (5,), ()),
    ((64, 5), (0,), None, (2, 32, 5), (), (5,)),
    ((2, 3, 4, 6), (-1,), (-1,), (24, 2, 3), (24,), ()),
    ((2, 3, 4, 6), (-1,), (0, -1), (2, 12, 2, 3), (12,), (2,)),
    ((2, 3, 4, 6), (-1,), (0, 2, -1), (2, 3, 4, 2, 3), (3,), (2, 4)),
    ((2, 3, 4, 6), (2, 3), None, (2, 3, 2, 12), (2,), (3,)),
    ((2, 3, 4, 6), (0, 1), None, (2, 3, 24), (), (24,)),
]


@pytest.mark.parametrize(
    ("shape", "feature", "reduction", "grouped", "kept", "positions"), WORK_SHAPES
)
def test_adjacent_axes_of_one_kind_are_merged(shape, feature, reduction, grouped, kept, positions):
    made = plan(shape, feature, reduction=reduction)
    assert made.grouped(made.work_shape) == grouped
    assert tuple(made.work_shape[a] for a in made.kept) == kept
    assert tuple(made.work_shape[a] for a in made.positions) == positions
    assert made.permutation is None
    assert math.prod(made.work_shape) == math.prod(shape)
    assert made.ungrouped(made.grouped(made.work_shape)) == made.work_shape


@pytest.mark.parametrize("feature", [(1, 3), (0, 2), (0, 3), (0, 1, 3)])
def test_separated_feature_axes_are_brought_together(feature):
    shape = (2, 3, 4, 6)
    made = plan(shape, feature)
    at = [made.permutation.index(a) for a in feature]
    assert at == list(range(at[0], at[0] + len(feature)))
    assert made.permuted_shape == tuple(shape[a] for a in made.permutation)
    back = tuple(made.permuted_shape[a] for a in made.inverse_permutation)
    assert back == shape
    assert made.feature_shape == tuple(shape[a] for a in feature)


def test_adjacent_feature_axes_need_no_permutation():
    assert plan((2, 3, 4, 6), (3, 2)).permutation is None


@pytest.mark.parametrize(
    ("groups", "size", "want"), [(2, None, (2, 6)), (None, 2, (6, 2)), (12, None, (12, 1))]
)
def test_group_counts_and_sizes(groups, size, want):
    for positions in (5, 50):
        made = plan((3, positions, 12), groups=groups, size=size)
        grouped = made.grouped(made.work_shape)
        assert grouped == (3, positions, *want)
        assert grouped[made.members] == want[1]
        assert made.group_count == positions * want[1]


def test_every_element_is_counted_once():
    for shape, feature, reduction, grouped, kept, _ in WORK_SHAPES:
        made = plan(shape, feature, reduction=reduction)
        assert made.group_count * 2 * math.prod(kept) == math.prod(grouped)
        assert made.inner_count == math.prod(made.work_shape[a] for a in made.inner)


@pytest.mark.parametrize(
    "shape", [(2, 100, 100, 64), (2, 64, 10_000), (1, 1 << 20, 8), (3, 4097, 2)]
)
def test_the_size_of_the_pivot_sample(shape):
    """At least sqrt(n) elements: one outlier in the sample moves the pivot by at most one sigma."""
    feature = (1,) if shape[1] == 64 else (-1,)
    made = plan(shape, feature, sampled=True)
    lengths = [len(range(*s.indices(n))) for s, n in zip(made.sample, made.work_shape, strict=True)]
    taken = math.prod(lengths[a] for a in made.inner)
    assert max(64, math.sqrt(made.inner_count)) <= taken <= made.inner_count / 2
    kept_whole = [a for a in range(len(lengths)) if a not in made.inner]
    assert all(lengths[a] == made.work_shape[a] for a in kept_whole)


def test_small_arrays_and_dynamic_shapes_have_no_pivot_sample():
    assert plan((2, 100, 8), sampled=True).sample is None
    assert plan((2, 100, 100, 8), sampled=True, static=False).sample is None
    assert plan((2, 100, 100, 8)).sample is None


# A mask's shape for x of shape (3, 4, 5, 6), and its work shape, where channels form one axis.
MASK_SHAPES = [
    ((), (1, 1, 1)),
    ((6,), (1, 1, 6)),
    ((4, 5, 1), (1, 20, 1)),
    ((4, 1, 1), (1, 20, 1)),
    ((3, 1, 1, 1), (3, 1, 1)),
    ((3, 4, 5, 6), (3, 20, 6)),
]


@pytest.mark.parametrize(("given", "work"), MASK_SHAPES)
def test_masks_are_expanded_only_where_necessary(given, work):
    full, broadcast, shape = plan((3, 4, 5, 6)).mask_shapes(given)
    assert shape == work
    assert math.prod(broadcast) == math.prod(work)
    assert full[4 - len(given) :] == given


@pytest.mark.parametrize("given", [(3,), (5, 6, 1), (1, 3, 4, 5, 6), (2, 1, 1, 1), (3, 4, 5, 0)])
def test_masks_that_do_not_broadcast(given):
    with pytest.raises(ArgumentValueError, match="does not broadcast"):
        plan((3, 4, 5, 6)).mask_shapes(given)


def test_a_mask_of_an_empty_array_may_be_empty():
    assert plan((3, 0, 6)).mask_shapes((3, 0, 1))[2] == (3, 0, 1, 1)


def test_empty():
    assert plan((3, 0, 6)).empty
    assert plan((0, 5, 6)).empty
    assert not plan((3, 5, 6)).empty


def test_plans_are_hashable_and_comparable():
    """They are hashable and comparable, so that equal layers share a compiler's cached program."""
    made = plan((3, 4, 5, 6), sampled=True)
    again = pickle.loads(pickle.dumps(made))
    assert made == again
    assert hash(plan((3, 4, 5, 6))) == hash(plan((3, 4, 5, 6)))


def test_planning_loads_no_array_library():
    """Only the package's own requirements are loaded."""
    code = (
        "import sys; import groupnorm.plan as p; "
        "p.make_plan((4, 6), (-1,), 2, None, None, sampled=False, static=True, blocked=True)"
    )
    heavy = ["jax", "torch", "cupy", "dask", "numba"]
    code += (
        f"; found = [m for m in {heavy} if m in sys.modules]; sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
