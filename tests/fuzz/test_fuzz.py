"""Random calls against the reference: the same 5000 in every run. `nox -s fuzz` draws others."""

from __future__ import annotations

import numpy as np
import pytest

from groupnorm import group_norm_vjp
from groupnorm.testing import oracle
from tests.fuzz import check as checks
from tests.fuzz.arrays import values_of
from tests.fuzz.cases import Case, draw
from tests.fuzz.reference import compute
from tests.fuzz.shrink import failure, shrink

SEED = 1
PARTS = 10
COUNTS = {"numpy": 2400, "torch": 2400, "jax": 200}


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize(
    "library", [pytest.param(name, marks=pytest.mark.needs(name)) for name in COUNTS]
)
def test_random_calls_equal_the_reference(library, part, needs_bfloat16):
    each = COUNTS[library] // PARTS
    for index in range(part * each, (part + 1) * each):
        case = draw(SEED, index, (library,))
        message = failure(case)
        if message is not None:
            small = shrink(case)
            pytest.fail(
                f"case {index}: {message}\n{case}\nsmaller: {failure(small)}\n"
                f"python -m tests.fuzz --case {str(small)!r}"
            )


def test_the_reference_agrees_with_the_oracle(needs_bfloat16):
    """Two methods: extended precision here, exact sums of float64 there."""
    compared = 0
    for index in range(400):
        case = draw(SEED, index, ("numpy",))
        ordinary = case.size == 1 and case.offset <= 1e3 and case.epsilon >= 1e-6
        if not ordinary or case.activation or case.padding in ("lowest", "large"):
            continue
        values = values_of(case)
        got = compute(case, values)
        names = ["num_groups", "group_size", "feature_axis", "reduction_axes", "epsilon"]
        keywords = {name: getattr(case, name) for name in names} | {"mask": values.mask}
        x, dy = (oracle.widen(a) for a in (values.x, values.dy))
        parameters = [None if p is None else oracle.widen(p) for p in (values.scale, values.bias)]
        want = (
            oracle.group_norm(x, *parameters, **keywords),
            *oracle.group_norm_gradients(x, dy, *parameters, **keywords),
        )
        for ours, theirs in zip(got[:4], want, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                size = np.maximum(1, np.abs(ours.values)).max(initial=1)
                assert (abs(ours.values - theirs) <= 1e-9 * size).all(), case
        compared += 1
    assert compared > 50


def _wrong_where_masked(x, *arrays, mask=None, **keywords):
    y, pullback = group_norm_vjp(x, *arrays, mask=mask, **keywords)
    return (y if mask is None else y + y.dtype.type(1e-4)), pullback


def _writes_to_its_input(x, *arrays, **keywords):
    result = group_norm_vjp(x, *arrays, **keywords)
    if x.flags.writeable and x.size:
        x.flat[0] += 1
    return result


def _conjugates_wrongly(x, *arrays, **keywords):
    y, pullback = group_norm_vjp(x, *arrays, **keywords)
    return y, lambda dy: pullback(dy.conj())


@pytest.mark.parametrize(
    ("fault", "words", "shrunk"),
    [
        (_wrong_where_masked, "y: ", lambda case: case.masked),
        (_writes_to_its_input, "an input was modified", lambda case: set(case.shape) == {1}),
        (_conjugates_wrongly, "dx: |dbias: ", lambda case: "complex" in case.result_dtype),
    ],
)
def test_a_fault_is_found_and_reduced(fault, words, shrunk, monkeypatch, needs_bfloat16):
    monkeypatch.setattr(checks, "group_norm_vjp", fault)
    found = 0
    for index in range(200):
        case = draw(SEED, index, ("numpy",))
        message = failure(case)
        if message is None:
            continue
        found += 1
        assert any(word in message for word in words.split("|")), message
        small = shrink(case)
        assert shrunk(small), small
        assert eval(repr(small), {"Case": Case}) == small
        assert failure(small)
        if found == 3:
            return
    pytest.fail(f"found {found}")
