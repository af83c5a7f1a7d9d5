"""Edits that act: the control of a method, rebuilt from the catalogue by id and version.

A file names a method, never a class path, so a file cannot choose which code runs.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..errors import CatalogueError, EditFormatError, MissingCapability, WrongMethod, nearest

if TYPE_CHECKING:
    from ..method import Control, Eraser
    from ..models.base import Model
    from . import Edit
    from .manifest import Manifest

__all__ = ["build", "method_of"]


def method_of(manifest: Manifest) -> type[Eraser]:
    """The class whose control goes with an edit.

    Raises:
        WrongMethod: Nobody registered the id, it is only planned, it is no eraser, or it has another version.
        MissingExtra: It needs an optional library.
    """
    from .. import catalogue
    from ..method import Eraser

    what = f"the edit of {manifest.method} acts while the model runs"
    try:
        found = catalogue.resolve(manifest.method)
    except CatalogueError as error:
        raise WrongMethod(f"{what}, and the code it needs is not here: {error}") from None
    if not issubclass(found, Eraser):
        raise WrongMethod(f"{what}, but {manifest.method} is no eraser, so it has no control")
    if found.version != manifest.version:
        raise WrongMethod(
            f"{what} by the code of version {manifest.version}; here is version {found.version} of {manifest.method}"
        )
    return found


def check(edit: Edit, model: Model) -> None:
    """Refuse an acting edit whose method is not here, or a model in which nothing can act."""
    if "controls" not in model.capabilities:
        raise MissingCapability(
            f"the edit of {edit.manifest.method} acts while the model runs; {model.name} ({model.family}) "
            "takes no controls"
        )
    method, settings = method_of(edit.manifest), edit.manifest.settings
    known = {field.name for field in dataclasses.fields(method)}
    for name in sorted(settings.keys() - known):
        raise EditFormatError(
            f"the edit of {method.id} names the setting {name!r}, which version {method.version} of it does not have"
            f"{nearest(name, known)}"
        )


def build(edit: Edit, model: Model) -> Control:
    """The control of an edit that has just been put on the model."""
    from ..method import Control

    control = method_of(edit.manifest).control(edit, model)
    if not isinstance(control, Control):
        raise WrongMethod(
            f"{edit.manifest.method}: control() returned {type(control).__name__}; a Control is needed"
        )
    return control
