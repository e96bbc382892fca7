"""Launches the fused CPU kernels on flat arrays, alone or with other threads."""

import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends.cpu import Layout, kernels
from groupnorm.backends.threads import helpers_for, run_together

__all__ = ["Saved", "Team", "backward", "forward", "tables_of"]

# Samples of up to this many elements are done by one thread each, in its own cache; larger ones by
# all of them together, one after the other, in the cache they share.
APART = 1 << 18

# As the kernels take them: the length is part of the type, for which they are compiled.
_ACTIVATIONS: dict[str | None, tuple[int, ...]] = {
    None: (),
    "relu": (0,),
    "silu": (0, 0),
    "gelu": (0, 0, 0),
}

_log = logging.getLogger("groupnorm")
_misses: dict[str, int] = {}


class Team(NamedTuple):
    """The threads of a library."""

    helpers_for: Callable[[int], int]
    run: Callable[[int, Callable[[], None]], None]


OWN = Team(helpers_for, run_together)


class Saved(NamedTuple):
    """What backward needs of forward: numbers of each group in float64, and what was applied."""

    mean: Any
    rstd: Any
    share: Any
    tables: tuple[Any, ...]  # centre, factor and term of each channel, channels last only


def forward(
    layout: Layout, x: Any, y: Any, scale: Any, bias: Any, mask: Any, epsilon: float,
    activation: str | None, team: Team = OWN,
) -> Saved:  # fmt: skip
    """Normalize x into y.

    Parameters
    ----------
    layout : Layout
        How x and y lie in memory; both are flat, float16 as uint16 and bfloat16 as int16.
    scale, bias : ndarray
        In float32, (channels,).
    mask : ndarray or None
        What `flat_mask` returns.
    team : Team
        Whose threads help.
    """
    numbers = np.empty((3, layout.samples * layout.groups))
    sizes = (layout.groups, layout.size, layout.positions)
    tag, helpers = _ACTIVATIONS[activation], team.helpers_for(layout.elements)
    if layout.first:
        _launch(
            kernels("numba_first").first_forward, team, helpers, 0,
            (x, y, scale, bias, mask, *sizes, epsilon, tag, *numbers),
        )  # fmt: skip
        return Saved(numbers[0], numbers[1], numbers[2], ())
    shape = _chunks_of(layout.channels, layout.positions, mask is not None)
    apart = _is_apart(layout, helpers)
    common = 0 if apart else shape.chunks
    tables = tables_of(layout.samples, shape.width)
    _launch(
        kernels("numba_last").last_forward, team, helpers, layout.samples,
        (
            x, y, scale, bias, mask, layout.samples, *sizes, shape.rows, epsilon, tag, apart,
            np.empty(common), *np.empty((2, common * layout.channels)), *numbers, *tables,
        ),
    )  # fmt: skip
    return Saved(numbers[0], numbers[1], numbers[2], tables)


def backward(
    layout: Layout, saved: Saved, x: Any, dy: Any, dx: Any, scale: Any, bias: Any, mask: Any,
    activation: str | None, team: Team = OWN,
) -> tuple[Any, Any]:  # fmt: skip
    """Pull dy back into dx; return the gradients of bias and scale, in float64.

    The arguments are those of `forward`, and what it returned.
    """
    numbers = (saved.mean, saved.rstd, saved.share)
    sizes = (layout.groups, layout.size, layout.positions)
    tag, helpers = _ACTIVATIONS[activation], team.helpers_for(layout.elements)
    sums = np.empty((2, layout.samples, layout.channels))
    if layout.first:
        _launch(
            kernels("numba_first").first_backward, team, helpers, 0,
            (x, dy, dx, scale, bias, mask, *sizes, tag, *numbers, *sums.reshape(2, -1)),
        )  # fmt: skip
    else:
        shape = _chunks_of(layout.channels, layout.positions, mask is not None)
        apart = _is_apart(layout, helpers)
        common = 0 if apart else shape.chunks
        _launch(
            kernels("numba_last").last_backward, team, helpers, layout.samples,
            (
                x, dy, dx, scale, mask, layout.samples, *sizes, shape.rows, tag, apart,
                *np.empty((2, common * layout.channels)), *numbers, *saved.tables,
                *tables_of(layout.samples, shape.width), *sums,
            ),
        )  # fmt: skip
    gradients = sums[:, 0] if layout.samples == 1 else sums.sum(axis=1)
    return gradients[0], gradients[1]


class _Chunks(NamedTuple):
    """How rows are taken, channels last."""

    rows: int  # of a chunk
    chunks: int  # of a sample
    width: int  # elements of a band


@lru_cache(maxsize=4096)
def _chunks_of(channels: int, positions: int, masked: bool) -> _Chunks:
    module = kernels("numba_last")
    rows = module.chunk_rows(channels, positions)
    # Rows that may be masked out go one by one.
    band = 1 if masked else module.band_rows(channels, positions)
    return _Chunks(rows, -(-positions // rows), band * channels)


def _is_apart(layout: Layout, helpers: int) -> bool:
    """Whether each thread does samples of its own."""
    return helpers == 0 or layout.elements <= APART * layout.samples


def tables_of(samples: int, width: int) -> tuple[Any, ...]:
    """Make room for three tables that begin where a line of the cache does."""
    room = np.empty(3 * samples * width + 16, np.float32)
    skip = -room.ctypes.data % 64 // 4
    tables = room[skip : skip + 3 * samples * width].reshape(3, samples, width)
    return tables[0], tables[1], tables[2]


def _launch(
    kernel: Any, team: Team, helpers: int, samples: int, arguments: tuple[Any, ...]
) -> None:
    """Run a kernel in this thread and in helpers, and say so where it had to be compiled.

    `samples` is how many of them threads may share, phase by phase.
    """
    parts = helpers + 1
    counters = 2 + max(samples * (2 * parts + 1), parts)
    claims = np.zeros(counters * kernels("numba_team").STRIDE, np.int64)
    known, start = len(kernel.overloads), time.perf_counter()
    team.run(helpers, lambda: kernel(*arguments, parts, claims))
    if len(kernel.overloads) > known and _is_news(kernel):
        _log.warning(
            "groupnorm compiled CPU kernels for this combination of dtypes in %.1f s; they are "
            "cached on disk, and later processes load them.",
            time.perf_counter() - start,
        )


def _is_news(kernel: Any) -> bool:
    """Whether a kernel was compiled, not loaded, since this was last asked."""
    misses: int = sum(kernel.stats.cache_misses.values())
    news = misses > _misses.get(kernel.__name__, 0)
    _misses[kernel.__name__] = misses
    return news
