"""PyTorch: tensors, statistics over process groups, and a layer that is an `nn.Module`."""

import sys
from functools import reduce
from typing import TYPE_CHECKING, Any

import array_api_compat.torch as xp
import numpy as np
import torch

from groupnorm.backends import Adapter, cpu, native, torch_gpu
from groupnorm.backends.numpy import small_float
from groupnorm.backends.torch_distributed import replicas_of, sum_gradients
from groupnorm.backends.torch_fused import functional, fused, fused_vjp
from groupnorm.backends.torch_memory import is_wrapped
from groupnorm.backends.torch_op import traced
from groupnorm.core import apply
from groupnorm.errors import ArgumentValueError
from groupnorm.implementations import NotServed
from groupnorm.layer import GroupNorm
from groupnorm.options import Options
from groupnorm.plan import Plan, make_plan, make_plan_uncached
from groupnorm.replicas import Replicas
from groupnorm.settings import Settings
from groupnorm.typing import ArrayT, MaskLike

__all__ = ["TorchAdapter", "TorchGroupNorm", "TorchNativeGroupNorm", "adapter", "sum_gradients"]


class TorchAdapter(Adapter):
    """Tensors, their subclasses and `torch.nn.Parameter`."""

    name = "PyTorch"
    array_name = "PyTorch tensors"
    backend = "torch"
    has_native = True

    def is_array(self, x: object) -> bool:
        """Whether x is a tensor."""
        return isinstance(x, torch.Tensor)

    def plan(self, *key: Any, sampled: bool) -> Plan:
        """Keep sizes open while compiling, and keep away from the cache then."""
        if torch.compiler.is_compiling() or any(isinstance(n, torch.SymInt) for n in key[0]):
            # Blocks hold for a range of sizes only, and an exported program is for all of them.
            blocked = not torch.compiler.is_exporting()
            return make_plan_uncached(*key, sampled=False, static=False, blocked=blocked)
        return make_plan(*key, sampled=sampled)

    def place(self, x: Any, device: Any) -> Any:
        """Move a tensor."""
        try:
            return x if device is None else x.to(device)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ArgumentValueError(
                f"device={device!r} is not one PyTorch can use here "
                f"({str(error).partition(chr(10))[0]}): choose from "
                f"{', '.join(self.devices())}, or 'meta'."
            ) from error

    def detach(self, x: Any) -> Any:
        """Cut from the graph."""
        return x.detach()

    def known(self, x: Any) -> bool | None:
        """Look, but while compiling, inside of torch.func's transforms, and on a device."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or is_wrapped(x):
            return None
        return bool(x)

    def from_host(self, value: "np.ndarray[Any, Any]", like: Any = None) -> Any:
        """Copy a NumPy array, bit by bit where NumPy and PyTorch share no dtype."""
        device = None if like is None else like.device
        if torch.compiler.is_compiling():  # which cannot trace what is asked of the array below
            return torch.as_tensor(value, device=device)
        dtype, value = self.dtype(value.dtype.name), native(value)
        if value.dtype.kind != "V":
            return torch.tensor(value, dtype=dtype, device=device)
        bits = value.view(np.int16 if value.dtype.itemsize == 2 else np.uint8)
        return torch.tensor(bits, device=device).view(dtype)

    def to_host(self, x: Any) -> "np.ndarray[Any, Any]":
        """Copy to the host, bit by bit where NumPy and PyTorch share no dtype."""
        x = x.detach().cpu().resolve_conj().resolve_neg()
        name = str(x.dtype).removeprefix("torch.")
        if not name.startswith(("bfloat", "float8")):
            return np.array(x.numpy())
        bits = x.contiguous().view(torch.int16 if x.dtype.itemsize == 2 else torch.uint8)
        return np.array(bits.numpy()).view(small_float(name))

    def default_float(self) -> Any:
        """Return what `torch.set_default_dtype` says."""
        return torch.get_default_dtype()

    def result_type(self, *dtypes: Any) -> Any:
        """Promote, by what the compiler can trace."""
        return reduce(torch.promote_types, dtypes)

    def erfc(self, x: Any) -> Any:
        """1 - erf(x)."""
        return torch.special.erfc(x)

    def complex_from(self, real: Any, imaginary: Any) -> Any:
        """Put two real tensors together."""
        return torch.complex(real, imaginary)

    def replicas_of(self, communicator: Any) -> Replicas:
        """Find the ranks of a process group, or of a mesh that has one."""
        return replicas_of(communicator)

    def over_shards(self, x: Any) -> Any:
        """Compute a DTensor by its local shards."""
        if type(x) is torch.Tensor:
            return None
        # Whoever has one has imported its module; importing it takes a while.
        module = sys.modules.get("torch.distributed.tensor")
        if module is None or not isinstance(x, module.DTensor):
            return None
        from groupnorm.backends.dtensor import over_shards

        return over_shards

    def fused_unavailable(self, device: str) -> NotServed | None:
        """Look for numba on the CPU, for Triton on NVIDIA's GPUs."""
        if device == "cpu":
            return cpu.unavailable(float16=False)
        return torch_gpu.unavailable(torch.device(device))

    def fused(self, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
        """Compute by kernels: of numba on the CPU, of Triton on a GPU."""
        if torch.compiler.is_compiling():
            return traced(self, x, scale, bias, mask, options)
        return fused(self, x, scale, bias, mask, options)

    def fused_vjp(self, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
        """Compute by kernels, backward as well."""
        return fused_vjp(self, x, scale, bias, mask, options)

    def native(self, x: Any, scale: Any, bias: Any, mask: Any, options: Options) -> Any:
        """Compute by `torch.nn.functional.group_norm`."""
        return functional(x, scale, bias, mask, options)

    def hold(self, value: Any, param_type: Any) -> Any:
        """Make a Parameter, or what is asked for."""
        return (torch.nn.Parameter if param_type is None else param_type)(value)

    def layer_class(self) -> type[GroupNorm]:
        """Return the module."""
        return TorchGroupNorm

    def devices(self) -> tuple[str, ...]:
        """Name the CPU and the accelerators."""
        found = ["cpu"]
        kind = torch.accelerator.current_accelerator(check_available=True)
        if kind is not None:
            found += [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
        return tuple(found)


class TorchGroupNorm(GroupNorm, torch.nn.Module):
    """Group normalization as an `nn.Module`; see `groupnorm.GroupNorm`.

    The parameters are `weight` and `bias`, flat (C,), as `torch.nn.GroupNorm` names them; `scale`
    reads the weight in the shape of the feature axes.
    """

    _adapter_name = "torch"
    weight: Any
    eps: float
    num_channels: int
    affine: bool

    if TYPE_CHECKING:

        def __call__(self, x: ArrayT, mask: MaskLike = None) -> ArrayT:
            """Normalize x; see `update`."""
            return x
    else:
        # Module's own, for its hooks; forward is where the work is.
        __call__ = torch.nn.Module.__call__

    def _setup(self, settings: Settings, scale: Any, bias: Any) -> None:
        torch.nn.Module.__init__(self)
        if settings.as_torch_native:
            self.__class__ = TorchNativeGroupNorm  # pyright: ignore[reportAttributeAccessIssue]
        self._settings = settings
        hold = self._adapter.hold
        for name, value in (("weight", scale), ("bias", bias)):
            if value is None:
                self.register_parameter(name, None)
            else:
                setattr(self, name, hold(value.reshape(-1), settings.param_type))
        # nn.GroupNorm's names, which tools read.
        self.num_channels = settings.num_groups * settings.group_size
        self.eps = settings.options.epsilon
        self.affine = settings.use_scale

    def forward(self, x: Any, mask: Any = None) -> Any:
        """Normalize x; see `update`."""
        if type(x) is torch.Tensor:  # no need to ask who serves it
            return apply(adapter, x, self.scale, self.bias, mask, self._settings.options)
        return self._normalize(x, mask)

    @property
    def scale(self) -> Any:
        """The weight, in the shape of the feature axes."""
        weight = self.weight
        shape = self._settings.feature_shape
        return weight if weight is None or len(shape) == 1 else weight.view(shape)

    def reset_parameters(self) -> None:
        """Fill the parameters in place with their initial values, as after `to_empty`."""
        scale, bias = self._initial(self._settings, None)
        with torch.no_grad():
            for stored, value in ((self.weight, scale), (self.bias, bias)):
                if stored is not None and value is not None:
                    stored.copy_(value.reshape(-1))

    def extra_repr(self) -> str:
        """Show the arguments."""
        return self._describe()

    def __repr__(self) -> str:
        return torch.nn.Module.__repr__(self)


class TorchNativeGroupNorm(TorchGroupNorm, torch.nn.GroupNorm):  # type: ignore[override]
    """A layer that computes what `torch.nn.GroupNorm` computes, and is one."""

    def _get_name(self) -> str:
        return "GroupNorm"


adapter = TorchAdapter(xp)
