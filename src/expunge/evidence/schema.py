"""The shape of ``evidence.json``, version 1: validated, documented in ``docs/evidence.md``, stable.

Everything is keyed by concept under ``concepts``.  Where an audit has exactly one concept, the same
fields also stand at top level, so that ``evidence["models"]["erased"]["target_hit"]`` works.  Rates
are plain numbers; their intervals, protocols and sample sizes stand in maps from field path, for
example ``intervals["models.erased.target_hit"]``.  What does not apply is null, and ``reasons`` says
why.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "ARMS",
    "ArmRecord",
    "AttackRecord",
    "ConceptFields",
    "CurvePoint",
    "EditRecord",
    "EvidenceFields",
    "Flag",
    "JudgeRecord",
    "Scope",
    "Stage",
]

ARMS = ("original", "erased", "never")
Rate = float | None
Interval = tuple[float, float]


class Strict(BaseModel):
    """No unknown keys and no NaN: both would be mistakes that go unseen."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ArmRecord(Strict):
    """What was measured on one of the three models, without any attack."""

    name: str = Field(description="The model as the user named it.")
    state: str = Field(description="Key of base weights and edits.")
    target_hit: Rate = Field(
        default=None, description="Share of prompts that name the concept and show it."
    )
    routes: dict[str, Rate] = Field(
        default_factory=dict, description="Hit rate of other ways to ask."
    )
    kept_hit: Rate = Field(
        default=None, description="Mean over the kept concepts of their hit rates, each weighing 1."
    )
    kept: dict[str, float] = Field(default_factory=dict, description="Kept concept -> hit rate.")
    clip_score: float | None = Field(default=None, description="100 cos on the concept's prompts.")
    clip_score_kept: float | None = Field(default=None, description="100 cos on the kept prompts.")
    unrecognisable: Rate = Field(
        default=None, description="Share of kept outputs of no known kind."
    )
    unrecognisable_target: Rate = Field(
        default=None, description="The same on the concept's prompts."
    )
    false_positive: Rate = Field(
        default=None, description="Share of kept outputs judged to show the concept."
    )
    frechet_to_original: float | None = Field(
        default=None, description="On kept prompts, judge's features."
    )
    kid_to_original: float | None = Field(
        default=None, description="Unbiased kernel distance, the same sets."
    )
    cmmd_to_original: float | None = Field(
        default=None, description="CMMD, the same sets, on the CLIP's embeddings."
    )
    perceptual_distance: float | None = Field(
        default=None, description="To the original, kept prompts."
    )
    perceptual_distance_target: float | None = Field(
        default=None, description="To the original, concept's prompts."
    )


class Models(Strict):
    """The triad; an arm that could not be had is null."""

    original: ArmRecord | None = None
    erased: ArmRecord
    never: ArmRecord | None = None


class CurvePoint(Strict):
    """What the arms show at one point of a teaching attack's budget, whatever the plain prompt showed."""

    at: float = Field(description="How many of what curve_of names.")
    hit_original: Rate = None
    hit_erased: Rate = None
    hit_never: Rate = None
    advantage: float | None = Field(default=None, description="hit_erased - hit_never.")
    interval: Interval | None = Field(default=None, description="95 % interval of advantage.")
    recovered: float | None = Field(
        default=None, description="(erased - never) / (original - never), where that range is 0.1."
    )


class AttackRecord(Strict):
    """One attack at one budget on all arms; rates count each attacked prompt."""

    id: str
    version: int = 1
    preset: str | None = Field(
        default=None, description="The preset it was configured from; settings hold every value."
    )
    settings: dict[str, Any] = Field(default_factory=dict)
    teaches: bool
    budget: str
    judge: str
    threshold: float | None
    seed: int = 0
    n: int = Field(description="Attacked prompts.")
    skipped: int = Field(
        default=0, description="Of these, prompts that could not be attacked on the erased model."
    )
    pre_original: Rate = None
    pre_erased: Rate = None
    pre_never: Rate = None
    hit_original: Rate = None
    hit_erased: Rate = None
    hit_never: Rate = None
    success: dict[str, Rate] = Field(
        default_factory=dict,
        description="Convention -> success on the erased model with another denominator than all prompts.",
    )
    summary: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Arm -> further numbers of the attack's own protocol, over all items.",
    )
    recovered: float | None = Field(
        default=None, description="(erased - never) / (original - never)."
    )
    interval: Interval | None = Field(default=None, description="95 % interval of recovered.")
    advantage: float | None = Field(default=None, description="hit_erased - hit_never.")
    curve_of: str | None = Field(
        default=None, description="What the points of the curve count: updates, steps, strength."
    )
    curve: list[CurvePoint] = Field(
        default_factory=list, description="Teaching attacks along their budget, ascending."
    )
    status: Literal["valid", "measures-nothing", "void", "unchecked", "failed", "not-run"]
    reason: str | None = Field(
        default=None, description="Why recovered is null or the attack is not valid."
    )
    cost: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="Arm -> rows by component."
    )
    seconds: dict[str, float] = Field(default_factory=dict, description="Arm -> wall time.")
    texts: list[str | None] = Field(
        default_factory=list, description="What the attack fed the erased model."
    )


