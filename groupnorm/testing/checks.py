"""Run a function in every row, and compare each with a float64 reference."""

import functools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing.compare import (
    UNITS,
    Units,
    Worst,
    default_bound,
    dtype_name,
    eps_of,
    extended,
    is_float,
    wide,
    worst,
)
from groupnorm.testing.derivatives import Derivatives, Index
from groupnorm.testing.registry import Row, known_rows, rows_of
from groupnorm.testing.report import Finding, Report, Skipped
from groupnorm.testing.trees import leaves

__all__ = ["check"]

Array = Any
Function = Callable[..., Any]

# What differences in float64 are good for.
DIFFERENCES = 1e-7


def check(
    function: Function | Mapping[str, Function],
    *,
    inputs: Any,
    reference: Function | None = None,
    rows: str | Iterable[str | Row] | None = None,
    without: Mapping[str, str] = MappingProxyType({}),
    gradients: bool | Sequence[int] = True,
    vjp: Function | None = None,
    reference_vjp: Function | None = None,
    bound: float | None = None,
    gradient_bound: float | None = None,
    units: Units = "relative",
    dtype: str | None = "input",
    elements: int = 64,
    seed: int = 0,
) -> Report:
    """Run a function of arrays in every library, and compare it with a float64 reference.

    For each row and input: the results' library, dtype, device and shape, their values, that the
    inputs are unchanged, and the gradients for random cotangents.

    Parameters
    ----------
    function : callable or mapping
        Takes the arrays of an input, and returns an array or nested dicts, lists and tuples of
        arrays. A mapping has one function for each library or row, such as ``{"torch": module,
        "jax": port}``; other rows are left out.
    inputs : mapping, tuple or ndarray
        The NumPy arguments by name, such as ``{"offset": (x, weight)}`` or what `hard_inputs`
        returns; or those of a single input. Arrays are placed in each row's library; other
        arguments, such as None and numbers, are passed on.
    reference : callable, optional
        Takes the same arguments, in float64, and returns the same results as NumPy arrays. Default
        is the function itself with NumPy, in float64, and for inputs in float64 in long double:
        that finds what is wrong in one library, or for lack of digits, but not what is wrong
        everywhere. A function that converts its arrays to a narrower dtype needs a reference.
    rows : str or iterable, optional
        As for `testing.rows`. Default is every row that can be used here.
    without : mapping of str to str, optional
        Rows that are left out, and why, which the report repeats: ``{"dask": "no sorting"}``. The
        name of a library stands for all of its rows.
    gradients : bool or sequence of int
        Whether to check gradients; or the positions of the arguments to check them for. Default is
        all arguments that are floating-point arrays.
    vjp : callable, optional
        For rows without automatic differentiation: takes the arguments and then one cotangent for
        each result, and returns one gradient for each argument that is wanted.
    reference_vjp : callable, optional
        The same for the reference, in float64. Default are differences of the reference: for some
        `elements`, and for all of them together along a random direction. The report lists where
        they are not accurate, such as at kinks.
    bound, gradient_bound : float, optional
        The largest error that is right. Default follows from the dtype: 50 times its epsilon (4
        times in 16 bits), or 64 units in the last place.
    units : {"relative", "mixed", "ulp"}
        Those of the values' errors: relative to the result's largest number; to
        ``max(1, abs(reference))`` at each element; or in units in the last place. Errors of
        gradients are relative to the largest.
    dtype : str, optional
        The dtype that floating-point results must have: "input" for that of the inputs, a name, or
        None for any.
    elements : int
        At most how many elements of each gradient are compared with differences one by one; each
        takes some tens of calls of the reference.
    seed : int
        Of the cotangents, and of the choice of elements.

    Returns
    -------
    Report

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If an argument is invalid, or the reference fails.

    Examples
    --------
    >>> import numpy as np
    >>> from groupnorm import testing
    >>> def spread(x):
    ...     return (x * x).mean() - x.mean() ** 2
    >>> x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    >>> bool(testing.check(spread, inputs=x, rows="numpy"))
    True
    >>> print(testing.check(spread, inputs=x + 1000, rows="numpy").wrong[0])  # doctest: +ELLIPSIS
    numpy, input 'input': result: ... instead of ...
    """
    asked = _Asked(
        gradients, vjp, reference_vjp, bound, gradient_bound, units, dtype, elements, seed
    )
    asked.validate()
    _validate_functions(function, reference=reference, vjp=vjp, reference_vjp=reference_vjp)
    chosen, absent = rows_of(rows, without)
    if not chosen and rows is not None and not without:
        raise ArgumentValueError(f"rows={rows!r} has no row: name one, or pass None for all.")
    named = _named(inputs)
    report = Report([], list(named), units)
    report.skipped += [Skipped(name, "everything", why) for name, why in absent.items()]
    wanted = _reference(function, reference)
    expected = {
        name: _Expected(wanted, reference is None, arguments, asked, name)
        for name, arguments in named.items()
    }
    for row in chosen:
        own = _function_for(function, row)
        if own is None:
            report.skipped.append(Skipped(row.name, "everything", "there is no function for it"))
            continue
        report.rows.append(row.name)
        for name, arguments in named.items():
            _Trial(row, name, own, arguments, expected[name], asked, report).run()
    report.skipped += [
        Skipped("reference", what, why) for made in expected.values() for what, why in made.notes
    ]
    return report


