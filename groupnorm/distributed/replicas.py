"""Records of the replicas that statistics are pooled over; each adapter makes them."""

import itertools
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from groupnorm.typing import Array

__all__ = [
    "Agreement",
    "Engine",
    "IndexGroups",
    "Replicas",
    "Signature",
    "checksum",
    "over_all",
]

IndexGroups = tuple[tuple[int, ...], ...] | None


class Agreement:
    """What the ranks of a communicator have agreed on: all the same, as every call involves all."""

    def __init__(self) -> None:
        self.number = next(_numbers)  # unlike an id never used again
        self.signatures: set[Any] = set()


_numbers = itertools.count()


class Engine(NamedTuple):
    """Ranks that run programs of their own, which could disagree."""

    #: Sums a table of integers over all ranks; `like` says on which device.
    add: "Callable[[list[list[int]], Array], list[list[int]]]"
    agreement: Agreement


class Signature(NamedTuple):
    """What all ranks must have the same of."""

    statistics_shape: tuple[int, ...]
    dtype: str
    groups: "IndexGroups"

    @property
    def code(self) -> float:
        """A number other than 0 that float32 holds exactly and that others hardly have."""
        return float(1 + checksum(tuple(self)) % (1 << 23))


class Replicas(NamedTuple):
    """What a library knows of a named axis."""

    index: Any  # this replica's, an int or a scalar array
    size: int
    add: Callable[[Any], Any]  # sums an array over all replicas, differentiably
    engines: tuple[Engine, ...] = ()
    #: What kind of statistics this replica takes part with, where others could differ.
    signature: "Signature | None" = None


def over_all(parts: Sequence[Replicas]) -> Replicas:
    """Put several axes together: the replicas of all, numbered in row-major order."""
    result = parts[0]
    for part in parts[1:]:
        result = _product(result, part)
    return result


def _product(a: Replicas, b: Replicas) -> Replicas:
    return Replicas(
        a.index * b.size + b.index,
        a.size * b.size,
        lambda x: b.add(a.add(x)),
        a.engines + b.engines,
    )


def checksum(value: Any) -> int:
    """Return 32 bits that are the same in every process for equal plain values."""
    return zlib.crc32(repr(value).encode())
