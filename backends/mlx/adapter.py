"""MLX: the adapter, and `mlx.core` in array API terms, as far as the implementation uses it."""

import math
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from groupnorm.adapter import Adapter, as_native_contiguous
from groupnorm.dtypes import small_float
from groupnorm.errors import ArgumentTypeError, ArgumentValueError
from groupnorm.parameters import ParamStore

__all__ = ["MlxAdapter", "mlx_adapter"]


class _Namespace(ModuleType):
    """`mlx.core`, with the names and arguments of the array API that it lacks."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, "bool_" if name == "bool" else name)

    @staticmethod
    def astype(x: Any, dtype: Any, *, copy: bool = True) -> Any:
        """Convert; what is returned for a copy is another object, which no write to x changes."""
        return x.astype(dtype) if copy or x.dtype != dtype else x

    @staticmethod
    def full(shape: Any, value: Any, *, dtype: Any = None, device: None = None) -> Any:
        """Return an array of one value."""
        return mx.full(shape, value, dtype)

    @staticmethod
    def ones(shape: Any, *, dtype: Any = None, device: None = None) -> Any:
        """Return an array of ones."""
        return mx.ones(shape, dtype or mx.float32)

    @staticmethod
    def exp(x: Any) -> Any:
        """Exponential; MLX's own is accurate to float32 only, for float64 too (0.32)."""
        return mx.power(math.e, x) if x.dtype == mx.float64 else mx.exp(x)


class MlxAdapter(Adapter):
    """`mlx.core.array`, also while MLX differentiates, compiles or batches."""

    label = "MLX"
    array_name = "MLX arrays"
    name = "mlx"

    def is_array(self, x: object) -> bool:
        """Whether x is an array or stands for one in a transformation."""
        return isinstance(x, mx.array)

    @property
    def overwrites(self) -> bool:
        """Arrays are immutable values: writing to one makes another."""
        return False

    def device_of(self, x: Any) -> Any:
        """Arrays have no device: they lie in memory that all devices share."""
        return None

    def place(self, x: Any, device: Any) -> Any:
        """Return x; check that the device is the one MLX computes on."""
        own = mx.default_device()
        known = isinstance(device, str | mx.Device | mx.DeviceType)
        if device is not None and not (known and device in (own, own.type, *self.devices())):
            raise ArgumentValueError(
                f"device={device!r} is not the device that MLX computes on, {own}: its arrays lie "
                "in memory that all devices share. Leave device out, and choose a device by "
                "mlx.core.set_default_device or mlx.core.stream."
            )
        return x

    def detach(self, x: Any) -> Any:
        """Stop gradients."""
        return mx.stop_gradient(x)

    def materialize(self, *values: Any) -> tuple[Any, ...]:
        """Return slices, for whose sake ``mx.compile(shapeless=True)`` raises.

        It infers no shapes of slices. Without them it would use the sizes of the first call in all
        others, with wrong results, or a crash of the process.
        """
        return tuple(mx.reshape(mx.stack([v, v])[:1], v.shape) for v in values)

    def from_host(self, value: "np.ndarray[Any, Any]", like: Any = None) -> Any:
        """Convert a NumPy array; MLX itself would round 64 bits to 32."""
        name = value.dtype.name
        dtype, value = self.dtype(name), as_native_contiguous(value)
        if name == "bfloat16":
            return mx.array(value.view(np.uint16)).view(dtype)
        return mx.array(value, dtype=dtype)

    def to_host(self, x: Any) -> "np.ndarray[Any, Any]":
        """Return the values as a NumPy array; bfloat16 as that of ml_dtypes."""
        if x.dtype == mx.bfloat16:
            return np.array(x.view(mx.uint16)).view(small_float("bfloat16"))
        return np.array(x)

    def dtype(self, name: str) -> Any:
        """Return the dtype with this name; float64 only where MLX computes on a CPU."""
        found = super().dtype(name)
        if found == mx.float64 and mx.default_device().type != mx.cpu:
            raise ArgumentTypeError(
                "dtype='float64' is one that MLX has on CPUs only: choose 'float32', or call "
                "mlx.core.set_default_device(mlx.core.cpu) first."
            )
        return found

    def default_float(self) -> Any:
        """Return float32."""
        return mx.float32

    def real_dtype(self, dtype: Any) -> Any:
        """Return the dtype of the parts of complex64, the only complex dtype."""
        return mx.float32 if self.is_complex(dtype) else dtype

    def complex_from(self, real: Any, imaginary: Any) -> Any:
        """Combine real and imaginary parts."""
        return real + 1j * imaginary

    def param_store(self, param_type: Any) -> ParamStore:
        """Return the store of plain arrays: a module of MLX trains nothing else."""
        if param_type is not None:
            raise ArgumentTypeError(
                f"param_type={param_type!r}: an mlx.nn.Module trains plain arrays only. Leave "
                "param_type out."
            )
        return super().param_store(None)

    def devices(self) -> tuple[str, ...]:
        """Return the name of the device that MLX computes on, ``"cpu"`` or ``"gpu"``."""
        return ("cpu" if mx.default_device().type == mx.cpu else "gpu",)


mlx_adapter = MlxAdapter(_Namespace("mlx"))
