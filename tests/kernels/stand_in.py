"""The stand-in for CUDA's driver, ``driver_stand_in.c``: compiled, loaded, and its records read."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("driver_stand_in.c")
COMPILER = shutil.which("gcc") or shutil.which("cc")
PARAMETERS, ATTRIBUTES = 64, 4


class Record(ctypes.Structure):
    """One launch; the arguments are those that the kernel reads, by the sizes in its cubin."""

    _fields_ = (
        ("_name", ctypes.c_char * 64), ("_grid", ctypes.c_uint32 * 3),
        ("_block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32), ("count", ctypes.c_int32),
        ("stream", ctypes.c_uint64), ("context", ctypes.c_uint64), ("thread", ctypes.c_uint64),
        ("_sizes", ctypes.c_int32 * PARAMETERS), ("_values", ctypes.c_uint64 * PARAMETERS),
        ("_attributes", ctypes.c_int32), ("_ids", ctypes.c_int32 * ATTRIBUTES),
        ("_attribute_values", ctypes.c_int32 * ATTRIBUTES), ("dynamic_shared", ctypes.c_int32),
    )  # fmt: skip

    @property
    def name(self) -> str:
        return self._name.decode()

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self._grid)

    @property
    def block(self) -> tuple[int, ...]:
        return tuple(self._block)

    @property
    def arguments(self) -> list[tuple[int, int]]:
        """The size in bytes and the value of every parameter."""
        return list(zip(self._sizes, self._values, strict=True))[: self.count]

    @property
    def attributes(self) -> list[tuple[int, int]]:
        return list(zip(self._ids, self._attribute_values, strict=True))[: self._attributes]


def compile_stand_in(folder: Path) -> Path:
    """Compile the library into a folder; return its path."""
    path = folder / "libcuda.so.1"
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread")
    subprocess.run([COMPILER, *flags, "-o", path, SOURCE], check=True)
    return path


class StandIn:
    """The library, as a test controls it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.stand_in_record.restype = ctypes.POINTER(Record)
        self._library.stand_in_called.restype = ctypes.c_char_p
        self._library.stand_in_record_bytes.restype = ctypes.c_size_t
        assert self._library.stand_in_record_bytes() == ctypes.sizeof(Record)

    def reset(self, *, recording: bool = True) -> None:
        """Forget all launches; no context is current. Without recording, a call does the least."""
        self._library.cuCtxSetCurrent(ctypes.c_void_p())
        self._library.stand_in_reset(int(recording))

    def fail(self, function: str, code: int) -> None:
        """Have a function return an error code."""
        self._library.stand_in_fail(function.encode(), code)

    @property
    def launches(self) -> list[Record]:
        count = self._library.stand_in_count()
        return [self._library.stand_in_record(i).contents for i in range(count)]

    @property
    def called(self) -> list[str]:
        """The names of the functions that were called."""
        return self._library.stand_in_called().decode().split()

    @property
    def modules(self) -> int:
        """How many modules were loaded."""
        return self._library.stand_in_modules()

    @property
    def context(self) -> int:
        """This thread's current context, 0 if there is none."""
        found = ctypes.c_uint64()
        self._library.cuCtxGetCurrent(ctypes.byref(found))
        return found.value

    @context.setter
    def context(self, value: int) -> None:
        self._library.cuCtxSetCurrent(ctypes.c_void_p(value))
