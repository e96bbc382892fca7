"""`save` and `load`: layers in files of safetensors, for every backend."""

import contextlib
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, overload

from groupnorm.arguments import flag
from groupnorm.dtypes import dtype_name
from groupnorm.errors import ArgumentTypeError, ArgumentValueError, FileFormatError
from groupnorm.file_format import decode, encode
from groupnorm.layer import GroupNorm, Layer
from groupnorm.layer_names import named_layers, shown
from groupnorm.typing import BackendName

__all__ = ["load", "save"]

Tree = TypeVar("Tree")
Path = str | os.PathLike[str]


def save(path: Path, layers: Any) -> None:
    """Save a layer, or the layers of a model, in a file that every backend can load.

    The file has the parameters, bit for bit, and the configuration of each layer, and a checksum;
    see `docs/saving.md`. It replaces an older one at once, when it is complete: after an error or
    a crash the older one is still there.

    Parameters
    ----------
    path : str or path-like
        The file, by custom ``*.safetensors``.
    layers : GroupNorm or tree of them
        Nested dicts, lists, tuples and dataclasses, a module of PyTorch, MLX, flax nnx, equinox or
        brainstate, or another object with layers as attributes. Keys, indices and attributes are
        the names, such as ``encoder.blocks.0.norm``; a layer in several places is saved once, with
        the first name. Everything else in a model is not saved.

    Raises
    ------
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        If there are no layers, names are ambiguous, or a layer cannot be saved.
    groupnorm.errors.BackendImportError
        If the package safetensors cannot be imported.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import os, tempfile
    >>> import groupnorm
    >>> from groupnorm import GroupNorm
    >>> path = os.path.join(tempfile.mkdtemp(), "norms.safetensors")
    >>> groupnorm.save(path, {"encoder": [GroupNorm(8, num_groups=2, epsilon=1e-5)]})
    >>> groupnorm.load(path)["encoder.0"].epsilon
    1e-05
    """
    target = _checked(path)
    _replace(target, encode(named_layers(layers, "layers")))


@overload
def load(path: Path, *, into: Tree, strict: bool = ...) -> Tree: ...
@overload
def load(
    path: Path, *, backend: BackendName = ..., device: Any = ..., param_type: Any = ...
) -> Any: ...
def load(
    path: Path,
    *,
    backend: str = "numpy",
    device: Any = None,
    param_type: Any = None,
    into: Any = None,
    strict: bool = True,
) -> Any:
    """Load what `save` wrote: as new layers, or into those of a model.

    Parameters
    ----------
    path : str or path-like
        The file.
    backend : {"numpy", "jax", "torch", "cupy", "mlx"}
        The library of new layers.
    device, param_type : optional
        Those of new layers, as in `GroupNorm.to_backend`.
    into : GroupNorm or tree of them, optional
        Layers of any backend, whose parameters are set: in PyTorch in place, so that optimizers
        keep them. Names are made as by `save`. Each layer must have the shape, groups, epsilon,
        feature and reduction axes, activation and parameter dtype of the one in the file.
    strict : bool
        Whether `into` must have exactly the layers that the file has. If not, those with names in
        both are set, at least one.

    Returns
    -------
    GroupNorm or dict of str to GroupNorm or `into`
        One layer if one was saved, or the layers of a model by name.

    Raises
    ------
    groupnorm.errors.FileFormatError
        If the file is damaged, truncated, or not written by `save`.
    groupnorm.errors.ArgumentValueError, groupnorm.errors.ArgumentTypeError
        If `into` does not fit, naming the layer, both values and the fix, or a backend cannot hold
        a dtype. Nothing was changed then.
    groupnorm.errors.BackendImportError
        If safetensors or the backend's library cannot be imported.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import os, tempfile
    >>> import groupnorm
    >>> from groupnorm import GroupNorm
    >>> path = os.path.join(tempfile.mkdtemp(), "norm.safetensors")
    >>> groupnorm.save(path, GroupNorm(2, num_groups=1, scale_init=3.0))
    >>> groupnorm.load(path).scale
    array([3., 3.], dtype=float32)
    >>> layer = groupnorm.load(path, into=GroupNorm(2, num_groups=1))
    >>> layer.scale
    array([3., 3.], dtype=float32)
    """
    strict = flag("strict", strict)
    given = {"backend": backend != "numpy", "device": device, "param_type": param_type}
    for name, value in given.items():
        if into is not None and value:
            raise ArgumentValueError(
                f"{name} and into are both given: into has layers already, with a backend and a "
                "device of their own. Leave one of them out."
            )
    target = _checked(path)
    layers = _read(target)
    if into is not None:
        _set(target, layers, into, strict)
        return into
    loaded = {
        name: layer.to_backend(backend, device=device, param_type=param_type)
        for name, layer in layers.items()
    }
    return loaded.get("", loaded)


