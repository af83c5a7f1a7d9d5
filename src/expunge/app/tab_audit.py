"""The tab that audits: attacks, a budget, and the report inside the page."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..measure.judges import known_ids
from . import choices, inputs, views
from .requests import Examination
from .windows import QUIET, spoken

if TYPE_CHECKING:
    from pathlib import Path

    from .layout import Page
    from .session import Session
    from .tab_erase import Erasing

__all__ = ["Auditing"]


class Auditing:
    """Its parts and what they do."""

    def __init__(self, page: Page) -> None:
        self.page = page
        with gr.Tab("Audit", id="audit"):
            with gr.Row(equal_height=False, elem_classes="x-box"):
                with gr.Column(scale=3, min_width=280):
                    self.attacks = gr.CheckboxGroup(
                        [],
                        label="Attacks",
                        elem_id="attacks",
                        info="Each runs with the same prompts, seed and budget on every model.",
                    )
                    self.judge = gr.Textbox(
                        "", label="Judge", placeholder="the model's own", elem_id="judge"
                    )
                    self.who = gr.HTML("")
                with gr.Column(scale=2, min_width=240):
                    self.budget = gr.Dropdown(
                        [(b.label, b.id) for b in choices.budgets()],
                        value="quick",
                        elem_id="budget",
                        label="Budget for each attacked prompt",
                    )
                    with gr.Row(elem_classes="x-joined"):
                        self.n = gr.Textbox("24", label="Prompts", min_width=70, elem_id="n")
                        self.kept_n = gr.Textbox(
                            "4", label="Kept, each", min_width=70, elem_id="kept-n"
                        )
                        self.attack_n = gr.Textbox(
                            "6", label="Attacked", min_width=70, elem_id="attack-n"
                        )
                        self.seed = gr.Textbox("0", label="Seed", min_width=60)
                    self.audit = gr.Button("Audit what is on", variant="primary", elem_id="audit")
            with gr.Row(elem_classes="x-joined x-reports"):
                self.reports = gr.Dropdown(
                    [],
                    label="Reports in the folder of runs",
                    elem_id="reports",
                    scale=4,
                    min_width=240,
                )
                self.download = gr.DownloadButton(
                    "Save", min_width=120, scale=1, interactive=False, elem_id="download"
                )
            self.frame = gr.HTML(
                views.note("No report is open. An audit of the edits that are on writes one."),
                elem_id="report",
            )

    @property
    def on_open_parts(self) -> list[Any]:
        """What :meth:`on_open` gives values to."""
        return [self.attacks, self.judge, self.who, self.reports]

    def on_open(self, session: Session) -> list[Any]:
        """Attacks for the family, a CLIP where nobody judges, reports made before."""
        found = choices.attacks(session.model.family)
        companions = session.model.companions
        judged = companions is not None and companions.judge is not None
        usual = [a.id for a in found if "searches" in a.label] if judged else []
        return [
            gr.update(choices=[(a.label, a.id) for a in found], value=usual),
            gr.update(placeholder="the model's own" if judged else "classifier:model=FOLDER"),
            views.judges(known_ids(session.model), judged),
            self._reports(session, None),
        ]

    def _reports(self, session: Session, chosen: str | None) -> Any:
        listed = [name for name, _ in session.reports()]
        return gr.update(choices=listed, value=chosen)

    def wire(self, erasing: Erasing) -> None:
        """Events."""

        def audited(
            attacks: list[str],
            budget: str,
            n: str,
            kept_n: str,
            attack_n: str,
            seed: str,
            judge: str,
            request: gr.Request,
        ) -> Iterator[list[Any]]:
            """Audit what is on, and open the report."""
            session = self.page.windows.of(request)

            def begin() -> Any:
                asked = Examination(
                    attacks=tuple(attacks or ()),
                    budget=budget,
                    n=inputs.whole(n, "prompts", 1, 10_000) or 1,
                    kept_n=inputs.whole(kept_n, "kept prompts", 1, 1_000) or 1,
                    attack_n=inputs.whole(attack_n, "attacked prompts", 1, 1_000) or 1,
                    seed=inputs.whole(seed, "seed") or 0,
                    judge=(judge or "").strip() or None,
                )
                return session.audit(asked)

            for job, shown in self.page.running(session, begin, 3):
                if job is not None and job.state == "done":
                    file = job.result.files["report"]
                    shown = [*shown[:2], self._reports(session, file.parent.name), *_opened(file)]
                yield shown

        def opened(name: str | None, request: gr.Request) -> list[Any]:
            if not name:
                return [gr.skip(), gr.skip()]
            return _opened(self.page.windows.of(request).report(name))

        given = [
            self.attacks,
            self.budget,
            self.n,
            self.kept_n,
            self.attack_n,
            self.seed,
            self.judge,
        ]
        shown = [self.frame, self.download]
        self.audit.click(audited, given, [*self.page.job_parts, self.reports, *shown], **QUIET)
        self.reports.input(spoken(opened), self.reports, shown, **QUIET)


def _opened(file: Path) -> list[Any]:
    """A report in a frame, and its button."""
    # The time in the address: a report that was written anew is not taken from the browser's memory.
    address = f"/gradio_api/file={urllib.parse.quote(str(file))}?{int(file.stat().st_mtime)}"
    return [
        views.report_frame(address, file.parent.name),
        gr.update(value=str(file), interactive=True),
    ]
