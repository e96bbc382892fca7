"""Calls of the compiled core itself, without a library, and what they should give, in float64."""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np
import pytest

from groupnorm.backends.kernels.cpu.availability import why_unavailable
from groupnorm.backends.kernels.variants import ACTIVATIONS, DTYPES
from groupnorm.testing import oracle
from tests.portable.test_activation import act, slope
from tests.rows import CONTRACT, host_dtype

# Half a unit in the last place, relative, and of the subnormal values.
ROUNDING = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 0.0)}
MEASURE, NORMALIZE, SUM, INPUT_GRADIENT = 1, 2, 4, 8  # as in call.hpp


def without_sanitizers(*names: str) -> Any:
    """Mark a test that cannot run under these sanitizers, which `nox -s sanitize` preloads."""
    found = [name for name in names if f"lib{name}" in os.environ.get("LD_PRELOAD", "")]
    # Its own memory must not run out, its locks may be held when a process forks, and it takes a
    # thread that Python ends within a call, by pthread_exit, for a fault.
    reason = (
        f"{', '.join(found)}: has memory of its own, and permits no forks and no end of a thread"
    )
    return pytest.mark.skipif(bool(found), reason=reason)


def needs_core() -> Any:
    """Return the core; without it, skip the module that calls this."""
    why = why_unavailable()
    if why is not None:
        pytest.skip(why.reason, allow_module_level=True)
    return importlib.import_module("groupnorm.backends.kernels.cpu._core")


