"""UnlearnCanvas: a grid of objects and styles, and what forgetting one of them does to the others (arXiv:2402.11846).

Pictures of every object in every style are drawn by a model that has forgotten one style (or object), and two
classifiers name style and object:

    UA   1 - accuracy on the pictures of the forgotten style
    IRA  mean accuracy on the other styles
    CRA  accuracy of the objects

Forgetting an object is the mirror image.  Published averages are over 50 models that forgot a style and 20 that
forgot an object.  Two details are settled here and part of the ids: CRA leaves the pictures of what was forgotten
out (the published script walks over all of them), and IRA of styles is over the painted styles, without photos.

Prompts and seeds are data, below.  :func:`canvas` draws and judges any such grid with any judge; a world has a
small one of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..concept import Concept
from ..core.protocols import full_id, same_protocol
from ..core.resampling import mean_rate, rate
from ..core.sampling import outputs
from ..core.vision import pixels
from ..errors import InputError, nearest
from ..method import Judge, Measurement, Prompt

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = [
    "CLASSES", "OBJECTS", "PHOTO", "PUBLISHED", "SEEDS", "STYLES", "Cell", "Rates", "average", "canvas", "classifier",
    "file_name", "grid", "rates", "read_folder", "read_name",
]  # fmt: skip

STYLES = tuple(
    "Abstractionism Artist_Sketch Blossom_Season Bricks Byzantine Cartoon Cold_Warm Color_Fantasy Comic_Etch Crayon "
    "Cubism Dadaism Dapple Defoliation Early_Autumn Expressionism Fauvism French Glowing_Sunset Gorgeous_Love "
    "Greenfield Impressionism Ink_Art Joy Liquid_Dreams Magic_Cube Meta_Physics Meteor_Shower Monet Mosaic Neon_Lines "
    "On_Fire Pastel Pencil_Drawing Picasso Pop_Art Red_Blue_Ink Rust Sketch Sponge_Dabbed Structuralism Superstring "
    "Surrealism Ukiyoe Van_Gogh Vibrant_Flow Warm_Love Warm_Smear Watercolor Winter".split()
)
"""The 50 painted styles that are used, of 60 in the data."""

PHOTO = "Seed_Images"
"""The photographs the paintings were made from: the 51st style of the grid and of the classifier."""

CLASSES = tuple(sorted((*STYLES, PHOTO)))
"""The 51 outputs of the published style classifier, in its order."""

OBJECTS = tuple(
    "Architectures Bears Birds Butterfly Cats Dogs Fishes Flame Flowers Frogs Horses Human Jellyfish Rabbits "
    "Sandwiches Sea Statues Towers Trees Waterfalls".split()
)

SEEDS = (188, 288, 588, 688, 888)
TEMPLATE = "A {object} image in {style} style."
STEPS, GUIDANCE, SAMPLER = 100, 9.0, "DDIM"

PUBLISHED: Mapping[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "ESD": ((98.58, 80.97, 93.96), (92.15, 55.78, 44.23)),
    "FMN": ((88.48, 56.77, 46.60), (45.64, 90.63, 73.46)),
    "UCE": ((98.40, 60.22, 47.71), (94.31, 39.35, 34.67)),
    "CA": ((60.82, 96.01, 92.70), (46.67, 90.11, 81.97)),
    "SalUn": ((86.26, 90.39, 95.08), (86.91, 96.35, 99.59)),
    "SEOT": ((56.90, 94.68, 84.31), (23.25, 95.57, 82.71)),
    "SPM": ((60.94, 92.39, 84.33), (71.25, 90.79, 81.65)),
    "EDiff": ((92.42, 73.91, 98.93), (86.67, 94.03, 48.48)),
    "SHS": ((95.84, 80.42, 43.27), (80.73, 81.15, 67.99)),
}
"""Method -> (UA, IRA, CRA) in percent for styles and for objects, as widely re-printed; for orientation only."""

_NAME = re.compile(r"(?P<style>.+)_(?P<object>[^_]+)_seed(?P<seed>\d+)\.(?:jpg|jpeg|png)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One picture of the grid.

    Attributes:
        style, object: What it was asked to show.
        seed: Of its noise.
        seen_style, seen_object: What the classifiers name; ``None`` where nothing is recognised, counted as wrong.
        confidence: The lower of the two best scores, where the judge gives scores.
    """

    style: str
    object: str
    seed: int = 0
    seen_style: str | None = None
    seen_object: str | None = None
    confidence: float | None = None


