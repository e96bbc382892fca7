"""JAX on a CPU by the kernels: NumPy's bits, transformations, programs that outlive us."""

from __future__ import annotations

import ctypes
import importlib
import operator
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from groupnorm import group_norm, group_norm_vjp
from groupnorm.adapter import Unsupported
from groupnorm.errors import ArgumentValueError
from tests.rows import GRADIENT, assert_gradient

pytestmark = pytest.mark.needs("jax")
pytest.importorskip("numba", reason="kernels need numba")

TARGET = "groupnorm_cpu_kernel"
# Shape, feature axis; sizes from one thread's to those that threads share in either way.
SHAPES = {
    "first": ((3, 8, 50), 1),
    "last": ((3, 50, 8), -1),
    "no positions": ((5, 8), -1),
    "one sample": ((8,), -1),
    "first, large": ((5, 32, 60, 60), 1),
    "last, large": ((5, 60, 60, 32), -1),
    "last, long": ((1, 40000, 16), -1),
}


@pytest.fixture
def jax(monkeypatch):
    """As in a process with one device; conftest asks for four, and everything lies on the first."""
    module = importlib.import_module("jax")
    if module.default_backend() != "cpu":
        pytest.skip("these kernels are for the CPU backend")
    monkeypatch.setattr(module, "device_count", lambda: 1)
    return module


def draw(name, rng, dtype="float32", masked=False):
    """Return x, dy, scale and bias of NumPy, and the keywords of a call."""
    shape, axis = SHAPES[name]
    x, dy = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    scale, bias = (rng.normal(size=shape[axis]).astype(np.float32) for _ in range(2))
    keywords = {"num_groups": 4, "feature_axis": axis, "activation": "silu"}
    if masked:
        mask_shape = list(shape)
        mask_shape[axis] = 1
        keywords["mask"] = rng.random(mask_shape) < 0.7
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    return x.astype(dtype), dy.astype(dtype), scale, bias, keywords


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_bits_are_those_of_numpy(jax, name, dtype, masked, rng):
    x, dy, scale, bias, keywords = draw(name, rng, dtype, masked)
    if x.ndim == 1 or (masked and x.ndim == 2):
        keywords.pop("mask", None)
    given = [jax.numpy.asarray(a) for a in (x, scale, bias)]
    y, pullback = group_norm_vjp(*given, implementation="fused", **keywords)
    assert TARGET in jax.jit(lambda *a: group_norm(*a, **keywords)).lower(*given).as_text()
    want, pull = group_norm_vjp(x, scale, bias, implementation="fused", **keywords)
    assert y.dtype == want.dtype
    np.testing.assert_array_equal(y, want)
    for got, reference in zip(
        pullback(jax.numpy.asarray(dy)), pull(dy.astype(np.float32)), strict=True
    ):
        assert got.dtype == reference.dtype
        np.testing.assert_array_equal(got, reference)


def batch(a):
    return np.stack([a, 2 * a + 1, 3 - a])


@pytest.mark.parametrize("masks", ["none", "one for all", "of the sample", "batched"])
@pytest.mark.parametrize("parameters", [None, 0], ids=["one scale", "batched scale"])
@pytest.mark.parametrize("name", ["first", "last"])
def test_vmap_equals_a_loop(jax, name, parameters, masks, rng):
    x, dy, scale, bias, keywords = draw(name, rng, masked=masks != "none")
    mask = keywords.pop("mask", None)
    mask_axis = None
    if masks == "one for all":
        mask = mask[:1]
    elif masks == "batched":
        mask, mask_axis = np.stack([mask, ~mask, mask]), 0
    x, dy = np.moveaxis(batch(x), 0, 1), batch(dy)
    if parameters == 0:
        scale, bias = batch(scale), batch(bias)

    def gradients(x, dy, scale, bias, mask):
        def loss(*given):
            return (group_norm(*given, mask=mask, **keywords) * dy).sum()

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    axes = (1, 0, parameters, parameters, mask_axis)
    found = jax.jit(jax.vmap(gradients, axes))(x, dy, scale, bias, mask)
    for i in range(3):
        one = [
            a if axis is None else np.take(a, i, axis)
            for a, axis in zip((x, dy, scale, bias, mask), axes, strict=True)
        ]
        for got, want in zip(found, gradients(*one), strict=True):
            assert_gradient(np.asarray(got[i]), np.asarray(want), rtol=GRADIENT)


def test_a_mapped_x_is_one_call(jax, rng):
    """Not one for each of the batch."""
    x, _, scale, bias, keywords = draw("last", rng)
    mapped = jax.vmap(lambda x: group_norm(x, scale, bias, **keywords))
    text = jax.jit(mapped).lower(batch(x)).as_text()
    assert text.count(f"@{TARGET}") == 1
    assert "while" not in text
    np.testing.assert_array_equal(
        mapped(batch(x)), [group_norm(a, scale, bias, **keywords) for a in batch(x)]
    )


