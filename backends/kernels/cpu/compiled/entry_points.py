"""Entry points of the CPU kernels: C functions that take the address of an argument block.

One is compiled for each `Variant` that is used, and cached on disk for later processes. See
`groupnorm.backends.kernels.cpu.call_frame` for the contents of an argument block.
"""

import ast
import contextlib
import hashlib
import io
import logging
import sys
from pathlib import Path

import numba
from llvmlite import ir
from numba import types
from numba.core import sigutils
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc
from numba.core.cgutils import get_null_value
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
    """Return the file of a module of groupnorm; None if there is no such module."""
    _, *parts = module.split(".")
    path = Path(str(sys.modules["groupnorm"].__file__)).resolve().parent.joinpath(*parts)
    files = (path.with_name(f"{path.name}.py"), path / "__init__.py")
    return next((file.resolve() for file in files if parts and file.is_file()), None)


def _imports(path: Path) -> set[Path]:
    """Return the files of the groupnorm modules that a file imports at module level.

    Imports under `if TYPE_CHECKING` are excluded: they are not compiled in.
    """
    found = set()
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Import):
            names = [(alias.name,) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # The name may be a module of a package, or an object of a module.
            names = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
        else:
            continue
        for candidates in names:
            files = (_file(name) for name in candidates if name.startswith("groupnorm."))
            found |= {next((file for file in files if file is not None), None)}
    return found - {None}


def _sources() -> list[Path]:
    """Return the files of this package and, recursively, those they import from groupnorm.

    Following imports, no file is missed when one is added or moved.
    """
    own = Path(__file__).resolve()
    found, waiting = set(), set(own.parent.glob("*.py"))
    while waiting:
        path = waiting.pop()
        found.add(path)
        waiting |= _imports(path) - found
    if own not in found:
        raise RuntimeError(
            f"the source of the kernels, which their cache is keyed by, is not {own}"
        )
    return sorted(found)


def _digest() -> str:
    """Return a hash of the kernels' sources: a change invalidates what was compiled before."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in _sources())).hexdigest()[:16]


_DIGEST = _digest()


class Variant(types.Type):
    """The address of an argument block; the type carries what a kernel is specialized for."""

    def __init__(self, kernel, x="", y="", dy="", masked=False, activation=0):
        self.kernel, self.x, self.y, self.dy = kernel, x, y, dy
        self.masked, self.activation = masked, activation
        mask = "masked" if masked else "whole"
        super().__init__(f"groupnorm_{kernel}_{x}_{y}_{dy}_{mask}_{activation}_{_DIGEST}")


register_model(Variant)(models.OpaqueModel)


# Reading an argument block ------------------------------------------------------------------------


@intrinsic
def address_of(typing_context, call):
    """Return the argument block's address as an integer."""

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
    """Read the word with this index, counted from an address."""
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
    """Return the tuple whose length identifies the activation; see `elements`."""
    kind = types.UniTuple(types.int64, call.activation) if call.activation else types.Tuple(())

    def code(context, builder, signature, arguments):
        return get_null_value(context.get_value_type(kind))

    return kind(call), code


def _mask(call, address, length):
    raise NotImplementedError


@overload(_mask)
def _mask_overload(call, address, length):
    if call.masked:
        return lambda call, address, length: numba.carray(_bytes(call, address), (length,))
    return lambda call, address, length: None


# Running a kernel ---------------------------------------------------------------------------------

# Each function returns consecutive arguments of the kernels, in their order.


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
def _chunking(at):
    """Return samples, span, rows, width, and whether threads process whole samples."""
    return (
        word(at, frames.SAMPLES), word(at, frames.SPAN), word(at, frames.ROWS),
        word(at, frames.WIDTH), word(at, frames.WHOLE_SAMPLES) != 0,
    )  # fmt: skip


@jit()
def _statistics(call, at):
    """Return mean, rstd and 1 / count."""
    n = word(at, frames.SAVED_ROWS) * word(at, frames.GROUPS)
    saved = numba.carray(_float64(call, word(at, frames.SAVED)), (3 * n,))
    return saved[:n], saved[n : 2 * n], saved[2 * n :]


@jit()
def _gradients(call, at):
    """Return dy, the sums, the number of batches, and the gradients of scale and bias."""
    channels, batches = word(at, frames.GROUPS) * word(at, frames.SIZE), word(at, frames.BATCHES)
    return (
        numba.carray(_dy(call, word(at, frames.DY)), (word(at, frames.ELEMENTS),)),
        numba.carray(_float64(call, word(at, frames.SUMS)), (word(at, frames.SUMS_WORDS),)),
        batches,
        numba.carray(_float32(call, word(at, frames.DSCALE)), (batches * channels,)),
        numba.carray(_float32(call, word(at, frames.DBIAS)), (batches * channels,)),
    )


@jit()
def _counters(call, at):
    """Return the number of parts, and the counters."""
    counters = word(at, frames.COUNTERS) * frames.LINE
    return word(at, frames.PARTS), numba.carray(_int64(call, at + 8 * frames.HEAD), (counters,))


@jit()
def _scratch(call, at):
    """Return the parts of the scratch buffer; no kernel uses all of them."""
    chunk_results, sample_results = word(at, frames.CHUNK_RESULTS), word(at, frames.SAMPLE_RESULTS)
    band_starts, tables = word(at, frames.BAND_STARTS), word(at, frames.TABLES)
    a = word(at, frames.SCRATCH)
    b = a + 8 * chunk_results
    c = b + 8 * sample_results
    d = (c + 8 * band_starts + 63) // 64 * 64
    return (
        numba.carray(_float64(call, a), (chunk_results,)),
        numba.carray(_float64(call, b), (sample_results,)),
        numba.carray(_int64(call, c), (band_starts,)),
        numba.carray(_float32(call, d), (tables,)),
    )


def _channels_first_forward(call):
    at = address_of(call)
    channels_first_forward(
        *_operands(call, at), word(at, frames.SAMPLES), _float(word(at, frames.EPSILON)),
        _activation(call), *_statistics(call, at), *_counters(call, at),
    )  # fmt: skip


def _channels_first_backward(call):
    at = address_of(call)
    channels_first_backward(
        *_operands(call, at), word(at, frames.SAMPLES), word(at, frames.SPAN), _activation(call),
        *_statistics(call, at), *_gradients(call, at), *_counters(call, at),
    )  # fmt: skip


def _channels_last_forward(call):
    at = address_of(call)
    chunk_results, _, band_starts, tables = _scratch(call, at)
    channels_last_forward(
        *_operands(call, at), *_chunking(at), _float(word(at, frames.EPSILON)), _activation(call),
        *_statistics(call, at), chunk_results, band_starts, tables, *_counters(call, at),
    )  # fmt: skip


def _channels_last_backward(call):
    at = address_of(call)
    chunk_results, sample_results, _, tables = _scratch(call, at)
    channels_last_backward(
        *_operands(call, at), *_chunking(at), _activation(call), *_statistics(call, at),
        *_gradients(call, at), chunk_results, sample_results, tables, *_counters(call, at),
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
    """Process tasks of a call until none is left; return when all are finished."""
    _run(call)


class _Files(IndexDataCacheFile):
    """Files that end with a hash of their content.

    numba would unpickle whatever a damaged file holds, and run it: zeros in the machine code, such
    as a power failure leaves, end the process.
    """

    @contextlib.contextmanager
    def _open_for_write(self, filepath):
        with super()._open_for_write(filepath) as file:
            content = io.BytesIO()
            yield content
            file.write(content.getvalue() + hashlib.sha256(content.getvalue()).digest())

    def _load_index(self):
        _verify(self._index_path)
        return super()._load_index()

    def _load_data(self, name):
        _verify(self._data_path(name))
        return super()._load_data(name)


def _verify(path):
    """Raise ValueError if a file exists and is damaged."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return
    size = hashlib.sha256().digest_size
    if hashlib.sha256(data[:-size]).digest() != data[-size:]:
        raise ValueError(f"{path} is damaged")


# What reading and writing the files may raise: `OSError`, and `ValueError` by `_verify`.
_UNUSABLE = (OSError, ValueError)


class _Cache(FunctionCache):
    """A cache on disk that may be damaged, unreadable, read-only or full: it only saves time."""

    stored = False

    def __init__(self, function):
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, signature, target_context):
        try:
            return super().load_overload(signature, target_context)
        except _UNUSABLE as error:
            _log_once(f"cannot be read from {self.cache_path}", error)
            return None

    def save_overload(self, signature, data):
        try:
            super().save_overload(signature, data)
            self.stored = True
        except _UNUSABLE:  # saving reads the index first, which may be what is damaged
            try:
                self.flush()
                super().save_overload(signature, data)
                self.stored = True
            except _UNUSABLE as error:
                _log_once(f"cannot be stored in {self.cache_path}", error)


def _log_once(problem, error):
    if problem not in _logged:
        _logged.add(problem)
        _log.warning(
            "groupnorm: compiled CPU kernels %s (%r), so they are compiled in this process.",
            problem, error,
        )  # fmt: skip


_log = logging.getLogger("groupnorm")
_logged = set()


class _Function(CFunc):
    """A compiled function; kept on disk if there is a folder for it."""

    def enable_caching(self):
        try:
            self._cache = _Cache(self._pyfunc)
        except RuntimeError as error:  # numba finds no folder that can be written
            _log_once("have no folder that can be written; NUMBA_CACHE_DIR may name one", error)

    @property
    def stored(self):
        """Whether the function was compiled now, and stored on disk."""
        return getattr(self._cache, "stored", False)


def compiled(variant, function=run, result=types.void):
    """Compile or load a function of argument blocks; return numba's object, with its address."""
    options = {"error_model": "numpy", "boundscheck": False, "nogil": True}
    made = _Function(function, sigutils.normalize_signature(result(variant)), {}, options)
    made.enable_caching()
    made.compile()
    return made
