"""The layer as an `nn.Module`."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from groupnorm.arguments import CallOptions, check_epsilon, positive
from groupnorm.backends.torch.adapter import torch_adapter
from groupnorm.backends.torch.internals import has_hooks
from groupnorm.backends.torch.native import is_autocast_to_float32, laid_out_as_pytorch
from groupnorm.dispatch import compute, compute_local
from groupnorm.errors import ArgumentStateError, ArgumentTypeError, ArgumentValueError
from groupnorm.initializers import Initializers
from groupnorm.layer import GroupNorm
from groupnorm.layer_config import LayerConfig
from groupnorm.typing import ArrayT, MaskLike

__all__ = ["TorchGroupNorm", "TorchNativeGroupNorm", "check_hooks"]


class TorchGroupNorm(GroupNorm, torch.nn.Module):
    """Group normalization as an `nn.Module`; see `groupnorm.GroupNorm`.

    The parameters are `weight` and `bias`, flat (C,), as `torch.nn.GroupNorm` names them; `scale`
    reads the weight in the shape of the feature axes. As in PyTorch's layer, one may assign `eps`,
    `num_groups`, `num_channels`, `weight` and `bias`; the next call uses them.
    """

    _adapter_name = "torch"
    # PyTorch's default differs from ours, so both are shown.
    _always_shown = ("epsilon",)
    weight: Any
    _call_options: CallOptions
    #: As in `torch.nn.GroupNorm`, read by `reset_parameters` only.
    affine: bool
    # The options of calls, and those with the activation of the last call of `modulated`.
    _kept_options: tuple[CallOptions, CallOptions] | None = None
    # For `reset_parameters`.
    _initializers = Initializers()
    # Whether autocast on CUDA devices makes results float32, as those of `torch.nn.GroupNorm`.
    _autocast_to_float32 = True
    # Whether scale and bias are the parameters; False in a subclass that computes them.
    _reads_parameters = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not vars(cls).keys().isdisjoint({"scale", "weight", "bias"}):
            cls._reads_parameters = False

    if TYPE_CHECKING:

        def __call__(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
            """Normalize x; see `update`."""
            return x

    # At run time `__call__` is looked up in nn.Module, where torch.fx replaces it.

    def _setup(self, config: LayerConfig, values: Any, metadata: Any) -> None:
        torch.nn.Module.__init__(self)
        if config.as_torch_native and type(self) is TorchGroupNorm:
            self.__class__ = TorchNativeGroupNorm  # pyright: ignore[reportAttributeAccessIssue]
        self._configure(config)
        flat = {name: None if v is None else v.reshape(-1) for name, v in values.items()}
        store = torch_adapter.param_store(config.param_type)
        held = store.create(flat, metadata, config.trainable)
        for name, key in (("weight", "scale"), ("bias", "bias")):
            stored = held[key]
            if stored is not None and not isinstance(stored, torch.nn.Parameter):
                raise ArgumentTypeError(
                    f"param_type={config.param_type!r} returned an object of type "
                    f"{type(stored).__name__}: a module trains and saves torch.nn.Parameter only. "
                    "For constants pass trainable=False instead."
                )
            self.register_parameter(name, stored)
            if stored is not None and not config.trainable:
                stored.requires_grad_(False)
        self.affine = config.use_scale or config.use_bias

    def _configure(self, config: LayerConfig, **changes: Any) -> None:
        """Set the configuration, with changes to its options."""
        options = config.options._replace(**changes)
        self._config = config._replace(options=options)
        # `dtype` reads what was given, so that a converted layer is an equal one.
        keeps = options.dtype is None and isinstance(self, torch.nn.GroupNorm)
        self._call_options = options._replace(dtype="input") if keeps else options

    @property
    def _options(self) -> CallOptions:
        return self._call_options

    def forward(self, x: Any, mask: Any = None) -> Any:
        """Normalize x; see `update`."""
        if type(x) is torch.Tensor and self._reads_parameters:  # a plain tensor, not a DTensor
            # Attributes of modules are slow, so they are read only if there are no parameters of
            # these names, as after pruning.
            stored, options = self._parameters, self._call_options
            weight = stored["weight"] if "weight" in stored else self.weight  # noqa: SIM401
            bias = stored["bias"] if "bias" in stored else self.bias  # noqa: SIM401
            scale = self._as_scale(weight)
            if x.is_cuda:
                options = self._options_for(x)
            return self._laid_out(compute_local(torch_adapter, x, scale, bias, mask, options))
        if isinstance(x, torch.fx.Proxy):
            from groupnorm.backends.torch.fx import record_layer

            recorded = record_layer(self, x, mask)
            if recorded is not None:
                return recorded
        # Autograd reads `requires_grad` itself, and torch.fx cannot branch on it.
        y = compute(self._adapter_for(x), x, self.scale, self.bias, mask, self._call_options)
        return self._laid_out(y)

    def _laid_out(self, y: Any) -> Any:
        """Return a result as PyTorch's modules lay it out, if this one was replaced in a model.

        Other modules of the model may view it.
        """
        return laid_out_as_pytorch(y) if "_original_class" in self.__dict__ else y

    def _options_for(self, x: Any) -> CallOptions:
        """Return the options of a call, with the result's dtype under autocast."""
        options = self._call_options
        if self._autocast_to_float32 and options.dtype == "input" and is_autocast_to_float32(x):
            return options._replace(dtype="float32")
        return options

    @property
    def can_be_modulated(self) -> bool:
        """Whether `modulated` computes what a call does before what follows it."""
        forward = type(self).forward
        plain = forward is TorchNativeGroupNorm.forward or forward is TorchGroupNorm.forward
        return plain and self._call_options.activation is None

    def modulated(
        self, x: Any, activation: str, scale: Any = None, shift: Any = None, mask: Any = None
    ) -> Any:
        """Compute ``activation(layer(x) * (1 + scale) + shift)`` in one pass.

        Parameters
        ----------
        x : tensor
            As in a call.
        activation : {"relu", "silu", "gelu"}
            The name of the activation.
        scale, shift : tensor of shape (N, C), optional
            With any axes of length 1 after them.
        mask : optional
            As in a call.
        """
        weight, bias = self.scale, self.bias
        if scale is not None or shift is not None:
            weight, bias = _modulated(weight, bias, scale, shift)
        options = self._options_for(x)
        # Kept, as the next call is mostly of the same activation; but not by compiled programs,
        # which would be compiled again for it.
        kept = None if torch.compiler.is_compiling() else self._kept_options
        if kept is None or kept[0] is not options or kept[1].activation != activation:
            kept = options, options._replace(activation=activation)
            if not torch.compiler.is_compiling():
                self.__dict__["_kept_options"] = kept
        if type(x) is torch.Tensor:  # a plain tensor, not a DTensor
            return self._laid_out(compute_local(torch_adapter, x, weight, bias, mask, kept[1]))
        return compute(torch_adapter, x, weight, bias, mask, kept[1])

    @property
    def scale(self) -> Any:
        """The weight, in the shape of the feature axes."""
        return self._as_scale(self.weight)

    def _as_scale(self, weight: Any) -> Any:
        shape = self._call_options.feature_shape
        return weight if weight is None or shape is None or len(shape) == 1 else weight.view(shape)

    @property
    def use_scale(self) -> bool:
        """Whether there is a weight."""
        return self.weight is not None

    @property
    def use_bias(self) -> bool:
        """Whether there is a bias."""
        return self.bias is not None

    @property
    def trainable(self) -> bool:
        """Whether a parameter requires gradients, or would, if there were any."""
        trained = self._trained()
        return any(trained) if trained else self._config.trainable

    # nn.GroupNorm's attributes, which other tools read and set ----------------------------------

    @property
    def eps(self) -> float:
        """The constant added to the variance."""
        return self.epsilon

    @eps.setter
    def eps(self, value: float) -> None:
        self._configure(self._config, epsilon=check_epsilon("eps", value))

    @property
    def num_groups(self) -> int:
        """The number of groups; the next call checks that it divides the channels."""
        return self._config.num_groups

    @num_groups.setter
    def num_groups(self, value: int) -> None:
        self._configure(self._config, num_groups=positive("num_groups", value))

    @property
    def num_channels(self) -> int:
        """The number of channels."""
        return math.prod(self._config.feature_shape)

    @num_channels.setter
    def num_channels(self, value: int) -> None:
        channels, config = positive("num_channels", value), self._config
        if channels == self.num_channels:
            return
        if not isinstance(config.feature_axis, int):
            raise ArgumentValueError(
                f"num_channels={value!r} cannot be set on a layer with the feature axes "
                f"{config.feature_axis}: which of them changes is unknown. Create a new layer."
            )
        size = list(config.in_size)
        size[config.feature_axis] = channels
        self._configure(config._replace(in_size=tuple(size)), feature_shape=(channels,))

    def _carry_state(self, layer: GroupNorm) -> None:
        if isinstance(layer, TorchGroupNorm):
            layer.train(self.training)
            layer._initializers = self._initializers
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(getattr(self, name).requires_grad)

    def _check_hooks(self) -> None:
        check_hooks(self)

    def _trained(self) -> list[bool]:
        return [p.requires_grad for p in (self.weight, self.bias) if p is not None]

    # Files ----------------------------------------------------------------------------------------

    def _converted(self, name: str, value: Any) -> Any:
        key = "weight" if name == "scale" else name
        stored = self._parameters.get(key)
        if stored is None or stored.is_meta:
            raise ArgumentStateError(
                f"the {key} of a layer is on the meta device: call to_empty(device=...) first."
                if stored is not None
                else f"the {key} of a layer is computed from other tensors, as by parametrizations "
                "and pruning: remove those first, or load without into."
            )
        converted = torch_adapter.from_host(value.reshape(stored.shape), stored)
        return torch_adapter.sharded_like(converted, stored)

    def _assign(self, name: str, value: Any) -> Callable[[], None]:
        """Set a parameter in place, since optimizers refer to it."""
        stored: Any = self._parameters["weight" if name == "scale" else name]
        old = stored.detach().clone()

        def write(value: Any) -> None:
            with torch.no_grad():
                stored.copy_(value)

        write(value)
        return lambda: write(old)

    # Initialization -------------------------------------------------------------------------------

    def _initialize(self, config: LayerConfig, initializers: Initializers, device: Any) -> None:
        super()._initialize(config, initializers, device)
        self._initializers = initializers

    def reset_parameters(self) -> None:
        """Fill the parameters in place with their initial values, as after `to_empty`."""
        if not self.affine:
            return
        for name, stored in (("scale", self.weight), ("bias", self.bias)):
            if stored is None:
                continue
            value, _ = self._initial(name, self._config, self._initializers, stored.device)
            with torch.no_grad():
                stored.copy_(torch_adapter.sharded_like(value.reshape(-1), stored))

    def _initial(self, name: str, config: LayerConfig, initializers: Any, device: Any) -> Any:
        """Initialize on the device itself: from the meta device nothing can be moved."""
        if device is None:
            return super()._initial(name, config, initializers, None)
        torch_adapter.place(torch.empty(0, device="cpu"), device)  # raises for an unknown device
        with torch.device(device):
            return super()._initial(name, config, initializers, None)

    def __prepare_scriptable__(self) -> Any:
        """Refuse `torch.jit.script`, which calls this first."""
        raise ArgumentTypeError(
            "torch.jit.script cannot compile groupnorm's layers, which are not written in "
            "TorchScript: use torch.compile, torch.export or torch.jit.trace."
        )

    def extra_repr(self) -> str:
        """Show the arguments."""
        return self._describe()

    def __repr__(self) -> str:
        return torch.nn.Module.__repr__(self)


