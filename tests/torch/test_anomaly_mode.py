"""`torch.autograd.detect_anomaly`, which raises for NaN in gradients, raises no false alarm."""

from __future__ import annotations

import pytest
import torch

from groupnorm import group_norm, group_norm_vjp, group_statistics, normalize
from tests.core_calls import CALLS, check, draw, reference
from tests.rows import ROWS

pytestmark = pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")


@pytest.fixture(params=[None, "portable"], ids=["default", "portable"])
def implementation(request):
    return request.param


def tensors(*arrays):
    return [ROWS["torch"].asarray(a) for a in arrays]


@pytest.mark.parametrize("size", [1e-15, 1.0, 1e18])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("call", CALLS)
def test_values_and_gradients(call, masked, size, implementation, rng, needs_bfloat16):
    if call == "bfloat16" and masked:
        implementation = "portable"  # no other test compiles a kernel for it
    host = x, dy, scale, bias, keywords = draw(rng, call, masked, size)
    x, dy, scale, bias = tensors(*host[:4])
    leaves = [a.requires_grad_() for a in (x, scale, bias)]
    with torch.autograd.detect_anomaly():
        y = group_norm(*leaves, implementation=implementation, **keywords)
        gradients = torch.autograd.grad(y, leaves, dy)
    got = [ROWS["torch"].to_numpy(a) for a in (y, *gradients)]
    check((got[0], got[1:]), reference(*host), host[0].dtype.name)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives(call, masked, implementation, rng, needs_bfloat16):
    """Autograd differentiates the operations of the portable code one by one."""
    *host, keywords = draw(rng, call, masked)
    x, dy, scale, bias = tensors(*host)
    leaves = [a.requires_grad_() for a in (x, scale, bias)]
    with torch.autograd.detect_anomaly():
        y = group_norm(*leaves, implementation=implementation, **keywords)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        total = sum((abs(g) ** 2).sum() for g in first)
        second = torch.autograd.grad(total, leaves, allow_unused=True)
    assert all(bool(torch.isfinite(abs(g)).all()) for g in second if g is not None)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("call", ["last", "first", "complex"])
def test_statistics_and_pullbacks(call, masked, implementation, rng):
    """Autograd records these operations one by one in the first derivative already."""
    *host, keywords = draw(rng, call, masked)
    x, dy, scale, bias = tensors(*host)
    leaves = [a.requires_grad_() for a in (x, scale, bias)]
    with torch.autograd.detect_anomaly():
        y, pullback = group_norm_vjp(*leaves, implementation=implementation, **keywords)
        torch.autograd.grad(sum(abs(a).sum() for a in (y, *pullback(dy))), leaves)
        keywords = {k: v for k, v in keywords.items() if k not in ("activation", "epsilon")}
        statistics = group_statistics(x, **keywords)
        y = normalize(x, statistics, scale, bias, **keywords)
        gradients = torch.autograd.grad(y, leaves, dy)
    got = [ROWS["torch"].to_numpy(a) for a in (y, *gradients)]
    keywords["activation"] = None
    check((got[0], got[1:]), reference(*host, keywords), host[0].dtype.name)


def test_nan_in_x_is_found(implementation):
    x = torch.ones(2, 20, 8).index_fill(1, torch.tensor(3), torch.nan).requires_grad_()
    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="nan values"):
        group_norm(x, num_groups=2, implementation=implementation).sum().backward()
