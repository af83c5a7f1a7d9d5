"""Edits that act and bring tokens: on and off bit for bit, rebuilt from the catalogue, checked at the door."""

from __future__ import annotations

import itertools

import pydantic
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from expunge.core.sampling import OutputCache, as_prompts, outputs
from expunge.edit import Edit
from expunge.edit.summary import print_summary
from expunge.edit.tokens import Words, in_training
from expunge.errors import (
    EditFormatError,
    MissingCapability,
    MissingPart,
    NonFiniteError,
    UnsupportedModel,
    WrongMethod,
    WrongShape,
    WrongState,
)  # fmt: skip
from expunge.method import Control
from expunge.testing import battery, bench, tiny_diffusion, tiny_language
from expunge.testing.layouts import tiny_layout

from . import acting
from .acting import WORDS, Toy
from .edits import STAR, Maker, make, same, values

TEXT = "a <w-1> star <w-2>"
PATH = f"{acting.__name__}:Toy"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    acting.known(monkeypatch, toy=PATH)


@pytest.fixture
def model():
    return tiny_diffusion()


def objects(model):
    """What must be the very same afterwards."""
    pipeline = model.pipeline
    found = [
        pipeline.tokenizer,
        pipeline.text_encoder.get_input_embeddings(),
        *model.tensors().values(),
    ]
    config = pipeline.text_encoder.config
    return [*map(id, found), len(pipeline.tokenizer), config.vocab_size, config.eos_token_id,
            model.acting, model.state, model.protocol_key, sorted(model.edits.originals)]  # fmt: skip


def words_edit(model, texts=("<v>",), seed=7, rows=None, **more):
    rows = (
        torch.randn(len(texts), 32, generator=torch.Generator().manual_seed(seed))
        if rows is None
        else rows
    )
    return Edit.make(Maker(), model, (STAR,), kind="control", tensors={"tokens.text_encoder": rows},
                     tokens={"tokenizer": list(texts)}, seed=seed, **more)  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_on_and_off_bit_for_bit_also_after_exceptions(model, share):
    edit, before, kept = Toy(share=share).erase(model, STAR), values(model), objects(model)
    base = model.fingerprint().to_dict()
    with pytest.raises(ZeroDivisionError), edit.on(model):
        ids = model.token_ids([TEXT])[0].tolist()
        assert [i in ids for i in (kept[-7], kept[-7] + 1)] == [True, True]
        assert len(model.tokenizer) == kept[-7] + 2 and len(model.token_table()) == kept[-7] + 2
        assert len(model.acting) == 1 and model.fingerprint().to_dict() == base
        assert model.state.edits == (edit.digest,) and model.state.base == kept[-3].base
        assert not any(p.requires_grad for p in model.tensors().values())
        raise ZeroDivisionError
    assert same(model, before) and objects(model) == kept


def test_three_deep_removed_in_every_order_and_lifted(model):
    before, kept = values(model), objects(model)
    edits = [Toy().erase(model, STAR), words_edit(model), make(model, "dense")]
    for order in itertools.permutations(range(3)):
        for index in order:
            edits[index].apply(model, rebase=True)
        held, table, texts = values(model), model.token_table(), model.encode([TEXT]).embeddings
        with model.lifted():
            assert same(model, before) and objects(model) == kept
            edits[1].apply(model)
        assert same(model, held) and torch.equal(model.token_table(), table)
        assert torch.equal(model.encode([TEXT]).embeddings, texts)
        for edit in edits:
            edit.revert(model)
        assert same(model, before) and objects(model) == kept


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_take_the_models_precision(dtype):
    model = tiny_diffusion(dtype=dtype)
    edit = words_edit(model)
    with edit.on(model):
        assert model.token_table().dtype == dtype
        assert torch.equal(
            model.token_table()[-1], edit.tensors["tokens.text_encoder"][0].to(dtype)
        )
    if dtype == torch.float16:
        with pytest.raises(NonFiniteError, match="float16"):
            words_edit(model, rows=torch.full((1, 32), 1e6)).apply(model)


