"""How several threads share one call of a kernel, compiled by numba.

All threads run the same function and claim tasks from counters. A thread that starts late, or
never, delays nothing: no thread ever waits for one that has not begun a task. Which thread
processes a task does not change the result.

The tasks are divided into one part per thread, and each thread begins with a part of its own:
neighbouring tasks of one thread find their cache lines in its cache, while threads that alternate
on neighbouring memory fetch it from each other, which took twice as long. A thread that has
finished its part continues with the others'.

`counters` is an int64 array of zeros, with `LINE` words for each counter, so that no two counters
share a cache line.
"""

import os

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_item_pointer
from numba.extending import intrinsic, register_jitable

from groupnorm.backends.kernels.cpu.call_frame import LINE
from groupnorm.backends.kernels.cpu.compiled.elements import jit

__all__ = ["claim_part", "claim_task", "finish", "wait"]


def _pointer(context, builder, signature, arguments):
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return get_item_pointer(
        context, builder, signature.args[0], array, [arguments[1]], wraparound=False
    )


@intrinsic
def _add(typing_context, counters, at, amount):
    """Add atomically to a counter; return its previous value."""

    def code(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature, arguments)
        return builder.atomic_rmw("add", pointer, arguments[2], "seq_cst")

    return types.int64(counters, types.intp, types.int64), code


@intrinsic
def _read(typing_context, counters, at):
    """Read atomically a counter that other threads write."""

    def code(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature, arguments)
        return builder.load_atomic(pointer, "seq_cst", 8, name="seen", typ=ir.IntType(64))

    return types.int64(counters, types.intp), code


if os.name == "posix":
    _yield_cpu = types.ExternalFunction("sched_yield", types.int32())
else:

    @register_jitable
    def _yield_cpu():
        return 0


@jit()
def claim_part(counters, counter, parts):
    """Return the part of the tasks that this thread begins with."""
    return _add(counters, counter * LINE, 1) % parts


@jit()
def claim_task(counters, counter, parts, tasks, first_part):
    """Claim a task for this thread; return -1 if none is left.

    Each part has its own counter, from `counter` on.
    """
    for turn in range(parts):
        part = (first_part + turn) % parts
        first, last = tasks * part // parts, tasks * (part + 1) // parts
        if _read(counters, (counter + part) * LINE) < last - first:
            task = first + _add(counters, (counter + part) * LINE, 1)
            if task < last:
                return task
    return -1


@jit()
def finish(counters, counter, amount):
    """Record that `amount` tasks are finished; return the total."""
    return _add(counters, counter * LINE, amount) + amount


@jit()
def wait(counters, counter, amount):
    """Wait until `amount` tasks are finished, the last of them by other threads."""
    reads = 0
    while _read(counters, counter * LINE) < amount:
        reads += 1
        if reads > 1000:
            _yield_cpu()
