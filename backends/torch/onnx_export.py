"""Group norms in `torch.onnx.export`: an operator for our layers, and translations to nodes.

While PyTorch exports to ONNX, a call of this package is one operator, `groupnorm::exported`. It is
defined as the portable implementation: PyTorch's exporter expands it, unless it has a translation.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from groupnorm.adapter import Planning, Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.torch.custom_op import SETTINGS, options_of, settings_of
from groupnorm.dispatch import adapter_named
from groupnorm.errors import BackendImportError
from groupnorm.onnx.graph import DTYPES, Dtypes, Graph, Normalized, layout_of, normalize
from groupnorm.portable.group_norm import group_norm
from groupnorm.portable.inputs import check
from groupnorm.portable.per_sample import is_per_sample

__all__ = ["exported", "translations"]

_library = torch.library.Library("groupnorm", "FRAGMENT")
_library.define(f"exported(Tensor x, Tensor? scale, Tensor? bias, {SETTINGS}) -> Tensor")


# Plans as for an exported program also when PyTorch runs or expands the operator.
_adapter: Any = copy.copy(adapter_named("torch"))
_adapter.planning = lambda shape: Planning(static=False, blocked_sums=False)


@torch.library.impl(_library, "exported", "CompositeImplicitAutograd")
def _portable(x: Any, scale: Any, bias: Any, *settings: Any) -> Any:
    return group_norm(_adapter, x, scale, bias, None, options_of(*settings))


def exported(adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
    """Return y, computed by the operator, or `Unsupported`; the exporter traces this function."""
    if mask is not None:
        return Unsupported("the operator takes no mask")
    if is_per_sample(x, scale, bias, options):
        return Unsupported("the operator's parameters are the same for all samples")
    if any(_name(a.dtype) not in DTYPES for a in (x, scale, bias) if a is not None):
        return Unsupported("the nodes are for real floating dtypes")
    plan = check(adapter, x, scale, bias, None, options).plan
    if not all(isinstance(n, int) for n in plan.feature_shape):
        return Unsupported("the number of channels is unknown")
    return torch.ops.groupnorm.exported.default(x, scale, bias, *settings_of(options))


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


# Translations -------------------------------------------------------------------------------------


def translations() -> dict[Any, Callable[..., Any]]:
    """Return the functions that add the nodes of each operator, by PyTorch's operators.

    Raises
    ------
    BackendImportError
        If onnxscript cannot be imported.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BackendImportError(
            "translation_table() is for torch.onnx.export, which needs the package onnxscript, and "
            f"that cannot be imported ({error}): install it with pip install onnxscript."
        ) from error
    return {
        torch.ops.groupnorm.exported.default: _exported,
        torch.ops.aten.group_norm.default: _group_norm,
        torch.ops.aten.native_group_norm.default: _native_group_norm,
    }


# The exporter passes some arguments by the names that they have in PyTorch's operators.


def _exported(x: Any, scale: Any, bias: Any, *settings: Any) -> Any:
    return _add(_graph(), x, scale, bias, options_of(*settings)).y


def _group_norm(
    input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:  # fmt: skip
    return _add(_graph(), input, weight, bias, _native_options(num_groups, eps)).y


def _native_group_norm(
    input: Any, weight: Any, bias: Any, N: Any, C: Any, HxW: Any, group: int, eps: float
) -> Any:
    graph = _graph()
    found = _add(graph, input, weight, bias, _native_options(group, eps))
    shape = graph.constant(np.array([0, group]))

    def per_group(value: Any) -> Any:
        like = input if weight is None else weight
        return graph.node("CastLike", graph.node("Reshape", value, shape), like)

    reciprocal = graph.node("Reciprocal", found.deviation)
    return found.y, per_group(graph.node("Add", *found.means)), per_group(reciprocal)


def _native_options(num_groups: int, epsilon: float) -> CallOptions:
    return options_of((1,), num_groups, None, None, epsilon, "input", True, None)


def _graph() -> Graph:
    """Return the graph that the exporter builds."""
    from onnxscript import ir, opset18

    def node(operator: str, *inputs: Any, **attributes: Any) -> Any:
        return getattr(opset18, operator)(*inputs, **attributes)

    def constant(value: Any) -> Any:
        return node("Constant", value=ir.tensor(value))

    return Graph(node, constant)


def _add(graph: Graph, x: Any, scale: Any, bias: Any, options: CallOptions) -> Normalized:
    """Add the nodes for values of the exporter's graph."""
    names = [None if a is None else a.dtype.numpy().name for a in (scale, bias)]
    dtypes = Dtypes.of(x.dtype.numpy().name, names, options)
    layout = layout_of(tuple(n if isinstance(n, int) else None for n in x.shape), options)
    shape = graph.constant(np.array(layout.parameter_shape))

    def parameter(value: Any, dtype: str | None) -> Any:
        if value is None:
            return None
        if dtype != dtypes.computed:
            value = graph.node("Cast", value, to=DTYPES[dtypes.computed])
        return graph.node("Reshape", value, shape)

    scale, bias = map(parameter, (scale, bias), names)
    return normalize(graph, x, scale, bias, layout, dtypes, options.epsilon, options.activation)
