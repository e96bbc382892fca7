"""A layer as an ONNX model, built with the package `onnx` alone."""

import numbers
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from groupnorm.arguments import CallOptions, positive
from groupnorm.dtypes import dtype_name
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, BackendImportError
from groupnorm.onnx.graph import DTYPES, Dtypes, Graph, layout_of, normalize

if TYPE_CHECKING:
    import onnx

__all__ = ["LOWEST_OPSET", "layer_model", "save"]

#: ReduceMean has its axes as an input since.
LOWEST_OPSET = 18


def layer_model(
    shape: Any,
    scale: "np.ndarray[Any, Any] | None",
    bias: "np.ndarray[Any, Any] | None",
    options: CallOptions,
    dtype: Any,
    opset: int,
) -> "onnx.ModelProto":
    """Return the model with the input x and the output y; see `GroupNorm.to_onnx`."""
    shape = _check_shape(shape)
    if options.axis_name is not None:
        raise ArgumentValueError(
            f"axis_name={options.axis_name!r} cannot be part of an ONNX model, which runs on one "
            "device: export a layer without axis_name, which has the same parameters."
        )
    layout = layout_of(shape, options)
    parameters = [None if a is None else a.dtype.name for a in (scale, bias)]
    dtypes = Dtypes.of(dtype_name("dtype", dtype), parameters, options)
    library = _import_onnx()
    newest, opset = library.defs.onnx_opset_version(), positive("opset", opset)
    if not LOWEST_OPSET <= opset <= newest:
        raise ArgumentValueError(
            f"opset={opset} is not supported: choose {LOWEST_OPSET} to {newest}, the newest that "
            f"the installed onnx {library.__version__} knows."
        )

    nodes: list[Any] = []
    constants: dict[str, np.ndarray[Any, Any]] = {}

    def constant(value: "np.ndarray[Any, Any]", name: str | None = None) -> str:
        name = name or f"constant_{len(constants)}"
        constants[name] = value
        return name

    def node(operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator.lower()}_{len(nodes)}"
        nodes.append(library.helper.make_node(operator, inputs, [output], **attributes))
        return output

    def parameter(value: "np.ndarray[Any, Any] | None", name: str) -> str | None:
        if value is None:
            return None
        return constant(value.astype(dtypes.computed).reshape(layout.parameter_shape), name)

    normalize(
        Graph(node, constant), "x", parameter(scale, "scale"), parameter(bias, "bias"), layout,
        dtypes, options.epsilon, options.activation,
    )  # fmt: skip
    nodes[-1].output[0] = "y"
    x, y = (
        library.helper.make_tensor_value_info(name, DTYPES[kind], shape)
        for name, kind in (("x", dtypes.x), ("y", dtypes.result))
    )
    graph = library.helper.make_graph(
        nodes, "group_norm", [x], [y],
        [library.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    imports = [library.helper.make_opsetid("", opset)]
    model: onnx.ModelProto = library.helper.make_model(
        graph, opset_imports=imports, producer_name="groupnorm",
        ir_version=library.helper.find_min_ir_version_for(imports),  # for older runtimes
    )  # fmt: skip
    library.checker.check_model(model, full_check=True)
    return model


def _check_shape(shape: Any) -> tuple[int | str | None, ...]:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise ArgumentTypeError(
            f"shape={shape!r} is of type {type(shape).__name__}: it must be a tuple with a number, "
            "a name or None for every axis, such as ('N', 64, 'H', 'W')."
        )
    for entry in shape:
        if entry is ...:
            raise ArgumentValueError(
                f"shape={shape!r} leaves the number of axes open, which inputs of an ONNX model "
                "must have: write one name for each axis, as in ('N', 64, 'H', 'W')."
            )
        number = isinstance(entry, numbers.Integral) and not isinstance(entry, bool)
        if not ((number and int(entry) > 0) or isinstance(entry, str) or entry is None):
            raise ArgumentValueError(
                f"shape={shape!r} holds {entry!r}: each entry must be a positive number, or a name "
                "or None for any length."
            )
    return tuple(int(n) if isinstance(n, numbers.Integral) else n for n in shape)


def save(model: "onnx.ModelProto", path: "str | os.PathLike[str]") -> None:
    """Write a model to a file."""
    _import_onnx().save_model(model, path)


def _import_onnx() -> Any:
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper
    except ImportError as error:
        raise BackendImportError(
            f"to_onnx needs the package onnx, which cannot be imported ({error}): install it with "
            'pip install "groupnorm[onnx]".'
        ) from error
    return onnx
