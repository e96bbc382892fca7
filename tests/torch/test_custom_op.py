"""The custom operators in compiled PyTorch programs: torch.library's checks, values, memory.

Most tests use `aot_eager`, which traces everything and compiles nothing.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from groupnorm import GroupNorm, group_norm
from groupnorm.backends.kernels.cpu import availability
from groupnorm.backends.torch import custom_op as torch_op
from groupnorm.errors import ArgumentValueError
from groupnorm.testing import oracle
from tests.kernels.core import needs_core
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient
from tests.torch.test_layer import CHANNELS, GROUPS, native

needs_core()

# torch's own inductor and forward-mode formulas still use torch.jit.script, and warn about it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

OP = torch.ops.groupnorm.group_norm.default
BACKWARD = torch.ops.groupnorm.group_norm_backward.default
KEYWORDS = {"num_groups": GROUPS, "feature_axis": 1, "epsilon": 1e-5}


def tensor(rng, *shape, dtype=torch.float32, requires_grad=False):
    return torch.from_numpy(rng.normal(size=shape)).to(dtype).requires_grad_(requires_grad)


@pytest.fixture(autouse=True)
def no_compiled_code_of_others():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def settings(activation=None, dtype=None):
    return ([1], GROUPS, None, None, 1e-5, dtype, True, activation)


def test_compiled_programs_call_the_operator_where_the_compiler_assumes_an_export(monkeypatch, rng):
    """Before PyTorch 2.12 torch.compile takes `is_exporting()` for True in every program."""
    x, graphs = tensor(rng, 2, CHANNELS, 9), Graphs()
    compiled = torch.compile(lambda x: group_norm(x, **KEYWORDS), backend=graphs, fullgraph=True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    y = compiled(x)
    assert graphs.operators == 1
    assert_close(y.numpy(), oracle.group_norm(x.numpy(), **KEYWORDS), tolerance=CONTRACT)


class Graphs(list):
    """A compiler that records the graphs it receives and runs them unchanged."""

    def __call__(self, module, inputs):
        self.append(module)
        return module.forward

    @property
    def operators(self) -> int:
        return sum(node.target is OP for module in self for node in module.graph.nodes)


def compiled(function, **keywords):
    graphs = Graphs()
    return torch.compile(function, fullgraph=True, backend=graphs, **keywords), graphs


def samples():
    rng = np.random.default_rng(0)
    image = tensor(rng, 2, CHANNELS, 5, 6)
    last = image.to(memory_format=torch.channels_last)
    mask = torch.from_numpy(rng.random((2, 1, 5, 6)) < 0.7)
    weight, bias = tensor(rng, CHANNELS), tensor(rng, CHANNELS)
    rows = tensor(rng, 2, CHANNELS, 5)
    return {
        "first": (image, weight, bias, None, *settings()),
        "last, silu": (last, weight, bias, None, *settings("silu")),
        "last, masked": (last, None, bias, mask, *settings()),
        "first, masked, gelu": (image, weight, None, mask, *settings("gelu")),
        "bfloat16, no parameters": (rows.bfloat16(), None, None, None, *settings("relu")),
        "float16 to float32": (last.half(), weight, bias, None, *settings(dtype="float32")),
        "gaps": (tensor(rng, 2, CHANNELS, 5, 12)[..., ::2], weight, None, None, *settings()),
        "gaps, last": (tensor(rng, 2, 5, 6, 16).permute(0, 3, 1, 2)[:, ::2], weight, bias, None,
                       *settings()),
        "one, for all": (image[:1].expand(3, -1, -1, -1), None, None, None, *settings()),
        "other order": (tensor(rng, 6, 5, CHANNELS, 2).permute(3, 2, 0, 1), weight, bias,
                                  None, *settings()),
        "portable, float64": (image.double(), weight, bias, None, *settings("silu")),
        "portable, mask of channels": (rows, weight, bias, torch.arange(CHANNELS)[:, None] > 2,
                                       *settings()),
    }  # fmt: skip


def requiring_grad(arguments):
    """Return the tensors with requires_grad set."""
    return tuple(
        a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in arguments
    )


# Tracing both operators for all samples would take seconds; only the most different are traced.
TRACED = ("last, masked", "bfloat16, no parameters", "gaps, last", "other order")


@pytest.mark.parametrize("name", samples())
def test_opcheck(name):
    arguments = samples()[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name in TRACED:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(OP, requiring_grad(arguments), test_utils=checks)
    y, saved = OP(*arguments)
    dy = torch.ones_like(y)
    arguments = (*arguments[:4], saved, *arguments[4:])
    torch.library.opcheck(BACKWARD, requiring_grad((dy, *arguments)), test_utils=checks)


@pytest.mark.parametrize("name", samples())
def test_operators_equal_eager_calls(name):
    x, weight, bias, mask, *rest = samples()[name]
    leaves = [a for a in requiring_grad((x, weight, bias)) if a is not None]
    given = iter(leaves)
    x, weight, bias = (a if a is None else next(given) for a in (x, weight, bias))
    y, _ = OP(x, weight, bias, mask, *rest)
    want = group_norm(
        x, weight, bias, mask=mask, activation=rest[-1], dtype=rest[5], implementation="portable",
        **KEYWORDS,
    )  # fmt: skip
    assert y.dtype == want.dtype
    assert y.stride() == torch.empty_like(x).stride()
    half = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(x.dtype)
    close = {"rtol": half or 2e-5, "atol": half or 2e-5}
    torch.testing.assert_close(y, want, **close)
    dy = tensor(np.random.default_rng(1), *y.shape, dtype=y.dtype).detach()
    for got, expected in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True
    ):
        assert got.dtype == expected.dtype
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=0, atol=scale * (half or 1e-5))


@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_numerical_gradients(check, masked, rng):
    x = tensor(rng, 2, CHANNELS, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = (tensor(rng, CHANNELS, dtype=torch.float64, requires_grad=True) for _ in "ab")
    mask = torch.tensor([[True, True, False], [True, False, True]])[:, None] if masked else None
    for chosen in ((x, weight, bias), (x, None, bias)):
        assert check(
            lambda x, weight, bias: OP(x, weight, bias, mask, *settings("silu"))[0], chosen
        )


def test_backward_recomputes_statistics_if_the_memory_order_changed(rng):
    """A compiler may change the memory order of x; the saved statistics are then unusable."""
    x, dy = tensor(rng, 2, CHANNELS, 5, 6), tensor(rng, 2, CHANNELS, 5, 6)
    last = x.to(memory_format=torch.channels_last)
    _, saved = OP(x, None, None, None, *settings())
    _, saved_last = OP(last, None, None, None, *settings())
    want = oracle.group_norm_gradients(x.numpy(), dy.numpy(), **KEYWORDS).x
    for array in (x, last):
        for numbers in (saved, saved_last, torch.zeros_like(saved)):
            dx, _, _ = BACKWARD(dy, array, None, None, None, numbers, *settings())
            assert dx.stride() == array.stride()
            assert_gradient(dx.numpy(), want, rtol=GRADIENT)


@pytest.mark.parametrize("order", ["contiguous_format", "channels_last"])
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
def test_compiled_values_and_memory_layout(compiler, order, rng):
    layer, x = native(rng), tensor(rng, 2, CHANNELS, 5, 6)
    x = x.to(memory_format=getattr(torch, order)).requires_grad_()
    dy = tensor(rng, *x.shape)
    y = torch.compile(layer, fullgraph=True, backend=compiler)(x)
    scale, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    values = x.detach().numpy()
    assert y.stride() == x.stride()
    want = oracle.group_norm(values, scale, bias, **KEYWORDS)
    assert_close(y.detach().numpy(), want, tolerance=2 * CONTRACT)
    dx, dscale, dbias = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    assert dx.stride() == x.stride()
    gradients = oracle.group_norm_gradients(values, dy.numpy(), scale, bias, **KEYWORDS)
    assert_gradient(dx.numpy(), gradients.x, rtol=GRADIENT)
    assert_gradient(dscale.numpy(), gradients.scale, rtol=GRADIENT)
    assert_gradient(dbias.numpy(), gradients.bias, rtol=GRADIENT)


@pytest.mark.slow
def test_compiled_with_other_layers(rng):
    """Inductor then chooses the memory layout of inputs and outputs, forward and backward."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, CHANNELS, 3),
        native(rng),
        torch.nn.SiLU(),
        torch.nn.Conv2d(CHANNELS, 4, 3),
    )
    x, dy = tensor(rng, 2, 3, 9, 9), tensor(rng, 2, 4, 5, 5)
    program = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    parameters = list(model.parameters())
    got = torch.autograd.grad(program(x), parameters, dy)
    for a, b in zip(got, torch.autograd.grad(model(x), parameters, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


OPERATOR_CALLS = {
    "plain": ({}, 1),
    "fused": ({"implementation": "fused"}, 1),
    "portable": ({"implementation": "portable"}, 0),
    "bfloat16": ({"dtype": "bfloat16"}, 1),
    "float64": ({"dtype": "float64"}, 0),
    "two axes": ({"feature_axis": (1, 2)}, 1),
    "middle": ({"feature_axis": 2, "num_groups": 5}, 0),
    "mask of integers": ({"mask": torch.tensor([0, 1, 1, 0, 1, 1])}, 1),
    "mask of channels": ({"mask": torch.arange(CHANNELS)[:, None, None] > 2}, 0),
}


@pytest.mark.parametrize(("keywords", "operators"), OPERATOR_CALLS.values(), ids=OPERATOR_CALLS)
def test_which_calls_compile_to_the_operator(keywords, operators, rng):
    x, keywords = tensor(rng, 2, CHANNELS, 5, 6), {**KEYWORDS, **keywords}
    function, graphs = compiled(lambda x: group_norm(x, **keywords))
    torch.testing.assert_close(function(x), group_norm(x, **keywords))
    assert graphs.operators == operators
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:Dynamo:UserWarning")
def test_errors_are_those_of_eager_calls(rng):
    x = tensor(rng, 2, CHANNELS, 5)
    for keywords, message in (
        ({"num_groups": 3, "feature_axis": 1}, "num_groups=3 does not divide"),
        ({"num_groups": 2, "feature_axis": 1, "mask": torch.ones(7) > 0}, "mask has shape"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            torch.compile(lambda x, k=keywords: group_norm(x, **k), backend="eager")(x)


def test_without_the_core_programs_are_portable(rng, monkeypatch):
    monkeypatch.setattr(availability, "why_unavailable", lambda: torch_op.Unsupported("none"))
    function, graphs = compiled(native(rng))
    function(tensor(rng, 2, CHANNELS, 5))
    assert graphs.operators == 0


def test_one_graph_for_all_sizes(rng):
    layer = native(rng)
    function, graphs = compiled(layer, dynamic=True)
    for batch, height in ((2, 4), (3, 7), (5, 9)):
        x = tensor(rng, batch, CHANNELS, height, 6)
        torch.testing.assert_close(function(x), layer(x))
    marked, more = compiled(layer)
    for batch in (2, 3):
        x = tensor(rng, batch, CHANNELS, 6)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(marked(x), layer(x))
    assert (len(graphs), graphs.operators, len(more), more.operators) == (1, 1, 1, 1)
    torch.testing.assert_close(marked(x[:0]), layer(x[:0]))


def transforms():
    func = torch.func

    def loss(layer, x):
        return layer(x).pow(3).sum()

    return {
        "grad": lambda layer, x: func.grad(lambda x: loss(layer, x))(x),
        "vmap": lambda layer, x: func.vmap(layer)(x[:, None]),
        "jvp": lambda layer, x: func.jvp(layer, (x,), (x.cos(),))[1],
        "vmap of grad": lambda layer, x: func.vmap(func.grad(lambda x: loss(layer, x)))(x[:, None]),
        "jvp of grad": lambda layer, x: func.jvp(
            func.grad(lambda x: loss(layer, x)), (x,), (x.cos(),)
        )[1],
    }


@pytest.mark.parametrize("name", transforms())
def test_transforms_in_a_program_use_portable_code(name, rng):
    layer, x = native(rng), tensor(rng, 2, CHANNELS, 6)
    transform = transforms()[name]
    function, graphs = compiled(lambda x: transform(layer, x))
    torch.testing.assert_close(function(x), transform(layer, x))
    assert (len(graphs), graphs.operators) == (1, 0)


@pytest.mark.parametrize("name", transforms())
def test_transforms_around_a_program(name, rng):
    layer, x = native(rng), tensor(rng, 2, CHANNELS, 6)
    transform = transforms()[name]
    function = torch.compile(layer, backend="aot_eager")
    function(x)
    torch.testing.assert_close(transform(function, x), transform(layer, x))


def test_vmap_of_the_operators(rng):
    x, weight = tensor(rng, 3, 2, CHANNELS, 6), tensor(rng, 3, CHANNELS)

    def call(x, weight):
        return OP(x, weight, None, None, *settings())

    y, saved = torch.func.vmap(call)(x, weight)
    dx, dscale, _ = torch.func.vmap(
        lambda dy, x, weight, saved: BACKWARD(dy, x, weight, None, None, saved, *settings())
    )(x.cos(), x, weight, saved)
    for i in range(3):
        want, numbers = call(x[i], weight[i])
        torch.testing.assert_close(y[i], want)
        gradients = BACKWARD(x[i].cos(), x[i], weight[i], None, None, numbers, *settings())
        torch.testing.assert_close((dx[i], dscale[i]), gradients[:2], rtol=1e-4, atol=1e-5)


def test_forward_mode_recompiles(rng):
    layer, x, tangent = native(rng), tensor(rng, 2, CHANNELS, 6), tensor(rng, 2, CHANNELS, 6)
    function, graphs = compiled(layer)
    function(x)
    assert graphs.operators == 1
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(dual.tangent, torch.func.jvp(layer, (x,), (tangent,))[1])
    function(x)
    assert (len(graphs), graphs.operators) == (2, 1)


def test_double_backward(rng):
    layer, x = native(rng), tensor(rng, 2, CHANNELS, 6, requires_grad=True)
    dy, v = tensor(rng, *x.shape), tensor(rng, *x.shape)
    function, graphs = compiled(layer)
    inputs = [x, layer.weight]

    def second(f):
        first = torch.autograd.grad(f(x), inputs, dy, create_graph=True)
        return torch.autograd.grad((first[0] * v).sum() + first[1].sum(), inputs)

    torch.testing.assert_close(second(function), second(layer), rtol=1e-4, atol=1e-4)
    assert graphs.operators == 1


def test_checkpointing_and_autocast(rng):
    layer = native(rng)
    model = torch.nn.Sequential(torch.nn.Conv1d(3, CHANNELS, 1), layer)
    x = tensor(rng, 4, 3, 50, requires_grad=True)

    def call(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    y, want = torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, want)
    dy = tensor(rng, *y.shape)
    (got,), (wanted,) = (torch.autograd.grad(a, x, dy) for a in (y, want))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_exported_programs_contain_no_custom_operator(strict, rng):
    layer, x = native(rng).eval(), tensor(rng, 2, CHANNELS, 5)
    program = torch.export.export(layer, (x,), strict=strict)
    assert not any("groupnorm." in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_a_layer_of_two_feature_axes(rng):
    layer = GroupNorm((2, 4, ...), (0, 1), num_groups=2, backend="torch", activation="gelu")
    x = tensor(rng, 3, 2, 4, 5, requires_grad=True)
    function, graphs = compiled(layer)
    dy = tensor(rng, *x.shape)
    inputs = [x, layer.weight, layer.bias]
    for a, b in zip(
        torch.autograd.grad(function(x), inputs, dy),
        torch.autograd.grad(layer(x), inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert graphs.operators == 1


def test_registering_does_not_import_the_compiler():
    program = "import sys, groupnorm.backends.torch; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


FIRST_CALL = """
import sys, warnings
import numpy as np
import torch
from groupnorm import GroupNorm, group_norm, group_norm_vjp
from groupnorm.testing import oracle

warnings.simplefilter("ignore")
x = np.random.default_rng(0).normal(size=(2, 8, 5, 3)).astype(np.float32)
options = {"num_groups": 2, "feature_axis": 1}
calls = {
    "function": lambda x: group_norm(x, **options),
    "vjp": lambda x: group_norm_vjp(x, **options)[0],
}
if sys.argv[1] == "layer":
    calls["layer"] = GroupNorm((8, ...), backend="torch", num_groups=2, feature_axis=0)
call = torch.compile(
    calls[sys.argv[1]], backend="aot_eager", fullgraph=True, dynamic=sys.argv[2] == "dynamic"
)
y = call(torch.tensor(x))
assert np.abs(y.detach().numpy() - oracle.group_norm(x, **options)).max() < 5e-6
"""


@pytest.mark.parametrize("sizes", ["static", "dynamic"])
@pytest.mark.parametrize("call", ["function", "vjp", "layer"])
def test_the_first_call_of_a_process_may_be_compiled(call, sizes):
    """It then imports adapters and kernels while the compiler traces (symbolic sizes: twice)."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL, call, sizes], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
