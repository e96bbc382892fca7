"""The handler of XLA's foreign function interface, by which its programs for CPUs call the kernels.

XLA calls it with the address of a call frame, of structs that its public header
(``xla/ffi/api/c_api.h``, in every jaxlib) defines; the offsets into them are those of `API`. The
handler makes a kernel's frame from the template that comes as an attribute (`groupnorm.backends.
frames`), and runs the kernel, with the help of XLA's own threads. Which kernel, it finds by its
number in a table: programs may be kept on disk, where no address would last.

A thread that comes when all is done finds nothing to do, but looks into the frame all the same. So
the frame is freed by the last one.
"""

import ctypes
import sys
from functools import lru_cache

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu import huge_pages as pages
from groupnorm.backends.kernels.cpu.compiled.elements import jit
from groupnorm.backends.kernels.cpu.compiled.entry_points import Variant, address_of, compiled, word

__all__ = ["API", "handler", "table"]

# The version of the header whose offsets these are.
API = (0, 3)

# Of XLA_FFI_CallFrame, in words.
EXTENSION, INTERFACE, CONTEXT, ARGUMENTS, RESULTS, ATTRIBUTES = 1, 2, 3, 9, 14, 20
# Of XLA_FFI_Metadata_Extension; and of XLA_FFI_Metadata, the one of the version.
METADATA, VERSION = 3, 3
# Of XLA_FFI_Buffer and XLA_FFI_Array.
BUFFER_DATA, ARRAY_SIZE, ARRAY_DATA = 3, 1, 2
# Of XLA_FFI_Api.
ERROR_CREATE, ERROR_DESTROY, SCHEDULE = 6, 8, 17
FAILED_PRECONDITION, RESOURCE_EXHAUSTED = 9, 8

_TABLE = "groupnorm_table"
_LINUX = sys.platform == "linux"


# Memory, and functions by their address -----------------------------------------------------------


@intrinsic
def _store(typing_context, address, value):
    def code(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[1], pointer)
        return context.get_dummy_value()

    return types.none(types.int64, types.int64), code


@intrinsic
def _let_go(typing_context, address):
    """Take one from a number that other threads take from as well; return what is left."""

    def code(context, builder, signature, arguments):
        number = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        before = builder.atomic_rmw("sub", pointer, number(1), "seq_cst")
        return builder.sub(before, number(1))

    return types.int64(types.int64), code


@intrinsic
def _call(typing_context, function, argument):
    """Call a function of C's kind, of one address, that returns one."""

    def code(context, builder, signature, arguments):
        number = ir.IntType(64)
        kind = ir.FunctionType(number, [number])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), code


def _address_of_text(text):
    @intrinsic
    def address(typing_context):
        def code(context, builder, signature, arguments):
            constant = context.insert_const_string(builder.module, text)
            return builder.ptrtoint(constant, ir.IntType(64))

        return types.int64(), code

    return address


_no_memory = _address_of_text("groupnorm: there is no memory for a kernel's frame")
_no_kernel = _address_of_text(
    "groupnorm: this program was compiled by another process, and its kernels are not loaded here: "
    "trace it here once"
)


@intrinsic
def _table_address(typing_context):
    """Return the address of the table, which is known by a name."""

    def code(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [])
        symbol = cgutils.get_or_insert_function(builder.module, kind, _TABLE)
        return builder.ptrtoint(symbol, ir.IntType(64))

    return types.int64(), code


_allocate = types.ExternalFunction("calloc", types.int64(types.int64, types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_advise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))


# The handler --------------------------------------------------------------------------------------


@jit()
def _refuse(interface, text, code):
    """Return an error of XLA's."""
    arguments = _allocate(4, 8)
    _store(arguments, 32)
    _store(arguments + 16, text)
    _store(arguments + 24, code)
    error = _call(word(interface, ERROR_CREATE), arguments)
    _free(arguments)
    return error


@jit()
def _release(frame):
    if _let_go(frame + 8 * frames.HOLDERS) == 0:
        _free(frame)


