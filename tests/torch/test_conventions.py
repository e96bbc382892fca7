"""PyTorch's tools around the layer: torch.fx, torch.jit, ONNX, hooks, other kinds of tensors."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest
import torch
import torch.masked
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import groupnorm
from groupnorm import GroupNorm, group_norm, group_norm_vjp
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, GroupNormError
from groupnorm.testing import oracle
from tests.portable.test_activation import act
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient
from tests.torch.test_layer import CHANNELS, GROUPS, channels_last, native, randomize

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


def tensor(rng, *shape, dtype=torch.float32, requires_grad=False):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype).requires_grad_(requires_grad)


# torch.fx ----------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Uses the layer, and the function with parameters of its own and a mask."""

    def __init__(self, layer):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.arange(8.0)), layer

    def forward(self, x, mask):
        y = group_norm(x, self.scale, num_groups=2, feature_axis=1, mask=mask, activation="silu")
        return y + self.layer(x, mask=mask) + self.layer.update(x)


def operations(graph) -> list[str]:
    return [n.op for n in graph.nodes if n.op.startswith("call")]


def test_fx_records_a_layer_as_one_node(rng):
    model = nn.Sequential(nn.Conv1d(3, CHANNELS, 1), native(rng), channels_last(rng), nn.ReLU())
    traced = torch.fx.symbolic_trace(model)
    x = tensor(rng, 2, 3, CHANNELS)
    assert operations(traced.graph) == ["call_module"] * 4
    assert isinstance(traced.get_submodule("1"), nn.GroupNorm)
    assert torch.equal(traced(x), model(x))
    again = torch.fx.symbolic_trace(traced)
    assert torch.equal(again(x), model(x))


def test_fx_records_masks_functions_and_updates(rng):
    model = Mixed(native(rng))
    traced = torch.fx.symbolic_trace(model)
    x, mask = tensor(rng, 2, CHANNELS, 5), torch.from_numpy(rng.random((2, 1, 5)) < 0.6)
    assert "call_function" in operations(traced.graph)
    assert torch.equal(traced(x, mask), model(x, mask))


@pytest.mark.parametrize("in_size", [(8, ...), (8,), (2, ..., 4)], ids=str)
def test_fx_traces_the_layer_itself(in_size, rng):
    axes = tuple(i for i, n in enumerate(in_size) if n is not ...)
    layer = randomize(GroupNorm(in_size, axes, num_groups=GROUPS, backend="torch"), rng)
    traced = torch.fx.symbolic_trace(layer)
    shape = (3, *(7 if n is ... else n for n in in_size))
    x = tensor(rng, *shape)
    assert torch.equal(traced(x, None), layer(x))
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(traced(x, None), layer(x))


def test_fx_refuses_the_rest_clearly(rng):
    with pytest.raises(ArgumentTypeError, match=r"x is a torch\.fx\.Proxy"):
        torch.fx.symbolic_trace(lambda x: group_norm_vjp(x, num_groups=2)[0])
    x = tensor(rng, 2, CHANNELS, 5)
    with pytest.raises(ArgumentTypeError, match=r"mask is a torch\.fx\.Proxy"):
        torch.fx.symbolic_trace(lambda mask: group_norm(x, num_groups=5, mask=mask))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(mode, rng):
    layer, other = native(rng), native(rng)
    call = lambda p, x: torch.func.functional_call(layer, p, (x,))  # noqa: E731
    given = {k: v.detach() for k, v in layer.named_parameters()}
    traced = make_fx(call, tracing_mode=mode)(given, tensor(rng, 2, CHANNELS, 5))
    x = tensor(rng, *((2, CHANNELS, 5) if mode == "real" else (3, CHANNELS, 7)))
    given = {k: v.detach() for k, v in other.named_parameters()}
    torch.testing.assert_close(traced(given, x), other(x), rtol=1e-5, atol=1e-5)


# Hooks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [native, channels_last])
@pytest.mark.parametrize("call", ["layer", "update"])
def test_no_hook_is_passed_by(make, call, rng):
    layer, x = make(rng), tensor(rng, 2, CHANNELS, CHANNELS, requires_grad=True)
    seen = []
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]))
    layer.register_forward_hook(lambda module, args, y: y + 1)
    layer.register_full_backward_pre_hook(lambda module, dy: (3 * dy[0],))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.append((dx, dy)))
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: seen.append("global")
    )
    try:
        y = (layer if call == "layer" else layer.update)(x)
    finally:
        everywhere.remove()
    assert seen.pop(0) == "global"
    dy = tensor(rng, *x.shape).detach()
    y.backward(dy)
    ((dx, cotangent),) = seen
    assert torch.equal(cotangent[0], 3 * dy)
    assert torch.equal(x.grad, 2 * dx[0])
    torch.testing.assert_close(y - 1, layer.forward(2 * x))


