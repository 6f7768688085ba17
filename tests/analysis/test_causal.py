"""Causal basis extraction and causal fidelity, against float64 and against models whose causal directions are known."""

import json

import mlx.core as mx
import numpy as np
import pytest

from metalens import LogitLens
from metalens.analysis import causal_extraction
from metalens.analysis.causal_basis import CausalBasis, basis_path
from metalens.analysis.causal_extraction import SearchOptions, extract_causal_bases
from metalens.analysis.fidelity import causal_fidelity
from metalens.analysis.lens_energy import LensEnergy
from metalens.analysis.serializing import as_json
from support import oracle
from support.planted import planted, random_directions, reading

WIDTH, VOCAB = 8, 50
THOROUGH = SearchOptions(max_evaluations=200, tolerance=1e-6)


def energy64(unembed, h, v, replacement, translator=None):
    """The mean KL(lens || lens with v ablated), in float64."""
    moved = h + np.outer((replacement - h) @ v, v)
    unembedding = oracle.Unembedding(unembed)
    w, b = (np.eye(h.shape[1]), np.zeros(h.shape[1])) if translator is None else (oracle.wide(translator.weight), oracle.wide(translator.bias))
    return oracle.kl(unembedding.translated(h, w, b), unembedding.translated(moved, w, b)).mean()


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("mode", ["mean", "zero", "resample"])
def test_energies_and_gradients_against_float64(rng, tiny, tuned, mode):
    lens = oracle.random_lens(rng) if tuned else LogitLens()
    rows = {layer: oracle.random_array(rng, 7, 64) for layer in (0, 2)}
    energy = LensEnergy(tiny.unembed, lens, rows, mode, seed=3)
    points = {layer: v / np.linalg.norm(v) for layer, v in ((0, rng.standard_normal(64)), (2, rng.standard_normal(64)))}
    for layer, (value, gradient) in energy(points).items():
        h, replacement, v = oracle.wide(rows[layer]), oracle.wide(energy.replacements[layer]), points[layer].copy()
        translator = lens.translators[layer] if tuned else None
        assert value == pytest.approx(energy64(tiny.unembed, h, v, replacement, translator), rel=1e-4)
        assert energy.of_directions(layer, v[None])[0] == pytest.approx(value, rel=1e-6)
        for i in (0, 17, 63):
            slope = oracle.central_difference(lambda: energy64(tiny.unembed, h, v, replacement, translator), v, i)  # noqa: B023
            assert gradient[i] == pytest.approx(slope, rel=2e-3, abs=1e-5)


def white(rng, count, width):
    """Vectors [count, width] with the mean 0 and the covariance I."""
    x = rng.standard_normal((count, width))
    x = x - x.mean(axis=0)
    return x @ np.linalg.inv(np.linalg.cholesky(x.T @ x / count)).T


def model_that_reads(rng, scales, later_scales, mean=0.0):
    """A model of 3 blocks whose head reads known directions, most of all the first. Block 1 scales them otherwise.

    Every word occurs as often as others, and their vectors are white. So to ablate a direction changes no other one's part, and for small
    logits, where the KL is a quadratic form, the best directions are those that the head reads.
    """
    directions = random_directions(rng, len(scales), WIDTH)
    words = white(rng, VOCAB, WIDTH) + mean
    head = rng.standard_normal((VOCAB, len(scales))) * scales @ directions
    later = reading(directions, np.asarray(later_scales) - 1)
    return planted(words, [np.zeros((WIDTH, WIDTH)), later, np.zeros((WIDTH, WIDTH))], head), directions


def test_a_planted_direction_is_found(rng):
    model, directions = model_that_reads(rng, [0.1], [1.0])
    text = rng.permutation(VOCAB).tolist()
    basis = extract_causal_bases(model, text, directions=3, layers=[0, 1], options=THOROUGH)[1]
    assert abs(basis.vectors[0] @ directions[0]) == pytest.approx(1, abs=1e-3)
    # Nothing else has any influence.
    np.testing.assert_allclose(basis.energies[1:], 0, atol=1e-3 * basis.energies[0])
    np.testing.assert_allclose(basis.vectors @ basis.vectors.T, np.eye(3), atol=1e-9)


