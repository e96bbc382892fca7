"""The GPU kernels, compiled without a GPU: no register spills, and 16-byte memory accesses."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from tests import ROOT

triton = pytest.importorskip("triton", reason="the GPU kernels need triton")
SPILLS = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8),
    reason="Triton before 3.8 puts a few bytes of some kernels on the stack",
)
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled"
)

from groupnorm.backends.kernels.gpu.build import build  # noqa: E402 - it imports the kernels

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
    given = dict.fromkeys(("x", "y", "dy", "dx"), dtype) | {"mask": "uint8"}
    given |= dict.fromkeys(("scale", "bias"), parameter)
    return tuple(given.get(name, "float32") for name in step.arrays)


def compiled(step, dtype, capability, aligned=True, parameter="float32", fixed=False):
    types = dtypes(step, dtype, parameter)
    return build(step, types, (aligned,) * len(types), capability, fixed)[0]


@pytest.fixture
def sass(monkeypatch):
    """The benchmarks' module that reads machine code."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("_sass")


def widths(ptx: str, kind: str) -> set[int]:
    """Return the widths, in bytes, of all global memory accesses."""
    found = re.findall(rf"{kind}\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\s", ptx)
    return {int(count or 1) * int(bits) // 8 for count, bits in found}


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *((name, 90) for name in FORMS),
        *((name, capability) for capability in (80, 100) for name in ("UNet", "ResNet", "VAE")),
    ],
)
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_no_spills_and_wide_memory_accesses(name, first, capability, sass):
    form = GroupedShape(*FORMS[name], first, 2)
    for step in steps(form):
        built = compiled(step, "bfloat16", capability)
        used = sass.resources(built.cubin_path)
        assert used["LOCAL"] == 0
        # Outside of loops, a few registers may be put aside.
        assert used["STACK"] <= (0 if step.module == "small" else 16), (step.kernel, used)
        spills = sass.spills_in_loops(built.cubin_path)
        # Triton 3.6 has ptxas put aside one constant of a loop for compute capability 8.0, with 72
        # registers in use.
        assert [s.split()[0] for s in spills] in ([], *([["LDL"]] if capability == 80 else []))
        assert used["REG"] <= (255 if step.module == "small" else 128)  # 4 blocks of 4 warps
        assert built.threads == 32 * step.warps
        assert built.shared <= 48 * 1024  # a larger size needs an explicit request
        if "x" in step.arrays:
            constants = dict(step.constants)
            lanes = constants.get("TILE_CHANNELS_P2", constants["TILE_CHANNELS"])
            tiles = constants.get("UNROLL", 1) * (2 if "dy" in step.arrays else 1)
            elements = lanes * constants["TILE_POSITIONS"] * tiles
            wide = len(
                re.findall(
                    r"ld\.global\.v4\.b32|cp\.async\.cg\.\S+ \[.*?\], \[.*?\], 0x10", built.ptx
                )
            )
            assert wide * 8 * built.threads >= elements
            # Few single elements are loaded: the first of each group, where deviations start.
            assert built.ptx.count("ld.global.b16") <= 16
        if {"y", "dx"} & set(step.arrays):
            assert max(widths(built.ptx, "st")) == 16


@SPILLS
@pytest.mark.parametrize("positions", [64, 128, 256, 512])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("mask", [None, "each"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_largest_tiles_do_not_spill(dtype, mask, activation, positions, sass):
    asked = gpu.KernelOptions(0.0, activation, mask, True, True)
    for first in (False, True):
        form = GroupedShape(16, 32, 16, positions, first, 4 if dtype == "float32" else 2)
        for step in steps(form, asked):
            if step.module == "small":
                used = sass.resources(compiled(step, dtype, 90).cubin_path)
                assert used["STACK"] == used["LOCAL"] == 0, (step.module, first, used)


def test_unaligned_addresses_use_narrow_accesses():
    form = GroupedShape(16, 32, 8, 256, False, 2)
    for step in steps(form):
        if "x" in step.arrays:
            assert max(widths(compiled(step, "bfloat16", 90, aligned=False).ptx, "ld")) <= 8


def test_odd_numbers_of_positions_compile(sass):
    for step in steps(GroupedShape(2, 32, 10, 49, True, 2)):
        used = sass.resources(compiled(step, "bfloat16", 90, parameter="bfloat16").cubin_path)
        assert used["STACK"] == used["LOCAL"] == 0, (step.kernel, used)


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("name", FORMS)
def test_kernels_of_a_sequence_wait_for_the_one_before(name, first):
    """Where launches overlap, each waits before it reads anything; JAX's do not overlap."""
    form = GroupedShape(*FORMS[name], first, 2)
    for plan in (gpu.forward, gpu.backward):
        launches = plan(form, FULL).launches
        for step in launches:
            built, older, fixed = (
                compiled(step, "bfloat16", 90),
                compiled(step, "bfloat16", 80),
                compiled(step, "bfloat16", 90, fixed=True),
            )
            assert built.follows == (len(launches) > 1)
            assert ("griddepcontrol.wait" in built.ptx) == built.follows
            assert ("griddepcontrol.launch_dependents" in built.ptx) == built.follows
            if built.follows:
                reads = built.ptx.index("ld.global")
                assert built.ptx.index("griddepcontrol.wait") < reads
            for other in (older, fixed):
                assert not other.follows
                assert "griddepcontrol" not in other.ptx


def test_scalars_are_arguments_or_constants():
    [step, *_] = steps(GroupedShape(2, 32, 10, 4096, True, 2))
    types = dtypes(step, "bfloat16")
    aligned = (True,) * len(types)
    (free, scalars), (fixed, none) = (build(step, types, aligned, 90, f) for f in (False, True))
    assert [value for _, value in scalars] == [v for _, v in step.scalars if v != 1]
    assert none == ()
    assert free.scratch == fixed.scratch  # parameters that Triton appends to the arguments
    assert len(re.findall(r"\.param \.u64", fixed.ptx)) == len(step.arrays) + fixed.scratch


def test_batch_sizes_share_one_kernel():
    found = set()
    for samples in (8, 24):
        form = GroupedShape(samples, 32, 16, 1 << 14, False, 2)
        for step in gpu.forward(form, FULL).launches:
            if step.kernel == "measure":
                found.add(compiled(step, "bfloat16", 90).cubin_path)
    assert len(found) == 1


# Instructions an element: of statistics, of normalizing with SiLU, of each pass of the gradients.
STATISTICS, NORMALIZING, GRADIENTS = 8, 16, 24
LIMITS = {
    "forward": {"measure": STATISTICS, "apply": NORMALIZING, "group": STATISTICS + NORMALIZING},
    "backward": {"measure": GRADIENTS, "apply": GRADIENTS, "group": 2 * GRADIENTS},
}


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", ["UNet", "UNet, small", "VAE", "video", "ResNet", "few channels"])
def test_memory_is_the_limit(name, direction, first, sass):
    """The instructions that a thread executes, counted, take less time than the memory does."""
    tool = importlib.import_module("gpu_instructions")
    form = GroupedShape(*FORMS[name], first, 2)
    assert FORMS[name] in tool.SHAPES.values()
    found = list(tool.passes(form, getattr(gpu, direction)(form, FULL)))
    for step in found:
        limit = LIMITS[direction][step.kernel]
        if (name, first, direction, step.kernel) == ("UNet, small", False, "forward", "measure"):
            # A slab is 256 positions long there: what threads add up at its end counts for more.
            limit = 10
        assert 1 < step.instructions <= limit, step
    for bandwidth in tool.CARDS.values():
        assert tool.share(form, found, bandwidth) >= 0.95


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
