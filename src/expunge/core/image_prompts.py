"""Pictures as a second prompt: decoupled cross-attention in front of a frozen denoiser (IP-Adapter).

A picture becomes a few tokens, and every cross-attention of the denoiser attends to them with keys and values of
their own, beside the text (arXiv 2308.06721):

    q = LayerNorm( W e )                                      e the picture's embedding, q (tokens, width)
    Z = attn(Q, K_text, V_text) + lambda attn(Q, q W'_k, q W'_v)        lambda a number of each row

Weights stand in the published layout: ``image_proj.*`` and ``ip_adapter.N.to_k_ip.weight``, ``to_v_ip``, where N =
1, 3, 5, ... goes through the cross-attention layers in the order of diffusers.  Sizes are read off the tensors.

    with prompts.attached(model):
        model.predict(x, t, with_image(condition, prompts.tokens(pictures)))

The tokens travel in ``Condition.extra``, row by row.  A row without them takes the text-only path exactly: no text
token is ever taken for an image token.  Nothing of the denoiser is replaced; hooks on the layers' own queries and
outputs do the work, so it goes together with whatever attention is installed, and gradients reach the denoiser's
parameters.  The branch's own parameters ask for none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError, MissingPart, ModelError, UnsupportedModel
from ..method import Control
from ..models.types import Condition
from .vision import Embed, vision_encoder

if TYPE_CHECKING:
    import numpy as np

    from ..models.diffusion import DiffusionModel

__all__ = [
    "SCALE", "TOKENS", "ImagePrompts", "cross_attentions", "refined", "text_only", "with_image",
]  # fmt: skip

TOKENS, SCALE = "image tokens", "image scale"
"""Names of the row-wise tensors in ``Condition.extra``: ``(n, tokens, width)`` and lambda, ``(n,)``."""


# -- conditions --------------------------------------------------------------------------------------


def with_image(condition: Condition, tokens: Tensor, scale: float = 1.0) -> Condition:
    """The condition with image tokens ``(n, tokens, width)``, or ``(1, ...)`` for all rows, at weight ``scale``."""
    rows = condition.rows
    if tokens.ndim != 3 or len(tokens) not in (1, rows):
        raise InputError(
            f"image tokens of shape {tuple(tokens.shape)} for {rows} rows; needed is ({rows}, tokens, width)"
        )
    weight = torch.full((rows,), float(scale), device=tokens.device)
    extra = {**condition.extra, TOKENS: tokens.expand(rows, -1, -1), SCALE: weight}
    return dataclasses.replace(condition, extra=extra)


def text_only(condition: Condition, like: Tensor) -> Condition:
    """The condition without a picture, in a form that can be put into a batch with rows that have one.

    Its rows have weight 0 and take the text-only path; ``like`` are tokens of the other rows.
    """
    return with_image(condition, torch.zeros_like(like[:1]), 0.0)


def refined(tokens: Tensor, text: Tensor) -> Tensor:
    """What text says of image tokens: ``softmax(q E^T / sqrt(width)) E``, each a mean of text rows.

    Args:
        tokens: ``q``, ``(n, tokens, width)``.
        text: ``E``, the concept's text rows, ``(length, width)`` or ``(n, length, width)``.

    Source: Co-Erasing, arXiv 2505.11131.
    """
    if text.shape[-1] != tokens.shape[-1]:
        raise InputError(
            f"image tokens of width {tokens.shape[-1]} cannot be refined by text rows of width {text.shape[-1]}"
        )
    weights = tokens @ text.transpose(-1, -2) / math.sqrt(tokens.shape[-1])
    return weights.softmax(-1) @ text


# -- the branch --------------------------------------------------------------------------------------


def cross_attentions(denoiser: nn.Module) -> list[nn.Module]:
    """The layers in which pictures attend to text, in the order of diffusers.

    Raises:
        UnsupportedModel: Text and picture attend jointly, or queries are normalised: no published branch fits.
    """
    names = [n.removesuffix(".processor") for n in getattr(denoiser, "attn_processors", {})]
    layers = [denoiser.get_submodule(name) for name in names]
    joint = any(getattr(layer, "add_q_proj", None) is not None for layer in layers)
    found = [layer for name, layer in zip(names, layers, strict=True) if name.endswith("attn2")]
    if joint or not found or any(getattr(layer, "norm_q", None) is not None for layer in found):
        raise UnsupportedModel(
            f"image prompts need cross-attention layers of their own for the text (UNets, PixArt, Sana); "
            f"{type(denoiser).__name__} has none that fit"
        )
    return found


class _Projection(nn.Module):
    """An embedding -> tokens."""

    def __init__(self, embedding: int, tokens: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(embedding, tokens * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, embeddings: Tensor) -> Tensor:
        width = self.norm.normalized_shape[0]
        return self.norm(self.proj(embeddings).unflatten(-1, (-1, width)))


class _KeysValues(nn.Module):
    """Keys and values of one layer."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(width, inner, bias=False)
        self.to_v_ip = nn.Linear(width, inner, bias=False)


