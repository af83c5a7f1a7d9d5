"""The tab that erases: concepts, a method and its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..concept import KINDS, Concept, common_kind
from ..errors import InputError
from . import choices, inputs, views
from .form import Form
from .requests import Erasure, unfinished
from .windows import QUIET, spoken

if TYPE_CHECKING:
    from .layout import Page
    from .session import Session
    from .tab_compare import Looking

__all__ = ["Erasing"]

STOPPED = "Stopped. Resume goes on from the last checkpoint, where the method keeps one."


class Erasing:
    """Its parts and what they do."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.looking: Looking  # built after this tab
        with gr.Tab("Erase", id="erase"):
            with gr.Row(equal_height=False):
                with gr.Column(min_width=280, elem_classes="x-box"):
                    self._concepts()
                with gr.Column(min_width=280, elem_classes="x-box"):
                    self._method()
            with gr.Accordion(
                "Settings of the method",
                open=False,
                elem_id="settings",
                elem_classes="x-box x-form",
            ):
                self.form = Form()
            with gr.Row(elem_classes="x-actions"):
                self.erase = gr.Button(
                    "Erase", variant="primary", min_width=120, scale=0, elem_id="erase"
                )
                self.look = gr.Button(
                    "See before and after",
                    min_width=170,
                    scale=0,
                    interactive=False,
                    elem_id="look",
                )
            self.result = gr.HTML("")
            with gr.Accordion(
                "Unfinished erasures", open=False, visible=False, elem_classes="x-box"
            ) as self.pile:
                gr.HTML(
                    views.note(
                        "Begun in this folder and interrupted. They go on from their last checkpoint."
                    )
                )
                with gr.Row(elem_classes="x-joined"):
                    self.begun = gr.Dropdown(
                        [],
                        label="Unfinished erasure",
                        show_label=False,
                        container=False,
                        elem_id="begun",
                    )
                    self.resume = gr.Button("Resume", min_width=90, scale=0, elem_id="resume")

    def _concepts(self) -> None:
        gr.HTML("<h2>What to forget</h2>")
        self.concepts = gr.Dropdown(
            [],
            multiselect=True,
            allow_custom_value=True,
            label="Concepts",
            elem_id="concepts",
            info="Choose what the world knows, or type any name and press Enter.",
        )
        with gr.Column(visible=False, elem_classes="x-plain") as self.details:
            with gr.Row(elem_classes="x-joined"):
                self.kind = gr.Dropdown(
                    list(KINDS), value="object", label="Kind", min_width=110, elem_id="kind"
                )
                self.anchor = gr.Textbox(
                    "",
                    label="Anchor",
                    placeholder="left to the method",
                    min_width=110,
                    elem_id="anchor",
                )
            self.phrases = gr.Textbox(
                "",
                label="Other phrasings",
                placeholder="separated by commas",
                elem_id="phrases",
                info="Texts that mean the same; all of them are erased.",
            )
        self.keep = gr.Dropdown(
            [],
            multiselect=True,
            allow_custom_value=True,
            label="Preserve",
            elem_id="keep",
            info="What the method is told to leave alone.",
        )
        self.neighbours = gr.Button(
            "Add the concept's neighbours", size="sm", visible=False, elem_id="neighbours"
        )

    def _method(self) -> None:
        gr.HTML("<h2>How</h2>")
        self.method = gr.Dropdown([], label="Method", elem_id="method")
        self.about = gr.HTML("")
        with gr.Row(elem_classes="x-joined"):
            self.preset = gr.Dropdown([], label="Preset", min_width=130, elem_id="preset")
            self.seed = gr.Textbox("0", label="Seed", min_width=80, elem_id="seed")

    # -- a model was opened ------------------------------------------------------------------------

    @property
    def on_open_parts(self) -> list[Any]:
        """What :meth:`on_open` gives values to."""
        fixed = [self.concepts, self.keep, self.neighbours, self.method, self.pile, self.begun]
        return [*fixed, self.preset, self.about, *self.form.parts]

    def on_open(self, session: Session) -> list[Any]:
        """Choices of an open model."""
        known = [(c.label, c.id) for c in choices.concepts(session.model)]
        methods = [(c.label, c.id) for c in session.methods()]
        ids = [id for _, id in methods]
        first = next((id for id in ("rece", "uce") if id in ids), ids[0] if ids else None)
        return [
            gr.update(choices=known, value=[]),
            gr.update(choices=known, value=[]),
            gr.update(visible=False),
            gr.update(choices=methods, value=first),
            *self._pile(session),
            *self._filled(first, None, session.model.companions is not None),
        ]

    def _filled(self, method: str | None, kind: str | None, world: bool) -> list[Any]:
        """Presets of a method, a line about it, and its settings."""
        names, first = _presets(method, kind, world)
        line = views.about(method) if method else ""
        return [gr.update(choices=names, value=first), line, *self.form.shown(method, first)]

    def _pile(self, session: Session) -> list[Any]:
        begun = [
            (f"{', '.join(r.wanted.names)} with {r.method}", name)
            for name, r in unfinished(session.desk.runs)
            if r.model == session.name
        ]
        return [
            gr.update(visible=bool(begun), label=f"Unfinished erasures ({len(begun)})"),
            gr.update(choices=begun, value=begun[0][1] if begun else None),
        ]

    # -- what happens ------------------------------------------------------------------------------

    def wire(self, looking: Looking, all_tabs: Any) -> None:
        """Events."""
        self.looking, of = looking, self.page.windows.of

        def told(chosen: list[str], method: str | None, request: gr.Request) -> list[Any]:
            """What is known of the chosen concepts, and the preset for their kind."""
            session = of(request)
            if session.name is None:
                return [gr.skip()] * 6
            one = _known(session, chosen[0]) if len(chosen) == 1 else None
            world = session.model.companions is not None
            kind = (
                one.kind
                if one is not None
                else common_kind([_known(session, name) for name in chosen])
            )
            names, first = _presets(method, kind, world)
            return [
                gr.update(visible=len(chosen) == 1),
                one.kind if one else "object",
                one.anchor or "" if one else "",
                ", ".join(one.phrases) if one else "",
                gr.update(visible=bool(chosen) and world),
                gr.update(choices=names, value=first),
            ]

        def described(
            method: str | None, chosen: list[str], kind: str, request: gr.Request
        ) -> list[Any]:
            session = of(request)
            world = session.name is not None and session.model.companions is not None
            return self._filled(method, kind if len(chosen) == 1 else None, world)

        def filled(method: str | None, preset: str | None) -> list[Any]:
            known = preset in _presets(method, None, False)[0]
            return self.form.shown(method, preset) if known else [gr.skip()] * len(self.form.parts)

        def neighbours(chosen: list[str], keep: list[str], request: gr.Request) -> list[str]:
            session = of(request)
            companions, found = session.model.companions, list(keep or [])
            for name in chosen:
                if companions is not None:
                    found += companions.neighbours(_known(session, name))
            return [n for n in dict.fromkeys(found) if n not in chosen]

        self.concepts.change(
            spoken(told),
            [self.concepts, self.method],
            [self.details, self.kind, self.anchor, self.phrases, self.neighbours, self.preset],
            **QUIET,
        )
        self.method.change(
            spoken(described),
            [self.method, self.concepts, self.kind],
            [self.preset, self.about, *self.form.parts],
            **QUIET,
        )
        self.preset.change(spoken(filled), [self.method, self.preset], self.form.parts, **QUIET)
        self.neighbours.click(spoken(neighbours), [self.concepts, self.keep], self.keep, **QUIET)
        self._wire_erase()
        self._wire_resume()
        looking.draw_from(self.look, all_tabs, self)

    def _wire_erase(self) -> None:
        fixed = [
            self.concepts,
            self.kind,
            self.anchor,
            self.phrases,
            self.method,
            self.preset,
            self.keep,
            self.seed,
        ]

        # A set of inputs comes as one mapping: there are too many of them for names.
        def erase(values: dict[Any, Any], request: gr.Request) -> Iterator[list[Any]]:
            """Erase with what stands in the fields."""
            session = self.page.windows.of(request)

            def begin() -> Any:
                """Read the fields; every mistake in them is an error here."""
                chosen, kind, anchor, phrases, method, preset, keep, seed = (
                    values[part] for part in fixed
                )
                if not method:
                    raise InputError("no method is chosen; open a model first")
                wanted = inputs.wanted(chosen, kind, anchor, phrases)
                session.concepts(wanted)
                parts = self.form.parts
                changed = self.form.changes(method, preset, [values[part] for part in parts])
                number = inputs.whole(seed, "seed") or 0
                asked = Erasure(
                    session.name or "", wanted, method, preset, changed, tuple(keep or ()), number
                )
                return session.erase(asked)

            yield from self._follow(session, begin)

        self.erase.click(erase, {*fixed, *self.form.parts}, self._shown(), **QUIET)

    def _shown(self) -> list[Any]:
        return [
            *self.page.job_parts,
            *self.page.edit_parts,
            self.result,
            self.look,
            self.erase,
            self.pile,
            self.begun,
            self.looking.prompts,
        ]

    def _follow(self, session: Session, begin: Any) -> Iterator[list[Any]]:
        for job, shown in self.page.running(session, begin, len(self._shown()) - 2):
            if job is None:
                yield shown
                continue
            over = [*shown[:2], *self.page.edit_values(session)]
            if job.state == "done":
                made = job.result
                told = "made before, read from its folder" if made.before else "made"
                text = views.note(
                    f"{made.held.label}: {told}. It is on now, and saved as {made.held.file}",
                    "good",
                )
                over += [
                    text + views.code(made.command),
                    gr.update(interactive=True, variant="primary"),
                    "Erase",
                ]
                over += [*self._pile(session), self.looking.suggested(session, made.held.concepts)]
            else:
                text = views.note(STOPPED) if job.state == "stopped" else ""
                over += [
                    text,
                    gr.skip(),
                    "Resume" if job.state == "stopped" else "Erase",
                    *self._pile(session),
                    gr.skip(),
                ]
            yield over

    def _wire_resume(self) -> None:
        def resume(name: str | None, request: gr.Request) -> Iterator[list[Any]]:
            session = self.page.windows.of(request)

            def begin() -> Any:
                found = dict(unfinished(session.desk.runs))
                if name not in found:
                    raise InputError("choose an unfinished erasure first")
                return session.erase(found[name])

            yield from self._follow(session, begin)

        self.resume.click(resume, self.begun, self._shown(), **QUIET)


def _known(session: Session, name: str) -> Concept:
    companions = session.model.companions
    return (companions.concept(name) if companions is not None else None) or Concept(name)


def _presets(method: str | None, kind: str | None, world: bool) -> tuple[list[str], str | None]:
    """A method's presets, and the one to begin with."""
    return choices.presets(method, kind, world) if method else ([], None)
