"""The kernels for CPUs, called by XLA's foreign function interface."""

import logging
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.backends.jax.primitives import Spec, normalize_p, pull_back_p, register_lowering
from groupnorm.backends.kernels.cpu import availability as cpu
from groupnorm.backends.kernels.variants import ACTIVATIONS
from groupnorm.num_threads import get_num_threads

__all__ = ["why_unavailable"]

# Of the handler, and of what its numbers mean: programs on disk contain both.
_TARGET = "groupnorm_cpu_1"
# The stages of a call, as in core/call.hpp.
_FORWARD, _BACKWARD = 3, 12

_log = logging.getLogger("groupnorm")


def why_unavailable() -> Unsupported | None:
    """Return why there are no kernels for CPUs here, or None."""
    why = cpu.why_unavailable()
    return _why_refused() if why is None else why


@lru_cache(maxsize=1)
def _why_refused() -> Unsupported | None:
    """Register the handler with XLA; return why it cannot be used, or None."""
    try:
        # Before there is a backend, JAX only queues the handler; XLA then refuses it while the
        # backend starts, which fails with it.
        jax.devices("cpu")
        jax.ffi.register_ffi_target(_TARGET, cpu.core().xla_handler(), platform="cpu")
    except (RuntimeError, ValueError) as error:  # XLA's errors are RuntimeErrors today
        why = Unsupported(
            "XLA does not accept the handler of the kernels for CPUs, which was written for "
            f"version 0.3 of its foreign function interface: {error}"
        )
        _log.warning("groupnorm computes without kernels in JAX on CPUs: %s", why.reason)
        return why
    return None


def _lower(context: Any, *operands: Any, spec: Spec, batches: int = 0) -> Any:
    """Lower to a call of the handler, which reads the rest from the arrays' dtypes and shapes."""
    shape, options = spec.shape, spec.options
    stages = _BACKWARD if batches else _FORWARD
    numbers = [
        *(stages, shape.samples, shape.groups, shape.group_size, shape.positions),
        *(shape.channels_first, ACTIVATIONS[options.activation]),
        *(np.float64(options.epsilon).view(np.int64), get_num_threads()),
    ]
    return jax.ffi.ffi_lowering(_TARGET)(context, *operands, numbers=np.array(numbers, np.int64))


register_lowering(normalize_p, "cpu", _lower, why_unavailable)
register_lowering(pull_back_p, "cpu", _lower, why_unavailable)
