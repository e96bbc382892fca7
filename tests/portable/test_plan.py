"""The plan: all decisions that depend on shapes, in plain ints, without an array library."""

import math
import pickle
import subprocess
import sys

import pytest

from groupnorm.errors import ArgumentValueError
from groupnorm.plan import make_plan, make_plan_uncached, resolve_groups, same_shape


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


@pytest.mark.parametrize(
    ("feature", "permutation"),
    [((1, 3), (0, 2, 1, 3)), ((0, 2), (1, 0, 2, 3)), ((0, 1, 3), (2, 0, 1, 3))],
)
def test_feature_axes_are_moved_to_the_last_of_them(feature, permutation):
    assert plan((2, 3, 4, 6), feature).permutation == permutation


def test_adjacent_feature_axes_need_no_permutation():
    assert plan((2, 3, 4, 6), (3, 2)).permutation is None


# shape, feature axes, reduction axes -> roles, kept axes of x, the shapes of parameters and of one
# value per group (grouped; as public statistics; with all kept axes), kept axes before channels.
SHAPES = [
    ((8, 5, 7, 6), (-1,), None, "KPC", {0}, (1, 1, 2, 3), (8, 1, 2, 1), (8, 2), (8, 2), 1),
    ((8, 6, 5, 7), (1,), None, "KCP", {0}, (1, 2, 3, 1), (8, 2, 1, 1), (8, 2), (8, 2), 1),
    ((6, 5), (0,), None, "CP", set(), (2, 3, 1), (2, 1, 1), (2,), (2,), 0),
    ((6,), (0,), None, "C", set(), (2, 3), (2, 1), (2,), (2,), 0),
    ((6, 4, 5), (0,), (0, 1), "CPK", {2}, (2, 3, 1, 1), (2, 1, 1, 5), (5, 2), (2, 5), 0),
    ((4, 5, 6, 7, 9), (2,), (0, 2, 3), "PKCPK", {1, 4},
     (1, 1, 2, 3, 1, 1), (1, 5, 2, 1, 1, 9), (5, 9, 2), (5, 2, 9), 1),
    ((2, 4, 5, 6), (0, 2), (0, 2, 3), "KCP", {1}, (1, 2, 5, 1), (4, 2, 1, 1), (4, 2), (4, 2), 1),
    ((3, 4, 5, 6), (1, 2), (1, 2), "KCK", {0, 3},
     (1, 2, 10, 1), (3, 2, 1, 6), (3, 6, 2), (3, 2, 6), 1),
    ((3, 4, 5, 6), (-1,), (-1,), "KC", {0, 1, 2},
     (1, 2, 3), (60, 2, 1), (3, 4, 5, 2), (3, 4, 5, 2), 3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "feature", "reduction", "roles", "kept", "parameters", "grouped", "public", "among",
     "before"), SHAPES,
)  # fmt: skip
def test_shapes_of_parameters_and_statistics(
    shape, feature, reduction, roles, kept, parameters, grouped, public, among, before
):
    made = plan(shape, feature, reduction=reduction)
    assert made.roles == roles
    assert made.kept_axes == kept
    assert made.parameter_shape == parameters
    assert made.grouped_statistics_shape == grouped
    assert made.statistics_shape == public
    assert made.groups_among_kept == among
    assert made.kept_before == before


def test_few_positions_have_one_stage():
    """From 16 on, channels are measured separately, unless a group is one channel."""
    assert not plan((3, 15, 6)).two_stages
    assert plan((3, 16, 6)).two_stages
    assert plan((3, 16, 4)).two_stages
    assert not plan((3, 50, 6), groups=6).two_stages
    assert plan((3, 2, 6), static=False).two_stages
    made = plan((3, 6, 5), (1,))
    assert (made.work_shape, made.positions, made.inner) == ((3, 2, 3, 5), (3,), (2, 3))
    made = plan((3, 6, 50), (1,))
    assert (made.work_shape, made.positions, made.inner) == ((3, 6, 50), (2,), (2,))


def test_counts_of_symbolic_sizes_are_no_floats():
    assert type(plan((3, 50, 6)).inner_count) is float
    assert type(plan((3, 50, 6), static=False).inner_count) is int


def test_axes_that_stay_separate():
    made = make_plan((2, 3, 4, 5, 6), (3, 4), 2, None, None, sampled=False, merging=False)
    assert made.merged == ((0,), (1,), (2,), (3, 4))
    assert (made.static, made.blocked) == (True, True)


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


