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

from ..concept import Concept
from ..edit import Edit, deltas
from ..errors import UnsupportedModel
from .closed_form import Solution, ValueMoments, gram, layer_changes, moved
from .factors import thin_factors
from .mentions import exchanged
from .token_policy import Pair, stream_rows, unique_pairs

if TYPE_CHECKING:
    from ..method import Method

__all__ = [
    "Projections",
    "edited_texts",
    "erased_pairs",
    "guide_of",
    "kept_texts",
    "per_layer_edit",
    "registered_texts",
    "shared_edit",
]

STYLE_TEMPLATES = ("painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}")
OBJECT_TEMPLATES = (
    "image of {}",
    "photo of {}",
    "portrait of {}",
    "picture of {}",
    "painting of {}",
)


class Projections:
    """The text projections of a model as it is now.

    Attributes:
        names: Canonical names.
        weights: Name -> present matrix ``(out, width)``, edits included; not copied.
        originals: Name -> matrix of the unedited model; not copied.
        width: Width of the text embeddings.

    Raises:
        UnsupportedModel: The matrices take rows of different widths, so no single solve serves them.
    """

    def __init__(self, model: Any) -> None:
        tensors = model.tensors()
        self.names = tuple(model.text_projections())
        self.weights = {name: tensors[name].detach() for name in self.names}
        saved = model.edits.originals
        self.originals = {name: saved.get(name, self.weights[name]) for name in self.names}
        widths = {weight.shape[1] for weight in self.weights.values()}
        if len(widths) != 1 or any(weight.ndim != 2 for weight in self.weights.values()):
            raise UnsupportedModel(
                f"{model.name}: the text projections take rows of widths {sorted(widths)}; "
                "closed-form edits need one width"
            )
        self.width = widths.pop()

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
    """
    if guide is not None:
        return guide
    if concept.anchor is not None:
        return concept.anchor
    return "art" if concept.kind == "style" else ""


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


def kept_texts(keep: Sequence[Concept | str], templates: Sequence[str] = ()) -> list[str]:
    """The texts of what is to be kept: names and phrases of concepts, prompts as they are."""
    names: list[str] = []
    for entry in keep:
        names += entry.names if isinstance(entry, Concept) else [str(entry)]
    return list(
        dict.fromkeys(form.replace("{}", name) for name in names for form in ("{}", *templates))
    )


def registered_texts(
    model: Any,
    concepts: Sequence[Concept],
    guide: str | None,
    contexts: int,
    general: int,
    told: Sequence[str] = (),
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
    """
    companions = model.companions
    if companions is None:
        return [], []
    known = [concept for concept in concepts if companions.concept(concept.name) is not None]
    pairs: list[Pair] = []
    for concept in known if contexts and companions.prompts is not None else ():
        instead = guide_of(concept, guide)
        for route in ("name", "phrase") if concept.phrases else ("name",):
            for prompt in companions.prompts(
                concept.name, contexts, seed=0, split="development", route=route
            ):
                text, name = exchanged(prompt.text, concept.names, instead)
                if name is not None:
                    pairs.append(Pair(prompt.text, text, name))
    texts: list[str] = []
    if general and companions.captions is not None:
        measured = [name for concept in known for name in companions.neighbours(concept)]
        listed = {name.lower() for name in told}
        untold = [n for n in (*measured, *companions.unrelated) if n.lower() not in listed]
        avoid = dict.fromkeys([*(concept.name for concept in known), *untold])
        texts = companions.captions(general, seed=1, without=tuple(avoid))
    return unique_pairs(pairs), list(dict.fromkeys(texts))


def edited_texts(
    method: Any, model: Any, concepts: Sequence[Concept], keep: Sequence[Concept | str]
) -> tuple[list[Pair], list[str]]:
    """All pairs to erase and all texts to keep, by the settings that the closed-form editors share.

    They are ``guide``, ``erase_phrases``, ``expand_prompts``, ``templates``, ``context_prompts`` and
    ``general_prompts``; see :func:`erased_pairs`, :func:`kept_texts` and :func:`registered_texts`.
    """
    pairs = erased_pairs(
        concepts,
        method.guide,
        phrases=method.erase_phrases,
        expand=method.expand_prompts,
        templates=method.templates,
    )
    more, general = registered_texts(
        model,
        concepts,
        method.guide,
        method.context_prompts,
        method.general_prompts,
        kept_texts(keep),
    )
    kept = dict.fromkeys([*kept_texts(keep, method.templates), *general])
    return unique_pairs([*pairs, *more]), list(kept)


