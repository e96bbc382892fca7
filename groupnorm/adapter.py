"""The interface between the implementation and an array library: one `Adapter` per library.

The base class implements it in array API terms; see ``backends/array_api.py``. The adapter of a
library overrides what differs. `groupnorm.dispatch` finds the adapter; this module knows no
specific library.
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import array_api_compat
import numpy as np

from groupnorm.distributed.axis_names import bound
from groupnorm.distributed.replicas import Replicas
from groupnorm.dtypes import is_numpy_float
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, AxisNameError
from groupnorm.parameters import ParamStore, param_store

if TYPE_CHECKING:
    from groupnorm.arguments import CallOptions
    from groupnorm.typing import Array

Result = TypeVar("Result")

__all__ = [
    "Adapter",
    "Kernels",
    "Planning",
    "Unsupported",
    "admit_host_array",
    "as_native_contiguous",
    "library_of",
    "not_an_array",
]

_log = logging.getLogger("groupnorm")


class Unsupported(NamedTuple):
    """Returned instead of a result: why an implementation does not support a call."""

    reason: str


class Kernels:
    """The compiled kernels of a library, if there are any.

    Parameters
    ----------
    why_none : str
        Why there are none; returned for every call. Subclasses override all methods.
    """

    def __init__(self, why_none: str = "") -> None:
        self._why_none = why_none

    def why_unavailable(self, device: str) -> Unsupported | None:
        """Return why no kernel runs on a device, one of `Adapter.devices`; None if kernels do.

        If installing a package would help, the reason names it. The answer holds for ordinary
        float32 calls and needs an import at most; nothing is compiled.
        """
        return Unsupported(self._why_none)

    def forward(
        self, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "CallOptions"
    ) -> Any:
        """Return the result of a kernel, within the accuracy contract.

        Otherwise `Unsupported` with the reason; also for invalid arguments, for which the portable
        implementation raises the error.
        """
        return Unsupported(self._why_none)

    def vjp(
        self, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "CallOptions"
    ) -> Any:
        """Return the result and its pullback, or `Unsupported`."""
        return Unsupported(self._why_none)


class _Once:
    """As `functools.cached_property`, without its lock (Python 3.11), which no compiler traces."""

    def __init__(self, function: "Callable[[Adapter], Kernels]") -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, adapter: "Adapter", owner: Any = None) -> Kernels:
        found = self._function(adapter)
        adapter.__dict__[self._function.__name__] = found
        return found


class Planning(NamedTuple):
    """The properties of a library that a plan depends on, besides the shape."""

    #: False while a compiler traces with symbolic sizes.
    static: bool = True
    #: Whether adjacent axes of the same kind are merged.
    merge_axes: bool = True
    #: Whether to sum in blocks of fixed size.
    blocked_sums: bool = True


class Adapter:
    """The operations that the implementation needs from an array library.

    Parameters
    ----------
    xp : module
        The library's array API namespace.
    """

    #: The library's name in messages, such as "PyTorch".
    label: str
    #: The name of its arrays in messages, such as "PyTorch tensors".
    array_name: str
    #: The name for `backend=` and `to_backend`; empty if this library has no layer.
    name: ClassVar[str] = ""
    #: Whether intermediate arrays may be needed after the call, by automatic differentiation.
    has_autograd: ClassVar[bool] = True
    #: Whether reading values is free, so that the computation may depend on them.
    reads_values: ClassVar[bool] = False
    #: Whether the library has array types that describe their sharding over devices.
    has_sharded_arrays: ClassVar[bool] = False

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    # Arrays -----------------------------------------------------------------------------------

    def is_array(self, x: object) -> bool:
        """Whether x is an array of this library (not merely convertible)."""
        raise NotImplementedError

    def admit(self, x: "Array", argument: str = "x") -> "Array":
        """Return an input in a form the library can compute with; usually unchanged.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            For kinds of arrays that would give wrong results.
        """
        return x

    def planning(self, shape: tuple[int, ...]) -> Planning:
        """Return the properties that a plan for arrays of this shape depends on."""
        return Planning()

    def device_of(self, x: "Array") -> Any:
        """Return the array's device; None while tracing."""
        return getattr(x, "device", None)

    def check_together(self, x: "Array", other: "Array", argument: str) -> None:
        """Check that an argument can be combined with x.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If it is on another device.
        """
        x_device, device = self.device_of(x), self.device_of(other)
        if x_device is not None and device is not None and x_device != device:
            raise ArgumentValueError(
                f"{argument} is on device {device} and x on device {x_device}: arrays are not "
                "moved between devices implicitly. Move one of them."
            )

    def place(self, x: "Array", device: Any) -> "Array":
        """Move an array to the given device; None leaves it on its device."""
        return x if device is None else self.xp.asarray(x, device=device)

    def detach(self, x: "Array") -> "Array":
        """Return the value without gradient flow."""
        return x

    def value_if_ready(self, x: "Array") -> bool | None:
        """Return a boolean scalar's value if it is available without synchronization, else None."""
        return None

    def materialize(self, *values: "Array") -> "tuple[Array, ...]":
        """Materialize small arrays, so that compilers do not recompute them for every element."""
        return values

    def from_host(self, value: "np.ndarray[Any, Any]", like: "Array | None" = None) -> "Array":
        """Convert a NumPy array without rounding, on the device of `like`."""
        device = None if like is None else self.device_of(like)
        dtype = self.dtype(value.dtype.name)
        return self.xp.asarray(as_native_contiguous(value), dtype=dtype, device=device)

    def admit_host(self, x: "np.ndarray[Any, Any]", argument: str) -> Any:
        """Return a NumPy array that is given for a parameter; reject kinds that would be wrong."""
        return admit_host_array(x, argument)

    def mask_from_host(self, mask: Any, check: "Callable[[Any], Any]", like: "Array") -> "Array":
        """Convert a mask on the host, which `check` converts to NumPy, on the device of `like`."""
        return self.from_host(check(mask), like)

    def to_host(self, x: "Array") -> "np.ndarray[Any, Any]":
        """Return the values as a NumPy array."""
        return np.asarray(x)

    def count_of(self, count: Any, like: "Array") -> Any:
        """Return a number of elements as a factor of arrays like `like`; a symbolic one too."""
        return count

    def sum_of_product(self, factors: "tuple[Array, ...]", axis: int) -> "Array":
        """Sum one array, or the product of two, along an axis, which is kept with length 1."""
        x = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        return self.xp.sum(x, axis=axis, keepdims=True)

    @property
    def sees_callers(self) -> bool:
        """Whether the callers are on the stack; compilers trace without them."""
        return True

    @property
    def overwrites(self) -> bool:
        """Whether the portable implementation may overwrite arrays that it created."""
        return True

    def erfc(self, x: "Array") -> "Array | None":
        """Return 1 - erf(x), which the array API lacks; None if the library lacks it too."""
        return None

    # Dtypes -----------------------------------------------------------------------------------

    def is_complex(self, dtype: Any) -> bool:
        """Whether dtype is complex."""
        return bool(self.xp.isdtype(dtype, "complex floating"))

    def is_real_floating(self, dtype: Any) -> bool:
        """Whether dtype is real floating, including 8 and 16 bit formats."""
        return bool(self.xp.isdtype(dtype, "real floating"))

    def dtype(self, name: str) -> Any:
        """Return this library's dtype with the given name."""
        dtype = getattr(self.xp, name, None)
        if dtype is None:
            raise ArgumentTypeError(
                f"dtype={name!r} is not a dtype of {self.label}: choose one it has, such as "
                "'float32'."
            )
        return dtype

    def default_float(self) -> Any:
        """Return the dtype that integers are converted to."""
        return self.xp.__array_namespace_info__().default_dtypes()["real floating"]

    def default_param_dtype(self) -> str:
        """Return the name of the dtype of a new layer's parameters."""
        return "float32"

    def result_type(self, *dtypes: Any) -> Any:
        """Return the dtype that floating and complex dtypes promote to."""
        return self.xp.result_type(*dtypes)

    def real_dtype(self, dtype: Any) -> Any:
        """Return the dtype of a complex dtype's parts; real dtypes unchanged."""
        if not self.is_complex(dtype):
            return dtype
        return self.xp.float32 if dtype == self.xp.complex64 else self.xp.float64

    def complex_from(self, real: "Array", imaginary: "Array") -> "Array":
        """Combine real and imaginary parts."""
        xp = self.xp
        dtype = xp.complex64 if real.dtype == xp.float32 else xp.complex128
        return xp.astype(real, dtype) + xp.astype(imaginary, dtype) * 1j

    # Replicas ---------------------------------------------------------------------------------

    def replicas(self, axis_name: Any) -> Replicas:
        """Return the replicas of a name, a communicator or a tuple of them.

        Raises
        ------
        AxisNameError
            If there are none.
        """
        raise AxisNameError(
            f"axis_name={bound(axis_name)[0]!r} cannot be used with {self.array_name}: "
            f"{self.label} has no replicas to pool statistics over, and statistics of this array "
            "alone would be wrong. Use JAX, PyTorch, NumPy or CuPy arrays, or leave axis_name out."
        )

    def sharded_call(self, x: "Array") -> Any:
        """Return the function that computes an array whose type describes its sharding.

        It takes `groupnorm.dispatch.compute_local` and that function's arguments. None for all
        other arrays. Called only if `has_sharded_arrays`.
        """
        return None

    def is_sharded(self, x: "Array") -> bool:
        """Whether x's type says that it is sharded over several devices."""
        return self.sharded_call(x) is not None

    # Parameters and devices -------------------------------------------------------------------

    def param_store(self, param_type: Any) -> ParamStore:
        """Return how a layer with a `param_type` holds its parameters."""
        return param_store(param_type, self.is_array)

    def devices(self) -> tuple[str, ...]:
        """Return the names of the devices this library can use on this machine."""
        return ("cpu",)

    # Faster implementations, if there are any -------------------------------------------------

    @_Once
    def kernels(self) -> Kernels:
        """The library's compiled kernels, imported at first use.

        They use private names of their library, which any release may rename. Then the kernels are
        lost, but not the library: the portable implementation uses no private names.
        """
        try:
            return self.load_kernels()
        except (ImportError, AttributeError) as error:
            why = (
                f"the kernels for {self.array_name} cannot be loaded "
                f"({type(error).__name__}: {error})"
            )
            _log.warning("groupnorm uses its portable implementation: %s", why)
            return Kernels(why)

    def load_kernels(self) -> Kernels:
        """Import and return the library's kernels; called once, by `kernels`."""
        return Kernels(f"there are no kernels for {self.array_name}")

    def run(self, compute: "Callable[..., Result]", *arguments: Any) -> "Result":
        """Call a function of the portable implementation with this adapter and the arguments.

        A library may differentiate `group_norm` as a whole, by `group_norm_vjp`.
        """
        return compute(self, *arguments)

    def native(
        self, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "CallOptions"
    ) -> Any:
        """Return the result of the library's own group normalization, with its accuracy.

        Otherwise `Unsupported` with the reason.
        """
        return Unsupported(f"{self.label} has no group normalization of its own")


