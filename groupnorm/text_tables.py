"""Tables of text: plain, or in colours with rich."""

import sys
from collections.abc import Sequence

__all__ = ["plain_table", "print_table"]

Line = Sequence[str]


def plain_table(header: Line, lines: Sequence[Line]) -> str:
    """Return a table with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join(map(str.ljust, line, widths)).rstrip() for line in (header, rule, *lines)
    )


def print_table(header: Line, lines: Sequence[Line]) -> None:
    """Print a table; with rich in colours, where cells that end in "WRONG" are red."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(header, lines))
        return
    table = Table(*map(escape, header))
    for line in lines:
        table.add_row(*(Text(c, style="bold red" if c.endswith("WRONG") else "") for c in line))
    console = Console()
    # What is measured with the console's own options is never wider than the console.
    unlimited = console.options.update_width(sys.maxsize)
    if console.measure(table, options=unlimited).maximum > console.width:  # it would cut the cells
        print(plain_table(header, lines))
    else:
        console.print(table)
