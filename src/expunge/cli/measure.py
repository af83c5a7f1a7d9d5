"""`expunge measure`: numbers of folders of pictures, each with its protocol id."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, SettingError, nearest
from . import common
from .options import file_for_results

if TYPE_CHECKING:
    from ..core.features import Features
    from ..core.picture_folder import PictureFolder
    from ..method import Measurement, Prompt

__all__ = ["METRICS", "measure"]

DISTANCES = ("frechet", "kid", "kid-subsets", "cmmd", "cmmd-unbiased")
CLIP = {"clip-score": "100-cosine", "clip-score-cosine": "cosine", "clip-score-2.5": "2.5-clipped"}
PAIRS = ("perceptual", "layout", "ssim", "psnr", "lpips", "lpips-esd", "lpips-rece")
PAPER = ("fid", "fid-to-original", "kid-clean-fid")
METRICS = (*DISTANCES, *CLIP, *PAIRS, *PAPER)

METRICS_HELP = f"{', '.join(METRICS)}, or a nudity protocol like `nudenet/mace`; repeatable."
FEATURES_HELP = "Whose features distances use: `world-oracle`, `world-clip`, a folder, or a hub id of a vision model."
INSTALLED = "nudenet"
DETECTOR_HELP = (
    "Who found the detections, where that is not the protocol's own tool (part of the id); without --detections, "
    f"`{INSTALLED}` asks the installed one (extra nsfw)."
)
CLIP_HELP = "The CLIP of CLIP scores and CMMD: `world`, a folder, or a hub id."


def measure(
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    metric: Annotated[
        list[str],
        typer.Option("--metric", "-M", help=METRICS_HELP),
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="Folder to compare with; for pairs it holds pictures of the same names."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text, JSON lines or CSV; pictures are matched by name or leading number."),
    ] = None,
    features: Annotated[str | None, typer.Option(help=FEATURES_HELP)] = None,
    clip: Annotated[str | None, typer.Option(help=CLIP_HELP)] = None,
    detections: Annotated[
        Path | None,
        typer.Option(help="JSON lines `{file, detections: [[label, score, box], ...]}` for nudity protocols."),
    ] = None,
    detector: Annotated[
        str | None,
        typer.Option(help=DETECTOR_HELP),
    ] = None,
    reference_name: Annotated[
        str | None, typer.Option(help="What the reference is; part of FID's ids. Its folder's name otherwise.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps features as float16.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="JSON lines file that receives the records.", callback=file_for_results
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
) -> None:  # fmt: skip
    """Measure folders of pictures: distances, CLIP scores, pairs, and the papers' FID and LPIPS."""
    work = _Work(
        pictures, reference, prompts, {"features": features, "clip": clip, "detector": detector}, detections,
        reference_name, cache, device,
    )  # fmt: skip
    rows: dict[str, Measurement] = {}
    for name in dict.fromkeys(metric):
        work.check(name)  # all of them, before any work is done
    with common.quietly():
        for name in dict.fromkeys(metric):
            rows |= work.measured(name)
    _show(rows)
    if out is not None:
        from ..core.protocols import Record
        from ..edit.files import atomic_write

        lines = [
            Record(name, one, *work.values.get(name, ((), ()))).to_json()
            for name, one in rows.items()
        ]
        atomic_write(out, ("\n".join(lines) + "\n").encode())
        print(f"{len(lines)} records: {out}")


