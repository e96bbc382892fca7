"""Whether launching works on a device; each device is probed once."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.backends.kernels.gpu import build
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.grouped_shape import GroupedShape

__all__ = ["DeviceProbe", "probe_case", "why_too_old"]

# What the kernels need: bfloat16, and copies of 16 bytes.
LEAST_CAPABILITY = 80

_log = logging.getLogger("groupnorm")


def probe_case() -> tuple[Any, gpu.LaunchSequence, Callable[[Any], bool]]:
    """Return an array of NumPy, what normalizes it, and what says whether a result is right.

    For a first call on a device, where what launches kernels may not work. The program is of one
    step, without parameters and mask.
    """
    x = np.arange(256, dtype=np.float32).reshape(2, 8, 16)
    program = gpu.forward(
        GroupedShape(2, 2, 4, 16, True, 4), gpu.KernelOptions(0.0, None, None, False, False)
    )

    def passed(y: Any) -> bool:
        groups = np.asarray(y, np.float64).reshape(4, 64)
        off = abs(groups.mean(1)) + abs((groups**2).mean(1) - 1)
        return bool(off.max() < 1e-5)

    return x, program, passed


def why_too_old(capability: int) -> Unsupported | None:
    """Say why the kernels are not for a GPU of this compute capability, such as 90."""
    if capability >= LEAST_CAPABILITY:
        return None
    return Unsupported(
        f"the kernels need a GPU of compute capability {LEAST_CAPABILITY / 10}, and this one has "
        f"{capability / 10}"
    )


class DeviceProbe:
    """Which devices a library's launches work on, each tried out once.

    Parameters
    ----------
    library : str
        What messages call it.
    why_unsupported : callable
        Says why there are no kernels for a device, by its index, or returns None.
    busy : callable
        Whether nothing can be tried out now; then launches are taken to work.
    compute : callable
        Runs a `trial`'s program on its array on a device, and returns the result on the host.
    """

    def __init__(
        self,
        library: str,
        why_unsupported: Callable[[int], Unsupported | None],
        busy: Callable[[], bool],
        compute: Callable[[int, Any, gpu.LaunchSequence], Any],
    ) -> None:
        self._library, self._why_unsupported, self._busy, self._compute = (
            library,
            why_unsupported,
            busy,
            compute,
        )
        self._found: dict[int, Unsupported | None] = {}

    def why_unavailable(self, device: int) -> Unsupported | None:
        """Say why no kernels run on a device, if so."""
        if device not in self._found:
            why = build.why_unavailable() or self._why_unsupported(device)
            if why is None and self._busy():
                return None
            self._found[device] = self._try(device) if why is None else why
        return self._found[device]

    def _try(self, device: int) -> Unsupported | None:
        array, program, passed = probe_case()
        try:
            if not passed(self._compute(device, array, program)):
                raise ArithmeticError("a first kernel computed something else")
        except Exception as error:  # of Triton, a C compiler that is missing, the driver
            why = f"{type(error).__name__}: {error}"
            _log.warning(
                "groupnorm computes portably on cuda:%d in %s: Triton's kernels failed there: %s",
                device, self._library, why,
            )  # fmt: skip
            return Unsupported(f"Triton's kernels do not work on cuda:{device}: {why}")
        return None
