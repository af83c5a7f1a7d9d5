"""The command line, driven as a person would: quick listings, one-sentence errors, a whole erase on a tiny model."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from expunge import cli
from expunge.testing import tiny_diffusion


def run(capsys, *arguments):
    """Exit status, standard output and standard error of one call."""
    old, sys.argv = sys.argv, ["expunge", *map(str, arguments)]
    status = 0
    try:
        cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = old
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model") / "tiny"
    tiny_diffusion().pipeline.save_pretrained(place)
    return place


def test_methods_as_json_lists_every_system_once(capsys):
    status, out, _ = run(capsys, "methods", "--json")
    rows = json.loads(out)
    assert status == 0
    assert sorted(row["number"] for row in rows if row["number"]) == list(range(1, 65))
    assert {"id", "title", "verb", "family", "paper", "number", "status", "tags"} <= set(rows[0])
    assert {row["status"] for row in rows} <= {"works", "planned"}


def test_methods_filters_and_shows_one(capsys):
    _, out, _ = run(capsys, "methods", "--verb", "attack", "--json")
    assert {row["verb"] for row in json.loads(out)} == {"attack"}
    status, out, _ = run(capsys, "methods", "esd")
    assert status == 0
    assert "esd-x" in out and "--preset paper:object" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("methods", "recee"), "rece"),
        (("methods", "--verb", "erasing"), "erase"),
        (("erase", "--model", "world"), "--out"),
        (("frobnicate",), "frobnicate"),
        (("generate", "-m", "./missing", "-p", "x", "-o", "o"), "not a folder"),
        (("inspect", "missing.safetensors"), "regular file"),
    ],
)
def test_mistakes_are_one_sentence_and_no_traceback(capsys, arguments, words):
    status, _, err = run(capsys, *arguments)
    assert status in (1, 2)
    assert words in err
    assert "Traceback" not in err


def test_concept_mistakes_name_file_entry_and_key(capsys, folder, tmp_path):
    bad = tmp_path / "concepts.yaml"
    for text, words in (
        ("- nme: star", "did you mean 'name'"),
        ("- name: ''", "empty"),
        ("- name: star\n  anchor: Star", "the concept itself"),
        ("- name: star\n  kind: objekt", "did you mean 'object'"),
        ("{", "not valid YAML"),
        ("[]", "no concept"),
    ):
        bad.write_text(text)
        status, _, err = run(
            capsys, "erase", "-m", folder, "--concept-file", bad, "--method", "uce", "-o", tmp_path
        )
        assert status == 1
        assert "concepts.yaml" in err and words in err


def test_erase_inspect_export_generate_on_a_saved_pipeline(capsys, folder, tmp_path):
    out = tmp_path / "out"
    erase = (
        "erase",
        "-m",
        folder,
        "-c",
        "star",
        "--anchor",
        "circle",
        "--method",
        "uce",
        "-o",
        out,
    )
    status, text, err = run(capsys, *erase)
    assert (status, err) == (0, ""), err
    assert "erased star with uce" in text
    manifest = json.loads((out / "edit.json").read_text())
    assert manifest["method"] == "uce" and manifest["concepts"][0]["name"] == "star"
    assert manifest["preset"] == "paper:object"  # the kind's, since none was asked for
    file = out / "edit.safetensors"
    status, text, _ = run(capsys, "inspect", file)
    assert status == 0 and "uce version" in text
    status, text, _ = run(capsys, "export", file, "-m", folder, "-o", tmp_path / "lora.safetensors")
    assert status == 0 and (tmp_path / "lora.safetensors").is_file()
    status, text, _ = run(
        capsys,
        "generate",
        "-m",
        folder,
        "-p",
        "a star",
        "-e",
        file,
        "-o",
        tmp_path / "g",
        "--steps",
        2,
        "--seeds",
        2,
    )
    assert status == 0
    pictures = sorted((tmp_path / "g").glob("*.png"))
    assert len(pictures) == 2 and Image.open(pictures[0]).size == (16, 16)


def test_device_and_precision_are_asked_for_or_refused(capsys, folder, tmp_path, monkeypatch):
    from expunge.models import diffusion

    seen, picture = [], np.zeros((1, 16, 16, 3), np.uint8)
    monkeypatch.setattr(
        diffusion.DiffusionModel,
        "generate",
        lambda self, *_, **__: seen.append((self.device.type, self.dtype)) or picture,
    )
    ask = ("generate", "-m", folder, "-p", "a star", "-o", tmp_path / "out")
    assert run(capsys, *ask, "--dtype", "bfloat16", "--device", "cpu")[0] == 0
    assert run(capsys, *ask)[0] == 0
    assert seen == [("cpu", torch.bfloat16), ("cpu", torch.float32)]
    for wrong, words in (("--dtype", "float32, float16, bfloat16"), ("--device", "this machine")):
        status, _, err = run(capsys, *ask, wrong, "odd")
        assert status == 1 and words in err


def test_unknown_settings_and_presets_are_refused_with_the_nearest(capsys, folder, tmp_path):
    common = ("erase", "-m", folder, "-c", "star", "-o", tmp_path)
    assert "did you mean 'ridge'" in run(capsys, *common, "--method", "uce", "--set", "rigde=1")[2]
    assert "key=value" in run(capsys, *common, "--method", "uce", "--set", "ridge")[2]
    assert "preset 'papr" in run(capsys, *common, "--method", "uce", "--preset", "papr")[2]
    assert "verb attack" in run(capsys, *common, "--method", "unlearndiffatk")[2]


def test_the_kind_of_the_concepts_selects_the_preset():
    """Only where no preset is asked for and no world has one; several kinds take the defaults."""
    from types import SimpleNamespace

    from expunge import Concept
    from expunge.cli.common import configured

    plain, world = SimpleNamespace(companions=None), SimpleNamespace(companions=object())
    one = {kind: (Concept("thing", kind=kind),) for kind in ("unsafe", "object", "style", "mark")}

    def made(id, concepts, preset=None, model=plain, settings=None):
        return configured(id, "erase", model, preset, settings, concepts)

    layers = {kind: made("esd", concepts).layers for kind, concepts in one.items()}
    assert layers == {"unsafe": "esd-u", "object": "esd-u", "style": "esd-x", "mark": "esd-x"}
    assert made("rece", one["unsafe"]).epochs == 3 and made("rece", one["object"]).epochs == 1
    two = (Concept("knife", kind="unsafe"), Concept("gun", kind="unsafe"))
    mixed = (Concept("knife", kind="unsafe"), Concept("star"))
    assert made("rece", two).epochs == 3
    assert made("rece", mixed) == made("rece", ()) == made("rece", one["unsafe"], "paper")
    assert made("rece", one["unsafe"], "paper:style").epochs == 1
    assert made("rece", one["unsafe"], settings=["epochs=7"]).epochs == 7
    assert made("rece", one["unsafe"], model=world) == made("rece", (), "world")
    assert made("uce", one["style"], model=plain).guide == "art"


def test_prompt_files_may_give_guidance(tmp_path):
    from expunge.cli.common import read_prompts

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "a star", "seed": 4, "guidance": 7}\n{"text": "star"}\n')
    assert [(p.text, p.seed, p.guidance) for p in read_prompts(file)] == [
        ("a star", 4, 7.0),
        ("star", 1, None),
    ]


def test_control_characters_of_a_name_do_not_reach_the_terminal(capsys):
    _, _, err = run(capsys, "methods", "\x1b[31mred")
    assert "\x1b" not in err


def test_help_explains_every_option():
    done = subprocess.run(
        [sys.executable, "-m", "expunge", "audit", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for option in (
        "--model",
        "--original",
        "--never",
        "--edit",
        "--concept",
        "--attacks",
        "--budget",
        "--prompts",
    ):
        assert option in done.stdout


@pytest.mark.parametrize("command", ["audit", "run"])
def test_a_model_without_a_judge_is_refused_before_anything_is_done(
    command, folder, tmp_path, capsys
):
    arguments = ("-m", folder, "-c", "star", "-o", tmp_path / "out")
    status, _, err = run(capsys, command, *arguments)
    assert status == 1 and "has no judge of its own; name one with --judge" in err
    assert not (tmp_path / "out").exists()