class Call:
    """A plan and arrays, which are (samples, channels, positions) here whatever the layout.

    `masked` is None, "one" (mask for all samples) or "each"; `rows` is whether parameters have a
    row for each sample; without `parameters` there are none.
    """

    def __init__(
        self, sizes, *, first=False, x="float32", y=None, dy=None, activation=None, masked=None,
        rows=False, parameters=True, offset=0.0, epsilon=1e-6, seed=0,
    ):  # fmt: skip
        self.sizes, self.first, self.epsilon, self.activation = sizes, first, epsilon, activation
        self.dtypes = x, y or x, dy or (y if y in (x, "float32") else x)
        samples, groups, size, positions = sizes
        channels = groups * size
        rng = np.random.default_rng(seed)
        shape = samples, channels, positions
        self.x = (offset + 2 * rng.normal(size=shape)).astype(host_dtype(x))
        self.scale = self.bias = self.mask = None
        self.rows, parameter = rows, (samples if rows else 1, channels)
        if parameters:
            self.scale = rng.uniform(0.5, 1.5, parameter).astype(np.float32)
            self.bias = rng.normal(size=parameter).astype(np.float32)
        if masked is not None:
            self.mask = rng.random((1 if masked == "one" else samples, positions)) < 0.6
            self.mask[:, 0], self.mask[:, -1] = positions == 1, True
        self.dy = rng.normal(size=shape).astype(host_dtype(self.dtypes[2]))
        self.plan = self.planned()

    def planned(self):
        """Return a plan of the call as it is now."""
        x, y, _ = map(DTYPES.index, self.dtypes)
        activation = ACTIVATIONS[self.activation]
        return needs_core().Plan(
            *self.sizes, self.first, x, y, activation, self.epsilon, False, self.rows
        )

    def avoid_kink(self):
        """Let no gradient depend on the side of relu's kink, which rounding decides."""
        if self.activation == "relu":
            self.dy[np.abs(self.z()) < 1e-3] = 0

    # Arrays in memory ----------------------------------------------------------------------------

    def flat(self, a):
        """Return an array in the order of memory, whose buffer can be read."""
        a = np.ascontiguousarray(a if self.first else a.transpose(0, 2, 1))
        return a.view(np.uint16) if a.dtype.kind == "V" else a

    def empty(self, dtype):
        """Return an array for a result: what no result has."""
        samples, groups, size, positions = self.sizes
        shape = (samples, groups * size, positions)
        return self.flat(np.full(shape, np.nan, host_dtype(dtype)))

    def shaped(self, flat, dtype):
        flat = flat.view(host_dtype(dtype))
        return flat if self.first else flat.transpose(0, 2, 1)

    @property
    def inputs(self):
        mask = None if self.mask is None else np.ascontiguousarray(self.mask).astype(np.uint8)
        return self.flat(self.x), self.scale, self.bias, mask

    # Calls ---------------------------------------------------------------------------------------

    def forward(self, threads=1, keep=True):
        """Return y; keep the statistics."""
        y = self.empty(self.dtypes[1])
        self.saved = self.plan.forward(*self.inputs, y, keep, threads)
        return self.shaped(y, self.dtypes[1])

    @property
    def statistics(self):
        """Mean, 1 / standard deviation and 1 / count of each group."""
        return np.frombuffer(self.saved).reshape(3, self.sizes[0], self.sizes[1])

    def backward(self, threads=1, batches=None):
        """Return dx, dscale and dbias, (batches, channels)."""
        x, _, dy = self.dtypes
        samples, groups, size, _ = self.sizes
        batches = batches or (samples if self.rows else 1)
        dx = self.empty(x)
        dscale, dbias = np.full((2, batches, groups * size), np.nan, np.float32)
        self.plan.backward(
            *self.inputs, self.saved, self.flat(self.dy), DTYPES.index(dy), dx, dscale, dbias,
            batches, threads,
        )  # fmt: skip
        return self.shaped(dx, x), dscale, dbias

    def stage(self, stage, statistics, y=None, dy=None, sums=None, threads=1):
        self.plan.stage(stage, *self.inputs, statistics, y, dy, sums, threads)

    # In float64 ----------------------------------------------------------------------------------

    @property
    def keywords(self):
        mask = None if self.mask is None else self.mask[:, None, :]
        return {"num_groups": self.sizes[1], "feature_axis": 1, "epsilon": self.epsilon,
                "mask": mask}  # fmt: skip

    def xhat(self):
        return oracle.group_norm(self.x.astype(np.float64), **self.keywords)

    def z(self):
        scale, bias = self.parameters()
        return self.xhat() * scale + bias

    def parameters(self):
        if self.scale is None:
            return np.ones((1, 1, 1)), np.zeros((1, 1, 1))
        return self.scale[:, :, None].astype(np.float64), self.bias[:, :, None].astype(np.float64)

    def want_y(self):
        return act(self.z(), self.activation)

    def want_gradients(self, batches=None):
        """Return dx, dscale and dbias."""
        samples, groups, size, _ = self.sizes
        batches = batches or (samples if self.rows else 1)
        g = self.dy.astype(np.float64) * slope(self.z(), self.activation)
        scale, _ = self.parameters()
        x = self.x.astype(np.float64)
        dx = oracle.group_norm_gradients(x, g * scale, None, None, **self.keywords).x
        each = np.stack([(g * self.xhat()).sum(2), g.sum(2)])
        return dx, *each.reshape(2, batches, -1, groups * size).sum(2)

    def check(self, threads=1, batches=None):
        """Compare the whole call, forward and backward, with float64."""
        self.avoid_kink()
        check(self.forward(threads), self.want_y(), self.dtypes[1])
        self.check_gradients(self.backward(threads, batches), batches)

    def check_gradients(self, got, batches=None, x=None):
        """Compare gradients with those in float64; there is none where x is not finite."""
        want = self.want_gradients(batches)
        finite = np.isfinite((self.x if x is None else x).astype(np.float64))
        assert not got[0][~finite].any()
        # Where a group has one element, dx is the difference of equal, large values.
        size = max(1.0, self.statistics[1].max()) * np.abs(want[0]).max(initial=1)
        check(got[0][finite], want[0][finite], self.dtypes[0], size)
        # Sums of many addends of both signs may be small.
        size = max(np.abs(w).max(initial=1) for w in want[1:])
        for a, b in zip(got[1:], want[1:], strict=True):
            check(a, b, "float32", size)


def check(got, want, dtype, size=1.0):
    """Assert the contract's error, CONTRACT * max(size, |want|), and one rounding to the dtype."""
    got, want = got.astype(np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    relative, absolute = ROUNDING[dtype]
    allowed = CONTRACT * np.maximum(size, np.abs(want))
    allowed += (1 + CONTRACT) * relative * (np.abs(want) + allowed) + absolute
    wrong = ~(np.abs(got - want) <= allowed)  # NaN is wrong
    assert not wrong.any(), (np.argwhere(wrong)[:3], got[wrong][:3], want[wrong][:3])
