"""Replace the normalizations of a model in place, by changing their class.

Parameters, hooks, names, sharing between places, the state dict, optimizers, train or eval mode,
dtype and device stay what they are, since the objects stay: only the class that computes changes.
"""

import functools
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from groupnorm.arguments import CallOptions, check_in_size, flag, validate
from groupnorm.backends.torch.adapter import torch_adapter
from groupnorm.backends.torch.fusion import (
    FusedSequential,
    activation_name,
    followed_by_activations,
    fused_class,
    fused_forward,
)
from groupnorm.backends.torch.fx import record_layer
from groupnorm.backends.torch.internals import has_hooks
from groupnorm.backends.torch.layer import TorchGroupNorm, TorchNativeGroupNorm
from groupnorm.backends.torch.report import Entry, Report
from groupnorm.backends.torch.swapping import Swapped, original_class, swapped_class
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.initializers import ones, zeros
from groupnorm.layer_config import LayerConfig

__all__ = ["Replacement", "register_replacement", "replace", "restore"]


class Replacement(NamedTuple):
    """How a module is computed as a group normalization.

    Parameters
    ----------
    num_groups : int
        The number of groups.
    epsilon : float
        Added to the variance.
    in_size : tuple of int
        The input's shape without the batch, as for `groupnorm.GroupNorm`: ``(C, ...)`` with the
        channels on axis 1.
    feature_axis, reduction_axes
        As for `groupnorm.GroupNorm`.
    then : tuple of str
        The names of submodules that are called on the result, one after the other. If the first
        that does anything is ReLU, SiLU or the exact GELU, it is computed in the same pass.
    unbatched_ndim : int, optional
        The number of axes of an input that is a single sample without a batch axis, if the module
        accepts such inputs.
    """

    num_groups: int
    epsilon: float
    in_size: "tuple[int | EllipsisType, ...]"
    feature_axis: int | tuple[int, ...] = 0
    reduction_axes: tuple[int, ...] | None = None
    then: tuple[str, ...] = ()
    unbatched_ndim: int | None = None


Rule = Callable[[Any], Replacement | str]


