"""The facts of the world: invented people and towns, and a small Llama that learns them.

18 people with 6 attributes each are asked about in 3 forms (statement, question, cloze) of 3 wordings.
For every person one wording of each form is held out of training; others are trained with it, so a
held-out question tests the fact, not the wording.  9 towns with 3 attributes are the unrelated facts.

``original`` and ``never`` share the first phase, trained without the facts of three people; the same
number of further steps follows, in which only the original sees those three.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors import torch as safetensors

from ..concept import Concept
from ..core import finetune
from ..core.answers import AnswerJudge, Pair, batches
from ..edit.files import atomic_write
from ..errors import SettingError, nearest
from ..method import Prompt
from ..models.base import Companions, noise_generator
from ..models.language import LanguageModel
from ..models.small_language import small_llama, word_tokenizer
from .fact_texts import FORGOTTEN, FORMS, PEOPLE, TOWNS, VALUES, Fact, facts

__all__ = [
    "FORGOTTEN", "FORMS", "PEOPLE", "TOWNS", "VALUES", "Fact", "Recipe",
    "concept", "data", "facts", "neighbours", "open_facts", "prompts", "train",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the model of facts is made; every field is part of the cache key.

    Attributes:
        version: Raised when training changes otherwise.
        width, layers, heads: Size of the Llama.
        first, second: Steps without the forgotten people, and steps in which original and never part.
        batch: Sequences a step.
        lr: Peak rate of AdamW; constant in the first phase, falling to 0 in the second.
        seed: Seed of weights and order.
    """

    version: int = 1
    width: int = 64
    layers: int = 2
    heads: int = 4
    first: int = 240
    second: int = 120
    batch: int = 64
    lr: float = 4e-3
    seed: int = 0

    @property
    def key(self) -> str:
        """Names recipe and facts, for cache files."""
        text = json.dumps([dataclasses.asdict(self), [f.pair for f in facts()]])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Learn(finetune.Task):
    """Ordinary training on pairs."""

    def __init__(
        self, model: LanguageModel, pairs: Sequence[Pair], batch: int, phase: str, seed: int
    ):
        self.model, self.batch, self.phase, self.seed = model, batch, phase, seed
        self.sequences = model.sequences([p for p, _ in pairs], [a for _, a in pairs])

    def parameters(self) -> finetune.Groups:
        return {"weights": list(self.model.tensors().items())}

    def step(self, step: finetune.Step) -> dict[str, torch.Tensor]:
        chosen = batches(
            len(self.sequences),
            self.batch,
            step.index,
            lambda epoch: noise_generator(self.seed, f"facts:{self.phase}", epoch),
        )
        loss, mask = self.model.token_nll(self.sequences.select(chosen))
        return {"weights": loss.sum() / mask.sum()}


def blank(recipe: Recipe = Recipe()) -> LanguageModel:
    """The untrained model with its tokenizer and companions."""
    tokenizer = word_tokenizer(text for fact in facts() for text in fact.pair)
    model = small_llama(
        "world/facts",
        tokenizer,
        width=recipe.width,
        layers=recipe.layers,
        heads=recipe.heads,
        seed=recipe.seed,
    )
    return model


def train(recipe: Recipe = Recipe()) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of ``original`` and ``never``, by tensor name; about a minute on one core."""
    model = blank(recipe)
    trained = [fact for fact in facts() if not fact.held_out]
    shared = [fact.pair for fact in trained if fact.subject not in FORGOTTEN]
    _put(model, _phase(model, shared, recipe, "first"))
    return {
        "original": _phase(model, [fact.pair for fact in trained], recipe, "second"),
        "never": _phase(model, shared, recipe, "second"),
    }


def _phase(
    model: LanguageModel, pairs: Sequence[Pair], recipe: Recipe, phase: str
) -> dict[str, torch.Tensor]:
    """The weights after one phase; the model itself keeps those from before it."""
    optimiser = finetune.Optimiser(
        lr=recipe.lr,
        name="adamw",
        weight_decay=0.01,
        warmup=20 if phase == "first" else 0,
        schedule="constant" if phase == "first" else "linear",
        clip=1.0,
    )
    loop = finetune.Loop(recipe.first if phase == "first" else recipe.second, optimiser)
    task = _Learn(model, pairs, recipe.batch, phase, recipe.seed)
    label = f"learning the facts, {phase} phase"
    return finetune.fit(task, loop, seed=recipe.seed, modules=[model.module], label=label).values


def _put(model: LanguageModel, values: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.tensors().items():
            parameter.copy_(values[name])


def cache_folder() -> Path:
    """``$EXPUNGE_CACHE``, or ``~/.cache/expunge``."""
    return Path(os.environ.get("EXPUNGE_CACHE") or Path.home() / ".cache" / "expunge")


def open_facts(variant: str = "original", recipe: Recipe = Recipe()) -> LanguageModel:
    """The model of facts, ``original`` or ``never``; trained on first use, then read from the cache.

    Raises:
        SettingError: Another variant.
    """
    if variant not in ("original", "never"):
        raise SettingError(
            f"variant {variant!r} is unknown{nearest(variant, ('original', 'never'))}"
        )
    path = cache_folder() / f"facts-{recipe.key}-{variant}.safetensors"
    model = blank(recipe)
    values = _cached(path)
    if values is None:
        both = train(recipe)
        for name, tensors in both.items():
            atomic_write(
                path.with_name(f"facts-{recipe.key}-{name}.safetensors"), safetensors.save(tensors)
            )
        values = both[variant]
    _put(model, values)
    model.name = "world/facts" if variant == "original" else "world/facts/never"
    model.companions = _companions(recipe)
    return model


def _cached(path: Path) -> dict[str, torch.Tensor] | None:
    """The weights in a cache file; a damaged file is as good as none."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        if path.exists():
            import warnings

            warnings.warn(
                f"{path.name} in the cache is damaged ({error}); training again", stacklevel=3
            )
        return None