def test_gradient_of_a_map(jax, rng):
    x, dy, scale, bias, keywords = draw("first", rng, masked=True)
    x, dy = map(jax.numpy.asarray, (batch(x), batch(dy)))

    def loss(scale, bias):
        y = jax.vmap(lambda x: group_norm(x, scale, bias, **keywords))(x)
        return (y * dy).sum()

    found = jax.grad(loss, (0, 1))(scale, bias)
    pairs = [
        jax.grad(lambda s, b, i=i: (group_norm(x[i], s, b, **keywords) * dy[i]).sum(), (0, 1))(
            scale, bias
        )
        for i in range(3)
    ]
    for got, want in zip(found, zip(*pairs, strict=True), strict=True):
        assert_gradient(np.asarray(got), sum(map(np.asarray, want)), rtol=GRADIENT)


def test_transposed_twice(jax, rng):
    """The pullback is linear in dy: its transpose is the tangent."""
    x, dy, scale, bias, keywords = draw("last", rng)
    _, pullback = jax.vjp(lambda x: group_norm(x, scale, bias, **keywords), x)
    (found,) = jax.linear_transpose(pullback, dy)((dy,))
    _, want = jax.jvp(lambda x: group_norm(x, scale, bias, **keywords), (x,), (dy,))
    assert_gradient(np.asarray(found), np.asarray(want), rtol=GRADIENT)


def test_without_jit(jax, rng):
    x, _, scale, bias, keywords = draw("last", rng)
    want = group_norm(x, scale, bias, **keywords)
    with jax.disable_jit():
        got = group_norm(jax.numpy.asarray(x), scale, bias, implementation="fused", **keywords)
    np.testing.assert_array_equal(got, want)


def test_exported_programs_call_no_kernel(jax, rng):
    """They are to run where groupnorm is not."""
    export = pytest.importorskip("jax.export")
    x, dy, scale, bias, keywords = draw("last", rng)

    def gradient(x):
        return jax.grad(lambda x: (group_norm(x, scale, bias, **keywords) * dy).sum())(x)

    assert TARGET in jax.jit(gradient).lower(x).as_text()
    exported = export.export(jax.jit(gradient))(x)
    assert TARGET not in exported.mlir_module()
    assert_gradient(np.asarray(exported.call(x)), np.asarray(gradient(x)), rtol=GRADIENT)


def test_a_kernel_that_is_not_loaded_is_an_error(jax, rng):
    """As after a compiled program was loaded by a process that never traced it."""
    xla = importlib.import_module("groupnorm.backends.kernels.cpu.compiled.xla_handler")
    x, _, scale, bias, keywords = draw("first", rng)
    program = jax.jit(lambda x: group_norm(x, scale, bias, **keywords)).lower(x).compile()
    want = np.asarray(program(x))
    table = xla.table()
    kept = list(table)
    table[1:] = [0] * (len(kept) - 1)
    try:
        with pytest.raises(Exception, match="its kernels are not loaded here"):
            program(x).block_until_ready()
    finally:
        table[:] = kept
    np.testing.assert_array_equal(program(x), want)


CACHED = """
import sys
import jax
import numpy as np
from groupnorm import group_norm
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append("cache_hits" in name))
x = np.random.default_rng(0).normal(size=(2, 8, 50)).astype(np.float32)
y = jax.jit(lambda x: group_norm(x, num_groups=4, feature_axis=1))(x)
np.testing.assert_array_equal(y, group_norm(x, num_groups=4, feature_axis=1))
print("hit" if any(hits) else "miss")
"""


def test_programs_kept_on_disk(jax, tmp_path):
    """No address of this process is in them."""
    told = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", CACHED, str(tmp_path)], capture_output=True, text=True,
            timeout=240, check=False, env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.split()[-1])
    assert told == ["miss", "hit"]


@pytest.mark.parametrize("checked", [True, False])
def test_within_a_shard_map_over_one_device(jax, checked, rng):
    """As programs for many devices are run on one; what the types of a checking one say stays."""
    x, dy, scale, bias, keywords = draw("last, large", rng)
    x, dy, scale, bias = map(jax.numpy.asarray, (x, dy, scale, bias))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((1,), ("rows",), axis_types=auto, devices=jax.devices()[:1])
    rows = jax.sharding.PartitionSpec("rows")
    whole = jax.sharding.PartitionSpec()

    def gradients(x, dy, scale, bias):
        def loss(*given):
            return (group_norm(*given, **keywords) * dy).sum()

        return jax.grad(loss, (0, 1, 2))(x, scale, bias)

    mapped = jax.shard_map(
        gradients, mesh=mesh, in_specs=(rows, rows, whole, whole), out_specs=(rows, whole, whole),
        check_vma=checked,
    )  # fmt: skip
    for got, want in zip(
        jax.jit(mapped)(x, dy, scale, bias), gradients(x, dy, scale, bias), strict=True
    ):
        assert_gradient(np.asarray(got), np.asarray(want), rtol=GRADIENT)


