import contextlib
import json
import os
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from metalens import InterpretableModel
from metalens.models.bundled import MODEL
from metalens.models.loading import load
from metalens.utils.errors import InvalidValueError
from support.mocks import LAYERS, MockModel, WordTokenizer, assert_close, llama_config, tiny_llama

TEXT = "w3 w1 w4 w1 w5"
IDS = [3, 1, 4, 1, 5]
QUICK = {"num_steps": 2, "max_seq_len": 12, "verbose": False}


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), WordTokenizer())


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A folder like those of mlx-lm's converter, and the model that was saved there."""
    folder = tmp_path_factory.mktemp("llama")
    llama = tiny_llama(tied=True)
    llama.save_weights(str(folder / "model.safetensors"))
    (folder / "config.json").write_text(json.dumps(llama_config(tied=True)))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w95"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w95").save_pretrained(folder)
    return folder, llama


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "Path"])
def test_a_model_in_a_folder(saved_model, kind):
    folder, llama = saved_model
    model = InterpretableModel(kind(folder))
    assert model.encode(TEXT) == IDS
    assert model.token_to_str(4) == "w4"
    found = model.logit_lens(TEXT, top_k=3)
    assert_close(found, InterpretableModel(llama, WordTokenizer()).logit_lens(IDS, top_k=3))
    # The predictions after the last block are the model's own.
    assert [p[0][0] for p in found[1]] == mx.argmax(llama(mx.array([IDS])), axis=-1)[0].tolist()


def test_a_loaded_model_trains_a_lens(saved_model, tmp_path):
    model = InterpretableModel(str(saved_model[0]))
    lens = model.train_tuned_lens(["w1 w2 w3 w4 w5 w6"] * 4, save_path=tmp_path / "lens", **QUICK)
    assert (lens.num_layers, lens.hidden_dim) == (2, 64)
    assert_close(model.tuned_lens(TEXT, model.load_tuned_lens(tmp_path / "lens")), model.tuned_lens(TEXT, lens))


def test_the_callers_tokenizer_is_used_instead_of_the_loaded_one(saved_model):
    tokenizer = WordTokenizer()
    assert InterpretableModel(str(saved_model[0]), tokenizer).tokenizer is tokenizer


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match=r"Could not load model '.*'\.\n.* has no config\.json, so it is not the folder of a model\."):
        InterpretableModel(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Could not load model '.*'\.\nTried the following strategies:\n  1\. mlx-lm failed to load model: .+"):
        InterpretableModel(str(tmp_path))


def test_a_name_that_cannot_be_loaded(monkeypatch):
    def fail(name, **_):
        raise RuntimeError(f"no network for {name}")

    monkeypatch.setattr("mlx_lm.load", fail)
    with pytest.raises(ValueError, match=r"(?s)Could not load model 'who/what'\..*no network for who/what.*InterpretableModel\(model\)") as error:
        InterpretableModel("who/what")
    assert isinstance(error.value.__cause__, RuntimeError)


def test_a_module_is_used_as_it_is():
    inner, tokenizer = MockModel(), WordTokenizer()
    model = InterpretableModel(inner, tokenizer)
    assert model.model is inner
    assert model.tokenizer is tokenizer
    assert len(model.layers) == LAYERS
    assert repr(model) == "InterpretableModel(MockModel, 3 layers, tokenizer ✓)"
    assert repr(InterpretableModel(inner)) == "InterpretableModel(MockModel, 3 layers, tokenizer ✗)"


def test_calls_and_parameters_go_to_the_model(model):
    np.testing.assert_array_equal(np.array(model(mx.array([IDS]))), np.array(model.model(mx.array([IDS]))))
    assert model.parameters().keys() == model.model.parameters().keys()
    assert model.trainable_parameters().keys() == model.model.trainable_parameters().keys()
    assert dict(model.named_modules()).keys() == dict(model.model.named_modules()).keys()


def test_a_model_without_blocks():
    with pytest.raises(AttributeError, match="Could not find layers attribute"):
        InterpretableModel(nn.Linear(3, 3))


def test_layer_attr():
    class Renamed(MockModel):
        def __init__(self):
            super().__init__()
            self.stages = self.layers
            del self["layers"]

        def __call__(self, ids):
            x = self.embed_tokens(ids)
            for stage in self.stages:
                x = stage(x)
            return self.lm_head(self.norm(x))

    with pytest.raises(AttributeError, match="layer_attr"):
        InterpretableModel(Renamed())
    model = InterpretableModel(Renamed(), layer_attr="stages")
    assert_close(model.logit_lens(IDS), InterpretableModel(MockModel()).logit_lens(IDS))


def test_the_bundled_model_is_hidden_by_a_model_of_its_name_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert InterpretableModel("demo").name == str(MODEL)
    (tmp_path / "demo" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="demo"):
        InterpretableModel("demo")


def test_a_tokenizer_never_asks_whether_to_run_its_code(tmp_path, monkeypatch):
    """Its code is not run either: transformers refuses, and does not wait for a keypress."""
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", None]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with contextlib.suppress(InvalidValueError):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_a_name_that_is_not_utf_8():
    with pytest.raises(InvalidValueError, match=r"'bad\\udcff' is not UTF-8.*Rename the folder"):
        load(os.fsdecode(b"bad\xff"))
