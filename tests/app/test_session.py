"""A window without a window: open, erase, stop, resume, stack, compare, load, export, audit."""

import threading

import numpy as np
import pytest

from expunge.app import choices
from expunge.app.comparing import MAX_PICTURES
from expunge.app.requests import Comparison, Erasure, Examination, Wanted, unfinished
from expunge.app.session import Session
from expunge.app.shelf import Desk, described
from expunge.edit import Edit
from expunge.errors import (
    CatalogueError,
    ConceptError,
    EditFormatError,
    InputError,
    PromptError,
    RunError,
    SettingError,
)

from .small import COMPANIONS, desk_with, session_on, without

STAR = Wanted(("star",))
SLOW = {"steps": "200", "bank": "none"}


def done(job, seconds=120):
    assert job.wait(seconds), job.state
    assert job.state == "done", job.error
    return job.result


def failed(job, seconds=60):
    assert job.wait(seconds)
    assert job.state == "failed", job.state
    return job.error


def request(method="uce", wanted=STAR, **more):
    return Erasure("tiny", wanted, method, **{"preset": "paper", **more})


@pytest.fixture
def session(tmp_path):
    return session_on(desk_with(tmp_path))


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    session = session_on(desk_with(tmp_path_factory.mktemp("runs")))
    done(session.erase(request()))
    return session


def weights(session):
    return {name: t.detach().clone() for name, t in session.model.tensors().items()}


def same(before, session):
    return all((before[n] == t).all() for n, t in session.model.tensors().items())


def test_nothing_can_be_done_before_a_model_is_open(tmp_path):
    session = Session(Desk(tmp_path))
    for act in (
        lambda: session.erase(request()),
        lambda: session.compare(Comparison(("a",))),
        lambda: session.model,
    ):
        with pytest.raises(InputError, match="no model is open"):
            act()
    with pytest.raises(InputError, match="no model was named"):
        session.open("  ")
    assert "is no model" in failed(session.open("no-such-thing"))
    assert session.name is None


def test_what_the_world_knows_is_offered_what_the_never_model_lacks_first(session):
    offered = choices.concepts(session.model)
    assert [c.id for c in offered] == ["star", "night", "heart", "moon"]
    assert offered[0].help == "reference" and offered[1].label == "night (style)"
    rows = dict(described(session.model))
    assert rows["Open"] == "tiny" and "trained without star" in rows["Never"]


def test_concepts_are_completed_by_the_world_unless_it_was_said(session):
    assert session.concepts(STAR)[0].anchor == "thing"
    own = session.concepts(Wanted(("star",), "style", "dot", ("comet",)))[0]
    assert (own.kind, own.anchor, own.phrases) == ("style", "dot", ("comet",))
    with pytest.raises(ConceptError, match="no concept is chosen"):
        session.concepts(Wanted(()))


def test_an_erasure_leaves_the_model_alone_and_joins_the_list(erased):
    held = erased.edits.held[0]
    assert held.on and held.concepts == ["star"] and held.label.startswith("uce: star (")
    assert Edit.load(held.file) == held.edit
    assert not len(erased.model.edits)
    assert (held.file.parent / "edit.json").exists() and unfinished(erased.desk.runs) == []


def test_asking_again_reads_what_was_made(erased):
    file = erased.edits.held[0].file
    stamp = file.stat().st_mtime_ns
    made = (
        done(
            erased.erase(
                request(),
            )
        )
        if not erased.edits.on
        else None
    )
    assert made is None, "with the edit on, the same request is another one"
    erased.edits.switch([])
    made = done(erased.erase(request()))
    assert made.before and made.held is erased.edits.held[0] and made.held.on
    assert file.stat().st_mtime_ns == stamp and len(erased.edits.held) == 1
    assert made.command.startswith(
        "expunge erase --model tiny --concept star --method uce --preset paper"
    )


def test_mistakes_are_told_before_a_job_begins(session):
    with pytest.raises(InputError, match="no eraser for diffusion models"):
        session.erase(request("graddiff"))
    with pytest.raises(SettingError, match="erase_scale"):
        session.erase(request(settings={"erase_scale": "much"}))
    with pytest.raises(ConceptError, match="anchor"):
        session.erase(request(wanted=Wanted(("star",), "object", "star")))
    assert session.job.label.startswith("Opening")


