"""A sweep as tasks of a Ray cluster: one task a cell, sent when the cells it needs are finished."""

from __future__ import annotations

import os
import time
from typing import Any

from ...core.extras import needed
from .bench import Bench
from .engine import PAUSE, Tell, task, threads
from .plan import Cell, Plan
from .store import Store

__all__ = ["execute"]

RETRIES = 3
"""How often Ray sends a task again whose node was lost; a finished cell is found, not done again."""


def _ray() -> Any:
    return needed("ray", "Ray", "cluster")


def execute(bench: Bench, plan: Plan, store: Store, address: str, tell: Tell) -> None:
    """Send what is not finished to the cluster at an address and wait for it.

    Args:
        bench, plan, store: The work; ``store`` lies where every node sees it under the same path.
        address: ``auto``, ``local``, or ``ray://HOST:PORT``.
        tell: Hears of every cell.

    Raises:
        MissingExtra: Ray is not installed.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        ray.init(address=address, runtime_env={"env_vars": threads(os.cpu_count() or 1)})
    try:
        _drive(ray, bench, plan, store, tell)
    finally:
        if ours:
            ray.shutdown()


def _drive(ray: Any, bench: Bench, plan: Plan, store: Store, tell: Tell) -> None:
    needs: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES}
    if bench.options.device.startswith("cuda"):
        needs["num_gpus"] = 1
    remote = ray.remote(**needs)(task)
    text, folder = bench.options.text(), str(store.folder.resolve())
    left: dict[str, Cell] = dict(plan.cells)
    sent: dict[Any, Cell] = {}
    while left or sent:
        for key, cell in list(left.items()):
            if store.finished(key) or store.failed(key) or any(map(store.failed, cell.needs)):
                del left[key]
                tell(cell, "found" if store.finished(key) else "failed")
            elif all(map(store.finished, cell.needs)):
                sent[remote.remote(text, folder, key)] = left.pop(key)
        if not sent:
            if left:  # they wait for a cell that another sweep has in work
                time.sleep(PAUSE)
            continue
        (done, *_), _ = ray.wait(list(sent), num_returns=1)
        cell = sent.pop(done)
        status = _status(ray, done, cell, store)
        if status in ("busy", "waits"):
            left[cell.key] = cell
            time.sleep(PAUSE)
        else:
            tell(cell, status)


def _status(ray: Any, done: Any, cell: Cell, store: Store) -> str:
    try:
        return str(ray.get(done))
    except Exception as error:  # whatever happened on the node belongs to this cell alone
        store.fail(cell.key, cell.title, str(error) or type(error).__name__)
        return "failed"
