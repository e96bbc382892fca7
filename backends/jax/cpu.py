"""The kernels for CPUs, called by XLA's foreign function interface."""

import ctypes
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax

from groupnorm.adapter import Unsupported
from groupnorm.backends.jax.primitives import Spec, normalize_p, pull_back_p, register_lowering
from groupnorm.backends.kernels.cpu import availability as cpu
from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu import launch as cpu_launch
from groupnorm.backends.kernels.cpu.huge_pages import are_worth_it
from groupnorm.backends.kernels.cpu.threads import helpers_for

__all__ = ["unavailable"]

_TARGET = "groupnorm_cpu_kernel"


def unavailable(float16: bool) -> Unsupported | None:
    """Return why there are no kernels for CPUs here, or none that read float16."""
    why = cpu.unavailable(float16)
    return _interface() if why is None else why


def _missing_on_cpu() -> Unsupported | None:
    why = cpu.unavailable(float16=False)
    if why is not None:
        return why
    found = _version()
    if found != cpu.kernels("xla_handler").API:
        return Unsupported(f"XLA's foreign function interface has version {found} here")
    return None


@lru_cache(maxsize=1)
def _interface() -> Unsupported | None:
    """Register the CPU's handler, if XLA's interface is the one it was written for."""
    why = _missing_on_cpu()
    if why is None:
        module = cpu.kernels("xla_handler")
        function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(module.handler()[0].address)
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(function), platform="cpu")
    return why


def _version() -> tuple[int, ...] | None:
    """Read the interface's version from the header of jaxlib."""
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    found = re.findall(r"#define XLA_FFI_API_(?:MAJOR|MINOR) (\d+)", header)
    return tuple(map(int, found))


# Lowerings ----------------------------------------------------------------------------------------


def _call(
    context: Any, operands: Any, spec: Spec, kernel: str, dy: str, slots: dict[int, int],
    result: Any, batches: int,
) -> Any:  # fmt: skip
    """Lower to a call of the handler.

    `slots` maps slots of the frame to operands, counted from 1, and results, counted from 101.
    """
    x, activation = context.avals_in[slots[frames.X] - 1].dtype.name, spec.options.activation
    y, masked = result.dtype.name, frames.MASK in slots
    shape = spec.shape
    name = f"{'first' if shape.channels_first else 'last'}_{kernel}"
    mask = context.avals_in[slots[frames.MASK] - 1].size if masked else 0
    template = frames.template(
        name, shape.samples, shape.groups, shape.group_size, shape.positions, mask,
        spec.options.epsilon, helpers_for(result.size),
    )  # fmt: skip
    number = frames.number(name, x, y, dy, masked, activation)
    entry = cpu_launch.entry(name, x, y, dy, masked, activation)
    where = ctypes.cast(entry, ctypes.c_void_p).value
    cpu.kernels("xla_handler").table()[number] = where
    words = template.words.copy()
    words[frames.RUN], words[frames.BATCHES] = number, batches
    size = result.size * result.dtype.itemsize
    words[frames.LARGE_PAGES] = size if are_worth_it(size) else 0
    for slot, place in slots.items():
        words[slot] = place
    return jax.ffi.ffi_lowering(_TARGET)(context, *operands, frame=words)


def _lower_normalize(context: Any, *operands: Any, spec: Spec) -> Any:
    slots = {frames.X: 1, frames.SCALE: 2, frames.BIAS: 3, frames.Y: 101, frames.SAVED: 102}
    if len(operands) > 3:
        slots[frames.MASK] = 4
    result = context.avals_out[0]
    return _call(context, operands, spec, "forward", "float32", slots, result, 1)


def _lower_pull_back(context: Any, *operands: Any, spec: Spec, batches: int) -> Any:
    slots = {frames.DY: 1, frames.X: 2, frames.SCALE: 3, frames.BIAS: 4}
    slots |= {frames.SAVED: len(operands), frames.Y: 101, frames.DSCALE: 102, frames.DBIAS: 103}
    if len(operands) > 5:
        slots[frames.MASK] = 5
    dy, result = context.avals_in[0].dtype.name, context.avals_out[0]
    return _call(context, operands, spec, "backward", dy, slots, result, batches)


register_lowering(normalize_p, "cpu", _lower_normalize, unavailable)
register_lowering(pull_back_p, "cpu", _lower_pull_back, unavailable)
