"""Records of the replicas to pool statistics over, created by the adapters."""

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
    """What the ranks of a communicator have agreed on; equal on all, as each call involves all."""

    def __init__(self) -> None:
        self.number = next(_numbers)  # unlike an id, never reused
        self.signatures: set[Any] = set()


_numbers = itertools.count()


class Engine(NamedTuple):
    """A communicator whose ranks run separate programs, which could disagree."""

    #: Sums a table of integers over all ranks, on the device of `like`.
    add: "Callable[[list[list[int]], Array], list[list[int]]]"
    agreement: Agreement


class Signature(NamedTuple):
    """The properties of statistics that must be equal on all ranks."""

    statistics_shape: tuple[int, ...]
    dtype: str
    groups: "IndexGroups"

    @property
    def code(self) -> float:
        """A nonzero 23-bit checksum, exact in float32."""
        return float(1 + checksum(tuple(self)) % (1 << 23))


class Replicas(NamedTuple):
    """The replicas of a named axis or communicator, in one library."""

    index: Any  # of this replica: an int or a scalar array
    size: int
    add: Callable[[Any], Any]  # sums an array over all replicas, differentiably
    engines: tuple[Engine, ...] = ()
    #: The signature of this replica's statistics, if those of other replicas could differ.
    signature: "Signature | None" = None


def over_all(parts: Sequence[Replicas]) -> Replicas:
    """Combine several axes into one, with the replicas numbered in row-major order."""
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
    """Return a 32-bit checksum, the same in every process for equal plain values."""
    return zlib.crc32(repr(value).encode())
