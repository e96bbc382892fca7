"""Dtypes by name, for the dtype objects of every library."""

from collections.abc import Collection
from typing import Any

import numpy as np

from groupnorm.errors import ArgumentTypeError, BackendImportError

__all__ = ["NumpyDtypes", "dtype_name", "is_numpy_float", "small_float"]


def dtype_name(argument: str, dtype: Any, extra: tuple[str, ...] = ()) -> str:
    """Return the name of a floating or complex dtype, given as a name or any library's object.

    Raises
    ------
    ArgumentTypeError
        If it is not such a dtype.
    """
    if isinstance(dtype, str):
        name = dtype
        if name in extra:
            return name
    else:
        name = _name_of(dtype)
    if name not in ("bfloat16",):
        try:
            name = np.dtype(name).name
        except (TypeError, ValueError):
            if not name.startswith("float8"):
                name = "?"
    if name == "?" and isinstance(dtype, str):
        raise ArgumentTypeError(
            f"{argument}={dtype!r} is not the name of a dtype: give one such as 'float32' or "
            f"'bfloat16'{''.join(f', or {e!r}' for e in extra)}."
        )
    if not name.startswith(("float", "bfloat", "complex")):
        raise ArgumentTypeError(
            f"{argument}={dtype!r} is not a floating dtype: normalized values are not integers. "
            "Give a name such as 'float32' or 'bfloat16', or a framework's dtype object"
            f"{''.join(f', or {e!r}' for e in extra)}."
        )
    return name


def _name_of(dtype: Any) -> str:
    text = str(dtype)
    if text.startswith("torch."):
        return text.removeprefix("torch.")
    if "array_api_strict" in type(dtype).__module__:
        return text.rpartition(".")[2]
    if isinstance(dtype, Collection):  # for NumPy, these describe structured dtypes
        return "?"
    try:
        return str(np.dtype(dtype).name)
    except (TypeError, ValueError):
        return text.rpartition(".")[2]


def small_float(name: str) -> "np.dtype[Any]":
    """Return a dtype of ml_dtypes, such as bfloat16."""
    try:
        import ml_dtypes
    except ImportError as error:
        raise BackendImportError(
            f"dtype={name!r} is not built into NumPy: it needs the package ml_dtypes, which cannot "
            "be imported. Run pip install ml_dtypes (it comes with jax)."
        ) from error
    if not hasattr(ml_dtypes, name):
        raise ArgumentTypeError(
            f"dtype={name!r} is not a dtype of NumPy or ml_dtypes: choose one that exists, such as "
            "'float32' or 'bfloat16'."
        )
    dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return dtype


def is_numpy_float(dtype: Any) -> bool:
    """Whether dtype is a real floating one; ml_dtypes' floats are of kind "V" or "f"."""
    dtype = np.dtype(dtype)
    small = dtype.kind == "V" and dtype.name.startswith(("bfloat", "float"))
    return bool(dtype.kind == "f" or small)


class NumpyDtypes:
    """The dtype methods of adapters whose dtypes are those of NumPy and ml_dtypes."""

    def dtype(self, name: str) -> Any:
        """Return the dtype with this name, of NumPy or ml_dtypes."""
        try:
            return np.dtype(name)
        except TypeError:  # NumPy has no such name
            return small_float(name)

    def is_complex(self, dtype: Any) -> bool:
        """Whether dtype is complex."""
        return bool(np.dtype(dtype).kind == "c")

    def is_real_floating(self, dtype: Any) -> bool:
        """Whether dtype is real floating, those of ml_dtypes included."""
        return is_numpy_float(dtype)

    def result_type(self, *dtypes: Any) -> Any:
        """Promote; small floats that NumPy cannot promote with each other become float32."""
        try:
            return np.result_type(*dtypes)
        except TypeError:
            return np.result_type(*(np.result_type(d, np.float32) for d in dtypes))
