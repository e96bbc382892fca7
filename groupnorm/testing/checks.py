"""Run a function in every row, and compare each with a float64 reference."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing.compare import (
    Units,
    Worst,
    default_bound,
    dtype_name,
    is_float,
    wide,
    worst,
)
from groupnorm.testing.derivatives import differences
from groupnorm.testing.registry import Row, rows_of
from groupnorm.testing.report import Finding, Report, Skipped, badness
from groupnorm.testing.trees import leaves

__all__ = ["check", "record"]

Array = Any
Function = Callable[..., Any]

# What differences in float64 are good for.
DIFFERENCES = 1e-7

#: The finding of each row, in all checks of this process, that is nearest to its bound or beyond
#: it; the pytest plugin shows them.
record: dict[str, Finding] = {}


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
        is the function itself with NumPy, in float64: that finds what is wrong in one library, or
        for lack of digits, but not what is wrong everywhere.
    rows : str or iterable, optional
        As for `testing.rows`. Default is every row that can be used here.
    without : mapping of str to str, optional
        Rows that are left out, and why, which the report repeats: ``{"dask": "no sorting"}``.
    gradients : bool or sequence of int
        Whether to check gradients; or the positions of the arguments to check them for. Default is
        all arguments that are floating-point arrays.
    vjp : callable, optional
        For rows without automatic differentiation: takes the arguments and then one cotangent for
        each result, and returns one gradient for each argument that is wanted.
    reference_vjp : callable, optional
        The same for the reference, in float64. Default are differences of the reference, at some
        `elements`.
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
        At most how many elements of each gradient are compared with differences.
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
    chosen, absent = rows_of(rows, without)
    named = _named(inputs)
    if not isinstance(function, Mapping) and not callable(function):
        raise ArgumentTypeError(
            f"function={function!r} cannot be called: pass a function, a module, or a mapping of "
            "them by the names of libraries or rows."
        )
    report = Report([], list(named), units)
    report.skipped += [Skipped(name, "everything", why) for name, why in absent.items()]
    asked = _Asked(
        gradients, vjp, reference_vjp, bound, gradient_bound, units, dtype, elements, seed
    )
    expected = {
        name: _Expected.of(_reference(function, reference), arguments, asked, name)
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
    for name in report.rows:
        found = [f for f in (record.get(name), report.worst(name)) if f is not None]
        if found:
            record[name] = max(found, key=badness)
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


def _named(inputs: Any) -> dict[str, tuple[Any, ...]]:
    if isinstance(inputs, np.ndarray | tuple):
        inputs = {"input": inputs}
    if not isinstance(inputs, Mapping) or not inputs:
        raise ArgumentTypeError(
            f"inputs={inputs!r} is not an array, a tuple of arguments, or a mapping of these by "
            "name: pass NumPy arrays, such as testing.hard_inputs((2, 8, 5))."
        )
    return {
        str(name): value if isinstance(value, tuple) else (value,) for name, value in inputs.items()
    }


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


class _Expected(NamedTuple):
    """The reference's results for an input."""

    #: By their paths; the cotangents are those of floating-point results.
    results: dict[str, Array]
    cotangents: dict[str, Array]
    wanted: list[int]
    #: For each wanted argument: the elements (None for all) and the gradient there.
    gradients: list[tuple[list[tuple[int, ...]] | None, Array]]

    @staticmethod
    def of(reference: Function, arguments: tuple[Any, ...], asked: _Asked, name: str) -> Any:
        """Compute the reference, and its gradients."""
        arrays = [wide(a) if isinstance(a, np.ndarray) else a for a in arguments]

        by_path = _by_path(reference, arguments)

        def flat(*values: Array) -> dict[str, Array]:
            return {path: np.asarray(y) for path, y in by_path(*values).items()}

        given = [a for a in arrays if isinstance(a, np.ndarray)]
        try:
            with np.errstate(all="ignore"):
                results = flat(*given)
        except Exception as error:
            raise ArgumentValueError(
                f"reference: it failed for the input {name!r} ({type(error).__name__}: {error}): "
                "it is called with float64 arrays of NumPy."
            ) from error
        rng = np.random.default_rng(asked.seed)
        # Their values are numbers of every dtype, so that each row has the same.
        cotangents = {
            path: _like(rng, y.shape, np.iscomplexobj(y))
            for path, y in results.items()
            if is_float(y.dtype)
        }
        wanted = _wanted(asked.gradients, arguments) if cotangents else []
        found: list[tuple[list[tuple[int, ...]] | None, Array]] = []
        if wanted and asked.reference_vjp is not None:
            exact = asked.reference_vjp(*arrays, *cotangents.values())
            exact = exact if isinstance(exact, list | tuple) else (exact,)
            found = [(None, np.asarray(g)) for g in exact]
        elif wanted:

            def of_floats(*values: Array) -> list[Array]:
                ys = flat(*values)
                return [ys[path] for path in cotangents]

            for i in wanted:
                at = _elements(rng, given[i].shape, asked.elements)
                with np.errstate(all="ignore"):
                    exact = differences(of_floats, given, i, at, list(cotangents.values()))
                found.append((at, exact))
        return _Expected(results, cotangents, wanted, found)


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
    """Return multiples of 1/16 between -2 and 2, which bfloat16 has as well."""
    drawn = rng.integers(-32, 33, size=shape) / 16
    return drawn + 1j * rng.integers(-32, 33, size=shape) / 16 if is_complex else drawn


