"""JAX's modes of debugging: a call is one operation to them, computed by rules of its own.

Padding that a mask excludes may be NaN, and minima start from infinity: neither may raise an alarm
of `jax_debug_nans` or `jax_debug_infs`, which look at the result of every single operation, but of
a jitted function only at its results. Within the call the usual rules of promotion apply.
"""

from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["as_one_operation", "is_debugging", "own_rules", "raise_alarm"]


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

    Raises
    ------
    FloatingPointError
        As `jax_debug_nans` and `jax_debug_infs` do.
    """
    config: Any = jax.config
    for on, kind, find in (
        (config.jax_debug_nans, "nan", jnp.isnan),
        (config.jax_debug_infs, "inf", jnp.isinf),
    ):
        if on and any(bool(find(a).any()) for a in jax.tree.leaves(values)):
            raise FloatingPointError(f"invalid value ({kind}) encountered in {name}")


def as_one_operation(apply: Any, adapter: Any, x: Any, *arguments: Any) -> Any:
    """Compute a call as one jitted function."""
    # Arguments on the host stay there: they are yet to be checked.
    traced = {i: a for i, a in enumerate(arguments) if adapter.is_array(a)}
    static = tuple(None if i in traced else a for i, a in enumerate(arguments))
    try:
        call = _jitted(apply, adapter, static)
    except TypeError:  # lists and NumPy arrays have no hash
        call = _jitted.__wrapped__(apply, adapter, static)
    with own_rules():
        return call(x, traced)


# Made anew, a jitted function is traced and compiled in every call.
@lru_cache(maxsize=256)
def _jitted(apply: Any, adapter: Any, static: tuple[Any, ...]) -> Any:
    @jax.jit
    def groupnorm_call(x: Any, traced: dict[int, Any]) -> Any:
        return apply(adapter, x, *(traced.get(i, a) for i, a in enumerate(static)))

    return groupnorm_call
