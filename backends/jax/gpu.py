"""JAX programs for NVIDIA GPUs: the kernels as calls that XLA launches, from PTX or by jax-triton.

XLA's own call for PTX is not public, so a first small program is computed by it and looked at.
Where that fails, jax-triton launches the kernels if it can be imported, and else nothing does: then
the portable code computes. XLA moves less memory for it, forward and backward, than for the passes
that are made for CPUs, or for a backward pass written by hand.
"""

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.backends.jax.xla_passes import Spec
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.build import POINTERS, build, kernel_of
from groupnorm.backends.kernels.gpu.build import why_unavailable as why_no_triton
from groupnorm.backends.kernels.gpu.probe import probe_case, why_too_old
from groupnorm.backends.kernels.grouped_shape import GroupedShape

__all__ = ["missing", "normalize", "pull_back"]

_TARGET = "__gpu$xla.gpu.ptx"
# XLA wants a result behind every pointer that it passes.
_NOTHING = jax.ShapeDtypeStruct((16,), np.uint8)

_log = logging.getLogger("groupnorm")


def missing() -> Unsupported | None:
    """Say what the kernels lack on this machine, if anything."""
    why = why_no_triton()
    if why is not None:
        return why
    found = _launcher()
    return found if isinstance(found, Unsupported) else None


# The computation ----------------------------------------------------------------------------------


def normalize(spec: Spec, saved: Any, x: Any, scale: Any, bias: Any, *mask: Any) -> Any:
    """Return y and what `pull_back` needs, of the shape and dtype of `saved`."""
    arrays = {"x": x, "scale": scale, "bias": bias, "mask": mask[0] if mask else None}
    results = {"y": jax.ShapeDtypeStruct(x.shape, spec.result), "statistics": saved}
    _run(gpu.forward(_grouped(spec, x), _asked(spec, mask)), arrays, results)
    return arrays["y"], arrays["statistics"]


def pull_back(
    spec: Spec, batches: int, dy: Any, x: Any, scale: Any, bias: Any, *rest: Any
) -> tuple[Any, Any, Any]:
    """Return the gradients of x, and of scale and bias for each of the batches."""
    mask, saved = rest[:-1], rest[-1]
    arrays = {"dy": dy, "x": x, "scale": scale, "bias": bias, "mask": mask[0] if mask else None}
    arrays["statistics"] = saved
    parameter = jax.ShapeDtypeStruct((batches, spec.channels), np.dtype(np.float32))
    results = {"dx": jax.ShapeDtypeStruct(x.shape, x.dtype), "dscale": parameter}
    results["dbias"] = parameter
    _run(gpu.backward(_grouped(spec, x), _asked(spec, mask), batches), arrays, results)
    return arrays["dx"], arrays["dscale"], arrays["dbias"]


def _grouped(spec: Spec, x: Any) -> GroupedShape:
    return GroupedShape(
        spec.samples, spec.groups, spec.members, spec.positions, spec.channels_first,
        x.dtype.itemsize,
    )  # fmt: skip


def _asked(spec: Spec, mask: Any) -> gpu.KernelOptions:
    kind = None
    if mask:
        kind = "one" if mask[0].shape[0] == 1 else "each"
    # Without waves: XLA allocates each result for the one call that writes it.
    return gpu.KernelOptions(spec.epsilon, spec.activation, kind, True, True)


def _run(program: gpu.LaunchSequence, arrays: dict[str, Any], results: dict[str, Any]) -> None:
    """Emit the steps' calls, and put what they write into the arrays."""
    for name, elements in program.shared:
        results[name] = jax.ShapeDtypeStruct((elements,), np.dtype(np.float32))
    launch: Any = _launcher()
    for step in program.launches:
        read, written = step.arrays[: -step.written], step.arrays[-step.written :]
        # A pointer that is not used must be one all the same.
        operands = [arrays["x"] if arrays.get(n) is None else arrays[n] for n in read]
        found = launch(step, operands, [results.get(n, _NOTHING) for n in written])
        arrays.update(zip(written, found, strict=True))


# Launchers ----------------------------------------------------------------------------------------

Launcher = Callable[[gpu.Launch, list[Any], list[Any]], Any]


