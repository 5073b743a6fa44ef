"""`fastunlearn report`: pages that are sound HTML whatever the folders hold, that say what was measured, and refuse what is no run."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fastunlearn import BitMask, save_masks
from fastunlearn.cli import main
from fastunlearn.report.layers import arranged, place
from fastunlearn.report.markup import Html, escape, join, tag
from fastunlearn.report.page import render, write_report
from fastunlearn.report.run_folder import load_run
from fastunlearn.report.samples import write_images
from fastunlearn.report.svg import Line, line_chart, thin, ticks
from fastunlearn.report.targets import Target

VOID = {"meta", "link", "img", "br", "hr"}
HOSTILE = "</style></title><script>alert(1)</script>\"><img src=x onerror='alert(1)'>&amp;\x00\x1b\ud800\u202e"


class Page(HTMLParser):
    """Checks what a parser can check while it reads."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refs: list[str] = []
        self.headings: list[int] = []
        self.images: list[dict[str, str]] = []
        self.svgs = 0
        self.tables: list[dict[str, int]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, name, attributes):
        given = dict(attributes)
        assert len(given) == len(attributes), attributes
        assert name not in {"script", "iframe", "object", "embed", "base", "form", "foreignobject"}, name
        for key, value in given.items():
            assert not key.startswith("on"), (name, attributes)
            assert key != "style"
            if key in {"src", "href"}:
                assert value.startswith(("#", "data:")), value
        if name not in VOID:
            self.open.append(name)
        if "id" in given:
            self.ids.append(given["id"])
        self.refs += [r for key in ("aria-labelledby", "aria-describedby") for r in given.get(key, "").split()]
        if given.get("href", "").startswith("#"):
            self.refs.append(given["href"][1:])
        if re.fullmatch(r"h[1-6]", name):
            self.headings.append(int(name[1]))
        if name == "img":
            assert given["alt"].strip()
            self.images.append(given)
        if name == "svg":
            self.svgs += 1
            assert given.get("aria-hidden") == "true" or (given["role"] == "img" and given["aria-labelledby"])
        if name == "table":
            self.tables.append({"col": 0, "row": 0, "caption": 0})
        if name == "caption":
            self.tables[-1]["caption"] += 1
        if name == "th":
            self.tables[-1][given["scope"]] += 1

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def checked(text: str) -> Page:
    """A page of which everything holds that a reader of any kind relies on."""
    page = Page(text)
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert len(page.ids) == len(set(page.ids))
    assert set(page.refs) <= set(page.ids), set(page.refs) - set(page.ids)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(page.headings, page.headings[1:]))
    assert all(t["caption"] == 1 and t["col"] >= 2 and t["row"] >= 1 for t in page.tables), page.tables
    assert not re.search(r"https?://|@import|url\(", text)
    text.encode("utf-8")
    return page


METRICS = {
    "method": "HAMU", "model": "a/b", "forget_rows": 2, "retain_rows": 10, "steps": 3,
    "before": {"forget": {"exact_recall": 1.0, "answer_probability": 0.98, "rows": 2}, "text": {"perplexity": 20.0}},
    "after": {"forget": {"exact_recall": 0.5, "answer_probability": 0.1, "rows": 2}, "text": {"perplexity": 20.5}},
    "targets": ["forget.exact_recall<=0.05", "text.perplexity<=1.05x", "retain.exact_recall>=0.95"],
    "settings": {"objective": "NPO", "learning_rate": 1e-3, "groups": None},
    "history": [{"step": i, "forget_loss": 3.0 - i, "sd_loss": 0.5 * i, "hamu_hardness": 0.1} for i in range(3)],
    "certificates": {"steps": 3, "flagged": 1, "first_flagged": 2, "checked": 3, "held": 2, "unharmed": 3, "largest_hardness": 0.4, "largest_s": 0.9},
    "train": {"train_runtime": 12.0}, "seconds": 12.5, "peak_mib": 100.0, "storage_mib": 250.0,
    "versions": {"fastunlearn": "0.1", "torch": "2.11"}, "command": "fastunlearn hamu --model a/b --output out",
}  # fmt: skip


