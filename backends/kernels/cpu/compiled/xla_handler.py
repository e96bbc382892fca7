"""The handler of XLA's foreign function interface, through which CPU programs call the kernels.

XLA calls it with the address of a call frame, made of structs that its public header defines
(``xla/ffi/api/c_api.h``, in every jaxlib); `xla_structs` mirrors them. The first call, when the
handler is registered, requests the version of the interface that it was written for; XLA refuses a
handler whose version it does not support. In every other call, the handler makes a kernel's
argument block from the template in an attribute (`groupnorm.backends.kernels.cpu.call_frame`), and
runs the kernel with the help of XLA's own threads. The template holds the kernel's number in a
table, not its address: programs may be stored on disk, and addresses change between processes.

A thread that starts late finds no work, but still reads the argument block. So the last thread
frees it.
"""

import ctypes
import sys
from functools import lru_cache

from llvmlite import binding, ir
from numba import types
from numba.core.cgutils import alloca_once, get_or_insert_function, memset
from numba.extending import intrinsic

from groupnorm.backends.kernels.cpu import call_frame as frames
from groupnorm.backends.kernels.cpu import huge_pages as pages
from groupnorm.backends.kernels.cpu import xla_structs as xla
from groupnorm.backends.kernels.cpu.compiled.elements import jit
from groupnorm.backends.kernels.cpu.compiled.entry_points import Variant, address_of, compiled, word

__all__ = ["API", "handler", "table"]

API = xla.API


def _word(*path):
    """Return the index of a field's first word; the path leads through nested structs."""
    return sum(field.offset for field in path) // 8


# Indices of words; `..._END` are sizes in bytes, as structs store them in their first words.
FRAME_SIZE, FRAME_END = _word(xla.CallFrame.struct_size), xla.end(xla.CallFrame.attrs)
EXTENSION, INTERFACE = _word(xla.CallFrame.extension_start), _word(xla.CallFrame.api)
CONTEXT = _word(xla.CallFrame.ctx)
ARGUMENTS_SIZE, ARGUMENTS_END = _word(xla.CallFrame.args), xla.end(xla.Args.args)
ARGUMENTS = _word(xla.CallFrame.args, xla.Args.args)
RESULTS_SIZE, RESULTS_END = _word(xla.CallFrame.rets), xla.end(xla.Rets.rets)
RESULTS = _word(xla.CallFrame.rets, xla.Rets.rets)
ATTRIBUTES_SIZE, ATTRIBUTES_END = _word(xla.CallFrame.attrs), xla.end(xla.Attrs.attrs)
ATTRIBUTES = _word(xla.CallFrame.attrs, xla.Attrs.attrs)

EXTENSION_TYPE, EXTENSION_NEXT = _word(xla.ExtensionBase.type), _word(xla.ExtensionBase.next)
METADATA_TYPE, METADATA = xla.XLA_FFI_Extension_Metadata, _word(xla.MetadataExtension.metadata)
METADATA_SIZE, METADATA_END = _word(xla.Metadata.struct_size), xla.end(xla.Metadata.api_version)
VERSION = _word(xla.Metadata.api_version, xla.ApiVersion.major_version)

BUFFER_DATA = _word(xla.Buffer.data)
ARRAY_SIZE, ARRAY_DATA = _word(xla.Array.size), _word(xla.Array.data)

API_SIZE, API_END = _word(xla.Api.struct_size), xla.end(xla.Api.XLA_FFI_ThreadPool_Schedule)
VERSION_SIZE, VERSION_END = _word(xla.Api.api_version), xla.end(xla.ApiVersion.minor_version)
ERROR_CREATE = _word(xla.Api.XLA_FFI_Error_Create)
ERROR_DESTROY = _word(xla.Api.XLA_FFI_Error_Destroy)
SCHEDULE = _word(xla.Api.XLA_FFI_ThreadPool_Schedule)

