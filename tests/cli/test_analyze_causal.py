"""metalens analyze causal, alignment, layers, residuals: tables, JSON, pictures, resumption, and errors in one line."""

import json

import pytest

from metalens.analysis import CausalBasis
from metalens.analysis.causal_basis import basis_path


def answer(result):
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_causal_bases_and_their_fidelity(run, text, lens, tmp_path):
    arguments = ("analyze", "causal", "demo", "--data", text, "--lens", lens, "--layers", "2,5", "--max-tokens", 12, "--max-seq-len", 6)
    few = ("--directions", 2, "--max-evaluations", 2, "--fidelity-tokens", 6)
    result = run(*arguments, *few, "--out", "bases", "--save", "causal.png", "--json")
    found = answer(result)
    assert [basis["layer"] for basis in found["bases"]] == [2, 5]
    for basis, fidelity in zip(found["bases"], found["fidelity"], strict=True):
        assert len(basis["energies"]) == len(fidelity["lens_influence"]) == len(fidelity["model_influence"]) == 2
        assert min(basis["energies"]) > 0
        assert fidelity["correlation"]["value"] in (1, -1)  # of two directions
        assert basis["tokens"] == 12
    assert (tmp_path / "causal.png").read_bytes().startswith(b"\x89PNG")
    stored = CausalBasis.load(basis_path(tmp_path / "bases", 5))
    assert stored.energies.tolist() == found["bases"][1]["energies"]
    assert result.stderr.count("nats per token") == 4
    # All directions are there: they are read, not searched, and shown as a table.
    again = run(*arguments, "--directions", 2, "--max-evaluations", 2, "--fidelity-tokens", 0, "--out", "bases")
    assert again.exit_code == 0, again.stderr
    assert "nats per token, " not in again.stderr
    assert "causal bases of the tuned lens of demo" in again.stdout


def test_a_short_text_serves_twice(run, tmp_path):
    (tmp_path / "short.txt").write_text("A short text, and no more than that.")
    result = run("analyze", "causal", "demo", "--data", "short.txt", "--layers", "1", "--directions", 1, "--max-evaluations", 2, "--json")
    assert "no tokens after the first 512" in result.stderr
    assert len(answer(result)["fidelity"]) == 1
    assert answer(result)["fidelity"][0]["correlation"]["value"] is None


def test_alignment(run, text, lens, tmp_path):
    arguments = ("analyze", "alignment", "demo", "--data", text, "--lens", lens, "--layers", "0,7", "--max-seq-len", 8, "--sequences", 6)
    first, last = answer(run(*arguments, "--json"))["alignment"]
    assert (first["layer"], last["layer"]) == (0, 7)
    assert last["lenses"]["logit"]["similarity"]["value"] == pytest.approx(1, abs=1e-3)
    assert last["lenses"]["tuned"]["samples"] == 6
    result = run(*arguments, "--save", "alignment.svg")
    assert "stimulus-response alignment of demo" in result.stdout
    assert "<svg" in (tmp_path / "alignment.svg").read_text()


def test_layers(run, text, tmp_path):
    arguments = ("analyze", "layers", "demo", "--data", text, "--layers", "3,7", "--max-tokens", 20, "--max-seq-len", 10)
    found = answer(run(*arguments, "--gradient", "model", "--json"))
    assert [list(each["effects"]) for each in found["layers"]] == [["delete", "swap", "replace"], ["delete", "replace"]]
    assert [each["layer"] for each in found["gradient"]] == list(range(8))
    result = run(*arguments, "--change", "mean", "--change", "swap", "--gradient", "lens", "--save", "layers.png")
    assert result.exit_code == 0, result.stderr
    assert "changed blocks of demo" in result.stdout
    assert "-" in result.stdout.splitlines()[-2].split("│")[4]  # the last block is not swapped
    assert (tmp_path / "layers.png").exists()


def test_a_lens_that_nothing_reads(run, text, lens):
    result = run("analyze", "layers", "demo", "--data", text, "--lens", lens)
    assert result.exit_code == 1
    assert "--lens is only for --gradient lens" in result.stderr


def test_residuals(run, text, lens, tmp_path):
    arguments = ("analyze", "residuals", "demo", "--data", text, "--max-tokens", 20, "--max-seq-len", 10)
    plain = answer(run(*arguments, "--json"))
    assert [each["layer"] for each in plain["layers"]] == ["embedding", *range(8)]
    assert plain["correlation"] is None
    assert plain["tokens"] == 18
    assert {each["to_next"] for each in plain["layers"]} == {None}
    distances = answer(run(*arguments, "--distances", "--json"))["layers"]
    assert all(each["to_next"]["wasserstein"] > 0 and each["to_next"]["kl"] is None for each in distances[:-1])  # 18 positions, 256 dimensions
    assert "Wasserstein" in run(*arguments, "--distances").stdout
    result = run(*arguments, "--lens", lens, "--save", "residuals.png")
    assert result.exit_code == 0, result.stderr
    assert "hidden states of demo: 18 tokens" in result.stdout
    assert "Rank correlation of covariance similarity (all dimensions) and transfer penalty: " in result.stderr
    assert (tmp_path / "residuals.png").exists()


def test_the_sequences_of_residuals_fit_the_bundled_model_by_default(run, text):
    result = run("analyze", "residuals", "demo", "--data", text, "--max-tokens", 600, "--json")
    assert answer(result)["tokens"] > 256 + 1  # more than the model's context
    assert "context" not in result.stderr


@pytest.mark.parametrize("command", ["causal", "alignment", "layers", "residuals"])
def test_errors_come_before_the_work(run, text, command):
    for arguments, message in (
        (("demo", "--data", text, "--save", "picture.xyz"), "Can't write a picture as 'picture.xyz'"),
        (("demo", "--data", "missing.txt"), "missing.txt"),
        (("demo", "--data", text, "--layers", "9"), "no layer 9"),
    ):
        result = run("analyze", command, *arguments)
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert len(result.stderr.strip().splitlines()) <= 3


def test_a_file_of_someone_else_is_not_replaced(run, text, tmp_path):
    (tmp_path / "mine.png").write_text("mine")
    result = run("analyze", "layers", "demo", "--data", text, "--save", "mine.png")
    assert result.exit_code == 1
    assert "is not a picture" in result.stderr
    assert (tmp_path / "mine.png").read_text() == "mine"
