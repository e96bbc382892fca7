"""`translation_table`: models of PyTorch, exported with it, run by onnxruntime."""

from __future__ import annotations

import doctest

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

import groupnorm
from groupnorm import GroupNorm, group_norm
from groupnorm.onnx import translation_table
from groupnorm.testing import oracle
from tests.api.test_imports import HIDE, python
from tests.onnx.test_models import BOUND
from tests.portable.test_activation import act
from tests.rows import CONTRACT, CONTRACT_64, assert_close

pytestmark = [
    # PyTorch's exporter itself gives them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:# The axis name:UserWarning"),
]
SIZE = 18  # nodes of a group norm with channels first


def export(model, x, *, table=True, opset=18, dynamic=(0, 2, 3)):
    """Export a model whose input may have other lengths of some axes; check and return it."""
    program = torch.onnx.export(
        model.eval(), (x,), dynamo=True, verbose=False, opset_version=opset, input_names=["x"],
        dynamic_shapes=({axis: torch.export.Dim(f"size{axis}") for axis in dynamic},),
        custom_translation_table=translation_table() if table else None,
    )  # fmt: skip
    made = program.model_proto
    onnx.checker.check_model(made, full_check=True)
    assert not made.functions
    assert {node.domain for node in made.graph.node} == {""}
    assert [entry.version for entry in made.opset_import if not entry.domain] == [opset]
    return made


def run(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})


def count(model):
    return sum(node.op_type != "Constant" for node in model.graph.node)


