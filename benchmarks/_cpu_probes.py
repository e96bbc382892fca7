"""The measurements of cpu.py besides its tables: call overhead, extra memory, and keras.

Memory and keras need separate processes: `in_child` starts cpu.py again to run one of `PROBES`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from _cpu_cases import (
    BOTH,
    FIRST,
    FORWARD,
    JAX,
    KERAS,
    LAST,
    LAYOUTS,
    LIMIT,
    NATIVE,
    NUMPY,
    OURS,
    PORTABLE,
    TEXTBOOK,
    TORCH,
    Call,
    Case,
    Data,
    Maker,
    make_data,
)
from _cpu_measure import Effort, contest_of, measure, reason
from _report import in_turns, summary

BASELINE = {NUMPY: TEXTBOOK, TORCH: NATIVE}
MEGABYTE = 1e6

# ---- overhead -----------------------------------------------------------------------------------


def overhead(quick: bool) -> Iterator[dict[str, Any]]:
    """Microseconds of eager calls on an array so small that its arithmetic is negligible.

    PyTorch with one thread: F.group_norm wakes the others even for this array, and its waiting for
    them on a busy machine would make our overhead look low.
    """
    for framework, task in ((NUMPY, FORWARD), (NUMPY, BOTH), (TORCH, FORWARD), (TORCH, BOTH)):
        row: dict[str, Any] = {"framework": framework, "task": task, "times": {}, "left_out": {}}
        try:
            case = Case(framework, task, "tiny", FIRST)
            contest = contest_of(case, make_data(case))
        except ImportError as error:
            row["left_out"]["everyone"] = reason(error)
            yield row
            continue
        calls: dict[str, Call] = {}
        with contest.context(), one_torch_thread():
            for name in (BASELINE[framework], OURS, PORTABLE):
                try:
                    calls[name] = contest.makers[name]()
                    calls[name]()
                except Exception as error:
                    row["left_out"][name] = reason(error)
            # Turns of 2 ms, about 50 calls: the timer is negligible, an interruption affects one.
            times = in_turns(calls, 1.0 if quick else 4.0, rounds=200, shortest=2e-3)
        row["times"] = {name: summary(values) for name, values in times.items()}
        row["above_us"] = above(row["times"], BASELINE[framework])
        yield row


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def above(times: dict[str, dict[str, float]], baseline: str) -> dict[str, dict[str, float]]:
    """Microseconds of each contender above the baseline, by minima and by medians."""
    if baseline not in times:
        return {}
    return {
        name: {key: 1e3 * (time[key] - times[baseline][key]) for key in ("min_ms", "median_ms")}
        for name, time in times.items()
        if name != baseline
    }


# ---- memory -------------------------------------------------------------------------------------


def memory(quick: bool) -> Iterator[dict[str, Any]]:
    """Peak memory beyond input and output of a forward pass over 134 MB."""
    everyone = {
        NUMPY: (LIMIT, TEXTBOOK, OURS, PORTABLE),
        TORCH: (LIMIT, NATIVE, OURS, PORTABLE),
    }
    for framework, names in everyone.items():
        for name in names[1:3] if quick else names:
            found = in_child({"probe": "memory", "framework": framework, "contender": name})
            if isinstance(found, str):
                yield {"framework": framework, "contender": name, "left_out": found}
            else:
                yield from found


def memory_probe(framework: str, contender: str) -> list[dict[str, Any]]:
    """Measure one contender in this process, which has run nothing else.

    The kernel's high-water mark of resident memory (VmHWM) is exact, where a thread that samples
    /proc/self/statm can miss a peak of a few milliseconds and disturbs the computation.
    It is read from /proc/self/status after a reset, since `resource.ru_maxrss` cannot be reset and
    starts in a child process at what its parent had at most.
    """
    return [extra_memory(framework, contender, layout) for layout in LAYOUTS]


def extra_memory(framework: str, contender: str, layout: str) -> dict[str, Any]:
    warm, large = (Case(framework, FORWARD, shape, layout) for shape in ("ResNet", "VAE"))
    contest = contest_of(warm, make_data(warm))
    with contest.context():
        for _ in range(2):  # compiles, loads libraries, starts the threads
            contest.makers[contender]()()
    data = make_data(large)
    contest = contest_of(large, data)
    call = contest.makers[contender]()
    with contest.context():
        before = reset_peak()
        result = call()
        after = peak()
    del result
    both = 2 * data.x.nbytes
    extra = after - before - data.x.nbytes
    return {"framework": framework, "contender": contender, "layout": layout,
            "input_and_output_mb": both / MEGABYTE, "extra_mb": extra / MEGABYTE,
            "extra_percent": 100 * extra / both}  # fmt: skip


def reset_peak() -> int:
    """Forget the peak of resident memory, and return what is resident now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(line.split()[1])


