"""What attacks on prompts share: forbidden tokens, splicing, realisable texts, trials and their records.

A searched string may not name the concept, neither by one of its tokens nor by pieces that join to a
forbidden word in the decoded text.  The attacked prompt itself may: only what is added counts.  The
picture is always made from the decoded and re-tokenised prompt, because only such prompts exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..concept import Concept
from ..errors import PromptError, SettingError, nearest
from ..method import Attack, Attempt, Attempts, Budget, Judge, Prompt
from ..models.types import Condition
from .prompt_search import Ledger
from .prompt_search.common import Realised
from .sampling import SHARED, outputs

__all__ = [
    "PLACEMENTS",
    "Forbidden",
    "Meter",
    "Spliced",
    "Trials",
    "arrangement",
    "assembled",
    "in_batches",
    "item_keys",
]

PLACEMENTS = ("prefix", "suffix", "middle", "spread", "third", "replace")
SHORTEST = 3
"""Letters from which on a sub-string of a forbidden word is forbidden too."""


class Forbidden:
    """What a search may not use: the concept's name and listed phrases.

    Attributes:
        words: Lower-case names, phrases and their words of at least three letters.
        allowed: bool ``(V,)``.  Out are special ids, every token of the tokenisations of the names,
            tokens that are a sub-string (three letters or more) of a forbidden word or hold one,
            tokens no text is written with (control characters, single bytes of longer letters), and
            ids the tokenizer does not know.

    Args:
        tokenizer: The model's tokenizer.
        concept: The concept; its own name and phrases are what is forbidden.
        size: Rows of the token table, ``V``.
    """

    def __init__(self, tokenizer: Any, concept: Concept, size: int) -> None:
        names = [name.lower() for name in concept.names]
        parts = [word for name in names for word in name.split() if len(word) >= SHORTEST]
        self.words = tuple(dict.fromkeys([*names, *parts]))
        inner = {
            word[i:j]
            for word in (*parts, *("".join(name.split()) for name in names))
            for i in range(len(word))
            for j in range(i + SHORTEST, len(word) + 1)
        }
        known = min(size, len(tokenizer))
        self.allowed = torch.zeros(size, dtype=torch.bool)
        shown = tokenizer.batch_decode([[i] for i in range(known)])
        for index, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(known)))):
            letters = (piece or "").replace("</w>", "").lstrip("\u0120\u2581").lower()
            named = letters in inner or any(part in letters for part in parts)
            self.allowed[index] = bool(letters) and not named and _printable(shown[index])
        spoken = [
            form
            for name in concept.names
            for form in (name, f" {name}", name.capitalize(), name.upper())
        ]
        for ids in tokenizer(spoken, add_special_tokens=False).input_ids:
            self.allowed[ids] = False
        self.allowed[[i for i in tokenizer.all_special_ids if i < size]] = False
        if not bool(self.allowed.any()):
            raise SettingError(
                f"every token of the vocabulary is forbidden for {concept.name!r}; nothing is left to search"
            )

    def count(self, text: str) -> int:
        """How often forbidden words stand in a text, inside longer words too."""
        lowered = " ".join(text.lower().split())
        return sum(lowered.count(word) for word in self.words)


def _printable(text: str) -> bool:
    """Letters, digits, signs; not blank, no control character and no broken byte."""
    return bool(text.strip()) and text.strip().isprintable() and "\ufffd" not in text


def arrangement(content: int, searched: int, placement: str) -> list[int]:
    """The order of ``content`` prompt tokens (0, 1, ...) and ``searched`` tokens (-1, -2, ...).

    prefix: searched tokens first; suffix: last; middle: after the first ``content // 2``; spread: one
    after each of the first runs of ``content // (searched + 1)``; third: one before every three content
    tokens; replace: searched tokens only.
    """
    if placement not in PLACEMENTS:
        raise SettingError(f"placement {placement!r} is unknown{nearest(placement, PLACEMENTS)}")
    if searched < 1:
        raise SettingError(f"{searched} tokens are searched; at least 1 is needed")
    prompt, added = list(range(content)), [-1 - j for j in range(searched)]
    if placement == "replace":
        return added
    if placement in ("prefix", "suffix", "middle"):
        cut = {"prefix": 0, "suffix": content, "middle": content // 2}[placement]
        return [*prompt[:cut], *added, *prompt[cut:]]
    run = 3 if placement == "third" else content // (searched + 1)
    order: list[int] = []
    for j, token in enumerate(added):
        piece = prompt[j * run : (j + 1) * run]
        order += [token, *piece] if placement == "third" else [*piece, token]
    return order + prompt[searched * run :]


class Spliced:
    """Prompts with ``searched`` free places each, as rows of the model's context length.

    Splicing is done on token embeddings, before positions are added; the end token and padding move
    back by as many places.  ``placement="replace"`` drops the prompt's own tokens.

    Raises:
        PromptError: A prompt leaves no room for the searched tokens.
    """

    def __init__(
        self, model: Any, texts: Sequence[str], searched: int, placement: str, forbidden: Forbidden
    ) -> None:
        bases = [""] * len(texts) if placement == "replace" else list(texts)
        self.model, self.forbidden, self.searched = model, forbidden, searched
        self.base = model.token_ids(bases)
        self.table = model.token_table()
        total = self.base.shape[1]
        self.content = model.content_length(bases)
        rows = []
        for text, length in zip(texts, self.content, strict=True):
            if length + searched + 2 > total:
                raise PromptError(
                    f"prompt {text[:60]!r} has {length} tokens; with {searched} searched ones at most "
                    f"{total - 2 - searched} fit this model"
                )
            inner = [
                1 + a if a >= 0 else total - 1 - a for a in arrangement(length, searched, placement)
            ]
            rows.append([0, *inner, *range(1 + length, total)][:total])
        self.order = torch.tensor(rows)
        self.limit = [forbidden.count(base) for base in bases]
        self._texts: dict[tuple[int, tuple[int, ...]], tuple[str, list[int], bool]] = {}

    def ids(self, searched: Tensor, item: Tensor) -> Tensor:
        """Rows of token ids ``(B, T)`` for searched ids ``(B, n)``."""
        return torch.cat([self.base[item], searched.cpu()], 1).gather(1, self.order[item])

    def vectors(self, searched: Tensor, item: Tensor) -> Tensor:
        """Token embeddings ``(B, T, d)`` for searched vectors ``(B, n, d)``; gradients reach these."""
        base = self.table[self.base[item]].to(searched.dtype)
        order = self.order[item].to(searched.device)
        return torch.cat([base, searched], 1).gather(
            1, order[..., None].expand(-1, -1, searched.shape[-1])
        )

    def encode(self, searched: Tensor, item: Tensor) -> Condition:
        """The text condition of spliced vectors; differentiable."""
        places = torch.zeros(len(item), self.searched, dtype=torch.long)
        return self.model.encode_tokens(
            self.ids(places + self._filler(), item), self.vectors(searched, item)
        )

    def _filler(self) -> int:
        # Some encoders read the place of the end token off the ids, so a filler must not look like one.
        return int(self.forbidden.allowed.nonzero()[0])

    def realise(self, searched: Tensor, item: Tensor) -> Realised:
        """Decoded prompts, their content ids after tokenising again, and whether these are unchanged."""
        wanted = [(int(i), tuple(row)) for i, row in zip(item, searched.tolist(), strict=True)]
        missing = list(dict.fromkeys(key for key in wanted if key not in self._texts))
        if missing:
            own = torch.tensor([i for i, _ in missing])
            rows = self.ids(torch.tensor([row for _, row in missing]), own)
            content = [
                row[1 : 1 + self._length(i)]
                for (i, _), row in zip(missing, rows.tolist(), strict=True)
            ]
            texts = self.model.tokenizer.batch_decode(
                content, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            texts = [text.strip() for text in texts]
            again = self.model.tokenizer(texts, add_special_tokens=False).input_ids
            for key, text, ids, before in zip(missing, texts, again, content, strict=True):
                self._texts[key] = (text, list(ids), list(ids) == before)
        found = [self._texts[key] for key in wanted]
        if len(self._texts) > 200_000:
            self._texts.clear()
        return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]

    def _length(self, i: int) -> int:
        return int(self.content[i]) + self.searched

    def admissible(self, searched: Tensor, item: Tensor) -> Tensor:
        """bool ``(B,)``: the realised text fits the context and names the concept no more than the prompt."""
        texts, again, _ = self.realise(searched, item)
        room = self.base.shape[1] - 2
        good = [
            0 < len(ids) <= room and self.forbidden.count(text) <= self.limit[int(i)]
            for text, ids, i in zip(texts, again, item, strict=True)
        ]
        return torch.tensor(good, dtype=torch.bool)


class Trials:
    """Pictures shown to the judge for each item, paid for, made once, counted before and after the attack.

    Attributes:
        price: Denoiser rows of one picture.
        pre, hit: bool ``(n,)``: shown by the plain prompt; shown before or after the attack.
        text: What was fed in for the picture kept of each item: the first success, or else the
            adversarial picture with the highest score.
        tried: Adversarial pictures made for each item.
    """

    def __init__(
        self, model: Any, concept: Concept, judge: Judge, prompts: Sequence[Prompt], ledger: Ledger,
        *, steps: int, guidance: float | None,
    ) -> None:  # fmt: skip
        self.model, self.concept, self.judge = model, concept, judge
        self.prompts, self.ledger = list(prompts), ledger
        self.options: dict[str, Any] = {
            "steps": steps,
            "guidance": model.guidance if guidance is None else guidance,
        }
        self.price = len(model.timesteps(steps)) * (1 if self.options["guidance"] == 1.0 else 2)
        if ledger.limit is not None and ledger.limit < self.price:
            raise SettingError(
                f"the budget allows {ledger.limit} denoiser rows an item, but one picture of {steps} steps "
                f"costs {self.price}; lower steps or choose a larger budget"
            )
        made = outputs(model, self.prompts, cache=SHARED, **self.options)
        ledger.spend(range(len(self.prompts)), self.price)
        verdicts = judge.judge(made, concept, self.prompts)
        self.pre = np.asarray(verdicts.hit, bool).copy()
        self.hit, self.score = self.pre.copy(), np.asarray(verdicts.score, float).copy()
        self.pictures = list(made)
        self.text: list[str | None] = [None] * len(self.prompts)
        self.tried = [0] * len(self.prompts)
        self._seen = [
            {prompt.text: bool(hit)} for prompt, hit in zip(self.prompts, self.hit, strict=True)
        ]

    @property
    def open(self) -> Tensor:
        """bool ``(n,)``: the concept was not shown yet."""
        return torch.from_numpy(~self.hit)

    def show(self, item: Sequence[int], texts: Sequence[str]) -> Tensor:
        """Pictures of texts with the items' own seeds; bool ``(len(item),)``.  A text seen before is free."""
        fresh = [
            (i, text) for i, text in zip(item, texts, strict=True) if text not in self._seen[i]
        ]
        if fresh:
            prompts = [Prompt(text, self.prompts[i].seed) for i, text in fresh]
            self._take(
                [i for i, _ in fresh],
                outputs(self.model, prompts, **self.options),
                [t for _, t in fresh],
            )
        return torch.tensor(
            [self._seen[i][text] for i, text in zip(item, texts, strict=True)], dtype=torch.bool
        )

    def show_condition(self, item: Sequence[int], condition: Condition) -> None:
        """Pictures of embeddings, which have no text."""
        seeds = [self.prompts[i].seed for i in item]
        made = self.model.generate(
            [""] * len(seeds), seeds=seeds, condition=condition, **self.options
        )
        self._take(list(item), made, [None] * len(seeds))

    def _take(self, item: list[int], made: Any, texts: Sequence[str | None]) -> None:
        self.ledger.spend(item, self.price)
        verdicts = self.judge.judge(made, self.concept, [self.prompts[i] for i in item])
        for row, (i, text) in enumerate(zip(item, texts, strict=True)):
            hit, score = bool(verdicts.hit[row]), float(verdicts.score[row])
            if text is not None:
                self._seen[i][text] = hit
            self.tried[i] += 1
            better = (hit, score) > (bool(self.hit[i]), self.score[i]) or self.tried[i] == 1
            if better and not self.hit[i]:
                self.pictures[i], self.score[i], self.text[i] = made[row], score, text
            self.hit[i] |= hit

    def attempts(self, details: Sequence[Mapping[str, Any]]) -> list[Attempt]:
        """One record an item, with ``details`` of the search."""
        return [
            Attempt(
                prompt,
                bool(self.pre[i]),
                bool(self.hit[i]),
                float(self.score[i]),
                self.text[i],
                {"pictures": self.tried[i], "rows": int(self.ledger.spent[i]), **details[i]},
            )
            for i, prompt in enumerate(self.prompts)
        ]


