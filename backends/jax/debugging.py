"""JAX's modes of debugging: a call is one operation to them, computed by rules of its own.

Padding that a mask excludes may be NaN, and minima start from infinity: neither may raise an alarm
of `jax_debug_nans` or `jax_debug_infs`, which look at the result of every single operation, but of
a jitted function only at its results. Within the call the usual rules of promotion apply.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from groupnorm.backends.jax.internals import Tracer
from groupnorm.portable.inputs import HOST_MASKS, from_numpy, host_mask

__all__ = ["as_one_operation", "by_result", "is_debugging", "own_rules", "raise_alarm"]


def is_debugging() -> bool:
    """Whether a mode is on that looks into the computation."""
    config: Any = jax.config  # whose attributes are made when JAX is imported
    return bool(
        config.jax_debug_nans
        or config.jax_debug_infs
        or config.jax_numpy_dtype_promotion != "standard"
        or config.jax_numpy_rank_promotion != "allow"
    )


def own_rules() -> ExitStack:
    """Return the context of the usual rules of promotion."""
    stack = ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


def raise_alarm(name: str, values: Any) -> None:
    """Raise JAX's error if a mode forbids one of the values of an operation.

    Tracers have no values yet.

    Raises
    ------
    FloatingPointError
        As `jax_debug_nans` and `jax_debug_infs` do.
    """
    config: Any = jax.config
    known = [
        a for a in jax.tree.leaves(values) if isinstance(a, jax.Array) and not isinstance(a, Tracer)
    ]
    for on, kind, find in (
        (config.jax_debug_nans, "nan", jnp.isnan),
        (config.jax_debug_infs, "inf", jnp.isinf),
    ):
        if on and any(bool(find(a).any()) for a in known):
            raise FloatingPointError(f"invalid value ({kind}) encountered in {name}")


def by_result(name: str, compute: Callable[[], Any]) -> Any:
    """Call a function; the modes look at what it returns, not at its single operations."""
    with own_rules(), jax.debug_nans(False), jax.debug_infs(False):
        result = compute()
    raise_alarm(f"groupnorm's {name}", result)
    return result


def as_one_operation(
    apply: Any, adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Any
) -> Any:
    """Compute a call as one jitted function."""
    x = adapter.admit(x)
    # On the host they would be constants, of which each is another program.
    if isinstance(mask, HOST_MASKS):
        mask = adapter.mask_from_host(mask, host_mask, x)
    arguments = {"x": x, "scale": scale, "bias": bias, "mask": mask}
    for name in ("scale", "bias"):
        if isinstance(arguments[name], np.ndarray):
            arguments[name] = from_numpy(adapter, arguments[name], name, x)
    arrays = {name: adapter.admit(a, name) for name, a in arguments.items() if adapter.is_array(a)}
    absent = tuple(name for name, a in arguments.items() if a is None)
    with own_rules():
        if len(arrays) + len(absent) < len(arguments):  # the call refuses the others
            return apply(adapter, **arguments, options=options)
        return _jitted(apply, adapter, absent, options)(arrays)


# Made anew, a jitted function is traced and compiled in every call.
@lru_cache(maxsize=256)
def _jitted(apply: Any, adapter: Any, absent: tuple[str, ...], options: Any) -> Any:
    @jax.jit
    def groupnorm_call(arrays: dict[str, Any]) -> Any:
        return apply(adapter, **arrays, **dict.fromkeys(absent), options=options)

    return groupnorm_call