# ---- keras --------------------------------------------------------------------------------------

KERAS_ENGINES = {"torch": TORCH, "jax": JAX}


def keras(quick: bool, effort: Effort) -> Iterator[dict[str, Any]]:
    """Rows of keras next to ours and a copy; keras fixes its backend at import."""
    for engine in KERAS_ENGINES:
        request = {"probe": "keras", "engine": engine, "quick": quick, "effort": vars(effort)}
        found = in_child(request, KERAS_BACKEND=engine)
        if isinstance(found, str):
            yield {"framework": f"keras on {engine}", "task": FORWARD, "left_out": found}
        else:
            yield from found


def keras_probe(engine: str, quick: bool, effort: dict[str, Any]) -> list[dict[str, Any]]:
    framework = f"keras on {engine}"
    cases = [
        Case(KERAS_ENGINES[engine], FORWARD, shape, layout)
        for shape in (("ResNet",) if quick else ("ResNet", "UNet"))
        for layout in ((LAST,) if quick else LAYOUTS)
    ]
    rows = []
    for case in cases:
        row = measure(case, Effort(**effort), keras_makers, only=(LIMIT, OURS))
        name = replace(case, framework=framework).name
        rows.append({**row, "framework": framework, "name": name})
    return rows


def keras_makers(case: Case, data: Data) -> dict[str, Maker]:
    makers = {TORCH: keras_on_torch, JAX: keras_on_jax}
    return {KERAS: functools.partial(makers[case.framework], case, data)}


def keras_layer(case: Case, data: Data) -> tuple[Any, int]:
    """The layer, and the axis of its channels."""
    import keras
    from _cpu_cases import EPSILON

    axis = 1 if case.layout == FIRST else -1
    layer = keras.layers.GroupNormalization(case.groups, axis=axis, epsilon=EPSILON)
    layer.build(data.x.shape)
    layer.set_weights([data.scale, data.bias])
    return layer, axis


def keras_on_torch(case: Case, data: Data) -> Call:
    import torch

    layer, axis = keras_layer(case, data)
    x = torch.from_numpy(data.x)  # for keras, channels-last is an array (N, ..., C)
    return lambda: layer(x).movedim(axis, 1)


def keras_on_jax(case: Case, data: Data) -> Call:
    import jax

    layer, _ = keras_layer(case, data)
    state = [[v.value for v in v_list] for v_list in
             (layer.trainable_variables, layer.non_trainable_variables)]  # fmt: skip
    call = jax.jit(lambda state, x: layer.stateless_call(*state, x)[0])
    x = jax.numpy.asarray(data.x)
    return lambda: call(state, x).block_until_ready()


# ---- processes ----------------------------------------------------------------------------------

PROBES = {"memory": memory_probe, "keras": keras_probe}


def in_child(request: dict[str, Any], **environment: str) -> Any:
    """The result of a probe in a fresh process, or the reason why there is none."""
    command = [sys.executable, str(Path(__file__).with_name("cpu.py")), "--child"]
    child = subprocess.run(
        [*command, json.dumps(request)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        return lines[-1] if lines else f"exit status {child.returncode}"
    return json.loads(child.stdout.splitlines()[-1])


def answer(request: dict[str, Any]) -> None:
    """Run in the child: the result is the last line of its output, a reason that of stderr."""
    probe = PROBES[request.pop("probe")]
    try:
        found = probe(**request)
    except Exception as error:
        sys.exit(reason(error))
    print(json.dumps(found))
