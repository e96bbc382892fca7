"""PyTorch: the adapter of tensors."""

import sys
import warnings
from functools import reduce
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch

from groupnorm.adapter import (
    Adapter,
    Kernels,
    Planning,
    admit_host_array,
    as_native_contiguous,
)
from groupnorm.arguments import CallOptions
from groupnorm.backends.kernels.layout import memory_order
from groupnorm.backends.torch.differentiation import portable
from groupnorm.backends.torch.internals import (
    fake_mode,
    has_memory,
    has_modes,
    is_exporting,
    is_exporting_to_onnx,
    is_traced,
    is_zero_tensor,
)
from groupnorm.backends.torch.memory import check_memory
from groupnorm.backends.torch.native import functional
from groupnorm.backends.torch.process_groups import replicas_of
from groupnorm.distributed.axis_names import bound
from groupnorm.distributed.replicas import Replicas, over_all
from groupnorm.dtypes import small_float
from groupnorm.errors import ArgumentStateError, ArgumentTypeError, ArgumentValueError
from groupnorm.parameters import ParamStore
from groupnorm.portable.group_norm import group_norm, group_norm_vjp
from groupnorm.portable.inputs import HOST_MASKS, host_mask

__all__ = ["TorchAdapter", "torch_adapter"]

_LAZY = (torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer)
# The dtypes that PyTorch promotes. It only converts others, such as float8.
_NAMES = (
    "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 "
    "float16 bfloat16 float32 float64 complex64 complex128"
)
_DTYPES = frozenset(getattr(torch, name) for name in _NAMES.split())


