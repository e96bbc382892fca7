"""That a difference which no longer exists fails, and so does a wrong result of ours."""

from __future__ import annotations

import numpy as np
import pytest

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from tests.peers.compare import Case, Difference, assert_differs, assert_listed

WANT = np.array([1.0, 2.0])
WRONG, NAN = WANT + 1, np.array([1.0, np.nan])


def refuse(error=ArgumentValueError):
    raise error("refused")


def differs(theirs, ours, want, found):
    assert_differs(Difference("a case", "wrong", "right", found), Case(theirs, ours, want))


TRUE = [
    (lambda: WRONG, lambda: WANT, WANT, 0.4),
    (lambda: NAN, lambda: WANT, WANT, "NaN"),
    (lambda: refuse(KeyError), lambda: WANT, WANT, "raises"),
    (lambda: WANT, refuse, ArgumentValueError, "accepts"),
]


@pytest.mark.parametrize("arguments", TRUE)
def test_a_difference(arguments):
    differs(*arguments)


@pytest.mark.parametrize(
    ("theirs", "want", "found"),
    [
        (lambda: WANT, WANT, 0.4),
        (lambda: WRONG, WANT, 1.5),
        (lambda: WRONG, WANT, "NaN"),
        (lambda: NAN, WANT, 0.4),
        (lambda: WANT, WANT, "raises"),
        (refuse, ArgumentValueError, "accepts"),
    ],
)
def test_a_corrected_peer(theirs, want, found):
    ours = refuse if isinstance(want, type) else lambda: WANT
    with pytest.raises(
        AssertionError, match=r"remove the entry here and its row in docs/peers\.md"
    ):
        differs(theirs, ours, want, found)


@pytest.mark.parametrize(
    ("ours", "want", "error"),
    [
        (lambda: WRONG, WANT, AssertionError),
        (lambda: NAN, WANT, AssertionError),
        (refuse, WANT, ArgumentValueError),
        (lambda: WANT, ArgumentValueError, AssertionError),
        (refuse, ArgumentTypeError, AssertionError),
    ],
)
def test_a_wrong_result_of_ours(ours, want, error):
    with pytest.raises(error, match=r"refused|ours returned|instead of"):
        differs(lambda: WRONG + 1, ours, want, 0.4)


def test_the_page_is_compared():
    with pytest.raises(AssertionError, match="the table must be"):
        assert_listed("keras", {"case": Difference("a case", "wrong", "right", "raises")})
