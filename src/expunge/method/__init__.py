"""The contracts: what a method is, what it receives and what it returns.

Small on purpose and without policy.  A method is a frozen dataclass whose fields are its
hyperparameters (:func:`setting`), with the paper's names and defaults; what it learns is a separate,
frozen thing (:class:`~expunge.edit.Edit`, :class:`Attempts`).

    Eraser   erase(model, concepts, keep=, data=, judge=, seed=, run=) -> Edit
    Attack   attack(model, concept, judge, budget, prompts=, reference=, seed=) -> Attempts
    Control  hooks that run while a model runs; the adapter installs them
    Judge    judge(outputs, concept, prompts) -> Verdicts; calibrate(outputs, labels, concept) -> Calibration
    Metric   update(outputs, prompts), compute() -> Measurement

Outputs are pictures, a uint8 array ``(n, height, width, 3)``, or texts, a list of ``n`` strings.
"""

from __future__ import annotations

import dataclasses
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError, ProtocolError, SettingError, WrongMethod, nearest
from .control import Control
from .judging import Calibration, Judge, Verdicts
from .settings import Method, setting

if TYPE_CHECKING:
    from ..concept import Concept
    from ..edit import Edit

__all__ = [
    "BUDGETS", "Attack", "Attempt", "Attempts", "Budget", "Calibration", "Control", "Eraser", "Judge", "Measurement",
    "Method", "Metric", "Prompt", "Verdicts", "budget", "setting",
]  # fmt: skip

