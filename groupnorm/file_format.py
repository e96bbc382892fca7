"""What is in a file: the layers' parameters as tensors of safetensors, and their configurations.

The header's metadata has one entry, ``groupnorm``: JSON with the checksum of the file, the version
of the format, and for each layer the arguments that make it. Nothing in a file is trusted: sizes
are compared before they are used, and configurations are checked by the constructor.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, BinaryIO, NoReturn

import numpy as np

from groupnorm.adapter import as_native_contiguous
from groupnorm.config_json import arguments_of, config_of
from groupnorm.dispatch import adapter_named, layer_class_named
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, FileFormatError
from groupnorm.imports import needs
from groupnorm.layer import GroupNorm, Layer
from groupnorm.layer_names import check_name, shown

__all__ = ["VERSION", "decode", "encode"]

#: The version of the format that is written; files of a later one are refused.
VERSION = 1
#: The most bytes of a header, and of a file.
HEADER_LIMIT, FILE_LIMIT = 2**24, 2**30

_KEY = "groupnorm"
_DIGITS = 64
# What stands before the checksum. No name can contain it: its first quotes would be escaped.
_MARK = rb'"groupnorm":"{\"sha256\":\"'
_ENTRY = {"dtype", "shape", "data_offsets"}
_DTYPES = {
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}


def encode(layers: Mapping[str, Layer]) -> bytes:
    """Return the content of a file.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError
        If a layer cannot be saved.
    """
    with needs("safetensors", "groupnorm.save", "groupnorm[files]"):
        import safetensors.numpy

    configurations, tensors = {}, {}
    for name, layer in layers.items():
        where = f"the layer {shown(name)}" if name else "the layer"
        try:
            configurations[name] = arguments_of(
                layer._config._replace(
                    use_scale=layer.use_scale, use_bias=layer.use_bias, trainable=layer.trainable
                )
            )
            config_of(configurations[name])  # what was set since, such as num_groups, may not fit
        except ArgumentTypeError as error:
            raise ArgumentTypeError(f"{where} cannot be saved: {error}") from error
        except ValueError as error:
            raise ArgumentValueError(f"{where} cannot be saved: {error}") from error
        for key, value in zip(("scale", "bias"), layer._host_parameters(), strict=True):
            if value is None:
                continue
            if value.dtype.name not in _DTYPES.values():
                raise ArgumentTypeError(
                    f"the {key} of {where} has dtype {value.dtype.name}, which files do not have: "
                    f"convert it to one of {', '.join(_DTYPES.values())}."
                )
            tensors[_tensor(name, key)] = as_native_contiguous(value)
    text = json.dumps(
        {"sha256": "0" * _DIGITS, "format": VERSION, "layers": configurations},
        separators=(",", ":"),
    )
    content = bytearray(safetensors.numpy.save(tensors, {_KEY: text}))
    if int.from_bytes(content[:8], "little") > HEADER_LIMIT or len(content) > FILE_LIMIT:
        raise ArgumentValueError(
            f"the file would have {len(content)} bytes for {len(layers)} layers, and at most "
            f"{FILE_LIMIT}, of which {HEADER_LIMIT} are names and configurations, can be loaded: "
            "save the layers in several files."
        )
    start = content.index(_MARK) + len(_MARK)
    content[start : start + _DIGITS] = hashlib.sha256(content).hexdigest().encode()
    return bytes(content)


def decode(file: BinaryIO, size: int) -> dict[str, GroupNorm]:
    """Return the layers in a file of a size, with NumPy parameters.

    Raises
    ------
    FileFormatError
        If the file is not exactly what `encode` returns. Messages do not name the file.
    """
    with needs("safetensors", "groupnorm.load", "groupnorm[files]"):
        import safetensors

    header = _read_header(file, size)
    start = header.find(_MARK) + len(_MARK)
    about = _parse(header, "its header")
    metadata = about.get("__metadata__") if isinstance(about, dict) else None
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(text, str) or start < len(_MARK):
        _fail(
            "groupnorm.save wrote no configuration into it: it is of another program, or damaged. "
            "Read it with safetensors, and set the parameters of a GroupNorm"
        )
    document = _parse(text.encode("utf-8", "surrogatepass"), "its configuration")
    if not isinstance(document, dict):
        _fail("its configuration is not what groupnorm.save writes")
    version = document.get("format")
    if type(version) is int and version > VERSION:
        _fail(
            f"its format has version {version}, and this groupnorm reads {VERSION}: it was written "
            "by a newer groupnorm. Install that, or save the file with this version again"
        )
    if size > FILE_LIMIT:
        _fail(f"it has {size} bytes, and at most {FILE_LIMIT} are read. It was not written so")

    data = file.read(size - 8 - len(header))
    length = len(header).to_bytes(8, "little")
    digest = bytes(header[start : start + _DIGITS])
    header[start : start + _DIGITS] = b"0" * _DIGITS
    if hashlib.sha256(b"".join((length, header, data))).hexdigest().encode() != digest:
        _fail("its checksum is wrong: the file is damaged or incomplete. Take another copy of it")

    header[start : start + _DIGITS] = digest
    entries = [entry for name, entry in about.items() if name != "__metadata__"]
    if (
        metadata.keys() != {_KEY}
        or document.keys() != {"sha256", "format", "layers"}
        or document["sha256"] != digest.decode("latin-1")
        or not all(isinstance(e, dict) and e.keys() == _ENTRY for e in entries)
    ):
        _fail("its header has entries that are unknown or missing")
    layers = document["layers"]
    if type(version) is not int or version != VERSION or not isinstance(layers, dict) or not layers:
        _fail(f"its format={version!r} or its layers are not what groupnorm.save writes")
    if "" in layers and len(layers) > 1:
        _fail("it has a layer without a name among several")
    try:
        tensors = dict(safetensors.deserialize(b"".join((length, header, data))))
    except safetensors.SafetensorError as error:
        _fail(f"safetensors does not read it: {error}")

    found = {name: _layer(name, arguments, tensors) for name, arguments in layers.items()}
    if tensors:
        _fail(f"its tensor {shown(min(tensors))} belongs to no layer")
    return found


def _read_header(file: BinaryIO, size: int) -> bytearray:
    """Return the header; nothing is read by a size that was not checked."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > HEADER_LIMIT or 8 + length > size:
        _fail(
            f"it has {size} bytes, and no header of at most {HEADER_LIMIT} bytes that fits: it is "
            "no file of safetensors, or truncated. Take another copy of it"
        )
    header = bytearray(file.read(length))
    if len(header) < length:
        _fail("it became shorter while it was read: load it again")
    return header


