"""Initial values of scale and bias.

An initializer is a callable that takes ``(shape, dtype)`` and returns an array, as here and in
NumPy. The conventions of other frameworks are supported too: ``(key, shape, dtype)`` as in JAX,
flax and equinox (called with ``jax.random.key(0)``), ``(shape)`` alone as in brainstate, and the
functions of ``torch.nn.init``, which fill a tensor in place.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from groupnorm.errors import ArgumentTypeError, ArgumentValueError

__all__ = ["constant", "initial_value", "ones", "zeros"]


def zeros(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Return zeros of a shape and dtype.

    Examples
    --------
    >>> zeros((3,))
    array([0., 0., 0.], dtype=float32)
    """
    return np.zeros(shape, dtype)


def ones(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
    """Return ones of a shape and dtype.

    Examples
    --------
    >>> ones((3,))
    array([1., 1., 1.], dtype=float32)
    """
    return np.ones(shape, dtype)


class constant:  # lower case: used like the functions above
    """Initialize every element to one value.

    Parameters
    ----------
    value : number

    Raises
    ------
    ArgumentTypeError
        If it is not a number.

    Examples
    --------
    >>> constant(0.5)((3,))
    array([0.5, 0.5, 0.5], dtype=float32)
    """

    def __init__(self, value: complex) -> None:
        if np.ndim(value) or np.asarray(value).dtype.kind not in "biufcV":  # V: of ml_dtypes
            raise ArgumentTypeError(
                f"value={value!r} is of type {type(value).__name__}: it must be a number, such as "
                "0.5. For one value per channel pass a callable of (shape, dtype)."
            )
        self.value = value

    def __call__(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        """Return an array filled with the value."""
        return np.full(shape, self.value, dtype)

    def __eq__(self, other: object) -> bool:
        """Whether both initialize to the same value."""
        return isinstance(other, constant) and self.value == other.value

    def __hash__(self) -> int:
        """Return a hash consistent with equality, as keys of jit caches need."""
        return hash((constant, self.value))

    def __repr__(self) -> str:
        """Return the constructor call."""
        return f"constant({self.value!r})"


def initial_value(
    argument: str, init: Callable[..., Any], shape: tuple[int, ...], dtype: Any
) -> Any:
    """Call an initializer by its framework's convention, and check the result.

    Parameters
    ----------
    argument : {"bias_init", "scale_init"}
        For the error message.
    init : callable
    shape : tuple of int
    dtype : numpy.dtype

    Returns
    -------
    array
        Of NumPy, or of the initializer's library.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If the initializer is not callable, or returns another shape.
    """
    if not callable(init):
        raise ArgumentTypeError(
            f"{argument}={init!r} is not callable: an initializer takes (shape, dtype) and returns "
            "an array. For one value everywhere pass groupnorm.initializers.constant(value)."
        )
    value = _call(argument, init, shape, dtype)
    if tuple(np.shape(value)) != shape:
        raise ArgumentValueError(
            f"{argument}={init!r} returned an array of shape {tuple(np.shape(value))} instead of "
            f"the requested shape {shape}: return an array of the shape that is passed."
        )
    return value


def _call(argument: str, init: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> Any:
    try:
        parameters = list(inspect.signature(init).parameters.values())
    except (TypeError, ValueError):  # builtins such as numpy.zeros have no signature
        return init(shape, dtype)
    if not parameters:
        raise ArgumentTypeError(
            f"{argument}={init!r} takes no argument: an initializer takes (shape, dtype) and "
            "returns an array. For one value everywhere pass "
            "groupnorm.initializers.constant(value)."
        )
    first = parameters[0].name
    if first in ("key", "rng", "rng_key"):
        import jax

        return init(jax.random.key(0), shape, dtype)
    if first == "tensor":
        import torch

        return init(torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name)))
    if any(p.name == "dtype" for p in parameters):
        return init(shape, dtype=dtype)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return init(shape, dtype) if len(positional) >= 2 else init(shape)
