"""Rows: placing arrays, bringing them home, compiling, differentiating, choosing them by name."""

from __future__ import annotations

import numpy as np
import pytest

from groupnorm import testing
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing import registry
from groupnorm.testing.registry import Row, register_row
from tests.conftest import importable


@pytest.fixture(params=testing.row_names())
def usable(request):
    """Each row that can be used here, of the libraries that --backends selects."""
    found = registry.known_rows()[request.param]
    if found.library not in importable(request.config):
        pytest.skip(f"--backends excludes {found.library}")
    if found.why_absent is not None:
        pytest.skip(found.why_absent)
    return found


def bits(rng, name: str) -> np.ndarray:
    """Return an array of any values of a dtype, NaN and infinities included."""
    if name == "bool":
        return rng.random((3, 5)) < 0.5
    dtype = np.dtype(pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else name)
    raw = rng.integers(0, 256, size=3 * 5 * dtype.itemsize, dtype=np.uint8)
    return raw.view(dtype).reshape(3, 5)


def test_every_bit_comes_home(usable, rng):
    row = usable
    for name in sorted(row.dtypes):
        given = bits(rng, name)
        with row.precision(name):
            placed = row.asarray(given)
            assert row.is_array(placed)
            assert row.device_of(placed) == row.device_of(row.empty())
            back = row.to_numpy(placed)
        assert back.dtype == given.dtype
        assert back.tobytes() == given.tobytes(), name


def test_an_array_is_a_copy(usable):
    row = usable
    given = np.ones(4, np.float32)
    placed = row.asarray(given)
    given[:] = 2
    assert (row.to_numpy(placed) == 1).all()


def test_gradients(usable, rng):
    """Also of complex numbers: dL/dRe + i dL/dIm for a real L, in every library."""
    row, (a, b, dy) = usable, (rng.normal(size=(2, 3)).astype(np.float32) for _ in range(3))
    placed = [row.asarray(x) for x in (a, b)]
    calls = [(lambda a, b: [a * b * b, a], placed, [1, 0], [row.asarray(dy)] * 2)]
    x, dx = (rng.normal(size=(2, 4, 2)) @ np.array([1, 1j])).astype(np.complex64)
    calls.append((lambda x: [x * x], [row.asarray(x)], [0], [row.asarray(dx)]))
    if "autodiff" in row.cannot:
        for call in calls:
            with pytest.raises(NotImplementedError, match="automatic differentiation"):
                row.vjp(*call)
        return
    want = [dy * 2 * a * b, dy * b * b + dy, dx * np.conj(2 * x)]
    found = [row.vjp(*call) for call in calls]
    for y, w in zip([y for ys, _ in found for y in ys], [a * b * b, a, x * x], strict=True):
        np.testing.assert_allclose(row.to_numpy(y), w, rtol=1e-6)
    for g, w in zip([g for _, gs in found for g in gs], want, strict=True):
        np.testing.assert_allclose(row.to_numpy(g), w, rtol=1e-5, atol=1e-6)


def test_names():
    assert [row.name for row in testing.rows("numpy, numpy:readonly")] == [
        "numpy",
        "numpy:readonly",
    ]
    assert [row.name for row in testing.rows("numpy:*")] == ["numpy", "numpy:readonly"]


@pytest.mark.parametrize("names", ["nunpy", "numpy,torhc", "numpy:", ":*", "jax:comple", ""])
def test_an_unknown_name_is_an_error(names):
    with pytest.raises(ArgumentValueError, match="is not known: choose from numpy"):
        testing.rows(names)


def test_an_absent_row_that_is_asked_for_is_an_error():
    class Absent(Row):
        """Of a library that nobody has."""

    register_row(Absent("nobody_has_this"))
    try:
        assert "nobody_has_this" in testing.row_names()
        for name in ("nobody_has_this", "nobody_has_this:*"):
            with pytest.raises(ArgumentValueError, match="is not installed"):
                testing.rows(name)
    finally:
        del registry._rows["nobody_has_this"]


def test_the_library_of_an_array(usable):
    assert testing.row_of(usable.empty()).library == usable.library


def test_what_is_no_array():
    with pytest.raises(ArgumentTypeError, match=r"of builtins\.list, which is no array"):
        testing.row_of([1.0])


def test_a_row_of_ones_own():
    class Lists(Row):
        """NumPy arrays of another type."""

        dtypes = frozenset({"float32", "float64"})
        cannot = {"autodiff": "it is a test"}

        class Array(np.ndarray):
            """As tests/toy_backend.py has."""

        @property
        def why_absent(self):
            return None

        def asarray(self, a):
            return a.copy().view(self.Array)

        def to_numpy(self, y):
            return np.array(y)

    register_row(Lists("lists"))
    try:
        report = testing.check(lambda x: 2 * x, inputs=np.ones(3, np.float32), rows="lists")
        assert report.rows == ["lists"]
        assert report
    finally:
        del registry._rows["lists"]
