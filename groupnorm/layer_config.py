"""A layer's configuration (everything but its parameters), its properties and repr."""

import math
from types import EllipsisType
from typing import Any, ClassVar, NamedTuple

from groupnorm.arguments import CallOptions
from groupnorm.typing import BackendName

__all__ = ["ConfigProperties", "LayerConfig"]


class LayerConfig(NamedTuple):
    """Everything but the parameters; hashable, so that equal layers share compiled programs.

    The options are written in one way: `num_groups` is set, and `reduction` is sorted.
    """

    in_size: "tuple[int | EllipsisType, ...]"
    feature_axis: int | tuple[int, ...]
    options: CallOptions
    use_bias: bool
    use_scale: bool
    param_type: Any
    param_dtype: str
    trainable: bool = True

    @property
    def _identity(self) -> tuple[Any, ...]:
        """What calls depend on and users read.

        Not how the feature axes were written: `options.feature` holds them.
        """
        return (
            self.in_size, self.options, self.use_bias, self.use_scale, self.param_type,
            self.param_dtype, self.trainable,
        )  # fmt: skip

    def __eq__(self, other: object) -> bool:
        """Whether layers with these configurations are equal, all sizes of `in_size` included."""
        return isinstance(other, LayerConfig) and self._identity == other._identity

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._identity)

    def __deepcopy__(self, memo: Any) -> "LayerConfig":
        """Return self: it is immutable, and a process group cannot be copied."""
        return self

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """The lengths of the feature axes."""
        return self.options.feature_shape or ()

    @property
    def num_groups(self) -> int:
        """The number of groups."""
        return self.options.num_groups or 1  # never None

    @property
    def as_torch_native(self) -> bool:
        """Whether this is exactly what `torch.nn.GroupNorm` computes, for inputs of any rank."""
        options = self.options
        return (
            options.feature == (1,)
            and options.reduction is None
            and options.axis_name is None
            and options.dtype in (None, "input")
            and options.activation is None
            and (self.use_scale or not self.use_bias)
        )


class ConfigProperties:
    """The fields of a layer's configuration as read-only properties."""

    _adapter_name: ClassVar[BackendName]
    #: Fields that repr always shows.
    _always_shown: ClassVar[tuple[str, ...]] = ()
    _config: LayerConfig

    @property
    def _options(self) -> CallOptions:
        """The options of a call."""
        return self._config.options

    @property
    def in_size(self) -> "tuple[int | EllipsisType, ...]":
        """The input's shape without the batch axis, as given."""
        return self._config.in_size

    @property
    def out_size(self) -> "tuple[int | EllipsisType, ...]":
        """The result's shape without the batch axis, equal to `in_size`."""
        return self._config.in_size

    @property
    def feature_axis(self) -> int | tuple[int, ...]:
        """The feature axes, as indices into `in_size`."""
        return self._config.feature_axis

    @property
    def num_groups(self) -> int:
        """The number of groups."""
        return self._config.num_groups

    @property
    def group_size(self) -> int:
        """The number of channels per group."""
        return math.prod(self._config.feature_shape) // self.num_groups

    @property
    def epsilon(self) -> float:
        """The constant added to the variance."""
        return self._config.options.epsilon

    @property
    def dtype(self) -> str | None:
        """The name of the result's dtype; None if it is inferred."""
        return self._config.options.dtype

    @property
    def param_dtype(self) -> str:
        """The name of the dtype the parameters were created with."""
        return self._config.param_dtype

    @property
    def param_type(self) -> Any:
        """The parameter type; None is the backend's plain type."""
        return self._config.param_type

    @property
    def trainable(self) -> bool:
        """Whether the parameters are trained; if not, their gradients are zero or None."""
        return self._config.trainable

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self._config.use_bias

    @property
    def use_scale(self) -> bool:
        """Whether there is a scale."""
        return self._config.use_scale

    @property
    def reduction_axes(self) -> tuple[int, ...] | None:
        """The reduced axes; None is all but the batch axis."""
        return self._config.options.reduction

    @property
    def axis_name(self) -> Any:
        """The replicas statistics are pooled over."""
        return self._config.options.axis_name

    @property
    def axis_index_groups(self) -> tuple[tuple[int, ...], ...] | None:
        """The sets of replicas that share statistics."""
        return self._config.options.axis_index_groups

    @property
    def use_fast_variance(self) -> bool:
        """Whether the statistics are computed in one pass."""
        return self._config.options.fast

    @property
    def activation(self) -> str | None:
        """The name of the activation applied to the result."""
        return self._config.options.activation

    @property
    def implementation(self) -> str | None:
        """The requested implementation; None is the fastest for each call."""
        return self._config.options.implementation

    @property
    def backend(self) -> BackendName:
        """The name of the backend."""
        return self._adapter_name

    def __repr__(self) -> str:
        """Return the constructor call of an equal layer."""
        return f"GroupNorm({self._describe()}, backend={self._adapter_name!r})"

    def _describe(self) -> str:
        config, options = self._config, self._config.options
        size = ", ".join("..." if n is ... else str(n) for n in config.in_size)
        parts = [f"({size},)" if len(config.in_size) == 1 else f"({size})"]
        shown = {
            "feature_axis": (config.feature_axis, -1),
            "epsilon": (options.epsilon, 1e-6),
            "dtype": (options.dtype, None),
            "use_bias": (self.use_bias, True),
            "use_scale": (self.use_scale, True),
            "reduction_axes": (options.reduction, None),
            "axis_name": (options.axis_name, None),
            "axis_index_groups": (options.axis_index_groups, None),
            "use_fast_variance": (options.fast, True),
            "param_dtype": (config.param_dtype, "float32"),
            "trainable": (self.trainable, True),
            "activation": (options.activation, None),
            "implementation": (options.implementation, None),
        }
        parts.append(f"num_groups={self.num_groups}")
        parts += [
            f"{name}={v!r}"
            for name, (v, default) in shown.items()
            if v != default or name in self._always_shown
        ]
        return ", ".join(parts)
