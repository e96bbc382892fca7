"""The GPU kernels, compiled without a GPU: no register spills, and 16-byte memory accesses."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.grouped_shape import GroupedShape

triton = pytest.importorskip("triton", reason="the GPU kernels need triton")
SPILLS = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="Triton before 3.8 puts a few bytes of some kernels on the stack",
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

from groupnorm.backends.kernels.gpu.build import build  # noqa: E402 - it imports the kernels

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Groups for every kind of plan, including D=10, whose rows are aligned in bundles of four.
FORMS = {
    "UNet": (16, 32, 10, 4096),
    "UNet, small": (16, 32, 40, 256),
    "VAE": (1, 32, 16, 65536),
    "video": (1, 32, 4, 20 * 65536),
    "ResNet": (32, 32, 8, 3136),
    "few channels": (256, 32, 2, 12544),
    "one group": (4, 1, 1280, 1024),
}
FULL = gpu.KernelOptions(1e-6, "silu", None, True, True)


def steps(form: GroupedShape, asked: gpu.KernelOptions = FULL) -> list[gpu.Launch]:
    """Return one step of each kernel."""
    every = (*gpu.forward(form, asked).launches, *gpu.backward(form, asked).launches)
    return list({(step.module, step.kernel): step for step in every}.values())


def dtypes(step: gpu.Launch, dtype: str, parameter: str = "float32") -> tuple[str, ...]:
    given = dict.fromkeys(("x", "y", "dy", "dx", ""), dtype) | {"mask": "uint8"}
    given |= dict.fromkeys(("scale", "bias"), parameter)
    return tuple(given.get(name, "float32") for name in step.arrays)


def compiled(step, dtype, capability, aligned=True, parameter="float32", fixed=False):
    types = dtypes(step, dtype, parameter)
    return build(step, types, (aligned,) * len(types), capability, fixed)[0]


def resources(built) -> dict[str, int]:
    command = [BINARIES / "cuobjdump", "--dump-resource-usage", built.cubin_path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", text)}


def widths(ptx: str, kind: str) -> set[int]:
    """Return the widths, in bytes, of all global memory accesses."""
    found = re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90, 100])
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("name", FORMS)
def test_no_spills_and_wide_memory_accesses(name, first, capability):
    form = GroupedShape(*FORMS[name], first, 2)
    for step in steps(form):
        built = compiled(step, "bfloat16", capability)
        used = resources(built)
        assert used["STACK"] == used["LOCAL"] == 0, (step.kernel, used)
        assert used["REG"] <= 255
        assert built.threads == 32 * step.warps
        assert built.shared <= 48 * 1024  # a larger size needs an explicit request
        if "x" in step.arrays:
            constants = dict(step.constants)
            elements = (
                constants["TILE_CHANNELS_P2"]
                * constants["TILE_POSITIONS"]
                * (2 if "dy" in step.arrays else 1)
            )
            assert built.ptx.count("ld.global.v4.b32") * 8 * built.threads >= elements
            # Few single elements are loaded: the first of each group, where deviations start.
            assert built.ptx.count("ld.global.b16") <= 16
        if {"y", "dx"} & set(step.arrays):
            assert max(widths(built.ptx, "st")) == 16


@SPILLS
@pytest.mark.parametrize("positions", [512, 1024, 2048])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("mask", [None, "each"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_largest_groups_do_not_spill(dtype, mask, activation, positions):
    asked = gpu.KernelOptions(0.0, activation, mask, True, True)
    for first in (False, True):
        form = GroupedShape(16, 32, 16, positions, first, 4 if dtype == "float32" else 2)
        for step in steps(form, asked):
            if step.kernel == "whole":
                used = resources(compiled(step, dtype, 90))
                assert used["STACK"] == used["LOCAL"] == 0, (step.module, first, used)


def test_unaligned_addresses_use_narrow_accesses():
    form = GroupedShape(16, 32, 8, 256, False, 2)
    for step in steps(form):
        if "x" in step.arrays:
            assert max(widths(compiled(step, "bfloat16", 90, aligned=False).ptx, "ld")) <= 8


def test_odd_numbers_of_positions_compile():
    for step in steps(GroupedShape(2, 32, 10, 49, True, 2)):
        used = resources(compiled(step, "bfloat16", 90, parameter="bfloat16"))
        assert used["STACK"] == used["LOCAL"] == 0, (step.kernel, used)


def test_scalars_are_arguments_or_constants():
    [step, *_] = steps(GroupedShape(2, 32, 10, 4096, True, 2))
    types = dtypes(step, "bfloat16")
    aligned = (True,) * len(types)
    (free, scalars), (fixed, none) = (build(step, types, aligned, 90, f) for f in (False, True))
    assert [value for _, value in scalars] == [v for _, v in step.scalars if v != 1]
    assert none == ()
    assert free.scratch == fixed.scratch  # parameters that Triton appends to the arguments
    assert len(re.findall(r"\.param \.u64", fixed.ptx)) == len(step.arrays) + fixed.scratch


def test_waves_and_batch_sizes_share_one_kernel():
    asked = FULL._replace(waves=True)
    found = set()
    for samples in (8, 24):
        for step in gpu.forward(GroupedShape(samples, 32, 16, 1 << 14, False, 2), asked).launches:
            if step.kernel == "measure":
                found.add(compiled(step, "bfloat16", 90).cubin_path)
    assert len(found) == 1


def test_the_program_does_not_depend_on_the_number_of_multiprocessors():
    """The same steps for every GPU: its number of multiprocessors is not queried."""
    form = GroupedShape(16, 32, 10, 4096, False, 2)
    assert gpu.forward(form, FULL) == gpu.forward.__wrapped__(form, FULL)
    sources = list(Path(gpu.__file__).parent.glob("*.py"))
    assert {"program.py", "tiling.py", "launch.py"} <= {path.name for path in sources}
    for source in (path.read_text() for path in sources):
        assert "multi_processor" not in source
        assert "get_device_properties" not in source


def test_compiles_with_an_empty_triton_cache_dir(monkeypatch):
    """Importing jax-triton sets TRITON_CACHE_DIR to "" for the whole process."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    [step, *_] = steps(GroupedShape(3, 5, 7, 11, True, 4))
    assert compiled(step, "float32", 90).threads == 32
