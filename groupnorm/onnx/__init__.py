"""Accurate group normalization in ONNX models: `layer.to_onnx`, and models of PyTorch."""

from collections.abc import Callable
from typing import Any

from groupnorm.dispatch import adapter_named

__all__ = ["translation_table"]


def translation_table() -> dict[Any, Callable[..., Any]]:
    """Return the translations with which PyTorch exports group norms accurately.

    Every `torch.nn.GroupNorm` and `torch.nn.functional.group_norm`, and every layer and call of
    this package, becomes about twenty nodes of basic operators. They subtract the mean twice, so
    that results are as accurate as those of this package, where PyTorch's own export loses digits.
    A call with a mask or with `axis_name`, or of another dtype than float16, bfloat16, float32 and
    float64, is exported as without the table.

    Returns
    -------
    dict
        For ``torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())``,
        at opset 18 or higher. To add translations, update it.

    Raises
    ------
    groupnorm.errors.BackendImportError
        If PyTorch or onnxscript cannot be imported.

    References
    ----------
    .. [1] T. F. Chan, G. H. Golub and R. J. LeVeque, "Algorithms for Computing the Sample
       Variance", The American Statistician 37(3), 1983, https://doi.org/10.2307/2683386

    Examples
    --------
    >>> import torch
    >>> from groupnorm.onnx import translation_table
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8)).eval()
    >>> program = torch.onnx.export(
    ...     model, (torch.ones(1, 3, 9, 9),), dynamo=True, verbose=False,
    ...     custom_translation_table=translation_table(),
    ... )
    >>> len(program.model_proto.graph.node)
    18
    """
    adapter: Any = adapter_named("torch")
    table: dict[Any, Callable[..., Any]] = adapter.onnx_translations()
    return table
