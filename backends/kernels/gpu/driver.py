"""Launching compiled kernels by CUDA's driver API, for libraries whose arrays have an address.

The cubins come from `build`. They are loaded and launched through ``libcuda.so.1`` by ctypes, which
needs no C compiler and no header. `Launches` prepares a launch sequence once per dtypes, alignment
and device: modules are loaded, and the memory that arguments are passed in is laid out. A call
writes the addresses and the stream into it, and calls the driver once per kernel.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

from groupnorm.backends.kernels.gpu.build import ALIGNMENT, Built, build
from groupnorm.backends.kernels.gpu.launch import Work
from groupnorm.backends.kernels.gpu.program import Launch, LaunchSequence, statistics_shape
from groupnorm.plan import product

__all__ = ["ARRAYS", "Driver", "DriverError", "Launches", "PreparedWork", "driver", "dtype_name"]

_LIBRARY = "libcuda.so.1"
# Temporary arrays begin at multiples of this many float32 elements: 256 bytes, as allocations do.
_STEP = 64
# More shared memory than this has to be asked for, kernel by kernel.
_SHARED_BY_DEFAULT = 48 << 10
# Constants of cuda.h.
_COMPUTE_CAPABILITY = (75, 76)
_MAX_DYNAMIC_SHARED = 8
_CAPTURE_MODE_RELAXED = 2
_PROGRAMMATIC_STREAM_SERIALIZATION = 6

# The arrays of the forward and of the backward pass, in the order of their addresses.
ARRAYS = {
    "forward": ("x", "scale", "bias", "mask", "y", "statistics"),
    "backward": (
        "x", "scale", "bias", "mask", "dy", "statistics", "dx", "dscale", "dbias"
    ),
}  # fmt: skip


class DriverError(RuntimeError):
    """A function of CUDA's driver failed, or the driver cannot be loaded."""


class Driver:
    """CUDA's driver API, as far as launching kernels needs it.

    Parameters
    ----------
    library : str
        The name or path of the driver's library.

    Raises
    ------
    DriverError
        If there is no driver, or it cannot be initialized.
    """

    def __init__(self, library: str) -> None:
        try:
            # Not PyDLL, which holds the GIL: a launch blocks while the device's queue is full, and
            # what the queue waits for may be a callback in Python.
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise DriverError(f"CUDA's driver cannot be loaded: {error}") from error
        self._lock = threading.RLock()  # a garbage collection in the midst of loading may call
        self._contexts: dict[int, int] = {}
        self._functions: dict[tuple[str, str, int], int] = {}
        self.call("cuInit", ctypes.c_uint(0))

    def function_at(self, name: str, *arguments: Any) -> Callable[[], int]:
        """Return a function of the driver with its arguments; it returns an error code."""
        return partial(getattr(self._library, name), *arguments)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver; raise `DriverError` if it fails."""
        self.check(getattr(self._library, name)(*arguments), name)

    def check(self, code: int, name: str) -> None:
        """Raise `DriverError` if a function of this name returned an error code."""
        if code:
            found = ctypes.c_char_p()
            told = []
            for describe in ("cuGetErrorName", "cuGetErrorString"):
                known = getattr(self._library, describe)(code, ctypes.byref(found)) == 0
                told.append((found.value or b"").decode() if known else "")
            raise DriverError(f"{name}: {told[0] or f'error {code}'}: {told[1] or 'unknown'}")

    @lru_cache(maxsize=64)  # noqa: B019 - there is one driver, which lives as long as the process
    def capability(self, device: int) -> int:
        """Return a device's compute capability, such as 90."""
        found = [ctypes.c_int(), ctypes.c_int()]
        for value, attribute in zip(found, _COMPUTE_CAPABILITY, strict=True):
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._handle(device))
        return 10 * found[0].value + found[1].value

    def context(self, device: int) -> int:
        """Return the device's primary context, which libraries allocate in, as an address."""
        if device not in self._contexts:
            found = ctypes.c_void_p()
            self.call("cuDevicePrimaryCtxRetain", ctypes.byref(found), self._handle(device))
            self._contexts[device] = found.value or 0  # kept as long as the process lives
        return self._contexts[device]

    def function(self, built: Built, device: int) -> int:
        """Return the address of a kernel's function on a device, loading its cubin at first.

        Modules are kept as long as the process lives: a CUDA graph may launch their kernels. The
        kernels are few, since `build` caches them.
        """
        key = built.cubin_path, built.name, device
        with self._lock:
            if key not in self._functions:
                with self.current(self.context(device)), self._capture_mode_relaxed():
                    self._functions[key] = self._load(built)
            return self._functions[key]

    def _load(self, built: Built) -> int:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), built.cubin)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, built.name.encode())
        if built.shared > _SHARED_BY_DEFAULT:
            self.call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, built.shared)
        return function.value or 0

    def _handle(self, device: int) -> ctypes.c_int:
        found = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(found), device)
        return found

    @contextmanager
    def current(self, context: int) -> Iterator[None]:
        """Make a context this thread's current one for a while."""
        self.call("cuCtxPushCurrent_v2", ctypes.c_void_p(context))
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    @contextmanager
    def _capture_mode_relaxed(self) -> Iterator[None]:
        """Allow loading modules while a stream is captured, in this thread or in another one.

        Loading may allocate memory, which the stricter modes forbid lest it become part of the
        graph's behavior; a module is not.
        """
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


