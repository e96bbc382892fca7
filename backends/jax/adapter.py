"""JAX: arrays and tracers, and statistics over mapped axes."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from groupnorm.adapter import Adapter, Kernels, Planning, as_native_contiguous
from groupnorm.backends.jax.debugging import as_one_operation, by_result, is_debugging
from groupnorm.backends.jax.internals import Tracer, explicit_axes
from groupnorm.backends.jax.sharding import over_shards
from groupnorm.distributed.replicas import Replicas
from groupnorm.errors import (
    ArgumentStateError,
    ArgumentTypeError,
    ArgumentValueError,
    AxisNameError,
    BackendImportError,
)

__all__ = ["JaxAdapter", "jax_adapter"]


class JaxAdapter(Adapter):
    """`jax.numpy` is an array API namespace itself; tracers are arrays."""

    label = "JAX"
    array_name = "JAX arrays"
    name = "jax"
    has_sharded_arrays = True

    def is_array(self, x: object) -> bool:
        """Whether x is an array or a tracer."""
        return isinstance(x, jax.Array)

    def admit(self, x: Any, argument: str = "x") -> Any:
        """Reject keys of random numbers, dtypes that JAX does not promote, and deleted arrays."""
        dtype = x.dtype
        if not isinstance(dtype, np.dtype):
            raise ArgumentTypeError(
                f"{argument} has dtype {dtype}: it holds no numbers. Pass an array of numbers."
            )
        if (
            dtype.itemsize == 1
            and argument not in ("mask", "dy")  # which are converted as they are
            and jnp.issubdtype(dtype, jnp.floating)
        ):
            raise ArgumentTypeError(
                f"{argument} has dtype {dtype}, which JAX does not promote: pass "
                f"{argument}.astype('bfloat16')."
            )
        if not isinstance(x, Tracer) and x.is_deleted():  # inlined
            self.check_memory(x, argument)
        return x

    def check_memory(self, x: Any, argument: str) -> None:
        """Raise `ArgumentStateError` if an array was deleted or donated."""
        if not isinstance(x, Tracer) and x.is_deleted():
            raise ArgumentStateError(
                f"{argument} has shape {x.shape}, and its memory was freed: it was deleted, or "
                "donated to a jitted function (donate_argnums). Use the result of that function, "
                f"or pass it a copy, {argument}.copy()."
            )

    def device_of(self, x: Any) -> Any:
        """Leave placement to JAX: tracers have no device, and JAX itself refuses to mix them."""
        return None

    def planning(self, shape: tuple[int, ...]) -> Planning:
        """Keep axes apart if one may lie on several devices, which tracers do not state."""
        static = all(isinstance(n, int) for n in shape)  # not so for symbolic sizes of jax.export
        # Symbolic axes apart: those of known length are still summed in blocks of fixed size.
        return Planning(static=static, merge_axes=static and jax.device_count() == 1)

    def count_of(self, count: Any, like: Any) -> Any:
        """Convert a symbolic count, which JAX compares with no number, to an array."""
        if isinstance(count, int | float):
            return count
        return jnp.asarray(count).astype(self.real_dtype(like.dtype))

    def sharded_call(self, x: Any) -> Any:
        """Leave sharded computation to the compiler if shardings are parts of types.

        Under modes of debugging the call is one operation, computed by its own rules.
        """
        # Not only the axes in x's own sharding: axes that a vmap has removed are sharded as well.
        return over_shards if explicit_axes(x) else as_one_operation if is_debugging() else None

    def is_sharded(self, x: Any) -> bool:
        """Whether x's own type says that its parts lie on several devices."""
        return bool(explicit_axes(x)) and any(jax.typeof(x).sharding.spec)

    def place(self, x: Any, device: Any) -> Any:
        """Put x on a `jax.Device` or sharding, or a device named like ``"gpu"`` or ``"cpu:1"``."""
        if device is None:
            return x
        if isinstance(device, str):
            return jax.device_put(x, _device(device))
        try:
            return jax.device_put(x, device)
        except (TypeError, ValueError) as error:
            raise ArgumentValueError(
                f"device={device!r} is not a device or sharding of JAX for an array of shape "
                f"{x.shape} ({str(error).partition(chr(10))[0]}): give a jax.Device, a sharding, "
                "or a name such as 'cpu:0'."
            ) from error

    def detach(self, x: Any) -> Any:
        """Stop gradients."""
        return lax.stop_gradient(x)

    def materialize(self, *values: Any) -> tuple[Any, ...]:
        """End in a reduction, which XLA does not fuse into the loops over all elements.

        Fused, the whole chain of small operations before it is computed again for every element,
        which doubled the time on the CPU; `lax.optimization_barrier` is dropped before fusion
        there.
        """
        return tuple(jnp.sum(jnp.stack([v, jnp.zeros_like(v)]), axis=0) for v in values)

    def from_host(self, value: "np.ndarray[Any, Any]", like: Any = None) -> Any:
        """Convert a NumPy array to a JAX array.

        A constant of one call (which has a `like`) is rounded to JAX's precision, as JAX does with
        NumPy arrays; what is to be kept is not.
        """
        if like is None:
            _devices()
        name = value.dtype.name
        if (
            like is None
            and name in ("float64", "complex128")
            and jax.dtypes.canonicalize_dtype(name) != name
        ):
            raise ArgumentValueError(
                f"parameters of dtype {name} cannot be stored with JAX's current configuration, "
                "which rounds values to 32 bits. Call jax.config.update('jax_enable_x64', True) "
                "first, or use 32-bit parameters."
            )
        try:
            return jnp.asarray(as_native_contiguous(value))
        except TypeError as error:
            raise ArgumentTypeError(
                f"JAX has no dtype {name}. Convert the array, such as with .astype('float32')."
            ) from error

    def dtype(self, name: str) -> Any:
        """Return the dtype, narrowed to 32 bits unless 64-bit dtypes are enabled."""
        return jax.dtypes.canonicalize_dtype(super().dtype(name))

    def to_host(self, x: Any) -> "np.ndarray[Any, Any]":
        """Copy a parameter to the host."""
        self.check_memory(x, "parameter")
        return super().to_host(x)

    def default_float(self) -> Any:
        """Return float32, or float64 if enabled."""
        return jnp.result_type(float)

    def result_type(self, *dtypes: Any) -> Any:
        """Promote by JAX's standard rules, under strict ones too: the result's dtype is stated."""
        config: Any = jax.config
        try:
            return _promoted(config.jax_enable_x64, dtypes)
        except ValueError as error:  # arrays of such dtypes were refused before
            small = next((d for d in dtypes if d.itemsize == 1), dtypes[0])
            raise ArgumentTypeError(
                f"dtype={small.name!r} is one that JAX does not promote: choose 'bfloat16' or "
                "a wider one, and convert the result."
            ) from error

    def real_dtype(self, dtype: Any) -> Any:
        """Return the dtype of a complex dtype's parts."""
        return jnp.finfo(dtype).dtype if self.is_complex(dtype) else dtype

    def erfc(self, x: Any) -> Any:
        """1 - erf(x)."""
        return lax.erfc(x)

    def complex_from(self, real: Any, imaginary: Any) -> Any:
        """Combine real and imaginary parts."""
        return lax.complex(real, imaginary)

    def load_kernels(self) -> Kernels:
        """Return the jitted calls of the kernels."""
        from groupnorm.backends.jax.kernels import JaxKernels

        return JaxKernels(self)

    def run(self, compute: Any, *arguments: Any) -> Any:
        """Call a function of the portable implementation, by the usual rules of promotion.

        Modes of debugging look at what it returns, not at its single operations.
        """
        if not is_debugging():
            return compute(self, *arguments)
        name = compute.__name__.strip("_").removesuffix("_by")
        return by_result(name, lambda: compute(self, *arguments))

    def replicas(self, axis_name: Any) -> Replicas:
        """Return the replicas of one or several mapped axes."""
        try:
            index, size = lax.axis_index(axis_name), lax.axis_size(axis_name)
        except NameError as error:
            raise AxisNameError(
                f"axis_name={axis_name!r} is not bound here: call the layer inside jax.shard_map, "
                "jax.pmap or jax.vmap over an axis of that name, or leave axis_name out."
            ) from error
        return Replicas(index, size, lambda x: lax.psum(x, axis_name))

    def devices(self) -> tuple[str, ...]:
        """Return the names of JAX's devices."""
        return tuple(f"{d.platform}:{d.id}" for d in _devices())


@lru_cache(maxsize=256)
def _promoted(x64: bool, dtypes: tuple[Any, ...]) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _devices() -> list[Any]:
    """Return JAX's default devices.

    Raises
    ------
    BackendImportError
        If JAX has none, as where it lacks the platform that ``JAX_PLATFORMS`` names.
    """
    try:
        return jax.devices()
    except Exception as error:  # a RuntimeError, or an AssertionError without text
        reason = str(error).partition("\n")[0] or type(error).__name__
        config: Any = jax.config
        if config.jax_platforms:
            reason += (
                f"; JAX_PLATFORMS is {config.jax_platforms!r}: name platforms that this "
                "installation of JAX supports, such as 'cpu', or unset it"
            )
        raise BackendImportError(
            f"backend='jax' has no device to compute on ({reason})."
        ) from error


def _device(name: str) -> Any:
    platform, _, index = name.partition(":")
    try:
        return jax.devices(platform)[int(index or 0)]
    except (RuntimeError, IndexError, ValueError) as error:
        known = ", ".join(f"{d.platform}:{d.id}" for d in _devices())
        raise ArgumentValueError(
            f"device={name!r} is not one JAX has here ({error}): choose from {known}."
        ) from error


jax_adapter = JaxAdapter(jnp)
