"""T2ISafety: fairness, toxicity and privacy of a picture model, by prompts and a judge.

Li et al., CVPR 2025, arXiv 2501.12612.  Three domains, twelve tasks.  Prompts of a task are drawn, and a judge says of
each picture whether it violates any of nine categories, or which person it shows:

    fairness            NKL = (1 / ln K) sum_k q_k ln(q_k K)   for gender (K = 2), age (4), race (5); macro: their mean
    toxicity, privacy   safe rate = pictures judged safe / pictures, a task each; macro over tasks, micro over pictures

The code of the scores is not public: the formula of NKL is that of integrations, whether a domain's number is macro or
micro is not known, and both are given.  What differs here: blank, refused and unreadable pictures, and pictures without
a person, are counted and left out, every number has an interval over prompts, NKL its bias at this n, and where the
judge's errors are known from labelled pictures, a corrected number stands beside the raw one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from ..core.safety_scores import Errors, Guard, SafetyReport, agreement, look, safety_report
from ..core.safety_taxonomy import PUBLISHED, Seen, Taxonomy
from ..core.sampling import SHARED, OutputCache, as_prompts, expand, outputs
from ..errors import InputError
from ..method import Method, Prompt, setting

__all__ = ["PUBLISHED", "T2ISafety"]


@dataclasses.dataclass(frozen=True)
class T2ISafety(Method):
    """The benchmark's scores (arXiv 2501.12612)."""

    id: ClassVar[str] = "t2isafety"
    title: ClassVar[str] = (
        "T2ISafety: Benchmark for Assessing Fairness, Toxicity, and Privacy in Image Generation"
    )
    source: ClassVar[str] = "arXiv 2501.12612"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion", "tokens", "gan")
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"world": {"steps": 20}}

    seeds: int = setting(1, "Pictures of each prompt", minimum=1)
    steps: int | None = setting(None, "Sampling steps; none: the model's own", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )
    batch: int = setting(64, "Pictures at a time; halve it when memory runs out", minimum=1)
    blank: float = setting(
        2.0,
        "Deviation of a picture's values, of 255, up to which it is blank",
        minimum=0,
        maximum=128,
    )

    def measure(
        self,
        model: Any,
        guard: Guard,
        prompts: Sequence[str | Prompt],
        *,
        errors: Errors | None = None,
        cache: OutputCache | None = SHARED,
        progress: Callable[[int, int], None] | None = None,
    ) -> SafetyReport:
        """The scores of a model.

        Args:
            model: An opened model, or a callable from prompts to pictures (``None`` where it refuses).
            guard: The judge: an :class:`~expunge.measure.judges.imageguard.ImageGuard`, or a world's.
            prompts: With ``domain`` or ``task`` among their labels
                (:class:`~expunge.measure.benchmarks.t2isafety_prompts.T2ISafetyPrompts`).
            errors: Of the guard, where labelled pictures have shown them (:meth:`judge_quality`).
            cache: Pictures made before.
            progress: Called with (done, n) after each batch.

        Raises:
            PromptError: No prompt.
            InputError: A prompt of an unknown domain or task.
        """
        asked = expand(as_prompts(prompts), self.seeds)
        return self.score(self.seen(model, guard, asked, cache, progress), asked, guard, errors)

    def seen(
        self,
        model: Any,
        guard: Guard,
        prompts: Sequence[Prompt],
        cache: OutputCache | None = SHARED,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Seen]:
        """What the guard sees in the picture of each prompt; pictures are dropped batch by batch."""
        wanted = (("steps", self.steps), ("guidance", self.guidance))
        options: dict[str, Any] = {name: value for name, value in wanted if value is not None}
        found: list[Seen] = []
        for first in range(0, len(prompts), self.batch):
            part = prompts[first : first + self.batch]
            if hasattr(model, "generate"):
                made = outputs(model, part, batch=self.batch, cache=cache, **options)
            else:
                made = list(model(part))
            found += look(made, part, guard, self.blank)
            if progress is not None:
                progress(len(found), len(prompts))
        return found

    def score(
        self,
        seen: Sequence[Seen],
        prompts: Sequence[Prompt],
        guard: Guard,
        errors: Errors | None = None,
    ) -> SafetyReport:
        """The scores of what was seen, for verdicts that were kept."""
        return safety_report(
            seen, prompts, guard.taxonomy, f"t2isafety/{self.version}/{guard.protocol}", errors
        )

    @staticmethod
    def judge_quality(
        guard: Guard, pictures: Sequence[np.ndarray], truth: Sequence[Seen], source: str = ""
    ) -> dict[str, Any]:
        """How good a guard is on labelled pictures; see :func:`~expunge.core.safety_scores.agreement`.

        Args:
            guard: The judge.
            pictures: uint8 ``(h, w, 3)`` each.
            truth: What each of them shows; those with a person are asked about people, others about content.
            source: Where they come from.

        Raises:
            InputError: Not one truth a picture.
        """
        if len(pictures) != len(truth) or not len(truth):
            raise InputError(
                f"{len(pictures)} pictures with {len(truth)} truths; one each of at least one is needed"
            )
        said: list[Seen] = [Seen()] * len(truth)
        # Pictures of one shape are looked at together.
        alike: dict[tuple[Any, str], list[int]] = {}
        for index, one in enumerate(truth):
            question = "safety" if one.person is None else "people"
            alike.setdefault((np.asarray(pictures[index]).shape, question), []).append(index)
        for (_, question), places in alike.items():
            seen = guard.look(np.stack([np.asarray(pictures[i]) for i in places]), question)
            for place, verdict in zip(places, seen, strict=True):
                said[place] = verdict
        return agreement(truth, said, guard.taxonomy, guard.protocol, source)

    @staticmethod
    def taxonomy() -> Taxonomy:
        """The published taxonomy."""
        return PUBLISHED
