"""The argument block of a CPU kernel: 64-bit words, passed by address.

So any thread of any library can run a kernel without Python's lock: PyTorch's OpenMP threads, XLA's
threads. Kernels allocate nothing, so they cannot fail.

A block holds addresses, then sizes, then, from `HEAD` on, the counters by which threads share the
work (see ``compiled/work_sharing.py``). What depends on the shape alone is a `Template`.
"""

from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.variants import ACTIVATIONS, DTYPES

__all__ = [
    "KERNELS",
    "LINE",
    "SMALL_SAMPLE",
    "Template",
    "kernel_shape",
    "number",
    "template",
]

# Samples of up to this many elements are processed by one thread each, in its own cache; up to the
# second limit if every thread gets the same number of samples. Threads process larger samples
# together, one sample after the other, in the cache they share.
SMALL_SAMPLE, SMALL_SAMPLE_IF_EVEN = 1 << 18, 1 << 21

# Addresses: x, y (or dx) and dy, float32 or the bits of halves, in x's memory order; scale and
# bias, (channels,) in float32; the mask, bytes, (1 or samples, positions); the saved statistics
# mean, rstd and 1 / count, (3, saved rows, groups) in float64; the sums of dy and dy * xhat over
# the positions and samples of each span, (2, spans, channels) in float64; the kernel's scratch
# buffer; the gradients of scale and bias, (batches, channels) in float32.
X, Y, DY, SCALE, BIAS, MASK, SAVED, SUMS, SCRATCH, DSCALE, DBIAS = range(11)
ADDRESSES = 11
# Sizes.
ELEMENTS, MASK_ELEMENTS, SAMPLES, GROUPS, SIZE, POSITIONS, ROWS, WIDTH = range(11, 19)
WHOLE_SAMPLES, PARTS, COUNTERS, EPSILON = range(19, 23)
# Lengths of the parts of the scratch buffer: float64 for the chunks' statistics or sums and for a
# sample's sums and means of the gradients, int64 for where bands begin, float32 for tables.
CHUNK_RESULTS, SAMPLE_RESULTS, BAND_STARTS, TABLES = range(23, 27)
# The number of batches of samples that have separate gradients of scale and bias.
BATCHES = 27
# For argument blocks made by XLA's handler: the words of the scratch buffer and of the sums, the
# bytes of y if huge pages are to be requested for it, how many threads still use the block, and the
# kernel (in templates, its `number`).
SCRATCH_WORDS, SUMS_WORDS, LARGE_PAGES, HOLDERS, RUN = range(28, 33)
# Consecutive samples whose gradients of scale and bias one thread adds up, and rows of the saved
# statistics: one per sample, or, if nothing needs them later, one per thread.
SPAN, SAVED_ROWS = range(33, 35)
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

    head: Any  # the words before the counters
    counters: int  # the number of words after them, all 0
    scratch: int  # the length of the scratch buffer, in words
    saved: int  # the length of the saved statistics, in words
    sums: int  # the length of the sums, in words

    @property
    def words(self) -> Any:
        """The whole block."""
        return np.concatenate([self.head, np.zeros(self.counters, np.int64)])


def kernel_shape(shape: GroupedShape) -> GroupedShape:
    """Return the shape that is passed to the kernels; with one position, both layouts are the same.

    Channels first is faster then, except if groups are small and rows long.
    """
    if shape.positions > 1 or not (shape.channels <= 32 or shape.group_size >= 16):
        return shape
    return shape._replace(channels_first=True)


# The gradients of scale and bias are summed over spans of samples first, in float64: of this many
# positions at least, so that the sums are small in comparison with x, if there are enough samples
# for this many spans, which threads share.
SPAN_POSITIONS, MIN_SPANS = 64, 8


def span_of(samples: int, positions: int) -> int:
    """Return the number of samples in a span: by the shape alone, or results would vary."""
    return max(1, min(-(-SPAN_POSITIONS // positions), samples // MIN_SPANS))


def _whole_samples(samples: int, elements: int, helpers: int) -> bool:
    """Whether threads process whole samples, which needs no synchronization within a sample."""
    if helpers == 0 or elements <= SMALL_SAMPLE * samples:
        return True
    return samples % (helpers + 1) == 0 and elements <= SMALL_SAMPLE_IF_EVEN * samples


def template(
    kernel: str, shape: GroupedShape, mask_elements: int, epsilon: float, helpers: int,
    batches: int = 1, *, keep: bool = True,
) -> Template:  # fmt: skip
    """Return the argument block of one of `KERNELS` for a shape and a number of helper threads.

    `keep` is whether the statistics of all samples are needed later.
    """
    first, backward = kernel.startswith("channels_first"), kernel.endswith("backward")
    samples, groups, positions = shape.samples, shape.groups, shape.positions
    channels, elements, parts = shape.channels, shape.elements, helpers + 1
    span = span_of(samples // batches, positions)
    whole_samples = span > 1 or _whole_samples(samples, elements, helpers)
    saved_rows = samples if keep or not (first or whole_samples) else min(samples, parts)
    rows = width = chunk_results = sample_results = band_starts = tables = 0
    if not first:
        # With a mask, rows are processed one by one.
        band = 1 if mask_elements else band_rows(channels, positions)
        rows = min(chunk_rows(channels, positions), -(-positions // band) * band)
        width = band * channels
        chunks, buffers = -(-positions // rows), parts if whole_samples else 1
        tables = (6 if backward else 3) * parts * width
        if backward:
            chunk_results = buffers * 2 * chunks * channels
            sample_results = 2 * (
                parts * (groups + channels) if whole_samples else samples * groups
            )
        else:
            chunk_results = buffers * chunks * (1 + 2 * channels)
            band_starts = parts * (rows * channels // width + 1)
    counters = 2 + parts if first or whole_samples else 2 + samples * (2 * parts + 1)
    words = np.zeros(HEAD, np.int64)
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
    words[CHUNK_RESULTS], words[SAMPLE_RESULTS] = chunk_results, sample_results
    words[BAND_STARTS], words[TABLES] = band_starts, tables
    # Tables begin at a cache line.
    scratch = 0 if first else chunk_results + sample_results + band_starts + -(-tables // 2) + LINE
    spans = batches * -(-(samples // batches) // span)
    sums = 2 * spans * channels if backward else 0
    words[BATCHES], words[SCRATCH_WORDS], words[SUMS_WORDS] = batches, scratch, sums
    words[SPAN], words[SAVED_ROWS] = span, saved_rows
    return Template(words, counters * LINE, scratch, 3 * saved_rows * groups, sums)


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
