"""`expunge ui`: the window in a browser, on this machine only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import MODEL_HELP, DeviceOption, DtypeOption

__all__ = ["ui"]


def ui(
    model: Annotated[
        str, typer.Option("--model", "-m", help=MODEL_HELP + " It is opened first.")
    ] = "world",
    runs: Annotated[
        Path, typer.Option(help="Folder that receives edits, exports and reports.")
    ] = Path("runs"),
    port: Annotated[
        int | None,
        typer.Option(min=1024, max=65535, help="The first free one from 7860 on otherwise."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="This machine only: 127.0.0.1; anything else is refused.")
    ] = "127.0.0.1",
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
) -> None:
    """Erase, compare and audit in a browser (needs the extra `ui`)."""
    from ..app import launch

    launch(model, runs, host=host, port=port, browser=browser, device=device, dtype=dtype)
