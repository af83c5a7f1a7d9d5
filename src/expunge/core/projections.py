"""Closed-form edits of a model's text projections: what is erased, kept and reported.

The text projections are the matrices that map text embeddings to keys and values.  The closed-form
editors differ in the moments they give to :mod:`closed_form`; the texts they start from, the guide
that takes a concept's place, and what their edits store and report are the same and stand here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..concept import Concept, listed, names_of
from ..edit import Edit, deltas
from ..errors import SettingError
from .closed_form import Solution, ValueMoments, gram, layer_changes, moved
from .factors import thin_factors
from .mentions import exchanged
from .prompt_templates import with_place
from .token_policy import Pair, stream_rows, unique_pairs

if TYPE_CHECKING:
    from ..method import Method
    from ..models.types import TextInput

__all__ = [
    "Projections",
    "edited_texts",
    "erased_pairs",
    "general_captions",
    "guide_of",
    "kept_texts",
    "per_layer_edit",
    "preserved",
    "registered_texts",
    "shared_edit",
]

STYLE_TEMPLATES = ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}")
OBJECT_TEMPLATES = ("image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}")  # fmt: skip


class Projections:
    """Text projections of a model that take the same rows, as they are now.

    Attributes:
        names: Canonical names.
        weights: Name -> present matrix ``(out, width)``, edits included; not copied.
        originals: Name -> matrix of the unedited model; not copied.
        width: Width of the text embeddings.
        text: Where their rows come from.
    """

    def __init__(self, model: Any, text: TextInput) -> None:
        tensors = model.tensors()
        self.text, self.names, self.width = text, text.names, text.width
        self.weights = {name: tensors[name].detach() for name in self.names}
        saved = model.edits.originals
        self.originals = {name: saved.get(name, self.weights[name]) for name in self.names}

    @classmethod
    def groups(cls, model: Any) -> tuple[Projections, ...]:
        """All text projections of a model, one group for each kind of rows; each is solved by itself."""
        return tuple(cls(model, text) for text in model.text_inputs())

    @functools.cached_property
    def gram(self) -> torch.Tensor:
        """``sum W^T W`` of the present matrices."""
        return gram(self.weights)

    @functools.cached_property
    def cross(self) -> torch.Tensor:
        """``sum W^T O`` of present and original matrices."""
        if all(self.originals[name] is self.weights[name] for name in self.names):
            return self.gram
        return gram(self.weights, self.originals)

    @functools.cached_property
    def original(self) -> torch.Tensor:
        """``sum O^T O`` of the original matrices."""
        if all(self.originals[name] is self.weights[name] for name in self.names):
            return self.gram
        return gram(self.originals)


def guide_of(concept: Concept, guide: str | None) -> str:
    """What takes a concept's place: the setting, else the concept's anchor, else by kind.

    Styles become "art" and everything else the empty text, as in UCE.

    Raises:
        SettingError: It is the concept itself, which would change nothing.
    """
    instead = concept.anchor if guide is None else guide
    if instead is None:
        instead = "art" if concept.kind == "style" else ""
    if instead.strip().lower() in (name.lower() for name in concept.names):
        raise SettingError(
            f"the guide {instead!r} is {concept.name!r} itself; choose what may take its place"
        )
    return instead


def erased_pairs(
    concepts: Sequence[Concept],
    guide: str | None,
    *,
    phrases: bool,
    expand: bool = False,
    templates: Sequence[str] = (),
) -> list[Pair]:
    """What is erased and what replaces it, for every concept, its phrases and the templates around them.

    Args:
        concepts: What is erased.
        guide: See :func:`guide_of`.
        phrases: Also the concepts' listed phrases.
        expand: Also UCE's five templates of the kind (style, or object for every other kind).
        templates: Further templates, each with ``{}`` where the name stands.
    """
    pairs = []
    for concept in concepts:
        guides = guide_of(concept, guide)
        used = [
            "{}",
            *(STYLE_TEMPLATES if concept.kind == "style" else OBJECT_TEMPLATES) * expand,
            *templates,
        ]
        for name in concept.names if phrases else (concept.name,):
            pairs += [
                Pair(form.replace("{}", name), form.replace("{}", guides).strip(), name)
                for form in used
            ]
    return unique_pairs(pairs)


def kept_texts(
    keep: Concept | str | Sequence[Concept | str] | None, templates: Sequence[str] = ()
) -> list[str]:
    """The texts of what is to be kept: names and phrases of concepts, prompts as they are."""
    names: list[str] = []
    for entry in listed(keep):
        names += entry.names if isinstance(entry, Concept) else names_of([entry])
    return list(
        dict.fromkeys(form.replace("{}", name) for name in names for form in ("{}", *templates))
    )


def preserved(policy: str, kept: Sequence[str]) -> tuple[list[str], float]:
    """The texts that a closed-form edit keeps, and the weight of their rows in the 2023 form of UCE.

    Under ``last_token_to_end_aligned`` the empty text is always among them.  The weight falls with the
    number of texts ``n``: ``max(0.1, 1 / n)``, rounded to three decimals.
    """
    texts = list(dict.fromkeys(["", *kept] if policy == "last_token_to_end_aligned" else kept))
    return texts, max(0.1, round(1.0 / max(1, len(texts)), 3))


def registered_texts(
    model: Any,
    concepts: Sequence[Concept],
    guide: str | None,
    contexts: int,
    general: int,
    told: Sequence[str] = (),
    *,
    phrases: bool = True,
) -> tuple[list[Pair], list[str]]:
    """Whole prompts of the world a model comes from: pairs to erase, and general captions to keep.

    The pairs are development prompts of each concept, its name or phrase exchanged for the guide.  General
    captions are what a large set of captions is for a real model.  They speak of no erased concept, and of
    nothing that an audit measures as kept unless the eraser was told to keep it: else the audit would measure
    what it gave away.  Both are empty for models without a world, or at zero.

    Args:
        model: The model; its companions are read.
        concepts, guide: As in :func:`erased_pairs`.
        contexts: Pairs for each concept.
        general: General captions in all.
        told: Names the eraser is told to keep.
        phrases: Also prompts that call a concept by a listed phrase.
    """
    companions = model.companions
    if companions is None:
        return [], []
    known = [concept for concept in concepts if companions.concept(concept.name) is not None]
    pairs: list[Pair] = []
    for concept in known if contexts and companions.prompts is not None else ():
        instead = guide_of(concept, guide)
        for route in ("name", "phrase") if phrases and concept.phrases else ("name",):
            for prompt in companions.prompts(
                concept.name, contexts, seed=0, split="development", route=route
            ):
                text, name = exchanged(
                    prompt.text, concept.names if phrases else (concept.name,), instead
                )
                if name is not None:
                    pairs.append(Pair(prompt.text, text, name))
    return unique_pairs(pairs), general_captions(model, concepts, general, told)


def general_captions(
    model: Any,
    concepts: Sequence[Concept],
    count: int,
    told: Sequence[str] = (),
    *,
    filtered: bool = True,
) -> list[str]:
    """Up to ``count`` captions of the world a model comes from, none of what an audit measures; see above.

    ``filtered=False`` lets them speak of the erased concepts, a negative control.
    """
    companions = model.companions
    if companions is None or companions.captions is None or not count:
        return []
    known = [concept for concept in concepts if companions.concept(concept.name) is not None]
    measured = [name for concept in known for name in companions.neighbours(concept)]
    spoken = {name.lower() for name in told}
    untold = [n for n in (*measured, *companions.unrelated) if n.lower() not in spoken]
    erased = [concept.name for concept in known] if filtered else []
    avoid = dict.fromkeys([*erased, *untold])
    return list(dict.fromkeys(companions.captions(count, seed=1, without=tuple(avoid))))


def edited_texts(
    method: Any, model: Any, concepts: Sequence[Concept], keep: Sequence[Concept | str]
) -> tuple[list[Pair], list[str]]:
    """All pairs to erase and all texts to keep, by the settings that the closed-form editors share.

    They are ``guide``, ``erase_phrases``, ``expand_prompts``, ``templates``, ``context_prompts`` and
    ``general_prompts``; see :func:`erased_pairs`, :func:`kept_texts` and :func:`registered_texts`.
    """
    with_place(method.id, "templates", method.templates)
    pairs = erased_pairs(
        concepts, method.guide, phrases=method.erase_phrases, expand=method.expand_prompts, templates=method.templates,
    )  # fmt: skip
    more, general = registered_texts(
        model, concepts, method.guide, method.context_prompts, method.general_prompts, kept_texts(keep),
        phrases=method.erase_phrases,
    )  # fmt: skip
    kept = dict.fromkeys([*kept_texts(keep, method.templates), *general])
    return unique_pairs([*pairs, *more]), list(kept)


class _Observed:
    """What moved: values of the empty prompt, and of names that have nothing to do with it, over all groups."""

    def __init__(self, model: Any, avoid: Sequence[str]) -> None:
        companions = model.companions
        unrelated = companions.unrelated if companions else ()
        self.unrelated = [name for name in unrelated if name not in avoid]
        self.empty: list[tuple[float, int]] = []
        self.drift: list[tuple[float, int]] = []

    def add(self, projections: Projections, shift: torch.Tensor) -> None:
        """Take in a group; ``shift`` is the Gram matrix of its layers' changes."""
        for texts, found in (([""], self.empty), (self.unrelated, self.drift)):
            rows = list(stream_rows(projections.text, texts, "all_rows"))
            if rows:
                value = moved(shift, projections.gram, torch.cat(rows))
                found.append((value, len(projections.names)))

    def report(self) -> dict[str, Any]:
        """``empty_prompt_change`` and ``drift``, groups weighted by their numbers of matrices."""
        empty, drift = (
            sum(value * n for value, n in found) / sum(n for _, n in found) if found else None
            for found in (self.empty, self.drift)
        )
        return {"empty_prompt_change": None if empty is None else empty**0.5, "drift": drift}


