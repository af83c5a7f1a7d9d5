"""The adapter for language models: any ``AutoModelForCausalLM`` with its tokenizer.

Sequences are padded on the left, so that answers stand at the end of every row: logits are then
computed at the label positions only (``logits_to_keep``), which is exact for every architecture that
knows the argument, scaled or capped heads included.

Cost: ``language.forward`` counts rows (sequences) of one pass.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import MissingCapability, ModelError, PromptError
from ..method import Prompt
from .base import Model, noise_generator

__all__ = ["LanguageModel", "Sequences", "open_language"]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Token ids of prompts with answers.

    Attributes:
        ids: One list of ids a sequence: prompt, answer, end token.
        labels: How many of its last ids are labels (answer and end token).
    """

    ids: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, index: Sequence[int]) -> Sequences:
        """The chosen sequences, in the given order; repeats are allowed."""
        return Sequences(tuple(self.ids[i] for i in index), tuple(self.labels[i] for i in index))

    def __add__(self, other: Sequences) -> Sequences:
        return Sequences(self.ids + other.ids, self.labels + other.labels)


class LanguageModel(Model):
    """A causal language model.

    Args:
        name: What the user asked for.
        module: A causal language model of transformers.
        tokenizer: Its fast tokenizer.
        chat: Wrap prompts in the tokenizer's chat template; ``None`` does so where it has one.
        system: System message for the chat template.
    """

    family = "language"
    capabilities = frozenset({"generate", "score", "embed", "activations", "gradients"})
    decisive = ("tokenizer", "chat", "system", "end_ids", "pad_id")

    def __init__(
        self,
        name: str,
        module: nn.Module,
        tokenizer: Any,
        *,
        chat: bool | None = None,
        system: str | None = None,
    ) -> None:
        super().__init__(name)
        self.module: Any = module.eval()
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None)
        if chat and not template:
            raise ModelError(f"{name}: the tokenizer has no chat template; open it with chat=False")
        self.chat = bool(template) if chat is None else chat
        self.system = system
        known = inspect.signature(type(module).forward).parameters
        self._accepts = {key: key in known for key in ("logits_to_keep", "position_ids")}
        ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
        self.end_ids = {
            i for i in (*_listed(ends), *_listed(tokenizer.eos_token_id)) if i is not None
        }
        self.pad_id = next(
            i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None
        )

    def parts(self) -> Mapping[str, nn.Module]:
        """``{"model": module}``."""
        return {"model": self.module}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    # -- tokens --------------------------------------------------------------------------------

    def prompt_ids(self, prompts: str | Prompt | Sequence[str | Prompt]) -> list[list[int]]:
        """Ids of prompts, chat template and start token included, never ended by the end token."""
        return [self._ids(self._framed(text)) for text in _texts(prompts)]

    def sequences(self, prompts: Sequence[str | Prompt], answers: Sequence[str]) -> Sequences:
        """Prompts with their answers; the answer and an end token are the labels.

        Prompt and answer are tokenised together (a space between them unless the prompt ends with
        one), and what both share with the prompt alone is the prompt: answers keep the tokens they
        have in running text.  An empty prompt makes a whole text the label.

        Raises:
            PromptError: Lengths differ, or an answer is empty.
        """
        texts = _texts(prompts)
        if len(texts) != len(answers):
            raise PromptError(
                f"{len(texts)} prompts came with {len(answers)} answers; one each is needed"
            )
        ids, labels = [], []
        for text, answer in zip(texts, answers, strict=True):
            framed = self._framed(text) if text or self.chat else ""
            gap = "" if not framed or framed[-1].isspace() or self.chat else " "
            prompt, whole = self._ids(framed), self._ids(framed + gap + answer)
            same = next(
                (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
                min(len(prompt), len(whole)),
            )
            end = [self.tokenizer.eos_token_id] if self.tokenizer.eos_token_id is not None else []
            # The first token of a sequence has nothing before it that could predict it.
            count = len(whole) - max(same, 1)
            if count < 1:
                raise PromptError(f"the answer {answer!r} to {text[:60]!r} holds no token")
            ids.append(tuple(whole + end))
            labels.append(count + len(end))
        return Sequences(tuple(ids), tuple(labels))

    def _framed(self, text: str) -> str:
        if not self.chat:
            return text
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": text})
        return str(
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the start token itself.
        found = list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
        while len(found) > 1 and found[-1] in self.end_ids and not self.chat:
            found.pop()
        if not found:
            start = self.tokenizer.bos_token_id
            found = [self.pad_id if start is None else start]
        return found

    def _padded(self, ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """Left-padded ``input_ids``, ``attention_mask`` and ``position_ids``, each ``(n, T)``."""
        width = max(map(len, ids))
        rows = [[self.pad_id] * (width - len(row)) + list(row) for row in ids]
        mask = torch.tensor(
            [[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device
        )
        batch = {"input_ids": torch.tensor(rows, device=self.device), "attention_mask": mask}
        if self._accepts["position_ids"]:
            batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        return batch

    def _forward(self, batch: Mapping[str, torch.Tensor], keep: int, **more: Any) -> Any:
        """One counted pass; logits of the last ``keep`` positions (all where the model cannot)."""
        self.cost.add("language", batch["input_ids"].shape[0])
        if self._accepts["logits_to_keep"]:
            more["logits_to_keep"] = keep
        return self.module(**batch, **more)

    # -- score ---------------------------------------------------------------------------------

    def token_nll(self, sequences: Sequences) -> tuple[torch.Tensor, torch.Tensor]:
        """Negative log probability of every label token, in one pass; differentiable.

        Returns:
            ``(loss, mask)``, both ``(n, K)`` with K the most labels of a row; labels stand at the
            right end of a row, ``loss`` is 0 (nats) where ``mask`` is False.
        """
        most = max(sequences.labels)
        batch = self._padded(sequences.ids)
        logits = self._forward(batch, most + 1, use_cache=False).logits[:, -(most + 1) : -1]
        targets = batch["input_ids"][:, -most:]
        counts = torch.tensor(sequences.labels, device=self.device)
        mask = torch.arange(most, device=self.device)[None] >= most - counts[:, None]
        loss = functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        return torch.where(mask, loss, 0.0), mask

    def nll(
        self, prompts: Sequence[str | Prompt], answers: Sequence[str], *, batch: int = 64
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed negative log probability of each answer (nats) and its number of label tokens.

        Returns:
            ``(nll, count)``, both ``(n,)``; ``exp(-nll / count)`` is the answer's probability per
            token.  Differentiable if gradients are enabled.
        """
        sequences = self.sequences(prompts, answers)
        losses = []
        for start in range(0, len(sequences), batch):
            part = sequences.select(range(start, min(start + batch, len(sequences))))
            losses.append(self.token_nll(part)[0].sum(1))
        return torch.cat(losses), torch.tensor(sequences.labels, device=self.device)

    # -- generate ------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        *,
        seeds: Any = None,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        batch: int = 64,
        **options: Any,
    ) -> list[str]:
        """Completions only, one for each prompt.

        Args:
            prompts: Texts or :class:`Prompt`s.
            seeds: One seed for each prompt when sampling; by default the prompts' own, else 0.
            max_new_tokens: Longest completion.
            temperature: 0 is greedy; otherwise each row samples from its own seed, whatever the
                batch.
            batch: Rows a pass.
        """
        if options:
            raise PromptError(
                f"generation option {sorted(options)[0]!r} is unknown; allowed: "
                "seeds, max_new_tokens, temperature, batch"
            )
        ids = self.prompt_ids(prompts)
        listed = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
        if seeds is None:
            seeds = [p.seed if isinstance(p, Prompt) else 0 for p in listed]
        elif isinstance(seeds, int):
            seeds = [seeds] * len(ids)
        if len(seeds) != len(ids):
            raise PromptError(
                f"{len(ids)} prompts came with {len(seeds)} seeds; one each is needed"
            )
        done = [""] * len(ids)
        # Similar lengths together: less padding.
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        with self._evaluating():
            for start in range(0, len(order), batch):
                index = order[start : start + batch]
                rows = self._complete(
                    [ids[i] for i in index],
                    [int(seeds[i]) for i in index],
                    max_new_tokens,
                    temperature,
                )
                for i, row in zip(index, rows, strict=True):
                    done[i] = self.tokenizer.decode(row, skip_special_tokens=True).strip()
        return done

    def _complete(
        self, ids: list[list[int]], seeds: list[int], longest: int, temperature: float
    ) -> list[list[int]]:
        generators = [noise_generator(seed, "language:sample") for seed in seeds]
        batch = self._padded(ids)
        found: list[list[int]] = [[] for _ in ids]
        open_rows = set(range(len(ids)))
        cache: Any = None
        for _ in range(longest):
            out = self._forward(batch, 1, use_cache=True, past_key_values=cache)
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            if temperature > 0:
                chance = torch.softmax(logits / temperature, dim=-1).cpu()
                drawn = [
                    torch.multinomial(c, 1, generator=g)
                    for c, g in zip(chance, generators, strict=True)
                ]
                chosen = torch.cat(drawn).tolist()
            else:
                chosen = logits.argmax(-1).tolist()
            for row in tuple(open_rows):
                if chosen[row] in self.end_ids:
                    open_rows.discard(row)
                else:
                    found[row].append(chosen[row])
            if not open_rows:
                break
            ones = batch["attention_mask"].new_ones(len(ids), 1)
            after = {"attention_mask": torch.cat([batch["attention_mask"], ones], 1)}
            if "position_ids" in batch:
                after["position_ids"] = batch["position_ids"][:, -1:] + 1
            batch = {"input_ids": torch.tensor(chosen, device=self.device)[:, None], **after}
        return found

    # -- hidden states -------------------------------------------------------------------------

    def activations(
        self, prompts: str | Prompt | Sequence[str | Prompt], layers: Sequence[int] = (-1,)
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """Hidden states after blocks (0 is the embedding, -1 the last), and the mask of real tokens.

        Returns:
            ``({layer: (n, T, width)}, mask (n, T))``, rows padded on the left.
        """
        batch = self._padded(self.prompt_ids(prompts))
        states = self._forward(batch, 1, use_cache=False, output_hidden_states=True).hidden_states
        for layer in layers:
            if not -len(states) <= layer < len(states):
                raise MissingCapability(
                    f"{self.name}: there is no layer {layer}; allowed: 0 to {len(states) - 1}"
                )
        return {layer: states[layer] for layer in layers}, batch["attention_mask"].bool()

    @torch.no_grad()
    def embed(self, prompts: str | Prompt | Sequence[str | Prompt]) -> torch.Tensor:
        """Mean of the last hidden states over a text's tokens, float32 ``(n, width)``."""
        states, mask = self.activations(prompts)
        weight = mask[..., None].float()
        return (states[-1].float() * weight).sum(1) / weight.sum(1)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Evaluation mode for a while; a training module comes back module by module."""
        modes = [(m, m.training) for m in self.module.modules() if m.training]
        for module, _ in modes:
            module.training = False
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _texts(prompts: str | Prompt | Sequence[str | Prompt]) -> list[str]:
    listed = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    if not listed:
        raise PromptError("no prompt was given; at least one is needed")
    texts = [p.text if isinstance(p, Prompt) else p for p in listed]
    for text in texts:
        if not isinstance(text, str):
            raise PromptError(
                f"a prompt must be a text, got {str(text)[:60]!r} of type {type(text).__name__}"
            )
    return texts


def open_language(
    path: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = "auto",
    chat: bool | None = None,
) -> LanguageModel:
    """Open a language model from a ``save_pretrained`` folder or by hub id (safetensors only).

    Raises:
        ModelError: It cannot be opened, or is not a causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = str(path) if not Path(path).exists() else str(Path(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        module = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name}: cannot be opened as a causal language model ({reason})"
        ) from None
    return LanguageModel(name, module.to(device), tokenizer, chat=chat)
