"""Dividing an array into the tiles of GPU kernels, by its shape alone.

It does not depend on the device: the same call gives the same bits on every GPU.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from groupnorm.backends.kernels.grouped_shape import GroupedShape

__all__ = [
    "MAX_OFFSET",
    "Tiles",
    "power_of_two",
    "tile_parts",
    "tile_whole_groups",
    "warps_for",
]

# The largest tile, in elements of 2 and of 4 bytes, that still fits the registers when it holds
# whole groups and is read once. A mask halves it, and so does gelu. Chunks are tiles of parts of
# groups.
WHOLE_FORWARD, WHOLE_BACKWARD = (32768, 16384), (16384, 16384)
CHUNK_FORWARD, CHUNK_BACKWARD = 8192, 8192
# A tile takes several whole groups, up to `SMALL` elements, if at least `ENOUGH` tiles remain.
SMALL, ENOUGH = 4096, 512
# Shorter rows (in bytes) waste memory bandwidth.
ROW_BYTES = 64
SECTOR_BYTES = 32
WIDEST = 256
# The most elements of the table that maps channels to groups.
TABLE = 4096
ELEMENTS_OF_A_THREAD = 32
# Offsets within a tile are 32-bit integers.
MAX_OFFSET = 2**31 - 1


class Tiles(NamedTuple):
    """The size of tiles; see ``compiled/tiles.py``."""

    width: int  # TILE_CHANNELS
    length: int  # TILE_POSITIONS
    parts: int  # PARTS

    def blocks(self, shape: GroupedShape) -> int:
        """The number of tiles that cover all channels."""
        if self.parts > 1:
            return shape.groups * self.parts
        return -(-shape.channels // self.width)

    def chunks(self, shape: GroupedShape) -> int:
        """The number of tiles that cover all positions."""
        return -(-shape.positions // self.length)

    def elements(self) -> int:
        """The number of elements of a tile, padding to powers of two included."""
        return power_of_two(self.width) * self.length

    def full(self, shape: GroupedShape) -> bool:
        """Whether no tile has padding."""
        channels = shape.group_size if self.parts > 1 else shape.channels
        return (
            self.width == power_of_two(self.width)
            and channels % self.width == 0
            and shape.positions % self.length == 0
        )

    def groups(self, shape: GroupedShape) -> int:
        """The number of groups in a tile."""
        return 1 if self.parts > 1 else max(self.width // shape.group_size, 1)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def warps_for(elements: int) -> int:
    """Return the number of warps for a tile."""
    return min(max(elements // (32 * ELEMENTS_OF_A_THREAD), 1), 16)


@lru_cache(maxsize=4096)
def tile_whole_groups(shape: GroupedShape, limit: int) -> Tiles | None:
    """Divide into whole groups; return None if a group has more than `limit` elements."""
    length = power_of_two(shape.positions)
    too_far = not shape.channels_first and length * shape.channels > MAX_OFFSET
    if power_of_two(shape.group_size) * length > limit or too_far:
        return None
    found = Tiles(shape.group_size, length, 1)
    for width in _widths(shape, length, limit):
        tiles = Tiles(width, length, 1)
        many = shape.samples * tiles.blocks(shape) >= ENOUGH
        if not (_wasteful(shape, found.width) or (many and tiles.elements() <= SMALL)):
            break
        found = tiles
    # Rows shorter than a sector would fetch every sector several times, for different tiles.
    narrow = not shape.channels_first and found.width < shape.channels
    return None if narrow and found.width * shape.item_bytes < SECTOR_BYTES else found


@lru_cache(maxsize=4096)
def tile_parts(shape: GroupedShape, limit: int) -> Tiles:
    """Divide groups into tiles of at most `limit` elements."""
    if shape.channels_first:
        length = min(power_of_two(shape.positions), limit)
        width = min(limit // length, shape.group_size)
    else:
        width = min(shape.group_size, WIDEST)
        if shape.group_size > WIDEST:  # prefer parts of equal width
            width = next((w for w in (256, 192, 128, 96) if shape.group_size % w == 0), WIDEST)
        for wider in _widths(shape, 1, WIDEST):
            if width >= shape.group_size and _wasteful(shape, width):
                width = wider
        length = min(power_of_two(shape.positions), max(limit // power_of_two(width), 1))
        while length * shape.channels > MAX_OFFSET:
            length //= 2
    return Tiles(width, length, -(-shape.group_size // width) if width < shape.group_size else 1)


def _widths(shape: GroupedShape, length: int, limit: int) -> list[int]:
    """Return efficient widths of several whole groups, in ascending order."""
    together = (
        1 if shape.channels_first else 8 // gcd(shape.group_size, 8)
    )  # groups until rows are aligned
    found = []
    for groups in range(together, shape.groups + 1, together):
        width = groups * shape.group_size
        padded = power_of_two(width)
        if padded * length > limit or padded * power_of_two(groups) > TABLE:
            break
        if 4 * width >= 3 * padded or groups == together:
            found.append(width)
    return found


def _wasteful(shape: GroupedShape, width: int) -> bool:
    """Whether rows of this width waste bandwidth, or prevent vectorized loads."""
    if shape.channels_first or width == shape.channels:
        return False
    return width * shape.item_bytes < ROW_BYTES or (width % 8 > 0 and shape.channels % 8 == 0)
