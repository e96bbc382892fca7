"""Group norms for flax: `groupnorm.flax.nnx.GroupNorm` and `groupnorm.flax.linen.GroupNorm`."""

from groupnorm.imports import needs

with needs("flax", "groupnorm.flax"):
    from groupnorm.flax import linen, nnx

__all__ = ["linen", "nnx"]
