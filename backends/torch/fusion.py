"""A normalization and the activation after it, computed in one pass where that is the same.

The modules stay as they are; only the module that calls them one after the other changes its class.
While one of the two has hooks, which would see what is between them, they are called separately.
"""

import ast
import functools
import hashlib
import inspect
import itertools
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from groupnorm.backends.torch.internals import has_hooks
from groupnorm.backends.torch.layer import TorchGroupNorm
from groupnorm.backends.torch.swapping import Swapped, check_class, swapped_class
from groupnorm.errors import ArgumentStateError, ArgumentTypeError

__all__ = [
    "FusedSequential",
    "activation_name",
    "followed_by_activations",
    "fused",
    "fused_class",
    "fused_forward",
    "register_fusion",
]

# Classes whose modules compute one of the activations that `activation=` names.
_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}
# Those of other packages, which need not be imported.
_ACTIVATIONS_BY_NAME = {
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.SiLUActivation": "silu",
}


def activation_name(module: Any) -> str | None:
    """Return the name of the activation that a module computes; None for others."""
    kind = type(module)
    name = _ACTIVATIONS.get(kind)
    if name is None:
        name = _ACTIVATIONS_BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
    if name == "gelu":
        # Not the approximation by tanh. transformers' class computes in Python if asked.
        exact = getattr(module, "approximate", "none") == "none"
        own = getattr(module, "act", nn.functional.gelu) is nn.functional.gelu
        return name if exact and own else None
    return name


def fused(norm: Any, activation: Any, x: Any, *, scale: Any = None, shift: Any = None) -> Any:
    """Compute ``activation(norm(x) * (1 + scale) + shift)``, in one pass where that is the same.

    It is the same for a layer of this library, followed by ReLU, SiLU or the exact GELU, if neither
    has hooks. Otherwise the two modules are called, also where one pass would not be faster: with a
    scale or shift for small x, or in channels-last memory.

    Parameters
    ----------
    norm : torch.nn.Module
        The normalization.
    activation : torch.nn.Module
        The activation.
    x : tensor of shape (N, C, ...)
        The input.
    scale, shift : tensor of shape (N, C), optional
        Of each sample, with any number of axes of length 1 after them; or broadcastable to x.

    Returns
    -------
    tensor of x's shape

    Examples
    --------
    >>> import torch
    >>> import groupnorm.torch
    >>> norm = torch.nn.GroupNorm(2, 8)
    >>> report = groupnorm.torch.replace(norm)
    >>> x = torch.randn(3, 8, 5, 5)
    >>> y = groupnorm.torch.fused(norm, torch.nn.SiLU(), x, shift=torch.ones(3, 8))
    >>> torch.allclose(y, torch.nn.functional.silu(norm(x) + 1), atol=1e-6)
    True
    """
    name = activation_name(activation)
    if (
        name is not None
        and _computes_as_a_layer(norm)
        and not has_hooks(norm)
        and not has_hooks(activation)
        and not isinstance(x, torch.fx.Proxy)
        and ((scale is None and shift is None) or _is_worth_fusing(x, scale, shift))
    ):
        return norm.modulated(x, name, scale, shift)
    y = norm(x)
    if scale is not None:
        y = y * (1 + _beside(scale, y))
    return activation(y if shift is None else y + _beside(shift, y))


def _computes_as_a_layer(norm: Any) -> bool:
    return isinstance(norm, TorchGroupNorm) and norm.can_be_modulated


# Below, the checks of parameters for each sample take longer than passes over x.
_WORTH_FUSING = 1 << 17


def _is_worth_fusing(x: Any, scale: Any, shift: Any) -> bool:
    """Whether kernels apply these parameters of each sample, in x's dtype."""
    return (
        type(x) is torch.Tensor
        and x.numel() >= _WORTH_FUSING
        and (x.is_contiguous() or x.shape[0] == 1)
        and all(
            a is None
            or (
                type(a) is torch.Tensor
                and a.shape[:2] == x.shape[:2]
                and a.numel() == x.shape[0] * x.shape[1]
                and torch.promote_types(a.dtype, x.dtype) == x.dtype
            )
            for a in (scale, shift)
        )
    )


def _beside(value: Any, y: Any) -> Any:
    """Return a tensor of shape (N, C, 1 ...) with as many axes as y; others as they are."""
    rows = (
        isinstance(value, torch.Tensor)
        and 2 <= value.ndim < y.ndim
        and value.shape[0] in (1, y.shape[0])
        and value.shape[1] in (1, y.shape[1])
        and all(n == 1 for n in value.shape[2:])
    )
    return value.reshape(*value.shape[:2], *(1,) * (y.ndim - 2)) if rows else value


# torch.nn.Sequential ------------------------------------------------------------------------------


class FusedSequential(nn.Sequential):
    """A `torch.nn.Sequential` that computes normalizations and activations after them as one."""

    _original_class = nn.Sequential

    def forward(self, input: Any) -> Any:
        """Call the modules one after the other."""
        waiting: Any = None  # a normalization that is yet to be called
        for module in self:
            if waiting is not None:
                if activation_name(module) is not None:
                    input, waiting = fused(waiting, module, input), None
                    continue
                input, waiting = waiting(input), None
            if _computes_as_a_layer(module):
                waiting = module
            else:
                input = module(input)
        return input if waiting is None else waiting(input)

    def _get_name(self) -> str:
        return "Sequential"


