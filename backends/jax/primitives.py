"""The kernels as primitives of JAX: on a CPU by XLA's foreign function interface, or on a GPU.

There are three: the normalization, its tangent, linear in the tangents, and its pullback, which is
the tangent's transpose. Kernels compute the first and the last; the tangent, and all that is
differentiated again, are the passes of `jax_passes`, so every transformation of JAX applies. So are
all three in an exported program, which is to run where groupnorm is not.
"""

import ctypes
import logging
from functools import lru_cache, partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.interpreters import ad, batching, mlir

from groupnorm.adapter import Unsupported
from groupnorm.backends.jax import gpu as jax_gpu
from groupnorm.backends.jax import xla_passes as jax_passes
from groupnorm.backends.jax.xla_passes import Spec
from groupnorm.backends.kernels.cpu import availability as cpu
from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu import launch as cpu_launch
from groupnorm.backends.kernels.cpu.huge_pages import are_worth_it
from groupnorm.backends.kernels.cpu.threads import helpers_for
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.variants import DTYPES

__all__ = ["missing", "normalize", "normalize_keeping", "pull_back", "why_unavailable"]

_log = logging.getLogger("groupnorm")

_TARGET = "groupnorm_cpu_kernel"


def why_unavailable(x_dtype: Any, work_dtype: Any, result_dtype: Any) -> Unsupported | None:
    """Say why the kernels do not compute this, if so."""
    names = [jnp.dtype(dtype).name for dtype in (x_dtype, result_dtype)]
    if jnp.dtype(work_dtype) != jnp.float32 or not set(names) <= set(DTYPES):
        return Unsupported(
            f"x of {names[0]} to a result of {names[1]}, computed in {jnp.dtype(work_dtype).name}: "
            "the kernels are for float32, float16 and bfloat16, computed in float32"
        )
    if jax.default_backend() == "gpu":
        return jax_gpu.missing()
    why = cpu.why_unavailable("float16" in names)
    return _interface() if why is None else why


def missing() -> Unsupported | None:
    """Say what the kernels lack on this machine, if anything.

    On a GPU a first kernel is tried out for that; on a CPU the handler is registered.
    """
    return jax_gpu.missing() if jax.default_backend() == "gpu" else _interface()


@lru_cache(maxsize=1)
def _interface() -> Unsupported | None:
    """Register the CPU's handler; return why it cannot be used, if XLA refuses it, or else None."""
    why = cpu.why_unavailable(float16=False)
    if why is not None:
        return why
    module = cpu.kernels("xla_handler")
    function = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(module.handler()[0].address)
    try:
        # Before there is a backend, JAX only queues the handler; XLA then refuses it while the
        # backend starts, which fails with it.
        jax.devices("cpu")
        jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(function), platform="cpu")
    except (RuntimeError, ValueError) as error:  # XLA's errors are RuntimeErrors today
        version = ".".join(map(str, module.API))
        why = Unsupported(
            "XLA does not take the handler of the kernels for CPUs, which was written for version "
            f"{version} of its foreign function interface: {error}"
        )
        _log.warning("groupnorm computes without kernels in JAX on CPUs: %s", why.reason)
    return why


# What the passes compute --------------------------------------------------------------------------


def _by_passes(spec: Spec, x: Any, scale: Any, bias: Any, *mask: Any) -> Any:
    full = jnp.broadcast_to(mask[0], (spec.samples, spec.positions)) if mask else None
    return jax_passes.normalize(spec, x, scale, bias, full)


def _normalize_by_passes(x: Any, scale: Any, bias: Any, *mask: Any, spec: Spec) -> Any:
    y = _by_passes(spec, x, scale, bias, *mask)
    return y, jnp.zeros(_saved_shape(spec), np.uint32)


def _tangent_by_passes(
    dx: Any, dscale: Any, dbias: Any, x: Any, scale: Any, bias: Any, *rest: Any, spec: Spec
) -> Any:
    mask = rest[:-1]
    _, tangent = jax.jvp(
        lambda *given: _by_passes(spec, *given, *mask), (x, scale, bias), (dx, dscale, dbias)
    )
    return tangent


