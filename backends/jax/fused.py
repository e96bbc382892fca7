"""JAX on one device: which calls the kernels compute, which the passes made for XLA, and how.

On a CPU the kernels need numba, and an XLA that supports the version of its interface that they
were written for; on a GPU Triton. Every transformation of JAX applies to both.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from groupnorm.adapter import Kernels, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.jax import primitives as jax_kernels
from groupnorm.backends.jax.xla_passes import Spec, normalize
from groupnorm.backends.kernels import layout as layouts
from groupnorm.plan import FEW_POSITIONS
from groupnorm.portable.inputs import check, check_cotangent, from_work, to_work
from groupnorm.typing import Gradients

__all__ = ["JaxKernels", "why_unavailable"]


def why_unavailable() -> Unsupported | None:
    """Say why nothing is computed here, by kernels or passes, if so."""
    if jax.default_backend() not in ("cpu", "gpu"):
        return Unsupported(
            "this form is for JAX's CPU and GPU backends; the default is another here"
        )
    if jax.device_count() > 1:
        return Unsupported(
            f"JAX has {jax.device_count()} devices, and kernels are for arrays on one: let it see "
            "one (CUDA_VISIBLE_DEVICES=0; on a CPU, no xla_force_host_platform_device_count)"
        )
    return None


class JaxKernels(Kernels):
    """The kernels, as jitted primitives; passes made for XLA where there are none."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self._adapter = adapter

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why there are none on JAX's default devices, whichever device is named."""
        why = why_unavailable()
        return jax_kernels.missing() if why is None else why

    def forward(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y, or `Unsupported`."""
        call = _call(self._adapter, x, scale, bias, mask, options)
        return call if isinstance(call, Unsupported) else normalized(call[0], *call[1])

    def vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Return y and its pullback, or `Unsupported`."""
        call = _call(self._adapter, x, scale, bias, mask, options)
        if isinstance(call, Unsupported):
            return call
        spec, arrays = call
        if spec.kernels:
            y, saved = _normalized_keeping(spec, *arrays)
            pull = partial(_pulled_back_by_kernels, spec, *arrays, saved)
        else:
            y = normalized(spec, *arrays)
            # Of full precision, whatever y is rounded to.
            pull = partial(_pulled_back, spec._replace(result=spec.dtype), *arrays)

        def pullback(dy: Any) -> Gradients:
            check_cotangent(self._adapter, dy, x)
            return Gradients(*pull(dy.astype(spec.dtype)))

        return y, pullback


# The computation ----------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def normalized(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> Any:
    """Normalize x of any shape the plan fits; a mask is (samples or 1, positions or 1)."""
    arrays = _to_work(spec, x, scale, bias, mask)
    y = jax_kernels.normalize(spec, *arrays) if spec.kernels else normalize(spec, *arrays)
    return from_work(y, spec.plan, spec.result, jnp)


@partial(jax.jit, static_argnums=0)
def _pulled_back(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any, dy: Any) -> Any:
    """Return the gradients of x, scale and bias."""
    _, pullback = jax.vjp(lambda *given: normalized(spec, *given, mask), x, scale, bias)
    return pullback(dy)


@partial(jax.jit, static_argnums=0)
def _normalized_keeping(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> Any:
    y, saved = jax_kernels.normalize_keeping(spec, *_to_work(spec, x, scale, bias, mask))
    return from_work(y, spec.plan, spec.result, jnp), saved


@partial(jax.jit, static_argnums=0)
def _pulled_back_by_kernels(
    spec: Spec, x: Any, scale: Any, bias: Any, mask: Any, saved: Any, dy: Any
) -> Any:
    dy = to_work(dy, spec.plan, jnp).reshape(spec.around(spec.positions))
    work = _to_work(spec, x, scale, bias, mask)
    dx, *gradients = jax_kernels.pull_back(spec, dy, *work, saved)
    return from_work(dx, spec.plan, x.dtype, jnp), *(
        None if p is None else g.reshape(p.shape).astype(p.dtype)
        for g, p in zip(gradients, (scale, bias), strict=True)
    )


def _to_work(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> tuple[Any, Any, Any, Any]:
    scale, bias = (
        jnp.full(spec.channels, neutral, spec.dtype)
        if value is None
        else value.reshape(spec.channels).astype(spec.dtype)
        for value, neutral in ((scale, 1.0), (bias, 0.0))
    )
    if mask is not None:
        samples = mask.shape[0] if spec.kernels else spec.samples
        mask = jnp.broadcast_to(mask, (samples, spec.positions))
    work = to_work(x, spec.plan, jnp).reshape(spec.around(spec.positions))
    return work, scale, bias, mask


# What is computed here ----------------------------------------------------------------------------


def _call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    why = why_unavailable()
    if why is not None:
        return why
    if adapter.sharded_call(x) is not None:
        return Unsupported("x has a sharding by its type")
    if not x.size:
        return Unsupported("there is nothing to compute")
    checked = check(adapter, x, scale, bias, mask, options)
    scale, bias, mask, plan = checked.scale, checked.bias, checked.mask, checked.plan
    for a in (x, scale, bias):
        if a is not None and not adapter.is_real_floating(a.dtype):
            return Unsupported(
                f"x or a parameter is of {a.dtype}: the kernels are for the real floating dtypes "
                "float32, float16 and bfloat16"
            )
    if any(_varies(a) for a in (x, scale, bias, mask)):
        return Unsupported("a shard_map checks over which of its axes values vary")
    kinds, dtypes = plan.roles, (x.dtype, checked.work_dtype, checked.result_dtype)
    if kinds not in layouts.ROLES:
        return Unsupported(f"the axes' order is {kinds} (kept, positions, channels)")
    positions = plan.merged_shape[kinds.index("P")] if "P" in kinds else 1
    no_kernels = jax_kernels.why_unavailable(*dtypes)
    if no_kernels is not None and jax.default_backend() == "gpu":
        return no_kernels  # the passes are made for CPUs
    if no_kernels is not None and positions < FEW_POSITIONS:
        return Unsupported(
            f"{positions} positions are too few for passes, and kernels there are none: "
            f"{no_kernels.reason}"
        )
    if mask is not None:
        channel_axes = mask.shape[plan.channel : len(mask.shape) - len(kinds) + plan.channel + 1]
        if math.prod(channel_axes) > 1:
            return Unsupported("the mask tells channels apart")
        sizes = [mask.shape[0] if "K" in kinds else 1, mask.size]
        mask = mask.reshape(sizes[0], sizes[1] // sizes[0])
    if no_kernels is not None and options.implementation == "fused":
        return no_kernels  # the passes are taken where nobody asks for something else
    spec = Spec(
        adapter=adapter,
        # Not in stages here, and without slices, which have no hash.
        plan=plan._replace(two_stages=True, sample=None),
        samples=plan.merged_shape[0] if "K" in kinds else 1,
        channels=plan.channels,
        positions=positions,
        groups=plan.parameter_shape[plan.channel],
        channels_first=kinds.endswith("CP"),
        stride=1 if mask is not None or not options.fast else _stride(positions),
        epsilon=options.epsilon,
        activation=options.activation,
        dtype=jnp.dtype(checked.work_dtype),
        result=jnp.dtype(checked.result_dtype),
        kernels=no_kernels is None,
    )
    return spec, (x, scale, bias, mask)


def _varies(a: Any) -> bool:
    """Whether an array's type says that it differs along an axis of a shard_map around."""
    if a is None:
        return False
    kind = jax.typeof(a)
    manual = getattr(kind, "manual_axis_type", None)  # of JAX 0.10
    return bool(getattr(kind, "vma", None) if manual is None else manual.varying)


def _stride(positions: int) -> int:
    """Return the stride of a sample of at least sqrt(positions), and of 16.

    As in `groupnorm.plan`: an outlier in it moves the pivot by one standard deviation at most.
    """
    stride = positions // max(math.isqrt(positions), FEW_POSITIONS)
    while stride > 1 and math.gcd(stride, positions) > 1:
        stride -= 1
    return max(stride, 1)