def test_another_call_of_modules_is_used(rng, monkeypatch):
    """Tools replace `nn.Module.__call__`."""
    layer, called = native(rng), []
    own = nn.Module.__call__
    monkeypatch.setattr(
        nn.Module, "__call__", lambda self, *args: (called.append(self), own(self, *args))[1]
    )
    layer(tensor(rng, 2, CHANNELS, 5))
    assert called == [layer]


# torch.jit.trace, ONNX ---------------------------------------------------------------------------

TRACED = {
    "2d": ({"num_groups": 1}, (2, 8), (5, 8)),
    "few positions": ({}, (2, 8, 1), (3, 8, 900)),
    "many positions": ({}, (2, 8, 5), (3, 8, 20_000)),
    "images": ({}, (1, 8, 64, 64), (3, 8, 9, 7)),
    "other channels": ({"num_groups": 2}, (2, 8, 5), (3, 6, 4)),
    "last": ({"feature_axis": -1}, (2, 5, 3, 8), (3, 7, 9, 8)),
    "two axes": ({"feature_axis": (1, -1)}, (2, 2, 5, 4), (3, 2, 7, 4)),
    "batch": ({"reduction_axes": (0, 1, 2)}, (2, 8, 5), (3, 8, 7)),
    "two passes": ({"use_fast_variance": False}, (2, 8, 5), (3, 8, 7)),
    "one channel each": ({"num_groups": 8}, (2, 8, 5), (3, 8, 7)),
    "portable": ({"implementation": "portable"}, (2, 8, 5), (3, 8, 7)),
    "double": ({"dtype": "float64"}, (2, 8, 5), (3, 8, 7)),
}


