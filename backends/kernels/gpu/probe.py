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


def probe_case(*, several: bool = False) -> tuple[Any, gpu.LaunchSequence, Callable[[Any], bool]]:
    """Return a NumPy array, the launches that normalize it, and a function that checks the result.

    For the first call on a device, where launching kernels may not work. There is one launch, or
    `several` that share a temporary array, with an activation; without parameters and mask.
    """
    samples, groups, size, positions = (1, 2, 64, 192) if several else (2, 2, 4, 16)
    shape = GroupedShape(samples, groups, size, positions, not several, 4)
    activation = "silu" if several else None
    program = gpu.forward(shape, gpu.KernelOptions(0.0, activation, None, False, False))
    dims = (positions, groups * size) if several else (groups * size, positions)
    x = np.sin(np.arange(shape.elements, dtype=np.float32)).reshape(samples, *dims)

    def by_group(array: Any) -> Any:
        array = np.asarray(array, np.float64).reshape(samples, *dims)
        return (array.swapaxes(1, 2) if several else array).reshape(samples * groups, -1)

    grouped = by_group(x)
    z = (grouped - grouped.mean(1, keepdims=True)) / grouped.std(1, keepdims=True)
    want = z / (1 + np.exp(-z)) if several else z

    def passed(y: Any) -> bool:
        return bool(abs(by_group(y) - want).max() < 1e-5)

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
        try:
            for several in (False, True):
                array, program, passed = probe_case(several=several)
                if not passed(self._compute(device, array, program)):
                    raise ArithmeticError("a probe kernel returned a wrong result")
        except Exception as error:  # from Triton or the driver
            why = f"{type(error).__name__}: {error}"
            _log.warning(
                "groupnorm uses the portable implementation on cuda:%d in %s: Triton's kernels "
                "failed there: %s", device, self._library, why,
            )  # fmt: skip
            return Unsupported(f"Triton's kernels do not work on cuda:{device}: {why}")
        return None
