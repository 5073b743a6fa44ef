"""Distance of a model's next-token distribution to a target's, from hidden states, without the logits of either."""

from __future__ import annotations

import difflib

from torch import Tensor

from fastunlearn import _backend
from fastunlearn.ops._linear_checks import cast, check, number
from fastunlearn.ops._linear_loss import Head, Spec, reduced
from fastunlearn.ops.linear_nll import check_reduction, transform

_OP = _backend.register("linear_divergence", triton=("cuda",))
#: kind -> whether it has a reference
KINDS = {"kl": True, "undial": True, "ce_u": False, "pdu": False}


def linear_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    labels: Tensor,
    *,
    kind: str = "kl",
    strength: float = 10.0,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    reduction: str = "sequence",
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss over the whole vocabulary at every token that counts, differentiable in hidden, weight and bias.

    With p the model's distribution, q the reference's and y the label:

        kl      KL(q || p)
        undial  cross entropy of p with softmax(reference logits - strength [v = y])    UNDIAL, Dong et al. 2024 (arXiv 2402.10052)
        ce_u    cross entropy of p with p without y, that target a constant             CE-U, Yang 2025 (arXiv 2503.01224)
        pdu     (largest logit - mean logit)^2                                          PDU, Entesari et al. 2025 (arXiv 2506.05314)

    A reference is its last hidden states, which take vocabulary / width less memory than its logits. Memory and time are as in
    `linear_nll`.

    Args:
        hidden, weight, bias, labels, reduction, logit_scale, softcap: as in `linear_nll`. kl and pdu ask of the labels only which
            tokens count.
        ref_hidden: [..., tokens, width of the reference], ref_weight: [vocabulary, that width], ref_bias: [vocabulary] or None:
            constants; scale and cap are the model's. None for ce_u and pdu.
        kind: "kl", "undial", "ce_u" or "pdu".
        strength: of undial, the amount taken from the label's logit, >= 0.

    Returns:
        (value in nats (pdu: in squared logits), counts): as `linear_nll` gives them.

    Raises:
        TypeError, ValueError, RuntimeError: as in `linear_nll`; a reference where the kind has none, or none where it has one;
        another vocabulary than the model's.

    Example:
        >>> value, tokens = ops.linear_divergence(hidden, head, cached, head, labels, kind="kl")
        >>> loss = value.sum() / tokens.sum()
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), KINDS, n=1, cutoff=0.3)
        raise ValueError(
            f"kind: want one of {', '.join(map(repr, KINDS))}, got {kind!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
        )
    for name, value in (("ref_hidden", ref_hidden), ("ref_weight", ref_weight)):
        if KINDS[kind] and value is None:
            raise ValueError(f"{name}: {kind} compares with a reference; want a tensor, got None")
        if not KINDS[kind] and value is not None:
            raise ValueError(f"{name}: {kind} has no reference; want None")
    if ref_bias is not None and not KINDS[kind]:
        raise ValueError(f"ref_bias: {kind} has no reference; want None")
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = cast(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)  # type: ignore[assignment]  # fmt: skip
    check("", hidden, weight, bias, labels)
    if ref_hidden is not None and ref_weight is not None:
        ref_hidden, ref_weight = ref_hidden.detach(), ref_weight.detach()
        ref_bias = None if ref_bias is None else ref_bias.detach()
        check("ref_", ref_hidden, ref_weight, ref_bias, labels)
        if len(ref_weight) != len(weight):
            raise ValueError(f"ref_weight: want weight's vocabulary of {len(weight)}, got {len(ref_weight)}")
        if ref_hidden.dtype != hidden.dtype or ref_hidden.device != hidden.device:
            raise ValueError(
                f"ref_hidden: {ref_hidden.dtype} on {ref_hidden.device}, but hidden is {hidden.dtype} on {hidden.device}"
            )
    if kind == "ce_u" and len(weight) < 2:
        raise ValueError(f"weight: ce_u takes the label out of the vocabulary; want 2 rows at least, got {len(weight)}")
    check_reduction(reduction)
    amount = number("strength", strength, "a number >= 0", lambda x: x >= 0)
    spec = Spec("linear_divergence", kind, amount, *transform(logit_scale, softcap))
    return reduced(spec, Head(hidden, weight, bias, ref_hidden, ref_weight, ref_bias), labels, reduction)