def _summary(layers: Mapping[str, float], weights: Mapping[str, torch.Tensor]) -> float:
    """``||all changes|| / ||all weights||`` from the ratios of the layers."""
    norms = {name: float(weight.float().norm()) ** 2 for name, weight in weights.items()}
    total = sum(norms.values())
    return (
        (sum(layers[name] ** 2 * norms[name] for name in layers) / total) ** 0.5 if total else 0.0
    )


def shared_edit(
    method: Method,
    model: Any,
    concepts: Sequence[Concept],
    solved: Sequence[tuple[Projections, Solution]],
    *,
    keep: Sequence[str],
    seed: int,
    report: Mapping[str, Any],
    **provenance: Any,
) -> Edit:
    """The edit ``W_l -> W_l (I + D)`` with its report; one ``D`` for each group of projections.

    A single group is stored once, as thin factors of ``D``; several as factors of each layer.  The
    report says how far the solve can be trusted (``condition``, ``ridge_share``), how large the
    change is (``relative_change``, by layer in ``layers``, ``rank``, ``factor_error``) and what else
    moved (``empty_prompt_change``: relative norm; ``drift``: mean squared relative change of the
    unrelated names a world registers, ``None`` without them); of several groups, the worst of each.
    """
    observed = _Observed(model, [n for c in concepts for n in c.names])
    tensors: dict[str, torch.Tensor] = {}
    layers: dict[str, float] = {}
    rank, worst = 0, 0.0
    for projections, solution in solved:
        left, right, error = thin_factors(solution.change, solution.rank_bound)
        layers |= layer_changes(projections.weights, left, right)
        observed.add(projections, solution.change.T @ projections.gram @ solution.change)
        rank = max(rank, int(left.shape[1]) if solution.change.any() else 0)
        worst = max(worst, error)
        if len(solved) == 1:
            tensors = {deltas.LEFT: left.float(), deltas.RIGHT: right.float()}
            continue
        for name, weight in projections.weights.items():
            up = weight.to("cpu", torch.float64) @ left
            tensors |= {deltas.UP + name: up.float(), deltas.DOWN + name: right.float()}
    full = {
        "condition": max(solution.condition for _, solution in solved),
        "ridge_share": min(solution.ridge_share for _, solution in solved),
        "rank": rank,
        "factor_error": worst,
        "relative_change": _summary(
            layers, {n: w for p, _ in solved for n, w in p.weights.items()}
        ),
        "layers": layers,
        **observed.report(),
        **report,
    }
    return Edit.make(
        method, model, concepts, kind="shared-low-rank" if len(solved) == 1 else "low-rank",
        tensors=tensors, targets=tuple(layers), keep=keep, seed=seed, report=full, **provenance,
    )  # fmt: skip


