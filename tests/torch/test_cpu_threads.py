"""The CPU kernels in PyTorch's threads: bits, calls of several Python threads, forks."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from groupnorm import group_norm_vjp
from tests import ROOT
from tests.kernels.core import needs_core, without_sanitizers

needs_core()

# Whole samples for each thread, and samples that threads share.
SHAPES = {"last": ((40, 500, 24), -1), "first": ((40, 24, 500), 1), "long": ((2, 60_001, 8), -1)}


@pytest.fixture
def number_of_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def results(x, axis):
    y, pullback = group_norm_vjp(
        x, num_groups=4, feature_axis=axis, activation="silu", implementation="fused"
    )
    return y, pullback(x).x


def drawn(name, dtype=torch.float32):
    shape, axis = SHAPES[name]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), axis


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_the_number_of_threads(name, dtype, number_of_threads):
    x, axis = drawn(name, dtype)
    number_of_threads(1)
    want = results(x, axis)
    for number in (2, 3, 7):
        number_of_threads(number)
        assert all(map(torch.equal, results(x, axis), want))


def test_calls_of_several_python_threads(number_of_threads):
    number_of_threads(3)
    given = [drawn(name) for name in SHAPES]
    want = [results(*one) for one in given]

    def is_right(turn):
        return all(map(torch.equal, results(*given[turn % 3]), want[turn % 3]))

    with ThreadPoolExecutor(5) as executor:
        assert all(executor.map(is_right, range(30)))


FORK = """
import os, sys
import numpy as np
import torch
from tests.torch.test_cpu_threads import drawn, results
torch.set_num_threads(3)
x, axis = drawn("long")
want = [a.numpy() for a in results(x, axis)]
def is_right():
    return all(map(np.array_equal, [a.numpy() for a in results(x, axis)], want))
for turn in range(6):
    child = os.fork()
    if child == 0:
        # PyTorch's threads do not exist here, and its own functions, such as equal, wait for them.
        found = [is_right() for _ in range(3)]
        (os._exit if turn % 2 else sys.exit)(not all(found))
    assert os.waitpid(child, 0)[1] == 0
    assert is_right()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@without_sanitizers("tsan")
def test_a_forked_process_has_threads_of_its_own():
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK], cwd=ROOT,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