def _checked(path: Any) -> str:
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(
            f"path={path!r} is of type {type(path).__name__}: it must be a str or pathlib.Path."
        )
    return os.fsdecode(path)


# Files --------------------------------------------------------------------------------------------


def _read(path: str) -> dict[str, GroupNorm]:
    # Looked at before it is opened: opening a pipe waits for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise FileFormatError(f"{path!r} is no regular file: give one that groupnorm.save wrote.")
    with open(path, "rb") as file:
        try:
            return decode(file, os.fstat(file.fileno()).st_size)
        except (FileFormatError, RecursionError) as error:  # of a value in a message
            raise FileFormatError(f"{path!r} cannot be loaded: {error}") from error.__cause__


def _replace(path: str, content: bytes) -> None:
    """Write a file that takes the place of another one when it is complete."""
    target = os.path.realpath(path)
    mode = None
    if os.path.exists(target):
        mode = os.stat(target).st_mode
        if not stat.S_ISREG(mode):
            raise ArgumentValueError(f"path={path!r} is no regular file: give another one.")
        with open(target, "r+b"):  # refused where a plain open would be: read-only
            pass
    unfinished = os.path.join(os.path.dirname(target), f".groupnorm-{secrets.token_hex(8)}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(unfinished, flags, 0o666)
    except OSError as error:  # naming the file that was asked for
        raise type(error)(error.errno, error.strerror, path) from error
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(unfinished, stat.S_IMODE(mode))
        os.replace(unfinished, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


# Into layers --------------------------------------------------------------------------------------


def _set(path: str, layers: Mapping[str, GroupNorm], into: Any, strict: bool) -> None:
    """Set the parameters of the layers in a tree: all, or none if one does not fit."""
    targets = named_layers(into, "into")
    common = [name for name in targets if name in layers]
    if not common or (strict and layers.keys() != targets.keys()):
        only = [sorted(a.keys() - b.keys()) for a, b in ((layers, targets), (targets, layers))]
        raise ArgumentValueError(
            f"{path!r} and into have not the same layers: only the file has {_listed(only[0])}, "
            f"only into {_listed(only[1])}. Pass what was saved"
            f"{', or strict=False to set those in both' if common else ''}."
        )
    changes = []
    for name in common:
        layer, target = layers[name], targets[name]
        where = f"the layer {shown(name)}" if name else "the layer"
        _check_fits(where, layer, target)
        for key in ("scale", "bias"):
            value = getattr(layer, key)
            if value is not None:
                changes.append((target, key, target._converted(key, value)))
    undo: list[Callable[[], None]] = []
    try:
        for target, key, value in changes:
            undo.append(target._assign(key, value))
    except BaseException:
        for restore in reversed(undo):
            restore()
        raise


def _listed(names: list[str]) -> str:
    some = ", ".join(shown(name) if name else "a layer without a name" for name in names[:5])
    return f"{some} and {len(names) - 5} more" if len(names) > 5 else some or "none"


def _check_fits(where: str, layer: Layer, target: Layer) -> None:
    """Check that a layer normalizes as the one in the file does.

    Not its result's dtype nor its replicas, which are of the program and not of the parameters.
    """
    for name, read in _COMPARED.items():
        stored, own = read(layer), read(target)
        if stored != own:
            raise ArgumentValueError(
                f"{where} in into has {_shown(target, name, own)}, and in the file "
                f"{_shown(layer, name, stored)}: create it with that of the file, or load without "
                "into, and change it by to_."
            )
    for key in ("scale", "bias"):
        value, held = getattr(layer, key), getattr(target, key)
        if value is None:
            continue
        stored, own = value.dtype.name, dtype_name(key, held.dtype)
        if stored != own:
            raise ArgumentTypeError(
                f"{where} in into has a {key} of dtype {own}, and in the file of {stored}: bits "
                f"are kept, so nothing is converted. Create it with param_dtype={stored!r}, or "
                "load without into and convert that."
            )


def _shown(layer: Layer, name: str, value: Any) -> str:
    """Return what differs, as the arguments that make it."""
    if name in ("feature shape", "feature axes"):
        size = str(layer.in_size).replace("Ellipsis", "...")
        return f"the {name} of in_size={size}, feature_axis={layer.feature_axis}"
    return f"{name}={value!r}"


_COMPARED: dict[str, Callable[[Layer], Any]] = {
    "feature shape": lambda layer: layer._config.feature_shape,
    "feature axes": lambda layer: layer._config.options.feature,
    "num_groups": lambda layer: layer.num_groups,
    "epsilon": lambda layer: layer.epsilon,
    "reduction_axes": lambda layer: layer.reduction_axes,
    "activation": lambda layer: layer.activation,
    "use_scale": lambda layer: layer.use_scale,
    "use_bias": lambda layer: layer.use_bias,
}
