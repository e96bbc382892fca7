"""Measure one row of cpu.py: check every contender against float64, then time them in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from _cpu_cases import (
    JAX,
    LIMIT,
    NUMPY,
    Call,
    Case,
    Contest,
    Data,
    LeftOut,
    Maker,
    make_data,
    truth,
    wrongness,
)
from _cpu_contenders import numpy_contest, torch_contest
from _report import in_turns, summary

# Separates contenders that compute something else from those that only round differently.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}

AlsoMakers = Callable[[Case, Data], dict[str, Maker]]


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds and turns per row, and whether to wait for the compiler."""

    seconds: float = 1.5
    rounds: int = 50
    fewest: int = 3
    compiles: bool = True


def contest_of(case: Case, data: Data, compiles: bool = True) -> Contest:
    if case.framework == NUMPY:
        return numpy_contest(case, data)
    if case.framework == JAX:
        from _cpu_contenders_jax import jax_contest

        return jax_contest(case, data)
    return torch_contest(case, data, compiles)


def measure(
    case: Case, effort: Effort, also: AlsoMakers | None = None, only: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The figures of a row in JSON types: times and errors by contender, and those left out.

    `also` adds contenders, `only` selects some of the usual ones.
    """
    row: dict[str, Any] = {
        "name": case.name, "framework": case.framework, "task": case.task, "shape": case.shape,
        "dims": case.dims, "layout": case.layout, "dtype": case.dtype, "groups": case.groups,
        "label": case.label, "main": case.is_main, "times": {}, "errors": {}, "left_out": {},
    }  # fmt: skip
    try:
        data = make_data(case)
        contest = contest_of(case, data, effort.compiles)
    except ImportError as error:
        row["left_out"]["everyone"] = not_installed(error)
        return row
    makers = {name: make for name, make in contest.makers.items() if not only or name in only}
    makers.update(also(case, data) if also else {})
    expected = truth(case, data)
    calls: dict[str, Call] = {}
    with contest.context():
        for name, make in makers.items():
            try:
                call = make()
                result = call()
                if name != LIMIT:
                    row["errors"][name] = wrongness(contest.read(result), expected)
                calls[name] = call
            except Exception as error:  # one broken contender must not hide the others
                row["left_out"][name] = reason(error)
            result = None  # free the result of one contender before the next one
        times = in_turns(calls, effort.seconds, effort.rounds, effort.fewest)
    row["times"] = {name: {**summary(t), "turns": len(t)} for name, t in times.items()}
    return row


def not_installed(error: ImportError) -> str:
    return f"not installed: {error.name or error}"


def reason(error: Exception) -> str:
    if isinstance(error, LeftOut):
        return str(error)
    if isinstance(error, ImportError):
        return not_installed(error)
    return f"RAISED {type(error).__name__}: {error}".partition("\n")[0]


def failures(row: dict[str, Any]) -> dict[str, str]:
    """The errors by contender: it raised, or its result is wrong."""
    raised = {name: why for name, why in row["left_out"].items() if why.startswith("RAISED")}
    wrong = {
        name: f"is wrong by {error}"
        for name, error in row["errors"].items()
        if error is None or error > TOLERANCE[row["dtype"]]
    }
    return raised | wrong
