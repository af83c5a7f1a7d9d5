"""Questions and answers: what language erasers and attacks learn from, and how answers are judged."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..concept import names_of
from ..errors import PromptError, SettingError
from ..method import Judge, Prompt, Verdicts

if TYPE_CHECKING:
    from ..concept import Concept
    from ..models.base import Model

__all__ = [
    "AnswerJudge", "Pair", "answer_hit", "batches", "digest", "normalised", "pairs_for", "rouge_l_recall",
]  # fmt: skip

Pair = tuple[str, str]
"""A prompt and its answer; an empty prompt makes a whole text the answer."""


def normalised(text: str) -> list[str]:
    """Words without case, accents, punctuation and a leading article; letters of every script count.

    A stroke through a Latin letter counts as an accent.  Marks that make another letter (kana voicing, vowel
    signs of Indian scripts) stay: accents are the combining marks of class 200 and above.
    """
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(c for c in plain if unicodedata.combining(c) < 200).casefold()
    words = "".join(map(_plain, plain)).split()
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words


def _plain(character: str) -> str:
    """A letter, mark or digit, a space for anything else; ``l`` for "L with stroke", which has no decomposition."""
    if unicodedata.category(character)[0] not in "LMN":
        return " "
    found = re.fullmatch(r"LATIN SMALL LETTER ([A-Z]) WITH .*", unicodedata.name(character, ""))
    return found[1].lower() if found else character


def answer_hit(output: str, answer: str) -> bool:
    """The answer's words stand in the output, together and in order."""
    words, gold = normalised(output), normalised(answer)
    return bool(gold) and any(
        words[i : i + len(gold)] == gold for i in range(len(words) - len(gold) + 1)
    )


def rouge_l_recall(output: str, answer: str) -> float:
    """Longest common subsequence of words over the number of words of the answer, 0 to 1."""
    words, gold = normalised(output), normalised(answer)
    if not gold:
        return 0.0
    row = [0] * (len(gold) + 1)
    for word in words:
        diagonal = 0
        for i, other in enumerate(gold, 1):
            above = row[i]
            row[i] = diagonal + 1 if word == other else max(above, row[i - 1])
            diagonal = above
    return row[-1] / len(gold)


