"""The models of `replace_in_diffusers.py`: published architectures with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torchvision_stub import import_timm

__all__ = ["MODELS", "Case"]


class Case(NamedTuple):
    """A model, and what it is called with.

    `make` and `inputs` take the number by which channels and sizes are divided: 1 for a realistic
    model, more for a quick one. `is_compiled` is true for one model of each package, since a
    compilation takes a minute or more.
    """

    package: str
    title: str
    make: Callable[[int], nn.Module]
    inputs: Callable[[int], tuple[torch.Tensor, ...]]
    call: Callable[..., torch.Tensor]
    is_compiled: bool = False


def random_normalizations(model: nn.Module) -> nn.Module:
    """Give normalizations a random scale and bias, as they have after training."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return model


def unet(norm: str) -> Callable[[int], nn.Module]:
    def make(divide: int) -> nn.Module:
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel(
            sample_size=64 // divide,
            block_out_channels=tuple(c // divide for c in (64, 128, 256)),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1, cross_attention_dim=256, attention_head_dim=8,
            norm_num_groups=32 // divide, resnet_time_scale_shift=norm,
        )  # fmt: skip

    return make


def vae(divide: int) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=tuple(c // divide for c in (64, 128, 128)),
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4, norm_num_groups=32 // divide,
    )  # fmt: skip


def wav2vec2(divide: int) -> nn.Module:
    from transformers import Wav2Vec2Config
    from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2FeatureEncoder

    return Wav2Vec2FeatureEncoder(Wav2Vec2Config(conv_dim=(512 // divide,) * 7))


def timm_model(name: str) -> Callable[[int], nn.Module]:
    return lambda divide: import_timm().create_model(name, pretrained=False)


def images(size: int, channels: int = 3) -> Callable[[int], tuple[torch.Tensor, ...]]:
    return lambda divide: (torch.randn(2, channels, size // divide, size // divide),)


def latents_and_text(divide: int) -> tuple[torch.Tensor, ...]:
    size = 64 // divide
    return torch.randn(2, 4, size, size), torch.tensor([10, 700]), torch.randn(2, 77, 256)


def first(model: nn.Module, *inputs: Any) -> torch.Tensor:
    return model(*inputs, return_dict=False)[0]


def plain(model: nn.Module, *inputs: Any) -> torch.Tensor:
    return model(*inputs)


MODELS = (
    Case("diffusers", "UNet2DConditionModel", unet("default"), latents_and_text, first),
    Case("diffusers", "the same, scale_shift", unet("scale_shift"), latents_and_text, first),
    Case("diffusers", "AutoencoderKL", vae, images(128), first, True),
    Case(
        "transformers",
        "Wav2Vec2 features",
        wav2vec2,
        lambda n: (torch.randn(2, 32000 // n),),
        plain,
        True,
    ),
    Case("timm", "resnetv2_50d_gn", timm_model("resnetv2_50d_gn"), images(160), plain, True),
    Case("timm", "efficientnet_b0_gn", timm_model("efficientnet_b0_gn"), images(160), plain),
    Case("timm", "poolformerv2_s12", timm_model("poolformerv2_s12"), images(160), plain),
)
