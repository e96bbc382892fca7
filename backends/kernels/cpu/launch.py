"""Launch the CPU kernels, in one thread or several."""

import ctypes
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu.availability import kernels, why_unavailable
from groupnorm.backends.kernels.cpu.threads import helpers_for, run_together
from groupnorm.backends.kernels.layout import KernelDtypes, MemoryLayout, kernel_dtypes, layout_of
from groupnorm.backends.kernels.variants import ACTIVATIONS

__all__ = ["Arrays", "Saved", "ThreadTeam", "Work", "address", "entry", "planned"]

_log = logging.getLogger("groupnorm")


class ThreadTeam(NamedTuple):
    """The threads of a library that run kernels."""

    helpers_for: Callable[[int], int]
    run: Callable[[int, Any, int, Any], None]  # helpers, entry, argument block's address, owner


OWN = ThreadTeam(helpers_for, run_together)


class Arrays(NamedTuple):
    """The addresses of the arrays that kernels read.

    x is flat in the order of the `MemoryLayout`; scale and bias are float32, (channels,); the mask
    is what `flat_mask` returns, and `mask_elements` its size; without a mask both are 0.
    """

    x: int
    scale: int
    bias: int
    mask: int
    mask_elements: int


class Saved(NamedTuple):
    """The statistics for backward: mean, rstd and 1 / count, (3, samples * groups) in float64."""

    address: int
    owner: Any  # keeps that memory alive


class _Program(NamedTuple):
    """A kernel, and the argument block that it is called with."""

    entry: Any
    helpers: int
    block: Any  # the ctypes type of the argument block and the values after it
    head: bytes  # its first words, without addresses; the others are 0
    argument_bytes: int  # the length of the argument block alone
    scratch: int  # the length of the scratch buffer, in words


class Work:
    """A normalization planned for one memory layout, whatever the values.

    Parameters
    ----------
    layout : MemoryLayout
    dtypes : KernelDtypes
    epsilon : float
    activation : str or None
    team : ThreadTeam
        Runs the kernels.
    """

    def __init__(
        self,
        layout: MemoryLayout,
        dtypes: KernelDtypes,
        epsilon: float,
        activation: str | None,
        team: ThreadTeam,
    ) -> None:
        self.layout, self.dtypes, self.team = layout, dtypes, team
        self._shape = frames.kernel_shape(layout.grouped)
        self.channels = self._shape.channels
        # The shapes that parameters may have.
        self.parameter_shapes = (layout.feature_shape, (self.channels,))
        self._epsilon, self._activation = epsilon, activation
        self._elements = self._shape.elements
        self._programs: dict[Any, _Program] = {}

    def forward(self, arrays: Arrays, y: int, owner: Any, *, keep: bool = True) -> Saved:
        """Normalize x, and write the result to the address y; return what `backward` needs.

        `owner` keeps all of these arrays alive, even if an exception ends this call early. Without
        `keep`, there is no `backward`, and the statistics are not kept.
        """
        program = self._program("forward", arrays.mask_elements, "float32", keep)
        block = _new_block(program)
        saved = ctypes.addressof(block) + program.argument_bytes
        self._run(program, block, arrays, y, saved, owner)
        return Saved(saved, block)

    def backward(
        self, saved: Saved, arrays: Arrays, dy: int, dy_dtype: str, dx: int, dscale: int,
        dbias: int, owner: Any,
    ) -> None:  # fmt: skip
        """Write dx, in x's dtype, and the gradients of scale and bias, in float32.

        dy has x's dtype or float32; `saved` is what `forward` returned for the same arrays, and
        `owner` keeps all of the others alive, as in `forward`.
        """
        program = self._program("backward", arrays.mask_elements, dy_dtype, keep=True)
        block = _new_block(program)
        block[frames.SUMS] = ctypes.addressof(block) + program.argument_bytes
        block[frames.DY], block[frames.DSCALE], block[frames.DBIAS] = dy, dscale, dbias
        self._run(program, block, arrays, dx, saved.address, (owner, saved))

    def saved_values(self, saved: Saved) -> Any:
        """Return a copy of the saved statistics as an array."""
        shape = self.layout.grouped
        size = 8 * 3 * shape.samples * shape.groups
        return np.frombuffer(ctypes.string_at(saved.address, size))

    def _run(
        self, program: _Program, block: Any, arrays: Arrays, y: int, saved: int, owner: Any
    ) -> None:
        scratch = None
        block[frames.X], block[frames.SCALE], block[frames.BIAS], block[frames.MASK], _ = arrays
        block[frames.Y], block[frames.SAVED] = y, saved
        if program.scratch:
            scratch = np.empty(program.scratch)
            block[frames.SCRATCH] = address(scratch)
        everything = (block, scratch, owner)
        self.team.run(program.helpers, program.entry, ctypes.addressof(block), everything)

    def _program(self, direction: str, mask_elements: int, dy: str, keep: bool) -> _Program:
        helpers = self.team.helpers_for(self._elements)
        key = (direction, mask_elements, dy, helpers, keep)
        found = self._programs.get(key)
        if found is None:
            found = self._programs[key] = self._new(*key)
        return found

    def _new(
        self, direction: str, mask_elements: int, dy: str, helpers: int, keep: bool
    ) -> _Program:
        shape, backward = self._shape, direction == "backward"
        kernel = f"{'channels_first' if shape.channels_first else 'channels_last'}_{direction}"
        template = frames.template(kernel, shape, mask_elements, self._epsilon, helpers, keep=keep)
        # After the arguments come what forward saves, or the sums of backward.
        arguments = template.head.size + template.counters
        words = arguments + (template.sums if backward else template.saved)
        return _Program(
            entry(
                kernel, self.dtypes.x, self.dtypes.x if backward else self.dtypes.result, dy,
                mask_elements > 0, self._activation,
            ),
            helpers, ctypes.c_int64 * words, template.head.tobytes(), 8 * arguments,
            template.scratch,
        )  # fmt: skip


