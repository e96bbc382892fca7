"""The handler that XLA calls, without XLA: frames that fit, and frames that XLA does not make."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.core import without_sanitizers
from tests.portable.test_activation import reference, reference_gradients
from tests.rows import CONTRACT, GRADIENT, assert_close, assert_gradient
from tests.xla_frames import HANDLER, Frame, Struct, capsule_address, constant, declared_version

core = pytest.importorskip(
    "groupnorm.backends.kernels.cpu._core", reason="the core is not compiled here"
)

FORWARD, BACKWARD = 3, 12
STAGES, SAMPLES, GROUPS, SIZE, POSITIONS, CHANNELS_FIRST, ACTIVATION, EPSILON, THREADS = range(9)
N, G, D, P = 4, 2, 3, 5
INVALID, EXHAUSTED, UNKNOWN = (
    constant(f"Error_Code_{name}")
    for name in ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION")
)


def numbers(stages, threads=2):
    epsilon = int(np.float64(1e-5).view(np.int64))
    return [stages, N, G, D, P, 0, 2, epsilon, threads]


class Calls:
    """The arrays of a forward and a backward call, channels last, and their frames."""

    def __init__(self, rng, rows=1, mask_rows=None, batches=1):
        channels = G * D
        self.x, self.dy = rng.normal(size=(2, N, P, channels)).astype(np.float32)
        self.scale, self.bias = rng.normal(size=(2, rows, channels)).astype(np.float32)
        self.mask = None if mask_rows is None else rng.random((mask_rows, P)) < 0.7
        self.y, self.dx = np.full((2, N, P, channels), np.nan, np.float32)
        self.saved = np.zeros((3, N * G, 2), np.uint32)
        self.dscale, self.dbias = np.full((2, batches, channels), np.nan, np.float32)

    def frame(self, stages, threads=2):
        read = [self.x, self.scale, self.bias, *(() if self.mask is None else (self.mask,))]
        if stages == FORWARD:
            return Frame(read, [self.y, self.saved], numbers(stages, threads))
        written = [self.dx, self.dscale, self.dbias]
        return Frame([self.dy, *read, self.saved], written, numbers(stages, threads))

    @property
    def written(self):
        return self.y, self.dx, self.dscale, self.dbias


@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.parametrize("mask_rows", [None, 1, N])
@pytest.mark.parametrize("rows", [1, N])
def test_a_call(rows, mask_rows, batches, rng):
    calls = Calls(rng, rows, mask_rows, batches)
    assert calls.frame(FORWARD).handle() is None
    assert calls.frame(BACKWARD).handle() is None
    scales, biases = (np.broadcast_to(p, (N, G * D)) for p in (calls.scale, calls.bias))
    dscale, dbias = [], []
    for i in range(N):
        mask = None if mask_rows is None else calls.mask[i % mask_rows, :, None][None]
        given = calls.x[i : i + 1], scales[i], biases[i]
        keywords = {"num_groups": G, "epsilon": 1e-5, "activation": "silu", "mask": mask}
        assert_close(calls.y[i : i + 1], reference(*given, **keywords), tolerance=CONTRACT)
        x, scale, bias = reference_gradients(given[0], calls.dy[i : i + 1], *given[1:], **keywords)
        assert_gradient(calls.dx[i : i + 1], x, rtol=GRADIENT)
        dscale.append(scale)
        dbias.append(bias)
    for got, want in ((calls.dscale, dscale), (calls.dbias, dbias)):
        want = np.reshape(want, (batches, N // batches, G * D)).sum(1)
        assert_gradient(got, want, rtol=GRADIENT)


def refused(calls, frame, code, message):
    assert frame.handle() == (code, message)
    assert all(np.isnan(a).all() for a in calls.written)


OUT_OF_RANGE = {
    STAGES: [0, 1, 2, 4, 15, -1],
    SAMPLES: [0, -1, 1 << 62], GROUPS: [0, -2, 1 << 62], SIZE: [0, -3, 1 << 62],
    POSITIONS: [0, -5, 1 << 62],
    CHANNELS_FIRST: [-1, 2], ACTIVATION: [-1, 4, 1 << 32], THREADS: [0, -1, 1 << 31],
}  # fmt: skip


@pytest.mark.parametrize("stages", [FORWARD, BACKWARD])
@pytest.mark.parametrize(("at", "value"), [(a, v) for a, vs in OUT_OF_RANGE.items() for v in vs])
def test_numbers_out_of_range(stages, at, value, rng):
    calls = Calls(rng)
    frame = calls.frame(stages)
    frame.numbers[at] = value
    refused(calls, frame, INVALID, "groupnorm: a number of the call is out of range")


def test_other_attributes(rng):
    calls = Calls(rng)
    message = "groupnorm: a number of the call is out of range"
    for change in (-1, 1):
        frame = calls.frame(FORWARD)
        frame.array["size"] += change
        refused(calls, frame, INVALID, message)
    for field, value in (("dtype", "U32"), ("dtype", "PRED")):
        frame = calls.frame(FORWARD)
        frame.array[field] = constant(f"DataType_{value}")
        refused(calls, frame, INVALID, message)
    frame = calls.frame(FORWARD)
    frame.attribute_type = 3  # a scalar
    refused(calls, frame, INVALID, message)
    for count in (0, 2):
        frame = calls.frame(FORWARD)
        frame.attrs["size"] = count
        refused(calls, frame, INVALID, message)


SIDES = {
    (FORWARD, "arguments"): 4, (FORWARD, "results"): 2,
    (BACKWARD, "arguments"): 6, (BACKWARD, "results"): 3,
}  # fmt: skip
HOW = ["too short", "other dtype", "missing", "one more", "too large"]
MASKS = [(FORWARD, "arguments", 3, "missing"), (BACKWARD, "arguments", 4, "missing")]  # may be
MISFITS = [(*s, i, how) for s, count in SIDES.items() for i in range(count) for how in HOW]
MISFIT = "groupnorm: a buffer does not fit the numbers of the call"


@pytest.mark.parametrize(
    ("stages", "side", "at", "how"), [case for case in MISFITS if case not in MASKS]
)
def test_buffers_that_do_not_fit(stages, side, at, how, rng):
    calls = Calls(rng, mask_rows=N)
    frame = calls.frame(stages)
    buffers = getattr(frame, side)
    if how == "too short":
        buffers[at]["rank"], buffers[at]["dims"] = 1, np.full(1, 2, np.int64)
    elif how == "other dtype":
        buffers[at]["dtype"] = 12  # float64
    elif how == "missing":
        del buffers[at]
    elif how == "one more":
        buffers.insert(at, buffers[at])
    else:
        buffers[at]["rank"], buffers[at]["dims"] = 3, np.full(3, 1 << 31, np.int64)
    refused(calls, frame, INVALID, MISFIT)


def test_dtypes_that_have_no_kernel(rng):
    """dy has x's dtype or float32, dx has x's."""
    half = constant("DataType_F16")
    for side, at in (("arguments", 0), ("arguments", 1), ("results", 0)):
        calls = Calls(rng)
        frame = calls.frame(BACKWARD)
        getattr(frame, side)[at]["dtype"] = half
        refused(calls, frame, INVALID, MISFIT)


def test_rows_of_scale_but_not_of_bias(rng):
    calls = Calls(rng, rows=N)
    calls.bias = calls.bias[:1]
    refused(calls, calls.frame(FORWARD), INVALID, MISFIT)


@pytest.mark.parametrize("batches", [0, 3])
def test_batches_that_do_not_divide_the_samples(batches, rng):
    calls = Calls(rng, batches=batches)
    refused(calls, calls.frame(BACKWARD), INVALID, MISFIT)


@without_sanitizers("asan")
def test_without_memory(rng):
    """Sums of so many samples do not fit into any memory; the buffers are not looked at."""
    calls, samples = Calls(rng), 1 << 50
    frame = calls.frame(BACKWARD)
    frame.numbers[[SAMPLES, GROUPS, SIZE, POSITIONS]] = samples, 1, 1, 64
    for at, elements in enumerate((64 * samples, 64 * samples, 1, 1, 6 * samples)):
        frame.arguments[at]["rank"] = 1
        frame.arguments[at]["dims"] = np.array([elements], np.int64)
    for at, elements in enumerate((64 * samples, 1, 1)):
        frame.results[at]["rank"] = 1
        frame.results[at]["dims"] = np.array([elements], np.int64)
    refused(calls, frame, EXHAUSTED, "groupnorm: there is not enough memory to call a kernel")


NESTED = ["args", "rets", "version"]  # others follow them
CHANGES = [(w, -1) for w in ("call", "attrs", "api", "buffer", *NESTED)] + [(w, 8) for w in NESTED]


@pytest.mark.parametrize(("where", "change"), CHANGES)
def test_a_frame_of_other_structs_is_refused_not_read(where, change, rng):
    calls = Calls(rng)
    frame = calls.frame(FORWARD)
    if where == "version":
        version = Struct("Api_Version")
        version["struct_size"] += change
        frame.api["api_version"] = version
    else:
        struct = frame.arguments[0] if where == "buffer" else getattr(frame, where)
        struct["struct_size"] += change
    refused(
        calls, frame, UNKNOWN,
        "groupnorm: XLA's call frame does not have the version that the handler was written for",
    )  # fmt: skip


def test_longer_structs_are_of_newer_minor_versions(rng):
    calls = Calls(rng)
    frame = calls.frame(FORWARD)
    for struct in (frame.call, frame.attrs, frame.api, frame.arguments[0]):
        struct["struct_size"] += 8
    other = Struct("Extension_Base", type=7)
    frame.call["extension_start"] = other.address
    assert frame.handle() is None
    assert np.isfinite(calls.y).all()


@pytest.mark.parametrize("others", [0, 1, 2])
def test_the_version_that_is_declared(others):
    """Behind extensions of other kinds, or first."""
    extensions = [Struct("Extension_Base", type=7) for _ in range(others)]
    handler = HANDLER(capsule_address(core.xla_handler()))
    assert declared_version(handler, *extensions) == (0, 3)


def test_metadata_without_room_for_a_version():
    metadata = Struct("Metadata")
    metadata["struct_size"] -= 1
    base = Struct("Extension_Base", type=constant("Extension_Metadata"))
    extension = Struct("Metadata_Extension", extension_base=base, metadata=metadata.address)
    handler = HANDLER(capsule_address(core.xla_handler()))
    before = bytes(metadata.memory)
    frame = Struct("CallFrame", extension_start=extension.address)
    assert handler(frame.address) == 0
    assert bytes(metadata.memory) == before
