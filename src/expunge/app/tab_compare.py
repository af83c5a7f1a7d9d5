"""The tab that looks: the user's prompts before, after and never, at equal seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from . import choices, inputs, views
from .requests import Comparison
from .windows import QUIET

if TYPE_CHECKING:
    from .layout import Page
    from .session import Session
    from .tab_erase import Erasing

__all__ = ["Looking"]


class Looking:
    """Its parts and what they do."""

    def __init__(self, page: Page) -> None:
        self.page = page
        with gr.Tab("Compare", id="compare"):
            with gr.Row(equal_height=False, elem_classes="x-box"):
                self.prompts = gr.Textbox(
                    "",
                    lines=6,
                    max_lines=12,
                    label="Prompts, one a line",
                    scale=3,
                    min_width=280,
                    placeholder="a red star on the beach",
                    elem_id="prompts",
                )
                with gr.Column(scale=2, min_width=240):
                    with gr.Row(elem_classes="x-joined"):
                        self.seeds = gr.Textbox(
                            "1", label="Seeds a prompt", min_width=100, elem_id="seeds"
                        )
                        self.seed = gr.Textbox("0", label="First seed", min_width=100)
                    with gr.Row(elem_classes="x-joined", visible=True) as self.picture_parts:
                        self.steps = gr.Textbox(
                            "",
                            label="Steps",
                            placeholder="the model's own",
                            min_width=100,
                            elem_id="steps",
                        )
                        self.guidance = gr.Textbox(
                            "", label="Guidance", placeholder="the model's own", min_width=100
                        )
                    self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.grid = gr.HTML(
                views.note(
                    "Write prompts and press Draw: each is drawn before, after and never, with the same noise."
                ),
                elem_id="grid",
            )

    @property
    def on_open_parts(self) -> list[Any]:
        """What :meth:`on_open` gives values to."""
        return [self.picture_parts, self.draw]

    def on_open(self, session: Session) -> list[Any]:
        """Texts have neither steps nor guidance."""
        pictures = session.model.family != "language"
        return [gr.update(visible=pictures), "Draw" if pictures else "Answer"]

    def suggested(self, session: Session, names: Sequence[str]) -> str:
        """Prompts to look at first."""
        return "\n".join(prompt.text for prompt in choices.prompts(session.model, names))

    def wire(self, erasing: Erasing) -> None:
        """Events."""
        shown = [*self.page.job_parts, self.grid]
        self.draw.click(self._drawn, self._given(erasing), shown, **QUIET)

    def draw_from(self, button: Any, all_tabs: Any, erasing: Erasing) -> None:
        """Another button that turns to this tab and draws."""
        turned = button.click(lambda: gr.update(selected="compare"), None, all_tabs, **QUIET)
        turned.then(self._drawn, self._given(erasing), [*self.page.job_parts, self.grid], **QUIET)

    def _given(self, erasing: Erasing) -> list[Any]:
        return [
            self.prompts,
            self.seeds,
            self.seed,
            self.steps,
            self.guidance,
            erasing.concepts,
            erasing.kind,
            erasing.anchor,
            erasing.phrases,
        ]

    def _drawn(
        self,
        prompts: str,
        seeds: str,
        seed: str,
        steps: str,
        guidance: str,
        concepts: list[str],
        kind: str,
        anchor: str,
        phrases: str,
        request: gr.Request,
    ) -> Iterator[list[Any]]:
        session = self.page.windows.of(request)

        def begin() -> Any:
            asked = Comparison(
                inputs.lines(prompts),
                inputs.whole(seeds, "seeds a prompt", 1, 64) or 1,
                inputs.whole(seed, "first seed") or 0,
                inputs.whole(steps, "steps", 1, 1000),
                inputs.number(guidance, "guidance"),
            )
            return session.compare(asked, inputs.wanted(concepts, kind, anchor, phrases))

        for job, shown in self.page.running(session, begin, 1):
            if job is not None and job.state == "done":
                shown = [*shown[:2], views.grid(job.result)]
            yield shown