def _by_ptx(step: gpu.Launch, operands: list[Any], results: list[Any]) -> Any:
    dtypes = tuple(_name(a.dtype) for a in (*operands, *results))
    built, _ = build(step, dtypes, (True,) * len(dtypes), _capability(), True)
    x, y, z = (*step.grid, 1, 1)[:3]
    call = jax.ffi.ffi_call(_TARGET, [*results, *(_NOTHING,) * built.scratch])
    found = call(
        *operands, name=built.name, kernel_type="ptx", kernel_data=built.ptx,
        grid_x=np.int32(x), grid_y=np.int32(y), grid_z=np.int32(z),
        block_x=np.int32(built.threads), block_y=np.int32(1), block_z=np.int32(1),
        shared_mem_bytes=np.int32(built.shared),
    )  # fmt: skip
    return found[: len(results)]


def _by_jax_triton(step: gpu.Launch, operands: list[Any], results: list[Any]) -> Any:
    jax_triton: Any = importlib.import_module("jax_triton")
    # It has no name for bytes that are not numbers of its own, and what is saved is of them.
    shown = [jax.ShapeDtypeStruct(r.shape, _plain(r.dtype)) for r in results]
    found = jax_triton.triton_call(
        *(a.view(_plain(a.dtype)) for a in operands), kernel=kernel_of(step.module, step.kernel),
        out_shape=shown, grid=step.grid, num_warps=step.warps,
        compute_capability=_capability(), **dict(step.scalars),
        **dict(step.constants),
    )  # fmt: skip
    return [a.view(r.dtype) for a, r in zip(found, results, strict=True)]


def _name(dtype: Any) -> str:
    """Return what kernels see of a dtype."""
    name: str = jnp.dtype(dtype).name
    return name if name in POINTERS else str(_plain(dtype).name)


def _plain(dtype: Any) -> Any:
    """Return the dtype as kernels see it: bool as bytes, what is saved as float32."""
    seen = {"bool": np.uint8, "uint32": np.float32}.get(jnp.dtype(dtype).name)
    return jnp.dtype(dtype if seen is None else seen)


def _capability() -> int:
    """Return the compute capability of the GPU that programs are compiled for, such as 90."""
    found = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    number = found.replace(".", "")
    return int(number) if number.isdecimal() else 0  # AMD's have names


@lru_cache(maxsize=1)
def _launcher() -> Launcher | Unsupported:
    """Return what launches kernels here: the first that computes the right numbers."""
    if jax.default_backend() != "gpu":
        return Unsupported("these kernels are for GPUs, and JAX's default device is none")
    why = why_too_old(_capability())
    if why is not None:
        return why
    failures = []
    for name, launcher in (("XLA's PTX call", _by_ptx), ("jax-triton", _by_jax_triton)):
        try:
            _try(launcher)
        except Exception as error:  # of XLA, of jax-triton, of a driver
            failures.append(f"{name}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            return launcher
    told = "; ".join(failures)
    _log.warning("groupnorm's kernels cannot be launched by JAX here: %s", told)
    return Unsupported(f"JAX cannot launch the kernels here ({told})")


def _try(launcher: Launcher) -> None:
    """Compute a small array, and look at the result; also while something else is traced."""
    x, program, passed = probe_case()

    def function(x: Any) -> Any:
        arrays = {"x": x, "scale": None, "bias": None, "mask": None}
        (step,) = program.launches
        results = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
        results.append(jax.ShapeDtypeStruct(x.shape, x.dtype))  # for statistics, which are fewer
        operands = [x if arrays.get(n) is None else arrays[n] for n in step.arrays[:-2]]
        return launcher(step, operands, results)[0]

    with jax.ensure_compile_time_eval():
        there = jax.device_put(x, jax.local_devices()[0])  # whatever the default device is
        y = jax.jit(function).lower(there).compile()(there)
    if not passed(np.asarray(y)):
        raise ArithmeticError("a first kernel computed something else")


@contextmanager
def launching(launcher: Launcher, capability: int) -> Iterator[None]:
    """Emit calls for a GPU that need not be here: what tests compile without one."""
    names = ("_launcher", "_capability")
    before = [globals()[name] for name in names]
    globals().update(_launcher=lambda: launcher, _capability=lambda: capability)
    try:
        yield
    finally:
        globals().update(zip(names, before, strict=True))
