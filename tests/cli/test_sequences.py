"""The switches of the command line for special tokens, on a model whose tokenizer adds BOS."""

import json

import pytest

from support.bos import ASSISTANT, BOS, EOS, USER, save_bos_model, words

IDS = [5 + i * i % 80 for i in range(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_bos_model(tmp_path_factory.mktemp("models") / "bos")


def test_switches_of_a_prompt(run, folder):
    def tokens(*arguments):
        result = run("lens", folder, *arguments, "--json")
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["tokens"]

    assert tokens("w5 w6") == ["<s>", "w5", "w6"]
    assert tokens("w5 w6", "--no-bos") == ["w5", "w6"]
    assert tokens("5, 6 7", "--ids") == ["w5", "w6", "w7"]
    assert tokens("w5 w6", "--chat") == words([BOS, USER, 5, 6, ASSISTANT]).split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["w5", "--ids"], "must be token ids like '1 733 16289', got 'w5'"),
        (["99999", "--ids"], "Token id 99999 is outside"),
        (["w5", "--ids", "--chat"], "exclude each other"),
    ],
)
def test_wrong_switches(run, folder, arguments, message):
    result = run("lens", folder, *arguments)
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_text_file_and_json_lines_have_the_same_numbers(run, folder, tmp_path):
    (tmp_path / "h.txt").write_text(words(IDS))
    (tmp_path / "h.jsonl").write_text(json.dumps({"text": words(IDS)}) + "\n")
    (tmp_path / "eos.txt").write_text(words([EOS, *IDS]))

    def ce(*arguments):
        result = run("eval", folder, "--max-seq-len", 16, "--json", *arguments)
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)["model"]["ce"]

    # The separator, and nothing else, distinguishes the two.
    assert ce("--data", "eos.txt") == pytest.approx(ce("--data", "h.jsonl"), rel=1e-6)
    assert ce("--data", "h.txt") != pytest.approx(ce("--data", "h.txt", "--no-bos"), rel=1e-6)


def test_training_without_bos(run, folder, tmp_path):
    (tmp_path / "h.txt").write_text(words(IDS))
    common = ["--data", "h.txt", "--recipe", "mlxterp", "--steps", 2, "--max-seq-len", 16]
    for name, switches in (("with", []), ("without", ["--no-bos"])):
        result = run("train", folder, *common, "--out", name, *switches)
        assert result.exit_code == 0, result.stderr
    with_bos, without = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("with", "without"))
    assert with_bos != without


def test_eval_s_bits_per_byte_are_about_the_whole_file(run, folder, tmp_path):
    text = words(IDS[:30]) + " </s>" * 40
    (tmp_path / "h.jsonl").write_text(json.dumps({"text": text}) + "\n")
    few, whole = (
        json.loads(run("eval", folder, "--data", "h.jsonl", "--no-bos", "--json", *switches).stdout) for switches in (["--max-tokens", 30], [])
    )
    assert (few["tokens"], whole["tokens"]) == (30, 71)
    assert few["bytes_per_token"] == pytest.approx(whole["bytes_per_token"])
