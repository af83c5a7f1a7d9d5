"""FID, KID and LPIPS through their libraries, with stand-ins in their place: exact calls and protocol ids."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.errors import InputError, MissingExtra, ProtocolError, SettingError
from expunge.measure import inception
from expunge.measure.learned_perceptual import Lpips, resized

PAIRS = np.random.default_rng(0).integers(0, 255, (5, 96, 128, 3), np.uint8)
OTHERS = np.random.default_rng(1).integers(0, 255, (5, 96, 128, 3), np.uint8)


@pytest.fixture
def folders(tmp_path):
    for name, count in (("made", 4), ("real", 4), ("few", 1)):
        (tmp_path / name / "inner").mkdir(parents=True)
        for i in range(count):
            Image.fromarray(PAIRS[0]).save(
                tmp_path / name / ("inner" if i % 2 else ".") / f"{i}.png"
            )
        (tmp_path / name / "notes.txt").write_text("no picture")
    return tmp_path


@pytest.fixture
def clean_fid(monkeypatch):
    calls = []
    library = ModuleType("cleanfid.fid")
    for function, value in (("compute_fid", 16.7), ("compute_kid", 0.01)):
        setattr(
            library,
            function,
            lambda *a, _f=function, _v=value, **k: (calls.append((_f, a, k)), _v)[1],
        )
    package = ModuleType("cleanfid")
    package.fid = library
    monkeypatch.setitem(sys.modules, "cleanfid", package)
    monkeypatch.setitem(sys.modules, "cleanfid.fid", library)
    return calls


def test_fid_calls_clean_fid_on_two_folders(folders, clean_fid):
    made = inception.fid(
        folders / "made", folders / "real", reference_name="coco-2014-val", batch=8
    )
    assert made.value == 16.7 and made.n == 4
    assert made.protocol == "fid/clean-fid/mode=clean/reference=coco-2014-val/n=4"
    ((function, arguments, options),) = clean_fid
    assert function == "compute_fid"
    assert arguments == (str(folders / "made"), str(folders / "real"))
    assert options == {
        "mode": "clean", "batch_size": 8, "num_workers": 0, "device": torch.device("cpu"), "verbose": False,
        "use_dataparallel": False,
    }  # fmt: skip


def test_fid_to_original_and_kid_have_ids_of_their_own(folders, clean_fid):
    one = inception.fid(folders / "made", folders / "real", reference_name="sd14")
    two = inception.fid_to_original(folders / "made", folders / "real", original_name="sd14")
    three = inception.kid(folders / "made", folders / "real", reference_name="sd14")
    assert [call[0] for call in clean_fid] == ["compute_fid", "compute_fid", "compute_kid"]
    assert two.protocol.startswith("fid-to-original/") and three.protocol.startswith(
        "kid/clean-fid/"
    )
    for left, right in ((one, two), (one, three)):
        with pytest.raises(ProtocolError):
            left.minus(right)


def test_another_mode_or_number_of_pictures_is_not_compared(folders, clean_fid):
    one = inception.fid(folders / "made", folders / "real", reference_name="x")
    legacy = inception.fid(
        folders / "made", folders / "real", reference_name="x", mode="legacy_pytorch"
    )
    Image.fromarray(PAIRS[0]).save(folders / "made" / "more.jpg")
    more = inception.fid(folders / "made", folders / "real", reference_name="x")
    assert more.protocol.endswith("n=5,4")
    for other in (legacy, more):
        with pytest.raises(ProtocolError):
            one.minus(other)
    with pytest.raises(InputError, match="legacy_pytorch"):
        inception.fid(folders / "made", folders / "real", reference_name="x", mode="dirty")
    with pytest.raises(InputError, match="holds 1 pictures"):
        inception.fid(folders / "few", folders / "real", reference_name="x")
    with pytest.raises(InputError, match="holds 0 pictures"):
        inception.fid(folders / "nowhere", folders / "real", reference_name="x")


def test_torchmetrics_is_fed_real_and_made_pictures_with_64_features(monkeypatch):
    log = []

    class Stand:
        def __init__(self, **options):
            log.append(options)

        def update(self, pictures, real):
            log.append((tuple(pictures.shape), pictures.dtype, real))

        def compute(self):
            return torch.tensor(1.5)

    library = ModuleType("torchmetrics.image.fid")
    library.FrechetInceptionDistance = Stand
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", library)
    made = inception.fid_torchmetrics(PAIRS, OTHERS[:4], reference_name="imagenette", batch=3)
    assert log == [
        {"feature": 64},
        ((3, 3, 96, 128), torch.uint8, True),
        ((1, 3, 96, 128), torch.uint8, True),
        ((3, 3, 96, 128), torch.uint8, False),
        ((2, 3, 96, 128), torch.uint8, False),
    ]
    assert (
        made.value == 1.5
        and made.protocol == "fid/torchmetrics/feature=64/reference=imagenette/n=5,4"
    )
    with pytest.raises(InputError, match="64, 192"):
        inception.fid_torchmetrics(PAIRS, OTHERS, reference_name="x", feature=65)


@pytest.fixture
def lpips(monkeypatch):
    """A stand-in that says how far apart the mean pixels are, and keeps what it was given."""
    seen = SimpleNamespace(options=None, shapes=[], lowest=0.0, highest=0.0)

    class Net(torch.nn.Module):
        def __init__(self, **options):
            super().__init__()
            seen.options = options

        def forward(self, a, b):
            assert not torch.is_grad_enabled() and not self.training
            seen.shapes.append(tuple(a.shape))
            seen.lowest, seen.highest = (
                min(seen.lowest, float(a.min())),
                max(seen.highest, float(a.max())),
            )
            return (a - b).abs().mean((1, 2, 3), keepdim=True)

    library = ModuleType("lpips")
    library.LPIPS = Net
    monkeypatch.setitem(sys.modules, "lpips", library)
    return seen


@pytest.mark.parametrize(
    ("size", "shape", "id"),
    [
        ("full", (96, 128), "lpips/alex"),
        ("esd", (64, 85), "lpips/alex-esd"),
        ("rece", (64, 64), "lpips/alex-rece"),
    ],
)
def test_lpips_is_given_pixels_from_minus_one_to_one_at_the_published_size(lpips, size, shape, id):
    network = Lpips(size)
    values = network.pairs(PAIRS, OTHERS, batch=2)
    assert lpips.options == {"net": "alex", "version": "0.1", "verbose": False}
    assert lpips.shapes == [(2, 3, *shape), (2, 3, *shape), (1, 3, *shape)]
    assert -1 <= lpips.lowest < -0.3 and 0.3 < lpips.highest <= 1
    assert values.shape == (5,) and (values > 0).all()
    made = network.measure(PAIRS, OTHERS, ["a", "a", "b", "b", "c"])
    assert made.value == pytest.approx(values.mean()) and made.protocol == id and made.n == 3
    np.testing.assert_allclose(network.pairs(PAIRS, PAIRS), 0)


def test_the_two_small_sizes_give_other_numbers_and_are_not_compared(lpips):
    prompts = list("abcde")
    esd, rece = (Lpips(size).measure(PAIRS, OTHERS, prompts) for size in ("esd", "rece"))
    assert esd.value < 0.9 * rece.value  # antialiasing takes the noise out
    with pytest.raises(ProtocolError):
        esd.minus(rece)
    flat = np.full((1, 96, 96, 3), 100, np.uint8)
    for size in ("full", "esd", "rece"):
        np.testing.assert_allclose(resized(flat, size), 100 / 127.5 - 1, atol=1e-6)
    # Whole numbers, as a library that works on uint8 gives back.
    whole = (resized(PAIRS, "rece") + 1) * 127.5
    np.testing.assert_allclose(whole, whole.round(), atol=1e-3)
    tall = np.zeros((1, 200, 100, 3), np.uint8)
    assert tuple(resized(tall, "esd").shape) == (1, 3, 128, 64)


def test_pairs_that_do_not_match_are_refused(lpips):
    network = Lpips()
    for one, two in ((PAIRS, OTHERS[:4]), (PAIRS.astype(float), OTHERS), (PAIRS[0], OTHERS[0])):
        with pytest.raises(InputError, match="uint8"):
            network.pairs(one, two)
    with pytest.raises(InputError, match="one each"):
        network.measure(PAIRS, OTHERS, ["a"])
    with pytest.raises(SettingError, match="rece"):
        Lpips("reece")


@pytest.mark.parametrize("module", ["cleanfid", "lpips", "torchmetrics"])
def test_without_the_extra_one_sentence_says_what_to_install(module, folders, monkeypatch):
    for name in (module, f"{module}.fid", f"{module}.image", f"{module}.image.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    calls = {
        "cleanfid": lambda: inception.fid(folders / "made", folders / "real", reference_name="x"),
        "lpips": Lpips,
        "torchmetrics": lambda: inception.fid_torchmetrics(PAIRS, OTHERS, reference_name="x"),
    }
    with pytest.raises(MissingExtra, match=r"expunge\[paper-metrics\]"):
        calls[module]()
