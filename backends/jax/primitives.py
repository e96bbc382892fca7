"""Group normalization as primitives of JAX, with all their rules.

There are three: the normalization, its tangent, linear in the tangents, and its pullback, which is
the tangent's transpose. `cpu` and `gpu` register lowerings that call compiled kernels for the first
and the last. All else is the portable implementation: the tangent, whatever is differentiated
again, every platform without kernels, and exported programs, which must run without groupnorm.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from groupnorm.adapter import Unsupported
from groupnorm.arguments import CallOptions
from groupnorm.backends.jax.debugging import own_rules, raise_alarm
from groupnorm.backends.jax.internals import (
    Primitive,
    ShapedArray,
    ad,
    batching,
    is_exporting,
    mlir,
    operand_and_result_types,
    require_all,
)
from groupnorm.backends.kernels.grouped_shape import GroupedShape
from groupnorm.backends.kernels.layout import why_no_variant
from groupnorm.plan import Plan
from groupnorm.portable.group_norm import group_norm, group_norm_vjp

__all__ = [
    "Spec",
    "normalize",
    "normalize_p",
    "pull_back",
    "pull_back_p",
    "register_lowering",
    "saved_shape",
    "why_not_compiled",
]

require_all()


class Spec(NamedTuple):
    """The static part of a call."""

    adapter: Any
    plan: Plan  # of the array that was given
    shape: GroupedShape
    options: CallOptions  # of a portable call with the work arrays
    work_dtype: Any

    @property
    def result_dtype(self) -> Any:
        """The dtype of the result."""
        return jnp.dtype(self.options.dtype)

    @property
    def work_shape(self) -> tuple[int, int, int]:
        """The shape of x: (samples, channels, positions), or positions before channels."""
        samples, channels, positions = self.shape.samples, self.shape.channels, self.shape.positions
        if self.shape.channels_first:
            return samples, channels, positions
        return samples, positions, channels

    def with_samples(self, samples: int) -> "Spec":
        """Return the same call of another number of samples."""
        return self._replace(shape=self.shape._replace(samples=samples))


@lru_cache(maxsize=1024)
def why_not_compiled(x: Any, work: Any, result: Any, activation: str | None) -> Unsupported | None:
    """Return why no kernel is compiled for these dtypes and this activation, on any device."""
    x_name, work_name, result_name = (jnp.dtype(dtype).name for dtype in (x, work, result))
    return why_no_variant(x_name, work_name, result_name, activation)


# By the portable implementation -------------------------------------------------------------------


def _mask_of(spec: Spec, mask: Any) -> Any:
    """Return a mask of (samples or 1, positions) that broadcasts to x; None if there is none."""
    return jnp.expand_dims(mask[0], 1 if spec.shape.channels_first else 2) if mask else None


def _portable(x: Any, scale: Any, bias: Any, *mask: Any, spec: Spec) -> Any:
    given = spec.adapter, x, scale, bias, _mask_of(spec, mask), spec.options
    with own_rules():
        return group_norm(*given)


def _portable_normalize(*arrays: Any, spec: Spec) -> Any:
    # The statistics saved for kernels are not used: pulling back takes them again.
    return _portable(*arrays, spec=spec), jnp.zeros(saved_shape(spec), np.uint32)


def _portable_tangent(
    dx: Any, dscale: Any, dbias: Any, x: Any, scale: Any, bias: Any, *rest: Any, spec: Spec
) -> Any:
    mask = rest[:-1]
    _, tangent = jax.jvp(
        lambda *given: _portable(*given, *mask, spec=spec), (x, scale, bias), (dx, dscale, dbias)
    )
    return tangent


def _portable_pull_back(
    dy: Any, x: Any, scale: Any, bias: Any, *rest: Any, spec: Spec, batches: int
) -> Any:
    def pull(dy: Any, x: Any, *mask: Any) -> Any:
        given = spec.adapter, x, scale, bias, _mask_of(spec, mask), spec.options
        with own_rules():
            return tuple(group_norm_vjp(*given)[1](dy))

    mask = rest[:-1]
    if scale.ndim == 2:
        dx, *of_rows = pull(dy, x, *mask)
        return dx, *(g.reshape(batches, -1, g.shape[-1]).sum(1) for g in of_rows)
    if batches == 1:  # XLA takes up to five times as long for derivatives of a vmap over one
        dx, dscale, dbias = pull(dy, x, *mask)
        return dx, dscale[None], dbias[None]
    mask = tuple(jnp.broadcast_to(m, (spec.shape.samples, spec.shape.positions)) for m in mask)
    apart = (a.reshape(batches, -1, *a.shape[1:]) for a in (dy, x, *mask))
    dx, dscale, dbias = jax.vmap(pull)(*apart)
    return dx.reshape(x.shape), dscale, dbias


# The primitives -----------------------------------------------------------------------------------

normalize_p = Primitive("groupnorm_normalize")
_tangent_p = Primitive("groupnorm_tangent")
pull_back_p = Primitive("groupnorm_pull_back")
normalize_p.multiple_results = pull_back_p.multiple_results = True


def normalize(spec: Spec, x: Any, scale: Any, bias: Any, mask: Any) -> Any:
    """Return the result, and what `pull_back` needs, (3, samples * groups, 2) in uint32.

    Parameters
    ----------
    x : array of shape `Spec.work_shape`
    scale, bias : arrays of shape (channels,) or (samples, channels)
        In the dtype of the statistics; both of the same shape.
    mask : boolean array of shape (samples or 1, positions), or None
    """
    masks = () if mask is None else (mask,)
    return normalize_p.bind(x, scale, bias, *masks, spec=spec)


def pull_back(spec: Spec, dy: Any, x: Any, scale: Any, bias: Any, mask: Any, saved: Any) -> Any:
    """Return the gradients of x, scale and bias."""
    masks = () if mask is None else (mask,)
    return _pull_back(dy, x, scale, bias, *masks, saved, spec=spec)


def _pull_back(dy: Any, x: Any, scale: Any, *rest: Any, spec: Spec) -> Any:
    if dy.dtype != x.dtype:  # kernels are compiled for this dtype, and for full precision
        dy = dy.astype(scale.dtype)
    batches = 1 if scale.ndim == 1 else scale.shape[0]
    dx, *gradients = pull_back_p.bind(dy, x, scale, *rest, spec=spec, batches=batches)
    return dx, *(g.reshape(scale.shape) for g in gradients)


def saved_shape(spec: Spec) -> tuple[int, int, int]:
    """Return the shape of the saved statistics."""
    # Values in float64, which JAX may be set up not to have.
    return 3, spec.shape.samples * spec.shape.groups, 2


@normalize_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(x: Any, scale: Any, bias: Any, *mask: Any, spec: Spec) -> Any:
    saved = ShapedArray(saved_shape(spec), np.dtype(np.uint32))
    return [ShapedArray(x.shape, spec.result_dtype), saved]


@_tangent_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(dx: Any, *rest: Any, spec: Spec) -> Any:
    return ShapedArray(dx.shape, spec.result_dtype)


@pull_back_p.def_abstract_eval  # type: ignore[untyped-decorator]
def _(dy: Any, x: Any, scale: Any, *rest: Any, spec: Spec, batches: int) -> Any:
    parameter = ShapedArray((batches, spec.shape.channels), scale.dtype)
    return [ShapedArray(x.shape, x.dtype), parameter, parameter]


def _eagerly(primitive: Any) -> None:
    """Compile the primitive even under `jax.disable_jit`, which would have it computed eagerly."""

    def implementation(*arguments: Any, **parameters: Any) -> Any:
        # An alarm inside of the compiled call would have it computed eagerly again, for ever.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            out = jax.jit(partial(primitive.bind, **parameters))(*arguments)
        raise_alarm(primitive.name, out)
        return out

    primitive.def_impl(implementation)


for _primitive in (normalize_p, _tangent_p, pull_back_p):
    _eagerly(_primitive)


# Derivatives --------------------------------------------------------------------------------------


def _normalize_jvp(primals: Any, tangents: Any, *, spec: Spec) -> Any:
    y, saved = normalize_p.bind(*primals, spec=spec)
    linear = map(ad.instantiate_zeros, tangents[:3])
    tangent = _tangent_p.bind(*linear, *primals, saved, spec=spec)
    return (y, saved), (tangent, ad.Zero(ShapedArray(saved.shape, jax.dtypes.float0)))


def _again(primitive: Any, linear: int, portable: Any) -> Any:
    """Return the rule for the tangent of a primitive that is linear in its first arguments."""

    def rule(primals: Any, tangents: Any, **parameters: Any) -> Any:
        out = primitive.bind(*primals, **parameters)
        count = linear + 3  # x, scale and bias; the mask and the saved statistics have no tangent
        if all(type(t) is ad.Zero for t in tangents[linear:count]):
            first = map(ad.instantiate_zeros, tangents[:linear])
            return out, primitive.bind(*first, *primals[linear:], **parameters)

        def function(*given: Any) -> Any:
            return portable(*given, *primals[count:], **parameters)

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
    """Transpose the pullback, as transposing twice does."""

    def function(dy: Any) -> Any:
        return _portable_pull_back(dy, *rest, spec=spec, batches=batches)

    like = jax.ShapeDtypeStruct(dy.aval.shape, dy.aval.dtype)
    found = jax.linear_transpose(function, like)(tuple(map(ad.instantiate_zeros, cotangents)))
    return [*found] + [None] * len(rest)


ad.primitive_jvps[normalize_p] = _normalize_jvp
ad.primitive_jvps[_tangent_p] = _again(_tangent_p, 3, _portable_tangent)
ad.primitive_jvps[pull_back_p] = _again(pull_back_p, 1, _portable_pull_back)
ad.primitive_transposes[_tangent_p] = _transposed_tangent
ad.primitive_transposes[pull_back_p] = _transposed_pullback


# vmap ---------------------------------------------------------------------------------------------


def _front(a: Any, dim: Any, size: int) -> Any:
    """Return an array with the batch in front, whether it has one or not."""
    if dim is None:
        return jnp.broadcast_to(a, (size, *a.shape))
    return jnp.moveaxis(a, dim, 0)


def _size(arguments: Any, dims: Any) -> int:
    sizes = (a.shape[d] for a, d in zip(arguments, dims, strict=True) if d is not None)
    return int(next(sizes))


def _folded(spec: Spec, size: int, arguments: Any, dims: Any) -> tuple[Any, list[Any]]:
    """Turn a batch into samples: of x or dy, and of the masks after them."""
    folded = []
    for a, dim in zip(arguments, dims, strict=True):
        is_mask = a.ndim == 2 + (dim is not None)
        if is_mask and dim is None and a.shape[0] == 1:  # of all samples
            folded.append(a)
            continue
        front = _front(a, dim, size)
        if is_mask:
            front = jnp.broadcast_to(front, (size, spec.shape.samples, spec.shape.positions))
        folded.append(front.reshape(-1, *front.shape[2:]))
    return spec.with_samples(size * spec.shape.samples), folded


def _rows(spec: Spec, size: int, parameters: Any, dims: Any) -> list[Any]:
    """Return scale and bias for all samples of a batch; with rows if they vary."""
    if parameters[0].ndim == 1 and all(d is None for d in dims):
        return list(parameters)
    samples, channels = spec.shape.samples, spec.shape.channels
    fronts = (_front(a, d, size) for a, d in zip(parameters, dims, strict=True))
    return [
        jnp.broadcast_to(a.reshape(size, -1, channels), (size, samples, channels)).reshape(
            -1, channels
        )
        for a in fronts
    ]


def _normalize_batched(arguments: Any, dims: Any, *, spec: Spec) -> Any:
    size = _size(arguments, dims)
    parameters = _rows(spec, size, arguments[1:3], dims[1:3])
    wide, (x, *mask) = _folded(spec, size, (arguments[0], *arguments[3:]), (dims[0], *dims[3:]))
    y, saved = normalize_p.bind(x, *parameters, *mask, spec=wide)
    y = y.reshape(size, spec.shape.samples, *y.shape[1:])
    return (y, saved.reshape(3, size, -1, 2)), (0, 1)


def _tangent_batched(arguments: Any, dims: Any, *, spec: Spec) -> Any:
    return jax.vmap(partial(_portable_tangent, spec=spec), in_axes=tuple(dims))(*arguments), 0


def _pull_back_batched(arguments: Any, dims: Any, *, spec: Spec, batches: int) -> Any:
    size = _size(arguments, dims)
    dy, x, _, _, *mask, saved = arguments
    scale, bias = _rows(spec, size, arguments[2:4], dims[2:4])
    wide, (dy, x, *mask) = _folded(spec, size, (dy, x, *mask), (*dims[:2], *dims[4:-1]))
    saved = _front(saved, dims[-1], size).swapaxes(0, 1).reshape(3, -1, 2)
    dx, dscale, dbias = pull_back_p.bind(
        dy, x, scale, bias, *mask, saved, spec=wide, batches=size * batches
    )
    found = (a.reshape(size, a.shape[0] // size, *a.shape[1:]) for a in (dx, dscale, dbias))
    return tuple(found), (0, 0, 0)


batching.primitive_batchers[normalize_p] = _normalize_batched
batching.primitive_batchers[_tangent_p] = _tangent_batched
batching.primitive_batchers[pull_back_p] = _pull_back_batched


# Lowerings ----------------------------------------------------------------------------------------

_portable_lowerings = {
    normalize_p: mlir.lower_fun(_portable_normalize, multiple_results=True),
    _tangent_p: mlir.lower_fun(_portable_tangent, multiple_results=False),
    pull_back_p: mlir.lower_fun(_portable_pull_back, multiple_results=True),
}
for _primitive, _lower in _portable_lowerings.items():
    mlir.register_lowering(_primitive, _lower)


def register_lowering(
    primitive: Any, platform: str, lower: Any, why_unavailable: Callable[[], Any]
) -> None:
    """Lower `normalize_p` or `pull_back_p` to kernels, on a platform.

    Exported programs, and calls without kernels, are lowered to the portable implementation.

    Parameters
    ----------
    lower : callable
        The rule that calls kernels, of the context, the operands and the parameters.
    why_unavailable : callable
        Returns why there are no kernels, or None.
    """
    at = 1 if primitive is pull_back_p else 0  # where x is among the operands

    def rule(context: Any, *operands: Any, **parameters: Any) -> Any:
        known = operand_and_result_types(context)
        if known is None or is_exporting(context):
            return _portable_lowerings[primitive](context, *operands, **parameters)
        x, scale = known[0][at : at + 2]
        dtypes = (x.dtype, scale.dtype, known[1][0].dtype)
        portable = (
            why_not_compiled(*dtypes, parameters["spec"].options.activation) is not None
            or why_unavailable() is not None
        )
        chosen = _portable_lowerings[primitive] if portable else lower
        return chosen(context, *operands, **parameters)

    mlir.register_lowering(primitive, rule, platform=platform)
