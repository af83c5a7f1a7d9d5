"""Optional libraries, imported where they are used; without one, a sentence says what to install."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingExtra

__all__ = ["needed"]


def needed(module: str, package: str, extra: str) -> Any:
    """An optional library.

    Args:
        module: What is imported.
        package: What it is called where it is installed from.
        extra: The extra of this distribution that brings it.

    Raises:
        MissingExtra: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{package} is needed here and cannot be imported ({error}); "
            f"install it with: pip install 'expunge[{extra}]'"
        ) from error
