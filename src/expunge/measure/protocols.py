"""The registry of protocols: what each published number is, and what may be compared with what.

    protocol("nudenet/mace").threshold        # 0.6
    ranking({"uce": a, "rece": b})            # refuses numbers of different protocols

The facts stand in ``core/protocols.toml``; docs/metrics.md shows them as a table.
"""

from __future__ import annotations

from ..core.protocols import (
    Protocol,
    Record,
    column,
    full_id,
    markdown,
    protocol,
    protocols,
    ranking,
    same_protocol,
)

__all__ = [
    "Protocol",
    "Record",
    "column",
    "full_id",
    "markdown",
    "protocol",
    "protocols",
    "ranking",
    "same_protocol",
]
