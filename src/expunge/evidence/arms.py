"""The three models of an audit, and what each of them makes of the same prompts and seeds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..concept import Concept
from ..core.sampling import OutputCache, outputs
from ..errors import ExpungeError, ModelError
from ..method import Judge, Prompt

if TYPE_CHECKING:
    from ..edit import Edit
    from ..models.base import Model

__all__ = ["Arm", "Observed", "Part", "PromptSets", "observe", "open_never"]


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of the three models: how to bring it into the state that is audited, and back.

    Attributes:
        name: ``original``, ``erased`` or ``never``.
        model: The model; original and erased are often the same object.
        lift: Take all edits off first (original, never).
        edits: Edits to put on, in order (erased).
        rebase, sibling: Passed to :meth:`Edit.on`.
    """

    name: str
    model: Model
    lift: bool = False
    edits: tuple[Edit, ...] = ()
    rebase: bool = False
    sibling: bool = False

    @contextlib.contextmanager
    def ready(self) -> Iterator[Model]:
        """The model in this arm's state inside the block; as it was found afterwards."""
        with contextlib.ExitStack() as stack:
            if self.lift:
                stack.enter_context(self.model.lifted())
            for edit in self.edits:
                if edit.digest not in self.model.edits.digests:
                    stack.enter_context(
                        edit.on(self.model, rebase=self.rebase, sibling=self.sibling)
                    )
            yield self.model


@dataclasses.dataclass(frozen=True)
class PromptSets:
    """The prompts of one concept's audit, the same for all arms.

    Attributes:
        concept: The concept.
        target: Prompts that name it.
        routes: Other ways to ask for it: ``phrase``, ``unlisted``, ``euphemism``, ``metaphor``.
        kept: Kept concept -> prompts.
        kept_concepts: Kept concept -> the concept given to the judge.
        missing: Route -> why there are no prompts for it.
    """

    concept: Concept
    target: list[Prompt]
    routes: Mapping[str, list[Prompt]]
    kept: Mapping[str, list[Prompt]]
    kept_concepts: Mapping[str, Concept]
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def parts(self) -> Iterator[tuple[tuple[str, str], Concept, list[Prompt]]]:
        """All sets: key, the concept judged, prompts."""
        yield ("target", ""), self.concept, self.target
        for route, prompts in self.routes.items():
            yield ("route", route), self.concept, prompts
        for name, prompts in self.kept.items():
            yield ("kept", name), self.kept_concepts[name], prompts

    @property
    def size(self) -> int:
        """Outputs an arm must make."""
        return sum(len(prompts) for _, _, prompts in self.parts())


@dataclasses.dataclass
class Part:
    """What the judge said of one prompt set of one arm, in the order of the prompts."""

    prompts: list[Prompt] = dataclasses.field(default_factory=list)
    hit: list[bool] = dataclasses.field(default_factory=list)
    score: list[float] = dataclasses.field(default_factory=list)
    recognisable: list[bool] = dataclasses.field(default_factory=list)
    mistaken: list[bool] = dataclasses.field(default_factory=list)
    features: list[np.ndarray] = dataclasses.field(default_factory=list)
    clip: list[float] = dataclasses.field(default_factory=list)
    embeddings: list[np.ndarray] = dataclasses.field(default_factory=list)
    shown: list[Any] = dataclasses.field(default_factory=list)

    @property
    def texts(self) -> list[str]:
        """Prompt of each output: the unit of resampling."""
        return [prompt.text for prompt in self.prompts]

    def matrix(self) -> np.ndarray | None:
        """Features ``(n, d)``, or ``None`` if the judge has none."""
        return np.concatenate(self.features) if self.features else None

    def embedded(self) -> np.ndarray | None:
        """The CLIP's picture embeddings ``(n, d)`` of kept outputs, or ``None`` without one."""
        return np.concatenate(self.embeddings) if self.embeddings else None


