"""The layer as an `mlx.nn.Module`."""

from typing import Any

import mlx.nn

from groupnorm.layer import PlainGroupNorm
from groupnorm.layer_config import LayerConfig

__all__ = ["MlxGroupNorm", "trained_parameters"]


def trained_parameters(module: mlx.nn.Module) -> dict[str, bool]:
    """Return for each parameter of a module whether it is trained."""
    trained = module.trainable_parameters()
    return {name: name in trained for name in module.parameters()}


class MlxGroupNorm(PlainGroupNorm, mlx.nn.Module):  # type: ignore[misc]
    """Group normalization as an `mlx.nn.Module`; see `groupnorm.GroupNorm`.

    A module is a dict of its parameters, which are `weight` and `bias`, as `mlx.nn.GroupNorm` names
    them, in the shape of the feature axes; `scale` reads the weight.

    Examples
    --------
    >>> import mlx.core as mx, mlx.nn as nn, mlx.optimizers as optim
    >>> from groupnorm import GroupNorm
    >>> model = nn.Sequential(GroupNorm(64, backend="mlx"), nn.Linear(64, 10))
    >>> x = mx.random.normal((8, 28, 28, 64))
    >>> loss = nn.value_and_grad(model, lambda x: mx.mean(mx.tanh(model(x)) ** 2))
    >>> value, gradients = loss(x)
    >>> optim.SGD(learning_rate=0.1).update(model, gradients)
    >>> model.layers[0].scale.shape
    (64,)
    """

    _adapter_name = "mlx"

    def _setup(self, config: LayerConfig, values: Any, metadata: Any) -> None:
        mlx.nn.Module.__init__(self)
        super()._setup(config, values, metadata)
        if not config.trainable:
            self.freeze()

    @property
    def _held(self) -> dict[str, Any]:  # type: ignore[override]
        return {"scale": self.get("weight"), "bias": self.get("bias")}

    @property
    def trainable(self) -> bool:
        """Whether a parameter is trained: none after `freeze`."""
        trained = self._trained()
        return any(trained) if trained else self._config.trainable

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_held":
            held = (("weight", value["scale"]), ("bias", value["bias"]))
            dict.update(self, {name: array for name, array in held if array is not None})
        elif name in ("_config", "scale", "bias", "weight"):
            # Not an entry of the module: a tuple, and what the properties check and store.
            object.__setattr__(self, "scale" if name == "weight" else name, value)
        else:
            mlx.nn.Module.__setattr__(self, name, value)

    def _carry_state(self, layer: Any) -> None:
        if isinstance(layer, MlxGroupNorm):
            layer.train(self.training)
            frozen = [name for name, trained in trained_parameters(self).items() if not trained]
            layer.unfreeze()
            if frozen:
                layer.freeze(keys=frozen)

    def _trained(self) -> list[bool]:
        return list(trained_parameters(self).values())

    def _check_is_trained(self, adapter: Any) -> None:
        """Do nothing: this is a module itself."""

    def update(self, x: Any, *arguments: Any, **keywords: Any) -> Any:
        """Normalize x, as a call; or replace parameters, given as a dict, as modules of MLX do.

        Parameters
        ----------
        x : array or dict
            Optimizers and `mlx.nn.value_and_grad` pass a dict of parameters.
        *arguments, **keywords
            `mask` with an array, `strict` with a dict.

        Returns
        -------
        array or MlxGroupNorm
            The result, or the layer itself.
        """
        if isinstance(x, dict):
            return mlx.nn.Module.update(self, x, *arguments, **keywords)
        return super().update(x, *arguments, **keywords)
