"""What a check expects: the results and gradients of the reference."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from groupnorm.errors import ArgumentValueError
from groupnorm.testing.compare import eps_of, extended, is_float, wide
from groupnorm.testing.derivatives import Derivatives, Index
from groupnorm.testing.options import Function, Options
from groupnorm.testing.trees import leaves

__all__ = ["Expected", "Gradient", "by_path_of", "largest_size", "merged"]

Array = Any


class Gradient(NamedTuple):
    """The reference's gradient for one argument."""

    #: Its elements, or all of it if that is None.
    at: list[Index] | None
    values: Array
    errors: Array
    #: Elements that are not finite and have no effect on the results.
    ignored: Array
    #: A direction in which all elements move, the derivative along it, and its error.
    along: tuple[Array, float, float] | None
    #: The size of results over that of the array: gradients below its last digit are zero.
    size: float


class Expected:
    """The reference's results for an input."""

    def __init__(
        self,
        reference: Function,
        is_function: bool,
        arguments: tuple[Any, ...],
        options: Options,
        name: str,
    ) -> None:
        self.name, self.arguments, self.options = name, arguments, options
        self.what = "the function itself, in NumPy," if is_function else "it"
        self.notes: list[tuple[str, str]] = []
        self.by_path = by_path_of(reference, arguments)
        given = [a for a in arguments if isinstance(a, np.ndarray)]
        self.given = [wide(a) for a in given]
        #: By their paths; the cotangents are those of floating-point results.
        self.results = self._attempt(lambda: self.flat(*self.given))
        if is_function and any(is_float(a.dtype) and a.dtype.itemsize >= 8 for a in given):
            self._extend()
        for path, y in self.results.items():
            if is_float(y.dtype) and eps_of(y.dtype) > eps_of(np.dtype(np.float64)):
                raise ArgumentValueError(
                    f"reference: its result{path} is {y.dtype} for the input {name!r}, whose "
                    "arrays it is given in float64: pass reference=, a function that computes in "
                    "float64."
                )
            if is_float(y.dtype) and y.size and not np.isfinite(y).any():
                self.notes.append((f"input {name!r}, values of result{path}", "none is finite"))
        rng = np.random.default_rng(options.seed)
        # Their values are numbers of every dtype, so that each row has the same.
        self.cotangents = {
            path: _like(rng, y.shape, np.iscomplexobj(y))
            for path, y in self.results.items()
            if is_float(y.dtype)
        }
        self.wanted = _wanted(options.gradients, arguments) if self.cotangents else []

    def flat(self, *values: Array) -> dict[str, Array]:
        """Return the results by their paths; neither arrays nor results are shared."""
        with np.errstate(all="ignore"):
            made = self.by_path(*(np.array(a) for a in values))
        return {path: np.array(y) for path, y in made.items()}

    def _attempt(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise ArgumentValueError(
                f"reference: {self.what} failed for the input {self.name!r} "
                f"({type(error).__name__}: {error}): it is called with float64 arrays of NumPy."
            ) from error

    def _extend(self) -> None:
        """Use long double, if the function computes in it."""
        longer = [extended(a) for a in self.given]
        why = "pass reference=, which is more accurate than float64"
        try:
            results = self.flat(*longer)
        except Exception as error:
            why = f"the function fails in long double ({type(error).__name__}): {why}"
        else:
            floats = [y for y in results.values() if is_float(y.dtype)]
            if all(eps_of(y.dtype) < eps_of(np.dtype(np.float64)) for y in floats):
                self.given, self.results = longer, results
                return
        self.notes.append((f"input {self.name!r}, digits beyond those of float64", why))

    @functools.cached_property
    def gradients(self) -> list[Gradient]:
        """The gradients, which are computed when the first row needs them."""
        rng = np.random.default_rng([self.options.seed, 1])
        if self.options.reference_vjp is not None:
            return self._exact(self.options.reference_vjp)
        return [self._attempt(functools.partial(self._differences, i, rng)) for i in self.wanted]

    def _exact(self, vjp: Function) -> list[Gradient]:
        arguments = merged(self.arguments, [np.array(a) for a in self.given])
        exact = self._attempt(lambda: vjp(*arguments, *self.cotangents.values()))
        exact = exact if isinstance(exact, list | tuple) else (exact,)
        shapes = [np.shape(g) for g in exact]
        if shapes != [self.given[i].shape for i in self.wanted]:
            raise ArgumentValueError(
                f"reference_vjp: it returned arrays of the shapes {shapes} for the input "
                f"{self.name!r}: return one gradient of the argument's shape for each of the "
                f"{len(self.wanted)} arguments."
            )
        none = np.zeros(0)
        return [
            Gradient(None, np.asarray(g), none, np.zeros(np.shape(g), bool), None, 0.0)
            for g in exact
        ]

    def _differences(self, i: int, rng: np.random.Generator) -> Gradient:
        def of_floats(*values: Array) -> list[Array]:
            ys = self.flat(*values)
            return [ys[path] for path in self.cotangents]

        x = self.given[i]
        finite = np.isfinite(x)
        at = [
            tuple(int(n) for n in index)
            for index in rng.permutation(np.argwhere(finite))[: self.options.elements]
        ]
        with np.errstate(all="ignore"):
            derivatives = Derivatives(of_floats, self.given, i, list(self.cotangents.values()))
            found = [derivatives.at(index) for index in at]
            along = derivatives.along_random(rng) if len(at) > 1 else None
            has_effect = finite.all() or not derivatives.ignores(~finite)
            paired = max(
                largest_size(c * self.results[path]) for path, c in self.cotangents.items()
            )
        return Gradient(
            at,
            np.array([value for value, _ in found]),
            np.array([error for _, error in found]),
            np.zeros(x.shape, bool) if has_effect else ~finite,
            along,
            paired / max(largest_size(x), 1.0),
        )


def largest_size(a: Array) -> float:
    """Return the largest finite size."""
    sizes = np.abs(a)
    return float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))


