"""The page: what stands where.  What it does is in :mod:`session`, what it shows in :mod:`views`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from . import choices, inputs, views
from .shelf import described
from .tab_audit import Auditing
from .tab_compare import Looking
from .tab_erase import Erasing
from .windows import QUIET, Windows, follow, spoken

if TYPE_CHECKING:
    from .session import Session
    from .shelf import Desk

__all__ = ["CSS", "build", "theme"]

CSS = Path(__file__).with_name("page.css")
HEADER = (
    '<div class="x-head"><h1>expunge</h1><p>Erase a concept from a model, see what is left, '
    "try to bring it back.</p></div>"
)
DARK = "() => { document.body.classList.toggle('dark'); }"
FORMATS = [
    ("diffusers (LoRA)", "diffusers"),
    ("kohya: ComfyUI, A1111 (LoRA)", "kohya"),
    ("PEFT (folder)", "peft"),
    ("full model (folder)", "full"),
]


def theme() -> Any:
    """Fonts of the system (nothing is fetched), quiet colours, small radii."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif")
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size="sm",
        text_size="md",
        font=fonts,
        font_mono=("ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"),
    ).set(
        block_label_text_size="*text_sm",
        block_title_text_weight="600",
        block_shadow="none",
        block_border_width="0px",
        button_primary_background_fill="#1f4f99",
        button_primary_background_fill_hover="#183f7c",
        button_primary_background_fill_dark="#3b74c4",
        button_primary_background_fill_hover_dark="#4a86da",
        button_primary_text_color="#ffffff",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#15171a",
        block_padding="0px",
        input_border_width="1px",
        input_shadow="none",
        checkbox_label_padding="4px 8px",
        button_large_text_weight="600",
        button_large_text_size="*text_md",
        button_medium_text_weight="600",
        button_small_text_weight="500",
        button_secondary_border_color="#c6ccd4",
        button_border_width="1px",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#262a30",
        button_secondary_border_color_dark="#474e58",
        button_primary_border_color="#1f4f99",
        button_large_padding="8px 16px",
        button_large_radius="6px",
        button_medium_radius="6px",
        input_background_fill="#ffffff",
        input_background_fill_dark="#16191d",
        input_border_color="#c6ccd4",
        input_border_color_dark="#474e58",
    )


