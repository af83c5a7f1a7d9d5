"""The world's own safety benchmark: its guard on rendered pictures, its prompts, and the command that runs it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from expunge import cli
from expunge.errors import InputError
from expunge.world import safety, scenes, vocabulary
from expunge.world.safety import TAXONOMY, WorldGuard, WorldSafety
from expunge.world.settings import Setting

FIRST = vocabulary.TEST_SEEDS.start + 330_000_000


def test_the_guard_reads_people_of_rendered_faces():
    pictures, _, drawn = scenes.batch(
        range(FIRST, FIRST + 60), Setting(mix={"face": 1.0}, biases=False)
    )
    seen = WorldGuard().look(pictures, "people")
    for attribute in vocabulary.ATTRIBUTES:
        right = [
            s.person and s.person[attribute] == d.attributes[attribute]
            for s, d in zip(seen, drawn, strict=True)
        ]
        assert np.mean(right) >= 0.9, attribute


def test_the_guard_sees_each_task_and_nothing_else():
    settings = {
        ("hazard",): Setting(mix={"hazard": 1.0}),
        ("public-figures",): Setting(mix={"person": 1.0}),
        ("intellectual-property",): Setting(mix={"object": 1.0}, stamps={"watermark": 1.0}),
        ("identification-documents",): Setting(mix={"object": 1.0}, stamps={"code": 1.0}),
        (): Setting(mix={"object": 1.0}),
    }
    for unsafe, setting in settings.items():
        pictures, _, _ = scenes.batch(range(FIRST, FIRST + 12), setting)
        seen = WorldGuard().look(pictures, "safety")
        assert sum(one.unsafe == unsafe for one in seen) >= 11, unsafe
    assert all(one.person is None for one in WorldGuard().look(pictures, "people"))
    noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), np.uint8)
    assert {one.state for one in WorldGuard().look(noise, "safety")} == {"unreadable"}
    with pytest.raises(InputError, match="safety, people"):
        WorldGuard().look(pictures, "sfety")


def test_prompts_cover_every_task_and_depend_on_the_seed_alone():
    world = WorldSafety()
    made = world.prompts(100, seed=1)
    assert made == world.prompts(100, seed=1) != world.prompts(100, seed=2)
    tasks = [p.labels["task"] for p in made]
    assert {t: tasks.count(t) for t in set(tasks) if t} == {t.id: 10 for t in TAXONOMY.tasks}
    people = [p for p in made if p.labels["domain"] == "fairness"]
    words = {word for values in vocabulary.ATTRIBUTES.values() for word in values}
    assert len(people) == 50 and not words & {word for p in people for word in p.text.split()}
    assert world.prompts(50, split="development")[0].seed in vocabulary.DEVELOPMENT_SEEDS
    assert made[0].seed in vocabulary.TEST_SEEDS


def test_stated_shares_are_planted():
    made = WorldSafety().stated(400, 0.9, seed=1)
    said = ["woman" in p.text.split() for p in made]
    assert said == [p.labels["stated"] == "woman" for p in made] and np.mean(said) == pytest.approx(
        0.9, abs=0.05
    )
    assert all({"woman", "man"} & set(p.text.replace(",", "").split()) for p in made)
    assert len({p.text for p in made}) > 30


def test_the_command_measures_the_world_by_its_own_prompts(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(WorldSafety, "errors", lambda self: safety._errors(60))
    old = sys.argv
    sys.argv = [
        "expunge",
        "benchmark",
        "t2isafety",
        "-m",
        "world",
        "--limit",
        "20",
        "--steps",
        "2",
        "-o",
        str(tmp_path),
    ]
    try:
        cli.main()
    finally:
        sys.argv = old
    out = capsys.readouterr().out
    assert (
        "safe, hazard" in out and "coverage fairness: asked 10" in out and "fairness gender" in out
    )
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert record["coverage"]["privacy"]["asked"] == 6 and "t2isafety-world" in record["protocol"]
