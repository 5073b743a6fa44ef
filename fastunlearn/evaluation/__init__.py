"""Did it forget, did it keep."""

from fastunlearn.evaluation.recall import answer_logprobs, exact_recall, generate_answers, score_answers

__all__ = ["answer_logprobs", "exact_recall", "generate_answers", "score_answers"]
