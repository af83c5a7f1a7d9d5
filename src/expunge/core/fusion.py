"""What erasers share that train a change for each concept and fuse all of them into keys and values.

    own = [pairs(method, model, concept) for concept in concepts]
    general, domain = preserved(method, model, concepts, keep, captions)
    moments = fused(group, texts, changes, prior(method, group, general, domain))

With ``W_c`` the weights of concept ``c`` with its change, ``x`` all rows of its texts, ``W0`` the weights as they are
and ``P = p (N_g C_g + w N_d C_d)``, ``C_g`` and ``C_d`` the mean over general texts and texts of the domain of
``sum k k^T``, the moments stand for

    W = (sum_c W_c sum x x^T + W0 P + ridge W_centre) (sum_c sum x x^T + P + ridge I)^{-1}

Sources: MACE, arXiv 2403.06135 (equation and caches); ANT, arXiv 2504.12782 (the same, without a refinement).

``method`` is any eraser with the settings ``templates``, ``erase_phrases``, ``guide``, ``context_prompts``,
``general_prompts``, ``preserve_scale`` (p), ``domain_scale`` (w), ``general_texts`` (N_g), ``domain_texts`` (N_d).
The texts of the templates are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..concept import Concept, common_kind, listed
from ..errors import SettingError
from .closed_form import ValueMoments
from .mentions import without
from .projections import Projections, erased_pairs, kept_texts, registered_texts
from .prompt_templates import with_place
from .token_policy import Pair, accumulate

__all__ = ["PLAIN", "STYLED", "fused", "pairs", "preserved", "prior", "thirty"]

PLAIN = tuple(
    f"{form} of {{}}{place}"
    for form in ("a photo", "a portrait", "a picture", "an image", "a close-up", "a drawing")
    for place in ("", " on a street", " at home", " in the rain", " at night")
)
STYLED = tuple(
    f"{form}{subject} by {{}}"
    for form in ("a painting", "a drawing", "a picture", "an artwork", "an image", "a print")
    for subject in ("", " of a city", " of a forest", " of a river", " of a person")
)
"""Thirty templates for styles; the others are for everything else."""


def thirty(kind: str) -> tuple[str, ...]:
    """The templates for a kind of concept."""
    return STYLED if kind == "style" else PLAIN


def pairs(method: Any, model: Any, concept: Concept) -> list[Pair]:
    """Every text of a concept, and the same with its mapping concept."""
    with_place(method.id, "templates", method.templates)
    own = erased_pairs(
        [concept],
        method.guide,
        phrases=method.erase_phrases,
        templates=method.templates or thirty(concept.kind),
    )
    more, _ = registered_texts(
        model, [concept], method.guide, method.context_prompts, 0, phrases=method.erase_phrases
    )
    return list(dict.fromkeys([*own, *more]))


def preserved(
    method: Any,
    model: Any,
    concepts: Sequence[Concept],
    keep: Sequence[Any],
    captions: Sequence[str],
) -> tuple[list[str], list[str]]:
    """General captions, and texts of the domain; none of either where ``p`` is zero.

    Raises:
        SettingError: There is nothing to preserve, though ``p`` is not zero.
    """
    if not method.preserve_scale:
        return [], []
    told = kept_texts(keep)
    general = list(captions)
    if not general:
        general = registered_texts(model, concepts, method.guide, 0, method.general_prompts, told)[
            1
        ]
    domain: list[str] = []
    if method.domain_scale:
        kind = common_kind(concepts) or "object"
        by_form: dict[tuple[str, ...], list[Any]] = {}
        for entry in listed(keep):
            own = entry.kind if isinstance(entry, Concept) else kind
            by_form.setdefault(method.templates or thirty(own), []).append(entry)
        domain = [text for forms, own in by_form.items() for text in kept_texts(own, forms)]
        domain += without(_contexts(method, model, told), [n for c in concepts for n in c.names])
    if not general and not domain:
        raise SettingError(
            f"{method.id}: preserve_scale is {method.preserve_scale:g}, but there is nothing to preserve; pass "
            'general captions as data={"captions": [...]}, name what to keep, or set preserve_scale=0 and a ridge'
        )
    return general, list(dict.fromkeys(domain))


def _contexts(method: Any, model: Any, told: Sequence[str]) -> list[str]:
    """Whole development prompts of kept concepts that the model's world knows."""
    companions = model.companions
    if companions is None or companions.prompts is None or not method.context_prompts:
        return []
    known = [found.name for name in told if (found := companions.concept(name)) is not None]
    return [
        prompt.text
        for name in dict.fromkeys(known)
        for prompt in companions.prompts(name, method.context_prompts, split="development")
    ]


def prior(
    method: Any, group: Projections, general: Sequence[str], domain: Sequence[str]
) -> tuple[Tensor, int]:
    """``P`` and the number of rows it was measured on."""
    total, rows = torch.zeros(group.width, group.width, dtype=torch.float64), 0
    p = method.preserve_scale
    weights = p * method.general_texts, p * method.domain_scale * method.domain_texts
    for texts, weight in zip((general, domain), weights, strict=True):
        if texts:
            found = accumulate(group.text, (), texts, "all_rows", erase=0.0, keep=1.0)
            total += weight / len(texts) * found.kept
            rows += found.keep_rows
    return total, rows


def fused(
    group: Projections,
    texts: Sequence[Sequence[str]],
    changes: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
    prior: tuple[Tensor, int],
    centres: Mapping[str, Tensor] | None = None,
) -> ValueMoments:
    """Every concept's own values for all rows of its texts, the present ones for the prior.

    Args:
        group: The matrices.
        texts: Texts of each concept.
        changes: Of each concept: name -> ``up (out, r)`` and ``down (r, width)``, added to the centres.
        prior: See :func:`prior`.
        centres: What the changes were trained on; default: the present matrices.
    """
    moments = ValueMoments(group.weights if centres is None else centres)
    for own, change in zip(texts, changes, strict=True):
        found = accumulate(group.text, (), own, "all_rows", erase=0.0, keep=1.0)
        moments.erase_moment(found.kept, found.keep_rows, change)
    moments.keep_moment(*prior, originals=None if centres is None else group.weights)
    return moments
