"""SSIM and PSNR against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.core.protocols import protocol
from expunge.errors import InputError
from expunge.measure.similarity import PSNR, SSIM, psnr, ssim

PICTURES = np.random.default_rng(0).integers(0, 255, (3, 16, 20, 3), np.uint8)
OTHERS = np.clip(
    PICTURES.astype(int) + np.random.default_rng(1).integers(-40, 40, PICTURES.shape), 0, 255
).astype(np.uint8)


def test_equal_pictures_have_the_largest_values() -> None:
    np.testing.assert_allclose(ssim(PICTURES, PICTURES), 1)
    np.testing.assert_allclose(psnr(PICTURES, PICTURES), 100)
    assert protocol(SSIM).group == protocol(PSNR).group == "pairs"


def test_flat_pictures_have_the_closed_form() -> None:
    one, two = np.full((1, 12, 12, 3), 100, np.uint8), np.full((1, 12, 12, 3), 120, np.uint8)
    c = (0.01 * 255) ** 2
    np.testing.assert_allclose(ssim(one, two), (2 * 100 * 120 + c) / (100**2 + 120**2 + c))
    np.testing.assert_allclose(psnr(one, two), 10 * np.log10(255**2 / 20**2))


def test_ssim_equals_a_window_by_window_computation() -> None:
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    x, y = PICTURES[0].astype(float), OTHERS[0].astype(float)
    values = []
    for row in range(5, 11):
        for column in range(5, 15):
            for channel in range(3):
                a, b = (p[row - 5 : row + 6, column - 5 : column + 6, channel] for p in (x, y))
                m, n = (window * a).sum(), (window * b).sum()
                v, w = (window * (a - m) ** 2).sum(), (window * (b - n) ** 2).sum()
                both = (window * (a - m) * (b - n)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append(
                    (2 * m * n + c1) * (2 * both + c2) / ((m * m + n * n + c1) * (v + w + c2))
                )
    assert ssim(PICTURES[:1], OTHERS[:1])[0] == pytest.approx(np.mean(values), rel=1e-9)


def test_what_does_not_match_is_refused() -> None:
    for function in (ssim, psnr):
        with pytest.raises(InputError, match="uint8"):
            function(PICTURES, OTHERS[:2])
        with pytest.raises(InputError, match="uint8"):
            function(PICTURES.astype(float), OTHERS)
    with pytest.raises(InputError, match="11"):
        ssim(PICTURES[:, :8], OTHERS[:, :8])