class _Asked(NamedTuple):
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


def _validate_functions(function: Any, **others: Any) -> None:
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


def _named(inputs: Any) -> dict[str, tuple[Any, ...]]:
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


def _function_for(function: Any, row: Row) -> Function | None:
    own: Function | None = function
    if isinstance(function, Mapping):
        own = function.get(row.name, function.get(row.library))
    return own


def _reference(function: Any, reference: Function | None) -> Function:
    if reference is not None:
        return reference
    own: Function | None = function.get("numpy") if isinstance(function, Mapping) else function
    if own is not None:
        return own
    raise ArgumentValueError(
        "reference=None takes the function for NumPy, and the mapping has none: pass reference=, "
        "a function of float64 arrays of NumPy."
    )


# The reference ------------------------------------------------------------------------------------


class _Gradient(NamedTuple):
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


class _Expected:
    """The reference's results for an input."""

    def __init__(
        self,
        reference: Function,
        is_function: bool,
        arguments: tuple[Any, ...],
        asked: _Asked,
        name: str,
    ) -> None:
        self.name, self.arguments, self.asked = name, arguments, asked
        self.what = "the function itself, in NumPy," if is_function else "it"
        self.notes: list[tuple[str, str]] = []
        self.by_path = _by_path(reference, arguments)
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
        rng = np.random.default_rng(asked.seed)
        # Their values are numbers of every dtype, so that each row has the same.
        self.cotangents = {
            path: _like(rng, y.shape, np.iscomplexobj(y))
            for path, y in self.results.items()
            if is_float(y.dtype)
        }
        self.wanted = _wanted(asked.gradients, arguments) if self.cotangents else []

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
    def gradients(self) -> list[_Gradient]:
        """The gradients, which are computed when the first row needs them."""
        rng = np.random.default_rng([self.asked.seed, 1])
        if self.asked.reference_vjp is not None:
            return self._exact(self.asked.reference_vjp)
        return [self._attempt(functools.partial(self._differences, i, rng)) for i in self.wanted]

    def _exact(self, vjp: Function) -> list[_Gradient]:
        arguments = _merged(self.arguments, [np.array(a) for a in self.given])
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
            _Gradient(None, np.asarray(g), none, np.zeros(np.shape(g), bool), None, 0.0)
            for g in exact
        ]

    def _differences(self, i: int, rng: np.random.Generator) -> _Gradient:
        def of_floats(*values: Array) -> list[Array]:
            ys = self.flat(*values)
            return [ys[path] for path in self.cotangents]

        x = self.given[i]
        finite = np.isfinite(x)
        at = [
            tuple(int(n) for n in index)
            for index in rng.permutation(np.argwhere(finite))[: self.asked.elements]
        ]
        with np.errstate(all="ignore"):
            derivatives = Derivatives(of_floats, self.given, i, list(self.cotangents.values()))
            found = [derivatives.at(index) for index in at]
            along = derivatives.along_random(rng) if len(at) > 1 else None
            has_effect = finite.all() or not derivatives.ignores(~finite)
            paired = max(_largest(c * self.results[path]) for path, c in self.cotangents.items())
        return _Gradient(
            at,
            np.array([value for value, _ in found]),
            np.array([error for _, error in found]),
            np.zeros(x.shape, bool) if has_effect else ~finite,
            along,
            paired / max(_largest(x), 1.0),
        )


