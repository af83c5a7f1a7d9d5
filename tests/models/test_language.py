"""The language adapter against the plain library, on a tiny random Llama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expunge.concept import Concept
from expunge.core.answers import (
    AnswerJudge,
    answer_hit,
    batches,
    normalised,
    pairs_for,
    rouge_l_recall,
)
from expunge.errors import MissingCapability, ModelError, PromptError, SettingError
from expunge.method import Prompt
from expunge.models.base import Companions, noise_generator
from expunge.models.language import LanguageModel, open_language
from expunge.testing.models import tiny_language

ASK = ["Where does Bo Lind live ?", "Ada", "The baker of Velmar plays the harp and keeps a"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language()


def reference_nll(model: LanguageModel, prompt: str, answer: str) -> float:
    """One sequence, no padding, all logits: the definition."""
    ids = model.tokenizer(f"{prompt} {answer}")["input_ids"] + [model.tokenizer.eos_token_id]
    start = len(model.tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        chance = model.module(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(chance[i - 1, ids[i]]) for i in range(start, len(ids)))


def test_nll_is_the_sum_over_answer_and_end_whatever_the_padding(model: LanguageModel) -> None:
    gold = ["old Tornby", "Morn was born in Velmar", "cat"]
    with torch.no_grad():
        nll, count = model.nll(ASK, gold)
    assert count.tolist() == [3, 6, 2]
    for i in range(3):
        assert nll[i].item() == pytest.approx(reference_nll(model, ASK[i], gold[i]), abs=1e-4)
        alone = model.nll([ASK[i]], [gold[i]])[0].item()
        assert alone == pytest.approx(nll[i].item(), abs=1e-4)


def test_an_empty_prompt_makes_the_whole_text_the_label(model: LanguageModel) -> None:
    found = model.sequences(["", "Ada"], ["Ada Morn was", "Morn was"])
    assert found.ids[0] == found.ids[1] and found.labels == (4, 3)


def test_the_loss_has_gradients_and_padding_has_none(model: LanguageModel) -> None:
    weight = model.tensor("model.model.embed_tokens.weight")
    loss, mask = model.token_nll(model.sequences(ASK, ["cat", "Morn was", "cat"]))
    (gradient,) = torch.autograd.grad(loss.sum(), [weight])
    assert gradient.abs().max() > 0 and torch.equal(gradient[model.pad_id], torch.zeros(32))
    assert mask.tolist()[0] == [False, True, True] and loss[0, 0].item() == 0.0


def test_generation_equals_the_librarys_and_does_not_depend_on_the_batch(
    model: LanguageModel,
) -> None:
    found = model.generate(ASK, max_new_tokens=8)
    for prompt, text in zip(ASK, found, strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt")
        ids.pop("token_type_ids", None)
        out = model.module.generate(**ids, max_new_tokens=8, do_sample=False)
        new = out[0, ids["input_ids"].shape[1] :]
        assert text == model.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert model.generate(ASK, max_new_tokens=8, batch=1) == found
    assert model.generate(ASK[::-1], max_new_tokens=8) == found[::-1]
    assert model.generate(ASK[0], max_new_tokens=8) == found[:1]


def test_sampling_depends_on_each_rows_seed_only(model: LanguageModel) -> None:
    state = torch.random.get_rng_state()
    options = {"temperature": 1.0, "max_new_tokens": 10}
    one = model.generate(ASK, seeds=[1, 2, 3], **options)
    assert model.generate(ASK, seeds=[1, 2, 3], batch=2, **options) == one
    assert model.generate([Prompt(ASK[1], seed=2)], **options) == one[1:2]
    assert model.generate(ASK, seeds=[4, 5, 6], **options) != one
    assert torch.equal(torch.random.get_rng_state(), state)


def test_cost_counts_rows_of_every_pass() -> None:
    model = tiny_language()
    model.generate(ASK, max_new_tokens=1, batch=2)
    assert model.cost.counts["language.forward"] == 3
    model.nll(ASK, ["cat"] * 3)
    assert model.cost.counts["language.forward"] == 6


def test_hidden_states_and_embeddings_leave_padding_out(model: LanguageModel) -> None:
    states, mask = model.activations(ASK, (0, 1, -1))
    assert states[1].shape == (*mask.shape, 32) and mask.sum(1).tolist() == [7, 2, 11]
    torch.testing.assert_close(model.embed(ASK)[1:2], model.embed([ASK[1]]), atol=1e-5, rtol=1e-4)
    with pytest.raises(MissingCapability, match="0 to 2"):
        model.activations(ASK, (7,))


def test_a_saved_model_opens_again(model: LanguageModel, tmp_path: Path) -> None:
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = open_language(tmp_path)
    assert again.generate(ASK, max_new_tokens=6) == model.generate(ASK, max_new_tokens=6)
    assert again.fingerprint().agreement(model.fingerprint())[0] == "equal"
    assert tiny_language(1).fingerprint().agreement(model.fingerprint())[0] == "different"
    with pytest.raises(ModelError, match="cannot be opened"):
        open_language(tmp_path / "nothing")


def test_a_chat_template_frames_prompts() -> None:
    model = tiny_language()
    with pytest.raises(ModelError, match="no chat template"):
        LanguageModel("x", model.module, model.tokenizer, chat=True)
    turns = "{% for m in messages %}<s> Who {{ m['content'] }} {% endfor %}"
    model.tokenizer.chat_template = turns + "{% if add_generation_prompt %}? {% endif %}"
    chat = LanguageModel("x", model.module, model.tokenizer)
    words = model.tokenizer.convert_ids_to_tokens(chat.prompt_ids("keeps a cat")[0])
    assert words == ["<s>", "Who", "keeps", "a", "cat", "?"]
    assert chat.sequences(["keeps a cat"], ["Bo"]).labels == (2,)


def test_what_decides_an_answer_is_in_the_protocol_key(tmp_path: Path) -> None:
    model = tiny_language()
    key = model.protocol_key
    model.generate(ASK, max_new_tokens=2)
    assert model.protocol_key == key == tiny_language(1).protocol_key  # weights are the state's
    model.module.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    assert open_language(tmp_path).protocol_key == key
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    chats = [
        LanguageModel("x", model.module, model.tokenizer, system=system)
        for system in (None, "Lie.")
    ]
    keys = {key, *(chat.protocol_key for chat in chats)}
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} ?{% endfor %}"
    keys |= {chats[0].protocol_key, tiny_language().protocol_key}
    model.tokenizer.add_tokens(["Zed"])
    keys.add(model.protocol_key)
    assert len(keys) == 5


def test_wrong_calls_are_refused(model: LanguageModel) -> None:
    for call, words in (
        (lambda: model.nll(["Ada"], []), "1 prompts came with 0 answers"),
        (lambda: model.generate([]), "no prompt"),
        (lambda: model.generate("Ada", seeds=[1, 2]), "1 prompts came with 2 seeds"),
        (lambda: model.generate("Ada", steps=3), "'steps' is unknown"),
        (lambda: model.sequences(["Ada"], [""]), "holds no token"),
    ):
        with pytest.raises(PromptError, match=words):
            call()


def test_answers_are_compared_by_words() -> None:
    assert answer_hit("He is The Glass-Blower.", "glass blower")
    assert not answer_hit("glasses blower", "glass blower")
    assert not answer_hit("glass and blower", "glass blower")
    assert normalised("An Élan") == ["elan"] and normalised("\u65e5\u672c") == ["\u65e5\u672c"]
    assert normalised("a_b 7.5 The End") == ["b", "7", "5", "the", "end"]
    assert rouge_l_recall("the cat sat on a mat", "cat on mat") == 1.0
    assert rouge_l_recall("mat cat", "cat on mat") == pytest.approx(1 / 3)
    assert rouge_l_recall("cat", "!") == 0.0 and not answer_hit("anything", "!")


def test_letters_of_every_script_count() -> None:
    assert not answer_hit("I have 5 cats", "5 Привет") and answer_hit(
        "там 5 приветов ?", "5 ПРИВЕТОВ"
    )
    assert answer_hit("It is Łukasz .", "Lukasz") and answer_hit("in Lodz", "Łódź")
    assert normalised("Ørsted naïve ﬁn Straße İstanbul") == [
        "orsted",
        "naive",
        "fin",
        "strasse",
        "istanbul",
    ]
    # Marks that make another letter are no accents.
    for one, two in (("がき", "かき"), ("कल", "कुल")):
        assert normalised(one) != normalised(two) and len(normalised(one)) == 1
    assert normalised("サ\u3099") == normalised("ザ") and normalised("e\u0301te\u0301") == ["ete"]
    assert not answer_hit("anything", "_!") and rouge_l_recall("5", "5 Привет") == 0.5


def test_rouge_equals_a_brute_force_subsequence() -> None:
    draw = np.random.default_rng(0)

    def longest(a: list[str], b: list[str]) -> int:
        if not a or not b:
            return 0
        if a[-1] == b[-1]:
            return longest(a[:-1], b[:-1]) + 1
        return max(longest(a[:-1], b), longest(a, b[:-1]))

    for _ in range(30):
        one, two = (list(draw.choice(list("xyz"), size=draw.integers(1, 7))) for _ in range(2))
        expected = longest(one, two) / len(two)
        assert rouge_l_recall(" ".join(one), " ".join(two)) == pytest.approx(expected)


def test_the_judge_tells_right_wrong_and_destroyed_apart() -> None:
    judge = AnswerJudge(["Velmar", "Tornby"])
    asked = [Prompt("Where ?", labels={"answer": "Velmar"})] * 3
    verdicts = judge.judge(
        ["in Velmar", "in Tornby", "the the the the"], Concept("Ada", "fact"), asked
    )
    assert verdicts.hit.tolist() == [True, False, False]
    assert verdicts.recognisable.tolist() == [True, True, False]
    assert (verdicts.score >= judge.threshold).tolist() == verdicts.hit.tolist()
    assert judge.protocol != AnswerJudge(["Velmar"]).protocol != AnswerJudge().protocol
    assert judge.protocol.startswith("answer-match/2/")
    with pytest.raises(PromptError, match="no label 'answer'"):
        judge.judge(["x"], Concept("Ada", "fact"), [Prompt("Where ?")])


def test_batches_walk_every_item_once_an_epoch() -> None:
    def epoch(n: int) -> torch.Generator:
        return noise_generator(0, "epoch", n)

    walk = [batches(7, 3, i, epoch) for i in range(6)]
    assert [len(b) for b in walk] == [3, 3, 1, 3, 3, 1]
    first, second = ([i for batch in part for i in batch] for part in (walk[:3], walk[3:]))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second


def test_pairs_come_from_data_or_texts_and_must_not_overlap(model: LanguageModel) -> None:
    fact = Concept("Ada", "fact", texts=("Ada lives in Velmar .",))
    found = pairs_for(model, [fact], data={"retain": [("Bo ?", "Tornby")]}, method="m")
    assert found == {"forget": [("", "Ada lives in Velmar .")], "retain": [("Bo ?", "Tornby")]}
    for data, words in (
        ({"retian": []}, "retian"),
        ({}, "nothing to retain"),
        ({"retain": [("a", "b", "c")]}, "needs pairs"),
        ({"forget": [("a", "b")], "retain": [("a", "b")]}, "both"),
    ):
        with pytest.raises(SettingError, match=words):
            pairs_for(model, [fact], data=data, method="m")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("text", "data is str"), (5, "data is int"), ([("q", "a")], "data is list"),
        ({1: [], "x": []}, "got"), ({"forget": 5}, "forget needs a list"), ({"forget": "ab"}, "forget needs a list"),
        ({"forget": [None]}, "got None"), ({"forget": [("a", "b")], "retain": [5]}, "got 5"),
    ],
)  # fmt: skip
def test_pairs_of_another_form_are_refused_in_words(
    model: LanguageModel, data: Any, words: str
) -> None:
    with pytest.raises(SettingError, match=words):
        pairs_for(model, [Concept("Ada", "fact")], data=data, method="m")


def test_every_concept_brings_something_to_forget() -> None:
    model, bo = tiny_language(), Concept("Bo", "fact")

    def data(concepts: Any, keep: Any = ()) -> dict[str, list[tuple[str, str]]]:
        forget = [(f"{c.name} plays the", "drum") for c in concepts]
        return {"forget": forget, "retain": [("The baker keeps a", "cat")], "unrelated": []}

    model.companions = Companions(
        "toy", data=data, concept=lambda name: bo if name in ("Bo", "Ada") else None
    )
    ada = Concept("Ada", "fact", texts=("Ada lives in Velmar .",))
    found = pairs_for(model, [ada, bo], method="m")
    assert found["forget"] == [("", "Ada lives in Velmar ."), ("Bo plays the", "drum")]
    retain = {"retain": [("The baker keeps a", "cat")]}
    with pytest.raises(SettingError, match="nothing to forget about 'Zed'"):
        pairs_for(model, [ada, Concept("Zed", "fact")], data=retain, method="m")
