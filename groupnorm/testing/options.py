"""The arguments of `check`."""

import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing.compare import UNITS, Units
from groupnorm.testing.registry import known_rows

__all__ = ["Options", "named_inputs", "validate_functions"]

Function = Callable[..., Any]


class Options(NamedTuple):
    """How to compare; see `check`."""

    gradients: bool | Sequence[int]
    vjp: Function | None
    reference_vjp: Function | None
    bound: float | None
    gradient_bound: float | None
    units: Units
    dtype: str | None
    elements: int
    seed: int

    def validate(self) -> None:
        """Check the arguments that need no arrays."""
        if self.units not in UNITS:
            raise ArgumentValueError(f"units={self.units!r} is not known: choose from {UNITS}.")
        for name in ("bound", "gradient_bound"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and value >= 0):
                raise ArgumentValueError(f"{name}={value!r} is not a number from 0 on, or None.")
        for name, least in (("elements", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ArgumentValueError(f"{name}={value!r} is not an integer from {least} on.")
        if self.dtype not in (None, "input", "bfloat16"):
            try:
                np.dtype(self.dtype)
            except TypeError as error:
                raise ArgumentValueError(
                    f"dtype={self.dtype!r} is not a dtype's name: pass 'input', one such as "
                    "'float32', or None."
                ) from error
        if not isinstance(self.gradients, bool):
            listed = isinstance(self.gradients, Sequence)
            if not listed or not all(type(i) is int for i in self.gradients):
                raise ArgumentTypeError(
                    f"gradients={self.gradients!r} is neither a bool nor a list of positions: pass "
                    "True, False or, say, [0]."
                )


def validate_functions(function: Any, **others: Any) -> None:
    """Check that functions can be called, and the keys of a mapping of them."""
    known = set(known_rows()) | {row.library for row in known_rows().values()}
    if isinstance(function, Mapping):
        for name in function:
            if name not in known:
                raise ArgumentValueError(
                    f"function has the key {name!r}, which is neither a row nor a library: choose "
                    f"from {', '.join(sorted(known))}."
                )
    for name in ("reference", "vjp", "reference_vjp"):
        if others[name] is not None and not callable(others[name]):
            raise ArgumentTypeError(f"{name}={others[name]!r} cannot be called: pass a function.")
    for one in function.values() if isinstance(function, Mapping) else [function]:
        if not callable(one):
            raise ArgumentTypeError(
                f"function={one!r} cannot be called: pass a function, a module, or a mapping of "
                "them by the names of libraries or rows."
            )


def named_inputs(inputs: Any) -> dict[str, tuple[Any, ...]]:
    """Return the tuples of arguments by the names of the inputs."""
    if isinstance(inputs, np.ndarray | tuple):
        inputs = {"input": inputs}
    if not isinstance(inputs, Mapping) or not inputs:
        raise ArgumentTypeError(
            f"inputs={reprlib.repr(inputs)} is not an array, a tuple of arguments, or a mapping of "
            "these by name: pass NumPy arrays, such as testing.hard_inputs((2, 8, 5))."
        )
    named = {
        str(name): value if isinstance(value, tuple) else (value,) for name, value in inputs.items()
    }
    for name, arguments in named.items():
        for i, argument in enumerate(arguments):
            if not isinstance(argument, np.ndarray) and _holds_arrays(argument):
                raise ArgumentTypeError(
                    f"inputs[{name!r}] has as argument {i} a {type(argument).__name__} that is, or "
                    "has in it, an array: pass each array as an argument of its own, of NumPy."
                )
    return named


def _holds_arrays(argument: Any) -> bool:
    if isinstance(argument, Mapping | list | tuple):
        parts = argument.values() if isinstance(argument, Mapping) else argument
        return any(map(_holds_arrays, parts))
    return hasattr(argument, "shape") and not isinstance(argument, np.generic)
