"""Bind a call's arrays to planned work, the same way for every library."""

from collections.abc import Callable
from typing import Any, NamedTuple

from groupnorm.adapter import Unsupported
from groupnorm.errors import GroupNormError

__all__ = ["Bound", "bind"]


class Bound(NamedTuple):
    """Work, and the arrays other than x as kernels read them."""

    work: Any
    scale: Any
    bias: Any
    mask: Any  # as `layout.flat_mask` returns it; None without a mask
    rows: bool  # whether scale and bias have a row for each sample


def bind(
    work: Any,
    scale: Any,
    bias: Any,
    mask: Any,
    to_mask: Callable[[Any, Any], Any],
    to_parameter: Callable[[Any], Any],
) -> Bound | Unsupported:
    """Check a call's arrays against its planned work, and convert them to what kernels read.

    Parameters
    ----------
    work : Work or Unsupported
        What `planned` returned for x.
    scale, bias, mask : array or None
        As passed by the caller.
    to_mask : callable
        Called with a mask and the work; returns `layout.flat_mask` of it, or `Unsupported`.
    to_parameter : callable
        Called with a parameter or None.
    """
    if isinstance(work, Unsupported):
        return work
    rows = False
    shapes = work.parameter_shapes
    if (scale is not None and scale.shape not in shapes) or (
        bias is not None and bias.shape not in shapes
    ):
        rows, shapes = True, work.row_shapes
        if not all(a is None or a.shape in shapes for a in (scale, bias)):
            return Unsupported("a parameter does not have the shape of the feature axes")
    if mask is not None:
        try:
            mask = to_mask(mask, work)
        except GroupNormError as error:  # the portable implementation raises it too
            return Unsupported(str(error))
        if isinstance(mask, Unsupported):
            return mask
    return Bound(work, to_parameter(scale), to_parameter(bias), mask, rows)
