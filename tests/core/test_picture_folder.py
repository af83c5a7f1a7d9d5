"""Folders of pictures, and prompts found by name or number, never by order."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from expunge.core.picture_folder import PictureFolder, prompts_of
from expunge.errors import InputError, PromptError


def save(place, name, size=(8, 8), value=0):
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(place / name)


def test_batches_end_where_the_size_changes(tmp_path):
    for index, size in enumerate([(8, 8), (8, 8), (8, 8), (4, 8), (8, 8)]):
        save(tmp_path, f"{index}.png", size, index)
    (tmp_path / "log.txt").write_text("no picture")
    folder = PictureFolder(tmp_path)
    assert len(folder) == 5 and folder.names == [f"{i}.png" for i in range(5)]
    found = [
        (names, pictures.shape, pictures[:, 0, 0, 0].tolist())
        for names, pictures in folder.batches(2)
    ]
    assert found == [
        (["0.png", "1.png"], (2, 8, 8, 3), [0, 1]),
        (["2.png"], (1, 8, 8, 3), [2]),
        (["3.png"], (1, 4, 8, 3), [3]),
        (["4.png"], (1, 8, 8, 3), [4]),
    ]


def test_grey_and_transparent_pictures_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 9, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4, 4), 9, np.uint8)).save(tmp_path / "rgba.png")
    ((_, pictures),) = PictureFolder(tmp_path).batches()
    assert pictures.shape == (2, 4, 4, 3) and (pictures == 9).all()


def test_folders_that_hold_no_pictures_are_refused(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match="picture"):
            PictureFolder(place)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"broken\.png"):
        list(PictureFolder(tmp_path).batches())


def test_pairs_need_the_same_names(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, "a.png")
    one, two = PictureFolder(tmp_path / "one"), PictureFolder(tmp_path / "two")
    one.same_names(two)
    save(tmp_path / "two", "b.png")
    with pytest.raises(InputError, match=r"b\.png"):
        one.same_names(PictureFolder(tmp_path / "two"))


def texts(names, file):
    return [prompt.text for prompt in prompts_of(names, file)]


def test_a_missing_picture_shifts_no_prompt(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("zero\none\n\ntwo\n")
    # The second picture is missing: in sorted order the third would be given its prompt.
    assert texts(["0000-seed5.png", "0002-seed7.png"], file) == ["zero", "two"]
    assert texts(["2_0.png", "2_1.png", "1.png"], file) == ["two", "two", "one"]
    for name in ("3.png", "picture.png", "2nd.png"):
        with pytest.raises(PromptError, match=name.replace(".", r"\.")):
            prompts_of([name], file)


def test_tables_of_other_projects_are_read_by_their_number_or_name(tmp_path):
    table = tmp_path / "prompts.csv"
    table.write_text('case_number,prompt,evaluation_seed\n7,"a, b",1\n9,c,2\n')
    assert texts(["9_0.png", "7_0.png"], table) == ["c", "a, b"]
    lines = tmp_path / "prompts.jsonl"
    rows = [
        {"file": "x.png", "text": "by name"},
        {"file": "y", "caption": "by stem"},
        {"id": 3, "text": "by number"},
    ]
    lines.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8-sig")
    assert texts(["x.png", "y.jpg", "003.png"], lines) == ["by name", "by stem", "by number"]
    unnumbered = tmp_path / "plain.csv"
    unnumbered.write_text("prompt\nfirst\nsecond\n")
    assert texts(["1.png"], unnumbered) == ["second"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", b"{", "line 1"),
        ("p.jsonl", b"[1]", "line 1"),
        ("p.jsonl", b'{"file": "a.png"}', "none of text"),
        ("p.csv", b"case_number,prompt\nx,a\n", "number 'x'"),
        ("p.txt", b"\xff\xfe", "byte 0"),
    ],
)
def test_bad_prompt_files_are_refused_in_words(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptError, match=words):
        prompts_of(["a.png"], tmp_path / name)


def test_only_line_feeds_part_prompts(tmp_path):
    odd = "one\u2028half \x85 more"
    for name, content in (
        ("p.txt", f"{odd}\r\ntwo\r\n"),
        ("p.csv", f'prompt\r\n"{odd}"\r\ntwo\r\n'),
        ("p.jsonl", "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in (odd, "two"))),
    ):
        (tmp_path / name).write_bytes(content.encode())
        assert texts(["0.png", "1.png"], tmp_path / name) == [odd, "two"]
    table = tmp_path / "lines.csv"
    table.write_text('prompt\n"a\nb"\nc\n')  # a cell of two lines is one prompt
    assert texts(["0.png", "1.png"], table) == ["a\nb", "c"]
