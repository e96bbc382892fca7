"""The contenders of cpu.py in JAX, each under jit: flax, equinox, brainstate, and our layer.

For a peer with only one layout, input and output are transposed inside the compiled function, as
its users have to. XLA's pool has one thread for each usable CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _cpu_cases import (
    BOTH,
    EPSILON,
    FIRST,
    LAST,
    LIMIT,
    NNX,
    OURS,
    SILU,
    Array,
    Call,
    Case,
    Contest,
    Data,
    LeftOut,
    Maker,
    first_group,
)
from _cpu_contenders import our_layer

Norm = Callable[[Any, Any, Any], Any]
"""From parameters, x and mask (or None) to the normalized x: what jit compiles."""


def jax_contest(case: Case, data: Data) -> Contest:
    jax.clear_caches()  # programs of earlier rows
    inputs = jax.block_until_ready(
        [None if a is None else jnp.asarray(a) for a in (data.x, data.dy, data.mask)]
    )
    makers: dict[str, Maker] = {LIMIT: functools.partial(make_copy, inputs[0])}
    peers = {NNX: flax_nnx, "flax linen": flax_linen, "equinox": equinox, "brainstate": brainstate}
    for name, peer in {**peers, OURS: ours}.items():
        makers[name] = functools.partial(make_call, peer, case, data, inputs)
    return Contest(makers, functools.partial(read, case))


def make_copy(x: Any) -> Call:
    copy = jax.jit(jnp.copy)
    return lambda: copy(x).block_until_ready()


def make_call(
    peer: Callable[[Case, Data], tuple[Any, Norm]], case: Case, data: Data, inputs: list[Any]
) -> Call:
    """The compiled call of one contender; the parameters are arguments, or XLA would fold them."""
    parameters, norm = peer(case, data)
    x, dy, mask = inputs
    if case.task == BOTH:
        both = jax.jit(functools.partial(with_gradients, norm))
        return lambda: jax.block_until_ready(both(parameters, x, dy))
    call = jax.jit(norm)
    return lambda: jax.block_until_ready(call(parameters, x, mask))


def with_gradients(norm: Norm, parameters: Any, x: Any, dy: Any) -> tuple[Any, Any, Any]:
    y, pullback = jax.vjp(lambda parameters, x: norm(parameters, x, None), parameters, x)
    dparameters, dx = pullback(dy)
    return y, dx, dparameters


def read(case: Case, result: Any) -> list[Array]:
    arrays = result[:2] if case.task == BOTH else [result]
    axis = 1 if case.layout == FIRST else -1
    return [first_group(np.asarray(array), case, axis) for array in arrays]


def adapted(case: Case, knows: str, norm: Norm) -> Norm:
    """`norm` of a peer with only one layout, for the row's, followed by the activation."""
    there, back = (-1, 1) if knows == FIRST else (1, -1)

    def call(parameters: Any, x: Any, mask: Any) -> Any:
        if case.layout != knows:
            x = jnp.moveaxis(x, there, back)
            mask = None if mask is None else jnp.moveaxis(mask, there, back)
        if mask is not None:  # flax refuses to broadcast it over the channels
            mask = jnp.broadcast_to(mask, x.shape)
        y = norm(parameters, x, mask)
        if case.task == SILU:
            y = jax.nn.silu(y)
        return y if case.layout == knows else jnp.moveaxis(y, back, there)

    return call


def ours(case: Case, data: Data) -> tuple[Any, Norm]:
    layer = our_layer("jax", case)
    layer.scale, layer.bias = jnp.asarray(data.scale), jnp.asarray(data.bias)
    return layer, lambda layer, x, mask: layer(x) if mask is None else layer(x, mask)


def flax_nnx(case: Case, data: Data) -> tuple[Any, Norm]:
    from flax import nnx

    layer = nnx.GroupNorm(case.channels, num_groups=case.groups, epsilon=EPSILON, rngs=nnx.Rngs(0))
    layer.scale[...], layer.bias[...] = data.scale, data.bias
    graph, state = nnx.split(layer)

    def norm(state: Any, x: Any, mask: Any) -> Any:
        return nnx.merge(graph, state)(x, mask=mask)

    return state, adapted(case, LAST, norm)


def flax_linen(case: Case, data: Data) -> tuple[Any, Norm]:
    from flax import linen

    layer = linen.GroupNorm(num_groups=case.groups, epsilon=EPSILON)
    parameters = {"params": {"scale": jnp.asarray(data.scale), "bias": jnp.asarray(data.bias)}}

    def norm(parameters: Any, x: Any, mask: Any) -> Any:
        return layer.apply(parameters, x, mask=mask)

    return parameters, adapted(case, LAST, norm)


def equinox(case: Case, data: Data) -> tuple[Any, Norm]:
    import equinox as eqx

    if data.mask is not None:
        raise LeftOut("equinox takes no mask")
    layer = eqx.nn.GroupNorm(case.groups, case.channels, eps=EPSILON)
    values = (jnp.asarray(data.scale), jnp.asarray(data.bias))
    layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), layer, values)
    parameters, static = eqx.partition(layer, eqx.is_array)

    def norm(parameters: Any, x: Any, mask: Any) -> Any:
        return jax.vmap(eqx.combine(parameters, static))(x)  # its layers take one sample

    return parameters, adapted(case, FIRST, norm)


def brainstate(case: Case, data: Data) -> tuple[Any, Norm]:
    import brainstate as bst

    # A complete in_size raises ("only supports 1D feature axis"), and so does any other axis.
    layer = bst.nn.GroupNorm(case.channels, num_groups=case.groups, epsilon=EPSILON)
    layer.weight.value = {"scale": jnp.asarray(data.scale), "bias": jnp.asarray(data.bias)}
    graph, state = bst.graph.treefy_split(layer)

    def norm(state: Any, x: Any, mask: Any) -> Any:
        return bst.graph.treefy_merge(graph, state)(x, mask=mask)

    return state, adapted(case, LAST, norm)
