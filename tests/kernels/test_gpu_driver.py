"""Launches of GPU kernels by CUDA's driver: what a stand-in for the driver is asked to launch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from groupnorm import GroupNorm
from groupnorm.backends.kernels.gpu import driver as gpu_driver
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.dispatch import adapter_named
from tests.kernels.stand_in import COMPILER, StandIn, compile_stand_in

triton = pytest.importorskip("triton", reason="the GPU kernels need triton")
pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler for the driver's stand-in"),
    pytest.mark.skipif(sys.platform != "linux", reason="the driver's stand-in is written for ELF"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
    ),
]

SMALL = GroupedShape(2, 2, 8, 16, True, 4)
LARGE = GroupedShape(16, 32, 10, 4096, False, 2)  # several kernels, which share temporary arrays
OPTIONS = gpu.KernelOptions(1e-6, "silu", None, True, True)
PRIMARY = 0x1000  # the stand-in's primary context of device 0


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return StandIn(compile_stand_in(tmp_path_factory.mktemp("driver")))


@pytest.fixture
def stand_in(library, monkeypatch):
    def forget():
        gpu_driver.driver.cache_clear()
        for name in ("torch", "cupy"):
            module = sys.modules.get(f"groupnorm.backends.{name}.gpu")
            if module is not None:
                module._prepared.cache_clear()

    monkeypatch.setattr(gpu_driver, "_LIBRARY", library.path)
    forget()
    library.reset()
    yield library
    library.reset()
    forget()


def prepared(task="forward", shape=SMALL, device=0, options=OPTIONS, change=None):
    """Return a prepared sequence, its plan, and names to addresses of its arrays."""
    sequence = getattr(gpu, task)(shape, options)
    if change is not None:
        sequence = change(sequence)
    item = "float32" if shape.item_bytes == 4 else "bfloat16"
    dtypes = {
        name: item if name in ("x", "y", "dy", "dx", "mask") else "float32"
        for name in gpu_driver.ARRAYS[task]
    }
    addresses = {name: 0x7F0000000000 + 0x10000 * i for i, name in enumerate(dtypes)}
    return gpu_driver.Launches(sequence, dtypes, device), sequence, dtypes, addresses


def called(launches, addresses, stream=0, temporary=0x7E0000000000):
    extra = [temporary] if launches.temporaries else []
    launches(stream, [*addresses.values(), *extra])


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("task", ["forward", "backward"])
def test_kernels_get_their_arguments_in_order(task, shape, stand_in):
    launches, sequence, dtypes, addresses = prepared(task, shape)
    called(launches, addresses, stream=77)
    temporary, offset = {}, 0
    for name, elements in sequence.shared:
        temporary[name] = 0x7E0000000000 + 4 * offset
        assert temporary[name] % 256 == 0
        offset += -(-elements // 64) * 64
    assert launches.temporaries == offset
    assert len(stand_in.launches) == len(sequence.launches)
    where = {**addresses, **temporary}
    attributes: list = []
    for record, launch in zip(stand_in.launches, sequence.launches, strict=True):
        names = [name if name in where else "x" for name in launch.arrays]
        types = tuple(dtypes.get(name, "float32") for name in names)
        built, scalars = gpu_driver.build(launch, types, (True,) * len(types), 90, False)
        want = [(8, where[name]) for name in names]
        want += [(4 if kind == "i32" else 8, value) for kind, value in scalars]
        want += [(8, 0)] * built.scratch
        assert record.arguments == want, launch.kernel
        assert record.name == built.name == launch.kernel
        assert record.grid == (*launch.grid, 1, 1)[:3]
        assert record.block == (built.threads, 1, 1)
        assert (record.shared, record.stream, record.context) == (built.shared, 77, PRIMARY)
        assert record.attributes == attributes
        attributes = [(6, 1)]
        assert record.dynamic_shared == 0


def test_scalars_of_64_bits(stand_in):
    steps = 2**33 + 5

    def enlarge(sequence):
        (launch,) = sequence.launches
        scalars = tuple((n, steps if n == "steps" else v) for n, v in launch.scalars)
        return sequence._replace(launches=(launch._replace(scalars=scalars),))

    launches, _, _, addresses = prepared(change=enlarge)
    called(launches, addresses)
    assert (8, steps) in stand_in.launches[0].arguments


def test_later_calls_use_their_own_addresses_and_stream(stand_in):
    launches, sequence, _, addresses = prepared()
    names = sequence.launches[0].arrays
    for call, stream in enumerate((0, 5, 5, 0)):
        moved = {name: address + 0x100000 * call for name, address in addresses.items()}
        called(launches, moved, stream=stream)
        *_, record = stand_in.launches
        assert record.stream == stream
        assert record.arguments[names.index("y")] == (8, moved["y"])
    assert stand_in.modules == 1
    assert stand_in.called.count("cuDevicePrimaryCtxRetain") == 1


def test_missing_arrays_have_the_address_of_x(stand_in):
    launches, sequence, dtypes, addresses = prepared("forward", LARGE)
    assert "mask" in dtypes  # of the arrays that a call passes; without one it passes x
    del addresses["mask"]
    launches = gpu_driver.Launches(sequence, {n: d for n, d in dtypes.items() if n != "mask"}, 0)
    called(launches, addresses)
    for record, launch in zip(stand_in.launches, sequence.launches, strict=True):
        if "mask" in launch.arrays:
            assert record.arguments[launch.arrays.index("mask")] == (8, addresses["x"])


def test_other_alignments_use_other_kernels(stand_in):
    launches, _, _, addresses = prepared()
    called(launches, addresses)
    assert stand_in.modules == 1
    moved = {**addresses, "x": addresses["x"] + 4}
    for _ in range(2):
        called(launches, moved)
        assert stand_in.modules == 2
    called(launches, addresses)
    assert stand_in.modules == 2
    assert [record.arguments[0][1] for record in stand_in.launches] == [
        given["x"] for given in (addresses, moved, moved, addresses)
    ]


# Devices, contexts, threads -----------------------------------------------------------------------


def test_another_context_is_current_again_afterwards(stand_in):
    for current in (0, PRIMARY, 0xABC):
        stand_in.context = current
        for device in (0, 3):
            launches, _, _, addresses = prepared(device=device)
            called(launches, addresses)
            assert stand_in.launches[-1].context == PRIMARY + device
            assert stand_in.context == current


def test_a_current_context_is_not_pushed(stand_in):
    launches, _, _, addresses = prepared()
    called(launches, addresses)
    before = stand_in.called.count("cuCtxPushCurrent")
    stand_in.context = PRIMARY
    called(launches, addresses)
    assert stand_in.called.count("cuCtxPushCurrent") == before


def test_the_context_is_restored_after_an_error(stand_in):
    launches, _, _, addresses = prepared()
    called(launches, addresses)
    stand_in.fail("cuLaunchKernelEx", 1)
    with pytest.raises(gpu_driver.DriverError):
        called(launches, addresses)
    assert stand_in.context == 0
    stand_in.fail("", 0)
    called(launches, addresses)
    assert len(stand_in.launches) == 2


def test_threads_do_not_mix_their_arguments(stand_in):
    """Each has arrays and a stream of its own; half of them have no context at first."""
    launches, sequence, dtypes, _ = prepared()
    names = sequence.launches[0].arrays
    start = threading.Barrier(8)
    failures = []

    def work(number):
        try:
            if number % 2:
                stand_in.context = PRIMARY
            start.wait()
            for call in range(100):
                base = (number << 40) + (call << 20)
                called(launches, {n: base + 256 * i for i, n in enumerate(dtypes)}, number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(stand_in.launches) == 800
    seen = set()
    for record in stand_in.launches:
        values = [value for _, value in record.arguments[: len(names)]]
        base = values[names.index("x")]
        assert base >> 40 == record.stream
        assert values == [base + 256 * list(dtypes).index(name) for name in names]
        seen.add(base)
    assert len(seen) == 800
    assert 1 <= len(launches._all_aligned.free) <= 8


# The header ---------------------------------------------------------------------------------------

HEADER = """
#include <stddef.h>
#include <cuda.h>
#define SAME(ours, theirs) _Static_assert((ours) == (theirs), #theirs)
"""


def test_structures_and_constants_are_those_of_the_header(tmp_path):
    """Triton brings CUDA's header along."""
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    if not (include / "cuda.h").exists():
        pytest.skip("Triton has no cuda.h here")
    config, attribute = gpu_driver._Config, gpu_driver._Attribute
    fields = {
        ("CUlaunchConfig", "gridDimX"): config.grid, ("CUlaunchConfig", "blockDimX"): config.block,
        ("CUlaunchConfig", "sharedMemBytes"): config.shared,
        ("CUlaunchConfig", "hStream"): config.stream,
        ("CUlaunchConfig", "attrs"): config.attributes,
        ("CUlaunchConfig", "numAttrs"): config.count, ("CUlaunchAttribute", "id"): attribute.id,
        ("CUlaunchAttribute", "value.programmaticStreamSerializationAllowed"): attribute.value,
    }  # fmt: skip
    values = {
        f"offsetof({name}, {field})": ours.offset for (name, field), ours in fields.items()
    } | {
        "sizeof(CUlaunchConfig)": ctypes.sizeof(config),
        "sizeof(CUlaunchAttribute)": ctypes.sizeof(attribute),
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR": gpu_driver._COMPUTE_CAPABILITY[0],
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR": gpu_driver._COMPUTE_CAPABILITY[1],
        "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES": gpu_driver._MAX_DYNAMIC_SHARED,
        "CU_STREAM_CAPTURE_MODE_RELAXED": gpu_driver._CAPTURE_MODE_RELAXED,
        "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION": (
            gpu_driver._PROGRAMMATIC_STREAM_SERIALIZATION
        ),
    }
    source = tmp_path / "header.c"
    source.write_text(HEADER + "".join(f"SAME({n}, {name});\n" for name, n in values.items()))
    command = [COMPILER, "-I", include, "-fsyntax-only", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# What is asked of the driver ----------------------------------------------------------------------


@pytest.mark.parametrize("task", ["forward", "backward"])
def test_launches_overlap_where_kernels_wait(task, stand_in, monkeypatch):
    """All but the first, which follows launches of others; not on GPUs that cannot."""
    for capability in (90, 80):
        monkeypatch.setattr(
            gpu_driver.Driver, "capability", lambda self, device, found=capability: found
        )
        launches, sequence, _, addresses = prepared(task, LARGE)
        before = len(stand_in.launches)
        called(launches, addresses)
        first, *rest = stand_in.launches[before:]
        assert first.attributes == []
        assert len(rest) == len(sequence.launches) - 1 > 1
        want = [(6, 1)] if capability == 90 else []
        assert all(record.attributes == want for record in rest)


def test_much_shared_memory_is_asked_for(stand_in, monkeypatch):
    build = gpu_driver.build

    def hungry(*arguments):
        built, scalars = build(*arguments)
        return built._replace(shared=100_000), scalars

    monkeypatch.setattr(gpu_driver, "build", hungry)
    launches, _, _, addresses = prepared()
    called(launches, addresses)
    [record] = stand_in.launches
    assert record.shared == record.dynamic_shared == 100_000


def test_modules_are_loaded_while_a_stream_is_captured(stand_in):
    """The stand-in refuses it in any but the relaxed mode, which is left afterwards."""
    launches, _, _, addresses = prepared()
    called(launches, addresses)
    assert stand_in.called.count("cuThreadExchangeStreamCaptureMode") == 2


@pytest.mark.parametrize(
    ("function", "code", "told"),
    [
        ("cuLaunchKernelEx", 1, "CUDA_ERROR_INVALID_VALUE: invalid argument"),
        ("cuModuleLoadData", 201, "CUDA_ERROR_INVALID_CONTEXT: invalid device context"),
        ("cuModuleGetFunction", 500, "CUDA_ERROR_NOT_FOUND: named symbol not found"),
        ("cuCtxGetCurrent", 4711, "error 4711: unknown"),
        ("cuInit", 1, "CUDA_ERROR_INVALID_VALUE: invalid argument"),
        ("cuDevicePrimaryCtxRetain", 1, "CUDA_ERROR_INVALID_VALUE: invalid argument"),
        ("cuDeviceGet", 1, "CUDA_ERROR_INVALID_VALUE: invalid argument"),
    ],
)
def test_errors_name_the_function_and_the_reason(function, code, told, stand_in):
    stand_in.fail(function, code)

    def call():
        launches, _, _, addresses = prepared()
        called(launches, addresses)

    with pytest.raises(gpu_driver.DriverError, match=f"^{function}: {told}$"):
        call()
    assert stand_in.launches == []


def test_without_a_driver_the_reason_is_clear(monkeypatch, stand_in):
    monkeypatch.setattr(gpu_driver, "_LIBRARY", "libcuda-which-is-not-there.so.1")
    with pytest.raises(gpu_driver.DriverError, match=r"driver cannot be loaded.*not-there"):
        gpu_driver.driver()


# The libraries ------------------------------------------------------------------------------------


@pytest.fixture
def torch_on_the_stand_in(stand_in, monkeypatch):
    """Have PyTorch's GPU engine compute tensors of the CPU, launching on the stand-in."""
    module = importlib.import_module("groupnorm.backends.torch.gpu")

    class Engine(module.GpuEngine):
        def why_unavailable(self, device):
            return None

        def prepare(self, sequence, dtypes, device):
            return super().prepare(sequence, dtypes, 2)

    engine = Engine()
    kernels = importlib.import_module("groupnorm.backends.torch.kernels")
    monkeypatch.setattr(kernels, "engine_for", lambda device: engine)
    monkeypatch.setattr(module, "current_stream", lambda device: 50 + device)
    return engine


@pytest.mark.needs("torch")
@pytest.mark.parametrize("masked", [False, True])
def test_pytorch_launches_by_the_driver(masked, torch_on_the_stand_in, stand_in):
    torch = importlib.import_module("torch")
    layer = GroupNorm((32, 4, 4), feature_axis=0, num_groups=8, backend="torch", dtype="input")
    layer = layer if masked else GroupNorm((32, ...), feature_axis=0, num_groups=8, backend="torch")
    x = torch.ones(2, 32, 4, 4, requires_grad=True)
    mask = torch.ones(2, 1, 4, 4, dtype=torch.bool) if masked else None
    for _ in range(2):
        y = layer(x, mask)
        (dx,) = torch.autograd.grad(y.sum(), x)
    whole, backward, rows = stand_in.launches[:3]
    assert [record.name for record in stand_in.launches] == [
        "normalize",
        "pull_back",
        "sum_rows",
    ] * 2
    forward = [value for _, value in whole.arguments]
    assert forward[:3] == [x.data_ptr(), layer.weight.data_ptr(), layer.bias.data_ptr()]
    assert (forward[3] == x.data_ptr()) == (not masked)
    assert stand_in.launches[3].arguments[0] == (8, x.data_ptr())
    assert stand_in.launches[4].arguments[6] == (8, dx.data_ptr())
    assert {record.stream for record in stand_in.launches} == {52}
    assert {record.context for record in stand_in.launches} == {PRIMARY + 2}
    # Products and gradients are what one kernel leaves for the next.
    assert [a for _, a in backward.arguments[7:9]] == [a for _, a in rows.arguments[:2]]


class HostArray(np.ndarray):
    """An array of NumPy that stands for one of CuPy on device 1."""

    class device(contextlib.nullcontext):
        id = 1

    device = device()

    @property
    def data(self):
        return type("Memory", (), {"ptr": self.ctypes.data})


class HostArrays:
    """NumPy in CuPy's place, as far as calls of the kernels ask for it."""

    ndarray = HostArray

    class cuda:
        @staticmethod
        def get_current_stream():
            return type("Stream", (), {"ptr": 99})

    @staticmethod
    def empty(shape, dtype):
        return np.empty(shape, dtype).view(HostArray)

    @staticmethod
    def asarray(a):
        return np.asarray(a).view(HostArray)

    ascontiguousarray = asarray


@pytest.mark.needs("cupy")
def test_cupy_launches_by_the_driver(stand_in, monkeypatch):
    module = importlib.import_module("groupnorm.backends.cupy.gpu")
    monkeypatch.setattr(module, "cupy", HostArrays)
    monkeypatch.setattr(module, "why_unavailable", lambda device: None)
    layer = GroupNorm(8, num_groups=2, epsilon=1e-6)
    x, scale, bias = (HostArrays.asarray(np.ones(n, "f")) for n in ((2, 5, 8), 8, 8))
    kernels = module.CupyKernels(adapter_named("numpy"))
    for call in range(2):
        y, pullback = kernels.vjp(x, scale, bias, None, layer._config.options)
        pullback(np.ones_like(y))
        arguments = [address for _, address in stand_in.launches[3 * call].arguments]
        assert (arguments[0], arguments[4]) == (x.ctypes.data, y.ctypes.data)
        assert arguments[3] == x.ctypes.data  # there is no mask
    assert [record.name for record in stand_in.launches] == [
        "normalize",
        "pull_back",
        "sum_rows",
    ] * 2
    assert {record.stream for record in stand_in.launches} == {99}
    assert {record.context for record in stand_in.launches} == {PRIMARY + 1}


@pytest.mark.needs("torch", "cupy")
def test_caches_are_bounded(stand_in):
    for name in ("torch", "cupy"):
        module = importlib.import_module(f"groupnorm.backends.{name}.gpu")
        assert module._prepared.cache_parameters()["maxsize"] == 4096
    launches, _, _, addresses = prepared()
    for _ in range(20):
        called(launches, addresses)
    assert len(launches._all_aligned.free) == 1
    assert launches._variants == {}
