"""Group norms for flax: `groupnorm.flax.nnx.GroupNorm` and `groupnorm.flax.linen.GroupNorm`."""

from groupnorm.imports import needs

with needs("flax", "groupnorm.flax"):
    import flax  # noqa: F401  # before JAX, so that the error names it

    from groupnorm.flax import linen, nnx

__all__ = ["linen", "nnx"]
