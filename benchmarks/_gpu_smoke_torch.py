"""How fast PyTorch's kernels are on a GPU, each by itself; for _gpu_smoke.py."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch
from _gpu_cases import (
    BOTH,
    DRY,
    EAGER,
    FIRST,
    FORWARD,
    LAYOUTS,
    LEAST_TRAFFIC,
    MEASURED,
    OURS,
    TORCH,
    Case,
    grouped,
    planned,
    traffic,
)
from _gpu_measure import Call
from _gpu_measure import copies as measured_copies
from _gpu_smoke import fact
from _gpu_torch import DEVICE, Contest, copy_timer, cuda, graphed

from groupnorm.backends.kernels.gpu import program as gpu
from groupnorm.backends.torch import gpu as torch_gpu
from groupnorm.backends.torch import kernels as torch_kernels

CASES = [Case(TORCH, BOTH, *named) for named in itertools.product(MEASURED, LAYOUTS)]
CALLS = 3 if DRY else 300


def replayed(call: Call, count: int) -> float:
    """Median microseconds of one call, of a graph of `count` calls on as many buffers."""
    timer = graphed(call, count)
    return sorted(timer.run(2) / 2 / count for _ in range(9))[4]


def copies() -> float:
    """Bytes per second of the largest copy."""
    found = measured_copies(TORCH, copy_timer)["bytes_per_second"]
    shown = {f"mb{int(size) // 10**6}": round(speed / 1e12, 2) for size, speed in found.items()}
    fact("copy, TB/s read and written, by MB", **shown)
    return list(found.values())[-1]


def host_time() -> None:
    case = Case(TORCH, FORWARD, MEASURED[0] if DRY else "UNet 2x320@32x32", FIRST)
    makers = Contest(case).makers
    calls = {name: makers[name]() for name in (OURS, EAGER)}
    found = {}
    for name, call in calls.items():
        for _ in range(CALLS // 10):
            call(0)
        cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(CALLS):
            call(0)
        found[name] = round((time.perf_counter() - begun) / CALLS * 1e6, 1)
        cuda.synchronize()
    fact("host, us a forward call", **found)


def kernels(case: Case, speed: float | None) -> None:
    """Microseconds of each launch by itself, and of each pass."""
    dtype, statistics = getattr(torch, case.dtype), gpu.statistics_shape(grouped(case))

    def new() -> torch.Tensor:
        return torch.randn(case.array_dims, device=DEVICE).to(dtype)

    count = min(case.buffers, 40)
    parameters = dict(zip(("scale", "bias"), torch.randn(2, case.channels, device=DEVICE).to(dtype),
                          strict=True))  # fmt: skip
    sets = []
    for _ in range(count):
        x, dy = new(), new()
        sums = {n: torch.empty(case.channels, device=DEVICE) for n in ("dscale", "dbias")}
        sets.append({
            "x": x, "dy": dy, "y": torch.empty_like(x), "dx": torch.empty_like(x), "mask": None,
            "statistics": torch.empty(statistics, device=DEVICE), **parameters, **sums,
        })  # fmt: skip

    engine = torch_kernels.engine_for(torch.device(DEVICE))  # in a dry run another one

    def timed(program: Any) -> float:
        return replayed(lambda i: torch_gpu.run(program, dict(sets[i]), engine), count)

    def at_copy_speed(arrays: int) -> float:
        return round(1e6 * arrays * case.bytes / (speed or 3e12), 1)

    for direction, program in planned(case).items():
        found = {"whole": round(timed(program), 1)}  # which leaves what the steps need
        for number, step in enumerate(program.launches):
            us, moved = timed(program._replace(launches=(step,))), traffic(step) * case.bytes
            rate = f" {moved / us / 1e6:.2f} TB/s" if moved else ""
            label = f"{number} {step.kernel} (grid {math.prod(step.grid)}, warps {step.warps})"
            found[label] = f"{us:.1f} us{rate}"
        least, floor = LEAST_TRAFFIC[direction], sum(map(traffic, program.launches))
        name = f"{case.shape} {case.layout} {direction}, us"
        fact(name, **found, least=at_copy_speed(least), floor=at_copy_speed(floor))
    cuda.empty_cache()
