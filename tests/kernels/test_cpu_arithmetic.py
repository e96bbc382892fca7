"""The arithmetic of the CPU kernels, run as plain Python: small shapes, each step by itself.

numba's decorators do nothing here, and four functions of LLVM code have stand-ins. So steps that
no entry point exports are compared with float64, at lengths of blocks, chunks and runs of a few
elements, where every branch is taken.
"""

from __future__ import annotations

import importlib
import math
import sys
import types

import numpy as np
import pytest

from groupnorm.testing import oracle

numba = pytest.importorskip("numba", reason="the kernels need numba, which is not installed here")

PACKAGE = "groupnorm.backends.kernels.cpu.compiled"
NAMES = ("elements", "moments", "work_sharing", "bands", "channels_first", "channels_last")
F = np.float32
ROUNDING = 5e-6


def _add(counters, at, amount):
    counters[at] += amount
    return int(counters[at]) - amount


def _never():
    raise AssertionError("waits for other threads, of which there are none")


def _times_power_of_two(value, shifted):
    bits = int(value.view(np.int32)) + (int(shifted.view(np.int32)) << 23)
    return np.uint32(bits & 0xFFFFFFFF).view(F)


@pytest.fixture(scope="module")
def k():
    """The modules, imported once more with numba's decorators switched off."""
    names = [f"{PACKAGE}.{name}" for name in NAMES]
    package = importlib.import_module(PACKAGE)
    compiled = {name: sys.modules.pop(name, None) for name in names}
    before, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, 1
    try:
        made = types.SimpleNamespace(
            **{n.rpartition(".")[2]: importlib.import_module(n) for n in names}
        )
    finally:
        numba.config.DISABLE_JIT = before
        for name, module in compiled.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
                setattr(package, name.rpartition(".")[2], module)
    e, w = made.elements, made.work_sharing
    e._get = lambda x, i: x[i]
    e._put = e._put_gradient = lambda y, i, value: y.__setitem__(i, value)
    e._times_power_of_two = _times_power_of_two
    e._activated = lambda z, a: e._activated_overload(z, a)(z, a)
    e._activation_vjp = lambda z, dy, a: e._activation_vjp_overload(z, dy, a)(z, dy, a)
    w._add, w._read, w._yield_cpu = _add, lambda counters, at: int(counters[at]), _never
    with np.errstate(all="ignore"):
        yield made


ACTIVATIONS = {None: (), "relu": (0,), "silu": (0, 0), "gelu": (0, 0, 0)}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def activated(z, activation):
    if activation == "relu":
        return np.maximum(z, 0)
    if activation == "silu":
        return z * sigmoid(z)
    if activation == "gelu":
        return z * 0.5 * np.vectorize(math.erfc)(-z / math.sqrt(2))
    return z


def derivative(z, activation):
    if activation == "relu":
        return (z > 0).astype(float)
    if activation == "silu":
        return sigmoid(z) * (1 + z * (1 - sigmoid(z)))
    if activation == "gelu":
        bell = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        return 0.5 * np.vectorize(math.erfc)(-z / math.sqrt(2)) + z * bell
    return np.ones_like(z)


def close(got, want, tolerance=ROUNDING):
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    wrong = ~(np.abs(got - want) <= tolerance * np.maximum(1, np.abs(want).max()))  # NaN is wrong
    assert not wrong.any(), (np.argwhere(wrong)[:3], got[wrong][:3], want[wrong][:3])


# Kernels ------------------------------------------------------------------------------------------


