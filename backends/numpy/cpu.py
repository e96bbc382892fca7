"""Calling the CPU kernels with NumPy arrays."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.binding import bind
from groupnorm.backends.kernels.cpu import availability
from groupnorm.backends.kernels.cpu.launch import Arrays, Work, planned
from groupnorm.backends.kernels.layout import flat_mask, in_memory, restored
from groupnorm.errors import ArgumentTypeError
from groupnorm.portable.inputs import HOST_MASKS, check_cotangent, host_mask
from groupnorm.typing import Gradients

__all__ = ["NumpyKernels"]


class _Call(NamedTuple):
    """A call bound to a kernel."""

    work: Work
    x: Any  # contiguous, in memory order
    scale: Any  # float32, contiguous
    bias: Any
    mask: Any  # as `layout.flat_mask` returns it
    rows: bool  # whether scale and bias have a row for each sample

    @property
    def arrays(self) -> Arrays:
        """The arrays as the kernels receive them."""
        return Arrays(_buffer(self.x), self.scale, self.bias, self.mask)

    def forward(self, *, keep: bool) -> tuple[Any, Any]:
        """Return y, which has x's memory layout, and the statistics for backward."""
        layout, dtypes = self.work.layout, self.work.dtypes
        y = np.empty(layout.plan.shape, dtypes.result_dtype)
        saved = self.work.forward(self.arrays, _buffer(y), rows=self.rows, keep=keep)
        return restored(y, layout), saved


class NumpyKernels(Kernels):
    """The CPU kernels, called with NumPy arrays."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self._adapter = adapter

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why kernels are unavailable: the compiled core is missing."""
        return availability.why_unavailable()

    def forward(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y, or `Unsupported`."""
        call = _call(self._adapter, x, scale, bias, mask, options)
        return call if isinstance(call, Unsupported) else call.forward(keep=False)[0]

    def vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y and its pullback, or `Unsupported`."""
        call = _call(self._adapter, x, scale, bias, mask, options)
        if isinstance(call, Unsupported):
            return call
        # The caller may modify parameters in place before calling the pullback.
        call = call._replace(
            scale=None if scale is None else call.scale.copy(),
            bias=None if bias is None else call.bias.copy(),
        )
        y, saved = call.forward(keep=True)
        return y, _pullback(self._adapter, call, saved, x, scale, bias)


def _pullback(
    adapter: Any, call: _Call, saved: Any, x: Any, scale: Any, bias: Any
) -> Callable[[Any], Gradients]:
    def pullback(dy: Any) -> Gradients:
        if not adapter.is_array(dy):
            raise ArgumentTypeError(
                f"dy is of type {type(dy).__name__}: a cotangent must be a NumPy array, as y is."
            )
        dy = check_cotangent(adapter, dy, x)
        if dy.dtype != x.dtype:  # kernels are compiled for x's dtype and float32
            with np.errstate(under="ignore"):
                dy = dy.astype(np.float32)
        work, layout = call.work, call.work.layout
        dx, dy = np.empty(layout.plan.shape, x.dtype), _aligned(in_memory(dy, layout, np))
        dscale, dbias = np.empty((2, work.gradient_rows(rows=call.rows), work.channels), np.float32)
        work.backward(
            saved, call.arrays, _buffer(dy), dy.dtype.name, _buffer(dx), dscale, dbias,
            rows=call.rows,
        )  # fmt: skip
        return Gradients(
            restored(dx, layout), _as_parameter(dscale, scale), _as_parameter(dbias, bias)
        )

    return pullback


def _as_parameter(gradient: Any, parameter: Any) -> Any:
    if parameter is None:
        return None
    if gradient.dtype != parameter.dtype:
        with np.errstate(under="ignore"):
            gradient = gradient.astype(parameter.dtype)
    return gradient.reshape(parameter.shape)


def _buffer(a: Any) -> Any:
    """Return an array whose buffer can be read: bfloat16 of ml_dtypes has none."""
    return a.view(np.uint16) if a.dtype.kind == "V" else a


def _call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    if type(x) is not np.ndarray or not x.dtype.isnative:
        return Unsupported(f"x is of type {type(x).__name__}, or not in native byte order")
    for parameter in (scale, bias):
        if parameter is not None and type(parameter) is not np.ndarray:
            return Unsupported("a parameter is not a plain NumPy array")
    strides = tuple(s // x.itemsize for s in x.strides)
    dtypes = (None if p is None else p.dtype for p in (scale, bias))
    work = planned(adapter, x.shape, strides, x.dtype, *dtypes, options)
    bound = bind(work, scale, bias, mask, _flat_mask, _flat_parameter)
    if isinstance(bound, Unsupported):
        return bound
    x = _aligned(in_memory(x, bound.work.layout, np))
    return _Call(bound.work, x, bound.scale, bound.bias, bound.mask, bound.rows)


def _flat_mask(mask: Any, work: Work) -> Any:
    if not isinstance(mask, HOST_MASKS):
        return Unsupported("the mask is an array of another library")
    return flat_mask(host_mask(mask), work.layout)


def _flat_parameter(parameter: Any) -> Any:
    return None if parameter is None else _aligned(np.ascontiguousarray(parameter, np.float32))


def _aligned(a: Any) -> Any:
    """Return an array that kernels can read: at an address that is a multiple of an element."""
    return a if a.flags.aligned else a.copy()
