"""Tiling for GPUs: every element exactly once, within limits, determined by the shape alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupnorm.backends.kernels.gpu import build
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.tiling import (
    MAX_OFFSET,
    SAMPLED,
    SMALL,
    Slabs,
    Tiles,
    power_of_two,
    slabs_of,
    slabs_of_whole_groups,
    tiles_of_small_groups,
    warps_for,
)
from groupnorm.backends.kernels.grouped_shape import GroupedShape

PLAIN = gpu.KernelOptions(1e-6, None, None, True, True)

forms = st.builds(
    GroupedShape,
    samples=st.integers(1, 5),
    groups=st.integers(1, 40),
    group_size=st.one_of(st.integers(1, 40), st.sampled_from([64, 300, 1000, 1280])),
    positions=st.one_of(st.integers(1, 300), st.sampled_from([1024, 3136, 4096, 20001])),
    channels_first=st.booleans(),
    item_bytes=st.sampled_from([2, 4]),
).filter(lambda form: form.channels * form.positions <= 1 << 23)  # `covered` allocates them


def covered(form: GroupedShape, parts: Tiles | Slabs) -> np.ndarray:
    """Return how many tiles or slabs contain each element of one sample, as kernels index them."""
    count = np.zeros((form.channels, form.positions), np.uint8)
    chunk = parts.chunk if isinstance(parts, Slabs) else form.positions
    for block in range(parts.blocks(form)):
        channels = slice(block * parts.width, (block + 1) * parts.width)
        for begin in range(0, form.positions, chunk):
            count[channels, begin : begin + chunk] += 1
    return count


@given(forms, st.sampled_from([1, 100, 10**6]), st.sampled_from([1, 2, 4]), st.booleans())
def test_every_element_is_in_exactly_one_slab(form, programs, unroll, sampled):
    slabs = slabs_of(form, programs, unroll, SAMPLED if sampled else MAX_OFFSET)
    assert slabs.width == power_of_two(slabs.width)
    assert slabs.length == power_of_two(slabs.length)
    assert slabs.at_once == power_of_two(slabs.at_once)
    assert slabs.chunk % slabs.at_once == 0
    assert (slabs.chunks(form) - 1) * slabs.chunk < form.positions  # the last one is not empty
    assert (covered(form, slabs) == 1).all()
    rounds = slabs.chunk // slabs.at_once
    assert rounds <= SAMPLED or not sampled
    assert slabs.sample() <= slabs.unroll or not sampled
    assert slabs.even(form) == (
        form.positions % slabs.chunk == 0
        or (slabs.chunks(form) == 1 and form.positions % slabs.at_once == 0)
        or (form.positions % slabs.chunk) % slabs.at_once == 0
    )
    # Rows of channels are as wide as a tile where they can be, and threads load 16 bytes.
    tile = slabs.width * slabs.length * form.item_bytes
    assert tile <= 32 * slabs.warps * 16


@given(forms, st.sampled_from([1, 2]), st.sampled_from([2, 4]))
def test_groups_of_one_program(form, arrays, unroll):
    slabs = slabs_of_whole_groups(form, arrays, unroll)
    if slabs is None:
        return
    assert form.channels_first
    assert form.group_size % slabs.width == 0  # no lane is without a channel
    assert slabs.chunk == form.positions
    sampled = slabs.sample(form.group_size // slabs.width)
    assert slabs.unroll <= unroll
    if arrays == 1:  # a pivot is taken from the first round
        assert 1 <= sampled <= slabs.unroll
        there = slabs.width * min(sampled * slabs.length, form.positions)
        assert SAMPLED * there >= form.group_size * form.positions


@given(forms)
def test_tiles_of_small_groups(form):
    for limit in (SMALL, SMALL // 2):
        tiles = tiles_of_small_groups(form, limit)
        padded = power_of_two(form.group_size) * power_of_two(form.positions)
        if tiles is None:
            narrow = not form.channels_first and form.group_size * form.item_bytes < 32
            assert padded > limit or narrow
            continue
        assert (
            form.channels_first
            or tiles.width * form.item_bytes >= 32
            or tiles.width == form.channels
        )
        assert tiles.elements() <= limit
        assert tiles.width % form.group_size == 0
        assert (covered(form, tiles) == 1).all()
        assert 1 <= warps_for(tiles.elements()) <= 16
        assert tiles.full(form) == (
            tiles.elements() * tiles.blocks(form) == form.channels * form.positions
        )


def test_slabs_of_the_widths_of_diffusion_models_have_no_empty_lanes():
    for channels in (320, 640, 960, 1280, 1920, 2560):
        form = GroupedShape(16, 32, channels // 32, 1024, False, 2)
        slabs = slabs_of(form, 640, 4)
        assert slabs.width * slabs.blocks(form) == channels
        assert slabs.width * form.item_bytes >= 64


def test_addresses_within_a_round_stay_in_32_bits():
    form = GroupedShape(1, 1 << 20, 32, 1 << 14, False, 2)
    slabs = slabs_of(form, 640, 4)
    assert 1 <= slabs.at_once * form.channels <= MAX_OFFSET
    assert tiles_of_small_groups(GroupedShape(1, 1 << 17, 16, 2000, False, 2), SMALL) is None


def test_bundles_of_groups_that_fit_are_one_tile():
    small = GroupedShape(4, 32, 10, 64, False, 2)
    assert tiles_of_small_groups(small, SMALL) == Tiles(40, 64)


SHAPES = {
    "small groups": (GroupedShape(16, 32, 40, 49, False, 2), ["normalize"], ["pull_back"]),
    "groups": (GroupedShape(32, 32, 8, 3136, True, 2), ["group"], ["group"]),
    "slabs": (
        GroupedShape(2, 32, 10, 4096, False, 2),
        ["measure", "merge", "apply"],
        ["measure", "merge", "apply"],
    ),
    "few large groups": (
        GroupedShape(2, 32, 10, 4096, True, 2),
        ["measure", "merge", "apply"],
        ["measure", "merge", "apply"],
    ),
    "many rows of sums": (
        GroupedShape(1, 2, 4, 1 << 22, False, 2),
        ["measure", "merge", "apply"],
        ["measure", "merge", "apply", "sum_rows"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_launches(name):
    form, forward, backward = SHAPES[name]
    assert [step.kernel for step in gpu.forward(form, PLAIN).launches] == forward
    found = [step.kernel for step in gpu.backward(form, PLAIN).launches]
    assert found == [*backward, "sum_rows"]


def test_parameter_gradients_are_summed_per_batch():
    form = GroupedShape(6, 4, 2, 9, True, 4)
    [*_, last] = gpu.backward(form, PLAIN, batches=3).launches
    assert last.kernel == "sum_rows"
    assert last.grid == (3,)
    assert dict(last.scalars) == {"rows": 6, "ROWS_PER_BLOCK": 2}


@given(forms)
def test_launches_take_what_their_kernels_name(form):
    """Every argument of a kernel is given, once, and nothing else."""
    pytest.importorskip("triton")
    for step in (*gpu.forward(form, PLAIN).launches, *gpu.backward(form, PLAIN).launches):
        names = build.kernel_of(step.module, step.kernel).arg_names
        given = [name for name, _ in (*step.scalars, *step.constants)]
        assert sorted({*names[len(step.arrays) :]} - {build.FOLLOWS}) == sorted(given)


def test_largest_unit_of_squares():
    for epsilon in (0.0, 1e-30, 1e-6, 1.0, 1e6):
        unit = gpu._largest_unit(epsilon)
        assert np.log2(unit) == int(np.log2(unit))
        assert 2.0**30 <= unit <= 2.0**100
        assert epsilon * unit * unit < 2.0**101
