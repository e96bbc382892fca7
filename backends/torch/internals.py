"""Every private name of PyTorch that this package uses, each with a default.

PyTorch has no public function for these checks, and may rename a private one in any release. Every
default means "portable": without the name no kernel is used, and results stay correct. `missing`
lists the names that this PyTorch does not have; a test fails if there are any in the pinned
version.
"""

import importlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

__all__ = [
    "PRIVATE_NAMES",
    "SPECIAL_KEYS",
    "apply_without_transforms",
    "assume_constant",
    "current_stream",
    "dispatch_keys",
    "fake_mode",
    "has_hooks",
    "has_memory",
    "has_modes",
    "in_forward_mode",
    "is_exporting",
    "is_exporting_to_onnx",
    "is_seen_through",
    "is_traced",
    "is_transformed",
    "is_zero_tensor",
    "missing",
]

# Looked up one by one, so that a test can delete each in turn.
PRIVATE_NAMES = (
    "torch._C._dispatch_keys",
    "torch._C.DispatchKeySet",
    "torch._C.DispatchKey",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_tracing_state",
    "torch.autograd.forward_ad._current_level",
    "torch.compiler._is_exporting_flag",
    "torch.nn.modules.module._has_any_global_hook",
)


def _always(*_: Any) -> bool:
    return True


class _Unknown:
    """Stands for the dispatch keys of any tensor."""

    def __init__(self, a: Any) -> None:
        pass

    def raw_repr(self) -> int:
        """Return all keys."""
        return -1


def _found(name: str) -> Any:
    """Return the object with this dotted name, or None."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


missing: tuple[str, ...] = tuple(name for name in PRIVATE_NAMES if _found(name) is None)

dispatch_keys: Any = _found(PRIVATE_NAMES[0])
if dispatch_keys is None:
    dispatch_keys = _Unknown
_key_set: Any = _found(PRIVATE_NAMES[1])
_key: Any = _found(PRIVATE_NAMES[2])
_peek: Callable[[], Any] = _found(PRIVATE_NAMES[3]) or _always
_modes: Callable[[], int] = _found(PRIVATE_NAMES[4]) or _always
_tracing_state: Callable[[], Any] = _found(PRIVATE_NAMES[5]) or _always
# The module, since the value of its `_current_level` changes.
_forward_ad: Any = importlib.import_module("torch.autograd.forward_ad")
if _found(PRIVATE_NAMES[6]) is None:
    _forward_ad = SimpleNamespace(_current_level=0)
# Likewise. Before version 2.12, torch.compile takes `torch.compiler.is_exporting()` for the
# constant True, also in programs that are not exported; it reads this flag as it is.
_compiler: Any = torch.compiler
if _found(PRIVATE_NAMES[7]) is None:
    _compiler = SimpleNamespace(_is_exporting_flag=True)


_global_hooks: Callable[[], Any] = _found(PRIVATE_NAMES[8]) or _always


def is_exporting() -> bool:
    """Whether torch.export traces the program, which then must hold portable code only."""
    return bool(_compiler._is_exporting_flag)


def is_exporting_to_onnx() -> bool:
    """Whether torch.export traces the program for torch.onnx.export."""
    return is_exporting() and torch.onnx.is_in_onnx_export()


def _bits(*names: str) -> int:
    """Return the dispatch keys with these names, as PyTorch numbers them; 0 if there are none."""
    found = 0
    if dispatch_keys is not _Unknown and _key_set is not None and _key is not None:
        for name in names:
            found |= _key_set(getattr(_key, name)).raw_repr()
    return found


# The dispatch keys that tensors in memory have. Every other kind adds one of its own: batched,
# fake, zero, sparse, quantized, nested and meta tensors, other devices', and subclasses that
# compute for themselves. So a kind that is not known here, such as one of a later release, is not
# taken for memory.
_ORDINARY = _bits("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU",
                  "AutocastCUDA")  # fmt: skip
#: A tensor's values are those in its memory if it has none of these keys.
SPECIAL_KEYS = ~_ORDINARY if _ORDINARY else -1
# These have memory, but not its values: negative and conjugate views.
_WITHOUT_MEMORY = ~(_ORDINARY | _bits("Negative", "Conjugate")) if _ORDINARY else -1
_ZERO = _bits("ZeroTensor")


def is_zero_tensor(a: torch.Tensor) -> bool:
    """Whether a tensor is all zeros without memory, as automatic differentiation makes them."""
    return bool(dispatch_keys(a).raw_repr() & _ZERO)


def has_memory(a: torch.Tensor) -> bool:
    """Whether a tensor is a strided one in memory, on a CPU or a CUDA device."""
    return not dispatch_keys(a).raw_repr() & _WITHOUT_MEMORY


def fake_mode(a: Any) -> Any:
    """Return the mode of a fake tensor, which has shape and dtype only; None for others."""
    if type(a) is torch.Tensor or torch.compiler.is_compiling():
        return None
    return getattr(a, "fake_mode", None) if isinstance(a, torch.Tensor) else None


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active; torch.compile guards on it."""
    return bool(_forward_ad._current_level >= 0)


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is active."""
    return _peek() is not None


def has_modes() -> bool:
    """Whether a dispatch mode is active, such as one that traces or counts operations."""
    return _modes() > 0


def is_traced() -> bool:
    """Whether `torch.jit.trace` records operations."""
    return _tracing_state() is not None


def is_seen_through() -> bool:
    """Whether a tracer, forward mode or a dispatch mode must see the individual operations."""
    return _forward_ad._current_level >= 0 or _modes() > 0 or _tracing_state() is not None


def _current_stream(device: int) -> int:
    found: int = torch.cuda.current_stream(device).cuda_stream
    return found


#: Return the address of a CUDA device's current stream; the private function is 20 times as fast.
#: Not among the names above: builds of PyTorch without CUDA never have it.
current_stream: Callable[[int], int] = (
    getattr(torch._C, "_cuda_getCurrentRawStream", None) or _current_stream
)


def has_hooks(module: Any) -> bool:
    """Whether calling a module calls more than its class's forward: hooks, or another forward.

    Hooks are the module's or those of all modules; packages such as accelerate set ``forward``.
    """
    own = module.__dict__
    # Without a loop, which would take as long as a small call.
    return bool(
        own.get("_forward_hooks", True)
        or own.get("_forward_pre_hooks", True)
        or own.get("_backward_hooks", True)
        or own.get("_backward_pre_hooks", True)
        or "forward" in own
        or _global_hooks()
    )


def apply_without_transforms(function: Any) -> Any:
    """Return ``function.apply`` without its handling of torch.func, which costs microseconds."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def assume_constant(function: Any) -> Any:
    """Mark a function whose result torch.compile keeps instead of tracing it.

    `torch.compiler.assume_constant_result` does the same but imports the compiler, which takes a
    second, also for users who do not compile. If the mark is ignored, the function is traced.
    """
    function._dynamo_marked_constant = True
    return function
