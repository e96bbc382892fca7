"""Nested results: their arrays, and the path to each."""

from collections.abc import Mapping
from typing import Any

__all__ = ["leaves"]


def leaves(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested dicts, lists and tuples, with their paths, in a fixed order.

    None has no leaves. Tuples have indices even if their fields have names, which not every
    library gives them.
    """
    if tree is None:
        return []
    if isinstance(tree, Mapping):
        parts = [(f"[{key!r}]", value) for key, value in tree.items()]
        parts.sort(key=lambda part: part[0])
    elif isinstance(tree, list | tuple):
        parts = [(f"[{i}]", value) for i, value in enumerate(tree)]
    else:
        return [(path, tree)]
    return [leaf for step, value in parts for leaf in leaves(value, path + step)]
