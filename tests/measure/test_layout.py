"""Layout similarity: by hand, and blind to what it is meant to be blind to."""

import numpy as np
import pytest

from expunge.errors import InputError
from expunge.measure.layout import layout_similarity, protocol


def pictures(seed=0, n=3):
    return np.random.default_rng(seed).integers(0, 200, (n, 16, 16, 3), dtype=np.uint8)


def test_it_is_the_correlation_of_coarse_pictures():
    one, two = pictures(0), pictures(1)
    found = layout_similarity(one, two, cells=4)
    for a, b, value in zip(one, two, found, strict=True):
        small = [
            np.stack([v[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].mean((0, 1)) for i in range(4) for j in range(4)])
            for v in (a.astype(float), b.astype(float))
        ]  # fmt: skip
        x, y = ((s - s.mean(0)).ravel() for s in small)
        assert value == pytest.approx((x @ y) / np.sqrt((x @ x) * (y @ y)))


def test_equal_layouts_count_as_one_and_brightness_does_not_count():
    one = pictures()
    np.testing.assert_allclose(layout_similarity(one, one), 1)
    np.testing.assert_allclose(layout_similarity(one, one + 30), 1)
    assert (layout_similarity(one, 255 - one) < -0.99).all()
    flat = np.full((1, 16, 16, 3), 9, np.uint8)
    assert layout_similarity(flat, flat)[0] == 1 and layout_similarity(flat, one[:1])[0] == 0


def test_pictures_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="sides"):
        layout_similarity(pictures(), pictures(n=2))
    with pytest.raises(InputError, match="divides"):
        layout_similarity(pictures(), pictures(), cells=5)
    assert "cells=8" in protocol()
