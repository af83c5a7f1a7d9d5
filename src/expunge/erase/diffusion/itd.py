"""Interpret then Deactivate: a sparse autoencoder of the text encoder turns a concept off, for prompts that name it.

A top-k sparse autoencoder learns, without labels, what one layer of the text encoder says of tokens.  A concept is the
set of its units that are on for prompts of the concept and on for none of the prompts that must stay.  At generation
these units are multiplied by a negative number and the layer goes on with the reconstruction, but only for prompts
that this changes much: the error of the edited reconstruction is a zero-shot classifier of "names a target".

Source: arXiv 2503.09446 (Interpret-then-Deactivate; in print "Sparse autoencoder as a zero-shot classifier").

``x (T, d)`` are the hidden states of a prompt behind layer ``layers``, ``W_e, W_d (n, d)``, ``b_e (n)``, ``b (d)``:

    z = ReLU(TopK_k(W_e (x - b) + b_e)),   x_hat = W_d^T z + b,   trained on  s mean (x_hat - x)^2 + L_aux / 32
    top_m(p)  the m units with the largest max over tokens (start token left out) of z
    F_keep = union over retained prompts of top_m,   F = union over target prompts of top_m(p) \\ F_keep
    z'_F = tau z_F  (all tokens but the start),   x' = W_d^T z' + b
    e(p) = mean over tokens and d of (x' - x)^2,   theta = 0.99 min over target prompts of e(p)
    the prompt goes on as x' where e(p) >= theta, and as x where not

No weight changes.  More concepts are a larger union, found without training; an autoencoder serves a model.  A prompt
below theta is untouched bit for bit, and so is its picture.  A negative text is never edited.

Where the official code contradicts itself, its intent is taken: theta and e are both means over tokens (it compares a
mean with a minimum of maxima for people), of one tau (styles: -6 and -8), over real tokens only, of prompts padded to
the model's length (there e depends on what else is in a batch, and short prompts reach the denoiser unpadded); units
that are not on are never among the top m; silence of units is counted in tokens, so that L_aux acts at all.  Ours:
tokens, not prompts, are shuffled into batches; of the padding, which is most of a context, ``padding`` rows of each
text are learnt from; the templates; target prompts with the anchor, or nothing, in the place of the name among the
retained prompts; target prompts without any unit of F have no say in theta, which would let every prompt in, and are
counted; several text encoders have an autoencoder and a decision each.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept, as_concepts
from ...core.concept_features import STARTS, Deactivated, Deactivation, used
from ...core.concept_prompts import Texts, concept_prompts, five
from ...core.examples import examples
from ...core.free_words import FreeWord, free_word
from ...core.mentions import without
from ...core.projections import kept_texts
from ...core.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from ...core.text_activations import Rows, Site, recorded, sites
from ...core.text_autoencoders import loaded, packed, reference, rounded, trained, unpacked
from ...edit import Edit
from ...errors import EditFormatError, InputError, MissingCapability, SettingError
from ...method import Eraser, Judge, setting
from ...models.diffusion import DiffusionModel

__all__ = ["ItD"]


@dataclasses.dataclass(frozen=True)
class ItD(Eraser):
    """Interpret then deactivate, arXiv 2503.09446; see the module for the method."""

    id: ClassVar[str] = "itd"
    title: ClassVar[str] = (
        "ItD: Sparse Autoencoder as a Zero-Shot Classifier for Concept Erasing in Text-to-Image Diffusion Models"
    )
    source: ClassVar[str] = "arXiv 2503.09446"
    version: ClassVar[int] = 3
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:identity": {},
        "paper:style": {"most": 256},
        "paper:unsafe": {"steps": 4000, "gate": "always", "general_prompts": 50},
        # Chosen on development prompts of one and five concepts: the second layer of four and those above mix words,
        # and a rare unit of a mixed row is on for some retained prompt too (see the page).
        "world": {
            "layers": (0,), "units": 1024, "k": 16, "steps": 500, "batch": 1024, "lr": 2e-3, "warm_up": 50,
            "encoder_start": "transposed", "normalise": "mean-square", "aux_weight": 0.25, "dead_tokens": 10_000,
            "captions": 5000, "padding": 4, "start": "kept", "most": 2, "context_prompts": 40, "general_prompts": 400,
        },
    }  # fmt: skip

    layers: tuple[int, ...] = setting(
        (8,),
        "layer whose output is edited, from 0; one for all text encoders or one each",
        minimum=0,
    )
    towers: tuple[str, ...] = setting((), "text encoders that are edited; all if empty")
    units: int = setting(524_288, "units of the autoencoder, n", minimum=2)
    k: int = setting(64, "units that are on for a token", minimum=1)
    steps: int = setting(6000, "optimiser steps of the autoencoder; 0 leaves it random", minimum=0)
    batch: int = setting(3850, "tokens a step", minimum=1)
    lr: float = setting(1e-4, "learning rate of Adam", minimum=0)
    warm_up: int = setting(1000, "steps over which the rate rises", minimum=0)
    encoder_start: str = setting(
        "uniform", "encoder at the start: the atoms, or uniform in 1 / sqrt(d)", choices=("transposed", "uniform")
    )  # fmt: skip
    normalise: str = setting(
        "none", "hidden states are learnt as they are, or scaled to a mean square of 1", choices=("none", "mean-square")
    )  # fmt: skip
    aux_weight: float = setting(1 / 32, "weight of L_aux", minimum=0)
    dead_tokens: int = setting(
        10_000_000, "tokens without firing after which a unit is dead", minimum=1
    )
    captions: int = setting(40_000, "captions of a model's world to learn from", minimum=2)
    padding: int | None = setting(
        8, "rows of padding of each text to learn from; all if none", minimum=0
    )
    autoencoder: str | None = setting(
        None, "folder of a trained autoencoder, or of one for each text encoder by its name"
    )
    carried: str = setting(
        "whole", "what the edit holds of the autoencoder: all of it, or the digest of the one in the folder",
        choices=("whole", "reference"),
    )  # fmt: skip
    start: str = setting(
        "replaced", "row of the start token in an edited prompt; kept: it has no say in e either", choices=STARTS
    )  # fmt: skip
    most: int = setting(128, "strongest units of a prompt, m", minimum=1)
    contrast: bool = setting(True, "leave out the units of retained prompts")
    tau: float = setting(-8.0, "what the units of the concept are multiplied by")
    gate: str = setting("error", "which prompts are edited", choices=("error", "always"))
    margin: float = setting(0.99, "theta over the least error of a target prompt", minimum=0)
    templates: tuple[str, ...] = setting(
        (), "target prompts, {} for the name; five of the concept's kind if empty"
    )
    guide: str | None = setting(
        None,
        "what stands for the name in retained prompts; none: the anchor, else 'art' for styles, else nothing",
    )
    erase_phrases: bool = setting(True, "read the concept's listed phrases too")
    context_prompts: int = setting(
        0, "whole prompts the model's world has of each concept, read too", minimum=0
    )
    general_prompts: int = setting(
        500, "captions among the retained prompts; of a world, none of what an audit measures untold", minimum=0
    )  # fmt: skip
    rounds: int = setting(0, "rounds of hardening against free words", minimum=0)
    attack_steps: int = setting(1000, "steps of a free word", minimum=1)
    attack_lr: float = setting(5e-3, "learning rate of Adam of a free word", minimum=0)
    attack_batch: int = setting(4, "pictures a step of a free word", minimum=1)
    pictures: int = setting(50, "pictures of a concept for its free word", minimum=1)

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
        """An edit that acts on the text encoders; the autoencoder is trained first where none is given.

        Args:
            keep: Names, concepts or prompts; they join the retained prompts.
            data: Captions to learn from, or a mapping with any of ``captions``, ``retained`` (prompts) and
                ``targets`` (concept's name -> prompts).  A world's model has captions of its own.
            run: Folder of the autoencoder's training; one serves all concepts of a model.

        Raises:
            SettingError: The text encoders have no such layer.
            InputError: No captions, or no unit belongs to a concept alone.
            MissingCapability: Rounds of hardening on a model with several text encoders.
        """
        model.check_family(self)
        model.needs("controls", "activations")
        wanted = as_concepts(concepts, keep)
        self._refuse_half_a_reference()
        if self.rounds and len(model.vocabularies()) != 1:
            raise MissingCapability(
                f"{model.name}: rounds={self.rounds} hardens against free words, which need a single text encoder; "
                "allowed is rounds=0"
            )
        places = sites(model, self.layers, self.towers or None)
        counted, began = model.cost.snapshot(), time.monotonic()
        known = self.autoencoder is not None
        texts = concept_prompts(self, model, wanted, keep, data, known=known)
        found = self._autoencoders(model, places, texts, seed, run)
        tensors: dict[str, Tensor] = {}
        report: dict[str, Any] = {
            "target_prompts": len(texts.targets), "retained_prompts": len(texts.retained), "sites": {},
        }  # fmt: skip
        said = [list(recorded(model, places, listed)) for listed in (texts.targets, texts.retained)]
        edited = self._read_all(places, found, *said)
        _refuse_unread(wanted, texts.targets, edited, said[0])
        for number in range(self.rounds):
            words = self._attacked(model, wanted, edited, seed, number)
            said[0] += [word.rows(places) for word in words]
            report.setdefault("attack_losses", []).append([word.losses[-1] for word in words])
            edited = self._read_all(places, found, *said)
        for one in edited:
            report["sites"][one.site.tower] = _told(one, *(_at(one.site, parts) for parts in said))
            tensors |= self._carried(one)
        return Edit.make(
            self, model, wanted, kind="control", tensors=tensors, acts=True, keep=kept_texts(keep), seed=seed,
            cost=model.cost.since(counted), seconds=time.monotonic() - began, report=report, data_digest=texts.digest,
        )  # fmt: skip

    # -- autoencoder ---------------------------------------------------------------------------------

    def config(self, site: Site) -> SparseAutoencoderConfig:
        """The autoencoder of a site."""
        return SparseAutoencoderConfig.configured(
            "itd", width=site.width, units=self.units, k=self.k, steps=max(1, self.steps), batch=self.batch, lr=self.lr,
            warm_up=self.warm_up, dead_tokens=self.dead_tokens, aux_weight=self.aux_weight, normalise=self.normalise,
            encoder_start=self.encoder_start, site=site.layer,
        )  # fmt: skip

    def _autoencoders(
        self,
        model: DiffusionModel,
        places: Sequence[Site],
        texts: Texts,
        seed: int,
        run: str | Path | None,
    ) -> dict[str, SparseAutoencoder]:
        if self.autoencoder is None:
            found = trained(
                model, places, texts.captions, self.config, padding=self.padding, starts=self.start == "replaced",
                seed=seed, untrained=self.steps == 0, run=run,
            )  # fmt: skip
        else:
            several = len(places) > 1
            found = {site.tower: loaded(self.autoencoder, site, several) for site in places}
        if self.carried == "whole":
            found = {tower: rounded(own) for tower, own in found.items()}
        return {tower: own.to(model.device) for tower, own in found.items()}

    def _refuse_half_a_reference(self) -> None:
        if self.carried == "reference" and self.autoencoder is None:
            raise SettingError(
                "itd: carried='reference' needs the folder that is referred to; set autoencoder=, or carried='whole'"
            )

    # -- concept -------------------------------------------------------------------------------------

    def read(
        self,
        site: Site,
        autoencoder: SparseAutoencoder,
        targets: Sequence[Rows],
        retained: Sequence[Rows],
    ) -> Deactivated:
        """The concept's units at a site, and the threshold, from hidden states of target and retained prompts.

        Raises:
            InputError: Every unit of the target prompts is on for a retained prompt too.
        """
        mask = used(autoencoder, targets, self.most)
        if self.contrast:
            mask &= ~used(autoencoder, retained, self.most)
        if not bool(mask.any()):
            raise InputError(
                f"at {site.layer} every unit of the target prompts is among the {self.most} strongest of a retained "
                "prompt too; lower most, retain fewer prompts, or take more units"
            )
        one = Deactivated(site, autoencoder, mask, self.tau, self.start)
        if self.gate == "always":
            return one
        return dataclasses.replace(one, threshold=self.margin * one.least_error(targets))

    def _read_all(
        self,
        places: Sequence[Site],
        found: Mapping[str, SparseAutoencoder],
        targets: Sequence[Mapping[str, Rows]],
        retained: Sequence[Mapping[str, Rows]],
    ) -> list[Deactivated]:
        return [
            self.read(site, found[site.tower], _at(site, targets), _at(site, retained))
            for site in places
        ]

    def _attacked(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        edited: Sequence[Deactivated],
        seed: int,
        number: int,
    ) -> list[FreeWord]:
        """A free word for each concept, learnt through the edit as it is."""
        found = []
        for concept in concepts:
            asked = [form.replace("{}", concept.name) for form in five(concept.kind)]
            _, shown = examples(
                model, concept.name, {}, count=self.pictures, texts=asked, seed=seed, steps=model.steps,
                guidance=model.guidance,
            )  # fmt: skip
            with model.controlled(Deactivation(edited)):
                word = free_word(
                    model, concept, shown, steps=self.attack_steps, lr=self.attack_lr, batch=self.attack_batch,
                    seed=seed, purpose=f"round {number}",
                )  # fmt: skip
            found.append(word)
        return found

    # -- edit ----------------------------------------------------------------------------------------

    def _carried(self, one: Deactivated) -> dict[str, Tensor]:
        prefix = f"{one.site.tower}."
        whole = self.carried == "whole"
        return {
            f"{prefix}units": one.mask.nonzero().flatten().cpu(),
            f"{prefix}threshold": torch.tensor(one.threshold, dtype=torch.float64),
            **(packed if whole else reference)(one.autoencoder, prefix),
        }

    @classmethod
    def control(cls, edit: Edit, model: DiffusionModel) -> Deactivation:
        """What the edit does to texts; refuses text encoders without the layer."""
        settings: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in edit.manifest.settings.items()
        }
        method = cls(**settings)
        places = sites(model, method.layers, method.towers or None)
        return Deactivation([method._edited(edit, model, site, len(places) > 1) for site in places])

    def _edited(self, edit: Edit, model: DiffusionModel, site: Site, several: bool) -> Deactivated:
        prefix, tensors = f"{site.tower}.", edit.tensors
        for name in ("units", "threshold"):
            if f"{prefix}{name}" not in tensors:
                raise EditFormatError(f"itd: the edit lacks the tensor {prefix + name!r}")
        if self.carried == "whole":
            own = unpacked(tensors, prefix)
        else:
            wanted = tensors.get(f"{prefix}digest", torch.zeros(0))
            own = loaded(str(self.autoencoder), site, several, wanted)
        if own.config.width != site.width:
            raise EditFormatError(
                f"itd: the edit's autoencoder has width {own.config.width}, {site.layer} has {site.width}"
            )
        units, mask = tensors[f"{prefix}units"], torch.zeros(own.config.units, dtype=torch.bool)
        if units.is_floating_point() or not bool(((units >= 0) & (units < len(mask))).all()):
            raise EditFormatError(
                f"itd: {prefix}units are numbers of units from 0 to {len(mask) - 1}; the edit's are not"
            )
        mask[units] = True
        own, mask = own.to(model.device), mask.to(model.device)
        return Deactivated(
            site, own, mask, self.tau, self.start, float(tensors[f"{prefix}threshold"])
        )


def _at(site: Site, parts: Sequence[Mapping[str, Rows]]) -> list[Rows]:
    return [part[site.tower] for part in parts]


def _refuse_unread(
    concepts: Sequence[Concept],
    targets: Sequence[str],
    edited: Sequence[Deactivated],
    said: Sequence[Mapping[str, Rows]],
) -> None:
    """Refuse a concept of whose prompts none has a unit in a row that counts: it would stay as it is.

    Units may be strongest in padding, which is edited and has no say.
    """
    named = torch.stack([one.read(_at(one.site, said))[1] for one in edited]).any(0)
    for concept in concepts:
        left = set(without(targets, concept.names))
        own = [
            found for text, found in zip(targets, named.tolist(), strict=True) if text not in left
        ]
        if own and not any(own):
            raise InputError(
                f"no prompt of {concept.name!r} has a unit that belongs to the concepts alone; lower most, retain "
                "fewer prompts, or take more units"
            )


def _told(one: Deactivated, targets: Sequence[Rows], retained: Sequence[Rows]) -> dict[str, Any]:
    """What to report of a site: its autoencoder's quality, the units, and which prompts are edited."""
    found: dict[str, Any] = {
        "layer": one.site.layer, "quality": one.autoencoder.quality, "units_of_the_concept": int(one.mask.sum()),
        "threshold": one.threshold,
    }  # fmt: skip
    for name, parts in (("target", targets), ("retained", retained)):
        errors, named = one.read(parts)
        if name == "target":
            found["target_prompts_without_a_unit"] = int((~named).sum())
        if len(errors):
            found[f"{name}_error"] = float(errors.median())
            found[f"{name}_edited"] = float((errors >= one.threshold).double().mean())
    return found
