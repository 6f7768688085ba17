"""Results have the same bits every time, and are equal within rounding for any number of threads and any instruction set."""

import mlx.core as mx
import numpy as np
import pytest

from metalens import _ext
from metalens.ops import Norm, lens_kl, lens_stats, lens_target, translate_norm
from support import oracle

# Threads split the vocabulary and add their parts; each instruction set has its own vectors and exponential. The results differ by float32 roundings,
# in sums of logits of size 1 to 10.
ROUNDING = 2e-5

# Write every result of every operation on rows to a file: few and many rows, vocabularies for one and for several threads, all kinds of head.
SCRIPT = """
import sys
import mlx.core as mx, numpy as np
from support import oracle
from metalens import _ext, use_backend
from metalens.ops import Norm, lens_compare, lens_kl, lens_stats, lens_target, translate_norm
mx.set_default_device(mx.cpu)
rng = np.random.default_rng(3)
results = {}
with use_backend("native"):
    for vocab, layers, tokens in ((70, 1, 1), (3001, 2, 1), (3001, 3, 5), (600, 70, 9)):
        for name, settings in oracle.HEADS.items():
            head, n_model = oracle.make_head(rng, vocab, 64, **settings), oracle.random_array(rng, tokens, 64)
            n = n_model + oracle.random_array(rng, layers, tokens, 64, scale=0.3)
            labels = mx.array(rng.integers(0, vocab, tokens))
            target = lens_target(n_model, head)
            stats = vars(lens_stats(n, head, 5, n_model, labels, reverse=True))
            kl, dn = lens_kl(n, target, head)
            found = {"target lse": target.lse, "target entropy": target.entropy, "kl": kl, "gradient": dn}
            found |= {"compare " + k: v for k, v in vars(lens_compare(n, n_model[None], head)).items()}
            found |= {"mean": target.mean} if target.mean is not None else {}
            found |= {"stats " + k: stats[k] for k in ("lse", "entropy", "max_probability", "top_logits", "kl", "nll", "reverse_kl")}
            results |= {f"{vocab} {layers} {tokens} {name} {k}": oracle.wide(v) for k, v in found.items()}
    for kind in ("rms", "layer", "none"):
        h, w, b = (oracle.random_array(rng, *shape) for shape in ((70, 33), (33, 33), (33,)))
        norm = Norm(None, kind, None, None, 1e-5)
        g = oracle.random_array(rng, 70, 33)
        (y,), gradients = mx.vjp(lambda h, w, b: translate_norm(h, w, b, norm), [h, w, b], [g])
        results |= {f"translate_norm {kind} {i}": oracle.wide(v) for i, v in enumerate([y, *gradients])}
np.savez("results.npz", **results)
print(_ext.isa(), _ext.num_threads())
"""


@pytest.fixture
def results(run_python, tmp_path):
    """Return a function that runs SCRIPT with environment variables and returns its output and {name: array}."""

    def run(**variables):
        printed = run_python(SCRIPT, **variables).split()
        with np.load(tmp_path / "results.npz") as file:
            return printed, {name: file[name] for name in file.files}

    return run


def assert_same_to_rounding(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=ROUNDING, rtol=ROUNDING, err_msg=name)


ISAS = _ext.available_isas().split()
WAYS = {"three threads": (ISAS[-1], "3")} | {isa: (isa, "1") for isa in ISAS[:-1]}
baseline = {}


@pytest.mark.parametrize(("isa", "threads"), WAYS.values(), ids=WAYS)
def test_any_number_of_threads_and_every_instruction_set(results, isa, threads):
    if not baseline:
        baseline.update(results(METALENS_ISA=ISAS[-1], METALENS_NUM_THREADS="1")[1])
    printed, found = results(METALENS_ISA=isa, METALENS_NUM_THREADS=threads)
    assert printed == [isa, threads]
    assert_same_to_rounding(found, baseline)


@pytest.mark.parametrize("tokens", [1, 5, 90])
@pytest.mark.parametrize("settings", oracle.HEADS.values(), ids=oracle.HEADS)
def test_two_runs_give_the_same_bits(rng, native, settings, tokens):
    head, n_model = oracle.make_head(rng, 3001, 32, **settings), oracle.random_array(rng, tokens, 32)
    n = n_model + oracle.random_array(rng, 3, tokens, 32, scale=0.3)
    labels = mx.array(rng.integers(0, 3001, tokens))
    weight, bias, norm = oracle.random_array(rng, 32, 32), oracle.random_array(rng, 32), Norm(None, "rms", None, None, 1e-5)

    def run():
        target, stats = lens_target(n_model, head), lens_stats(n, head, 5, n_model, labels, reverse=True)
        values = [*lens_kl(n, target, head), target.lse, target.entropy, *vars(stats).values(), translate_norm(n, weight, bias, norm)]
        return [np.array(v).tobytes() for v in values]

    first = run()
    for _ in range(5):
        assert run() == first
