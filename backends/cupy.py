"""CuPy: NumPy's layer on a CUDA device. Importing this needs no driver; computing does."""

from typing import Any

import array_api_compat.cupy as xp
import cupy
import numpy as np

from groupnorm.backends import Adapter, cupy_gpu
from groupnorm.errors import ArgumentValueError, AxisNameError, BackendImportError
from groupnorm.implementations import NotServed
from groupnorm.layer import GroupNorm, PlainGroupNorm
from groupnorm.options import Options
from groupnorm.replicas import Agreement, Engine, Replicas

__all__ = ["CupyAdapter", "CupyGroupNorm", "adapter"]


class CupyAdapter(Adapter):
    """`cupy.ndarray` on any device."""

    name = "CuPy"
    array_name = "CuPy arrays"
    backend = "cupy"
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
        """Put two real arrays together."""
        return real + 1j * imaginary

    def replicas_of(self, communicator: Any) -> Replicas:
        """Find the ranks of a communicator of NCCL, bare or cupyx.distributed's."""
        # cupyx.distributed wraps one; NCCL itself is asked, so that both go the same way.
        library = getattr(communicator, "_comm", communicator)
        if not hasattr(library, "allReduce"):
            raise AxisNameError(
                f"axis_name={communicator!r} is a {type(communicator).__name__}: for CuPy arrays "
                "the replicas are a cupy.cuda.nccl.NcclCommunicator, what "
                "cupyx.distributed.init_process_group returns, or a name bound to one of them by "
                "groupnorm.bind_axis."
            )

        def add(x: Any) -> Any:
            # In C order: NCCL adds what lies in memory, and would mix other orders up.
            x = cupy.ascontiguousarray(x)
            total = cupy.empty(x.shape, x.dtype, order="C")
            nccl: Any = cupy.cuda.nccl  # holds nothing where the library is missing
            kind = {"f": nccl.NCCL_FLOAT32, "d": nccl.NCCL_FLOAT64}[x.dtype.char]
            stream = cupy.cuda.get_current_stream().ptr
            library.allReduce(x.data.ptr, total.data.ptr, x.size, kind, nccl.NCCL_SUM, stream)
            return total

        rank, size = library.rank_id(), library.size()

        def add_table(table: list[list[int]], like: Any) -> list[list[int]]:
            total = cupy.asnumpy(add(cupy.asarray(table, dtype=cupy.float64)))  # exact up to 2**53
            return [[int(number) for number in row] for row in total]

        _, agreement = _agreements.setdefault(id(library), (library, Agreement()))
        return Replicas(rank, size, add, (Engine(add_table, agreement),))

    def fused_unavailable(self, device: str) -> NotServed | None:
        """Look for Triton, and try out a kernel."""
        return cupy_gpu.unavailable(int(device.partition(":")[2] or 0))

    def fused(self, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
        """Compute by kernels, where Triton is installed."""
        return cupy_gpu.fused(self, x, scale, bias, mask, options)

    def fused_vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
        """Compute by kernels, backward as well."""
        return cupy_gpu.fused_vjp(self, x, scale, bias, mask, options)

    def layer_class(self) -> type[GroupNorm]:
        """Return the plain layer."""
        return CupyGroupNorm

    def devices(self) -> tuple[str, ...]:
        """Name the CUDA devices."""
        return tuple(f"cuda:{i}" for i in range(device_count()))


# Communicators are kept with what their ranks agreed on: they cannot be referred to weakly, and an
# id must not come to mean another one.
_agreements: dict[int, tuple[Any, Agreement]] = {}


def device_count() -> int:
    """Return the number of CUDA devices.

    Raises
    ------
    BackendImportError
        If there is none, or no driver.
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
            f"device={device!r} is not one CuPy has here: choose an index below {device_count()}, "
            "such as 'cuda:0'."
        )
    return cupy.cuda.Device(int(number))


class CupyGroupNorm(PlainGroupNorm):
    """Group normalization with CuPy parameters; see `groupnorm.GroupNorm`."""

    _adapter_name = "cupy"


adapter = CupyAdapter(xp)
