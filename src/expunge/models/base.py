"""Model: the adapter around a real model of one family.

An adapter gives a model identity (fingerprint and state), named parts, counted costs and a small
set of capabilities.  It never re-implements the model.  Edits are put on and taken off by
:mod:`expunge.edit` through :attr:`Model.edits`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from ..edit.checksums import Checksums
from ..edit.fingerprint import Fingerprint, base_digest, fingerprint
from ..edit.stack import EditStack
from ..edit.tokens import Vocabulary
from ..errors import MissingCapability, MissingPart, UnsupportedModel, nearest
from . import protocols

if TYPE_CHECKING:
    from ..concept import Concept
    from ..method import Control, Judge, Method, Outputs, Prompt

__all__ = [
    "Boxed",
    "Companions",
    "Cost",
    "Labelled",
    "Model",
    "Pictures",
    "State",
    "noise_generator",
]


def noise_generator(seed: int, purpose: str, item: int | str = 0) -> torch.Generator:
    """A private CPU generator for one purpose and item.

    Noise drawn from it does not depend on batch composition, order or device, and drawing it does
    not touch the global random state.
    """
    digest = hashlib.sha256(f"{seed}|{purpose}|{item}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") & (2**63 - 1))


class Cost:
    """Rows counted by component and direction, for example ``denoiser.forward``.

    A row is one element of a batch in one pass.  ``counts`` only grows; use :meth:`since` for the
    cost of a stage.

    Attributes:
        watcher: Called before every pass of the model, whoever asked for it; raising stops the work there, as a
            model that raises does.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.watcher: Callable[[], None] | None = None

    def add(self, component: str, rows: int, direction: str = "forward") -> None:
        """Count ``rows`` rows of one pass."""
        if self.watcher is not None:
            self.watcher()
        self.counts[f"{component}.{direction}"] += int(rows)

    def snapshot(self) -> Counter[str]:
        """A copy of the counts, to be given to :meth:`since`."""
        return Counter(self.counts)

    def since(self, before: Mapping[str, int]) -> dict[str, int]:
        """Counts added since ``before``."""
        return {
            k: v - before.get(k, 0) for k, v in sorted(self.counts.items()) if v > before.get(k, 0)
        }

    def rows(self, component: str, before: Mapping[str, int] | None = None) -> int:
        """Forward and backward rows of a component (since ``before``)."""
        counts = self.since(before or {})
        return sum(v for k, v in counts.items() if k.rsplit(".", 1)[0] == component)


