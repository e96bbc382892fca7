"""Small models of published packages, with random weights."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from tests import ROOT

sys.path.insert(0, str(ROOT / "examples"))
try:
    from replace_in_diffusers_models import random_normalizations
    from torchvision_stub import import_timm
finally:
    sys.path.pop(0)

REASON = "{} is not installed: `nox -s models` has it"


def package(name: str) -> Any:
    return pytest.importorskip(name, reason=REASON.format(name))


class Model(NamedTuple):
    """A model, what it is called with, and what `replace` must find in it.

    Attributes
    ----------
    make, inputs, call
        Functions that return the model, its inputs, and its result for inputs.
    replaced, fused
        The numbers of modules in `replace`'s report.
    images
        Whether its first input is one: then it has a channels_last memory format.
    save
        Whether it has save_pretrained.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[np.random.Generator], tuple[torch.Tensor, ...]]
    call: Callable[..., torch.Tensor]
    replaced: int
    fused: int
    images: bool = True
    save: bool = False


def normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def images(size: int) -> Callable[[np.random.Generator], tuple[torch.Tensor, ...]]:
    return lambda rng: (normal(rng, 2, 3, size, size),)


def first(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return model(*inputs, return_dict=False)[0]


def plain(model: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
    return model(*inputs)


def unet(time_embedding_norm: str) -> nn.Module:
    return package("diffusers").UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8,
        attention_head_dim=4, resnet_time_scale_shift=time_embedding_norm,
    )  # fmt: skip


def latents(rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    return normal(rng, 2, 4, 8, 8), torch.tensor([10, 700]), normal(rng, 2, 5, 8)


def vae() -> nn.Module:
    return package("diffusers").AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip


def wav2vec2() -> nn.Module:
    package("transformers")
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        feat_extract_norm="group", num_feat_extract_layers=3, conv_dim=(16,) * 3,
        conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2, num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0,
    )  # fmt: skip
    return Wav2Vec2Model(config)


def timm() -> Any:
    """The package, which is imported with a stand-in for torchvision."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip(REASON.format("timm"))
    return import_timm()


def efficientnet() -> nn.Module:
    return timm().create_model("test_efficientnet_gn", pretrained=False)


def resnetv2() -> nn.Module:
    timm()
    from timm.layers import GroupNormAct
    from timm.models.resnetv2 import ResNetV2

    norm = functools.partial(GroupNormAct, num_groups=8)
    return ResNetV2((1, 1), (32, 64), stem_chs=32, stem_type="deep", norm_layer=norm, num_classes=3)


def poolformer() -> nn.Module:
    timm()
    from timm.models.metaformer import GroupNorm1NoBias, MetaFormer, Pooling

    return MetaFormer(
        depths=(1, 1), dims=(8, 16), token_mixers=Pooling, norm_layers=GroupNorm1NoBias,
        mlp_act=nn.GELU, num_classes=3,
    )  # fmt: skip


MODELS = {
    "UNet": Model(lambda: unet("default"), latents, first, 21, 8, save=True),
    "UNet, scale_shift": Model(lambda: unet("scale_shift"), latents, first, 21, 8, save=True),
    "VAE": Model(vae, images(16), first, 24, 10, save=True),
    "Wav2Vec2": Model(
        wav2vec2, lambda rng: (normal(rng, 2, 400),), first, 1, 1, images=False, save=True
    ),
    "efficientnet": Model(efficientnet, images(32), plain, 13, 0),
    "resnetv2": Model(resnetv2, images(32), plain, 9, 0),
    "poolformer": Model(poolformer, images(32), plain, 4, 0),
}


def built(name: str) -> nn.Module:
    """A model in eval mode; its normalizations have random parameters, as after training."""
    torch.manual_seed(0)
    return random_normalizations(MODELS[name].make().eval())
