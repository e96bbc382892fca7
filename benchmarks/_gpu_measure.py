"""Measure one row of gpu.py: call every contender, then time them in turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import array_api_compat
from _gpu_cases import DRY, OURS, PEER, ROTATED_BYTES, UNGRAPHED, Case, reads

ROUNDS, FEWEST = 25, 1 if DRY else 3
SHORTEST = 1.0 if DRY else 1000.0  # microseconds per turn
SECONDS = 0.0 if DRY else 0.6
# Between ours, rounded once, and a peer that also rounds to bfloat16 before the activation.
DISAGREEMENT = 0.1
COPY_BYTES = (1_000, 4_000) if DRY else (5_000_000, 20_000_000, 50_000_000, 270_000_000)

Call = Callable[[int], Any]
"""Computes on the buffers of the given index."""


@dataclass(frozen=True)
class Timer:
    """A contender's timer: `run(repeats)` returns microseconds of `repeats * calls` calls."""

    how: str
    run: Callable[[int], float]
    calls: int


def measure(case: Case, engine: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The figures of a row in JSON types; `engine` is the library's module.

    It raises if the device does not answer any more: after a fault every later call fails.
    """
    begun = time.monotonic()
    left_out: dict[str, str] = {}
    timers: dict[str, Timer] = {}
    results: dict[str, Any] = {}
    for name, make in engine.Contest(case).makers.items():
        if name in without:
            continue
        try:
            call = make()
            results[name] = call(0)
            engine.wait()
            timers.update(engine.timers(name, call, case.buffers))
        except Exception as error:  # one broken contender must not hide the others
            left_out[name] = reason(error)
            still_answers(engine, f"{name}: {left_out[name]}")
        if name not in (OURS, PEER[case.library]):
            results.pop(name, None)
    found = differences(*results.values()) if len(results) == 2 else None
    results.clear()
    times = take_turns(timers, SECONDS, left_out)
    still_answers(engine, "all took turns")
    return {
        "kind": "row", "name": case.name, "library": case.library, "task": case.task,
        "shape": case.shape, "layout": case.layout, "dims": case.dims, "bytes": case.bytes,
        "buffers": case.buffers, "dtype": case.dtype, "reads": reads(case), "times": times,
        "left_out": left_out, "disagreement": found, "seconds": time.monotonic() - begun,
    }  # fmt: skip


def differences(found: Any, expected: Any) -> dict[str, float]:
    """Largest differences of the results of two calls; of sums, relative to the largest.

    Gradients of parameters that are in a tree, as JAX's are, are not compared.
    """
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    largest = {}
    for name, a, b in zip(("y", "dx", "dscale", "dbias"), found, expected, strict=False):
        if hasattr(a, "ndim"):
            xp = array_api_compat.array_namespace(a, b)
            a, b = xp.astype(a, xp.float32), xp.astype(b, xp.float32)
            size = xp.maximum(xp.abs(b), xp.ones_like(b))
            size = xp.max(size) if b.ndim == 1 else size
            largest[name] = float(xp.max(xp.abs(a - b) / size))
    return largest


def disagrees(row: dict[str, Any]) -> bool:
    """Whether ours was compared with the peer and differs."""
    return not all(d <= DISAGREEMENT for d in (row["disagreement"] or {}).values())


def still_answers(engine: Any, after: str) -> None:
    try:
        engine.wait()
    except Exception as error:
        raise RuntimeError(f"the device was lost after {after}: {reason(error)}") from error


def take_turns(
    timers: Mapping[str, Timer], seconds: float, left_out: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Microseconds of a call by each timer, in turns, so that all of them see the same machine.

    A turn lasts a millisecond or more. Timers that fail go to `left_out`.
    """
    costs: dict[str, float] = {}
    for name, timer in timers.items():
        try:
            costs[name] = max(min(timer.run(1) for _ in range(2)), 1e-3)
        except Exception as error:
            left_out[name] = reason(error)
    repeats = {name: math.ceil(SHORTEST / cost) for name, cost in costs.items()}
    whole = sum(cost * repeats[name] for name, cost in costs.items())
    rounds = min(max(int(1e6 * seconds / whole), FEWEST), ROUNDS) if costs else 0
    found: dict[str, list[float]] = {name: [] for name in costs}
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in costs if turn % 2 else reversed(costs):
                timer = timers[name]
                took = timer.run(repeats[name])
                found[name].append(took / (repeats[name] * timer.calls))
    finally:
        gc.enable()
    return {
        name: {
            "min_us": min(times), "median_us": statistics.median(times), "rounds": len(times),
            "calls_a_round": repeats[name] * timers[name].calls, "how": timers[name].how,
        }
        for name, times in found.items()
    }  # fmt: skip


def copies(library: str, make_timer: Callable[[int, int], Timer]) -> dict[str, Any]:
    """Read and written bytes per second of copies, the best turn, by the bytes of the source.

    `make_timer` takes a number of bytes and of buffers.
    """
    found, how, left_out = {}, None, {}
    for size in COPY_BYTES:
        timer = make_timer(size, 2 if DRY else max(-(-ROTATED_BYTES // size), 2))
        times = take_turns({"copy": timer}, min(SECONDS, 0.25), left_out)
        if "copy" in times:
            found[str(size)] = 2 * size / (1e-6 * times["copy"]["min_us"])
            how = timer.how
    return {
        "kind": "copy", "library": library, "bytes_per_second": found, "how": how,
        "left_out": left_out,
    }  # fmt: skip


# ---- for the libraries --------------------------------------------------------------------------


def looped(how: str, call: Call, count: int, timed: Callable[[Callable[[], Any]], float]) -> Timer:
    """Calls one after the other, including the host's time if that is longer.

    `timed` returns the microseconds of a function, until its results are there.
    """

    def calls(repeats: int) -> list[Any]:
        kept: list[Any] = [None] * count
        for _ in range(repeats):
            for i in range(count):
                kept[i] = call(i)
        return kept

    return Timer(how, lambda repeats: timed(lambda: calls(repeats)), count)


def both_timers(
    name: str, call: Call, count: int, graphed: Callable[[Call, int], Timer],
    timed: Callable[[Callable[[], Any]], float],
) -> dict[str, Timer]:  # fmt: skip
    """Timers by a graph and by events; by events alone if no graph can be captured."""
    plain = looped("CUDA events", call, count, timed)
    try:
        return {name: graphed(call, count), name + UNGRAPHED: plain}
    except Exception as error:
        how = f"CUDA events, since no graph could be captured ({reason(error)})"
        return {name: Timer(how, plain.run, plain.calls)}


def reason(error: BaseException) -> str:
    """Why a contender is left out, in one line."""
    if isinstance(error, ImportError):
        return f"not installed: {error.name or error}"
    return f"RAISED {type(error).__name__}: {error}".partition("\n")[0][:300]