class ImagePrompts(nn.Module):
    """An image-prompt branch; its state dict is the published file.

    Args:
        embedding: Width of a picture's embedding.
        tokens: Tokens of a picture.
        width: Width of a token, that of a text row.
        inner: Width of each cross-attention layer's keys, in order.
        encoder: Pictures -> embeddings; without one only embeddings can be turned into tokens.
    """

    def __init__(
        self,
        embedding: int,
        tokens: int,
        width: int,
        inner: list[int],
        encoder: Embed | None = None,
    ) -> None:
        super().__init__()
        self.image_proj = _Projection(embedding, tokens, width)
        self.ip_adapter = nn.ModuleDict(
            {str(2 * i + 1): _KeysValues(width, size) for i, size in enumerate(inner)}
        )
        self.encoder = encoder
        self.requires_grad_(False)

    # -- files ---------------------------------------------------------------------------------

    @classmethod
    def from_state(
        cls, state: Mapping[str, Tensor], encoder: Embed | None = None, where: str = "image prompts"
    ) -> ImagePrompts:
        """A branch from its tensors.

        Raises:
            ModelError: A tensor is missing, of an unknown kind or of a wrong shape; names it.
        """
        need = [f"image_proj.{name}" for name in ("proj.weight", "norm.weight")]
        missing = [name for name in need if name not in state]
        if missing:
            raise ModelError(
                f"{where}: there is no {missing[0]}; allowed is a linear layer with a norm behind a pooled embedding"
            )
        rows, embedding = state[need[0]].shape
        width = len(state[need[1]])
        keys = [name for name in state if name.endswith(".to_k_ip.weight")]
        order = sorted(keys, key=lambda name: int(name.split(".")[1]))
        inner = [len(state[name]) for name in order]
        made = cls(embedding, max(1, rows // width), width, inner, encoder)
        wanted = made.state_dict()
        # Files count through all attention layers or through those with text only; the order is the same.
        names = {name.split(".")[1]: str(2 * i + 1) for i, name in enumerate(order)}
        given = {_renamed(name, names): value for name, value in state.items()}
        for name, tensor in wanted.items():
            if name not in given or given[name].shape != tensor.shape:
                got = tuple(given[name].shape) if name in given else "nothing"
                raise ModelError(f"{where}: {name} should be {tuple(tensor.shape)}, got {got}")
        more = sorted(set(given) - set(wanted))
        if more:
            raise ModelError(f"{where}: the tensor {more[0]} is of no known image prompt")
        made.load_state_dict({name: value.float() for name, value in given.items()})
        return made

    @classmethod
    def load(cls, path: str | Path, encoder: Embed | None = None) -> ImagePrompts:
        """A branch from a safetensors file in the published layout; pickled files are refused.

        Raises:
            ModelError: The file is missing, of another format, or no image-prompt branch.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(path)
        if path.suffix != ".safetensors" or not path.is_file():
            raise ModelError(f"{path}: image prompts are read from an existing .safetensors file")
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ModelError(f"{path}: not a readable safetensors file ({error})") from error
        return cls.from_state(state, encoder, str(path))

    @classmethod
    def of(cls, pipeline: Any) -> ImagePrompts:
        """A copy of the branch that a diffusers pipeline has loaded with ``load_ip_adapter``.

        Take it, call ``pipeline.unload_ip_adapter()``, and open the pipeline: with the branch inside, a denoiser
        is not the ordinary one.  Pictures are read by the pipeline's ``image_encoder``.

        Raises:
            MissingPart: No branch is loaded, several are, or one of another kind.
        """
        denoiser: Any = getattr(pipeline, "unet", None)
        projections = getattr(
            getattr(denoiser, "encoder_hid_proj", None), "image_projection_layers", []
        )
        if len(projections) != 1 or not hasattr(projections[0], "image_embeds"):
            raise MissingPart(
                f"the pipeline has {len(projections)} image prompts of a known kind loaded; one is needed"
            )
        state = {
            f"image_proj.{name.replace('image_embeds', 'proj')}": value
            for name, value in projections[0].state_dict().items()
        }
        with_own = [p for p in denoiser.attn_processors.values() if hasattr(p, "to_k_ip")]
        for index, processor in enumerate(with_own):
            at = f"ip_adapter.{2 * index + 1}"
            state[f"{at}.to_k_ip.weight"] = processor.to_k_ip[0].weight.detach().clone()
            state[f"{at}.to_v_ip.weight"] = processor.to_v_ip[0].weight.detach().clone()
        encoder = getattr(pipeline, "image_encoder", None)
        return cls.from_state(state, None if encoder is None else vision_encoder(encoder))

    # -- use -----------------------------------------------------------------------------------

    @torch.no_grad()
    def tokens(self, pictures: np.ndarray | Tensor) -> Tensor:
        """``q`` of pictures, uint8 ``(n, height, width, 3)``, or of embeddings: ``(n, tokens, width)``.

        Raises:
            MissingPart: Pictures were given and the branch has no encoder.
        """
        if not isinstance(pictures, Tensor):
            if self.encoder is None:
                raise MissingPart("this image prompt has no encoder; give it one, or embeddings")
            pictures = self.encoder(pictures)
        weight = self.image_proj.proj.weight
        made: Tensor = self.image_proj(pictures.to(weight.device, weight.dtype))
        return made

    @contextlib.contextmanager
    def attached(self, model: DiffusionModel) -> Iterator[DiffusionModel]:
        """The model, whose conditions may carry image tokens for a while.

        Raises:
            ModelError: The branch was made for other layers, or one is attached already.
        """
        if any(isinstance(control, _Travelling) for control in model.controls):
            raise ModelError(f"{model.name}: image prompts are attached already")
        with self.on(model.denoiser) as given, model.controlled(_Travelling(given)):
            yield model

    @contextlib.contextmanager
    def on(self, denoiser: nn.Module) -> Iterator[Given]:
        """Hooks on a bare denoiser; what the next pass is given is set in the result."""
        layers, own = cross_attentions(denoiser), list(self.ip_adapter.values())
        if [layer.to_q.out_features for layer in layers] != [kv.to_k_ip.out_features for kv in own]:
            raise ModelError(
                f"the image prompt is for {len(own)} cross-attention layers of widths "
                f"{[kv.to_k_ip.out_features for kv in own]}; the denoiser has {len(layers)} of widths "
                f"{[layer.to_q.out_features for layer in layers]}"
            )
        given, handles = Given(), []
        try:
            for layer, keys_values in zip(layers, own, strict=True):
                beside = _Beside(layer, keys_values, given)
                handles.append(layer.to_q.register_forward_hook(beside.remember))
                handles.append(layer.to_out[0].register_forward_pre_hook(beside.add))
            yield given
        finally:
            for handle in handles:
                handle.remove()


def _renamed(name: str, numbers: Mapping[str, str]) -> str:
    """A tensor's name with the number of its layer as it is counted here."""
    parts = name.split(".")
    if parts[0] == "ip_adapter" and len(parts) > 1:
        parts[1] = numbers.get(parts[1], parts[1])
    return ".".join(parts)


@dataclasses.dataclass
class Given:
    """What the rows of a pass are given beside text: tokens ``(n, tokens, width)`` and lambda ``(n,)``, or nothing."""

    tokens: Tensor | None = None
    scale: Tensor | None = None


class _Beside:
    """Attention to image tokens beside one cross-attention layer."""

    def __init__(self, layer: Any, keys_values: Any, given: Given) -> None:
        self.layer, self.keys_values, self.given = layer, keys_values, given
        self.query: Tensor | None = None

    def remember(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """The layer's own query ``(rows, places, inner)``."""
        self.query = output if self.given.tokens is not None else None

    def add(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """``attn(text) + lambda attn(image)`` on its way into the output layer."""
        query, self.query = self.query, None
        tokens, scale = self.given.tokens, self.given.scale
        if query is None or tokens is None or scale is None:
            return None
        # Rows of weight 0 are left alone, not given zero times something: their path is the text's exactly.
        rows = scale.nonzero().flatten()
        if not len(rows):
            return None
        tokens = tokens[rows].to(query.device, query.dtype)
        key, value = (
            self._heads(functional.linear(tokens, part.weight.to(query.device, query.dtype)))
            for part in (self.keys_values.to_k_ip, self.keys_values.to_v_ip)
        )
        seen = functional.scaled_dot_product_attention(
            self._heads(query[rows]), key, value, scale=self.layer.scale
        )
        seen = seen.transpose(1, 2).flatten(2) * scale[rows].to(query)[:, None, None]
        return (
            inputs[0].index_add(0, rows.to(query.device), seen.to(inputs[0].dtype)),
            *inputs[1:],
        )

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.layer.heads, -1)).transpose(1, 2)


class _Travelling(Control):
    """Takes the image tokens of a condition to the layers, and takes them away after the pass."""

    def __init__(self, given: Given) -> None:
        self.given = given

    def condition(self, context: Any, condition: Any) -> Any:
        """What this pass is given; nothing where the condition has no image tokens."""
        self.given.tokens = condition.extra.get(TOKENS)
        self.given.scale = condition.extra.get(SCALE)
        return condition

    def prediction(self, context: Any, prediction: Any) -> Any:
        """The pass is over."""
        self.given.tokens = self.given.scale = None
        return prediction
