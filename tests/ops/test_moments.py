"""Token moments: sums by hand, streaming, weights, what is no token."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch

import fastunlearn
from fastunlearn import ops
from fastunlearn.reference import moments as reference
from tests.proof import TRITON, Aot, OpProof


def _case(shape, weighted=False, anchored=False, dtype=torch.float32):
    def make(device):
        g = torch.Generator().manual_seed(0)
        return {
            "features": torch.randn(shape, generator=g).to(device, dtype),
            "weights": torch.rand(shape[:-1], generator=g).to(device) if weighted else None,
            "anchors": torch.randn(shape, generator=g).to(device, dtype) if anchored else None,
        }

    return make


class TestTokenMoments(OpProof):
    op = "token_moments"
    backends = ("triton",)
    aot = [
        Aot(
            "fastunlearn.kernels.moments:_moments",
            {"left": f"*{t}", "right": f"*{t}", "weights": "*fp32", "out": "*fp64", "tokens": "i64", "d": "i32", "run": "i32"},
            {"SYMMETRIC": symmetric, "WEIGHTED": weighted, "BLOCK": 64, "BLOCK_K": 16},
            {"num_warps": 4, "num_stages": 2},
            (80, 90, 100) if TRITON >= (3, 8) else (80, 90),
        )
        for t, symmetric, weighted in (("fp32", True, False), ("fp64", False, True), ("bf16", False, True))
        if t != "bf16" or TRITON >= (3, 9)
    ]  # fmt: skip
    exact = False
    traced = ("prompts", "half")
    eps = 1e-13
    cases = {
        "tokens": _case((9, 5)),
        "prompts": _case((3, 7, 5), weighted=True),
        "anchors": _case((3, 7, 5), weighted=True, anchored=True),
        "half": _case((30, 6), anchored=True, dtype=torch.float16),
        "none": _case((0, 4)),
        "two tiles, three runs": _case((300, 70)),
        "two tiles, three runs, anchors": _case((20, 15, 70), weighted=True, anchored=True),
        "wide": _case((9, 5), weighted=True, anchored=True, dtype=torch.float64),
    }

    def run(self, args):
        return ops.token_moments(args["features"], args["weights"], anchors=args["anchors"])

    def library_calls(self, args):
        c, a, w = (
            None if t is None else t.flatten(0, -2) if t.dim() > 2 else t
            for t in (args["features"], args["anchors"], args["weights"])
        )
        out = torch.zeros(c.shape[1], c.shape[1], dtype=torch.float64)
        yield torch.ops.fastunlearn.token_moments_.default, (a, c, None if w is None else w.flatten(), out)

    def oracle(self, args):
        c = args["features"].double().flatten(0, -2)
        a = c if args["anchors"] is None else args["anchors"].double().flatten(0, -2)
        out = torch.zeros(c.shape[1], c.shape[1], dtype=torch.float64)
        for t in range(len(c)):
            w = 1.0 if args["weights"] is None else float(args["weights"].flatten()[t])
            out += w * torch.outer(a[t], c[t])
        return out


def test_streamed_and_in_parts(monkeypatch):
    c, a, w = torch.randn(50, 6), torch.randn(50, 6), torch.rand(50)
    want = ops.token_moments(c, w, anchors=a)
    out = torch.zeros(6, 6, dtype=torch.float64)
    for part in range(0, 50, 13):
        at = slice(part, part + 13)
        assert ops.token_moments(c[at], w[at], out, anchors=a[at]) is out
    torch.testing.assert_close(out, want)
    monkeypatch.setattr(reference, "CHUNK", 7)
    torch.testing.assert_close(ops.token_moments(c, w, anchors=a), want)


def test_padding_of_no_weight_does_not_count():
    c = torch.randn(4, 10, 6)
    w = torch.ones(4, 10)
    w[:, 3:] = 0
    torch.testing.assert_close(ops.token_moments(c, w), ops.token_moments(c[:, :3]))


C = torch.randn(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ops.token_moments(C.int()), TypeError, "features: want a floating tensor"),
        (lambda: ops.token_moments(C[0]), TypeError, "at least two dimensions"),
        (lambda: ops.token_moments(C * float("inf")), ValueError, "want finite numbers"),
        (lambda: ops.token_moments(C, torch.ones(4)), ValueError, r"weights: want one for each token, \[3\]"),
        (lambda: ops.token_moments(C, -torch.ones(3)), ValueError, "weights: want finite numbers of at least 0"),
        (lambda: ops.token_moments(C, anchors=C[:2]), ValueError, "anchors: want one for each token"),
        (lambda: ops.token_moments(C, out=torch.zeros(4, 4)), ValueError, "out: want float64"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.skipif(TRITON == (0, 0), reason="needs triton")
@pytest.mark.parametrize("anchored", [False, True])
def test_an_older_triton_gets_16_bit_features_in_float32(monkeypatch, anchored):
    if torch.cuda.is_available():
        pytest.skip("this process compiles Triton kernels")
    from fastunlearn.kernels import moments as kernels

    args = _case((9, 5), anchored=anchored, dtype=torch.bfloat16)("cpu")
    wanted = ops.token_moments(args["features"], anchors=args["anchors"])
    monkeypatch.setattr(kernels, "TRITON", (3, 6))
    with fastunlearn.backend("triton"):
        assert torch.equal(ops.token_moments(args["features"], anchors=args["anchors"]), wanted)


@pytest.mark.skipif(TRITON == (0, 0), reason="needs triton")
def test_products_of_a_gpu_that_an_older_triton_does_not_compile(monkeypatch):
    from fastunlearn.kernels import _common

    moments, nm_linear = (importlib.import_module(f"fastunlearn.ops.{name}") for name in ("moments", "nm_linear"))
    device, x = torch.device("cuda", 0), SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), shape=(4, 8))
    asked = {}
    monkeypatch.setattr(nm_linear._backend, "resolve", lambda op, device, without: asked.update(without) or "native")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(_common, "TRITON", (3, 7))
    assert "does not compile float64 products for this GPU; 3.8 does" in moments._unsupported(device)["triton"]
    x.dtype = torch.float32
    nm_linear._resolve(x)
    assert "float32 gradients" in asked.pop("triton")
    x.dtype = torch.bfloat16
    nm_linear._resolve(x)
    assert not asked
    monkeypatch.setattr(_common, "TRITON", (3, 8))
    assert moments._unsupported(device) == {}
    monkeypatch.setattr(_common, "TRITON", (3, 6))
    assert moments._unsupported(torch.device("cpu")) == {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert moments._unsupported(device) == {}
