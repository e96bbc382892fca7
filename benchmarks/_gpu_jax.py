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
from _gpu_cases import ACTIVATION, DRY, EPSILON, FLAX, GROUPS, OURS, SEED, Case
from _gpu_measure import Call, Timer, looped

from groupnorm.dispatch import adapter_named
from groupnorm.errors import BackendImportError

BACKEND = "jax"
IMPLEMENTATION = None if DRY else "fused"

Norm = Callable[[Any, Any], Any]
"""From parameters and x to the normalized x: what jit compiles."""


def missing() -> str | None:
    """Why there is no usable GPU, or None."""
    if DRY:
        return None
    try:
        adapter_named(BACKEND).devices()
    except BackendImportError as error:
        return str(error)
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

    def __init__(self, case: Case):
        self.case = case
        self.keys = iter(jax.random.split(jax.random.key(SEED), 2 + 2 * case.buffers))
        self.scale, self.bias = (self._normal((case.channels,)) for _ in range(2))
        self.x = [self._normal(case.array_dims) for _ in range(case.buffers)]
        many = case.buffers if case.both else 0
        self.dy = [self._normal(case.array_dims) for _ in range(many)]
        self.makers: dict[str, Callable[[], Call]] = {
            OURS: lambda: self._call(*self._ours()),
            FLAX: lambda: self._call(*self._flax()),
        }

    def _normal(self, shape: tuple[int, ...]) -> Any:
        return jax.random.normal(next(self.keys), shape, self.case.dtype)

    def _call(self, parameters: Any, norm: Norm) -> Call:
        """The compiled call; the parameters are arguments, or XLA would fold them."""
        if self.case.both:
            both = jax.jit(functools.partial(with_gradients, norm))
            return lambda i: both(parameters, self.x[i], self.dy[i])
        call = jax.jit(norm)
        return lambda i: call(parameters, self.x[i])

    def _ours(self) -> tuple[Any, Norm]:
        from groupnorm import GroupNorm

        first, channels = self.case.first, self.case.channels
        layer = GroupNorm(
            (channels, ...) if first else channels, feature_axis=0 if first else -1,
            num_groups=GROUPS, epsilon=EPSILON, activation=ACTIVATION, dtype="input",
            param_dtype=self.case.dtype, backend="jax", implementation=IMPLEMENTATION,
        )  # fmt: skip
        layer.scale, layer.bias = self.scale, self.bias
        return layer, lambda layer, x: layer(x)

    def _flax(self) -> tuple[Any, Norm]:
        from flax import nnx

        layer = nnx.GroupNorm(
            self.case.channels, num_groups=GROUPS, epsilon=EPSILON,
            param_dtype=self.case.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        layer.scale[...], layer.bias[...] = self.scale, self.bias
        graph, state = nnx.split(layer)
        first = self.case.first

        def norm(state: Any, x: Any) -> Any:
            x = jnp.moveaxis(x, 1, -1) if first else x
            y = jax.nn.silu(nnx.merge(graph, state)(x))
            return jnp.moveaxis(y, -1, 1) if first else y

        return state, norm


def with_gradients(norm: Norm, parameters: Any, x: Any, dy: Any) -> tuple[Any, Any, Any]:
    y, pullback = jax.vjp(norm, parameters, x)
    dparameters, dx = pullback(dy)
    return y, dx, dparameters


def timers(name: str, call: Call, count: int) -> dict[str, Timer]:
    return {name: looped("dispatch loop", call, count, timed)}


def timed(work: Callable[[], Any]) -> float:
    """Microseconds until the results of some work are there."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    return 1e6 * (time.perf_counter() - start)
