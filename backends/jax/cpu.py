"""The kernels for CPUs, called by XLA's foreign function interface."""

import ctypes
import logging
from functools import lru_cache
from typing import Any

import jax

from groupnorm.adapter import Unsupported
from groupnorm.backends.jax.internals import operand_and_result_types
from groupnorm.backends.jax.primitives import Spec, normalize_p, pull_back_p, register_lowering
from groupnorm.backends.kernels.cpu import availability as cpu
from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu import launch as cpu_launch
from groupnorm.backends.kernels.cpu.huge_pages import are_worth_it
from groupnorm.backends.kernels.cpu.threads import helpers_for

__all__ = ["why_unavailable"]

_TARGET = "groupnorm_cpu_kernel"

_log = logging.getLogger("groupnorm")


def why_unavailable(float16: bool) -> Unsupported | None:
    """Return why there are no kernels for CPUs here, or none that read float16."""
    why = cpu.why_unavailable(float16)
    return _interface() if why is None else why


@lru_cache(maxsize=1)
def _interface() -> Unsupported | None:
    """Register the handler with XLA; return why it cannot be used, or None."""
    why = cpu.why_unavailable(float16=False)
    if why is not None:
        return why
    module = cpu.kernels("xla_handler")
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(module.handler()[0].address)
    try:
        # Before there is a backend, JAX only queues the handler; XLA then refuses it while the
        # backend starts, which fails with it.
        jax.devices("cpu")
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(function), platform="cpu")
    except (RuntimeError, ValueError) as error:  # XLA's errors are RuntimeErrors today
        version = ".".join(map(str, module.API))
        why = Unsupported(
            "XLA does not accept the handler of the kernels for CPUs, which was written for "
            f"version {version} of its foreign function interface: {error}"
        )
        _log.warning("groupnorm computes without kernels in JAX on CPUs: %s", why.reason)
    return why


# Lowerings ----------------------------------------------------------------------------------------


def _call(
    context: Any, operands: Any, spec: Spec, kernel: str, dy: str, slots: dict[int, int],
    result: Any, batches: int,
) -> Any:  # fmt: skip
    """Lower to a call of the handler.

    `slots` maps slots of the frame to operands, counted from 1, and results, counted from 101.
    """
    given: Any = operand_and_result_types(context)
    x, activation = given[0][slots[frames.X] - 1].dtype.name, spec.options.activation
    y, masked = result.dtype.name, frames.MASK in slots
    shape = frames.kernel_shape(spec.shape)
    name = f"channels_{'first' if shape.channels_first else 'last'}_{kernel}"
    mask = given[0][slots[frames.MASK] - 1].size if masked else 0
    helpers = helpers_for(result.size)
    template = frames.template(name, shape, mask, spec.options.epsilon, helpers, batches)
    number = frames.number(name, x, y, dy, masked, activation)
    entry = cpu_launch.entry(name, x, y, dy, masked, activation)
    where = ctypes.cast(entry, ctypes.c_void_p).value
    cpu.kernels("xla_handler").table()[number] = where
    words = template.words
    words[frames.RUN] = number
    size = result.size * result.dtype.itemsize
    words[frames.LARGE_PAGES] = size if are_worth_it(size) else 0
    for slot, place in slots.items():
        words[slot] = place
    return jax.ffi.ffi_lowering(_TARGET)(context, *operands, frame=words)


def _lower_normalize(context: Any, *operands: Any, spec: Spec) -> Any:
    slots = {frames.X: 1, frames.SCALE: 2, frames.BIAS: 3, frames.Y: 101, frames.SAVED: 102}
    if len(operands) > 3:
        slots[frames.MASK] = 4
    given: Any = operand_and_result_types(context)
    result = given[1][0]
    return _call(context, operands, spec, "forward", "float32", slots, result, 1)


def _lower_pull_back(context: Any, *operands: Any, spec: Spec, batches: int) -> Any:
    slots = {frames.DY: 1, frames.X: 2, frames.SCALE: 3, frames.BIAS: 4}
    slots |= {frames.SAVED: len(operands), frames.Y: 101, frames.DSCALE: 102, frames.DBIAS: 103}
    if len(operands) > 5:
        slots[frames.MASK] = 5
    given: Any = operand_and_result_types(context)
    dy, result = given[0][0].dtype.name, given[1][0]
    return _call(context, operands, spec, "backward", dy, slots, result, batches)


register_lowering(normalize_p, "cpu", _lower_normalize, why_unavailable)
register_lowering(pull_back_p, "cpu", _lower_pull_back, why_unavailable)