def _largest(a: Array) -> float:
    """Return the largest finite size."""
    sizes = np.abs(a)
    return float(np.max(sizes, initial=0.0, where=np.isfinite(sizes)))


def _by_path(function: Function, arguments: tuple[Any, ...]) -> Callable[..., dict[str, Array]]:
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


def _merged(arguments: tuple[Any, ...], values: Sequence[Any]) -> list[Any]:
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


# One row, one input -------------------------------------------------------------------------------


class _Trial(NamedTuple):
    row: Row
    name: str
    function: Function
    arguments: tuple[Any, ...]
    expected: _Expected
    asked: _Asked
    report: Report

    def run(self) -> None:
        """Compare everything, and add what is found to the report."""
        row, host = self.row, self.host
        lacking = {a.dtype.name for a in host} - row.dtypes
        if lacking:
            self.skip(f"input {self.name!r}", f"{row.library} has no {', '.join(sorted(lacking))}")
            return
        # What is not finite is found in the values; NumPy need not warn of it.
        with row.precision(*(a.dtype.name for a in host)), np.errstate(all="ignore"):
            try:
                placed = [row.asarray(a) for a in host]
                made = row.compiled(_by_path(self.function, self.arguments))(*placed)
                same = self.results(made)
                self.unchanged(placed, host)
            except Exception as error:  # whatever is raised is the row's result
                self.raised("result", error)
                return
            if not self.expected.wanted or not same:
                return
            if "autodiff" in row.cannot and self.asked.vjp is None:
                self.skip("gradients", row.cannot["autodiff"])
                return
            exact = self.expected.gradients
            try:
                self.gradients(placed, made, exact)
            except Exception as error:
                self.raised("gradient", error)

    @property
    def host(self) -> list[Array]:
        """The arguments that are arrays, as they were given."""
        return [a for a in self.arguments if isinstance(a, np.ndarray)]

    def unchanged(self, placed: list[Array], host: list[Array], what: str = "array") -> None:
        """Check that arrays were not written to."""
        for i, (before, after) in enumerate(zip(host, placed, strict=True)):
            native = before.astype(before.dtype.newbyteorder("="), copy=False)
            now = self.row.to_numpy(after).astype(native.dtype, copy=False)
            if now.tobytes() != native.tobytes():
                self.wrong("input changed", f"{what} {i}", "the function wrote to its input")

    def results(self, made: dict[str, Array]) -> bool:
        """Compare the results, and return whether they are arrays at the paths of the reference."""
        expected = self.expected.results
        if made.keys() != expected.keys():
            self.wrong("results", "result", f"{_paths(made)} instead of {_paths(expected)}")
            return False
        for path in expected:
            self.result(made[path], path)
        return all(map(self.row.is_array, made.values()))

    def result(self, y: Array, path: str, note: str = "") -> None:
        """Compare one result."""
        want, where = self.expected.results[path], f"result{path}{note}"
        floats = [a.dtype for a in self.host if is_float(a.dtype)]
        if self.is_like(y, where, _expected_dtype(self.asked.dtype, floats, want), want.shape):
            got = self.row.to_numpy(y)
            bound = self.asked.bound
            bound = default_bound(got.dtype, self.asked.units) if bound is None else bound
            self.compare("value", where, worst(got, want, self.asked.units), bound)

    def gradients(
        self, placed: list[Array], made: dict[str, Array], exact: list[_Gradient]
    ) -> None:
        """Compare the gradients, and the results that are computed with them."""
        row, expected, asked, host = self.row, self.expected, self.asked, self.host
        given = [
            np.asarray(c.astype(row.to_numpy(made[path]).dtype))
            for path, c in expected.cotangents.items()
        ]
        cotangents = [row.asarray(c) for c in given]
        by_path, paths = _by_path(self.function, self.arguments), tuple(expected.cotangents)

        def of_floats(*arrays: Array) -> list[Array]:
            ys = by_path(*arrays)
            return [ys[path] for path in paths]

        results: list[Array] = []
        if "autodiff" in row.cannot:
            assert asked.vjp is not None
            found = asked.vjp(*_merged(self.arguments, placed), *cotangents)
            found = list(found) if isinstance(found, list | tuple) else [found]
        else:
            results, found = row.vjp(of_floats, placed, expected.wanted, cotangents)
        wrong = {f.where for f in self.report.wrong if (f.row, f.input) == (row.name, self.name)}
        for y, path in zip(results, expected.cotangents, strict=False):
            if f"result{path}" not in wrong:  # or it would be told twice
                self.result(y, path, " with gradients")
        self.unchanged(placed, host, "with gradients, array")
        self.unchanged(cotangents, given, "cotangent")
        if len(found) != len(expected.wanted):
            self.wrong("results", "gradient", f"{len(found)} instead of {len(expected.wanted)}")
            return
        numbers = [i for i, a in enumerate(self.arguments) if isinstance(a, np.ndarray)]
        for g, i, want in zip(found, expected.wanted, exact, strict=True):
            where = f"gradient of argument {numbers[i]}"
            if self.is_like(g, where, host[i].dtype.name, host[i].shape):
                self.gradient(row.to_numpy(g), want, where)

    def gradient(self, got: Array, want: _Gradient, where: str) -> None:
        """Compare one gradient."""
        bound = self.asked.gradient_bound
        if bound is None:
            bound = default_bound(got.dtype, "relative")
            bound = bound if want.at is None else max(bound, DIFFERENCES)
        if want.at is None:
            self.compare("gradient", where, worst(got, want.values, "relative"), bound)
            return
        nonzero = np.argwhere(want.ignored & ~(got == 0))
        if len(nonzero):
            index = tuple(int(n) for n in nonzero[0])
            message = f"{got[index]} instead of 0 at {list(index)}, which has no effect"
            self.wrong("gradient", where, message)
        everywhere = np.abs(wide(got))
        largest = max(_largest(everywhere), _largest(want.values))
        is_zero = _largest(want.values) < want.size * eps_of(got.dtype)
        if is_zero:  # and what is computed is rounding, of terms of that size
            largest = max(largest, want.size)
        self.elements(got, want, where, bound, largest)
        if want.along is None:
            return
        direction, derivative, error = want.along
        sizes = np.abs(direction).astype(np.float64)
        moves = sizes > 0
        total = float(np.sum(sizes * np.where(np.isfinite(everywhere), everywhere, 0)))
        if is_zero:
            total = max(total, want.size * float(np.sum(sizes)))
        if not (math.isfinite(derivative) and error <= 0.1 * max(total, abs(derivative))):
            self.skip(
                f"{where}, input {self.name!r}, all elements together",
                "differences of the reference are not accurate there: give a reference_vjp=",
            )
            return
        product = np.conj(wide(got)) * np.where(moves, direction, 0)
        ours = float(np.sum(np.where(moves, product, 0)).real)
        off = max(0.0, abs(ours - derivative) - error) if math.isfinite(ours) else math.inf
        message = (
            f"the derivative in a direction that moves all elements is {ours:.9g} instead of "
            f"{derivative:.9g}: error {off / total if total else off:.2g}, allowed {bound:.2g}"
        )
        share = 0.0 if off == 0 else off / total if total else math.inf
        self.add("gradient", f"{where}, all elements", share, bound, message)

    def elements(
        self, got: Array, want: _Gradient, where: str, bound: float, largest: float
    ) -> None:
        """Compare the elements of a gradient for which there are differences."""
        assert want.at is not None
        known = np.isfinite(want.values) & (want.errors <= 0.1 * largest)
        if not known.all():
            self.skip(
                f"{where}, input {self.name!r}, {np.sum(~known)} of {len(known)} elements",
                "differences of the reference are not accurate there: give a reference_vjp=",
            )
        if not known.any():
            return
        indices = [index for index, k in zip(want.at, known, strict=True) if k]
        values = np.array([got[index] for index in indices], got.dtype)
        exact, errors = want.values[known], want.errors[known]
        # As far towards the row's value as the error of the differences reaches.
        gap = wide(values) - exact
        share = np.divide(errors, np.abs(gap), out=np.ones(len(gap)), where=np.abs(gap) > errors)
        near = exact + np.where(np.isfinite(gap), gap * share, 0)
        found = worst(values, near, "relative", largest)
        self.compare("gradient", where, found._replace(at=indices[found.at[0]]), bound)

    def is_like(self, y: Array, where: str, dtype: str | None, shape: tuple[int, ...]) -> bool:
        """Check library, dtype, device and shape, which come before any value."""
        row = self.row
        if not row.is_array(y):
            kind = f"{type(y).__module__}.{type(y).__qualname__}"
            self.wrong("library", where, f"{kind} is not an array of {row.library}")
            return False
        got = dtype_name(y)
        if dtype is not None and not _same_dtype(got, dtype):
            self.wrong("dtype", where, f"{got} instead of {dtype}")
            return False
        here, there = row.device_of(y), row.device_of(row.empty())
        if here != there:
            self.wrong("device", where, f"{here} instead of {there}")
            return False
        if tuple(y.shape) != tuple(shape):
            self.wrong("shape", where, f"{tuple(y.shape)} instead of {tuple(shape)}")
            return False
        return True

    def compare(self, what: str, where: str, found: Worst, bound: float) -> None:
        """Add a comparison of values."""
        message = (
            f"{found.value} instead of {found.reference} at {list(found.at)}: error "
            f"{found.error:.2g}, allowed {bound:.2g} ({found.ulps:.3g} units in the last place)"
        )
        self.add(what, where, found.error, bound, message, found)

    def add(
        self, what: str, where: str, error: float, bound: float, message: str,
        found: Worst | None = None,
    ) -> None:  # fmt: skip
        """Add a finding."""
        finding = Finding(self.row.name, self.name, what, where, error, bound, message)
        if found is not None:
            finding = replace(
                finding,
                at=found.at,
                value=found.value,
                reference=found.reference,
                ulps=found.ulps,
            )
        self.report.findings.append(finding)

    def wrong(self, what: str, where: str, message: str) -> None:
        """Add what cannot be compared."""
        self.add(what, where, math.inf, 0.0, message)

    def raised(self, where: str, error: Exception) -> None:
        """Add an exception."""
        self.wrong("raised", where, f"{type(error).__name__}: {_first_line(error)}")
        self.report.errors.append(error)

    def skip(self, what: str, reason: str) -> None:
        """Add what is not checked, once."""
        skipped = Skipped(self.row.name, what, reason)
        if skipped not in self.report.skipped:
            self.report.skipped.append(skipped)