def as_native_contiguous(value: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return the array C-contiguous and in native byte order, which every library can read."""
    return np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))


def library_of(x: Any) -> str | None:
    """Return the name of an array's library in messages; None if x is not an array."""
    if not array_api_compat.is_array_api_obj(x):
        return None
    name: str = array_api_compat.array_namespace(x).__name__
    name = name.removeprefix("array_api_compat.").partition(".")[0]
    labels = {"numpy": "NumPy", "jax": "JAX", "torch": "PyTorch", "cupy": "CuPy", "mlx": "MLX"}
    return labels.get(name, name)


def not_an_array(x: Any, argument: str) -> ArgumentTypeError:
    """Return the error for an argument that is not an array."""
    text = repr(x)
    text = text if len(text) <= 40 else text[:37] + "..."
    return ArgumentTypeError(
        f"{argument}={text} is of type {type(x).__name__}, not an array: pass an array of "
        f"NumPy, JAX, PyTorch, CuPy, MLX or another array API library, such as "
        f"numpy.asarray({argument})."
    )


def admit_host_array(x: Any, argument: str, *, traced: bool = False) -> Any:
    """Return a NumPy array; reject the kinds that would silently give wrong results.

    The dtype of one that is `traced` by a compiler is unknown.
    """
    if isinstance(x, np.ma.MaskedArray):
        raise ArgumentTypeError(
            f"{argument} is a numpy.ma.MaskedArray of shape {x.shape}: its mask would be "
            f"ignored. Pass {argument}.data, and mask=~numpy.ma.getmaskarray({argument})."
        )
    if isinstance(x, np.matrix):
        raise ArgumentTypeError(
            f"{argument} is a numpy.matrix of shape {x.shape}, which always stays "
            f"two-dimensional: pass numpy.asarray({argument})."
        )
    if not traced and x.dtype.kind in "OSUMmV" and not is_numpy_float(x.dtype):
        raise ArgumentTypeError(
            f"{argument} has dtype {x.dtype}: a numeric dtype is needed. Convert it with "
            f"{argument}.astype('float32')."
        )
    return x
