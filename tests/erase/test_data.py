"""Examples that a method would ignore are refused, by every eraser; those that it reads are checked."""

from __future__ import annotations

import pytest

from expunge import catalogue
from expunge.errors import InputError
from expunge.testing import bench as on

ERASERS = [system.id for system in catalogue.implemented("erase")]
IGNORE = ("all-but-one", "esd", "realera", "sld", "spm")
ONLY = {
    "ant": "form='multi'", "few-shot-erasing": "zero_shot=False", "rece": "select=True", "uce": "technique='debias'",
}  # fmt: skip


@pytest.mark.parametrize("id", ERASERS)
def test_data_is_never_ignored(id):
    """What no method can read: whoever reads data says what is allowed, and the others that they read none."""
    method = catalogue.resolve(id)
    bench = on.bench(method)
    with pytest.raises(InputError, match=r"\bdata\b|^prompts is <object"):
        on.quick(method).erase(bench.opens(), bench.concept, keep=bench.keep, data=object())


@pytest.mark.parametrize("id", [*IGNORE, *ONLY])
def test_a_method_that_reads_none_says_so_before_any_work(id):
    method = catalogue.resolve(id)
    bench = on.bench(method)
    model, made = bench.opens(), on.quick(method)
    if id == "few-shot-erasing":
        made = type(made)(zero_shot=True)
    reads = f"only with {ONLY[id]}" if id in ONLY else "no examples"
    with pytest.raises(InputError) as caught:
        made.erase(model, bench.concept, data={"captions": ["a circle"]})
    assert reads in str(caught.value) and str(caught.value).startswith(f"{id}: data was given")
    assert not model.cost.counts and not len(model.edits)
