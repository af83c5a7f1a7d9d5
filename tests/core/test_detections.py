"""Pictures and what is seen in them: whose they are, who looked, and what is refused."""

import numpy as np
import pytest

from expunge.concept import as_concepts
from expunge.core.detections import detected
from expunge.errors import InputError
from expunge.method import Judge, Verdicts
from expunge.models.base import Boxed, Companions
from expunge.testing import tiny_diffusion

MARK = as_concepts("mark")
PICTURES = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
CAPTIONS = ["a star", "a heart", "a circle"]
BOXES = [[(0.9, (0, 0, 4, 4), "mark")], [], [(1, None, "mark")]]


class First(Judge):
    """Sees everything in the first picture."""

    id, protocol, threshold = "first", "first/1", 0.5

    def judge(self, outputs, concept, prompts):
        hit = np.arange(len(outputs)) == 0
        return Verdicts(hit, hit.astype(float), np.ones(len(outputs), bool))


def look(data=None, judge=None, companions=None, count=2, seed=0):
    model = tiny_diffusion()
    model.companions = companions
    return detected(model, MARK, data, judge, count=count, seed=seed, steps=2)


def test_boxes_of_the_user():
    found = look({"pictures": PICTURES, "captions": CAPTIONS, "boxes": BOXES})
    assert (found.origin, found.seer) == ("data", "boxes")
    assert found.boxes[0][0].box == (0.0, 0.0, 4.0, 4.0) and found.boxes[2][0].box is None
    assert found.captions == tuple(CAPTIONS)


def test_a_detector_of_the_user():
    data = {"pictures": PICTURES, "captions": CAPTIONS, "detector": lambda pictures: BOXES}
    assert (
        look(data).boxes == look({"pictures": PICTURES, "captions": CAPTIONS, "boxes": BOXES}).boxes
    )
    drawn = look({"captions": CAPTIONS, "detector": lambda p: [[]] * len(p)}, count=4)
    assert (drawn.origin, drawn.seer, len(drawn.pictures)) == ("model", "detector", 4)
    assert drawn.captions == ("a star", "a heart", "a circle", "a star")


def test_a_judge_says_whether_and_not_where():
    found = look({"captions": CAPTIONS}, judge=First())
    assert found.seer == "judge" and found.digest is None
    assert found.boxes[0][0].box is None and found.boxes[1] == ()
    again = look({"captions": CAPTIONS}, judge=First())
    other = look({"captions": CAPTIONS}, judge=First(), seed=1)
    assert np.array_equal(found.pictures, again.pictures)
    assert not np.array_equal(found.pictures, other.pictures)


def test_a_world_has_pictures_of_its_own():
    asked = []

    def contaminated(names, n, seed=0, split="development", share=0.5):
        asked.append((names, n, seed, split))
        return Boxed(PICTURES[:n], CAPTIONS[:n], BOXES[:n])

    found = look(companions=Companions("test", contaminated=contaminated), seed=4)
    assert asked == [(["mark"], 2, 4, "development")]
    assert (found.origin, found.seer, len(found.boxes)) == ("world", "boxes", 2)


def test_the_digest_names_pictures_captions_and_boxes():
    data = {"pictures": PICTURES, "captions": CAPTIONS, "boxes": BOXES}
    digests = {
        look(data | more).digest
        for more in (
            {},
            {"pictures": PICTURES + 1},
            {"captions": CAPTIONS[::-1]},
            {"boxes": [[], [], []]},
        )
    }
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "nobody says"),
        ([1], "mapping"),
        ({"picture": PICTURES}, "pictures"),
        ({"boxes": BOXES}, "need 'pictures'"),
        ({"detector": 3}, "not callable"),
        ({"pictures": PICTURES.astype(float), "captions": CAPTIONS, "boxes": BOXES}, "uint8"),
        ({"pictures": PICTURES, "captions": CAPTIONS[:1], "boxes": BOXES}, "with a caption each"),
        ({"pictures": PICTURES, "captions": CAPTIONS, "boxes": BOXES[:2]}, "one each"),
        (
            {
                "pictures": PICTURES,
                "captions": CAPTIONS,
                "boxes": [[(0.5, (1, 2, 3), "x")], [], []],
            },
            "picture 0",
        ),
        (
            {"pictures": PICTURES, "captions": CAPTIONS, "boxes": [[], [(7, None, "x")], []]},
            "picture 1",
        ),
        ({"pictures": PICTURES, "captions": CAPTIONS}, "nobody says"),
        ({"detector": lambda pictures: []}, "no captions"),
        ({"captions": CAPTIONS, "detector": lambda pictures: None}, "boxes are NoneType"),
        ({"pictures": PICTURES, "captions": "abc", "boxes": BOXES}, "must be a list of texts"),
        ({"pictures": PICTURES[..., :1], "captions": CAPTIONS, "boxes": BOXES}, "uint8"),
        (
            {"pictures": [PICTURES[0], PICTURES[1, 1:]], "captions": CAPTIONS[:2], "boxes": BOXES},
            "make no one array",
        ),
        (
            {"pictures": PICTURES.repeat(2, 1), "captions": CAPTIONS, "boxes": BOXES},
            "32 x 16 pixels",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_words(data, said):
    with pytest.raises(InputError, match=said):
        look(data)
