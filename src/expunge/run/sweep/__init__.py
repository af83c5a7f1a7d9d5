"""The matrix: every eraser against every attack on the same concepts, seeds and prompts, resumable.

    expunge sweep --model world --erasers all --attacks all --concepts star,striped,hazard --seeds 0,1,2 --out FOLDER

A cell is one piece of work: fitting an eraser, looking at an arm's pictures, or one attack on one arm.  It
is finished when a folder named by the hash of its request exists, and that folder appears in one step, so a
sweep resumes by looking.

    options   what was asked for, as it travels to other processes
    bench     the opened model with its companions, prompts and arms
    plan      the cells, cheapest first, each with everything that can change its answer
    store     run folders and claims that end with the process that holds them
    cells     the work itself
    engine    one process, several, or a Ray cluster
    forecast  what it will cost
    record    the compact form of finished cells
    numbers, board, drawing, page   the leaderboard made of it
"""

from __future__ import annotations

__all__ = ["RESULTS"]

RESULTS = 2
"""Raised whenever what a cell records may change though no method did; part of every request."""
