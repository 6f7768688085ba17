"""What benchmarks/sampled_vocabulary concludes from its results."""

import pytest
from benchmarks.sampled_vocabulary import beside_full, groups_of, ids_of, page, targets


def entry(vocabulary, kl, *, model="small", tokens=49_152, steps=120):
    config = {"vocabulary": vocabulary, "num_steps": steps, "warm_start_tokens": 8192}
    return {"model": model, "tokens": tokens, "config": config, "layers": [0, 1], "kl": kl}


@pytest.fixture
def found():
    return [entry(512, [1.1, 1.1]), entry("full", [1.0, 1.0]), entry(2660, [1.008, 1.008]), entry(2660, [9.0, 9.0], steps=24)]


def test_runs_compare_with_the_full_vocabulary_of_the_same_length_only(found):
    short, long = sorted(groups_of(found), key=len)
    assert [ids_of(e) for e in long] == [49_152, 2660, 512]
    assert beside_full(long[2], long) == pytest.approx(0.1)
    assert beside_full(short[0], short) is None


def test_the_verdict_is_that_of_the_default_sample(found):
    (target,) = targets(groups_of(found))
    assert target.met
    assert target.measured == "+0.80% with 2,660 of 49,152 ids"
    (target,) = targets(groups_of([entry("full", [1.0, 1.0]), entry(2660, [1.02, 1.02])]))
    assert not target.met


def test_the_page_marks_the_default_sample(found):
    assert "| small | 49,152 | **2,660**: +0.80% · 512: +10.00% |" in page(found)
