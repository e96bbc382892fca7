"""Ahead-of-time compilation of GPU kernels, which needs no GPU or driver.

`driver` launches their cubins for PyTorch and CuPy; JAX takes PTX.

Triton caches compiled kernels on disk, keyed by the kernel's source, constants, types and the GPU's
architecture, so later runs of a program compile nothing.
"""

import importlib
import logging
import os
import re
from functools import lru_cache
from typing import Any, NamedTuple

from groupnorm.adapter import Unsupported
from groupnorm.backends.kernels.gpu.program import Launch

__all__ = ["ALIGNMENT", "FOLLOWS", "POINTERS", "Built", "build", "kernel_of", "why_unavailable"]

_log = logging.getLogger("groupnorm")

_KERNELS = "groupnorm.backends.kernels.gpu.compiled"
# The dtypes that kernels read and write, and Triton's names of pointers to them.
POINTERS = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "uint8": "*u8",
}
# Launches overlap (programmatic dependent launch) on GPUs of this compute capability and higher.
OVERLAPPING = 90
FOLLOWS = "DEPENDENT"  # the constant of kernels that are in sequences of several
ALIGNMENT = 16  # bytes; loads are vectorized only for addresses known to have it


class Built(NamedTuple):
    """A compiled kernel, and what is needed to launch it."""

    name: str
    cubin: bytes
    cubin_path: str  # in Triton's cache, which may be emptied
    ptx: str
    shared: int  # bytes of shared memory
    threads: int
    scratch: int  # null pointers to pass after the arguments
    follows: bool  # whether it waits for the launch before it, and so may begin before that ends


class Signature(NamedTuple):
    """What a kernel is specialized for, by argument."""

    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]  # indices of addresses and integers divisible by 16


@lru_cache(maxsize=1)
def why_unavailable() -> Unsupported | None:
    """Return why GPU kernels are unavailable here; None if they are available. Imports Triton."""
    try:
        importlib.import_module(f"{_KERNELS}.forward")
    except ImportError as error:
        why = (
            f"the kernels for GPUs need triton, which cannot be imported ({error}); "
            'install it with pip install "groupnorm[gpu]", on Linux'
        )
        if isinstance(error, ModuleNotFoundError):  # a choice, of which nobody has to be warned
            return Unsupported(why)
    except Exception as error:
        # Importing a compiler loads libraries and reads the environment, which may raise anything;
        # a private name of it may be missing, or the source files that the cache is keyed by.
        why = f"Triton does not work here: {type(error).__name__}: {error}"
    else:
        return None
    _log.warning("groupnorm uses its portable implementation on GPUs: %s", why)
    return Unsupported(why)


@lru_cache(maxsize=64)
def kernel_of(module: str, name: str) -> Any:
    """Return Triton's object of a kernel; requires that `why_unavailable` returned None."""
    return getattr(importlib.import_module(f"{_KERNELS}.{module}"), name)


def build(
    launch: Launch, dtypes: tuple[str, ...], aligned: tuple[bool, ...], capability: int, fixed: bool
) -> tuple[Built, tuple[tuple[str, int], ...]]:
    """Compile the kernel of a launch; return it with the types and values of its scalars.

    Parameters
    ----------
    launch : Launch
        The kernel's arguments are its arrays, followed by the returned scalars.
    dtypes, aligned : tuple
        For each array, its dtype and whether its address is a multiple of 16 bytes.
    capability : int
        The GPU's compute capability, such as 90.
    fixed : bool
        Whether to compile the scalars as constants; then the arrays are the only arguments.
    """
    overlaps = not fixed and capability >= OVERLAPPING
    signature, arguments = _signature(launch, dtypes, aligned, fixed, overlaps)
    return _compiled(launch.module, launch.kernel, signature, launch.warps, capability), arguments


@lru_cache(maxsize=4096)
def _signature(
    launch: Launch, dtypes: tuple[str, ...], aligned: tuple[bool, ...], fixed: bool, overlaps: bool
) -> tuple[Signature, tuple[tuple[str, int], ...]]:
    loose: tuple[str, ...] = importlib.import_module(f"{_KERNELS}.tiles").UNSPECIALIZED
    constants, scalars = dict(launch.constants), dict(launch.scalars)
    types: dict[str, str] = {}
    divisible = []
    arguments = []
    arrays = iter(zip(dtypes, aligned, strict=True))
    names = kernel_of(launch.module, launch.kernel).arg_names
    if FOLLOWS in names:
        constants[FOLLOWS] = int(overlaps)
    for place, name in enumerate(names):
        if name in scalars and (fixed or (scalars[name] == 1 and name not in loose)):
            constants[name] = scalars[name]  # as Triton itself does with ones
        if name in constants:
            types[name] = "constexpr"
        elif name in scalars:
            types[name] = "i32" if scalars[name] < 2**31 else "i64"
            arguments.append((types[name], scalars[name]))
            if scalars[name] % 16 == 0 and name not in loose:
                divisible.append(place)
        else:
            dtype, is_aligned = next(arrays)
            types[name] = POINTERS[dtype]
            if is_aligned:
                divisible.append(place)
    found = Signature(tuple(types.items()), tuple(constants.items()), tuple(divisible))
    return found, tuple(arguments)


@lru_cache(maxsize=4096)
def _compiled(module: str, name: str, signature: Signature, warps: int, capability: int) -> Built:
    triton: Any = importlib.import_module("triton")
    compiler: Any = importlib.import_module("triton.compiler")
    targets: Any = importlib.import_module("triton.backends.compiler")

    # Importing jax-triton sets this to "", and then Triton has no cache directory.
    if os.environ.get("TRITON_CACHE_DIR") == "":
        del os.environ["TRITON_CACHE_DIR"]
    types = dict(signature.types)
    attributes = {(place,): [["tt.divisibility", ALIGNMENT]] for place in signature.divisible}
    source = compiler.ASTSource(
        kernel_of(module, name), types, dict(signature.constants), attributes
    )
    target = targets.GPUTarget("cuda", capability, 32)
    # The second option is set so that every version of Triton compiles the same.
    options = {"num_warps": warps, "enable_fp_fusion": True}
    made = triton.compile(source, target=target, options=options)
    ptx = made.asm["ptx"]
    arguments = sum(kind != "constexpr" for kind in types.values())
    return Built(
        name=made.metadata.name,
        cubin=made.asm["cubin"],
        cubin_path=next(str(p) for n, p in made.metadata_group.items() if n.endswith(".cubin")),
        ptx=ptx,
        shared=made.metadata.shared,
        threads=32 * made.metadata.num_warps,
        scratch=_parameters(ptx) - arguments,
        follows=dict(signature.constants).get(FOLLOWS) == 1,
    )


def _parameters(ptx: str) -> int:
    """Count the parameters of the only entry point of a PTX module."""
    found = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    return 0 if found is None else found.group(1).count(".param")
