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
    "apply_without_transforms",
    "assume_constant",
    "has_modes",
    "in_forward_mode",
    "is_exporting",
    "is_seen_through",
    "is_transformed",
    "is_wrapped",
    "missing",
]

# Looked up one by one, so that a test can delete each in turn.
PRIVATE_NAMES = (
    "torch._C._functorch.is_functorch_wrapped_tensor",
    "torch._C._functorch.peek_interpreter_stack",
    "torch._C._len_torch_dispatch_stack",
    "torch._C._get_tracing_state",
    "torch.autograd.forward_ad._current_level",
    "torch.compiler._is_exporting_flag",
)


def _always(*_: Any) -> bool:
    return True


def _found(name: str) -> Any:
    """Return the object with this dotted name, or None."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part, None)
    return found


missing: tuple[str, ...] = tuple(name for name in PRIVATE_NAMES if _found(name) is None)

#: Whether a tensor belongs to a torch.func transform and has no values.
is_wrapped: Callable[[Any], bool] = _found(PRIVATE_NAMES[0]) or _always
_peek: Callable[[], Any] = _found(PRIVATE_NAMES[1]) or _always
_modes: Callable[[], int] = _found(PRIVATE_NAMES[2]) or _always
_tracing_state: Callable[[], Any] = _found(PRIVATE_NAMES[3]) or _always
# The module, since the value of its `_current_level` changes.
_forward_ad: Any = importlib.import_module("torch.autograd.forward_ad")
if _found(PRIVATE_NAMES[4]) is None:
    _forward_ad = SimpleNamespace(_current_level=0)
# Likewise. Before version 2.12, torch.compile takes `torch.compiler.is_exporting()` for the
# constant True, also in programs that are not exported; it reads this flag as it is.
_compiler: Any = torch.compiler
if _found(PRIVATE_NAMES[5]) is None:
    _compiler = SimpleNamespace(_is_exporting_flag=True)


def is_exporting() -> bool:
    """Whether torch.export traces the program, which then must hold portable code only."""
    return bool(_compiler._is_exporting_flag)


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is active; torch.compile guards on it."""
    return bool(_forward_ad._current_level >= 0)


def is_transformed() -> bool:
    """Whether one of torch.func's transforms is active."""
    return _peek() is not None


def has_modes() -> bool:
    """Whether a dispatch mode is active, such as one that traces or counts operations."""
    return _modes() > 0


def is_seen_through() -> bool:
    """Whether a tracer, forward mode or a dispatch mode must see the individual operations."""
    return _forward_ad._current_level >= 0 or _modes() > 0 or _tracing_state() is not None


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
