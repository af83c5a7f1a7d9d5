"""A small network that looks at a picture and answers a question about it in words.

Patch tokens of a frozen encoder go through a perceive sampler into a few visual tokens; a text decoder, in whose
layers text may attend to them before its self-attention (:mod:`.cross_modality`), reads question and answer behind
them:

    H_v = sampler(patches)                          learned queries attend to patches, ``(n, visual, width)``
    each layer:  H_t <- H_t + g CMA(H_t, H_v);  [H_v; H_t] <- self-attention, then MLP, causal
    L = L_next-token (answer tokens only) + lambda L_con

After T2ISafety's evaluator (arXiv 2501.12612), which puts both additions on a 7-billion-parameter decoder with
low-rank adapters.  This decoder is trained from nothing, so all of it trains.  The visual tokens of L_con are the
sampler's, the caption's embedding is the mean of the decoder's own word vectors, and a linear map on each side makes
them comparable.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError, SettingError
from ..models.base import noise_generator
from .cross_modality import Attention, CrossModalityAttention, info_nce
from .tasks import Groups, Step, Task
from .word_codes import ANSWER, BEGIN, END, PAD, WordCodes

__all__ = ["AnswerTask", "Asked", "PictureAnswerer", "Shape", "answer_loss", "padded"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the network.

    Attributes:
        patch_width: Of the frozen encoder's tokens.
        words: Of the vocabulary.
        length: Most text tokens, question and answer together.
        width, layers, heads: Of the decoder.
        visual_tokens: That the sampler makes of a picture.
        sampler_layers: Of the sampler.
        cross_attention: Text attends to visual tokens before each self-attention.
        contrastive: Pooled visual tokens and captions are compared.
    """

    patch_width: int
    words: int
    length: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    visual_tokens: int = 16
    sampler_layers: int = 1
    cross_attention: bool = True
    contrastive: bool = True


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class _SamplerLayer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm, self.attention = (
            nn.LayerNorm(shape.width),
            Attention(shape.width, shape.heads),
        )
        self.mlp_norm, self.mlp = nn.LayerNorm(shape.width), _mlp(shape.width)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        queries = queries + self.attention(self.norm(queries), patches)
        found: Tensor = queries + self.mlp(self.mlp_norm(queries))
        return found


class PerceiveSampler(nn.Module):
    """Patches ``(n, patches, patch_width)`` -> visual tokens ``(n, visual_tokens, width)``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(shape.visual_tokens, shape.width))
        # The encoder's residual stream has channels of very different sizes.
        self.patch_norm = nn.LayerNorm(shape.patch_width)
        self.patches = nn.Linear(shape.patch_width, shape.width)
        self.layers = nn.ModuleList(_SamplerLayer(shape) for _ in range(shape.sampler_layers))
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, patches: Tensor) -> Tensor:
        """The visual tokens."""
        read = self.patches(self.patch_norm(patches))
        tokens = self.queries.expand(len(patches), -1, -1)
        for layer in self.layers:
            tokens = layer(tokens, read)
        found: Tensor = self.norm(tokens)
        return found


class DecoderLayer(nn.Module):
    """One layer: gated cross-modality attention where it is on, causal self-attention, MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.cross = (
            CrossModalityAttention(shape.width, shape.heads) if shape.cross_attention else None
        )
        self.norm, self.attention = (
            nn.LayerNorm(shape.width),
            Attention(shape.width, shape.heads),
        )
        self.mlp_norm, self.mlp = nn.LayerNorm(shape.width), _mlp(shape.width)

    def looked(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """What goes into the self-attention: the visual tokens as they are, and the text that looked at them."""
        return visual, text if self.cross is None else self.cross(text, visual)

    def forward(self, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Visual ``(n, visual, width)`` and text ``(n, tokens, width)`` after the layer."""
        both = torch.cat(self.looked(visual, text), dim=1)
        read = self.norm(both)
        both = both + self.attention(read, read, causal=True)
        both = both + self.mlp(self.mlp_norm(both))
        return both[:, : visual.shape[1]], both[:, visual.shape[1] :]


class PictureAnswerer(nn.Module):
    """The network.

    Args:
        shape: Its sizes.
        seed: Of the weights, which depend on it and on the tensors' names only: networks with and without an
            addition begin alike.
    """

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.device("meta"):  # nothing is drawn from the process's own random state
            self.sampler = PerceiveSampler(shape)
            self.words = nn.Embedding(shape.words, shape.width)
            self.places = nn.Embedding(shape.length, shape.width)
            self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.layers))
            self.norm = nn.LayerNorm(shape.width)
            if shape.contrastive:
                self.picture_side = nn.Linear(shape.width, shape.width, bias=False)
                self.caption_side = nn.Linear(shape.width, shape.width, bias=False)
        self.to_empty(device="cpu")
        self._draw(seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        for name, tensor in self.named_parameters():
            if tensor.ndim < 2:  # biases, gates; norms begin at one
                tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            table = name in ("words.weight", "places.weight", "sampler.queries")
            deviation = 0.5 if table else tensor.shape[1] ** -0.5
            own = noise_generator(seed, "picture-answers", name)
            tensor.copy_(deviation * torch.randn(tensor.shape, generator=own))

    def look(self, patches: Tensor) -> Tensor:
        """Visual tokens ``(n, visual_tokens, width)`` of patch tokens."""
        found: Tensor = self.sampler(patches)
        return found

    def forward(self, visual: Tensor, ids: Tensor) -> Tensor:
        """Logits ``(n, tokens, words)`` of what follows each token of ``ids`` ``(n, tokens)``.

        Raises:
            InputError: The text is too long.
        """
        if ids.shape[1] > self.shape.length:
            raise InputError(
                f"a text of {ids.shape[1]} tokens is too long; at most {self.shape.length} are allowed"
            )
        text = self.words(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            visual, text = layer(visual, text)
        # Word vectors also read what is to be written; the root keeps logits near one at the start.
        logits: Tensor = self.norm(text) @ self.words.weight.T * self.shape.width**-0.5
        return logits

    def pooled(self, visual: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides of the contrastive loss ``(n, width)``.

        Args:
            visual: Visual tokens behind the sampler.
            captions: ``(n, tokens)``, padded.
        """
        words = (captions != PAD).unsqueeze(-1)
        mean = (self.words(captions) * words).sum(1) / words.sum(1).clamp(min=1)
        return self.picture_side(visual.mean(1)), self.caption_side(mean)

    @torch.no_grad()
    def answer(self, patches: Tensor, question: Sequence[int]) -> list[list[int]]:
        """Greedy answers: at each place the likeliest word, until ``END`` or the end of the places.

        Args:
            patches: ``(n, patches, patch_width)``.
            question: Numbers of its words.
        """
        visual = self.look(patches)
        start = torch.tensor([BEGIN, *question, ANSWER], device=patches.device)
        ids = start.expand(len(patches), -1)
        ended = torch.zeros(len(patches), dtype=torch.bool, device=patches.device)
        while ids.shape[1] < self.shape.length and not bool(ended.all()):
            best = self(visual, ids)[:, -1].argmax(-1)
            best = torch.where(ended, PAD, best)
            ended |= best == END
            ids = torch.cat([ids, best[:, None]], dim=1)
        return [row[len(start) :] for row in ids.tolist()]


# -- training --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is to be learned of one picture: a question, its answer, and a caption or ``""``."""

    question: str
    answer: str
    caption: str = ""


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of numbers as ``(n, longest)``, ``PAD`` behind their ends."""
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[PAD] * (longest - len(row))] for row in rows]).reshape(
        len(rows), longest
    )


def answer_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens behind ``ANSWER``, ``END`` included; question and padding do not count.

    Args:
        logits: ``(n, tokens, words)``; those of a place say what follows it.
        ids: ``(n, tokens)``, with one ``ANSWER`` a row.
    """
    begun = (ids == ANSWER).cumsum(1)[:, :-1] > 0
    wanted = begun & (ids[:, 1:] != PAD)
    return functional.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted])