class Call:
    """One call of both kernels of a layout, with the sizes that `call_frame` plans."""

    def __init__(self, first, samples, positions, groups, size, *, seed=0, offset=0.0, masked=None,
                 batches=1, parts=1, whole=True, rows=4, band=2, span=1, activation=None,
                 epsilon=1e-6, keep=True, helped=None):  # fmt: skip
        rng = np.random.default_rng(seed)
        channels = groups * size
        self.x = (offset + rng.normal(size=(samples, positions, channels))).astype(F)
        self.dy = rng.normal(size=self.x.shape).astype(F)
        self.scale = rng.uniform(0.5, 1.5, channels).astype(F)
        self.bias = rng.normal(size=channels).astype(F)
        self.mask = None
        if masked is not None:
            self.mask = rng.random((1 if masked == "one" else samples, positions)) < 0.6
            self.mask[:, : 8 if masked == "late" else 1] = False
            self.mask[:, -1] = positions > 1
            band = 1
        self.__dict__.update(
            first=first, samples=samples, positions=positions, groups=groups, size=size,
            batches=batches, parts=parts, whole=whole, rows=rows, width=band * channels, span=span,
            activation=activation, epsilon=epsilon, keep=keep, channels=channels, helped=helped,
        )  # fmt: skip

    def flat(self, a):
        return np.ascontiguousarray(np.swapaxes(a, 1, 2) if self.first else a).reshape(-1)

    def shaped(self, flat):
        n, p, c = self.x.shape
        return np.swapaxes(flat.reshape(n, c, p), 1, 2) if self.first else flat.reshape(n, p, c)

    def counters(self):
        plain = self.first or self.whole
        count = 2 + (self.parts if plain else self.samples * (2 * self.parts + 1))
        return np.zeros(8 * count, np.int64)

    def claims(self, k, rows, span=1):
        """The number of claims of tasks, of `GRAIN` elements at least."""
        grain = max(1, k.channels_first.GRAIN // (self.size * self.positions * span))
        return -(-rows * self.groups // grain)

    def operands(self, out):
        mask = None if self.mask is None else self.mask.astype(np.uint8).reshape(-1)
        sizes = (mask, self.groups, self.size, self.positions, self.samples)
        return (self.flat(self.x), out, self.scale, self.bias, *sizes)

    def run(self, k, direction, *arguments, tasks):
        """Run a kernel in one thread, or, if `helped`, in two: the first gets none at that claim.

        The other begins when the first waits for it, and another one when all is done.
        """
        module, claim = (
            (k.channels_first if self.first else k.channels_last),
            k.work_sharing.claim_task,
        )
        kernel = getattr(module, f"channels_{'first' if self.first else 'last'}_{direction}")
        taken, others = 0, 0

        def claim_some(*where):
            nonlocal taken
            taken += others == 0
            return -1 if others == 0 and taken - 1 == self.helped else claim(*where)

        def other():
            nonlocal others
            if self.helped is None or others:
                _never()
            others = 1
            kernel(*arguments)

        module.claim_task, k.work_sharing._yield_cpu = claim_some, other
        try:
            kernel(*arguments)
            assert arguments[-1][8] == tasks  # finished
            result = arguments[1].copy()
            others = 1
            kernel(*arguments)
            np.testing.assert_array_equal(arguments[1], result)
        finally:
            module.claim_task, k.work_sharing._yield_cpu = claim, _never

    def forward(self, k):
        """Return y, and keep the statistics."""
        rows = self.samples if self.keep else self.parts
        self.saved = [np.full(rows * self.groups, np.nan) for _ in range(3)]
        y = np.full(self.x.size, np.nan, F)
        activation = ACTIVATIONS[self.activation]
        if self.first:
            self.run(
                k, "forward", *self.operands(y), self.epsilon, activation, *self.saved, self.parts,
                self.counters(), tasks=self.claims(k, self.samples),
            )  # fmt: skip
        else:
            chunks = -(-self.positions // self.rows)
            buffers = self.parts if self.whole else 1
            self.run(
                k, "forward", *self.operands(y), self.span, self.rows, self.width, self.whole,
                self.epsilon, activation, *self.saved,
                np.full(buffers * chunks * (1 + 2 * self.channels), np.nan),
                np.full(self.parts * (self.rows * self.channels // self.width + 1), -1, np.int64),
                np.full(self.parts * 3 * self.width, np.nan, F), self.parts, self.counters(),
                tasks=self.samples * chunks,
            )  # fmt: skip
        return self.shaped(y)

    def backward(self, k):
        """Return dx, dscale and dbias, by batch."""
        dx = np.full(self.x.size, np.nan, F)
        spans = self.batches * -(-(self.samples // self.batches) // self.span)
        sums = np.full(2 * spans * self.channels, np.nan)
        gradients = np.full((2, self.batches * self.channels), np.nan, F)
        x, _, *rest = self.operands(dx)
        activation, dy = ACTIVATIONS[self.activation], self.flat(self.dy)
        if self.first:
            self.run(
                k, "backward", x, dx, *rest, self.span, activation, *self.saved, dy, sums,
                self.batches, *gradients, self.parts, self.counters(),
                tasks=self.claims(k, spans, self.span) + 1,
            )  # fmt: skip
        else:
            chunks = -(-self.positions // self.rows)
            buffers = self.parts if self.whole else 1
            results = (
                self.parts * 2 * (self.groups + self.channels)
                if self.whole
                else self.samples * 2 * self.groups
            )
            self.run(
                k, "backward", x, dx, *rest, self.span, self.rows, self.width, self.whole,
                activation, *self.saved, dy, sums, self.batches, *gradients,
                np.full(buffers * 2 * chunks * self.channels, np.nan), np.full(results, np.nan),
                np.full(self.parts * 6 * self.width, np.nan, F), self.parts, self.counters(),
                tasks=self.samples * chunks + 1,
            )  # fmt: skip
        return self.shaped(dx), *gradients.reshape(2, self.batches, self.channels)

    def check(self, k, tolerance=ROUNDING):
        keywords = {"num_groups": self.groups, "epsilon": self.epsilon}
        mask = None if self.mask is None else self.mask[:, :, None]
        z = oracle.group_norm(self.x, self.scale, self.bias, mask=mask, **keywords)
        close(self.forward(k), activated(z, self.activation), tolerance)
        if not self.keep:  # the only thread has the first rows
            rows = np.array(self.saved).reshape(3, self.parts, self.groups)
            assert np.isfinite(rows[:, 0]).all()
            assert np.isnan(rows[:, 1:]).all() or self.samples == self.parts
            return
        g = self.dy * derivative(z, self.activation)
        got, n = self.backward(k), self.samples // self.batches
        for batch in range(self.batches):
            part = slice(batch * n, (batch + 1) * n)
            own = None if mask is None else mask[part if len(mask) > 1 else slice(None)]
            want = oracle.group_norm_gradients(
                self.x[part], g[part], self.scale, self.bias, mask=own, **keywords
            )
            # Of groups of one element dx is the difference of equal, large values.
            close(got[0][part], want.x, tolerance * max(1, self.saved[1].max()))
            close(got[1][batch], want.scale, tolerance)
            close(got[2][batch], want.bias, tolerance)


# samples, positions, groups, size: one of each, then lengths around bands of 2 and chunks of 4.
SIZES = [(1, 1, 1, 1), (2, 2, 1, 3), (3, 5, 2, 1), (2, 9, 3, 2), (2, 24, 2, 2), (1, 35, 1, 2)]
OPTIONS = [
    {}, {"offset": 1e5}, {"offset": 1e5, "rows": 16}, {"offset": 1e5, "masked": "each"},
    {"activation": "silu", "rows": 16}, {"activation": "gelu", "rows": 32, "whole": False},
    {"masked": "each"}, {"masked": "one", "offset": 20.0}, {"masked": "late", "offset": 20.0},
    {"activation": "silu"}, {"activation": "gelu", "masked": "each"}, {"activation": "relu"},
    {"parts": 3}, {"rows": 16, "band": 2}, {"rows": 34, "band": 1}, {"whole": False},
    {"whole": False, "parts": 2, "masked": "each"}, {"keep": False, "parts": 2},
    {"span": 2}, {"epsilon": 0.5}, {"offset": 1e5, "activation": "silu"},
    {"offset": 1e5, "activation": "gelu", "masked": "each"},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_both_kernels(first, sizes, options, k, monkeypatch):
    for module in (k.channels_first, k.channels_last):
        for name, value in {"BLOCK": 7, "SAMPLE": 3, "RUN": 2, "GRAIN": 8}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    Call(first, *sizes, **options).check(k)


@pytest.mark.parametrize("helped", [0, 1, 2, 3, 5, 7, 20])
@pytest.mark.parametrize(
    "options", [{}, {"masked": "each"}, {"whole": False}, {"span": 2}], ids=str
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_two_threads_share_the_work(first, options, helped, k, monkeypatch):
    monkeypatch.setattr(k.channels_first, "GRAIN", 8)
    for samples in (4, 1):
        Call(first, samples, 12, 2, 2, parts=2, helped=helped, **options).check(k)


def test_each_group_is_computed_once(k, monkeypatch):
    monkeypatch.setattr(k.channels_first, "GRAIN", 48)
    counted = {name: Counted(getattr(k.channels_first, name)) for name in ("_statistics", "_sums")}
    for name, function in counted.items():
        monkeypatch.setattr(k.channels_first, name, function)
    Call(True, 5, 12, 2, 2).check(k)
    assert counted["_statistics"].calls == 10
    assert counted["_sums"].calls == 20


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize(("batches", "span"), [(2, 1), (3, 2), (2, 3)])
def test_batches_have_gradients_of_their_own(first, batches, span, k):
    Call(first, 6, 5, 2, 2, batches=batches, span=span, parts=2).check(k)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("size", [1e-25, 1e25])
@pytest.mark.parametrize("masked", [None, "each"])
def test_squares_out_of_range(masked, size, first, k):
    call = Call(first, 2, 9, 2, 3, masked=masked, epsilon=0.0)
    call.x = (call.x * F(size)).astype(F)
    y = call.forward(k)
    mask = None if masked is None else call.mask[:, :, None]
    wide = call.x.astype(np.float64) / size
    close(y, oracle.group_norm(wide, call.scale, call.bias, num_groups=2, mask=mask, epsilon=0))


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("positions", [1, 6])
def test_samples_without_a_valid_element(positions, first, k):
    call = Call(first, 2, positions, 2, 2, masked="each", epsilon=3.0)
    call.mask[0], call.mask[1] = False, True
    call.check(k)
    assert (call.saved[2].reshape(2, 2)[0] == 0).all()
    np.testing.assert_array_equal(call.saved[1].reshape(2, 2)[0], 0.5)  # 1 / sqrt(1 + epsilon)
    np.testing.assert_array_equal(call.saved[0].reshape(2, 2)[0], 0)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_what_is_masked_out_may_be_of_any_size(first, k):
    call = Call(first, 1, 6, 1, 2, masked="one", epsilon=0.0)
    call.mask[0] = [True, False, True, False, False, True]
    call.x[0, 1], call.x[0, 3], call.x[0, 4] = [np.nan, np.inf], [3e38, -3e38], [-np.inf, 2.0]
    call.dy[0, 4, 1] = 5
    y = call.forward(k)
    dx, dscale, dbias = call.backward(k)
    clean = np.where(call.mask[:, :, None], call.x, 0)
    clean[0, 4, 1] = 2
    keywords = {"num_groups": 1, "epsilon": 0.0, "mask": call.mask[:, :, None]}
    want = oracle.group_norm(clean, call.scale, call.bias, **keywords)
    ordinary = np.ones(call.x.shape, bool)
    ordinary[0, 3] = False
    close(y[ordinary], want[ordinary])
    assert np.isfinite(y).all()
    assert (np.abs(y[0, 3]) > 1e30).all()
    np.testing.assert_array_equal(np.sign(y[0, 3]), [1, -1])
    # Such elements have no cotangent, but those replaced by 0 have, though no gradient.
    call.dy[0, 3] = 0
    dx, dscale, dbias = call.backward(k)
    want = oracle.group_norm_gradients(clean, call.dy, call.scale, call.bias, **keywords)
    finite = np.isfinite(call.x)
    assert not dx[~finite].any()
    close(dx[finite], want.x[finite])
    close(dscale[0], want.scale)
    close(dbias[0], want.bias)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_constant_data(first, k):
    """The mean is exactly the value, so y is exactly the bias; without an epsilon too."""
    for masked in (None, "each"):
        call = Call(first, 1, 20, 2, 2, epsilon=0.0, masked=masked)
        call.x[...] = F(0.1)
        y = call.forward(k)
        np.testing.assert_array_equal(y, np.broadcast_to(call.bias, y.shape))
        np.testing.assert_array_equal(call.saved[0], F(0.1))
        np.testing.assert_array_equal(call.saved[1], 1.0)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_nan_stays_nan(first, k):
    call = Call(first, 1, 20, 2, 2)
    call.x[0, 3, 0] = np.nan
    y = call.forward(k)
    assert np.isnan(y[..., :2]).all()
    assert np.isfinite(y[..., 2:]).all()


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("masked", [None, "each"])
def test_statistics_far_from_zero(masked, first, k):
    """Means and variances are of float64 accuracy: squares of means would not be."""
    call = Call(first, 2, 12, 2, 2, masked=masked, epsilon=0.0)
    call.x = (2.0**23 + np.floor(9 * np.random.default_rng(0).random(call.x.shape))).astype(F)
    call.forward(k)
    for i in range(4):
        valid = slice(None) if masked is None else call.mask[i // 2]
        values = call.x[i // 2][valid][:, i % 2 * 2 : i % 2 * 2 + 2].astype(np.float64)
        np.testing.assert_allclose(call.saved[0][i], values.mean(), rtol=1e-15)
        np.testing.assert_allclose(call.saved[1][i], 1 / values.std(), rtol=1e-6)


# The second look at a block or chunk -------------------------------------------------------------


class Counted:
    """A function, and how often it was called."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.function(*arguments)


def looks(k, monkeypatch, first, blocks, masked=False):
    """Return how often blocks of equal lengths, one channel, are summed; check the statistics."""
    module = k.channels_first if first else k.channels_last
    name = ("_masked_moments" if masked else "_moments") if first else "_take_moments"
    counted = Counted(getattr(module, name))
    monkeypatch.setattr(module, name, counted)
    n = len(blocks[0])
    if first:
        monkeypatch.setattr(module, "BLOCK", n)
        monkeypatch.setattr(module, "SAMPLE", n)
    call = Call(first, 1, n * len(blocks), 1, 1, rows=n, band=1, masked="one" if masked else None)
    if masked:
        call.mask[...] = True
    call.x[0, :, 0] = np.concatenate(blocks)
    call.forward(k)
    wide = call.x.astype(np.float64)
    assert abs(call.saved[0][0] / wide.mean() - 1) < 1e-6
    assert abs(call.saved[1][0] * np.sqrt(wide.var() + 1e-6) - 1) < 1e-6
    monkeypatch.undo()
    return counted.calls


NOISE = np.array([-1, 1, -1, 1, 1, -1, -1, 1, 1, -1.0])


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_blocks_near_the_last_mean_are_read_once(first, k, monkeypatch):
    """The mean drifts by one standard deviation per block, and the centre follows."""
    assert looks(k, monkeypatch, first, [50 + i + NOISE for i in range(8)]) == 8


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_blocks_far_from_their_centre_are_read_again(first, k, monkeypatch):
    """A block is 10,000 standard deviations from the one before, or from its own first rows."""
    if first:
        blocks = [1e4 * (i + 1) + NOISE for i in range(4)]
        assert looks(k, monkeypatch, first, blocks) == 7
        return
    block = 1e4 + np.tile(NOISE, 10)
    block[:8] -= 1e4
    assert looks(k, monkeypatch, first, [block, 1e4 + np.tile(NOISE, 10), block]) == 5


def test_masked_blocks_far_from_their_centre_are_read_again(k, monkeypatch):
    """The first block is always read about one of its elements, and again about its mean."""
    assert looks(k, monkeypatch, True, [50 + i + NOISE for i in range(8)], masked=True) == 10
    far = [1e4 * (i + 1) + NOISE for i in range(4)]
    assert looks(k, monkeypatch, True, far, masked=True) == 12


def test_an_outlier_in_front_is_no_centre(k, monkeypatch):
    """The first centre is the mean of a sample."""
    block = np.tile(NOISE, 8)
    block[0] = 20
    counted = Counted(k.channels_first._moments)
    monkeypatch.setattr(k.channels_first, "_moments", counted)
    k.channels_first._measure(block.astype(F), 0, 80)
    assert counted.calls == 1


@pytest.mark.parametrize(("channels", "band", "taken"), [(1, 1, 8), (2, 2, 8), (1, 4, 16)])
def test_the_sample_of_a_chunk(channels, band, taken, k):
    """The mean of at least eight rows and four bands."""
    x = np.random.default_rng(0).normal(size=(40, channels)).astype(F)
    width = band * channels
    starts = np.arange(0, 40 * channels, width)
    base, total = np.full(width, np.nan, F), np.full(width, np.nan, F)
    k.channels_last._sample_mean(
        x.reshape(-1), 0, starts, 40 // band, 0, channels, base, total, np.full(channels, np.nan)
    )
    close(base.reshape(band, channels), np.tile(x[:taken].mean(0), (band, 1)), 1e-6)


# Steps --------------------------------------------------------------------------------------------


def test_masks_of_one_or_all_samples(k):
    begins = k.moments.mask_begins
    assert begins(None, 2, 5) == 0
    assert begins(np.ones(5), 2, 5) == 0
    assert begins(np.ones(15), 2, 5) == 10


def test_a_centre_is_poor_from_two_standard_deviations_on(k):
    for distance, poor in ((1.99, False), (-1.99, False), (2.01, True), (-2.01, True), (0, False)):
        n, sigma = 12, 3.0
        d = distance * sigma
        assert k.moments.centre_is_poor(n * d, d, n * (d * d + sigma**2)) == poor
    assert not k.moments.centre_is_poor(2.0, 2.0, 5.0)
    assert not k.moments.centre_is_poor(0.0, 0.0, 0.0)


def test_merging_blocks(k):
    rng = np.random.default_rng(0)
    parts = [rng.normal(i, 1 + i, size=3 + i) for i in range(4)]
    count, mean, m2 = 0.0, 0.0, 0.0
    for part in parts:
        d = part - 1.5
        count, mean, m2 = k.moments.merged(
            count, mean, m2, float(len(part)), 1.5, d.sum(), (d * d).sum()
        )
    every = np.concatenate(parts)
    assert count == every.size
    np.testing.assert_allclose([mean, m2], [every.mean(), every.size * every.var()], rtol=1e-14)
    # Rounding left a negative sum of squares; NaN is no such thing.
    assert k.moments.merged(4.0, 1.0, 2.0, 4.0, 1.0, 2.0, 0.5) == (8.0, 1.25, 2.5)
    assert k.moments.merged(4.0, 1.0, 2.0, 4.0, 1.0, 2.0, 1.0) == (8.0, 1.25, 2.5)
    assert math.isnan(k.moments.merged(4.0, 1.0, 2.0, 4.0, 1.0, 2.0, math.nan)[2])


@pytest.mark.parametrize("of_rows", [None, True, False])
def test_the_fallback_in_float64(of_rows, k):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=40) * 1e30 + 1e31).astype(F)
    rows = x[3:].reshape(-1)[: 5 * 7].reshape(5, 7)[:, :4]
    mask, valid = None, np.ones((5, 4), bool)
    if of_rows is not None:
        mask = np.array([9, 9, 0, 0, 1, 0, 1, 1])[: 7 if of_rows else 6]
        valid = (mask[2:, None] if of_rows else mask[None, 2:]) * np.ones((5, 4)) > 0
    count, mean, variance = k.moments.in_float64(x, 3, 5, 7, 4, mask, 2, bool(of_rows))
    values = rows[valid].astype(np.float64)
    assert count == values.size
    np.testing.assert_allclose([mean, variance], [values.mean(), values.var()], rtol=1e-14)
    same = np.full(8, F(0.1) * F(1e30))
    assert k.moments.in_float64(same, 0, 1, 0, 8, None, 0, False) == (8.0, np.float64(same[0]), 0.0)
    same[3] = np.nan
    assert math.isnan(k.moments.in_float64(same, 0, 1, 0, 8, None, 0, False)[2])


def test_the_inverse_deviation_is_finite(k):
    inverse = k.moments.inverse_deviation
    assert inverse(3.0, 1.0) == 0.5
    assert inverse(0.0, 0.0) == 1
    assert inverse(2.0**-252, 0.0) == 2.0**126
    assert inverse(2.0**-252 * 0.999, 0.0) == 1
    assert math.isnan(inverse(math.nan, 1.0))


def test_factors_are_finite(k):
    finite = k.moments.finite_float32
    assert [finite(v) for v in (1e39, -1e39, math.inf)] == [F(3e38), F(-3e38), F(3e38)]
    assert [finite(v) for v in (2e38, -2e38, 0.1)] == [F(2e38), F(-2e38), F(0.1)]
    assert finite(3.2e38) == F(3e38)
    assert math.isnan(finite(math.nan))


@pytest.mark.parametrize(
    ("samples", "batches", "span"), [(1, 1, 1), (7, 1, 3), (12, 3, 4), (10, 2, 3)]
)
def test_spans_have_every_sample_once(samples, batches, span, k):
    each = samples // batches
    spans = -(-each // span)
    found = [k.moments.samples_of(n, span, samples, batches) for n in range(batches * spans)]
    assert [i for begin, end in found for i in range(begin, end)] == list(range(samples))
    assert all(begin // each == (end - 1) // each for begin, end in found)
    assert all(end - begin == span or end % each == 0 for begin, end in found)


def test_limits_of_masked_out_deviations(k):
    limit = k.moments.invalid_limit
    assert limit(F(0)) == limit(F(1)) == limit(F(-0.5)) == F(5e33)
    assert limit(F(1e10)) == limit(F(-1e10)) == F(1e28)
    assert limit(F(1.9e4)) == F(5e33)
    assert limit(F(2.1e4)) == F(1e38 / 2.1e4)


def test_sums_of_spans(k):
    sums = np.random.default_rng(0).normal(size=(2, 3, 2, 4))  # kind, batch, span, channel
    dscale, dbias = np.full((2, 12), np.nan, F)
    k.moments.sum_spans(sums.reshape(-1), 3, 4, dscale, dbias)
    close(np.stack([dbias, dscale]).reshape(2, 3, 4), sums.sum(2), 1e-6)


def test_values_that_are_masked_out(k):
    clamp, deviation = k.elements.clamp_masked, k.elements.invalid_deviation
    values = np.array([2, -2, 1e36, -1e36, np.nan, np.inf, -np.inf], F)
    assert [clamp(v) for v in values] == [2, -2, F(5e33), F(-5e33), 0, 0, 0]
    got = [deviation(v, F(1.5), F(10)) for v in values]
    assert got == [0.5, -3.5, 10, -10, -1.5, -1.5, -1.5]
    bounded = k.elements.bounded
    assert [bounded(F(v), F(3)) for v in (2, 3, 4, -2, -4)] == [2, 3, 3, -2, -3]
    assert np.isnan(bounded(F(np.nan), F(3)))


def test_exp(k):
    x = np.linspace(-87, 87, 999).astype(F)
    got = np.array([k.elements._exp(v) for v in x], np.float64)
    want = np.exp(x.astype(np.float64))
    # 9e-8 instead of 3e-8: without fused multiply-add one more product of x's size is rounded.
    assert (np.abs(got / want - 1) <= 1.2e-7 + np.abs(x) * 9e-8).all()
    assert k.elements._exp(F(-1e4)) == k.elements._exp(F(-87))
    assert k.elements._exp(F(1e4)) == k.elements._exp(F(87))


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu"])
def test_activations(activation, k):
    z = np.concatenate([np.linspace(-9, 9, 499), [0, -30, 30, 85]]).astype(F)
    kind, wide = ACTIVATIONS[activation], z.astype(np.float64)
    got = np.array([k.elements.activated(v, kind) for v in z])
    assert (np.abs(got - activated(wide, activation)) <= 4e-7 * np.maximum(1, np.abs(wide))).all()
    got = np.array([k.elements.activation_vjp(v, F(2), kind) for v in z])
    assert (np.abs(got / 2 - derivative(wide, activation)) <= 6e-7).all()
    for far, value, slope in ((1e30, 1e30, 1), (np.inf, np.inf, 1), (-1e30, 0, 0), (-np.inf, 0, 0)):
        got = k.elements.activated(F(far), kind)
        assert got == F(value) or abs(got - value) < 2e-36
        assert abs(k.elements.activation_vjp(F(far), F(2), kind) - 2 * slope) < 1e-34
    assert np.isnan(k.elements.activated(F(np.nan), kind))


@pytest.mark.parametrize(("parts", "tasks"), [(1, 1), (1, 5), (3, 7), (4, 2), (3, 9)])
def test_threads_claim_every_task_once(parts, tasks, k):
    counters = np.zeros(8 * (3 + parts), np.int64)
    work = k.work_sharing
    assert [work.claim_part(counters, 0, parts) for _ in range(parts + 1)] == [*range(parts), 0]
    own = tasks * (parts - 1) // parts
    claimed = [work.claim_task(counters, 3, parts, tasks, parts - 1) for _ in range(tasks)]
    assert claimed == [*range(own, tasks), *range(own)]
    assert [work.claim_task(counters, 3, parts, tasks, p) for p in range(parts)] == [-1] * parts
    assert not counters[8 : 3 * 8].any()
    assert [work.finish(counters, 1, n) for n in (1, 2)] == [1, 3]
    work.wait(counters, 1, 3)
    with pytest.raises(AssertionError, match="waits for other threads"):
        work.wait(counters, 1, 4)


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("masked", [None, "each"])
@pytest.mark.parametrize("size", [1e-14, 0.1, 1e14])
def test_ordinary_variances_need_no_float64(size, masked, first, k, monkeypatch):
    for module in (k.channels_first, k.channels_last):
        monkeypatch.setattr(module, "in_float64", None)
    call = Call(first, 1, 12, 1, 2, masked=masked)
    call.x *= F(size)
    assert np.isfinite(call.forward(k)).all()