CREATE_MESSAGE, CREATE_CODE = _word(xla.ErrorCreateArgs.message), _word(xla.ErrorCreateArgs.errc)
CREATE_END = xla.end(xla.ErrorCreateArgs.errc)
FAILED_PRECONDITION = xla.XLA_FFI_Error_Code_FAILED_PRECONDITION
RESOURCE_EXHAUSTED = xla.XLA_FFI_Error_Code_RESOURCE_EXHAUSTED
DESTROY_ERROR, DESTROY_END = _word(xla.ErrorDestroyArgs.error), xla.end(xla.ErrorDestroyArgs.error)
SCHEDULE_CONTEXT, SCHEDULE_TASK = _word(xla.ScheduleArgs.ctx), _word(xla.ScheduleArgs.task)
SCHEDULE_DATA, SCHEDULE_END = _word(xla.ScheduleArgs.data), xla.end(xla.ScheduleArgs.data)

# The words of the longest struct that is passed to XLA.
PASSED_WORDS = -(-max(CREATE_END, DESTROY_END, SCHEDULE_END) // 8)

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
def _passed(typing_context):
    """Return the address of `PASSED_WORDS` zeros on the stack; unlike calloc, this cannot fail.

    They are valid until the calling function returns.
    """

    def code(context, builder, signature, arguments):
        words = alloca_once(builder, ir.ArrayType(ir.IntType(64), PASSED_WORDS))
        memset(builder, words, ir.IntType(64)(8 * PASSED_WORDS), 0)
        return builder.ptrtoint(words, ir.IntType(64))

    return types.int64(), code


@intrinsic
def _decrement(typing_context, address):
    """Decrement a counter atomically; return its new value."""

    def code(context, builder, signature, arguments):
        number = ir.IntType(64)
        pointer = builder.inttoptr(arguments[0], number.as_pointer())
        before = builder.atomic_rmw("sub", pointer, number(1), "seq_cst")
        return builder.sub(before, number(1))

    return types.int64(types.int64), code


@intrinsic
def _call(typing_context, function, argument):
    """Call a C function that takes one address and returns one."""

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


_no_memory = _address_of_text("groupnorm: out of memory for a kernel's argument block")
_no_kernel = _address_of_text(
    "groupnorm: this program was compiled by another process, and its kernels are not loaded here: "
    "trace it here once"
)
_unknown_structs = _address_of_text(
    "groupnorm: XLA's call frame does not have the version that the handler was written for"
)


@intrinsic
def _table_address(typing_context):
    """Return the address of the table, which is a named symbol."""

    def code(context, builder, signature, arguments):
        kind = ir.FunctionType(ir.VoidType(), [])
        symbol = get_or_insert_function(builder.module, kind, _TABLE)
        return builder.ptrtoint(symbol, ir.IntType(64))

    return types.int64(), code


_allocate = types.ExternalFunction("calloc", types.int64(types.int64, types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_advise = types.ExternalFunction("madvise", types.int32(types.int64, types.int64, types.int32))


# The handler --------------------------------------------------------------------------------------


@jit()
def _put(struct, index, value):
    _store(struct + 8 * index, value)


@jit()
def _refuse(interface, text, code):
    """Return a new XLA error."""
    arguments = _passed()
    _put(arguments, 0, CREATE_END)
    _put(arguments, CREATE_MESSAGE, text)
    _put(arguments, CREATE_CODE, code)
    return _call(word(interface, ERROR_CREATE), arguments)


@jit()
def _release(block):
    if _decrement(block + 8 * frames.HOLDERS) == 0:
        _free(block)


@jit()
def _schedule_helper(interface, context, block, help_):
    """Schedule a helper in XLA's thread pool; if XLA refuses, continue without it."""
    arguments = _passed()
    _put(arguments, 0, SCHEDULE_END)
    _put(arguments, SCHEDULE_CONTEXT, context)
    _put(arguments, SCHEDULE_TASK, help_)
    _put(arguments, SCHEDULE_DATA, block)
    error = _call(word(interface, SCHEDULE), arguments)
    if error != 0:
        refused = _passed()
        _put(refused, 0, DESTROY_END)
        _put(refused, DESTROY_ERROR, error)
        _call(word(interface, ERROR_DESTROY), refused)
        _release(block)


@jit()
def _metadata(call_frame):
    """Return the address of the metadata that XLA requests, or 0 if this is an ordinary call."""
    extension = word(call_frame, EXTENSION)
    while extension != 0 and word(extension, EXTENSION_TYPE) & 0xFFFFFFFF != METADATA_TYPE:
        extension = word(extension, EXTENSION_NEXT)
    return extension if extension == 0 else word(extension, METADATA)


@jit()
def _is_known(call_frame, interface):
    """Whether all fields that are read exist, at the offsets of the mirrored structs.

    Structs may have grown at their ends, except those that other fields follow in the frame.
    """
    return (
        word(call_frame, FRAME_SIZE) >= FRAME_END
        and word(call_frame, ARGUMENTS_SIZE) == ARGUMENTS_END
        and word(call_frame, RESULTS_SIZE) == RESULTS_END
        and word(call_frame, ATTRIBUTES_SIZE) >= ATTRIBUTES_END
        and word(interface, API_SIZE) >= API_END
        and word(interface, VERSION_SIZE) == VERSION_END
    )


@jit()
def _buffer(call_frame, number):
    """Return the address of the data of argument `number`, from 1, or of a result, from 101."""
    if number == 0:
        return 0
    first = number < 101
    buffers = word(call_frame, ARGUMENTS if first else RESULTS)
    return word(word(buffers, number - (1 if first else 101)), BUFFER_DATA)


@jit()
def _make_block(call_frame, template):
    """Allocate and fill an argument block; return its address, or 0."""
    length, words = word(template, ARRAY_SIZE), word(template, ARRAY_DATA)
    scratch, sums = word(words, frames.SCRATCH_WORDS), word(words, frames.SUMS_WORDS)
    block = _allocate(length + scratch + sums, 8)
    if block != 0:
        for i in range(length):
            _store(block + 8 * i, word(words, i))
        for i in range(frames.ADDRESSES):
            _store(block + 8 * i, _buffer(call_frame, word(words, i)))
        _store(block + 8 * frames.SCRATCH, block + 8 * length)
        _store(block + 8 * frames.SUMS, block + 8 * (length + scratch))
        _store(block + 8 * frames.HOLDERS, word(words, frames.PARTS))
    return block


@jit()
def _want_large_pages(address, size):
    """As `groupnorm.backends.kernels.cpu.huge_pages.want_large_pages`; nothing if size is 0."""
    if size != 0:
        begin = (address + pages.PAGE - 1) // pages.PAGE * pages.PAGE
        end = (address + size) // pages.PAGE * pages.PAGE
        _advise(begin, end - begin, pages.MADV_HUGEPAGE)


def _help(call):
    """Help with the work of an argument block, then release it."""
    block = address_of(call)
    _call(word(block, frames.RUN), block)
    _release(block)


def _handle(call):
    """Handle a call from XLA; return 0 or an error."""
    call_frame = address_of(call)
    metadata = _metadata(call_frame)
    if metadata != 0:  # XLA requests the version
        if word(metadata, METADATA_SIZE) >= METADATA_END:
            _put(metadata, VERSION, API[0] | API[1] << 32)  # two 32-bit integers
        return 0
    interface = word(call_frame, INTERFACE)
    if not _is_known(call_frame, interface):
        return _refuse(interface, _unknown_structs(), FAILED_PRECONDITION)
    template = word(word(call_frame, ATTRIBUTES), 0)
    words = word(template, ARRAY_DATA)
    table = _table_address()
    run = word(table, word(words, frames.RUN))
    if run == 0:
        return _refuse(interface, _no_kernel(), FAILED_PRECONDITION)
    block = _make_block(call_frame, template)
    if block == 0:
        return _refuse(interface, _no_memory(), RESOURCE_EXHAUSTED)
    _store(block + 8 * frames.RUN, run)
    if _LINUX:
        _want_large_pages(word(block, frames.Y), word(block, frames.LARGE_PAGES))
    for _ in range(word(block, frames.PARTS) - 1):
        _schedule_helper(interface, word(call_frame, CONTEXT), block, word(table, 0))
    _call(run, block)
    _release(block)
    return 0


@lru_cache(maxsize=1)
def table():
    """Return the table of the kernels' addresses, indexed by their numbers; callers fill it."""
    made = (ctypes.c_int64 * (1 + frames.KERNEL_COUNT))()
    binding.add_symbol(_TABLE, ctypes.addressof(made))
    return made


@lru_cache(maxsize=1)
def handler():
    """Compile or load the handler; return numba's objects, with their addresses."""
    help_ = compiled(Variant("help"), _help)
    table()[0] = help_.address
    return compiled(Variant("handle"), _handle, types.int64), help_
