"""JAX on one device: which calls the primitives compute, and their jitted entries.

On a CPU the kernels are the compiled core's, called by XLA; on a GPU Triton's. Every
transformation of JAX applies to both. On a CPU without kernels, and for other dtypes, the same
primitives are lowered to the portable implementation: their pullback takes less time and memory
than the one JAX derives from it.
"""

import math
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.jax import cpu, gpu
from groupnorm.backends.jax.debugging import is_debugging
from groupnorm.backends.jax.internals import explicit_axes, is_plain
from groupnorm.backends.jax.primitives import Spec, normalize, pull_back, why_not_compiled
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.layout import ROLES
from groupnorm.plan import Plan
from groupnorm.portable.inputs import check, check_cotangent, from_work, to_work
from groupnorm.portable.per_sample import has_rows, is_per_sample
from groupnorm.typing import Gradients

__all__ = ["JaxKernels"]


class JaxKernels(Kernels):
    """The kernels, as jitted primitives."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self._adapter = adapter

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why there are none on JAX's default devices, whichever device is named."""
        why = _why_no_primitives()
        return _why_no_kernels() if why is None else why

    def forward(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y, or `Unsupported`."""
        call = _bind(self._adapter, x, scale, bias, mask, options)
        return call if isinstance(call, Unsupported) else _normalized(call[0], *call[1])[0]

    def vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y and its pullback, or `Unsupported`."""
        if explicit_axes(x):
            return Unsupported("x has a sharding by its type")
        call = _bind(self._adapter, x, scale, bias, mask, options)
        if isinstance(call, Unsupported):
            return call
        spec, arrays = call
        y, saved = _normalized(spec, *arrays)

        def pullback(dy: Any) -> Gradients:
            dy = check_cotangent(self._adapter, dy, x)
            dy = dy.astype(spec.work_dtype)
            for name, a in zip(("x", "scale", "bias", "mask"), arrays, strict=True):
                if a is not None:
                    self._adapter.check_memory(a, name)
            return Gradients(*_pulled_back(spec, *arrays, saved, dy))

        return y, pullback


# Which calls --------------------------------------------------------------------------------------


def _why_no_primitives() -> Unsupported | None:
    """Return why calls are left to the portable implementation as it is, or None."""
    if jax.default_backend() not in ("cpu", "gpu"):
        return Unsupported("kernels support JAX's CPU and GPU backends, not the default one here")
    if jax.device_count() > 1:
        return Unsupported(
            f"JAX has {jax.device_count()} devices, and kernels are for arrays on one: let it see "
            "one (CUDA_VISIBLE_DEVICES=0; on a CPU, no xla_force_host_platform_device_count)"
        )
    return None


def _why_no_kernels() -> Unsupported | None:
    """Return why there are no kernels on JAX's default device, or None."""
    return gpu.why_unavailable() if jax.default_backend() == "gpu" else cpu.why_unavailable()


def _bind(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    """Return the static part of a call and its arrays, or `Unsupported`."""
    why = _why_no_primitives()
    if why is not None:
        return why
    if not all(isinstance(n, int) for n in x.shape):
        return Unsupported(f"x has symbolic sizes, {x.shape}")
    if not x.size:
        return Unsupported("x has no elements")
    checked = check(adapter, x, scale, bias, mask, options)
    scale, bias, mask, plan = checked.scale, checked.bias, checked.mask, checked.plan
    for a in (x, scale, bias):
        if a is not None and not adapter.is_real_floating(a.dtype):
            return Unsupported(
                f"x or a parameter is of {a.dtype}: the kernels support the real floating dtypes "
                "float32, float16 and bfloat16"
            )
    rows = [a is None or has_rows(a, plan) for a in (scale, bias)]
    if is_per_sample(x, scale, bias, options) and not (all(rows) and plan.kept_axes == {0}):
        return Unsupported("parameters do not have a row for each of the samples")
    if not all(a is None or is_plain(a) for a in (x, scale, bias, mask)):
        return Unsupported("a shard_map checks over which of its axes values vary")
    roles = plan.roles
    if roles not in ROLES:
        return Unsupported(f"the axes' order is {roles} (kept, positions, channels)")
    if mask is not None and is_debugging() and options.implementation is None:
        # The kernels' backward pass keeps x itself, and an alarm would be raised for its padding.
        return Unsupported("a mode of debugging looks at padding that is kept for gradients")
    if mask is not None:
        channel_axes = mask.shape[plan.channel : len(mask.shape) - len(roles) + plan.channel + 1]
        if math.prod(channel_axes) > 1:
            return Unsupported("the mask varies along the feature axes")
        samples = mask.shape[0] if "K" in roles else 1
        mask = mask.reshape(samples, mask.size // samples)
    dtypes = (x.dtype, checked.work_dtype, checked.result_dtype)
    no_kernels = why_not_compiled(*dtypes, options.activation)
    if no_kernels is None:
        no_kernels = _why_no_kernels()
    if no_kernels and (options.implementation == "fused" or jax.default_backend() == "gpu"):
        return no_kernels
    if no_kernels and is_per_sample(x, scale, bias, options):
        return Unsupported("without kernels, parameters of each sample are applied afterwards")
    # As work arrays have it: channels on one axis. Slices have no hash.
    plan = plan._replace(two_stages=True, sample=None)
    return _spec(adapter, plan, *dtypes, options), (x, scale, bias, mask)


@lru_cache(maxsize=1024)
def _spec(
    adapter: Any, plan: Plan, x_dtype: Any, work_dtype: Any, result_dtype: Any, options: CallOptions
) -> Spec:
    sizes = dict(zip(plan.roles, plan.merged_shape, strict=True))
    groups, group_size = plan.parameter_shape[plan.channel : plan.channel + 2]
    first = plan.roles.endswith("CP")
    return Spec(
        adapter=adapter,
        plan=plan,
        shape=GroupedShape(
            sizes.get("K", 1), groups, group_size, sizes.get("P", 1), first, x_dtype.itemsize
        ),
        options=options._replace(
            feature=(1,) if first else (2,),
            num_groups=groups,
            group_size=None,
            reduction=(1, 2),
            dtype=jnp.dtype(result_dtype).name,
            implementation=None,
            feature_shape=None,
        ),
        work_dtype=jnp.dtype(work_dtype),
    )


# The computation ----------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def _normalized(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> Any:
    """Return y and the saved statistics; a mask is (samples or 1, positions or 1)."""
    y, saved = normalize(spec, *_work_arrays(spec, x, scale, bias, mask))
    return from_work(y, spec.plan, spec.result_dtype, jnp), saved


@partial(jax.jit, static_argnums=0)
def _pulled_back(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any, saved: Any, dy: Any) -> Any:
    """Return the gradients of x, scale and bias."""
    dy = to_work(dy, spec.plan, jnp).reshape(spec.work_shape)
    work = _work_arrays(spec, x, scale, bias, mask)
    dx, *gradients = pull_back(spec, dy, *work, saved)
    return from_work(dx, spec.plan, x.dtype, jnp), *(
        None if p is None else g.reshape(p.shape).astype(p.dtype)
        for g, p in zip(gradients, (scale, bias), strict=True)
    )


def _work_arrays(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
    dtype = spec.work_dtype
    shape: tuple[int, ...] = (spec.shape.channels,)
    if any(p is not None and p.size != spec.shape.channels for p in (scale, bias)):
        shape = (spec.shape.samples, spec.shape.channels)
    scale, bias = (
        jnp.full(shape, neutral, dtype) if value is None else value.reshape(shape).astype(dtype)
        for value, neutral in ((scale, 1.0), (bias, 0.0))
    )
    if mask is not None:
        mask = jnp.broadcast_to(mask, (mask.shape[0], spec.shape.positions))
    return to_work(x, spec.plan, jnp).reshape(spec.work_shape), scale, bias, mask
