"""NumPy: the adapter of arrays on the host."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from groupnorm.adapter import Adapter, Kernels, admit_host_array
from groupnorm.backends.numpy.mpi import replicas_of
from groupnorm.distributed.axis_names import bound
from groupnorm.distributed.replicas import Replicas, over_all
from groupnorm.dtypes import NumpyDtypes
from groupnorm.errors import ArgumentValueError

__all__ = ["NumpyAdapter", "numpy_adapter"]

_T = TypeVar("_T")

_PARTIAL_SUMS = 8
_SHORT_ROW = 256


class NumpyAdapter(NumpyDtypes, Adapter):
    """NumPy arrays, including those of ml_dtypes' small floats."""

    label = "NumPy"
    array_name = "NumPy arrays"
    name = "numpy"
    has_autograd = False
    reads_values = True

    def is_array(self, x: object) -> bool:
        """Whether x is an ndarray or a NumPy scalar."""
        return isinstance(x, np.ndarray | np.generic)

    def admit(self, x: Any, argument: str = "x") -> Any:
        """Reject the subclasses that would silently give wrong results."""
        return admit_host_array(x, argument)

    def place(self, x: Any, device: Any) -> Any:
        """Accept the only device, the CPU."""
        if device is not None and str(device) != "cpu":
            raise ArgumentValueError(
                f"device={device!r} is not a NumPy device: NumPy computes on 'cpu' only. Use "
                "backend='cupy', 'jax' or 'torch' for others."
            )
        return x

    def device_of(self, x: Any) -> Any:
        """Return "cpu": every array is on the host."""
        return "cpu"

    def from_host(self, value: "np.ndarray[Any, Any]", like: Any = None) -> Any:
        """Return the array itself."""
        return value

    def value_if_ready(self, x: Any) -> bool | None:
        """Return the value; NumPy is eager."""
        return bool(x)

    def default_float(self) -> Any:
        """Return float64, NumPy's only default; NumPy 2.0 has no function that says so."""
        return np.dtype(np.float64)

    def real_dtype(self, dtype: Any) -> Any:
        """Return the dtype of the real and imaginary parts, longdouble included."""
        return np.zeros((), dtype).real.dtype

    def complex_from(self, real: Any, imaginary: Any) -> Any:
        """Combine two real arrays into a complex one."""
        return real + 1j * imaginary

    def sum_of_product(self, factors: tuple[Any, ...], axis: int) -> Any:
        """Use BLAS or einsum: without an array of products, in a third of the time of `sum`."""
        x, shape = factors[0], factors[0].shape
        kept = (*shape[:axis], 1, *shape[axis + 1 :])
        if not x.size:  # empty: do not depend on how einsum handles it
            return np.zeros(kept, x.dtype)
        if axis < len(shape) - 1:
            return _in_partial_sums(factors, axis).reshape(kept)
        if len(factors) == 2 and x.dtype.char in "fd":
            with np.errstate(over="ignore"):  # as einsum does
                return np.vecdot(*factors).reshape(kept)
        return _einsum(factors, axis).reshape(kept)

    def replicas(self, axis_name: Any) -> Replicas:
        """Return the ranks of one or several mpi4py communicators."""
        return over_all([replicas_of(communicator) for communicator in bound(axis_name)])

    def run(self, compute: Callable[..., _T], *arguments: Any) -> _T:
        """Call a portable function; underflow in it is expected, whatever `numpy.errstate` says.

        Squares of small deviations, tails of activations and roundings to a narrower dtype may
        vanish without loss of accuracy.
        """
        with np.errstate(under="ignore"):
            return compute(self, *arguments)

    def load_kernels(self) -> Kernels:
        """Return the CPU kernels."""
        from groupnorm.backends.numpy.cpu import NumpyKernels

        return NumpyKernels(self)


def _in_partial_sums(factors: Sequence[Any], axis: int) -> Any:
    """Sum the product of the factors along an axis, which is removed, in several partial sums.

    A running float32 sum of fewer terms is more accurate: of equal terms all roundings may have the
    same sign. Partial sums of short rows lie side by side, so that loops run along longer ones.
    """
    shape = factors[0].shape
    before, length, after = shape[:axis], shape[axis] // _PARTIAL_SUMS, shape[axis + 1 :]
    if length < 2:
        return _einsum(factors, axis)
    at, whole = (slice(None),) * axis, length * _PARTIAL_SUMS
    if math.prod(after) <= _SHORT_ROW:
        split, summed = (*before, length, _PARTIAL_SUMS, *after), axis
    else:
        split, summed = (*before, _PARTIAL_SUMS, length, *after), axis + 1
    head = [f[(*at, slice(whole))].reshape(split) for f in factors]
    result = _einsum([_einsum(head, summed)], axis)
    if whole < shape[axis]:
        result += _einsum([f[(*at, slice(whole, None))] for f in factors], axis)
    return result


def _einsum(factors: Sequence[Any], axis: int) -> Any:
    """Sum the product of the factors along an axis, which is removed."""
    axes = list(range(factors[0].ndim))
    operands = [o for factor in factors for o in (factor, axes)]
    return np.einsum(*operands, axes[:axis] + axes[axis + 1 :])


# NumPy 2 is an array API namespace itself; importing that of array-api-compat takes 70 ms more.
numpy_adapter = NumpyAdapter(np)
