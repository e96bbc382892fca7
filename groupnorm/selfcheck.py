"""The check of ``python -m groupnorm``: whether every installed backend computes correctly.

The reference is float64 NumPy, written from the definition, one group of one sample at a time. It
shares no code with the rest of the package, so an error there cannot go unnoticed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from groupnorm import BackendInfo, available_backends, group_norm, group_norm_vjp
from groupnorm.dispatch import adapter_named

if TYPE_CHECKING:
    from groupnorm.adapter import Adapter

__all__ = ["NOT_INSTALLED", "BackendReport", "Check", "agree", "check_backends"]

Array = npt.NDArray[Any]

SHAPE = (2, 9, 7, 12)
GROUPS = 4
EPSILON = 1e-6
SEED = 20240607
FORWARD_BOUND = 5e-6
GRADIENT_BOUND = 2e-6
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Check:
    """One comparison with the reference.

    Attributes
    ----------
    name : str
        The name of the case.
    device : str
        The device it was computed on.
    error : float or None
        Forward: max ``|error| / max(1, |reference|)``. Gradient: the largest over x, scale and bias
        of max ``|error|`` / max ``|reference|``. None if the backend raised.
    bound : float
        The largest `error` that counts as agreement.
    failure : str or None
        The exception, if there was one.
    """

    name: str
    device: str
    error: float | None
    bound: float
    failure: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether the error is within the bound (a NaN is not)."""
        return self.error is not None and self.error <= self.bound


@dataclass(frozen=True)
class BackendReport:
    """The state of one backend, and the results of its checks.

    Attributes
    ----------
    name : str
        The name for ``backend=``.
    version : str or None
        The version of its library.
    devices : tuple of str
        The devices that the library reports.
    reason : str or None
        Why the backend was not checked: not installed, or installed without a usable device.
    checks : tuple of Check
        Empty if `reason` is set.
    implementations, why_not_fused : mapping
        As in `groupnorm.discovery.BackendInfo`.
    """

    name: str
    version: str | None
    devices: tuple[str, ...]
    reason: str | None
    checks: tuple[Check, ...]
    implementations: Mapping[str, tuple[str, ...]]
    why_not_fused: Mapping[str, str]

    @property
    def status(self) -> str:
        """``"agrees"``, ``"disagrees"`` or why it was not checked."""
        if self.reason is not None:
            return self.reason
        return "agrees" if all(check.agrees for check in self.checks) else "disagrees"


def check_backends() -> list[BackendReport]:
    """Check every backend that is installed and has a device.

    Returns
    -------
    list of BackendReport
        One for each backend.
    """
    return [_report(info) for info in available_backends()]


def agree(reports: list[BackendReport]) -> bool:
    """Whether every backend that could be checked agrees with the reference.

    Parameters
    ----------
    reports : list of BackendReport
        The result of `check_backends`.

    Returns
    -------
    bool
        Also False if NumPy, which is always installed, could not be checked.
    """
    checked = {report.name: report.status for report in reports if report.reason is None}
    return "numpy" in checked and all(status == "agrees" for status in checked.values())


def _report(info: BackendInfo) -> BackendReport:
    """Run the checks of one backend, or report why they cannot run."""
    reason = None
    if not info.installed:
        reason = NOT_INSTALLED
    elif info.error is not None or not info.devices:
        reason = f"not usable: {info.error or 'no device'}"
    checks: tuple[Check, ...] = ()
    if reason is None:
        checks = tuple(
            _check(adapter_named(info.name), case, device)
            for device in _one_of_each_kind(info.devices)
            for case in _cases()
        )
    return BackendReport(
        info.name,
        info.version,
        info.devices,
        reason,
        checks,
        info.implementations,
        info.why_not_fused,
    )


def _one_of_each_kind(devices: tuple[str, ...]) -> list[str]:
    """The first device of each kind: eight equal GPUs need not all be checked."""
    first: dict[str, str] = {}
    for device in devices:
        first.setdefault(device.partition(":")[0], device)
    return list(first.values())


def _check(adapter: Adapter, case: _Case, device: str) -> Check:
    """Compare one backend on one device with the reference on one case."""
    compare, bound = _forward_error, FORWARD_BOUND
    if case.gradient:
        compare, bound = _gradient_error, GRADIENT_BOUND
    try:
        error = compare(adapter, case, device)
    except Exception as failure:  # any error of a backend is reported, not raised
        return Check(case.name, device, None, bound, f"{type(failure).__name__}: {failure}")
    return Check(case.name, device, error, bound)