def _pull_back_by_passes(
    dy: Any, x: Any, scale: Any, bias: Any, *rest: Any, spec: Spec, batches: int
) -> Any:
    one = spec._replace(samples=spec.samples // batches)
    mask = [jnp.broadcast_to(m, (spec.samples, spec.positions)) for m in rest[:-1]]

    def pull(dy: Any, x: Any, *mask: Any) -> Any:
        _, pullback = jax.vjp(lambda *given: _by_passes(one, *given, *mask), x, scale, bias)
        return pullback(dy)

    apart = (a.reshape(batches, -1, *a.shape[1:]) for a in (dy, x, *mask))
    dx, dscale, dbias = jax.vmap(pull)(*apart)
    return dx.reshape(x.shape), dscale, dbias


# The primitives -----------------------------------------------------------------------------------

_normalize_p = jax.extend.core.Primitive("groupnorm_normalize")
_tangent_p = jax.extend.core.Primitive("groupnorm_tangent")
_pull_back_p = jax.extend.core.Primitive("groupnorm_pull_back")
_normalize_p.multiple_results = _pull_back_p.multiple_results = True


def normalize(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> Any:
    """As `jax_passes.normalize`, of a mask that may be (1, positions)."""
    return normalize_keeping(spec, x, scale, bias, mask)[0]


def normalize_keeping(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> Any:
    """Return the result, and what `pull_back` needs, (3, samples * groups, 2) in uint32."""
    masks = () if mask is None else (mask,)
    return _normalize_p.bind(x, scale, bias, *masks, spec=spec)


def pull_back(spec: Spec, dy: Any, x: Any, scale: Any, bias: Any, mask: Any, saved: Any) -> Any:
    """Return the gradients of x, scale and bias."""
    masks = () if mask is None else (mask,)
    return _pull_back(dy, x, scale, bias, *masks, saved, spec=spec)


def _pull_back(dy: Any, x: Any, *rest: Any, spec: Spec) -> Any:
    if dy.dtype != x.dtype:  # the kernels are compiled for that, or full precision
        dy = dy.astype(np.float32)
    dx, dscale, dbias = _pull_back_p.bind(dy, x, *rest, spec=spec, batches=1)
    return dx, dscale[0], dbias[0]


def _saved_shape(spec: Spec) -> tuple[int, int, int]:
    # Numbers in float64, which JAX may be set up not to have.
    return 3, spec.samples * spec.groups, 2


@_normalize_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(x: Any, scale: Any, bias: Any, *mask: Any, spec: Spec) -> Any:
    saved = ShapedArray(_saved_shape(spec), np.dtype(np.uint32))
    return [ShapedArray(x.shape, spec.result), saved]


@_tangent_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(dx: Any, *rest: Any, spec: Spec) -> Any:
    return ShapedArray(dx.shape, spec.result)


@_pull_back_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(dy: Any, x: Any, scale: Any, *rest: Any, spec: Spec, batches: int) -> Any:
    parameter = ShapedArray((batches, spec.channels), np.dtype(np.float32))
    return [ShapedArray(x.shape, x.dtype), parameter, parameter]


def _eagerly(primitive: Any) -> None:
    """Compile it where `jax.disable_jit` would have it computed at once."""

    def implementation(*arguments: Any, **parameters: Any) -> Any:
        with jax.disable_jit(False):
            return jax.jit(partial(primitive.bind, **parameters))(*arguments)

    primitive.def_impl(implementation)


for _primitive in (_normalize_p, _tangent_p, _pull_back_p):
    _eagerly(_primitive)


# Derivatives --------------------------------------------------------------------------------------


def _normalize_jvp(primals: Any, tangents: Any, *, spec: Spec) -> Any:
    y, saved = _normalize_p.bind(*primals, spec=spec)
    linear = map(ad.instantiate_zeros, tangents[:3])
    tangent = _tangent_p.bind(*linear, *primals, saved, spec=spec)
    return (y, saved), (tangent, ad.Zero(ShapedArray(saved.shape, jax.dtypes.float0)))


def _again(primitive: Any, linear: int, by_passes: Any) -> Any:
    """Return the rule for the tangent of what is linear in its first arguments."""

    def rule(primals: Any, tangents: Any, **parameters: Any) -> Any:
        out = primitive.bind(*primals, **parameters)
        count = linear + 3  # x, scale and bias; the mask, and what was saved, have no tangent
        if all(type(t) is ad.Zero for t in tangents[linear:count]):
            first = map(ad.instantiate_zeros, tangents[:linear])
            return out, primitive.bind(*first, *primals[linear:], **parameters)

        def function(*given: Any) -> Any:
            return by_passes(*given, *primals[count:], **parameters)

        directions = tuple(map(ad.instantiate_zeros, tangents[:count]))
        return out, jax.jvp(function, tuple(primals[:count]), directions)[1]

    return rule


def _transposed_tangent(dy: Any, *arguments: Any, spec: Spec) -> Any:
    linear, rest = arguments[:3], arguments[3:]
    nothing = [None] * len(rest)
    if type(dy) is ad.Zero:
        return [None] * 3 + nothing
    found = zip(linear, _pull_back(dy, *rest, spec=spec), strict=True)
    return [g if ad.is_undefined_primal(a) else None for a, g in found] + nothing


def _transposed_pullback(cotangents: Any, dy: Any, *rest: Any, spec: Spec, batches: int) -> Any:
    """Only where someone transposes twice: then by what it is the transpose of."""

    def function(dy: Any) -> Any:
        return _pull_back_by_passes(dy, *rest, spec=spec, batches=batches)

    like = jax.ShapeDtypeStruct(dy.aval.shape, dy.aval.dtype)
    found = jax.linear_transpose(function, like)(tuple(map(ad.instantiate_zeros, cotangents)))
    return [*found] + [None] * len(rest)


ad.primitive_jvps[_normalize_p] = _normalize_jvp
ad.primitive_jvps[_tangent_p] = _again(_tangent_p, 3, _tangent_by_passes)
ad.primitive_jvps[_pull_back_p] = _again(_pull_back_p, 1, _pull_back_by_passes)
ad.primitive_transposes[_tangent_p] = _transposed_tangent
ad.primitive_transposes[_pull_back_p] = _transposed_pullback


# vmap ---------------------------------------------------------------------------------------------


def _front(a: Any, dim: Any, size: int) -> Any:
    """Return an array with the batch in front, whether it has one or not."""
    if dim is None:
        return jnp.broadcast_to(a, (size, *a.shape))
    return jnp.moveaxis(a, dim, 0)


def _size(arguments: Any, dims: Any) -> int:
    sizes = (a.shape[d] for a, d in zip(arguments, dims, strict=True) if d is not None)
    return int(next(sizes))


def _folded(spec: Spec, arguments: Any, dims: Any) -> tuple[Any, list[Any]]:
    """Make samples of a batch, of arguments x or dy, and masks behind them."""
    size = _size(arguments, dims)
    folded = []
    for a, dim in zip(arguments, dims, strict=True):
        is_mask = a.ndim == 2 + (dim is not None)
        if is_mask and dim is None and a.shape[0] == 1:  # one for all
            folded.append(a)
            continue
        front = _front(a, dim, size)
        if is_mask:
            front = jnp.broadcast_to(front, (size, spec.samples, spec.positions))
        folded.append(front.reshape(-1, *front.shape[2:]))
    return spec._replace(samples=size * spec.samples), folded


def _one_by_one(primitive: Any, arguments: Any, dims: Any, parameters: Any) -> Any:
    size = _size(arguments, dims)
    fronts = [_front(a, d, size) for a, d in zip(arguments, dims, strict=True)]
    out = lax.map(lambda given: primitive.bind(*given, **parameters), fronts)
    return out, [0] * len(out)


def _normalize_batched(arguments: Any, dims: Any, *, spec: Spec) -> Any:
    if any(d is not None for d in dims[1:3]):
        return _one_by_one(_normalize_p, arguments, dims, {"spec": spec})
    wide, (x, *mask) = _folded(spec, (arguments[0], *arguments[3:]), (dims[0], *dims[3:]))
    y, saved = _normalize_p.bind(x, *arguments[1:3], *mask, spec=wide)
    size = wide.samples // spec.samples
    y = y.reshape(size, spec.samples, *y.shape[1:])
    return (y, saved.reshape(3, size, -1, 2)), (0, 1)


def _tangent_batched(arguments: Any, dims: Any, *, spec: Spec) -> Any:
    return jax.vmap(partial(_tangent_by_passes, spec=spec), in_axes=tuple(dims))(*arguments), 0


def _pull_back_batched(arguments: Any, dims: Any, *, spec: Spec, batches: int) -> Any:
    if any(d is not None for d in dims[2:4]):
        parameters = {"spec": spec, "batches": batches}
        return _one_by_one(_pull_back_p, arguments, dims, parameters)
    size = _size(arguments, dims)
    dy, x, scale, bias, *mask, saved = arguments
    wide, (dy, x, *mask) = _folded(spec, (dy, x, *mask), (*dims[:2], *dims[4:-1]))
    saved = _front(saved, dims[-1], size).swapaxes(0, 1).reshape(3, -1, 2)
    dx, dscale, dbias = _pull_back_p.bind(
        dy, x, scale, bias, *mask, saved, spec=wide, batches=size * batches
    )
    found = (a.reshape(size, a.shape[0] // size, *a.shape[1:]) for a in (dx, dscale, dbias))
    return tuple(found), (0, 0, 0)


batching.primitive_batchers[_normalize_p] = _normalize_batched
batching.primitive_batchers[_tangent_p] = _tangent_batched
batching.primitive_batchers[_pull_back_p] = _pull_back_batched


# What XLA is told ---------------------------------------------------------------------------------


def _call(
    context: Any, operands: Any, spec: Spec, kernel: str, dy: str, slots: dict[int, int],
    result: Any, batches: int,
) -> Any:  # fmt: skip
    """Have the handler called; slots say where operands are, from 1, and results, from 101."""
    x, activation = context.avals_in[slots[frames.X] - 1].dtype.name, spec.activation
    y, masked = result.dtype.name, frames.MASK in slots
    name = f"{'channels_first' if spec.channels_first else 'channels_last'}_{kernel}"
    mask = context.avals_in[slots[frames.MASK] - 1].size if masked else 0
    template = frames.template(
        name,
        GroupedShape(spec.samples, spec.groups, spec.members, spec.positions, spec.channels_first),
        mask,
        spec.epsilon,
        helpers_for(result.size),
    )
    number = frames.number(name, x, y, dy, masked, activation)
    entry = cpu_launch.entry(name, x, y, dy, masked, activation)
    where = ctypes.cast(entry, ctypes.c_void_p).value
    cpu.kernels("xla_handler").table()[number] = where
    words = template.words.copy()
    words[frames.RUN], words[frames.BATCHES] = number, batches
    size = result.size * result.dtype.itemsize
    words[frames.LARGE_PAGES] = size if are_worth_it(size) else 0
    for slot, place in slots.items():
        words[slot] = place
    return jax.ffi.ffi_lowering(_TARGET)(context, *operands, frame=words)


def _exports(context: Any) -> bool:
    return bool(context.module_context.lowering_parameters.for_export)


def _without_cpu_kernels(context: Any) -> bool:
    """Whether to lower to passes: to run anywhere, or where a GPU is the default and numba not."""
    halves = any(a.dtype == np.float16 for a in (*context.avals_in, *context.avals_out))
    return _exports(context) or cpu.why_unavailable(halves) is not None or _interface() is not None


def _lower_normalize(context: Any, *operands: Any, spec: Spec) -> Any:
    if _without_cpu_kernels(context):
        return _lower_normalize_by_passes(context, *operands, spec=spec)
    slots = {frames.X: 1, frames.SCALE: 2, frames.BIAS: 3, frames.Y: 101, frames.SAVED: 102}
    if len(operands) > 3:
        slots[frames.MASK] = 4
    result = context.avals_out[0]
    return _call(context, operands, spec, "forward", "float32", slots, result, 1)


def _lower_pull_back(context: Any, *operands: Any, spec: Spec, batches: int) -> Any:
    if _without_cpu_kernels(context):
        return _lower_pull_back_by_passes(context, *operands, spec=spec, batches=batches)
    slots = {frames.DY: 1, frames.X: 2, frames.SCALE: 3, frames.BIAS: 4}
    slots |= {frames.SAVED: len(operands), frames.Y: 101, frames.DSCALE: 102, frames.DBIAS: 103}
    if len(operands) > 5:
        slots[frames.MASK] = 5
    dy, result = context.avals_in[0].dtype.name, context.avals_out[0]
    return _call(context, operands, spec, "backward", dy, slots, result, batches)


def _on_gpu(by_kernels: Any, by_passes: Any) -> Any:
    """Return the rule that calls the kernels for GPUs, where there are and not to run anywhere."""
    by_kernels = mlir.lower_fun(by_kernels, multiple_results=True)

    def rule(context: Any, *operands: Any, **parameters: Any) -> Any:
        portable = _exports(context) or jax_gpu.missing() is not None
        lower = by_passes if portable else by_kernels
        return lower(context, *operands, **parameters)

    return rule


def _normalize_on_gpu(x: Any, *rest: Any, spec: Spec) -> Any:
    saved = jax.ShapeDtypeStruct(_saved_shape(spec), np.dtype(np.uint32))
    return jax_gpu.normalize(spec, saved, x, *rest)


def _pull_back_on_gpu(dy: Any, *rest: Any, spec: Spec, batches: int) -> Any:
    return jax_gpu.pull_back(spec, batches, dy, *rest)


_lower_normalize_by_passes = mlir.lower_fun(_normalize_by_passes, multiple_results=True)
_lower_pull_back_by_passes = mlir.lower_fun(_pull_back_by_passes, multiple_results=True)
mlir.register_lowering(_normalize_p, _lower_normalize_by_passes)
mlir.register_lowering(_normalize_p, _lower_normalize, platform="cpu")
mlir.register_lowering(_tangent_p, mlir.lower_fun(_tangent_by_passes, multiple_results=False))
mlir.register_lowering(_pull_back_p, _lower_pull_back_by_passes)
mlir.register_lowering(_pull_back_p, _lower_pull_back, platform="cpu")
for _primitive, _by_kernels, _passes in (
    (_normalize_p, _normalize_on_gpu, _lower_normalize_by_passes),
    (_pull_back_p, _pull_back_on_gpu, _lower_pull_back_by_passes),
):
    mlir.register_lowering(_primitive, _on_gpu(_by_kernels, _passes), platform="cuda")
