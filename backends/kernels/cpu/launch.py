"""Plan calls of the CPU kernels, and call them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.cpu.availability import core, why_unavailable
from groupnorm.backends.kernels.layout import KernelDtypes, MemoryLayout, kernel_dtypes, layout_of
from groupnorm.backends.kernels.variants import ACTIVATIONS, DTYPES
from groupnorm.num_threads import get_num_threads

__all__ = ["OWN", "Arrays", "Threads", "Work", "planned"]


class Threads(NamedTuple):
    """The threads that run kernels."""

    number: Callable[[], int]  # how many a call may use
    by_openmp: bool  # whether they are PyTorch's, by the core's `use_openmp`


OWN = Threads(get_num_threads, by_openmp=False)

# Smaller calls use one thread in any case (twice `WORTH_A_SPINNING_THREAD` of core/run.cpp).
WORTH_THREADS = 1 << 15


class Arrays(NamedTuple):
    """What kernels read: objects with a buffer, addresses, or None.

    x is dense in the order of the `MemoryLayout`; scale and bias are float32, (channels,) or
    (samples, channels); the mask is what `flat_mask` returns.
    """

    x: Any
    scale: Any
    bias: Any
    mask: Any


class Work:
    """A normalization planned for one memory layout, whatever the values.

    Parameters
    ----------
    layout : MemoryLayout
    dtypes : KernelDtypes
    epsilon : float
    activation : str or None
    threads : Threads
    """

    def __init__(
        self,
        layout: MemoryLayout,
        dtypes: KernelDtypes,
        epsilon: float,
        activation: str | None,
        threads: Threads,
    ) -> None:
        self.layout, self.dtypes = layout, dtypes
        shape = layout.grouped
        self.channels = shape.channels
        #: The shapes that parameters may have, and those with a row for each sample.
        self.parameter_shapes = (layout.feature_shape, (shape.channels,))
        self.row_shapes = layout.row_shapes
        self._threads = threads.number if shape.elements >= WORTH_THREADS else _one
        sizes = shape.samples, shape.groups, shape.group_size, shape.positions
        x, y = (DTYPES.index(dtype) for dtype in (dtypes.x, dtypes.result))
        self._plans = [
            core().Plan(
                *sizes, shape.channels_first, x, y, ACTIVATIONS[activation], epsilon,
                threads.by_openmp, rows,
            )
            for rows in (False, True)
        ]  # fmt: skip

    def forward(self, arrays: Arrays, y: Any, *, rows: bool, keep: bool) -> Any:
        """Normalize x into y; return what `backward` needs, or None if it is not to be kept.

        It is an object with a buffer: mean, rstd and 1 / count, (3, samples, groups) in float64.
        `rows` is whether scale and bias have a row for each sample.
        """
        return self._plans[rows].forward(*arrays, y, keep, self._threads())

    def backward(
        self, saved: Any, arrays: Arrays, dy: Any, dy_dtype: str, dx: Any, dscale: Any, dbias: Any,
        *, rows: bool,
    ) -> None:  # fmt: skip
        """Write dx, in x's dtype, and the gradients of scale and bias, in float32.

        dy has x's dtype or float32; `saved` is what `forward` returned for the same arrays.
        """
        batches = self.gradient_rows(rows=rows)
        self._plans[rows].backward(
            *arrays, saved, dy, DTYPES.index(dy_dtype), dx, dscale, dbias, batches, self._threads()
        )

    def gradient_rows(self, *, rows: bool) -> int:
        """Return the number of rows, of all channels, of the gradients of scale and bias."""
        return self.layout.grouped.samples if rows else 1


def _one() -> int:
    return 1


# An entry takes a few kilobytes, whatever the sizes: it holds no arrays.
@lru_cache(maxsize=1024)
def planned(
    adapter: Any, shape: Any, strides: Any, x: Any, scale: Any, bias: Any, options: CallOptions,
    threads: Threads = OWN,
) -> Work | Unsupported:  # fmt: skip
    """Plan a call by everything but values: shape, strides, dtypes and options."""
    dtypes = kernel_dtypes(adapter, x, scale, bias, options)
    if isinstance(dtypes, Unsupported):
        return dtypes
    why = why_unavailable()
    layout = layout_of(tuple(shape), strides, options) if why is None else why
    if isinstance(layout, Unsupported):
        return layout
    return Work(layout, dtypes, options.epsilon, options.activation, threads)
