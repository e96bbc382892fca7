"""Initial values of scale and bias.

An initializer is a callable that takes ``(shape, dtype)`` and returns an array, as here and in
NumPy. Those of other frameworks are taken as they are: ``(key, shape, dtype)`` as in JAX, flax and
equinox (called with ``jax.random.key(0)``), ``(shape)`` alone as in brainstate, and
``torch.nn.init``'s, which fill a tensor in place.
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


class constant:  # it is used like the functions beside it
    """Initialize every element to one value.

    Parameters
    ----------
    value : number

    Examples
    --------
    >>> constant(0.5)((3,))
    array([0.5, 0.5, 0.5], dtype=float32)
    """

    def __init__(self, value: complex) -> None:
        self.value = value

    def __call__(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray[Any, Any]:
        """Return an array full of the value."""
        return np.full(shape, self.value, dtype)

    def __eq__(self, other: object) -> bool:
        """Equal values initialize equally."""
        return isinstance(other, constant) and self.value == other.value

    def __hash__(self) -> int:
        """Agree with equality, as keys of jit caches must."""
        return hash((constant, self.value))

    def __repr__(self) -> str:
        """Show the call that makes it."""
        return f"constant({self.value!r})"


def initial_value(
    argument: str, init: Callable[..., Any], shape: tuple[int, ...], dtype: Any
) -> Any:
    """Call an initializer the way its framework means it, and check what comes back.

    Parameters
    ----------
    argument : {"bias_init", "scale_init"}
        For the error's text.
    init : callable
    shape : tuple of int
    dtype : numpy.dtype

    Returns
    -------
    array
        NumPy's, or the initializer's own library's.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If it is not callable, or returns another shape.
    """
    if not callable(init):
        raise ArgumentTypeError(
            f"{argument}={init!r} is not callable: an initializer takes (shape, dtype) and returns "
            "an array. For one value everywhere pass groupnorm.initializers.constant(value)."
        )
    value = _call(init, shape, dtype)
    if tuple(np.shape(value)) != shape:
        raise ArgumentValueError(
            f"{argument}={init!r} returned an array of shape {tuple(np.shape(value))} for the "
            f"shape {shape} it was asked for: an initializer must return the shape it is given."
        )
    return value


def _call(init: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> Any:
    try:
        parameters = list(inspect.signature(init).parameters.values())
    except (TypeError, ValueError):  # builtins such as numpy.zeros have no signature
        return init(shape, dtype)
    first = parameters[0].name if parameters else ""
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
