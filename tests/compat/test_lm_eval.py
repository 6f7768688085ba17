"""The bridge to lm-evaluation-harness: a local task through a layer, and the harness's own requests."""

import json

import numpy as np
import pytest

from metalens import InterpretableModel
from metalens.analysis import Question, score_choices
from metalens.utils.errors import InvalidValueError
from support.mocks import MockModel, WordTokenizer, random_lens, tiny_llama

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from metalens.compat.lm_eval import LensLM

DOCUMENTS = [{"question": f"w{i} w{2 * i + 1}", "options": ["w1", "w2", "w3"], "gold": i % 3} for i in range(6)]


class Tokenizer(WordTokenizer):
    """A tokenizer of words whose every text ends with w0."""

    eos_token_id = 0


@pytest.fixture
def model():
    return InterpretableModel(MockModel(), Tokenizer())


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in DOCUMENTS), encoding="utf-8")
    return {
        "task": "numbers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def instance(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.mark.parametrize("layer", [0, 1, None])
def test_a_task_of_the_harness_scores_a_layer(model, task, layer):
    lens = None if layer is None else random_lens()
    found = simple_evaluate(LensLM(model, lens, layer), tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0)
    questions = [Question(d["question"], tuple(f" {o}" for o in d["options"]), d["gold"]) for d in DOCUMENTS]
    expected = score_choices(model, questions, lens)
    row = -1 if layer is None else layer
    assert found["results"]["numbers"]["acc,none"] == pytest.approx(expected.correct()[row].mean())
    logged = [[float(score[0]) for score in sample["filtered_resps"]] for sample in found["samples"]["numbers"]]
    np.testing.assert_allclose(logged, expected.log_probs[row], rtol=1e-5)


def test_an_empty_context_and_greedy_continuations(model):
    lm = LensLM(model)
    first = int(model.trajectory([0], top_k=1).model.top_ids[0, 0, 0])
    requests = [instance("loglikelihood", "", f"w{token}") for token in (first, (first + 1) % 100)]
    (likely, greedy), (_, other) = lm.loglikelihood(requests, disable_tqdm=True)
    assert (greedy, other) == (True, False)
    assert likely == pytest.approx(np.log(model.trajectory([0], top_k=1).model.max_probability[0, 0]), rel=1e-4)


def test_a_whole_text_in_windows(model):
    text = " ".join(f"w{i}" for i in (3, 1, 4, 1, 5, 9, 2))
    (whole,) = LensLM(model).loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    own = model.trajectory([0, 3, 1, 4, 1, 5, 9, 2]).model
    assert whole == pytest.approx(-float(own.cross_entropy[0, :-1].sum()), rel=1e-5)
    (parts,) = LensLM(model, max_length=3).loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    # each token once: three after the end of text, three after w4, and the last one after as long a context as there is room for
    expected = [model.trajectory(ids).model.cross_entropy[0, from_ : len(ids) - 1].sum() for ids, from_ in (([0, 3, 1, 4], 0), ([4, 1, 5, 9], 0))]
    expected.append(model.trajectory([1, 5, 9, 2]).model.cross_entropy[0, 2])
    assert parts == pytest.approx(-float(sum(expected)), rel=1e-5)
    with pytest.raises(InvalidValueError, match="larger max_length"):
        LensLM(model, max_length=2).loglikelihood([instance("loglikelihood", "w1", " w2 w3 w4")], disable_tqdm=True)


def test_generation_from_a_layer_up_to_a_stop():
    model = InterpretableModel(tiny_llama(), Tokenizer(96))
    expected = "".join(token.text for token in model.generate_from_layer("w3 w1", 0, max_tokens=5))
    lm = LensLM(model, layer=0)
    (whole,) = lm.generate_until([instance("generate_until", "w3 w1", {"until": [], "max_gen_toks": 5})], disable_tqdm=True)
    assert whole == expected
    stop = expected.split()[2]
    (cut,) = lm.generate_until([instance("generate_until", "w3 w1", {"until": [stop], "max_gen_toks": 5})], disable_tqdm=True)
    assert cut == expected.split(stop)[0]


def test_a_lens_needs_its_layer(model):
    with pytest.raises(InvalidValueError, match="give its number"):
        LensLM(model, random_lens())
    with pytest.raises(InvalidValueError, match="at least 1"):
        LensLM(model, max_length=0)
