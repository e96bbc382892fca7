"""PyTorch tensors on GPUs: fake tensors, availability of kernels, and, with a GPU, values."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from groupnorm import available_backends, group_norm, group_norm_vjp
from groupnorm.backends.torch import custom_op as torch_op  # noqa: F401 - the operators
from groupnorm.backends.torch import gpu as torch_gpu
from groupnorm.dispatch import adapter_named
from groupnorm.errors import ArgumentValueError
from groupnorm.testing import oracle
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient

OP = torch.ops.groupnorm.group_norm.default
BACKWARD = torch.ops.groupnorm.group_norm_backward.default
GPU = torch.cuda.is_available()
SETTINGS = ([1], 8, None, None, 1e-5, None, True, "silu")
KEYWORDS = {"num_groups": 8, "feature_axis": 1, "epsilon": 1e-5}


def on_gpu(function):
    """Mark a test that computes on a GPU."""
    return pytest.mark.gpu(
        pytest.mark.skipif(not GPU, reason="no GPU that PyTorch can use")(function)
    )


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    match layout:
        case "channels_last":
            return x.to(memory_format=torch.channels_last)
        case "transposed":
            return x.transpose(2, 3)
        case "slice":
            return x.narrow(2, 0, 5)  # works for a fake tensor in PyTorch without CUDA
    return x


LAYOUTS = ("contiguous", "channels_last", "transposed", "slice")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_memory_layout_of_real_ones(layout):
    """On a nonexistent GPU; the kernels' actual results are checked where they run."""
    with FakeTensorMode():
        x = laid_out(torch.empty(2, 32, 6, 10, device="cuda", dtype=torch.bfloat16), layout)
        scale = torch.empty(32, device="cuda")
        y, saved = OP(x, scale, None, None, *SETTINGS)
        assert (y.dtype, y.device.type) == (torch.float32, "cuda")
        assert y.stride() == torch.empty_like(x).stride()
        assert (saved.shape, saved.dtype, saved.device.type) == (
            (2 * 8 * 4,),
            torch.float32,
            "cuda",
        )
        dx, dscale, dbias = BACKWARD(torch.empty_like(y), x, scale, None, None, saved, *SETTINGS)
        assert (dx.dtype, dx.stride()) == (x.dtype, y.stride())
        assert (dscale.shape, dbias.shape) == ((32,), (0,))


def test_without_a_gpu_the_reason_is_reported():
    why = torch_gpu.GpuEngine().why_unavailable(torch.device("mps"))
    assert "no kernels for PyTorch tensors on mps" in why.reason
    if not GPU:
        why = torch_gpu.GpuEngine().why_unavailable(torch.device("cuda", 0))
        assert "no NVIDIA GPU" in why.reason


def test_without_triton_the_extra_is_named(monkeypatch):
    from groupnorm.backends.kernels.gpu import build as triton_build

    def refuse(name):
        raise ImportError("No module named 'triton'")

    triton_build.why_unavailable.cache_clear()
    monkeypatch.setattr(triton_build.importlib, "import_module", refuse)
    why = triton_build.why_unavailable()
    monkeypatch.undo()
    triton_build.why_unavailable.cache_clear()
    assert "groupnorm[gpu]" in why.reason


def test_tensors_on_other_devices_use_the_portable_implementation():
    x = torch.empty(2, 8, 4, device="meta")
    assert group_norm(x, num_groups=2, feature_axis=1).shape == x.shape
    with pytest.raises(ArgumentValueError, match=r"x is not a plain tensor.*meta"):
        group_norm(x, num_groups=2, feature_axis=1, implementation="fused")


# With a GPU ---------------------------------------------------------------------------------------


def arguments(layout="contiguous", dtype=torch.float32, shape=(3, 32, 14, 10)):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(shape, generator=generator).to(dtype)
    scale, bias = torch.rand(2, 32, generator=generator).to(dtype)
    x = laid_out(x.cuda(), layout)
    dy = torch.randn(x.shape, generator=generator).to(dtype)
    return x, dy.cuda(), scale.cuda(), bias.cuda()


def host(tensor):
    return tensor.detach().double().cpu().numpy()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients(layout, dtype):
    x, dy, scale, bias = arguments(layout, dtype)
    y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **KEYWORDS)
    want = oracle.group_norm(host(x), host(scale), host(bias), **KEYWORDS)
    last = 0 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert_close(host(y), want, tolerance=max(CONTRACT, last))
    found = pullback(dy)
    assert found.x.stride() == y.stride()
    reference = oracle.group_norm_gradients(host(x), host(dy), host(scale), host(bias), **KEYWORDS)
    for ours, true in zip(found, reference, strict=True):
        assert_gradient(host(ours), true, rtol=max(GRADIENT, last))


@on_gpu
@pytest.mark.parametrize("shape", [(2, 32, 300, 300), (1, 32, 64, 64), (64, 32, 7, 7)], ids=str)
def test_results_are_reproducible_bit_for_bit(shape):
    x, dy, scale, bias = arguments(shape=shape)
    runs = []
    for _ in range(3):
        y, pullback = group_norm_vjp(x, scale, bias, implementation="fused", **KEYWORDS)
        runs.append((y, *pullback(dy)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@on_gpu
def test_in_a_cuda_graph():
    x, _, scale, bias = arguments()
    group_norm(x, scale, bias, implementation="fused", **KEYWORDS)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = group_norm(x, scale, bias, implementation="fused", **KEYWORDS)
    x.copy_(torch.randn_like(x) * 3)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, group_norm(x, scale, bias, implementation="fused", **KEYWORDS))


@on_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled(layout):
    x, dy, scale, bias = arguments(layout)
    given = [a.requires_grad_() for a in (x.detach(), scale, bias)]

    def function(*arrays):
        return group_norm(*arrays, activation="silu", implementation="fused", **KEYWORDS)

    eager = function(*given)
    wanted = torch.autograd.grad(eager, given, dy)
    made = torch.compile(function, fullgraph=True)(*given)
    assert torch.equal(made, eager)
    assert made.stride() == eager.stride()
    for ours, true in zip(torch.autograd.grad(made, given, dy), wanted, strict=True):
        assert torch.equal(ours, true)


@on_gpu
def test_on_another_stream():
    x, _, scale, bias = arguments()
    want = group_norm(x, scale, bias, implementation="fused", **KEYWORDS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = group_norm(x, scale, bias, implementation="fused", **KEYWORDS)
    stream.synchronize()
    assert torch.equal(y, want)


@on_gpu
def test_fused_is_the_default():
    [torch_info] = [info for info in available_backends() if info.name == "torch"]
    assert torch_info.implementations["cuda:0"][0] == "fused"
    assert adapter_named("torch").kernels.why_unavailable("cuda:0") is None
