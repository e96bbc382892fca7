"""The contenders of gpu.py in JAX, each under jit: flax's layer followed by SiLU, and ours.

flax only supports channels-last; for the other layout its input and output are transposed inside
the compiled function, as its users have to. Calls are dispatched one after the other, with one wait
at the end: the result is the device's time or the host's, whichever is longer.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _gpu_cases import (
    ACTIVATION,
    EPSILON,
    FLAX,
    FLAX_TWO_PASSES,
    GROUPS,
    OURS,
    SEED,
    Case,
)
from _gpu_measure import Call, Timer, elements

Norm = Callable[[Any, Any], Any]
"""From parameters and x to the normalized x: what jit compiles."""


def missing() -> str | None:
    """Why there is no usable GPU, or None."""
    found = jax.default_backend()
    return None if found == "gpu" else f"JAX's default backend is its {found}"


def gpu_name() -> str:
    return jax.devices()[0].device_kind


def release() -> None:
    """Release memory between rows."""
    gc.collect()


def wait() -> None:
    jax.block_until_ready(jnp.zeros(()) + 1)


class Contest:
    """A row's buffers and contenders."""

    dtype = "bfloat16"

    def __init__(self, case: Case, implementation: str | None = "fused"):
        self.case = case
        self.keys = iter(jax.random.split(jax.random.key(SEED), 2 + 2 * case.buffers))
        self.scale, self.bias = (self._normal((case.channels,)) for _ in range(2))
        self.x = [self._normal(case.array_dims) for _ in range(case.buffers)]
        many = case.buffers if case.both else 0
        self.dy = [self._normal(case.array_dims) for _ in range(many)]
        self.makers: dict[str, Callable[[], Call]] = {
            OURS: lambda: self._call(*self._ours(implementation)),
            FLAX: lambda: self._call(*self._flax(True)),
            FLAX_TWO_PASSES: lambda: self._call(*self._flax(False)),
        }

    def _normal(self, shape: tuple[int, ...]) -> Any:
        return jax.random.normal(next(self.keys), shape, jnp.bfloat16)

    def _call(self, parameters: Any, norm: Norm) -> Call:
        """The compiled call; the parameters are arguments, or XLA would fold them."""
        if self.case.both:
            both = jax.jit(functools.partial(with_gradients, norm))
            return lambda i: both(parameters, self.x[i], self.dy[i])
        call = jax.jit(norm)
        return lambda i: call(parameters, self.x[i])

    def _ours(self, implementation: str | None) -> tuple[Any, Norm]:
        from groupnorm import GroupNorm

        first, channels = self.case.first, self.case.channels
        layer = GroupNorm(
            (channels, ...) if first else channels, feature_axis=0 if first else -1,
            num_groups=GROUPS, epsilon=EPSILON, activation=ACTIVATION, dtype="input",
            param_dtype="bfloat16", backend="jax", implementation=implementation,
        )  # fmt: skip
        layer.scale, layer.bias = self.scale, self.bias
        return layer, lambda layer, x: layer(x)

    def fallback(self) -> Call:
        return self._call(*self._ours("portable"))

    def _flax(self, fast: bool) -> tuple[Any, Norm]:
        from flax import nnx

        layer = nnx.GroupNorm(
            self.case.channels, num_groups=GROUPS, epsilon=EPSILON, use_fast_variance=fast,
            param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0),
        )  # fmt: skip
        layer.scale[...], layer.bias[...] = self.scale, self.bias
        graph, state = nnx.split(layer)
        first = self.case.first

        def norm(state: Any, x: Any) -> Any:
            x = jnp.moveaxis(x, 1, -1) if first else x
            y = jax.nn.silu(nnx.merge(graph, state)(x))
            return jnp.moveaxis(y, -1, 1) if first else y

        return state, norm

    def timers(self, name: str, call: Call) -> dict[str, Timer]:
        return {name: dispatched(call, self.case.buffers)}

    def differences(self, found: Any, expected: Any) -> dict[str, float]:
        if not self.case.both:
            return {"y": difference(found, expected)}
        # The parameters' gradients are in trees that differ.
        names = ("y", "dx")
        pairs = zip(found[:2], expected[:2], strict=True)
        return {name: difference(a, b) for name, (a, b) in zip(names, pairs, strict=True)}

    def wait(self) -> None:
        wait()


def with_gradients(norm: Norm, parameters: Any, x: Any, dy: Any) -> tuple[Any, Any, Any]:
    y, pullback = jax.vjp(norm, parameters, x)
    dparameters, dx = pullback(dy)
    return y, dx, dparameters


@jax.jit
def largest_difference(a: Any, b: Any) -> Any:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b) / jnp.maximum(jnp.abs(b), 1))


def difference(a: Any, b: Any) -> float:
    return float(largest_difference(a, b))


# ---- timers -------------------------------------------------------------------------------------


def dispatched(call: Call, count: int) -> Timer:
    jax.block_until_ready(call(0))

    def run(repeats: int) -> float:
        kept: list[Any] = [None] * count
        start = time.perf_counter()
        for _ in range(repeats):
            for i in range(count):
                kept[i] = call(i)
        jax.block_until_ready(kept)
        return 1e6 * (time.perf_counter() - start)

    return Timer("dispatch loop", run, count)


def copy_timer(size: int, count: int) -> Timer:
    sources = [jnp.ones(elements(size), jnp.bfloat16) for _ in range(count)]
    copy = jax.jit(jnp.copy)
    return dispatched(lambda i: copy(sources[i]), count)


# ---- checks -------------------------------------------------------------------------------------


def vjp(
    arrays: dict[str, Any], dtype: str, first: bool, options: dict[str, Any]
) -> list[np.ndarray]:
    """Y and the gradients of x, scale and bias as NumPy's float32, by `group_norm_vjp`.

    NumPy arrays: x, dy (N, C, *spatial), scale, bias, and mask (N, 1, *spatial) or None.
    """
    from groupnorm import group_norm_vjp

    def put(name: str) -> Any:
        a = arrays[name]
        if a is None:
            return None
        a = a if first or a.ndim == 1 else np.moveaxis(a, 1, -1)
        return jnp.asarray(a) if name == "mask" else jnp.asarray(a, dtype=dtype)

    x, dy, scale, bias, mask = map(put, ("x", "dy", "scale", "bias", "mask"))

    @jax.jit
    def both(x: Any, scale: Any, bias: Any, mask: Any, dy: Any) -> Any:
        y, pullback = group_norm_vjp(
            x, scale, bias, mask=mask, feature_axis=1 if first else -1, **options
        )
        return (y, *pullback(dy))

    found = [np.asarray(a.astype(jnp.float32)) for a in both(x, scale, bias, mask, dy)]
    return found if first else [np.moveaxis(a, -1, 1) if a.ndim > 1 else a for a in found]
