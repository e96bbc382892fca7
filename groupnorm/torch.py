"""Have the group normalizations of existing PyTorch models computed by this library."""

try:
    from groupnorm.backends.torch.fusion import fused, register_fusion
    from groupnorm.backends.torch.override import override
    from groupnorm.backends.torch.process_groups import sum_gradients
    from groupnorm.backends.torch.replacement import (
        Replacement,
        register_replacement,
        replace,
        restore,
    )
    from groupnorm.backends.torch.report import Entry, Report
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    from groupnorm.errors import BackendImportError

    raise BackendImportError(
        "groupnorm.torch needs PyTorch, which cannot be imported: install it with "
        'pip install "groupnorm[torch]".'
    ) from error

__all__ = [
    "Entry",
    "Replacement",
    "Report",
    "fused",
    "override",
    "register_fusion",
    "register_replacement",
    "replace",
    "restore",
    "sum_gradients",
]
