"""The explicit backward pass in array API terms, for libraries without autograd."""

from typing import TYPE_CHECKING, NamedTuple

from groupnorm.distributed.replicas import IndexGroups, Replicas
from groupnorm.portable.blocked_sums import total, total_of_products
from groupnorm.portable.collectives import pool
from groupnorm.portable.complex_parts import conj, join, real_part, split
from groupnorm.portable.pivots import clip_real
from groupnorm.portable.statistics import Coefficients, Deviations

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter
    from groupnorm.plan import Plan
    from groupnorm.typing import Array

__all__ = ["WorkGradients", "pull_back"]


class WorkGradients(NamedTuple):
    """Gradients in the work shape; those of the parameters are not summed over replicas."""

    x: "Array"
    scale: "Array"
    bias: "Array"


def pull_back(
    dy: "Array",
    mask: "Array | None",
    scale: "Array",
    deviations: Deviations,
    coefficients: Coefficients,
    plan: "Plan",
    adapter: "Adapter",
    replicas: Replicas | None,
    groups: IndexGroups,
    *,
    overwrite: bool = False,
) -> WorkGradients:
    """Compute the vector-Jacobian product of the normalization.

    With ``xhat = (x - mean) * rstd``, ``g = conj(scale) * dy`` and ``m`` the mask,
    ``dx = rstd * (g - m * (mean(g) + xhat * mean(Re(conj(xhat) * g))))``, where the means run over
    a group's valid elements on all replicas. Complex gradients are ``dL/dRe + i dL/dIm``.

    Parameters
    ----------
    overwrite : bool
        Whether the deviations are needed no more, and no operation is recorded or batched: large
        arrays are then used again, since allocating them takes longer than computing.
    """
    xp = adapter.xp
    rstd = coefficients.rstd

    def channels(value: "Array") -> "Array":
        return xp.reshape(value, plan.ungrouped(value.shape))

    def grouped(value: "Array") -> "Array":
        return xp.reshape(value, plan.grouped(value.shape))

    ones = xp.ones_like(rstd + real_part(scale, adapter))  # a product might overflow
    gain, shift = adapter.materialize(coefficients.gain * ones, coefficients.shift * ones)
    xhat = deviations.values
    if overwrite and gain.dtype == xhat.dtype:
        xhat *= channels(gain)
    else:
        xhat = xhat * channels(gain)
    xhat -= channels(shift)
    sum_dy = grouped(total(dy, plan.positions, plan, adapter))
    sum_dy_xhat = grouped(total_of_products(dy, conj(xhat, adapter), plan.positions, plan, adapter))
    members = (plan.members,)
    conj_scale = conj(scale, adapter)
    p = total(conj_scale * sum_dy, members, plan, adapter)
    if not adapter.is_complex(xhat.dtype):
        p = real_part(p, adapter)
    q = real_part(total(conj_scale * sum_dy_xhat, members, plan, adapter), adapter)
    if replicas is not None:
        *p_parts, q = pool((*split(p, adapter), q), adapter, replicas, groups)
        p = join(p_parts, adapter)
    # Expanded to all channels: an operand broadcast within its rows costs NumPy tenfold.
    weight = rstd * coefficients.inv_count * ones
    slope = q * weight
    if mask is not None:
        # Not infinite, however large what is masked out is: valid elements may equal the mean.
        largest = xp.full_like(slope, float(xp.finfo(slope.dtype).max))
        slope = clip_real(slope, -largest, largest, xp)
    factor, slope, offset = adapter.materialize(conj_scale * rstd, slope, p * weight)
    # With a mask, first of all: what is masked out may be so large that the product overflows.
    through_statistics = xhat if mask is None else xp.where(mask, xhat, 0.0)
    if overwrite and slope.dtype == xhat.dtype:
        through_statistics *= channels(slope)
    else:
        through_statistics = through_statistics * channels(slope)
    through_statistics += channels(offset)
    if mask is not None:
        through_statistics = xp.where(mask, through_statistics, 0.0)
    dx = dy * channels(factor)
    if not adapter.is_complex(xhat.dtype):
        dx = real_part(dx, adapter)
    dx -= through_statistics
    return WorkGradients(
        dx, total(sum_dy_xhat, plan.kept, plan, adapter), total(sum_dy, plan.kept, plan, adapter)
    )
