"""How good a lens is on text: scores per layer, layer transfer, marginals and their bias, and the files of a result."""

from metalens.evaluation.evaluator import evaluate
from metalens.evaluation.marginals import LogitStats, bias
from metalens.evaluation.results import Evaluation, write_results
from metalens.evaluation.scores import Scores
from metalens.evaluation.sequences import SequenceScores
from metalens.evaluation.text import EvaluationText
from metalens.evaluation.transfer import Transfer

__all__ = ["Evaluation", "EvaluationText", "LogitStats", "Scores", "SequenceScores", "Transfer", "bias", "evaluate", "write_results"]