def a_run(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(METRICS | changes))
    records = [
        {
            "step": i + 1,
            "hardness": 0.1 * i,
            "s": 0.5,
            "flagged": i == 1,
            "holds": i != 2,
            "forget_change": 0.1,
            "retain_change": [0.01],
        }
        for i in range(3)
    ]
    (folder / "certificates.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 4, "har')
    masks = {f"model.layers.{i}.{layer}.weight": BitMask.pack(torch.rand(8, 8) < 0.1 * (i + 1)) for i in range(3) for layer in ("mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    save_masks(masks, folder / "masks.safetensors")
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    write_images(folder, {"forget": ["a cat"], "retain": ["a <dog>"]}, images, images + 255, seed=7)
    rows = json.loads((folder / "_samples" / "samples.json").read_text())
    rows.append({"part": "forget", "prompt": "Who?", "wanted": "Ann.", "before": "Ann.", "after": ""})
    (folder / "_samples" / "samples.json").write_text(json.dumps(rows))
    return folder


def test_a_page_says_what_the_run_wrote(tmp_path):
    run = a_run(tmp_path / "out")
    text = render([load_run(run)])
    page = checked(text)
    for words in (
        "Unlearning report: HAMU on b", "of what had to be forgotten it recalls 50.0% (100.0% before)", "at most 5 %: missed",
        "at most 1.05 x before: met", "retain.exact_recall at least 0.95: not measured in out", "after (differs from the data) (nothing)",
        "forget loss (nats)", "sd loss", "largest hardness 0.4", "2 steps flagged or not held", "certificates.jsonl ends in half a line",
        "may move : ", "layers.2", "peak memory (MiB) 100", "storage (MiB) 250", "fastunlearn hamu --model a/b --output out",
        "torch 2.11", "learning_rate 0.001", "What this does not show", "keep it to yourself",
    ):  # fmt: skip
        assert words in page.text, words
    # Three curves (two losses; of HAMU its own two) and a heat map, each with its table.
    assert page.svgs == 5
    assert [image["alt"] for image in page.images] == [
        "before: a cat",
        "after: a cat",
        "before: a <dog>",
        "after: a <dog>",
    ]
    source = page.images[0]["src"]
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.split(",")[1]) == (run / "_samples" / "00-before.png").read_bytes()
    without = checked(render([load_run(run)], texts=False))
    assert not without.images
    assert "Who?" not in without.text


def test_runs_side_by_side(tmp_path):
    runs = [a_run(tmp_path / a / "out", settings={"objective": a, "seed": 0}) for a in ("npo", "simnpo")]
    page = checked(render([load_run(r) for r in (*runs, runs[0])], targets=["forget.exact_recall<0.6"]))
    assert "3 runs, side by side" in page.text
    assert "npo/out" in page.text
    assert "simnpo/out" in page.text
    assert "npo/out (2)" in page.text
    # One image before for all of them, one after of each; the setting that differs stands first.
    assert [image["alt"] for image in page.images[:4]] == [
        "before: a cat",
        *(f"after, {n}: a cat" for n in ("npo/out", "simnpo/out", "npo/out (2)")),
    ]
    assert page.text.index("objective npo simnpo npo") < page.text.index("seed 0 0 0")
    assert page.text.count("below 60 %: met") == 3


def test_hostile_strings_are_text(tmp_path):
    changes = {
        HOSTILE: HOSTILE, "method": HOSTILE, "model": HOSTILE, "command": HOSTILE, "versions": {HOSTILE: HOSTILE, "n": [HOSTILE]},
        "settings": {HOSTILE: {HOSTILE: HOSTILE}, "objective": HOSTILE, "t": True}, "before": {HOSTILE: {HOSTILE: HOSTILE}},
        "after": {HOSTILE: {HOSTILE: [HOSTILE], "rows": HOSTILE}}, "targets": [], "certificates": {"flagged": HOSTILE},
        "history": [{"step": 1, HOSTILE + "_loss": 1.0}, {"step": HOSTILE, "forget_loss": 1.0}, HOSTILE, {"step": 2, "forget_loss": 10**400}],
        "mask_density": {HOSTILE: {HOSTILE: 0.5, f"layers.1.{HOSTILE}": 0.1, "bad": 7}}, "seconds": HOSTILE, "peak_mib": float("nan"),
    }  # fmt: skip
    run = a_run(tmp_path / "<b>&'\"", **changes)
    rows = [
        {
            "part": HOSTILE,
            "prompt": HOSTILE,
            "wanted": HOSTILE,
            "before": HOSTILE,
            "after": HOSTILE * 200,
            "seed": HOSTILE,
        }
    ]
    rows += [
        {"before_image": name, "prompt": "p"}
        for name in ("../metrics.json", "/etc/passwd", "fake.png", "absent.png", "link.png", "a" * 5000, 3)
    ]
    rows.append({"before_image": "00-before.png", "prompt": HOSTILE})
    (run / "_samples" / "fake.png").write_text("<svg onload=alert(1)>")
    (run / "_samples" / "link.png").symlink_to(run / "_samples" / "00-before.png")
    (run / "_samples" / "samples.json").write_text(json.dumps(rows))
    (run / "TOFU_SUMMARY.json").write_text(json.dumps({HOSTILE: HOSTILE, "model_utility": 0.5}))
    text = render([load_run(run)], title=HOSTILE)
    page = checked(text)
    assert len(page.images) == 1
    assert "alert(1)" in page.text
    assert "<script" not in text
    assert "model_utility 0.5" in re.sub(r" not measured", "", page.text)
    for said in (
        "fake.png is no picture",
        "absent.png cannot be read",
        "names a picture that is no file in its folder",
    ):
        assert said in page.text
    assert not re.search("[\x00\x1b\ud800]", text)


def test_markup():
    assert (
        tag("p", "a < b", None, [Html("<b>c</b>")], class_='x"y', hidden=True, id=None)
        == '<p class="x&quot;y" hidden>a &lt; b<b>c</b></p>'
    )
    assert tag("p", title=Html("<b>")) == '<p title="&lt;b&gt;"></p>'
    assert escape("\x00a\ud800") == "\ufffda\ufffd"
    assert join(1, None, ["<", Html("<i></i>")]) == "1&lt;<i></i>"
    with pytest.raises(ValueError, match="no inside"):
        tag("br", "x")


def test_pictures_of_numbers():
    assert ticks(0, 87) == [0, 20, 40, 60, 80]
    assert ticks(3, 3) == [3]
    x, y = thin(range(10_000), [float(i == 5_003) for i in range(10_000)])
    assert len(x) <= 410
    assert 5_003 in x
    assert max(y) == 1
    for ys in ([1.0], [0.0, 0.0], [-2.0, 1e30], [-1e17], [0.0, 5e-324], [-1e300, -1e300]):
        svg = line_chart([Line("a", range(len(ys)), ys)], ident="a", title="t", description="d", x_label="x")
        assert "nan" not in svg
        assert "inf" not in svg
    with pytest.raises(ValueError, match="nothing to draw"):
        line_chart([], ident="a", title="t", description="d", x_label="x")


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.3.self_attn.q_proj.weight", ("layers.3", "self_attn.q_proj")),
        ("base_model.model.model.layers.11.mlp.up_proj.weight", ("layers.11", "mlp.up_proj")),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.weight",
         ("down_blocks.1.attentions.0.transformer_blocks.0", "attn1.to_out.0")),
        ("transformer.h.0.attn.c_attn.weight", ("h.0", "attn.c_attn")),
        ("time_embedding.linear_1.weight", ("time_embedding", "linear_1")),
        ("weight", ("weight", "weight")),
    ],
)  # fmt: skip
def test_names_as_places(name, where):
    assert place(name) == where
    values, rows, columns = arranged({name: 0.5, name + ".weight": 0.25})
    assert sorted(values.values()) == [0.25, 0.5]
    assert {(r, c) for r in rows for c in columns} >= values.keys()


