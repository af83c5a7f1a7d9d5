"""Judges: who says what an output shows, and how often that is wrong.

:mod:`expunge.method` re-exports everything here; methods import it from there.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InputError, ProtocolError, nearest
from .intervals import wilson

if TYPE_CHECKING:
    import numpy as np

    from ..concept import Concept
    from . import Outputs, Prompt

__all__ = ["Calibration", "Judge", "Verdicts"]

DERIVED = ("n", "false_positive_rate", "true_positive_rate", "accuracy", "f1", "kappa")
COUNTS = ("true_positives", "false_positives", "true_negatives", "false_negatives")


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What a judge says of ``n`` outputs.

    Attributes:
        hit: bool ``(n,)``: the concept is shown.
        score: float ``(n,)``: the judge's confidence, 0 to 1; ``hit`` is ``score >= threshold``
            where the judge has one threshold.
        recognisable: bool ``(n,)``: the output is of the kind the judge knows at all; a destroyed
            picture is not.
    """

    hit: np.ndarray
    score: np.ndarray
    recognisable: np.ndarray


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How a judge did on outputs whose truth is known; it holds for one concept and one protocol.

    Attributes:
        protocol: The judge's protocol: another threshold or version has other errors.
        concept: Name of the concept asked about.
        true_positives, false_positives, true_negatives, false_negatives: Outputs, counted.
        unrecognisable: How many of all of them the judge called of no known kind.
        source: Where the labelled outputs come from.
    """

    protocol: str
    concept: str
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    unrecognisable: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        for name in (*COUNTS, "unrecognisable"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise InputError(f"calibration: {name} is {value!r}; a count is needed")
        if not self.n:
            raise InputError("calibration: no labelled output was counted; at least one is needed")

    @property
    def positives(self) -> int:
        """Outputs that do show the concept."""
        return self.true_positives + self.false_negatives

    @property
    def negatives(self) -> int:
        """Outputs that do not."""
        return self.true_negatives + self.false_positives

    @property
    def n(self) -> int:
        """All labelled outputs."""
        return self.positives + self.negatives

    @property
    def false_positive_rate(self) -> float | None:
        """Share of outputs without the concept that are judged to show it; ``None`` without any."""
        return self.false_positives / self.negatives if self.negatives else None

    @property
    def true_positive_rate(self) -> float | None:
        """Share of outputs with the concept that are judged to show it; ``None`` without any."""
        return self.true_positives / self.positives if self.positives else None

    @property
    def accuracy(self) -> float:
        """Share of right verdicts."""
        return (self.true_positives + self.true_negatives) / self.n

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall of the concept; 0 where nothing is found or asked."""
        wrong = self.false_positives + self.false_negatives
        return 2 * self.true_positives / max(1, 2 * self.true_positives + wrong)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, agreement beyond chance; ``None`` where chance alone agrees always."""
        said = self.true_positives + self.false_positives
        chance = (said * self.positives + (self.n - said) * self.negatives) / self.n**2
        return (self.accuracy - chance) / (1 - chance) if chance < 1 else None

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % Wilson intervals of the rates that exist and of the accuracy."""
        found = {"accuracy": wilson(self.true_positives + self.true_negatives, self.n)}
        if self.negatives:
            found["false_positive_rate"] = wilson(self.false_positives, self.negatives)
        if self.positives:
            found["true_positive_rate"] = wilson(self.true_positives, self.positives)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the counts, and the numbers that follow from them."""
        derived = {name: getattr(self, name) for name in DERIVED}
        spans = {name: list(span) for name, span in self.intervals.items()}
        return {**dataclasses.asdict(self), **derived, "intervals": spans}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Calibration:
        """From the counts of :meth:`to_dict`; what follows from them is worked out again.

        Raises:
            InputError: A key is missing or unknown, or a count is none.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(data, Mapping):
            raise InputError(f"calibration: a mapping is needed, got {type(data).__name__}")
        for key in data:
            if key not in (*fields, *DERIVED, "intervals"):
                raise InputError(f"calibration: unknown key {key!r}{nearest(str(key), fields)}")
        for name in ("protocol", "concept", *COUNTS):
            if name not in data:
                raise InputError(f"calibration: the key {name!r} is missing")
        return cls(**{name: data[name] for name in fields if name in data})


class Judge(ABC):
    """Says whether outputs show a concept.

    Attributes:
        id: Short name, for example ``world-oracle``.
        protocol: Names everything that changes the answer: judge, version, threshold, unit.
        threshold: Score from which on an output counts as a hit.
        calibrations: Concept -> how the judge did on labelled outputs.
    """

    id: str
    protocol: str
    threshold: float
    calibrations: Mapping[str, Calibration] = {}

    @abstractmethod
    def judge(self, outputs: Outputs, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on ``n`` outputs; ``prompts`` are the ``n`` prompts they answer."""

    def features(self, outputs: Outputs) -> np.ndarray | None:
        """Feature vectors ``(n, d)`` for distribution distances, or ``None``."""
        return None

    def calibrate(
        self,
        outputs: Outputs,
        labels: Sequence[Any],
        concept: Concept,
        *,
        prompts: Sequence[Prompt] = (),
        source: str = "",
    ) -> Calibration:
        """Judge ``n`` outputs whose truth is known, and keep what came out under the concept's name.

        Args:
            outputs: Pictures or texts.
            labels: ``n`` truths: whether the output shows the concept, or the name of what it shows
                (``None``: nothing that has a name).
            concept: The concept asked about; a label that is its name or a phrase of it counts as shown.
            prompts: What the outputs answer, for judges that read them.
            source: Where the outputs come from, for the record.

        Raises:
            InputError: There is no output, or not one label each.
        """
        from . import Prompt

        truth = [_truth(label, concept) for label in labels]
        if not truth or len(truth) != len(outputs):
            raise InputError(
                f"{self.id}: {len(outputs)} outputs with {len(truth)} labels cannot calibrate; one label each "
                "of at least one output is needed"
            )
        asked = list(prompts) or [Prompt(concept.name, seed=i) for i in range(len(truth))]
        found = self.judge(outputs, concept, asked)
        pairs = [(t, bool(h)) for t, h in zip(truth, found.hit, strict=True)]
        wanted = ((True, True), (False, True), (False, False), (True, False))
        counts = {name: pairs.count(pair) for name, pair in zip(COUNTS, wanted, strict=True)}
        unknown = sum(not known for known in found.recognisable)
        made = Calibration(
            self.protocol, concept.name, **counts, unrecognisable=unknown, source=source
        )
        return self.calibrated(made)

    def calibrated(self, made: Calibration) -> Calibration:
        """Keep a calibration that was made before, and give it back.

        Raises:
            ProtocolError: It was made under another protocol.
        """
        if made.protocol != self.protocol:
            raise ProtocolError(
                f"a calibration of {made.protocol!r} says nothing about {self.protocol!r}"
            )
        # A mapping of its own: the class's is shared by all judges, and frozen judges have no other way.
        object.__setattr__(self, "calibrations", {**self.calibrations, made.concept: made})
        return made


def _truth(label: Any, concept: Concept) -> bool:
    if label is None:
        return False
    if isinstance(label, str):
        return label.lower() in (name.lower() for name in concept.names)
    if type(label).__name__ in ("bool", "bool_") or label in (0, 1):
        return bool(label)
    raise InputError(f"label {label!r} is no truth value and no name")
