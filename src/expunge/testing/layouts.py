"""Tiny random pipelines of every covered layout beside SD: real library classes, nothing downloaded.

They draw nothing meaningful.  They are for mechanics: names and shapes of layers, rows of texts, identities.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..models.diffusion import DiffusionModel
from .diffusion import LENGTH, WIDTH, WORDS, tiny_tokenizer

__all__ = ["TINY_LAYOUTS", "tiny_layout"]

INSTRUCTION_WORDS = ("User", "Prompt:", "Enhanced", "prompts")
FLOW = {"shift": 3.0, "num_train_timesteps": 1000}


def _word_tokenizer(template: str, kind: str) -> Any:
    """A tokenizer of whole words behind a space mark, as T5 (``$A </s>``) or Gemma (``<bos> $A``) has them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "<bos>"]
    words = ["▁", *(f"▁{word}" for word in (*WORDS, *INSTRUCTION_WORDS))]
    vocabulary = {token: index for index, token in enumerate([*special, *words])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    core.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(t, vocabulary[t]) for t in special[1::2]]
    )
    bos = {"bos_token": "<bos>"} if kind == "gemma" else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=512, padding_side="right", **bos,
    )  # fmt: skip


def _clip(projected: bool, pad: str | None = None) -> tuple[Any, Any]:
    """A CLIP text tower and its tokenizer; ``pad`` is another padding token than the end."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = tiny_tokenizer()
    if pad is not None:
        tokenizer.pad_token = pad
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config), tokenizer


def _t5(width: int) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel

    tokenizer = _word_tokenizer("$A </s>", "t5")
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        relative_attention_num_buckets=8, feed_forward_proj="gated-gelu", pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config), tokenizer


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        **more,
    )  # fmt: skip


def _sdxl() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        cross_attention_dim=2 * WIDTH, attention_head_dim=(2, 4), norm_num_groups=8,
        use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
    )  # fmt: skip
    (one, tokenizer), (two, tokenizer_2) = _clip(False), _clip(True, pad="!")
    return StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=one, text_encoder_2=two, tokenizer=tokenizer, tokenizer_2=tokenizer_2, unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        add_watermarker=False,
    )  # fmt: skip


def _pixart(sample_size: int = 8) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=sample_size, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=6,
        in_channels=4, out_channels=8, cross_attention_dim=48, caption_channels=WIDTH,
    )  # fmt: skip
    encoder, tokenizer = _t5(WIDTH)
    return PixArtAlphaPipeline(
        tokenizer, encoder, _vae(), transformer, DPMSolverMultistepScheduler()
    )


def _sana() -> Any:
    from diffusers import (
        AutoencoderDC,
        DPMSolverMultistepScheduler,
        SanaPipeline,
        SanaTransformer2DModel,
    )
    from transformers import Gemma2Config, Gemma2Model

    tokenizer = _word_tokenizer("<bos> $A", "gemma")
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=tokenizer.bos_token_id,
        )
    )
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, scaling_factor=0.41407,
        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=4, attention_head_dim=8,
        num_cross_attention_heads=4, cross_attention_head_dim=8, cross_attention_dim=32,
        caption_channels=WIDTH, sample_size=16,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(tokenizer, encoder, vae, transformer, scheduler)


def _sd3() -> Any:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    wide = 2 * WIDTH + 16  # wider than both CLIPs together, so that their rows are padded
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=wide,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    (one, tokenizer), (two, tokenizer_2), (three, tokenizer_3) = (
        _clip(True), _clip(True, pad="!"), _t5(wide),
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(**FLOW),
        vae=_vae(shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=one, tokenizer=tokenizer, text_encoder_2=two, tokenizer_2=tokenizer_2,
        text_encoder_3=three, tokenizer_3=tokenizer_3,
    )  # fmt: skip


def _flux(guidance_embeds: bool = True) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    (one, tokenizer), (two, tokenizer_2) = _clip(False), _t5(WIDTH)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **FLOW),
        vae=_vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=one, tokenizer=tokenizer, text_encoder_2=two, tokenizer_2=tokenizer_2,
        transformer=transformer,
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return pipeline


MAKERS: dict[str, Callable[..., Any]] = {
    "sdxl": _sdxl, "pixart": _pixart, "sana": _sana, "sd3": _sd3, "flux": _flux,
}  # fmt: skip
TINY_LAYOUTS = tuple(MAKERS)


def tiny_layout(name: str, seed: int = 0, **options: Any) -> DiffusionModel:
    """A random model of a layout with 4 default steps.

    Args:
        name: ``sdxl``, ``pixart``, ``sana``, ``sd3`` or ``flux``.
        seed: Another seed gives other weights.
        options: ``sample_size`` of PixArt, ``guidance_embeds`` of Flux.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = MAKERS[name](**options)
    pipeline.set_progress_bar_config(disable=True)
    return DiffusionModel(pipeline, f"tiny-{name}", steps=4, guidance=3.0)
