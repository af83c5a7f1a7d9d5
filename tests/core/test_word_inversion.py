"""Free words: their place in a prompt, how they learn, and the file that diffusers reads."""

from __future__ import annotations

import pytest
import torch

from expunge import Concept
from expunge.core.word_inversion import (
    FreePrompts,
    export_word,
    fitting,
    initial_word,
    learn_word,
    placed,
    random_word,
    save_word,
    token_for,
    with_place,
)
from expunge.errors import InputError, NonFiniteError, PromptError, SettingError
from expunge.method import Attempt, Attempts, Prompt
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("heart",))
TEXTS = ["a photo of a {}", "{}", "a red {} of a blue square", "{} circle {}"]


def drawn(count: int, width: int = 32) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_free_word_is_read_as_a_token_of_its_own_that_diffusers_loads(tmp_path, tokens):
    model, vectors = tiny_diffusion(), drawn(tokens)
    prompts = FreePrompts(model, TEXTS, tokens)
    with torch.no_grad():
        found = prompts.encode(vectors.expand(len(TEXTS), -1, -1), torch.arange(len(TEXTS)))
    path = tmp_path / "word.safetensors"
    save_word(path, "<star>", vectors)
    pipeline = tiny_diffusion().pipeline
    pipeline.load_textual_inversion(tmp_path, weight_name=path.name)
    spoken = pipeline.maybe_convert_prompt([t.format(*["<star>"] * 2) for t in TEXTS], pipeline.tokenizer)  # fmt: skip
    ids = pipeline.tokenizer(
        spoken, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        wanted = pipeline.text_encoder(ids)[0]
    torch.testing.assert_close(found.embeddings, wanted, rtol=1e-4, atol=1e-5)


def test_the_rows_of_a_name_in_its_place_are_the_prompt_itself():
    model = tiny_diffusion()
    rows = initial_word(model, "star", 1)
    with torch.no_grad():
        found = FreePrompts(model, ["a red {} of a circle"], 1).encode(rows[None], torch.tensor([0]))  # fmt: skip
        wanted = model.encode("a red star of a circle")
    assert torch.equal(found.embeddings, wanted.embeddings)


def test_gradients_reach_the_word_from_every_place():
    model = tiny_diffusion(dtype=torch.float64)
    prompts = FreePrompts(model, ["{} circle {}"], 1)
    word = drawn(1).double().requires_grad_(True)
    goal = drawn(16).double()

    def value(vectors):
        made = prompts.encode(vectors[None], torch.tensor([0])).embeddings
        return (made * goal).sum()

    (slope,) = torch.autograd.grad(value(word), word)
    step = torch.zeros_like(word)
    step[0, 3] = 1e-6
    with torch.no_grad():
        rise = (value(word + step) - value(word - step)) / 2e-6
    assert float(slope[0, 3]) == pytest.approx(float(rise), rel=1e-4)


def test_where_the_word_stands():
    assert with_place("a red Star, a heart", STAR.names) == "a red {}, a {}"
    assert with_place("nothing of it", STAR.names) == "{} nothing of it"
    assert with_place("a {} star", STAR.names) == "a   {}"
    model = tiny_diffusion()
    long = "a " * 14 + "star"
    assert placed(model, long, STAR, 1) == "{} " + long
    assert placed(model, "a star", STAR, 1) == "a {}"
    assert fitting(model, ["a {}", long.replace("star", "{}")], 1) == ["a {}"]
    assert fitting(model, [long.replace("star", "{}")], 1) == ["{}"]
    with pytest.raises(PromptError, match="beyond the 16 tokens"):
        FreePrompts(model, [long.replace("star", "{}")], 1)
    with pytest.raises(PromptError, match="no place"):
        FreePrompts(model, ["a star"], 1)


def test_learning_is_adamw_on_the_mean_gradient():
    start, goal = drawn(1), drawn(3)[2:]
    seen = []
    word = learn_word(
        lambda update, part, v: ((v - goal) * (1 + part)).square().sum(), start, updates=3, lr=0.1,
        weight_decay=0.5, accumulate=2, after=lambda number, v: seen.append((number, v)),
    )  # fmt: skip
    weight = torch.nn.Parameter(start.clone())
    optimiser = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        ((weight - goal).square().sum() * (1 + 4) / 2).backward()
        optimiser.step()
    torch.testing.assert_close(word.vectors, weight.detach())
    assert [number for number, _ in seen] == [1, 2, 3] and torch.equal(seen[-1][1], word.vectors)
    assert len(word.losses) == 3 and word.losses[0] > word.losses[2]
    assert torch.equal(start, drawn(1))
    with pytest.raises(NonFiniteError, match="update 1"):
        learn_word(lambda *a: (a[2] * float("nan")).sum(), start, updates=1, lr=0.1)


def test_starts():
    model = tiny_diffusion()
    table = model.token_table()
    ids = model.tokenizer("red circle", add_special_tokens=False).input_ids
    torch.testing.assert_close(initial_word(model, "red circle", 2)[1], table[ids].mean(0))
    random = random_word(model, 2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(random.norm(dim=1), table.norm(dim=1).mean().expand(2))
    with pytest.raises(SettingError, match="no token"):
        initial_word(model, "", 1)


def test_export(tmp_path):
    def made(details):
        item = Attempt(Prompt("a star"), False, False, 0.0, None, details)
        return Attempts("x", 1, {}, True, "b", "j", 0.5, 0, (item,), [], {})

    word = {"token": token_for(Concept("Mira Solen")), "vectors": [[0.5, 1.0]]}
    assert export_word(made({"word": word}), tmp_path / "a.safetensors") == "<mira-solen>"
    from safetensors.torch import load_file

    (row,) = load_file(tmp_path / "a.safetensors").values()
    assert row.tolist() == [0.5, 1.0]
    with pytest.raises(InputError, match="no learnt word"):
        export_word(made({}), tmp_path / "b.safetensors")
    for token in ("", "two words", "__metadata__"):
        with pytest.raises(InputError, match="cannot be a token"):
            save_word(tmp_path / "c.safetensors", token, drawn(1))
