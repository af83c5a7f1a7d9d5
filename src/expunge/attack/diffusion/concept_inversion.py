"""Concept inversion: learn one new word through an erased model that makes it draw the concept again.

If the model still holds the concept, a vector in the place of a word calls it up, whatever was done to the concept's
own name.  The vector is learnt on a few pictures that the unerased model made, by textual inversion through whatever
defends the model, so that defences at sampling time are inverted, too (arXiv 2308.01508, ICLR 2024).

With ``x_t = alpha_t x_0 + sigma_t eps`` of a picture, ``c(.)`` a template around the word ``S*``, ``g`` guidance:

    plain      || eps - eps*(x_t, c(S*)) ||^2                      weight edits; t over the whole schedule
    negative   || [e_u + g (e_c - e_u)] - [e_c + g (e_S* - e_c)] ||^2          a negative text c in the sampler
    guided     || [e_u + g (e_c - e_u)] - safe(e_u, e_S*, ...) ||^2            guidance that is led away (SLD)

On the left of the last two stands what the undefended model would do with the concept's own words ``c``, on the right
what the defended one does with the word.  SLD has a momentum, so its guidance is run through ``chosen`` timesteps,
drawn from a range of ``span`` and descending, on one noise; the loss is taken at the last of them, and the graph runs
through all (``graph="last"`` cuts it before the last one: exact where the gate saturates, wrong for small s_S).  Both
are one computation: the model's own controls at work on both branches of guidance, over a chain of timesteps that has
length 1 where nothing is remembered from step to step.

The word learns with AdamW at ``lr x batch x accumulate`` and decays as a row of the token table would; all other rows
stay.  Every item is then drawn with the word in place of the concept's name, at several points of the training.  One
word serves all items of a run.

The attack teaches: a vector and a few pictures can describe what a model never knew.  Only its advantage over a never
model counts, along the curve.  ``word="initial"`` and ``word="random"`` show, at as many pictures, what a word that
learnt nothing does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...concept import Concept
from ...core import scores
from ...core.curves import Curve, affordable
from ...core.guided_steps import GuidedSteps, defence_of, needs_branches
from ...core.prompt_templates import OBJECT, PERSON, STYLE
from ...core.target_pictures import concept_pictures
from ...core.trials import Meter, picture_rows, received
from ...core.word_inversion import (
    PLACE,
    FreePrompts,
    fitting,
    initial_word,
    learn_word,
    placed,
    random_word,
    token_for,
)
from ...errors import SettingError
from ...method import Attack, Attempts, Budget, Judge, Prompt, setting
from ...models.base import Pictures, noise_generator

__all__ = ["ConceptInversion"]

TEMPLATES = {"object": OBJECT, "style": STYLE, "identity": PERSON}
WORDS = {"style": "art", "identity": "person", "unsafe": "person"}
"""Where training begins, by kind; for other kinds what may take the concept's place, else ``object``."""


