"""Outputs in batches, each made once, under a name that says everything that can change it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from expunge.core.sampling import (
    SHARED,
    OutputCache,
    as_prompts,
    expand,
    output_key,
    outputs,
    pictures,
    prompts_digest,
    remembered,
)
from expunge.errors import PromptError
from expunge.method import Control, Prompt
from expunge.models.base import Model
from expunge.testing import tiny_diffusion


class Echo(Model):
    """A picture whose values are the seed, the weight and the steps; it counts what it makes."""

    family: ClassVar[str] = "diffusion"
    capabilities: ClassVar[frozenset[str]] = frozenset({"generate"})

    def __init__(self, weight: float = 1.0, steps: int = 2) -> None:
        super().__init__("echo")
        self.layer = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.layer.weight.fill_(weight)
        self.steps, self.made, self.batches = steps, 0, []

    def parts(self) -> Mapping[str, nn.Module]:
        return {"unet": self.layer}

    def generate(
        self, prompts: Any, *, seeds: Any = None, steps: int | None = None, **options: Any
    ) -> Any:
        self.made += len(prompts)
        self.batches.append(len(prompts))
        weight = int(self.layer.weight.item())
        return np.array([[[[seed % 251, weight, steps or self.steps]]] for seed in seeds], np.uint8)


PROMPTS = [Prompt("a", 1), Prompt("b", 2), Prompt("a", 1), Prompt("a", 3)]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_order_is_kept_and_equal_requests_are_made_once(batch: int) -> None:
    model = Echo()
    made = outputs(model, PROMPTS, batch=batch)
    assert made[:, 0, 0, 0].tolist() == [1, 2, 1, 3]
    assert model.made == 3 and max(model.batches) <= batch


def test_what_can_change_an_output_is_in_its_name() -> None:
    cache = OutputCache()
    model = Echo()
    first = outputs(model, PROMPTS, cache=cache)
    again = outputs(model, PROMPTS[::-1], cache=cache)
    assert model.made == 3 and (again == first[::-1]).all()
    outputs(model, PROMPTS, cache=cache, steps=5)
    assert model.made == 6
    model.steps = 9  # the model's own default counts, though nobody named it
    assert outputs(model, PROMPTS[:1], cache=cache)[0, 0, 0, 2] == 9
    other = Echo(weight=7)
    assert outputs(other, PROMPTS[:1], cache=cache)[0, 0, 0, 1] == 7
    names = [output_key("s", p, {}) for p in (Prompt("a", 1), Prompt("a", 2), Prompt("b", 1))]
    assert (
        len(
            {*names, output_key("t", Prompt("a", 1), {}), output_key("s", Prompt("a", 1), {"k": 1})}
        )
        == 5
    )


def test_a_prompts_own_guidance_is_in_its_name_and_goes_with_it() -> None:
    own = Prompt("a", 1, guidance=3.0)
    shared = {"guidance": 7.5}
    assert output_key("s", own, shared) != output_key("s", Prompt("a", 1), shared)
    assert output_key("s", own, shared) == output_key("s", Prompt("a", 1), {"guidance": 3.0})
    assert [p.guidance for p in expand([own], 2)] == [3.0, 3.0]
    assert own.guided(7.5) == 3.0 and Prompt("a", guidance=0.0).guided(7.5) == 0.0


def test_another_scheduler_or_tokenizer_is_another_picture() -> None:
    cache, model = OutputCache(), tiny_diffusion()
    asked = [Prompt("a red star", 1)]
    first = outputs(model, asked, cache=cache, steps=2)
    assert (outputs(model, asked, cache=cache, steps=2) == first).all() and cache.misses == 1
    config = model.pipeline.scheduler.config
    model.pipeline.scheduler = DDPMScheduler.from_config(config, prediction_type="v_prediction")
    second = outputs(model, asked, cache=cache, steps=2)
    assert cache.misses == 2 and (second != first).any()
    model.tokenizer.add_tokens(["star"])
    outputs(model, asked, cache=cache, steps=2)
    assert cache.misses == 3


def test_a_list_of_prompts_has_a_name() -> None:
    one = [Prompt("a", 1, "star", {"colour": "red"}), Prompt("b", 2)]
    others = [one[::-1], one[:1], [Prompt("a", 1, "star", {"colour": "blue"}), Prompt("b", 2)]]
    assert prompts_digest(one) == prompts_digest(list(one))
    assert len({prompts_digest(p) for p in (one, *others)}) == 4


def test_outputs_under_a_control_are_never_kept() -> None:
    cache, model = OutputCache(), Echo()
    with model.controlled(Control()):
        outputs(model, PROMPTS, cache=cache)
    assert len(cache) == 0
    outputs(model, PROMPTS, cache=cache)
    assert len(cache) == 3


def test_a_cached_picture_cannot_be_changed_by_accident() -> None:
    cache, model = OutputCache(), Echo()
    outputs(model, PROMPTS, cache=cache)[:] = 0
    assert outputs(model, PROMPTS, cache=cache)[0, 0, 0, 0] == 1


def test_another_process_finds_them_in_the_folder(tmp_path: Any) -> None:
    outputs(Echo(), PROMPTS, cache=OutputCache(tmp_path))
    fresh = Echo()
    assert outputs(fresh, PROMPTS, cache=OutputCache(tmp_path)).shape == (4, 1, 1, 3)
    assert fresh.made == 0
    assert all(f.suffix == ".npz" for f in tmp_path.rglob("*") if f.is_file())


def test_a_search_that_is_remembered_says_what_it_cost() -> None:
    model, asked = Echo(), []

    def search(new: list[int]) -> list[str]:
        asked.append(new)
        model.cost.add("encoder", 10 * len(new))
        return [f"found {k}" for k in new]

    assert remembered(["a", "b"], search, model) == ["found 0", "found 1"]
    assert not SHARED.recalled
    assert remembered(["b", "c"], search, model) == ["found 1", "found 1"]
    assert asked == [[0, 1], [1]] and SHARED.recalled["encoder.forward"] == 10
    SHARED.clear(searches=False)
    assert not SHARED.recalled
    remembered(["a", "c"], search, model)
    assert len(asked) == 2 and SHARED.recalled["encoder.forward"] == 20
    SHARED.clear()
    remembered(["a"], search, model)
    assert asked[2:] == [[0]] and not SHARED.recalled


def test_seeds_of_a_prompt_meet_no_other_prompts_seeds() -> None:
    found = expand([Prompt("a", 0), Prompt("b", 1)], 3)
    assert [p.text for p in found] == ["a", "a", "a", "b", "b", "b"]
    assert len({p.seed for p in found}) == 6 and found[0].seed == 0


def test_progress_counts_to_the_end() -> None:
    seen: list[tuple[int, int]] = []
    pictures(Echo(), ["a", "b", "c"], batch=2, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(2, 3), (3, 3)]


@pytest.mark.parametrize("bad", [[], [""], [3]])
def test_nothing_to_ask_is_refused(bad: list[Any]) -> None:
    with pytest.raises(PromptError):
        as_prompts(bad)
    with pytest.raises(PromptError):
        expand([Prompt("a")], 0)
