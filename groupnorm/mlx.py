"""Layers carried from and to MLX; a layer with ``backend="mlx"`` is a module of MLX itself."""

from typing import Any

from groupnorm.carrying import check_class, trained_as_one
from groupnorm.imports import needs

with needs("mlx", "groupnorm.mlx"):
    import mlx.nn

    from groupnorm.backends.mlx.layer import MlxGroupNorm, trained_parameters

__all__ = ["arguments_of", "module_of"]


def arguments_of(module: Any) -> dict[str, Any]:
    """Return the arguments of a layer equal to an `mlx.nn.GroupNorm`, and its parameters.

    Without ``pytorch_compatible=True`` a group has every G-th channel, of G groups. Then the layer
    is for inputs ``x.reshape(..., C // G, G).swapaxes(-1, -2)``, of shape (N, ..., G, C // G),
    where the channels of a group are next to each other.
    """
    check_class(module, MlxGroupNorm, mlx.nn.GroupNorm, "__call__")
    scale, bias = module.get("weight"), module.get("bias")
    trained = list(trained_parameters(module).values())
    arguments = {
        "in_size": (..., module.dims),
        "num_groups": module.num_groups,
        "epsilon": module.eps,
        "trainable": trained_as_one(trained, True, "weight and bias"),
        "backend": "mlx",
    }
    if not module.pytorch_compatible:
        shape = (module.dims // module.num_groups, module.num_groups)
        scale, bias = (None if p is None else p.reshape(shape).T for p in (scale, bias))
        arguments |= {"in_size": (..., *shape[::-1]), "feature_axis": (-2, -1)}
    return {**arguments, "scale": scale, "bias": bias}


def module_of(layer: Any) -> MlxGroupNorm:
    """Return the layer as a module of MLX."""
    module: MlxGroupNorm = layer.to_backend("mlx")
    return module
