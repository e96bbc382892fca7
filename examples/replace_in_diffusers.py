"""Published models before and after ``groupnorm.torch.replace``: errors and times, on the CPU.

The models are of diffusers, transformers and timm, with random weights. For each of them it prints
what was found and replaced, the errors of the output and of the gradients against the same model in
float64, beside those with PyTorch's own normalization (of its two memory formats, the larger), and
the times of an inference step with ``replace``, relative to those without: eager, in the
channels_last memory format, and compiled. It
draws the errors of the first model for data with an offset, and the times::

    nox -s examples -- examples/replace_in_diffusers.py      # installs the packages, too
    python examples/replace_in_diffusers.py [--quick] [--threads N] [--seconds N] [--out FOLDER]

Packages that are not installed are left out. Times of small models, as with ``--quick``, are those
of calls, not of computations.

The two models are called in turns, so that a change of the machine's speed affects both; the ratios
are those of the minima and of the medians. The exit status is 1 if an error is larger than with
PyTorch by more than rounding, or a state dict changed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from replace_in_diffusers_figure import draw
from replace_in_diffusers_models import MODELS, Case, random_normalizations
from torch import nn

from groupnorm.torch import replace

# Of a network in float32: of the output, and of gradients, which are sums of more terms.
ROUNDING = (5e-6, 3e-5)
OFFSETS = (0.0, 10.0, 100.0, 1000.0, 10000.0)
QUICK = 4  # by which sizes are divided


class Errors(NamedTuple):
    """Of an output and of gradients, relative to the largest value of each."""

    output: float
    gradient: float


class Times(NamedTuple):
    """Of a step before, in milliseconds, and the ratios after / before."""

    before: float
    minimum: float
    median: float


class Row(NamedTuple):
    """What is known of a model."""

    case: Case
    counts: dict[str, int]
    reasons: set[str]
    theirs: Errors
    ours: Errors
    unchanged: bool
    times: dict[str, Times]


def twin(model: nn.Module) -> nn.Module:
    """A copy that has the same parameters, so that both read the same memory."""
    return copy.deepcopy(model, {id(p): p for p in (*model.parameters(), *model.buffers())})


def channels_last(case: Case, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:
    """The model and its inputs in this memory format; None if there are no images."""
    if inputs[0].ndim != 4:
        return None
    inputs = tuple(
        x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in inputs
    )
    return copy.deepcopy(model).to(memory_format=torch.channels_last), inputs


def in_dtype(dtype: torch.dtype, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [x.to(dtype) if x.is_floating_point() else x for x in inputs]


# Errors -------------------------------------------------------------------------------------------


def results(case: Case, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """The output, and the gradients of all parameters."""
    dtype = next(model.parameters()).dtype
    model.zero_grad()
    y = case.call(model, *in_dtype(dtype, inputs))
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape).sin())
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def relative(got: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    """The largest difference, relative to the largest value."""
    return float((got - want).abs().max() / want.abs().max().clamp(min=floor))


def errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> Errors:
    # Some gradients are 0 but for rounding: of the biases before a normalization.
    floor = 1e-2 * max(float(g.abs().max()) for g in want[1:])
    gradients = (relative(g, w, floor) for g, w in zip(got[1:], want[1:], strict=True))
    return Errors(relative(got[0], want[0]), max(gradients))


def errors_by_offset(case: Case, divide: int) -> dict[str, list[float]]:
    """Errors of the output if the first convolution's results have an offset, in channels_last."""
    model = random_normalizations(case.make(divide)).eval()
    found: dict[str, list[float]] = {"PyTorch": [], "groupnorm": []}
    model, inputs = channels_last(case, model, case.inputs(divide))
    bias = model.conv_in.bias.clone()
    with torch.no_grad():
        for offset in OFFSETS:
            model.conv_in.bias.copy_(bias + offset)
            exact = copy.deepcopy(model).double()
            want = case.call(exact, *in_dtype(torch.float64, inputs))
            after = twin(model)
            replace(after)
            for name, network in (("PyTorch", model), ("groupnorm", after)):
                found[name].append(relative(case.call(network, *inputs), want))
    return found


# Times --------------------------------------------------------------------------------------------


def in_turns(before: Callable[[], Any], after: Callable[[], Any], seconds: float) -> Times:
    """Call both in turns, and return the ratios of their times."""
    times: tuple[list[float], list[float]] = ([], [])
    for call in (before, after) * 2:  # compiles kernels
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, took in zip((before, after), times, strict=True):
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
    (a, b), (c, d) = ([f(t) for t in times] for f in (min, statistics.median))
    return Times(1e3 * a, b / a, d / c)


