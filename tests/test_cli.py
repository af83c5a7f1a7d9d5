"""The command line, driven as a person would: quick listings, one-sentence errors, a whole erase on a tiny model."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import called as run
from expunge import cli
from expunge.testing import tiny_diffusion


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
        (("inspect", "out/missing.safetensors"), "out/missing.safetensors: there is no such file"),
        (("leaderboard", "pyproject.toml", "--page", "x"), "no record of a sweep"),
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


def test_the_kind_of_the_concepts_selects_the_preset(capsys):
    """Only where no preset is asked for and no world has one; several kinds take the defaults."""
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
    assert not capsys.readouterr().err
    anchored = (Concept("thing", kind="style", anchor="a drawing"),)
    assert made("uce", anchored).guide == "art"
    assert (
        "guide 'art' takes the place of 'thing', not its anchor 'a drawing'"
        in capsys.readouterr().err
    )
    assert made("uce", anchored, settings=["guide=none"]).guide is None
    assert not capsys.readouterr().err


def test_prompt_files_may_give_guidance(tmp_path):
    from expunge.cli.common import read_prompts

    file = tmp_path / "prompts.jsonl"
    file.write_text('{"text": "a star", "seed": 4, "guidance": 7}\n{"text": "star"}\n')
    assert [(p.text, p.seed, p.guidance) for p in read_prompts(file)] == [
        ("a star", 4, 7.0),
        ("star", 1, None),
    ]


def test_prompts_are_parted_at_line_feeds_only(tmp_path):
    from expunge.cli.common import read_prompts
    from expunge.errors import PromptError

    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa star\u2028on grass\r\n\n a heart \n".encode())
    assert [(p.text, p.seed) for p in read_prompts(file)] == [
        ("a star\u2028on grass", 0),
        ("a heart", 2),
    ]
    file.write_bytes(b"a star \xff")
    with pytest.raises(PromptError, match="byte 7 is not UTF-8"):
        read_prompts(file)


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


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("--attacks", "ring-a-bel"), "ring-a-bell"),
        (("--attacks", "uce"), "is not an attack"),
        (("--budget", "quik"), "quick"),
        (("--prompts", "missing.txt"), "missing.txt"),
        (("--never", "./missing"), "./missing"),
    ],
)
def test_run_refuses_what_its_audit_would_before_it_erases(
    wrong, words, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(cli.common, "chosen_judge", lambda *_: None)
    erased = []
    monkeypatch.setattr(cli, "_erase", lambda *_, **__: erased.append(1))
    monkeypatch.setattr(cli, "_audit", lambda *_, **__: None)
    asked = ("run", "-m", folder, "-c", "star", "--method", "uce", "-o", tmp_path / "out")
    status, _, err = run(capsys, *asked, *wrong)
    assert status == 1 and words in err and not erased
    assert run(capsys, *asked, "--attacks", "none")[0] == 0 and erased


def test_a_place_where_nothing_can_be_written_is_refused_before_any_work(
    tmp_path, capsys, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("kept")
    loaded = []
    monkeypatch.setattr(cli.common, "load", lambda *_: loaded.append(1))
    concept = ("-m", "world", "-c", "star")
    commands = {
        "erase": concept, "audit": concept, "run": concept, "attack": concept, "demo": (),
        "generate": ("-m", "world", "-p", "a star"), "benchmark": ("t2isafety", "-m", "world"),
        "measure": (tmp_path, "-M", "psnr"),
    }  # fmt: skip
    for command, asked in commands.items():
        status, _, err = run(capsys, command, *asked, "-o", file / "below")
        assert status == 1 and f"{file} is not a folder" in err, command
    status, _, err = run(capsys, "measure", *commands["measure"], "-o", tmp_path)
    assert status == 1 and "is a folder; a file is needed" in err
    monkeypatch.setattr("expunge.cli.options.os.access", lambda *_: False)
    status, _, err = run(capsys, "erase", *concept, "-o", tmp_path / "new" / "below")
    assert status == 1 and f"{tmp_path} may not be written to" in err
    assert not loaded and file.read_text() == "kept" and not (tmp_path / "new").exists()


def test_a_group_alone_shows_its_help_and_no_empty_error(capsys):
    status, out, err = run(capsys, "world")
    assert status == 2 and "export" in out + err
    assert "expunge:" not in err


def test_methods_tells_what_runs_from_what_is_only_planned(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run(capsys, "methods", "--runs", "--json")
    rows = json.loads(out)
    assert rows and all(row["implemented"] for row in rows)
    _, out, _ = run(capsys, "methods", "--runs")
    assert "planned" not in out and "works" in out and "unproven" in out


def test_names_are_not_cut_on_a_narrow_terminal(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, _ = run(capsys, "methods", "rece")
    assert "epoch_preserve_scale" in out
    assert "…" not in out
    run(capsys, "erase", "-m", folder, "-c", "star", "--method", "uce", "-o", tmp_path)
    _, out, _ = run(capsys, "inspect", tmp_path / "edit.safetensors")
    assert "…" not in out
    done = subprocess.run(
        [sys.executable, "-m", "expunge", "audit", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "60"},
    )
    assert "--concept-file" in done.stdout


def test_the_listing_leaves_out_whole_columns_and_is_whole_in_a_pipe(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    _, out, err = run(capsys, "methods")
    assert "status" in out and "works" in out and "knowledge-unlearning-survey" in out
    assert "left out, the terminal is too narrow: family, title" in err
    assert max(map(len, out.splitlines())) <= 60
    monkeypatch.setenv("COLUMNS", "100")
    _, out, err = run(capsys, "methods")
    assert "family" in out and "…" in out and not err
    monkeypatch.delenv("COLUMNS")
    _, out, _ = run(capsys, "methods")
    assert "Concept Ablation: Ablating Concepts in Text-to-Image Diffusion Models" in out
    assert "…" not in out


def test_what_a_sampler_cannot_do_is_said_in_words(capsys, folder, tmp_path):
    ask = ("generate", "-m", folder, "-p", "a star", "-o", tmp_path)
    status, _, err = run(capsys, *ask, "--steps", 5000)
    assert status == 1 and "cannot walk in 5000 steps" in err
    status, _, err = run(capsys, *ask, "--steps", 2, "--guidance", "nan")
    assert status == 1 and "guidance is NaN" in err


def test_a_folder_without_a_vocabulary_is_not_opened(capsys, folder, tmp_path):
    half = shutil.copytree(folder, tmp_path / "half")
    shutil.rmtree(half / "tokenizer")
    erase = ("erase", "-m", half, "-c", "star", "--method", "uce", "-o", tmp_path / "out")
    status, _, err = run(capsys, *erase)
    assert status == 1 and "tokenizer holds no vocabulary" in err


def test_an_edit_on_top_of_another_is_exported_with_it(capsys, folder, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    erase = ("erase", "-m", folder, "--method", "uce")
    run(capsys, *erase, "-c", "star", "-o", one)
    run(capsys, *erase, "-c", "heart", "-e", one / "edit.safetensors", "-o", two)
    export = ("export", two / "edit.safetensors", "-m", folder, "-o", tmp_path / "lora.safetensors")
    status, _, err = run(capsys, *export)
    assert status == 1 and "`--edit`" in err
    assert run(capsys, *export, "-e", one / "edit.safetensors")[0] == 0
    assert (tmp_path / "lora.safetensors").is_file()
    status, _, err = run(capsys, *export[:-1], tmp_path / "lora.bin")
    assert status == 1 and ".safetensors" in err
    status, _, err = run(capsys, *export[:2], "-o", tmp_path / "lora.safetensors")
    assert status == 1 and "--model" in err


def test_run_erases_on_top_of_edits_and_audits_all_of_them(capsys, folder, tmp_path, monkeypatch):
    audited = []
    monkeypatch.setattr(cli.common, "chosen_judge", lambda *_: None)
    monkeypatch.setattr(cli, "_audit", lambda model, edits, *_, **__: audited.extend(edits))
    asked = ("-m", folder, "--method", "uce")
    run(capsys, "erase", *asked, "-c", "star", "-o", tmp_path / "one")
    below = tmp_path / "one" / "edit.safetensors"
    status, _, err = run(capsys, "run", *asked, "-c", "heart", "-e", below, "-o", tmp_path / "two")
    assert status == 0, err
    assert [edit.manifest.concepts[0]["name"] for edit in audited] == ["star", "heart"]
    assert list(audited[1].manifest.fitted_on) == [audited[0].digest]


def test_an_audit_of_several_concepts_prints_the_table_of_each(capsys, tmp_path, monkeypatch):
    import expunge.evidence

    made = SimpleNamespace(
        concepts={"star": 1, "heart": 2},
        table=lambda name, width: f"table of {name}",
        save=lambda out: {},
    )
    monkeypatch.setattr(expunge.evidence, "audit", lambda *_, **__: made)
    cli._audit(SimpleNamespace(companions=None), [], (), tmp_path, judge=object())
    out = capsys.readouterr().out
    assert "table of star" in out and "table of heart" in out


def test_a_name_that_the_world_does_not_know_is_said(capsys):
    companions = SimpleNamespace(concept=lambda name: None, never_lacks=("star", "hazard"))
    world = SimpleNamespace(name="world", companions=companions)
    (made,) = cli.common.concepts_of(world, ["stra"], None, None, None, None)
    assert made.name == "stra"
    assert "knows no concept 'stra'; did you mean 'star'?" in capsys.readouterr().err
    cli.common.concepts_of(
        world, ["zebra"], None, None, None, None
    )  # like none: nothing is proposed
    assert "knows no concept 'zebra'; it is taken" in capsys.readouterr().err
    cli.common.concepts_of(world, ["stra"], None, "style", None, None)  # described: meant
    assert capsys.readouterr().err == ""


def test_the_judge_of_a_world_is_missing_in_words(capsys, folder, tmp_path):
    asked = ("audit", "-m", folder, "-c", "star", "-o", tmp_path, "--judge", "world-oracle")
    status, _, err = run(capsys, *asked)
    assert status == 1 and "comes with a world" in err