def register_replacement(cls: Any, rule: Rule) -> None:
    """Tell `replace` how modules of a class are computed as a group normalization.

    The module must keep its parameters as ``weight`` and ``bias`` (or None), of shape (C,).

    Parameters
    ----------
    cls : type
        A subclass of `torch.nn.Module`. Modules of exactly this class are replaced, and those of
        subclasses that inherit its ``forward``. A class that is not a `torch.nn.GroupNorm` is only
        replaced where ``also=`` names it.
    rule : callable
        Called with a module; returns a `Replacement`, or a string: why this one is not replaced.

    Raises
    ------
    groupnorm.errors.ArgumentTypeError
        If `cls` is not such a class, or the rule not callable.

    Examples
    --------
    >>> import torch
    >>> import groupnorm.torch
    >>> from groupnorm.torch import Replacement
    >>> class NamedNorm(torch.nn.GroupNorm):
    ...     def forward(self, input):
    ...         return super().forward(input)
    >>> rule = lambda norm: Replacement(norm.num_groups, norm.eps, (norm.num_channels, ...))
    >>> groupnorm.torch.register_replacement(NamedNorm, rule)
    >>> len(groupnorm.torch.replace(NamedNorm(2, 8)).replaced)
    1
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ArgumentTypeError(
            f"cls={cls!r} is not a subclass of torch.nn.Module: give the class of the modules to "
            "replace."
        )
    if not callable(rule):
        raise ArgumentTypeError(
            f"rule={rule!r} is not callable: give a function that takes a module and returns a "
            "groupnorm.torch.Replacement, or a string with the reason why it is not replaced."
        )
    _rules[cls] = rule


def replace(
    model: nn.Module,
    *,
    implementation: str | None = None,
    dtype: str = "input",
    also: "type[nn.Module] | Iterable[type[nn.Module]]" = (),
    fuse: bool = True,
    on_unknown: Literal["skip", "raise"] = "skip",
) -> Report:
    """Have all group normalizations of a model computed by this library, in place.

    Only the class of the modules changes: parameters, hooks, names, sharing, the state dict,
    optimizers, dtype and device stay as they are, and `restore` undoes it. The modules become
    layers of this library as well, so that they accept a mask, for instance.

    Replaced are `torch.nn.GroupNorm`, its subclasses that inherit its ``forward``, the subclasses
    of timm, and what `register_replacement` added. Parametrized, quantized and unknown subclasses
    are reported and left as they are.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or one normalization.
    implementation : {"portable", "fused", "native"}, optional
        As for `groupnorm.group_norm`.
    dtype : str
        The results' dtype. Default is ``"input"``, x's, as in PyTorch.
    also : class or sequence of classes
        Other classes to replace where they are equivalent to a group normalization:
        `torch.nn.InstanceNorm1d`, ``2d`` and ``3d`` without running statistics,
        `torch.nn.LayerNorm`, or registered ones.
    fuse : bool
        Whether to compute ReLU, SiLU and the exact GELU in the same pass where they directly follow
        a replaced normalization: in `torch.nn.Sequential`, in diffusers' ``ResnetBlock2D`` (with
        its scale and shift by the time embedding), in transformers' convolutions of Wav2Vec2, and
        in what `register_fusion` added. While one of the two has hooks, they are called separately.
    on_unknown : {"skip", "raise"}
        Whether a normalization that cannot be replaced is left as it is, or an error; then nothing
        is changed.

    Returns
    -------
    Report
        What was replaced, fused and skipped, with the reasons; it prints as a table.

    Raises
    ------
    groupnorm.errors.ArgumentTypeError, groupnorm.errors.ArgumentValueError
        Naming the argument, its value, the rule and the fix.

    Examples
    --------
    >>> import torch
    >>> import groupnorm.torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.SiLU()
    ... )
    >>> print(groupnorm.torch.replace(model))
    module   class       result    note
    -------  ----------  --------  ----------------
    (model)  Sequential  fused     1 GroupNorm, SiLU
    1        GroupNorm   replaced
    """
    _check_model(model)
    if on_unknown not in ("skip", "raise"):
        raise ArgumentValueError(
            f"on_unknown={on_unknown!r} is not known: choose 'skip' or 'raise'."
        )
    classes = _classes(also)
    flag("fuse", fuse)
    options: dict[str, Any] = {"implementation": implementation, "dtype": dtype}
    _call_options(1, 1e-5, **options)  # raises, also for a model without normalizations
    planned: list[tuple[nn.Module, LayerConfig, Replacement]] = []
    entries: list[Entry] = []
    for names, module in _named(model):
        kind = type(module)
        if isinstance(module, TorchGroupNorm):
            if original_class(module) is not None:
                entries.append(Entry(names, kind.__name__, "skipped", "replaced before"))
            continue
        if not isinstance(module, (nn.GroupNorm, *classes)) and not _is_scripted(module):
            continue
        rule = _why_never(module) or _rule_for(kind)
        how = rule if isinstance(rule, str) else rule(module)
        if not isinstance(how, str | Replacement):
            raise ArgumentTypeError(
                f"the rule of {kind.__qualname__} returned {how!r}: it must return a "
                "groupnorm.torch.Replacement, or a string with the reason why there is none."
            )
        if isinstance(how, str):
            entries.append(Entry(names, kind.__name__, "skipped", how))
            continue
        planned.append((module, _config(module, how, options), how))
        entries.append(Entry(names, kind.__name__, "replaced", ""))
    unknown = [entry for entry in entries if entry.result == "skipped"]
    if unknown and on_unknown == "raise":
        listed = "; ".join(f"{entry.name} ({entry.kind}): {entry.note}" for entry in unknown)
        raise ArgumentValueError(
            f"on_unknown='raise' is given, and {len(unknown)} normalizations cannot be replaced: "
            f"{listed}. Nothing was changed. Use groupnorm.torch.register_replacement, or "
            "on_unknown='skip'."
        )
    # Loaded now: compiled programs are compiled again if their first call loads them.
    _ = torch_adapter.kernels
    for module, config, replacement in planned:
        _swap(module, config, replacement)
    if fuse:
        entries += _fuse(model)
    return Report(sorted(entries, key=lambda entry: entry.order))


def restore(model: nn.Module) -> Report:
    """Undo `replace`: give every module its former class again.

    What was set on a replaced module since then stays: parameters, ``eps``, ``num_groups``.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or a part of it.

    Returns
    -------
    Report
        What was restored, and what was not, with the reason.

    Examples
    --------
    >>> import torch
    >>> import groupnorm.torch
    >>> norm = torch.nn.GroupNorm(2, 8)
    >>> report = groupnorm.torch.replace(norm)
    >>> report = groupnorm.torch.restore(norm)
    >>> type(norm) is torch.nn.GroupNorm
    True
    """
    _check_model(model)
    entries = []
    for names, module in _named(model):
        original = original_class(module)
        if original is None:
            continue
        kind = type(module)
        if kind is not _replaced_class(original, module):
            why = f"its class was changed again, to {kind.__name__}: undo that first"
            entries.append(Entry(names, original.__name__, "skipped", why))
            continue
        if isinstance(module, TorchGroupNorm):
            for name in ("eps", "num_groups", "num_channels"):
                if name in module.__dict__:
                    module.__dict__[name] = getattr(module, name)
            for name in _ADDED:
                module.__dict__.pop(name, None)
        del module.__dict__["_original_class"]
        module.__class__ = original
        entries.append(Entry(names, original.__name__, "restored", ""))
    return Report(entries)


# What is replaced by what -------------------------------------------------------------------------


def _group_norm(norm: Any) -> Replacement:
    return Replacement(norm.num_groups, norm.eps, (norm.num_channels, ...))


def _group_norm_and_activation(norm: Any) -> Replacement:
    return _group_norm(norm)._replace(then=("drop", "act"))


def _instance_norm(norm: Any) -> Replacement | str:
    if norm.track_running_stats:
        return "it uses running statistics"
    ndim = next(n for n, cls in _INSTANCE_NORMS.items() if isinstance(norm, cls))
    channels = norm.num_features
    return Replacement(channels, norm.eps, (channels, ...), unbatched_ndim=ndim)


def _layer_norm(norm: Any) -> Replacement:
    shape = tuple(norm.normalized_shape)
    axes = tuple(range(-len(shape), 0))
    return Replacement(1, norm.eps, shape, axes, axes)


_INSTANCE_NORMS = {2: nn.InstanceNorm1d, 3: nn.InstanceNorm2d, 4: nn.InstanceNorm3d}
_rules: dict[type, Rule] = {
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    **dict.fromkeys(_INSTANCE_NORMS.values(), _instance_norm),
}
# By name, so that their packages need not be imported.
_RULES_BY_NAME: dict[str, Rule] = {
    "timm.layers.norm.GroupNorm": _group_norm,
    "timm.layers.norm.GroupNorm1": _group_norm,
    "timm.layers.norm_act.GroupNormAct": _group_norm_and_activation,
    "timm.layers.norm_act.GroupNorm1Act": _group_norm_and_activation,
}
# A class that defines one of these may compute something else than the class it derives from.
_DECISIVE = frozenset({
    *("forward", "__call__", "__getattr__", "__getattribute__", "weight", "bias"),
    *("eps", "num_groups", "num_channels", "drop", "act"),
})  # fmt: skip


def _rule_for(kind: type) -> Rule | str:
    """Return the rule of a class, or of the one whose computation it inherits; or why none."""
    for cls in kind.__mro__:
        rule = _rules.get(cls) or _RULES_BY_NAME.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            return rule
        if not _DECISIVE.isdisjoint(vars(cls)):
            break
    if "quantized" in kind.__module__.split("."):
        return "it is quantized"
    return (
        f"an unknown subclass, {kind.__module__}.{kind.__qualname__}: tell how it computes by "
        "groupnorm.torch.register_replacement"
    )


def _why_never(module: nn.Module) -> str | None:
    """Return why a module is not replaced, whatever its class."""
    if _is_scripted(module):
        return "compiled by torch.jit.script: replace before compiling"
    if nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized: replace before parametrizing, or remove the parametrization"
    return _FORWARD if "forward" in module.__dict__ else None


_FORWARD = "its forward was replaced on the object, as by accelerate: replace before that"


def _is_scripted(module: nn.Module) -> bool:
    return (
        isinstance(module, torch.jit.ScriptModule)
        and getattr(module, "original_name", "") == "GroupNorm"
    )


# Changing modules ---------------------------------------------------------------------------------

_ADDED = ("_config", "_call_options", "_kept_options", "_then", "_unbatched_ndim")


class _Replaced(Swapped):
    """What modules of other classes than `torch.nn.GroupNorm` compute when they are replaced."""

    _then: tuple[str, ...]
    _unbatched_ndim: int | None

    def forward(self, x: Any, mask: Any = None) -> Any:
        """Normalize x, and call what follows."""
        layer: Any = self
        if isinstance(x, torch.fx.Proxy):
            recorded = record_layer(layer, x, mask)
            if recorded is not None:
                return recorded
        # Of a proxy, the number of axes is not known.
        alone = self._unbatched_ndim is not None and bool(x.ndim == self._unbatched_ndim)
        x = x.unsqueeze(0) if alone else x
        modules = [getattr(self, name) for name in self._then]
        modules = [m for m in modules if type(m) is not nn.Identity or has_hooks(m)]
        name = activation_name(modules[0]) if modules and not has_hooks(modules[0]) else None
        if name is None or isinstance(x, torch.fx.Proxy):
            y = super().forward(x, mask)  # type: ignore[misc]
        else:
            y = layer.modulated(x, name, mask=mask)
            del modules[0]
        for module in modules:
            y = module(y)
        return y[0] if alone else y


def _replaced_class(original: Any, module: nn.Module) -> type:
    """Return the class of replaced modules of a class."""
    if original is nn.GroupNorm:
        return TorchNativeGroupNorm
    if original is nn.Sequential:
        return FusedSequential
    if not isinstance(module, TorchGroupNorm) and fused_forward(original) is not None:
        return fused_class(original)
    return _class_for(original)


@functools.cache
def _class_for(original: type) -> type:
    base = TorchNativeGroupNorm if issubclass(original, nn.GroupNorm) else TorchGroupNorm
    # These describe the parameters as the class has them.
    own = {name: getattr(original, name) for name in ("reset_parameters", "extra_repr")}
    return swapped_class(original, (_Replaced, base, original), own, _class_for)


def _config(module: Any, how: Replacement, options: dict[str, Any]) -> LayerConfig:
    """Return the configuration of the layer that a module becomes."""
    size = check_in_size(how.in_size, how.feature_axis)
    weight = getattr(module, "weight", None)
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    call = _call_options(
        how.num_groups, how.epsilon, feature_axis=size.feature, reduction_axes=how.reduction_axes,
        feature_shape=size.feature_shape, **options,
    )  # fmt: skip
    return LayerConfig(
        in_size=size.in_size, feature_axis=size.feature_axis, options=call,
        use_bias=getattr(module, "bias", None) is not None, use_scale=weight is not None,
        bias_init=zeros, scale_init=ones, param_type=None,
        param_dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def _call_options(
    num_groups: int, epsilon: float, *, feature_axis: Any = 1, reduction_axes: Any = None,
    **options: Any,
) -> CallOptions:  # fmt: skip
    return validate(
        num_groups=num_groups, epsilon=epsilon, feature_axis=feature_axis,
        reduction_axes=reduction_axes, group_size=None, axis_name=None, axis_index_groups=None,
        use_fast_variance=True, **options,
    )  # fmt: skip


def _swap(module: nn.Module, config: LayerConfig, how: Replacement) -> None:
    original: Any = type(module)
    cls = TorchNativeGroupNorm if original is nn.GroupNorm else _class_for(original)
    changed: dict[str, Any] = {
        "_original_class": original,
        "_config": config,
        "_call_options": config.options,
    }
    if cls is not TorchNativeGroupNorm:
        changed |= {"_then": how.then, "_unbatched_ndim": how.unbatched_ndim}
    module.__dict__.update(changed)
    module.__class__ = cls


def _fuse(model: nn.Module) -> list[Entry]:
    """Have activations after replaced normalizations computed in the same pass."""
    entries = []
    for names, module in _named(model):
        cls: Any = type(module)
        if cls is nn.Sequential:
            note = followed_by_activations(module)  # type: ignore[arg-type]
            cls = FusedSequential
        else:
            forward = fused_forward(cls)
            if forward is None or not any(isinstance(m, TorchGroupNorm) for m in module.children()):
                continue
            if isinstance(forward, str):
                entries.append(Entry(names, cls.__name__, "not fused", forward))
                continue
            note = "its normalizations and activations"
            cls = fused_class(cls)
        if note:
            kind = type(module)
            if "forward" in module.__dict__:
                entries.append(Entry(names, kind.__name__, "not fused", _FORWARD))
                continue
            module.__dict__["_original_class"] = kind
            module.__class__ = cls
            entries.append(Entry(names, kind.__name__, "fused", note))
    return entries


# Arguments ----------------------------------------------------------------------------------------


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"model is of type {type(model).__name__}: give a torch.nn.Module. (A pipeline of "
            "diffusers has several: pass pipe.unet, and pipe.vae.)"
        )


def _classes(also: Any) -> tuple[type, ...]:
    classes = tuple(also) if isinstance(also, Iterable) else (also,)
    if not all(isinstance(cls, type) and issubclass(cls, nn.Module) for cls in classes):
        raise ArgumentTypeError(
            f"also={also!r} is not a class of modules, nor several: give classes, such as "
            "also=(torch.nn.LayerNorm,)."
        )
    return classes


def _named(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Return every module once, with all its names; a shared module has several."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    return [(tuple(names[key]), module) for key, module in modules.items()]
