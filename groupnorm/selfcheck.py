"""The check of ``groupnorm check``: whether every installed backend computes correctly.

The reference is `groupnorm.testing.oracle`, which shares no code with the rest of the package, so
an error there cannot go unnoticed here.
"""

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import numpy as np

from groupnorm.adapter import Adapter
from groupnorm.discovery import BackendInfo
from groupnorm.dispatch import adapter_named
from groupnorm.functional import group_norm, group_norm_vjp
from groupnorm.testing import oracle
from groupnorm.testing.checks import check
from groupnorm.testing.registry import Row
from groupnorm.testing.report import Report

__all__ = ["check_backends", "rows_of_backend"]

Array = Any

SHAPE = (2, 9, 7, 12)
OPTIONS: dict[str, Any] = {"num_groups": 4, "epsilon": 1e-6}
SEED = 20240607
FORWARD_BOUND = 5e-6
GRADIENT_BOUND = 2e-6


class _BackendRow(Row):
    """A backend of this package on one of its devices, through its adapter."""

    cannot = MappingProxyType({"autodiff": "group_norm_vjp is checked"})

    def __init__(self, name: str, device: str, adapter: Adapter) -> None:
        super().__init__(f"{name}:{device}")
        self.device, self.adapter = device, adapter

    def asarray(self, a: Array) -> Array:
        return self.adapter.place(self.adapter.from_host(a.copy()), self.device)

    def to_numpy(self, y: Array) -> Array:
        return np.asarray(self.adapter.to_host(y))

    def is_array(self, y: object) -> bool:
        return self.adapter.is_array(y)

    def device_of(self, y: Array) -> Any:
        return self.adapter.device_of(y)


def rows_of_backend(info: BackendInfo) -> list[Row]:
    """Return a row for each kind of device of a backend: eight equal GPUs need not all be checked.

    Parameters
    ----------
    info : BackendInfo
        Of a backend that is installed; without devices there are no rows.
    """
    first: dict[str, str] = {}
    for device in info.devices:
        first.setdefault(device.partition(":")[0], device)
    adapter = adapter_named(info.name) if first else None
    return [_BackendRow(info.name, device, adapter) for device in first.values() if adapter]


def check_backends(rows: list[Row], progress: Callable[[Row], None] = lambda row: None) -> Report:
    """Compare `group_norm` and `group_norm_vjp` with the reference.

    Parameters
    ----------
    rows : list of Row
        Of `rows_of_backend`.
    progress : callable, optional
        Is called with each row before it is checked.

    Returns
    -------
    Report
        The errors of values are relative to ``max(1, abs(reference))``, those of gradients to the
        largest.
    """
    report = Report([], [], "mixed")
    far, near = _inputs()
    for row in rows:
        progress(row)
        for inputs, gradients in ((near, [0, 1, 2]), (far, False)):
            report.extend(
                check(
                    _call,
                    inputs=inputs,
                    reference=_reference,
                    rows=[row],
                    gradients=gradients,
                    vjp=_call_vjp,
                    reference_vjp=_reference_vjp,
                    bound=FORWARD_BOUND,
                    gradient_bound=GRADIENT_BOUND,
                    units="mixed",
                )
            )
    return report


def _call(x: Array, scale: Array, bias: Array, mask: Array | None, fast: bool) -> Array:
    return group_norm(x, scale, bias, mask=mask, use_fast_variance=fast, **OPTIONS)


def _call_vjp(
    x: Array, scale: Array, bias: Array, mask: Array | None, fast: bool, dy: Array
) -> tuple[Array, ...]:
    _, pullback = group_norm_vjp(x, scale, bias, mask=mask, use_fast_variance=fast, **OPTIONS)
    return tuple(pullback(dy))


def _reference(x: Array, scale: Array, bias: Array, mask: Array | None, fast: bool) -> Array:
    return oracle.group_norm(x, scale, bias, mask=mask, **OPTIONS)


def _reference_vjp(
    x: Array, scale: Array, bias: Array, mask: Array | None, fast: bool, dy: Array
) -> tuple[Array, ...]:
    return tuple(oracle.group_norm_gradients(x, dy, scale, bias, mask=mask, **OPTIONS))


def _inputs() -> tuple[dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]:
    """Return inputs whose mean is large, and others whose gradients are checked as well."""
    rng = np.random.default_rng(SEED)
    x = rng.standard_normal(SHAPE, dtype=np.float32)
    scale, bias = rng.standard_normal((2, SHAPE[-1]), dtype=np.float32)
    mask = rng.random((*SHAPE[:-1], 1)) < 0.7
    offset = (x + 1e4).astype(np.float32)
    padded = np.where(mask, x, np.float32("nan"))
    near = {
        "one pass": (x, scale, bias, None, True),
        "two passes": (x, scale, bias, None, False),
        "masked, NaN padding": (padded, scale, bias, mask, True),
    }
    far = {
        "mean 1e4, one pass": (offset, scale, bias, None, True),
        "mean 1e4, two passes": (offset, scale, bias, None, False),
    }
    return far, near
