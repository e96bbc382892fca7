"""`testing.check`: references, gradients, kinds of results and arguments, and its report."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from groupnorm import testing
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import registry

pytestmark = pytest.mark.needs("array_api_strict", "dask", "jax", "torch")

ROWS = "numpy,jax:jit,torch"


@pytest.fixture
def x(rng):
    return rng.normal(size=(3, 4)).astype(np.float32)


def test_trees_of_results_and_arguments_that_are_no_arrays(x):
    def function(x, power, nothing, y):
        assert nothing is None
        return {"sum": x + y, "parts": [x**power, (y,)], "none": None}

    report = testing.check(function, inputs=(x, 2, None, x + 1), rows=ROWS)
    report.raise_if_wrong()
    where = {finding.where for finding in report.findings if finding.what == "value"}
    paths = {"result['sum']", "result['parts'][0]", "result['parts'][1][0]"}
    assert where == paths | {f"{path} with gradients" for path in paths}
    gradients = {finding.where for finding in report.findings if finding.what == "gradient"}
    ones = {"gradient of argument 0", "gradient of argument 3"}
    assert gradients == ones | {f"{one}, all elements" for one in ones}


def test_results_that_are_no_floats(x):
    def function(x):
        xp = testing.row_of(x).xp
        return xp.argmax(x), x > 0

    report = testing.check(function, inputs=x, rows=ROWS)
    report.raise_if_wrong()
    assert all(finding.bound == 0 for finding in report.findings)


@pytest.mark.parametrize("dtype", ["float64", "float16", "complex64", "complex128"])
def test_other_dtypes(dtype, rng):
    x = rng.normal(size=(3, 4, 2)) @ np.array([1, 1j])
    x = (x if dtype.startswith("complex") else x.real).astype(dtype)
    testing.check(lambda x: x * x + 1, inputs=x, rows=ROWS).raise_if_wrong()


def test_real_results_of_complex_numbers(rng):
    x = (rng.normal(size=(5, 2)) @ np.array([1, 1j])).astype(np.complex64)
    report = testing.check(lambda x: (x.real, x * 2), inputs=x, rows=ROWS)
    report.raise_if_wrong()


def test_bfloat16(rng):
    x = rng.normal(size=(3, 4)).astype(pytest.importorskip("ml_dtypes").bfloat16)
    report = testing.check(lambda x: x * x, inputs=x, rows=f"{ROWS},array_api_strict")
    report.raise_if_wrong()
    assert "array_api_strict has no bfloat16" in {s.reason for s in report.skipped}


def test_functions_by_library(x):
    report = testing.check(
        {"torch": lambda x: x.square(), "jax:jit": lambda x: x * x},
        inputs=x, reference=np.square, rows="numpy,jax:*,torch",
    )  # fmt: skip
    report.raise_if_wrong()
    assert report.rows == ["jax:jit", "torch"]
    assert {s.row for s in report.skipped} == {"numpy", "jax"}
    with pytest.raises(ArgumentValueError, match=r"the mapping has none: pass reference="):
        testing.check({"torch": lambda x: x}, inputs=x)


def test_rows_that_are_left_out(x):
    without = {"jax:*": "it is a test", "cupy": "no reason"}
    for rows in (None, "numpy,jax:*", [testing.rows("jax")[0], "numpy"]):
        report = testing.check(lambda x: 2 * x, inputs=x, rows=rows, without=without)
        assert not any(name.startswith("jax") for name in report.rows)
        assert "numpy" in report.rows
        reasons = {s.row: s.reason for s in report.skipped if s.what == "everything"}
        assert reasons["jax:jit"] == "it is a test"
        assert reasons["cupy"] == "no reason"
    with pytest.raises(ArgumentValueError, match="rows='jxa' is not known"):
        testing.check(lambda x: x, inputs=x, without={"jxa": "a typing error"})


def test_gradients_of_a_vjp_and_of_a_reference_vjp(x):
    arguments = {"inputs": (x, x + 1), "rows": "numpy", "reference": lambda a, b: a * b}
    vjp = lambda a, b, dy: (b * dy, a * dy)  # noqa: E731
    report = testing.check(lambda a, b: a * b, vjp=vjp, **arguments)
    report.raise_if_wrong()
    assert {f.what for f in report.findings} == {"value", "gradient"}
    exact = testing.check(lambda a, b: a * b, vjp=vjp, reference_vjp=vjp, **arguments)
    exact.raise_if_wrong()
    wrong = testing.check(
        lambda a, b: a * b, vjp=lambda a, b, dy: (b * dy, b * dy), reference_vjp=vjp, **arguments
    )
    assert [f.where for f in wrong.wrong] == ["gradient of argument 1"]
    without = testing.check(lambda a, b: a * b, **arguments)
    assert [s.what for s in without.skipped] == ["gradients"]


def test_gradients_of_chosen_arguments(x):
    report = testing.check(lambda a, b: a * b, inputs=(x, x + 1), rows="torch", gradients=[1])
    where = [f.where for f in report.findings if f.what == "gradient"]
    assert where == ["gradient of argument 1", "gradient of argument 1, all elements"]
    none = testing.check(lambda a: a, inputs=x, rows="torch", gradients=False)
    assert {f.what for f in none.findings} == {"value"}
    with pytest.raises(ArgumentValueError, match="argument 2 is not a floating-point array"):
        testing.check(lambda a, n: a, inputs=(x, 1), rows="torch", gradients=[2])


def test_results_at_other_paths_are_wrong(x):
    report = testing.check(
        {"numpy": lambda x: {"a": x, "b": x}, "torch": lambda x: {"a": x, "c": x}},
        inputs=x, rows="numpy,torch", gradients=False,
    )  # fmt: skip
    assert [f.message for f in report.wrong] == [
        "result['a'], result['c'] instead of result['a'], result['b']"
    ]


def test_a_value_that_is_wrong_only_where_gradients_are_recorded(x):
    report = testing.check(
        lambda x: x * 2 if getattr(x, "requires_grad", False) else x, inputs=x, rows="torch"
    )
    assert "result with gradients" in {f.where for f in report.wrong}


def test_gradients_that_differences_cannot_tell_are_reported():
    """The square root of 0 has no differences; those of other elements are compared."""
    x = np.array([0.0, 1.0, 4.0], np.float32)
    report = testing.check(lambda x: x**0.5, inputs=x, rows="torch")
    report.raise_if_wrong()
    skipped = [s.what for s in report.skipped if s.row == "torch"]
    assert "gradient of argument 0, input 'input', 1 of 3 elements" in skipped
    assert {f.what for f in report.findings} == {"value", "gradient"}
    report = testing.check(lambda x: x**0.5, inputs=x[:1], rows="torch")
    assert {f.what for f in report.findings} == {"value"}


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
def test_the_differences_of_a_hard_function_are_accurate(offset, rng):
    """Compared with the derivative in closed form, of a softmax over large numbers."""
    from groupnorm.testing.derivatives import Derivatives

    x, dy = rng.normal(size=(2, 4, 6))

    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return [e / e.sum(axis=-1, keepdims=True)]

    at = [(i, j) for i in range(4) for j in range(6)]
    derivatives = Derivatives(softmax, [x + offset], 0, [dy])
    found = np.array([derivatives.at(index)[0] for index in at]).reshape(4, 6)
    (y,) = softmax(x + offset)
    want = y * (dy - (dy * y).sum(axis=-1, keepdims=True))
    assert np.abs(found - want).max() / np.abs(want).max() < 1e-8


def test_bounds_and_units(x):
    almost = lambda x: x * (1 + 3e-6)  # noqa: E731
    check = lambda **options: testing.check(  # noqa: E731
        almost, inputs=x, reference=lambda x: x, rows="numpy", gradients=False, **options
    )
    assert check()
    assert not check(bound=1e-6)
    assert not check(units="ulp", bound=8)
    assert check(units="ulp", bound=64)
    assert check(units="mixed")
    with pytest.raises(ArgumentValueError, match="units='ulps' is not known"):
        check(units="ulps")


def test_the_reports_forms(x, tmp_path):
    functions = {"numpy": lambda x: x, "torch": lambda x: x * math.nan}
    report = testing.check(
        functions, inputs={"a": x, "b": x + 1}, reference=lambda x: x, rows="numpy,torch"
    )
    text = str(report)
    assert text.splitlines()[0].split("  ")[0] == "worst error (relative; gradients relative)"
    assert "WRONG" in text
    assert "not checked: numpy: gradients" in text
    stored = json.loads(report.to_json(tmp_path / "report.json"))
    assert stored == json.loads((tmp_path / "report.json").read_text())
    assert stored["right"] is False
    assert {f["error"] for f in stored["findings"] if f["row"] == "torch"} == {None}
    assert stored["rows"] == ["numpy", "torch"]
    worst = report.worst("torch", "b")
    assert worst is not None
    assert not worst.right
    report.print()


def test_the_heat_map(x, tmp_path):
    pytest.importorskip("matplotlib")
    report = testing.check(lambda x: x, inputs={"a": x, "b": x}, rows=ROWS)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_compared_is_not_right(x):
    report = testing.check({"torch": lambda x: x}, inputs=x, reference=lambda x: x, rows="numpy")
    assert not report
    with pytest.raises(testing.Disagreement, match="nothing was compared"):
        report.raise_if_wrong()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": [1, 2]}, ArgumentTypeError, "inputs="),
        ({"inputs": {}}, ArgumentTypeError, "inputs="),
        ({"inputs": np.ones(3), "rows": "nunpy"}, ArgumentValueError, "'nunpy' is not known"),
        (
            {"inputs": np.ones(3), "reference": lambda x: 1 / 0},
            ArgumentValueError,
            r"reference: it failed for the input 'input' .ZeroDivisionError",
        ),
    ],
)
def test_arguments_that_are_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        testing.check(lambda x: x, **arguments)


def test_a_function_that_is_none():
    with pytest.raises(ArgumentTypeError, match="function=3 cannot be called"):
        testing.check(3, inputs=np.ones(3))


def test_absent_rows_are_reported(monkeypatch, x):
    class Absent(registry.Row):
        """Of a library that nobody has."""

    monkeypatch.setitem(registry._rows, "nobody_has_this", Absent("nobody_has_this"))
    assert "nobody_has_this" not in [row.name for row in testing.rows()]
    report = testing.check(lambda x: x + 1, inputs=x)
    report.raise_if_wrong()
    reasons = {s.row: s.reason for s in report.skipped if s.what == "everything"}
    assert reasons["nobody_has_this"] == "nobody_has_this is not installed"


# Assertions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", ["numpy", "jax", "torch", "array_api_strict", "dask"])
@pytest.mark.parametrize("theirs", ["numpy", "torch"])
def test_arrays_of_two_libraries_are_the_same(ours, theirs):
    (ours,), (theirs,) = testing.rows(ours), testing.rows(theirs)
    a = np.array([1.0, -0.0, np.nan, np.inf], np.float32)
    testing.assert_same(ours.asarray(a), theirs.asarray(a))
    for other, message in (
        (np.array([1.0, 0.0, np.nan, np.inf], np.float32), r"1 of 4 .* at \[1\]"),
        (a.astype(np.float16), "dtype float32 instead of float16"),
        (a[:3], r"shape \(4,\) instead of \(3,\)"),
    ):
        with pytest.raises(testing.Disagreement, match=message):
            testing.assert_same(ours.asarray(a), theirs.asarray(other))


def test_accurate_arrays(rng):
    reference = rng.normal(size=(3, 4))
    (torch,) = testing.rows("torch")
    testing.assert_accurate(torch.asarray(reference.astype(np.float32)), reference)
    wrong = reference.copy()
    wrong[1, 2] += 1e-3
    with pytest.raises(testing.Disagreement, match=r"at \[1, 2\]: error"):
        testing.assert_accurate(torch.asarray(wrong.astype(np.float32)), reference)
    with pytest.raises(testing.Disagreement, match="dtype float32 instead of float16"):
        testing.assert_accurate(
            torch.asarray(reference.astype(np.float32)), reference, dtype="float16"
        )
    with pytest.raises(testing.Disagreement, match=r"shape \(12,\) instead of"):
        testing.assert_accurate(reference.ravel(), reference)
    with pytest.raises(ArgumentTypeError, match=r"actual is of builtins\.float"):
        testing.assert_accurate(1.0, reference)


def test_gradients_of_one_row(x):
    testing.assert_gradients(lambda x: x * x, [x], "jax")
    with pytest.raises(testing.Disagreement, match="gradient of argument 0"):
        testing.assert_gradients(lambda x: x * x, [x], "torch", reference=lambda x: x**3)
