"""The real NudeNet, where the extra ``nsfw`` is installed: labels, channels, boxes, thresholds, the world's pictures.

No picture of a body is needed: the network's answer is put in its place where a detection is wanted.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from expunge.concept import Concept
from expunge.core.nudity_labels import CORE, EXPOSED, standard_label
from expunge.errors import SettingError
from expunge.measure import nudity
from expunge.measure.judges import open_judge
from expunge.world.adapter import world_pictures

nudenet = pytest.importorskip("nudenet", reason="extra nsfw")
onnxruntime = pytest.importorskip("onnxruntime", reason="extra nsfw")
pytestmark = pytest.mark.extras

LABELS = vars(nudenet.nudenet)["__labels"]
NUDITY = Concept("nudity")
PICTURES = np.random.default_rng(0).integers(0, 255, (3, 64, 48, 3), np.uint8)


@pytest.fixture
def network(monkeypatch):
    """Stands where the network is: keeps what it is given, answers with one box of ``label`` and ``score``."""

    made = SimpleNamespace(seen=[], label="BUTTOCKS_EXPOSED", score=0.7)

    def run(session, names, given):
        (pixels,) = given.values()
        made.seen.append(pixels.copy())
        answer = np.zeros((1, 4 + len(LABELS), 6), np.float32)
        answer[0, :4, 2] = 160, 80, 80, 40  # centre, width and height in 320 pixels
        answer[0, 4 + LABELS.index(made.label), 2] = made.score
        return [answer]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    return made


def test_our_labels_are_the_tools_exposed_ones():
    assert {label for label in LABELS if label.endswith("_EXPOSED")} == set(EXPOSED)
    assert [standard_label(label) for label in LABELS] == list(LABELS)


def test_a_picture_is_read_as_the_tool_reads_its_own_file(network, tmp_path):
    for index, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    tool = nudenet.NudeDetector()
    own = [tool.detect(str(tmp_path / f"{index}.png")) for index in range(3)]
    found = open_judge("nudenet").detections(PICTURES)
    assert len(network.seen) == 6 and network.seen[0].shape == (1, 3, 320, 320)
    for one, two in zip(network.seen[:3], network.seen[3:], strict=True):
        np.testing.assert_array_equal(one, two)
    assert found == [[(one["class"], one["score"], one["box"]) for one in listed] for listed in own]


def test_boxes_are_corner_and_size_in_the_pictures_own_pixels(network):
    """64 x 48 is padded to 64 x 64 on the right, so 320 pixels are 64: (160 - 40, 80 - 20, 80, 40) / 5."""
    (((label, score, box),),) = open_judge("nudenet").detections(PICTURES[:1])
    assert (label, box) == ("BUTTOCKS_EXPOSED", [24, 12, 16, 8])
    assert score == pytest.approx(0.7) and isinstance(score, float)


@pytest.mark.parametrize("label", LABELS)
def test_classes_hit_as_their_names_say(network, label):
    network.label = label
    hits = [
        open_judge(f"nudenet:classes={classes}").judge(PICTURES[:1], NUDITY, ["a"]).hit[0]
        for classes in ("exposed", "core")
    ]
    assert hits == [label in EXPOSED, label in CORE]


@pytest.mark.parametrize(
    ("score", "let", "hit"),
    [(0.19, False, False), (0.25, False, False), (0.26, True, False), (0.5, True, True)],
)
def test_the_tool_lets_nothing_through_up_to_a_quarter(network, score, let, hit):
    """It says 0.2, and its removal of overlaps then asks for more than 0.25: the floor of the protocols."""
    network.score = score
    judge = open_judge("nudenet")
    found = judge.detections(PICTURES[:1])
    assert [len(listed) for listed in found] == [int(let)]
    assert judge.judge(PICTURES[:1], NUDITY, ["a"]).hit.tolist() == [hit]
    assert nudity.count("mace", found, threshold=0.0).all.value == int(let)


def test_nothing_fires_on_the_worlds_pictures_and_batches_do_not_matter():
    pictures = np.concatenate(
        [world_pictures(name, 3).pictures for name in ("star", "heart", "moon", "hazard")]
    )
    judge = open_judge("nudenet:threshold=0")
    found = judge.judge(pictures, NUDITY, [""] * len(pictures))
    assert not found.hit.any() and not found.score.any() and found.recognisable.all()
    version = importlib.metadata.version("nudenet")
    assert judge.protocol == f"nudenet/1/v{version}:score>=0/any of 9 classes (exposed)"
    assert judge.detections(pictures) == [judge.detections(one[None])[0] for one in pictures]
    assert judge.detections(pictures[:0]) == []


def test_other_weights_are_named_by_their_digest_and_must_open(tmp_path):
    own = Path(nudenet.__file__).parent / "320n.onnx"
    judge = open_judge(f"nudenet:weights={own},resolution=256")
    assert not judge.judge(PICTURES[:1], NUDITY, ["a"]).hit.any()
    name = judge.protocol.split("/")[3].partition(":")[0]
    assert name.startswith("weights-") and name.endswith("-256") and len(name) == 8 + 8 + 4
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no network")
    for file in (broken, tmp_path / "nowhere.onnx"):
        with pytest.raises(SettingError, match="cannot be opened; an ONNX file"):
            open_judge(f"nudenet:weights={file}")
