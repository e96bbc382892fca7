"""The shape that kernels work with."""

from typing import NamedTuple

__all__ = ["GroupedShape"]


class GroupedShape(NamedTuple):
    """An array's shape: samples, then channels and positions in either order."""

    samples: int
    groups: int
    group_size: int  # channels of a group
    positions: int
    channels_first: bool  # whether channels come before positions
    item_bytes: int = 4  # of an element of x, which the tiling on GPUs depends on

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.groups * self.group_size

    @property
    def elements(self) -> int:
        """The number of elements."""
        return self.samples * self.channels * self.positions
