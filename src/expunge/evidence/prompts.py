"""Which prompts an audit uses, and which concepts it measures as kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..concept import Concept
from ..core.sampling import as_prompts, expand
from ..errors import ExpungeError, PromptError, nearest
from ..method import Prompt
from .arms import PromptSets

__all__ = ["ROUTES", "attacked", "prompt_sets"]

ROUTES = ("phrase", "unlisted", "euphemism", "metaphor")
TEMPLATES = (
    "a photo of {}",
    "{}",
    "a picture of {}",
    "a painting of {}",
    "a close view of {}",
    "a drawing of {}",
)
"""Used for picture models without a world where the caller gives no prompts."""


def prompt_sets(
    concept: Concept,
    companions: Any,
    *,
    family: str,
    prompts: Any = None,
    kept: Any = None,
    n: int = 100,
    kept_n: int = 20,
    seeds: int = 1,
    seed: int = 0,
    split: str = "test",
) -> PromptSets:
    """The prompts of one concept's audit.

    Args:
        concept: The concept.
        companions: What a world registered beside the model, or ``None``.
        family: Family of the model; picture models have templates to fall back on.
        prompts: Texts or prompts that name the concept, or a mapping from concept to them; a concept
            may be mapped to ``None``, for the usual prompts, but not be left out.
        kept: Names of kept concepts, or a mapping from name to prompts; default: all neighbours of
            the same kind and the world's unrelated set.
        n, kept_n: Prompts for the concept, each other route and each kept concept (``kept_n``).
        seeds: Outputs of each prompt.
        seed: Chooses the prompts.
        split: ``test``, or ``development`` while choosing settings.

    Raises:
        PromptError: There are no prompts for the concept, or the mapping has no such name.
    """
    ask = companions.prompts if companions is not None else None

    def found(name: str, count: int, route: str = "name") -> list[Prompt]:
        if ask is not None:
            return list(ask(name, count, seed=seed, split=split, route=route))
        if route != "name" or family == "language":
            raise PromptError(f"there are no prompts for {name!r}; give them with prompts=")
        return [
            Prompt(TEMPLATES[i % len(TEMPLATES)].format(name), i // len(TEMPLATES) + seed, name)
            for i in range(count)
        ]

    prompts = _given(prompts, concept)
    if prompts is not None:
        target = [
            p if p.concept else dataclasses.replace(p, concept=concept.name)
            for p in as_prompts(prompts, concept.name)
        ]
    else:
        target = found(concept.name, n)
    routes, missing = {}, {}
    for route in ROUTES:
        try:
            ways = found(concept.name, max(4, kept_n), route)
            if ways:
                routes[route] = expand(ways, seeds)
            else:
                missing[route] = "the world has no prompts of this kind for this concept"
        except (ExpungeError, ValueError, LookupError) as error:
            missing[route] = str(error) or "the world has no prompts of this kind for this concept"
    named = _kept_names(concept, companions, kept)
    chosen = {
        name: expand(as_prompts(given, name) if given is not None else found(name, kept_n), seeds)
        for name, given in named.items()
    }
    concepts = {name: _known(name, concept, companions) for name in chosen}
    return PromptSets(concept, expand(target, seeds), routes, chosen, concepts, missing)


def attacked(target: Sequence[Prompt], count: int) -> list[Prompt]:
    """The prompts that attacks are given: the first with distinct texts (one seed each), repeated texts after."""
    first = list({prompt.text: prompt for prompt in reversed(target)}.values())[::-1]
    rest = [prompt for prompt in target if prompt not in first]
    return [*first, *rest][:count]


def _given(prompts: Any, concept: Concept) -> Any:
    """The caller's own prompts of one concept; ``None`` stands for the usual ones."""
    if not isinstance(prompts, Mapping):
        return prompts
    if concept.name not in prompts:
        raise PromptError(
            f"prompts= has no entry for the concept {concept.name!r}{nearest(concept.name, prompts)}"
        )
    return prompts[concept.name]


def _kept_names(concept: Concept, companions: Any, kept: Any) -> dict[str, Sequence[Any] | None]:
    if isinstance(kept, Mapping):
        return dict(kept)
    if kept is not None:
        return {name if isinstance(name, str) else name.name: None for name in kept}
    if companions is None:
        return {}
    names = [*companions.neighbours(concept), *companions.unrelated]
    return {name: None for name in dict.fromkeys(names) if name.lower() != concept.name.lower()}


def _known(name: str, concept: Concept, companions: Any) -> Concept:
    known = companions.concept(name) if companions is not None else None
    return known if known is not None else Concept(name, kind=concept.kind)
