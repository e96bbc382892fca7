"""Entries to the kernels for CPUs: functions of C's kind that take the address of a frame.

One is compiled for each `Variant` that is called for, and kept on disk for later processes. See
`groupnorm.backends.frames` for what a frame holds.
"""

import hashlib
from pathlib import Path

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, models, overload, register_model

from groupnorm.backends import frames
from groupnorm.backends.kernels.numba_first import first_backward, first_forward
from groupnorm.backends.kernels.numba_last import last_backward, last_forward

__all__ = ["Variant", "address_of", "compiled", "load", "run", "word"]

_ELEMENTS = {"float32": types.float32, "float16": types.uint16, "bfloat16": types.int16}


def _digest() -> str:
    """Return what changes when any of the kernels does: what was compiled before is void then."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    sources.append(Path(frames.__file__))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


_DIGEST = _digest()


class Variant(types.Type):
    """The address of a frame, and by its type what must be known when the kernel is compiled."""

    def __init__(self, kernel, x="", y="", dy="", masked=False, activation=0):
        self.kernel, self.x, self.y, self.dy = kernel, x, y, dy
        self.masked, self.activation = masked, activation
        mask = "masked" if masked else "whole"
        super().__init__(f"groupnorm_{kernel}_{x}_{y}_{dy}_{mask}_{activation}_{_DIGEST}")


register_model(Variant)(models.OpaqueModel)


# Reading a frame ----------------------------------------------------------------------------------


@intrinsic
def address_of(typing_context, call):
    """Return the frame's address as a number."""

    def code(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], ir.IntType(64))

    return types.int64(call), code


@intrinsic
def load(typing_context, address):
    """Read a word of memory."""

    def code(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.int64(address), code


@numba.njit
def word(address, index):
    """Read one of the words that begin at an address."""
    return load(address + 8 * index)


@intrinsic
def _float(typing_context, bits):
    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), code


def _pointer_to(element):
    @intrinsic
    def pointer(typing_context, call, address):
        result = types.CPointer(element(call))

        def code(context, builder, signature, arguments):
            return builder.inttoptr(arguments[1], context.get_value_type(result))

        return result(call, types.int64), code

    return pointer


_x = _pointer_to(lambda call: _ELEMENTS[call.x])
_y = _pointer_to(lambda call: _ELEMENTS[call.y])
_dy = _pointer_to(lambda call: _ELEMENTS[call.dy])
_bytes = _pointer_to(lambda _: types.uint8)
_float32 = _pointer_to(lambda _: types.float32)
_float64 = _pointer_to(lambda _: types.float64)
_int64 = _pointer_to(lambda _: types.int64)


@intrinsic
def _activation(typing_context, call):
    """Return the tuple whose length says which activation is meant."""
    kind = types.UniTuple(types.int64, call.activation) if call.activation else types.Tuple(())

    def code(context, builder, signature, arguments):
        return cgutils.get_null_value(context.get_value_type(kind))

    return kind(call), code


def _mask(call, address, length):
    raise NotImplementedError


@overload(_mask)
def _mask_overload(call, address, length):
    if call.masked:
        return lambda call, address, length: numba.carray(_bytes(call, address), (length,))
    return lambda call, address, length: None


# Running it ---------------------------------------------------------------------------------------

_X, _Y, _DY, _SCALE, _BIAS, _MASK = (
    frames.X, frames.Y, frames.DY, frames.SCALE, frames.BIAS, frames.MASK,
)  # fmt: skip
_SAVED, _SUMS, _SCRATCH = frames.SAVED, frames.SUMS, frames.SCRATCH
_DSCALE, _DBIAS, _BATCHES = frames.DSCALE, frames.DBIAS, frames.BATCHES
_N, _MASK_N, _SAMPLES, _GROUPS = (
    frames.ELEMENTS, frames.MASK_ELEMENTS, frames.SAMPLES, frames.GROUPS,
)  # fmt: skip
_SIZE, _POSITIONS, _ROWS, _WIDTH = frames.SIZE, frames.POSITIONS, frames.ROWS, frames.WIDTH
_APART, _PARTS, _EPSILON = frames.APARTNESS, frames.PARTS, frames.EPSILON
_ROOM, _PULLS, _STARTS, _TABLES = frames.ROOM, frames.PULLS, frames.STARTS, frames.TABLES
_HEAD, _STRIDE = frames.HEAD, frames.COUNTER_WORDS


@numba.njit
def _sizes(at):
    return word(at, _GROUPS), word(at, _SIZE), word(at, _POSITIONS)


@numba.njit
def _operands(call, at):
    """Return x, y, scale, bias and the mask."""
    n, channels = word(at, _N), word(at, _GROUPS) * word(at, _SIZE)
    return (
        numba.carray(_x(call, word(at, _X)), (n,)),
        numba.carray(_y(call, word(at, _Y)), (n,)),
        numba.carray(_float32(call, word(at, _SCALE)), (channels,)),
        numba.carray(_float32(call, word(at, _BIAS)), (channels,)),
        _mask(call, word(at, _MASK), word(at, _MASK_N)),
    )