def test_a_stopped_training_goes_on_where_it_was(session):
    before = weights(session)
    training = request("esd", settings=SLOW)
    job = session.erase(training)
    while not (job.report is not None and job.report.done >= 3) and not job.over:
        threading.Event().wait(0.01)
    with pytest.raises(RunError, match="still busy"):
        session.compare(Comparison(("a star",)))
    job.stop()
    assert job.wait(60) and job.state == "stopped", job.error
    assert same(before, session), "the model is as it was found"
    assert [r for _, r in unfinished(session.desk.runs)] == [training]
    stopped_at = job.report.done
    again = session.erase(unfinished(session.desk.runs)[0][1])
    while again.report is None and not again.over:
        threading.Event().wait(0.005)
    assert again.report is not None and again.report.done >= stopped_at - 1
    again.stop()
    assert again.wait(60)


def test_before_after_never_at_equal_seeds(erased):
    erased.edits.switch([held.digest for held in erased.edits.held])
    grid = done(
        erased.compare(
            Comparison(("a star number 0", "a moon", "a starlet"), seeds=2, seed=5, steps=2)
        )
    )
    assert grid.columns == ("before", "after", "never") and grid.notes == ()
    assert [(r.prompt, r.seed) for r in grid.rows[:3]] == [
        ("a star number 0", 5),
        ("a star number 0", 6),
        ("a moon", 5),
    ]
    assert [r.asks for r in grid.rows] == [True, True, False, False, True, True]
    first = grid.rows[0].cells
    alone = erased.model.generate(["a star number 0"], seeds=[5], steps=2)[0]
    assert np.array_equal(first["before"].output, alone)
    assert not np.array_equal(first["after"].output, alone)
    assert grid.shown("before")[1] == 4, "prompts that ask for it are counted"


def test_without_edits_there_is_no_after(session):
    grid = done(session.compare(Comparison(("a star",), steps=1), STAR))
    assert grid.columns == ("before", "never") and "No edit is on" in grid.notes[0]
    grid = done(session.compare(Comparison(("a moon",), steps=1), Wanted(("moon",))))
    assert grid.columns == ("before",) and "trained with 'moon'" in grid.notes[1]


def test_a_model_without_companions_says_what_is_missing(tmp_path):
    session = session_on(desk_with(tmp_path, None))
    assert choices.concepts(session.model) == []
    done(session.erase(request()))
    grid = done(session.compare(Comparison(("a star",), steps=1)))
    assert grid.columns == ("before", "after") and grid.shown("after") is None
    assert any("no never model" in note for note in grid.notes) and any(
        "Nobody judges" in n for n in grid.notes
    )
    with pytest.raises(InputError, match="no judge of its own"):
        session.audit(Examination(n=1))
    assert (
        "judge 'clipp' is unknown" in failed(session.audit(Examination(n=1, judge="clipp"))).lower()
    )
    assert dict(described(session.model))["Judge"].startswith("none of its own")
    # Prompts are made where no world has any.
    assert [p.text for p in choices.prompts(session.model, ["star"])] == [
        "a photo of star",
        "a painting of star",
    ]


def test_a_judge_that_does_not_know_the_concept_is_a_sentence(tmp_path):
    class Narrow(COMPANIONS.judge):
        def judge(self, outputs, concept, prompts):
            raise InputError(f"the oracle does not know {concept.name!r}")

    session = session_on(desk_with(tmp_path, without(judge=Narrow)))
    grid = done(session.compare(Comparison(("a star",), steps=1), STAR))
    assert (
        grid.shown("before") is None and "is not judged: the oracle does not know" in grid.notes[-1]
    )


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        (Comparison(("  ", "")), PromptError, "no prompt"),
        (Comparison(("a",), seeds=0), InputError, "seeds"),
        (Comparison(("a",), steps=0), InputError, "steps is 0"),
        (Comparison(("a",), guidance=-1), InputError, "guidance"),
        (Comparison(("a",), seeds=MAX_PICTURES + 1), PromptError, f"at most {MAX_PICTURES}"),
    ],
)
def test_comparisons_out_of_range_are_refused(session, asked, error, words):
    with pytest.raises(error, match=words):
        session.compare(asked)


