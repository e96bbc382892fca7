"""What the implementation needs from an array library: one `Adapter` per library.

The base class works for any array API library as it is; see ``backends/array_api.py``. The adapter
of a library overrides what differs. `groupnorm.dispatch` finds it; nothing here knows which
libraries there are.
"""

import logging
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import array_api_compat
import numpy as np

from groupnorm.distributed.axis_names import bound
from groupnorm.distributed.replicas import Replicas, over_all
from groupnorm.errors import ArgumentTypeError, AxisNameError
from groupnorm.plan import Plan, make_plan

if TYPE_CHECKING:
    from groupnorm.arguments import Options
    from groupnorm.typing import Array

__all__ = ["Adapter", "Kernels", "NotServed", "library_of", "native", "not_an_array"]

_log = logging.getLogger("groupnorm")


class NotServed(NamedTuple):
    """Returned in place of a result: why an implementation does not compute a call."""

    reason: str


class Kernels:
    """The compiled kernels of a library, as far as there are any.

    Parameters
    ----------
    why_none : str
        Why there are none: the reason for every call. Subclasses override all methods.
    """

    def __init__(self, why_none: str = "") -> None:
        self._why_none = why_none

    def why_unavailable(self, device: str) -> NotServed | None:
        """Return why no kernel runs on a device, one of `Adapter.devices`; None if they do.

        If installing something would change that, the reason names it. The answer is about ordinary
        float32 calls and costs an import at most: nothing is compiled for it.
        """
        return NotServed(self._why_none)

    def forward(
        self, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "Options"
    ) -> Any:
        """Return the result of a kernel, within the accuracy contract.

        `NotServed` with the reason for every call that no kernel computes, wrong arguments
        included, which the portable implementation names.
        """
        return NotServed(self._why_none)

    def vjp(self, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "Options") -> Any:
        """Return the result and its pullback, or `NotServed`."""
        return NotServed(self._why_none)


