"""JAX on a CPU: which calls are computed in the passes made for XLA there, and how they are called.

Plain operations of JAX all the same, so every transformation of JAX applies.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from groupnorm.backends.jax_passes import Spec, normalized, pulled_back
from groupnorm.implementations import NotServed
from groupnorm.options import Options
from groupnorm.plan import FEW_POSITIONS
from groupnorm.prepare import check, check_cotangent
from groupnorm.typing import Gradients

__all__ = ["fused", "fused_vjp", "unavailable"]


def unavailable() -> NotServed | None:
    """Say why nothing is computed here, if so."""
    if jax.default_backend() != "cpu":
        return NotServed("this form is for JAX's CPU backend, which is not the default here")
    if jax.device_count() > 1:
        return NotServed("JAX has several devices: the portable code leaves their axes apart")
    return None


def fused(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y, or `NotServed`."""
    call = _call(adapter, x, scale, bias, mask, options)
    return call if isinstance(call, NotServed) else normalized(call[0], *call[1])


def fused_vjp(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    """Return y and its pullback, or `NotServed`."""
    call = _call(adapter, x, scale, bias, mask, options)
    if isinstance(call, NotServed):
        return call
    spec, arrays = call

    def pullback(dy: Any) -> Gradients:
        check_cotangent(adapter, dy, x)
        # Of full precision, whatever y is rounded to.
        wide = spec._replace(result=spec.dtype)
        dx, dscale, dbias = pulled_back(wide, *arrays, dy.astype(spec.dtype))
        return Gradients(dx, dscale, dbias)

    return normalized(spec, *arrays), pullback


def _call(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
    why = unavailable()
    if why is not None:
        return why
    if options.axis_name is not None:
        return NotServed("statistics of replicas are pooled by the portable implementation")
    if adapter.over_shards(x) is not None:
        return NotServed("x has a sharding by its type")
    if not x.size:
        return NotServed("there is nothing to compute")
    checked = check(adapter, x, scale, bias, mask, options)
    scale, bias, mask, plan = checked.scale, checked.bias, checked.mask, checked.plan
    for a in (x, scale, bias):
        if a is not None and not adapter.is_real_floating(a.dtype):
            return NotServed(f"x or a parameter is of {a.dtype}: this form is for floating dtypes")
    kinds = plan.roles
    if kinds not in ("KPC", "KCP", "PC", "CP"):
        return NotServed(f"the axes' order is {kinds} (kept, positions, channels)")
    positions = plan.merged_shape[kinds.index("P")]
    if positions < FEW_POSITIONS:
        return NotServed(f"{positions} positions are too few")
    if mask is not None:
        channel_axes = mask.shape[plan.channel : len(mask.shape) - len(kinds) + plan.channel + 1]
        if math.prod(channel_axes) > 1:
            return NotServed("the mask tells channels apart")
        sizes = [mask.shape[0] if "K" in kinds else 1, mask.size]
        mask = mask.reshape(sizes[0], sizes[1] // sizes[0])
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
    )
    return spec, (x, scale, bias, mask)


def _stride(positions: int) -> int:
    """Return the stride of a sample of at least sqrt(positions), and of 16.

    As in `groupnorm.plan`: an outlier in it moves the pivot by one standard deviation at most.
    """
    stride = positions // max(math.isqrt(positions), FEW_POSITIONS)
    while stride > 1 and math.gcd(stride, positions) > 1:
        stride -= 1
    return max(stride, 1)
