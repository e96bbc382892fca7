"""How several threads share one call of a kernel, compiled by numba.

All of them run the same function. They claim tasks from a counter, one after the other, so that
one that comes late, or not at all, costs nothing but its help: nobody ever waits for a thread that
has not begun a task. Which thread does a task changes no number.

A team is an array of zeros in int64, with `STRIDE` numbers for each counter, so that no two lie in
one line of the cache.
"""

import os

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from groupnorm.backends.kernels.numba_numbers import jit

__all__ = ["STRIDE", "claim", "finish", "wait"]

STRIDE = 8


def _pointer(context, builder, signature, arguments):
    from numba.core import cgutils

    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return cgutils.get_item_pointer(
        context, builder, signature.args[0], array, [arguments[1]], wraparound=False
    )


@intrinsic
def _add(typing_context, counters, at, amount):
    """Add to a number that other threads add to as well; return what it was."""

    def code(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), code


@intrinsic
def _look(typing_context, counters, at):
    """Read a number that other threads write."""

    def code(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature, arguments)
        return builder.load_atomic(pointer, "seq_cst", 8, name="seen", typ=ir.IntType(64))

    return types.int64(counters, types.intp), code


if os.name == "posix":
    _give_way = types.ExternalFunction("sched_yield", types.int32())
else:

    @register_jitable
    def _give_way():
        return 0


@jit()
def claim(team, counter, amount):
    """Return the first of so many tasks that are this thread's from now on."""
    return _add(team, counter * STRIDE, amount)


@jit()
def finish(team, counter, amount):
    """Say that so many tasks are done; return how many are."""
    return _add(team, counter * STRIDE, amount) + amount


@jit()
def wait(team, counter, amount):
    """Wait until so many tasks are done, which other threads are at."""
    looks = 0
    while _look(team, counter * STRIDE) < amount:
        looks += 1
        if looks > 1000:
            _give_way()
