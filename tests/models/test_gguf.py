"""GGUF files of every architecture that metalens converts, in every format, beside the models they were made of."""

import json
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx_lm.utils import load, load_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import zoo
from metalens.models.gguf import conversion, convert_gguf, is_gguf
from metalens.models.gguf.header import read_gguf
from metalens.utils.errors import InvalidValueError, MetalensError, MissingPackageError
from support.gguf_files import blocks, tokenizer_metadata, write_gguf, write_model

_NO_WINDOWS = {key: value for key, value in zoo.CONFIGS["llama"].items() if key not in ("layer_types", "sliding_window")}

# {id: (llama.cpp's architecture, configuration of mlx-lm)}
MODELS = {
    "llama": ("llama", _NO_WINDOWS),
    "llama-tied-without-biases": ("llama", {**_NO_WINDOWS, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}),
    "qwen2": ("qwen2", zoo.CONFIGS["qwen2"]),
    "qwen2-tied": ("qwen2", zoo.CONFIGS["qwen2-tied"]),
    "qwen3": ("qwen3", zoo.CONFIGS["qwen3-tied"]),
    "gemma": ("gemma", zoo.CONFIGS["gemma"]),
    "gemma2": ("gemma2", zoo.CONFIGS["gemma2"]),
    "gemma3": ("gemma3", zoo.CONFIGS["gemma3_text"]),
    "phi3": ("phi3", zoo.CONFIGS["phi3"]),
    "gpt2": ("gpt2", zoo.CONFIGS["gpt2"]),
    "gptneox": ("gptneox", zoo.CONFIGS["gpt_neox"]),
}
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 130, 0]])