def test_the_first_direction_is_the_best_on_the_whole_sphere(rng):
    directions = random_directions(rng, 3, 3)
    model = planted(rng.standard_normal((VOCAB, 3)), [np.zeros((3, 3))], rng.standard_normal((VOCAB, 3)) @ directions)
    text = rng.integers(0, VOCAB, 40).tolist()
    basis = extract_causal_bases(model, text, directions=3, options=THOROUGH)[0]
    h = oracle.wide(model.source.capture(mx.array([text])).hidden[0])[0]
    head = oracle.wide(model.model.lm_head.weight)

    def energy(v):
        return oracle.kl(h @ head.T, (h + np.outer((h.mean(axis=0) - h) @ v, v)) @ head.T).mean()

    angles = [(a, b) for a in np.linspace(0, np.pi, 25) for b in np.linspace(0, np.pi, 25)]
    grid = [energy(np.array([np.sin(a) * np.cos(b), np.sin(a) * np.sin(b), np.cos(a)])) for a, b in angles]
    assert basis.energies[0] >= max(grid) * (1 - 1e-6)
    assert basis.energies[0] < max(grid) * 1.1
    np.testing.assert_allclose(basis.energies, [energy(v) for v in basis.vectors], rtol=1e-4)
    # The second is the best on the circle that is left.
    first, second, third = basis.vectors
    circle = [energy(np.cos(a) * second + np.sin(a) * third) for a in np.linspace(0, np.pi, 200)]
    assert basis.energies[1] >= max(circle) * (1 - 1e-6)
    assert first @ second == pytest.approx(0, abs=1e-9)


SCALES = [1.0, 0.6, 0.35, 0.2]


@pytest.mark.parametrize(("later", "expected"), [([1, 1, 1, 1], 1.0), ([0.1, 0.4, 1.5, 6], -1.0)], ids=["the same", "the other way round"])
def test_the_fidelity_of_a_known_model(rng, later, expected):
    model, directions = model_that_reads(rng, SCALES, later, mean=0.7)
    text = rng.permutation(VOCAB).tolist()
    bases = extract_causal_bases(model, text, directions=4, layers=[0, 1], options=THOROUGH, max_seq_len=16)
    found = bases[0]  # its vectors are replaced by the planted directions
    known = CausalBasis(0, directions, found.energies, found.evaluations, found.converged, found.mean, "mean", found.tokens)
    before, after = causal_fidelity(model, text, {0: known, 1: bases[1]}, max_seq_len=16, resamples=50)
    assert before.correlation.value == pytest.approx(expected)
    # After the block that scales, only blocks that do nothing are left: the lens is the model.
    assert after.correlation.value == pytest.approx(1)
    np.testing.assert_allclose(after.lens_influence, [effect.kl.value for effect in after.model_influence], rtol=1e-3)
    np.testing.assert_allclose(bases[1].energies, after.lens_influence, rtol=1e-4)
    assert as_json(before)["correlation"]["value"] == pytest.approx(expected)
    json.dumps(as_json([before, after]), allow_nan=False)


def test_layers_side_by_side_equal_layers_alone(rng, tiny):
    lens, text = oracle.random_lens(rng), rng.integers(0, 131, 30).tolist()
    together = extract_causal_bases(tiny, text, lens, directions=2, options=SearchOptions(max_evaluations=12))
    assert list(together) == [0, 1, 2]
    alone = extract_causal_bases(tiny, text, lens, directions=2, layers=[1], options=SearchOptions(max_evaluations=12))[1]
    np.testing.assert_allclose(alone.energies, together[1].energies, rtol=1e-3)


def test_an_extraction_goes_on_where_it_stopped(rng, tiny, tmp_path, monkeypatch):
    text = rng.integers(0, 131, 30).tolist()
    few = SearchOptions(max_evaluations=8)
    whole = extract_causal_bases(tiny, text, directions=3, layers=[0, 1], options=few)

    def kill_at_second(basis):
        if len(basis) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_causal_bases(tiny, text, directions=3, layers=[0, 1], options=few, folder=tmp_path, on_direction=kill_at_second)
    stored = {layer: CausalBasis.load(basis_path(tmp_path, layer)) for layer in (0, 1)}
    assert sorted(map(len, stored.values())) in ([1, 2], [2, 2])
    resumed = extract_causal_bases(tiny, text, directions=3, layers=[0, 1], options=few, folder=tmp_path)
    for layer, basis in resumed.items():
        np.testing.assert_array_equal(basis.vectors[: len(stored[layer])], stored[layer].vectors)
        np.testing.assert_allclose(basis.energies, whole[layer].energies, rtol=1e-3)
        np.testing.assert_allclose(np.abs(np.sum(basis.vectors * whole[layer].vectors, axis=1)), 1, atol=1e-3)
        np.testing.assert_array_equal(CausalBasis.load(basis_path(tmp_path, layer)).vectors, basis.vectors)
    # All are there: nothing is searched again.
    monkeypatch.setattr(causal_extraction.LensEnergy, "__call__", lambda *_: pytest.fail("searched again"))
    again = extract_causal_bases(tiny, text, directions=2, layers=[0, 1], options=few, folder=tmp_path)
    assert [len(basis) for basis in again.values()] == [2, 2]
    np.testing.assert_array_equal(again[0].vectors, resumed[0].vectors[:2])


