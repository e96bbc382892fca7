"""JAX: arrays and tracers; statistics over mapped axes; kernels as primitives."""

from groupnorm.backends.jax.layer import JaxGroupNorm

__all__ = ["JaxGroupNorm"]
