"""The form of a method's settings: a fixed number of places, filled anew for each method and preset.

Places that are there from the start, and not made anew for each method, so that the button beside them always
finds the values it reads.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from .. import catalogue
from ..errors import ExpungeError, InputError
from . import choices

__all__ = ["Form"]

CONTROLS = ("text", "list", "switch")


class Form:
    """Its places; each has a text field, a list and a switch, of which one at most is to be seen."""

    def __init__(self) -> None:
        self.of = gr.State("")
        self.places: list[dict[str, Any]] = []
        with gr.Row(elem_classes="x-settings"):
            for _ in range(_most()):
                common: dict[str, Any] = {
                    "visible": False,
                    "interactive": True,
                    "elem_classes": "x-setting",
                }
                self.places.append(
                    {
                        "text": gr.Textbox("", max_lines=2, min_width=160, **common),
                        "list": gr.Dropdown([], min_width=160, **common),
                        "switch": gr.Checkbox(False, min_width=160, **common),
                    }
                )

    @property
    def parts(self) -> list[Any]:
        """All components, the one that says whose form it is first."""
        return [self.of, *(place[control] for place in self.places for control in CONTROLS)]

    def shown(self, method: str | None, preset: str | None) -> list[Any]:
        """New values of :attr:`parts`."""
        fields = choices.form(method, preset) if method and preset else []
        updates: list[Any] = [_name(method, preset)]
        for place in range(len(self.places)):
            field = fields[place] if place < len(fields) else None
            updates += [_update(field, control) for control in CONTROLS]
        return updates

    def changes(self, method: str, preset: str | None, values: list[Any]) -> dict[str, str]:
        """What was changed, from the values of :attr:`parts`.

        Raises:
            InputError: The form on the page is still another method's.
        """
        if preset is None or values[0] != _name(method, preset):
            raise InputError(
                "the settings of this method are still being read; press the button again"
            )
        fields, width = choices.form(method, preset), len(CONTROLS)
        typed = [values[1 + width * k + CONTROLS.index(f.control)] for k, f in enumerate(fields)]
        return choices.changes(fields, typed)


def _name(method: str | None, preset: str | None) -> str:
    return f"{method}/{preset}"


def _update(field: choices.Field | None, control: str) -> Any:
    if field is None or field.control != control:
        return gr.update(visible=False)
    more = {"choices": list(field.choices)} if control == "list" else {}
    label = field.name.replace("_", " ")
    return gr.update(visible=True, label=label, info=field.help, value=field.value, **more)


def _most() -> int:
    """The most settings that any eraser has."""
    most = 0
    for entry in catalogue.implemented("erase"):
        try:
            most = max(most, len(catalogue.resolve(entry.id).describe()))
        except ExpungeError:
            continue  # an extra that is not installed
    return most
