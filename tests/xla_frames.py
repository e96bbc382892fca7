"""Call frames of XLA's foreign function interface, made of the structs that the core declares."""

from __future__ import annotations

import ctypes
import importlib
import sys

import numpy as np

CODES = {"bool": "PRED", "int64": "S64", "uint32": "U32", "float16": "F16", "float32": "F32"}
HANDLER = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)


def core():
    return importlib.import_module("groupnorm.backends.kernels.cpu._core")


def constant(name):
    return core().xla_interface()[f"XLA_FFI_{name}"]


class Struct:
    """A struct by name, zero but for its size and these fields; or one at an address."""

    def __init__(self, name, at=None, **values):
        declared = core().xla_interface()
        name = f"XLA_FFI_{name}"
        self.fields = {k[1]: where for k, where in declared.items() if k[0] == name}
        size = max(offset + length for offset, length in self.fields.values())
        memory = ctypes.c_char * size
        self.memory = memory() if at is None else memory.from_address(at)
        self.kept = []
        if at is None and "struct_size" in self.fields:
            self["struct_size"] = size
        for field, value in values.items():
            self[field] = value

    @property
    def address(self):
        return ctypes.addressof(self.memory)

    def __getitem__(self, field):
        offset, length = self.fields[field]
        return int.from_bytes(self.memory[offset : offset + length], sys.byteorder, signed=True)

    def __setitem__(self, field, value):
        """Set a field: to an integer, another struct inside of this one, or an array's address."""
        offset, length = self.fields[field]
        self.kept.append(value)
        if isinstance(value, Struct):
            content = bytes(value.memory)
        else:
            number = value.ctypes.data if isinstance(value, np.ndarray) else value
            content = number.to_bytes(length, sys.byteorder, signed=True)
        self.memory[offset : offset + length] = content


def addresses(structs):
    return np.array([struct.address for struct in structs], np.int64)


def buffer(a):
    code = CODES.get(a.dtype.name, "BF16")
    return Struct(
        "Buffer", dtype=constant(f"DataType_{code}"), data=a, rank=a.ndim,
        dims=np.array(a.shape, np.int64),
    )  # fmt: skip


def api(create):
    """Return the interface, with the function that makes errors."""
    function = ctypes.cast(create, ctypes.c_void_p).value
    return Struct("Api", api_version=Struct("Api_Version"), XLA_FFI_Error_Create=function)


def capsule_address(capsule):
    find = ctypes.pythonapi.PyCapsule_GetPointer
    find.restype, find.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return find(capsule, b"xla._CUSTOM_CALL_TARGET")


def declared_version(handler, *others):
    """Return the version that a handler answers, behind other extensions of the frame."""
    metadata = Struct("Metadata", api_version=Struct("Api_Version"))
    base = Struct("Extension_Base", type=constant("Extension_Metadata"))
    last = Struct("Metadata_Extension", extension_base=base, metadata=metadata.address)
    chain = [last.address]
    for other in others:
        other["next"] = chain[-1]
        chain.append(other.address)
    frame = Struct("CallFrame", extension_start=chain[-1])
    assert handler(frame.address) == 0
    at = metadata.address + metadata.fields["api_version"][0]
    version = Struct("Api_Version", at=at)
    return version["major_version"], version["minor_version"]


class Frame:
    """A call of the handler, without XLA: arrays, results, and the array of numbers.

    Buffers and nested structs may be changed before `handle`.
    """

    def __init__(self, arguments, results, numbers):
        self.errors = []
        self.create = HANDLER(self._created)
        self.api = api(self.create)
        self.arguments = list(map(buffer, arguments))
        self.results = list(map(buffer, results))
        self.numbers = np.array(numbers, np.int64)
        self.array = Struct("Array", dtype=constant("DataType_S64"), size=len(numbers))
        self.args, self.rets, self.attrs = Struct("Args"), Struct("Rets"), Struct("Attrs", size=1)
        self.attribute_type = constant("AttrType_ARRAY")
        self.call = Struct("CallFrame", api=self.api.address)

    def _created(self, address):
        error = Struct("Error_Create_Args", at=address)
        assert error["struct_size"] == len(error.memory)
        self.errors.append((error["errc"], ctypes.string_at(error["message"]).decode()))
        return 4711

    def handle(self):
        """Call the handler; return the code of the error and its message, or None."""
        for struct, name, buffers in (
            (self.args, "args", self.arguments),
            (self.rets, "rets", self.results),
        ):
            struct["size"] = len(buffers)
            struct["types"] = np.full(max(1, len(buffers)), constant("ArgType_BUFFER"), np.int32)
            struct[name] = addresses(buffers)
        self.array["data"] = self.numbers
        self.attrs["types"] = np.full(1, self.attribute_type, np.int32)
        self.attrs["attrs"] = addresses([self.array])
        self.call["args"], self.call["rets"] = self.args, self.rets
        self.call["attrs"] = self.attrs
        handler = HANDLER(capsule_address(core().xla_handler()))
        returned = handler(self.call.address)
        assert returned == (4711 if self.errors else 0)
        return self.errors.pop() if self.errors else None
