"""Pictures of any size and from files, turned or not."""

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.concept import Concept
from expunge.core.examples import fitted, given, read_pictures, turned
from expunge.errors import InputError
from expunge.testing import tiny_diffusion


def wide() -> np.ndarray:
    """20 x 40 pixels: black, then a white square of 20, then black."""
    picture = np.zeros((20, 40, 3), np.uint8)
    picture[:, 10:30] = 255
    return picture


def test_pictures_are_stretched_or_cut_in_the_middle():
    assert np.array_equal(fitted(wide(), 20, 40), wide())
    stretched, cut = fitted(wide(), 20, 20), fitted(wide(), 20, 20, crop=True)
    assert stretched.shape == cut.shape == (20, 20, 3)
    assert cut.min() == 255 and stretched[:, 0].max() == 0
    assert np.array_equal(fitted(Image.fromarray(wide()).convert("L"), 20, 40), wide())


def test_files_of_a_concept(tmp_path):
    Image.fromarray(wide()).save(tmp_path / "a.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # to be turned by a quarter
    Image.fromarray(np.swapaxes(wide(), 0, 1)).save(tmp_path / "b.png", exif=rotated)
    paths = [str(tmp_path / name) for name in ("a.png", "b.png")]
    found = read_pictures(Concept("star", images=paths), 20, 40)
    assert found is not None and found.captions == ("star", "star")
    assert np.array_equal(found.pictures, np.stack([wide(), wide()]))
    assert read_pictures(Concept("star"), 20, 40) is None
    with pytest.raises(InputError, match=r"c\.png"):
        read_pictures(Concept("star", images=[str(tmp_path / "c.png")]), 20, 40)


def test_some_pictures_are_turned_and_the_rest_left():
    pictures = np.random.default_rng(0).integers(0, 255, (40, 4, 6, 3), dtype=np.uint8)
    before = pictures.copy()
    made, count = turned(pictures, 0.5, torch.Generator().manual_seed(0))
    same = [np.array_equal(a, b) for a, b in zip(made, pictures, strict=True)]
    other = [np.array_equal(a, b[:, ::-1]) for a, b in zip(made, pictures, strict=True)]
    assert 10 < count < 30 and sum(other) == count and sum(same) == 40 - count
    assert np.array_equal(pictures, before)
    assert turned(pictures, 0.0, torch.Generator())[1] == 0
    assert turned(pictures, 1.0, torch.Generator())[1] == 40


def test_what_a_user_gives():
    array = np.zeros((2, 4, 4, 3), np.uint8)
    found, captions = given({"pictures": {"star": (array, None, ["a", "b"])}, "captions": ("c",)})
    assert found["star"].captions == ("a", "b") and captions == ["c"]
    assert given(None) == ({}, [])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([], "list; allowed is a mapping"),
        ({"caption": []}, "did you mean 'captions'"),
        ({"captions": "a star"}, "'captions' must be a list of texts, not str"),
        ({"captions": [1]}, "holds a int"),
        ({"captions": 3}, "not int"),
        ({"pictures": [wide()]}, "'pictures' is list; allowed is a mapping"),
        ({"pictures": {"star": wide()[None]}}, "'star' are ndarray; allowed is a tuple"),
        ({"pictures": {"star": (wide()[None], ["a"])}}, "'star' are tuple; allowed is a tuple"),
        ({"pictures": {"star": (wide()[None], None, "a")}}, "captions of 'star' must be a list of texts"),
        ({"pictures": {"star": (wide()[None], None, None)}}, "captions of 'star' must be a list of texts"),
        ({"pictures": {"star": ([wide(), wide()[:5]], None, ["a", "b"])}}, "make no one array"),
        ({"pictures": {"star": (wide()[None] / 255.0, None, ["a"])}}, "float64 for 1 captions"),
    ],
)  # fmt: skip
def test_what_a_user_gives_wrongly_is_said_in_words(data, match):
    with pytest.raises(InputError, match=match):
        given(data)


def test_what_a_method_would_ignore_is_refused():
    assert given({"captions": ["a"]}, parts=("captions",)) == ({}, ["a"])
    with pytest.raises(
        InputError, match="reads no 'pictures'; allowed is a mapping with 'captions'"
    ):
        given({"captions": ["a"], "pictures": {}}, parts=("captions",))
    with pytest.raises(InputError, match="unknown key 'picture'; did you mean 'pictures'"):
        given({"picture": {}}, parts=("pictures",))


def test_pictures_of_another_size_than_the_model_draws_are_refused():
    data = {"pictures": {"star": (wide()[None], None, ["a star"])}}
    assert given(data)[0]["star"].pictures.shape == (1, 20, 40, 3)
    with pytest.raises(InputError, match="20 x 40 pixels; tiny draws 16 x 16"):
        given(data, tiny_diffusion())