@pytest.mark.parametrize("layout", ["sdxl", "pixart", "sana", "sd3", "flux"])
def test_every_layout_and_tokenizer(layout):
    model = tiny_layout(layout)
    before, plain = values(model), model.encode(["a star"]).embeddings
    for name, own in model.vocabularies().items():
        kept = own.tokenizer, own.encoder.get_input_embeddings()
        width = kept[1].weight.shape[1]
        edit = Edit.make(Maker(), model, (STAR,), kind="control", tokens={name: ["<l1>"]},
                         tensors={f"tokens.{own.part}": 10 * torch.ones(1, width)})  # fmt: skip
        other = model.encode(["a <l1> star"])
        with edit.on(model):
            made = model.encode(["a <l1> star"])
            moved = not torch.equal(made.embeddings, other.embeddings)
            assert moved or not torch.equal(made.pooled, other.pooled)
            assert torch.equal(model.encode(["a star"]).embeddings, plain)
        assert own.tokenizer is kept[0] and own.encoder.get_input_embeddings() is kept[1]
    assert same(model, before)


def test_remembered_texts_follow_the_tokens(model):
    first, second = words_edit(model, seed=1), words_edit(model, seed=2)
    plain = model.encode(["a <v>"]).embeddings
    with first.on(model):
        one = model.encode(["a <v>"]).embeddings
    with second.on(model):
        assert not torch.equal(model.encode(["a <v>"]).embeddings, one)
    assert torch.equal(model.encode(["a <v>"]).embeddings, plain) and not torch.equal(one, plain)


def test_rows_in_training_have_gradients_and_the_values_of_the_rows(model):
    edit = words_edit(model)
    rows = torch.randn(1, 32, requires_grad=True)
    with edit.on(model), in_training(model, edit, {"text_encoder": rows}):
        made = model.encode(["a <v> star"]).embeddings
        made.sum().backward()
    assert rows.grad is not None and rows.grad.abs().max() > 0 and not model.edits.training
    with words_edit(model, rows=rows.detach()).on(model):
        torch.testing.assert_close(model.encode(["a <v> star"]).embeddings, made.detach())


def test_controls_of_edits_come_first_and_their_outputs_are_kept(model):
    edit, mine = Toy(words=False).erase(model, STAR), Control()
    plain = model.generate("a red star", seeds=0)
    cache, prompts = OutputCache(), as_prompts(["a red star"])
    with edit.on(model):
        assert not (model.generate("a red star", seeds=0) == plain).all()
        outputs(model, prompts, cache=cache)
        outputs(model, prompts, cache=cache)
        assert cache.hits == 1  # its state names what the edit does
        with model.controlled(mine):
            assert [type(c).__name__ for c in model.acting] == ["Dimmed", "Control"]
            outputs(model, prompts, cache=cache)
            assert cache.hits == 1  # nobody names what a user's control does
        with model.lifted():
            assert (model.generate("a red star", seeds=0) == plain).all()
    assert (model.generate("a red star", seeds=0) == plain).all()


@pytest.mark.parametrize(
    ("systems", "match"),
    [
        ({}, "no system has the id 'toy'"),
        ({"toy": None}, "planned"),
        ({"toy": f"{acting.__name__}:Dimmed"}, "no eraser"),
    ],
)
def test_an_edit_without_its_code_is_refused_and_nothing_is_touched(
    model, monkeypatch, systems, match
):
    edit, before, kept = Toy().erase(model, STAR), values(model), objects(model)
    acting.known(monkeypatch, **systems)
    with pytest.raises(WrongMethod, match=match):
        edit.apply(model)
    assert same(model, before) and objects(model) == kept


