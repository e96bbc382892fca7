"""How several threads share one call of a kernel, compiled by numba.

All of them run the same function, and claim tasks from counters, so that a thread that comes late,
or not at all, costs nothing but its help: nobody ever waits for one that has not begun a task.
Which thread does a task changes no number.

The tasks are cut into as many parts as there are threads. Each has a seat, and begins with that
part: neighbouring tasks of one thread find their lines in its cache, and two threads that took
turns on the memory would fetch it from each other, which took twice as long. Who has done with its
own part goes on to the others'.

A team is an array of zeros in int64, with `LINE` numbers for each counter, so that no two lie in
one line of the cache.
"""

import os

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, register_jitable

from groupnorm.backends.kernels.cpu.call_frame import LINE
from groupnorm.backends.kernels.cpu.compiled.elements import jit

__all__ = ["claim_part", "claim_task", "finish", "wait"]


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
def claim_part(team, counter, parts):
    """Return the part of the tasks this thread is to begin with."""
    return _add(team, counter * LINE, 1) % parts


@jit()
def claim_task(team, counter, parts, tasks, seat):
    """Return a task that is this thread's from now on; -1 where there is none left.

    Each part has its own counter, from `counter` on.
    """
    for turn in range(parts):
        part = (seat + turn) % parts
        first, last = tasks * part // parts, tasks * (part + 1) // parts
        if _look(team, (counter + part) * LINE) < last - first:
            task = first + _add(team, (counter + part) * LINE, 1)
            if task < last:
                return task
    return -1


@jit()
def finish(team, counter, amount):
    """Say that so many tasks are done; return how many are."""
    return _add(team, counter * LINE, amount) + amount


@jit()
def wait(team, counter, amount):
    """Wait until so many tasks are done, which other threads are at."""
    looks = 0
    while _look(team, counter * LINE) < amount:
        looks += 1
        if looks > 1000:
            _give_way()
