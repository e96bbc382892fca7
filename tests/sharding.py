"""One array split over several devices or processes, and the expected result for the whole array.

Shards differ in length along axis 1. JAX pads them to one length and masks the padding (which is
NaN); processes hold them as they are. Either way the concatenated shards must equal the oracle's
result on the whole array, or on the part of it that belongs to one of `index_groups`.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib

import numpy as np

from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, GRADIENT_FAR, assert_close, assert_gradient

BATCH, CHANNELS, NUM_GROUPS = 2, 8, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of splitting, masking and pooling."""

    name: str
    sizes: tuple[int, ...]
    masked: str = "nothing"  # or "at random", "shard 1", "sample 0"
    offset: float = 0.0
    fast: bool = True
    index_groups: tuple[tuple[int, ...], ...] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def length(self) -> int:
        return sum(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(int(n) for n in np.cumsum((0, *self.sizes)))

    @property
    def groups_as_lists(self) -> list[list[int]] | None:
        return None if self.index_groups is None else [list(group) for group in self.index_groups]

    @property
    def keywords(self) -> dict[str, object]:
        return {"num_groups": NUM_GROUPS, "use_fast_variance": self.fast}

    def split(self, a: np.ndarray) -> list[np.ndarray]:
        """Return the shards of an array of shape (N, T, ...)."""
        return [a[:, i:j] for i, j in zip(self.starts[:-1], self.starts[1:], strict=True)]

    def padded(self, a: np.ndarray, filling) -> np.ndarray:
        """Return the shards stacked as (shards, N, longest, ...), padded with `filling`."""
        out = np.full((len(self.sizes), BATCH, max(self.sizes), *a.shape[2:]), filling, a.dtype)
        for shard, part in zip(out, self.split(a), strict=True):
            shard[:, : part.shape[1]] = part
        return out

    def unpadded(self, stacked: np.ndarray) -> np.ndarray:
        """Undo `padded`."""
        shards = zip(stacked, self.sizes, strict=True)
        return np.concatenate([shard[:, :size] for shard, size in shards], axis=1)


@dataclasses.dataclass(frozen=True)
class Data:
    """The whole arrays of one case, and the oracle's results."""

    x: np.ndarray
    dy: np.ndarray
    mask: np.ndarray | None
    scale: np.ndarray
    bias: np.ndarray
    y: np.ndarray
    gradients: oracle.Gradients


@functools.cache
def data(case: Case) -> Data:
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    shape = (BATCH, case.length, CHANNELS)
    x = (rng.normal(size=shape) + case.offset).astype(np.float32)
    dy = rng.normal(size=shape).astype(np.float32)
    scale = rng.uniform(0.5, 1.5, CHANNELS).astype(np.float32)
    bias = rng.normal(size=CHANNELS).astype(np.float32)
    mask = None
    if case.masked != "nothing":
        mask = rng.random((BATCH, case.length, 1)) < 0.7
        if case.masked == "shard 1":
            mask[:, case.starts[1] : case.starts[2]] = False
        elif case.masked == "sample 0":
            mask[0] = False
        x = np.where(mask, x, np.float32(np.nan))
    return Data(x, dy, mask, scale, bias, *_expected(case, x, dy, mask, scale, bias))


def _expected(case, x, dy, mask, scale, bias) -> tuple[np.ndarray, oracle.Gradients]:
    y, dx = np.empty(x.shape), np.empty(x.shape)
    dscale, dbias = np.zeros(CHANNELS), np.zeros(CHANNELS)
    positions = case.split(np.arange(case.length)[None])
    for group in case.index_groups or (range(len(case.sizes)),):
        at = np.concatenate([positions[shard][0] for shard in group])
        part = None if mask is None else mask[:, at]
        arguments = {"num_groups": NUM_GROUPS, "mask": part}
        y[:, at] = oracle.group_norm(x[:, at], scale, bias, **arguments)
        gradients = oracle.group_norm_gradients(x[:, at], dy[:, at], scale, bias, **arguments)
        dx[:, at] = gradients.x
        dscale += gradients.scale
        dbias += gradients.bias
    return y, oracle.Gradients(dx, dscale, dbias)


def check(case: Case, y, dx, dscale, dbias) -> None:
    """Assert that the concatenated shards equal the oracle's results for the whole array."""
    whole = data(case)
    assert y.dtype == dx.dtype == np.float32
    assert_close(y, whole.y, tolerance=CONTRACT)
    rtol = GRADIENT if case.offset == 0 else GRADIENT_FAR
    if case.offset <= 1e3:  # the accuracy contract of gradients does not cover larger offsets
        assert_gradient(dx, whole.gradients.x, rtol=rtol)
        assert_gradient(dscale, whole.gradients.scale, rtol=rtol)
    assert_gradient(dbias, whole.gradients.bias, rtol=rtol)


def cases(shards: int) -> list[Case]:
    """Return the cases for 2 or 4 shards."""
    even, uneven, empty = {
        2: ((4, 4), (5, 2), (6, 0)),
        4: ((3, 3, 3, 3), (5, 2, 3, 1), (4, 0, 3, 2)),
    }[shards]
    groups = {
        2: {"alone": ((0,), (1,)), "together": ((1, 0),)},
        4: {"two pairs": ((0, 1), (2, 3)), "one and three": ((2,), (0, 3, 1))},
    }[shards]
    return [
        Case("even", even),
        Case("even, exact variance", even, fast=False),
        Case("uneven", uneven),
        Case("uneven, exact variance", uneven, fast=False),
        Case("one shard empty", empty),
        Case("one shard empty, exact variance", empty, fast=False),
        Case("masked at random", uneven, "at random"),
        Case("masked at random, exact variance", uneven, "at random", fast=False),
        Case("a shard fully masked", uneven, "shard 1"),
        Case("a shard fully masked, offset", uneven, "shard 1", offset=1e3),
        Case("a sample fully masked", uneven, "sample 0"),
        *(Case(f"offset {offset:g}", uneven, offset=offset) for offset in (1e2, 1e3, 1e4, 1e5)),
        Case("offset 1e5, exact variance", uneven, offset=1e5, fast=False),
        Case("offset 1e5, masked", uneven, "at random", offset=1e5),
        *(Case(f"index groups: {k}", uneven, index_groups=v) for k, v in groups.items()),
        *(
            Case(f"index groups: {k}, masked, exact", uneven, "shard 1", 10.0, False, v)
            for k, v in groups.items()
        ),
    ]
