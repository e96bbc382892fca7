"""The exceptions of this package; each derives from `GroupNormError` and a built-in one."""

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "AxisNameError",
    "BackendImportError",
    "GroupNormError",
]


class GroupNormError(Exception):
    """Base of every error this package raises on purpose."""


class ArgumentValueError(GroupNormError, ValueError):
    """An argument has the right type and a value that breaks a rule."""


class ArgumentTypeError(GroupNormError, TypeError):
    """An argument has a type that cannot be used here."""


class BackendImportError(GroupNormError, ImportError):
    """A backend was asked for and its library cannot be imported or used."""


class AxisNameError(GroupNormError, NameError, ValueError):
    """`axis_name` names nothing that statistics could be pooled over."""
