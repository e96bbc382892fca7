"""PyTorch: tensors, statistics over process groups and of DTensors, kernels in autograd."""

from groupnorm.backends.torch.layer import TorchGroupNorm, TorchNativeGroupNorm
from groupnorm.backends.torch.process_groups import sum_gradients

__all__ = ["TorchGroupNorm", "TorchNativeGroupNorm", "sum_gradients"]
