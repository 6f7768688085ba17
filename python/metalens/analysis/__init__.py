"""What the tuned-lens paper does with lenses: small functions on hidden states, lenses and trajectories."""

from metalens.analysis.ablation import ablate_block, ablate_subspace, derangement, orthonormal_basis, remove_subspace
from metalens.analysis.aitchison import aitchison_inner, aitchison_similarity
from metalens.analysis.alignment import Alignment, LensAlignment, stimulus_response_alignment
from metalens.analysis.anomalies import DETECTORS, Detection, detect_anomalies, fit_detector, hidden_features, read_prompts, trajectory_features
from metalens.analysis.calibration import calibrated_accuracy, calibration_error
from metalens.analysis.causal_basis import CausalBasis
from metalens.analysis.causal_extraction import SearchOptions, extract_causal_bases
from metalens.analysis.changed_layers import CHANGES, LayerEffects, layer_effects
from metalens.analysis.choices import ChoiceScores, score_choices, score_continuations
from metalens.analysis.difficulty import Difficulty, checkpoint_predictions, iteration_learned, question_predictions, text_depths, text_predictions
from metalens.analysis.fidelity import Fidelity, causal_fidelity
from metalens.analysis.gaussians import (
    GaussianDistances,
    gaussian_bhattacharyya,
    gaussian_kl,
    gaussian_wasserstein,
    gaussian_wasserstein_to_origin,
)
from metalens.analysis.interventions import Effect, Intervention, delete_blocks, measure_effects, permute_blocks, replace_block, swap_blocks
from metalens.analysis.layer_accuracy import LayerAccuracy, Overthinking, accuracy_by_layer, overthinking
from metalens.analysis.questions import Question, read_questions, with_demonstrations
from metalens.analysis.resampling import Interval, bootstrap, bootstrap_mean, ranks, spearman
from metalens.analysis.residual_summary import LayerResiduals, ResidualReport, residual_report
from metalens.analysis.residuals import (
    ResidualStatistics,
    covariance_similarity,
    effective_rank,
    residual_statistics,
    rogue_dimensions,
    similarity_matrix,
    transfer_correlation,
)
from metalens.analysis.roc import auroc, bootstrap_auroc
from metalens.analysis.sequences import sequences_of
from metalens.analysis.serializing import as_json
from metalens.analysis.update_gradients import GradientAlignment, gradient_alignment
from metalens.analysis.weight_readings import WeightReading, coherence_auroc, concept_tokens, random_directions, read_directions, read_weights

__all__ = [
    "CHANGES",
    "DETECTORS",
    "Alignment",
    "CausalBasis",
    "ChoiceScores",
    "Detection",
    "Difficulty",
    "Effect",
    "Fidelity",
    "GaussianDistances",
    "GradientAlignment",
    "Interval",
    "Intervention",
    "LayerAccuracy",
    "LayerEffects",
    "LayerResiduals",
    "LensAlignment",
    "Overthinking",
    "Question",
    "ResidualReport",
    "ResidualStatistics",
    "SearchOptions",
    "WeightReading",
    "ablate_block",
    "ablate_subspace",
    "accuracy_by_layer",
    "aitchison_inner",
    "aitchison_similarity",
    "as_json",
    "auroc",
    "bootstrap",
    "bootstrap_auroc",
    "bootstrap_mean",
    "calibrated_accuracy",
    "calibration_error",
    "causal_fidelity",
    "checkpoint_predictions",
    "coherence_auroc",
    "concept_tokens",
    "covariance_similarity",
    "delete_blocks",
    "derangement",
    "detect_anomalies",
    "effective_rank",
    "extract_causal_bases",
    "fit_detector",
    "gaussian_bhattacharyya",
    "gaussian_kl",
    "gaussian_wasserstein",
    "gaussian_wasserstein_to_origin",
    "gradient_alignment",
    "hidden_features",
    "iteration_learned",
    "layer_effects",
    "measure_effects",
    "orthonormal_basis",
    "overthinking",
    "permute_blocks",
    "question_predictions",
    "random_directions",
    "ranks",
    "read_directions",
    "read_prompts",
    "read_questions",
    "read_weights",
    "remove_subspace",
    "replace_block",
    "residual_report",
    "residual_statistics",
    "rogue_dimensions",
    "score_choices",
    "score_continuations",
    "sequences_of",
    "similarity_matrix",
    "spearman",
    "stimulus_response_alignment",
    "swap_blocks",
    "text_depths",
    "text_predictions",
    "trajectory_features",
    "transfer_correlation",
    "with_demonstrations",
]
