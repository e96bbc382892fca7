"""JAX arrays whose type states their sharding: computed under automatic sharding."""

from typing import Any

import jax

from groupnorm.backends.jax.debugging import by_result, is_debugging
from groupnorm.backends.jax.internals import explicit_axes, in_shard_map

__all__ = ["over_shards"]


def over_shards(
    apply: Any, adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Any
) -> Any:
    """Compute an array with an explicit sharding; the result has the same sharding.

    Splitting channels into groups, and blocks for sums, have no sharding that a type could state;
    the compiler needs none.
    """
    # Arguments on the host stay there: they are yet to be checked.
    arguments = {"x": x, "scale": scale, "bias": bias, "mask": mask}
    arrays = {name: adapter.admit(a, name) for name, a in arguments.items() if adapter.is_array(a)}

    def compute(arrays: dict[str, Any]) -> Any:
        return apply(adapter, **{**arguments, **arrays}, options=options)

    sharding = jax.typeof(x).sharding
    # Only these axes: those of a surrounding shard_map stay mapped.
    free: Any = jax.sharding.auto_axes(compute, axes=explicit_axes(x), out_sharding=sharding)
    if in_shard_map(sharding.mesh):
        # Under a surrounding shard_map, JAX 0.10 cannot keep scalars of this mesh for backward.
        free = jax.checkpoint(free)
    if is_debugging():
        return by_result("group_norm", lambda: free(arrays))
    return free(arrays)
