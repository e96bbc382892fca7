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

# The kernels need bfloat16, and copies of 16 bytes.
LEAST_CAPABILITY = 80

_log = logging.getLogger("groupnorm")


def probe_case() -> tuple[Any, gpu.LaunchSequence, Callable[[Any], bool]]:
    """Return a NumPy array, the launches that normalize it, and a function that checks the result.

    For the first call on a device, where launching kernels may not work. There is one launch,
    without parameters and mask.
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
    """Return why GPUs of this compute capability, such as 90, are unsupported, or None."""
    if capability >= LEAST_CAPABILITY:
        return None
    return Unsupported(
        f"the kernels need a GPU of compute capability {LEAST_CAPABILITY / 10}, and this one has "
        f"{capability / 10}"
    )


class DeviceProbe:
    """Whether a library's launches work on a device; each device is probed once.

    Parameters
    ----------
    library : str
        Its name in messages.
    why_unsupported : callable
        Returns why a device, given by its index, is unsupported, or None.
    busy : callable
        Whether probing is impossible now; then launches are assumed to work.
    compute : callable
        Runs the launches of `probe_case` on a device, and returns the result on the host.
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
        """Return why kernels cannot run on a device; None if they can."""
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
                raise ArithmeticError("the probe kernel returned a wrong result")
        except Exception as error:  # from Triton or the driver
            why = f"{type(error).__name__}: {error}"
            _log.warning(
                "groupnorm uses the portable implementation on cuda:%d in %s: Triton's kernels "
                "failed there: %s", device, self._library, why,
            )  # fmt: skip
            return Unsupported(f"Triton's kernels do not work on cuda:{device}: {why}")
        return None