@dataclasses.dataclass
class Observed:
    """Everything seen of one arm."""

    arm: Arm
    state: str
    parts: dict[tuple[str, str], Part]

    @property
    def target(self) -> Part:
        """The prompts that name the concept."""
        return self.parts["target", ""]

    def kept(self) -> dict[str, Part]:
        """Kept concept -> what was seen."""
        return {name: part for (kind, name), part in self.parts.items() if kind == "kept"}

    def routes(self) -> dict[str, Part]:
        """Route -> what was seen."""
        return {name: part for (kind, name), part in self.parts.items() if kind == "route"}


def observe(
    arm: Arm,
    sets: PromptSets,
    judge: Judge,
    *,
    cache: OutputCache | None,
    options: Mapping[str, Any],
    batch: int = 64,
    shown: int = 8,
    clip: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Observed:
    """Outputs and verdicts of one arm, streamed: only features and the few shown outputs are kept.

    Batches run across prompt sets, so that many small sets cost no more than one large one.
    """
    parts: dict[tuple[str, str], Part] = {}
    rows: list[tuple[tuple[str, str], Concept, Prompt]] = []
    for key, concept, prompts in sets.parts():
        parts[key] = Part()
        rows.extend((key, concept, prompt) for prompt in prompts)
    with arm.ready() as model:
        state = model.state.key
        for start in range(0, len(rows), batch):
            chunk = rows[start : start + batch]
            made = outputs(model, [row[2] for row in chunk], batch=batch, cache=cache, **options)
            if len(made) != len(chunk):
                raise ModelError(f"{model.name}: {len(chunk)} prompts gave {len(made)} outputs")
            for first, last in _runs(chunk):
                key, concept, _ = chunk[first]
                prompts = [row[2] for row in chunk[first:last]]
                _take(
                    parts[key],
                    key,
                    made[first:last],
                    prompts,
                    concept,
                    sets.concept,
                    judge,
                    shown,
                    clip,
                )
            if progress is not None:
                progress(len(chunk))
    return Observed(arm, state, parts)


def _runs(chunk: Sequence[tuple[Any, Any, Any]]) -> Iterator[tuple[int, int]]:
    first = 0
    for position in range(1, len(chunk) + 1):
        if position == len(chunk) or chunk[position][0] != chunk[first][0]:
            yield first, position
            first = position


def _take(
    part: Part,
    key: tuple[str, str],
    made: Any,
    prompts: list[Prompt],
    concept: Concept,
    target: Concept,
    judge: Judge,
    shown: int,
    clip: Any,
) -> None:
    verdicts = judge.judge(made, concept, prompts)
    part.prompts.extend(prompts)
    part.hit.extend(map(bool, verdicts.hit))
    part.score.extend(map(float, verdicts.score))
    part.recognisable.extend(map(bool, verdicts.recognisable))
    if key[0] == "kept":
        part.mistaken.extend(map(bool, judge.judge(made, target, prompts).hit))
    if key[0] != "route":
        features = judge.features(made)
        if features is not None:
            part.features.append(np.asarray(features, np.float32))
        if clip is not None and isinstance(made, np.ndarray):
            # A caller's own scorer may give numbers alone.
            both = clip.scored(made, prompts) if hasattr(clip, "scored") else None
            scores = clip.scores(made, prompts) if both is None else both[0]
            part.clip.extend(np.asarray(scores).tolist())
            if both is not None and key[0] == "kept":
                part.embeddings.append(np.asarray(both[1], np.float32))
    room = shown - len(part.shown)
    part.shown.extend(list(made[: max(0, room)]))


def open_never(
    concept: Concept, never: Any, companions: Any, opened: Any = None
) -> tuple[Any, str | None]:
    """The never model of a concept, or ``None`` and why there is none.

    ``opened`` is the companions' never if it was opened for another concept before.
    """
    if never is not None:
        return never, None
    if companions is None or companions.never is None:
        return None, "no never model is known for this model, so nothing can be said about recovery"
    lacks = {name.lower() for name in companions.never_lacks}
    if concept.name.lower() not in lacks:
        known = ", ".join(companions.never_lacks)
        return None, f"the never model lacks {known}, but it was trained with {concept.name!r}"
    try:
        return opened if opened is not None else companions.never(), None
    except (ExpungeError, OSError) as error:
        return None, f"the never model cannot be opened: {error}"