class Adapter:
    """What the implementation asks of an array library.

    Parameters
    ----------
    xp : module
        The library's array API namespace.
    """

    name: str
    #: What messages call its arrays.
    array_name: str
    #: The word to pass to `to_backend`; empty where there is no layer of this library.
    backend: ClassVar[str] = ""
    #: Whether the library may need intermediate arrays again after the call.
    has_autograd: ClassVar[bool] = True
    #: Whether `native` computes anything.
    has_native: ClassVar[bool] = False
    _kernels: Kernels | None = None

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    # Arrays -----------------------------------------------------------------------------------

    def is_array(self, x: object) -> bool:
        """Whether x is this library's own (not merely convertible)."""
        raise NotImplementedError

    def check_input(self, x: "Array", argument: str = "x") -> None:
        """Refuse the kinds of array that would be computed wrongly."""

    def arrange(self, x: "Array") -> "Array":
        """Return an input as the library can compute it: nearly always as it is."""
        return x

    def plan(self, *key: Any, sampled: bool) -> Plan:
        """Make or look up a plan."""
        return make_plan(*key, sampled=sampled)

    def device_of(self, x: "Array") -> Any:
        """Return the array's device; None while tracing."""
        return getattr(x, "device", None)

    def place(self, x: "Array", device: Any) -> "Array":
        """Move an array, because the user said so."""
        return x if device is None else self.xp.asarray(x, device=device)

    def detach(self, x: "Array") -> "Array":
        """Return a value no gradient flows through."""
        return x

    def known(self, x: "Array") -> bool | None:
        """Return the value of a boolean scalar, where looking at it costs nothing; else None."""
        return None

    def surely_within(self, x: "Array", low: float, high: float) -> bool:
        """Whether all values are known to lie in a range, so that a program may depend on it."""
        return False

    def settle(self, *values: "Array") -> "tuple[Array, ...]":
        """Mark small arrays a compiler shall compute once, not in each element that uses them."""
        return values

    def from_host(self, value: "np.ndarray[Any, Any]", like: "Array | None" = None) -> "Array":
        """Bring a NumPy array here with exactly its values, to the device of `like`."""
        device = None if like is None else self.device_of(like)
        dtype = self.dtype(value.dtype.name)
        return self.xp.asarray(native(value), dtype=dtype, device=device)

    def to_host(self, x: "Array") -> "np.ndarray[Any, Any]":
        """Return the values as a NumPy array."""
        return np.asarray(x)

    # Dtypes -----------------------------------------------------------------------------------

    def is_complex(self, dtype: Any) -> bool:
        """Whether dtype is complex."""
        return bool(self.xp.isdtype(dtype, "complex floating"))

    def is_real_floating(self, dtype: Any) -> bool:
        """Whether dtype is real floating, the small ones included."""
        return bool(self.xp.isdtype(dtype, "real floating"))

    def is_floating(self, dtype: Any) -> bool:
        """Whether dtype is real floating or complex, not integer or boolean."""
        return self.is_real_floating(dtype) or self.is_complex(dtype)

    def dtype(self, name: str) -> Any:
        """Return this library's dtype of a name."""
        found = getattr(self.xp, name, None)
        if found is None:
            raise ArgumentTypeError(
                f"dtype={name!r} is no dtype of {self.name}: choose one it has, such as 'float32'."
            )
        return found

    def default_float(self) -> Any:
        """Return the dtype integers are computed in."""
        return self.xp.__array_namespace_info__().default_dtypes()["real floating"]

    def result_type(self, *dtypes: Any) -> Any:
        """Return what floating and complex dtypes promote to."""
        return self.xp.result_type(*dtypes)

    def real_dtype(self, dtype: Any) -> Any:
        """Return the dtype of a complex dtype's parts; others as they are."""
        if not self.is_complex(dtype):
            return dtype
        return self.xp.float32 if dtype == self.xp.complex64 else self.xp.float64

    def smallest_normal(self, dtype: Any) -> float:
        """Return the smallest number of full precision."""
        return float(self.xp.finfo(dtype).smallest_normal)

    def largest(self, dtype: Any) -> float:
        """Return the largest finite number."""
        return float(self.xp.finfo(dtype).max)

    def complex_from(self, real: "Array", imaginary: "Array") -> "Array":
        """Put two real arrays together."""
        xp = self.xp
        dtype = xp.complex64 if real.dtype == xp.float32 else xp.complex128
        return xp.astype(real, dtype) + xp.astype(imaginary, dtype) * 1j

    # Sums -------------------------------------------------------------------------------------

    def sum_of_product(self, factors: "tuple[Array, ...]", axis: int) -> "Array":
        """Sum one array, or the product of two, along an axis, which stays with length 1."""
        x = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        return self.xp.sum(x, axis=axis, keepdims=True)

    def erfc(self, x: "Array") -> "Array | None":
        """Return 1 - erf(x), which is no part of the array API; None where there is none."""
        return None

    # Replicas ---------------------------------------------------------------------------------

    def replicas(self, axis_name: Any) -> Replicas:
        """Find the replicas a name, a communicator or a tuple of them stands for, here."""
        return over_all([self.replicas_of(communicator) for communicator in bound(axis_name)])

    def replicas_of(self, communicator: Any) -> Replicas:
        """Find the replicas of a communicator."""
        raise AxisNameError(
            f"axis_name={communicator!r} cannot be used with {self.array_name}: {self.name} has no "
            "replicas to pool statistics over, and statistics of this array alone would be wrong. "
            "Use JAX, PyTorch, NumPy or CuPy arrays, or leave axis_name out."
        )

    def over_shards(self, x: "Array") -> Any:
        """Return what computes an array that says itself how it lies on several devices.

        None for all others: a function of `groupnorm.dispatch.compute` and its arguments.
        """
        return None

    def is_sharded(self, x: "Array") -> bool:
        """Whether x says itself that its parts lie on several devices."""
        return self.over_shards(x) is not None

    # Layers -----------------------------------------------------------------------------------

    def hold(self, value: "Array", param_type: Any) -> Any:
        """Turn an array into a stored parameter."""
        return value if param_type is None else param_type(value)

    def read(self, stored: Any) -> "Array":
        """Turn a stored parameter into an array."""
        return stored if self.is_array(stored) else getattr(stored, "value", stored)

    def devices(self) -> tuple[str, ...]:
        """Name the devices this library can compute on here."""
        return ("cpu",)

    # Other implementations --------------------------------------------------------------------

    @property
    def kernels(self) -> Kernels:
        """The library's compiled kernels, imported at first use.

        They use private names of their library, which any release may rename. That costs the
        kernels, never the library: the portable implementation needs none of them.
        """
        found = self._kernels
        if found is None:
            found = self._kernels = self._guarded_kernels()
        return found

    def _guarded_kernels(self) -> Kernels:
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

    def native(
        self, x: "Array", scale: "Array", bias: "Array", mask: Any, options: "Options"
    ) -> Any:
        """Return what the library's own group normalization computes, of its own accuracy.

        `NotServed` with the reason for all others.
        """
        return NotServed(f"{self.name} has no group normalization of its own")


def native(value: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Lay an array out as every library can read it: in order, in the machine's bytes."""
    return np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))


def library_of(x: Any) -> str | None:
    """Return the name of the library an array is of, such as "torch"; None if x is no array."""
    if not array_api_compat.is_array_api_obj(x):
        return None
    name: str = array_api_compat.array_namespace(x).__name__
    return name.removeprefix("array_api_compat.").partition(".")[0]


def not_an_array(x: Any, argument: str) -> ArgumentTypeError:
    """Return the error for an argument that is no array."""
    text = repr(x)
    text = text if len(text) <= 40 else text[:37] + "..."
    return ArgumentTypeError(
        f"{argument}={text} is of type {type(x).__name__}, not an array: pass an array of "
        f"NumPy, JAX, PyTorch, CuPy or another array API library, such as "
        f"numpy.asarray({argument})."
    )
