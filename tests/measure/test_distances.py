"""KID over subsets, CMMD, streaming, and named features."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from expunge.core import discrepancy
from expunge.core.features import (
    FeatureCache,
    Features,
    cached,
    clip_features,
    judge_features,
    vision_features,
)
from expunge.errors import InputError, ProtocolError, SettingError
from expunge.measure.distances import (
    KINDS,
    Distance,
    Moments,
    Rows,
    clip_distance,
    frechet_distance,
    frechet_of,
    kernel_distance,
    subset_kernel_distance,
)
from expunge.method import Prompt


def draw(n: int, d: int = 6, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def test_the_golden_value_of_two_gaussians_is_ten() -> None:
    # N(0, 1) and N(3, 2^2): (0 - 3)^2 + 1 + 4 - 2 sqrt(4) = 10; written N(3, 4) with the variance.
    assert frechet_distance([0.0], [[1.0]], [3.0], [[4.0]]) == pytest.approx(10, abs=1e-9)


def test_gaussian_samples_come_near_the_closed_form() -> None:
    generator = np.random.default_rng(1)
    one = Moments().update(generator.normal(0, 1, (20_000, 1)))
    two = Moments().update(generator.normal(3, 2, (20_000, 1)))
    assert frechet_of(one, two, "line").value == pytest.approx(10, abs=0.25)


def test_frechet_distances_of_other_sample_sizes_are_not_compared() -> None:
    x, y = draw(400), draw(400, seed=1)
    large, small = frechet_of(x, y, "f"), frechet_of(x[:40], y[:40], "f")
    assert small.value > 4 * large.value  # the bias of few samples, on equal distributions
    with pytest.raises(ProtocolError):
        large.minus(small)
    assert frechet_of(x, y[:40], "f").protocol.endswith("n=400,40")


def test_kid_equals_sums_over_all_pairs_and_its_closed_form() -> None:
    x, y = draw(7), draw(9, shift=1, seed=1)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / len(a) + 1) ** 3

    within_x = np.mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    within_y = np.mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    across = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y, "f").value == pytest.approx(within_x + within_y - 2 * across)
    # E (x y + 1)^3 = 1 + 3 a1 b1 + 3 a2 b2 + a3 b3 with the raw moments 0, 1, 0 of N(0, 1) and 1, 2, 4 of N(1, 1).
    expected = (1 + 3) + (1 + 3 + 3 * 2 * 2 + 4 * 4) - 2 * (1 + 3 * 1 * 2)
    generator = np.random.default_rng(3)
    one, two = generator.normal(0, 1, (2_000, 1)), generator.normal(1, 1, (2_000, 1))
    assert kernel_distance(one, two, "line").value == pytest.approx(expected, rel=0.15)


def test_subsets_give_what_libraries_print_and_agree_with_all_pairs() -> None:
    x, y = draw(60), draw(50, shift=0.5, seed=1)
    whole = subset_kernel_distance(x, y[:50], "f", subsets=2, size=1_000)
    assert whole.protocol.endswith("subsets=2/size=50")
    # The formula of the published code, with the subset being the whole set.
    m, d = 50, x.shape[1]
    a = (y @ y.T / d + 1) ** 3 + (y[::-1] @ y[::-1].T / d + 1) ** 3
    b = (y @ y[::-1].T / d + 1) ** 3
    published = ((a.sum() - np.trace(a)) / (m - 1) - b.sum() * 2 / m) / m
    own = kernel_distance(y, y[::-1], "f").value
    assert own == pytest.approx(published)
    found = subset_kernel_distance(x, y, "f", subsets=400, size=20)
    assert found.interval[0] < kernel_distance(x, y, "f").value < found.interval[1]
    assert found == subset_kernel_distance(x, y, "f", subsets=400, size=20)
    with pytest.raises(ProtocolError):
        found.minus(kernel_distance(x, y, "f"))
    with pytest.raises(InputError, match="subsets"):
        subset_kernel_distance(x, y, "f", subsets=1)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_cmmd_equals_its_definition_and_ignores_length() -> None:
    x, y = draw(8), draw(5, shift=1, seed=1)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(
            np.mean([[np.exp(-((p - q) @ (p - q)) / 200) for q in unit(b)] for p in unit(a)])
        )

    expected = 1_000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
    found = clip_distance(x, y, "clip")
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert clip_distance(5 * x, y / 3, "clip").value == pytest.approx(expected, rel=1e-9)
    assert found.protocol == "cmmd/gaussian-biased/features=clip/n=8,5"
    assert clip_distance(x, x, "clip").value == pytest.approx(0, abs=1e-9)


def test_cmmd_of_two_opposite_points_is_its_closed_form() -> None:
    x, y = np.tile([[1.0, 0.0]], (4, 1)), np.tile([[-1.0, 0.0]], (4, 1))
    # Unit vectors two apart: 1000 (1 + 1 - 2 exp(-4 / 200)).
    assert clip_distance(x, y, "clip").value == pytest.approx(2_000 * (1 - np.exp(-0.02)))
    assert clip_distance(x, y, "clip", unbiased=True).value == pytest.approx(
        2_000 * (1 - np.exp(-0.02))
    )
    wide = clip_distance(x, y, "clip", sigma=1, scale=1)
    assert wide.value == pytest.approx(2 * (1 - np.exp(-2)))
    assert "sigma=1/scale=1" in wide.protocol
    with pytest.raises(InputError, match="positive"):
        clip_distance(x, y, "clip", sigma=0)


def test_the_unbiased_cmmd_is_zero_on_average_and_the_published_one_is_not() -> None:
    pairs = [(draw(20, seed=2 * i), draw(20, seed=2 * i + 1)) for i in range(100)]
    unbiased = [clip_distance(a, b, "clip", unbiased=True).value for a, b in pairs]
    biased = [clip_distance(a, b, "clip").value for a, b in pairs]
    assert abs(np.mean(unbiased)) < 4 * np.std(unbiased) / 10
    assert min(biased) > 0 and np.mean(biased) > 10 * np.std(unbiased) / 10


def test_kernels_are_summed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = draw(23), draw(17, shift=0.3, seed=1)
    whole = [kernel_distance(x, y, "f").value, clip_distance(x, y, "f").value]
    monkeypatch.setattr(discrepancy, "BLOCK", 5)
    assert [kernel_distance(x, y, "f").value, clip_distance(x, y, "f").value] == pytest.approx(
        whole
    )


def test_kernel_distances_carry_the_interval_of_their_discrepancy() -> None:
    x, y = draw(12), draw(10, shift=1, seed=1)
    prompts = [f"prompt {i // 2}" for i in range(12)]
    kernel = lambda a, b: (a @ b.T / 6 + 1) ** 3  # noqa: E731
    own = discrepancy.squared_discrepancy(x, y, kernel)
    found, by_prompt = kernel_distance(x, y, "f"), kernel_distance(x, y, "f", prompts)
    assert found.interval == pytest.approx(own.interval()) and found.n == 10
    assert by_prompt.interval == pytest.approx(own.interval(prompts)) and by_prompt.n == 6
    assert by_prompt.value == found.value and by_prompt.protocol == found.protocol
    for unbiased in (True, False):
        made = clip_distance(x, y, "f", unbiased=unbiased)
        wide = clip_distance(x, y, "f", unbiased=unbiased, prompts=prompts, scale=1.0)
        assert sum(made.interval) / 2 == pytest.approx(made.value)
        assert sum(wide.interval) / 2 == pytest.approx(made.value / 1_000) and wide.n == 6
    assert clip_distance(x, y, "f", prompts=["one"] * 12).interval is None


# -- streaming and features ------------------------------------------------------------------------

PICTURES = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)
OTHERS = np.random.default_rng(1).integers(0, 200, (40, 8, 8, 3), np.uint8)
MEANS = Features("corner means", lambda p: p.reshape(len(p), -1)[:, ::48] / 255.0)


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_and_merged_distances_equal_those_of_everything_at_once(kind: str) -> None:
    whole = Distance(kind, MEANS, OTHERS)
    whole.update(PICTURES)
    left, right = Distance(kind, MEANS, whole), Distance(kind, MEANS, OTHERS, batch=7)
    left.update(PICTURES[:11])
    right.update(PICTURES[11:])
    # `left` was told that `whole`'s pictures are its reference, so only `right` compares with OTHERS.
    merged = right.merge(left).compute()
    assert merged.value == pytest.approx(whole.compute().value, rel=1e-9)
    assert merged.protocol == whole.compute().protocol == whole.protocol
    assert "corner means" in merged.protocol and merged.n == 40
    assert left.compute().value != pytest.approx(merged.value)


@pytest.mark.parametrize("kind", ["kid", "cmmd", "cmmd-unbiased"])
def test_prompts_are_the_units_also_of_streamed_distances(kind: str) -> None:
    texts = [f"prompt {i // 4}" for i in range(40)]
    asked = [Prompt(text, seed=i) for i, text in enumerate(texts)]
    plain = Distance(kind, MEANS, OTHERS)
    plain.update(PICTURES)
    reference = Distance(kind, MEANS, OTHERS[:0])
    reference.update(OTHERS, texts)
    parts = Distance(kind, MEANS, reference, batch=7), Distance(kind, MEANS, reference)
    parts[0].update(PICTURES[:11], asked[:11])
    parts[0].update(PICTURES[11:30], asked[11:30])
    parts[1].update(PICTURES[30:], asked[30:])
    found = parts[0].merge(parts[1]).compute()
    function = kernel_distance if kind == "kid" else clip_distance
    more = {} if kind == "kid" else {"unbiased": kind == "cmmd-unbiased"}
    wanted = function(
        MEANS(PICTURES), MEANS(OTHERS), MEANS.name, prompts=texts, reference_prompts=texts, **more
    )
    assert found.value == pytest.approx(wanted.value) and found.n == wanted.n == 10
    assert found.interval == pytest.approx(wanted.interval, rel=1e-6)
    assert plain.compute().n == 40 and plain.compute().interval != pytest.approx(found.interval)
    with pytest.raises(InputError, match="all or with none"):
        parts[0].update(PICTURES[:2])
    with pytest.raises(InputError, match="2 pictures came with 1 prompts"):
        parts[0].update(PICTURES[:2], asked[:1])


def test_metrics_of_other_kinds_or_features_do_not_merge() -> None:
    one = Distance("kid", MEANS, OTHERS)
    other = Features("others", MEANS.extract)
    for wrong in (Distance("cmmd", MEANS, OTHERS), Distance("kid", other, OTHERS)):
        with pytest.raises(InputError, match="merge"):
            one.merge(wrong)
    with pytest.raises(InputError, match="reference"):
        Distance("frechet", MEANS, one)
    with pytest.raises(SettingError, match="kid"):
        Distance("fid", MEANS, OTHERS)
    with pytest.raises(InputError, match="width"):
        Rows().update(np.zeros((2, 3))).update(np.zeros((2, 4)))


@pytest.mark.parametrize("name", ["", "Inception-v3", "FID features"])
def test_no_features_may_sound_like_fid(name: str) -> None:
    with pytest.raises(InputError, match="Inception"):
        Features(name, MEANS.extract)


@pytest.mark.parametrize(
    ("extract", "pictures"),
    [
        (lambda p: np.full((len(p), 2), np.nan), PICTURES),
        (lambda p: np.zeros((len(p) + 1, 2)), PICTURES),
        (lambda p: np.zeros(len(p)), PICTURES),
        (MEANS.extract, PICTURES.astype(np.float32)),
        (MEANS.extract, PICTURES[:0]),
    ],
)
def test_bad_pictures_and_bad_features_are_refused(extract, pictures) -> None:
    with pytest.raises(InputError, match="broken"):
        Features("broken", extract)(pictures)


def test_a_cache_computes_each_picture_once_and_says_float16(tmp_path) -> None:
    seen = []

    def extract(pictures: np.ndarray) -> np.ndarray:
        seen.append(len(pictures))
        return MEANS(pictures)

    features = Features("counted", extract)
    twice = np.concatenate([PICTURES[:5], PICTURES[3:8]])
    first = cached(features, FeatureCache(tmp_path))
    rows = first(twice)
    assert seen == [8] and first.name == "counted@float16"
    np.testing.assert_array_equal(rows, MEANS(twice).astype(np.float16).astype(np.float32))
    again = cached(features, FeatureCache(tmp_path))  # another process
    np.testing.assert_array_equal(again(twice), rows)
    assert seen == [8]
    # Another extractor of the same pictures finds nothing, and a damaged file counts as missing.
    cached(Features("other", extract), FeatureCache(tmp_path))(twice)
    assert seen == [8, 8]
    victim = sorted(tmp_path.rglob("*.npy"))[0]
    victim.write_bytes(victim.read_bytes()[:40])
    fresh = FeatureCache(tmp_path)
    for maker in (features, Features("other", extract)):
        cached(maker, fresh)(twice)
    assert sum(seen) == 17 and fresh.misses == 1


def test_a_cache_forgets_the_least_recently_used_and_refuses_what_float16_cannot_hold() -> None:
    cache = FeatureCache(limit=2 * 4 * 2)
    features = cached(MEANS, cache)
    features(PICTURES[:3])
    features(PICTURES[:3])
    assert cache.hits < 3
    with pytest.raises(InputError, match="float16"):
        cached(Features("large", lambda p: np.full((len(p), 2), 1e6)), FeatureCache())(PICTURES)


def test_features_of_judges_and_library_models() -> None:
    with pytest.raises(InputError, match="blind"):
        judge_features(SimpleNamespace(id="blind", features=lambda p: None))(PICTURES)
    own = judge_features(SimpleNamespace(id="seeing", features=lambda p: np.ones((len(p), 3))))
    assert own(PICTURES).shape == (40, 3) and own.name == "seeing"
    from transformers import CLIPConfig, CLIPModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        vit = ViTModel(ViTConfig(**small, image_size=16, patch_size=8)).eval()
        plain = ViTModel(
            ViTConfig(**small, image_size=16, patch_size=8), add_pooling_layer=False
        ).eval()
        convolutions = ResNetModel(
            ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        ).eval()
        clip = CLIPModel(
            CLIPConfig(
                text_config={**small, "vocab_size": 40, "max_position_embeddings": 12},
                vision_config={**small, "image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        ).eval()
    for features, width in (
        (vision_features(vit, "vit"), 16),
        (vision_features(plain, "vit"), 16),
        (vision_features(vit, "vit", pooling="mean"), 16),
        (vision_features(convolutions, "resnet"), 8),
        (clip_features(clip, "clip"), 8),
    ):
        rows = features(PICTURES[:5])
        assert rows.shape == (5, width) and np.ptp(rows) > 0
        np.testing.assert_allclose(
            rows, np.concatenate([features(PICTURES[:2]), features(PICTURES[2:5])]), atol=1e-5
        )
    rows = clip_features(clip, "clip")(PICTURES[:5])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert vision_features(vit, "vit", pooling="mean").name == "vit:mean"
    # The middle of what is not square is cut out, as CMMD does; squeezing it is another name.
    tall = np.random.default_rng(0).integers(0, 255, (2, 16, 8, 3), np.uint8)
    cut, squeezed = clip_features(clip, "clip"), clip_features(clip, "clip", squeeze=True)
    np.testing.assert_allclose(cut(tall), cut(tall[:, 4:12]), atol=1e-6)
    assert np.abs(squeezed(tall) - cut(tall)).max() > 1e-4 and squeezed.name == "clip:squeezed"
    with pytest.raises(InputError, match="pooling"):
        vision_features(vit, "vit", pooling="max")