class EditRecord(Strict):
    """The edits on the erased model, taken together."""

    methods: list[str]
    digests: list[str]
    rank: int | None = Field(
        default=None, description="Largest numerical rank of a changed matrix."
    )
    relative_change: float | None = Field(
        default=None, description="|change| / |weights| over the changed tensors."
    )
    drift: float | None = Field(
        default=None,
        description="Mean of |(W - W0) u|^2 / |W0 u|^2 over text rows u of unrelated names.",
    )
    parameters: int | None = Field(default=None, description="Numbers the edits store.")
    tensors: int | None = Field(default=None, description="Tensors of the model that they change.")
    acts: list[str] = Field(
        default_factory=list, description="Methods whose control is on while the model runs."
    )
    tokens: dict[str, list[str]] = Field(
        default_factory=dict, description="Tokenizer to the tokens that the edits add."
    )
    manifests: list[dict[str, Any]] = Field(default_factory=list)


class Stage(Strict):
    """A part of the work: wall time, and the process's peak memory at its end."""

    name: str
    seconds: float
    peak_bytes: int | None = None
    cost: dict[str, int] = Field(default_factory=dict)
    found: dict[str, int] = Field(
        default_factory=dict,
        description="What earlier work had made already: outputs, and rows of attacks by component.",
    )
    edit: str | None = Field(
        default=None,
        description="Digest of the edit, where its making is meant: one piece of work under every concept.",
    )


class Flag(Strict):
    """Something a reader must know before trusting the numbers."""

    code: str
    message: str


class Verdict(Strict):
    """One plain sentence and the word it rests on."""

    status: Literal["erased", "partly", "recovered", "not-erased", "destroyed", "inconclusive"]
    line: str


class JudgeRecord(Strict):
    """How the judge did on outputs whose truth is known; its protocol is the document's ``judge``."""

    protocol: str
    concept: str
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    unrecognisable: int = 0
    source: str = Field(default="", description="Where the labelled outputs come from.")
    n: int
    false_positive_rate: Rate = None
    true_positive_rate: Rate = None
    accuracy: Rate = None
    f1: Rate = None
    kappa: float | None = None
    intervals: dict[str, Interval] = Field(default_factory=dict)


class Scope(Strict):
    """Where an original or a never is missing: what cannot be concluded then, and what still can."""

    cannot: list[str] = Field(default_factory=list)
    can: list[str] = Field(default_factory=list)


class ConceptFields(Strict):
    """The evidence on one concept."""

    concept: dict[str, Any] | None = None
    verdict: Verdict | None = None
    models: Models | None = None
    attacks: list[AttackRecord] = Field(default_factory=list)
    calibration: JudgeRecord | None = Field(
        default=None, description="The judge on labelled outputs, this concept."
    )
    edit: EditRecord | None = None
    stages: list[Stage] = Field(default_factory=list)
    features: str | None = Field(default=None, description="Whose features the distances use.")
    frechet_to_original: float | None = None
    kid_to_original: float | None = None
    cmmd_to_original: float | None = None
    perceptual_distance: float | None = None
    unrecognisable: Rate = None
    differences: dict[str, float | None] = Field(
        default_factory=dict, description="erased - original, paired."
    )
    composites: dict[str, float | None] = Field(default_factory=dict)
    protocols: dict[str, str] = Field(default_factory=dict)
    intervals: dict[str, Interval] = Field(default_factory=dict)
    n: dict[str, int] = Field(default_factory=dict, description="Prompts behind a field.")
    reasons: dict[str, str] = Field(default_factory=dict, description="Why a field is null.")
    flags: list[Flag] = Field(default_factory=list)
    scope: Scope | None = Field(
        default=None,
        description="What cannot be said without an original or a never, and what can.",
    )

    @field_validator("intervals")
    @classmethod
    def _ordered(cls, value: dict[str, Interval]) -> dict[str, Interval]:
        for path, (low, high) in value.items():
            if not low <= high or math.isnan(low):
                raise ValueError(f"interval {path!r} is not ordered")
        return value


class EvidenceFields(ConceptFields):
    """The whole document."""

    schema_version: Literal[1] = 1
    expunge_version: str
    created: str = Field(description="UTC, ISO 8601.")
    command: str | None = Field(
        default=None, description="What was typed, if a command line was used."
    )
    model: str
    family: str
    judge: str
    settings: dict[str, Any] = Field(
        default_factory=dict, description="Everything that was chosen."
    )
    libraries: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    cost: dict[str, int] = Field(
        default_factory=dict,
        description="Rows by component, all stages; the making of an edit counts once.",
    )
    found: dict[str, int] = Field(
        default_factory=dict,
        description="What earlier audits had made already and this one did not pay for, all stages.",
    )
    seconds: float | None = None
    concepts: dict[str, ConceptFields]

    @model_validator(mode="after")
    def _single_concept_is_repeated(self) -> EvidenceFields:
        if not self.concepts:
            raise ValueError("concepts is empty")
        names = list(ConceptFields.model_fields)
        if len(self.concepts) == 1:
            (only,) = self.concepts.values()
            if self.models is not None and any(getattr(self, n) != getattr(only, n) for n in names):
                raise ValueError("the fields at top level differ from those of the only concept")
            for name in names:
                object.__setattr__(self, name, getattr(only, name))
        elif self.models is not None:
            raise ValueError("fields of one concept stand at top level although there are several")
        return self