def test_another_version_or_a_control_that_fails_leaves_nothing(model, monkeypatch):
    edit, before, kept = Toy().erase(model, STAR), values(model), objects(model)
    monkeypatch.setattr(Toy, "version", 3)
    with pytest.raises(WrongMethod, match="version 2; here is version 3"):
        edit.apply(model)
    monkeypatch.undo()
    acting.known(monkeypatch, toy=PATH)

    def failing(cls, edit, model):
        assert len(model.acting) == 0 and "<w-1>" in model.tokenizer.get_vocab()
        raise ZeroDivisionError

    for control, error in ((failing, ZeroDivisionError), (lambda *a: 3, WrongMethod)):
        monkeypatch.setattr(Toy, "control", classmethod(control))
        with pytest.raises(error):
            edit.apply(model)
        assert same(model, before) and objects(model) == kept


def test_a_setting_that_the_method_does_not_have_is_refused_and_nothing_is_touched(model):
    edit, before, kept = Toy().erase(model, STAR), values(model), objects(model)
    settings = {**edit.manifest.settings, "factr": 0.5}
    other = Edit(edit.manifest.model_copy(update={"settings": settings}), edit.tensors)
    with pytest.raises(EditFormatError, match="names the setting 'factr'"):
        other.apply(model)
    assert same(model, before) and objects(model) == kept


def test_a_method_without_a_control_and_a_model_without_controls_are_refused(model):
    from expunge.erase.diffusion.uce import UCE

    with pytest.raises(WrongMethod, match="has no control"):
        UCE.control(None, model)
    edit = Edit.make(Toy(), tiny_language(), (STAR,), kind="control", tensors={}, acts=True)
    with pytest.raises(MissingCapability, match="takes no controls"):
        edit.apply(tiny_language())
    with pytest.raises(MissingPart, match="no text encoder"):
        Edit.make(Toy(), tiny_language(), (STAR,), kind="control", tokens={"tokenizer": ["<a>"]},
                  tensors={"tokens.text_encoder": torch.zeros(1, 32)})  # fmt: skip
    with pytest.raises(MissingPart, match="would do nothing"):
        Edit.make(Maker(), model, (STAR,), kind="control", tensors={}).apply(model)


@pytest.mark.parametrize("text", ["star", "a</w>", "<|endoftext|>"])
def test_a_token_that_exists_is_refused(model, text):
    before, kept = values(model), objects(model)
    with pytest.raises(WrongState, match="already"):
        words_edit(model, [text]).apply(model)
    assert same(model, before) and objects(model) == kept


def test_tokens_that_do_not_stay_in_one_piece_or_do_not_fit(model):
    with pytest.raises(WrongState, match="one piece"):
        words_edit(model, ["<V>", "<v>"]).apply(model)  # CLIP knows no capitals
    with pytest.raises(WrongState, match="already"):
        words_edit(model, seed=1).apply(model)
        words_edit(model, seed=2).apply(model, rebase=True)
    model.edits.clear()
    with pytest.raises(WrongShape, match="33 wide"):
        words_edit(model, rows=torch.zeros(1, 33)).apply(model)


def test_round_trip_and_digest(model, tmp_path):
    edit = Toy().erase(model, STAR)
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert again == edit and again.manifest == edit.manifest
    assert again.manifest.acts and again.manifest.tokens == {"tokenizer": list(WORDS)}
    assert words_edit(model, ["<x>"]).digest != words_edit(model, ["<y>"]).digest
    assert (
        Toy(words=False).erase(model, STAR).digest
        != Toy(words=False, acts=False).erase(model, STAR).digest
    )
    with again.on(model):
        assert len(model.acting) == 1


def test_what_is_not_used_is_not_written(model):
    plain = make(model).manifest.plain()
    assert (
        "acts" not in plain and "tokens" not in plain
    )  # older readers and digests are not disturbed


@pytest.mark.parametrize(
    "tokens",
    [{"tokeniser": ["<a>"]}, {"tokenizer": []}, {"tokenizer": [""]}, {"tokenizer": ["<" * 101]},
     {"tokenizer": ["a b"]}, {"tokenizer": ["a\u0000"]}, {"tokenizer": ["a\u202e"]}, {"tokenizer": ["\ud800"]},
     {"tokenizer": ["<a>", "<a>"]}, {"tokenizer": [f"<{i}>" for i in range(10_001)]}, {"tokenizer": 3}],
)  # fmt: skip
def test_hostile_tokens_are_refused_at_the_door(model, tokens):
    manifest = make(model).manifest
    with pytest.raises(pydantic.ValidationError):
        type(manifest).model_validate({**manifest.model_dump(), "tokens": tokens})


