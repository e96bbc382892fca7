"""The layer as an `nn.Module`."""

from typing import TYPE_CHECKING, Any

import torch

from groupnorm.backends.torch.adapter import torch_adapter
from groupnorm.dispatch import compute_local
from groupnorm.layer import GroupNorm
from groupnorm.layer_config import LayerConfig
from groupnorm.typing import ArrayT, MaskLike

__all__ = ["TorchGroupNorm", "TorchNativeGroupNorm"]


class TorchGroupNorm(GroupNorm, torch.nn.Module):
    """Group normalization as an `nn.Module`; see `groupnorm.GroupNorm`.

    The parameters are `weight` and `bias`, flat (C,), as `torch.nn.GroupNorm` names them; `scale`
    reads the weight in the shape of the feature axes.
    """

    _adapter_name = "torch"
    weight: Any
    eps: float
    num_channels: int
    affine: bool

    if TYPE_CHECKING:

        def __call__(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
            """Normalize x; see `update`."""
            return x
    else:
        # nn.Module's, which runs hooks and calls `forward`.
        __call__ = torch.nn.Module.__call__

    def _setup(self, config: LayerConfig, scale: Any, bias: Any) -> None:
        torch.nn.Module.__init__(self)
        if config.as_torch_native:
            self.__class__ = TorchNativeGroupNorm  # pyright: ignore[reportAttributeAccessIssue]
        self._config = config
        wrap = self._adapter.wrap_parameter
        for name, value in (("weight", scale), ("bias", bias)):
            if value is None:
                self.register_parameter(name, None)
            else:
                setattr(self, name, wrap(value.reshape(-1), config.param_type))
        # nn.GroupNorm's attributes, which other tools read.
        self.num_channels = config.num_groups * config.group_size
        self.eps = config.options.epsilon
        self.affine = config.use_scale

    def forward(self, x: Any, mask: Any = None) -> Any:
        """Normalize x; see `update`."""
        if type(x) is torch.Tensor:  # a plain tensor, not a DTensor
            return compute_local(
                torch_adapter, x, self.scale, self.bias, mask, self._config.options
            )
        return self._normalize(x, mask)

    @property
    def scale(self) -> Any:
        """The weight, in the shape of the feature axes."""
        weight, shape = self.weight, self._config.options.feature_shape
        return weight if weight is None or shape is None or len(shape) == 1 else weight.view(shape)

    def reset_parameters(self) -> None:
        """Fill the parameters in place with their initial values, as after `to_empty`."""
        scale, bias = self._initial(self._config, None)
        with torch.no_grad():
            for stored, value in ((self.weight, scale), (self.bias, bias)):
                if stored is not None and value is not None:
                    stored.copy_(value.reshape(-1))

    def extra_repr(self) -> str:
        """Show the arguments."""
        return self._describe()

    def __repr__(self) -> str:
        return torch.nn.Module.__repr__(self)


class TorchNativeGroupNorm(TorchGroupNorm, torch.nn.GroupNorm):  # type: ignore[override]
    """A layer that computes what `torch.nn.GroupNorm` computes, and is one."""

    def _get_name(self) -> str:
        return "GroupNorm"