def _parse(text: bytes | bytearray, what: str) -> Any:
    try:
        return json.loads(
            text.decode(), object_pairs_hook=_without_repetition, parse_constant=_no_number
        )
    except (ValueError, RecursionError) as error:
        _fail(f"{what} is no valid JSON ({error}): it is damaged, or of another program")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _layer(name: str, arguments: Any, tensors: dict[str, Any]) -> GroupNorm:
    """Return a layer, and take its tensors out of the others."""
    where = f"its layer {shown(name)}" if name else "its layer"
    try:
        check_name(name)
        config = config_of(arguments)
    except (ArithmeticError, TypeError, ValueError) as error:
        _fail(f"{where} cannot be made: {error}")
    values: dict[str, Any] = {"scale": None, "bias": None}
    for key, used in (("scale", config.use_scale), ("bias", config.use_bias)):
        if not used:
            continue
        tensor = tensors.pop(_tensor(name, key), None)
        if tensor is None:
            _fail(f"{where} has no tensor {key}")
        if tuple(tensor["shape"]) != config.feature_shape:
            _fail(
                f"the {key} of {where} has shape {tensor['shape']}, and its configuration "
                f"{config.feature_shape}"
            )
        if tensor["dtype"] not in _DTYPES:
            _fail(f"the {key} of {where} has the dtype {tensor['dtype']}, which no layer has")
        dtype = adapter_named("numpy").dtype(_DTYPES[tensor["dtype"]])
        flat = np.frombuffer(tensor["data"], dtype.newbyteorder("<"))
        values[key] = as_native_contiguous(flat).reshape(config.feature_shape).copy()
    layer: GroupNorm = layer_class_named("numpy")._of(config, values)
    return layer


def _tensor(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _fail(what: str) -> NoReturn:
    raise FileFormatError(f"{what}." if len(what) < 800 else f"{what[:800]}...")
