"""Sparse autoencoders of text encoders: trained on texts once for a model, found again, carried by an edit.

    found = trained(model, sites(model, (8,)), texts, config, seed=0, run=folder)     # tower -> SparseAutoencoder
    tensors = packed(found["text_encoder"], "text_encoder.")                         # what an edit carries
    autoencoder = unpacked(edit.tensors, "text_encoder.")

An autoencoder depends on the model, the texts, the settings and the seed, not on a concept, so one serves them all:
it is kept for the process, and with a run folder on disk, where a killed training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..edit.files import tensors_digest
from ..errors import EditFormatError, InputError, SettingError
from ..models.base import noise_generator
from ..models.diffusion import DiffusionModel
from . import sampling
from .sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from .sparse_autoencoder.metrics import quality
from .sparse_autoencoder.start import started
from .sparse_autoencoder.stream import ActivationCache, as_activations
from .sparse_autoencoder.trainer import fit
from .text_activations import Rows, Site, recorded

__all__ = [
    "loaded",
    "packed",
    "random_start",
    "reference",
    "rounded",
    "rows_of",
    "trained",
    "unpacked",
]

HELD_OUT = 20
"""One text in so many is not trained on; the quality table is measured there."""

BATCH = 64

LARGE = 2.0**14
"""Held-out hidden states from this size on are not kept in float16, which ends at four times as much."""


def rows_of(rows: Rows, padding: int | None, starts: bool, generator: torch.Generator) -> Tensor:
    """The hidden states that an autoencoder learns from, ``(m, d)``.

    Args:
        rows: Hidden states of texts.
        padding: Rows of padding of each text, drawn at random; all if ``None``.
        starts: Also the start tokens.
        generator: Draws the padding.
    """
    real = rows.real if starts else rows.real & ~rows.first
    after = ~rows.real
    if padding is not None:
        draw = torch.rand(after.shape, generator=generator).to(after.device).masked_fill(~after, -1)
        chosen = draw.topk(min(padding, after.shape[1]), dim=1).indices
        after = after & torch.zeros_like(after).scatter(1, chosen, True)
    return rows.hidden[real | after]


def trained(
    model: DiffusionModel,
    wanted: Sequence[Site],
    texts: Sequence[str],
    config: Callable[[Site], SparseAutoencoderConfig],
    *,
    padding: int | None,
    starts: bool,
    seed: int,
    untrained: bool = False,
    run: str | Path | None = None,
) -> dict[str, SparseAutoencoder]:
    """An autoencoder for each site, of the hidden states that texts give in the model as it is now.

    Args:
        model: The model.
        wanted: Sites; each is trained by itself.
        texts: What it learns from; every twentieth is held out.
        config: Settings for a site.
        padding, starts: See :func:`rows_of`.
        seed: Seed of start, order and padding.
        untrained: Random directions around the median instead, a negative control.
        run: Folder for hidden states, checkpoints and resume.

    Raises:
        InputError: Fewer than two texts.
        ResumeMismatch, RunError: The folder holds a run of other texts or settings.
    """
    if len(texts) < 2:
        raise InputError(
            f"{len(texts)} texts to train a sparse autoencoder on; at least 2 are needed, and thousands to learn from"
        )
    found = {}
    for site in wanted:
        own = config(site)
        source = {
            "model": model.state.key, "protocol": model.protocol_key, "site": site.layer, "padding": padding,
            "starts": starts, "seed": seed, "texts": _digest(texts),
        }  # fmt: skip
        asked = json.dumps([source, own.settings(), untrained], default=list)
        key, known = f"text autoencoder {asked}", sampling.SHARED.results
        folder = None if run is None else Path(run) / site.tower
        if key not in known:
            known[key] = _train(model, site, texts, own, source, untrained, folder)
        elif folder is not None and not untrained and not (folder / "autoencoder").exists():
            # Trained before without a folder: an edit may refer to the one that was asked for now.
            known[key].save(folder / "autoencoder")
        found[site.tower] = known[key]
    return found


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]


def _train(
    model: DiffusionModel,
    site: Site,
    texts: Sequence[str],
    config: SparseAutoencoderConfig,
    source: Mapping[str, Any],
    untrained: bool,
    folder: Path | None,
) -> SparseAutoencoder:
    held = list(texts[::HELD_OUT])
    own = [text for index, text in enumerate(texts) if index % HELD_OUT]

    def rows(listed: Sequence[str], purpose: str) -> Iterator[Tensor]:
        draw = noise_generator(int(source["seed"]), "padding rows", purpose)
        for part in recorded(model, [site], listed, batch=BATCH):
            yield rows_of(part[site.tower], source["padding"], bool(source["starts"]), draw)

    unseen = torch.cat(list(rows(held, "held out")))
    # Half precision: what is kept for the whole training is the largest thing here.  Hidden states of T5 do not fit it.
    dtype = torch.float16 if float(unseen.abs().max()) < LARGE else torch.float32
    unseen = unseen.to(dtype).float()
    with contextlib.ExitStack() as stack:
        # On disk either way: rows in memory are shuffled otherwise, and which units a concept has for itself hangs on
        # their order, so that an edit would depend on whether somebody named a folder.
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        learnt = ActivationCache.write(
            place / "hidden", rows(own, "training"), dtype=str(dtype).removeprefix("torch."),
            source=json.dumps(source, sort_keys=True),
        )  # fmt: skip
        seed, device = int(source["seed"]), str(unseen.device)
        if untrained:
            return random_start(learnt, config, seed, unseen)
        made = fit(learnt, config, seed=seed, run=folder, held_out=unseen, device=device)
    if folder is not None:
        made.save(folder / "autoencoder")
    return made


def random_start(
    activations: Any, config: SparseAutoencoderConfig, seed: int, held_out: Tensor
) -> SparseAutoencoder:
    """An autoencoder that learnt nothing but the median of the activations, with its quality table."""
    source, device = as_activations(activations), str(held_out.device)
    made = started(config, source, seed, device).eval().requires_grad_(False)
    made.quality = quality(made, held_out)
    return made


def rounded(autoencoder: SparseAutoencoder) -> SparseAutoencoder:
    """The autoencoder with encoder and atoms as an edit stores them, in half precision; a copy.

    Whatever is measured on it then holds for the edit that is read from a file.
    """
    made = SparseAutoencoder(autoencoder.config)
    made.load_state_dict({
        name: value.half().float() if name in ("encoder", "atoms") else value.clone()
        for name, value in autoencoder.tensors().items()
    })  # fmt: skip
    made.quality, made.trained = dict(autoencoder.quality), dict(autoencoder.trained)
    return made.to(autoencoder.bias.device).eval().requires_grad_(False)


def packed(autoencoder: SparseAutoencoder, prefix: str) -> dict[str, Tensor]:
    """The tensors of a :func:`rounded` autoencoder and its settings, for an edit."""
    text = json.dumps(autoencoder.config.settings(), default=list, sort_keys=True)
    found = {f"{prefix}settings": torch.tensor(list(text.encode()), dtype=torch.uint8)}
    for name, value in autoencoder.tensors().items():
        half = name in ("encoder", "atoms")
        found[f"{prefix}autoencoder.{name}"] = value.half() if half else value
    return found


def unpacked(tensors: Mapping[str, Tensor], prefix: str) -> SparseAutoencoder:
    """The autoencoder that an edit carries.

    Raises:
        EditFormatError: It carries none, or one that does not fit its settings.
    """
    head = f"{prefix}autoencoder."
    own = {n.removeprefix(head): t.float() for n, t in tensors.items() if n.startswith(head)}
    try:
        settings = json.loads(bytes(tensors[f"{prefix}settings"].tolist()))
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        made = SparseAutoencoder(SparseAutoencoderConfig.configured(**settings))
        made.load_state_dict(own)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, SettingError) as error:
        raise EditFormatError(
            f"the edit carries no autoencoder that fits its settings under {prefix!r} ({error})"
        ) from None
    return made.eval().requires_grad_(False)


def reference(autoencoder: SparseAutoencoder, prefix: str) -> dict[str, Tensor]:
    """What an edit holds in place of an autoencoder that stays in its folder: the digest of its tensors."""
    digest = bytes.fromhex(_named(autoencoder))
    return {f"{prefix}digest": torch.tensor(list(digest), dtype=torch.uint8)}


def _named(autoencoder: SparseAutoencoder) -> str:
    return tensors_digest({n: t.cpu().contiguous() for n, t in autoencoder.tensors().items()})


def loaded(
    folder: str | Path, site: Site, several: bool = False, wanted: Tensor | None = None
) -> SparseAutoencoder:
    """The autoencoder of a site from a folder.

    Args:
        folder: Folder of an autoencoder, or of one for each text encoder, by their names.
        site: Where it is used.
        several: There are several sites, so the folder must be of the second kind.
        wanted: What :func:`reference` said of it.

    Raises:
        EditFormatError: No autoencoder is there, it is damaged, or it is another one than the edit was made with.
        SettingError: It is of another layer or width.
    """
    place = Path(folder)
    if several or (place / site.tower).is_dir():
        place = place / site.tower
    made = SparseAutoencoder.load(place)
    if made.config.width != site.width or made.config.site not in ("", site.layer):
        raise SettingError(
            f"{place}: is an autoencoder of {made.config.site or 'a layer'} of width {made.config.width}; wanted is "
            f"one of {site.layer} of width {site.width}"
        )
    if wanted is not None and bytes(wanted.tolist()).hex() != _named(made):
        raise EditFormatError(
            f"{place}: holds another autoencoder than the edit was made with "
            f"({_named(made)[:12]}, wanted {bytes(wanted.tolist()).hex()[:12]})"
        )
    return made.eval().requires_grad_(False)
