"""The number of threads of the CPU kernels: `set_num_threads`, environment variables, limits."""

import logging
import math
import os
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from groupnorm.arguments import positive

__all__ = ["get_num_threads", "set_num_threads"]

# The root of the file system, which tests replace.
ROOT = Path("/")
# Variables that limit the threads of other numerical libraries, and so of this one.
LIMITS = ("OMP_NUM_THREADS",)
VARIABLE = "GROUPNORM_NUM_THREADS"

_log = logging.getLogger("groupnorm")
_set: int | None = None


def set_num_threads(num_threads: int | None) -> None:
    """Set the number of threads that the CPU kernels use in NumPy and JAX.

    The result does not depend on it, to the bit. In PyTorch the kernels run in PyTorch's own
    threads, so that ``torch.set_num_threads`` sets their number there. JAX reads the number when it
    compiles a program.

    Parameters
    ----------
    num_threads : int or None
        At least 1; 1 computes in the calling thread alone. None: as if it had not been set.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If `num_threads` is not a positive integer.

    See Also
    --------
    get_num_threads : The number in use.

    Examples
    --------
    >>> import groupnorm
    >>> groupnorm.set_num_threads(1)
    >>> groupnorm.get_num_threads()
    1
    >>> groupnorm.set_num_threads(None)
    """
    global _set
    _set = None if num_threads is None else positive("num_threads", num_threads)


def get_num_threads() -> int:
    """Return the number of threads that the CPU kernels use in NumPy and JAX.

    It is, if given, the number of `set_num_threads`, or else that of the environment variable
    ``GROUPNORM_NUM_THREADS``. Otherwise it is the number of CPUs available to this process: no more
    than its affinity, a container's limit on CPU time (cgroups), ``OMP_NUM_THREADS`` and, if
    threadpoolctl has been imported, its limits permit.

    Returns
    -------
    int
        At least 1, the calling thread included. Small arrays use fewer.

    See Also
    --------
    set_num_threads : Sets the number.

    Examples
    --------
    >>> import groupnorm
    >>> groupnorm.get_num_threads() >= 1
    True
    """
    if _set is not None:
        return _set
    own = _own_variable()
    if own is not None:
        return own
    limits = [_cpus(), *_fixed_limits()]
    if "threadpoolctl" in sys.modules:
        limits += [library["num_threads"] or 1 for library in _controller().info()]
    return max(1, min(limits))


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@lru_cache(maxsize=1)
def _own_variable() -> int | None:
    """Return the number in our own variable, which is read once, as OpenMP reads its variables."""
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    number = _positive(text)
    if number is None:
        _log.warning(
            "groupnorm ignores %s=%r: it must be a positive integer, such as 1.", VARIABLE, text
        )
    return number


@lru_cache(maxsize=1)
def _fixed_limits() -> tuple[int, ...]:
    """Return the limits that do not change while a process runs."""
    # OMP_NUM_THREADS may list one number for each level of nested parallel regions.
    variables = (_positive(os.environ.get(name, "").split(",")[0]) for name in LIMITS)
    quota = _quota()
    return (*(v for v in variables if v is not None), *(() if quota is None else (quota,)))


def _positive(text: str) -> int | None:
    try:
        number = int(text)
    except ValueError:
        return None
    return number if number > 0 else None


def _quota() -> int | None:
    """Return how many CPUs' time the control groups of this process permit, or None."""
    folder = ROOT / "sys/fs/cgroup"
    quotas = []
    for line in _text(ROOT / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # A container may see its own group as the root of the hierarchy, whatever the path.
        top = folder / "cpu" if controllers else folder
        here = top / path.strip("/")
        for group in {top, here, *(p for p in here.parents if top in p.parents)}:
            if controllers:
                found = [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                found = _text(group / "cpu.max").split()
            numbers = [_positive(text) for text in found]
            if len(numbers) == 2 and numbers[0] and numbers[1]:  # not "max", and not -1
                quotas.append(math.ceil(numbers[0] / numbers[1]))
    return min(quotas, default=None)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@lru_cache(maxsize=1)
def _controller() -> Any:
    """Return threadpoolctl's view of the libraries loaded so far."""
    return sys.modules["threadpoolctl"].ThreadpoolController()
