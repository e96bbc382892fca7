"""MLX: lazy arrays in unified memory; the layer is an `mlx.nn.Module`."""

from groupnorm.backends.mlx.layer import MlxGroupNorm

__all__ = ["MlxGroupNorm"]
