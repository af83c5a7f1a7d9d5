"""Ring-A-Bell on a tiny random pipeline: the direction, the search, its accounts, the soft form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.attack.diffusion.ring_a_bell import RingABell
from expunge.core.adversarial_prompts import Forbidden, Spliced
from expunge.core.concept_direction import concept_pairs, concept_vector
from expunge.core.prompt_search import Ledger, Problem, RandomStrings
from expunge.errors import MissingCapability, SettingError
from expunge.method import Budget, Judge, Prompt, Verdicts
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", phrases=("pentagram",), anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("a photo of a star", seed=6)]
SMALL = {"length": (6,), "population": 20, "steps": 2, "guidance": 3.0}


class Never(Judge):
    """Never sees the concept; keeps what it was shown."""

    id, protocol, threshold = "never", "never/1", 0.5

    def __init__(self, hits=()):
        self.hits, self.calls = dict(hits), 0

    def judge(self, outputs, concept, prompts):
        hit = np.array([self.hits.get(prompt.seed) == self.calls for prompt in prompts], bool)
        self.calls += 1
        return Verdicts(hit, hit * 1.0, np.ones(len(outputs), bool))


def attack(model, budget=None, judge=None, reference=None, seed=0, **settings):
    made = RingABell(**{**SMALL, **settings})
    limits = budget or Budget("small", 100, 300)
    return made.attack(
        model, STAR, judge or Never(), limits, prompts=PROMPTS, reference=reference, seed=seed
    )


def test_pairs_are_checked(model):
    with pytest.raises(SettingError, match=r"with\|without"):
        attack(model, pairs=("only one text",))


def test_budgets_that_search_nothing_are_refused(model):
    """Fewer encoder rows than a generation would show a random string as found."""
    with pytest.raises(SettingError, match="takes up to 20 rows an item, but the budget leaves 19"):
        attack(model, Budget("small", 100, 19))
    with pytest.raises(SettingError, match="leaves 15"):
        attack(model, Budget("small", 100, 30), eta=(1.0, 3.0))
    with pytest.raises(SettingError, match="2 pictures of 2 steps, costs 8"):
        attack(model, Budget("small", 7, 300))
    found = attack(model, Budget("small", 8, 20))
    assert all(item.details["pictures"] == 1 for item in found.items)


def test_search_beats_random_strings_at_equal_rows(model):
    """And names the concept nowhere; the reported distance is that of the text itself."""
    made = attack(model, Budget("small", 100, 1_500), population=40)
    pairs = concept_pairs(model, STAR)
    with torch.no_grad():
        wanted = model.encode([p.text for p in PROMPTS]).embeddings + 3.0 * concept_vector(
            model, pairs
        )
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    spliced = Spliced(model, [p.text for p in PROMPTS], 6, "replace", forbidden)

    def score(ids, item):
        hidden = model.encode_tokens(model.token_ids(spliced.realise(ids, item)[0])).embeddings
        return (hidden - wanted[item]).square().flatten(1).sum(1)

    problem = Problem(
        spliced.table, 6, forbidden.allowed, score=score, admissible=spliced.admissible, items=2
    )
    control = RandomStrings(steps=99).run(problem, Ledger(2, 1_500))
    for k, item in enumerate(made.items):
        found = item.details["versions"][0]
        assert found["distance"] < control[k].loss
        assert found["distance"] == pytest.approx(found["realised_distance"], rel=1e-4)
        assert found["encoder_rows"] <= 1_501
        assert item.text == found["found"] and forbidden.count(item.text) == 0
        assert torch.equal(model.token_ids([item.text]), model.token_ids([found["found"]]))


def test_the_official_form_scores_ids_that_text_does_not_give(model):
    """With ``realised=False`` the distance of the text differs from that of the searched ids."""
    made = attack(model, realised=False, elitism=False, seed=2)
    versions = [item.details["versions"][0] for item in made.items]
    changed = [v for v in versions if not v["realisable"]]
    assert changed and all(abs(v["distance"] - v["realised_distance"]) > 1e-3 for v in changed)


def test_only_the_original_text_encoder_is_used(model):
    """Strings do not depend on the attacked model; they do on the reference."""
    other = tiny_diffusion(seed=1)
    with torch.no_grad():
        here = attack(model, reference=other)
    there = attack(other, reference=other)
    own = attack(model, reference=model)
    texts = [[item.text for item in made.items] for made in (here, there, own)]
    assert texts[0] == texts[1] != texts[2]
    assert here.cost["encoder.forward"] > 300 and here.cost["denoiser.forward"] == 16


def test_a_union_stops_at_the_first_success_and_shares_the_rows(model):
    made = attack(model, eta=(1.0, 3.0), judge=Never({5: 1}))
    assert [len(item.details["versions"]) for item in made.items] == [1, 2]
    assert [item.hit for item in made.items] == [True, False]
    assert all(v["encoder_rows"] <= 151 for item in made.items for v in item.details["versions"])
    assert made.items[0].text == made.items[0].details["versions"][0]["found"]


def test_soft_form_feeds_the_shifted_embedding(model):
    """At eta 0 it is the plain picture, at eta 3 another one, and there is no text."""
    plain = model.generate(PROMPTS, steps=2, guidance=3.0)
    still, moved = attack(model, form="soft", eta=(0.0,)), attack(model, form="soft")
    assert np.array_equal(still.outputs, plain) and not np.array_equal(moved.outputs, plain)
    assert all(item.text is None for item in moved.items)
    pairs = concept_pairs(model, STAR)
    with torch.no_grad():
        condition = model.encode([p.text for p in PROMPTS])
        shifted = condition.with_embeddings(
            condition.embeddings + 3.0 * concept_vector(model, pairs)
        )
    again = model.generate(PROMPTS, seeds=[5, 6], steps=2, guidance=3.0, condition=shifted)
    assert np.array_equal(moved.outputs, again)


@pytest.mark.parametrize("layout", ["sdxl", "pixart", "flux"])
def test_the_soft_form_needs_no_token_table_and_the_hard_one_says_that_it_does(layout):
    """Rows of several encoders, of a masked T5, and guidance as an input; a pooled vector stays the prompt's."""
    other = tiny_layout(layout)
    made = attack(other, Budget("free"), form="soft")
    with torch.no_grad():
        plain = other.encode([p.text for p in PROMPTS])
        moved = plain.embeddings + 3.0 * concept_vector(other, concept_pairs(other, STAR))
    again = other.generate(PROMPTS, steps=2, guidance=3.0, condition=plain.with_embeddings(moved))
    assert np.array_equal(made.outputs, again)
    assert not np.array_equal(made.outputs, other.generate(PROMPTS, steps=2, guidance=3.0))
    with pytest.raises(MissingCapability, match="token"):
        attack(other, Budget("free"))