def _forward_error(adapter: Adapter, case: _Case, device: str) -> float:
    expected, _ = _reference(case)
    operands = [_put(adapter, a, device) for a in (case.x, case.scale, case.bias)]
    result = adapter.to_host(group_norm(*operands, **case.options()))
    return float(np.max(np.abs(result - expected) / np.maximum(1.0, np.abs(expected))))


def _gradient_error(adapter: Adapter, case: _Case, device: str) -> float:
    _, expected = _reference(case)
    operands = [_put(adapter, a, device) for a in (case.x, case.scale, case.bias)]
    _, pullback = group_norm_vjp(*operands, **case.options())
    gradients = pullback(_put(adapter, case.dy, device))
    computed = [adapter.to_host(g) for g in (gradients.x, gradients.scale, gradients.bias)]
    errors = [
        np.max(np.abs(ours - true)) / np.max(np.abs(true))
        for ours, true in zip(computed, expected, strict=True)
    ]
    return float(np.max(errors))  # unlike the built-in max, this keeps a NaN


def _put(adapter: Adapter, a: Array, device: str) -> Any:
    return adapter.place(adapter.from_host(a), device)


# ---- the cases and the reference ----------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """One input with its parameters, cotangent and options, in NumPy float32."""

    name: str
    x: Array
    scale: Array
    bias: Array
    dy: Array
    mask: Array | None = None
    fast: bool = True
    gradient: bool = False

    def options(self) -> dict[str, Any]:
        """The keyword arguments for the functions under test."""
        return {
            "num_groups": GROUPS,
            "epsilon": EPSILON,
            "mask": self.mask,
            "use_fast_variance": self.fast,
        }


def _cases() -> list[_Case]:
    """Inputs that together cover both variance modes, the mask, an offset and the gradient."""
    rng = np.random.default_rng(SEED)
    x, dy = rng.standard_normal((2, *SHAPE), dtype=np.float32)
    scale, bias = rng.standard_normal((2, SHAPE[-1]), dtype=np.float32)
    mask = rng.random((*SHAPE[:-1], 1)) < 0.7
    plain = _Case("one pass", x, scale, bias, dy)
    offset = (x + 1e4).astype(np.float32)
    padded = np.where(mask, x, np.float32("nan"))
    return [
        plain,
        replace(plain, name="two passes", fast=False),
        replace(plain, name="masked, NaN padding", mask=mask, x=padded),
        replace(plain, name="mean 1e4, one pass", x=offset),
        replace(plain, name="mean 1e4, two passes", x=offset, fast=False),
        replace(plain, name="gradient", gradient=True),
        replace(plain, name="gradient, masked", gradient=True, mask=mask, fast=False),
    ]


def _reference(case: _Case) -> tuple[Array, tuple[Array, Array, Array]]:
    """Result and gradients (x, scale, bias) of `case` in float64, from the definition."""
    y, dx = np.empty(SHAPE), np.empty(SHAPE)
    dscale, dbias = np.zeros(SHAPE[-1]), np.zeros(SHAPE[-1])
    counts = np.broadcast_to(True if case.mask is None else case.mask, SHAPE)
    width = SHAPE[-1] // GROUPS
    for sample in range(SHAPE[0]):
        for first in range(0, SHAPE[-1], width):
            channels = slice(first, first + width)
            here = (sample, ..., channels)
            valid, dy = counts[here], case.dy[here].astype(np.float64)
            scale, bias = (a[channels].astype(np.float64) for a in (case.scale, case.bias))
            values = case.x[here].astype(np.float64)
            values = np.where(valid | np.isfinite(values), values, 0.0)

            std = np.sqrt(np.var(values[valid]) + EPSILON)
            hat = (values - np.mean(values[valid])) / std
            y[here] = hat * scale + bias

            dscale[channels] += np.sum(dy * hat, axis=(0, 1))
            dbias[channels] += np.sum(dy, axis=(0, 1))
            # All positions are normalized; only the valid ones contribute to the statistics.
            dhat = dy * scale
            through_statistics = (np.sum(dhat) + hat * np.sum(dhat * hat)) / np.sum(valid)
            dx[here] = (dhat - valid * through_statistics) / std
    return y, (dx, dscale, dbias)