def check_hooks(module: Any) -> None:
    """Raise an error if a call of a module does more than its class, which a copy would not do."""
    if has_hooks(module):
        raise ArgumentValueError(
            f"layer={type(module).__name__} has hooks, which a new layer would not call: use "
            "groupnorm.torch.replace, which keeps them, or remove them."
        )


def _modulated(weight: Any, bias: Any, scale: Any, shift: Any) -> tuple[Any, Any]:
    """Return the parameters of each sample; in float32 at least, so that nothing is rounded."""
    wide = torch.promote_types(torch.float32, (shift if scale is None else scale).dtype)
    weight, bias = (None if p is None else p.flatten() for p in (weight, bias))
    if scale is not None:
        factor = 1 + scale.flatten(1).to(wide)
        weight = factor if weight is None else weight * factor
        bias = None if bias is None else bias * factor
    if shift is not None:
        shift = shift.flatten(1).to(wide)
        bias = shift if bias is None else bias + shift
    return weight, bias


class TorchNativeGroupNorm(  # pyright: ignore[reportIncompatibleVariableOverride]
    TorchGroupNorm, torch.nn.GroupNorm
):
    """A layer that computes what `torch.nn.GroupNorm` computes, and is one.

    As in that layer, the result has x's dtype by default.
    """

    # Not keyword-only: torch.onnx.export passes one value for each parameter by position.
    def forward(self, x: Any = None, mask: Any = None, input: Any = None) -> Any:  # type: ignore[override]
        """Normalize x, which PyTorch's layer calls input; see `update`."""
        return super().forward(input if x is None else x, mask)

    def _get_name(self) -> str:
        return "GroupNorm"
