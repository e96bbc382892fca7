"""Interrupt many calls of the CPU kernels at random moments, then check what they left behind.

Usage: python -m tests.programs.interrupted_calls [calls]

The default number of calls is that of the variable GROUPNORM_INTERRUPTED_CALLS, or 1500. A timer's
signal handler raises, as Ctrl-C and time limits do, before the kernel runs in this thread or after
it. All of the arrays of an interrupted call are then dropped, and memory of the same sizes is
allocated and filled at once: a thread of the core that still wrote to its result would write there.
Run it under MALLOC_PERTURB_ and PYTHONMALLOC=debug as well.
"""

import os
import random
import signal
import sys

import numpy as np

from groupnorm import group_norm, group_norm_vjp, set_num_threads

GROUPS = 4
# Channels last and channels first, with samples that threads share and samples for each thread.
CASES = (((2, 160, 96, 16), -1), ((16, 16, 400, 4), 1), ((1, 300_000, 2), -1), ((40, 16, 500), 1))


class Interrupted(Exception):
    """Raised by the signal handler."""


def interrupt(*_):
    raise Interrupted


def one_call(x, axis, mask, backward):
    groups = min(GROUPS, x.shape[axis])
    keywords = {"num_groups": groups, "feature_axis": axis, "mask": mask}
    if not backward:
        return group_norm(x, **keywords)
    y, pullback = group_norm_vjp(x, **keywords)
    return pullback(y).x


def main(calls):
    set_num_threads(4)
    signal.signal(signal.SIGALRM, interrupt)
    rng, choose = np.random.default_rng(0), random.Random(0)
    inputs = [(rng.normal(size=shape).astype(np.float32), axis) for shape, axis in CASES]
    # Rare moments are hit by calls whose time is known; nothing is measured.
    expected = {}
    variants = [(i, masked, b) for i in range(len(inputs)) for masked in (0, 1) for b in (0, 1)]

    def run(variant):
        number, masked, backward = variant
        x, axis = inputs[number]
        mask = None
        if masked:
            shape = [n if a in (0, len(x.shape) - 1 if axis == 1 else 1) else 1
                     for a, n in enumerate(x.shape)]  # fmt: skip
            mask = np.arange(np.prod(shape)).reshape(shape) % 3 > 0
        return one_call(x.copy(), axis, mask, backward)

    for variant in variants:
        expected[variant] = run(variant)
    interrupted = 0
    for _ in range(calls):
        variant = choose.choice(variants)
        y = None
        try:
            # Up to the length of a call, in microseconds.
            signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-6, 1.5e-3))
            y = run(variant)
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if y is not None and not np.array_equal(y, expected[variant]):
            raise SystemExit(f"a call that was not interrupted is wrong: {variant}")
        # Reuse the memory of what was just dropped.
        canaries = [np.full(x.size, 7, np.float32) for x, _ in inputs]
        if any((c != 7).any() for c in canaries):
            raise SystemExit(f"memory was overwritten after an interrupted call: {variant}")
    print(f"{calls} calls, {interrupted} interrupted")


if __name__ == "__main__":
    variable = os.environ.get("GROUPNORM_INTERRUPTED_CALLS", "1500")
    main(int(sys.argv[1] if len(sys.argv) > 1 else variable))
