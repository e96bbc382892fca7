"""Replace the normalizations of a model in place, by changing their class.

Parameters, hooks, names, sharing between places, the state dict, optimizers, train or eval mode,
dtype and device stay what they are, since the objects stay: only the class that computes changes.
"""

import inspect
import math
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
from groupnorm.backends.torch.swapping import Swapped, check_class, original_class, swapped_class
from groupnorm.errors import (
    ArgumentStateError,
    ArgumentTypeError,
    ArgumentValueError,
    GroupNormError,
)
from groupnorm.layer_config import LayerConfig
from groupnorm.plan import resolve_groups

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
    check_class(cls, "to replace")
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
    are reported and left as they are. A second call changes the options of what was replaced.

    A single value per channel, with which PyTorch's layers raise in training, gives the bias; a
    normalization without parameters requires the number of channels that it was created for.

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
    -------  ----------  --------  ----
    (model)  Sequential  fused     SiLU
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
    planned: list[_Planned] = []
    entries: list[Entry] = []
    for names, module in _named(model):
        kind = type(module)
        if isinstance(module, TorchGroupNorm):
            original = original_class(module)
            if original is not None:
                same = (module.implementation, module.dtype) == (implementation, dtype)
                result, note = ("unchanged", "replaced before") if same else ("replaced", "again")
                entries.append(Entry(names, original.__name__, result, note))
                if not same:
                    planned.append(_again(module, options))
            continue
        if not isinstance(module, (nn.GroupNorm, *classes)) and not _is_scripted(module):
            continue
        plan = _plan(module, options)
        if isinstance(plan, str):
            entries.append(Entry(names, kind.__name__, "skipped", plan))
            continue
        planned.append(plan)
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
    for plan in planned:
        plan.module.__dict__.update(plan.attributes)
        plan.module.__class__ = plan.cls
    if fuse:
        entries += _fuse(model)
    return Report(sorted(entries, key=lambda entry: entry.order))


def restore(model: nn.Module) -> Report:
    """Undo `replace`: give every module its former class again.

    What was set on a replaced module since then stays, if the former class has it as well:
    parameters, ``eps``, ``num_groups``, ``num_channels``.

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
        if kind not in (TorchNativeGroupNorm, FusedSequential) and "_make" not in vars(kind):
            why = f"its class was changed again, to {kind.__name__}: undo that first"
            entries.append(Entry(names, original.__name__, "skipped", why))
            continue
        if "forward" in module.__dict__:
            entries.append(Entry(names, original.__name__, "skipped", _FORWARD_SINCE))
            continue
        if isinstance(module, TorchGroupNorm):
            for name in ("eps", "num_groups", "num_channels"):
                if name in module.__dict__:
                    module.__dict__[name] = getattr(module, name)
            for name in _ADDED:
                module.__dict__.pop(name, None)
        module.__dict__.pop("_original_class", None)
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
    *("eps", "num_groups", "num_channels", "num_features", "normalized_shape", "drop", "act"),
    *("track_running_stats", "_apply_instance_norm", "_check_input_dim", "_call_impl"),
})  # fmt: skip
# Names that replaced modules have besides those of PyTorch's classes.
_OURS = frozenset(
    name
    for name in set(dir(TorchNativeGroupNorm)) - set(dir(nn.GroupNorm))
    if not name.startswith("_") and name not in ("eps", "num_groups", "num_channels")
)


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
_FORWARD_SINCE = "its forward was replaced on the object since, as by accelerate: undo that first"


def _why_hidden(module: nn.Module) -> str | None:
    """Return which of a module's attributes would be hidden by those of a layer, or None."""
    own = {*vars(module), *module._parameters, *module._buffers, *module._modules}
    for cls in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        if not cls.__module__.startswith("torch.nn."):
            own |= vars(cls).keys()
    clash = ", ".join(sorted(own & _OURS))
    return f"it defines {clash}, which layers of this library define too" if clash else None


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
    _input_name: str  # of the original class's forward
    _checks_input: bool  # as instance norms do

    def forward(self, *args: Any, mask: Any = None, **named: Any) -> Any:
        """Normalize x, and call what follows."""
        layer: Any = self
        if not args and self._input_name in named:
            args = (named.pop(self._input_name),)
        if named or not 1 <= len(args) <= 2:
            raise TypeError(f"forward() takes {self._input_name} and mask, not {args} and {named}")
        x, mask = args[0], mask if len(args) == 1 else args[1]
        if isinstance(x, torch.fx.Proxy):
            recorded = record_layer(layer, x, mask)
            if recorded is not None:
                return recorded
        if self._checks_input and not isinstance(x, torch.fx.Proxy):
            self._check_input_dim(x)  # type: ignore[attr-defined]
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

    def vjp(self, x: Any, mask: Any = None) -> Any:
        """Refuse: the pullback would be that of the normalization alone."""
        self._refuse("vjp")
        return super().vjp(x, mask)  # type: ignore[misc]

    def to_backend(self, backend: str, **options: Any) -> Any:
        """Refuse: the layer would be the normalization alone."""
        self._refuse("to_backend")
        return super().to_backend(backend, **options)  # type: ignore[misc]

    def _refuse(self, method: str) -> None:
        if self._then:
            raise ArgumentStateError(
                f"{method} is for normalizations, and this module calls {', '.join(self._then)} "
                "after it. Use PyTorch's own differentiation, or a GroupNorm of this library."
            )


class _Planned(NamedTuple):
    """What is changed of a module."""

    module: nn.Module
    cls: type
    attributes: dict[str, Any]


