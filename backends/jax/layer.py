"""The layer as a pytree of its parameters."""

from typing import Any

import jax

from groupnorm.layer import PlainGroupNorm
from groupnorm.layer_config import LayerConfig
from groupnorm.typing import ArrayT, MaskLike

__all__ = ["JaxGroupNorm"]


class JaxGroupNorm(PlainGroupNorm):
    """Group normalization as a pytree of its parameters; see `groupnorm.GroupNorm`.

    Everything else is static, so equal layers share compiled programs.
    """

    _adapter_name = "jax"

    def _setup(self, config: LayerConfig, scale: Any, bias: Any) -> None:
        if getattr(config.param_type, "__module__", "").startswith("flax."):
            from flax import nnx

            # An nnx module takes a pytree of Params as data only if it knows its class.
            nnx.register_data_type(JaxGroupNorm)
        super()._setup(config, scale, bias)

    def __call__(self, x: ArrayT, mask: MaskLike = None, *, key: Any = None) -> ArrayT:
        """Normalize x; see `update`. The key is ignored: equinox passes one to every layer."""
        y: ArrayT = self._normalize(x, mask)
        return y

    def _flatten(self) -> tuple[tuple[Any, ...], Any]:
        return (self._scale, self._bias), self._config

    def _flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        key = jax.tree_util.GetAttrKey
        return ((key("scale"), self._scale), (key("bias"), self._bias)), self._config

    @classmethod
    def _unflatten(cls, config: Any, children: Any) -> "JaxGroupNorm":
        # Anything may be a leaf here: tracers, shapes, None, placeholders.
        layer: JaxGroupNorm = object.__new__(cls)
        layer._config = config
        layer._scale, layer._bias = children
        return layer


jax.tree_util.register_pytree_with_keys(
    JaxGroupNorm,
    JaxGroupNorm._flatten_with_keys,
    JaxGroupNorm._unflatten,
    JaxGroupNorm._flatten,
)