@dataclasses.dataclass(frozen=True)
class State:
    """What a model is right now: a digest of its base and the ordered digests of the edits on it."""

    base: str
    edits: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A short text that names the state, for cache keys."""
        return hashlib.sha256("|".join((self.base, *self.edits)).encode()).hexdigest()[:24]


class Pictures(NamedTuple):
    """Example pictures of one concept.

    Attributes:
        pictures: uint8 ``(n, height, width, 3)``.
        masks: bool ``(n, height, width)``, where the concept is; ``None`` where that is not known.
        captions: A text for each, which names the concept.
    """

    pictures: Any
    masks: Any
    captions: Sequence[str]


class Boxed(NamedTuple):
    """Pictures with captions, and boxes of what is looked for.

    Attributes:
        pictures: uint8 ``(n, height, width, 3)``.
        captions: A text for each, which need not name what is boxed.
        boxes: A list of ``(confidence, (x1, y1, x2, y2) in pixels, name)`` for each, right and lower edge exclusive.
    """

    pictures: Any
    captions: Sequence[str]
    boxes: Sequence[Sequence[tuple[float, tuple[float, float, float, float], str]]]


class Labelled(NamedTuple):
    """Pictures of which it is known whether they show one concept.

    Attributes:
        pictures: uint8 ``(n, height, width, 3)``.
        shown: bool ``(n,)``.
    """

    pictures: Any
    shown: Any


@dataclasses.dataclass(frozen=True)
class Companions:
    """What a world (or a user) registers beside a model; every field may be missing.

    Attributes:
        world: Name of the world.
        never: Opens the model that was trained the same way without the concepts in
            ``never_lacks``; audits of other concepts have no never.
        never_lacks: Names of the concepts the never model lacks.
        judge: Opens the world's judge.
        concept: Name -> the world's :class:`~expunge.Concept`, or ``None`` if unknown.
        neighbours: Concept -> names of all other concepts of the same kind.
        unrelated: A fixed set of names that share nothing with any reference concept.
        prompts: ``prompts(name, n, seed=0, split="development" | "test", route="name" | "phrase" |
            "unlisted" | "euphemism" | "metaphor") -> list[Prompt]``.
        spoken: ``spoken(name, route) -> tuple[str, ...]``: words for a concept along one of these routes.
        captions: ``captions(n, seed=0, without=()) -> list[str]``: development captions that speak of
            none of the named concepts, by whatever word.
        data: World-specific training data for methods that need examples.
        clip: Opens the CLIP score of the world's own CLIP.
        pictures: ``pictures(name, n, seed=0, split="development" | "test") -> Pictures``: pictures of a
            concept with exact masks of it.
        contaminated: ``contaminated(names, n, seed=0, split="development" | "test", share=0.5) -> Boxed``:
            pictures as the model was trained on, of which a share holds each named concept, with exact
            boxes; marks go unsaid in the captions.
        labelled: ``labelled(name, n, seed=0, split="development" | "test") -> Labelled``: ``n`` pictures with a
            concept and ``n`` without it, to calibrate judges on.
        safety: Opens the world's safety benchmark: ``prompts(n, seed=0, split="development" | "test")`` with domain and
            task among their labels, ``guard`` (:class:`expunge.core.safety_scores.Guard`), ``errors()`` of the guard.
        image_prompts: Opens the image-prompt branch of the world's original denoiser
            (:class:`expunge.core.image_prompts.ImagePrompts`).
    """

    world: str
    never: Callable[[], Model] | None = None
    never_lacks: tuple[str, ...] = ()
    judge: Callable[[], Judge] | None = None
    concept: Callable[[str], Concept | None] = lambda name: None
    neighbours: Callable[[Concept], tuple[str, ...]] = lambda concept: ()
    unrelated: tuple[str, ...] = ()
    prompts: Callable[..., list[Prompt]] | None = None
    spoken: Callable[[str, str], tuple[str, ...]] | None = None
    captions: Callable[..., list[str]] | None = None
    data: Callable[..., Any] | None = None
    clip: Callable[[], Any] | None = None
    pictures: Callable[..., Pictures] | None = None
    contaminated: Callable[..., Boxed] | None = None
    labelled: Callable[..., Labelled] | None = None
    safety: Callable[[], Any] | None = None
    image_prompts: Callable[[], Any] | None = None


class Model(ABC):
    """An opened model of one family.

    Attributes:
        family: ``diffusion``, ``language``, ...
        capabilities: Subset of ``generate, score, embed, classify, activations, gradients, controls``.
        decisive: Attributes that decide outputs beside the weights: sampler, tokenizer, defaults.
        name: What the user asked for (``world``, a folder, a hub id).
        companions: What a world registered beside it, or ``None``.
        cost: Rows counted since the model was opened.
        edits: The edits on the model (:class:`~expunge.edit.stack.EditStack`).
        checksums: What is known of the weights' checksums (:class:`~expunge.edit.checksums.Checksums`).
    """

    family: ClassVar[str] = ""
    capabilities: ClassVar[frozenset[str]] = frozenset()
    decisive: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name
        self.companions: Companions | None = None
        self.cost = Cost()
        self.edits = EditStack(self)
        self.checksums = Checksums()
        self.controls: tuple[Control, ...] = ()

    # -- parts and identity --------------------------------------------------------------------

    @abstractmethod
    def parts(self) -> Mapping[str, nn.Module]:
        """Component name (``unet``, ``text_encoder``, ``model``, ...) -> module."""

    def tensors(self) -> dict[str, nn.Parameter]:
        """Canonical tensor name -> parameter, for example ``unet.mid_block...to_k.weight``.

        Canonical names leave out wrappers that differ between library versions.
        """
        found: dict[str, nn.Parameter] = {}
        for part, module in self.parts().items():
            for name, parameter in module.named_parameters():
                found[f"{part}.{self.canonical(name)}"] = parameter
        return found

    @staticmethod
    def canonical(name: str) -> str:
        """A tensor's name without wrappers that come and go with library versions."""
        return name.removeprefix("text_model.").replace(".base_layer.", ".")

    def tensor(self, name: str) -> nn.Parameter:
        """One parameter by canonical name.

        Raises:
            MissingPart: With the nearest existing name.
        """
        tensors = self.tensors()
        if name not in tensors:
            raise MissingPart(f"{self.name}: there is no tensor {name!r}{nearest(name, tensors)}")
        return tensors[name]

    def fingerprint(self, names: Sequence[str] = ()) -> Fingerprint:
        """Identity of the base weights (edits lifted), for the components that ``names`` touch.

        Without names all components are covered.
        """
        return fingerprint(self, names)

    @property
    def state(self) -> State:
        """Digest of all base weights and ordered digests of the edits on the model."""
        return State(base_digest(self), self.edits.digests)

    @property
    def protocol_key(self) -> str:
        """A short text that names what decides outputs beside :attr:`state` and the request, for cache keys.

        It covers the configurations of all parts and the attributes in ``decisive``.
        """
        parts = {name: protocols.configuration(module) for name, module in self.parts().items()}
        others = {name: protocols.described(getattr(self, name)) for name in self.decisive}
        return protocols.key({"family": self.family, "parts": parts, **others})

    # -- running -------------------------------------------------------------------------------

    def beside(self, other: Model) -> Model:
        """This model, moved to the device and into the precision of another one of its kind."""
        theirs = next(iter(other.tensors().values()))
        for module in self.parts().values():
            module.to(device=theirs.device, dtype=theirs.dtype)
        return self

    @abstractmethod
    def generate(
        self, prompts: str | Prompt | Sequence[str | Prompt], *, seeds: Any = None, **options: Any
    ) -> Outputs:
        """Outputs for prompts: pictures ``uint8 (n, h, w, 3)`` or ``n`` texts."""

    @contextlib.contextmanager
    def lifted(self) -> Iterator[Model]:
        """The same model with every edit and control taken off for a while; restored bit for bit."""
        controls, self.controls = self.controls, ()
        try:
            with self.edits.lifted():
                yield self
        finally:
            self.controls = controls

    @contextlib.contextmanager
    def controlled(self, *controls: Control) -> Iterator[Model]:
        """The model with ``controls`` added after those already active."""
        before, self.controls = self.controls, (*self.controls, *controls)
        try:
            yield self
        finally:
            self.controls = before

    @property
    def acting(self) -> tuple[Control, ...]:
        """All that acts while the model runs: controls of the edits, in their order, then the user's."""
        return (*self.edits.controls, *self.controls)

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """Tokenizers that edits can add tokens to, by name; none unless an adapter says so."""
        return {}

    def needs(self, *capabilities: str) -> None:
        """Refuse, in words, when a capability is missing."""
        for capability in capabilities:
            if capability not in self.capabilities:
                raise MissingCapability(
                    f"{self.name} ({self.family}) cannot {capability}; it can "
                    f"{', '.join(sorted(self.capabilities))}"
                )

    def check_family(self, method: Method) -> None:
        """Refuse a method that is not defined for this family."""
        if self.family not in method.families:
            raise UnsupportedModel(
                f"{method.id} is defined for {', '.join(method.families)} models; "
                f"{self.name} is a {self.family} model"
            )
