"""The real clean-fid, torchmetrics and lpips, where the extra ``paper-metrics`` is installed.

Their trained weights would be downloaded, so random ones stand in their place: what is checked is that the pictures
reach the networks as each library itself prepares them, that the numbers are theirs, and what is said without weights.
"""

from __future__ import annotations

import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.errors import ModelError
from expunge.measure import inception
from expunge.measure.distances import frechet_of
from expunge.measure.learned_perceptual import Lpips

pytestmark = pytest.mark.extras
torchvision = pytest.importorskip("torchvision", reason="extra paper-metrics")

REAL = np.random.default_rng(0).integers(0, 255, (6, 40, 48, 3), np.uint8)
MADE = (REAL[:5] // 2 + np.random.default_rng(1).integers(0, 90, (5, 40, 48, 3))).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    for name, pictures in (("real", REAL), ("made [1]", MADE)):
        (tmp_path / name / "inner").mkdir(parents=True)
        for index, picture in enumerate(pictures):
            place = tmp_path / name / ("inner" if index % 2 else ".")
            Image.fromarray(picture).save(place / f"{index}.png")
        (tmp_path / name / "notes.txt").write_text("no picture")
        (tmp_path / name / ".hidden.png").write_text("no picture")
    return tmp_path


@pytest.fixture
def clean_fid(monkeypatch):
    """clean-fid on the means of the channels of an upper and a lower half: six features of what Inception is given."""
    library = pytest.importorskip("cleanfid.fid", reason="extra paper-metrics")
    seen: list[torch.Tensor] = []

    class Means(torch.nn.Module):
        def __init__(self, path, download=True, resize_inside=False):
            super().__init__()

        def forward(self, pixels):
            seen.append(pixels)
            top, bottom = pixels.chunk(2, dim=2)
            return torch.cat([top.mean((2, 3)), bottom.mean((2, 3))], 1)

    monkeypatch.setattr("cleanfid.features.InceptionV3W", Means)
    library.seen = seen
    return library


def features(pictures):
    """Those means at 299 pixels, where PIL's bicubic with antialiasing has made them, channel by channel."""
    found = []
    for picture in pictures:
        large = np.stack([
            np.asarray(Image.fromarray(picture[..., c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
            for c in range(3)
        ], -1).clip(0, 255)  # fmt: skip
        found.append(np.concatenate([large[:150].mean((0, 1)), large[150:].mean((0, 1))]))
    return np.array(found)


def test_clean_fids_numbers_are_those_of_its_own_preparation(folders, clean_fid):
    made = inception.fid(folders / "made [1]", folders / "real", reference_name="x", batch=2)
    assert [tuple(one.shape) for one in clean_fid.seen] == (
        [(2, 3, 299, 299)] * 2 + [(1, 3, 299, 299)] + [(2, 3, 299, 299)] * 3
    )
    wanted = frechet_of(features(MADE), features(REAL), features="means").value
    assert made.value == pytest.approx(wanted, rel=1e-3) and made.value > 1
    assert made.n == 5 and made.protocol.endswith("/n=5,6")
    kid = inception.kid(folders / "made [1]", folders / "real", reference_name="x")
    assert np.isfinite(kid.value) and kid.protocol.startswith("kid/clean-fid/mode=clean/")
    same = inception.fid_to_original(folders / "real", folders / "real", original_name="x")
    assert same.value == pytest.approx(0, abs=1e-3)


def test_what_is_counted_is_what_clean_fid_reads(clean_fid):
    assert set(inception.PICTURES) == set(clean_fid.EXTENSIONS)


def test_torchmetrics_number_is_the_distance_of_its_own_features(monkeypatch):
    library = pytest.importorskip("torchmetrics.image.fid", reason="extra paper-metrics")
    source = pytest.importorskip(
        "torch_fidelity.feature_extractor_inceptionv3", reason="extra paper-metrics"
    )
    monkeypatch.setattr(source, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(library.NoTrainInceptionV3, "load_state_dict", lambda *a, **k: None)
    kept = []
    make = library.FrechetInceptionDistance
    monkeypatch.setattr(
        library, "FrechetInceptionDistance", lambda **o: (kept.append(make(**o)), kept[0])[1]
    )
    made = inception.fid_torchmetrics(MADE, REAL, reference_name="x", batch=4)
    with torch.no_grad():
        one, two = (
            kept[0].inception(torch.from_numpy(part).permute(0, 3, 1, 2)).double().numpy()
            for part in (MADE, REAL)
        )
    assert one.shape == (5, 64)
    assert made.value == pytest.approx(frechet_of(one, two, features="inception").value, rel=1e-2)
    assert made.protocol == "fid/torchmetrics/feature=64/reference=x/n=5,6"


def test_lpips_is_given_what_its_own_reader_gives(monkeypatch):
    library = pytest.importorskip("lpips", reason="extra paper-metrics")
    alexnet = torchvision.models.alexnet
    monkeypatch.setattr(torchvision.models, "alexnet", lambda pretrained: alexnet(weights=None))
    network = Lpips()
    values = network.pairs(MADE, REAL[:5], batch=2)
    with torch.no_grad():
        wanted = [
            float(network.network(library.im2tensor(one), library.im2tensor(two)))
            for one, two in zip(MADE, REAL[:5], strict=True)
        ]
    np.testing.assert_allclose(values, wanted, rtol=1e-4)
    assert (values > 0).all()
    np.testing.assert_allclose(network.pairs(REAL, REAL), 0, atol=1e-7)
    for size in ("esd", "rece"):
        assert (Lpips(size).pairs(MADE, REAL[:5]) > 0).all()


@pytest.mark.parametrize("metric", ["fid", "fid legacy", "torchmetrics", "lpips"])
def test_without_weights_and_network_one_sentence_says_so(metric, folders, tmp_path, monkeypatch):
    module = {"lpips": "lpips", "torchmetrics": "torch_fidelity"}.get(metric, "cleanfid")
    pytest.importorskip(module, reason="extra paper-metrics")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def nobody(*arguments, **options):
        raise urllib.error.URLError("nobody there")

    monkeypatch.setattr("urllib.request.urlopen", nobody)
    monkeypatch.setattr("torch.hub.urlopen", nobody)
    if module == "cleanfid":  # it looks into /tmp, where its weights may be
        monkeypatch.setattr("cleanfid.inception_torchscript.check_download_inception", nobody)
    made, real = folders / "made [1]", folders / "real"
    calls = {
        "fid": lambda: inception.fid(made, real, reference_name="x"),
        "fid legacy": lambda: inception.fid(made, real, reference_name="x", mode="legacy_pytorch"),
        "torchmetrics": lambda: inception.fid_torchmetrics(MADE, REAL, reference_name="x"),
        "lpips": Lpips,
    }
    with pytest.raises(ModelError, match=r"weights of .* cannot be downloaded \(nobody there\)"):
        calls[metric]()
