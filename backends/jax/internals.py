"""Every private name of JAX that this package uses, each with a default.

These are the names outside JAX's public interface, which any release may rename. A default always
means "portable": `kernels` raises ImportError where a name is missing, so that no kernel is used,
and the adapter, the layer and `sharding` do without. `missing` lists the names that this JAX does
not have; a test fails if there are any in the pinned version.
"""

import pkgutil
from typing import Any

import jax

__all__ = [
    "PRIVATE_NAMES",
    "Primitive",
    "ShapedArray",
    "Tracer",
    "ad",
    "batching",
    "explicit_axes",
    "in_shard_map",
    "is_exporting",
    "is_plain",
    "missing",
    "mlir",
    "operand_and_result_types",
    "require_all",
]

# Looked up one by one, so that a test can delete each in turn. A bar separates the names of
# different JAX releases, of which one is enough.
PRIVATE_NAMES = (
    "jax.core.ShapedArray",
    "jax.core.ShapedArray.manual_axis_type|jax.core.ShapedArray.vma",
    "jax.core.Tracer",
    "jax.extend.core.Primitive",
    "jax.interpreters.ad.Zero",
    "jax.interpreters.ad.instantiate_zeros",
    "jax.interpreters.ad.is_undefined_primal",
    "jax.interpreters.ad.primitive_jvps",
    "jax.interpreters.ad.primitive_transposes",
    "jax.interpreters.batching.primitive_batchers",
    "jax.interpreters.mlir.LoweringParameters.for_export",
    "jax.interpreters.mlir.lower_fun",
    "jax.interpreters.mlir.register_lowering",
    "jax.sharding.AbstractMesh.explicit_axes",
    "jax.sharding.AbstractMesh.manual_axes",
)


def _found(name: str) -> Any:
    """Return the object of a dotted name, or None."""
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return None


missing: tuple[str, ...] = tuple(
    names for names in PRIVATE_NAMES if all(_found(name) is None for name in names.split("|"))
)

ShapedArray: Any = _found("jax.core.ShapedArray")
# By default every array counts as one, of which neither values nor memory are looked at.
Tracer: Any = _found("jax.core.Tracer") or object
Primitive: Any = _found("jax.extend.core.Primitive")
ad: Any = _found("jax.interpreters.ad")
batching: Any = _found("jax.interpreters.batching")
mlir: Any = _found("jax.interpreters.mlir")


def require_all() -> None:
    """Raise ImportError where a name is missing: kernels cannot be used without all of them."""
    if missing:
        raise ImportError(f"JAX {jax.__version__} has no {', '.join(missing)}")


def explicit_axes(x: Any) -> tuple[Any, ...]:
    """Return the axes of x's mesh whose shardings are part of types; () by default."""
    return tuple(getattr(jax.typeof(x).sharding.mesh, "explicit_axes", ()))


def in_shard_map(mesh: Any) -> bool:
    """Whether a shard_map maps some axes of a mesh; True by default."""
    return bool(getattr(mesh, "manual_axes", True))


def is_plain(x: Any) -> bool:
    """Whether x's type states no axis of a surrounding shard_map that x varies over.

    False by default.
    """
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # of JAX 0.10; `vma` before
    varying = getattr(kind, "vma", None) if manual is None else getattr(manual, "varying", None)
    return varying is not None and not varying


def operand_and_result_types(context: Any) -> tuple[Any, Any] | None:
    """Return the types of a lowering's operands and results; None by default."""
    found = getattr(context, "avals_in", None), getattr(context, "avals_out", None)
    return None if None in found else found


def is_exporting(context: Any) -> bool:
    """Whether a lowering is for `jax.export`; True by default."""
    module = getattr(context, "module_context", None)
    parameters = getattr(module, "lowering_parameters", None)
    return bool(getattr(parameters, "for_export", True))
