"""Units of a concept and the change they make, on numbers small enough for pencil and paper."""

from __future__ import annotations

import pytest
import torch

from expunge.core.concept_features import Deactivated, Deactivation, peaks, used
from expunge.core.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from expunge.core.text_activations import Rows, Site
from expunge.errors import SettingError, UnsupportedModel
from expunge.models.types import Context

SITE = Site("text_encoder", "text_encoder.encoder.layers.1", 3, start=7, end=8)


@pytest.fixture(scope="module")
def autoencoder():
    """The two largest of three numbers: ``W_e`` and ``W_d`` are identities, both biases zero."""
    config = SparseAutoencoderConfig.configured("itd", width=3, units=3, k=2)
    made = SparseAutoencoder(config)
    with torch.no_grad():
        made.encoder.copy_(torch.eye(3))
        made.atoms.copy_(torch.eye(3))
    return made.eval().requires_grad_(False)


#              start        content      end          padding
HIDDEN = [[9.0, 0, 0], [3.0, 2, 1], [0.0, 4, 1], [5.0, 0, 0]]
OTHER = [[9.0, 0, 0], [0.0, 2, 1], [0.0, 4, 1], [0.0, 6, 0]]


def rows(*texts):
    hidden = torch.tensor(texts)
    real = torch.tensor([True, True, True, False]).expand(len(texts), 4)
    first = torch.tensor([True, False, False, False]).expand(len(texts), 4)
    return Rows(hidden, real, first)


def mask(*units):
    found = torch.zeros(3, dtype=torch.bool)
    found[list(units)] = True
    return found


def test_peaks_leave_out_the_start_and_see_padding(autoencoder):
    assert peaks(autoencoder, rows(HIDDEN, OTHER)).tolist() == [[5, 4, 1], [0, 6, 1]]


def test_only_units_that_are_on_are_among_the_strongest(autoencoder):
    assert used(autoencoder, [rows(HIDDEN)], 1).tolist() == [True, False, False]
    assert used(autoencoder, [rows(OTHER)], 1).tolist() == [False, True, False]
    assert used(autoencoder, [rows(HIDDEN), rows(OTHER)], 1).tolist() == [True, True, False]
    assert used(autoencoder, [rows(OTHER)], 128).tolist() == [False, True, True]
    assert not used(autoencoder, [], 3).any()


@pytest.mark.parametrize(("start", "error"), [("replaced", 82 / 9), ("kept", 82 / 6)])
def test_the_edited_reconstruction_and_its_error(autoencoder, start, error):
    # Content: z = (3, 2, 0) -> z' = (-6, 2, 0), so x' - x = (-9, 0, -1).  End and start: no unit of F, no error.
    # Padding: z' = (-10, 0, 0), which has no say in e.
    read = Deactivated(SITE, autoencoder, mask(0), -2.0, start).of(rows(HIDDEN))
    assert read.hidden[0].tolist() == [[9, 0, 0], [-6, 2, 0], [0, 4, 1], [-10, 0, 0]]
    assert float(read.errors) == pytest.approx(error)


def test_the_start_is_never_deactivated_but_may_be_reconstructed(autoencoder):
    odd = rows([[9.0, 2, 1], *HIDDEN[1:]])
    replaced = Deactivated(SITE, autoencoder, mask(0), -2.0).of(odd)
    kept = Deactivated(SITE, autoencoder, mask(0), -2.0, "kept").of(odd)
    assert replaced.hidden[0, 0].tolist() == [9, 2, 0] and kept.hidden[0, 0].tolist() == [9, 2, 1]
    assert float(replaced.errors) == pytest.approx((1 / 3 + 82 / 3) / 3)


def test_without_a_unit_only_the_reconstruction_errs_and_tau_one_changes_nothing_more(autoencoder):
    plain = Deactivated(SITE, autoencoder, mask(), -8.0).of(rows(HIDDEN))
    one = Deactivated(SITE, autoencoder, mask(0, 1, 2), 1.0).of(rows(HIDDEN))
    assert torch.equal(plain.hidden, one.hidden) and torch.equal(plain.errors, one.errors)
    assert float(plain.errors) == pytest.approx(1 / 9)


def test_the_error_does_not_depend_on_padding(autoencoder):
    one = Deactivated(SITE, autoencoder, mask(0), -8.0)
    more = rows(HIDDEN)
    longer = Rows(
        torch.cat([more.hidden, torch.full((1, 5, 3), 7.0)], 1),
        torch.cat([more.real, torch.zeros(1, 5, dtype=torch.bool)], 1),
        torch.cat([more.first, torch.zeros(1, 5, dtype=torch.bool)], 1),
    )
    assert torch.equal(one.of(longer).errors, one.of(more).errors)


def context(*ids):
    return Context(layer=SITE.layer, ids=torch.tensor(ids))


IDS = (7, 1, 8, 8)


def test_a_text_without_a_unit_has_no_say_in_the_least_error(autoencoder):
    # Of the second text unit 0 is on in the padding alone, which has no say.
    one = Deactivated(SITE, autoencoder, mask(0), 1.0)
    texts = [rows(HIDDEN), rows([[0.0, 0, 0], [0.0, 0, 0], [0.0, 2, 0], [5.0, 0, 0]])]
    assert one.read(texts)[1].tolist() == [True, False]
    assert one.errors(texts).tolist() == pytest.approx([1 / 9, 0])
    assert one.least_error(texts) == pytest.approx(1 / 9)
    assert one.least_error(texts[1:]) == 0
    off = Deactivated(SITE, autoencoder, mask(0), 0.0)
    assert off.read(texts)[1].tolist() == [True, False]


def test_texts_at_the_threshold_are_edited_and_others_stay_bit_for_bit(autoencoder):
    one = Deactivated(SITE, autoencoder, mask(0), -2.0)
    error = float(one.of(rows(HIDDEN)).errors)
    both = torch.tensor([HIDDEN, [[9.0, 0, 0], [1.0, 3, 2], *OTHER[2:]]])
    at = Deactivation([Deactivated(SITE, autoencoder, mask(0), -2.0, threshold=error)])
    made = at.activations(context(IDS, IDS), both)
    assert torch.equal(made[1], both[1])
    assert made[0, 1].tolist() == [-6, 2, 0]
    above = Deactivation([Deactivated(SITE, autoencoder, mask(0), -2.0, threshold=error * 1.0001)])
    assert above.activations(context(IDS, IDS), both) is both
    always = Deactivation([Deactivated(SITE, autoencoder, mask(0), -2.0)])
    assert not torch.equal(always.activations(context(IDS, IDS), both)[1], both[1])


def test_half_precision_comes_back_as_it_came(autoencoder):
    control = Deactivation([Deactivated(SITE, autoencoder, mask(0), -2.0)])
    made = control.activations(context(IDS), torch.tensor([HIDDEN]).half())
    assert made.dtype == torch.float16 and made[0, 1].tolist() == [-6, 2, 0]


def test_refusals(autoencoder):
    one = Deactivated(SITE, autoencoder, mask(0), -2.0)
    with pytest.raises(SettingError, match="two changes of one layer"):
        Deactivation([one, one])
    with pytest.raises(UnsupportedModel, match="not given token ids"):
        Deactivation([one]).activations(Context(layer=SITE.layer), torch.tensor([HIDDEN]))
