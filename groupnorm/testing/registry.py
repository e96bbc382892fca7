"""Rows of a consistency test by name: every array library, in each way that it can be used.

A row's name is ``"library"`` or ``"library:tag"``, such as ``torch`` and ``torch:compile``. A
library is imported when a row of it is used; or when its GPUs are looked for, where a driver is.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.testing.libraries import LIBRARY_ROWS
from groupnorm.testing.row import Row

__all__ = [
    "Row",
    "known_rows",
    "names_of",
    "register_row",
    "row_names",
    "row_of",
    "rows",
    "rows_of",
]

_rows: dict[str, Row] = {name: kind(name) for name, kind in LIBRARY_ROWS.items()}


def register_row(row: Row) -> None:
    """Add a row, or replace the one of its name.

    Parameters
    ----------
    row : Row
        Its methods `asarray` and `to_numpy` are called for every array; its attribute `cannot` says
        whether it can differentiate.

    Raises
    ------
    ArgumentTypeError
        If it is no row.
    """
    if not isinstance(row, Row):
        raise ArgumentTypeError(
            f"row={row!r} is not a Row: pass an instance of a subclass of testing.Row."
        )
    _rows[row.name] = row


def known_rows() -> Mapping[str, Row]:
    """Return all rows by their names, usable here or not."""
    return MappingProxyType(_rows)


def row_names() -> tuple[str, ...]:
    """Return the names of all rows, usable here or not.

    Returns
    -------
    tuple of str
    """
    return tuple(_rows)


def rows(names: str | Iterable[str] | None = None) -> list[Row]:
    """Return rows by their names.

    Parameters
    ----------
    names : str or iterable of str, optional
        Names of rows; "torch:*" stands for all rows of a library that can be used here. A string
        may list several, separated by commas. Default is every row that can be used here.

    Returns
    -------
    list of Row
        In the order of `row_names`, each once.

    Raises
    ------
    ArgumentValueError
        If a name is unknown, or if what it names cannot be used here: what was asked for is not
        left out in silence.

    Examples
    --------
    >>> from groupnorm import testing
    >>> [row.name for row in testing.rows("numpy:*")]
    ['numpy', 'numpy:readonly']
    """
    if names is None:
        return [row for row in _rows.values() if row.why_absent is None]
    chosen: set[str] = set()
    for name in _split(names):
        if name in _rows:
            chosen.add(_usable(name))
            continue
        family = [row for row in _rows.values() if f"{row.library}:*" == name]
        if not family:
            raise ArgumentValueError(
                f"rows={name!r} is not known: choose from {', '.join(_rows)}, or 'torch:*' for all "
                "of a library; others are added by register_row()."
            )
        usable = [row.name for row in family if row.why_absent is None]
        chosen.update(usable or [_usable(family[0].name)])
    return [row for row in _rows.values() if row.name in chosen]


def _usable(name: str) -> str:
    why = _rows[name].why_absent
    if why is not None:
        raise ArgumentValueError(f"rows={name!r} cannot be used here: {why}.")
    return name


def names_of(patterns: str | Iterable[str], *, libraries: bool = False) -> set[str]:
    """Return the names of rows, usable here or not, that names and patterns like "torch:*" mean.

    Parameters
    ----------
    patterns : str or iterable of str
        As for `rows`.
    libraries : bool
        Whether the name of a library means all of its rows.

    Raises
    ------
    ArgumentValueError
        If one is unknown.
    """
    found: set[str] = set()
    for pattern in _split(patterns):
        if libraries and any(row.library == pattern for row in _rows.values()):
            pattern = f"{pattern}:*"
        names = {name for name, row in _rows.items() if pattern in (name, f"{row.library}:*")}
        if not names:
            rows(pattern)  # raises
        found |= names
    return found


def _split(names: str | Iterable[str]) -> list[str]:
    """Return names that may be listed in strings, separated by commas."""
    try:
        listed = [names] if isinstance(names, str) else list(names)
        return [name.strip() for part in listed for name in part.split(",")]
    except (AttributeError, TypeError) as error:
        raise ArgumentTypeError(
            f"rows={names!r} are not names of rows: pass strings such as 'numpy,torch:*'."
        ) from error


def rows_of(
    asked: "str | Iterable[str | Row] | None", without: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Row], dict[str, str]]:
    """Return rows, given by name or as they are, and by name why others are left out."""
    if not isinstance(without, Mapping):
        raise ArgumentTypeError(
            f"without={without!r} has no reasons: pass a mapping, such as {{'dask': 'no sorting'}}."
        )
    why_not = {
        name: why for pattern, why in without.items() for name in names_of(pattern, libraries=True)
    }
    found: list[Row] = []
    if asked is None:
        every = [row for name, row in _rows.items() if name not in why_not]
        absent = {row.name: row.why_absent for row in every}
        found = [row for row in every if absent[row.name] is None]
        return found, why_not | {name: why for name, why in absent.items() if why is not None}
    try:
        listed = rows(asked) if isinstance(asked, str) else list(asked)
    except TypeError as error:
        raise ArgumentTypeError(
            f"rows={asked!r} are not rows: pass names, such as 'numpy,torch:*', or rows."
        ) from error
    for one in listed:
        if isinstance(one, Row) and one.why_absent is not None:
            raise ArgumentValueError(f"rows={one.name!r} cannot be used here: {one.why_absent}.")
        found += [r for r in ([one] if isinstance(one, Row) else rows(one)) if r not in found]
    return [row for row in found if row.name not in why_not], why_not


def row_of(array: Any, argument: str = "array") -> Row:
    """Return a row whose library an array is of; only its library is known by that.

    Raises
    ------
    ArgumentTypeError
        If there is none.
    """
    for cls in type(array).__mro__:
        root = cls.__module__.partition(".")[0].replace("jaxlib", "jax")
        for row in _rows.values():
            if row.library == root and row.is_array(array):
                return row
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    raise ArgumentTypeError(f"{argument} is of {kind}, which is no array of a registered row.")
