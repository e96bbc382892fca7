"""The kernels for NVIDIA GPUs, as calls that XLA launches: from PTX, or by jax-triton.

XLA's own call for PTX is not public, so it is tried out first with a small program. If that fails,
jax-triton launches the kernels if it can be imported. Without either, the portable implementation
is used as it is: on GPUs XLA moves less memory for it, forward and backward, than for a backward
pass written by hand.
"""

import importlib
import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.backends.jax.internals import mlir
from groupnorm.backends.jax.primitives import (
    Spec,
    normalize_p,
    pull_back_p,
    register_lowering,
    saved_shape,
)
from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.kernels.gpu.build import FOLLOWS, POINTERS, build, kernel_of
from groupnorm.backends.kernels.gpu.build import why_unavailable as why_no_triton
from groupnorm.backends.kernels.gpu.probe import probe_case, why_too_old

__all__ = ["chosen_launcher", "compute_capability", "normalize", "pull_back", "why_unavailable"]

_TARGET = "__gpu$xla.gpu.ptx"
# XLA wants a result behind every pointer that it passes, such as those to scratch memory of Triton.
_NOTHING = jax.ShapeDtypeStruct((16,), np.uint8)

_log = logging.getLogger("groupnorm")


def why_unavailable() -> Unsupported | None:
    """Return why there are no kernels on this machine, or None; a first kernel is tried out."""
    why = why_no_triton()
    if why is not None:
        return why
    found = chosen_launcher()
    return found if isinstance(found, Unsupported) else None


# The computation ----------------------------------------------------------------------------------


def normalize(x: Any, scale: Any, bias: Any, *mask: Any, spec: Spec) -> Any:
    """Return y, and the statistics that `pull_back` needs."""
    saved = jax.ShapeDtypeStruct(saved_shape(spec), np.dtype(np.uint32))
    arrays = {"x": x, "scale": scale, "bias": bias, "mask": mask[0] if mask else None}
    results = {"y": jax.ShapeDtypeStruct(x.shape, spec.result_dtype), "statistics": saved}
    _run(gpu.forward(spec.shape, _options(spec, scale, mask)), arrays, results)
    return arrays["y"], arrays["statistics"]


def pull_back(
    dy: Any, x: Any, scale: Any, bias: Any, *rest: Any, spec: Spec, batches: int
) -> tuple[Any, Any, Any]:
    """Return the gradients of x, and of scale and bias for each of the batches."""
    mask, saved = rest[:-1], rest[-1]
    arrays = {"dy": dy, "x": x, "scale": scale, "bias": bias, "mask": mask[0] if mask else None}
    arrays["statistics"] = saved
    parameter = jax.ShapeDtypeStruct((batches, spec.shape.channels), np.dtype(np.float32))
    results = {"dx": jax.ShapeDtypeStruct(x.shape, x.dtype), "dscale": parameter}
    results["dbias"] = parameter
    _run(gpu.backward(spec.shape, _options(spec, scale, mask), batches), arrays, results)
    return arrays["dx"], arrays["dscale"], arrays["dbias"]


def _options(spec: Spec, scale: Any, mask: Any) -> gpu.KernelOptions:
    kind = None
    if mask:
        kind = "one" if mask[0].shape[0] == 1 else "each"
    options = spec.options
    return gpu.KernelOptions(
        options.epsilon, options.activation, kind, True, True, rows=scale.ndim == 2
    )


def _run(program: gpu.LaunchSequence, arrays: dict[str, Any], results: dict[str, Any]) -> None:
    """Emit the calls of the steps, and put the arrays they write into `arrays`."""
    for name, elements in program.shared:
        results[name] = jax.ShapeDtypeStruct((elements,), np.dtype(np.float32))
    launch: Any = chosen_launcher()
    for step in program.launches:
        read, written = step.arrays[: -step.written], step.arrays[-step.written :]
        # A pointer that is not used must be one all the same.
        operands = [arrays["x"] if arrays.get(n) is None else arrays[n] for n in read]
        found = launch(step, operands, [results[n] for n in written])
        arrays.update(zip(written, found, strict=True))


# Launchers ----------------------------------------------------------------------------------------

Launcher = Callable[[gpu.Launch, list[Any], list[Any]], Any]


def _by_ptx(step: gpu.Launch, operands: list[Any], results: list[Any]) -> Any:
    dtypes = tuple(_name(a.dtype) for a in (*operands, *results))
    built, _ = build(step, dtypes, (True,) * len(dtypes), compute_capability(), True)
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
    # jax-triton has no uint32 pointers, which the saved statistics are.
    shown = [jax.ShapeDtypeStruct(r.shape, _plain(r.dtype)) for r in results]
    kernel = kernel_of(step.module, step.kernel)
    follows = {FOLLOWS: 0} if FOLLOWS in kernel.arg_names else {}  # its defaults are not known
    found = jax_triton.triton_call(
        *(a.view(_plain(a.dtype)) for a in operands), kernel=kernel, out_shape=shown,
        grid=step.grid, num_warps=step.warps,
        compute_capability=compute_capability(), **dict(step.scalars),
        **dict(step.constants), **follows,
    )  # fmt: skip
    return [a.view(r.dtype) for a, r in zip(found, results, strict=True)]


def _name(dtype: Any) -> str:
    """Return the name of a dtype as kernels see it."""
    name: str = jnp.dtype(dtype).name
    return name if name in POINTERS else str(_plain(dtype).name)


def _plain(dtype: Any) -> Any:
    """Return the dtype as kernels see it: bool as bytes, saved statistics as float32."""
    seen = {"bool": np.uint8, "uint32": np.float32}.get(jnp.dtype(dtype).name)
    return jnp.dtype(dtype if seen is None else seen)


def compute_capability() -> int:
    """Return the compute capability of the GPU that programs are compiled for, such as 90."""
    found = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    number = found.replace(".", "")
    return int(number) if number.isdecimal() else 0  # AMD's have names


@lru_cache(maxsize=1)
def chosen_launcher() -> Launcher | Unsupported:
    """Return the function that launches kernels here: the first that computes correctly."""
    if jax.default_backend() != "gpu":
        return Unsupported("the kernels for GPUs need a GPU as JAX's default device")
    why = why_too_old(compute_capability())
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
    """Compute a small array and check the result; also while something else is traced."""
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


# Lowerings ----------------------------------------------------------------------------------------

for _primitive, _function in ((normalize_p, normalize), (pull_back_p, pull_back)):
    register_lowering(
        _primitive,
        "cuda",
        mlir.lower_fun(_function, multiple_results=True),
        lambda: why_unavailable(),
    )