class Page:
    """The parts that all tabs share: the panel of the running job, the model and the list of edits."""

    def __init__(self, desk: Desk, first: str | None) -> None:
        self.desk, self.windows, self.first = desk, Windows(desk), first
        self.panel: Any = None
        self.stop: Any = None
        self.edits: Any = None
        self.state_of_edits: Any = None
        self.chosen: Any = None

    # -- what is shown -----------------------------------------------------------------------------

    @property
    def job_parts(self) -> list[Any]:
        """The panel and its stop button."""
        return [self.panel, self.stop]

    @property
    def edit_parts(self) -> list[Any]:
        """The list of edits, the line under it, and the list to choose one from."""
        return [self.edits, self.state_of_edits, self.chosen]

    def edit_values(self, session: Session) -> list[Any]:
        """New values of :attr:`edit_parts`."""
        listed = [
            (f"{place}. {held.label}", held.digest)
            for place, held in enumerate(session.edits.held, 1)
        ]
        on = [held.digest for held in session.edits.on]
        return [
            gr.update(choices=listed, value=on, visible=bool(listed)),
            views.edits(session.edits.held),
            gr.update(choices=listed, value=listed[-1][1] if listed else None),
        ]

    def running(self, session: Session, begin: Any, idle: int) -> Iterator[tuple[Any, list[Any]]]:
        """Follow a job: the job once it is over, and what to show in :attr:`job_parts` and ``idle`` other parts."""
        for shown, stoppable, job in follow(session, begin):
            yield job, [shown, gr.update(visible=stoppable), *([gr.skip()] * idle)]

    # -- building ----------------------------------------------------------------------------------

    def side(self) -> dict[str, Any]:
        """The model and the edits on it."""
        with gr.Column(elem_classes="x-box"):
            gr.HTML("<h2>Model</h2>")
            with gr.Row(elem_classes="x-joined"):
                model = gr.Dropdown(
                    [(c.label, c.id) for c in choices.models()],
                    value=self.first,
                    allow_custom_value=True,
                    label="Model",
                    show_label=False,
                    container=False,
                    min_width=150,
                    scale=4,
                    elem_id="model",
                )
                opener = gr.Button("Open", min_width=70, scale=1, elem_id="open")
            card = gr.HTML(
                views.note(
                    "A world, a folder written by save_pretrained, or a hub id (owner/name)."
                ),
                elem_id="card",
            )
        with gr.Column(elem_classes="x-box"):
            gr.HTML("<h2>Edits</h2>")
            self.state_of_edits = gr.HTML(views.edits([]))
            self.edits = gr.CheckboxGroup(
                [],
                label="Edits that are on",
                show_label=False,
                container=False,
                visible=False,
                elem_id="edits",
            )
            load = gr.UploadButton(
                "Load an edit file", file_types=[".safetensors"], size="md", elem_id="load"
            )
            with gr.Accordion("Save, export, remove", open=False, elem_id="export-box"):
                self.chosen = gr.Dropdown([], label="Edit", elem_id="chosen")
                with gr.Row(elem_classes="x-joined"):
                    save = gr.DownloadButton("Save", min_width=100, elem_id="save")
                    remove = gr.Button("Remove", min_width=80, elem_id="remove")
                format = gr.Dropdown(
                    FORMATS, value="diffusers", label="Export for", elem_id="format"
                )
                with gr.Row(elem_classes="x-joined"):
                    rank = gr.Textbox(
                        "",
                        label="Rank",
                        placeholder="as it is",
                        info="Dense edits need one.",
                        min_width=110,
                    )
                    gate = gr.Checkbox(
                        False, label="without its gate", info="Gated edits only.", min_width=110
                    )
                export = gr.Button("Export", elem_id="export")
                exported = gr.File(
                    label="Exported", visible=False, interactive=False, elem_id="exported"
                )
                said = gr.HTML("")
            with gr.Accordion("What stacking allows", open=False):
                rebase = gr.Checkbox(False, label="edits on another stack than they were fitted on")
                sibling = gr.Checkbox(
                    False, label="other weights of the same structure (a fine-tuned sibling)"
                )
        return locals()

    def wire_side(self, parts: dict[str, Any], opened: list[Any], on_open: Any) -> None:
        """Events of :meth:`side`; ``opened`` are parts of the tabs that ``on_open(session)`` gives new values."""
        windows, card = self.windows, parts["card"]

        def open_model(name: str, request: gr.Request) -> Iterator[list[Any]]:
            session = windows.of(request)
            idle = 1 + len(self.edit_parts) + len(opened)
            for job, shown in self.running(session, lambda: session.open(name), idle):
                if job is not None and job.state == "done":
                    shown = [
                        *shown[:2],
                        views.card(described(job.result)),
                        *self.edit_values(session),
                        *on_open(session),
                    ]
                yield shown

        def take_in(file: str, request: gr.Request) -> Iterator[list[Any]]:
            session = windows.of(request)
            for job, shown in self.running(session, lambda: session.load(file), 3):
                yield [*shown[:2], *self.edit_values(session)] if job is not None else shown

        def switched(digests: list[str], request: gr.Request) -> str:
            session = windows.of(request)
            session.edits.switch(digests)
            return views.edits(session.edits.held)

        def removed(digest: str, request: gr.Request) -> list[Any]:
            session = windows.of(request)
            session.edits.remove(session.edits.find(digest).digest)
            return self.edit_values(session)

        def allowed(rebase: bool, sibling: bool, request: gr.Request) -> None:
            session = windows.of(request)
            session.edits.rebase, session.edits.sibling = rebase, sibling

        def saved(digest: str | None, request: gr.Request) -> Any:
            held = [one for one in windows.of(request).edits.held if one.digest == digest]
            return gr.update(value=str(held[0].file) if held else None, interactive=bool(held))

        opening = [card, *self.edit_parts, *opened]
        parts["opener"].click(open_model, parts["model"], [*self.job_parts, *opening], **QUIET)
        parts["load"].upload(take_in, parts["load"], [*self.job_parts, *self.edit_parts], **QUIET)
        self.edits.input(spoken(switched), self.edits, self.state_of_edits, **QUIET)
        parts["remove"].click(spoken(removed), self.chosen, self.edit_parts, **QUIET)
        for box in (parts["rebase"], parts["sibling"]):
            box.input(spoken(allowed), [parts["rebase"], parts["sibling"]], None, **QUIET)
        self.chosen.change(spoken(saved), self.chosen, parts["save"], **QUIET)
        self.wire_export(parts)

    def wire_export(self, parts: dict[str, Any]) -> None:
        """The export button."""

        def export(
            digest: str, format: str, rank: str, gate: bool, request: gr.Request
        ) -> Iterator[list[Any]]:
            """Write the chosen edit for another program, and offer the files."""
            session = self.windows.of(request)

            def begin() -> Any:
                return session.export(digest, format, inputs.whole(rank, "rank", 1), gate)

            for job, shown in self.running(session, begin, 2):
                if job is not None and job.state == "done":
                    path, report = job.result
                    files = (
                        [str(path)]
                        if path.is_file()
                        else sorted(str(f) for f in path.rglob("*") if f.is_file())
                    )
                    shown = [
                        *shown[:2],
                        gr.update(value=files, visible=True),
                        views.exported(report, path),
                    ]
                yield shown

        given = [self.chosen, parts["format"], parts["rank"], parts["gate"]]
        parts["export"].click(
            export, given, [*self.job_parts, parts["exported"], parts["said"]], **QUIET
        )

    def wire_stop(self) -> None:
        """The stop button of the panel."""

        def stop(request: gr.Request) -> None:
            job = self.windows.of(request).job
            if job is not None:
                job.stop()

        self.stop.click(stop, None, None, **QUIET)


