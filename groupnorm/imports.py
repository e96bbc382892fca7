"""Imports of optional libraries."""

from collections.abc import Iterator
from contextlib import contextmanager

from groupnorm.errors import BackendImportError

__all__ = ["needs"]


@contextmanager
def needs(library: str, module: str, package: str = "") -> Iterator[None]:
    """Turn a failed import of a library into an error that says what needs it.

    `package` is the name that installs the library, if it is another one.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise BackendImportError(
            f"{module} needs {library}, which cannot be imported: install it with "
            f'pip install "{package or library}".'
        ) from error
