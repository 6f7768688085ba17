"""What an evaluation is made of: the text in sequences, sums over its tokens, layer transfer, marginals, the result and its files.

`metalens.evaluation.evaluator` is where they meet.
"""

from metalens.evaluation.marginals import LogitStats, bias
from metalens.evaluation.results import Evaluation, write_results
from metalens.evaluation.scores import Scores
from metalens.evaluation.text import EvaluationText
from metalens.evaluation.transfer import Transfer

__all__ = ["Evaluation", "EvaluationText", "LogitStats", "Scores", "Transfer", "bias", "write_results"]