@pytest.mark.parametrize(("keywords", "example", "shape"), TRACED.values(), ids=TRACED)
def test_jit_trace_for_other_sizes(keywords, example, shape, rng):
    keywords = {"num_groups": GROUPS, "feature_axis": 1, **keywords}
    program = torch.jit.trace(lambda x: group_norm(x, **keywords), tensor(rng, *example))
    for offset in (0.0, 1e4):
        x = (tensor(rng, *shape) + offset).requires_grad_()
        y = program(x)
        options = {
            k: v
            for k, v in keywords.items()
            if k not in ("implementation", "use_fast_variance", "dtype")
        }
        want = oracle.group_norm(x.detach().double().numpy(), **options)
        assert_close(y.detach().numpy(), want, tolerance=2 * CONTRACT)
    dy = tensor(rng, *shape, dtype=y.dtype)
    x = tensor(rng, *shape, requires_grad=True)
    (dx,) = torch.autograd.grad(program(x), x, dy)
    want = oracle.group_norm_gradients(x.detach().double().numpy(), dy.double().numpy(), **options)
    assert_gradient(dx.numpy(), want.x, rtol=GRADIENT)


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_jit_trace_of_a_layer_is_saved(activation, rng):
    layer = native(rng, activation=activation)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, tensor(rng, 1, CHANNELS, 4)), file)
    file.seek(0)
    program, x = torch.jit.load(file), tensor(rng, 3, CHANNELS, 5, 6)[..., 0]
    torch.testing.assert_close(program(x), layer(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("example", "shape"), [((2, 1, 5), (3, 1, 7)), ((2, 1, 1), (3, 1, 1)), ((5,), (7,))], ids=str
)
def test_jit_trace_with_a_mask(example, shape, rng):
    call = lambda x, mask: group_norm(x, num_groups=2, feature_axis=1, mask=mask)  # noqa: E731
    masks = [torch.from_numpy(rng.random(s) < 0.6) for s in (example, shape)]
    program = torch.jit.trace(call, (tensor(rng, 2, 8, 5), masks[0]))
    x = tensor(rng, 3, 8, 7)
    want = oracle.group_norm(x.numpy(), num_groups=2, feature_axis=1, mask=masks[1].numpy())
    assert_close(program(x, masks[1]).numpy(), want, tolerance=CONTRACT)


def test_jit_trace_of_statistics(rng):
    keywords = {"num_groups": 2, "feature_axis": 1}
    program = torch.jit.trace(
        lambda x: tuple(groupnorm.group_statistics(x, **keywords)[:2]), tensor(rng, 2, 8, 5)
    )
    x = tensor(rng, 3, 8, 7)
    for got, want in zip(program(x), groupnorm.group_statistics(x, **keywords)[:2], strict=True):
        torch.testing.assert_close(got, want)


def test_jit_trace_refuses_what_it_would_keep(rng):
    with pytest.raises(ArgumentValueError, match="no elements"):
        torch.jit.trace(native(rng), torch.ones(2, CHANNELS, 0))
    program = torch.jit.trace(native(rng), tensor(rng, 2, CHANNELS, 5))
    with pytest.raises(RuntimeError, match="shape"):
        program(tensor(rng, 2, 2 * CHANNELS, 5))
    with pytest.raises(RuntimeError, match="min"):
        program(torch.ones(2, CHANNELS, 0))


ONNX = {
    "3d": ({}, (2, 8, 5), (3, 8, 900)),
    "images": ({}, (2, 8, 64, 64), (3, 8, 9, 7)),
    "gelu": ({"activation": "gelu"}, (2, 8, 5), (3, 8, 7)),
    "last": ({"in_size": 8, "feature_axis": -1}, (2, 5, 3, 8), (3, 7, 9, 8)),
    "batch": ({"reduction_axes": (0, 1, 2)}, (2, 8, 5), (3, 8, 7)),
    "two passes": ({"use_fast_variance": False}, (2, 8, 5), (3, 8, 7)),
    "masked": ({}, (2, 8, 5), (3, 8, 7)),
}


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:# The axis name:UserWarning"
)
@pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "dynamo"])
@pytest.mark.parametrize(("keywords", "example", "shape"), ONNX.values(), ids=ONNX)
def test_onnx_programs_for_other_sizes(keywords, example, shape, dynamo, rng, tmp_path, request):
    """Run by onnxruntime: never with the sizes of the example."""
    reason = "onnx, onnxscript and onnxruntime are no dependencies of the tests"
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason=reason)
    runtime = pytest.importorskip("onnxruntime", reason=reason)
    keywords = {"in_size": (8, ...), "feature_axis": 0, "num_groups": GROUPS, **keywords}
    layer = randomize(GroupNorm(backend="torch", **keywords), rng).eval()
    inputs = ["x", "mask"] if request.node.callspec.id.startswith("masked") else ["x"]

    def draw(shape, offset=0.0):
        x = tensor(rng, *shape) + offset
        return x, torch.from_numpy(rng.random((shape[0], 1, shape[2])) < 0.6)

    channels = example.index(8, 1)
    sizes = {i: f"size{i}" for i in range(len(example)) if i != channels}
    given, file = draw(example)[: len(inputs)], str(tmp_path / "layer.onnx")
    if dynamo:
        shared = {i: torch.export.Dim(name) for i, name in sizes.items()}
        torch.onnx.export(
            layer, given, file, dynamo=True, input_names=inputs, verbose=False,
            dynamic_shapes=tuple(shared for _ in inputs),
        )  # fmt: skip
    else:
        torch.onnx.export(
            layer, given, file, dynamo=False, input_names=inputs,
            dynamic_axes=dict.fromkeys(inputs, sizes),
        )  # fmt: skip
    program = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for size, offset in ((example, 0.0), (shape, 0.0), (shape, 1e4)):
        x, mask = draw(size, offset)
        arrays = {"x": x.numpy(), "mask": mask.numpy()}
        (y,) = program.run(None, {name: arrays[name] for name in inputs})
        want = oracle.group_norm(
            x.double().numpy(),
            layer.weight.detach().double().numpy(),
            layer.bias.detach().double().numpy(),
            num_groups=GROUPS,
            feature_axis=channels,
            epsilon=layer.epsilon,
            reduction_axes=layer.reduction_axes,
            mask=mask.numpy() if "mask" in inputs else None,
        )
        if layer.activation is not None:
            want = act(want, layer.activation)
        assert_close(y, want, tolerance=2 * CONTRACT)


def test_jit_script_names_the_alternatives(rng):
    for model in (native(rng), nn.Sequential(channels_last(rng))):
        with pytest.raises(ArgumentTypeError, match=r"torch\.compile.*torch\.jit\.trace"):
            torch.jit.script(model)


