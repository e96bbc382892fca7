"""What a kernel is told in one call: a frame of 64-bit words, whose address is all it takes.

So any thread of any library can run it, without Python's lock: OpenMP's of PyTorch, XLA's of JAX.
Nothing is allocated in a kernel, so none can fail.

A frame is addresses, then sizes, then, from `HEAD` on, the counters by which threads share the work
(see ``compiled/work_sharing.py``). What depends on the shape alone is a `Template`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.variants import ACTIVATIONS, DTYPES

__all__ = [
    "APART",
    "KERNELS",
    "LINE",
    "Template",
    "number",
    "template",
]

# Samples of up to this many elements are done by one thread each, in its own cache, and up to the
# second if all threads get equally many; larger ones by all of them together, one after the other,
# in the cache they share.
APART, APART_IF_EVEN = 1 << 18, 1 << 21

# Addresses. Those of x, y (or dx) and dy, float32 or the bits of halves, in x's order in memory; of
# scale and bias, (channels,) in float32; of the mask, bytes, (1 or samples, positions); of what is
# saved, mean, rstd and share (1 / count), (3, samples, groups) in float64; of the gradients' sums,
# (2, samples, channels) in float64; of memory for the kernel's own use; and of the gradients of
# scale and bias, (batches, channels) in float32.
X, Y, DY, SCALE, BIAS, MASK, SAVED, SUMS, SCRATCH, DSCALE, DBIAS = range(11)
ADDRESSES = 11
# Sizes.
ELEMENTS, MASK_ELEMENTS, SAMPLES, GROUPS, SIZE, POSITIONS, ROWS, WIDTH = range(11, 19)
APARTNESS, PARTS, COUNTERS, EPSILON = range(19, 23)
# How the scratch is divided: float64 for sums of chunks and for the groups' pulls, int64 for where
# bands begin, and then float32 for tables.
ROOM, PULLS, STARTS, TABLES = range(23, 27)
# How many parts the samples have whose gradients of scale and bias are apart.
BATCHES = 27
# For frames that XLA's handler makes: the words of the scratch and of the sums, the bytes of y if
# that is to have large pages, how many threads still hold the frame, and the kernel, in templates
# by its `number`.
SCRATCH_WORDS, SUMS_WORDS, LARGE_PAGES, HOLDERS, RUN = range(28, 33)
HEAD = 40

# The words of a line of the cache, of which each counter has one to itself.
LINE = 8


KERNELS = (
    "channels_first_forward",
    "channels_first_backward",
    "channels_last_forward",
    "channels_last_backward",
)
NUMBERS = len(KERNELS) * len(DTYPES) ** 3 * 2 * len(ACTIVATIONS)


def number(kernel: str, x: str, y: str, dy: str, masked: bool, activation: str | None) -> int:
    """Return a kernel's number, from 1 to `NUMBERS`."""
    found = KERNELS.index(kernel)
    for dtype in (x, y, dy):
        found = found * len(DTYPES) + DTYPES.index(dtype)
    return 1 + (found * 2 + masked) * len(ACTIVATIONS) + ACTIVATIONS[activation]


class Template(NamedTuple):
    """What is the same for all calls of one shape."""

    words: Any  # the frame, without addresses
    scratch: int  # words


def _is_apart(samples: int, elements: int, helpers: int) -> bool:
    """Whether each thread does samples of its own, which needs no waiting in the midst of one."""
    if helpers == 0 or elements <= APART * samples:
        return True
    return samples % (helpers + 1) == 0 and elements <= APART_IF_EVEN * samples


@lru_cache(maxsize=4096)
def template(
    kernel: str, shape: GroupedShape, mask_elements: int, epsilon: float, helpers: int
) -> Template:
    """Return the frame of one of `KERNELS` for this shape; so many threads may help."""
    first, backward = kernel.startswith("channels_first"), kernel.endswith("backward")
    samples, groups, positions = shape.samples, shape.groups, shape.positions
    channels, elements, parts = shape.channels, shape.elements, helpers + 1
    apart = _is_apart(samples, elements, helpers)
    rows = width = room = pulls = starts = tables = 0
    if not first:
        # Rows that may be masked out go one by one.
        band = 1 if mask_elements else band_rows(channels, positions)
        rows, width = chunk_rows(channels, positions), band * channels
        chunks, grounds = -(-positions // rows), parts if apart else 1
        tables = (6 if backward else 3) * parts * width
        if backward:
            room, pulls = grounds * 2 * chunks * channels, 2 * samples * groups
        else:
            room = grounds * chunks * (1 + 2 * channels)
            starts = parts * (rows * channels // width + 1)
    counters = 2 + parts if first or apart else 2 + samples * (2 * parts + 1)
    words = np.zeros(HEAD + counters * LINE, np.int64)
    words[ELEMENTS], words[MASK_ELEMENTS] = elements, mask_elements
    words[SAMPLES], words[GROUPS], words[SIZE], words[POSITIONS] = (
        samples,
        groups,
        shape.group_size,
        positions,
    )
    words[ROWS], words[WIDTH], words[APARTNESS], words[PARTS] = rows, width, apart, parts
    words[COUNTERS], words[EPSILON] = counters, np.float64(epsilon).view(np.int64)
    words[ROOM], words[PULLS], words[STARTS], words[TABLES] = room, pulls, starts, tables
    # Tables begin where a line of the cache does.
    scratch = 0 if first else room + pulls + starts + -(-tables // 2) + LINE
    words[BATCHES], words[SCRATCH_WORDS] = 1, scratch
    words[SUMS_WORDS] = 2 * samples * channels if backward else 0
    words.flags.writeable = False
    return Template(words, scratch)


# How channels-last arrays are taken: by the shape alone, or numbers would depend on threads. A band
# has elements enough to forget what starting a loop costs, and few enough for its tables to stay in
# the first cache.
BAND = 512
# Elements of a chunk, and the least rows, which a merge of its channels is spread over.
CHUNK, LEAST_ROWS = 65536, 128


def band_rows(channels: int, positions: int) -> int:
    """Return how many rows loops run over at once."""
    return max(1, min(BAND // channels, positions // 16))


def chunk_rows(channels: int, positions: int) -> int:
    """Return how many rows are measured together, some bands of them."""
    band = band_rows(channels, positions)
    return max(LEAST_ROWS, CHUNK // channels) // band * band