# The lengths of one or two axes of positions that do not merge -> the stride along the longest.
STRIDES = [
    ((127,), None), ((128,), None), ((129,), 2), ((191,), 2), ((193,), 3),
    # A divisor of the length would select a single column of an image.
    ((130,), None), ((192,), None), ((225,), 2), ((10_007,), 100), ((10_000,), 99),
    ((25, 17), 3), ((17, 25), 3), ((23, 19), 2), ((21, 20), 2), ((15, 15), None), ((40, 41), 5),
]  # fmt: skip


@pytest.mark.parametrize(("lengths", "stride"), STRIDES, ids=str)
def test_the_stride_of_the_pivot_sample(lengths, stride):
    """At least 64 samples and 8 positions, and a stride coprime to the length."""
    if len(lengths) == 1:
        made = plan((2, *lengths, 6), sampled=True)
        want = (slice(None), slice(None, None, stride), slice(None))
    else:
        a, b = lengths
        made = plan((a, 2, b, 6), reduction=(0, 2, 3), sampled=True)
        steps = (stride if a > b else None, None, stride if b > a else None, None)
        want = tuple(slice(None, None, step) for step in steps)
    assert made.sample == (None if stride is None else want)


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


def test_masks_of_one_stage_have_two_axes_for_channels():
    made = plan((3, 5, 6))
    assert made.mask_shapes((6,))[2] == (1, 1, 2, 3)
    assert made.mask_shapes((5, 6))[2] == (1, 5, 2, 3)
    assert made.mask_shapes((3, 5, 1))[2] == (3, 5, 1, 1)
    assert made.mask_shapes((3, 1, 6))[1] == (3, 1, 6)
    made = plan((3, 6, 5), (1,))
    assert made.mask_shapes((6, 1))[2] == (1, 2, 3, 1)
    assert made.mask_shapes((3, 1, 5))[2] == (3, 1, 1, 5)


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
    assert not plan((3, 1, 2)).empty
    assert plan((3, 0, 6), static=False).empty


# x's shape, keywords, message.
WRONG = [
    ((2, 3, 6), {"feature": (3,)}, r"feature_axis=3 is .*\[-3, 2\]\. Give x at least 4 axes"),
    ((2, 3, 6), {"feature": (-5,)}, r"feature_axis=-5 is .*\[-3, 2\]\. Give x at least 5 axes"),
    ((), {"feature": (0,)}, "Give x at least 1 axes"),
    ((), {"feature": (-1,)}, "Give x at least 1 axes"),
    ((2, 3, 6), {"feature": (-1, 2)}, r"feature_axis=\(-1, 2\) names an axis .* twice"),
    ((2, 3, 6), {"reduction": (1, -3, -2)}, r"reduction_axes=\(1, -3, -2\) names an axis"),
    ((2, 3, 4, 6), {"feature": (2, 3), "reduction": (1,)}, r"the feature axis 2 of .* Add -2\."),
    ((2, 3, 12), {"groups": 5}, "num_groups=5 does not divide the 12 channels.*12, such as 4"),
    ((2, 3, 12), {"groups": 13}, "such as 12"),
    ((2, 3, 12), {"groups": None, "size": 7}, "group_size=7 does not divide .* such as 6"),
    ((2, 3, 7), {"groups": 2}, "such as 1"),
    ((2 * 65537,), {"groups": 65536}, r"Choose a divisor of 131074, such as 2\."),
    ((3 * 65536,), {"groups": 65535}, "such as 65536"),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "keywords", "message"), WRONG, ids=str)
def test_messages_name_the_rule_and_the_fix(shape, keywords, message):
    with pytest.raises(ArgumentValueError, match=message):
        plan(shape, **keywords)


def test_the_first_and_the_last_axis_are_in_range():
    assert plan((6, 3, 2), (-3,)).feature_shape == (6,)
    assert plan((6, 3, 2), (2,)).feature_shape == (2,)


def test_the_lengths_of_feature_axes_may_be_given():
    options = {"sampled": False}
    assert make_plan_uncached((2, 3, 6), (-1,), 2, None, None, (6,), **options).channels == 6
    with pytest.raises(ArgumentValueError, match=r"feature axes of length \(6,\), .* for \(5,\)"):
        make_plan_uncached((2, 3, 6), (-1,), 2, None, None, (5,), **options)


def test_shapes_are_compared_elementwise():
    assert same_shape((), ())
    assert same_shape((1, 2), (1, 2))
    assert not same_shape((1, 2), (1, 3))
    assert not same_shape((1, 2), (1,))


def test_the_number_of_groups():
    assert resolve_groups(12, 3, None) == 3
    assert resolve_groups(12, None, 3) == 4


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
    heavy = ["jax", "torch", "cupy", "dask", "mlx", "groupnorm.backends.kernels.cpu._core"]
    code += (
        f"; found = [m for m in {heavy} if m in sys.modules]; sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
