"""What of a call on a GPU does not depend on values, for every library that launches kernels."""

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from groupnorm.backends import gpu, triton_build
from groupnorm.backends.gpu_tiles import FARTHEST, Form
from groupnorm.backends.layouts import Kinds, Layout, kinds_of, layout_of
from groupnorm.implementations import NotServed
from groupnorm.options import Options

__all__ = ["Trials", "Work", "lacking", "planned", "trial"]

# What the kernels need: bfloat16, and copies of 16 bytes.
LEAST_CAPABILITY = 80

FEW_POSITIONS, MANY_ELEMENTS = 8, 1 << 24
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_log = logging.getLogger("groupnorm")


class Work(NamedTuple):
    """A normalization of arrays that lie in memory in one way, of any values."""

    layout: Layout
    kinds: Kinds
    form: Form
    epsilon: float
    activation: str | None

    @property
    def parameter_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that parameters may have."""
        return self.layout.feature_shape, (self.form.channels,)

    def forward(self, mask_elements: int, scale: bool, bias: bool, waves: bool) -> gpu.Program:
        """Return what computes y and the statistics, for a mask of so many elements, or of 0."""
        return gpu.forward(self.form, self._asked(mask_elements, scale, bias, waves))

    def backward(self, mask_elements: int, scale: bool, bias: bool, waves: bool) -> gpu.Program:
        """Return what computes dx, dscale and dbias."""
        return gpu.backward(self.form, self._asked(mask_elements, scale, bias, waves))

    def _asked(self, mask_elements: int, scale: bool, bias: bool, waves: bool) -> gpu.Asked:
        mask = None
        if mask_elements:
            mask = "one" if mask_elements == self.form.positions else "each"
        return gpu.Asked(self.epsilon, self.activation, mask, scale, bias, waves)


@lru_cache(maxsize=4096)
def planned(
    adapter: Any, shape: Any, strides: Any, x: Any, scale: Any, bias: Any, options: Options
) -> Work | NotServed:
    """Plan for a shape, strides in elements, and dtypes, those of parameters there are not None."""
    kinds = kinds_of(adapter, x, scale, bias, options)
    if isinstance(kinds, NotServed):
        return kinds
    layout = layout_of(tuple(shape), strides, options)
    if isinstance(layout, NotServed):
        return layout
    kept = [a for a in layout.order or () if a in _kept(layout)]
    if kept != sorted(kept):
        # What is saved for backward has the samples in the order of x's axes.
        return NotServed("the axes of the samples are permuted in memory")
    if layout.channels > FARTHEST:
        return NotServed(f"there are {layout.channels} channels")
    if layout.positions < FEW_POSITIONS and layout.elements > MANY_ELEMENTS:
        # The gradients of scale and bias would take as much memory again for each sample.
        return NotServed(f"{layout.positions} positions are too few for so many samples")
    form = Form(
        layout.samples, layout.groups, layout.size, layout.positions, layout.first,
        ITEM_BYTES[kinds.x],
    )  # fmt: skip
    return Work(layout, kinds, form, options.epsilon, options.activation)


def _kept(layout: Layout) -> set[int]:
    """Return the axes of x that statistics are separate for."""
    order = layout.order or tuple(range(len(layout.shape)))
    return {order[a] for a in layout.plan.kept_axes}


def trial() -> tuple[Any, gpu.Program, Callable[[Any], bool]]:
    """Return an array of NumPy, what normalizes it, and what says whether a result is right.

    For a first call on a device, where what launches kernels may not work. The program is of one
    step, without parameters and mask.
    """
    x = np.arange(256, dtype=np.float32).reshape(2, 8, 16)
    program = gpu.forward(Form(2, 2, 4, 16, True, 4), gpu.Asked(0.0, None, None, False, False))

    def passed(y: Any) -> bool:
        groups = np.asarray(y, np.float64).reshape(4, 64)
        off = abs(groups.mean(1)) + abs((groups**2).mean(1) - 1)
        return bool(off.max() < 1e-5)

    return x, program, passed


def lacking(capability: int) -> NotServed | None:
    """Say why the kernels are not for a GPU of this compute capability, such as 90."""
    if capability >= LEAST_CAPABILITY:
        return None
    return NotServed(
        f"the kernels need a GPU of compute capability {LEAST_CAPABILITY / 10}, and this one has "
        f"{capability / 10}"
    )


class Trials:
    """Which devices a library's launches work on, each tried out once.

    Parameters
    ----------
    library : str
        What messages call it.
    lacks : callable
        Says why there are no kernels for a device, by its index, or returns None.
    busy : callable
        Whether nothing can be tried out now; then launches are taken to work.
    compute : callable
        Runs a `trial`'s program on its array on a device, and returns the result on the host.
    """

    def __init__(
        self, library: str, lacks: Callable[[int], NotServed | None], busy: Callable[[], bool],
        compute: Callable[[int, Any, gpu.Program], Any],
    ) -> None:  # fmt: skip
        self._library, self._lacks, self._busy, self._compute = library, lacks, busy, compute
        self._found: dict[int, NotServed | None] = {}

    def unavailable(self, device: int) -> NotServed | None:
        """Say why no kernels run on a device, if so."""
        if device not in self._found:
            why = triton_build.unavailable() or self._lacks(device)
            if why is None and self._busy():
                return None
            self._found[device] = self._try(device) if why is None else why
        return self._found[device]

    def _try(self, device: int) -> NotServed | None:
        array, program, passed = trial()
        try:
            if not passed(self._compute(device, array, program)):
                raise ArithmeticError("a first kernel computed something else")
        except Exception as error:  # of Triton, a C compiler that is missing, the driver
            why = f"{type(error).__name__}: {error}"
            _log.warning(
                "groupnorm computes portably on cuda:%d in %s: Triton's kernels failed there: %s",
                device, self._library, why,
            )  # fmt: skip
            return NotServed(f"Triton's kernels do not work on cuda:{device}: {why}")
        return None