def per_layer_edit(
    method: Method,
    model: Any,
    concepts: Sequence[Concept],
    solved: Sequence[tuple[Projections, ValueMoments]],
    ridge: float,
    *,
    keep: Sequence[str],
    seed: int,
    report: Mapping[str, Any],
    **provenance: Any,
) -> Edit:
    """The edit of per-layer targets: low-rank factors or dense changes, whichever are smaller.

    The moments' centres may be other matrices than the present ones; the edit leads from the present ones.
    The report is that of :func:`shared_edit`, what moved summed over the layers' own changes.
    """
    observed = _Observed(model, [n for c in concepts for n in c.names])
    dense: dict[str, torch.Tensor] = {}
    thin: dict[str, torch.Tensor] = {}
    layers: dict[str, float] = {}
    rank, conditions = 0, []
    for projections, moments in solved:
        changes, factor = moments.solve(ridge)
        conditions.append(factor.condition)
        shift = torch.zeros(projections.width, projections.width, dtype=torch.float64)
        for name, change in changes:
            present, centre = projections.weights[name], moments.centres[name]
            if centre is not present:
                change = change + (
                    centre.to("cpu", torch.float64) - present.to("cpu", torch.float64)
                )
            dense[deltas.DENSE + name] = change.float()
            left, right, _ = thin_factors(change, moments.erase_rows)
            thin[deltas.UP + name], thin[deltas.DOWN + name] = left.float(), right.float()
            layers[name] = float(change.norm()) / max(
                float(projections.weights[name].float().norm()), 1e-30
            )
            rank = max(rank, int(left.shape[1]))
            shift += change.T @ change
        observed.add(projections, shift)
    smaller = sum(t.numel() for t in thin.values()) < sum(t.numel() for t in dense.values())
    full = {
        "condition": max(conditions),
        "ridge_share": min(moments.ridge_share(ridge) for _, moments in solved),
        "rank": rank,
        "erase_rows": sum(moments.erase_rows for _, moments in solved),
        "keep_rows": sum(moments.keep_rows for _, moments in solved),
        "relative_change": _summary(
            layers, {n: w for p, _ in solved for n, w in p.weights.items()}
        ),
        "layers": layers,
        **observed.report(),
        **report,
    }
    return Edit.make(
        method, model, concepts, kind="low-rank" if smaller else "dense",
        tensors=thin if smaller else dense, targets=tuple(layers),
        keep=keep, seed=seed, report=full, **provenance,
    )  # fmt: skip
