"""HamuSGD with the geometry of Adam: lengths of steps, units, promises, state."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fastunlearn import BitMask
from fastunlearn.optim import HamuSGD

SHAPES = [(40, 30), (17,), (6, 3, 3, 3)]


def drawn(seed, count=1):
    generator = torch.Generator().manual_seed(seed)
    lists = [[torch.randn(s, generator=generator) for s in SHAPES] for _ in range(count + 1)]
    return lists[-1], lists[:-1]


def made(gradients, dtype=torch.float32, **options):
    """(parameters, optimiser): the parameters from zero, `gradients` called for every step."""
    params = [torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for s in SHAPES]
    given = {"lr": 1e-3, "share": 0.5, "geometry": "adam"} | options
    return params, HamuSGD(params, gradients, **given)


def constant(scale_forget=1.0, scale_retain=1.0, count=1, seed=0):
    def gradients():
        forget, retain = drawn(seed, count)
        return [x * scale_forget for x in forget], [[x * scale_retain for x in row] for row in retain]

    return gradients


@pytest.mark.parametrize("variant", ["q", "u"])
def test_lengths_of_gradients_do_not_matter(variant):
    results = []
    for scales in ((1.0, 1.0), (1e3, 1.0), (1.0, 1e-3), (1e-4, 1e4)):
        params, optimizer = made(constant(*scales), variant=variant)
        for _ in range(3):
            optimizer.step()
        results.append(params)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_half_of_the_ball_is_the_default():
    (a, one), (b, other) = made(constant(1e2, 1e2), share=None), made(constant())
    one.step()
    other.step()
    assert one.certificate.s == pytest.approx(other.certificate.s, rel=1e-3)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-7)


def test_groups_that_cancel_are_refused():
    forget, (retain,) = drawn(0)
    params, optimizer = made(lambda: (forget, [retain, [-x for x in retain]]), variant="u")
    with pytest.raises(ValueError, match="g_retain: the groups' gradients cancel out"):
        optimizer.step()
    assert not any(p.any() for p in params)


def test_what_is_asked_for_nothing_is_adam_s_length():
    params, optimizer = made(constant(), share=0.0)
    optimizer.step()
    forget, (retain,) = drawn(0)
    kept, gone = (math.sqrt(sum(float(x.square().sum()) for x in row)) for row in (retain, forget))
    # Nothing to forget is asked for: against the retain gradient where it does not disagree, and never by more than lr.
    for p, r, f in zip(params, retain, forget):
        p = p.detach()
        if float((r * f).sum()) <= 0:
            continue
        direct = -1e-3 * (r / kept) / torch.sqrt((r / kept) ** 2 + (f / gone) ** 2)
        assert float((p - direct).abs().max()) <= 2e-3
    assert max(float(p.detach().abs().max()) for p in params) <= 2e-3
    assert min(float(p.detach().abs().max()) for p in params) > 1e-4


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_promises_are_of_the_losses(share):
    params, optimizer = made(constant(), share=share)
    forget, (retain,) = drawn(0)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    certificate = optimizer.certificate
    change = [p.detach() - b for p, b in zip(params, before)]
    # Linear losses: of descent on the forget term, which is to grow.
    gone = -sum(float((c * x).sum()) for c, x in zip(change, forget))
    kept = sum(float((c * x).sum()) for c, x in zip(change, retain))
    assert gone == pytest.approx(certificate.predicted_forget, rel=1e-4)
    assert kept == pytest.approx(certificate.predicted_retain[0], rel=1e-4)
    assert gone >= 0.999 * certificate.demand
    assert certificate.holds(gone, [kept])


def test_a_quadratic_is_forgotten_and_kept():
    """Two ill-conditioned quadratics: forgetting grows, the retain loss does not, more at the same rate than by plain steps."""
    curvature = torch.logspace(-4, 0, 60)
    targets = torch.ones(60), torch.cat([torch.ones(30), -torch.ones(30)])

    def losses(x):
        return [float((curvature * (x - t) ** 2).sum()) for t in targets]

    ends = {}
    for geometry in ("euclidean", "adam"):
        x = torch.nn.Parameter(torch.full((60,), 0.5))

        def gradients(x=x):
            # Of descent: the forget loss is to grow.
            gone, kept = (curvature * 2 * (x.detach() - t) for t in reversed(targets))
            return [-gone], [[kept]]

        optimizer = HamuSGD([x], gradients, lr=1e-2, share=0.7, geometry=geometry)
        start = losses(x.detach())
        for _ in range(20):
            optimizer.step()
        end = losses(x.detach())
        assert end[1] > start[1]
        assert end[0] <= start[0] * 1.001
        ends[geometry] = end[1] - start[1]
    assert ends["adam"] > 1.2 * ends["euclidean"]


def test_frozen_entries_and_groups():
    masks = [BitMask.pack(torch.rand(s) < 0.5) for s in SHAPES]

    def gradients():
        forget, retain = drawn(0, 2)
        for row in (forget, *retain):
            for x, m in zip(row, masks):
                x[~m.unpack()] = float("nan")
        return forget, retain

    params, optimizer = made(gradients, masks=masks)
    for _ in range(2):
        optimizer.step()
    for p, m in zip(params, masks):
        assert not p[~m.unpack()].any()
        assert p[m.unpack()].all()
    assert len(optimizer.certificate.predicted_retain) == 2


def test_state_goes_round_in_float32():
    params, optimizer = made(constant(), torch.bfloat16, stochastic_rounding=False)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    again, other = made(constant(), torch.bfloat16, stochastic_rounding=False)
    with torch.no_grad():
        for p, q in zip(again, params):
            p.copy_(q)
    other.load_state_dict(kept)
    for p, q in zip(params, again):
        assert other.state[q]["square"].dtype == torch.float32
        assert torch.equal(other.state[q]["square"], optimizer.state[p]["square"])
    optimizer.step()
    other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, again))
    assert all(torch.equal(a["square"], b["square"]) for a, b in zip(optimizer.state.values(), other.state.values()))


def test_a_bad_gradient_changes_nothing():
    params, optimizer = made(lambda: ([torch.full(s, float("nan")) for s in SHAPES], drawn(0)[1]))
    with pytest.raises(ValueError, match="g_forget: the gradient of tensor 0 is not finite"):
        optimizer.step()
    assert not optimizer.state
    assert not any(p.any() for p in params)


def test_more_than_the_ball_holds():
    params, optimizer = made(constant(), share=None, q=1e9, infeasible="largest")
    optimizer.step()
    assert optimizer.certificate.demand == pytest.approx(optimizer.certificate.largest, rel=1e-5)
    assert max(float(p.detach().abs().max()) for p in params) < 1e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"geometry": "cone"}, "geometry: want 'euclidean' or 'adam', got 'cone'"),
        ({"share": None, "ratio": 0.5}, "ratio: of clipped gradients"),
        ({"beta2": 1.0}, "beta2: want a number in"),
        ({"eps": 0.0}, "eps: want a number > 0"),
    ],
)
def test_bad_input(changes, words):
    with pytest.raises(ValueError, match=words):
        made(constant(), **changes)
