"""The nodes of a group norm, for any library that builds ONNX graphs; nothing of ONNX is imported.

Runtimes add up long rows in float32 one element after the other. Therefore the mean is subtracted
twice: the first one is off by up to 1e-3 of the offset, and the second one finds that difference.
Likewise the variance is a rough mean of the squares plus the mean of their differences from it.
Then what is summed is small or of both signs, and results do not depend on how a runtime sums.

All operators are those of operator set 18, which later ones have unchanged.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from groupnorm.arguments import CallOptions
from groupnorm.dispatch import adapter_named
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.plan import make_plan
from groupnorm.portable.inputs import dtypes_of

__all__ = ["DTYPES", "Dtypes", "Graph", "Layout", "Normalized", "layout_of", "normalize"]

#: The numbers of the dtypes in ONNX (`onnx.TensorProto.DataType`).
DTYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}

Value = Any


class Graph(NamedTuple):
    """How a library adds to the graph that it builds."""

    #: Adds a node: ``node(operator, *inputs, **attributes)`` returns its output.
    node: Callable[..., Value]
    #: Adds a constant, given as a NumPy array.
    constant: Callable[["np.ndarray[Any, Any]"], Value]


class Layout(NamedTuple):
    """Where the axes of x are, for any lengths of those that are no feature axes."""

    kept: int  # axes in front that are not reduced, after the permutation
    permutation: tuple[int, ...] | None
    groups: int
    members: int

    @property
    def parameter_shape(self) -> tuple[int, int, int]:
        """The shape of one value per channel, broadcast to (groups, members, positions)."""
        return self.groups, self.members, 1


def layout_of(shape: tuple[int | str | None, ...], options: CallOptions) -> Layout:
    """Return the layout of inputs of a shape, of which lengths may be unknown.

    Raises
    ------
    ArgumentValueError
        If the axes do not match the shape.
    """
    ndim = len(shape)
    features = sorted({a % ndim for a in options.feature if -ndim <= a < ndim})
    lengths = tuple(shape[a] for a in features)
    expected = options.feature_shape
    if not all(isinstance(n, int) for n in lengths) or expected not in (None, lengths):
        raise ArgumentValueError(
            f"shape={shape!r} has the lengths {lengths} at the feature axes {tuple(features)}, and "
            f"the channels are part of the model: there must be {expected or 'numbers'}."
        )
    plan = make_plan(
        tuple(n if isinstance(n, int) and a in features else 1 for a, n in enumerate(shape)),
        options.feature, options.num_groups, options.group_size, options.reduction,
        sampled=False,
    )  # fmt: skip
    kept = sorted(plan.kept_axes)
    positions = [a for a in range(ndim) if a not in plan.kept_axes and a not in features]
    permutation = (*kept, *features, *positions)
    groups = plan.parameter_shape[plan.channel]
    return Layout(
        kept=len(kept),
        permutation=None if permutation == tuple(range(ndim)) else permutation,
        groups=groups,
        members=math.prod(plan.feature_shape) // groups,
    )


class Dtypes(NamedTuple):
    """The names of the dtypes of x, of the computation, and of the result."""

    x: str
    computed: str
    result: str

    @classmethod
    def of(cls, x: str, parameters: Iterable[str | None], options: CallOptions) -> "Dtypes":
        """Return the dtypes with which a layer computes, given those of its scale and bias.

        Raises
        ------
        ArgumentTypeError
            If one of them has no operators in ONNX.
        """
        numpy = adapter_named("numpy")
        scale, bias = parameters
        like: dict[str | None, Any] = {
            name: np.empty(0, numpy.dtype(name)) for name in (x, scale, bias) if name is not None
        }
        computed, _, result = dtypes_of(numpy, like[x], like.get(scale), like.get(bias), options)
        for argument, name in (("x", x), ("scale", scale), ("bias", bias), ("y", result.name)):
            if name is not None and name not in DTYPES:
                raise ArgumentTypeError(
                    f"{argument} has dtype {name}: models in ONNX can be made for "
                    f"{', '.join(sorted(DTYPES))}. Choose one of them, or convert the layer."
                )
        return cls(x, computed.name, result.name)


class Normalized(NamedTuple):
    """The outputs; the statistics have the shape (kept ..., groups, 1, 1)."""

    y: Value
    means: tuple[Value, Value]  # to be added
    deviation: Value


def normalize(
    graph: Graph, x: Value, scale: Value | None, bias: Value | None, layout: Layout,
    dtypes: Dtypes, epsilon: float, activation: str | None,
) -> Normalized:  # fmt: skip
    """Add the nodes; scale and bias are of the layout's `parameter_shape`."""
    node, dtype = graph.node, np.dtype(dtypes.computed)

    def number(value: float) -> Value:
        return graph.constant(np.array(value, dtype))

    def mean_over(value: Value, *axes: int) -> Value:
        return node("ReduceMean", value, graph.constant(np.array(axes, np.int64)))

    members, positions = layout.kept + 1, layout.kept + 2
    if layout.permutation is not None:
        x = node("Transpose", x, perm=layout.permutation)
    wide = x if dtypes.x == dtypes.computed else node("Cast", x, to=DTYPES[dtypes.computed])
    grouped = [0] * layout.kept + [layout.groups, layout.members, -1]  # 0 is the input's length
    work = node("Reshape", wide, graph.constant(np.array(grouped, np.int64)))

    # In two steps, so that the rows are shorter.
    mean = mean_over(mean_over(work, positions), members)
    centered = node("Sub", work, mean)
    rest = mean_over(centered, members, positions)
    centered = node("Sub", centered, rest)
    squares = node("Mul", centered, centered)
    rough = mean_over(squares, members, positions)
    variance = node("Add", rough, mean_over(node("Sub", squares, rough), members, positions))
    deviation = node("Sqrt", node("Add", variance, number(epsilon)))
    if scale is None:
        y = node("Div", centered, deviation)
    else:
        y = node("Mul", centered, node("Div", scale, deviation))
    if bias is not None:
        y = node("Add", y, bias)

    y = _ACTIVATIONS[activation](node, number, y)
    if dtypes.result != dtypes.computed:
        y = node("Cast", y, to=DTYPES[dtypes.result])
    y = node("Reshape", y, node("Shape", x), allowzero=1)
    if layout.permutation is not None:
        y = node("Transpose", y, perm=tuple(np.argsort(layout.permutation).tolist()))
    return Normalized(y, (mean, rest), deviation)


def _gelu(node: Any, number: Any, y: Value) -> Value:
    """Multiply by the normal distribution function; operator set 18 has no Gelu."""
    error = node("Erf", node("Mul", y, number(math.sqrt(0.5))))
    return node("Mul", node("Mul", y, number(0.5)), node("Add", error, number(1)))


_ACTIVATIONS: dict[str | None, Callable[[Any, Any, Value], Value]] = {
    None: lambda node, number, y: y,
    "relu": lambda node, number, y: node("Relu", y),
    "silu": lambda node, number, y: node("Mul", y, node("Sigmoid", y)),
    "gelu": _gelu,
}
