"""Every error expunge raises on purpose, drawn once.

    ExpungeError
    |-- InputError (ValueError)      something the caller wrote is wrong
    |   |-- ConceptError             a concept or a concept file
    |   |-- SettingError             a hyperparameter: unknown name, wrong type, out of range
    |   |-- PromptError              a prompt or a prompt file
    |   `-- NameRefused              a name that may not become a path
    |-- CatalogueError (LookupError) an id nobody registered, or one that is only planned
    |-- ModelError                   a model cannot be opened or lacks what a method needs
    |   |-- UnsupportedModel         wrong family or layout for this method
    |   |-- MissingPart              a named part or tensor was not found
    |   `-- MissingCapability        the adapter cannot do what was asked
    |-- EditError                    an edit cannot be read or put on a model
    |   |-- EditFormatError          the file is not an edit, is damaged, or has a wrong digest
    |   |-- WrongBase                the edit was fitted on other weights
    |   |-- WrongShape               a tensor of the edit does not fit the model
    |   |-- WrongState               the edits on the model are not those the edit was fitted on
    |   |-- WrongMethod              the edit acts, and the code it needs is not here
    |   `-- NotOnModel               revert or removal of an edit that is not on the model
    |-- NonFiniteError               NaN or infinity in weights, an edit or a loss
    |-- NumericalError               a solve is too ill-conditioned to be trusted
    |-- JudgeError                   a judge cannot be asked, or its answer cannot be read
    |-- RunError                     a run folder: resume mismatch, unfinished, unreadable
    |   `-- ResumeMismatch           the folder holds a run with other settings
    |-- ProtocolError                numbers measured by different protocols were compared
    `-- MissingExtra (ImportError)   an optional library is not installed

Each message is one sentence: what was wrong, where, what is allowed.  ``cure`` says what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CatalogueError",
    "ConceptError",
    "EditError",
    "EditFormatError",
    "ExpungeError",
    "InputError",
    "JudgeError",
    "MissingCapability",
    "MissingExtra",
    "MissingPart",
    "ModelError",
    "NameRefused",
    "NonFiniteError",
    "NotOnModel",
    "NumericalError",
    "PromptError",
    "ProtocolError",
    "ResumeMismatch",
    "RunError",
    "SettingError",
    "UnsupportedModel",
    "WrongBase",
    "WrongMethod",
    "WrongShape",
    "WrongState",
    "candidate",
    "nearest",
]


class ExpungeError(Exception):
    """Base of all errors raised on purpose; ``cure`` is the class's general advice."""

    cure = "Read the message: it names the place and what is allowed."


class InputError(ExpungeError, ValueError):
    """Something the caller wrote is wrong."""

    cure = "Correct the named argument, option or key."


class ConceptError(InputError):
    """A concept or a concept file is wrong."""

    cure = "A concept needs a name; keys are name, kind, phrases, anchor, images, texts."


class SettingError(InputError):
    """A hyperparameter or an option is unknown, of the wrong type or out of range."""

    cure = "`expunge methods ID` lists a method's settings, `expunge COMMAND --help` a command's options."


class PromptError(InputError):
    """A prompt or a prompt file is wrong."""

    cure = "A prompt is a text; a file holds one a line in UTF-8, or JSON lines with a key `text`."


class NameRefused(InputError):
    """A name that may not become a path."""

    cure = "Use letters, digits, spaces, '.', '_' and '-', and no reserved or relative parts."


class CatalogueError(ExpungeError, LookupError):
    """No method, world or judge of that id, or one that is only planned."""

    cure = "`expunge methods` lists every id."


class ModelError(ExpungeError):
    """A model cannot be opened or lacks what a method needs."""

    cure = "A model is `world`, a folder written by save_pretrained, or a hub id."


class UnsupportedModel(ModelError):
    """A method was given a family or a layout it is not defined for."""

    cure = "`expunge methods ID` says for which families a method is defined."


class MissingPart(ModelError):
    """A named part or tensor was not found in the model."""

    cure = "Check that the model is of the layout the method or edit was made for."


class MissingCapability(ModelError):
    """The adapter cannot do what was asked."""

    cure = "`model.capabilities` lists what an adapter can do."


class EditError(ExpungeError):
    """An edit cannot be read or put on a model."""

    cure = "`expunge inspect FILE` shows what an edit needs."


class EditFormatError(EditError):
    """The file is not an edit, is damaged, or its digest does not agree."""

    cure = "Get the file again from where it was made; nothing was loaded."


class WrongBase(EditError):
    """The edit was fitted on other weights."""

    cure = (
        "Load the model the edit names, or allow a sibling by name with `sibling=True` (`--sibling` of the commands "
        "that take `--edit`)."
    )


class WrongShape(EditError):
    """A tensor of the edit does not fit the model."""

    cure = "The edit belongs to another architecture or size."


class WrongState(EditError):
    """The edits on the model are not those the edit was fitted on."""

    cure = (
        "Apply the named edits first (`--edit` for each, in order), or ask for it by name with `rebase=True` "
        "(`--rebase` of the commands that take `--edit`)."
    )


class WrongMethod(EditError):
    """The edit acts while the model runs, and the code it needs is missing or of another version."""

    cure = "Install the version of expunge (or of the package) that made the edit."


class NotOnModel(EditError):
    """An edit was to be taken off a model it is not on."""

    cure = "`model.state` lists the edits on a model."


class NonFiniteError(ExpungeError):
    """NaN or infinity in weights, an edit or a loss."""

    cure = "Lower the learning rate or strength, or use float32; nothing was changed."


class NumericalError(ExpungeError):
    """A solve is too ill-conditioned to be trusted."""

    cure = "Raise the ridge, lower the scales or pass fewer identical phrases."


class JudgeError(ExpungeError):
    """A judge cannot be asked, or what it answered cannot be read."""

    cure = "Nothing was counted: an answer that cannot be read is no verdict. Check the endpoint and its model."


class RunError(ExpungeError):
    """A run folder cannot be used."""

    cure = "Choose another folder or file, or delete this one if it is not needed."


class ResumeMismatch(RunError):
    """The folder holds a run with other settings."""

    cure = "Resume with the recorded settings or choose another folder."


class ProtocolError(ExpungeError):
    """Numbers that were measured by different protocols were compared."""

    cure = "Compare only numbers with the same protocol id."


class MissingExtra(ExpungeError, ImportError):
    """An optional library is not installed."""

    cure = "Install the named extra with pip."


def candidate(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that ``name`` was most likely meant to be, or ``None`` where none is like it."""
    names = sorted(set(map(str, allowed)))
    return next(iter(difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)), None)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The end of an error sentence: ``"; did you mean 'x'?"``, or the allowed names.

    Long lists are cut to twelve names so that the sentence stays readable.  :func:`candidate` gives the name alone.
    """
    names = sorted(set(map(str, allowed)))
    close = candidate(name, names)
    if close is not None:
        return f"; did you mean {close!r}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"; allowed: {shown}" if names else "; nothing is allowed here"
