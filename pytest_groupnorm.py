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


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Any:
    """One row of `groupnorm.testing`, as the option and the mark ``rows`` choose them."""
    from groupnorm import testing

    (found,) = testing.rows([request.param])
    return found


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests with the fixture once for each row."""
    if "row" not in metafunc.fixturenames or not _is_ours(metafunc):
        return
    from groupnorm import testing
    from groupnorm.errors import ArgumentValueError
    from groupnorm.testing.registry import names_of

    marks = list(metafunc.definition.iter_markers("rows"))
    without = {n: why for mark in marks for n, why in mark.kwargs.get("without", {}).items()}
    option = metafunc.config.getoption("--rows")
    try:
        chosen = [r.name for r in testing.rows(option)]
        for mark in marks:
            if mark.args:
                wanted = names_of(mark.args)
                chosen = [name for name in chosen if name in wanted]
        reasons = {n: why for pattern, why in without.items() for n in names_of([pattern])}
    except ArgumentValueError as error:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: {error}") from error
    parameters = [
        pytest.param(
            name, marks=[pytest.mark.skip(reason=reasons[name])] if name in reasons else []
        )
        for name in chosen
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
    checks = sys.modules.get("groupnorm.testing.checks")
    found = getattr(checks, "record", {})
    return [(name, str(f), float(f.error), float(f.bound)) for name, f in found.items()]


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