def _observed(
    model: Any, projections: Projections, shift: torch.Tensor, avoid: Sequence[str]
) -> dict[str, Any]:
    """What moved: keys and values of the empty prompt, and of names that have nothing to do with it.

    ``shift`` is the Gram matrix of the layers' changes.
    """
    found: dict[str, Any] = {}
    empty = torch.cat(list(stream_rows(model, [""], "all_rows")))
    found["empty_prompt_change"] = moved(shift, projections.gram, empty) ** 0.5
    companions = model.companions
    unrelated = [name for name in (companions.unrelated if companions else ()) if name not in avoid]
    rows = list(stream_rows(model, unrelated, "all_rows"))
    found["drift"] = moved(shift, projections.gram, torch.cat(rows)) if rows else None
    return found


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
    projections: Projections,
    solution: Solution,
    *,
    keep: Sequence[str],
    seed: int,
    report: Mapping[str, Any],
    **provenance: Any,
) -> Edit:
    """The edit ``W_l -> W_l (I + D)``, stored once as thin factors of ``D``, with its report.

    The report says how far the solve can be trusted (``condition``, ``ridge_share``), how large the
    change is (``relative_change``, by layer in ``layers``, ``rank``, ``factor_error``) and what else
    moved (``empty_prompt_change``: relative norm; ``drift``: mean squared relative change of the
    unrelated names a world registers, ``None`` without them).
    """
    left, right, error = thin_factors(solution.change, solution.rank_bound)
    layers = layer_changes(projections.weights, left, right)
    shift = solution.change.T @ projections.gram @ solution.change
    full = {
        "condition": solution.condition,
        "ridge_share": solution.ridge_share,
        "rank": int(left.shape[1]) if solution.change.any() else 0,
        "factor_error": error,
        "relative_change": _summary(layers, projections.weights),
        "layers": layers,
        **_observed(model, projections, shift, [n for c in concepts for n in c.names]),
        **report,
    }
    return Edit.make(
        method, model, concepts, kind="shared-low-rank",
        tensors={deltas.LEFT: left.float(), deltas.RIGHT: right.float()},
        targets=projections.names, keep=keep, seed=seed, report=full, **provenance,
    )  # fmt: skip


def per_layer_edit(
    method: Method,
    model: Any,
    concepts: Sequence[Concept],
    projections: Projections,
    moments: ValueMoments,
    ridge: float,
    *,
    keep: Sequence[str],
    seed: int,
    report: Mapping[str, Any],
    **provenance: Any,
) -> Edit:
    """The edit of per-layer targets: low-rank factors or dense changes, whichever are smaller.

    The report is that of :func:`shared_edit`, what moved summed over the layers' own changes.
    """
    changes, factor = moments.solve(ridge)
    shift = torch.zeros(projections.width, projections.width, dtype=torch.float64)
    dense, thin, layers, rank = {}, {}, {}, 0
    for name, change in changes:
        dense[deltas.DENSE + name] = change.float()
        left, right, _ = thin_factors(change, moments.erase_rows)
        thin[deltas.UP + name], thin[deltas.DOWN + name] = left.float(), right.float()
        layers[name] = float(change.norm()) / max(
            float(projections.weights[name].float().norm()), 1e-30
        )
        rank = max(rank, int(left.shape[1]))
        shift += change.T @ change
    smaller = sum(t.numel() for t in thin.values()) < sum(t.numel() for t in dense.values())
    full = {
        "condition": factor.condition,
        "ridge_share": moments.ridge_share(ridge),
        "rank": rank,
        "erase_rows": moments.erase_rows,
        "keep_rows": moments.keep_rows,
        "relative_change": _summary(layers, projections.weights),
        "layers": layers,
        **_observed(model, projections, shift, [n for c in concepts for n in c.names]),
        **report,
    }
    return Edit.make(
        method, model, concepts, kind="low-rank" if smaller else "dense",
        tensors=thin if smaller else dense, targets=projections.names,
        keep=keep, seed=seed, report=full, **provenance,
    )  # fmt: skip