@pytest.fixture(scope="module")
def tokens():
    """A byte-level tokenizer of 131 tokens, as GGUF metadata."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["the model says what the model sees"] * 9, trainers.BpeTrainer(vocab_size=131, special_tokens=["<end>"]))
    assert tokenizer.get_vocab_size() <= 131
    return tokenizer_metadata(tokenizer, "gpt-2")


@pytest.fixture
def written(tmp_path, monkeypatch, tokens):
    """Write the GGUF file of a tiny random model. Return its path, and the model with the numbers that the file holds."""

    def write(label, kind=Kind.F32, extra=None):
        architecture, config = MODELS[label]
        monkeypatch.setitem(zoo.CONFIGS, config["model_type"], config)
        model = zoo.build(config["model_type"])
        write_model(tmp_path / "model.gguf", architecture, config, model, kind, extra, tokens)
        return tmp_path / "model.gguf", model

    return write


def contents(path):
    """Return the metadata and tensors of a file, for `write_gguf`."""
    read = read_gguf(path)
    metadata = {key: value for key, value in read.metadata.items() if key != "general.architecture"}
    return metadata, {name: (np.array(t.data if len(t.shape) > 1 else t.data[0]), Kind[t.kind]) for name, t in read.tensors.items()}


def logits(model):
    return np.array(model(IDS).astype(mx.float32))


# ------------------------------------------------------------------ models


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_0, Kind.Q8_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("label", MODELS)
def test_a_model_gives_its_logits(written, tmp_path, label, kind):
    file, model = written(label, kind)
    report = convert_gguf(file, tmp_path / "folder", dtype="float32")
    loaded, tokenizer, config = load(str(tmp_path / "folder"), return_config=True)
    assert tokenizer.decode(tokenizer.encode("the model")) == "the model"
    expected = logits(model)
    np.testing.assert_allclose(logits(loaded), expected, atol=2e-5 * np.abs(expected).max())
    assert ("quantization" in config) == (kind != Kind.F32)
    assert {part.kind: part.error for part in report.formats} == dict.fromkeys({kind.name, "F32"}, 0.0)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_formats_are_mixed(tmp_path, tokens):
    """K-quants need rows of 256: matrices of every format in one model, and the report says which kept their codes."""
    config = {**_NO_WINDOWS, "hidden_size": 256, "intermediate_size": 256, "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True}
    rng = np.random.default_rng(0)
    zoo.CONFIGS["llama-wide"] = config
    try:
        model = zoo.build("llama-wide")
    finally:
        del zoo.CONFIGS["llama-wide"]
    write_model(tmp_path / "plain.gguf", "llama", config, model, Kind.F16, None, tokens)
    metadata, tensors = contents(tmp_path / "plain.gguf")
    kinds = {"ffn_down": Kind.Q4_K, "ffn_up": Kind.Q6_K, "ffn_gate": Kind.BF16, "attn_v": Kind.Q5_1}
    for name, (array, _) in tensors.items():
        kind = kinds.get(name.split(".")[-2])
        if kind is not None:
            tensors[name] = (blocks(kind, array.shape[0], 256, rng), kind)
    write_gguf(tmp_path / "mixed.gguf", "llama", metadata, tensors)
    report = convert_gguf(tmp_path / "mixed.gguf", tmp_path / "folder")
    by_kind = {part.kind: part for part in report.formats}
    assert report.dtype == "bfloat16"  # as the file's dense matrices
    assert {kind: (part.tensors, part.bits) for kind, part in by_kind.items()} == {
        **{"F16": (10, 0), "F32": (7, 0), "BF16": (3, 0), "Q5_1": (3, 5), "Q4_K": (3, 4), "Q6_K": (3, 8)}
    }
    assert [kind for kind, part in by_kind.items() if part.requantized] == ["Q6_K"]
    assert any("3 x Q6_K: requantized to 8 bits in groups of 32, largest error" in line for line in report.lines())
    assert 0 < by_kind["Q6_K"].error < 0.02
    loaded, config = load_model(tmp_path / "folder")
    assert config["quantization"]["model.layers.0.mlp.up_proj"] == {"group_size": 32, "bits": 8}
    assert np.isfinite(logits(loaded)).all()


@pytest.mark.parametrize(
    ("label", "kind", "dtype"),
    [("llama", Kind.F32, "float32"), ("llama", Kind.BF16, "bfloat16"), ("llama", Kind.Q4_0, "float16"), ("gemma2", Kind.Q4_0, "bfloat16")],
)
def test_the_type_follows_the_file(written, tmp_path, label, kind, dtype):
    file, _ = written(label, kind)
    assert convert_gguf(file, tmp_path / "folder").dtype == dtype
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["torch_dtype"] == dtype


def test_llama3_rotary_factors(written, tmp_path):
    file, _ = written("llama-tied-without-biases")
    metadata, tensors = contents(file)
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(8) / 8)
    low, high = 8192 / 1.0, 8192 / 4.0
    smooth = (8192 / wavelengths - 1) / 3
    expected = np.where(wavelengths < high, 1, np.where(wavelengths > low, 8, 1 / ((1 - smooth) / 8 + smooth)))
    for factors, scaling in ((expected, "llama3"), (np.linspace(1, 3, 8), "longrope")):
        tensors["rope_freqs.weight"] = (factors.astype(np.float32), Kind.F32)
        write_gguf(tmp_path / f"{scaling}.gguf", "llama", metadata, tensors)
        convert_gguf(tmp_path / f"{scaling}.gguf", tmp_path / scaling)
        loaded, _, config = load(str(tmp_path / scaling), return_config=True)
        assert config["rope_scaling"]["rope_type"] == scaling
        frequencies = np.array(loaded.layers[0].self_attn.rope._freqs)
        np.testing.assert_allclose(frequencies, 10000.0 ** (np.arange(8) / 8) * factors, rtol=1e-5)


def test_numbers_beyond_float16_are_refused(written, tmp_path):
    file, _ = written("llama-tied-without-biases", Kind.F32)
    content = bytearray(file.read_bytes())
    content[-4:] = struct.pack("<f", 1e6)  # the last number of the last tensor
    file.write_bytes(content)
    with pytest.raises(InvalidValueError, match=r"has numbers that .*float16 can't hold.*float32"):
        convert_gguf(file, tmp_path / "folder", dtype="float16")
    assert not (tmp_path / "folder").exists()


# ------------------------------------------------------------------ refusals and damage


def changed(path, key, value):
    """Write a file again with another metadata value; None removes the key."""
    metadata, tensors = contents(path)
    metadata = {k: v for k, v in metadata.items() if k != key} | ({} if value is None else {key: value})
    architecture = metadata.pop("general.architecture", "llama")
    write_gguf(path.with_name("changed.gguf"), architecture, metadata, tensors)
    return path.with_name("changed.gguf")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "general.architecture",
            "mamba",
            r"'mamba'\. metalens converts llama, qwen2, qwen3, gemma, gemma2, gemma3, phi3, gpt2, gptneox",
        ),
        ("llama.expert_count", 8, "mixture of experts"),
        ("tokenizer.ggml.model", "bert", "tokenizer of the kind 'bert'. metalens rebuilds gpt2, llama"),
        ("tokenizer.ggml.pre", "bloom", "splits words like 'bloom'. metalens knows .*llama-bpe"),
        ("llama.rope.scaling.type", "longrope", None),
        ("split.count", 3, "one of 3 parts"),
        ("llama.block_count", None, "does not say 'llama.block_count'"),
        ("llama.block_count", "three", "must be of type int, got 'three'"),
        ("llama.block_count", 2, "says block_count 2, and its tensors have 3"),
        ("llama.block_count", 2**30, "says block_count 1073741824"),
        ("llama.embedding_length", 65, "says embedding_length 65, and its tensors have 64"),
        ("llama.feed_forward_length", 95, "does not fit mlx-lm's model"),
        ("llama.attention.head_count", 3, "10|rows for 3 heads"),
        ("llama.attention.head_count", 0, "0 (attention )?heads"),
        ("tokenizer.ggml.merges", ["no such"], "merges 'no such'"),
        ("tokenizer.ggml.token_type", [1, 1], "2 token types"),
    ],
)
def test_refusals_say_what(written, tmp_path, key, value, message):
    file = changed(written("llama-tied-without-biases")[0], key, value)
    if message is None:
        convert_gguf(file, tmp_path / "folder")  # a type without a factor changes nothing
        return
    with pytest.raises(InvalidValueError, match=message):
        convert_gguf(file, tmp_path / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.gguf", "model.gguf"]


def test_an_unknown_tensor_is_named(written, tmp_path):
    file, _ = written("qwen2-tied")
    file.write_bytes(file.read_bytes().replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xy.weight"))
    with pytest.raises(InvalidValueError, match=r"'blk\.0\.ffn_xy\.weight', which metalens does not know for qwen2"):
        convert_gguf(file, tmp_path / "folder")


def test_a_head_that_mlx_lm_lacks_is_a_remark(written, tmp_path):
    file, _ = written("gpt2")
    metadata, tensors = contents(file)
    tensors["output.weight"] = tensors["token_embd.weight"]
    write_gguf(tmp_path / "head.gguf", "gpt2", metadata, tensors)
    assert any("head of its own" in line for line in convert_gguf(tmp_path / "head.gguf", tmp_path / "folder").lines())


def test_only_an_empty_folder_is_written(written, tmp_path):
    file, _ = written("llama")
    (tmp_path / "empty").mkdir()
    convert_gguf(file, tmp_path / "empty")
    for taken, fault in (("empty", "exists"), ("model.gguf", "exists and is not a folder")):
        with pytest.raises(FileExistsError, match=rf"{fault}\. Choose the name of a folder that does not exist"):
            convert_gguf(file, tmp_path / taken)


def test_a_disk_that_fills_leaves_nothing(written, tmp_path, monkeypatch):
    file, _ = written("llama")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("metalens.models.gguf.conversion.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        convert_gguf(file, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "folder")
    for content, message in (
        (b"", "0 bytes and no header"),
        (b"PK" + bytes(100), "is no GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "version 9"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(InvalidValueError, match=message):
            convert_gguf(tmp_path / "x.gguf", tmp_path / "folder")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "none.gguf")
    assert is_gguf(tmp_path / "x.gguf")


def test_a_damaged_header_ends_with_an_error(written, tmp_path):
    """Cut files, and every bit of some header bytes flipped: an error of ours or a header, within bounded time and memory."""
    file, _ = written("llama-tied-without-biases")
    content, damaged = file.read_bytes(), tmp_path / "damaged.gguf"
    end = read_gguf(file).tensors["token_embd.weight"].data.ctypes.data  # only to be sure that it can be read
    assert end
    for length in (*range(0, 200, 7), *range(200, len(content), len(content) // 40)):
        damaged.write_bytes(content[:length])
        with pytest.raises(InvalidValueError, match="damaged"):
            read_gguf(damaged)
    refused = 0
    rng = np.random.default_rng(0)
    for position in (*range(4, 40), *rng.integers(40, 12000, 150)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(flipped)
        try:
            read_gguf(damaged)
        except (MetalensError, OSError):
            refused += 1
    assert refused > 30


def test_without_the_gguf_package(written, tmp_path, monkeypatch):
    file, _ = written("llama")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'gguf>=0\.19'"):
        convert_gguf(file, tmp_path / "folder")


def test_force_replaces_a_model_of_an_earlier_conversion_alone(written, tmp_path, monkeypatch):
    file, _ = written("llama")
    target = tmp_path / "folder"
    convert_gguf(file, target)
    (target / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="or replace it with --force"):
        convert_gguf(file, target)
    with monkeypatch.context() as patch:  # a conversion that fails leaves the old model

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        patch.setattr(conversion, "_check", full)
        with pytest.raises(OSError, match="No space"):
            convert_gguf(file, target, force=True)
    assert (target / "config.json").read_text() == "{}"
    convert_gguf(file, target, force=True)
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"
    (target / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="has 'thesis.txt', which a conversion does not write"):
        convert_gguf(file, target, force=True)
    assert (target / "thesis.txt").read_text() == "precious"
    with pytest.raises(FileExistsError, match="is not a folder"):
        convert_gguf(file, file, force=True)
    (target / "thesis.txt").unlink()
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FileExistsError, match="is not a folder"):
        convert_gguf(file, tmp_path / "link", force=True)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_move_that_fails_puts_the_old_model_back(written, tmp_path, monkeypatch):
    file, _ = written("llama")
    target = tmp_path / "folder"
    convert_gguf(file, target)
    before = (target / "model.safetensors").read_bytes()
    moves, replace = [], Path.replace

    def failing(self, to):
        moves.append(self)
        if len(moves) == 2:
            raise OSError(5, "Input/output error")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        convert_gguf(file, target, force=True)
    assert len(moves) == 3
    assert (target / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