def by_path_of(function: Function, arguments: tuple[Any, ...]) -> Callable[..., dict[str, Array]]:
    """Return a function of the arrays alone, whose results are by their paths.

    This is what compilers take. It holds none of the arrays that were given: they would be traced.
    """
    others = tuple(None if isinstance(a, np.ndarray) else a for a in arguments)
    places = tuple(i for i, a in enumerate(arguments) if isinstance(a, np.ndarray))

    def by_path(*arrays: Array) -> dict[str, Array]:
        merged = list(others)
        for i, a in zip(places, arrays, strict=True):
            merged[i] = a
        return dict(leaves(function(*merged)))

    return by_path


def merged(arguments: tuple[Any, ...], values: Sequence[Any]) -> list[Any]:
    """Return the arguments with other arrays in the places of their arrays."""
    rest = iter(values)
    return [next(rest) if isinstance(a, np.ndarray) else a for a in arguments]


def _wanted(gradients: bool | Sequence[int], arguments: tuple[Any, ...]) -> list[int]:
    """Return the numbers, among the arrays, of those whose gradients are wanted."""
    if gradients is False:
        return []
    arrays = [i for i, a in enumerate(arguments) if isinstance(a, np.ndarray)]
    floats = [i for i in arrays if is_float(arguments[i].dtype)]
    if gradients is True:
        return [arrays.index(i) for i in floats]
    for i in gradients:
        if i not in floats:
            raise ArgumentValueError(
                f"gradients={gradients!r}: argument {i} is not a floating-point array."
            )
    return [arrays.index(i) for i in gradients]


def _like(rng: np.random.Generator, shape: tuple[int, ...], is_complex: bool) -> Array:
    """Return multiples of 1/16 up to 2, without 0, which bfloat16 has as well."""
    sizes = rng.integers(1, 33, size=(2, *shape)) * rng.choice([-1, 1], size=(2, *shape)) / 16
    return np.asarray(sizes[0] + 1j * sizes[1] if is_complex else sizes[0])
