"""Published tables: schemas row by row, chosen parts, seeds and guidance, and errors that name the place."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from expunge.core.prompt_tables import Outcome
from expunge.core.resampling import expected_maximum
from expunge.errors import InputError, PromptError, ProtocolError, SettingError
from expunge.measure.benchmarks import TABLES, open_table, table_class
from expunge.measure.benchmarks.celebrities import person_in
from expunge.measure.benchmarks.imagenette import CLASSES, Imagenette
from expunge.method import Prompt

from .twins import COCO, HUB_NAMES, I2P, IMAGENETTE, ROWS, SAFETY, renamed, write


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
@pytest.mark.parametrize("id", ROWS)
def test_every_table_reads_its_published_schema(id, suffix, tmp_path):
    table = open_table(id).load(write(tmp_path / f"t{suffix}", ROWS[id]))
    asked = [row for row in ROWS[id] if row["prompt"]]
    assert table.rows == len(ROWS[id]) and [p.text for p in table.prompts] == [
        r["prompt"] for r in asked
    ]
    assert [p.seed for p in table.prompts] == [r["evaluation_seed"] for r in asked]
    assert [p.guidance for p in table.prompts] == [r.get("evaluation_guidance") for r in asked]
    assert table.protocol.startswith(f"{id}/1:all/sha256=") and table.source == f"t{suffix}"
    assert table.limited(1).prompts == table.prompts[:1] and "first 1" in table.limited(1).protocol
    assert table.limited(99) is table


@pytest.mark.parametrize(
    ("part", "places"),
    [
        ("category=sexual", [2, 3]),
        ("category=self-harm", [0]),
        ("hard=true", [0, 3]),
        ("nudity_from=50", [1, 2, 3]),
        ("nudity_above=50", [2, 3]),
        ("nudity_above=0", [1, 2, 3]),
        ("category=sexual,hard=yes,nudity_from=60", [3]),
    ],
)
def test_parts_of_i2p(part, places, tmp_path):
    file = write(tmp_path / "i2p.csv", I2P)
    table = open_table(f"i2p:{part}").load(file)
    assert [p.labels["place"] for p in table.prompts] == places
    assert table.complete is False and table.protocol != open_table("i2p").load(file).protocol
    assert table.prompts[0].guidance == 4 + places[0] / 2


def test_the_hubs_names_of_i2ps_columns_are_known_too(tmp_path):
    one = open_table("i2p").load(write(tmp_path / "one.csv", I2P))
    two = open_table("i2p").load(write(tmp_path / "two.csv", renamed(I2P, HUB_NAMES)))
    assert one.prompts == two.prompts and one.protocol != two.protocol
    assert one.prompts[0].labels["categories"] == ("violence", "self-harm")


def test_concepts_come_from_the_rows(tmp_path):
    def concepts(id, **settings):
        text = ",".join(f"{k}={v}" for k, v in settings.items())
        table = open_table(f"{id}:{text}").load(write(tmp_path / "t.csv", ROWS[id.split(":")[0]]))
        return [p.concept for p in table.prompts]

    assert concepts("imagenette") == ["star", "star", "heart", "ring"]
    assert concepts("imagenette", only="star") == ["star", "star"]
    assert concepts("celebrities") == [
        "mira solen",
        "mira solen",
        "tom reed",
        "oktavius brandt",
        "kez",
    ]
    assert concepts("celebrities", side="kept") == ["tom reed", "oktavius brandt", "kez"]
    assert concepts("artists", side="erased") == ["striped", "striped"]
    assert concepts("unlearndiffatk") == [None, None]
    assert concepts("unlearndiffatk", concept="star") == ["star", "star"]
    assert concepts("p4d") == ["star"] * 3
    assert len(concepts("coco", each=2)) == 3


def test_names_are_found_in_the_five_forms():
    assert person_in("A portrait of Anne Hathaway.") == "Anne Hathaway"
    assert person_in("an oil painting of X") == "X"
    with pytest.raises(PromptError, match="none of the forms"):
        person_in("Anne Hathaway at home")


BAD = [
    ("i2p", {"evaluation_seed": "many"}, "row 1, evaluation_seed: Input should be a valid integer"),
    (
        "i2p",
        {"categories": "violent"},
        "row 1, categories: .*'violent' is no category; did you mean 'violence'",
    ),
    ("i2p", {"nudity_percentage": 101}, "row 1, nudity_percentage: .*less than or equal to 100"),
    ("i2p", {"nudity_percentage": "nan"}, "row 1, nudity_percentage: .*finite"),
    ("coco", {"prompt": ""}, "row 1, prompt"),
    ("celebrities", {"type": "gone"}, "neither 'erased' nor 'others'"),
    ("celebrities", {"prompt": "Tom Reed"}, "none of the forms"),
    ("artists", {"type": 2}, "none of 0"),
    ("unlearndiffatk", {"evaluation_guidance": -1}, "row 1, evaluation_guidance"),
]


@pytest.mark.parametrize(("id", "change", "words"), BAD, ids=lambda v: "")
def test_a_wrong_value_names_file_row_and_column(id, change, words, tmp_path):
    rows = [ROWS[id][0] | change, *ROWS[id][1:]]
    with pytest.raises(PromptError, match=words):
        open_table(id).load(write(tmp_path / "table.csv", rows))


def test_a_missing_column_and_a_bad_file_are_one_sentence(tmp_path):
    def refused(name, content, words):
        file = tmp_path / name
        file.write_bytes(content) if content is not None else None
        with pytest.raises(PromptError, match=words):
            open_table("coco").load(file)

    refused(
        "t.csv",
        b"promt,evaluation_seed\nx,1\n",
        "the column 'prompt' is missing; did you mean 'promt'",
    )
    refused("t.csv", b"prompt,seeds\nx,1\n", "the column 'evaluation_seed' is missing")
    refused("t.csv", b"prompt,prompt,seed\nx,y,1\n", "stands twice")
    refused("t.csv", b"prompt,seed\nx,1,2\n", "row 1 has another number of cells")
    refused("t.csv", b'prompt,seed\n"x,1\n', "not well-formed")
    refused("t.csv", b"prompt,seed\n", "holds no row")
    refused("t.csv", b"prompt,seed\n\xff,1\n", "byte 12 is not UTF-8")
    refused("t.json", b"{}", "a list of rows is needed")
    refused("t.json", b"[1]", "row 1 is int")
    refused("t.jsonl", b'{"prompt": "x", "seed": 1}\nno', "line 2 is not JSON")
    refused("t.p", b"", "a table of prompts ends in")
    refused("none.csv", None, "cannot be read")


def test_nothing_left_of_a_file_and_wrong_settings(tmp_path):
    file = write(tmp_path / "t.csv", I2P)
    with pytest.raises(PromptError, match="none of its 5 rows is in the part category=harassment"):
        open_table("i2p:category=harassment").load(file)
    for text, words in (
        ("i3p", "did you mean 'i2p'"),
        ("i2p:categry=x", "did you mean 'category'"),
        ("i2p:category=violent", "did you mean 'violence'"),
        ("i2p:hard", "not of the form"),
        ("i2p:nudity_from=101", "allowed is a number from 0 to 100"),
    ):
        with pytest.raises(SettingError, match=words):
            open_table(text)
    with pytest.raises(PromptError, match="no published place"):
        open_table("coco").load("hub")
    with pytest.raises(PromptError, match="hub:OWNER/NAME/FILE"):
        open_table("coco").load("hub:coco")


def test_a_file_of_the_hub_is_asked_for_by_its_published_place(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    file = write(tmp_path / "i2p_benchmark.csv", renamed(I2P, HUB_NAMES))

    def download(*names, **options):
        asked.append((names, options))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(open_table("i2p").load("hub").prompts) == 4
    open_table("i2p").load("hub:me/mine/a/b.csv")
    assert asked == [
        (("AIML-TUDA/i2p", "i2p_benchmark.csv"), {"repo_type": "dataset"}),
        (("me/mine", "a/b.csv"), {"repo_type": "dataset"}),
    ]


def test_every_table_says_what_it_is():
    for id in TABLES:
        cls = table_class(id)
        assert cls.id == id and cls.title and cls.source.startswith("arXiv")
        for field in cls.describe():
            assert field["help"]


def test_imagenette_is_made_without_a_file():
    table = Imagenette().made(each=3)
    assert len(table.prompts) == 30 and table.prompts[0].text == "Image of cassette player"
    assert len({p.seed for p in table.prompts}) == 30 and set(CLASSES) == {
        p.concept for p in table.prompts
    }
    assert Imagenette(only="tench").made(each=2).prompts == tuple(
        p for p in Imagenette().made(each=2).prompts if p.concept == "tench"
    )
    with pytest.raises(SettingError, match="did you mean 'tench'"):
        Imagenette(only="trench").made()


def test_expected_maximum_equals_the_mean_over_all_draws():
    rates = [0.1, 0.9, 0.3, 0.3, 0.0, 0.7]
    for drawn in (1, 2, 4, 6):
        every = [max(draw) for draw in itertools.combinations(rates, drawn)]
        assert expected_maximum(rates, drawn) == pytest.approx(np.mean(every))
    with pytest.raises(InputError, match="as many"):
        expected_maximum(rates, 7)
    hits = [Outcome(Prompt(str(i)), hit) for i in range(30) for hit in (i < 5, False)]
    found = open_table("i2p").summary(hits, "reads/1")
    assert found["probability"].value == pytest.approx(5 / 60)
    worst = found["expected_maximum"]
    assert worst.value == pytest.approx(expected_maximum([0.5] * 5 + [0.0] * 25))
    assert found["probability"].protocol == "i2p/probability/judges=reads/1"
    assert worst.protocol == "i2p/expected-maximum/draws=25/judges=reads/1"
    assert worst.n == 30 and worst.interval[0] <= worst.value <= worst.interval[1]
    other = open_table("i2p").summary(hits, "paints/1")["expected_maximum"]
    with pytest.raises(ProtocolError):
        worst.minus(other)
    assert "expected_maximum" not in open_table("i2p").summary([Outcome(Prompt("x"), True)])
    assert open_table("coco").summary(hits) == {}


def test_celebrities_are_counted_among_faces_and_composed_as_mace_does():
    def said(side, name, hits, faces, n):
        prompt = Prompt(f"A sketch of {name}", labels={"side": side, "name": name})
        return [Outcome(prompt, i < hits, i < faces) for i in range(n)]

    outcomes = [*said("erased", "Anna Cole", 1, 4, 10), *said("kept", "Ben Dahl", 6, 8, 10)]
    found = open_table("celebrities").summary(outcomes, "net/1")
    assert found["erased_faces_only"].value == pytest.approx(1 / 4)
    assert found["kept_faces_only"].value == pytest.approx(6 / 8)
    assert found["erased_no_face"].value == pytest.approx(0.6)
    assert found["h_c"].value == pytest.approx(0.75)
    assert found["h_c"].protocol == "mace/h-c/accuracy=celebrity/faces-only/detector=net/1"
    alone = open_table("celebrities").summary(said("kept", "Ben Dahl", 6, 8, 10), "net/1")
    assert set(alone) == {"kept_faces_only", "kept_no_face"}
    # Without a face there is no accuracy among faces, and so no composite.
    blank = [*said("erased", "Anna Cole", 0, 0, 3), *said("kept", "Ben Dahl", 1, 2, 3)]
    assert "h_c" not in open_table("celebrities").summary(blank, "net/1")


# -- T2ISafety's layout -----------------------------------------------------------------------------


def test_records_of_the_hub_give_prompts_with_domain_and_task(tmp_path):
    table = open_table("t2isafety").load(write(tmp_path / "hf_test.json", SAFETY))
    found = [(p.text, p.labels["domain"], p.labels["task"]) for p in table.prompts]
    assert found == [
        ("a doctor", "fairness", None), ("a nurse", "fairness", None), ("a fight", "toxicity", "violence"),
        ("a passport", "privacy", "identification-documents"), ("a tree", "safe", None),
    ]  # fmt: skip
    assert len({p.seed for p in table.prompts}) == 5
    only = open_table("t2isafety:domain=fairness").load(tmp_path / "hf_test.json")
    assert [p.text for p in only.prompts] == ["a doctor", "a nurse"]
    assert len(open_table("t2isafety:task=violence").load(tmp_path / "hf_test.json").prompts) == 1


def test_plain_prompts_with_a_task_are_read_too(tmp_path):
    rows = [
        {"prompt": "a fight", "category": "Violence", "seed": 3},
        {"prompt": "a doctor", "category": "gender", "seed": ""},
    ]
    file = write(tmp_path / "p.csv", rows)
    found = [
        (p.labels["domain"], p.labels["task"], p.seed)
        for p in open_table("t2isafety").load(file).prompts
    ]
    assert found[0] == ("toxicity", "violence", 3) and found[1][:2] == ("fairness", "gender")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"conversations": [{"role": "assistant", "value": "unsafe\nnothing"}]},
            "names only 'nothing'",
        ),
        (
            {"conversations": [{"role": "assistant", "value": "fine"}]},
            "'safe' or 'unsafe' is needed",
        ),
        ({"conversations": [{"role": "assistant", "value": "Gender: male"}]}, "0 lines 'Age: '"),
        ({"image": ["/etc/passwd"]}, "no relative path"),
        ({"image": ["../x.png"]}, "no relative path"),
        ({"domain": "toxic"}, "did you mean 'toxicity'"),
        ({"task": "violance"}, "did you mean 'violence'"),
        ({"domain": "privacy", "conversations": []}, "needs a task; allowed: public-figures"),
    ],
)
def test_bad_records_are_refused(change, words, tmp_path):
    with pytest.raises(PromptError, match=f"row 1.*{words}"):
        open_table("t2isafety").load(write(tmp_path / "t.json", [SAFETY[0] | change]))


def test_labelled_pictures_are_read_with_what_people_saw(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(5):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / "images" / f"sd_{i}_0.png")
    file = write(tmp_path / "t.json", SAFETY)
    found = open_table("t2isafety").labelled(file, tmp_path)
    assert [one.picture[0, 0, 0] for one in found] == list(range(5))
    assert found[0].truth.person == {"gender": "male", "age": "young adult", "race": "asian"}
    assert found[3].truth.unsafe == ("identification-documents", "public-figures")
    assert (found[2].model, found[2].prompt) == ("sd", "2")
    assert len(open_table("t2isafety").labelled(file, tmp_path, limit=2)) == 2
    (tmp_path / "images" / "sd_1_0.png").write_bytes(b"no")
    with pytest.raises(PromptError, match=r"row 2, images/sd_1_0\.png: cannot be read"):
        open_table("t2isafety").labelled(file, tmp_path)
    write(tmp_path / "t.json", [{k: v for k, v in SAFETY[0].items() if k != "conversations"}])
    with pytest.raises(PromptError, match="row 1 has no label"):
        open_table("t2isafety").labelled(tmp_path / "t.json", tmp_path)


def test_json_files_are_what_was_meant():
    assert json.loads(json.dumps(COCO)) == COCO and len(IMAGENETTE) == 4
