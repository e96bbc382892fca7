"""Comparisons of a peer's result with ours and the oracle's, and lists of differences."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from groupnorm import group_norm
from groupnorm.errors import GroupNormError
from groupnorm.testing.compare import dtype_name
from tests import ROOT
from tests.rows import CONTRACT, assert_close

# One unit in the last place of a half-precision result, relative to max(1, |value|).
HALF = {"float16": 2**-10, "bfloat16": 2**-7}


class Difference(NamedTuple):
    """A case that a peer gets wrong: a row of docs/peers.md, and what `describe` must return.

    `found` is "raises", "accepts", "NaN" or, for wrong values, a lower bound of the error.
    """

    case: str
    theirs: str
    ours: str
    found: str | float


class Case(NamedTuple):
    """How to show a difference. `want` is the reference, or the error that must be raised."""

    theirs: Callable[[], Any]
    ours: Callable[[], Any]
    want: np.ndarray | type[GroupNormError]
    tolerance: float = 2 * CONTRACT


def draw(rng, *shape):
    """Return normal numbers in float32."""
    return rng.normal(size=shape).astype(np.float32)


def host(y: Any) -> np.ndarray:
    """Return an array or tensor of any peer as a NumPy array; bfloat16 as float32."""
    if hasattr(y, "detach"):
        y = y.detach()
        return (y.float() if dtype_name(y) == "bfloat16" else y).numpy()
    return np.asarray(y)


def quick_jit(function):
    """Compile one of our functions by JAX, without LLVM's optimization.

    Compiling takes nearly all of the time of these tests, though less than eager operations do.
    Optimized programs are tested in the other rooms.
    """
    options = {"xla_backend_optimization_level": 0}
    return importlib.import_module("jax").jit(function, compiler_options=options)


def jitted(x, scale=None, bias=None, mask=None, **options):
    """Call `group_norm` compiled by JAX."""
    return quick_jit(functools.partial(group_norm, **options))(x, scale, bias, mask=mask)


def assert_all_agree(theirs, ours, want, *, tolerance=2 * CONTRACT, peer=None) -> None:
    """Assert that the peer and this library return the reference, and the same dtype."""
    assert dtype_name(theirs) == dtype_name(ours)
    assert_close(host(theirs), want, tolerance=peer or 2 * tolerance)
    assert_close(host(ours), want, tolerance=tolerance)


def assert_same_error(theirs, ours, *, match: str, peer=ValueError) -> None:
    """Assert that both refuse the call: the peer with its error, ours with a message."""
    with pytest.raises(peer):
        theirs()
    with pytest.raises(GroupNormError, match=match):
        ours()


def outcome(call: Callable[[], Any]) -> np.ndarray | Exception:
    """Return the result on the host, or the exception. A peer's warnings are not the subject."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return host(call())
        except Exception as error:
            return error


def describe(result: np.ndarray | Exception, want) -> str | float:
    """Return what is wrong with a result: in words, or the largest relative error."""
    if isinstance(result, Exception):
        return "raises"
    if isinstance(want, type):
        return "accepts"
    if result.shape != want.shape:
        return f"has shape {result.shape}"
    wide = result.astype(np.complex128 if np.iscomplexobj(result) else np.float64)
    if np.isnan(wide).any():
        return "NaN"
    return float((np.abs(wide - want) / np.maximum(1, np.abs(want))).max(initial=0))


def assert_differs(difference: Difference, case: Case) -> None:
    """Assert that ours is right, and that the peer is still wrong in the way that is listed."""
    ours = outcome(case.ours)
    if isinstance(case.want, type):
        assert isinstance(ours, case.want), f"ours returned {ours!r}"
    else:
        if isinstance(ours, Exception):
            raise ours
        assert_close(ours, case.want, tolerance=case.tolerance)
    theirs = outcome(case.theirs)
    found = describe(theirs, case.want)
    if isinstance(difference.found, str):
        still = found == difference.found
    else:
        still = isinstance(found, float) and found >= difference.found
    assert still, (
        f"{difference.case}: listed as {difference.found!r}, found {found!r} ({theirs!r:.200}). If "
        "the peer was corrected, remove the entry here and its row in docs/peers.md."
    )


def assert_listed(peer: str, differences: dict[str, Difference]) -> None:
    """Assert that the peer's table in docs/peers.md has these differences and no others."""
    page = (ROOT / "docs" / "peers.md").read_text("utf-8")
    section = page.partition(f"## {peer}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    want = [f"| {d.case} | {d.theirs} | {d.ours} |" for d in differences.values()]
    assert rows == want, "the table must be:\n" + "\n".join(want)
