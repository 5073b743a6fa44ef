"""ScaPre on a pipeline of real classes: every mode against its system written out, what it leaves alone, what it refuses."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_diffusion import tiny_pipeline, tiny_xl

pytest.importorskip("diffusers")

import scipy.linalg

from fastunlearn import ops
from fastunlearn.data import concepts as concept_text
from fastunlearn.data.prompts import aligned_features, empty_feature, encode_prompts, last_features
from fastunlearn.evaluation.residuals import forget_residuals, retain_residuals, spread
from fastunlearn.methods.scapre import ScaPreConfig, scapre
from fastunlearn.methods.scapre_official import PRESETS, ROLLBACKS, bures_rows, soft_mask
from fastunlearn.methods.scapre_solve import gate, overlap
from fastunlearn.methods.uce import UCEConfig, uce
from fastunlearn.parametrize.edit_lora import edit_lora, save_edit_lora
from fastunlearn.parametrize.partial_unet import load_partial_unet, save_partial_unet
from fastunlearn.sampling import sample

TEMPLATE = ["a {} image .", "{} style"]
EYE = torch.eye(16, dtype=torch.float64)


def double(pipeline):
    for part in (pipeline.unet, pipeline.text_encoder):
        part.double()
    return pipeline


def state(pipeline):
    return {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}


@pytest.mark.parametrize("preserve", [[], ["Pop Art", "Cat"]])
def test_robust_is_its_normal_equations(preserve):
    pipeline = double(tiny_pipeline())
    config = ScaPreConfig(
        lamb=0.3, erase_scale=1.5, preserve_scale=0.7, padding_weight=0.1, template=TEMPLATE, gamma=0.2
    )
    old = state(pipeline)
    c, a, w = (torch.cat(t) for t in zip(*concept_text.token_pairs(
        pipeline, ["Van Gogh", "Mosaic"], ["Photo", "Photo"], TEMPLATE, last=False, padding_weight=0.1)))  # fmt: skip
    assert set(w.tolist()) == {0.1, 1.0}
    last = last_features(pipeline, ["Van Gogh", "Mosaic"])
    R = 0.2 * last.square().sum(1).mean() * overlap(last, "conflict")
    left = 0.3 * EYE + 1.5 * (c * w[:, None]).T @ c + R
    right = 0.3 * EYE + 1.5 * (a * w[:, None]).T @ c + R
    if preserve:
        p = torch.cat(list(concept_text.kept_tokens(pipeline, preserve, TEMPLATE)))
        left, right = left + 0.7 * p.T @ p, right + 0.7 * p.T @ p
    edit = scapre(pipeline, ["Van Gogh", "Mosaic"], "Photo", preserve=preserve, config=config)
    assert set(edit.weights) == {n for n in old if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    for name, tensor in pipeline.unet.state_dict().items():
        if name in edit.weights:
            torch.testing.assert_close(tensor, old[name] @ right @ torch.linalg.inv(left), rtol=1e-9, atol=1e-9)
            assert torch.equal(edit.old[name], old[name])
        else:
            assert torch.equal(tensor, old[name])
    assert all(0 < value < 0.9 for value in edit.forget.values())
    assert (edit.retain is None) == (not preserve)
    assert edit.condition > 1


def test_one_last_word_is_uce():
    mine, theirs = double(tiny_pipeline()), double(tiny_pipeline())
    scapre(mine, ["Mosaic"], "Photo", config=ScaPreConfig(tokens="last", lamb=0.2), preserve=["Cat"])
    uce(theirs, ["Mosaic"], ["Photo"], ["Cat"], UCEConfig(lamb=0.2))
    for a, b in zip(mine.unet.state_dict().values(), theirs.unet.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"relevance": "gaussian"}, {"gamma": 0.5}])
def test_erase_scale_0_changes_no_bit(settings):
    pipeline, old = tiny_pipeline(), state(tiny_pipeline())
    scapre(pipeline, ["Mosaic"], "Photo", preserve=["Cat"], config=ScaPreConfig(erase_scale=0, **settings))
    assert all(torch.equal(tensor, old[name]) for name, tensor in pipeline.unet.state_dict().items())


def test_relevance_confines_the_edit():
    pipeline = double(tiny_pipeline())
    config = ScaPreConfig(relevance="gaussian", noise=0.3)
    edit = scapre(pipeline, ["Mosaic", "Van Gogh"], "Photo", preserve=["Pop Art", "Tree"], config=config)
    alpha = edit.relevance
    assert alpha.max() == 1
    assert alpha.min() >= 0
    assert alpha.unique().numel() > len(alpha) / 2
    every = scapre(double(tiny_pipeline()), ["Mosaic", "Van Gogh"], "Photo", preserve=["Pop Art", "Tree"])
    assert every.relevance is None
    moved = [torch.cat([(e.weights[n] - e.old[n]).norm(dim=1) for n in e.weights]) for e in (edit, every)]
    assert (moved[0] <= moved[1] + 1e-9).float().mean() > 0.9


def test_controls_of_relevance():
    """An ablation keeps what it does not ask about: the numbers of a projection, or their mean."""
    names, kept = ["Mosaic", "Van Gogh"], ["Pop Art", "Tree"]

    def run(**settings):
        config = ScaPreConfig(relevance="gaussian", noise=0.3, **settings)
        return scapre(double(tiny_pipeline()), names, "Photo", preserve=kept, config=config)

    real, shuffled, constant, empty = run(), run(control="shuffled"), run(control="constant"), run(negatives="empty")
    heights = [len(weight) for weight in real.weights.values()]
    assert not torch.equal(real.relevance, shuffled.relevance)
    assert not torch.equal(real.relevance, empty.relevance)
    parts = [edit.relevance.split(heights) for edit in (real, shuffled, constant)]
    for a, b, c in zip(*parts):
        assert torch.equal(a.sort().values, b.sort().values)
        assert torch.equal(c, a.mean().expand_as(a))
    assert torch.equal(shuffled.relevance, run(control="shuffled").relevance)
    assert any(not torch.equal(real.weights[name], shuffled.weights[name]) for name in real.weights)


def test_a_dry_run_tells_relevance():
    told = scapre(double(tiny_pipeline()), ["Mosaic"], "Photo", preserve=["Cat"], dry_run=True)
    used = scapre(
        double(tiny_pipeline()), ["Mosaic"], "Photo", preserve=["Cat"], config=ScaPreConfig(relevance="gaussian")
    )
    torch.testing.assert_close(told.relevance, used.relevance)


def test_paper_is_equation_9_and_the_bures_step():
    pipeline = double(tiny_pipeline())
    names, old = ["Van Gogh", "Mosaic"], state(pipeline)
    config = ScaPreConfig(mode="paper", lamb=0.4)
    edit = scapre(pipeline, names, ["Photo", "Cat"], config=config)
    tokens = encode_prompts(pipeline, names).flatten(0, 1)
    C, A = last_features(pipeline, names), last_features(pipeline, ["Photo", "Cat"])
    system = 0.4 * EYE + tokens.T @ tokens + overlap(C, "paper")
    at = 0
    for name, weight in edit.weights.items():
        alpha = edit.relevance[at : at + len(weight)].double()
        at += len(weight)
        want = scipy.linalg.solve_sylvester(alpha.diag().numpy(), system.numpy(), (old[name] @ A.T @ C).numpy())
        torch.testing.assert_close(weight, torch.from_numpy(want), rtol=1e-8, atol=1e-8)
    other = double(tiny_pipeline())
    stepped = scapre(other, names, ["Photo", "Cat"], config=ScaPreConfig(mode="paper", lamb=0.4, geometry=0.3, guard=9))
    for name, weight in stepped.weights.items():
        whole = ops.bures_distance(edit.weights[name], old[name])
        torch.testing.assert_close(ops.bures_distance(edit.weights[name], weight), 0.3 * whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"V\* = 0, for which eq. 9 has the one solution W = 0"):
        scapre(pipeline, names, mode="paper")


@pytest.mark.parametrize(
    ("preset", "anchor"), [(None, ""), ("confuse5", ""), ("nsfw", ""), ("artists", "Photo"), (None, "a Tree image")]
)
def test_official_is_the_authors_system_row_by_row(preset, anchor):
    """Written out from the description, one Cholesky factor a row."""
    pipeline = double(tiny_pipeline())
    names, old = ["Van Gogh", "Mosaic", "Cat"], state(pipeline)
    config = ScaPreConfig(mode="official", preset=preset, erase_scale=1.3)
    scale, power, ased, copies = PRESETS[preset]
    es = 1.3 if scale is None else scale
    features, other = encode_prompts(pipeline, names), encode_prompts(pipeline, [anchor or " "])[0]
    starts = [2, 1, 1]  # Van Gogh is two words
    # Both from their last words on; of nothing from the token that begins every prompt.
    begin = len(anchor.split())
    pairs = [(f[s:], other[begin:]) for f, s in zip(features, starts)]
    pairs = [(f[: len(o)], o[: len(f)]) for f, o in pairs]
    C = torch.stack([features[k, s] for k, s in enumerate(starts)])
    torch.testing.assert_close(C, last_features(pipeline, names))
    pi = C.T @ torch.linalg.solve(C @ C.T + 1e-8 * torch.eye(3, dtype=torch.float64), C)
    edit = scapre(pipeline, names, anchor, config=config)
    positives = concept_text.noisy(C, 5, 0.01, 0)
    negatives = concept_text.noisy(empty_feature(pipeline), 5, 0.01, 0)
    for name in [*edit.weights][:3]:
        w0, got = old[name], edit.weights[name]
        mu = float(ops.row_entropy(w0, concept_text.noisy(C, copies, 0.01, 0)).mean())
        masks = torch.ones(len(w0), 3, dtype=torch.float64)
        if power is not None:
            mi = ops.informax(w0, positives, negatives, reduce="none")
            masks = (((mi - mi.mean(0)) / mi.std(0).clamp_min(1e-8)) / 0.7).sigmoid() ** power
            torch.testing.assert_close(soft_mask(mi, power), masks)
        G = (0.5 + mu) * EYE + C.T @ C
        if ased:
            U, s, _ = torch.linalg.svd(C.T, full_matrices=False)
            G = G + U @ (mu * (1 - torch.sigmoid(s - s.median()))).diag() @ U.T
        for here, _ in pairs:
            G = G + es * here.T @ here
        want = torch.empty_like(w0)
        for i, w in enumerate(w0):
            b = (0.5 + mu) * w
            for k, (here, there) in enumerate(pairs):
                b = b + es * masks[i, k] * (there @ w) @ here
            system = G + es * masks[i].max() * pi
            want[i] = torch.cholesky_solve(b[:, None], torch.linalg.cholesky(system))[:, 0]
        torch.testing.assert_close(got, bures_rows(want, w0, 0.5 + mu, mu), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("preset", list(ROLLBACKS))
def test_the_authors_program_for_few_concepts(preset):
    """Written out from the description: one inverse a projection, and the share of the way that each row goes."""
    floor, residual = ROLLBACKS[preset]
    pipeline = double(tiny_pipeline())
    names, old = ["Van Gogh", "Mosaic"], state(pipeline)
    features, other = encode_prompts(pipeline, names), encode_prompts(pipeline, ["Photo"])[0]
    pairs = [(features[0, 2:], other[1:-1]), (features[1, 1:], other[1:])]
    C = torch.stack([c[0] for c, _ in pairs], 1)
    U, s, _ = torch.linalg.svd(C, full_matrices=False)
    left = (EYE - U @ torch.sigmoid(s - s.median()).diag() @ U.T) @ C
    edit = scapre(pipeline, names, "Photo", config=ScaPreConfig(mode="official", preset=preset))
    samples = [concept_text.noisy(t, 5, 0.01, 0) for t in (C.T.contiguous(), empty_feature(pipeline))]
    for name, got in [*edit.weights.items()][:3]:
        w0 = old[name]
        masks = soft_mask(ops.informax(w0, *samples, reduce="none"), 2.0)
        mat1, mat2 = 0.5 * w0, 0.5 * EYE + C @ C.T
        for k, (c, a) in enumerate(pairs):
            mat1, mat2 = mat1 + masks[:, k, None] * (w0 @ a.T @ c), mat2 + c.T @ c
        if residual:
            mat1 = mat1 - w0 @ left @ left.T
        specialised = 1 - ops.row_entropy(w0, concept_text.noisy(C.T.contiguous(), 20, 0.01, 0))
        share = (floor + (1 - floor) * specialised)[:, None]
        want = share * (mat1 @ torch.inverse(mat2)) + (1 - share) * w0
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_the_row_step():
    """One step by hand: equal weights, radius (1 + cos) / 2, turned towards the old row."""
    lam = mu = 0.5
    a = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    for cos, one in ((0.2, 0.6), (0.95, 0.975)):
        w0 = torch.tensor([[cos, (1 - cos**2) ** 0.5]], dtype=torch.float64)
        got = bures_rows(a, w0, lam, mu)
        assert float(got.norm()) == pytest.approx(one, abs=1e-9)
        assert float(got @ w0.T) > cos * float(got.norm())
    assert torch.equal(bures_rows(a, a, lam, mu), a)
    assert bures_rows(torch.zeros(1, 2), w0.float(), lam, mu).eq(0).all()


def test_order_and_batches_do_not_matter(monkeypatch):
    names, guides = ["Van Gogh", "Mosaic", "Cat"], ["Photo", "Tree", "Fish"]
    want = scapre(double(tiny_pipeline()), names, guides).weights
    for mode in ("robust", "official"):
        whole = scapre(double(tiny_pipeline()), names, guides, config=ScaPreConfig(mode=mode, noise=0.0)).weights
        other = scapre(double(tiny_pipeline()), names[::-1], guides[::-1], config=ScaPreConfig(mode=mode, noise=0.0))
        for name, weight in other.weights.items():
            torch.testing.assert_close(weight, whole[name], rtol=1e-8, atol=1e-8)
    monkeypatch.setattr(concept_text, "BATCH", 1)
    for name, weight in scapre(double(tiny_pipeline()), names, guides).weights.items():
        torch.testing.assert_close(weight, want[name], rtol=1e-10, atol=1e-10)


def test_dry_run_changes_nothing_and_files_hold_it(tmp_path):
    pipeline, old = tiny_pipeline(), state(tiny_pipeline())
    told = scapre(pipeline, ["Mosaic"], "Photo", preserve=["Cat"], dry_run=True)
    assert all(torch.equal(tensor, old[name]) for name, tensor in pipeline.unet.state_dict().items())
    edit = scapre(pipeline, ["Mosaic"], "Photo", preserve=["Cat"])
    assert edit.forget == told.forget
    assert edit.retain == told.retain
    assert max(edit.retain.values()) < 0.1 < 0.5
    save_partial_unet(edit.weights, tmp_path / "unet.safetensors", method="scapre")
    other = tiny_pipeline()
    assert load_partial_unet(other.unet, tmp_path / "unet.safetensors") == {"method": "scapre"}
    assert all(torch.equal(a, b) for a, b in zip(other.unet.state_dict().values(), pipeline.unet.state_dict().values()))


def test_as_a_lora_of_plain_diffusers(tmp_path):
    pytest.importorskip("peft")
    pipeline, plain = tiny_pipeline(), tiny_pipeline()
    before = sample(plain, ["a Cat image in Mosaic style"], [1], steps=2)
    edit = scapre(pipeline, ["Mosaic"], "Photo", config=ScaPreConfig(tokens="last"))
    # One word is an edit of rank one.
    factors, errors = edit_lora(edit.old, edit.weights, 1)
    assert max(errors.values()) < 1e-5
    save_edit_lora(factors, tmp_path / "pytorch_lora_weights.safetensors")
    plain.load_lora_weights(tmp_path)
    want = sample(pipeline, ["a Cat image in Mosaic style"], [1], steps=2, decode=False)
    got = sample(plain, ["a Cat image in Mosaic style"], [1], steps=2, decode=False)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert not torch.equal(before, sample(pipeline, ["a Cat image in Mosaic style"], [1], steps=2))
    errors = [edit_lora(scapre(tiny_pipeline(), ["Mosaic"], "Photo").old, scapre(tiny_pipeline(), ["Mosaic"], "Photo").weights, r)[1] for r in (1, 4, 16)]  # fmt: skip
    assert max(errors[0].values()) > max(errors[1].values()) > max(errors[2].values())
    assert max(errors[2].values()) < 1e-5
    with pytest.raises(FileExistsError):
        save_edit_lora(factors, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="lora_rank: want a whole number"):
        edit_lora(edit.old, edit.weights, 0)


def test_empty_anchors_stand_for_what_comes_behind():
    pipeline = double(tiny_pipeline())
    c, a, padding = aligned_features(pipeline, ["Mosaic"], [""])
    empty = encode_prompts(pipeline, [""])[0]
    assert torch.equal(a[:2], empty[:2])
    # The name and the ending that follows it both become the ending.
    assert torch.equal(a[2:], empty[1 : 1 + len(a) - 2])
    assert padding.tolist() == [False] * 3 + [True] * (len(c) - 3)


def test_gates():
    s = torch.tensor([0.1, 1.28, 5.0, 28.0])
    torch.testing.assert_close(gate(s, "paper"), torch.tensor([0.0475, 0.2785, 0.0335, 2.4e-11]), rtol=0.03, atol=1e-10)
    for kind, rises in (("conflict", True), ("code", False)):
        values = gate(s, kind)
        assert (values.diff() > 0).all() == rises
        torch.testing.assert_close(gate(10 * s, kind), values)


def test_residuals():
    old, new = {"w": torch.eye(3)}, {"w": 2 * torch.eye(3)}
    c, a = torch.eye(3, dtype=torch.float64)[:2], 2 * torch.eye(3, dtype=torch.float64)[:2]
    assert forget_residuals(new, old, c, a) == {"w": 0.0}
    assert forget_residuals(old, old, c, a) == {"w": 1.0}
    assert retain_residuals(new, old, c) == {"w": 1.0}
    assert retain_residuals(old, old, 0 * c) == {"w": 0.0}
    assert spread([torch.arange(10.0)[:, None]], 4).flatten().tolist() == [0, 3, 6, 9]


def test_two_text_encoders():
    pipeline = tiny_xl()
    prompts = ["a Cat image in Mosaic style", ""]
    features = encode_prompts(pipeline, prompts)
    theirs = pipeline.encode_prompt(prompts, device="cpu", do_classifier_free_guidance=False)[0]
    torch.testing.assert_close(features, theirs)
    old = state(pipeline)
    edit = scapre(pipeline, ["Mosaic", "Van Gogh"], "Photo", preserve=["Cat"], config=ScaPreConfig(template=TEMPLATE))
    assert edit.weights
    assert all(weight.shape[1] == 40 for weight in edit.weights.values())
    assert max(edit.forget.values()) < 0.9
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, old[name]) == (name not in edit.weights)


def test_a_damaged_model_is_named():
    pipeline = tiny_pipeline()
    name = next(n for n, _ in pipeline.unet.named_parameters() if n.endswith("attn2.to_v.weight"))
    pipeline.unet.get_parameter(name).data[0, 0] = float("nan")
    for edit in (lambda: scapre(pipeline, ["Mosaic"], "Photo"), lambda: uce(pipeline, ["Mosaic"], ["Photo"])):
        with pytest.raises(ValueError, match=f"pipeline: {name} holds NaN or infinite entries already"):
            edit()


def test_repetitions_are_warned_of():
    once = scapre(double(tiny_pipeline()), ["Mosaic", "Cat"], ["Photo", "Fish"]).weights
    with pytest.warns(UserWarning, match="1 are repetitions and count once, 'Mosaic' for one"):
        twice = scapre(double(tiny_pipeline()), ["Mosaic", "Cat", "Mosaic"], ["Photo", "Fish", "Tree"]).weights
    assert all(torch.equal(weight, once[name]) for name, weight in twice.items())
    # As CLIP's tokenizer has it, case does not tell names apart.
    with pytest.warns(UserWarning, match="1 are repetitions and count once, 'MOSAIC' for one"):
        twice = scapre(double(tiny_pipeline()), ["Mosaic", "Cat", "MOSAIC"], ["Photo", "Fish", "Tree"]).weights
    assert all(torch.equal(weight, once[name]) for name, weight in twice.items())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: scapre(p, []), ValueError, "concepts: none given"),
        (lambda p: scapre(p, "Mosaic"), TypeError, "concepts: want a list of names"),
        (
            lambda p: scapre(p, ["Mosaic"], preserve="Cat"),
            TypeError,
            "preserve: want a list of names, got the text 'Cat'",
        ),
        (lambda p: uce(p, "Cat", ["Tree"]), TypeError, "edit_concepts: want a list of names, got the text 'Cat'"),
        (lambda p: scapre(p, ["Mosaic", " "]), ValueError, "concepts: ' ' has no token"),
        (lambda p: scapre(p, ["Mosaic"], ["a", "b"]), ValueError, "anchors: want one, or one for each of the 1"),
        (lambda p: scapre(p, ["Mosaic"], "Mosaic"), ValueError, "anchors: 'Mosaic' is its own anchor"),
        (lambda p: scapre(p, ["Mosaic"], "mosaic"), ValueError, "anchors: 'Mosaic' is its own anchor"),
        (lambda p: scapre(p, ["Mosaic"], preserve=["Mosaic"]), ValueError, "preserve: 'Mosaic' is to be erased, too"),
        (lambda p: scapre(p, ["Mosaic"], preserve=["Cat", "mosaic"]), ValueError, "preserve: 'mosaic' is to be erased"),
        (
            lambda p: scapre(p, ["Mosaic"], preserve=["Cat"], mode="official"),
            ValueError,
            "mode official has no preserve",
        ),
        (lambda p: scapre(object(), ["Mosaic"]), ValueError, "pipeline: object has no unet and no transformer"),
        (lambda p: ScaPreConfig(mode="robust", preset="nsfw"), ValueError, "preset: only mode official"),
        (lambda p: ScaPreConfig(mode="fast"), ValueError, "mode: want one of robust, official, paper"),
        (lambda p: ScaPreConfig(lamb=0), ValueError, "lamb: want a finite number above 0"),
        (lambda p: ScaPreConfig(geometry=2), ValueError, r"geometry: want a number in \[0, 1\]"),
        (lambda p: ScaPreConfig(samples=1), ValueError, "samples: want at least 2"),
        (lambda p: ScaPreConfig(template=["x"]), ValueError, "template: want texts with"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(tiny_pipeline())