# torch.compile with symbolic sizes ---------------------------------------------------------------

DYNAMIC = {
    "function": lambda x: group_norm(x, num_groups=4, feature_axis=1),
    "default groups": lambda x: group_norm(x.repeat(1, 8, 1), feature_axis=1),
    "group size": lambda x: group_norm(x, num_groups=None, group_size=2, feature_axis=1),
    "portable": lambda x: group_norm(x, num_groups=4, feature_axis=1, implementation="portable"),
    "masked": lambda x: group_norm(x, num_groups=4, feature_axis=1, mask=x[:, :1] > 0),
    "vjp": lambda x: group_norm_vjp(x, num_groups=4, feature_axis=1)[1](x.cos()).x,
    "tiled": lambda x: groupnorm.normalize(
        x,
        groupnorm.group_statistics(x, num_groups=4, feature_axis=1),
        num_groups=4,
        feature_axis=1,
    ),
}


@pytest.mark.parametrize("how", ["dynamic", "marked"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_compiled_functions_for_all_sizes(name, how, rng):
    torch._dynamo.reset()
    graphs = []

    def counting(module, inputs):
        graphs.append(module)
        return module.forward

    function = DYNAMIC[name]
    compiled = torch.compile(
        function, backend=counting, fullgraph=True, dynamic=True if how == "dynamic" else None
    )
    for shape in ((2, 8, 6), (3, 8, 9), (5, 8, 20)):
        x = tensor(rng, *shape)
        if how == "marked":
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 2)
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1
    torch._dynamo.reset()


MASKS = {
    "list": [True] * 4 + [False],
    "numbers": [1, 1, 0, 1.0, 0],
    "nested": [[[1, 1, 1, 0, 0]], [[0, 1, 1, 1, 1]]],
    "tuple": (True, False, True, True, False),
    "scalar": True,
    "NumPy": np.arange(5) < 4,
    "NumPy, integers": np.array([[1, 0, 1, 1, 1]]),
}


@pytest.mark.parametrize(
    ("mask", "given", "implementation"),
    [
        *((name, given, None) for name in MASKS for given in ("constant", "argument")),
        *((name, "argument", "portable") for name in ("nested", "NumPy")),
        *((name, "constant", "portable") for name in ("list", "scalar")),
    ],
)
def test_masks_of_the_host_in_a_compiled_program(mask, given, implementation, rng):
    """In two calls of one program; an argument's numbers are symbolic if sizes are."""
    torch._dynamo.reset()
    mask = MASKS[mask]

    def call(x, mask=mask):
        keywords = {"num_groups": 2, "feature_axis": 1, "mask": mask}
        y = group_norm(x, implementation=implementation, **keywords)
        return group_norm(y, implementation=implementation, **keywords)

    compiled = torch.compile(
        call, backend="aot_eager", fullgraph=True, dynamic=True if given == "argument" else None
    )
    x = tensor(rng, 2, 8, 5)
    got = compiled(x, mask) if given == "argument" else compiled(x)
    want = x.numpy()
    for _ in range(2):
        want = oracle.group_norm(
            want, num_groups=2, feature_axis=1, mask=np.asarray(mask).astype(bool)
        )
    assert_close(got.numpy(), want, tolerance=2 * CONTRACT)
    torch._dynamo.reset()


@pytest.mark.parametrize("tool", ["compile", "compile dynamic", "fx"])
@pytest.mark.parametrize("implementation", [None, "portable"])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_numpy_parameters_in_a_traced_program(dtype, implementation, tool, rng):
    torch._dynamo.reset()
    scale, bias = (rng.integers(-4, 5, 8).astype(dtype) for _ in range(2))
    keywords = {"num_groups": 2, "feature_axis": 1, "dtype": "float32"}

    class Model(nn.Module):
        def forward(self, x):
            return group_norm(x, scale, bias, implementation=implementation, **keywords)

    if tool == "fx":
        traced = torch.fx.symbolic_trace(Model())
    else:
        dynamic = tool == "compile dynamic"
        traced = torch.compile(Model(), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for size in (2, 3):
        x = tensor(rng, size, 8, 5)
        want = oracle.group_norm(x.numpy(), scale, bias, num_groups=2, feature_axis=1)
        got = traced(x)
        assert got.dtype == torch.float32
        assert_close(got.numpy(), want, tolerance=CONTRACT)
    torch._dynamo.reset()


def test_numpy_parameters_in_a_compiled_pullback(rng):
    torch._dynamo.reset()
    scale, bias = rng.normal(size=(2, 8)).astype(np.float32)

    def gradients(x, dy):
        y, pullback = group_norm_vjp(x, scale, bias, num_groups=2, feature_axis=1)
        return y, *pullback(dy)

    x, dy = tensor(rng, 2, 8, 5), tensor(rng, 2, 8, 5)
    found = torch.compile(gradients, backend="aot_eager", fullgraph=True)(x, dy)
    want = oracle.group_norm_gradients(
        x.numpy(), dy.numpy(), scale, bias, num_groups=2, feature_axis=1
    )
    for g, w in zip(found[1:], want, strict=True):
        assert_gradient(g.numpy(), w, rtol=GRADIENT)
    torch._dynamo.reset()


def test_fx_keeps_a_mask_of_numpy(rng):
    mask = rng.random((2, 1, 5)) < 0.6
    traced = torch.fx.symbolic_trace(
        lambda x: group_norm(x, num_groups=2, feature_axis=1, mask=mask)
    )
    x = tensor(rng, 2, 8, 5)
    want = oracle.group_norm(x.numpy(), num_groups=2, feature_axis=1, mask=mask)
    assert_close(traced(x).numpy(), want, tolerance=CONTRACT)


# After the error the compiler tries again, within the call.
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("argument", ["scale", "bias", "mask"])
@pytest.mark.parametrize("tool", ["compile", "fx"])
def test_masked_arrays_in_a_traced_program(tool, argument, rng):
    """Their own masks would be ignored."""
    torch._dynamo.reset()
    masked = np.ma.masked_array(np.ones(8, bool if argument == "mask" else np.float32), True)
    keywords = {"num_groups": 2, argument: masked}

    def call(x):
        return group_norm(x, **keywords)

    # Not fullgraph: the error must come where the compiler goes on without a graph too.
    compiled = torch.compile(call, backend="aot_eager")
    trace = torch.fx.symbolic_trace if tool == "fx" else lambda _: compiled(tensor(rng, 2, 8))
    with pytest.raises(ArgumentTypeError, match=rf"{argument} is a numpy\.ma\.MaskedArray"):
        trace(call)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["tensor", "NumPy", "buffer"])
def test_masks_of_fixed_size_where_sizes_are_symbolic(kind, rng):
    torch._dynamo.reset()
    mask = torch.arange(6).reshape(1, 1, 6) % 3 > 0
    layer = GroupNorm((4, ...), num_groups=2, feature_axis=0, backend="torch")
    layer.register_buffer("fixed", mask if kind == "buffer" else None)

    def call(x, mask=None):
        return layer(x, layer.fixed if mask is None else mask)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 3):
        x = tensor(rng, size, 4, 6)
        given = {"tensor": (mask,), "NumPy": (mask.numpy(),), "buffer": ()}[kind]
        want = oracle.group_norm(x.numpy(), num_groups=2, feature_axis=1, mask=mask.numpy())
        assert_close(compiled(x, *given).detach().numpy(), want, tolerance=CONTRACT)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mask", [[True, 2], [0.5, 1], [[1, 0], [1]], [[[1]], [[1, 0]]], ["1", "0"]], ids=str
)
def test_bad_masks_of_the_host_in_a_compiled_program(mask, rng):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: group_norm(x, num_groups=2, feature_axis=1, mask=mask), backend="aot_eager"
    )
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match="mask"):
        compiled(tensor(rng, 2, 8, 2))
    torch._dynamo.reset()


