"""Edits on the command line: put on other stacks and on siblings where that is asked for by name, in every command."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image

from command_line import called as run
from expunge import Edit, cli, load
from expunge.method import Judge, Verdicts
from expunge.testing import tiny_diffusion


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A saved model, a sibling of it, and two edits that were both fitted on the bare model."""
    from expunge import Concept
    from expunge.erase.diffusion.uce import UCE

    folder = tmp_path_factory.mktemp("edits")
    model = tiny_diffusion()
    model.pipeline.save_pretrained(folder / "model")
    for name in ("star", "heart"):
        UCE().erase(model, Concept(name, anchor="circle")).save(folder / f"{name}.safetensors")
    with torch.no_grad():
        for name in model.text_projections():
            model.tensor(name).mul_(1.05)
    model.pipeline.save_pretrained(folder / "sibling")
    return folder


def test_every_command_that_takes_edits_takes_them_on_siblings_and_other_stacks():
    commands = [command.callback for command in cli.app.registered_commands]
    found = {one.__name__: inspect.signature(one).parameters for one in commands}
    edited = {name: options for name, options in found.items() if "edit" in options}
    assert set(edited) >= {"generate", "erase", "audit", "run", "attack", "benchmark", "export"}
    for name, options in edited.items():
        assert {"sibling", "rebase"} <= set(options), name


def test_pictures_of_two_edits_of_the_bare_model_need_rebase(capsys, place, tmp_path):
    one, two = place / "star.safetensors", place / "heart.safetensors"
    asked = (
        "generate",
        "-m",
        place / "model",
        "-p",
        "a star",
        "-e",
        one,
        "-e",
        two,
        "-o",
        tmp_path,
    )
    status, _, err = run(capsys, *asked)
    assert status == 1 and "was fitted on the bare base" in err and "`--rebase`" in err
    status, _, err = run(capsys, *asked, "--rebase")
    assert status == 0, err
    model = load(str(place / "model"))
    with Edit.load(one).on(model), Edit.load(two).on(model, rebase=True):
        wanted = model.generate("a star", seeds=0)[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "0000-seed0.png")), wanted)


def test_an_eraser_learns_on_top_of_edits_of_a_sibling_and_of_another_stack(
    capsys, place, tmp_path
):
    one, two = place / "star.safetensors", place / "heart.safetensors"
    asked = ("erase", "--method", "uce", "-c", "square", "-o", tmp_path, "-m")
    status, _, err = run(capsys, *asked, place / "sibling", "-e", one)
    assert status == 1 and "other weights" in err and "`--sibling`" in err
    assert run(capsys, *asked, place / "sibling", "-e", one, "--sibling")[0] == 0
    made = Edit.load(tmp_path / "edit.safetensors")
    assert list(made.manifest.fitted_on) == [Edit.load(one).digest]
    assert run(capsys, *asked, place / "model", "-e", one, "-e", two)[0] == 1
    assert run(capsys, *asked, place / "model", "-e", one, "-e", two, "--rebase")[0] == 0
    made = Edit.load(tmp_path / "edit.safetensors")
    assert list(made.manifest.fitted_on) == [Edit.load(file).digest for file in (one, two)]


@pytest.mark.parametrize("command", ["audit", "run"])
def test_an_audit_is_told_what_is_allowed(capsys, place, tmp_path, monkeypatch, command):
    seen = {}

    def stop(*_, rebase, sibling, **__):
        from expunge.errors import InputError

        seen.update(rebase=rebase, sibling=sibling)
        raise InputError("that is all")

    monkeypatch.setattr("expunge.evidence.audit", stop)
    monkeypatch.setattr(cli.common, "chosen_judge", lambda *_: object())
    more = ("--method", "uce") if command == "run" else ()
    asked = (
        command, "-m", place / "sibling", "-c", "square", "-e", place / "star.safetensors", "-e",
        place / "heart.safetensors", "-o", tmp_path, *more,
    )  # fmt: skip
    status, _, err = run(capsys, *asked, "--sibling", "--rebase")
    assert status == 1 and "that is all" in err
    assert seen == {"rebase": True, "sibling": True}


def test_an_edit_is_exported_into_a_sibling(capsys, place, tmp_path):
    one, two = place / "star.safetensors", place / "heart.safetensors"
    asked = ("export", two, "-m", place / "sibling", "--format", "full", "-o", tmp_path / "full")
    status, _, err = run(capsys, *asked)
    assert status == 1 and "other weights" in err
    both = (*asked, "-e", one, "--sibling")
    assert run(capsys, *both)[0] == 1
    status, _, err = run(capsys, *both, "--rebase")
    assert status == 0, err
    sibling, full = load(str(place / "sibling")), load(str(tmp_path / "full"))
    with Edit.load(one).on(sibling, sibling=True):
        with Edit.load(two).on(sibling, sibling=True, rebase=True):
            for name in sibling.text_projections():
                assert torch.equal(sibling.tensor(name), full.tensor(name))
    lora = ("export", two, "-m", place / "sibling", "-o", tmp_path / "lora.safetensors")
    assert run(capsys, *lora)[0] == 1 and run(capsys, *lora, "--sibling")[0] == 0


