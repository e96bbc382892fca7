"""The argument block of a CPU kernel: 64-bit words, passed by address.

So any thread of any library can run a kernel without Python's lock: PyTorch's OpenMP threads, XLA's
threads. Kernels allocate nothing, so they cannot fail.

A block holds addresses, then sizes, then, from `HEAD` on, the counters by which threads share the
work (see ``compiled/work_sharing.py``). What depends on the shape alone is a `Template`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.variants import ACTIVATIONS, DTYPES

__all__ = [
    "KERNELS",
    "LINE",
    "SMALL_SAMPLE",
    "Template",
    "number",
    "template",
]

# Samples of up to this many elements are processed by one thread each, in its own cache; up to the
# second limit if every thread gets the same number of samples. Threads process larger samples
# together, one sample after the other, in the cache they share.
SMALL_SAMPLE, SMALL_SAMPLE_IF_EVEN = 1 << 18, 1 << 21

# Addresses: x, y (or dx) and dy, float32 or the bits of halves, in x's memory order; scale and
# bias, (channels,) in float32; the mask, bytes, (1 or samples, positions); the saved statistics
# mean, rstd and 1 / count, (3, samples, groups) in float64; the sums over positions of dy and dy *
# xhat, (2, samples, channels) in float64; the kernel's scratch buffer; the gradients of scale and
# bias, (batches, channels) in float32.
X, Y, DY, SCALE, BIAS, MASK, SAVED, SUMS, SCRATCH, DSCALE, DBIAS = range(11)
ADDRESSES = 11
# Sizes.
ELEMENTS, MASK_ELEMENTS, SAMPLES, GROUPS, SIZE, POSITIONS, ROWS, WIDTH = range(11, 19)
WHOLE_SAMPLES, PARTS, COUNTERS, EPSILON = range(19, 23)
# Lengths of the parts of the scratch buffer: float64 for the chunks' statistics or sums and for the
# groups' means of the gradients, int64 for where bands begin, float32 for tables.
CHUNK_RESULTS, GROUP_MEANS, BAND_STARTS, TABLES = range(23, 27)
# The number of batches of samples that have separate gradients of scale and bias.
BATCHES = 27
# For argument blocks made by XLA's handler: the words of the scratch buffer and of the sums, the
# bytes of y if huge pages are to be requested for it, how many threads still use the block, and the
# kernel (in templates, its `number`).
SCRATCH_WORDS, SUMS_WORDS, LARGE_PAGES, HOLDERS, RUN = range(28, 33)
HEAD = 40

# The words of a cache line; each counter has a line to itself.
LINE = 8


KERNELS = (
    "channels_first_forward",
    "channels_first_backward",
    "channels_last_forward",
    "channels_last_backward",
)
KERNEL_COUNT = len(KERNELS) * len(DTYPES) ** 3 * 2 * len(ACTIVATIONS)


def number(kernel: str, x: str, y: str, dy: str, masked: bool, activation: str | None) -> int:
    """Return a kernel's number, from 1 to `KERNEL_COUNT`."""
    found = KERNELS.index(kernel)
    for dtype in (x, y, dy):
        found = found * len(DTYPES) + DTYPES.index(dtype)
    return 1 + (found * 2 + masked) * len(ACTIVATIONS) + ACTIVATIONS[activation]


class Template(NamedTuple):
    """The argument block of all calls with one shape, without addresses."""

    words: Any
    scratch: int  # the length of the scratch buffer, in words


def _whole_samples(samples: int, elements: int, helpers: int) -> bool:
    """Whether threads process whole samples, which needs no synchronization within a sample."""
    if helpers == 0 or elements <= SMALL_SAMPLE * samples:
        return True
    return samples % (helpers + 1) == 0 and elements <= SMALL_SAMPLE_IF_EVEN * samples


@lru_cache(maxsize=4096)
def template(
    kernel: str, shape: GroupedShape, mask_elements: int, epsilon: float, helpers: int
) -> Template:
    """Return the argument block of one of `KERNELS` for a shape and a number of helper threads."""
    first, backward = kernel.startswith("channels_first"), kernel.endswith("backward")
    samples, groups, positions = shape.samples, shape.groups, shape.positions
    channels, elements, parts = shape.channels, shape.elements, helpers + 1
    whole_samples = _whole_samples(samples, elements, helpers)
    rows = width = chunk_results = group_means = band_starts = tables = 0
    if not first:
        # With a mask, rows are processed one by one.
        band = 1 if mask_elements else band_rows(channels, positions)
        rows, width = chunk_rows(channels, positions), band * channels
        chunks, buffers = -(-positions // rows), parts if whole_samples else 1
        tables = (6 if backward else 3) * parts * width
        if backward:
            chunk_results, group_means = buffers * 2 * chunks * channels, 2 * samples * groups
        else:
            chunk_results = buffers * chunks * (1 + 2 * channels)
            band_starts = parts * (rows * channels // width + 1)
    counters = 2 + parts if first or whole_samples else 2 + samples * (2 * parts + 1)
    words = np.zeros(HEAD + counters * LINE, np.int64)
    words[ELEMENTS], words[MASK_ELEMENTS] = elements, mask_elements
    words[SAMPLES], words[GROUPS], words[SIZE], words[POSITIONS] = (
        samples,
        groups,
        shape.group_size,
        positions,
    )
    words[ROWS], words[WIDTH], words[PARTS] = rows, width, parts
    words[WHOLE_SAMPLES] = whole_samples
    words[COUNTERS], words[EPSILON] = counters, np.float64(epsilon).view(np.int64)
    words[CHUNK_RESULTS], words[GROUP_MEANS] = chunk_results, group_means
    words[BAND_STARTS], words[TABLES] = band_starts, tables
    # Tables begin at a cache line.
    scratch = 0 if first else chunk_results + group_means + band_starts + -(-tables // 2) + LINE
    words[BATCHES], words[SCRATCH_WORDS] = 1, scratch
    words[SUMS_WORDS] = 2 * samples * channels if backward else 0
    words.flags.writeable = False
    return Template(words, scratch)


# How channels-last arrays are divided: by the shape alone, or results would depend on the number of
# threads. A band is long enough to amortize loop overhead and short enough for its tables to stay
# in L1.
BAND = 512
# Elements of a chunk, and its least rows, which amortize merging its channels.
CHUNK, MIN_CHUNK_ROWS = 65536, 128


def band_rows(channels: int, positions: int) -> int:
    """Return the number of rows of a band."""
    return max(1, min(BAND // channels, positions // 16))


def chunk_rows(channels: int, positions: int) -> int:
    """Return the number of rows that are measured together: a multiple of a band."""
    band = band_rows(channels, positions)
    return max(MIN_CHUNK_ROWS, CHUNK // channels) // band * band