def test_the_seed_draws_the_random_starts(rng):
    """Along the principal directions nothing changes the prediction, so the best start is a random one."""
    words = rng.standard_normal((VOCAB, WIDTH)) * np.repeat([100.0, 1.0], WIDTH // 2)
    head = rng.standard_normal((VOCAB, WIDTH)) * np.repeat([0.0, 1.0], WIDTH // 2)
    model, text = planted(words, [np.zeros((WIDTH, WIDTH))], head), rng.integers(0, VOCAB, 20).tolist()

    def start(seed):
        options = SearchOptions(starts=6, max_evaluations=1, seed=seed)
        return extract_causal_bases(model, text, directions=2, options=options)[0]

    np.testing.assert_array_equal(start(0).vectors, start(0).vectors)
    assert np.abs(start(0).vectors - start(1).vectors).max() > 0.1
    # Each direction has draws of its own.
    first, second = start(0).vectors
    assert abs(first @ second) < 1e-9


def test_a_folder_of_another_extraction(rng, tiny, tmp_path):
    text = rng.integers(0, 131, 20).tolist()
    few = SearchOptions(max_evaluations=3)
    extract_causal_bases(tiny, text, directions=1, layers=[0], options=few, folder=tmp_path)
    for arguments, names in (
        ({"text": text[:-1]}, "text"),
        ({"mode": "zero"}, "mode"),
        ({"options": SearchOptions(max_evaluations=3, seed=1)}, "seed"),
        ({"lens": oracle.random_lens(rng)}, "lens"),
    ):
        with pytest.raises(ValueError, match=f"another extraction; these differ: {names}\\. Give another folder"):
            extract_causal_bases(tiny, **{"text": text, "directions": 1, "layers": [0], "options": few, "folder": tmp_path, **arguments})


def test_files_that_are_no_basis(tmp_path, rng, tiny):
    path = basis_path(tmp_path, 0)
    basis = extract_causal_bases(tiny, rng.integers(0, 131, 9).tolist(), directions=2, layers=[0], options=SearchOptions(max_evaluations=2))[0]
    basis.save(path)
    np.testing.assert_array_equal(CausalBasis.load(path).vectors, basis.vectors)
    assert vars(CausalBasis.load(path)).keys() == vars(basis).keys()
    whole = path.read_bytes()
    for broken in (whole[:100], b"", whole.replace(b"vectors.npy", b"victors.npy"), b"text"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="Delete it, and extract the basis again") as error:
            CausalBasis.load(path)
        assert "unsafe" not in str(error.value)  # NumPy's advice for what is no archive
    for bit in rng.choice(8 * len(whole), 500, replace=False).tolist():
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = CausalBasis.load(path)
        except ValueError:
            continue
        np.testing.assert_equal(vars(found), vars(basis))  # a date, or another field that nobody reads
    path.write_text("mine")
    with pytest.raises(ValueError, match="not a causal basis: metalens does not replace"):
        basis.save(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"directions": 0}, "directions must be from 1 to 64"),
        ({"directions": 65}, "directions must be from 1 to 64"),
        ({"layers": [3]}, "no layer 3"),
        ({"mode": "none"}, "no ablation 'none'"),
        ({"max_seq_len": 1}, "max_seq_len and max_tokens must be at least 2"),
        ({"text": []}, "no tokens"),
        ({"lens": lambda h, i: h * np.nan}, "energy of a direction is NaN"),
    ],
)
def test_arguments_out_of_range(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        extract_causal_bases(tiny, **{"text": [1, 2, 3], "directions": 1, **arguments})


def test_search_options_out_of_range():
    for options in ({"starts": 0}, {"max_evaluations": 0}, {"tolerance": -1.0}, {"tolerance": float("nan")}):
        with pytest.raises(ValueError, match="A search needs"):
            SearchOptions(**options)
