"""PyTorch calls of the fused CPU kernels, which compute in the tensors' own memory.

Eager tensors on the CPU are served; `torch_op` has what compiled programs call. Where PyTorch looks
through the computation - exporting, torch.func's transforms, forward mode, dispatch modes, double
backward - the portable implementation computes, which it can look through.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.autograd import forward_ad

from groupnorm.backends import cpu, layouts, torch_gpu
from groupnorm.backends.cpu_launch import Arrays, Saved, Team, Work, address, planned
from groupnorm.backends.pages import want_large_pages
from groupnorm.backends.torch_memory import PLAIN, cotangent, in_memory, is_wrapped, like
from groupnorm.backends.torch_threads import run_in_torch_threads, torch_helpers_for
from groupnorm.core import apply, apply_with_pullback
from groupnorm.errors import GroupNormError
from groupnorm.implementations import NotServed
from groupnorm.options import Options
from groupnorm.prepare import HOST_MASKS, check_cotangent, host_mask
from groupnorm.typing import Gradients

__all__ = [
    "Call",
    "as_parameter",
    "call_of",
    "functional",
    "fused",
    "fused_vjp",
    "is_wrapped",
]

_TEAM = Team(torch_helpers_for, run_in_torch_threads)


class Call(NamedTuple):
    """A call the kernels serve."""

    adapter: Any
    options: Options
    work: Work
    mask: Any  # as it was given
    flat_mask: Any
    scale: Any  # float32, a tensor or of NumPy
    bias: Any

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Saved]:
        """Return y, in x's memory format, and what backward needs."""
        work = self.work
        x, y = in_memory(x, work.layout), like(x, work.layout, work.kinds.dtype)
        return y, work.forward(self._arrays(x), _fresh(y))

    def backward(
        self, saved: Saved, x: torch.Tensor, dy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dx, and the gradients of scale and bias, flat in float32."""
        work, dy = self.work, cotangent(dy, x, self.work.layout)
        dx = like(x, work.layout, x.dtype)
        x = in_memory(x, work.layout)
        dscale = torch.empty(work.channels, dtype=torch.float32, device="cpu")
        dbias = torch.empty_like(dscale)
        dy_dtype = "float32" if dy.dtype is torch.float32 else work.kinds.x
        work.backward(
            saved, self._arrays(x), dy.data_ptr(), dy_dtype, _fresh(dx), dscale.data_ptr(),
            dbias.data_ptr(),
        )  # fmt: skip
        return dx, dscale, dbias

    def packed(self, saved: Saved) -> torch.Tensor:
        """Put what was saved behind a number that tells the order in memory it is of."""
        values = self.work.saved_values(saved)
        return torch.from_numpy(np.concatenate([[_signature(self.work.layout)], values]))

    def unpacked(self, packed: torch.Tensor) -> Saved | None:
        """Return what was packed, unless it was of another order in memory."""
        if packed[0].item() != _signature(self.work.layout):
            return None
        return Saved(packed.data_ptr() + packed.itemsize, packed)

    def _arrays(self, x: torch.Tensor) -> Arrays:
        mask = self.flat_mask
        where, size = (0, 0) if mask is None else (address(mask), mask.size)
        return Arrays(x.data_ptr(), _where(self.scale), _where(self.bias), where, size)


class _Fused(torch.autograd.Function):
    """The kernels forward and backward; derivatives of the gradient are those of portable code."""

    @staticmethod
    def forward(ctx: Any, x: Any, scale: Any, bias: Any, call: Call) -> Any:
        y, ctx.numbers = call.forward(x)
        ctx.save_for_backward(x, scale, bias)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (dy,) = gradients
        x, scale, bias = ctx.saved_tensors
        call: Call = ctx.call
        if torch.is_grad_enabled() or type(dy) is not torch.Tensor or is_wrapped(dy):
            return (*_differentiable(call, (x, scale, bias), ctx.needs_input_grad, dy), None)
        dx, dscale, dbias = call.backward(ctx.numbers, x, dy)
        _, for_scale, for_bias, _ = ctx.needs_input_grad
        return (
            dx,
            as_parameter(dscale, scale) if for_scale else None,
            as_parameter(dbias, bias) if for_bias else None,
            None,
        )


# Without what `Function.apply` does for torch.func's tensors, of which there are none here.
_apply: Any = super(torch.autograd.Function, _Fused).apply  # pyright: ignore[reportAttributeAccessIssue]


def _differentiable(call: Call, inputs: Any, wanted: Any, dy: Any) -> list[Any]:
    options = call.options._replace(implementation="portable")
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        y = apply(call.adapter, inputs[0], inputs[1], inputs[2], call.mask, options)
    chosen = [a for a, w in zip(inputs, wanted, strict=False) if w]
    found = iter(torch.autograd.grad(y, chosen, dy, create_graph=create_graph))
    return [next(found) if w else None for _, w in zip(inputs, wanted, strict=False)]


def fused(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y, or `NotServed`."""
    call = call_of(adapter, x, scale, bias, mask, options)
    if isinstance(call, NotServed):
        return call
    if torch.is_grad_enabled() and (
        x.requires_grad or _asks_for_gradient(scale) or _asks_for_gradient(bias)
    ):
        # What autograd is to see; constants from the host, which it is not, are in the call.
        scale = scale if isinstance(scale, torch.Tensor) else None
        bias = bias if isinstance(bias, torch.Tensor) else None
        return _apply(x, scale, bias, call)
    return call.forward(x)[0]


def _asks_for_gradient(a: Any) -> bool:
    return isinstance(a, torch.Tensor) and a.requires_grad


def fused_vjp(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y and its pullback, or `NotServed`."""
    call: Any = NotServed("torch.compile traces this")
    if not torch.compiler.is_compiling():
        call = call_of(adapter, x, scale, bias, mask, options)
    if isinstance(call, NotServed):
        return call
    y, saved = call.forward(x)

    def pullback(dy: Any) -> Gradients:
        check_cotangent(adapter, dy, x)
        if is_wrapped(dy):  # torch.func maps or differentiates the pullback
            portable = options._replace(implementation="portable")
            return apply_with_pullback(adapter, x, scale, bias, mask, portable)[1](dy)
        dx, *gradients = call.backward(saved, x, dy)
        dscale, dbias = gradients
        return Gradients(dx, as_parameter(dscale, scale), as_parameter(dbias, bias))

    return y, pullback


def as_parameter(gradient: Any, parameter: Any) -> Any:
    """Return a parameter's gradient, of float32 and flat, in its shape and dtype."""
    if parameter is None:
        return None
    found = gradient if parameter.ndim == 1 else gradient.reshape(parameter.shape)
    if parameter.dtype == torch.float32:
        return found
    if isinstance(parameter, torch.Tensor):
        return found.to(parameter.dtype)
    return found.to(getattr(torch, parameter.dtype.name))


def call_of(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return the `Call` the kernels compute, or `NotServed`."""
    if options.axis_name is not None:
        return NotServed("statistics of replicas are pooled by the portable implementation")
    if _looked_through():
        return NotServed("PyTorch looks through the computation, which kernels do not allow")
    # In one place, and cheap things first: this is much of the time of a small call.
    on_cpu = not torch_gpu.INTERPRETED
    for name, a in (("x", x), ("scale", scale), ("bias", bias)):
        if type(a) in PLAIN:
            if a.layout is not torch.strided or a.is_neg() or is_wrapped(a):
                return NotServed(f"{name} is no ordinary tensor")
            on_cpu = on_cpu and a.is_cpu
        elif a is not None and (a is x or type(a) is not np.ndarray):
            return NotServed(f"{name} is of type {type(a).__name__}")
    if not on_cpu:
        return torch_gpu.call_of(adapter, x, scale, bias, mask, options)
    work = planned(
        adapter, x.shape, x.stride(), x.dtype, None if scale is None else scale.dtype,
        None if bias is None else bias.dtype, options, _TEAM,
    )  # fmt: skip
    if isinstance(work, NotServed):
        return work
    for parameter in (scale, bias):
        if parameter is not None and parameter.shape not in work.parameter_shapes:
            return NotServed("a parameter does not have the shape of the feature axes")
    flat_mask = None if mask is None else _flat_mask(mask, work.layout)
    if isinstance(flat_mask, NotServed):
        return flat_mask
    return Call(
        adapter, options, work, mask, flat_mask, _flat_parameter(scale, 1.0, work),
        _flat_parameter(bias, 0.0, work),
    )  # fmt: skip


def _flat_parameter(parameter: Any, neutral: float, work: Work) -> Any:
    """Return a parameter contiguous in float32: itself if it is so already."""
    if parameter is None:
        return cpu.constant(neutral, work.channels)
    if not isinstance(parameter, torch.Tensor):
        return np.ascontiguousarray(parameter, np.float32)
    if parameter.dtype is torch.float32 and parameter.is_contiguous():
        return parameter
    return parameter.detach().to(torch.float32).contiguous()


def _signature(layout: layouts.Layout) -> float:
    """Return a number for an order of axes, which is not 0."""
    ndim = len(layout.shape)
    order = range(ndim) if layout.order is None else layout.order
    return float(1 + sum(a * ndim**i for i, a in enumerate(order)))


def _where(parameter: Any) -> int:
    if isinstance(parameter, torch.Tensor):
        return parameter.data_ptr()
    return address(parameter)


def _looked_through() -> bool:
    """Whether something other than values is asked for; private, but there is no other way."""
    return (
        getattr(forward_ad, "_current_level", -1) >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    )


def _flat_mask(mask: Any, layout: layouts.Layout) -> Any:
    if isinstance(mask, torch.Tensor):
        plain = type(mask) in PLAIN and not is_wrapped(mask) and mask.is_cpu
        if not plain or mask.layout is not torch.strided or mask.is_complex():
            return NotServed("the mask is no ordinary tensor on the CPU, or complex")
        return layouts.flat_mask((mask.detach() != 0).numpy(), layout)
    if not isinstance(mask, HOST_MASKS):
        return NotServed("the mask is of another library")
    try:
        return layouts.flat_mask(host_mask(mask), layout)
    except GroupNormError:
        return NotServed("the mask is no array of booleans")


def _fresh(a: torch.Tensor) -> int:
    """Return where a tensor begins that is about to be written."""
    where = a.data_ptr()
    want_large_pages(where, a.nbytes)
    return where


def functional(x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return what `torch.nn.functional.group_norm` computes, or `NotServed`."""
    channels = x.shape[1] if x.ndim > 1 else 0
    own = (
        mask is None
        and options.axis_name is None
        and options.reduction is None
        and tuple(a % max(x.ndim, 1) for a in options.feature) == (1,)
        and channels > 0
    )
    if not own:
        return NotServed(
            "torch.nn.functional.group_norm has its channels on axis 1 and takes neither a mask, "
            "reduction_axes nor axis_name"
        )
    if options.dtype not in (None, "input"):
        return NotServed("torch.nn.functional.group_norm keeps x's dtype")
    groups = options.num_groups or channels // (options.group_size or 1)
    try:
        y = torch.nn.functional.group_norm(x, groups, scale, bias, options.epsilon)
    except (RuntimeError, TypeError, ValueError) as error:
        return NotServed(f"torch.nn.functional.group_norm says: {error}")
    return y if options.activation is None else getattr(torch.nn.functional, options.activation)(y)
