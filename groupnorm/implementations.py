"""Which implementation computes a call: a kernel, the library's own, or the portable one."""

from typing import TYPE_CHECKING, Any, NamedTuple

from groupnorm.errors import ArgumentValueError

if TYPE_CHECKING:
    from groupnorm.backends import Adapter
    from groupnorm.options import Options
    from groupnorm.typing import Array

__all__ = ["IMPLEMENTATIONS", "NotServed", "not_served", "served", "usable"]

IMPLEMENTATIONS = ("portable", "fused", "native")


class NotServed(NamedTuple):
    """What an adapter returns in place of a result: why a kernel does not compute this call."""

    reason: str


def served(
    adapter: "Adapter", x: "Array", scale: "Array", bias: "Array", mask: Any, options: "Options"
) -> Any:
    """Return what a kernel computes; NotServed where the portable implementation shall do it."""
    wanted = options.implementation
    if wanted == "portable":
        return NotServed("the portable implementation was asked for")
    ask = adapter.native if wanted == "native" else adapter.fused
    return ask(x, scale, bias, mask, options)


def usable(adapter: "Adapter", device: str) -> tuple[str, ...]:
    """Name what can compute ordinary calls on a device, in the order `served` would take them.

    The library's own comes last: only who asks for it gets it.
    """
    fused = ("fused",) if adapter.fused_unavailable(device) is None else ()
    native = ("native",) if adapter.has_native else ()
    return (*fused, "portable", *native)


def not_served(why: NotServed, options: "Options") -> None:
    """Refuse to compute by another implementation than the one that was asked for.

    Raises
    ------
    ArgumentValueError
        If one was.
    """
    if options.implementation in ("fused", "native"):
        raise ArgumentValueError(
            f"implementation={options.implementation!r} cannot compute this call: {why.reason}. "
            "Use implementation=None, which takes the best there is for each call, or 'portable'."
        )
