"""The layer as a pytree of its parameters."""

import contextlib
import json
import sys
from typing import Any

import jax
import jax.export

from groupnorm.config_json import arguments_of, config_of
from groupnorm.errors import ArgumentTypeError
from groupnorm.layer import PlainGroupNorm
from groupnorm.layer_config import LayerConfig
from groupnorm.typing import ArrayT, MaskLike

__all__ = ["JaxGroupNorm"]


class JaxGroupNorm(PlainGroupNorm):
    """Group normalization as a pytree of its parameters; see `groupnorm.GroupNorm`.

    Everything else is static, so equal layers share compiled programs.
    """

    _adapter_name = "jax"

    def _setup(self, config: LayerConfig, values: Any, metadata: Any) -> None:
        nnx = sys.modules.get("flax.nnx")
        if nnx is not None:
            # An nnx module takes a pytree of Params as data only if it knows its class.
            nnx.register_data_type(JaxGroupNorm)
        super()._setup(config, values, metadata)

    def __call__(self, x: ArrayT, mask: MaskLike = None, *, key: Any = None) -> ArrayT:
        """Normalize x; see `update`. The key is ignored: equinox passes one to every layer."""
        y: ArrayT = self._normalize(x, mask)
        return y

    def _converted(self, name: str, value: Any) -> Any:
        super()._converted(name, value)  # checks what is held
        converted = self._adapter.from_host(value)  # without `like`, which would round 64 bits
        held = getattr(self, name)
        return jax.device_put(converted, held.sharding) if held.committed else converted

    def _flatten(self) -> tuple[tuple[Any, ...], Any]:
        return tuple(self._held.values()), (self._config, tuple(self._held))

    def _flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        children, static = self._flatten()
        keys = map(jax.tree_util.GetAttrKey, self._held)
        return tuple(zip(keys, children, strict=True)), static

    @classmethod
    def _unflatten(cls, static: Any, children: Any) -> "JaxGroupNorm":
        # Anything may be a leaf here: tracers, shapes, None, placeholders.
        layer: JaxGroupNorm = object.__new__(cls)
        layer._config, names = static
        layer._held = dict(zip(names, children, strict=True))
        return layer


def _serialized(static: Any) -> bytes:
    """Return what is static of a layer that is an argument of a program of `jax.export`."""
    config, _ = static
    if config.param_type is not None:
        raise ArgumentTypeError(
            f"param_type={config.param_type!r}: programs with a layer as an argument are saved for "
            "layers of plain arrays only. Export with layer.to_backend('jax', param_type=None)."
        )
    return json.dumps(arguments_of(config)).encode()


def _deserialized(static: bytes) -> Any:
    config = config_of(json.loads(static))
    return config, ("scale", "bias")


jax.tree_util.register_pytree_with_keys(
    JaxGroupNorm,
    JaxGroupNorm._flatten_with_keys,
    JaxGroupNorm._unflatten,
    JaxGroupNorm._flatten,
)
# The name is taken if this module is imported again, after an import that failed.
with contextlib.suppress(ValueError):
    jax.export.register_pytree_node_serialization(
        JaxGroupNorm,
        serialized_name="groupnorm.GroupNorm",
        serialize_auxdata=_serialized,
        deserialize_auxdata=_deserialized,
    )