def test_rows_must_go_with_the_tokens(model):
    good = words_edit(model)
    for tensors, match in (
        ({}, "lacks"),
        ({"tokens.text_encoder": torch.zeros(2, 32)}, "one row"),
        ({"tokens.text_encoder": torch.zeros(1, 32, dtype=torch.int64)}, "one row"),
        ({"tokens.text_encoder": torch.zeros(32)}, "one row"),
        ({**good.tensors, "tokens.unet": torch.zeros(1, 32)}, "names no tokens"),
    ):
        with pytest.raises(EditFormatError, match=match):
            Edit(good.manifest, tensors)
    with pytest.raises(NonFiniteError):
        Edit(good.manifest, {"tokens.text_encoder": torch.full((1, 32), torch.nan)})
    with pytest.raises(pydantic.ValidationError, match="names targets"):
        type(good.manifest).model_validate({**make(model).manifest.model_dump(), "kind": "control"})


def test_interrupted_on_its_way_the_model_stays_as_it_was(model, monkeypatch):
    edit, before, kept = Toy().erase(model, STAR), values(model), objects(model)
    put = Words.on

    def interrupted(words):
        put(words)
        raise KeyboardInterrupt

    monkeypatch.setattr(Words, "on", interrupted)
    for edits in (edit, Toy(acts=False).erase(model, STAR)):
        with pytest.raises(KeyboardInterrupt):
            edits.apply(model)
        assert same(model, before) and objects(model) == kept
    monkeypatch.undo()
    acting.known(monkeypatch, toy=PATH)
    with edit.on(model):
        held, mine = values(model), objects(model)
        plain, tries = Words.off, []

        def once(words):
            tries.append(words)
            if len(tries) == 1:
                raise KeyboardInterrupt
            plain(words)

        monkeypatch.setattr(Words, "off", once)
        with pytest.raises(KeyboardInterrupt), model.lifted():
            pass
        assert same(model, held) and objects(model) == mine
    assert same(model, before) and objects(model) == kept


def test_a_model_cast_meanwhile_keeps_one_precision(model):
    edit, wanted = words_edit(model), tiny_diffusion(dtype=torch.bfloat16)
    plain = wanted.encode(["a star"]).embeddings
    with edit.on(model):
        model.beside(wanted)
        with model.lifted():
            assert torch.equal(model.encode(["a star"]).embeddings, plain)
            model.beside(tiny_diffusion())
        assert model.encode(["a <v>"]).embeddings.dtype == torch.float32
        model.beside(wanted)
    assert {p.dtype for p in model.tensors().values()} == {torch.bfloat16}
    assert torch.equal(model.encode(["a star"]).embeddings, plain)


def test_the_legacy_end_of_clip_is_found_at_the_same_place():
    # Encoders configured with end token 2 look for the largest id, which a new token would be.
    model = tiny_layout("sdxl")
    own = model.vocabularies()["tokenizer_2"]
    holders = [own.encoder.config, *(m for m in own.encoder.modules() if "eos_token_id" in vars(m))]
    for holder in holders:
        holder.eos_token_id = 2
    plain = model.encode(["a red star"]).pooled
    edit = Edit.make(Maker(), model, (STAR,), kind="control", tokens={"tokenizer_2": ["<l1>"]},
                     tensors={f"tokens.{own.part}": torch.ones(1, 32)})  # fmt: skip
    with edit.on(model):
        assert torch.equal(model.encode(["a red star"]).pooled, plain)
        ids = own.tokenizer("a <l1> star", padding="max_length", max_length=16, return_tensors="pt")
        place = ids.input_ids[0].tolist().index(own.tokenizer.eos_token_id)
        assert int(ids.input_ids[0].argmax()) != place
        rows = own.encoder(ids.input_ids).last_hidden_state[0, place]
        pooled = model.encode(["a <l1> star"]).pooled[0]
        torch.testing.assert_close(own.encoder.text_projection(rows), pooled)
    assert [holder.eos_token_id for holder in holders] == [2] * len(holders)
    assert torch.equal(model.encode(["a red star"]).pooled, plain)


