"""The pytest plugin: the fixture ``row``, the option ``--rows``, and a table of the worst errors.

It lies outside of the package, whose import takes a while: projects that do not use the plugin pay
for this file alone.
"""

import sys
from typing import Any

import pytest

_WORST = "groupnorm_worst_errors"
_from_workers: list[tuple[str, str, float, float]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("groupnorm").addoption(
        "--rows",
        dest="groupnorm_rows",  # the plain name may be a project's own
        default=None,
        metavar="NAMES",
        help="the rows of tests with the fixture `row`: names as of groupnorm.testing.rows, such "
        "as numpy,torch:*; default is every row that can be used here",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Describe the mark."""
    config.addinivalue_line(
        "markers",
        "rows(*names, without={name: reason}): the rows of a test with the fixture `row`, and "
        "those that are skipped, with the reason",
    )


@pytest.fixture(scope="session")  # hypothesis refuses fixtures that are made anew for each test
def row(request: pytest.FixtureRequest) -> Any:
    """One row of `groupnorm.testing`, as the option and the mark ``rows`` choose them."""
    from groupnorm import testing

    if not hasattr(request, "param"):
        pytest.fail("the fixture `row` is for arguments of tests, not for getfixturevalue()")
    (found,) = testing.rows([request.param])
    return found


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with the fixture once for each row."""
    if "row" not in metafunc.fixturenames or not _is_ours(metafunc):
        return
    from groupnorm import testing
    from groupnorm.errors import ArgumentValueError, GroupNormError
    from groupnorm.testing.registry import known_rows, names_of, rows_of

    marks = list(metafunc.definition.iter_markers("rows"))
    option = metafunc.config.getoption("groupnorm_rows")
    skipped: dict[str, Any] = {}
    try:
        selected = [r.name for r in testing.rows(option)]
        wanted = set(testing.row_names())
        for mark in marks:
            unknown = set(mark.kwargs) - {"without"}
            if unknown:
                raise ArgumentValueError(
                    f"the mark rows has {', '.join(sorted(unknown))}, which is not known: it takes "
                    "names of rows, and without={name: reason}."
                )
            if mark.args:
                named = names_of(mark.args)
                wanted &= named
                if option is None:  # what the mark asks for and is not here is told
                    skipped |= {n: known_rows()[n].why_absent for n in named - set(selected)}
            _, reasons = rows_of([], mark.kwargs.get("without", {}))
            skipped |= reasons
    except GroupNormError as error:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: {error}") from error
    chosen = [n for n in testing.row_names() if n in wanted and (n in selected or option is None)]
    parameters = [
        pytest.param(
            name, marks=[pytest.mark.skip(reason=skipped[name])] if name in skipped else []
        )
        for name in chosen
        if name in selected or name in skipped
    ]
    nothing = pytest.param(None, marks=pytest.mark.skip(reason="--rows selects none of its rows"))
    metafunc.parametrize("row", parameters or [nothing], indirect=True)


def _is_ours(metafunc: pytest.Metafunc) -> bool:
    """Whether the argument is this fixture, and not a project's own fixture or parameter."""
    found = getattr(metafunc, "_arg2fixturedefs", {}).get("row", ())
    given = any("row" in call.params for call in getattr(metafunc, "_calls", ()))
    return bool(found) and found[-1].func.__module__ == __name__ and not given


# The closing table -------------------------------------------------------------------------------


def _worst() -> list[tuple[str, str, float, float]]:
    """Return the worst finding of each row, if anything was checked in this process."""
    report = sys.modules.get("groupnorm.testing.report")
    found = getattr(report, "record", {})
    return [(name, str(f), float(f.error), float(f.bound)) for name, f in found.items()]


def pytest_sessionstart() -> None:
    """Forget what other sessions of this process found."""
    _from_workers.clear()
    report = sys.modules.get("groupnorm.testing.report")
    if report is not None:
        report.record.clear()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what a process of pytest-xdist found to the one that reports."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_WORST] = _worst()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Keep what a process of pytest-xdist found."""
    _from_workers.extend(map(tuple, getattr(node, "workeroutput", {}).get(_WORST, ())))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the worst error of each row."""
    worst: dict[str, tuple[float, float, str]] = {}
    for name, text, error, bound in [*_from_workers, *_worst()]:
        share = error / bound if bound else (float("inf") if error else 0.0)
        if name not in worst or not share <= worst[name][0]:
            worst[name] = (share, error, text)
    if not worst:
        return
    terminalreporter.section("groupnorm.testing: the largest error of each row")
    width = max(map(len, worst))
    for name, (share, error, text) in worst.items():
        line = f"{name:{width}}  {error:.1e}  {share:.2g} of what is allowed  {text}"
        terminalreporter.write_line(line[:200])
