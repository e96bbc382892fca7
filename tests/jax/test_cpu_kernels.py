"""JAX on a CPU by the kernels: NumPy's bits, transformations, programs that outlive us."""

from __future__ import annotations

import ctypes
import importlib
import os
import pickle
import re
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

import groupnorm
from groupnorm import group_norm, group_norm_vjp
from groupnorm.adapter import Unsupported
from groupnorm.errors import ArgumentValueError
from tests.rows import GRADIENT, assert_gradient
from tests.xla_frames import HANDLER, Struct

pytestmark = pytest.mark.needs("jax")
pytest.importorskip("groupnorm.backends.kernels.cpu._core", reason="the core is not compiled here")

TARGET = "groupnorm_cpu_1"
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


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", ["first", "last", "no positions", "last, large"])
def test_parameters_of_each_sample(jax, name, masked, rng):
    """One call, with the values and gradients of separate calls; and derivatives of these."""
    x, dy, _, _, keywords = draw(name, rng, masked=masked and name != "no positions")
    mask = keywords.pop("mask", None)
    axis = keywords["feature_axis"]
    scale, bias = rng.normal(size=(2, x.shape[0], x.shape[axis])).astype(np.float32)

    def gradients(x, scale, bias, mask, implementation="fused"):
        def loss(*given):
            y = group_norm(*given, mask=mask, implementation=implementation, **keywords)
            return (y * dy[: x.shape[0]]).sum(), y

        found, y = jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)
        return y, *found

    text = jax.jit(gradients).lower(x, scale, bias, mask).as_text()
    assert text.count(f"@{TARGET}") == 2
    found = gradients(x, scale, bias, mask)
    assert [a.shape for a in found] == [x.shape, x.shape, scale.shape, bias.shape]
    for i in range(x.shape[0]):
        y, pullback = group_norm_vjp(
            jax.numpy.asarray(x[i : i + 1]), scale[i], bias[i],
            mask=None if mask is None else mask[i : i + 1], **keywords,
        )  # fmt: skip
        want = pullback(jax.numpy.asarray(dy[i : i + 1]))
        for got, one in zip(found, (y, *want), strict=True):
            one = np.asarray(one)
            assert_gradient(np.asarray(got[i]), one.reshape(got[i].shape), rtol=GRADIENT)
    if name not in ("first", "last"):  # groups of two elements: gradients of x cancel
        return

    def twice(implementation):
        def loss(*given):
            _, dx, dscale, _ = gradients(*given, mask, implementation)
            return (dx**2).sum() + (dscale**2).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, bias)

    for got, want in zip(twice("fused"), twice("portable"), strict=True):
        assert_gradient(np.asarray(got), np.asarray(want), rtol=GRADIENT)


def test_mapped_parameters_are_one_call(jax, rng):
    x, _, scale, bias, keywords = draw("last", rng)
    mapped = jax.vmap(lambda *given: group_norm(*given, **keywords), (None, 0, None))
    text = jax.jit(mapped).lower(x, batch(scale), bias).as_text()
    assert text.count(f"@{TARGET}") == 1
    assert "while" not in text


@pytest.mark.parametrize("name", ["one row", "a row for one parameter alone"])
def test_rows_that_kernels_do_not_take(jax, name, rng):
    x, _, scale, bias, keywords = draw("last", rng)
    scales = scale[None] if name == "one row" else np.stack([scale] * 3)
    x = jax.numpy.asarray(x[:1] if name == "one row" else x)
    got = group_norm(x, scales, bias, **keywords)
    np.testing.assert_allclose(got, group_norm(x, scale, bias, **keywords), rtol=1e-5, atol=1e-6)


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


STORED = """
import pickle
import sys
import jax
import numpy as np
from jax.experimental import serialize_executable as stored
from groupnorm.backends.jax import cpu
assert cpu.why_unavailable() is None
x = np.random.default_rng(0).normal(size=(2, 8, 50)).astype(np.float32)
with open(sys.argv[1], "rb") as file:
    program, want = pickle.load(file)
call = stored.deserialize_and_load(*program, execution_devices=jax.devices()[:1])
np.testing.assert_array_equal(call(x), want)
"""


