"""Private names of PyTorch: all there in the pinned version, and none of them needed."""

import subprocess
import sys

import pytest
import torch

from groupnorm.backends.torch import internals

# Hides a name from the package, and compares calls of every kind with float64.
PROGRAM = """
import sys
import warnings
import numpy as np
import torch

from groupnorm import GroupNorm, group_norm, group_norm_vjp

name = sys.argv[1]
if name:
    owner, _, attribute = name.rpartition(".")
    owner = eval(owner, {"torch": torch})
    value = getattr(owner, attribute)
    delattr(owner, attribute)
from groupnorm.backends.torch import internals
if name:
    setattr(owner, attribute, value)  # PyTorch itself uses it
from groupnorm.testing import oracle
assert internals.missing == ((name,) if name else ()), internals.missing

rng = np.random.default_rng(0)
x, dy = rng.normal(size=(2, 2, 8, 5, 3)).astype(np.float32)
scale, bias = rng.normal(size=(2, 8)).astype(np.float32)
options = {"num_groups": 2, "feature_axis": 1}
want = oracle.group_norm(x, scale, bias, **options)
gradients = oracle.group_norm_gradients(x, dy, scale, bias, **options)

def close(found, reference):
    found = found.detach().numpy()
    assert np.abs(found - reference).max() <= 5e-6 * max(1, np.abs(reference).max())

for implementation in (None, "portable"):
    given = [torch.tensor(a, requires_grad=True) for a in (x, scale, bias)]
    y = group_norm(*given, **options, implementation=implementation)
    close(y, want)
    for found, reference in zip(torch.autograd.grad(y, given, torch.tensor(dy)), gradients):
        close(found, reference)
    y, pullback = group_norm_vjp(*map(torch.tensor, (x, scale, bias)), **options)
    close(y, want)
    for found, reference in zip(pullback(torch.tensor(dy)), gradients):
        close(found, reference)
layer = GroupNorm((8, ...), backend="torch", **{**options, "feature_axis": 0})
close(layer(torch.tensor(x)), oracle.group_norm(x, **options))
one = torch.func.vmap(lambda x: group_norm(x[None], **options)[0])(torch.tensor(x))
close(one, oracle.group_norm(x, **options))
_, tangent = torch.func.jvp(
    lambda x: group_norm(x, **options), (torch.tensor(x),), (torch.tensor(dy),)
)
assert torch.isfinite(tangent).all() and tangent.abs().max() > 0.1
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    compiled = torch.compile(lambda x: group_norm(x, **options), backend="eager", fullgraph=True)
    close(compiled(torch.tensor(x)), oracle.group_norm(x, **options))
"""


def test_none_is_missing_in_the_pinned_version():
    assert internals.missing == (), torch.__version__
    assert len(internals.PRIVATE_NAMES) > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", *internals.PRIVATE_NAMES])
def test_without_a_private_name_results_are_right(name):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
