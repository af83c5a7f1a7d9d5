"""Who judges pictures: the model's own judge, or a CLIP that the user names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..cli import common
from ..errors import InputError, ModelError

if TYPE_CHECKING:
    from ..concept import Concept
    from ..method import Judge
    from ..models.base import Model

__all__ = ["clip_judge", "judge_of"]


def judge_of(
    model: Model, concepts: Sequence[Concept], clip: str | None, labels: Sequence[str]
) -> Judge:
    """The judge of an audit.

    Args:
        model: Its own judge comes first, unless a CLIP is named.
        concepts: What is asked about.
        clip: Folder or hub id of a CLIP.
        labels: What the CLIP tells the concepts from.

    Raises:
        InputError: There is no judge at all, or the CLIP has nothing to tell the concepts from.
    """
    own = common.own_judge(model)
    if own is not None and not clip:
        return own
    if not clip:
        raise InputError(
            f"{model.name} has no judge of its own; name a CLIP (a folder or a hub id) and what it is to tell "
            "the concept from"
        )
    if model.family == "language":
        raise InputError("a CLIP judges pictures; this model writes texts")
    names = list(
        dict.fromkeys(
            [*(c.name for c in concepts), *(label.strip() for label in labels if label.strip())]
        )
    )
    if len(names) < 2:
        raise InputError(
            "a CLIP needs something to tell the concept from: name at least one other thing"
        )
    return clip_judge(clip, names)


def clip_judge(name: str, labels: Sequence[str]) -> Judge:
    """A zero-shot judge on a CLIP of the library; safetensors only.

    Raises:
        ModelError: It cannot be opened.
    """
    from transformers import AutoTokenizer, CLIPModel

    from ..measure.clip_score import ClipScore, ClipZeroShot

    try:
        model: Any = CLIPModel.from_pretrained(name, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{name}: cannot be opened as a CLIP ({reason})") from error
    return ClipZeroShot(ClipScore(model.eval(), tokenizer, name), labels)