# -- other programs ------------------------------------------------------------------------------------


def test_tokens_alone_become_a_textual_inversion(model, tmp_path):
    edit, path = Toy(share=0).erase(model, STAR), tmp_path / "words.safetensors"
    assert edit.export(path, model=model)["left_out"] == ["control"]
    plain = tiny_diffusion()
    plain.pipeline.load_textual_inversion([{t: row} for t, row in load_file(path).items()])
    with edit.on(model):
        wanted = model.encode([TEXT]).embeddings
    assert torch.equal(plain.encode([TEXT]).embeddings, wanted)
    one = words_edit(model)
    one.export(path)
    single = tiny_diffusion()
    single.pipeline.load_textual_inversion(tmp_path, weight_name=path.name)
    with one.on(model):
        assert torch.equal(single.encode(["a <v>"]).embeddings, model.encode(["a <v>"]).embeddings)


def test_a_full_folder_holds_tokenizer_and_table(model, tmp_path):
    edit, before, kept = Toy().erase(model, STAR), values(model), objects(model)
    assert edit.export(tmp_path, format="full", model=model)["left_out"] == ["control"]
    assert same(model, before) and objects(model) == kept
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert len(again.tokenizer) == len(again.text_encoder.get_input_embeddings().weight)
    with edit.on(model):
        wanted = model.encode([TEXT]).embeddings
    ids = again.tokenizer(
        [TEXT], padding="max_length", return_tensors="pt", max_length=16
    ).input_ids
    assert torch.equal(again.text_encoder(ids)[0], wanted)


def test_a_name_that_safetensors_keeps_for_itself_is_refused(model, tmp_path):
    with pytest.raises(UnsupportedModel, match="keeps for itself"):
        words_edit(model, ["__metadata__"]).export(tmp_path / "x.safetensors", model=model)
    assert not list(tmp_path.iterdir())


def test_a_full_folder_names_what_acts_below(model, tmp_path):
    with Toy(words=False).erase(model, STAR).on(model):
        report = words_edit(model).export(tmp_path, format="full", model=model)
    assert report["left_out"] == ["control"] and report["tensors"] == 1


def test_what_lora_layouts_leave_out(model, tmp_path):
    edit = Toy().erase(model, STAR)
    for format in ("diffusers", "kohya", "peft"):
        report = edit.export(tmp_path / format, format=format, model=model, rank=4)
        assert report["left_out"] == ["control", "tokens.text_encoder"]
    bare = Toy(share=0).erase(model, STAR)
    for format in ("kohya", "peft"):
        with pytest.raises(UnsupportedModel, match=r"leaves out control, tokens\.text_encoder"):
            bare.export(tmp_path / "x", format=format, model=model)
    with pytest.raises(UnsupportedModel, match="only acts"):
        Toy(share=0, words=False).erase(model, STAR).export(
            tmp_path / "x", format="full", model=model
        )


def test_the_summary_shows_what_acts_and_the_words_as_they_are(model, capsys):
    print_summary(words_edit(model, ["[red]x[/]", "<v>"]))
    shown = capsys.readouterr().out
    assert "[red]x[/] <v>" in shown and "no weights change" in shown
    print_summary(Toy().erase(model, STAR))
    assert "while the model runs" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"share": 0}, {"words": False}])
def test_the_battery_covers_them(settings, monkeypatch):
    monkeypatch.setattr(bench, "quick", lambda method, preset=None: method(**settings))
    for check in battery.ERASER:
        check(Toy)
