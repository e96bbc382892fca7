"""Tiling for GPUs: every element exactly once, within limits, determined by the shape alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.tiling import (
    CHUNK_BACKWARD,
    CHUNK_FORWARD,
    MAX_OFFSET,
    WHOLE_BACKWARD,
    WHOLE_FORWARD,
    Tiles,
    power_of_two,
    tile_parts,
    tile_whole_groups,
    warps_for,
)
from groupnorm.backends.kernels.grouped_shape import GroupedShape

PLAIN = gpu.KernelOptions(1e-6, None, None, True, True, waves=True)

forms = st.builds(
    GroupedShape,
    samples=st.integers(1, 5),
    groups=st.integers(1, 40),
    group_size=st.one_of(st.integers(1, 40), st.sampled_from([64, 300, 1000, 1280])),
    positions=st.one_of(st.integers(1, 300), st.sampled_from([1024, 3136, 4096, 20001])),
    channels_first=st.booleans(),
    item_bytes=st.sampled_from([2, 4]),
).filter(lambda form: form.channels * form.positions <= 1 << 23)  # `covered` allocates them


def covered(form: GroupedShape, tiles: Tiles) -> np.ndarray:
    """Return how many tiles contain each element of one sample, by the kernels' indexing."""
    count = np.zeros((form.channels, form.positions), np.uint8)
    for block in range(tiles.blocks(form)):
        if tiles.parts == 1:
            begin, end = block * tiles.width, form.channels
        else:
            group, part = divmod(block, tiles.parts)
            begin, end = group * form.group_size + part * tiles.width, (group + 1) * form.group_size
        channels = slice(begin, min(begin + tiles.width, end))
        for chunk in range(tiles.chunks(form)):
            positions = slice(chunk * tiles.length, (chunk + 1) * tiles.length)
            count[channels, positions] += 1
    return count


@given(forms)
def test_every_element_is_in_exactly_one_tile(form):
    for limit in (CHUNK_FORWARD, CHUNK_BACKWARD):
        tiles = tile_parts(form, limit)
        assert tiles.elements() <= limit
        assert tiles.length == power_of_two(tiles.length)
        assert (covered(form, tiles) == 1).all()
        if tiles.parts == 1:
            assert tiles.width % form.group_size == 0  # whole groups
        assert tiles.full(form) == (
            tiles.elements() * tiles.blocks(form) * tiles.chunks(form)
            == form.channels * form.positions
        )


@given(forms)
def test_tiles_of_whole_groups(form):
    for limit in {*WHOLE_FORWARD, *WHOLE_BACKWARD}:
        tiles = tile_whole_groups(form, limit)
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
        assert tiles.parts == tiles.chunks(form) == 1
        assert tiles.width % form.group_size == 0
        assert (covered(form, tiles) == 1).all()
        assert 1 <= warps_for(tiles.elements()) <= 16


def test_channels_last_tiles_are_not_narrow():
    for form in (GroupedShape(256, 32, 2, 12544, False, 2), GroupedShape(16, 32, 10, 64, False, 2)):
        tiles = tile_whole_groups(form, WHOLE_FORWARD[0]) or tile_parts(form, CHUNK_FORWARD)
        assert tiles.width * form.item_bytes >= 64
        assert tiles.width % 8 == 0  # for 16-byte loads


def test_addresses_within_a_tile_stay_in_32_bits():
    form = GroupedShape(1, 1 << 20, 32, 1 << 14, False, 2)
    tiles = tile_parts(form, CHUNK_FORWARD)
    assert 1 <= tiles.length * form.channels <= MAX_OFFSET
    assert tile_whole_groups(GroupedShape(1, 1 << 17, 16, 2000, False, 2), WHOLE_FORWARD[0]) is None


def test_bundles_of_groups_that_fit_are_one_tile():
    assert tile_whole_groups(GroupedShape(4, 32, 10, 256, False, 2), WHOLE_FORWARD[0]) == Tiles(
        40, 256, 1
    )


SHAPES = {
    "one kernel": (GroupedShape(16, 32, 40, 256, False, 2), ["whole"], ["whole", "sum_rows"]),
    "tiles": (
        GroupedShape(2, 32, 10, 4096, True, 2),
        ["measure", "apply"],
        ["measure", "apply", "sum_rows"],
    ),
    "many tiles of a group": (
        GroupedShape(1, 2, 4, 1 << 20, False, 2),
        ["measure", "merge", "apply"],
        ["measure", "merge", "apply", "sum_rows", "sum_rows"],
    ),
    "waves": (
        GroupedShape(4, 32, 16, 1 << 14, False, 2),
        ["measure", "apply"] * 4,
        ["measure", "apply"] * 4 + ["sum_rows"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_steps(name):
    form, forward, backward = SHAPES[name]
    assert [step.kernel for step in gpu.forward(form, PLAIN).launches] == forward
    if name != "waves":
        assert [step.kernel for step in gpu.backward(form, PLAIN).launches] == backward


@pytest.mark.parametrize(
    "form",
    [
        GroupedShape(3, 32, 16, 1 << 15, True, 2),
        GroupedShape(14, 32, 8, 1 << 14, False, 2),
        GroupedShape(5, 3, 7, 333_333, True, 4),
    ],
    ids=["first", "last", "odd"],
)
@pytest.mark.parametrize("direction", [gpu.forward, gpu.backward])
def test_waves_contain_whole_groups_and_fit_the_cache(form, direction):
    program = direction(form, PLAIN)
    measured = [step for step in program.launches if step.kernel == "measure"]
    applied = [step for step in program.launches if step.kernel == "apply"]
    assert len(measured) == len(applied) > 1
    begin = 0
    for one, other in zip(measured, applied, strict=True):
        assert one.grid == other.grid
        assert dict(one.scalars)["begin_at"] == dict(other.scalars)["begin_at"] == begin
        begin += one.grid[0]
        elements = (
            one.grid[0]
            * dict(one.constants)["TILE_CHANNELS"]
            * dict(one.constants)["TILE_POSITIONS"]
        )
        item = form.item_bytes * (2 if direction is gpu.backward else 1)
        assert elements * item <= 1.3 * gpu.WAVE  # an upper bound, because tiles are padded
    tiles = (CHUNK_FORWARD, CHUNK_BACKWARD)[direction is gpu.backward]
    cut = tile_parts(form, tiles)
    assert begin == form.samples * cut.blocks(form) * cut.chunks(form)
    once = direction(form, PLAIN._replace(waves=False))
    assert sum(step.kernel == "measure" for step in once.launches) == 1


def test_parameter_gradients_are_summed_per_batch():
    form = GroupedShape(6, 4, 2, 9, True, 4)
    [*_, last] = gpu.backward(form, PLAIN, batches=3).launches
    assert last.kernel == "sum_rows"
    assert last.grid == (3,)
    assert dict(last.scalars) == {"rows": 6, "ROWS_PER_BLOCK": 2}


def test_largest_unit_of_squares():
    for epsilon in (0.0, 1e-30, 1e-6, 1.0, 1e6):
        unit = gpu._largest_unit(epsilon)
        assert np.log2(unit) == int(np.log2(unit))
        assert 2.0**30 <= unit <= 2.0**100
        assert epsilon * unit * unit < 2.0**101