@lru_cache(maxsize=1)
def driver() -> Driver:
    """Return the driver; raises as `Driver`."""
    return Driver(_LIBRARY)


# A launch sequence --------------------------------------------------------------------------------


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = (
        ("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    )  # fmt: skip


class _Config(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


class _Kernel(NamedTuple):
    """A launch whose kernel is compiled and loaded."""

    function: int
    built: Built
    scalars: tuple[int, ...]
    launch: Launch


class _Variant(NamedTuple):
    """The kernels of a sequence for one alignment of its arrays."""

    kernels: tuple[_Kernel, ...]
    # Blocks that no call is using; as many exist as calls ran at the same time.
    free: "list[_Block]"


class Launches:
    """A launch sequence prepared for arrays of given dtypes on one device.

    Parameters
    ----------
    sequence : LaunchSequence
    dtypes : mapping
        The dtypes of the arrays by name, the first being that of x. An array of a launch that is
        neither among them nor among the temporary ones is unused; x's address is passed for it,
        since a pointer must be valid.
    device : int
        The index of the device.

    Attributes
    ----------
    temporaries : int
        The size in float32 elements of the one array that all temporary arrays are parts of.
    """

    def __init__(self, sequence: LaunchSequence, dtypes: Mapping[str, str], device: int) -> None:
        self._driver, self._device, self._sequence = driver(), device, sequence
        self._dtypes = {**dtypes, **dict.fromkeys((name for name, _ in sequence.shared), "float32")}
        offsets = [0]
        for _, elements in sequence.shared:
            offsets.append(offsets[-1] + -(-elements // _STEP) * _STEP)
        self.temporaries = offsets[-1]
        self._offsets = tuple(4 * offset for offset in offsets[:-1])
        self._variants: dict[tuple[bool, ...], _Variant] = {}
        self._all_aligned: _Variant | None = None

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        """Launch the kernels on a stream of the device.

        Parameters
        ----------
        stream : int
            The address of the stream, a ``CUstream``.
        addresses : sequence of int
            Those of the arrays in the order of `dtypes`, and of the temporary array if there is
            one.

        Raises
        ------
        DriverError
            If the driver refuses, or if an earlier computation on the device failed.
        """
        bits = 0
        for address in addresses:
            bits |= address
        variant = self._unaligned(addresses) if bits % ALIGNMENT else self._all_aligned
        if variant is None:
            variant = self._all_aligned = self._variant((True,) * len(addresses))
        # A block is of one call at a time: threads run at the same time while the driver is called,
        # and a garbage collection may call in the midst of a call.
        try:
            block = variant.free.pop()
        except IndexError:
            block = _Block(
                self._driver, self._driver.context(self._device), variant.kernels,
                list(self._dtypes), self._offsets,
            )  # fmt: skip
        try:
            block.launch(stream, addresses)
        finally:
            variant.free.append(block)

    def _unaligned(self, addresses: Sequence[int]) -> _Variant:
        aligned = tuple(address % ALIGNMENT == 0 for address in addresses)
        found = self._variants.get(aligned)
        if found is None:
            found = self._variants.setdefault(aligned, self._variant(aligned))
        return found

    def _variant(self, aligned: tuple[bool, ...]) -> _Variant:
        """Compile and load the kernels; `aligned` is by address."""
        # All temporary arrays are aligned as the array is that they are parts of.
        flags = dict(zip(self._dtypes, aligned + aligned[-1:] * len(self._offsets), strict=False))
        capability = self._driver.capability(self._device)
        x = next(iter(self._dtypes))
        kernels = []
        for launch in self._sequence.launches:
            names = [name if name in self._dtypes else x for name in launch.arrays]
            built, scalars = build(
                launch, tuple(self._dtypes[name] for name in names),
                tuple(flags[name] for name in names), capability, False,
            )  # fmt: skip
            function = self._driver.function(built, self._device)
            kernels.append(_Kernel(function, built, tuple(v for _, v in scalars), launch))
        return _Variant(tuple(kernels), [])


class _Block:
    """The arguments and the configurations of all launches of a sequence, for one call at a time.

    Arguments are passed by their addresses, so kernels share those that they have in common. The
    driver copies them before it returns.
    """

    def __init__(
        self, driver: Driver, context: int, kernels: tuple[_Kernel, ...], names: list[str],
        offsets: tuple[int, ...],
    ) -> None:  # fmt: skip
        self._driver, self._context, self._offsets = driver, context, offsets
        places = {name: place for place, name in enumerate(names)}
        null = len(names)
        scalars = [value for kernel in kernels for value in kernel.scalars]
        # Of a 32-bit scalar the driver reads the lower half, which comes first.
        self._values = struct.pack(f"<{null + 1}Q{len(scalars)}q", *(0,) * (null + 1), *scalars)
        self._storage = ctypes.create_string_buffer(self._values)
        self._fill = partial(struct.Struct(f"<{null}Q").pack_into, self._storage, 0)
        begin = ctypes.addressof(self._storage)
        self._kept: list[Any] = []  # what the driver is passed the addresses of
        self._configs: list[_Config] = []
        self._launches: list[Callable[[], int]] = []
        scalar = null + 1
        for kernel in kernels:
            count = len(kernel.scalars)
            used = [places.get(name, 0) for name in kernel.launch.arrays]
            # After the scalars come Triton's pointers to scratch memory, which are null.
            used += [*range(scalar, scalar + count), *(null,) * kernel.built.scratch]
            scalar += count
            pointers = (ctypes.c_void_p * len(used))(*(begin + 8 * place for place in used))
            config = _config(kernel, first=not self._configs)
            self._kept.append(pointers)
            self._configs.append(config)
            self._launches.append(
                driver.function_at(
                    "cuLaunchKernelEx", ctypes.byref(config), ctypes.c_void_p(kernel.function),
                    pointers, None,
                )
            )  # fmt: skip
        self._stream = 0
        self._current = ctypes.c_void_p()
        self._find_current = driver.function_at("cuCtxGetCurrent", ctypes.byref(self._current))

    def launch(self, stream: int, addresses: Sequence[int]) -> None:
        """Launch the kernels on a stream; see `Launches`."""
        if self._offsets:
            *given, begin = addresses
            self._fill(*given, *[begin + offset for offset in self._offsets])
        else:
            self._fill(*addresses)
        if stream != self._stream:
            for config in self._configs:
                config.stream = stream
            self._stream = stream
        code = self._find_current()
        if code:
            self._driver.check(code, "cuCtxGetCurrent")
        if self._current.value == self._context:
            self._launch()
        else:
            # A thread in which the library has not used the device yet, or in which another device
            # is the current one; the library is not to notice.
            with self._driver.current(self._context):
                self._launch()

    def _launch(self) -> None:
        for launch in self._launches:
            code = launch()
            if code:
                self._driver.check(code, "cuLaunchKernelEx")


def _config(kernel: _Kernel, *, first: bool) -> _Config:
    grid = (ctypes.c_uint * 3)(*(*kernel.launch.grid, 1, 1)[:3])
    block = (ctypes.c_uint * 3)(kernel.built.threads, 1, 1)
    config = _Config(grid, block, kernel.built.shared)
    if kernel.built.follows and not first:
        # It may begin before the launch before it ends, and waits for it by itself.
        config.attributes = ctypes.pointer(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1))
        config.count = 1
    return config


# Planned work -------------------------------------------------------------------------------------

Prepare = Callable[[LaunchSequence, dict[str, str]], Any]


class PreparedWork:
    """Planned work on one device, whose launches are prepared when a call first needs them.

    Parameters
    ----------
    work : Work
    prepare : callable
        Prepares a launch sequence for arrays of given dtypes, by name; returns a function of the
        library's arrays in the order of `ARRAYS`.

    Attributes
    ----------
    parameter_shapes : tuple
        The shapes that parameters may have.
    statistics_size : int
        The number of float32 elements of the statistics.
    """

    def __init__(self, work: Work, prepare: Prepare) -> None:
        self.work, self._prepare = work, prepare
        self.parameter_shapes = work.parameter_shapes
        self.statistics_size = product(statistics_shape(work.shape))
        self._found: dict[Any, Any] = {}

    def launcher(
        self, task: str, mask_elements: int, scale: Any, bias: Any, dy: Any, rows: bool
    ) -> Any:
        """Return the function that launches a pass.

        Parameters
        ----------
        task : {"forward", "backward"}
        mask_elements : int
            The size of the mask, 0 without one.
        scale, bias, dy : dtype or None
            Of the arrays as kernels read them; None for those that are missing.
        rows : bool
            Whether scale and bias have a row for each sample.
        """
        # The keys are few: dtypes, and three sizes of masks.
        key = task, mask_elements, scale, bias, dy, rows
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._launcher(*key)
        return found

    def _launcher(
        self, task: str, mask_elements: int, scale: Any, bias: Any, dy: Any, rows: bool
    ) -> Any:
        work = self.work
        known = {
            "x": work.dtypes.x, "y": work.dtypes.result, "dx": work.dtypes.x,
            # What is missing has the address of x.
            **{
                name: work.dtypes.x if dtype is None else dtype_name(dtype)
                for name, dtype in (("scale", scale), ("bias", bias), ("dy", dy))
            },
            "mask": "uint8" if mask_elements else work.dtypes.x,
            "dscale": "float32" if scale is None else dtype_name(scale),
            "dbias": "float32" if bias is None else dtype_name(bias),
        }  # fmt: skip
        dtypes = {name: known.get(name, "float32") for name in ARRAYS[task]}
        plan = work.forward if task == "forward" else work.backward
        sequence = plan(mask_elements, scale is not None, bias is not None, rows)
        return self._prepare(sequence, dtypes)


def dtype_name(dtype: Any) -> str:
    """Return the name of a library's dtype, such as "bfloat16"."""
    return getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
