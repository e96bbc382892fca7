"""The structs of XLA's foreign function interface that the handler reads and writes.

They mirror version 0.3 of the public header, ``xla/ffi/api/c_api.h`` in every jaxlib, under its
names, each up to the last field that is used; the tests compare them with the installed header.

The header says what may change. The major version is "incremented when an ABI-incompatible change
is made", such as "rearranging fields in the XLA_FFI_Api or argument structs"; minor versions may be
"adding a new field" and "renaming a method or argument (doesn't affect ABI)". And: "XLA runtime
guarantees that old API version are supported for at least 12 months". So the handler declares the
version it was written for, and leaves it to XLA to refuse that when it is registered.

Structs that lie within another one would move its other fields if they grew. So the handler checks
that they have the sizes they have here.
"""

import ctypes
from typing import Any

__all__ = [
    "API",
    "STRUCTS",
    "Api",
    "ApiVersion",
    "Args",
    "Array",
    "Attrs",
    "Buffer",
    "CallFrame",
    "ErrorCreateArgs",
    "ErrorDestroyArgs",
    "ExtensionBase",
    "Metadata",
    "MetadataExtension",
    "Rets",
    "ScheduleArgs",
    "end",
]

# The version of the interface these are of.
API = (0, 3)

# Values of the header's enumerations.
XLA_FFI_Extension_Metadata = 1
XLA_FFI_Error_Code_RESOURCE_EXHAUSTED = 8
XLA_FFI_Error_Code_FAILED_PRECONDITION = 9

STRUCTS: list[type[ctypes.Structure]] = []

_SIZE, _INT64, _POINTER, _ENUM = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int


def _struct(name: str, **fields: Any) -> Any:
    made = type(f"XLA_FFI_{name}", (ctypes.Structure,), {"_fields_": list(fields.items())})
    STRUCTS.append(made)
    return made


def _passed(name: str, **fields: Any) -> Any:
    """Return a struct as those are that functions take: with its size, so that it can grow."""
    return _struct(name, struct_size=_SIZE, extension_start=_POINTER, **fields)


def end(field: Any) -> int:
    """Return the size of a struct up to and with a field, which the header calls its size."""
    size: int = field.offset + field.size
    return size


ExtensionBase = _struct("Extension_Base", struct_size=_SIZE, type=_ENUM, next=_POINTER)
ApiVersion = _passed("Api_Version", major_version=ctypes.c_int, minor_version=ctypes.c_int)

Buffer = _passed("Buffer", dtype=_ENUM, data=_POINTER)
Array = _struct("Array", dtype=_ENUM, size=_SIZE, data=_POINTER)

Args = _passed("Args", size=_INT64, types=_POINTER, args=_POINTER)
Rets = _passed("Rets", size=_INT64, types=_POINTER, rets=_POINTER)
Attrs = _passed("Attrs", size=_INT64, types=_POINTER, names=_POINTER, attrs=_POINTER)
CallFrame = _passed(
    "CallFrame", api=_POINTER, ctx=_POINTER, stage=_ENUM, args=Args, rets=Rets, attrs=Attrs
)

Metadata = _struct("Metadata", struct_size=_SIZE, api_version=ApiVersion)
MetadataExtension = _struct("Metadata_Extension", extension_base=ExtensionBase, metadata=_POINTER)

ErrorCreateArgs = _passed("Error_Create_Args", message=_POINTER, errc=_ENUM)
ErrorDestroyArgs = _passed("Error_Destroy_Args", error=_POINTER)
ScheduleArgs = _passed("ThreadPool_Schedule_Args", ctx=_POINTER, task=_POINTER, data=_POINTER)
Api = _passed(
    "Api",
    api_version=ApiVersion,
    internal_api=_POINTER,
    XLA_FFI_Error_Create=_POINTER,
    XLA_FFI_Error_GetMessage=_POINTER,
    XLA_FFI_Error_Destroy=_POINTER,
    XLA_FFI_Handler_Register=_POINTER,
    XLA_FFI_Stream_Get=_POINTER,
    XLA_FFI_Type_Register=_POINTER,
    XLA_FFI_ExecutionContext_Get=_POINTER,
    XLA_FFI_State_Set=_POINTER,
    XLA_FFI_State_Get=_POINTER,
    XLA_FFI_DeviceMemory_Allocate=_POINTER,
    XLA_FFI_DeviceMemory_Free=_POINTER,
    XLA_FFI_ThreadPool_Schedule=_POINTER,
)
