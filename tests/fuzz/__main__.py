"""Fuzz for a while: ``python -m tests.fuzz --seconds 600 --seed 1`` (as `nox -s fuzz` does).

Every failure is printed with the call that shows it, shrunk to what is needed, ready to run:
``python -m tests.fuzz --case "Case(...)"``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time

from tests.fuzz import cases
from tests.fuzz.check import check
from tests.fuzz.shrink import failure, shrink


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, help="stop after this time")
    parser.add_argument("--count", type=int, help="stop after so many cases")
    parser.add_argument("--seed", type=int, help="default: from the clock")
    parser.add_argument("--start", type=int, default=0, help="the first case's number")
    parser.add_argument("--libraries", default="numpy,torch,jax")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many")
    parser.add_argument("--ci", action="store_true", help="only kernels that the suite compiles")
    parser.add_argument("--case", help="run one case, such as 'Case(shape=(2, 3))'")
    options = parser.parse_args()
    if options.case:
        check(eval(options.case, {"Case": cases.Case}))
        print("right")
        return 0
    seed = int(time.time()) if options.seed is None else options.seed
    seconds = 60 if options.seconds is None and options.count is None else options.seconds
    print(f"seed {seed}", flush=True)
    libraries, start, failed, index = tuple(options.libraries.split(",")), time.time(), 0, 0
    for index in itertools.count(options.start):
        done = index - options.start
        if done == options.count or (seconds and time.time() - start > seconds):
            break
        case = cases.draw(seed, index, libraries, every_kernel=not options.ci)
        message = failure(case)
        if message is None:
            continue
        failed += 1
        small = shrink(case)
        print(f"\ncase {index} of seed {seed}: {message}\n  as drawn: {case}", flush=True)
        print(
            f"  shrunk: {failure(small)}\n  python -m tests.fuzz --case {str(small)!r}", flush=True
        )
        if failed == options.failures:
            break
    print(f"{index - options.start} cases in {time.time() - start:.0f} s, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
