"""The report and the contact sheet: self-contained, escaped, readable."""

from __future__ import annotations

import dataclasses
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from expunge import Concept, audit
from expunge.core.sampling import OutputCache
from expunge.errors import InputError
from expunge.evidence import Evidence, plots
from expunge.evidence.gallery import Gallery, Shown, png
from expunge.evidence.schema import CurvePoint
from expunge.method import Prompt

from .stubs import (
    STAR,
    ColourJudge,
    Compares,
    ConstantJudge,
    Forger,
    Painter,
    Password,
    edit,
    triad,
)

HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</style><script>x</script>", "javascript:alert(3)",
    "' onload='alert(4)", "{{ 7 * 7 }}", "$\\frac{1}{0}$", "</svg><svg onload=alert(5)>", "&lt;b&gt;", "\u202egnp.exe",
)  # fmt: skip


class Page(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name.lower(), value or "") for name, value in attributes]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def assert_inert(page: Page) -> None:
    executable = {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
        "foreignobject",
        "animate",
        "set",
    }
    assert not executable & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert "javascript:" not in value.lower() or name in ("alt", "aria-label"), (
            tag,
            name,
            value,
        )
        if name in ("src", "href", "xlink:href", "action", "poster", "srcset", "data"):
            assert value.startswith(("data:image/png;base64,", "#")), (tag, name, value[:60])
        if name == "style":
            assert "url(" not in value.lower() or "url(#" in value.lower(), value