Outputs = Any
"""uint8 pictures ``(n, height, width, 3)`` or a list of ``n`` texts."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One thing to ask a model, and what is known to be in a right answer.

    Attributes:
        text: What the model is given.
        seed: Seed of the initial noise (pictures) or of sampling (texts).
        concept: Name of the concept the prompt is about, if any.
        labels: Ground truth of the world, for example ``{"object": "star", "colour": "red"}`` or
            ``{"answer": "Lisbon"}``.
        guidance: Classifier-free guidance of this picture; it wins over what is asked for all.
    """

    text: str
    seed: int = 0
    concept: str | None = None
    labels: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    guidance: float | None = None

    def guided(self, otherwise: float) -> float:
        """This prompt's guidance, or ``otherwise`` where it has none of its own."""
        return otherwise if self.guidance is None else self.guidance


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A number with what makes it comparable.

    Attributes:
        value: The number.
        protocol: How it was measured; only equal protocols may be compared.
        n: Independent units behind it (prompts, not pictures, where prompts repeat).
        interval: 95 % interval ``(low, high)`` or ``None``.
    """

    value: float | None
    protocol: str
    n: int
    interval: tuple[float, float] | None = None

    def minus(self, other: Measurement) -> float:
        """The difference of two values of one protocol.

        Raises:
            ProtocolError: The protocols differ.
        """
        if self.protocol != other.protocol:
            raise ProtocolError(f"{self.protocol!r} cannot be compared with {other.protocol!r}")
        if self.value is None or other.value is None:
            raise ProtocolError(
                f"{self.protocol!r} has no value on one side, so nothing to compare"
            )
        return self.value - other.value


class Metric(ABC):
    """A number from outputs, streamed."""

    protocol: str

    @abstractmethod
    def update(self, outputs: Outputs, prompts: Sequence[Prompt]) -> None:
        """Take in a batch of outputs and the prompts they answer."""

    @abstractmethod
    def compute(self) -> Measurement:
        """The number over everything taken in so far."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """A named allowance for one attacked item; ``None`` means unlimited.

    Attributes:
        name: Presets of this name are used by attacks that have one.
        denoiser_rows: Rows (one prompt of a batch, one pass) through the denoiser or language model,
            forward and backward counted alike, pictures for confirmation included.
        encoder_rows: Rows through the text encoder.
    """

    name: str
    denoiser_rows: int | None = None
    encoder_rows: int | None = None


BUDGETS: Mapping[str, Budget] = {
    "paper": Budget("paper"),
    "world": Budget("world", denoiser_rows=2_000, encoder_rows=20_000),
    "quick": Budget("quick", denoiser_rows=400, encoder_rows=4_000),
}


def budget(name: str | Budget) -> Budget:
    """A budget by name; an unknown name is refused with the nearest valid one."""
    if isinstance(name, Budget):
        return name
    if name not in BUDGETS:
        raise SettingError(f"budget {name!r} is unknown{nearest(name, BUDGETS)}")
    return BUDGETS[name]


class Eraser(Method, ABC):
    """A published way to remove a concept; the model is unchanged by :meth:`erase`."""

    @abstractmethod
    def erase(
        self,
        model: Any,
        concepts: Any,
        *,
        keep: Sequence[Any] = (),
        data: Any = None,
        judge: Judge | None = None,
        seed: int = 0,
        run: str | Path | None = None,
    ) -> Edit:
        """Learn an edit.

        Args:
            model: An opened :class:`~expunge.models.Model` of a family in ``families``.
            concepts: One or several concepts (or bare names) to forget.
            keep: Concepts or prompts the eraser is told to preserve.
            data: Method-specific examples; a method that reads none refuses them (:meth:`without_data`).
            judge: For methods that select a model by looking at its outputs.
            seed: All randomness derives from it.
            run: Folder for progress and resume; ``None`` keeps nothing on disk.
        """

    def without_data(self, data: Any, only: str = "") -> None:
        """Refuse examples that would be ignored; ``only`` is the setting under which the method reads some.

        Raises:
            InputError: ``data`` is not ``None``.
        """
        if data is not None:
            reads = f"reads examples only with {only}" if only else "reads no examples"
            raise InputError(f"{self.id}: data was given, but the method {reads}; leave it out")

    @classmethod
    def control(cls, edit: Edit, model: Any) -> Control:
        """What an edit made with ``acts=True`` does while the model runs; others are never asked.

        It is called when the edit goes on, with the edit's weights and tokens in place, and again whenever
        the stack is built anew, so it may read nothing but the edit and the model.  The control keeps nothing
        from one picture to the next, because pictures are remembered by the model's state, which names the
        edit and not what its control has seen.  Texts are to be encoded when they are needed: an edit put on
        later may change the text encoder.

        ``context.conditional`` says which rows belong to which branch of guidance.  At guidance 1 only the
        conditional branch runs, and outside sampling it is ``None``: a control of the unconditional branch
        then leaves all rows as they are, as a negative text does.  For a model that has no such branch
        (``two_branches`` is false) ``control`` is to refuse, in words, which leaves the model untouched.

        Raises:
            WrongMethod: The method has no control.
        """
        raise WrongMethod(f"{cls.id} has no control, so no edit of it can act while a model runs")


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What an attack did with one prompt.

    Attributes:
        prompt: The attacked prompt, with its seed.
        pre_hit: The plain prompt already shows the concept.
        hit: The concept is shown before or after the attack (the field's convention).
        score: The judge's score of the shown output.
        text: The adversarial text as it was re-tokenised and fed in; ``None`` for attacks that do not
            end in a text.
        details: Losses, norms, evaluations; ``skipped``: why the prompt was not attacked.
    """

    prompt: Prompt
    pre_hit: bool
    hit: bool
    score: float
    text: str | None = None
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Attempts:
    """Everything an attack did to one model.

    Attributes:
        attack, version, settings: The method and its resolved hyperparameters.
        teaches: The attack can put knowledge into the model or its context.
        budget: Name of the budget.
        judge, threshold: Who decided, and from which score on.
        seed: Seed of the attack.
        items: One attempt a prompt, in order.
        outputs: What was shown for each item: pictures or texts, in order.
        cost: Rows by component, as counted in the adapter.
        summary: Further numbers of the attack's own protocol, over all items.
    """

    attack: str
    version: int
    settings: Mapping[str, Any]
    teaches: bool
    budget: str
    judge: str
    threshold: float
    seed: int
    items: tuple[Attempt, ...]
    outputs: Outputs
    cost: Mapping[str, int]
    summary: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def pre_rate(self) -> float:
        """Share of items whose plain prompt shows the concept."""
        return sum(item.pre_hit for item in self.items) / max(1, len(self.items))

    @property
    def rate(self) -> float:
        """Share of items that show the concept before or after the attack."""
        return sum(item.hit for item in self.items) / max(1, len(self.items))


class Attack(Method, ABC):
    """A published way to bring a concept back.

    Class attributes:
        teaches: It can teach (relearning, inversion, knowledge in the context): only its advantage
            over the never model counts.
    """

    teaches: ClassVar[bool] = False

    def needs_reference(self, concept: Concept) -> bool:
        """Whether the attack means nothing without the original model; then it is not run where there is none.

        It may depend on what is known of the concept: whose pictures are given needs nobody to draw them.
        """
        return False

    @abstractmethod
    def attack(
        self,
        model: Any,
        concept: Concept,
        judge: Judge,
        budget: Budget,
        *,
        prompts: Sequence[Prompt],
        reference: Any = None,
        seed: int = 0,
    ) -> Attempts:
        """Attack each prompt within ``budget`` (an allowance for each prompt).

        Args:
            model: The model under attack, its edits applied; left as it was found.
            concept: The concept; its name and phrases are forbidden to searches.
            judge: Decides success.
            budget: Allowance for each prompt.
            prompts: Prompts that name the concept.
            reference: The original model, for attacks that use it (target pictures, original
                weights or text encoder); it may be the same object as ``model``: use
                ``with reference.lifted() as original``.
            seed: Private randomness of the attack.
        """

    @classmethod
    def under(cls, budget: Budget, kind: str | None = None) -> typing.Self:
        """This attack with the preset of the budget's name, else the paper's for a kind, else its defaults."""
        return cls.configured(cls.preset_for(kind, budget.name))
