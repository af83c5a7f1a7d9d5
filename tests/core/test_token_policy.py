"""Every token policy on hand-made and real token rows, empty guides, and streaming."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from expunge.core.token_policy import (
    POLICIES,
    TOKEN_GROUPS,
    Pair,
    accumulate,
    kept_rows,
    paired_rows,
    span,
    stream_pairs,
    stream_rows,
    unique_pairs,
)
from expunge.errors import PromptError, SettingError
from expunge.testing import tiny_diffusion

CLIP = SimpleNamespace(bos_token_id=90, eos_token_id=91, pad_token_id=91)
OPEN_CLIP = SimpleNamespace(bos_token_id=90, eos_token_id=91, pad_token_id=0)
T5 = SimpleNamespace(bos_token_id=None, eos_token_id=1, pad_token_id=0)
LENGTH = 10


def clip(*content: int):
    ids = [90, *content, 91]
    return span(CLIP, ids + [91] * (LENGTH - len(ids)))


def test_start_content_and_end_are_found_whatever_the_tokenizer():
    text = clip(5, 6, 7)
    assert (text.first, text.last, text.end, text.content) == (1, 3, 4, (5, 6, 7))
    zero_padded = span(OPEN_CLIP, [90, 5, 6, 91, 0, 0])
    assert (zero_padded.first, zero_padded.last, zero_padded.end) == (1, 2, 3)
    exclaimed = span(OPEN_CLIP, [90, 5, 0, 6, 91, 0, 0])  # what pads may stand in the text as well
    assert (exclaimed.last, exclaimed.content) == (3, (5, 0, 6))
    sentence_piece = span(T5, [5, 6, 1, 0, 0])
    assert (sentence_piece.first, sentence_piece.last, sentence_piece.end) == (0, 1, 2)
    endless = span(T5, [5, 6, 0, 0])  # a tokenizer that sets no end token, as Gemma's
    assert (endless.last, endless.end) == (1, 2)
    full = span(T5, [5, 6, 7])  # cut at the context length: no end token is left
    assert (full.first, full.last, full.end) == (0, 2, 3)
    assert span(T5, [1, 0, 0]).last == 0


def test_an_empty_text_counts_with_its_start_row():
    empty = clip()
    assert (empty.first, empty.last, empty.end, empty.content) == (1, 0, 1, ())
    assert paired_rows("last_token", clip(5, 6), empty) == ([2], [0])
    assert kept_rows("last_token", empty) == [0]


def test_rows_from_the_last_content_to_the_end_are_aligned():
    # i = 3, k = 1, m = 3: old [3 : 10), new [1 : 8).
    assert paired_rows("last_token_to_end_aligned", clip(5, 6, 7), clip(8)) == (
        list(range(3, 10)),
        list(range(1, 8)),
    )
    # The other way round, i = 1, k = 3: old [1 : 8), new [3 : 10).
    assert paired_rows("last_token_to_end_aligned", clip(8), clip(5, 6, 7)) == (
        list(range(1, 8)),
        list(range(3, 10)),
    )
    # Empty guide, k = 0: the start row pairs with the last content row.
    old, new = paired_rows("last_token_to_end_aligned", clip(5, 6), clip())
    assert (old, new) == (list(range(2, 10)), list(range(8)))


def test_the_other_policies():
    long, short = clip(5, 6, 7), clip(8)
    assert paired_rows("last_token", long, short) == ([3], [1])
    assert paired_rows("all_rows", long, short) == (list(range(10)), list(range(10)))
    assert paired_rows("eot_only", long, short) == ([4], [2])
    assert paired_rows("keyword_tokens", long, short) == ([1, 2, 3], [9, 9, 9])
    assert paired_rows("keyword_tokens", long, short, keyword=[6, 7]) == ([2, 3], [9, 9])
    assert paired_rows("keyword_tokens", clip(6, 5, 6), short, keyword=[6])[0] == [1, 3]
    with pytest.raises(PromptError, match="keyword"):
        paired_rows("keyword_tokens", long, short, keyword=[7, 6])
    with pytest.raises(SettingError, match="last_token"):
        paired_rows("last_tokens", long, short)


def test_kept_texts_give_one_row_or_all():
    assert kept_rows("last_token", clip(5, 6)) == [2]
    assert kept_rows("content_to_end", clip(5, 6)) == [1, 2, 3]
    for policy in set(POLICIES[1:]) - {"content_to_end"}:
        assert kept_rows(policy, clip(5, 6)) == list(range(LENGTH))


def test_content_is_aligned_from_the_end_backwards():
    long, short = clip(5, 6, 7), clip(8)
    assert paired_rows("content_to_end", long, short) == ([1, 2, 3, 4], [1, 1, 1, 2])
    assert paired_rows("content_to_end", short, long) == ([1, 2], [3, 4])
    assert paired_rows("content_to_end", long, clip()) == ([1, 2, 3, 4], [1, 1, 1, 1])
    assert paired_rows("content_to_end", clip(), short) == ([1], [2])
    cut = span(T5, [5, 6, 7])  # no end token is left
    assert paired_rows("content_to_end", cut, cut) == ([0, 1, 2], [0, 1, 2])
    pooled = span(None, [0])
    assert paired_rows("content_to_end", pooled, pooled) == ([0], [0])


def test_groups_of_rows_that_only_an_ablation_weighs():
    long, short = clip(5, 6, 7), clip(8)
    assert paired_rows("sot_only", long, short) == ([0], [0])
    # One row for each of the paddings of the erased text: rows 5 to 9, and 3 to 9.
    assert paired_rows("last_row_only", long, short) == ([9] * 5, [9] * 5)
    assert paired_rows("last_row_only", short, long) == ([9] * 7, [9] * 7)
    no_start = span(T5, [5, 6, 1, 0, 0])
    assert paired_rows("sot_only", no_start, no_start) == ([], [])
    assert paired_rows("last_row_only", no_start, no_start) == ([4, 4], [4, 4])
    cut = span(T5, [5, 6, 7])
    assert paired_rows("last_row_only", cut, cut) == ([], [])
    pooled = span(None, [0])
    for group in ("sot_only", "last_row_only"):
        assert paired_rows(group, pooled, pooled) == ([0], [0])
    assert not {"sot_only", "last_row_only"} & set(POLICIES)
    assert {"eot_only", "keyword_tokens"} < set(TOKEN_GROUPS)


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.mark.parametrize("policy", POLICIES)
def test_streamed_rows_are_the_rows_of_the_encoded_texts(model, policy, monkeypatch):
    pairs = [("red star", "circle"), ("star", ""), ("a blue heart", "a plain photo of")]
    wanted = []
    for old, new in pairs:
        spans = [span(model.tokenizer, ids.tolist()) for ids in model.token_ids([old, new])]
        rows = model.encode([old, new]).embeddings
        a, b = paired_rows(policy, *spans)
        wanted.append((rows[0, a], rows[1, b]))
    monkeypatch.setattr("expunge.core.token_policy.CHUNK", 2)
    blocks = list(stream_pairs(model.text_inputs()[0], pairs, policy))
    assert [len(block.sizes) for block in blocks] == [2, 1]
    for column, name in enumerate(("sources", "targets")):
        found = torch.cat([getattr(block, name) for block in blocks])
        assert torch.allclose(found, torch.cat([w[column] for w in wanted]), atol=1e-5)
    sizes = [size for block in blocks for size in block.sizes]
    assert sizes == [len(w[0]) for w in wanted]


def test_only_the_keywords_rows_are_mapped_whatever_stands_around_it(model):
    texts = ["a photo of star", "star", "plain red star of a red star"]
    pairs = [Pair(text, "circle", "star") for text in texts]
    (block,) = stream_pairs(model.text_inputs()[0], pairs, "keyword_tokens")
    assert block.sizes == (1, 1, 2)
    rows = model.encode(texts).embeddings
    wanted = torch.stack([rows[0, 4], rows[1, 1], rows[2, 3], rows[2, 7]])
    torch.testing.assert_close(block.sources, wanted, atol=1e-5, rtol=1e-5)
    (whole,) = stream_pairs(
        model.text_inputs()[0], [Pair(text, "circle") for text in texts], "keyword_tokens"
    )
    assert whole.sizes == (
        4,
        1,
        7,
    )  # control: without a keyword the template's words are mapped too
    moments = accumulate(model.text_inputs()[0], pairs, (), "keyword_tokens", erase=1.0, keep=0.0)
    assert moments.erase_rows == 4
    torch.testing.assert_close(
        moments.source, wanted.double().T @ wanted.double(), atol=1e-4, rtol=1e-4
    )
    with pytest.raises(PromptError, match="keyword"):
        list(
            stream_pairs(
                model.text_inputs()[0], [Pair("a photo", "circle", "star")], "keyword_tokens"
            )
        )


def test_a_text_is_erased_once_with_its_longest_keyword():
    pairs = [
        Pair("red star", "dot", "star"),
        Pair("red star", "dot", "red star"),
        Pair("star", "dot"),
    ]
    assert unique_pairs(pairs) == [pairs[1], pairs[2]]
    assert unique_pairs([pairs[0], Pair("red star", "", "star")])[1].replacing == ""


def test_memory_of_texts_is_not_kept_in_the_model(model):
    before = len(model._texts)
    accumulate(
        model.text_inputs()[0],
        [(f"star {i}", "") for i in range(40)],
        ["red"],
        "last_token",
        erase=1.0,
        keep=1.0,
    )
    assert len(model._texts) == before


def test_moments_of_texts_count_rows_and_scales(model):
    pairs, kept = [("star", "circle"), ("red star", "")], ["heart", "square"]
    one = accumulate(model.text_inputs()[0], pairs, kept, "last_token", erase=2.0, keep=0.5)
    assert (one.erase_rows, one.keep_rows) == (2, 2)
    rows = torch.cat(list(stream_rows(model.text_inputs()[0], kept, "last_token"))).double()
    assert torch.allclose(one.kept, 0.5 * rows.T @ rows)
    whole = accumulate(model.text_inputs()[0], pairs, kept, "all_rows", erase=1.0, keep=1.0)
    assert (whole.erase_rows, whole.keep_rows) == (32, 32)


def test_aligned_rows_are_what_two_texts_share_around_the_concept():
    # "a b X Y" against "a b Z": start, a, b; end; padding from each one's own end until the longer is full.
    old, new = paired_rows("aligned", clip(1, 2, 7, 8), clip(1, 2, 9))
    assert old == [0, 1, 2, 5, 6, 7, 8, 9] and new == [0, 1, 2, 4, 5, 6, 7, 8]
    # The name in the middle: the words after it are paired by their distance from the end.
    old, new = paired_rows("aligned", clip(1, 7, 8, 9, 2, 3), clip(1, 5, 2, 3))
    assert old == [0, 1, 5, 6, 7, 8, 9] and new == [0, 1, 3, 4, 5, 6, 7]
    # A longer replacing text is the one that limits the padding.
    old, new = paired_rows("aligned", clip(1, 7), clip(1, 4, 5, 6))
    assert old == [0, 1, 3, 4, 5, 6, 7] and new == [0, 1, 5, 6, 7, 8, 9]


def test_aligned_keeps_a_word_shared_at_an_edge_and_drops_the_middle_of_a_repeated_name():
    # The two phrases share their last piece 8: it is paired.
    old, new = paired_rows("aligned", clip(1, 7, 8), clip(1, 9, 8))
    assert old[:4] == [0, 1, 3, 4] and new[:4] == [0, 1, 3, 4] and len(old) == 9
    # Named twice: what stands between the first and the last mention is dropped, shared words too.
    old, new = paired_rows("aligned", clip(1, 7, 2, 7, 3), clip(1, 9, 2, 9, 3))
    assert old == [0, 1, 5, 6, 7, 8, 9] == new
    # A prefix is never counted again as a suffix.
    old, new = paired_rows("aligned", clip(4, 4), clip(4, 4, 4))
    assert old == [0, 1, 2, 3, 4, 5, 6, 7, 8] and new == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_aligned_empty_equal_and_full_texts():
    old, new = paired_rows("aligned", clip(7), clip())
    assert old == [0, 2, 3, 4, 5, 6, 7, 8, 9] and new == list(range(9))
    assert paired_rows("aligned", clip(5, 6), clip(5, 6)) == (list(range(LENGTH)),) * 2
    # Cut at the context length, without an end token: nothing after the concept is left to pair.
    full = span(T5, [5, 6, 7, 8])
    assert paired_rows("aligned", full, span(T5, [5, 9, 1, 0])) == ([0], [0])