def hostile() -> Evidence:
    model = Painter(HOSTILE[0])
    bad = Concept("star", phrases=HOSTILE[1:3])
    kept = {text: [Prompt(text, 1), Prompt("a heart", 2)] for text in HOSTILE}
    return audit(
        model, [edit(model, star=0.05)], bad, prompts=[Prompt(f"star {text}", i) for i, text in enumerate(HOSTILE)],
        kept=kept, judge=ColourJudge(), attacks=[Password()], command=HOSTILE[1], cache=None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    model, change, _ = triad()
    return audit(model, [change], STAR, attacks=[Password(), Forger()], n=12, kept_n=4, cache=None)


@pytest.fixture(scope="module")
def page(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> str:
    return evidence.report(tmp_path_factory.mktemp("report") / "report.html").read_text(
        encoding="utf-8"
    )


def test_hostile_texts_are_shown_and_do_nothing(tmp_path: Path) -> None:
    page = Page(hostile().report(tmp_path / "r.html").read_text(encoding="utf-8"))
    assert_inert(page)
    said = " ".join(" ".join(page.text).split())
    for text in HOSTILE[:6]:
        assert text in said, text
    assert "49" not in [word.strip("\u201c\u201d") for word in said.split()]


def trained(report: dict) -> Evidence:
    model, change, _ = triad()
    manifest = change.manifest.model_copy(update={"report": report})
    return audit(
        model, [dataclasses.replace(change, manifest=manifest)], STAR, attacks=[], n=2, kept_n=1, cache=None
    )  # fmt: skip


def test_a_trained_edit_shows_its_losses(tmp_path: Path) -> None:
    losses = {"denoiser": [1.0, 0.5, 0.2, 0.1], "discriminator": [None, 0.7, 0.6, 0.7]}
    found = trained({"losses": losses, "losses_every": 2})
    text = found.report(tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert_inert(page)
    assert "Training of stub-eraser" in " ".join(page.text)
    assert "at the end: denoiser 0.1, discriminator 0.7" in text
    shown = plots.loss_plot({"losses": losses, "losses_every": 2})
    assert shown is not None and "denoiser" in shown and "discriminator" in shown
    assert plots.loss_plot({"losses": {"denoiser": [1.0]}}) is None  # one step is no curve
    assert "Training of" not in trained({}).report(tmp_path / "s.html").read_text(encoding="utf-8")


def test_an_attack_that_teaches_is_drawn_along_its_budget(tmp_path: Path) -> None:
    model, change, _ = triad()
    found = audit(model, [change], STAR, attacks=[Password()], n=2, kept_n=1, cache=None)
    (attack,) = found.concepts["star"].attacks
    assert plots.curve_plot(found.concepts["star"]) is None
    attack.curve_of = HOSTILE[0]
    attack.curve = [
        CurvePoint(at=at, hit_erased=hit, hit_never=0.0) for at, hit in ((2, 0.0), (8, 0.5))
    ]
    text = found.report(tmp_path / "r.html").read_text(encoding="utf-8")
    assert_inert(Page(text))
    assert "Along the budget" in text and "password: 0.0\u00a0% at 2, 50.0\u00a0% at 8" in text
    drawn = plots.curve_plot(found.concepts["star"])
    assert drawn is not None and "erased" in drawn and "original" not in drawn


def test_what_acts_and_new_tokens_are_shown_and_do_nothing(tmp_path: Path) -> None:
    found = trained({})
    assert "acts while" not in found.report(tmp_path / "r.html").read_text(encoding="utf-8")
    record = found.concepts["star"].edit
    assert record is not None
    record.acts.append("stub-eraser")
    record.tokens["tokenizer_2"] = [text.replace(" ", "") for text in HOSTILE]
    found.save(tmp_path / "evidence")
    again = Evidence.load(tmp_path / "evidence")
    page = Page(again.report(tmp_path / "s.html").read_text(encoding="utf-8"))
    assert_inert(page)
    said = " ".join(" ".join(page.text).split())
    assert "acts while the model runs" in said and "tokens new to tokenizer_2" in said
    assert all(text.replace(" ", "") in said for text in HOSTILE[:6])


def test_hostile_losses_do_nothing(tmp_path: Path) -> None:
    values = {text: [1.0, 2.0, "x", None, True] for text in HOSTILE[:3]}
    for report in (
        {"losses": values, "losses_every": "</svg>"},
        {"losses": [1]},
        {"losses": {"a": 3}},
    ):
        text = trained(report).report(tmp_path / "r.html").read_text(encoding="utf-8")
        assert_inert(Page(text))


def test_the_check_for_inert_pages_can_fail() -> None:
    for bad in (
        "<script>x</script>",
        "<img src=http://a/b.png>",
        "<a href='javascript:x'>",
        "<p onload=x>",
    ):
        with pytest.raises(AssertionError):
            assert_inert(Page(bad))


def test_the_page_asks_nobody_for_anything(page: str) -> None:
    parsed = Page(page)
    assert_inert(parsed)
    policy = [
        v for tag, name, v in parsed.attributes if tag == "meta" and "default-src 'none'" in v
    ]
    assert len(policy) == 1 and "script-src" not in policy[0]
    assert "@import" not in page
    outside = page.replace("http://www.w3.org/", "").replace("https://www.w3.org/", "")
    assert "http://" not in outside and "https://" not in outside


def test_the_page_says_what_matters(page: str, evidence: Evidence) -> None:
    text = " ".join(" ".join(Page(page).text).split())
    assert " ".join(evidence.verdict.line.split()) in text
    for words in ("Before and after, at equal seeds", "What attacks brought back", "What was kept", "How it was made",
                  "open sesame", "measures nothing", "no attack"):  # fmt: skip
        assert words in text, words
    assert "<svg" in page and "<text" in page and "currentColor" in page


def test_every_picture_has_an_alternative_text_and_a_label(page: str) -> None:
    parsed = Page(page)
    count = parsed.tags.count("img")
    assert count == sum(
        1
        for tag, name, value in parsed.attributes
        if tag == "img" and name == "alt" and len(value) > 10
    )
    assert count >= 18
    assert parsed.tags.count("h1") == 1 and ("html", "lang", "en") in parsed.attributes


def test_without_a_never_the_page_says_so(tmp_path: Path) -> None:
    model = Painter()
    model.companions = triad()[0].companions
    found = audit(
        model, [edit(model, heart=0.0)], "heart", attacks="none", n=4, kept_n=2, cache=None
    )
    text = found.report(tmp_path / "r.html").read_text(encoding="utf-8")
    assert "There is no never model" in text and "No attack was run" in text


def test_a_loaded_evidence_renders_without_pictures(evidence: Evidence, tmp_path: Path) -> None:
    evidence.save(tmp_path)
    again = Evidence.load(tmp_path)
    text = again.report(tmp_path / "again.html").read_text(encoding="utf-8")
    assert "<img" not in text and "made from the numbers alone" in text
    with pytest.raises(InputError, match="no pictures"):
        again.contact_sheet(tmp_path / "sheet.png")


def test_texts_stand_where_pictures_would(evidence: Evidence, tmp_path: Path) -> None:
    again = Evidence.model_validate_json(evidence.to_json())
    answer = "Lisbon <script>alert(1)</script>"
    again.gallery["star"] = Gallery(
        target=[Shown("where?", 0, {"original": answer, "erased": "no idea"}, {"original": True})]
    )
    page = Page(again.report(tmp_path / "r.html").read_text(encoding="utf-8"))
    assert_inert(page)
    assert answer in "".join(page.text) and "blockquote" in page.tags


def test_several_concepts_are_linked(tmp_path: Path) -> None:
    model, change, _ = triad(star=0.0, heart=0.0)
    found = audit(model, [change], ["star", "heart"], attacks="none", n=3, kept_n=2, cache=None)
    page = Page(found.report(tmp_path / "r.html").read_text(encoding="utf-8"))
    links = [v for tag, name, v in page.attributes if tag == "a" and name == "href"]
    ids = {v for _, name, v in page.attributes if name == "id"}
    assert len(links) == 2 and all(link[1:] in ids for link in links)


def test_pictures_stay_crisp() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    enlarged = np.asarray(Image.open(io.BytesIO(png(picture, smallest=20))))
    assert enlarged.shape == (24, 24, 3) and (enlarged[::3, ::3] == picture).all()


def test_the_contact_sheet_has_a_row_for_each_model(evidence: Evidence, tmp_path: Path) -> None:
    image = Image.open(evidence.contact_sheet(tmp_path / "sheet.png"))
    assert image.width > 1000 and image.height > 600
    pixels = np.asarray(image.convert("RGB"), int)
    red = (abs(pixels - np.array([240, 70, 60])).max(axis=-1) < 25).any(axis=1)
    blocks = np.flatnonzero(np.diff(red.astype(int)) == 1).size
    # Original of the prompts; original and erased of one attack; all three of the forger.
    assert blocks >= 5


def test_the_table_escapes_markup_and_fits_a_terminal(evidence: Evidence) -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(evidence.table())
    text = console.export_text()
    assert "100.0 [" in text and "after password" in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_stranger_is_called_as_given_and_scope_leads_the_page(tmp_path: Path) -> None:
    prompts = [Prompt(f"a star number {i}", i) for i in range(12)]
    found = audit(
        Painter("strange"), (), STAR, judge=ColourJudge(), prompts=prompts, attacks=[Password(), Compares()],
        n=12, attack_n=4, cache=None,
    )  # fmt: skip
    # One model asked for one concept may show it always: the judge is not condemned for it.
    assert found.models.erased.target_hit == 1.0 and "judge-constant" not in {
        f.code for f in found.flags
    }
    found.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    body = page[page.index("<main>") :]
    assert (
        body.index("What cannot be concluded")
        < body.index("What still can")
        < body.index("What the model makes")
    )
    for words in (
        "as given",
        "not run: it needs the original model",
        "The model under attack",
        "Under attack",
    ):
        assert words in body
    for words in (
        "Erased model",
        "What attacks brought back",
        ">erased<",
        "unlearning",
        "There is no never model (no never",
    ):
        assert words not in body
    alone = audit(
        Painter("strange"),
        (),
        STAR,
        judge=ConstantJudge(),
        prompts=prompts,
        attacks="none",
        n=12,
        cache=None,
    )
    assert "judge-constant" in {f.code for f in alone.flags}  # equal scores for all of them


def test_the_page_says_what_was_found_ready(tmp_path: Path) -> None:
    model, _, _ = triad()
    cache = OutputCache()
    for left in (0.05, 0.3):
        found = audit(
            model, [edit(model, star=left)], STAR, attacks=[Password()], n=8, kept_n=2, cache=cache
        )
    found.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "not paid for, found ready" in page and "found ready: denoiser.forward 32" in page
    assert f"outputs {found.found['outputs']}" in page


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_table_keeps_the_names_of_its_rows_on_any_terminal(
    evidence: Evidence, width: int
) -> None:
    from io import StringIO

    from rich.console import Console

    stream = StringIO()
    Console(file=stream, width=width).print(evidence.table(width=width))
    shown = stream.getvalue()
    assert "…" not in shown
    assert "unrecognisable" in shown
    assert max(map(len, shown.splitlines())) <= width
    fields = evidence.of()
    low, high = fields.intervals["models.erased.target_hit"]
    assert f"[{100 * low:.0f}, {100 * high:.0f}]" in shown