@dataclasses.dataclass(frozen=True)
class Rates:
    """The three numbers of one model, and what says whether they mean anything.

    Attributes:
        ua, ira, cra: Shares from 0 to 1.
        unrecognisable: Share of pictures that nobody recognises.
        confidence: Mean confidence of the judge, where it gives one: a classifier names something in a broken picture
            too, but is not sure of it.
    """

    ua: Measurement
    ira: Measurement | None
    cra: Measurement | None
    unrecognisable: float
    confidence: float | None = None


def grid(
    styles: Sequence[str] = (*STYLES, PHOTO),
    objects: Sequence[str] = OBJECTS,
    seeds: Sequence[int] = SEEDS,
    template: str = TEMPLATE,
) -> list[tuple[Cell, Prompt]]:
    """Every cell with its prompt; ``_`` in a name is a space in the prompt, as in the published script."""
    if not styles or not objects or not seeds:
        raise InputError("a grid needs at least one style, one object and one seed")
    for slot in ("{style}", "{object}"):
        if slot not in template:
            raise InputError(f"the template {template!r} has no {slot}")

    def text(style: str, thing: str) -> str:
        words = template.replace("{style}", style.replace("_", " "))
        return words.replace("{object}", thing.replace("_", " "))

    return [
        (Cell(style, thing, seed), Prompt(text(style, thing), seed, labels={"style": style, "object": thing}))
        for seed in seeds
        for style in styles
        for thing in objects
    ]  # fmt: skip


def file_name(cell: Cell) -> str:
    """``{style}_{object}_seed{seed}.jpg``."""
    return f"{cell.style}_{cell.object}_seed{cell.seed}.jpg"


