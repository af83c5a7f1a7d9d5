"""Erasers side by side on the same work: one concept, many at once, one after another.

    python -m expunge.run.comparison --table star,hazard
    python -m expunge.run.comparison --people 1,5,20,32 --objects 1,3,6 --sequence 20

Every cell is one piece of work (a method, a set of concepts, a seed) and becomes one JSON record under
``results/comparison`` as soon as it is measured, named by the hash of its request; what is recorded is
not measured again.  :mod:`.units` says what a cell is, :mod:`.work` measures it, :mod:`.page` makes the
tables and plots of ``docs/comparison.md`` from the records alone.
"""
