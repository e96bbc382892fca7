"""Consistency tests of functions of arrays in every library, against float64 references."""

from typing import TYPE_CHECKING, Any

from groupnorm.errors import BackendImportError
from groupnorm.testing.assertions import assert_accurate, assert_gradients, assert_same
from groupnorm.testing.checks import check
from groupnorm.testing.inputs import hard_inputs, layouts, pad_with_nan
from groupnorm.testing.registry import Row, register_row, row_names, row_of, rows

if TYPE_CHECKING:
    from groupnorm.testing.strategies import arrays
from groupnorm.testing.report import Disagreement, Finding, Report, Skipped

__all__ = [
    "Disagreement",
    "Finding",
    "Report",
    "Row",
    "Skipped",
    "arrays",
    "assert_accurate",
    "assert_gradients",
    "assert_same",
    "check",
    "hard_inputs",
    "layouts",
    "pad_with_nan",
    "register_row",
    "row_names",
    "row_of",
    "rows",
]


def __getattr__(name: str) -> Any:
    if name == "arrays":  # it imports hypothesis
        try:
            from groupnorm.testing.strategies import arrays
        except ImportError as error:
            raise BackendImportError(
                f"testing.arrays needs hypothesis, which cannot be imported ({error}): install it "
                'with pip install "groupnorm[testing]".'
            ) from error
        return arrays
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
