"""A model on a table of prompts: rates over all of it and by label; and the command that does so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from command_line import called as run
from expunge.concept import Concept
from expunge.core.prompt_scores import score_table
from expunge.errors import PromptError
from expunge.measure import judges
from expunge.measure.benchmarks import open_table
from expunge.method import Judge, Verdicts
from expunge.testing import tiny_diffusion

from .twins import CELEBRITIES, I2P, IMAGENETTE, write


class Reads(Judge):
    """Sees what the prompt names, but never a ring, and not on odd seeds; heart pictures are of no known kind."""

    id, protocol, threshold = "reads", "reads/1", 0.5

    def judge(self, outputs, concept, prompts):
        hit = np.array(
            [concept.name in p.text.lower() and concept.name != "ring" for p in prompts], bool
        )
        return Verdicts(hit, hit * 0.75, np.array([concept.name != "heart" for _ in prompts]))


class Paints:
    """Draws a picture of its seed, and remembers the guidance it was asked for."""

    family, name, controls = "diffusion", "paints", ()

    def __init__(self):
        self.asked = []

    def needs(self, *_):
        pass

    def generate(self, prompts, *, seeds, **options):
        self.asked += [(p.text, p.guided(1.0), s) for p, s in zip(prompts, seeds, strict=True)]
        return np.stack([np.full((2, 2, 3), s % 250, np.uint8) for s in seeds])


def test_each_prompt_is_judged_for_its_own_concept(tmp_path):
    kind = open_table("imagenette")
    table = kind.load(write(tmp_path / "t.csv", IMAGENETTE))
    done = []
    found = score_table(
        Paints(),
        table,
        Reads(),
        kind,
        seeds=2,
        batch=3,
        cache=None,
        progress=lambda *at: done.append(at),
    )
    assert found.rate.value == 6 / 8 and found.rate.n == 3  # three texts
    assert found.unrecognisable.value == 2 / 8
    assert {k: v.value for k, v in found.groups["class"].items()} == {
        "star": 1.0,
        "heart": 1.0,
        "ring": 0.0,
    }
    assert [row["concept"] for row in found.rows[::2]] == ["star", "star", "heart", "ring"]
    assert (
        done[-1] == (8, 8)
        and table.protocol in found.rate.protocol
        and "reads/1" in found.rate.protocol
    )
    json.dumps(found.to_dict())


def test_all_prompts_for_one_concept_with_their_own_guidance(tmp_path):
    kind = open_table("i2p")
    table = kind.load(write(tmp_path / "t.csv", I2P))
    model = Paints()
    found = score_table(model, table, Reads(), kind, Concept("hazard", kind="unsafe"), cache=None)
    assert found.rate.value == 1 / 4
    assert {v: m.value for v, m in found.groups["categories"].items()} == {
        "violence": 1.0, "self-harm": 1.0, "shocking": 0.0, "sexual": 0.0, "hate": 0.0,
    }  # fmt: skip
    assert found.groups["hard"]["True"].value == 0.5 and "place" not in found.groups
    assert [guidance for _, guidance, _ in model.asked] == [4.0, 4.5, 5.0, 5.5]
    assert found.summary["probability"].value == 0.25 and set(found.summary) == {"probability"}
    assert found.summary["probability"].protocol == "i2p/probability/judges=reads/1"
    with pytest.raises(PromptError, match="names no concept of its own"):
        score_table(model, table, Reads(), kind, cache=None)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "tiny"
    tiny_diffusion().pipeline.save_pretrained(place)
    return place


@pytest.fixture
def reads():
    judges.register("reads", lambda model: Reads())
    yield "reads"
    judges._registered.clear()


def test_the_command_lists_and_checks(capsys, tmp_path):
    status, out, _ = run(capsys, "benchmark", "list")
    assert status == 0 and "i2p" in out and "AIML-TUDA/i2p" in out
    file = write(tmp_path / "i2p.csv", I2P)
    status, out, err = run(capsys, "benchmark", "i2p:category=sexual", "--file", file, "--show", 1)
    assert status == 0, err
    assert (
        "5 rows are of the schema i2p, 2 prompts chosen" in out and "published file has 4703" in out
    )
    assert "seed 4261553413: a red star" in out and "2 prompts with a guidance" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("i3p",), "did you mean 'i2p'"),
        (("coco",), "no file was given"),
        (("coco", "--file", "none.csv"), "cannot be read"),
        (("t2isafety",), "no file was given"),
    ],
)
def test_mistakes_are_one_sentence(capsys, arguments, words):
    status, _, err = run(capsys, "benchmark", *arguments)
    assert status == 1 and words in err and "Traceback" not in err


def test_the_command_runs_a_model_with_a_judge(capsys, folder, reads, tmp_path):
    file = write(tmp_path / "c.csv", CELEBRITIES)
    out = tmp_path / "out"
    run_it = (
        "benchmark",
        "celebrities:side=kept",
        "-f",
        file,
        "-m",
        folder,
        "--judge",
        reads,
        "--steps",
        2,
        "-o",
        out,
    )
    status, text, err = run(capsys, *run_it)
    assert status == 0, err
    assert "judge reads/1" in text and "shown: 100.0 %" in text and "3 prompts" in text
    record = json.loads((out / "benchmark.json").read_text())
    assert record["rate"]["value"] == 1.0 and len(record["rows"]) == 3 and record["edits"] == []
    status, _, err = run(capsys, "benchmark", "celebrities", "-f", file, "-m", folder)
    assert status == 1 and "has no judge of its own; name one with --judge" in err
    status, _, err = run(
        capsys, "benchmark", "celebrities", "-f", file, "-m", folder, "--judge", "reeds"
    )
    assert status == 1 and "did you mean 'reads'" in err


def test_an_audit_takes_a_judge_by_its_id(capsys, folder, reads, tmp_path):
    asked = (
        "audit",
        "-m",
        folder,
        "-c",
        "star",
        "--judge",
        reads,
        "--attacks",
        "none",
        "--n",
        2,
        "-o",
        tmp_path / "a",
    )
    status, _, err = run(capsys, *asked)
    assert status == 0, err
    evidence = json.loads((tmp_path / "a" / "evidence.json").read_text())
    assert evidence["judge"] == "reads/1" and evidence["calibration"] is None
    assert "not calibrated" in evidence["reasons"]["calibration"]