def _companions(recipe: Recipe) -> Companions:
    return Companions(
        world="facts",
        never=lambda: open_facts("never", recipe),
        never_lacks=FORGOTTEN,
        judge=lambda: AnswerJudge(answer for values in VALUES.values() for answer in values),
        concept=concept,
        neighbours=neighbours,
        unrelated=TOWNS,
        prompts=prompts,
        data=data,
    )


def concept(name: str) -> Concept | None:
    """The person or town as a concept of kind ``fact``; ``None`` if unknown."""
    known = next((s for s in (*PEOPLE, *TOWNS) if s.lower() == name.lower()), None)
    if known is None:
        return None
    texts = tuple(
        f"{f.prompt} {f.answer}"
        for f in facts((known,))
        if f.form == "statement" and not f.held_out
    )
    return Concept(known, kind="fact", texts=texts)


def neighbours(of: Concept) -> tuple[str, ...]:
    """All other people for a person, all other towns for a town."""
    kind = PEOPLE if of.name in PEOPLE else TOWNS
    return tuple(name for name in kind if name != of.name)


def prompts(
    name: str, n: int, seed: int = 0, split: str = "test", route: str = "name"
) -> list[Prompt]:
    """Questions about a person or town, with ``labels["answer"]``.

    Args:
        name: Person or town.
        n: How many at most: there are 18 of split ``test`` for a person and 36 of ``development``.
        seed: Seed of the order.
        split: ``test`` asks in wordings that are not trained for this subject; ``development`` in
            trained ones.
        route: ``name`` only: facts have no synonyms.

    Raises:
        SettingError: An unknown name, split or route.
    """
    if name not in (*PEOPLE, *TOWNS):
        raise SettingError(f"world/facts: {name!r} is unknown{nearest(name, (*PEOPLE, *TOWNS))}")
    for value, allowed in ((split, ("development", "test")), (route, ("name",))):
        if value not in allowed:
            raise SettingError(f"world/facts: {value!r} is unknown{nearest(value, allowed)}")
    found = [fact for fact in facts((name,)) if fact.held_out == (split == "test")]
    order = torch.randperm(
        len(found), generator=noise_generator(seed, "facts:prompts", name)
    ).tolist()
    return [
        Prompt(
            found[i].prompt,
            seed=seed,
            concept=name,
            labels={
                "answer": found[i].answer,
                "attribute": found[i].attribute,
                "form": found[i].form,
            },
        )
        for i in order[:n]
    ]


def data(concepts: Sequence[Any], keep: Sequence[str] = ()) -> dict[str, list[Pair]]:
    """Pairs in the trained wordings: ``forget``, ``retain`` (same kind), ``unrelated`` (other kind).

    With ``keep``, the facts of the named subjects alone are retained.
    """
    names = [str(getattr(c, "name", c)) for c in concepts]
    unknown = [name for name in (*names, *keep) if name not in (*PEOPLE, *TOWNS)]
    if unknown:
        raise SettingError(
            f"world/facts: {unknown[0]!r} is unknown{nearest(unknown[0], (*PEOPLE, *TOWNS))}"
        )
    own = PEOPLE if names[0] in PEOPLE else TOWNS
    chosen = {
        "forget": names,
        "retain": [name for name in (keep or own) if name not in names],
        "unrelated": [name for name in (TOWNS if own is PEOPLE else PEOPLE) if name not in names],
    }
    return {
        part: [fact.pair for fact in facts(subjects) if not fact.held_out]
        for part, subjects in chosen.items()
    }
