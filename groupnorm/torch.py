"""Have the group normalizations of existing PyTorch models computed by this library."""

from groupnorm.errors import needs

with needs("torch", "groupnorm.torch"):
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
