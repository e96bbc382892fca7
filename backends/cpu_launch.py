"""Launches the fused CPU kernels, alone or with other threads."""

import ctypes
import logging
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends import frames
from groupnorm.backends.cpu import Layout, kernels
from groupnorm.backends.frames import APART, Template
from groupnorm.backends.threads import helpers_for, run_together

__all__ = ["Arrays", "Team", "address", "backward", "entry", "forward", "template_for"]

_log = logging.getLogger("groupnorm")


class Team(NamedTuple):
    """The threads of a library."""

    helpers_for: Callable[[int], int]
    run: Callable[[int, Any, int, Any], None]  # helpers, an entry, a frame's address, what it needs


OWN = Team(helpers_for, run_together)


class Arrays(NamedTuple):
    """What kernels read, by address, and what must be known of it when they are compiled.

    x and dy are flat in memory, of float32, float16 or bfloat16; scale and bias are in float32,
    (channels,); the mask is what `flat_mask` returns, with as many elements as are said.
    """

    x: int
    scale: int
    bias: int
    mask: int
    mask_elements: int
    x_dtype: str
    activation: str | None


def forward(
    layout: Layout, arrays: Arrays, y: int, y_dtype: str, epsilon: float, team: Team = OWN
) -> Any:
    """Normalize x into y; return what `backward` needs.

    That is mean, rstd and 1 / count of each group, (3, samples * groups) in float64.
    """
    kernel = "first_forward" if layout.first else "last_forward"
    template = template_for(layout, arrays.mask_elements, epsilon, False, team.helpers_for)
    saved = np.empty(3 * layout.samples * layout.groups)
    _launch(
        entry(kernel, arrays.x_dtype, y_dtype, "float32", arrays.mask != 0, arrays.activation),
        template, team, arrays, y, 0, saved, 0,
    )  # fmt: skip
    return saved


def backward(
    layout: Layout, saved: Any, arrays: Arrays, dy: int, dy_dtype: str, dx: int, team: Team = OWN
) -> tuple[Any, Any]:
    """Pull dy back into dx, of x's dtype; return the gradients of bias and scale, in float64.

    The arguments are those of `forward`, and what it returned.
    """
    kernel = "first_backward" if layout.first else "last_backward"
    template = template_for(layout, arrays.mask_elements, 0.0, True, team.helpers_for)
    sums = np.empty((2, layout.samples, layout.channels))
    x_dtype = arrays.x_dtype
    _launch(
        entry(kernel, x_dtype, x_dtype, dy_dtype, arrays.mask != 0, arrays.activation),
        template, team, arrays, dx, dy, saved, address(sums),
    )  # fmt: skip
    gradients = sums[:, 0] if layout.samples == 1 else sums.sum(axis=1)
    return gradients[0], gradients[1]


def address(a: Any) -> int:
    """Return where a NumPy array begins in memory."""
    where: int = a.__array_interface__["data"][0]
    return where


def template_for(
    layout: Layout, mask_elements: int, epsilon: float, backward: bool,
    helpers_for: Callable[[int], int],
) -> Template:  # fmt: skip
    """Return the frame's template for a layout."""
    elements, samples = layout.elements, layout.samples
    helpers = helpers_for(elements)
    return frames.template(
        layout.first, samples, layout.groups, layout.size, layout.positions, mask_elements,
        epsilon, backward, helpers, helpers == 0 or elements <= APART * samples,
    )  # fmt: skip


def _launch(
    run: Any, template: Template, team: Team, arrays: Arrays, y: int, dy: int, saved: Any, sums: int
) -> None:
    frame, scratch = template.words.copy(), np.empty(template.scratch)
    frame[: frames.ADDRESSES] = (
        arrays.x, y, dy, arrays.scale, arrays.bias, arrays.mask, address(saved), sums,
        address(scratch), 0, 0,
    )  # fmt: skip
    team.run(template.helpers, run, address(frame), (frame, scratch))


@lru_cache(maxsize=1024)
def entry(
    kernel: str, x: str, y: str, dy: str, masked: bool, activation: str | None
) -> "ctypes._FuncPointer":
    """Return a kernel for these dtypes, as a function that takes the address of a frame.

    It is compiled, or loaded from disk, where it has not been yet.
    """
    calls, start = kernels("numba_calls"), time.perf_counter()
    made = calls.compiled(calls.Variant(kernel, x, y, dy, masked, frames.ACTIVATIONS[activation]))
    if not made.cache_hits:
        _log.warning(
            "groupnorm compiled CPU kernels for this combination of dtypes in %.1f s; they are "
            "cached on disk, and later processes load them.",
            time.perf_counter() - start,
        )
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(made.address)
    function.made = made  # type: ignore[attr-defined]  # or numba would free the code
    return function