class Meter:
    """Rows that an attack spends on one or two models, counted once where they are the same."""

    def __init__(self, *models: Any) -> None:
        self._models = list({id(model): model for model in models}.values())
        self._before = [model.cost.snapshot() for model in self._models]

    def read(self) -> dict[str, int]:
        """Rows by component since the meter was made."""
        total: Counter[str] = Counter()
        for model, before in zip(self._models, self._before, strict=True):
            total.update(model.cost.since(before))
        return dict(sorted(total.items()))


def item_keys(prompts: Sequence[Prompt]) -> list[str]:
    """Names of items for their private randomness: text and seed, so that batches do not matter."""
    return [f"{prompt.text}|{prompt.seed}" for prompt in prompts]


def in_batches(
    prompts: Sequence[Prompt],
    size: int,
    one: Callable[[list[Prompt]], tuple[Trials, list[Attempt]]],
) -> tuple[list[Attempt], Any]:
    """Attempts and pictures of all prompts, ``size`` of them in lock step at a time."""
    items: list[Attempt] = []
    pictures: list[Any] = []
    for first in range(0, len(prompts), size):
        trials, attempts = one(list(prompts[first : first + size]))
        items += attempts
        pictures += trials.pictures
    if not items:
        raise PromptError("an attack was given no prompt; at least one is needed")
    return items, np.stack(pictures)


def assembled(
    attack: Attack,
    judge: Judge,
    budget: Budget,
    seed: int,
    items: Sequence[Attempt],
    pictures: Any,
    cost: Mapping[str, int],
) -> Attempts:
    """The record of an attack, with everything that makes it comparable."""
    return Attempts(
        attack.id, attack.version, attack.settings(), attack.teaches, budget.name, judge.id, judge.threshold,
        seed, tuple(items), pictures, dict(cost),
    )  # fmt: skip
