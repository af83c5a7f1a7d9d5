"""Shared mathematics and machinery of the methods, named for what it is.

What two methods share lives here, so that no method imports another: closed-form edits
(:mod:`closed_form`) and which text rows they map (:mod:`token_policy`), the training loop, sampling,
prompt search.  Nothing here knows a concept, a paper or a world.
"""