def step_times(
    case: Case, model: nn.Module, inputs: tuple[torch.Tensor, ...], seconds: float, compiled: bool
) -> dict[str, Times]:
    kinds = {"contiguous": (model, inputs)}
    last = channels_last(case, model, inputs)
    if last is not None:
        kinds["channels_last"] = last
    if compiled:
        kinds["compiled"] = model, inputs
    found = {}
    with torch.inference_mode():
        for kind, (before, given) in kinds.items():
            after = twin(before)
            replace(after)
            if kind == "compiled":
                torch._dynamo.reset()
                before, after = torch.compile(before), torch.compile(after)
            calls = [lambda m=m, given=given: case.call(m, *given) for m in (before, after)]
            found[kind] = in_turns(*calls, seconds)
    return found


# The table ----------------------------------------------------------------------------------------


def measure(case: Case, divide: int, seconds: float, compiled: bool) -> Row:
    torch.manual_seed(0)
    model = random_normalizations(case.make(divide)).eval()
    inputs = case.inputs(divide)
    times = step_times(case, model, inputs, seconds, compiled)
    want = results(case, copy.deepcopy(model).double(), inputs)
    theirs = errors(results(case, model, inputs), want)
    last = channels_last(case, model, inputs)
    if last is not None:  # where a ReLU is near its kink, gradients depend on the memory format
        theirs = Errors(*map(max, theirs, errors(results(case, *last), want)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = sum(isinstance(m, nn.GroupNorm) for m in model.modules())
    report = replace(model)
    ours = errors(results(case, model, inputs), want)
    after = model.state_dict()
    same = list(after) == list(state) and all(torch.equal(after[k], state[k]) for k in state)
    counts = {"found": found, "replaced": len(report.replaced), "fused": len(report.fused)}
    return Row(case, counts, {e.note for e in report.skipped}, theirs, ours, same, times)


HEAD = "\n".join((
    f"{'':34}  norms              output error       gradient error     state  "
    "step: ms before, and after / before: minimum (median)",
    f"{'package and model':34}  found repl. fused  PyTorch groupnorm  PyTorch groupnorm  dict   "
    "contiguous           channels_last        compiled",
))  # fmt: skip


def line(row: Row) -> str:
    counts = row.counts
    cells = [
        f"{row.case.package + ' ' + row.case.title:34}",
        f"{counts['found']:5} {counts['replaced']:5} {counts['fused']:5}",
        *(
            f"{getattr(row.theirs, name):7.0e} {getattr(row.ours, name):9.0e}"
            for name in Errors._fields
        ),
        "equal" if row.unchanged else "CHANGED",
    ]
    for kind in ("contiguous", "channels_last", "compiled"):
        t = row.times.get(kind)
        cells.append(f"{t.before:6.0f} {t.minimum:.2f} ({t.median:.2f})  " if t else f"{'-':>19} ")
    skipped = "".join(f"\n    skipped: {reason}" for reason in sorted(row.reasons))
    return "  ".join(cells) + skipped


def is_fine(row: Row) -> bool:
    found = zip(row.ours, row.theirs, ROUNDING, strict=True)
    close = all(ours <= 2 * theirs + rounding for ours, theirs, rounding in found)
    return close and row.unchanged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, none is compiled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=None, help="of each measurement")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the models' names")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*lru_cache")  # of transformers, when compiled
    torch.set_num_threads(options.threads)
    divide, seconds = (QUICK, 0.5) if options.quick else (1, 10.0)
    seconds = options.seconds or seconds
    load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
    threads = f"{options.threads} threads of {os.cpu_count()} cores"
    print(f"PyTorch {torch.__version__}, {threads}; load average {load}")
    print(HEAD, flush=True)
    rows = []
    for case in MODELS:
        if options.only and not any(part in case.title for part in options.only):
            continue
        if importlib.util.find_spec(case.package) is None:
            print(f"{case.package} {case.title}: not installed", flush=True)
            continue
        rows.append(measure(case, divide, seconds, compiled=case.is_compiled and not options.quick))
        print(line(rows[-1]), flush=True)
    if not rows:
        print("None of the packages is installed.", file=sys.stderr)
        return 1
    offsets = None
    if rows[0].case is MODELS[0]:
        offsets = OFFSETS, errors_by_offset(MODELS[0], divide)
        print(f"\nOutput error of {MODELS[0].title}, channels_last, if the results of its first")
        print("convolution have an offset:", *(f"{offset:>7g}" for offset in OFFSETS))
        for name, found in offsets[1].items():
            print(f"{name:>27}", *(f"{error:7.0e}" for error in found))
    times = {row.case.title: {k: t.minimum for k, t in row.times.items()} for row in rows}
    print(f"drawn: {draw(options.out, times, offsets)}")
    if not all(map(is_fine, rows)):
        print("Errors are LARGER, or a state dict CHANGED: see above.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
