"""`expunge measure` on small folders, as a person would call it."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import called
from expunge.core.protocols import Record
from expunge.world.adapter import world_pictures


def run(capsys, *arguments):
    """Exit status, standard output and standard error of one call of `expunge measure`."""
    return called(capsys, "measure", *arguments)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Six pictures of hearts, and six of moons under the same names, with their captions."""
    place = tmp_path_factory.mktemp("pictures")
    for name in ("heart", "moon"):
        found = world_pictures(name, 6)
        (place / name).mkdir()
        for index, picture in enumerate(found.pictures):
            Image.fromarray(picture).save(place / name / f"{index}.png")
        (place / f"{name}.txt").write_text("\n".join(found.captions) + "\n")
    rows = [
        {"file": f"{i}.png", "detections": [["BELLY_EXPOSED", 0.7, None]] * (i % 2)}
        for i in range(6)
    ]
    (place / "found.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return place


def records(file):
    return [Record.from_json(line) for line in file.read_text().splitlines()]


def test_distances_on_the_worlds_features(folders, tmp_path, capsys):
    asked = [
        word for name in ("frechet", "kid", "kid-subsets", "perceptual") for word in ("-M", name)
    ]
    out = tmp_path / "out.jsonl"
    options = (
        "--reference",
        folders / "moon",
        "--features",
        "world-oracle",
        "--cache",
        tmp_path / "cache",
        "-o",
        out,
    )
    status, shown, _ = run(capsys, folders / "heart", *asked, *options)
    assert status == 0 and "frechet" in shown
    found = {record.metric: record for record in records(out)}
    assert list(found) == ["frechet", "kid", "kid-subsets", "perceptual"]
    for record in found.values():
        assert record.measurement.n == 6 and "world-oracle@float16" in record.measurement.protocol
    assert found["frechet"].measurement.value > 1
    assert len(found["perceptual"].values) == 6
    # The cache is used: the same numbers come again, and a set is no distance from itself.
    again = tmp_path / "again.jsonl"
    run(capsys, folders / "heart", *asked, *options[:-1], again)
    assert again.read_text() == out.read_text()
    same = ("--reference", folders / "heart", "--features", "world-oracle", "-o", again)
    run(
        capsys,
        folders / "heart",
        "-M",
        "frechet",
        "-M",
        "layout",
        "-M",
        "ssim",
        "-M",
        "psnr",
        *same,
    )
    frechet, layout, ssim, psnr = records(again)
    assert ssim.measurement.value == pytest.approx(1) and psnr.measurement.value == 100
    assert frechet.measurement.value == pytest.approx(0, abs=1e-3)
    assert layout.measurement.value == pytest.approx(1)


def test_clip_scores_and_cmmd_with_the_worlds_clip(folders, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    options = (
        "--clip",
        "world",
        "--reference",
        folders / "moon",
        "--prompts",
        folders / "heart.txt",
        "-o",
        out,
    )
    asked = (
        "-M",
        "clip-score",
        "-M",
        "clip-score-cosine",
        "-M",
        "clip-score-2.5",
        "-M",
        "cmmd",
        "-M",
        "cmmd-unbiased",
    )
    status, _, _ = run(capsys, folders / "heart", *asked, *options)
    assert status == 0
    hundred, plain, clipped, cmmd, unbiased = (record.measurement for record in records(out))
    assert hundred.value == pytest.approx(100 * plain.value) and clipped.value == pytest.approx(
        2.5 * plain.value
    )
    assert 40 < hundred.value <= 100
    assert cmmd.value > unbiased.value > 0 and "world-clip-2" in cmmd.protocol
    assert records(out)[0].prompts == tuple((folders / "heart.txt").read_text().splitlines())
    # The same pictures with the other captions score lower.
    run(
        capsys,
        folders / "heart",
        "-M",
        "clip-score",
        *options[:4],
        "--prompts",
        folders / "moon.txt",
        "-o",
        out,
    )
    assert records(out)[0].measurement.value < hundred.value - 5


def test_nudity_protocols_of_stored_detections_come_with_their_second_figure(
    folders, tmp_path, capsys
):
    out = tmp_path / "out.jsonl"
    options = ("--detections", folders / "found.jsonl", "-o", out)
    status, shown, _ = run(
        capsys, folders / "heart", "-M", "nudenet/mace", "-M", "nudenet/trce", *options
    )
    assert status == 0 and "nudenet/mace, narrow" in shown
    values = [(record.measurement.protocol, record.measurement.value) for record in records(out)]
    assert values == [
        ("nudenet/mace", 3), ("nudenet/mace/parts=narrow", 0), ("nudenet/trce", 0.5), ("nudenet/trce/parts=narrow", 0),
    ]  # fmt: skip


def test_another_detector_is_named_in_the_id(folders, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    options = ("--detections", folders / "found.jsonl", "--detector", "v3.4.2", "-o", out)
    run(capsys, folders / "heart", "-M", "nudenet/mace", *options)
    assert records(out)[0].measurement.protocol == "nudenet/mace/detector=v3.4.2"


def test_the_installed_detector_is_asked_once_and_named_with_its_version(
    folders, tmp_path, capsys, monkeypatch
):
    seen = []

    class NudeDetector:
        def detect(self, picture):
            seen.append(picture.shape)
            return [{"class": "BUTTOCKS_EXPOSED", "score": 0.61, "box": [0, 0, 5, 5]}] * (
                len(seen) % 2
            )

    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nowhere)  # as a fork that lies on the path
    library = ModuleType("nudenet")
    library.NudeDetector = NudeDetector
    monkeypatch.setitem(sys.modules, "nudenet", library)
    out = tmp_path / "out.jsonl"
    asked = ("-M", "nudenet/mace", "-M", "nudenet/unlearndiffatk", "--detector", "nudenet")
    status, _, _ = run(capsys, folders / "heart", *asked, "-o", out)
    assert status == 0 and seen == [(64, 64, 3)] * 6
    made = {record.measurement.protocol: record.measurement.value for record in records(out)}
    assert (
        made["nudenet/mace/detector=v-unknown"]
        == made["nudenet/mace/detector=v-unknown/parts=narrow"]
        == 3
    )
    assert made["nudenet/unlearndiffatk/detector=v-unknown"] == 0.5
    monkeypatch.setitem(sys.modules, "nudenet", None)
    status, _, err = run(capsys, folders / "heart", *asked)
    assert status == 1 and "expunge[nsfw]" in err


@pytest.mark.extras
def test_the_real_detector_finds_nothing_in_the_worlds_pictures(folders, tmp_path, capsys):
    pytest.importorskip("nudenet", reason="extra nsfw")
    out = tmp_path / "out.jsonl"
    asked = ("-M", "nudenet/mace", "-M", "nudenet/trce", "--detector", "nudenet")
    status, _, _ = run(capsys, folders / "heart", *asked, "-o", out)
    version = importlib.metadata.version("nudenet")
    assert status == 0
    assert [(record.measurement.protocol, record.measurement.value) for record in records(out)] == [
        (f"nudenet/{rule}/detector=v{version}{parts}", 0)
        for rule in ("mace", "trce") for parts in ("", "/parts=narrow")
    ]  # fmt: skip


def test_prompts_are_the_units_of_a_kernel_distances_interval(folders, tmp_path, capsys):
    out, twice = tmp_path / "out.jsonl", tmp_path / "twice.txt"
    twice.write_text("a heart\n" * 3 + "a red heart\n" * 3)
    asked = (
        folders / "heart", "-M", "kid", "--reference", folders / "moon", "--features", "world-oracle", "-o", out,
    )  # fmt: skip
    assert run(capsys, *asked)[0] == 0
    (plain,) = (record.measurement for record in records(out))
    status, shown, _ = run(capsys, *asked, "--prompts", twice)
    (by_prompt,) = (record.measurement for record in records(out))
    assert status == 0 and " to " in shown
    assert (plain.n, by_prompt.n) == (6, 2) and plain.value == by_prompt.value
    for one in (plain, by_prompt):
        assert one.interval[0] < one.value < one.interval[1]
    assert plain.interval != by_prompt.interval


def test_the_papers_libraries_are_called_where_they_are(folders, tmp_path, capsys, monkeypatch):
    library = ModuleType("cleanfid.fid")
    library.compute_fid = lambda one, two, **options: 12.5
    monkeypatch.setitem(sys.modules, "cleanfid", ModuleType("cleanfid"))
    monkeypatch.setitem(sys.modules, "cleanfid.fid", library)
    lpips = ModuleType("lpips")

    class Net(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()

        def forward(self, a, b):
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    lpips.LPIPS = Net
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    out = tmp_path / "out.jsonl"
    asked = ("-M", "fid", "-M", "fid-to-original", "-M", "lpips-rece")
    status, _, _ = run(
        capsys, folders / "heart", *asked, "--reference", folders / "moon", "-o", out
    )
    assert status == 0
    fid, original, distance = (record.measurement for record in records(out))
    assert (fid.value, original.value) == (12.5, 12.5) and fid.protocol.startswith("fid/clean-fid/")
    assert "reference=moon" in original.protocol and original.protocol.startswith(
        "fid-to-original/"
    )
    assert distance.protocol == "lpips/alex-rece" and distance.value > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-M", "fred"), "kid"),
        (("-M", "fid/coco-10k", "--reference", "moon"), "no code of ours gives 'fid/coco-10k'"),
        (("-M", "fid/clean-fid", "--reference", "moon"), "'fid/clean-fid' is unknown"),
        (("-M", "frechet"), "needs --reference"),
        (("-M", "kid", "--reference", "moon"), "needs --features"),
        (("-M", "cmmd", "--reference", "moon"), "needs --clip"),
        (("-M", "clip-score", "--clip", "world"), "needs --prompts"),
        (("-M", "nudenet/mace"), "needs --detections"),
        (("-M", "nudenet/maze"), "mace"),
        (("-M", "layout", "--reference", "few"), "5.png"),
        (("-M", "kid", "--reference", "moon", "--features", "./nothing"), "./nothing"),
        (("-M", "clip-score", "--clip", "./nothing", "--prompts", "moon.txt"), "./nothing"),
        (("-M", "layout", "--reference", "nowhere"), "no folder"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_before_anything_is_measured(
    folders, capsys, monkeypatch, arguments, words
):
    monkeypatch.chdir(folders)
    (folders / "few").mkdir(exist_ok=True)
    for index in range(5):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folders / "few" / f"{index}.png")
    status, _, err = run(capsys, "heart", *arguments)
    assert status == 1 and words in err and "Traceback" not in err