def test_edits_are_loaded_checked_stacked_and_removed(erased, tmp_path):
    file = erased.edits.held[0].file
    other = session_on(desk_with(tmp_path / "runs"))
    held = done(other.load(file))
    assert (
        held.on
        and held.file.parent.parent == other.desk.runs
        and held.edit == erased.edits.held[0].edit
    )
    second = done(other.erase(request(wanted=Wanted(("moon",)))))
    assert second.held.edit.manifest.fitted_on == [held.digest], "it was fitted on what was on"
    grid = done(other.compare(Comparison(("a moon",), steps=1)))
    assert "after" in grid.columns and any("trained with 'moon'" in n for n in grid.notes)
    # The lower one off: the upper one was not fitted on that, unless leave is given.
    other.edits.switch([second.held.digest])
    assert "Leave can be given" in failed(other.compare(Comparison(("a moon",), steps=1)))
    other.edits.rebase = True
    done(other.compare(Comparison(("a moon",), steps=1)))
    other.edits.remove(held.digest)
    assert [one.concepts for one in other.edits.held] == [["moon"]]
    with pytest.raises(InputError, match="is in the list"):
        other.edits.find(held.digest)


def test_files_that_are_no_edits_are_refused_at_the_door(session, tmp_path, monkeypatch):
    bad = tmp_path / "x.safetensors"
    bad.write_bytes(b"\0" * 64)
    assert "x.safetensors: is not a safetensors file" in failed(session.load(bad))
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(EditFormatError, match=r"ends in \.safetensors"):
        session.load(tmp_path / "x.pt")
    monkeypatch.setattr("expunge.app.session.MAX_FILE", 10)
    with pytest.raises(EditFormatError, match="at most 10 B"):
        session.load(bad)
    assert session.edits.held == []


def test_an_edit_of_other_weights_is_refused_in_words(erased, tmp_path):
    desk = Desk(tmp_path)
    from expunge.testing import tiny_diffusion

    model = tiny_diffusion(3)
    desk.models["other"] = desk.watched(model)
    session = session_on(desk, "other")
    assert "was fitted on other weights" in failed(session.load(erased.edits.held[0].file))


def test_exports_for_other_programs(erased):
    digest = erased.edits.held[0].digest
    file, report = done(erased.export(digest, "diffusers"))
    assert file.is_file() and report["tensors"] > 0 and erased.desk.runs in file.parents
    folder, _ = done(erased.export(digest, "peft"))
    assert (folder / "adapter_config.json").is_file()
    assert "format 'zip' is unknown" in failed(erased.export(digest, "zip")).lower()
    with pytest.raises(InputError, match="choose an edit"):
        erased.export(None, "diffusers")


def test_an_audit_writes_its_report_where_it_can_be_found(erased):
    erased.edits.switch([held.digest for held in erased.edits.held])
    asked = Examination(budget="quick", n=2, kept_n=1, attack_n=1)
    made = done(erased.audit(asked))
    fields = made.evidence.of("star")
    assert fields.models.never is not None and fields.models.original is not None
    assert made.evidence.command.startswith("expunge audit --model tiny --concept star --edit ")
    names = [name for name, _ in erased.reports()]
    assert (
        made.files["report"].parent.name in names and erased.report(names[0]).name == "report.html"
    )
    for bad in ("../x", "/etc", ""):
        with pytest.raises(InputError, match="no report"):
            erased.report(bad)


def test_an_audit_needs_an_edit_and_known_attacks(session, erased):
    with pytest.raises(InputError, match="no edit is on"):
        session.audit(Examination())
    with pytest.raises(CatalogueError, match="unlearndiffatk"):
        erased.audit(Examination(attacks=("unlearndifatk",)))


def test_the_never_model_is_opened_once_and_can_be_stopped_too(tmp_path):
    opened = []

    def never():
        from expunge.testing import tiny_diffusion

        opened.append(tiny_diffusion(1))
        return opened[-1]

    session = session_on(desk_with(tmp_path, without(never=never)))
    done(session.compare(Comparison(("a star",), steps=1), STAR))
    done(session.compare(Comparison(("a star b",), steps=1), STAR))
    assert len(opened) == 1 and opened[0].cost.watcher is not None


def test_a_model_nobody_uses_is_closed(tmp_path):
    desk = desk_with(tmp_path)
    first, second = session_on(desk), session_on(desk)
    first.close()
    desk.queue.submit("", lambda: None).wait(10)
    assert "tiny" in desk.models
    second.close()
    desk.queue.submit("", lambda: None).wait(10)
    assert desk.models == {}
