"""Initial values of scale and bias.

An initializer is a number, an array, or a callable that takes ``(shape, dtype)`` and returns an
array, as here and in NumPy. The conventions of other frameworks are supported too:
``(key, shape, dtype)`` as in JAX, flax and equinox, ``(shape)`` alone as in brainstate, and the
functions of ``torch.nn.init``, which fill a tensor in place. Keys are those of the layer's argument
`key` or `rngs`, one for each parameter; by default they are made from ``jax.random.key(0)``.
"""

import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.typing import Initializer

__all__ = ["Initializers", "constant", "ones", "zeros"]


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
                "0.5. For one value per channel pass an array."
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


class Initializers(NamedTuple):
    """What makes a layer's parameters; no part of the layer itself."""

    scale: Initializer | Any = ones
    bias: Initializer | Any = zeros
    #: A key of JAX, and a stream of them, such as `flax.nnx.Rngs`.
    key: Any = None
    rngs: Any = None

    def check(self) -> "Initializers":
        """Return self; raise `ArgumentTypeError` for a key or rngs of another kind."""
        key, rngs = self.key, self.rngs
        if key is not None and not hasattr(key, "dtype"):
            raise ArgumentTypeError(
                f"key={key!r} is of type {type(key).__name__}: it must be a key of JAX, such as "
                "jax.random.key(0)."
            )
        if rngs is not None and not callable(getattr(rngs, "params", None)):
            raise ArgumentTypeError(
                f"rngs={rngs!r} has no stream params: it must be like flax.nnx.Rngs(0)."
            )
        if key is not None and rngs is not None:
            raise ArgumentTypeError(
                f"key={key!r} and rngs={rngs!r} are both given: keys are taken from one of them."
            )
        return self

    def value(
        self, name: str, shape: tuple[int, ...], dtype: "np.dtype[Any]"
    ) -> tuple[Any, Mapping[str, Any]]:
        """Return the initial value of ``"scale"`` or ``"bias"``, and its metadata.

        The value is an array of NumPy or of the initializer's library; metadata are keyword
        arguments for the parameter type, such as a sharding.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            If the initializer is of another kind, or has or returns another shape.
        """
        argument, init = f"{name}_init", getattr(self, name)
        # The number of a constant, too.
        is_complex = isinstance(getattr(init, "value", init), complex | np.complexfloating)
        if dtype.kind != "c" and (is_complex or "complex" in str(getattr(init, "dtype", ""))):
            raise ArgumentTypeError(
                f"{argument}={init!r} is complex, and the parameters are of dtype {dtype}: pass "
                "real values, or a complex param_dtype."
            )
        if isinstance(init, int | float | complex | np.number) and not isinstance(init, bool):
            try:
                init = constant(init if is_complex else float(init))  # type: ignore[arg-type]
            except OverflowError as error:
                raise ArgumentValueError(
                    f"{argument} is an integer beyond the range of floating-point numbers: pass a "
                    "smaller one."
                ) from error
        value: Any
        if callable(init):
            value, what = _call(argument, init, shape, dtype, self._key(name)), "returned an array"
        elif hasattr(init, "shape") and hasattr(init, "dtype"):
            value, what = init, "is an array"
        else:
            raise ArgumentTypeError(
                f"{argument}={init!r} is of type {type(init).__name__}: it must be a number, an "
                "array, or a callable that takes (shape, dtype) and returns an array."
            )
        metadata: Mapping[str, Any] = {}
        if hasattr(value, "raw_value") and hasattr(value, "metadata"):  # nnx.with_partitioning
            hooks = {k: hook for k, hook in vars(value).items() if k.startswith("on_") and hook}
            metadata = {**value.metadata, **hooks}
            value = value.raw_value
        if tuple(np.shape(value)) != shape:
            raise ArgumentValueError(
                f"{argument}={init!r} {what} of shape {tuple(np.shape(value))} instead of the "
                f"shape {shape} of the feature axes: return or pass one of that shape."
            )
        return value, metadata

    def _key(self, name: str) -> Callable[[], Any]:
        """Return what makes the key of a parameter, when an initializer asks for it."""

        def key() -> Any:
            import jax

            if self.rngs is not None:
                return self.rngs.params()
            whole = jax.random.key(0) if self.key is None else self.key
            try:
                return jax.random.split(whole)[("scale", "bias").index(name)]
            except (TypeError, ValueError) as error:
                raise ArgumentTypeError(
                    f"key={whole!r} is no key of JAX ({error}): pass one such as jax.random.key(0)."
                ) from error

        return key

    def __reduce__(self) -> Any:
        """Pickle initializers that can be pickled, and neither arrays nor keys."""
        return Initializers, tuple(i if _is_importable(i) else _lost for i in self[:2])

    def __deepcopy__(self, memo: Any) -> "Initializers":
        """Return self: it is immutable, and initializers may be anything."""
        return self


def _is_importable(init: Any) -> bool:
    if not callable(init):
        return isinstance(init, int | float | complex | np.number)
    try:
        pickle.dumps(init)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


def _lost(shape: Any, dtype: Any) -> Any:
    """Stand in for an initializer that was not pickled."""
    raise ArgumentValueError(
        "this layer was pickled, and its initializer was not, being an array or a local function: "
        "the parameters cannot be initialized again. Use an initializer that can be imported, or "
        "set the parameters."
    )


def _call(
    argument: str,
    init: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: Any,
    key: Callable[[], Any],
) -> Any:
    try:
        parameters = list(inspect.signature(init).parameters.values())
    except (TypeError, ValueError):  # builtins such as numpy.zeros have no signature
        return init(shape, dtype)
    if not parameters:
        raise ArgumentTypeError(
            f"{argument}={init!r} takes no argument: an initializer takes (shape, dtype) and "
            "returns an array. For one value everywhere pass the number."
        )
    first = parameters[0].name
    if first in ("key", "rng", "rng_key"):
        return init(key(), shape, dtype)
    if first == "tensor":
        import torch

        return init(torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name)))
    if any(p.name == "dtype" for p in parameters):
        return init(shape, dtype=dtype)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return init(shape, dtype) if len(positional) >= 2 else init(shape)
