"""What is optimised: unlearning objectives as functions of log-probabilities, distributions and hidden states."""

from fastunlearn.objectives.distribution import CEU, PDU, UNDIAL
from fastunlearn.objectives.language import (
    KL,
    NPO,
    OBJECTIVES,
    WGA,
    AltPO,
    GradAscent,
    GradDiff,
    IdkDPO,
    Objective,
    SatImp,
    SimNPO,
    make_objective,
    token_nll,
)
from fastunlearn.objectives.logprobs import AnswerLogprobs, answer_kl, answer_logits, answer_logprobs
from fastunlearn.objectives.rmu import RMU
from fastunlearn.objectives.states import why_logits

OBJECTIVES |= {c.__name__: c for c in (RMU, UNDIAL, CEU, PDU)}

__all__ = [
    "CEU",
    "KL",
    "NPO",
    "OBJECTIVES",
    "PDU",
    "RMU",
    "UNDIAL",
    "WGA",
    "AltPO",
    "AnswerLogprobs",
    "GradAscent",
    "GradDiff",
    "IdkDPO",
    "Objective",
    "SatImp",
    "SimNPO",
    "answer_kl",
    "answer_logits",
    "answer_logprobs",
    "make_objective",
    "token_nll",
    "why_logits",
]