def _plan(module: nn.Module, options: dict[str, Any]) -> _Planned | str:
    """Return what is changed of a module, or why it is not replaced; nothing is changed yet."""
    kind: Any = type(module)
    rule = _why_never(module) or _rule_for(kind)
    if isinstance(rule, str):
        return rule
    how = rule(module)
    hidden = _why_hidden(module)
    if hidden is not None:
        return hidden
    if isinstance(how, str):
        return how
    if not isinstance(how, Replacement):
        raise ArgumentTypeError(
            f"the rule of {kind.__qualname__} returned {how!r}: it must return a "
            "groupnorm.torch.Replacement, or a string with the reason why there is none."
        )
    then: Any = how.then
    if isinstance(then, str):
        raise ArgumentTypeError(
            f"the rule of {kind.__qualname__} returned then={then!r}: it must be a tuple of "
            f"names, such as ({then!r},)."
        )
    missing = [name for name in how.then if not isinstance(getattr(module, name, None), nn.Module)]
    if missing:
        return f"it has no submodule {missing[0]}, which its rule names"
    try:
        config = _config(module, how, options)
        cls = TorchNativeGroupNorm if kind is nn.GroupNorm else _class_for(kind)
    except (GroupNormError, TypeError, ValueError) as error:
        return str(error)
    attributes: dict[str, Any] = {"_original_class": kind} | _configured(cls, config)
    if cls is not TorchNativeGroupNorm:
        attributes |= {"_then": how.then, "_unbatched_ndim": how.unbatched_ndim}
    return _Planned(module, cls, attributes)


def _again(layer: TorchGroupNorm, options: dict[str, Any]) -> _Planned:
    """Return the change of the options of a module that was replaced before."""
    config = layer._config
    config = config._replace(options=config.options._replace(**options))
    return _Planned(layer, type(layer), _configured(type(layer), config))


def _configured(cls: type[TorchGroupNorm], config: LayerConfig) -> dict[str, Any]:
    """Return the attributes that configure a layer."""
    layer: Any = object.__new__(cls)
    layer.__dict__.update(_parameters={}, _buffers={}, _modules={})
    layer._configure(config)
    return {name: layer.__dict__[name] for name in ("_config", "_call_options")}


def _class_for(original: type) -> type:
    """Return the class of replaced modules of a class."""
    positional = [
        p
        for p in inspect.signature(original.forward).parameters.values()  # type: ignore[attr-defined]
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(positional) > 2:  # self and x
        raise ArgumentTypeError(f"its forward takes more than x: {positional[2].name}")
    base = TorchNativeGroupNorm if issubclass(original, nn.GroupNorm) else TorchGroupNorm
    # These describe the parameters as the class has them.
    own = {
        name: getattr(original, name)
        for name in ("reset_parameters", "extra_repr")
        if hasattr(original, name)
    }
    # Autocast on CUDA devices leaves instance norms in their dtype.
    own["_autocast_to_float32"] = issubclass(original, (nn.GroupNorm, nn.LayerNorm))
    own["_checks_input"] = hasattr(original, "_check_input_dim")
    own["_input_name"] = positional[1].name if len(positional) > 1 else "x"
    return swapped_class(original, (_Replaced, base, original), own, _class_for)


def _config(module: Any, how: Replacement, options: dict[str, Any]) -> LayerConfig:
    """Return the configuration of the layer that a module becomes."""
    if not isinstance(how.in_size, tuple):
        raise ArgumentTypeError(
            f"its rule gives in_size={how.in_size!r}: it must be a tuple, such as (C, ...) for "
            "channels on axis 1"
        )
    size = check_in_size(how.in_size, how.feature_axis)
    channels = math.prod(size.feature_shape)
    resolve_groups(channels, how.num_groups, None)
    for name in ("weight", "bias"):
        if not hasattr(module, name):
            raise ArgumentValueError(f"it has no attribute {name}, which may be None")
        stored = getattr(module, name)
        lazy = isinstance(stored, nn.parameter.UninitializedParameter)
        shapes = ((channels,), size.feature_shape)
        if stored is not None and (lazy or tuple(stored.shape) not in shapes):
            shape = "no shape yet" if lazy else f"shape {tuple(stored.shape)}"
            raise ArgumentValueError(f"its {name} has {shape}, and there are {channels} channels")
    weight, bias = module.weight, module.bias
    dtype = torch.get_default_dtype() if weight is None else weight.dtype
    call = _call_options(
        how.num_groups, how.epsilon, feature_axis=size.feature, reduction_axes=how.reduction_axes,
        feature_shape=size.feature_shape, **options,
    )  # fmt: skip
    return LayerConfig(
        in_size=size.in_size, feature_axis=size.feature_axis, options=call,
        use_bias=bias is not None, use_scale=weight is not None,
        param_type=None,
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


def _fuse(model: nn.Module) -> list[Entry]:
    """Have activations after replaced normalizations computed in the same pass."""
    entries = []
    for names, module in _named(model):
        cls: Any = type(module)
        if original_class(module) is not None:
            continue
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
    """Return every module once, with its names; a shared module has several."""
    modules = dict(model.named_modules())
    names: dict[int, list[str]] = {id(module): [name] for name, module in modules.items()}
    for name, module in modules.items():
        for child_name, child in module._modules.items():
            if child is not None:
                full = f"{name}.{child_name}" if name else child_name
                known = names[id(child)]
                known += [] if full in known else [full]
    return [(tuple(names[id(module)]), module) for module in modules.values()]