# -- a negative text -------------------------------------------------------------------------------


@pytest.mark.parametrize("edited", [False, True])
def test_a_negative_text_stands_in_the_unconditional_branch(capsys, place, tmp_path, edited):
    """As in Python; an edit that acts on guidance is told of it."""
    from expunge import Concept
    from expunge.erase.diffusion.sld import SLD

    model = load(str(place / "model"))
    edit = SLD(warm_up=0).erase(model, Concept("heart"))
    edit.save(tmp_path / "edit.safetensors")
    more = ("-e", tmp_path / "edit.safetensors") if edited else ()
    asked = (
        "generate",
        "-m",
        place / "model",
        "-p",
        "a star",
        "--seed",
        3,
        "--guidance",
        4,
        *more,
        "-o",
    )
    assert run(capsys, *asked, tmp_path / "with", "--negative", "a red circle")[0] == 0
    assert run(capsys, *asked, tmp_path / "without")[0] == 0
    drawn = {
        name: np.asarray(Image.open(tmp_path / name / "0000-seed3.png"))
        for name in ("with", "without")
    }
    if edited:
        edit.apply(model)
    for name, text in (("with", "a red circle"), ("without", "")):
        wanted = model.generate("a star", seeds=3, guidance=4.0, negative=text)[0]
        assert np.array_equal(drawn[name], wanted)
    assert not np.array_equal(drawn["with"], drawn["without"])


def test_a_negative_text_that_would_do_nothing_is_refused(capsys, place, tmp_path):
    from expunge.errors import PromptError
    from expunge.method import Prompt
    from expunge.testing import tiny_language

    asked = ("generate", "-m", place / "model", "-p", "a star", "--negative", "red", "-o", tmp_path)
    status, _, err = run(capsys, *asked, "--guidance", 1)
    assert status == 1 and "a negative text has no part at guidance 1" in err
    model = tiny_diffusion()
    one = Prompt("a star", guidance=1.0)
    with pytest.raises(PromptError, match="no part at guidance 1"):
        model.generate([one], negative="red")
    # Where one of several pictures is guided it has a part, in batches of any size.
    both = [one, Prompt("a star")]
    whole, single = (model.generate(both, negative="red", batch=size) for size in (2, 1))
    assert abs(whole.astype(int) - single.astype(int)).max() <= 1
    with pytest.raises(PromptError, match="'negative' is unknown"):
        tiny_language().generate("Ada", negative="red")


# -- attacks ---------------------------------------------------------------------------------------


class Later(Judge):
    """Of the plain pictures sees the concept in the first alone, and afterwards in every one."""

    id, protocol, threshold = "later", "later/1", 0.5

    def __init__(self):
        self.asked = 0

    def judge(self, outputs, concept, prompts):
        hit = np.ones(len(outputs), bool) if self.asked else np.arange(len(outputs)) == 0
        self.asked += 1
        return Verdicts(hit, hit * 0.75, np.ones(len(outputs), bool))


def test_attacks_of_a_model_are_shown_and_written(capsys, place, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.common, "chosen_judge", lambda *_: Later())
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"text": "a photo of a star", "seed": 7}\n')
    asked = (
        "attack", "-m", place / "model", "-e", place / "star.safetensors", "-c", "star", "-p", "a star", "-p",
        "a red star", "-f", prompts, "--attacks", "random-tokens", "--budget", "quick", "-o", tmp_path / "out",
    )  # fmt: skip
    status, out, err = run(capsys, *asked)
    assert status == 0, err
    assert "random-tokens" in out and "33.3 [" in out and "100.0 [" in out and "score 0.75" in out
    document = json.loads((tmp_path / "out" / "attacks.json").read_text())
    (attack,) = document["attacks"]
    assert [(i["prompt"], i["seed"]) for i in attack["items"]] == [
        ("a star", 0), ("a red star", 1), ("a photo of a star", 7),
    ]  # fmt: skip
    assert [(i["before"], i["after"]) for i in attack["items"]] == [
        (True, True),
        (False, True),
        (False, True),
    ]
    assert attack["items"][0]["text"] is None and attack["items"][1]["text"] in out
    assert len(list((tmp_path / "out" / "random-tokens").glob("*.png"))) == 3
    assert document["command"].startswith("expunge attack") and document["own_prompts"]
    status, out, err = run(capsys, *asked, "--n", "1", "--attacks", "ring-a-bel")
    assert status == 1 and "ring-a-bell" in err


def test_a_command_whose_attacks_all_fail_says_so(capsys, place, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.common, "chosen_judge", lambda *_: Later())
    asked = (
        "attack",
        "-m",
        place / "model",
        "-c",
        "star",
        "-p",
        "a star",
        "-o",
        tmp_path,
        "--attacks",
    )
    status, out, _ = run(capsys, *asked, "p4d")  # there is nothing that could be lifted
    assert status == 1 and "p4d: not-run: it needs the original" in out