def _new_block(program: _Program) -> Any:
    block = program.block()
    ctypes.memmove(block, program.head, len(program.head))
    return block


# An entry takes a few kilobytes, whatever the sizes: it holds no arrays.
@lru_cache(maxsize=1024)
def planned(
    adapter: Any, shape: Any, strides: Any, x: Any, scale: Any, bias: Any, options: CallOptions,
    team: ThreadTeam = OWN,
) -> Work | Unsupported:  # fmt: skip
    """Plan a call by everything but values: shape, strides, dtypes and options."""
    dtypes = kernel_dtypes(adapter, x, scale, bias, options)
    if isinstance(dtypes, Unsupported):
        return dtypes
    why = why_unavailable(dtypes.float16)
    layout = layout_of(tuple(shape), strides, options) if why is None else why
    if isinstance(layout, Unsupported):
        return layout
    return Work(layout, dtypes, options.epsilon, options.activation, team)


def address(a: Any) -> int:
    """Return the address of a NumPy array's data."""
    where: int = a.__array_interface__["data"][0]
    return where


@lru_cache(maxsize=1024)
def entry(kernel: str, x: str, y: str, dy: str, masked: bool, activation: str | None) -> Any:
    """Return a kernel for these dtypes: a ctypes function of the argument block's address.

    The first call compiles it or loads it from disk.
    """
    calls, start = kernels("entry_points"), time.perf_counter()
    variant = calls.Variant(kernel, x, y, dy, masked, ACTIVATIONS[activation])
    made = calls.compiled(variant)
    if not getattr(made, "cache_hits", True):  # counted in private
        _log.warning(
            "groupnorm compiled the CPU kernel %s (x of %s, %s of %s, %s, activation %s) in %.1f s"
            "%s.",
            kernel, x, "dy" if kernel.endswith("backward") else "y",
            dy if kernel.endswith("backward") else y, "a mask" if masked else "no mask",
            activation, time.perf_counter() - start,
            "; it is cached on disk, and later processes load it" if made.stored else "",
        )  # fmt: skip
    function: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(made.address)
    function.made = made  # keeps numba from freeing the code
    return function