@pytest.mark.parametrize("how", ["checkpoint", "scan", "cond"])
def test_within_control_flow(jax, how, rng):
    x, dy, scale, bias, keywords = draw("last", rng)

    def layer(x):
        return group_norm(x, scale, bias, **keywords)

    ways = {
        "checkpoint": jax.checkpoint(layer),
        "scan": lambda x: jax.lax.scan(lambda _, a: (0, layer(a[None])[0]), 0, x)[1],
        "cond": lambda x: jax.lax.cond(x.sum() < 1e9, layer, lambda x: x, x),
    }
    found = jax.jit(jax.grad(lambda x: (ways[how](x) * dy).sum()))(x)
    want = jax.grad(lambda x: (layer(x) * dy).sum())(x)
    assert_gradient(np.asarray(found), np.asarray(want), rtol=GRADIENT)


def test_many_threads_at_once(jax, rng):
    x, _, scale, bias, keywords = draw("last, large", rng)
    call = jax.jit(lambda x: group_norm(x, scale, bias, **keywords))
    want = np.asarray(call(x))
    wrong = []

    def work():
        wrong.extend(not np.array_equal(call(x), want) for _ in range(10))

    workers = [threading.Thread(target=work) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(wrong) == 60
    assert not any(wrong)


# XLA's interface --------------------------------------------------------------------------------


class Declaring:
    """A handler that answers XLA's question for its version, and is never called otherwise."""

    def __init__(self, structs, version):
        def handle(address):
            frame = structs.CallFrame.from_address(address)
            extension = structs.MetadataExtension.from_address(frame.extension_start)
            answer = structs.Metadata.from_address(extension.metadata).api_version
            answer.major_version, answer.minor_version = version
            return 0

        self.kept = HANDLER(handle)
        self.address = ctypes.cast(self.kept, ctypes.c_void_p).value


HANDLER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
KEPT = []  # XLA keeps their addresses


@pytest.fixture
def declare(jax, monkeypatch):
    """Have another handler registered, under a name of its own, that declares this version."""
    kernels = importlib.import_module("groupnorm.backends.jax.cpu")
    structs = importlib.import_module("groupnorm.backends.kernels.cpu.xla_structs")
    xla = importlib.import_module("groupnorm.backends.kernels.cpu.compiled.xla_handler")

    def declare(*version):
        KEPT.append(Declaring(structs, version))
        monkeypatch.setattr(xla, "handler", lambda: (KEPT[-1],))
        monkeypatch.setattr(kernels, "_TARGET", f"{TARGET}_{len(KEPT)}")
        kernels._interface.cache_clear()
        return kernels

    yield declare
    monkeypatch.undo()
    importlib.import_module("groupnorm.backends.jax.cpu")._interface.cache_clear()


@pytest.mark.parametrize("version", [(0, 0), (0, 99), (1, 0)], ids=["old", "new", "other"])
def test_a_version_that_xla_refuses_is_a_reason(jax, declare, version, rng, caplog):
    x, _, scale, bias, keywords = draw("last", rng)
    want = group_norm(x, scale, bias, **keywords)
    kernels = declare(*version)
    for _ in range(2):
        why = kernels.why_unavailable(float16=False)
        assert isinstance(why, Unsupported)
        assert kernels._interface() == why
    assert "version 0.3 of its foreign function interface" in why.reason  # which the real one has
    assert f"API version ({version[0]}.{version[1]})" in why.reason  # as XLA has it
    told = [record for record in caplog.records if record.name == "groupnorm"]
    assert [why.reason in record.getMessage() for record in told] == [True]
    # What was there stays there, and what needs no kernel goes on.
    text = jax.jit(lambda x: group_norm(x, scale, bias, **keywords)).lower(x).as_text()
    assert TARGET not in text
    np.testing.assert_allclose(
        group_norm(jax.numpy.asarray(x), scale, bias, **keywords), want, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ArgumentValueError, match="foreign function interface"):
        group_norm(jax.numpy.asarray(x), scale, bias, implementation="fused", **keywords)


@pytest.mark.parametrize("version", [(0, 3)])
def test_a_version_that_xla_supports(declare, version):
    kernels = declare(*version)
    assert kernels._interface() is None


REFUSED = """
import logging
import sys
import jax
from groupnorm.backends.jax import cpu as jax_kernels
from groupnorm.backends.kernels.cpu import xla_structs
from groupnorm.backends.kernels.cpu.compiled import xla_handler
from tests.jax.test_cpu_kernels import Declaring
handler = Declaring(xla_structs, (0, 99))
xla_handler.handler = lambda: (handler,)
logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s")
print(jax_kernels._interface().reason)
print(jax.numpy.ones(2).sum())
print(jax.devices())
"""


def test_a_refusal_before_jax_has_a_backend(jax):
    """JAX would only queue the handler, and its backend then fail to start."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSED], capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logged, reason, total, devices = done.stdout.splitlines()
    assert logged.startswith("groupnorm: ")
    assert "(0.99)" in reason
    assert reason in logged
    assert total == "2.0"
    assert "CpuDevice" in devices


def test_a_refusal_where_jax_has_no_cpu(jax, declare, monkeypatch):
    """As where JAX_PLATFORMS names a GPU's alone."""

    def devices(*_):
        raise RuntimeError("Unknown backend cpu")

    kernels = declare(0, 3)
    monkeypatch.setattr(jax, "devices", devices)
    assert "Unknown backend cpu" in kernels._interface().reason


# The handler by itself, with frames that XLA does not make today.


class Frame:
    """A frame without arguments, results or attributes, and the interface that errors go to."""

    def __init__(self):
        self.structs = s = importlib.import_module("groupnorm.backends.kernels.cpu.xla_structs")
        self.errors = []
        self.create = HANDLER(self.created)
        self.api = s.Api(
            struct_size=s.end(s.Api.XLA_FFI_ThreadPool_Schedule),
            api_version=s.ApiVersion(struct_size=s.end(s.ApiVersion.minor_version)),
            XLA_FFI_Error_Create=ctypes.cast(self.create, ctypes.c_void_p),
        )
        self.call = s.CallFrame(
            struct_size=s.end(s.CallFrame.attrs),
            api=ctypes.addressof(self.api),
            args=s.Args(struct_size=s.end(s.Args.args)),
            rets=s.Rets(struct_size=s.end(s.Rets.rets)),
            attrs=s.Attrs(struct_size=s.end(s.Attrs.attrs)),
        )

    def created(self, address):
        given = self.structs.ErrorCreateArgs.from_address(address)
        assert given.struct_size == self.structs.end(self.structs.ErrorCreateArgs.errc)
        self.errors.append((given.errc, ctypes.string_at(given.message).decode()))
        return 4711

    def handle(self):
        xla = importlib.import_module("groupnorm.backends.kernels.cpu.compiled.xla_handler")
        return HANDLER(xla.handler()[0].address)(ctypes.addressof(self.call))


GROWN = ["call.args", "call.rets", "api.api_version"]  # others follow them
CUT = ["call", "call.attrs", "api", *GROWN]


@pytest.mark.parametrize(
    ("where", "change"), [(w, -1) for w in CUT] + [(w, 8) for w in GROWN],
)  # fmt: skip
def test_a_frame_of_other_structs_is_refused_not_read(jax, where, change):
    frame = Frame()
    struct = operator.attrgetter(where)(frame)
    struct.struct_size += change
    assert frame.handle() == 4711
    ((code, message),) = frame.errors
    assert code == 9
    assert "does not have the version that the handler was written for" in message


@pytest.mark.parametrize("others", [0, 1, 2])
def test_the_version_that_is_declared(jax, others):
    """Behind extensions of other kinds, or first."""
    frame = Frame()
    s = frame.structs
    metadata = s.Metadata(struct_size=s.end(s.Metadata.api_version))
    base = s.ExtensionBase(type=s.XLA_FFI_Extension_Metadata)
    chain = [s.MetadataExtension(extension_base=base, metadata=ctypes.addressof(metadata))]
    chain += [s.ExtensionBase(type=7, next=ctypes.addressof(chain[-1])) for _ in range(others)]
    for i in range(1, others):
        chain[i + 1].next = ctypes.addressof(chain[i])
    frame.call.extension_start = ctypes.addressof(chain[-1])
    assert frame.handle() == 0
    found = metadata.api_version.major_version, metadata.api_version.minor_version
    assert found == s.API
    assert not frame.errors


def test_a_call_with_an_unknown_extension_is_a_call(jax):
    frame = Frame()
    extension = frame.structs.ExtensionBase(type=7)
    frame.call.extension_start = ctypes.addressof(extension)
    frame.call.struct_size -= 1
    assert frame.handle() == 4711


def test_metadata_without_room_for_a_version(jax):
    frame = Frame()
    s = frame.structs
    metadata = s.Metadata(struct_size=s.end(s.Metadata.api_version) - 1)
    base = s.ExtensionBase(type=s.XLA_FFI_Extension_Metadata)
    extension = s.MetadataExtension(extension_base=base, metadata=ctypes.addressof(metadata))
    frame.call.extension_start = ctypes.addressof(extension)
    assert frame.handle() == 0
    assert metadata.api_version.minor_version == 0
