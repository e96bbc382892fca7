"""Reduce a case that fails to a simpler one that fails too."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tests.fuzz.cases import Case
from tests.fuzz.check import check


def failure(case: Case) -> str | None:
    """Return how a case fails, or None."""
    try:
        check(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _kind(message: str | None) -> str:
    """What must stay the same: the type of the error, and the array that is wrong."""
    if message is None:
        return ""
    return message if "Warning" in message else message[:24]


def shrink(case: Case, attempts: int = 400) -> Case:
    """Return the simplest case found that fails in the same way."""
    kind, progress = _kind(failure(case)), True
    while progress and attempts:
        progress = False
        for simpler in _simpler(case):
            attempts -= 1
            if _kind(failure(simpler)) == kind:
                case, progress = simpler, True
                break
            if not attempts:
                break
    return case


def _simpler(case: Case) -> Iterator[Case]:
    """Yield cases that are simpler in one way; some are not valid calls, and fail differently."""
    for field in dataclasses.fields(Case):
        if field.name == "shape" or getattr(case, field.name) == field.default:
            continue
        if field.name in ("num_groups", "group_size"):
            change = {"num_groups": 1, "group_size": None}
        else:
            change = {field.name: field.default}
        simpler = dataclasses.replace(case, **change)
        fits = simpler.channels % (simpler.num_groups or simpler.group_size) == 0
        if simpler != case and fits:
            yield simpler
    for axis, n in enumerate(case.shape):
        for smaller in sorted({1, 2, n // 2, n - 1} & set(range(1, n))):
            shape = (*case.shape[:axis], smaller, *case.shape[axis + 1 :])
            mask = case.mask_shape
            if mask is not None and axis - len(shape) + len(mask) >= 0:
                at = axis - len(shape) + len(mask)
                if mask[at] != 1:
                    mask = (*mask[:at], smaller, *mask[at + 1 :])
            simpler = dataclasses.replace(case, shape=shape, mask_shape=mask)
            if simpler.channels % (case.num_groups or case.group_size) == 0:
                yield simpler
