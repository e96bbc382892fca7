"""NumPy calls of the fused CPU kernels: what they serve, and arrays as the kernels want them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends import cpu
from groupnorm.backends.cpu_launch import Arrays, Saved, Work, address, planned
from groupnorm.backends.layouts import flat_mask, in_memory, restored
from groupnorm.errors import ArgumentTypeError
from groupnorm.implementations import NotServed
from groupnorm.options import Options
from groupnorm.prepare import check_cotangent, host_mask
from groupnorm.typing import Gradients

__all__ = ["fused", "fused_vjp"]


class _Call(NamedTuple):
    """A call the kernels serve."""

    work: Work
    x: Any  # contiguous, in memory order
    scale: Any  # float32, contiguous
    bias: Any
    mask: Any  # as `layouts.flat_mask` returns it

    @property
    def arrays(self) -> Arrays:
        """The arrays as the kernels take them."""
        mask, size = (0, 0) if self.mask is None else (address(self.mask), self.mask.size)
        return Arrays(address(self.x), address(self.scale), address(self.bias), mask, size)

    def forward(self) -> tuple[Any, Saved]:
        """Return y, which lies in memory as x does, and what backward needs."""
        layout, kinds = self.work.layout, self.work.kinds
        y = np.empty(layout.plan.shape, kinds.dtype)
        saved = self.work.forward(self.arrays, address(y))
        return restored(y, layout), saved


def fused(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y, or `NotServed`."""
    call = _call(adapter, x, scale, bias, mask, options)
    return call if isinstance(call, NotServed) else call.forward()[0]


def fused_vjp(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y and its pullback, or `NotServed`."""
    call = _call(adapter, x, scale, bias, mask, options)
    if isinstance(call, NotServed):
        return call
    # The caller may change parameters in place before the pullback is called.
    call = call._replace(scale=call.scale.copy(), bias=call.bias.copy())
    y, saved = call.forward()
    return y, _pullback(adapter, call, saved, x, scale, bias)


def _pullback(
    adapter: Any, call: _Call, saved: Saved, x: Any, scale: Any, bias: Any
) -> Callable[[Any], Gradients]:
    def pullback(dy: Any) -> Gradients:
        if not adapter.is_array(dy):
            raise ArgumentTypeError(
                f"dy is of type {type(dy).__name__}: a cotangent is a NumPy array, as y is."
            )
        check_cotangent(adapter, dy, x)
        if dy.dtype != x.dtype:  # the kernels are compiled for that, or full precision
            dy = dy.astype(np.float32)
        work, layout = call.work, call.work.layout
        dx, dy = np.empty(layout.plan.shape, x.dtype), in_memory(dy, layout, np)
        dscale, dbias = np.empty((2, work.channels), np.float32)
        work.backward(
            saved, call.arrays, address(dy), dy.dtype.name, address(dx), address(dscale),
            address(dbias),
        )  # fmt: skip
        return Gradients(
            restored(dx, layout), _as_parameter(dscale, scale), _as_parameter(dbias, bias)
        )

    return pullback


def _as_parameter(gradient: Any, parameter: Any) -> Any:
    if parameter is None:
        return None
    return gradient.astype(parameter.dtype).reshape(parameter.shape)


def _call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    if options.axis_name is not None:  # which may be a communicator that has no hash
        return NotServed("statistics of replicas are pooled by the portable implementation")
    if type(x) is not np.ndarray or not x.dtype.isnative:
        return NotServed(f"x is of type {type(x).__name__}, or not in the machine's byte order")
    for parameter in (scale, bias):
        if parameter is not None and type(parameter) is not np.ndarray:
            return NotServed("a parameter is no plain NumPy array")
    strides = tuple(s // x.itemsize for s in x.strides)
    dtypes = (None if p is None else p.dtype for p in (scale, bias))
    work = planned(adapter, x.shape, strides, x.dtype, *dtypes, options)
    if isinstance(work, NotServed):
        return work
    parameters, layout = [], work.layout
    for parameter, neutral in ((scale, 1.0), (bias, 0.0)):
        if parameter is None:
            parameters.append(cpu.constant(neutral, work.channels))
        elif parameter.shape not in work.parameter_shapes:
            return NotServed("a parameter does not have the shape of the feature axes")
        else:
            parameters.append(np.ascontiguousarray(parameter, np.float32))
    flat = None if mask is None else flat_mask(host_mask(mask), layout)
    if isinstance(flat, NotServed):
        return flat
    return _Call(work, in_memory(x, layout, np), parameters[0], parameters[1], flat)