def test_a_compiled_program_in_a_process_that_never_traced_it(jax, tmp_path):
    """There is nothing to compile or load but the handler."""
    stored = importlib.import_module("jax.experimental.serialize_executable")
    x = np.random.default_rng(0).normal(size=(2, 8, 50)).astype(np.float32)
    call = jax.jit(lambda x: group_norm(x, num_groups=4, feature_axis=1))
    program = stored.serialize(call.lower(x).compile())
    (tmp_path / "program").write_bytes(pickle.dumps((program, np.asarray(call(x)))))
    done = subprocess.run(
        [sys.executable, "-c", STORED, str(tmp_path / "program")], capture_output=True, text=True,
        timeout=240, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [1, 3])
def test_the_number_of_threads_is_that_of_the_compilation(jax, number, rng):
    before = groupnorm.get_num_threads()
    x, _, scale, bias, keywords = draw("last, large", rng)

    def call(x):
        return group_norm(x, scale, bias, **keywords)

    want = np.asarray(jax.jit(call)(x))
    groupnorm.set_num_threads(number)
    try:
        lowered = jax.jit(lambda x: call(x)).lower(x)
    finally:
        groupnorm.set_num_threads(before)
    (numbers,) = re.findall(r"numbers = dense<\[(.*?)\]>", lowered.as_text())
    assert int(numbers.split(",")[-1]) == number
    np.testing.assert_array_equal(lowered.compile()(x), want)


@pytest.mark.parametrize("name", ["first, large", "last"])
def test_donated_memory(jax, name, rng):
    """The result may lie where x was, which the kernel has read by then: XLA copies it if not."""
    x, _, scale, bias, keywords = draw(name, rng)
    want = group_norm(jax.numpy.asarray(x), scale, bias, **keywords)
    call = jax.jit(lambda x: group_norm(x, scale, bias, **keywords), donate_argnums=0)
    given = jax.numpy.array(x)
    np.testing.assert_array_equal(call(given), want)
    assert given.is_deleted()


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

    def __init__(self, jax, version):
        def handle(address):
            extension = Struct("CallFrame", at=address)["extension_start"]
            metadata = Struct("Metadata", at=Struct("Metadata_Extension", at=extension)["metadata"])
            answer = Struct("Api_Version", at=metadata.address + metadata.fields["api_version"][0])
            answer["major_version"], answer["minor_version"] = version
            return 0

        self.kept = HANDLER(handle)
        self.capsule = jax.ffi.pycapsule(ctypes.cast(self.kept, ctypes.c_void_p).value)

    def core(self):
        """Stand in for `availability.core`."""
        return types.SimpleNamespace(xla_handler=lambda: self.capsule)


KEPT = []  # XLA keeps their addresses


@pytest.fixture
def declare(jax, monkeypatch):
    """Have another handler registered, under a name of its own, that declares this version."""
    kernels = importlib.import_module("groupnorm.backends.jax.cpu")
    availability = importlib.import_module("groupnorm.backends.kernels.cpu.availability")

    def declare(*version):
        KEPT.append(Declaring(jax, version))
        assert availability.why_unavailable() is None  # before there is no core but that handler
        monkeypatch.setattr(availability, "core", KEPT[-1].core)
        monkeypatch.setattr(kernels, "_TARGET", f"{TARGET}_{len(KEPT)}")
        kernels._why_refused.cache_clear()
        return kernels

    yield declare
    monkeypatch.undo()
    kernels._why_refused.cache_clear()


@pytest.mark.parametrize("version", [(0, 0), (0, 99), (1, 0)], ids=["old", "new", "other"])
def test_a_version_that_xla_refuses_is_a_reason(jax, declare, version, rng, caplog):
    x, _, scale, bias, keywords = draw("last", rng)
    want = group_norm(x, scale, bias, **keywords)
    kernels = declare(*version)
    for _ in range(2):
        why = kernels.why_unavailable()
        assert isinstance(why, Unsupported)
        assert kernels._why_refused() == why
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
    assert kernels._why_refused() is None


REFUSED = """
import logging
import sys
import jax
from groupnorm.backends.jax import cpu as jax_kernels
from groupnorm.backends.kernels.cpu import availability
from tests.jax.test_cpu_kernels import Declaring
handler = Declaring(jax, (0, 99))
availability.core = handler.core
logging.basicConfig(stream=sys.stdout, format="%(name)s: %(message)s")
print(jax_kernels._why_refused().reason)
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
    assert "Unknown backend cpu" in kernels._why_refused().reason