class AnswerTask(Task):
    """Trains a network on pictures with questions and answers; a task of :func:`expunge.core.finetune.fit`.

    Args:
        network: It.
        codes: Its vocabulary.
        asked: What is to be learned of each picture.
        patches: Places of pictures -> their patch tokens.
        batch: Pictures of a step, drawn with putting back.
        weight: Lambda, of the contrastive loss; pictures without a caption are in no pair.
        temperature: Of the contrastive loss.

    Raises:
        SettingError: There is nothing to learn.
    """

    def __init__(
        self,
        network: PictureAnswerer,
        codes: WordCodes,
        asked: Sequence[Asked],
        patches: Callable[[list[int]], Tensor],
        *,
        batch: int = 32,
        weight: float = 0.1,
        temperature: float = 0.1,
    ) -> None:
        if not asked:
            raise SettingError("there is no labelled picture to learn from")
        self.network, self.patches = network, patches
        self.batch, self.weight, self.temperature = batch, weight, temperature
        self.texts = [
            [BEGIN, *codes.encode(a.question), ANSWER, *codes.encode(a.answer), END] for a in asked
        ]
        self.captions = [codes.encode(a.caption) for a in asked]

    def parameters(self) -> Groups:
        """All of the network; the encoder is not part of it."""
        return {"answers": list(self.network.named_parameters())}

    def step(self, step: Step) -> Mapping[str, Tensor]:
        """The loss on one batch."""
        drawn = torch.randint(len(self.texts), (self.batch,), generator=step.generator("batch"))
        return {"answers": self.loss(drawn.tolist())}

    def loss(self, places: list[int]) -> Tensor:
        """``L_next-token + lambda L_con`` of these pictures."""
        visual = self.network.look(self.patches(places))
        ids = padded([self.texts[place] for place in places]).to(visual.device)
        total = answer_loss(self.network(visual, ids), ids)
        named = [row for row, place in enumerate(places) if self.captions[place]]
        if self.network.shape.contrastive and self.weight > 0 and len(named) > 1:
            captions = [self.captions[places[row]] for row in named]
            same = torch.tensor([[a == b for b in captions] for a in captions])
            sides = self.network.pooled(visual[named], padded(captions).to(visual.device))
            total = total + self.weight * info_nce(*sides, self.temperature, same.to(visual.device))
        return total


def shape_from(plain: Mapping[str, Any]) -> Shape:
    """Sizes from plain values.

    Raises:
        SettingError: A size is missing, unknown or of another type.
    """
    fields = {field.name: field.type for field in dataclasses.fields(Shape)}
    for name in {*fields, *plain}:
        kind = bool if fields.get(name) == "bool" else int
        if name not in fields or type(plain.get(name)) is not kind or plain[name] < 0:
            raise SettingError(
                f"size {name!r} is {plain.get(name)!r}; allowed: {', '.join(fields)}"
            )
    return Shape(**plain)
