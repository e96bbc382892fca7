"""Run a function in every row, and compare each with a float64 reference."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from groupnorm.errors import ArgumentValueError
from groupnorm.testing.compare import (
    Units,
    Worst,
    default_bound,
    dtype_name,
    eps_of,
    is_float,
    wide,
    worst,
)
from groupnorm.testing.options import Function, Options, named_inputs, validate_functions
from groupnorm.testing.reference import Expected, Gradient, by_path_of, largest_size, merged
from groupnorm.testing.registry import Row, rows_of
from groupnorm.testing.report import Finding, Report, Skipped

__all__ = ["check"]

Array = Any

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
    options = Options(
        gradients, vjp, reference_vjp, bound, gradient_bound, units, dtype, elements, seed
    )
    options.validate()
    validate_functions(function, reference=reference, vjp=vjp, reference_vjp=reference_vjp)
    chosen, absent = rows_of(rows, without)
    if not chosen and rows is not None and not without:
        raise ArgumentValueError(f"rows={rows!r} has no row: name one, or pass None for all.")
    named = named_inputs(inputs)
    report = Report([], list(named), units)
    report.skipped += [Skipped(name, "everything", why) for name, why in absent.items()]
    wanted = _reference(function, reference)
    expected = {
        name: Expected(wanted, reference is None, arguments, options, name)
        for name, arguments in named.items()
    }
    for row in chosen:
        own = _function_for(function, row)
        if own is None:
            report.skipped.append(Skipped(row.name, "everything", "there is no function for it"))
            continue
        report.rows.append(row.name)
        for name, arguments in named.items():
            _Trial(row, name, own, arguments, expected[name], options, report).run()
    report.skipped += [
        Skipped("reference", what, why) for made in expected.values() for what, why in made.notes
    ]
    return report


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


# One row, one input -------------------------------------------------------------------------------


class _Trial(NamedTuple):
    row: Row
    name: str
    function: Function
    arguments: tuple[Any, ...]
    expected: Expected
    options: Options
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
                made = row.compiled(by_path_of(self.function, self.arguments))(*placed)
                same = self.results(made)
                self.unchanged(placed, host)
            except Exception as error:  # whatever is raised is the row's result
                self.raised("result", error)
                return
            if not self.expected.wanted or not same:
                return
            if "autodiff" in row.cannot and self.options.vjp is None:
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
        if self.is_like(y, where, _expected_dtype(self.options.dtype, floats, want), want.shape):
            got = self.row.to_numpy(y)
            bound = self.options.bound
            bound = default_bound(got.dtype, self.options.units) if bound is None else bound
            self.compare("value", where, worst(got, want, self.options.units), bound)

    def gradients(self, placed: list[Array], made: dict[str, Array], exact: list[Gradient]) -> None:
        """Compare the gradients, and the results that are computed with them."""
        row, expected, options, host = self.row, self.expected, self.options, self.host
        given = [
            np.asarray(c.astype(row.to_numpy(made[path]).dtype))
            for path, c in expected.cotangents.items()
        ]
        cotangents = [row.asarray(c) for c in given]
        by_path, paths = by_path_of(self.function, self.arguments), tuple(expected.cotangents)

        def of_floats(*arrays: Array) -> list[Array]:
            ys = by_path(*arrays)
            return [ys[path] for path in paths]

        results: list[Array] = []
        if "autodiff" in row.cannot:
            assert options.vjp is not None
            found = options.vjp(*merged(self.arguments, placed), *cotangents)
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

    def gradient(self, got: Array, want: Gradient, where: str) -> None:
        """Compare one gradient."""
        bound = self.options.gradient_bound
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
        largest = max(largest_size(everywhere), largest_size(want.values))
        is_zero = largest_size(want.values) < want.size * eps_of(got.dtype)
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
        self, got: Array, want: Gradient, where: str, bound: float, largest: float
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
