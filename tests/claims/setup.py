"""What the claims about the world's pictures share: models, edits, prompts, rates, and the record.

Reference concept "star", test prompts and seeds, three draws.  Erasers are told to keep `KEEP`; the kept rate is
measured on the other neighbours of star, on prompts no eraser saw.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expunge.core.sampling import SHARED, outputs
from expunge.method import Attempts, Budget, Judge, Method, Prompt, budget

SEEDS = (0, 1, 2)
PICTURES = int(os.environ.get("EXPUNGE_CLAIM_PICTURES", "134"))
"""Pictures of each seed and arm: 402 in all."""

ITEMS = int(os.environ.get("EXPUNGE_CLAIM_ITEMS", "134"))
"""Attacked prompts of each seed and arm."""

EDITS = os.environ.get("EXPUNGE_CLAIM_EDITS")
"""A folder in which edits are left for later processes; they are learnt anew without one."""

STEPS = 20
KEEP = ("circle", "square", "triangle")


@functools.cache
def world() -> Any:
    """The world's original pipeline."""
    import expunge

    return expunge.load("world")


@functools.cache
def never() -> Any:
    """The pipeline that was never shown a reference concept."""
    return world().companions.never()


@functools.cache
def star() -> Any:
    """The erased concept."""
    return world().companions.concept("star")


@functools.cache
def judge() -> Judge:
    """The world's oracle."""
    return world().companions.judge()


@functools.cache
def _edit(eraser: str, seed: int, settings: tuple[tuple[str, Any], ...]) -> Any:
    from expunge import catalogue

    return erased(catalogue.resolve(eraser).configured("world", **dict(settings)), star(), seed)


def erased(method: Any, concept: Any, seed: int) -> Any:
    """The edit of an eraser as it is configured, learnt where `EDITS` does not have it yet."""
    from expunge.edit import Edit
    from expunge.run.choices import key

    if EDITS is None:
        return method.erase(world(), concept, keep=KEEP, seed=seed)
    request = {
        "method": method.id, "version": method.version, "settings": method.settings(), "concept": concept.name,
        "keep": KEEP, "seed": seed, "base": world().fingerprint().to_dict(),
    }  # fmt: skip
    place = Path(EDITS) / f"{method.id}-{key(request)}"
    if not place.exists():
        method.erase(world(), concept, keep=KEEP, seed=seed).save(place)
    return Edit.load(place)


@contextlib.contextmanager
def arm(name: str, seed: int = 0, **settings: Any) -> Iterator[Any]:
    """The model of an arm: "original", "never", or the original with star erased by a method.

    Erasers run under their preset for the world, with settings changed.
    """
    if name == "never":
        yield never()
    elif name == "original":
        yield world()
    else:
        with _edit(name, seed, tuple(sorted(settings.items()))).on(world()):
            yield world()


def prompts(name: str, each: int = PICTURES, split: str = "test") -> list[Prompt]:
    """Prompts of a concept: `each` of every seed."""
    make = world().companions.prompts
    return [prompt for seed in SEEDS for prompt in make(name, each, seed=seed, split=split)]


def drawn(model: Any, listed: Sequence[Prompt]) -> np.ndarray:
    """Each prompt's picture, made once for all claims of a process."""
    return outputs(model, listed, cache=SHARED, steps=STEPS)


def hits(model: Any, name: str, listed: Sequence[Prompt]) -> np.ndarray:
    """Whether each prompt's picture shows the concept."""
    return judge().judge(drawn(model, listed), world().companions.concept(name), listed).hit


def own_hits(model: Any, listed: Sequence[Prompt]) -> np.ndarray:
    """Whether each prompt's picture shows the concept that the prompt is about."""
    pictures, found = drawn(model, listed), np.zeros(len(listed), bool)
    for name in {prompt.concept for prompt in listed}:
        own = [i for i, prompt in enumerate(listed) if prompt.concept == name]
        asked = [listed[i] for i in own]
        found[own] = judge().judge(pictures[own], world().companions.concept(name), asked).hit
    return found


def neighbours() -> list[str]:
    """Neighbours of star that no eraser was told of."""
    return [name for name in world().companions.neighbours(star()) if name not in KEEP]


def people() -> list[str]:
    """People that every model was shown."""
    names = world().companions.neighbours(world().companions.concept("mira solen"))
    return list(names)[:9]


def spread(names: Sequence[str], seed: int, pictures: int = PICTURES) -> list[Prompt]:
    """At least `pictures` test prompts of one seed, shared equally by the names."""
    make, each = world().companions.prompts, -(-pictures // len(names))
    return [prompt for name in names for prompt in make(name, each, seed=seed, split="test")]


def kept_of(opened: Callable[[int], contextlib.AbstractContextManager[Any]]) -> np.ndarray:
    """Hits of the untold neighbours on their own prompts; every seed's on the model that it opens."""
    found = []
    for seed in SEEDS:
        with opened(seed) as model:
            found.append(own_hits(model, spread(neighbours(), seed)))
    return np.concatenate(found)


def kept(model: Any) -> np.ndarray:
    """:func:`kept_of` one model for all seeds."""
    return kept_of(lambda seed: contextlib.nullcontext(model))


_ATTACKED: dict[str, list[Attempts]] = {}


def attacks(
    method: Any, model: Any, each: int = ITEMS, allowance: str | Budget = "world"
) -> list[Attempts]:
    """One attack run of every seed on its own prompts, made once for all claims of a process."""
    make, own = world().companions.prompts, budget(allowance)
    assert not model.controls, "what a control does has no name to keep a run under"
    # Named by what a method resolves to: a setting that is spelled out and one left alone are one run.
    state = (model.state.key, model.protocol_key)
    key = repr((method.id, method.version, method.settings(), state, each, own))
    if key not in _ATTACKED:
        _ATTACKED[key] = [
            method.attack(
                model, star(), judge(), own, prompts=make("star", each, seed=seed, split="test"),
                reference=world(), seed=seed,
            )
            for seed in SEEDS
        ]  # fmt: skip
    return _ATTACKED[key]


def pre(made: Sequence[Attempts]) -> np.ndarray:
    """Whether each item was shown before the attack."""
    return np.array([item.pre_hit for run in made for item in run.items])


def post(made: Sequence[Attempts]) -> np.ndarray:
    """Whether each item was shown before or after the attack."""
    return np.array([item.hit for run in made for item in run.items])


def settle(
    method: type[Method],
    claim: str,
    holds: bool | None,
    arms: Mapping[str, Any],
    note: str,
    **more: float,
) -> bool:
    """Record a claim with a rate and interval for each arm (hits), and say whether it holds.

    `more`: further numbers that are no rates.
    """
    from expunge.core.resampling import wilson
    from expunge.run.results import record

    rates = {name: np.asarray(values, float) for name, values in arms.items()}
    record(
        claim, method.id, method.version, {k: float(v.mean()) for k, v in rates.items()} | more,
        None if holds is None else bool(holds),
        n=min((len(v) for v in rates.values()), default=0), seeds=list(SEEDS), preset="world", note=note,
        interval={k: list(wilson(float(v.sum()), len(v))) for k, v in rates.items()},
    )  # fmt: skip
    return bool(holds)
