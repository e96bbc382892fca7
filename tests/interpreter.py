"""Triton's interpreter, patched to compute as a GPU does, before the kernels are imported.

Unpatched, it truncates float32 to bfloat16 where a GPU rounds to nearest, ties to even, and it sums
sequentially along the slow axis of a tile where a GPU sums pairwise (in a tree).
"""

from __future__ import annotations

import importlib
import os
import tempfile

import numpy as np

# The interpreter computes with NumPy, which warns about operations that a GPU does not warn about.
WARNINGS = ("invalid value", "divide by zero", "overflow", "All-NaN")


def interpret() -> None:
    """Enable Triton's interpreter, and use the GPU kernels for PyTorch's CPU tensors."""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    # torch.compile's on-disk cache comes from processes that used the CPU kernels.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="groupnorm-inductor-")
    interpreter = importlib.import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(value, from_dtype, to_dtype, mode):
        if (from_dtype.name, to_dtype.name) != ("fp32", "bf16"):
            return convert(value, from_dtype, to_dtype, mode)
        bits = np.ascontiguousarray(value).view(np.uint32)
        nearest = (bits + (0x7FFF + (bits >> 16 & 1)).astype(np.uint32)) >> 16
        return np.where(np.isnan(value), bits >> 16 | 0x40, nearest).astype(np.uint16)

    def summed(reduction, given):
        (given,) = given if isinstance(given, tuple) else (given,)
        data = given.handle.data
        axis = 0 if reduction.axis is None else reduction.axis
        data = np.moveaxis(data.reshape(-1) if reduction.axis is None else data, axis, 0)
        while len(data) > 1:  # a power of two
            data = data[: len(data) // 2] + data[len(data) // 2 :]
        total = data if reduction.keep_dims else data[0]
        if reduction.keep_dims:
            total = np.moveaxis(total, 0, axis)
        return reduction.to_tensor(total, given.dtype)

    interpreter._convert_float = rounded
    interpreter.ReduceOps.sum = summed
    engine = interpreted_engine()
    importlib.import_module("groupnorm.backends.torch.kernels").engine_for = lambda device: engine


def interpreted_engine():
    """Return the GPU engine, for tensors on the CPU."""

    class Interpreted(importlib.import_module("groupnorm.backends.torch.gpu").GpuEngine):
        def why_unavailable(self, device, float16=False):
            return None

        def prepare(self, sequence, dtypes, device):
            torch = importlib.import_module("torch")
            return interpreted(sequence, dtypes, torch.empty, lambda tensor: tensor)

    return Interpreted()


def interpreted(sequence, dtypes, empty, pointer):
    """Prepare launches as the driver's are prepared, of kernels that the interpreter runs."""

    def launch(*arrays):
        x = arrays[0]
        there = dict(zip(dtypes, arrays, strict=True))
        there |= {name: empty(elements) for name, elements in sequence.shared}
        for step in sequence.launches:
            given = (x if (a := there.get(name)) is None else a for name in step.arrays)
            run_pointers(step, map(pointer, given))

    return launch


class Pointer:
    """A NumPy array in the form the interpreter accepts: it needs only an address and a dtype."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        # As the kernels see them: masks as bytes, and words that hold float32 as float32.
        self.dtype = {"bool": "uint8", "uint32": "float32"}.get(array.dtype.name, array.dtype.name)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    # The interpreter copies device memory to the host. This memory is on the host already.
    def untyped_storage(self) -> Pointer:
        return self

    def cpu(self) -> Pointer:
        return self

    def copy_(self, other: Pointer) -> None:
        assert other.data_ptr() == self.data_ptr()

    def new_empty(self, size: int, device: str) -> Pointer:
        return self

    def set_(self, storage: Pointer, offset: int, size: int, stride: int) -> None:
        assert storage.data_ptr() == self.data_ptr()

    def storage_offset(self) -> int:
        return 0

    def size(self) -> int:
        return self.array.size

    def stride(self) -> int:
        return 1


def run(step, arrays) -> None:
    """Run one step on NumPy arrays."""
    run_pointers(step, map(Pointer, arrays))


def run_pointers(step, pointers) -> None:
    """Run one step on what the interpreter takes for pointers, such as tensors."""
    build = importlib.import_module("groupnorm.backends.kernels.gpu.build")
    kernel = build.kernel_of(step.module, step.kernel)
    keywords = {**dict(step.scalars), **dict(step.constants), "num_warps": step.warps}
    kernel[step.grid](*pointers, **keywords)
