"""NumPy calls of the fused CPU kernels: what they serve, and arrays as the kernels want them."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends import cpu, cpu_launch
from groupnorm.errors import ArgumentTypeError
from groupnorm.implementations import NotServed
from groupnorm.options import Options
from groupnorm.prepare import check_cotangent, dtypes_of, host_mask
from groupnorm.typing import Gradients

__all__ = ["bits", "constant", "fused", "fused_vjp", "row_kinds"]


class _Dtypes(NamedTuple):
    """What a call's arrays hold."""

    result: Any
    float16: bool  # whether it must be converted


class _Call(NamedTuple):
    """A call the kernels serve."""

    layout: cpu.Layout
    dtypes: _Dtypes
    x: Any  # flat, in memory order
    scale: Any
    bias: Any
    mask: Any

    def forward(self, options: Options) -> tuple[Any, cpu_launch.Saved]:
        """Return y, which lies in memory as x does, and what backward needs."""
        y = np.empty(self.layout.plan.shape, self.dtypes.result)
        saved = cpu_launch.forward(
            self.layout, self.x, bits(y.reshape(-1)), self.scale, self.bias, self.mask,
            options.epsilon, options.activation,
        )  # fmt: skip
        return _restored(y, self.layout), saved


def fused(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y, or `NotServed`."""
    call = _call(adapter, x, scale, bias, mask, options)
    return call if isinstance(call, NotServed) else call.forward(options)[0]


def fused_vjp(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y and its pullback, or `NotServed`."""
    call = _call(adapter, x, scale, bias, mask, options)
    if isinstance(call, NotServed):
        return call
    # The caller may change parameters in place before the pullback is called.
    call = call._replace(scale=call.scale.copy(), bias=call.bias.copy())
    y, saved = call.forward(options)
    return y, _pullback(adapter, call, saved, x, scale, bias, options)


def _pullback(
    adapter: Any,
    call: _Call,
    saved: cpu_launch.Saved,
    x: Any,
    scale: Any,
    bias: Any,
    options: Options,
) -> Callable[[Any], Gradients]:
    def pullback(dy: Any) -> Gradients:
        if not adapter.is_array(dy):
            raise ArgumentTypeError(
                f"dy is of type {type(dy).__name__}: a cotangent is a NumPy array, as y is."
            )
        check_cotangent(adapter, dy, x)
        if dy.dtype != call.dtypes.result or dy.dtype != x.dtype:
            dy = dy.astype(np.float32)
        dx = np.empty(call.layout.plan.shape, x.dtype)
        dbias, dscale = cpu_launch.backward(
            call.layout, saved, call.x, _memory(dy, call.layout), bits(dx.reshape(-1)), call.scale,
            call.bias, call.mask, options.activation,
        )  # fmt: skip
        return Gradients(
            _restored(dx, call.layout), _as_parameter(dscale, scale), _as_parameter(dbias, bias)
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
    kinds = (None if p is None else p.dtype for p in (scale, bias))
    planned = _planned(adapter, x.shape, strides, x.dtype, *kinds, options)
    if isinstance(planned, NotServed):
        return planned
    layout, dtypes = planned
    parameters = []
    for parameter, neutral in ((scale, 1.0), (bias, 0.0)):
        if parameter is None:
            parameters.append(constant(neutral, layout.channels))
        elif parameter.shape not in (layout.feature_shape, (layout.channels,)):
            return NotServed("a parameter does not have the shape of the feature axes")
        else:
            flat = np.ascontiguousarray(parameter, np.float32).reshape(-1)
            parameters.append(_writable(flat))
    flat_mask = None if mask is None else cpu.flat_mask(host_mask(mask), layout)
    if isinstance(flat_mask, NotServed):
        return flat_mask
    return _Call(layout, dtypes, _memory(x, layout), parameters[0], parameters[1], flat_mask)


@lru_cache(maxsize=4096)
def _planned(
    adapter: Any, shape: Any, strides: Any, x: Any, scale: Any, bias: Any, options: Options
) -> Any:
    """Return the layout and what the arrays hold: all that does not depend on values."""
    dtypes = _dtypes(adapter, x, scale, bias, options)
    if isinstance(dtypes, NotServed):
        return dtypes
    why = cpu.unavailable(dtypes.float16)
    if why is not None:
        return why
    layout = cpu.layout_of(shape, strides, options)
    return layout if isinstance(layout, NotServed) else (layout, dtypes)


@lru_cache(maxsize=1024)
def constant(value: float, channels: int) -> Any:
    """Return as many equal parameters as there are channels."""
    return np.full(channels, value, np.float32)


class _Typed(NamedTuple):
    """As much of an array as its dtype is asked for."""

    dtype: Any


def _dtypes(adapter: Any, x: Any, scale: Any, bias: Any, options: Options) -> Any:
    typed_scale, typed_bias = (None if d is None else _Typed(d) for d in (scale, bias))
    given = [d for d in (x, scale, bias) if d is not None]
    if not all(map(adapter.is_real_floating, given)):
        return NotServed(
            f"x or a parameter is of {given}: the kernels are for real floating dtypes"
        )
    work, _, result = dtypes_of(adapter, _Typed(x), typed_scale, typed_bias, options)
    return row_kinds(x.name, np.dtype(work).name, np.dtype(result).name, result)


def row_kinds(x: str, work: str, result: str, dtype: Any = None) -> Any:
    """Say how rows of these dtypes are computed; the arithmetic is float32's."""
    served = ("float32", "float16", "bfloat16")
    if work != "float32" or x not in served or result not in served:
        return NotServed(
            f"x of {x} to a result of {result}, computed in {work}: the kernels are for float32, "
            "float16 and bfloat16, computed in float32"
        )
    return _Dtypes(dtype, "float16" in (x, result))


def _memory(a: Any, layout: cpu.Layout) -> Any:
    """Return an array's elements in the order of x's memory: flat, half precision as bits."""
    if layout.order is not None:
        a = a.transpose(layout.order)
    return _writable(bits(np.ascontiguousarray(a).reshape(-1)))


def _restored(a: Any, layout: cpu.Layout) -> Any:
    """Bring the axes of what lies in memory order back to x's."""
    return a if layout.order is None else a.transpose(layout.inverse)


def bits(a: Any) -> Any:
    """Return an array as the kernels take it: float16 as uint16, bfloat16 as int16."""
    if a.dtype.itemsize == 2:
        return a.view(np.uint16 if a.dtype == np.float16 else np.int16)
    return a


class _Interface:
    """A read-only array as one that is not: numba would compile all again for those."""

    def __init__(self, a: Any) -> None:
        self.owner = a
        interface = a.__array_interface__
        self.__array_interface__ = interface | {"data": (interface["data"][0], False)}


def _writable(a: Any) -> Any:
    if a.flags.writeable:
        return a
    return np.asarray(_Interface(a))  # the kernels do not write to it