def followed_by_activations(modules: nn.Sequential) -> str:
    """Return which activations directly follow layers of this library; "" if none does."""
    children = list(modules)
    found = [
        type(after).__name__
        for norm, after in itertools.pairwise(children)
        if _computes_as_a_layer(norm) and activation_name(after) is not None
    ]
    return ", ".join(dict.fromkeys(found))


# Other modules ------------------------------------------------------------------------------------


def register_fusion(cls: Any, forward: Callable[..., Any]) -> None:
    """Tell `replace` how modules of a class compute with `fused`.

    Parameters
    ----------
    cls : type
        A subclass of `torch.nn.Module`, which calls normalizations and activations. Modules of
        exactly this class are changed, if one of their children is a replaced normalization.
    forward : callable
        Used instead of the class's own ``forward``: the same with `groupnorm.torch.fused`.

    Raises
    ------
    groupnorm.errors.ArgumentTypeError
        If `cls` is not such a class, or `forward` not callable.

    Examples
    --------
    >>> import torch
    >>> import groupnorm.torch
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm, self.act = torch.nn.GroupNorm(2, 8), torch.nn.ReLU()
    ...     def forward(self, x):
    ...         return self.act(self.norm(x))
    >>> def forward(self, x):
    ...     return groupnorm.torch.fused(self.norm, self.act, x)
    >>> groupnorm.torch.register_fusion(Block, forward)
    >>> [entry.kind for entry in groupnorm.torch.replace(Block()).fused]
    ['Block']
    """
    check_class(cls, "that call a normalization and an activation")
    if not callable(forward):
        raise ArgumentTypeError(
            f"forward={forward!r} is not callable: give a function with the arguments of "
            f"{cls.__name__}.forward."
        )
    _forwards[cls] = forward


_forwards: dict[type, Callable[..., Any]] = {}


def fused_forward(cls: type) -> Callable[..., Any] | str | None:
    """Return the fused forward of a class, why there is none for this version, or None."""
    if cls in _forwards:
        return _forwards[cls]
    known = _KNOWN.get(f"{cls.__module__}.{cls.__qualname__}")
    if known is None:
        return None
    forward, digests = known
    if source_digest(cls.forward) in digests:  # type: ignore[attr-defined]
        return forward
    return "its forward is not one that is known, as of another version of its package"


def fused_class(original: type) -> type:
    """Return the class of modules that compute with the fused forward of their class.

    Raises
    ------
    ArgumentStateError
        If there is none, as in another process than the one that pickled a module.
    """
    forward = fused_forward(original)
    if not callable(forward):
        raise ArgumentStateError(
            f"{original.__qualname__} has no fused forward here: call "
            "groupnorm.torch.register_fusion before the model is loaded, or restore(model) before "
            "it is saved."
        )
    return swapped_class(original, (Swapped, original), {"forward": forward}, fused_class)


@functools.cache
def source_digest(function: Any) -> str:
    """Return a digest of a function's source without comments and layout; "" without source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]


def _resnet_block(
    self: Any, input_tensor: torch.Tensor, temb: Any, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """Compute what diffusers' ``ResnetBlock2D.forward`` does."""
    if args or kwargs.get("scale") is not None:  # deprecated arguments, of which it warns
        return self._original_class.forward(self, input_tensor, temb, *args, **kwargs)  # type: ignore[no-any-return]
    hidden_states = fused(self.norm1, self.nonlinearity, input_tensor)
    resample = self.downsample if self.upsample is None else self.upsample
    if resample is not None:
        if self.upsample is not None and hidden_states.shape[0] >= 64:
            input_tensor, hidden_states = input_tensor.contiguous(), hidden_states.contiguous()
        input_tensor, hidden_states = resample(input_tensor), resample(hidden_states)
    hidden_states = self.conv1(hidden_states)
    if self.time_emb_proj is not None:
        temb = temb if self.skip_time_act else self.nonlinearity(temb)
        temb = self.time_emb_proj(temb)[:, :, None, None]
    scale = shift = None
    if self.time_embedding_norm == "default":
        hidden_states = hidden_states if temb is None else hidden_states + temb
    elif self.time_embedding_norm == "scale_shift":
        if temb is None:
            raise ValueError(" `temb` should not be None when `time_embedding_norm` is scale_shift")
        scale, shift = torch.chunk(temb, 2, dim=1)
    hidden_states = fused(
        self.norm2, self.nonlinearity, hidden_states, scale=scale, shift=shift
    )  # fmt: skip
    hidden_states = self.conv2(self.dropout(hidden_states))
    if self.conv_shortcut is not None:
        input_tensor = input_tensor.contiguous() if self.training else input_tensor
        input_tensor = self.conv_shortcut(input_tensor)
    return (input_tensor + hidden_states) / self.output_scale_factor  # type: ignore[no-any-return]


def _wav2vec2_convolution(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Compute what transformers' ``Wav2Vec2GroupNormConvLayer.forward`` does."""
    return fused(self.layer_norm, self.activation, self.conv(hidden_states))  # type: ignore[no-any-return]


# By name, with the digests of the sources that they are equal to.
_KNOWN: dict[str, tuple[Callable[..., Any], frozenset[str]]] = {
    "diffusers.models.resnet.ResnetBlock2D": (_resnet_block, frozenset({"24624aeb812a69ca"})),
    "transformers.models.wav2vec2.modeling_wav2vec2.Wav2Vec2GroupNormConvLayer": (
        _wav2vec2_convolution,
        frozenset({"80354caff10c3873"}),
    ),
}