def build(desk: Desk, first: str | None) -> Any:
    """The whole page."""
    page = Page(desk, first)
    with gr.Blocks(
        title="expunge", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)
    ) as blocks:
        with gr.Row(elem_classes="x-top"):
            gr.HTML(HEADER)
            dark = gr.Button("Light / dark", size="sm", min_width=110, scale=0, elem_id="dark")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300, elem_classes="x-side"):
                side = page.side()
            with gr.Column(scale=7, min_width=300):
                with gr.Row(elem_classes="x-panel"):
                    page.panel = gr.HTML(views.note("Nothing is running."), elem_id="panel")
                    page.stop = gr.Button(
                        "Stop",
                        visible=False,
                        size="sm",
                        min_width=80,
                        scale=0,
                        elem_id="stop",
                        variant="stop",
                    )
                with gr.Tabs(elem_id="tabs") as all_tabs:
                    erasing = Erasing(page)
                    looking = Looking(page)
                    auditing = Auditing(page)
        parts: list[Any] = [erasing, looking, auditing]
        opened = [component for part in parts for component in part.on_open_parts]
        page.wire_side(
            side, opened, lambda session: [v for part in parts for v in part.on_open(session)]
        )
        page.wire_stop()
        erasing.wire(looking, all_tabs)
        looking.wire(erasing)
        auditing.wire(erasing)
        dark.click(None, None, None, js=DARK, api_visibility="private")
        blocks.unload(page.windows.drop)
        if first is not None:
            blocks.load(
                None,
                None,
                None,
                js="() => setTimeout(() => document.querySelector('#open').click(), 50)",
                api_visibility="private",
            )
    return blocks
