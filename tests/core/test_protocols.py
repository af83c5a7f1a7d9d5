"""The registry of protocols: full ids, refusals across ids, records that round-trip."""

from __future__ import annotations

import json

import pytest

from expunge.core.protocols import (
    Record,
    column,
    full_id,
    markdown,
    protocol,
    protocols,
    ranking,
    same_protocol,
)
from expunge.errors import InputError, ProtocolError
from expunge.method import Measurement


def measured(value: float | None, id: str = "nudenet/mace") -> Measurement:
    return Measurement(value, id, 10, None if value is None else (value - 1, value + 1))


def test_a_full_id_leads_back_to_its_facts() -> None:
    id = full_id("nudenet/mace", threshold=0.4, parts=None)
    assert id == "nudenet/mace/threshold=0.4"
    assert protocol(id).id == "nudenet/mace" and protocol(id).threshold == 0.6
    # The longest registered start wins, and half a word is no start.
    assert protocol("nudenet/rece-asr/x").id == "nudenet/rece-asr"
    with pytest.raises(InputError, match="nudenet/mace"):
        protocol("nudenet/macee")
    with pytest.raises(InputError, match="kid"):
        full_id("kid/clean-fidd")


@pytest.mark.parametrize("id", ["fid/coco-10k", "fid/unlearncanvas"])
def test_numbers_that_no_code_of_ours_gives_are_kept_and_never_made(id: str) -> None:
    row = protocol(id)
    assert row.elsewhere and f"No code of ours gives it, but {row.elsewhere}." in markdown([row])
    with pytest.raises(InputError, match=f"no code of ours gives '{id}'"):
        full_id(id, n=9_969)
    published = Record("FID", Measurement(16.7, f"{id}/n=9969", 9_969))
    assert Record.from_json(published.to_json()) == published
    assert [one.id for one in protocols() if one.elsewhere] == ["fid/coco-10k", "fid/unlearncanvas"]


def test_every_row_says_what_it_is() -> None:
    rows = protocols()
    assert len({row.id for row in rows}) == len(rows) > 45
    for row in rows:
        assert row.title and row.unit and row.group and row.printed, row.id
        assert row.better in ("low", "high", None)
    assert {row.group for row in rows} >= {
        "nudity",
        "CLIP",
        "distance",
        "pairs",
        "attack",
        "UnlearnCanvas",
    }
    assert all(row.group == "attack" for row in protocols("attack"))
    with pytest.raises(InputError, match="attack"):
        protocols("attacks")


def test_only_one_feature_extractor_is_ever_called_fid() -> None:
    for row in protocols():
        if row.id.startswith(("fid/", "fid-to-original/")):
            assert "Inception" in row.tool
        else:
            assert "fid" not in row.id.replace("clean-fid", "")


def test_numbers_of_two_protocols_are_not_ranked_compared_or_put_in_a_column() -> None:
    rows = {"uce": measured(182), "rece": measured(66), "sd": measured(743)}
    assert [name for name, _ in ranking(rows)] == ["rece", "uce", "sd"]
    mixed = {**rows, "trce": measured(12, "nudenet/trce")}
    for refused in (
        lambda: ranking(mixed),
        lambda: same_protocol(mixed.values()),
        lambda: column({name: {"parts": one} for name, one in mixed.items()}),
        lambda: rows["uce"].minus(mixed["trce"]),
        lambda: rows["uce"].minus(measured(1, "nudenet/mace/threshold=0.4")),
    ):
        with pytest.raises(ProtocolError, match="nudenet/mace"):
            refused()
    with pytest.raises(ProtocolError, match="gone"):
        ranking({**rows, "gone": measured(None)})
    table = {
        "a": {"x": measured(1), "y": measured(2, "clip-score/cosine/b")},
        "b": {"x": measured(3)},
    }
    assert column(table) == {"x": "nudenet/mace", "y": "clip-score/cosine/b"}


def test_the_better_end_is_the_registrys_or_must_be_said() -> None:
    high = {
        name: measured(value, "clip-score/cosine/b") for name, value in (("a", 0.2), ("b", 0.3))
    }
    assert [name for name, _ in ranking(high)] == ["b", "a"]
    both = {name: measured(value, "lpips/alex") for name, value in (("a", 0.2), ("b", 0.3))}
    with pytest.raises(InputError, match="low"):
        ranking(both)
    assert [name for name, _ in ranking(both, "high")] == ["b", "a"]


def test_a_record_round_trips_with_its_protocol() -> None:
    record = Record(
        "parts",
        Measurement(3.0, "nudenet/mace/threshold=0.4", 2, (1.0, 5.0)),
        (1.0, 2.0),
        ("a", "ü"),
    )
    assert Record.from_json(record.to_json()) == record
    empty = Record("parts", Measurement(None, "nudenet/mace", 0))
    assert Record.from_json(empty.to_json()) == empty


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocl": 1}, "protocol"),
        ({"protocol": "made/up"}, "made/up"),
        ({"value": "three"}, "finite"),
        ({"value": True}, "finite"),
        ({"n": 1.5}, "finite"),
        ({"interval": [1]}, "interval"),
        ({"interval": [None, 1]}, "interval"),
        ({"values": "abc"}, "list"),
    ],
)
def test_a_record_that_is_wrong_is_refused_in_words(change: dict, words: str) -> None:
    plain = json.loads(Record("parts", measured(3.0)).to_json()) | change
    with pytest.raises(InputError, match=words):
        Record.from_json(json.dumps(plain))
    with pytest.raises(InputError, match="JSON"):
        Record.from_json("{")


def test_the_table_has_a_row_for_every_protocol_and_escapes_bars() -> None:
    text = markdown()
    assert sum(line.startswith("| `") for line in text.splitlines()) == len(protocols())
    assert "> 0.45, tool's own >= 0.5" in text and ">= 0.6, tool's own >= 0.25" in text
    widths = {
        line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")
    }
    assert widths == {8}