# Results -----------------------------------------------------------------------------------------

# How x lies in memory: as kernels read it, or with gaps or another order, so that they copy it.
LAYOUTS = {
    "channels first": lambda a: a,
    "channels last": lambda a: a.movedim(1, -1).contiguous().movedim(-1, 1),
    "slice": lambda a: torch.cat([a, a], 1).movedim(1, -1).contiguous().movedim(-1, 1)[:, :8],
    "steps": lambda a: a.repeat_interleave(2, -1)[..., ::2].transpose(2, 3),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("implementation", [None, "portable"])
def test_the_result_may_be_changed_in_place(implementation, layout, dtype, grad, rng):
    x, dy = (layout(tensor(rng, 2, 8, 5, 5, dtype=dtype)) for _ in range(2))
    weight = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    with torch.set_grad_enabled(grad):
        given = x.clone().requires_grad_()
        y = group_norm(given, num_groups=2, feature_axis=1, implementation=implementation)
    want = oracle.group_norm(x.numpy(), num_groups=2, feature_axis=1)
    y.add_(weight).relu_()
    assert_close(y.detach().numpy(), np.maximum(want + 2, 0), tolerance=2 * CONTRACT)
    y.backward(dy)
    cotangent = dy.numpy() * (want > -2)
    assert_gradient(weight.grad.numpy(), cotangent.sum(), rtol=1e-5)
    if grad:
        gradient = oracle.group_norm_gradients(
            x.numpy(), cotangent, None, None, num_groups=2, feature_axis=1
        ).x
        assert_gradient(given.grad.numpy(), gradient, rtol=GRADIENT)


@pytest.mark.parametrize("implementation", [None, "portable", "fused"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("value", [[2.0] * 8, (2.0,) * 8, 2.0, np.float32(2), True], ids=repr)
@pytest.mark.parametrize("argument", ["scale", "bias"])
def test_parameters_that_are_no_arrays_are_refused(argument, value, recorded, implementation):
    x = torch.ones(2, 5, 8, requires_grad=recorded)
    with pytest.raises((ArgumentTypeError, ArgumentValueError), match=argument):
        group_norm(x, num_groups=2, implementation=implementation, **{argument: value})


def test_backward_of_the_native_implementation_in_channels_last_order(rng):
    """F.group_norm ends the process where x needs no gradient."""
    x = LAYOUTS["channels last"](tensor(rng, 2, 8, 5, 5))
    scale = torch.ones(8, requires_grad=True)
    y = group_norm(x, scale, num_groups=4, feature_axis=1, implementation="native")
    dy = tensor(rng, 2, 8, 5, 5)
    y.backward(dy)
    want = oracle.group_norm_gradients(
        x.numpy(), dy.numpy(), np.ones(8), None, num_groups=4, feature_axis=1
    ).scale
    assert_gradient(scale.grad.numpy(), want, rtol=1e-5)


# Tensors of other kinds --------------------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


REFUSED = {
    "nested": lambda a: torch.nested.nested_tensor([a[:1], a]),
    "jagged": lambda a: torch.nested.nested_tensor([a[:1], a], layout=torch.jagged),
    "sparse": lambda a: a.to_sparse(),
    "sparse rows": lambda a: (a if a.ndim == 2 else a[None]).to_sparse_csr(),
    "mkldnn": lambda a: a.to_mkldnn(),
    "quantized": lambda a: torch.quantize_per_tensor(a, 0.1, 0, torch.quint8),
    "complex32": lambda a: a.to(torch.complex32),
    "masked": lambda a: torch.masked.masked_tensor(a, a > -9),
    "lazy": lambda a: nn.UninitializedParameter(),
    **{
        name: lambda a, name=name: torch.empty(a.shape, dtype=getattr(torch, name))
        for name in ("bits8", "bits16", "uint1", "uint4", "int4", "float4_e2m1fn_x2", "quint8")
    },
}
TAKEN = {
    "subclass": lambda a: a.as_subclass(Subclass),
    "buffer": nn.Buffer,
    "parameter": lambda a: nn.Parameter(a, requires_grad=False),
    "integers": lambda a: a.long(),
    "float8": lambda a: a.to(torch.float8_e4m3fn),
    "complex": lambda a: a.to(torch.complex64),
}
ARGUMENTS = {
    "x": lambda: torch.linspace(-2, 2, 16).view(2, 8),
    "scale": lambda: torch.ones(8),
    "bias": lambda: torch.zeros(8),
    "mask": lambda: torch.ones(2, 1),
    "dy": lambda: torch.ones(2, 8),
}


def call_with(implementation=None, **arguments):
    dy = arguments.pop("dy")
    y, pullback = group_norm_vjp(
        **arguments, num_groups=4, feature_axis=1, implementation=implementation
    )
    return y, pullback(dy)


# PyTorch warns that some of these are prototypes.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("implementation", [None, "portable", "fused"])
@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_tensors_are_refused_in_our_words(kind, argument, implementation):
    given = {name: make() for name, make in ARGUMENTS.items()}
    try:
        call_with(implementation, **given)
    except ArgumentValueError as error:  # kernels may be unavailable
        pytest.skip(str(error))
    given[argument] = REFUSED[kind](given[argument])
    with pytest.raises(GroupNormError, match=f"{argument} (is a|has)"):
        call_with(implementation, **given)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("implementation", [None, "native"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_kinds_of_tensors_are_refused_by_layers(kind, implementation):
    layer = GroupNorm(
        (CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", implementation=implementation
    )
    with pytest.raises(ArgumentTypeError, match=r"x (is a|has)"):
        layer(REFUSED[kind](ARGUMENTS["x"]()))


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize("kind", TAKEN)
def test_kinds_of_tensors_that_are_right(kind, argument):
    given = {name: make() for name, make in ARGUMENTS.items()}
    given[argument] = TAKEN[kind](given[argument])
    if kind == "complex" and argument in ("mask", "dy"):
        with pytest.raises(ArgumentTypeError, match=f"{argument} has dtype torch.complex64"):
            call_with(**given)
        return
    y, gradients = call_with(**given)
    plain = {k: torch.Tensor.as_subclass(v.detach(), torch.Tensor) for k, v in given.items()}
    want, wanted = call_with("portable", **plain)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), want, rtol=1e-5, atol=1e-5)
    for got, expected in zip(gradients, wanted, strict=True):
        got = got.as_subclass(torch.Tensor)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got.cfloat(), expected.cfloat(), rtol=1e-5, atol=1e-5)


# Fake tensors ------------------------------------------------------------------------------------


def fake(mode, *tensors):
    return [mode.from_tensor(a) for a in tensors]


@pytest.mark.parametrize("within", [True, False], ids=["within the mode", "outside"])
@pytest.mark.parametrize("implementation", [None, "portable", "native"])
def test_fake_tensors(implementation, within, rng):
    """Within their mode and outside: a fake result, like the real one in shape and strides."""
    real = tensor(rng, 2, CHANNELS, 5, 3).to(memory_format=torch.channels_last)
    mode = FakeTensorMode()
    (x,) = fake(mode, real)
    with mode:
        layer = GroupNorm(
            (CHANNELS, ...), 0, num_groups=GROUPS, backend="torch", implementation=implementation
        )
    options = {"num_groups": GROUPS, "feature_axis": 1, "implementation": implementation}
    calls = {"layer": layer, "function": lambda x: group_norm(x, **options)}
    if implementation != "native":
        calls["mask"] = lambda x: group_norm(x, mask=[True] * real.shape[-1], **options)
        calls["parameters of the host"] = lambda x: group_norm(
            x, np.ones(CHANNELS, np.float32), **options
        )
        calls["pullback"] = lambda x: group_norm_vjp(x, **options)[1](x).x
    for name, call in calls.items():
        with mode if within else contextlib.nullcontext():
            y = call(x)
        assert type(y) is FakeTensor, name
        assert (y.shape, y.dtype, y.stride()) == (real.shape, real.dtype, real.stride()), name


@pytest.mark.parametrize("implementation", [None, "portable", "native"])
@pytest.mark.parametrize("argument", ["x", "scale", "bias", "mask", "dy"])
@pytest.mark.parametrize("mixed", ["one fake", "one real"])
@pytest.mark.parametrize("within", [True, False], ids=["within the mode", "outside"])
def test_fake_and_real_tensors_mixed(within, mixed, argument, implementation):
    """Refused with the fix, unless their mode takes real ones too."""
    if implementation == "native" and argument in ("mask", "dy"):
        pytest.skip("PyTorch's own group normalization takes no mask and no cotangent")
    if within and (mixed == "one fake") == (argument != "x"):
        pytest.skip("within a mode, PyTorch itself refuses every operation on a real x")
    for allowed in (False, True):
        mode = FakeTensorMode(allow_non_fake_inputs=allowed)
        given = {name: make() for name, make in ARGUMENTS.items()}
        if implementation == "native":
            del given["mask"], given["dy"]
        for name in given:
            if (name == argument) == (mixed == "one fake"):
                (given[name],) = fake(mode, given[name])

        def call(given=given):
            if implementation == "native":
                return [group_norm(**given, **OPTIONS, implementation="native")]
            y, gradients = call_with(implementation, **given)
            return y, gradients.x

        with mode if within else contextlib.nullcontext():
            if allowed:
                assert any(type(a) is FakeTensor for a in call())
            else:
                with pytest.raises(ArgumentTypeError, match=r"is a (real|fake) tensor and x a"):
                    call()


OPTIONS = {"num_groups": 4, "feature_axis": 1}
