"""Published sets of prompts by id, opened when they are needed; nothing of theirs is stored here.

    open_table("i2p:category=sexual,nudity_from=50")

Settings follow a colon, as for judges.  ``docs/benchmarks.md`` has the schema of every table.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping

from ...core.prompt_tables import PromptTable
from ...errors import SettingError, nearest

__all__ = ["TABLES", "open_table", "table_class"]

TABLES: Mapping[str, str] = {
    "i2p": ".i2p:I2P",
    "coco": ".coco:Coco",
    "imagenette": ".imagenette:Imagenette",
    "celebrities": ".celebrities:Celebrities",
    "artists": ".artists:Artists",
    "unlearndiffatk": ".unlearndiffatk_prompts:UnlearnDiffAtkPrompts",
    "p4d": ".p4d_prompts:P4DPrompts",
    "t2isafety": ".t2isafety_prompts:T2ISafetyPrompts",
}


def table_class(id: str) -> type[PromptTable]:
    """The class of a table.

    Raises:
        SettingError: There is none of that id.
    """
    if id not in TABLES:
        raise SettingError(f"benchmark {id!r} is unknown{nearest(id, TABLES)}")
    module, _, name = TABLES[id].partition(":")
    found: type[PromptTable] = getattr(importlib.import_module(module, __package__), name)
    return found


def open_table(specification: str) -> PromptTable:
    """The table of ``id`` or ``id:setting=value,...``.

    Raises:
        SettingError: No such table or setting, or a value of the wrong type.
    """
    id, _, rest = specification.partition(":")
    cls = table_class(id.strip())
    settings = {}
    for piece in re.split(r",(?=\s*[a-z][\w-]*=)", rest) if rest.strip() else ():
        name, equals, value = piece.partition("=")
        if not equals:
            raise SettingError(f"benchmark {id}: {piece!r} is not of the form setting=value")
        settings[name.strip().replace("-", "_")] = value.strip()
    return cls.configured(None, **settings)
