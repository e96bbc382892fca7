"""Launch planning for GPU kernels that does not depend on the library or on values."""

from functools import lru_cache
from typing import Any, NamedTuple

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.tiling import MAX_OFFSET
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.layout import (
    KernelDtypes,
    MemoryLayout,
    kernel_dtypes,
    layout_of,
)

__all__ = ["Work", "planned"]

FEW_POSITIONS, MANY_ELEMENTS = 8, 1 << 24
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Work(NamedTuple):
    """A normalization planned for one memory layout, whatever the values."""

    layout: MemoryLayout
    dtypes: KernelDtypes
    shape: GroupedShape
    epsilon: float
    activation: str | None

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that parameters may have."""
        return self.layout.feature_shape, (self.shape.channels,)

    @property
    def row_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that parameters with a row for each sample may have."""
        return self.layout.row_shapes

    def forward(
        self, mask_elements: int, scale: bool, bias: bool, rows: bool
    ) -> gpu.LaunchSequence:
        """Return the launches that compute y and the statistics; without a mask, its size is 0."""
        return gpu.forward(self.shape, self._options(mask_elements, scale, bias, rows))

    def backward(
        self, mask_elements: int, scale: bool, bias: bool, rows: bool
    ) -> gpu.LaunchSequence:
        """Return the launches that compute dx, dscale and dbias."""
        batches = self.gradient_rows(rows=rows)
        return gpu.backward(self.shape, self._options(mask_elements, scale, bias, rows), batches)

    def gradient_rows(self, *, rows: bool) -> int:
        """Return the number of rows, of all channels, of the gradients of scale and bias."""
        return self.shape.samples if rows else 1

    def _options(
        self, mask_elements: int, scale: bool, bias: bool, rows: bool
    ) -> gpu.KernelOptions:
        mask = None
        if mask_elements:
            mask = "one" if mask_elements == self.shape.positions else "each"
        return gpu.KernelOptions(self.epsilon, self.activation, mask, scale, bias, rows)


@lru_cache(maxsize=4096)
def planned(
    adapter: Any, shape: Any, strides: Any, x: Any, scale: Any, bias: Any, options: CallOptions
) -> Work | Unsupported:
    """Plan a call by its shape, strides in elements and dtypes; None for a missing parameter's."""
    dtypes = kernel_dtypes(adapter, x, scale, bias, options)
    if isinstance(dtypes, Unsupported):
        return dtypes
    layout = layout_of(tuple(shape), strides, options)
    if isinstance(layout, Unsupported):
        return layout
    kept = [a for a in layout.order or () if a in _kept(layout)]
    if kept != sorted(kept):
        # The saved statistics have the samples in the order of x's axes.
        return Unsupported("the kept axes (samples) are permuted in memory")
    grouped = layout.grouped._replace(item_bytes=ITEM_BYTES[dtypes.x])
    if grouped.channels > MAX_OFFSET:
        return Unsupported(f"{grouped.channels} channels exceed the kernels' limit of {MAX_OFFSET}")
    if grouped.positions < FEW_POSITIONS and grouped.elements > MANY_ELEMENTS:
        # The sums for the gradients of scale and bias, one row per sample, would be about as large
        # as x.
        return Unsupported(
            f"{grouped.positions} positions are too few for {grouped.samples} samples: beyond "
            f"{MANY_ELEMENTS} elements the kernels need {FEW_POSITIONS} positions"
        )
    return Work(layout, dtypes, grouped, options.epsilon, options.activation)


def _kept(layout: MemoryLayout) -> set[int]:
    """Return the axes of x that have separate statistics."""
    order = layout.order or tuple(range(len(layout.shape)))
    return {order[a] for a in layout.plan.kept_axes}
