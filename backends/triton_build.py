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

_KERNELS = "groupnorm.backends.kernels"
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
        importlib.import_module(f"{_KERNELS}.triton_forward")
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
    return getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)


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
    signature, constants, attributes, arguments = _signature(
        step, kernel.arg_names, dtypes, aligned, fixed
    )
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


def _signature(
    step: Step, names: list[str], dtypes: tuple[str, ...], aligned: tuple[bool, ...], fixed: bool
) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any], list[tuple[str, int]]]:
    """Return what Triton is told of a kernel's arguments, and the scalars among them."""
    loose: tuple[str, ...] = importlib.import_module(f"{_KERNELS}.triton_tiles").LOOSE
    constants, scalars = dict(step.constants), dict(step.scalars)
    signature: dict[str, str] = {}
    divisible = []
    arguments = []
    arrays = iter(zip(dtypes, aligned, strict=True))
    for place, name in enumerate(names):
        if name in scalars and (fixed or (scalars[name] == 1 and name not in loose)):
            constants[name] = scalars[name]  # Triton's own launcher makes constants of ones as well
        if name in constants:
            signature[name] = "constexpr"
        elif name in scalars:
            signature[name] = "i32" if scalars[name] < 2**31 else "i64"
            arguments.append((signature[name], scalars[name]))
            if scalars[name] % 16 == 0 and name not in loose:
                divisible.append(place)
        else:
            dtype, is_aligned = next(arrays)
            signature[name] = POINTERS[dtype]
            if is_aligned:
                divisible.append(place)
    attributes: dict[tuple[int, ...], Any] = {
        (place,): [["tt.divisibility", ALIGNMENT]] for place in divisible
    }
    return signature, constants, attributes, arguments


def _parameters(ptx: str) -> int:
    """Count the parameters of the one entry of a PTX module."""
    found = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    return 0 if found is None else found.group(1).count(".param")