def _paths(results: Mapping[str, Array]) -> str:
    """Return the paths of results, in words."""
    if list(results) == [""]:
        return "one array"
    return ", ".join(f"result{path}" for path in results) or "nothing"


def _expected_dtype(wanted: str | None, floats: list[Any], want: Array) -> str | None:
    """Return the name of the dtype that a result must have; None for any."""
    if not is_float(want.dtype):
        return {"b": "bool"}.get(want.dtype.kind, "integer")
    if wanted != "input" or not floats:
        return None if wanted == "input" else wanted
    dtype = floats[0]
    for other in floats[1:]:
        if other != dtype and {other.name, dtype.name} == {"float16", "bfloat16"}:
            dtype = np.dtype(np.float32)
        elif other != dtype:
            dtype = np.result_type(dtype, other)
    if (want.dtype.kind == "c") == (dtype.kind == "c"):
        return str(dtype.name)
    if dtype.itemsize < 4:
        return None  # libraries have several complex dtypes for it
    size = dtype.itemsize * (16 if want.dtype.kind == "c" else 4)
    return f"{'complex' if want.dtype.kind == 'c' else 'float'}{size}"


def _same_dtype(got: str, wanted: str) -> bool:
    return got == wanted or (wanted == "integer" and got.startswith(("int", "uint")))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
