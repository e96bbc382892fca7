"""CuPy: the adapter of arrays on CUDA devices. Only computing needs a driver, not importing."""

from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from groupnorm.adapter import Adapter, Kernels
from groupnorm.backends.cupy.nccl import replicas_of
from groupnorm.distributed.axis_names import bound
from groupnorm.distributed.replicas import Replicas, over_all
from groupnorm.dtypes import NumpyDtypes
from groupnorm.errors import ArgumentValueError, BackendImportError

__all__ = ["CupyAdapter", "cupy_adapter"]


class CupyAdapter(NumpyDtypes, Adapter):
    """`cupy.ndarray` on any device."""

    label = "CuPy"
    array_name = "CuPy arrays"
    name = "cupy"
    has_autograd = False

    def is_array(self, x: object) -> bool:
        """Whether x is a CuPy array."""
        return isinstance(x, cupy.ndarray)

    def place(self, x: Any, device: Any) -> Any:
        """Copy to a device: an index, ``"cuda:1"`` or a `cupy.cuda.Device`."""
        if device is None:
            return x
        with _device(device):
            return cupy.asarray(x, copy=True)

    def from_host(self, value: "np.ndarray[Any, Any]", like: Any = None) -> Any:
        """Copy to the device of `like`, or to the current one."""
        device_count()
        with like.device if like is not None else cupy.cuda.Device():
            return cupy.asarray(value)

    def to_host(self, x: Any) -> "np.ndarray[Any, Any]":
        """Copy to the host."""
        return np.asarray(cupy.asnumpy(x))

    def complex_from(self, real: Any, imaginary: Any) -> Any:
        """Combine two real arrays into a complex one."""
        return real + 1j * imaginary

    def replicas(self, axis_name: Any) -> Replicas:
        """Return the ranks of one or several NCCL communicators."""
        return over_all([replicas_of(communicator) for communicator in bound(axis_name)])

    def load_kernels(self) -> Kernels:
        """Return the GPU kernels."""
        from groupnorm.backends.cupy.gpu import CupyKernels

        return CupyKernels(self)

    def devices(self) -> tuple[str, ...]:
        """Return the names of the CUDA devices."""
        return tuple(f"cuda:{i}" for i in range(device_count()))


def device_count() -> int:
    """Return the number of CUDA devices.

    Raises
    ------
    BackendImportError
        If there is no device, or no driver.
    """
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        count, reason = 0, str(error)
    else:
        reason = "CUDA reports no device"
    if not count:
        raise BackendImportError(
            f"backend='cupy' has no GPU to compute on ({reason}): it needs an NVIDIA GPU and its "
            "driver. On this machine use backend='numpy'."
        )
    return count


def _device(device: Any) -> Any:
    if isinstance(device, cupy.cuda.Device):
        return device
    kind, _, index = str(device).rpartition(":")
    number = index if index.isdecimal() else "0" if index == "cuda" and not kind else ""
    if kind not in ("", "cuda") or not number or int(number) >= device_count():
        raise ArgumentValueError(
            f"device={device!r} is not a CuPy device here: choose an index below {device_count()}, "
            "such as 'cuda:0'."
        )
    return cupy.cuda.Device(int(number))


cupy_adapter = CupyAdapter(xp)
