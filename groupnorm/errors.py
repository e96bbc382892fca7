"""The exceptions of this package; each derives from `GroupNormError` and a built-in exception."""

__all__ = [
    "ArgumentStateError",
    "ArgumentTypeError",
    "ArgumentValueError",
    "AxisNameError",
    "BackendImportError",
    "FileFormatError",
    "GroupNormError",
]


class GroupNormError(Exception):
    """Base class of all exceptions that this package raises."""


class ArgumentValueError(GroupNormError, ValueError):
    """An argument has the right type but an invalid value."""


class ArgumentTypeError(GroupNormError, TypeError):
    """An argument has an unsupported type."""


class ArgumentStateError(GroupNormError, RuntimeError):
    """An array's memory was freed, or its values were changed while they were still needed."""


class BackendImportError(GroupNormError, ImportError):
    """The library of the requested backend cannot be imported or used."""


class AxisNameError(GroupNormError, NameError, ValueError):
    """`axis_name` does not name an axis or communicator to pool statistics over."""


class FileFormatError(GroupNormError, ValueError):
    """A file is damaged, or not one that `groupnorm.save` wrote."""
