"""log p(answer) from hidden states and the output layer's weight, without the logits."""

from __future__ import annotations

from torch import Tensor

from fastunlearn import _backend
from fastunlearn.ops._linear_checks import cast, check, number
from fastunlearn.ops._linear_loss import Head, Spec, reduced

_OP = _backend.register("linear_nll", triton=("cuda",))
REDUCTIONS = ("sequence", "token")


def check_reduction(reduction: str) -> None:
    """Raises ValueError for what is no reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: want one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")


def transform(logit_scale: float, softcap: float | None) -> tuple[float, float]:
    """(scale, softcap or 0), checked."""
    scale = number("logit_scale", logit_scale, "a finite number other than 0", lambda x: x != 0)
    return scale, 0.0 if softcap is None else number("softcap", softcap, "a number > 0, or None", lambda x: x > 0)


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "sequence",
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the labels under softmax(hidden @ weight^T + bias), differentiable, without the logits.

    The loss that every language-model objective is made of: NPO (Zhang et al. 2024, eq. 3), SimNPO (Fan et al. 2024, eq. 6) and
    their kin weigh each sequence by a factor of its own, so any upstream gradient is right here, also one a token. Memory beyond
    inputs and gradients is one buffer of fixed size (256 MiB on a CPU, 512 MiB on a GPU), whatever vocabulary and tokens. With a
    frozen head the two matrix products of torch's own forward and backward pass are all there is; a head that trains makes its
    logits twice unless they fit the buffer. Tokens that are ignored are not computed.

    Args:
        hidden: [..., tokens, width], states that enter the output layer; float32, float16, bfloat16 (float64 too, in plain PyTorch).
        weight: [vocabulary, width] of hidden's type. Under autocast hidden, weight and bias are cast as F.linear casts.
        labels: int64 [..., tokens], the token each state must predict: the caller shifts. -100 is ignored.
        bias: [vocabulary] or None.
        reduction: "sequence": sums over the last dimension; "token": none.
        logit_scale: the logits are multiplied by it.
        softcap: then they are capped: softcap * tanh(logits / softcap). None: they are not.

    Returns:
        (nll in nats, counts). nll: fp32 (fp64 for fp64), [...] or [..., tokens], 0 where nothing counts; counts: int64 of the same
        shape, the number of tokens that count. First derivatives only. On a GPU a call waits once, for the number of tokens.

    Raises:
        TypeError: not dense floating tensors, types that differ, DTensors. ValueError: shapes, devices or numbers that do not fit; a
        label outside the vocabulary. RuntimeError: a CUDA graph is being captured.

    Example:
        >>> nll, tokens = ops.linear_nll(hidden[:, :-1], model.lm_head.weight, labels[:, 1:])
        >>> loss = 2 / beta * F.softplus(beta * (reference_nll - nll)).mean()
    """
    hidden, weight, bias = cast(hidden, weight, bias)  # type: ignore[assignment]
    check("", hidden, weight, bias, labels)
    check_reduction(reduction)
    spec = Spec("linear_nll", "nll", 0.0, *transform(logit_scale, softcap))
    return reduced(spec, Head(hidden, weight, bias, None, None, None), labels, reduction)
