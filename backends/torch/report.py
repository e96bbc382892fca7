"""The report of what was replaced in a model."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from groupnorm.text_tables import plain_table

__all__ = ["Entry", "Report"]


class Entry(NamedTuple):
    """One module.

    Attributes
    ----------
    names : tuple of str
        Its names in the model; several if it is shared.
    kind : str
        The name of its class.
    result : str
        "replaced", "fused", "skipped", "not fused", "unchanged" or "restored".
    note : str
        The reason, or what was fused.
    """

    names: tuple[str, ...]
    kind: str
    result: str
    note: str

    @property
    def name(self) -> str:
        """Its first name."""
        return self.names[0] or "(model)"

    @property
    def order(self) -> list[tuple[int, int, str]]:
        """A key by which entries are in the order of names, 2 before 10."""
        parts = self.names[0].split(".") if self.names[0] else []
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]


class Report(Sequence[Entry]):
    """What `groupnorm.torch.replace` or `restore` did, module by module; prints as a table.

    Parameters
    ----------
    entries : sequence of Entry
        One for each module.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self._entries = tuple(entries)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._entries[index]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def _with(self, result: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._entries if entry.result == result)

    @property
    def replaced(self) -> tuple[Entry, ...]:
        """The modules that were replaced."""
        return self._with("replaced")

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """The normalizations that were not replaced, with the reasons."""
        return self._with("skipped")

    @property
    def fused(self) -> tuple[Entry, ...]:
        """The modules in which activations are computed together with normalizations."""
        return self._with("fused")

    @property
    def restored(self) -> tuple[Entry, ...]:
        """The modules that have their former class again."""
        return self._with("restored")

    def __str__(self) -> str:
        if not self._entries:
            return "no group normalization was found"
        lines = []
        for entry in self._entries:
            others = len(entry.names) - 1
            shared = f" (and {others} other name{'s' * (others > 1)})" if others else ""
            lines.append([entry.name + shared, entry.kind, entry.result, entry.note])
        return plain_table(["module", "class", "result", "note"], lines)

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for entry in self._entries:
            counts[entry.result] = counts.get(entry.result, 0) + 1
        listed = ", ".join(f"{n} {result}" for result, n in counts.items()) or "nothing found"
        return f"<Report: {listed}>"
