"""Kernels for GPUs compiled ahead: cubins for CuPy, PTX for JAX. This needs no GPU and no driver.

Triton keeps what it compiled on disk, by the kernel's source, its constants, types and the GPU's
architecture, so a program that runs again compiles nothing.
"""

import importlib
import os
import re
from functools import lru_cache
from typing import Any, NamedTuple

from groupnorm.backends.gpu import Step
from groupnorm.implementations import NotServed

__all__ = ["ALIGNMENT", "POINTERS", "Built", "build", "kernel_of", "unavailable"]

# What the kernels read and write, and what Triton calls it.
POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "uint8": "*u8",
}
ALIGNMENT = 16  # bytes; elements are read together only if their address is known to be so


class Built(NamedTuple):
    """A kernel, and what launching it takes."""

    name: str
    cubin_path: str  # in Triton's cache
    ptx: str
    shared: int  # bytes of shared memory
    threads: int
    scratch: int  # pointers behind the arguments, which are null
    scalars: tuple[tuple[str, int], ...]  # arguments behind the arrays: type and value


@lru_cache(maxsize=1)
def unavailable() -> NotServed | None:
    """Say why there are no kernels for GPUs here, if so. This imports Triton."""
    try:
        importlib.import_module("groupnorm.backends.kernels.triton_forward")
    except ImportError as error:
        return NotServed(
            f"the kernels for GPUs need triton, which cannot be imported ({error}); "
            'pip install "groupnorm[gpu]" brings it, on Linux'
        )
    except Exception as error:
        return NotServed(f"Triton does not work here: {type(error).__name__}: {error}")
    return None


@lru_cache(maxsize=64)
def kernel_of(module: str, name: str) -> Any:
    """Return a kernel as Triton has it, where `unavailable` says nothing."""
    return getattr(importlib.import_module(f"groupnorm.backends.kernels.{module}"), name)


@lru_cache(maxsize=1024)
def build(
    step: Step, dtypes: tuple[str, ...], aligned: tuple[bool, ...], capability: int, fixed: bool
) -> Built:
    """Compile the kernel of a step.

    Parameters
    ----------
    step : Step
        Its arrays are the kernel's first arguments.
    dtypes, aligned : tuple
        For each array its dtype, and whether its address is a multiple of 16 bytes.
    capability : int
        Of the GPU, such as 90.
    fixed : bool
        Whether the scalars become constants: then the arrays are the only arguments.
    """
    triton: Any = importlib.import_module("triton")
    compiler: Any = importlib.import_module("triton.compiler")
    targets: Any = importlib.import_module("triton.backends.compiler")

    kernel = kernel_of(step.module, step.kernel)
    constants, scalars = dict(step.constants), dict(step.scalars)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    arguments: list[tuple[str, int]] = []
    types = iter(zip(dtypes, aligned, strict=True))
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in scalars:
            value = scalars[argument]
            # Triton's own launcher makes constants of ones as well.
            if fixed or value == 1:
                signature[argument] = "constexpr"
                constants[argument] = value
                continue
            signature[argument] = "i32" if value < 2**31 else "i64"
            arguments.append((signature[argument], value))
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            dtype, is_aligned = next(types)
            signature[argument] = POINTERS[dtype]
            if is_aligned:
                attributes[(place,)] = [["tt.divisibility", ALIGNMENT]]
    # Importing jax-triton empties this, and then Triton has nowhere to keep what it compiles.
    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
    source = compiler.ASTSource(kernel, signature, constants, attributes)
    target = targets.GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options={"num_warps": step.warps})
    ptx = made.asm["ptx"]
    return Built(
        name=made.metadata.name,
        cubin_path=next(str(p) for n, p in made.metadata_group.items() if n.endswith(".cubin")),
        ptx=ptx,
        shared=made.metadata.shared,
        threads=32 * made.metadata.num_warps,
        scratch=_parameters(ptx) - len(dtypes) - len(arguments),
        scalars=tuple(arguments),
    )


def _parameters(ptx: str) -> int:
    """Count the parameters of the one entry of a PTX module."""
    found = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    return 0 if found is None else found.group(1).count(".param")