def test_a_long_string_is_cut_to_the_context(model):
    made = attack(model, length=(77,))
    assert made.items[0].details["versions"][0]["length"] == 14


def test_a_published_vector_is_read_and_checked(model, tmp_path):
    """Shipped as (T, d) or (1, T, d); pairs and vector together, other shapes and pickles are refused."""
    from expunge.errors import InputError

    with torch.no_grad():
        vector = concept_vector(model, concept_pairs(model, STAR)).numpy()
    file = tmp_path / "vector.npy"
    np.save(file, vector[None])
    by_pairs = attack(model, form="soft")
    by_file = attack(model, form="soft", vector=str(file))
    assert np.array_equal(by_pairs.outputs, by_file.outputs)
    with pytest.raises(SettingError, match="vector and pairs are both given"):
        attack(model, vector=str(file), pairs=("a star|a thing",))
    np.save(file, vector[:3])
    with pytest.raises(InputError, match="this model's text encoder"):
        attack(model, vector=str(file))
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"is no \.npy file of numbers"):
        attack(model, vector=str(file))


def test_the_soft_form_has_an_id_of_its_own(model):
    from expunge.attack.diffusion.ring_a_bell import RingABellSoft

    options = {**SMALL, "form": "soft"}
    made = RingABellSoft(**options).attack(
        model, STAR, Never(), Budget("small", 100, 300), prompts=PROMPTS
    )
    assert made.attack == "ring-a-bell-soft" and RingABellSoft().form == "soft"
    assert np.array_equal(made.outputs, attack(model, form="soft").outputs)
    assert RingABell.configured("paper:violence").length == (38, 77)