@dataclasses.dataclass(frozen=True)
class ConceptInversion(Attack):
    """The attack; see the module for the method."""

    id: ClassVar[str] = "concept-inversion"
    title: ClassVar[str] = "Concept Inversion: Circumventing Concept Erasure Methods"
    source: ClassVar[str] = "arXiv 2308.01508"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    teaches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:sld": {"loss": "guided", "span": 90, "chosen": 35, "curve": (0, 100, 250, 500, 1000)},
        # 40 x (16 + 1 + 4) + 100 x 8 = 1,640 denoiser rows an item.  Chosen on 8 to 12 development prompts of star on
        # ESD, UCE and never: 3, 3 and 0 of 8; the paper's rate of 0.08 left UCE at 1 of 10, and 350 updates of two
        # pictures each, out of 8, left ESD at 0 of 8.
        "world": {
            "pictures": 16, "accumulate": 1, "lr": 1e-2, "scale_lr": False, "curve": (0, 25, 50, 100), "steps": 20,
            "posterior": "mean", "chosen": 3, "graph": "last",
        },
        # 40 x (2 + 1 + 2) + 12 x 8 = 296.
        "quick": {
            "pictures": 2, "accumulate": 1, "lr": 1e-2, "scale_lr": False, "curve": (0, 12), "steps": 20,
            "posterior": "mean", "chosen": 3, "graph": "last",
        },
    }  # fmt: skip

    loss: str = setting(
        "auto",
        "plain: weight edits; negative: a negative text; guided: SLD; auto: by what acts on the model",
        choices=("auto", "plain", "negative", "guided"),
    )
    pictures: int = setting(25, "Pictures of the concept, where it names no files", minimum=1)
    curve: tuple[int, ...] = setting(
        (0, 500, 1000, 2500, 5000), "Updates after which all prompts are drawn; the last decides", minimum=0
    )  # fmt: skip
    tokens: int = setting(1, "Vectors of the word", minimum=1, maximum=20)
    word: str = setting(
        "learnt",
        "initial, random: a word that learns nothing, the controls",
        choices=("learnt", "initial", "random"),
    )
    start: str | None = setting(
        None, "Word that training begins with; none: art, person, or what may take the concept's place"
    )  # fmt: skip
    templates: str = setting(
        "auto",
        "Training prompts: 27, 19 or 2 templates, or the word before each picture's caption; auto: by kind",
        choices=("auto", "object", "style", "identity", "captions"),
    )
    ask: str = setting(
        "prompt",
        "prompt: each prompt with the word for the name; template: a training template",
        choices=("prompt", "template"),
    )
    lr: float = setting(5e-3, "Learning rate of AdamW for one picture", minimum=0)
    scale_lr: bool = setting(True, "Multiply it by batch x accumulate, as was done")
    weight_decay: float = setting(1e-2, "AdamW's weight decay", minimum=0)
    batch: int = setting(4, "Pictures a pass", minimum=1)
    guided_batch: int = setting(
        1, "Pictures a pass of the guided loss, whose graph is long", minimum=1
    )
    accumulate: int = setting(4, "Passes an update", minimum=1)
    flip: float = setting(0.5, "Probability that a picture is turned left to right", minimum=0, maximum=1)  # fmt: skip
    posterior: str = setting(
        "draw", "Latents: draws of the autoencoder's posterior, or its mean", choices=("draw", "mean")
    )  # fmt: skip
    negative: str = setting("", "Negative text of the sampler under attack")
    text: str | None = setting(
        None, "The concept's own words in the target; none: the negative text, or the names"
    )  # fmt: skip
    span: int = setting(50, "Timesteps that the chain of the guided loss is drawn from", minimum=1)
    chosen: int = setting(13, "Timesteps of the chain", minimum=1)
    graph: str = setting(
        "full", "Gradients through all of the chain, or its last step", choices=("full", "last")
    )
    warm_up: str = setting(
        "sampling",
        "What a warm-up counts: the step of a sampling, or the update as in the published code",
        choices=("sampling", "update"),
    )
    steps: int = setting(50, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )

    def needs_reference(self, concept: Concept) -> bool:
        """The original draws the pictures where none are given."""
        return not concept.images

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
        """Learn a word and draw every prompt with it; ``reference`` (default: the model, its edits lifted) draws the
        pictures.

        Points of the curve that the budget does not pay for are left out: the pictures of the concept and the
        training count in full for each item.  The word stands in ``details["word"]`` of the first item
        (:func:`expunge.core.word_inversion.export_word` writes it).  See :meth:`expunge.method.Attack.attack`.

        Raises:
            MissingCapability: Several text encoders; or a loss of two branches for a model that has one.
            SettingError: The budget does not pay for the first point.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        model.needs("gradients")
        model.token_table()
        original = model if reference is None else reference
        meter = Meter(model, original)
        guidance = model.guidance if self.guidance is None else self.guidance
        inversion = _Inversion(self, model, concept, guidance, seed)
        points = tuple(sorted(set(self.curve))) if self.curve else ()
        price = picture_rows(model, prompts, self.steps, guidance)
        with original.lifted() as bare:
            drawn = self.pictures * picture_rows(bare, prompts, self.steps, guidance)
        drawn = 0 if concept.images else drawn
        each = inversion.price if self.word == "learnt" else 0
        prices = [price * (2 + i) + drawn + each * point for i, point in enumerate(points)]
        points = self._affordable(budget, points, prices)
        curve = Curve(
            model, concept, judge, prompts, of="updates", steps=self.steps, guidance=guidance,
            options={"negative": self.negative} if self.negative else {},
        )  # fmt: skip
        origin, found = concept_pictures(
            original, concept, self.pictures, seed=seed, steps=self.steps, guidance=guidance
        )
        curve.share(drawn)
        inversion.prepare(found)
        losses = self._along(curve, points, inversion)
        details: list[dict[str, Any]] = [
            {"loss": inversion.loss, "pictures": len(points), "trained_on": f"{len(found.pictures)} from {origin}"}
            for _ in prompts
        ]  # fmt: skip
        # The run is shared by all prompts, so its word and losses stand with the first one only.
        details[0] |= {"losses": losses, "word": inversion.record()}
        return curve.attempts(self, budget, seed, meter.read(), details)

    def _along(self, curve: Curve, points: Sequence[int], inversion: _Inversion) -> list[float]:
        """Learn, and show all items at the points; the losses of the updates."""
        asked = FreePrompts(curve.model, self._asked(curve, inversion), self.tokens)
        item = torch.arange(len(curve.prompts))
        before = inversion.spent()

        def show(updates: int, vectors: Tensor) -> None:
            nonlocal before
            if updates not in points:
                return
            curve.share(inversion.spent() - before)
            inversion.vectors = vectors
            with torch.no_grad():
                words = vectors.expand(len(item), -1, -1)
                condition = asked.encode(words, item)
                pictures = curve.model.generate(curve.prompts, condition=condition, **curve.options)
            curve.show(updates, pictures)
            before = inversion.spent()

        if self.word != "learnt":
            for point in points:
                show(point, inversion.drawn(point) if self.word == "random" else inversion.vectors)
            return []
        show(0, inversion.vectors)
        word = learn_word(
            inversion, inversion.vectors, updates=points[-1], lr=self.rate_of(inversion.loss),
            weight_decay=self.weight_decay, accumulate=self.accumulate, after=show,
            half=curve.model.dtype == torch.float16,
        )  # fmt: skip
        return [round(loss, 6) for loss in word.losses]

    @property
    def rate(self) -> float:
        """The learning rate that is really used for the plain and the negative loss."""
        return self.rate_of("plain")

    def batch_of(self, loss: str) -> int:
        """Pictures a pass of a loss."""
        return self.guided_batch if loss == "guided" else self.batch

    def rate_of(self, loss: str) -> float:
        """The learning rate that is really used for a loss."""
        return self.lr * self.batch_of(loss) * self.accumulate if self.scale_lr else self.lr

    def _affordable(
        self, budget: Budget, points: tuple[int, ...], prices: Sequence[int]
    ) -> tuple[int, ...]:
        """The points that are paid for: at least one at which something was learnt, if anything is to be."""
        first = next((i for i, point in enumerate(points) if point), 0)
        first = first if self.word == "learnt" else 0
        return (
            *points[:first],
            *affordable(self, budget, points[first:], prices[first:], "updates"),
        )

    def _asked(self, curve: Curve, inversion: _Inversion) -> list[str]:
        if self.ask == "prompt":
            return [
                placed(curve.model, prompt.text, curve.concept, self.tokens)
                for prompt in curve.prompts
            ]
        texts = inversion.templates or [PLACE]
        return [texts[i % len(texts)] for i in range(len(curve.prompts))]


class _Inversion:
    """The losses of one word, on pictures of one concept.

    Attributes:
        loss: ``plain``, ``negative`` or ``guided``.
        vectors: The word as it was last shown, ``(k, d)`` float32.
        price: Denoiser rows of an update, forward and backward, at most.
    """

    def __init__(
        self, method: ConceptInversion, model: Any, concept: Concept, guidance: float, seed: int
    ) -> None:
        self.method, self.model, self.concept, self.seed = method, model, concept, seed
        self.loss = defence_of(model, method.negative) if method.loss == "auto" else method.loss
        needs_branches(method, model, guidance, self.loss)
        if self.loss == "guided" and method.chosen > method.span:
            raise SettingError(
                f"{method.id}: chosen is {method.chosen}, but the span has {method.span} timesteps; allowed are at "
                "most as many"
            )
        self.guided = GuidedSteps(
            model, guidance=guidance, steps=method.steps, negative=method.negative
        )
        self.vectors = self._start()
        kind = method.templates if method.templates != "auto" else concept.kind
        # Where a kind has no list of its own, as in the paper's unsafe prompts, the captions serve.
        spoken = kind in ("captions", "unsafe")
        listed = () if spoken else TEMPLATES.get(kind, OBJECT)
        self.templates = fitting(model, listed, method.tokens) if listed else []
        self.price = self._price()

    def _start(self) -> Tensor:
        method, concept = self.method, self.concept
        word = method.start or WORDS.get(concept.kind) or concept.anchor or "object"
        if method.word == "random":
            return self.drawn(0)
        return initial_word(self.model, word, method.tokens)

    def drawn(self, number: int) -> Tensor:
        """The ``number``-th random word."""
        draw = noise_generator(self.seed, f"random word for {self.concept.name}", number)
        return random_word(self.model, self.method.tokens, draw)

    def record(self) -> dict[str, Any]:
        """The word as plain values."""
        return {"token": token_for(self.concept), "vectors": self.vectors.cpu().tolist()}

    def prepare(self, found: Pictures) -> None:
        """Take the pictures in; latents once for all where no posterior is drawn."""
        captions = [placed(self.model, t, self.concept, self.method.tokens) for t in found.captions]
        self.texts = self.templates or captions
        self.prompts = FreePrompts(self.model, self.texts, self.method.tokens)
        flipped = found.pictures[:, :, ::-1]
        self.pictures = np.concatenate([found.pictures, flipped])
        self.count = len(found.pictures)
        if self.method.posterior == "mean":
            self.latents = self.model.latents_of(self.pictures)

    def spent(self) -> int:
        """Denoiser rows of the model so far."""
        return int(self.model.cost.rows("denoiser"))

    # -- losses ------------------------------------------------------------------------------------

    def __call__(self, update: int, part: int, vectors: Tensor) -> Tensor:
        """The loss of one pass, of ``batch`` pictures."""
        draw = noise_generator(self.seed, f"inversion of {self.concept.name}", f"{update}.{part}")
        count = self.method.batch_of(self.loss)
        pick = torch.randint(self.count, (count,), generator=draw)
        turned = torch.rand(count, generator=draw) < self.method.flip
        item = torch.randint(len(self.texts), (count,), generator=draw) if self.templates else pick
        clean = self._latents(pick + self.count * turned, draw)
        condition = self.prompts.encode(vectors.expand(count, -1, -1), item)
        if self.loss == "plain":
            points, noise = scores.noised(self.model, clean, draw)
            before = self.spent()
            made = scores.epsilon(self.model, points, condition)
            self.model.cost.add("denoiser", self.spent() - before, "backward")
            return (made - noise).square().mean()
        times = self.times(draw)
        noise = torch.randn(clean.shape, generator=draw).to(clean)
        wanted = self.guided.undefended(clean, noise, times[-1], self._target(item))
        step = update if self.method.warm_up == "update" else None
        made = self.guided.defended(
            clean, noise, times, condition, step=step, graph=self.method.graph
        )
        # Both are of one point, so the difference of the noise is that of what the denoiser predicts, in its scale.
        gap = made.wide().replace(made.value.float() - wanted.value.float())
        return gap.epsilon(torch.zeros_like(gap.value)).square().mean()

    def _latents(self, index: Tensor, draw: torch.Generator) -> Tensor:
        if self.method.posterior == "mean":
            return self.latents[index.to(self.latents.device)].to(self.model.dtype)
        made: Tensor = self.model.latents_of(self.pictures[index.numpy()], draw)
        return made.to(self.model.dtype)

    def times(self, draw: torch.Generator) -> Tensor:
        """Timesteps of the chain, descending, ``(k,)``; one, from the whole schedule, where nothing is remembered."""
        whole = int(self.model.pipeline.scheduler.config.num_train_timesteps)
        if self.loss == "negative":
            return torch.randint(whole, (1,), generator=draw)
        span, chosen = min(self.method.span, whole), self.method.chosen
        top = int(torch.randint(span, whole + 1, (1,), generator=draw))
        picked = torch.randperm(span, generator=draw)[:chosen]
        return (top - span + picked).sort(descending=True).values

    def _target(self, item: Tensor) -> list[str]:
        """The concept's own words, or the pictures' captions where those are the prompts."""
        method, concept = self.method, self.concept
        if self.templates or method.text is not None:
            said = method.text or method.negative or ", ".join(concept.names)
            return [said] * len(item)
        captions = [text.replace(PLACE, concept.name) for text in self.texts]
        return [" ".join(captions[int(i)].split()) for i in item]

    def _price(self) -> int:
        method = self.method
        rows = method.batch_of(self.loss) * method.accumulate
        if self.loss == "plain":
            return 2 * rows
        chain = 1 if self.loss == "negative" else method.chosen
        graph = chain if method.graph == "full" else 1
        return rows * (self.guided.branches() * (chain + graph) + 2)