class TorchAdapter(Adapter):
    """Tensors, their subclasses and `torch.nn.Parameter`."""

    label = "PyTorch"
    array_name = "PyTorch tensors"
    name = "torch"
    has_sharded_arrays = True

    def is_array(self, x: object) -> bool:
        """Whether x is a tensor, or stands for one in torch.fx's tracing."""
        return isinstance(x, torch.Tensor | torch.fx.Proxy)

    def admit(self, x: Any, argument: str = "x") -> Any:
        """Reject tensors without one number for each element, or whose memory was freed.

        Zero tensors, which cannot be written to, become ordinary ones. An x with gaps is copied in
        the order of its memory, so that a part of a channels-last tensor stays channels-last.
        """
        if isinstance(x, torch.fx.Proxy):
            raise ArgumentTypeError(
                f"{argument} is a torch.fx.Proxy, without values: torch.fx records calls of layers "
                "and of group_norm whose x is one, nothing else. Call one of them."
            )
        if isinstance(x, _LAZY):
            raise ArgumentTypeError(
                f"{argument} is a {type(x).__name__}, which has no shape yet: initialize it first, "
                "by a first call of the module that it belongs to."
            )
        if x.is_nested:
            raise ArgumentTypeError(
                f"{argument} is a nested tensor, whose parts have different lengths: pass "
                "torch.nested.to_padded_tensor(..., 0.0), and mask= for its valid elements."
            )
        if x.layout is not torch.strided:
            raise ArgumentTypeError(
                f"{argument} has the layout {x.layout}, not torch.strided: pass "
                f"{argument}.to_dense()."
            )
        if x.dtype not in _DTYPES and not str(x.dtype).startswith("torch.float8"):
            how = "a tensor of numbers, such as one of torch.float32"  # there is no conversion
            if x.is_quantized:
                how = f"{argument}.dequantize()"
            elif x.is_complex():
                how = f"{argument}.to(torch.complex64)"
            raise ArgumentTypeError(
                f"{argument} has dtype {x.dtype}, in which PyTorch does not compute: pass {how}."
            )
        if type(x).__name__ == "MaskedTensor":
            raise ArgumentTypeError(
                f"{argument} is a MaskedTensor: its mask would be ignored. Pass "
                f"{argument}.get_data(), and mask={argument}.get_mask()."
            )
        if torch.compiler.is_compiling():
            return x
        if not has_memory(x):
            return x.clone() if is_zero_tensor(x) else x
        check_memory(x, argument)
        if argument == "x" and not x.is_contiguous() and memory_order(x.shape, x.stride()) is None:
            return x.clone()
        return x

    def check_together(self, x: Any, other: Any, argument: str) -> None:
        """Check the devices, and that fake tensors meet real ones only if their mode allows it."""
        super().check_together(x, other, argument)
        for fake, real in ((x, other), (other, x)):
            mode = fake_mode(fake)
            if mode is not None and fake_mode(real) is None and not mode.allow_non_fake_inputs:
                kinds = ("a real", "a fake") if fake is x else ("a fake", "a real")
                raise ArgumentTypeError(
                    f"{argument} is {kinds[0]} tensor and x {kinds[1]} one: create both within "
                    "the FakeTensorMode, convert one by mode.from_tensor(...), or create the mode "
                    "with allow_non_fake_inputs=True."
                )

    def is_sharded(self, x: Any) -> bool:
        """Whether x is a DTensor."""
        return not isinstance(x, torch.fx.Proxy) and super().is_sharded(x)

    def planning(self, shape: tuple[int, ...]) -> Planning:
        """Keep sizes symbolic while compiling."""
        if torch.compiler.is_compiling() or any(isinstance(n, torch.SymInt) for n in shape):
            # Blocks are valid for a range of sizes only; an exported program is for all sizes.
            # Nor can inductor compile what a merged axis makes of sizes such as height - 4.
            keep = is_exporting()
            return Planning(static=False, blocked_sums=not keep, merge_axes=not keep)
        if any(isinstance(n, torch.Tensor) for n in shape):
            # torch.jit.trace records sizes as tensors, and keeps what is decided by their values.
            if any(int(n) == 0 for n in shape):
                raise ArgumentValueError(
                    "x has no elements, and torch.jit.trace would record a program for such "
                    "inputs only: trace it with an example that has elements."
                )
            return Planning(static=False, blocked_sums=False)
        return Planning()

    def place(self, x: Any, device: Any) -> Any:
        """Move a tensor."""
        try:
            return x if device is None else x.to(device=device)
        except (RuntimeError, AssertionError, TypeError, ValueError) as error:
            raise ArgumentValueError(
                f"device={device!r} is not a device that PyTorch can use here "
                f"({str(error).partition(chr(10))[0]}): choose from "
                f"{', '.join(self.devices())}, or 'meta'."
            ) from error

    def detach(self, x: Any) -> Any:
        """Detach from the autograd graph."""
        return x.detach()

    def value_if_ready(self, x: Any) -> bool | None:
        """Return the value, or None while compiling, under torch.func, or on an accelerator."""
        if torch.compiler.is_compiling() or x.device.type != "cpu" or not has_memory(x):
            return None
        if is_traced():  # the decision would be kept for all values
            return None
        return bool(x)

    def from_host(self, value: "np.ndarray[Any, Any]", like: Any = None) -> Any:
        """Copy a NumPy array; reinterpret its bits if NumPy and PyTorch share no dtype."""
        device = None if like is None else like.device
        if torch.compiler.is_compiling():  # it cannot trace the code below
            return torch.as_tensor(value, device=device)
        dtype, value = self.dtype(value.dtype.name), as_native_contiguous(value)
        # Of ml_dtypes, some are of no kind, and others are floats.
        if value.dtype.kind != "V" and not value.dtype.name.startswith("float8"):
            return torch.tensor(value, dtype=dtype, device=device)
        bits = value.view(np.int16 if value.dtype.itemsize == 2 else np.uint8)
        return torch.tensor(bits, device=device).view(dtype)

    def admit_host(self, x: "np.ndarray[Any, Any]", argument: str) -> Any:
        """Check a NumPy array; the compiler takes it for a tensor, and does not show its dtype."""
        return admit_host_array(x, argument, traced=torch.compiler.is_compiling())

    def mask_from_host(self, mask: Any, check: Any, like: Any) -> Any:
        """Check and copy a mask; in a compiled program a list is a constant, an array an input."""
        if not torch.compiler.is_compiling():
            return super().mask_from_host(mask, check, like)
        if isinstance(mask, np.ndarray):
            return torch.as_tensor(self.admit_host(mask, "mask"), device=like.device)
        return torch.tensor(_booleans(mask), device=like.device)

    def to_host(self, x: Any) -> "np.ndarray[Any, Any]":
        """Copy to the host; reinterpret bits if NumPy and PyTorch share no dtype."""
        if x.is_meta:
            raise ArgumentStateError(
                f"a tensor of shape {tuple(x.shape)} is on the meta device and has no values to "
                "copy: call to_empty(device=...) and reset_parameters() first."
            )
        if self.sharded_call(x) is not None:
            raise ArgumentTypeError(
                f"a tensor of shape {tuple(x.shape)} is a DTensor, and only a part of it is here: "
                "take x.full_tensor() on all ranks, or use torch.distributed.checkpoint."
            )
        x = x.detach().cpu().resolve_conj().resolve_neg()
        name = str(x.dtype).removeprefix("torch.")
        if not name.startswith(("bfloat", "float8")):
            return np.array(x.numpy())
        bits = x.contiguous().view(torch.int16 if x.dtype.itemsize == 2 else torch.uint8)
        return np.array(bits.numpy()).view(small_float(name))

    def default_float(self) -> Any:
        """Return the dtype set by `torch.set_default_dtype`."""
        return torch.get_default_dtype()

    def default_param_dtype(self) -> str:
        """Return the dtype set by `torch.set_default_dtype`, as torch's own layers use."""
        return str(torch.get_default_dtype()).removeprefix("torch.")

    def result_type(self, *dtypes: Any) -> Any:
        """Promote dtypes, with a function that the compiler can trace.

        float8, which PyTorch does not promote, counts as float32 next to others.
        """
        if all(d == dtypes[0] for d in dtypes):
            return dtypes[0]
        known = (d if d in _DTYPES else torch.float32 for d in dtypes)
        return reduce(torch.promote_types, known)

    @property
    def overwrites(self) -> bool:
        """Not where a mode may keep what operations return, as selective checkpointing does."""
        return torch.compiler.is_compiling() or not has_modes()

    def erfc(self, x: Any) -> Any:
        """1 - erf(x); None for ONNX, which has no such operator."""
        if is_traced() and torch.onnx.is_in_onnx_export():
            return None
        return torch.special.erfc(x)

    def sum_of_product(self, factors: tuple[Any, ...], axis: int) -> Any:
        """Sum in the order of memory: in another, PyTorch takes up to 50 times as long."""
        x = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        if torch.compiler.is_compiling() or not has_memory(x) or x.is_contiguous():
            return x.sum(axis, keepdim=True)
        strides = x.stride()
        order = sorted(range(x.ndim), key=lambda a: -strides[a])
        inverse = [order.index(a) for a in range(x.ndim)]
        return x.permute(order).sum(order.index(axis), keepdim=True).permute(inverse)

    def complex_from(self, real: Any, imaginary: Any) -> Any:
        """Combine two real tensors into a complex one."""
        return torch.complex(real, imaginary)

    def replicas(self, axis_name: Any) -> Replicas:
        """Return the ranks of one or several process groups or one-dimensional meshes."""
        return over_all([replicas_of(communicator) for communicator in bound(axis_name)])

    def sharded_call(self, x: Any) -> Any:
        """Return `over_shards` for a DTensor, `record_call` for torch.fx, otherwise None."""
        if type(x) is torch.Tensor:
            return None
        if isinstance(x, torch.fx.Proxy):
            from groupnorm.backends.torch.fx import record_call

            return record_call
        # A DTensor's module is already imported; importing it takes a while.
        module = sys.modules.get("torch.distributed.tensor")
        if module is None or not isinstance(x, module.DTensor):
            return None
        from groupnorm.backends.torch.dtensor import over_shards

        return over_shards

    def sharded_like(self, value: Any, like: Any) -> Any:
        """Return a tensor, the same on all ranks, sharded as a DTensor is; as it is for others."""
        if self.sharded_call(like) is None:
            return value
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, like.device_mesh, like.placements)

    def load_kernels(self) -> Kernels:
        """Return the kernels, for eager and compiled calls."""
        from groupnorm.backends.torch.kernels import TorchKernels

        return TorchKernels(self, _traced)

    def run(self, compute: Any, *arguments: Any) -> Any:
        """Call a function of the portable implementation; `group_norm` as one for autograd."""
        if is_traced():
            # It warns of each check of an argument, which holds for the example only. The program
            # is right for other sizes as well.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
                return self._run(compute, *arguments)
        return self._run(compute, *arguments)

    def _run(self, compute: Any, *arguments: Any) -> Any:
        mode = fake_mode(arguments[0])  # of x
        if mode is not None:
            with mode:  # which makes what the computation creates fake as well
                return compute(self, *arguments)
        if torch.compiler.is_compiling() and compute in (group_norm, group_norm_vjp):
            x, scale, bias, *others = arguments
            return compute(self, x, *_as_tensors(self, (scale, bias), x), *others)
        if compute is not group_norm:
            return compute(self, *arguments)
        return portable(self, *arguments)

    def native(self, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions) -> Any:
        """Compute with `torch.nn.functional.group_norm`."""
        for argument, a in (("x", x), ("scale", scale), ("bias", bias)):
            if isinstance(a, torch.Tensor):
                self.admit(a, argument)
                self.check_together(x, a, argument)
        return functional(x, scale, bias, mask, options)

    def onnx_translations(self) -> dict[Any, Any]:
        """Return the translations of `groupnorm.onnx.translation_table`."""
        from groupnorm.backends.torch.onnx_export import translations

        return translations()

    @property
    def sees_callers(self) -> bool:
        """Whether no compiled program is traced."""
        return not torch.compiler.is_compiling()

    def param_store(self, param_type: Any) -> ParamStore:
        """Return how a layer with a `param_type`, by default `torch.nn.Parameter`, holds them."""
        return super().param_store(param_type or torch.nn.Parameter)

    def devices(self) -> tuple[str, ...]:
        """Return the names of the CPU and the accelerators."""
        found = ["cpu"]
        kind = torch.accelerator.current_accelerator(check_available=True)
        if kind is not None:
            found += [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
        return tuple(found)


def _booleans(mask: Any) -> Any:
    """Check a number or a list of them, and convert it to booleans; the compiler traces this."""
    if isinstance(mask, list | tuple):
        parts = [_booleans(part) for part in mask]
        if any(_shape(part) != _shape(parts[0]) for part in parts):
            host_mask(mask)  # raises
        return parts
    if mask == 0:
        return False
    if mask == 1:
        return True
    host_mask(mask)  # raises
    return mask


def _shape(nested: Any) -> tuple[int, ...]:
    if not isinstance(nested, list):
        return ()
    return (len(nested), *_shape(nested[0])) if nested else (0,)


def _traced(
    adapter: Any, x: Any, scale: Any, bias: Any, mask: Any, options: CallOptions
) -> Any:  # fmt: skip
    if isinstance(mask, HOST_MASKS):
        mask = adapter.mask_from_host(mask, host_mask, x)
    scale, bias = _as_tensors(adapter, (scale, bias), x)
    # Imported here, since registering operators takes a while.
    if is_exporting_to_onnx():
        from groupnorm.backends.torch.onnx_export import exported

        return exported(adapter, x, scale, bias, mask, options)
    from groupnorm.backends.torch.custom_op import traced

    return traced(adapter, x, scale, bias, mask, options)


def _as_tensors(adapter: Any, parameters: tuple[Any, Any], x: Any) -> tuple[Any, Any]:
    """Convert scale and bias that are NumPy arrays, which the compiler takes for tensors."""
    scale, bias = parameters
    if isinstance(scale, np.ndarray):
        scale = adapter.from_host(adapter.admit_host(scale, "scale"), x)
    if isinstance(bias, np.ndarray):
        bias = adapter.from_host(adapter.admit_host(bias, "bias"), x)
    return scale, bias


torch_adapter = TorchAdapter(xp)
