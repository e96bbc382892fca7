"""Measure one row of gpu.py: call every contender, then time them in turns."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from _gpu_cases import (
    ITEM,
    OURS,
    PEER,
    PORTABLE,
    ROTATED_BYTES,
    UNGRAPHED,
    Case,
    LeftOut,
    kernels,
)  # fmt: skip

ROUNDS, FEWEST = 25, 3
SHORTEST = 1000.0  # microseconds per turn
SECONDS = 0.6
# Between ours, rounded once, and a peer that also rounds to bfloat16 before the activation.
DISAGREEMENT = 0.1
COPY_BYTES = (5_000_000, 20_000_000, 50_000_000, 270_000_000)

Call = Callable[[int], Any]
"""Computes on the buffers of the given index."""


class DeviceLost(Exception):
    """The device is no longer usable in this process."""


@dataclass(frozen=True)
class Timer:
    """A contender's timer: `run(repeats)` returns microseconds of `repeats * calls` calls."""

    how: str
    run: Callable[[int], float]
    calls: int
    launches: float | None = None  # of one call, if known from a graph


class Contest(Protocol):
    """A row's buffers and contenders in one library."""

    dtype: str
    makers: Mapping[str, Callable[[], Call]]
    fallback: Callable[[], Call]
    """Ours without kernels, measured only where those fail."""

    def timers(self, name: str, call: Call) -> dict[str, Timer]: ...
    def differences(self, found: Any, expected: Any) -> dict[str, float]: ...
    def wait(self) -> None: ...


def measure(case: Case, make_contest: Callable[[], Contest], seconds: float) -> dict[str, Any]:
    """The figures of a row in JSON types."""
    begun = time.monotonic()
    row: dict[str, Any] = {
        "kind": "row", "name": case.name, "library": case.library, "task": case.task,
        "shape": case.shape, "layout": case.layout, "dims": case.dims, "bytes": case.bytes,
        "buffers": case.buffers, **kernels(case), "dtype": None, "times": {}, "launches": {},
        "left_out": {}, "disagreement": None,
    }  # fmt: skip
    try:
        contest = make_contest()
    except Exception as error:
        row["left_out"]["everyone"] = reason(error)
        return row | {"seconds": time.monotonic() - begun}
    row["dtype"] = contest.dtype
    timers: dict[str, Timer] = {}
    results: dict[str, Any] = {}
    compared = (OURS, PORTABLE, PEER[case.library])
    waiting = list(contest.makers.items())
    while waiting:
        name, make = waiting.pop(0)
        try:
            call = make()
            result = call(0)
            contest.wait()
            if name in compared:
                results[name] = result
            timers.update(contest.timers(name, call))
        except Exception as error:  # one broken contender must not hide the others
            row["left_out"][name] = reason(error)
            alive(contest, f"{name}: {row['left_out'][name]}")
            if name == OURS:
                waiting.insert(0, (PORTABLE, contest.fallback))
        result = None
    row["disagreement"] = disagreement(contest, results, PEER[case.library])
    results.clear()
    row["times"] = take_turns(timers, seconds, row["left_out"])
    row["launches"] = {n: t.launches for n, t in timers.items() if t.launches is not None}
    alive(contest, "all took turns")
    return row | {"seconds": time.monotonic() - begun}


def disagreement(contest: Contest, results: dict[str, Any], peer: str) -> Any:
    """Largest differences of ours from the peer, or why they are unknown."""
    ours = OURS if OURS in results else PORTABLE
    if not {ours, peer} <= results.keys():
        return None
    try:
        return contest.differences(results[ours], results[peer])
    except Exception as error:
        return reason(error)


def disagrees(row: dict[str, Any]) -> bool:
    """Whether ours was compared with the peer and differs."""
    found = row["disagreement"]
    return isinstance(found, dict) and not all(d <= DISAGREEMENT for d in found.values())


def alive(contest: Contest, after: str) -> None:
    """Raise `DeviceLost` if the device does not answer: after a fault every later call fails."""
    try:
        contest.wait()
    except Exception as error:
        raise DeviceLost(f"after {after}: {reason(error)}") from error


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


def copies(make_timer: Callable[[int, int], Timer]) -> dict[str, Any]:
    """Read and written bytes per second of copies, the best turn, by the bytes of the source.

    `make_timer` takes a number of bytes and of buffers.
    """
    found, how, left_out = {}, None, {}
    for size in COPY_BYTES:
        timer = make_timer(size, max(-(-ROTATED_BYTES // size), 2))
        times = take_turns({"copy": timer}, 0.25, left_out)
        if "copy" in times:
            found[str(size)] = 2 * size / (1e-6 * times["copy"]["min_us"])
            how = timer.how
    return {"kind": "copy", "bytes_per_second": found, "how": how, "left_out": left_out}


def elements(size: int) -> int:
    """The number of 16-bit elements in a number of bytes."""
    return size // ITEM


def graph_launches(handle: int) -> int | None:
    """The number of kernels, copies and fills of a CUDA graph, as counted by the driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    graph, count = ctypes.c_void_p(handle), ctypes.c_size_t()
    if driver.cuGraphGetNodes(graph, None, ctypes.byref(count)):
        return None
    nodes = (ctypes.c_void_p * count.value)()
    if driver.cuGraphGetNodes(graph, nodes, ctypes.byref(count)):
        return None
    kinds = []
    for node in nodes:
        kind = ctypes.c_int(-1)
        if driver.cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)):
            return None
        kinds.append(kind.value)
    kernel, copy, fill = 0, 1, 2
    return sum(kind in (kernel, copy, fill) for kind in kinds)


def both_timers(
    name: str, call: Call, count: int, graphed: Callable[[Call, int], Timer],
    evented: Callable[[Call, int], Timer],
) -> dict[str, Timer]:  # fmt: skip
    """A library's timers by graph and by events; by events alone if no graph can be captured."""
    plain = evented(call, count)
    try:
        return {name: graphed(call, count), name + UNGRAPHED: plain}
    except Exception as error:
        how = f"{plain.how}, since no graph could be captured ({reason(error)})"
        return {name: Timer(how, plain.run, plain.calls)}


def named(found: Any, expected: Any, case: Case) -> Iterator[tuple[str, Any, Any]]:
    """The results of a row's call, by name, with the expected ones."""
    pairs = zip(found, expected, strict=True) if case.both else [(found, expected)]
    for name, (ours, theirs) in zip(("y", "dx", "dscale", "dbias"), pairs, strict=False):
        yield name, ours, theirs


def reason(error: BaseException) -> str:
    """Why a contender is left out, in one line."""
    if isinstance(error, LeftOut):
        return str(error)
    if isinstance(error, ImportError):
        return f"not installed: {error.name or error}"
    return f"RAISED {type(error).__name__}: {error}".partition("\n")[0][:300]
