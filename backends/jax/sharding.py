"""JAX arrays whose type states their sharding: computed under automatic sharding."""

from typing import Any

import jax

__all__ = ["explicit_axes", "over_shards"]


def explicit_axes(x: Any) -> tuple[Any, ...]:
    """Return the axes of x's mesh by which types tell shardings."""
    return tuple(getattr(jax.typeof(x).sharding.mesh, "explicit_axes", ()))


def over_shards(apply: Any, adapter: Any, x: Any, *arguments: Any) -> Any:
    """Compute an array with an explicit sharding, whose result is to lie where it lies.

    Splitting channels into groups, and blocks for sums, have no sharding of their own that a type
    could state; the compiler needs none.
    """
    # What is on the host stays there: it is yet to be checked.
    traced = {i: a for i, a in enumerate(arguments) if adapter.is_array(a)}

    def compute(x: Any, traced: dict[int, Any]) -> Any:
        return apply(adapter, x, *(traced.get(i, a) for i, a in enumerate(arguments)))

    sharding = jax.typeof(x).sharding
    # Only these axes: those of a shard_map around stay mapped.
    free: Any = jax.sharding.auto_axes(compute, axes=explicit_axes(x), out_sharding=sharding)
    if sharding.mesh.manual_axes:
        # Under a shard_map around, JAX 0.10 cannot keep scalars of this mesh for backward.
        free = jax.checkpoint(free)
    return free(x, traced)