class Calls(nn.Module):
    """A function of x as a module, which the exporter takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def our_layer(**keywords):
    keywords = {"in_size": (32, ...), "feature_axis": 0, "num_groups": 8, **keywords}
    return GroupNorm(backend="torch", **keywords)


def call(x):
    return group_norm(x, num_groups=None, group_size=4, feature_axis=1, epsilon=1e-5)


# Each of what is exported, its size, and the feature axis.
MODELS = {
    "PyTorch's layer": (nn.GroupNorm(8, 32), SIZE, 1),
    "without parameters": (nn.GroupNorm(8, 32, affine=False), SIZE - 2, 1),
    "PyTorch's function": (Calls(lambda x: functional.group_norm(x, 8)), SIZE - 2, 1),
    "our layer": (our_layer(epsilon=1e-5), SIZE, 1),
    "channels last": (our_layer(in_size=32, feature_axis=-1, epsilon=1e-5), SIZE + 2, 3),
    "our function": (Calls(call), SIZE - 2, 1),
}


@pytest.mark.parametrize(("model", "size", "axis"), MODELS.values(), ids=MODELS)
def test_offsets(model, size, axis, rng):
    example, shape = (
        ((2, 32, 8, 9), (3, 32, 20, 11)) if axis == 1 else ((2, 8, 9, 32), (3, 7, 9, 32))
    )
    dynamic = [a for a in range(4) if a != axis]
    made = export(model, torch.zeros(example), dynamic=dynamic)
    assert count(made) == size
    for offset in (0.0, 1.0, 1e2, 1e3, 1e4, 1e5):
        x = (rng.normal(size=shape) + offset).astype(np.float32)
        want = oracle.group_norm(x, num_groups=8, feature_axis=axis, epsilon=1e-5)
        assert np.abs(run(made, x)[0] - want).max() <= BOUND


@pytest.mark.parametrize("opset", [18, 21])
def test_models_with_several_norms(opset, rng):
    """Without the table the same model loses digits, and NaN comes out with opset 21."""
    torch.manual_seed(0)
    layers = [nn.GroupNorm(8, 32), nn.SiLU(), nn.Conv2d(32, 32, 1), our_layer(activation="silu")]
    model = nn.Sequential(Calls(lambda x: x + 1e4), *layers)
    x = torch.from_numpy(rng.normal(size=(2, 32, 16, 16)).astype(np.float32))
    made = export(model, x, opset=opset)
    assert count(made) <= 2 * SIZE + 6  # the addition, the convolution and the activations
    theirs = run(export(model, x, opset=opset, table=False), x.numpy())[0]
    want = nn.Sequential(*layers).double()((x + 1e4).double()).detach().numpy()
    assert_close(run(made, x.numpy())[0], want, tolerance=CONTRACT)
    assert not np.abs(theirs - want).max() < 20 * CONTRACT


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_layers_with_parameters_and_activation(activation, rng):
    layer = our_layer(activation=activation)
    for parameter in layer.parameters():
        parameter.data = torch.from_numpy(rng.normal(size=32).astype(np.float32))
    made = export(layer, torch.zeros(2, 32, 5, 6))
    x = (rng.normal(size=(3, 32, 7, 4)) + 1e3).astype(np.float32)
    want = oracle.group_norm(
        x, layer.weight.detach().numpy(), layer.bias.detach().numpy(), num_groups=8, feature_axis=1
    )
    assert_close(run(made, x)[0], act(want, activation), tolerance=CONTRACT)


@pytest.mark.parametrize("module", [lambda: nn.GroupNorm(8, 32, eps=1e-6), our_layer])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-10), ("float64", CONTRACT_64)])
def test_dtypes(dtype, tolerance, module, rng):
    """In float64 no constant is rounded to float32."""
    model = module().to(getattr(torch, dtype))
    x = rng.normal(size=(2, 32, 5, 6)).astype(dtype)
    (y,) = run(export(model, torch.from_numpy(x)), x)
    assert y.dtype == x.dtype
    want = oracle.group_norm(x.astype(np.float64), num_groups=8, feature_axis=1)
    assert_close(y.astype(np.float64), want, tolerance=tolerance)


def test_a_model_whose_norms_were_replaced(rng):
    """The replaced layer computes the activation too."""
    model = nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU())
    groupnorm.torch.replace(model)
    made = export(model, torch.zeros(2, 32, 5, 6))
    assert count(made) == SIZE + 2
    x = (rng.normal(size=(3, 32, 7, 4)) + 1e4).astype(np.float32)
    want = oracle.group_norm(x, num_groups=8, feature_axis=1, epsilon=1e-5)
    assert_close(run(made, x)[0], act(want, "silu"), tolerance=CONTRACT)


def test_parameters_of_each_sample(rng):
    """As in diffusion models: the normalization without parameters, and then a factor."""
    scale = torch.from_numpy(rng.normal(size=(1, 32)).astype(np.float32))

    def modulated(x):
        return group_norm(x, scale.expand(x.shape[0], 32), num_groups=8, feature_axis=1)

    made = export(Calls(modulated), torch.zeros(2, 32, 5, 6))
    assert count(made) <= SIZE + 6
    x = (rng.normal(size=(3, 32, 7, 4)) + 1e4).astype(np.float32)
    want = oracle.group_norm(x, scale.numpy()[0], num_groups=8, feature_axis=1)
    assert_close(run(made, x)[0], want, tolerance=CONTRACT)


def test_bfloat16_with_float32_parameters(rng):
    """The bits of bfloat16 go into the model by a cast, since NumPy has no such dtype."""

    def mixed(x):
        return layer(x.to(torch.bfloat16)).float()

    layer = nn.GroupNorm(8, 32, eps=1e-6)
    x = rng.normal(size=(2, 32, 5, 6)).astype(np.float32)
    (y,) = run(export(Calls(mixed), torch.from_numpy(x)), x)
    rounded = torch.from_numpy(x).bfloat16().double().numpy()
    want = oracle.group_norm(rounded, num_groups=8, feature_axis=1)
    assert_close(y, want, tolerance=2**-7)


def test_statistics_of_the_native_operator(rng):
    """Decomposed programs contain it; its other results are the mean and 1 / deviation."""

    def native(x):
        n, _, h, w = x.shape
        return torch.ops.aten.native_group_norm(x, None, None, n, 32, h * w, 8, 1e-5)

    x = (rng.normal(size=(2, 32, 5, 6)) + 1e4).astype(np.float32)
    made = export(Calls(native), torch.zeros(3, 32, 4, 4))
    y, mean, reciprocal = run(made, x)
    groups = x.astype(np.float64).reshape(2, 8, -1)
    assert_close(
        y, oracle.group_norm(x, num_groups=8, feature_axis=1, epsilon=1e-5), tolerance=BOUND
    )
    assert_close(mean, groups.mean(2), tolerance=1e-6)
    assert_close(reciprocal, 1 / np.sqrt(groups.var(2) + 1e-5), tolerance=1e-6)


# What stays as it is -----------------------------------------------------------------------------


def test_without_the_table_layers_are_portable_code(rng):
    made = export(our_layer(), torch.zeros(2, 32, 5, 6), table=False)
    assert count(made) > 4 * SIZE
    x = (rng.normal(size=(3, 32, 7, 4)) + 1e4).astype(np.float32)
    want = oracle.group_norm(x, num_groups=8, feature_axis=1)
    assert_close(run(made, x)[0], want, tolerance=CONTRACT)


def test_masked_calls_are_portable_code(rng):
    mask = torch.from_numpy(rng.random((1, 1, 5, 6)) < 0.5)
    made = export(Calls(lambda x: call_masked(x, mask)), torch.zeros(2, 32, 5, 6), dynamic=(0,))
    x = (rng.normal(size=(3, 32, 5, 6)) + 1e4).astype(np.float32)
    want = oracle.group_norm(x, num_groups=8, feature_axis=1, mask=mask.numpy())
    assert_close(run(made, x)[0], want, tolerance=CONTRACT)


def call_masked(x, mask):
    return group_norm(x, num_groups=8, feature_axis=1, mask=mask)


@pytest.mark.parametrize("strict", [False, True])
def test_torch_export_has_no_operator_of_this_package(strict):
    translation_table()  # registers it
    program = torch.export.export(our_layer(), (torch.zeros(2, 32, 5),), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert targets
    assert not [target for target in targets if "groupnorm" in target]


def test_an_invalid_call_raises_its_own_error():
    with pytest.raises(torch.onnx.OnnxExporterError) as caught:
        export(our_layer(), torch.zeros(2, 30, 5, 6))
    error, messages = caught.value, []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    assert any("in_size=(C, ...)" in message for message in messages)


def test_missing_packages_are_named():
    program = HIDE.format(library="onnxscript") + (
        "from groupnorm import errors\nfrom groupnorm.onnx import translation_table\n"
        "try: translation_table()\n"
        "except errors.BackendImportError as error: print(error)\n"
    )
    assert "pip install onnxscript" in python("-c", program).stdout
    program = HIDE.format(library="onnx") + (
        "from groupnorm import GroupNorm, errors\n"
        "try: GroupNorm(4, num_groups=2).to_onnx(None, ('N', 4))\n"
        "except errors.BackendImportError as error: print(error)\n"
    )
    assert "groupnorm[onnx]" in python("-c", program).stdout


def test_examples_in_docstrings():
    """Where the docstrings of all modules are tested, onnx may be missing."""
    runner = doctest.DocTestRunner()
    for function in (translation_table, GroupNorm.to_onnx):
        (test,) = doctest.DocTestFinder().find(function, globs={})
        for example in test.examples:
            example.options.pop(doctest.SKIP, None)
        assert runner.run(test) == (0, len(test.examples))