@numba.njit
def _numbers(call, at):
    """Return mean, rstd and share."""
    n = word(at, _SAMPLES) * word(at, _GROUPS)
    saved = numba.carray(_float64(call, word(at, _SAVED)), (3 * n,))
    return saved[:n], saved[n : 2 * n], saved[2 * n :]


@numba.njit
def _gradients(call, at):
    """Return dy, room for sums, the number of batches and the gradients of scale and bias."""
    channels, batches = word(at, _GROUPS) * word(at, _SIZE), word(at, _BATCHES)
    return (
        numba.carray(_dy(call, word(at, _DY)), (word(at, _N),)),
        numba.carray(_float64(call, word(at, _SUMS)), (2 * word(at, _SAMPLES) * channels,)),
        batches,
        numba.carray(_float32(call, word(at, _DSCALE)), (batches * channels,)),
        numba.carray(_float32(call, word(at, _DBIAS)), (batches * channels,)),
    )


@numba.njit
def _team(call, at):
    parts, samples = word(at, _PARTS), word(at, _SAMPLES)
    most = _STRIDE * (2 + max(parts, samples * (2 * parts + 1)))
    return parts, numba.carray(_int64(call, at + 8 * _HEAD), (most,))


@numba.njit
def _scratch(call, at):
    """Return room, pulls, starts and tables."""
    a = word(at, _SCRATCH)
    b = a + 8 * word(at, _ROOM)
    c = b + 8 * word(at, _PULLS)
    d = (c + 8 * word(at, _STARTS) + 63) // 64 * 64
    return (
        numba.carray(_float64(call, a), (word(at, _ROOM),)),
        numba.carray(_float64(call, b), (word(at, _PULLS),)),
        numba.carray(_int64(call, c), (word(at, _STARTS),)),
        numba.carray(_float32(call, d), (word(at, _TABLES),)),
    )


def _first_forward(call):
    at = address_of(call)
    x, y, scale, bias, mask = _operands(call, at)
    groups, size, positions = _sizes(at)
    mean, rstd, share = _numbers(call, at)
    parts, team = _team(call, at)
    first_forward(
        x, y, scale, bias, mask, groups, size, positions, _float(word(at, _EPSILON)),
        _activation(call), mean, rstd, share, parts, team,
    )  # fmt: skip


def _first_backward(call):
    at = address_of(call)
    x, dx, scale, bias, mask = _operands(call, at)
    groups, size, positions = _sizes(at)
    mean, rstd, share = _numbers(call, at)
    dy, sums, batches, dscale, dbias = _gradients(call, at)
    parts, team = _team(call, at)
    first_backward(
        x, dy, dx, scale, bias, mask, groups, size, positions, _activation(call), mean, rstd, share,
        sums, batches, dscale, dbias, parts, team,
    )  # fmt: skip


def _last_forward(call):
    at = address_of(call)
    x, y, scale, bias, mask = _operands(call, at)
    groups, size, positions = _sizes(at)
    mean, rstd, share = _numbers(call, at)
    room, _, starts, tables = _scratch(call, at)
    parts, team = _team(call, at)
    last_forward(
        x, y, scale, bias, mask, word(at, _SAMPLES), groups, size, positions, word(at, _ROWS),
        word(at, _WIDTH), _float(word(at, _EPSILON)), _activation(call), word(at, _APART) != 0,
        mean, rstd, share, room, tables, starts, parts, team,
    )  # fmt: skip


def _last_backward(call):
    at = address_of(call)
    x, dx, scale, bias, mask = _operands(call, at)
    groups, size, positions = _sizes(at)
    mean, rstd, share = _numbers(call, at)
    dy, sums, batches, dscale, dbias = _gradients(call, at)
    room, pulls, _, tables = _scratch(call, at)
    parts, team = _team(call, at)
    last_backward(
        x, dy, dx, scale, bias, mask, word(at, _SAMPLES), groups, size, positions, word(at, _ROWS),
        word(at, _WIDTH), _activation(call), word(at, _APART) != 0, mean, rstd, share, sums,
        batches, dscale, dbias, room, pulls, tables, parts, team,
    )  # fmt: skip


def _run(call):
    raise NotImplementedError


@overload(_run)
def _run_overload(call):
    bodies = (_first_forward, _first_backward, _last_forward, _last_backward)
    return dict(zip(frames.KERNELS, bodies, strict=True))[call.kernel]


def run(call):
    """Do a thread's share of a call, and return when all of it is done."""
    _run(call)


# Raises RuntimeError where numba finds nowhere to keep what it compiles.
FunctionCache(run)


def compiled(variant, function=run, result=types.void):
    """Compile a function of frames, or load it: numba's object, which has its address."""
    return numba.cfunc(
        result(variant), cache=True, error_model="numpy", boundscheck=False, nogil=True
    )(function)
