"""How an array is cut into the tiles of the kernels for GPUs, from its shape alone.

Not from the device: the same call gives the same bits on every GPU.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

from groupnorm.backends.kernels.grouped_shape import GroupedShape

__all__ = [
    "FARTHEST",
    "Tiles",
    "power_of_two",
    "tile_parts",
    "tile_whole_groups",
    "warps_for",
]

# Elements of a tile. One that is a group or more is read once and must stay in the registers: as
# many of these, of 2 and of 4 bytes each, do; half of them with a mask, and with a long activation.
WHOLE_FORWARD, WHOLE_BACKWARD = (32768, 16384), (16384, 16384)
CHUNK_FORWARD, CHUNK_BACKWARD = 8192, 8192
# Tiles of whole groups take several of them, up to this many elements, if there are enough tiles.
SMALL, ENOUGH = 4096, 512
# Bytes of a row in memory: fewer waste what is fetched with them.
ROW_BYTES = 64
SECTOR_BYTES = 32
WIDEST = 256
# Elements of the table that says which channel is of which group.
TABLE = 4096
ELEMENTS_OF_A_THREAD = 32
# Addresses within a tile are counted in 32 bits.
FARTHEST = 2**31 - 1


class Tiles(NamedTuple):
    """How it is cut; see `kernels.triton_tiles`."""

    width: int  # W
    length: int  # BP
    parts: int  # J

    def blocks(self, shape: GroupedShape) -> int:
        """Tiles side by side for all channels."""
        if self.parts > 1:
            return shape.groups * self.parts
        return -(-shape.channels // self.width)

    def chunks(self, shape: GroupedShape) -> int:
        """Tiles one behind the other for all positions."""
        return -(-shape.positions // self.length)

    def elements(self) -> int:
        """Elements of a tile, with those that are there for the power of two alone."""
        return power_of_two(self.width) * self.length

    def full(self, shape: GroupedShape) -> bool:
        """Whether no tile has elements that are not there."""
        channels = shape.group_size if self.parts > 1 else shape.channels
        return (
            self.width == power_of_two(self.width)
            and channels % self.width == 0
            and shape.positions % self.length == 0
        )

    def groups(self, shape: GroupedShape) -> int:
        """Groups of a tile."""
        return 1 if self.parts > 1 else max(self.width // shape.group_size, 1)


def power_of_two(number: int) -> int:
    """Return the least power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def warps_for(elements: int) -> int:
    """Return how many warps a tile takes."""
    return min(max(elements // (32 * ELEMENTS_OF_A_THREAD), 1), 16)


@lru_cache(maxsize=4096)
def tile_whole_groups(shape: GroupedShape, limit: int) -> Tiles | None:
    """Cut into whole groups, or return None where a group is more than `limit` elements."""
    length = power_of_two(shape.positions)
    too_far = not shape.channels_first and length * shape.channels > FARTHEST
    if power_of_two(shape.group_size) * length > limit or too_far:
        return None
    found = Tiles(shape.group_size, length, 1)
    for width in _widths(shape, length, limit):
        tiles = Tiles(width, length, 1)
        many = shape.samples * tiles.blocks(shape) >= ENOUGH
        if not (_wasteful(shape, found.width) or (many and tiles.elements() <= SMALL)):
            break
        found = tiles
    # Half of what is fetched would be for others, once more for each of them.
    narrow = not shape.channels_first and found.width < shape.channels
    return None if narrow and found.width * shape.item_bytes < SECTOR_BYTES else found


@lru_cache(maxsize=4096)
def tile_parts(shape: GroupedShape, limit: int) -> Tiles:
    """Cut into parts of groups, `limit` elements at most."""
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
        while length * shape.channels > FARTHEST:
            length //= 2
    return Tiles(width, length, -(-shape.group_size // width) if width < shape.group_size else 1)


def _widths(shape: GroupedShape, length: int, limit: int) -> list[int]:
    """Return widths of several whole groups that are worth it, the narrow ones first."""
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
    """Whether rows this wide fetch memory for others, or cannot be read by whole words."""
    if shape.channels_first or width == shape.channels:
        return False
    return width * shape.item_bytes < ROW_BYTES or (width % 8 > 0 and shape.channels % 8 == 0)