def _elements(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    size = math.prod(shape)
    flat = np.sort(rng.permutation(size)[:most])
    return [tuple(int(i) for i in np.unravel_index(j, shape)) for j in flat]


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
            placed = [row.asarray(a) for a in host]
            try:
                made = row.compiled(_by_path(self.function, self.arguments))(*placed)
            except Exception as error:  # whatever the function raises is its result
                self.wrong("raised", "result", f"{type(error).__name__}: {_first_line(error)}")
                return
            same = self.results(made)
            for i, (before, after) in enumerate(zip(host, placed, strict=True)):
                native = before.astype(before.dtype.newbyteorder("="), copy=False)
                if row.to_numpy(after).astype(native.dtype).tobytes() != native.tobytes():
                    self.wrong("input changed", f"array {i}", "the function wrote to its input")
            if self.expected.wanted and same:
                self.gradients(placed, made)

    @property
    def host(self) -> list[Array]:
        """The arguments that are arrays, as they were given."""
        return [a for a in self.arguments if isinstance(a, np.ndarray)]

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
            bound = self.asked.bound
            got = self.row.to_numpy(y)
            bound = default_bound(got.dtype, self.asked.units) if bound is None else bound
            self.compare("value", where, worst(got, want, self.asked.units), bound)

    def gradients(self, placed: list[Array], made: dict[str, Array]) -> None:
        """Compare the gradients, and the results that are computed with them."""
        row, expected, asked = self.row, self.expected, self.asked
        if "autodiff" in row.cannot and asked.vjp is None:
            self.skip("gradients", row.cannot["autodiff"])
            return
        cotangents = [
            row.asarray(c.astype(row.to_numpy(made[path]).dtype))
            for path, c in expected.cotangents.items()
        ]
        by_path, paths = _by_path(self.function, self.arguments), tuple(expected.cotangents)

        def of_floats(*arrays: Array) -> list[Array]:
            ys = by_path(*arrays)
            return [ys[path] for path in paths]

        results: list[Array] = []
        try:
            if "autodiff" in row.cannot:
                assert asked.vjp is not None
                found = asked.vjp(*_merged(self.arguments, placed), *cotangents)
                found = list(found) if isinstance(found, list | tuple) else [found]
            else:
                results, found = row.vjp(of_floats, placed, expected.wanted, cotangents)
        except Exception as error:
            self.wrong("raised", "gradient", f"{type(error).__name__}: {_first_line(error)}")
            return
        for y, path in zip(results, expected.cotangents, strict=False):
            self.result(y, path, " with gradients")
        if len(found) != len(expected.wanted):
            self.wrong("results", "gradient", f"{len(found)} instead of {len(expected.wanted)}")
            return
        host = self.host
        numbers = [i for i, a in enumerate(self.arguments) if isinstance(a, np.ndarray)]
        for g, i, (at, want) in zip(found, expected.wanted, expected.gradients, strict=True):
            where = f"gradient of argument {numbers[i]}"
            if not self.is_like(g, where, host[i].dtype.name, host[i].shape):
                continue
            got = row.to_numpy(g)
            bound = asked.gradient_bound
            if bound is None:
                bound = default_bound(got.dtype, "relative")
                bound = bound if at is None else max(bound, DIFFERENCES)
            if at is None:
                self.compare("gradient", where, worst(got, want, "relative"), bound)
                continue
            known = np.isfinite(want)
            if not known.all():
                lost = f"{len(want) - known.sum()} of {len(want)} elements"
                self.skip(
                    f"{where}, input {self.name!r}, {lost}",
                    "differences of the reference are not finite there: give a reference_vjp=",
                )
            indices = [index for index, k in zip(at, known, strict=True) if k]
            values = np.array([got[index] for index in indices], got.dtype)
            largest = worst(values, want[known], "relative")
            if indices:
                largest = largest._replace(at=indices[largest.at[0]])
            elif at:
                continue  # nothing was compared, which was said
            self.compare("gradient", where, largest, bound)

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
        self.report.findings.append(
            Finding(self.row.name, self.name, what, where, found.error, bound, message)
        )

    def wrong(self, what: str, where: str, message: str) -> None:
        """Add what cannot be compared."""
        self.report.findings.append(
            Finding(self.row.name, self.name, what, where, math.inf, 0.0, message)
        )

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
        dtype = other if other == dtype else np.result_type(dtype, other)
    if (want.dtype.kind == "c") == (dtype.kind == "c") or dtype.itemsize < 4:
        return str(dtype.name)
    size = dtype.itemsize * (16 if want.dtype.kind == "c" else 4)
    return f"{'complex' if want.dtype.kind == 'c' else 'float'}{size}"


def _same_dtype(got: str, wanted: str) -> bool:
    return got == wanted or (wanted == "integer" and got.startswith(("int", "uint")))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]
