"""Optional libraries, imported where they are used; without one, a sentence says what to install."""

from __future__ import annotations

import contextlib
import importlib
import urllib.error
from collections.abc import Iterator
from typing import Any

from ..errors import MissingExtra, ModelError

__all__ = ["downloading", "needed"]


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


@contextlib.contextmanager
def downloading(package: str, folder: str) -> Iterator[None]:
    """Around what downloads weights on first use.

    Args:
        package: Whose weights they are.
        folder: Where it looks for them first, for the sentence.

    Raises:
        ModelError: They are not there and cannot be downloaded.
    """
    try:
        yield
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise ModelError(
            f"the weights of {package} are not on this machine and cannot be downloaded "
            f"({getattr(error, 'reason', error)}); run it once with a network, or copy them into {folder} from a "
            "machine where it ran"
        ) from error