def read_name(name: str) -> Cell:
    """Style, object and seed of a file; styles may hold ``_`` themselves, objects do not.

    Raises:
        InputError: The name is not of that form.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise InputError(f"{name!r} is not of the form STYLE_OBJECT_seedNUMBER.jpg")
    return Cell(found["style"], found["object"], int(found["seed"]))


Classifier = Callable[[np.ndarray], Sequence[str | None]]


def classifier(
    network: Callable[[Any], Any],
    names: Sequence[str],
    *,
    size: int = 224,
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    device: str = "cpu",
) -> Classifier:
    """What an image classifier names, with the published preprocessing as the default.

    Args:
        network: Normalised pixels ``(n, 3, size, size)`` -> logits ``(n, names)``, or an output record that holds them.
        names: Of its classes, in the order of its outputs: :data:`CLASSES` or :data:`OBJECTS` for the published ones.
        size, mean, std: What it was trained on; pictures are squeezed to a square, bilinear with antialiasing.
        device: Where it is.

    Raises:
        InputError: When it is asked, if it has another number of classes.
    """

    def name(pictures: np.ndarray) -> list[str | None]:
        """The class of the largest logit of each picture."""
        import torch

        with torch.no_grad():
            read = pixels(pictures, size, mean, std, squeeze=True, resize="bilinear").to(device)
            made = network(read)
        logits = getattr(made, "logits", made)
        if tuple(logits.shape) != (len(pictures), len(names)):
            raise InputError(
                f"the classifier gives {tuple(logits.shape)} for {len(pictures)} pictures and {len(names)} names"
            )
        return [names[int(best)] for best in logits.argmax(1)]

    return name


def read_folder(
    folder: str | os.PathLike[str],
    style_of: Classifier,
    object_of: Classifier,
    *,
    styles: Sequence[str] = (*STYLES, PHOTO),
    objects: Sequence[str] = OBJECTS,
    seeds: Sequence[int] = SEEDS,
    partial: bool = False,
) -> list[Cell]:
    """Classify a folder of pictures named as above, one picture at a time.

    Args:
        folder: Holds one file a cell; other files are refused by name.
        style_of, object_of: uint8 pictures ``(n, h, w, 3)`` -> the name each shows, or ``None``.
        styles, objects, seeds: The whole grid.
        partial: Allow that pictures of the grid are missing, as in a sub-sample.

    Raises:
        InputError: A file that is of no cell, or (unless ``partial``) cells without a file: both are counted and one
            is named.
    """
    from PIL import Image

    wanted = {(s, o, seed) for s in styles for o in objects for seed in seeds}
    files: dict[tuple[str, str, int], Path] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        cell = read_name(path.name)
        key = (cell.style, cell.object, cell.seed)
        if key not in wanted:
            raise InputError(f"{path.name} is of no cell of the grid{nearest(cell.style, styles)}")
        if key in files:
            raise InputError(f"{path.name} and {files[key].name} are of the same cell")
        files[key] = path
    missing = sorted(wanted - files.keys())
    if not files or (missing and not partial):
        first = file_name(Cell(*missing[0]))
        raise InputError(
            f"{len(missing)} of {len(wanted)} pictures are missing, {first} among them"
        )
    cells = []
    for (style, thing, seed), path in files.items():
        with Image.open(path) as opened:
            picture = np.asarray(opened.convert("RGB"))[None]
        cells.append(Cell(style, thing, seed, style_of(picture)[0], object_of(picture)[0]))
    return cells


def rates(
    cells: Sequence[Cell],
    forgotten: str,
    kind: str = "style",
    *,
    cross_with_forgotten: bool = False,
    photo: str | None = PHOTO,
    judge: str = "vit-l-16",
) -> Rates:
    """UA, IRA and CRA of a model that has forgotten one style or object.

    Args:
        cells: All pictures, judged.
        forgotten: The style or object.
        kind: ``style`` or ``object``.
        cross_with_forgotten: Count pictures of what was forgotten in CRA too, as the published script does.
        photo: The style that is left out of the IRA of styles, where it occurs.
        judge: Who named style and object; part of the ids.

    Raises:
        InputError: Another kind, or no picture was asked to show ``forgotten``.
    """
    if kind not in ("style", "object"):
        raise InputError(f"kind is {kind!r}; allowed is 'style' or 'object'")
    other = "object" if kind == "style" else "style"
    mine = [cell for cell in cells if getattr(cell, kind) == forgotten]
    if not mine:
        known = {getattr(cell, kind) for cell in cells}
        raise InputError(f"no picture was asked to show {forgotten!r}, so UA cannot be measured"
                         f"{nearest(forgotten, known)}")  # fmt: skip
    rest = [cell for cell in cells if getattr(cell, kind) != forgotten]
    names = dict.fromkeys(getattr(cell, kind) for cell in rest)
    if kind == "style":
        names.pop(photo, None)
    common = {"of": kind, "judge": judge}

    def right(part: Sequence[Cell], what: str) -> np.ndarray:
        return np.array([getattr(c, what) == getattr(c, f"seen_{what}") for c in part], bool)

    value, interval, n = rate(~right(mine, kind), _units(mine))
    ua = Measurement(value, full_id("unlearncanvas/ua", **common), n, interval)
    ira = cra = None
    if names:
        parts = [[cell for cell in rest if getattr(cell, kind) == name] for name in names]
        value, interval, n = mean_rate([(right(part, kind), _units(part)) for part in parts])
        ira = Measurement(value, full_id("unlearncanvas/ira", **common), n, interval)
    crossed = list(cells) if cross_with_forgotten else rest
    if crossed:
        value, interval, n = rate(right(crossed, other), _units(crossed))
        scope = "all" if cross_with_forgotten else "others"
        cra = Measurement(value, full_id("unlearncanvas/cra", **common, over=scope), n, interval)
    lost = np.mean([cell.seen_style is None or cell.seen_object is None for cell in cells])
    sure = [cell.confidence for cell in cells if cell.confidence is not None]
    return Rates(ua, ira, cra, float(lost), float(np.mean(sure)) if sure else None)


def average(models: Sequence[Rates]) -> Rates:
    """Means over models that have each forgotten something else, each weighing the same, as tables print them.

    The intervals are those of a mean over models that vary; ``n`` is their number.

    Raises:
        ProtocolError: The models were measured differently.
        InputError: There is no model.
    """
    if not models:
        raise InputError("an average needs at least one model")

    def mean(name: str) -> Measurement | None:
        found = [one for one in (getattr(model, name) for model in models) if one is not None]
        if len(found) != len(models):
            return None
        id = same_protocol(found)
        values = np.array([one.value for one in found], float)
        half = 1.96 * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None
        centre = float(values.mean())
        interval = None if half is None else (centre - float(half), centre + float(half))
        return Measurement(centre, f"{id}/mean-over=models", len(found), interval)

    ua = mean("ua")
    assert ua is not None
    lost = float(np.mean([model.unrecognisable for model in models]))
    sure = [model.confidence for model in models if model.confidence is not None]
    return Rates(ua, mean("ira"), mean("cra"), lost, float(np.mean(sure)) if sure else None)


def canvas(
    model: Model,
    cells: Sequence[tuple[Cell, Prompt]],
    judge: Judge,
    *,
    batch: int = 64,
    cache: Any = None,
    **options: Any,
) -> list[Cell]:
    """Draw a grid and let a judge name style and object of each picture.

    The judge scores every style and every object of the grid; the highest score names the picture.  What the judge
    does not recognise shows nothing.

    Args:
        model: The model, with its edits on.
        cells: What :func:`grid` made, or a world's own.
        judge: Knows all styles and objects of the grid.
        batch: Pictures at a time.
        cache: Pictures made before (:class:`~expunge.core.sampling.OutputCache`).
        options: Of ``model.generate``.
    """
    if not cells:
        raise InputError("the grid has no cell")
    styles = [Concept(name, kind="style") for name in dict.fromkeys(c.style for c, _ in cells)]
    things = [Concept(name) for name in dict.fromkeys(c.object for c, _ in cells)]
    judged = []
    for start in range(0, len(cells), batch):
        part = cells[start : start + batch]
        prompts = [prompt for _, prompt in part]
        made = outputs(model, prompts, batch=batch, cache=cache, **options)
        style = _best(judge, made, styles, prompts)
        thing = _best(judge, made, things, prompts)
        for (cell, _), (s, one), (t, two) in zip(part, style, thing, strict=True):
            judged.append(
                dataclasses.replace(cell, seen_style=s, seen_object=t, confidence=min(one, two))
            )
    return judged


def _best(
    judge: Judge, made: Any, concepts: Sequence[Concept], prompts: Sequence[Prompt]
) -> list[tuple[str | None, float]]:
    """The best concept of each picture, ``None`` where it is not recognised, and its score."""
    verdicts = [judge.judge(made, concept, prompts) for concept in concepts]
    scores = np.stack([verdict.score for verdict in verdicts])
    fine = np.stack([verdict.recognisable for verdict in verdicts]).min(0)
    best = scores.argmax(0)
    return [
        (concepts[b].name if ok else None, float(scores[b, place]))
        for place, (b, ok) in enumerate(zip(best, fine, strict=True))
    ]


def _units(cells: Sequence[Cell]) -> list[str]:
    """The prompt of each picture: seeds of a prompt are correlated."""
    return [f"{cell.style}\n{cell.object}" for cell in cells]
