"""RealEra: erase the neighbourhood of a concept's embedding, and pin what lies beyond it.

Erasing a name leaves a residue: related inputs still give the concept.  RealEra perturbs the embedding of the
concept at random, erases the neighbours found so, and keeps points a little further away as they were.  Both
sets are used twice: in a closed form of the text projections, then in low-rank training of the denoiser.

Source: arXiv 2410.09140 (2024; no official code).  ``e (tokens, d)`` is the embedding of an erased text and
``a`` that of the anchor; how neighbours ``e + eta`` and points beyond ``e + xi`` are mined stands in
:mod:`expunge.core.neighbour_mining`.

1. Closed form.  With ``N`` the rows of ``e`` and of its neighbours, ``P`` kept texts, ``B`` points beyond,

       W' = argmin  sum_{x in N} ||W' x - W a||^2 + l1 sum_{p in P} ||W' p - W p||^2
                    + l2 sum_{b in B} ||W' b - W b||^2 + l0 ||W' - W||_F^2

   for every text projection ``W (out, d)``.  Rows run from the first content token to the first end token;
   those of a text and of its anchor are counted from the end backwards (policy ``content_to_end``).

2. Noise alignment: a LoRA on the denoiser with ``W'``.  ``x_t`` is a random stop on the present model's own
   guided walk towards ``e``; ``eps_o`` is the model before both stages, and ``y = eps_o(0) - eta_g (eps_o(e) -
   eps_o(0))``, or ``eps_o(a)``:

       L = ||eps(x_t, e) - y||^2 + mean_j ||eps(x_t, e + eta_j) - y||^2
           + mean_m ||eps(x_t, e + xi_m) - eps_o(x_t, e + xi_m)||^2

   with new perturbations at every step.  ``alternate`` trains on the first term at odd steps and on sums of
   the others at even ones.

Reconstructions of ours, as no more is published: the form of 1, all weights and numbers of points in it,
rank, layers and rate of the LoRA.  ``vocabulary_neighbours`` is an extension of ours: the words of the
tokenizer's vocabulary whose embeddings lie nearest to the concept's are erased as its name is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...concept import Concept, as_concepts
from ...core import finetune
from ...core.closed_form import Moments
from ...core.low_rank import stored
from ...core.mentions import exchanged, without
from ...core.neighbour_mining import SAMPLERS, Mining, Survey, free_rows, mine
from ...core.noise_alignment import LAYERS, Alignment, need_rows
from ...core.projections import Projections, edited_texts, guide_of, kept_texts, shared_edit
from ...core.token_policy import POLICIES, Pair, Placed, accumulate, placed, unique_pairs
from ...core.vocabulary_words import Words
from ...edit import Edit, deltas
from ...errors import SettingError
from ...method import Eraser, Judge, setting
from ...models.base import noise_generator
from ...models.diffusion import DiffusionModel

__all__ = ["RealEra"]


@dataclasses.dataclass(frozen=True)
class RealEra(Eraser):
    """Semantic-level erasure via neighbour mining; see the module for the method."""

    id: ClassVar[str] = "realera"
    title: ClassVar[str] = "RealEra: Semantic-level Concept Erasure via Neighbor-Concept Mining"
    source: ClassVar[str] = "arXiv 2410.09140"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {},
        "paper:style": {"guide": "art"},
        "paper:identity": {"guide": "a person"},
        "paper:unsafe": {},
        # Chosen on development prompts of star, erased by its name alone: with twice the weight of kept rows the
        # closed form without mining leaves the name itself in a quarter of pictures.
        "world": {
            "preserve_scale": 0.15, "kept_tokens": "all_rows", "general_prompts": 400, "steps": 120, "lr": 1e-3,
            "batch": 2, "sampling_steps": 20, "bank": 64, "step_neighbours": 3, "step_beyond": 2,
            "target": "anchor",
        },
    }  # fmt: skip

    neighbours: int = setting(100, "Closed form: neighbours of each erased text", minimum=0)
    beyond: int = setting(100, "Closed form: points beyond, for each erased text", minimum=0)
    radius: float = setting(1.6, "D in norms of the embedding (400 in CLIP)", minimum=0)
    inner_radius: float | None = setting(
        None, "D1, the farthest a neighbour may be, in norms of the embedding; none: D", minimum=0
    )
    low_cosine: float = setting(
        0.5, "S1: neighbours are above, points beyond below", minimum=-1, maximum=1
    )
    high_cosine: float = setting(
        0.9, "S2: cosine of the nearest neighbour allowed", minimum=-1, maximum=1
    )
    noise_scale: float | None = setting(
        None, "Deviation of the random points (1 in the paper); none: that of the embedding, about 1 in CLIP",
        minimum=0,
    )  # fmt: skip
    sampler: str = setting("analytic", "How perturbations are drawn", choices=SAMPLERS)
    first_row: bool = setting(
        False, "Perturb the begin token too, as the third-party code does; it is the same in every text"
    )  # fmt: skip
    mine_from: str | None = setting(
        None, "Mine around this text in place of the erased name: a control"
    )
    preserve_scale: float = setting(1.0, "Weight l1 of the kept rows", minimum=0)
    beyond_scale: float = setting(1.0, "Weight l2 of the points beyond", minimum=0)
    ridge: float = setting(
        0.5, "Weight l0 of the distance to the old weights; without it the solve is singular", minimum=1e-9
    )  # fmt: skip
    tokens: str = setting("content_to_end", "Which rows of a text are mapped", choices=POLICIES)
    kept_tokens: str = setting(
        "content_to_end", "Rows of kept texts, by policy", choices=("content_to_end", "all_rows")
    )
    expand_prompts: bool = setting(False, "Erase five templates around each name too")
    templates: tuple[str, ...] = setting(
        (), "Further templates with {} for the name, erased and kept alike"
    )
    context_prompts: int = setting(
        0, "Whole prompts the model's world has of each concept, erased too", minimum=0
    )
    general_prompts: int = setting(
        0, "Captions of the model's world, preserved too; none names what an audit measures untold", minimum=0
    )  # fmt: skip
    guide: str | None = setting(
        None, "What takes the place; none: the anchor, else 'art' for styles, else ''"
    )
    erase_phrases: bool = setting(
        True, "Erase the concept's listed phrases too, and prompts with them"
    )
    vocabulary_neighbours: int = setting(
        0, "Words of the vocabulary nearest to the concept's name, erased like it (ours)", minimum=0
    )
    vocabulary: int = setting(
        2000, "Words of the tokenizer that are looked at, frequent ones first; 0: no words are reported",
        minimum=0,
    )  # fmt: skip
    align: bool = setting(True, "Train the LoRA after the closed form (stage 2)")
    lora_rank: int = setting(4, "Alignment: rank of each layer's change", minimum=1)
    lora_layers: str = setting("cross-attention", "Alignment: layers with a change", choices=LAYERS)
    steps: int = setting(200, "Alignment: optimiser steps", minimum=1)
    lr: float = setting(1e-4, "Alignment: learning rate of Adam", minimum=0)
    batch: int = setting(1, "Alignment: points x_t a step", minimum=1)
    guidance: float = setting(3.0, "Alignment: guidance of the walk that gives x_t", minimum=0)
    sampling_steps: int = setting(50, "Alignment: sampling steps of a whole walk", minimum=2)
    step_neighbours: int = setting(5, "Alignment: new neighbours for each x_t", minimum=0)
    step_beyond: int = setting(3, "Alignment: new points beyond for each x_t", minimum=0)
    target: str = setting(
        "negative", "Alignment: y pushes away from the concept, or is the anchor's prediction",
        choices=("negative", "anchor"),
    )  # fmt: skip
    eta_g: float = setting(1.0, "Alignment: strength of the push", minimum=0)
    alternate: bool = setting(
        False, "Alignment: first term at odd steps, sums of the others at even ones"
    )
    bank: int | None = setting(
        None, "Alignment: points drawn once, after the closed form; fresh ones every step when unset", minimum=1
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mining  # noqa: B018  refuses cosines that cannot be met
        if self.vocabulary_neighbours > self.vocabulary:
            raise SettingError(
                f"realera: vocabulary_neighbours is {self.vocabulary_neighbours} of {self.vocabulary} words "
                "(vocabulary); it cannot be larger"
            )

    @property
    def mining(self) -> Mining:
        """What counts as near."""
        return Mining(
            self.radius, self.inner_radius, self.low_cosine, self.high_cosine, self.noise_scale, self.sampler
        )  # fmt: skip

    def erase(
        self,
        model: DiffusionModel,
        concepts: Any,
        *,
        keep: Sequence[Any] = (),
        data: Any = None,
        judge: Judge | None = None,
        seed: int = 0,
        run: str | Path | None = None,
    ) -> Edit:
        """One solve for all concepts, then one LoRA over all; ``run`` is for the training.

        The teacher is the model as it is, edits on it included.  See :meth:`expunge.method.Eraser.erase`.

        Raises:
            UnsupportedModel: The alignment is asked for where a text is not one tensor of rows.
        """
        model.check_family(self)
        self.without_data(data)
        began, before = time.perf_counter(), model.cost.snapshot()
        wanted = as_concepts(concepts, keep)
        groups = Projections.groups(model)
        if self.align:
            model.needs("gradients")
            need_rows(self.id, model, groups)
        known = None
        if self.vocabulary:
            known = Words(groups[0].text, self.vocabulary, [concept.name for concept in wanted])
        pairs, kept, words = self._texts(model, wanted, keep, known)
        survey = Survey(known)
        moments = [self._moments(i, g, pairs, kept, seed, survey) for i, g in enumerate(groups)]
        solved = [(g, m.solve(self.ridge)) for g, m in zip(groups, moments, strict=True)]
        report: dict[str, Any] = {
            "pairs": len(pairs),
            "kept": len(kept),
            "erase_rows": sum(m.erase_rows for m in moments),
            "keep_rows": sum(m.keep_rows for m in moments),
            "mining": survey.report(),
            "vocabulary": words,
        }
        shared: dict[str, Any] = {"keep": kept_texts(keep), "seed": seed}
        if not self.align:
            return shared_edit(
                self, model, wanted, solved, report=report, cost=model.cost.since(before),
                seconds=time.perf_counter() - began, **shared,
            )  # fmt: skip
        stage = shared_edit(self, model, wanted, solved, report=report, **shared)
        kind, tensors, learnt = self._aligned(model, wanted, stage, pairs, run)
        return Edit.make(
            self, model, wanted, kind=kind, tensors=tensors,
            targets=tuple(dict.fromkeys(name.partition(".")[2] for name in tensors)),
            report={**stage.manifest.report, **learnt}, cost=model.cost.since(before),
            seconds=time.perf_counter() - began, **shared,
        )  # fmt: skip

    # -- texts ---------------------------------------------------------------------------------

    def _texts(
        self, model: Any, concepts: Sequence[Concept], keep: Sequence[Any], known: Words | None
    ) -> tuple[list[Pair], list[str], dict[str, Any]]:
        """Pairs to erase, texts to keep, and the words of the vocabulary that were erased or left out."""
        pairs, kept = edited_texts(self, model, concepts, keep)
        report: dict[str, Any] = {}
        spared = kept_texts(keep)
        for concept in concepts if known is not None and self.vocabulary_neighbours else ():
            assert known is not None
            guide = guide_of(concept, self.guide)
            near = known.nearest(concept.name, self.vocabulary_neighbours, leave=(guide,))
            words = [word for word in near if without(spared, (word,)) == spared]
            report[concept.name] = {
                "erased": words,
                "left out, as they are kept": [w for w in near if w not in words],
            }
            own = [p for p in pairs if (p.keyword or "").lower() == concept.name.lower()]
            pairs += [
                Pair(_called(pair, word), pair.replacing, word) for word in words for pair in own
            ]
        return unique_pairs(pairs), kept, report

    def around(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs, the text that is mined around in place of the erased one."""
        if self.mine_from is None:
            return list(pairs)
        return [
            Pair(_called(pair, self.mine_from), pair.replacing, self.mine_from) for pair in pairs
        ]

    # -- stages --------------------------------------------------------------------------------

    def _moments(
        self,
        number: int,
        group: Projections,
        pairs: Sequence[Pair],
        kept: Sequence[str],
        seed: int,
        survey: Survey,
    ) -> Moments:
        """Everything the closed form of a group is made of."""
        moments = accumulate(
            group.text, (), kept, self.tokens, erase=1.0, keep=self.preserve_scale,
            kept_policy=self.kept_tokens,
        )  # fmt: skip
        mined = self.around(pairs)
        for place in placed(group.text, pairs, self.tokens):
            moments.erase(place.erased[place.rows], place.replacing[place.onto])
            if self.mine_from is None:
                self._mine(number, place, mined[place.pair], seed, moments, survey)
        if self.mine_from is not None:
            for place in placed(group.text, mined, self.tokens):
                self._mine(number, place, mined[place.pair], seed, moments, survey)
        return moments

    def _mine(
        self, number: int, place: Placed, pair: Pair, seed: int, moments: Moments, survey: Survey
    ) -> None:
        """Add the neighbours of one text, and the points beyond."""
        free = free_rows(place.span, place.attended, first_row=self.first_row)
        item = f"{number}.{place.segment}.{place.pair}"
        for beyond, count in ((False, self.neighbours), (True, self.beyond)):
            if not count:
                continue
            draw = noise_generator(seed, "beyond" if beyond else "neighbours", item)
            found = mine(place.erased, free, count, beyond=beyond, mining=self.mining, generator=draw)  # fmt: skip
            survey.add(found, beyond)
            rows = found.points[:, place.rows].flatten(0, 1)
            if beyond:
                moments.keep(rows, self.beyond_scale)
                continue
            moments.erase(rows, place.replacing[place.onto].repeat(count, 1))
            if number == 0 and pair.erased == pair.keyword:
                survey.look(pair.erased, place, found)

    def _aligned(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        stage: Edit,
        pairs: Sequence[Pair],
        run: str | Path | None,
    ) -> tuple[Any, Mapping[str, Any], dict[str, Any]]:
        """Stage 2: both changes of every weight, as an edit stores them, and the training's report."""
        seed, keep = stage.manifest.seed, stage.manifest.keep
        task = Alignment(self, model, stage, pairs, seed)
        trained = finetune.fit(
            task,
            finetune.Loop(self.steps, finetune.Optimiser(self.lr)),
            seed=seed,
            modules=tuple(model.parts().values()),
            run=run,
            settings=finetune.request(self, model, concepts, keep=keep, closed_form=stage.digest),
            label=self.id,
        )
        changes: dict[str, list[Any]] = {}
        for target in stage.manifest.targets:
            pair = deltas.factors(stage, target.name, model.tensor(target.name))
            changes[target.name] = [pair]
        for name, pair in task.changes.factors(trained.values).items():
            changes.setdefault(name, []).append(pair)
        return *stored(changes), {**trained.report(), "lora_layers": len(task.changes.modules)}


def _called(pair: Pair, word: str) -> str:
    """The erased text of a pair with another word in the keyword's place."""
    return exchanged(pair.erased, (pair.keyword or pair.erased,), word)[0]