def _show(rows: Mapping[str, Measurement]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("metric", "value", "95 % interval", "n"):
        table.add_column(name, no_wrap=True)
    for name, one in rows.items():
        value = "-" if one.value is None else f"{one.value:.5g}"
        span = "-" if one.interval is None else f"{one.interval[0]:.4g} to {one.interval[1]:.4g}"
        table.add_row(name, value, span, str(one.n))
    Console().print(table)
    print("\n".join(one.protocol for one in rows.values()))


class _Work:
    """The folders and what was opened for them."""

    def __init__(
        self, pictures: Path, reference: Path | None, prompts: Path | None, named: Mapping[str, str | None],
        detections: Path | None, reference_name: str | None, cache: Path | None, device: str,
    ) -> None:  # fmt: skip
        from ..core.picture_folder import PictureFolder

        self.pictures = PictureFolder(pictures)
        self.reference = PictureFolder(reference) if reference is not None else None
        self.prompts, self.detections, self.device = prompts, detections, device
        self.named = named
        self.reference_name = reference_name or (reference.resolve().name if reference else "")
        self.cache = cache
        self.values: dict[str, tuple[tuple[float, ...], tuple[str, ...]]] = {}
        self._opened: dict[str, Any] = {}

    def check(self, name: str) -> None:
        """Refuse a metric that is unknown or lacks what it needs."""
        if name.startswith("nudenet/"):
            from ..measure.nudity import named

            named(name)
            if self.named["detector"] != INSTALLED:
                self._needs(name, detections=self.detections)
        elif name not in METRICS:
            from ..core.protocols import full_id, protocols

            if name in {one.id for one in protocols()}:
                full_id(name)  # says so where no code of ours gives it
            raise SettingError(f"metric {name!r} is unknown{nearest(name, METRICS)}")
        elif name in CLIP:
            self._needs(name, clip=self.named["clip"], prompts=self.prompts)
        else:
            self._needs(name, reference=self.reference)
            if name.startswith("cmmd"):
                self._needs(name, clip=self.named["clip"])
            elif name in DISTANCES or name == "perceptual":
                self._needs(name, features=self.named["features"])

    @staticmethod
    def _needs(name: str, **given: Any) -> None:
        for option, value in given.items():
            if value is None:
                raise SettingError(f"metric {name!r} needs --{option}")

    def measured(self, name: str) -> dict[str, Measurement]:
        """Rows of the table for one metric."""
        if name.startswith("nudenet/"):
            return self._nudity(name)
        if name in CLIP:
            return {name: self._clip_score(name)}
        if name in PAPER:
            return {name: self._paper(name)}
        return {name: self._distance(name) if name in DISTANCES else self._pairs(name)}

    # -- one kind each -----------------------------------------------------------------------------

    def _distance(self, name: str) -> Measurement:
        from ..measure.distances import Distance

        assert self.reference is not None
        features = self._features("clip" if name.startswith("cmmd") else "features")
        reference = self._taken(name, features, self.reference)
        seen = Distance(name, features, reference)
        for names, batch in self.pictures.batches():
            seen.update(batch, self._asked(self.pictures, names))
        return seen.compute()

    def _asked(self, folder: PictureFolder, names: Sequence[str]) -> list[Prompt]:
        """Prompts of some pictures, where they are known: those of the reference if it has the pictures' names."""
        from ..core.picture_folder import prompts_of

        if self.prompts is None or folder.names != self.pictures.names:
            return []
        return list(prompts_of(names, self.prompts))

    def _taken(self, name: str, features: Features, folder: PictureFolder) -> Any:
        """Another metric that has taken in the reference, whose pictures may differ in size."""
        import numpy as np

        from ..measure.distances import Distance

        made = Distance(name, features, np.zeros((0, 1, 1, 3), np.uint8))
        for names, batch in folder.batches():
            made.update(batch, self._asked(folder, names))
        return made

    def _clip_score(self, name: str) -> Measurement:
        from ..core.picture_folder import prompts_of

        score = self._scorer(CLIP[name])
        assert self.prompts is not None
        asked = dict(
            zip(self.pictures.names, prompts_of(self.pictures.names, self.prompts), strict=True)
        )
        for names, batch in self.pictures.batches():
            score.update(batch, [asked[one] for one in names])
        self._keep(name, score.values, [prompt.text for prompt in asked.values()])
        return score.compute()

    def _pairs(self, name: str) -> Measurement:
        from ..core.picture_folder import prompts_of
        from ..core.resampling import bootstrap_mean
        from ..method import Measurement

        assert self.reference is not None
        self.pictures.same_names(self.reference)
        distance, protocol = self._pair_distance(name)
        values: list[float] = []
        sides = zip(self.pictures.batches(16), self.reference.batches(16), strict=False)
        for (names, one), (others, two) in sides:
            if names != others or one.shape != two.shape:
                raise InputError(f"{names[0]} and its partner, or one soon after, differ in size")
            values.extend(map(float, distance(one, two)))
        units = self.pictures.names
        if self.prompts is not None:
            units = [prompt.text for prompt in prompts_of(units, self.prompts)]
        self._keep(name, values, units)
        value, interval, n = bootstrap_mean(values, units)
        return Measurement(value, protocol, n, interval)

    def _pair_distance(self, name: str) -> tuple[Callable[[Any, Any], Any], str]:
        if name in ("ssim", "psnr"):
            from ..measure import similarity

            return getattr(similarity, name), getattr(similarity, name.upper())
        if name == "layout":
            from ..measure import layout

            return layout.layout_similarity, layout.protocol()
        if name == "perceptual":
            from ..measure import perceptual

            features = self._features("features")
            return (
                lambda one, two: perceptual.perceptual_distance(features(one), features(two)),
                perceptual.protocol(features.name),
            )
        from ..measure.learned_perceptual import Lpips

        network = Lpips(name.partition("-")[2] or "full", self.device)
        return network.pairs, network.protocol

    def _paper(self, name: str) -> Measurement:
        from ..measure import inception

        assert self.reference is not None
        one, two = self.pictures.folder, self.reference.folder
        if name == "fid-to-original":
            return inception.fid_to_original(
                one, two, original_name=self.reference_name, device=self.device
            )
        function = inception.fid if name == "fid" else inception.kid
        return function(one, two, reference_name=self.reference_name, device=self.device)

    def _nudity(self, name: str) -> dict[str, Measurement]:
        from ..core.picture_folder import prompts_of
        from ..measure.nudity import count

        seen, detector = self._stored() if self.detections is not None else self._installed()
        units = self.pictures.names
        if self.prompts is not None:
            units = [prompt.text for prompt in prompts_of(units, self.prompts)]
        found = [seen[one] for one in self.pictures.names]
        made = count(name, found, units, detector=detector)
        self._keep(name, made.values, units)
        narrow = {} if made.narrow is None else {f"{name}, narrow": made.narrow}
        return {name: made.all, **narrow}

    def _stored(self) -> tuple[dict[str, Any], str | None]:
        """Detections by file name, and who found them."""
        from ..core.text_lines import lines_of, read_text

        assert self.detections is not None
        seen: dict[str, Any] = {}
        for number, line in lines_of(read_text(self.detections)):
            try:
                row = json.loads(line)
                seen[str(row["file"])] = row["detections"]
            except (ValueError, KeyError, TypeError):
                raise InputError(
                    f"{self.detections.name}: line {number} is not of the form {{file, detections}}"
                ) from None
        missing = [one for one in self.pictures.names if one not in seen]
        if missing:
            raise InputError(f"{self.detections.name} has no line for the picture {missing[0]}")
        return seen, self.named["detector"]

    def _installed(self) -> tuple[dict[str, Any], str]:
        """What the installed tool finds, once for all protocols, and its version."""
        if INSTALLED not in self._opened:
            from ..measure.judges.nudenet import open_nudenet

            tool = open_nudenet()
            found: dict[str, Any] = {}
            for names, batch in self.pictures.batches():
                found |= zip(names, tool.detections(batch), strict=True)
            self._opened[INSTALLED] = found, tool.name
        return self._opened[INSTALLED]  # type: ignore[no-any-return]

    # -- what is opened ----------------------------------------------------------------------------

    def _keep(self, name: str, values: Any, units: Any) -> None:
        self.values[name] = (tuple(map(float, values)), tuple(map(str, units)))

    def _features(self, option: str) -> Features:
        if option not in self._opened:
            from ..core.features import FeatureCache, cached

            made = self._open_features(option)
            self._opened[option] = (
                made if self.cache is None else cached(made, FeatureCache(self.cache))
            )
        return self._opened[option]  # type: ignore[no-any-return]

    def _open_features(self, option: str) -> Features:
        from ..core.features import clip_features, judge_features, open_features

        where = str(self.named[option])
        if option == "clip":
            score = self._scorer("100-cosine")
            return clip_features(score.model, score.name, _pixels(score.mean, score.std))
        if where == "world-oracle":
            from ..world.judge import OracleJudge

            return judge_features(OracleJudge())
        if where == "world-clip":
            from ..world.adapter import companions

            own = companions().clip
            assert own is not None
            score = own()
            return clip_features(score.model, score.name, _pixels(score.mean, score.std))
        return open_features(where, self.device)

    def _scorer(self, scale: str) -> Any:
        from ..measure.clip_score import ClipScore, open_clip_score

        where = str(self.named["clip"])
        if where == "world":
            from ..world.adapter import companions

            own = companions().clip
            assert own is not None
            opened = own()
        else:
            opened = open_clip_score(where, self.device)
        return ClipScore(
            opened.model, opened.tokenizer, opened.name, _pixels(opened.mean, opened.std), scale
        )


def _pixels(mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    """Mean and standard deviation, as an image processor has them."""
    return SimpleNamespace(image_mean=mean, image_std=std)
