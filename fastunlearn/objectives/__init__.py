"""What is optimised: unlearning objectives as functions of log-probabilities."""

from fastunlearn.objectives.language import (
    NPO,
    OBJECTIVES,
    GradAscent,
    GradDiff,
    IdkDPO,
    Objective,
    SimNPO,
    make_objective,
    token_nll,
)
from fastunlearn.objectives.logprobs import AnswerLogprobs, answer_kl, answer_logits, answer_logprobs

__all__ = [
    "NPO",
    "OBJECTIVES",
    "AnswerLogprobs",
    "GradAscent",
    "GradDiff",
    "IdkDPO",
    "Objective",
    "SimNPO",
    "answer_kl",
    "answer_logits",
    "answer_logprobs",
    "make_objective",
    "token_nll",
]
