"""Entries to the kernels for CPUs: functions of C's kind that take the address of a frame.

One is compiled for each `Variant` that is called for, and kept on disk for later processes. See
`groupnorm.backends.kernels.cpu.call_frame` for what a frame holds.
"""

import ast
import hashlib
import sys
from pathlib import Path

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic, models, overload, register_model

from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu.compiled.channels_first import (
    channels_first_backward,
    channels_first_forward,
)
from groupnorm.backends.kernels.cpu.compiled.channels_last import (
    channels_last_backward,
    channels_last_forward,
)
from groupnorm.backends.kernels.cpu.compiled.elements import jit

__all__ = ["Variant", "address_of", "compiled", "run", "word"]

_ELEMENTS = {"float32": types.float32, "float16": types.uint16, "bfloat16": types.int16}


def _file(module: str) -> Path | None:
    """Return the file of a module of groupnorm, if there is a module of this name."""
    _, *parts = module.split(".")
    path = Path(str(sys.modules["groupnorm"].__file__)).resolve().parent.joinpath(*parts)
    files = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file.resolve() for file in files if parts and file.is_file()), None)


def _imports(path: Path) -> set[Path]:
    """Return the files of the modules of groupnorm that a file imports when it is imported.

    What it imports for types alone, under `if TYPE_CHECKING`, is not compiled in.
    """
    found = set()
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import):
            names = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # Either a module of a package, or what a module defines.
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        else:
            continue
        for candidates in names:
            files = (_file(name) for name in candidates if name.startswith("groupnorm."))
            found |= {next((file for file in files if file is not None), None)}
    return found - {None}


def _sources() -> list[Path]:
    """Return the files of this package, and those that they import from groupnorm, and so on.

    Found by their imports, none is forgotten when one is added or moved.
    """
    own = Path(__file__).resolve()
    found, waiting = set(), set(own.parent.glob("*.py"))
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= _imports(path) - found
    if own not in found:
        raise RuntimeError(f"the source of the kernels, by which they are kept, is not at {own}")
    return sorted(found)


def _digest() -> str:
    """Return what changes when any of the kernels does: what was compiled before is void then."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in _sources())).hexdigest()[:16]


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
def _load(typing_context, address):
    def code(context, builder, signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.int64(address), code


@jit()
def word(address, index):
    """Read one of the words that begin at an address."""
    return _load(address + 8 * index)


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

# Each returns what kernels take next to each other, in their order.


@jit()
def _operands(call, at):
    """Return x, y, scale, bias and the mask; then groups, size and positions."""
    n, groups, size = word(at, frames.ELEMENTS), word(at, frames.GROUPS), word(at, frames.SIZE)
    return (
        numba.carray(_x(call, word(at, frames.X)), (n,)),
        numba.carray(_y(call, word(at, frames.Y)), (n,)),
        numba.carray(_float32(call, word(at, frames.SCALE)), (groups * size,)),
        numba.carray(_float32(call, word(at, frames.BIAS)), (groups * size,)),
        _mask(call, word(at, frames.MASK), word(at, frames.MASK_ELEMENTS)),
        groups, size, word(at, frames.POSITIONS),
    )  # fmt: skip


@jit()
def _ways(at):
    """Return samples, rows, width and whether threads work apart: for channels last."""
    return (
        word(at, frames.SAMPLES), word(at, frames.ROWS), word(at, frames.WIDTH),
        word(at, frames.APARTNESS) != 0,
    )  # fmt: skip


@jit()
def _numbers(call, at):
    """Return mean, rstd and share."""
    n = word(at, frames.SAMPLES) * word(at, frames.GROUPS)
    saved = numba.carray(_float64(call, word(at, frames.SAVED)), (3 * n,))
    return saved[:n], saved[n : 2 * n], saved[2 * n :]


@jit()
def _gradients(call, at):
    """Return dy, room for sums, the number of batches and the gradients of scale and bias."""
    channels, batches = word(at, frames.GROUPS) * word(at, frames.SIZE), word(at, frames.BATCHES)
    sums = 2 * word(at, frames.SAMPLES) * channels
    return (
        numba.carray(_dy(call, word(at, frames.DY)), (word(at, frames.ELEMENTS),)),
        numba.carray(_float64(call, word(at, frames.SUMS)), (sums,)),
        batches,
        numba.carray(_float32(call, word(at, frames.DSCALE)), (batches * channels,)),
        numba.carray(_float32(call, word(at, frames.DBIAS)), (batches * channels,)),
    )


@jit()
def _team(call, at):
    """Return the number of parts, and the counters."""
    counters = word(at, frames.COUNTERS) * frames.LINE
    return word(at, frames.PARTS), numba.carray(_int64(call, at + 8 * frames.HEAD), (counters,))


@jit()
def _scratch(call, at):
    """Return room, pulls, starts and tables, of which no kernel takes all."""
    room, pulls = word(at, frames.ROOM), word(at, frames.PULLS)
    starts, tables = word(at, frames.STARTS), word(at, frames.TABLES)
    a = word(at, frames.SCRATCH)
    b = a + 8 * room
    c = b + 8 * pulls
    d = (c + 8 * starts + 63) // 64 * 64
    return (
        numba.carray(_float64(call, a), (room,)),
        numba.carray(_float64(call, b), (pulls,)),
        numba.carray(_int64(call, c), (starts,)),
        numba.carray(_float32(call, d), (tables,)),
    )


def _channels_first_forward(call):
    at = address_of(call)
    channels_first_forward(
        *_operands(call, at), _float(word(at, frames.EPSILON)), _activation(call),
        *_numbers(call, at), *_team(call, at),
    )  # fmt: skip


def _channels_first_backward(call):
    at = address_of(call)
    channels_first_backward(
        *_operands(call, at), _activation(call), *_numbers(call, at), *_gradients(call, at),
        *_team(call, at),
    )  # fmt: skip


def _channels_last_forward(call):
    at = address_of(call)
    room, _, starts, tables = _scratch(call, at)
    channels_last_forward(
        *_operands(call, at), *_ways(at), _float(word(at, frames.EPSILON)), _activation(call),
        *_numbers(call, at), room, starts, tables, *_team(call, at),
    )  # fmt: skip


def _channels_last_backward(call):
    at = address_of(call)
    room, pulls, _, tables = _scratch(call, at)
    channels_last_backward(
        *_operands(call, at), *_ways(at), _activation(call), *_numbers(call, at),
        *_gradients(call, at), room, pulls, tables, *_team(call, at),
    )  # fmt: skip


def _run(call):
    raise NotImplementedError


@overload(_run)
def _run_overload(call):
    bodies = (
        _channels_first_forward,
        _channels_first_backward,
        _channels_last_forward,
        _channels_last_backward,
    )
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