def test_targets():
    before, after = {"a": {"m": 2.0}}, {"a": {"m": 2.1}, "b": {"m": None}}
    assert [Target.read(t).met(before, after) for t in ("a.m<=2.1", "a.m > 2.1", "a.m<=1.05x", "a.m>=1.1x", "b.m<1", "c.m<1", "a.n<1x")] == [
        True, False, True, False, None, None, None,
    ]  # fmt: skip
    for text in ("a<1", "a.m=1", "a.m<", "a.m<nan", "a.m<=one", ""):
        with pytest.raises(ValueError, match="target: want part"):
            Target.read(text)


BROKEN = {
    "absent": (None, "is not there"),
    "empty": ({}, "it holds nothing"),
    "other": ({"thesis.tex": "years"}, "holds none of metrics.json, demo.json, pruning.json, pecker.json"),
    "around": ({"a/metrics.json": "{}"}, "of its folders a does"),
    "killed": ({"checkpoint-10/x": ""}, "only checkpoint-10: the run did not end"),
    "cut": ({"metrics.json": '{"method": "SA'}, "metrics.json is no JSON (line 1"),
    "binary": ({"metrics.json": b"\xff\xfe\x00"}, "is not utf-8"),
    "deep": ({"metrics.json": "[" * 100_000}, "metrics.json"),
    "list": ({"metrics.json": "[]"}, "metrics.json: want an object, got a list"),
    "history": ({"metrics.json": '{"history": "x"}'}, "metrics.json: history: want a list, got text"),
    "part": ({"metrics.json": '{"before": {"forget": 1}}'}, "before.forget: want an object, got a number"),
    "target": ({"metrics.json": '{"targets": ["?"], "after": {"a": {"b": 1}}}'}, "target: want part.metric"),
    "certificates": ({"metrics.json": "{}", "certificates.jsonl": "{\n{}\n"}, "certificates.jsonl, line 1: no JSON"),
    "masks": ({"metrics.json": "{}", "masks.safetensors": "none"}, "masks.safetensors"),
    "samples": ({"metrics.json": "{}", "_samples/samples.json": "{}"}, "samples.json: want a list"),
    "demo": ({"demo.json": "{}"}, "is of a demo that did not end"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_run_is_one_line(tmp_path, capsys, case):
    files, said = BROKEN[case]
    run = tmp_path / "run"
    if files is not None:
        run.mkdir()
        for name, text in files.items():
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["report", str(run), "--out", str(tmp_path / "r.html")]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("fastunlearn report: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_the_command(tmp_path, capsys):
    run, out = a_run(tmp_path / "out"), tmp_path / "new" / "report.html"
    words = ["report", str(run), "--out", str(out)]
    assert main([*words, "--target", "forget.exact_recall<=0.6", "text.perplexity<=2x"]) == 0
    assert str(out) in capsys.readouterr().out
    before = out.read_bytes()
    assert checked(before.decode()).text.count(": met") == 2
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    assert main(words) == 2
    assert "exists; --overwrite replaces it" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*words, "--overwrite", "--no-texts"]) == 0
    assert out.read_bytes() != before
    assert main([*words, "--overwrite", "--target", "forget.exact_recal<=0.6"]) == 2
    assert "no run measured forget.exact_recal; there is forget.exact_recall" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is a folder"):
        write_report([run], tmp_path)


def test_a_pruned_model_and_a_demo(tmp_path):
    pruned = tmp_path / "pruned"
    pruned.mkdir()
    pruning = {
        "method": "wanda",
        "pattern": "2:4",
        "density": 0.5,
        "perplexity": {"dense": 20.0, "pruned": 30.0},
        "seconds": 3.0,
    }
    (pruned / "pruning.json").write_text(
        json.dumps(pruning | {"settings": {"model_name_or_path": "m"}, "command": "fastunlearn prune"})
    )
    text = checked(render([load_run(pruned)])).text
    for words in ("pruning (wanda) on m", "perplexity on other text 20 30", "seconds 3", "fastunlearn prune"):
        assert words in text
    demo = tmp_path / "demo"
    a_run(demo / "unlearned")
    stage = {"forget": 1.0, "paraphrased": 1.0, "retain": 1.0, "perplexity": 20.0, "answers": {}}
    record = {
        "stages": {"memorised": stage, "unlearned": stage | {"forget": 0.0}}, "targets": ["forget.exact_recall<=0.05"], "seconds": {"pruning": 2.0},
        "samples": [{"part": "paraphrased", "prompt": "What is Ann?", "before": "A smith.", "after": "A star."}], "machine": "two cores",
    }  # fmt: skip
    (demo / "demo.json").write_text(json.dumps(record))
    text = checked(render([load_run(demo)])).text
    for words in (
        "at most 5 %: met",
        "asked in other words",
        "What is Ann?",
        "seconds, pruning 2",
        "machine two cores",
    ):
        assert words in text