class AnswerJudge(Judge):
    """Hit: the prompt's right answer, ``labels["answer"]``, stands in the output.

    Args:
        known: Answers the world knows; an output that holds none of them is not recognisable (a
            destroyed model says something that is no answer at all).  Without them an output is
            recognisable unless it is empty or repeats one word.
    """

    id = "answer-match"
    threshold = 1.0

    def __init__(self, known: Iterable[str] = ()) -> None:
        self.known = tuple(sorted(set(known)))
        tail = (
            hashlib.sha256("|".join(self.known).encode()).hexdigest()[:8] if self.known else "open"
        )
        self.protocol = f"answer-match/2/words/{tail}"

    def judge(self, outputs: Any, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on ``n`` texts; score is 1.0 for a hit, else the ROUGE-L recall below it.

        Raises:
            PromptError: Numbers differ, or a prompt has no label ``answer``.
        """
        if len(outputs) != len(prompts):
            raise PromptError(
                f"{len(outputs)} outputs came with {len(prompts)} prompts; one each is needed"
            )
        for prompt in prompts:
            if "answer" not in prompt.labels:
                raise PromptError(
                    f"the prompt {prompt.text[:60]!r} has no label 'answer' to compare with"
                )
        gold = [str(prompt.labels["answer"]) for prompt in prompts]
        hit = np.array([answer_hit(o, a) for o, a in zip(outputs, gold, strict=True)], dtype=bool)
        partial = np.array(
            [rouge_l_recall(o, a) for o, a in zip(outputs, gold, strict=True)], dtype=float
        )
        score = np.where(hit, 1.0, np.minimum(partial, 0.99))
        return Verdicts(hit, score, np.array([self._recognisable(o) for o in outputs], dtype=bool))

    def _recognisable(self, output: str) -> bool:
        if self.known:
            return any(answer_hit(output, answer) for answer in self.known)
        words = normalised(output)
        return bool(words) and (len(words) < 4 or len(set(words)) > 1)


def digest(pairs: Mapping[str, Sequence[Pair]]) -> str:
    """Names a set of examples."""
    return hashlib.sha256(
        json.dumps({k: list(map(list, v)) for k, v in pairs.items()}, sort_keys=True).encode()
    ).hexdigest()[:32]


def pairs_for(
    model: Model,
    concepts: Sequence[Concept],
    keep: Sequence[Any] = (),
    data: Any = None,
    *,
    method: str,
) -> dict[str, list[Pair]]:
    """``{"forget": pairs, "retain": pairs}`` for language erasers.

    Args:
        model: Its companions supply what ``data`` and the concepts do not.
        concepts: ``texts`` that are not the companions' own are forgotten as whole texts.
        keep: Names whose facts make the retain set; all other facts if empty.
        data: ``{"forget": [(prompt, answer)], "retain": [...]}``; either may be left out.
        method: Id, for messages.

    Raises:
        SettingError: Unknown keys, or nothing to forget or to retain.
    """
    if data is not None and not isinstance(data, Mapping):
        raise SettingError(
            f"{method}: data is {type(data).__name__}; allowed is a mapping with 'forget' and 'retain'"
        )
    given = dict(data or {})
    if set(given) - {"forget", "retain"}:
        raise SettingError(
            f"{method}: data may hold 'forget' and 'retain', got {sorted(map(str, given))}"
        )
    companions = model.companions
    source = companions.data if companions is not None else None
    known = companions.concept if companions is not None else lambda name: None
    # Texts the user wrote come first; a concept as the world has it stands for the world's pairs.
    written = [c for c in concepts if c.texts and c.texts != getattr(known(c.name), "texts", ())]
    own = [("", text) for concept in written for text in concept.texts]
    others = [concept for concept in concepts if concept not in written]
    names = names_of(keep)
    asked = source is not None and len(given) < 2 and all(known(c.name) for c in concepts)
    found = source(concepts, keep=names) if asked and source is not None else {}
    forget = given.get("forget") or ()
    if not forget and own and others:
        # Each concept brings something, or it would be left in without a word.
        mute = [concept.name for concept in others if source is None or known(concept.name) is None]
        if mute:
            raise SettingError(
                f"{method}: there is nothing to forget about {mute[0]!r}; give it texts, or data={{'forget': [...]}}"
            )
        assert source is not None
        own += source(others, keep=names)["forget"]
    result = {
        "forget": _checked(forget or own or found.get("forget", ()), method, "forget"),
        "retain": _checked(given.get("retain") or found.get("retain", ()), method, "retain"),
    }
    shared = set(result["forget"]) & set(result["retain"])
    if shared:
        raise SettingError(f"{method}: {next(iter(shared))!r} is both to be forgotten and retained")
    return result


def _checked(pairs: Iterable[Any], method: str, what: str) -> list[Pair]:
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise SettingError(
            f"{method}: {what} needs a list of pairs (prompt, answer), got {pairs!r}"
        )
    found = []
    for pair in pairs:
        fits = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not fits or not all(isinstance(p, str) for p in pair):
            raise SettingError(f"{method}: {what} needs pairs (prompt, answer), got {pair!r}")
        found.append((pair[0], pair[1]))
    if not found:
        raise SettingError(
            f"{method}: there is nothing to {what}; give data={{'{what}': [(prompt, answer), ...]}}"
        )
    return found


def batches(items: int, size: int, index: int, seed_of: Any) -> list[int]:
    """Indices of batch ``index`` of an endless series of shuffled epochs over ``items``.

    Args:
        items: Number of items.
        size: Batch size; the last batch of an epoch may be smaller.
        index: Batch number, from 0.
        seed_of: Epoch -> generator of its order.
    """
    per_epoch = -(-items // size)
    epoch, place = divmod(index, per_epoch)
    order = torch.randperm(items, generator=seed_of(epoch)).tolist()
    return order[place * size : (place + 1) * size]