@jit()
def _ask_for_help(interface, context, frame, help_):
    """Have one of XLA's threads come, or do without."""
    arguments = _allocate(5, 8)
    _store(arguments, 40)
    _store(arguments + 16, context)
    _store(arguments + 24, help_)
    _store(arguments + 32, frame)
    error = _call(word(interface, SCHEDULE), arguments)
    if error != 0:
        _store(arguments, 24)
        _store(arguments + 16, error)
        _call(word(interface, ERROR_DESTROY), arguments)
        _release(frame)
    _free(arguments)


@jit()
def _buffer(call_frame, number):
    """Return where an argument's data is, which are counted from 1; of results, from 101."""
    if number == 0:
        return 0
    first = number < 101
    buffers = word(call_frame, ARGUMENTS if first else RESULTS)
    return word(word(buffers, number - (1 if first else 101)), BUFFER_DATA)


@jit()
def _make_frame(call_frame, template):
    """Return a frame on memory of its own, or 0."""
    length, words = word(template, ARRAY_SIZE), word(template, ARRAY_DATA)
    scratch, sums = word(words, frames.SCRATCH_WORDS), word(words, frames.SUMS_WORDS)
    frame = _allocate(length + scratch + sums, 8)
    if frame != 0:
        for i in range(length):
            _store(frame + 8 * i, word(words, i))
        for i in range(frames.ADDRESSES):
            _store(frame + 8 * i, _buffer(call_frame, word(words, i)))
        _store(frame + 8 * frames.SCRATCH, frame + 8 * length)
        _store(frame + 8 * frames.SUMS, frame + 8 * (length + scratch))
        _store(frame + 8 * frames.HOLDERS, word(words, frames.PARTS))
    return frame


@jit()
def _want_large_pages(address, size):
    """As `groupnorm.backends.kernels.cpu.huge_pages.want_large_pages`, where size is not 0."""
    if size != 0:
        begin = (address + pages.PAGE - 1) // pages.PAGE * pages.PAGE
        end = (address + size) // pages.PAGE * pages.PAGE
        _advise(begin, end - begin, pages.MADV_HUGEPAGE)


def _help(call):
    """Do a thread's share of a frame's work, and let go of it."""
    frame = address_of(call)
    _call(word(frame, frames.RUN), frame)
    _release(frame)


def _handle(call):
    """Serve a call of XLA's; return 0 or an error."""
    call_frame = address_of(call)
    extension = word(call_frame, EXTENSION)
    if extension != 0:  # it asks for the version
        _store(word(extension, METADATA) + 8 * VERSION, API[0] | API[1] << 32)
        return 0
    interface = word(call_frame, INTERFACE)
    template = word(word(call_frame, ATTRIBUTES), 0)
    words = word(template, ARRAY_DATA)
    table = _table_address()
    run = word(table, word(words, frames.RUN))
    if run == 0:
        return _refuse(interface, _no_kernel(), FAILED_PRECONDITION)
    frame = _make_frame(call_frame, template)
    if frame == 0:
        return _refuse(interface, _no_memory(), RESOURCE_EXHAUSTED)
    _store(frame + 8 * frames.RUN, run)
    if _LINUX:
        _want_large_pages(word(frame, frames.Y), word(frame, frames.LARGE_PAGES))
    for _ in range(word(frame, frames.PARTS) - 1):
        _ask_for_help(interface, word(call_frame, CONTEXT), frame, word(table, 0))
    _call(run, frame)
    _release(frame)
    return 0


@lru_cache(maxsize=1)
def table():
    """Return the kernels by their numbers, from 1 on, for who adds one to put its address there."""
    made = (ctypes.c_int64 * (1 + frames.NUMBERS))()
    binding.add_symbol(_TABLE, ctypes.addressof(made))
    return made


@lru_cache(maxsize=1)
def handler():
    """Compile the handler, or load it: numba's object, which has its address."""
    help_ = compiled(Variant("help"), _help)
    table()[0] = help_.address
    return compiled(Variant("handle"), _handle, types.int64), help_
