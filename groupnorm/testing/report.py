"""What a consistency check found: as text, table, JSON and picture."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from groupnorm.errors import ArgumentValueError
from groupnorm.text_tables import plain_table, print_table

__all__ = ["Disagreement", "Finding", "Report", "Skipped", "badness", "record"]

# The scale of the heat map: orders of magnitude of errors over their bounds.
LEAST, MOST = -4.0, 4.0


#: The finding of each row, in all `raise_if_wrong` of this process, that is nearest to its bound or
#: beyond it; the pytest plugin shows them.
record: "dict[str, Finding]" = {}


class Disagreement(AssertionError):
    """A row disagrees with the reference."""


@dataclass(frozen=True)
class Finding:
    """One comparison of one row.

    Attributes
    ----------
    row, input : str
        The name of the row and of the input.
    what : str
        "value", "gradient", or what was wrong before values were compared: "raised", "results",
        "library", "dtype", "device", "shape", "input changed".
    where : str
        The path of the result, such as ``result['mean']``, or ``gradient of argument 0``.
    error, bound : float
        The largest error, in the units of the check, and what is allowed.
    message : str
        The element of the largest error, or what was wrong.
    at, value, reference, ulps
        The index of that element, its value, the reference's, and the error in units in the last
        place; None if it is not about one element.
    """

    row: str
    input: str
    what: str
    where: str
    error: float
    bound: float
    message: str
    at: tuple[int, ...] | None = None
    value: Any = None
    reference: Any = None
    ulps: float | None = None

    @property
    def right(self) -> bool:
        """Whether the error is within the bound (NaN is not)."""
        return self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.row}, input {self.input!r}: {self.where}: {self.message}"


@dataclass(frozen=True)
class Skipped:
    """What was not checked, and why."""

    row: str
    what: str
    reason: str


@dataclass
class Report:
    """The result of `check`.

    Attributes
    ----------
    rows, inputs : list of str
        The names of the rows that ran, and of the inputs.
    findings : list of Finding
        In the order of rows and inputs.
    skipped : list of Skipped
        Rows that cannot be used here, and what rows cannot do.
    units : str
        Those of the errors.
    errors : list of Exception
        Those that functions raised.
    """

    rows: list[str]
    inputs: list[str]
    units: str
    findings: list[Finding] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def wrong(self) -> list[Finding]:
        """The findings whose error is above the bound."""
        return [finding for finding in self.findings if not finding.right]

    def __bool__(self) -> bool:
        """Whether something was compared, and all of it is right."""
        return bool(self.findings) and not self.wrong

    def raise_if_wrong(self) -> None:
        """Raise `Disagreement`, an `AssertionError`, if a row is wrong or nothing was compared."""
        if not self.findings:
            reasons = "".join(f"\n  {s.row}: {s.what}: {s.reason}" for s in self.skipped)
            raise Disagreement(f"nothing was compared:{reasons or ' there are no rows or inputs'}")
        wrong = self.wrong
        for row in self.rows:
            found = [f for f in (record.get(row), self.worst(row)) if f is not None]
            if found:
                record[row] = max(found, key=badness)
        if wrong:
            shown = "".join(f"\n  {finding}" for finding in wrong[:10])
            more = f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            cause = self.errors[0] if self.errors else None
            raise Disagreement(
                f"{len(wrong)} of {len(self.findings)} comparisons:{shown}{more}"
            ) from cause

    def worst(self, row: str, name: str | None = None) -> Finding | None:
        """Return the finding of a row that is nearest to its bound, or beyond it.

        Parameters
        ----------
        row : str
        name : str, optional
            The input; default is all of them.
        """
        found = [f for f in self.findings if f.row == row and name in (None, f.input)]
        return max(found, key=badness, default=None)

    def extend(self, other: "Report") -> None:
        """Add what another check found, of other inputs, rows or with other bounds.

        Parameters
        ----------
        other : Report
            In the same units.
        """
        if other.units != self.units:
            raise ArgumentValueError(
                f"other has errors in the units {other.units!r}, and this report has "
                f"{self.units!r}: check both in the same units."
            )
        for ours, theirs in ((self.rows, other.rows), (self.inputs, other.inputs)):
            ours += [name for name in theirs if name not in ours]
        self.findings += other.findings
        self.errors += other.errors
        self.skipped += [s for s in other.skipped if s not in self.skipped]

    def __str__(self) -> str:
        """Return the table as plain text, and below it what is wrong and what was skipped.

        A cell has the error that is nearest to its bound, or beyond it.
        """
        header, *lines = self._cells()
        return "\n".join([plain_table(header, lines), *self._notes()])

    def print(self) -> None:
        """Print the table, in colours if rich is installed."""
        header, *lines = self._cells()
        print_table(header, lines)
        for note in self._notes():
            print(note)

    def _cells(self) -> Iterator[list[str]]:
        yield [f"worst error ({self.units}; gradients relative)", *self.rows]
        for name in self.inputs:
            yield [name, *(self._cell(row, name) for row in self.rows)]

    def _cell(self, row: str, name: str) -> str:
        found = self.worst(row, name)
        if found is None:
            return "-"
        if found.what not in ("value", "gradient"):
            return f"{found.what} WRONG"
        return f"{found.error:.1e}{'' if found.right else ' WRONG'}"

    def _notes(self) -> list[str]:
        return [
            *(f"WRONG: {finding}" for finding in self.wrong),
            *self._skipped_together(),
        ]

    def _skipped_together(self) -> Iterator[str]:
        """Yield one line for the rows of which the same is skipped for the same reason."""
        together: dict[tuple[str, str], list[str]] = {}
        for s in self.skipped:
            together.setdefault((s.what, s.reason), []).append(s.row)
        for (what, reason), rows in together.items():
            yield f"not checked: {', '.join(rows)}: {what}: {reason}"

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON; also write it to a file.

        Numbers that are infinite or NaN are null; complex numbers are text.
        """
        text = json.dumps(self.as_dict(), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def as_dict(self) -> dict[str, Any]:
        """Return the report in the types of JSON."""
        return {
            "right": bool(self),
            "units": self.units,
            "rows": self.rows,
            "inputs": self.inputs,
            "findings": [
                {k: _plain(v) for k, v in asdict(f).items()} | {"right": f.right}
                for f in self.findings
            ],
            "skipped": [asdict(s) for s in self.skipped],
        }

    def plot(self, path: str | Path) -> None:
        """Draw the errors of rows and inputs, over their bounds, as a heat map; needs matplotlib.

        Parameters
        ----------
        path : path-like
            The picture's file, such as ``errors.png``.
        """
        from matplotlib.figure import Figure

        found = [[self.worst(row, name) for name in self.inputs] for row in self.rows]
        errors = [[math.nan if f is None else _shown(f) for f in line] for line in found]
        figure = Figure(
            figsize=(2.5 + 0.8 * len(self.inputs), 1.5 + 0.35 * len(self.rows)),
            layout="constrained",
        )
        axes: Any = figure.subplots()
        image = axes.imshow(errors, vmin=LEAST, vmax=MOST, cmap="viridis", aspect="auto")
        axes.set_xticks(range(len(self.inputs)), self.inputs, rotation=45, ha="right")
        axes.set_yticks(range(len(self.rows)), self.rows)
        for i, line in enumerate(found):
            for j, finding in enumerate(line):
                if finding is not None and not finding.right:
                    axes.text(j, i, "wrong", ha="center", va="center", color="red", fontsize=7)
        figure.colorbar(image, label="log10 of the largest error over its bound")
        figure.savefig(path, dpi=120)


def badness(finding: Finding) -> float:
    """Return the error over the bound; infinite for NaN."""
    error = math.inf if math.isnan(finding.error) else finding.error
    return math.inf if error > 0 and finding.bound == 0 else error / (finding.bound or 1.0)


def _plain(value: Any) -> Any:
    """Return a value in the types of JSON."""
    if value is None or isinstance(value, str | list | tuple):
        return value
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def _shown(finding: Finding) -> float:
    """Return the order of magnitude of the error over the bound, within the scale of colours."""
    return math.log10(min(max(badness(finding), 10.0**LEAST), 10.0**MOST))
