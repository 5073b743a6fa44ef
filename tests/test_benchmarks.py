"""The harness on a tiny op, the tables it feeds, and the totals of the real shapes."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as cli
from benchmarks import harness, machine, ops, plots, shapes, spec, tables
from benchmarks.spec import COPY, FLOOR, Case, Inputs, Limit, Op, Provider, Target
from fastunlearn import BitMask

CPU = torch.device("cpu")
ROWS = {
    "op",
    "case",
    "dtype",
    "provider",
    "ms_p20",
    "ms_p50",
    "ms_p80",
    "peak_mib",
    "limit_ms",
    "limit_kind",
    "correct",
}


def tiny(log: list[str] | None = None, **changes: object) -> Op:
    """out = 2 x, with a right peer, a wrong one, one that cannot serve and a floor; the runs are noted in `log`."""
    log = [] if log is None else log

    def provider(name: str, factor: float, **options: object) -> Provider:
        def build(x: Inputs):
            def call():
                log.append(name)
                return [x.a * factor]

            return call

        return Provider(name, build, **options)  # type: ignore[arg-type]

    def make(case: Case, device: torch.device) -> Inputs:
        return Inputs(a=torch.arange(64, dtype=torch.float32, device=device))

    fields = {
        "name": "tiny",
        "cases": [Case("small", [("a", (8, 8))], quick=True), Case("gpu only", [("a", (8, 8))], devices=("cuda",))],
        "make": make,
        "expected": lambda x: [x.a * 2],
        "check": spec.equal,
        "limit": lambda x, line: Limit("bytes", 8 * 64),
        "providers": [
            provider("fastunlearn", 2, backend="auto"),
            provider("right", 2),
            provider("wrong", 3),
            Provider("absent", lambda x: None),
            provider(FLOOR + "less", 1, check=lambda x, out, want: None),
        ],
        "targets": [
            Target("right", 1e9, "cpu"),
            Target("right", 0.5, "cuda"),
            Target("", -1.0, "cpu", kind="workspace"),
        ],
    }
    return Op(**(fields | changes))  # type: ignore[arg-type]


def settings(**changes: object) -> harness.Settings:
    return harness.Settings(**({"seconds": 0.0, "min_runs": 6, "say": lambda _: None} | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def result() -> dict:
    return harness.run([tiny()], CPU, settings())


@pytest.fixture
def quick_rates(monkeypatch: pytest.MonkeyPatch):
    """What a run measures beside the op, small."""
    monkeypatch.setattr(machine, "matmul_tflops", lambda device, dtype=None: {None: 1.0, torch.float64: 0.5}[dtype])
    monkeypatch.setattr(machine, "Bandwidth", lambda device, make=machine.Bandwidth: make(device, 2**16))


@pytest.mark.serial
def test_rows_have_the_fixed_fields(result: dict):
    assert [r["provider"] for r in result["rows"]] == ["fastunlearn", "right", "wrong", FLOOR + "less"]
    for row in result["rows"]:
        assert set(row) == ROWS
        assert (row["op"], row["case"], row["dtype"], row["limit_kind"]) == ("tiny", "small", "fp32", "bytes")
    facts = {"device", "driver", "torch", "triton", "commit", "date", "copy_gbps", "matmul_tflops", "empty_launch_us"}
    assert facts | {"cpu", "cores", "threads", "python"} <= set(result["meta"])
    limit = 8 * 64 / result["meta"]["copy_gbps"] / 1e6
    assert result["rows"][0]["limit_ms"] == pytest.approx(limit, abs=1e-5)


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_operations_count_at_the_rate_of_their_type():
    op = replace(tiny(), limit=lambda x, line: Limit("flops", {torch.float64: 3e9, None: 2e9}))
    result = harness.run([op], CPU, settings())
    assert result["rows"][0]["limit_ms"] == pytest.approx(3 / 0.5 + 2)
    assert result["meta"]["matmul_tflops_by_dtype"] == {"float64": 0.5}
    assert Limit("flops", 2e9).ms(1.0, lambda dtype: 4.0) == pytest.approx(0.5)
    assert Limit("bytes", 2e9).ms(40.0, lambda dtype: 4.0) == pytest.approx(50)


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_a_wrong_provider_is_recorded_and_not_timed():
    log: list[str] = []
    rows = {r["provider"]: r for r in harness.run([tiny(log)], CPU, settings())["rows"]}
    assert not rows["wrong"]["correct"]
    assert rows["wrong"]["ms_p50"] is None
    assert log.count("wrong") == 1
    assert rows["right"]["correct"]
    assert rows["right"]["ms_p20"] <= rows["right"]["ms_p50"] <= rows["right"]["ms_p80"]


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_providers_take_turns():
    log: list[str] = []
    harness.run([tiny(log)], CPU, settings())
    timed = log[-3 * 6 :]  # six rounds of three providers
    rounds = [timed[i : i + 3] for i in range(0, len(timed), 3)]
    assert all(set(r) == {"fastunlearn", "right", FLOOR + "less"} for r in rounds)
    assert {r[0] for r in rounds} == set(rounds[0]), "the first of a round rotates"


@pytest.mark.serial
def test_budgets():
    limited = tiny(
        providers=[
            Provider("fastunlearn", lambda x: lambda: [x.a * 2]),
            Provider("few", lambda x: lambda: [x.a * 2], max_runs=2),
        ]
    )
    runners, _, _ = harness.run_case(
        limited,
        limited.cases[0],
        CPU,
        settings(),
        machine.Bandwidth(CPU, 2**16),
        machine.Flusher(CPU),
        machine.OtherLoad(),
    )
    assert [len(r.ms) for r in runners] == [6, 2]
    slow = harness._Runner(limited.providers[0], ms=[5000.0])
    assert not slow.may_run(settings(slow_s=4.0))
    assert harness._Runner(limited.providers[0], ms=[10.0]).may_run(settings(slow_s=4.0))
    # What a GPU is kept busy with before each call counts, too.
    assert harness._Runner(limited.providers[0], ms=[1.0] * 6, seconds=0.5).may_run(settings(seconds=0.6))
    assert not harness._Runner(limited.providers[0], ms=[1.0] * 6, seconds=0.7).may_run(settings(seconds=0.6))
    assert all(r.seconds >= sum(r.ms) / 1e3 for r in runners)


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_what_a_run_changes_is_put_back_before_each_gate():
    def inplace(x: Inputs):
        return lambda: [x.a.mul_(2)]

    op = tiny(
        mutated=lambda x: [x.a],
        expected=lambda x: [x.a.mul_(2).clone()],
        providers=[Provider("fastunlearn", inplace), Provider("peer", inplace)],
    )
    assert all(row["correct"] for row in harness.run([op], CPU, settings())["rows"])


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_what_does_not_fit_or_does_not_run_is_said():
    def broken(x: Inputs):
        raise ImportError("no such peer")

    def raises(x: Inputs):
        raise RuntimeError("a bug")

    providers = [
        Provider("fastunlearn", lambda x: lambda: [x.a * 2]),
        Provider("broken", broken),
        Provider("bug", raises),
    ]
    op = tiny(cases=[Case("small", [("a", (8, 8))]), Case("huge", [("a", (8, 8))], gib=1e9)], providers=providers)
    result = harness.run([op], CPU, settings())
    assert {r["provider"]: r["correct"] for r in result["rows"]} == {"fastunlearn": True, "bug": False}
    assert any("broken" in line and "no such peer" in line for line in result["left_out"])
    assert any("huge" in line and "GiB" in line for line in result["left_out"])
    over = harness.run([op], CPU, settings(total_s=-1.0))
    assert not over["rows"]
    assert len(over["left_out"]) == 2


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_an_interrupted_run_keeps_what_it_has():
    def interrupted(x: Inputs):
        raise harness.Terminated

    op = tiny(cases=[Case("first", [("a", (8, 8))]), Case("second", [("a", (8, 8))])])
    stop = tiny(name="stop", providers=[Provider("fastunlearn", interrupted)])
    result = harness.run([op, stop], CPU, settings())
    assert {r["case"] for r in result["rows"]} == {"first"}
    assert "interrupted" in result["left_out"][-1]


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_every_op_has_its_turn_before_the_time_is_over():
    """Else what is late in the alphabet is never measured where the time is short."""
    said: list[str] = []
    cases = [Case("first", [("a", (8, 8))]), Case("second", [("a", (8, 8))])]
    alone = tiny(name="b", cases=cases[:1])
    result = harness.run([tiny(name="a", cases=cases), alone], CPU, settings(say=said.append))
    assert [line for line in said if "fp32" in line] == ["a, first, fp32", "b, first, fp32", "a, second, fp32"]
    rows = [(r["op"], r["case"]) for r in result["rows"] if r["provider"] == "right"]
    assert rows == [("a", "first"), ("a", "second"), ("b", "first")]


@pytest.mark.serial
@pytest.mark.usefixtures("quick_rates")
def test_a_lost_gpu_ends_the_run_and_keeps_what_it_has(monkeypatch):
    answers = iter([None, "an illegal memory access was encountered"])
    monkeypatch.setattr(machine, "lost", lambda device: next(answers))
    cases = [Case(name, [("a", (8, 8))]) for name in ("first", "second", "third")]
    result = harness.run([tiny(cases=cases)], CPU, settings())
    assert {r["case"] for r in result["rows"]} == {"first", "second"}
    assert "the GPU was lost in tiny, second (an illegal memory access" in result["left_out"][-1]


def test_a_gpu_that_is_lost_is_known(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert machine.lost(CPU) is None
    assert machine.lost(torch.device("cuda")) == "CUDA error: an illegal memory access was encountered"


@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the load of others is counted on Linux only")
def test_the_load_of_others_is_seen():
    others = machine.OtherLoad()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy, others:
        time.sleep(0.8)
        busy.kill()
    share = others.share()
    assert share is not None
    assert share > 0.2 / machine.cores()


def test_percentiles():
    assert machine.percentile([4.0, 1.0, 3.0, 2.0, 5.0], 50) == 3
    assert machine.percentile([1.0, 2.0], 20) == pytest.approx(1.2)
    assert machine.percentile([7.0], 80) == 7


@pytest.mark.serial
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is counted on Linux only")
def test_peak_memory_sees_scratch_and_not_the_output():
    def work():
        scratch = torch.ones(48 * 2**20, dtype=torch.uint8)
        scratch.add_(1)
        del scratch
        return None, torch.ones(32 * 2**20, dtype=torch.uint8)

    work()
    _, peak, fresh = machine.peak_memory(work, [], CPU)
    assert peak is not None
    assert fresh == 32 * 2**20
    assert 12 < peak < 24  # 48 MiB of scratch, of which the output's 32 hide that much
    kept = torch.ones(32 * 2**20, dtype=torch.uint8)
    _, peak, fresh = machine.peak_memory(lambda: (None, kept.add_(1)), [kept], CPU)
    assert peak is not None
    assert peak < 4
    assert fresh == 0


def judged(target: Target, **ms: float) -> dict | None:
    case = Case("c", [("a", (1024, 1024))])
    rows = [
        {"provider": name.replace("_", " "), "ms_p50": value, "peak_mib": 1.0, "limit_ms": 1.0 if value > 0.1 else 0.01}
        for name, value in ms.items()
    ]
    return harness.judge(tiny(), target, case, rows)


def test_targets():
    met = judged(Target("peer", 0.5, "cpu"), fastunlearn=4.0, peer=10.0)
    assert met is not None
    assert met["met"]
    assert met["ratio"] == pytest.approx(0.4)
    missed = judged(Target("limit", 1.25, "cpu"), fastunlearn=4.0, peer=10.0)
    assert missed is not None
    assert not missed["met"]
    assert missed["ratio"] == pytest.approx(4)
    workspace = judged(Target("", 0.3, "cpu", kind="workspace"), fastunlearn=4.0)
    assert workspace is not None
    assert workspace["met"]
    assert workspace["ratio"] == pytest.approx(0.25)  # 1 MiB beside 4 MiB of scores
    assert judged(Target("nobody", 0.5, "cpu"), fastunlearn=4.0) is None


def test_small_limits_are_judged_by_the_distance_to_the_best_peer():
    near = judged(Target("peer", 0.1, "cpu"), fastunlearn=0.030, peer=0.020)
    far = judged(Target("peer", 0.1, "cpu"), fastunlearn=0.040, peer=0.020)
    assert near is not None
    assert far is not None
    assert near["met"]
    assert not far["met"]


def test_slug_is_a_file_name():
    assert all(c.isalnum() or c == "-" for c in machine.slug(CPU))
    assert machine.slug(CPU).endswith("c")


@pytest.mark.parametrize(("rows", "cols", "itemsize"), [(5, 64, 4), (7, 13, 4), (3, 1, 2), (1, 1000, 2), (70, 9, 8)])
@pytest.mark.parametrize("line", [32, 64])
def test_touched_bytes(rows: int, cols: int, itemsize: int, line: int):
    mask = torch.rand(rows, cols) < 0.1
    lines = {(i * itemsize) // line for i in mask.flatten().nonzero().flatten().tolist()}
    assert spec.touched_bytes(BitMask.pack(mask).bits, cols, itemsize, line) == len(lines) * line


def test_touched_bytes_without_a_mask():
    mask = torch.rand(512, 512) < 0.05
    counted = spec.touched_bytes(BitMask.pack(mask).bits, 512, 4, 64)
    assert spec.expected_touched_bytes(mask.numel(), 0.05, 4, 64) == pytest.approx(counted, rel=0.03)


def test_totals_of_the_real_shapes():
    totals = [shapes.numel(f()) for f in (shapes.smollm2_135m, shapes.sd14_unet, shapes.sdxl_unet, shapes.llama_31_8b)]
    assert totals == [134_515_008, 859_520_964, 2_567_463_684, 8_030_261_248]
    assert shapes.numel(shapes.llama_31_8b_slice(1)) == 218_112_000


def test_language_models_are_transformers_own():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert shapes.smollm2_135m() == [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def test_every_benchmark_is_well_formed():
    for op in ops.load():
        assert [p.name for p in op.providers].count("fastunlearn") == 1, op.name
        names = {p.name for p in op.providers}
        assert len(names) == len(op.providers), f"{op.name}: two providers of one name"
        assert len({(c.name, c.dtype) for c in op.cases}) == len(op.cases), f"{op.name}: two cases of one name"
        assert any(c.quick for c in op.cases), f"{op.name}: nothing for --quick"
        for target in op.targets:
            assert target.over in names | {"limit", ""}, f"{op.name}: target over {target.over!r}"
            assert any(target.case in c.name for c in op.cases), f"{op.name}: no case like {target.case!r}"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_redistribution_that_stays_in_cache_is_held_to_one_read(device):
    """The copy counts two reads of the importance: too slow a yardstick for tensors that are read from memory once."""
    (op,) = ops.load(["redistribute"])
    for case in op.cases:
        over = {t.over for t in op.targets if t.device == device and t.case in case.name}
        assert over == ({COPY, "limit"} if "SmolLM2" in case.name else {COPY})


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="no benchmark named nothing"):
        ops.load(["nothing"])


def publish(folder: Path, result: dict) -> Path:
    cli.write_json(folder / "results" / "some-cpu.json", result)
    readme = folder / "README.md"
    readme.write_text(
        "# x\n<!-- benchmarks:begin ops-cpu -->\n<!-- benchmarks:end -->\ntext\n"
        "<!-- benchmarks:begin ops-cuda -->\nold\n<!-- benchmarks:end -->\n"
    )
    return readme


@pytest.mark.serial
def test_tables_round_trip(tmp_path: Path, result: dict, capsys: pytest.CaptureFixture[str]):
    readme = publish(tmp_path, result)
    where = ["--readme", str(readme), "--results", str(tmp_path / "results")]
    assert json.loads((tmp_path / "results" / "some-cpu.json").read_text()) == result
    assert cli.main(["table", "--check", *where]) == 1
    assert "old" in readme.read_text()
    assert cli.main(["table", *where]) == 0
    text = readme.read_text()
    assert "tiny: small, fp32" not in text
    assert "| tiny | " in text
    assert "**missed**" in text
    assert "<details>" not in text
    assert "[Every case, target and provider](results/README.md#ops-cpu)" in text
    whole = (tmp_path / "results" / "README.md").read_text()
    assert "tiny: small, fp32" in whole
    assert "## ops-cpu\n" in whole
    assert "wrong result, not timed" in whole
    assert tables.NOT_MEASURED in text
    assert text.startswith("# x\n")
    assert "text\n" in text
    assert cli.main(["table", "--check", *where]) == 0
    (tmp_path / "results" / "README.md").write_text("old")
    assert cli.main(["table", "--check", *where]) == 1
    assert cli.main(["table", *where]) == 0
    assert (tmp_path / "results" / "README.md").read_text() == whole
    slower = copy.deepcopy(result)
    slower["rows"][0]["ms_p50"] *= 3
    cli.write_json(tmp_path / "results" / "some-cpu.json", slower)
    assert cli.main(["table", "--check", *where]) == 1
    capsys.readouterr()


def test_each_op_is_shown_of_its_newest_run(tmp_path: Path):
    def run(date: str, ops_: dict[str, float], **updated: str) -> dict:
        meta = {"device": f"made on {date}", "device_type": "cpu", "threads": 1, "torch": "2", "copy_gbps": 10.0}
        meta |= {"matmul_tflops": 1.0, "commit": f"c{date}", "date": date, "quick": False}
        meta["updated"] = {op: {"commit": f"u{when}", "date": when, "copy_gbps": 20.0} for op, when in updated.items()}
        row = {"case": "c", "dtype": "fp32", "provider": "fastunlearn", "limit_ms": 1.0, "correct": True, "peak_mib": 0}
        rows = [row | {"op": op, "ms_p20": ms, "ms_p50": ms, "ms_p80": ms} for op, ms in ops_.items()]
        return {"meta": meta, "rows": rows, "targets": [], "left_out": []}

    results = {
        "a": run("2026-01-01", {"gram": 1.25, "nm": 2.25, "sid": 3.25}, sid="2026-01-05"),
        "b": run("2026-01-03", {"gram": 4.25, "sid": 5.25, "topk": 6.25, "mask": 7.25}),
    }
    for slug, result in results.items():
        cli.write_json(tmp_path / f"{slug}.json", result)
    text = tables.block("ops-cpu", tmp_path)
    first, second = text.split("made on 2026-01-01")
    assert "copy 10 GB/s, matmul 1 TFLOP/s, measured in the same run; commit c2026-01-03, 2026-01-03." in first
    assert [number in first for number in ("4.25", "6.25", "7.25", "5.25", "2.25")] == [True, True, True, False, False]
    assert "copy 10 to 20 GB/s" in second
    assert "commit c2026-01-01 and u2026-01-05, 2026-01-01 to 2026-01-05." in second
    assert [number in second for number in ("2.25", "3.25", "1.25")] == [True, True, False]
    alone = tables.heading(results["a"]["meta"], ["sid"])
    assert alone.endswith("copy 20 GB/s, matmul 1 TFLOP/s, measured in the same run; commit u2026-01-05, 2026-01-05.")
    assert tables.block("ops-cuda", tmp_path) == tables.NOT_MEASURED


def test_an_op_is_one_line_of_its_cases():
    def row(op: str, case: str, provider: str, ms: float | None) -> dict:
        return {"op": op, "case": case, "dtype": "fp32", "provider": provider, "ms_p50": ms, "limit_ms": 2.0}

    def target(op: str, met: bool) -> dict:
        return {"op": op, "case": "a", "provider": "fastunlearn", "met": met}

    rows = [
        row("gram", "a", "fastunlearn", 4.0), row("gram", "a", "eager", 8.0), row("gram", "a", "compile", 6.0),
        row("gram", "b", "fastunlearn", 2.5), row("gram", "b", "compile", 10.0), row("gram", "b", FLOOR + "copy", 1.0),
        row("nm", "a", "fastunlearn", None), row("nm", "a", "eager", 1.0),
        row("sid", "a", "fastunlearn", 2.0),
    ]  # fmt: skip
    result = {"meta": {}, "rows": rows, "targets": [target("gram", True), target("gram", False), target("nm", True)]}
    assert tables.ops_brief(result)[2:] == [
        "| gram | 2 | 50% to 80% | 1.5x to 4x | compile | 1 of 2 |",
        "| sid | 1 | 100% | - | - | - |",
    ]


def test_the_first_table_has_what_has_been_measured(tmp_path: Path):
    assert tables.block("glance", tmp_path) == tables.NOT_MEASURED
    quality = tmp_path / "quality"
    quality.mkdir()

    def put(name: str, rows: list[dict]) -> None:
        (quality / f"{name}.json").write_text(json.dumps({"rows": rows}))

    put("kills", [{"same": True}, {"same": False}, {"same": True}])
    scaling = {"what": "scaling", "provider": "fastunlearn", "concepts": 50, "moments_s": 0.5, "solve_s": 1.5}
    official = {"what": "official", "provider": "official", "concepts": 50, "solve_s": 2468.0}
    uce = scaling | {"provider": "UCE, last words", "solve_s": 3.0}
    put("scapre", [scaling, scaling | {"concepts": 1000, "solve_s": 9.0}, uce, official, official | {"concepts": 1000}])
    said = {"target": "6 of 60 people", "retain recall": "100%"}
    put(
        "demo",
        [
            said | {"method": "memorised", "forget recall": "100%", "seconds": 90.0},
            said | {"method": "SAU, NPO", "forget recall": "5%", "seconds": 80.0},
            said | {"method": "SAU, NPO", "forget recall": "0%", "seconds": 100.0},
        ],
    )

    def picture(method: str, kind: str, UA: float, **more: object) -> dict:
        return {"method": method, "kind": kind, "target": kind, "seed": 0, "UA": UA, "IRA": 100.0, "CRA": 100.0} | more

    rows = [
        picture(m, kind, ua)
        for m, ua in (("none", 0.0), ("spare", 100.0), ("uce", 70.0))
        for kind in ("style", "object")
    ]
    rows[-1]["recovered_relearning"] = 80.0
    rows += [picture("esd", "style", 100.0)]
    rows += [
        picture("rece", "style", 100.0),
        {"method": "rece", "kind": "object", "target": "object", "seed": 0, "failed": "diverged"},
    ]
    put("canvas", rows)
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in tables.block("glance", tmp_path).splitlines()[2:]
    ]
    assert [line[1:] for line in cells] == [
        ["exact recall of those 0% to 5%, of the others 100%, in 80.0 to 100.0 s", "before: 100% and 100%"],
        ["2 s", "UCE 3.0 s, the official row-by-row loop about 2,000 s (all scaled from a part)"],
        ["100.0 %", "uce 90.0 %, rece 50.0 %; relearning brings 80 % of it back, whatever the method"],
        ["2 of 3 end bit for bit as if nothing had happened", "-"],
    ]
    assert "2 targets, 1 seed" in cells[2][0]


def test_a_floor_is_never_the_best_peer():
    rows = [
        {"provider": p, "ms_p50": v} for p, v in [(FLOOR + "read", 1.0), ("fastunlearn-triton", 2.0), ("peer", 3.0)]
    ]
    assert tables.best_peer(rows)["provider"] == "peer"  # type: ignore[index]


def test_markers_are_checked(tmp_path: Path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmarks:begin ops-cpu -->\n")
    with pytest.raises(ValueError, match="without its"):
        tables.update(readme, tmp_path)
    readme.write_text("<!-- benchmarks:begin nonsense -->\n<!-- benchmarks:end -->\n")
    with pytest.raises(ValueError, match="nonsense"):
        tables.update(readme, tmp_path)


def test_quality_tables(tmp_path: Path):
    (tmp_path / "quality").mkdir()
    rows = [{"method": "none", "seed": 0, "recall": 1.0}, {"method": "npo", "seed": 0, "recall": 0.0312, "steps": 31}]
    (tmp_path / "quality" / "demo.json").write_text(json.dumps({"rows": rows, "meta": {"model": "SmolLM2"}}))
    text = tables.block("demo", tmp_path)
    assert "| npo | 0 | 0.0312 | 31 |" in text
    assert "model: SmolLM2" in text
    assert tables.block("quality-other", tmp_path) == tables.NOT_MEASURED


@pytest.mark.serial
def test_plots(tmp_path: Path, result: dict):
    pytest.importorskip("matplotlib")
    publish(tmp_path, result)
    paths = plots.draw(tmp_path / "results", tmp_path / "plots")
    assert [path.name for path in paths] == ["some-cpu-tiny.svg", "some-cpu-roofline.svg", "some-cpu-memory.svg"]
    assert all(path.read_text().lstrip().startswith("<?xml") for path in paths)


def test_rows_of_the_demo_study():
    from benchmarks import demo

    stage = {"forget": 0.0, "retain": 0.99, "paraphrased": 0.03, "perplexity": 181.234}
    result = {
        "settings": {"forget": 6, "people": 60},
        "seconds": dict(zip("abcdefg", range(1, 8))),
        "stages": dict.fromkeys(demo.METHODS, stage),
    }
    rows = demo.rows_of(3, result)
    assert [row["seconds"] for row in rows] == [2, 4, 6]
    assert {(row["target"], row["seed"], row["forget recall"], row["retain recall"]) for row in rows} == {
        ("6 of 60 people", 3, "0%", "99%")
    }
    assert {(row["in other words"], row["perplexity"]) for row in rows} == {("3%", 181.2)}


def test_some_ops_measured_again():
    meta = {"device": "CPU", "torch": "2", "triton": "", "threads": 2, "commit": "a", "date": "d1", "copy_gbps": 40.0}

    def row(op, ms):
        return {"op": op, "case": "c", "ms_p50": ms}

    old = {
        "meta": meta,
        "rows": [row("adamw", 1), row("nm", 2)],
        "targets": [row("nm", 2)],
        "left_out": ["nm, c: no time"],
    }
    new = {"meta": {**meta, "commit": "b", "date": "d2", "copy_gbps": 44.0}, "rows": [row("nm", 1), row("redistribute", 3)],
           "targets": [row("nm", 1)], "left_out": []}  # fmt: skip
    both = cli.merged(old, new)
    assert both["rows"] == [row("adamw", 1), row("nm", 1), row("redistribute", 3)]
    assert (both["targets"], both["left_out"]) == ([row("nm", 1)], [])
    assert both["meta"]["commit"] == "a"
    assert both["meta"]["updated"] == {
        key: {"commit": "b", "date": "d2", "copy_gbps": 44.0} for key in ["nm", "redistribute"]
    }
    with pytest.raises(ValueError, match="--update: torch was 2, is 3 now"):
        cli.merged(old, {**new, "meta": {**new["meta"], "torch": "3"}})
    with pytest.raises(ValueError, match="--update: replaces whole ops"):
        cli.run(
            cli.argparse.Namespace(
                update=True, ops=None, quick=False, cases=None, device="cpu", seconds=None, total=None
            )
        )


def test_the_pruning_study_names_the_data_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    pytest.importorskip("transformers")

    for folder in (None, tmp_path):
        if folder is None:
            monkeypatch.delenv("FASTUNLEARN_DATA", raising=False)
        else:
            monkeypatch.setenv("FASTUNLEARN_DATA", str(folder))
        with pytest.raises(SystemExit) as ended:
            cli.main(["quality", "prune"])
        assert ended.value.code == 2
        assert "FASTUNLEARN_DATA: set it to a folder that holds wikitext2/valid.txt" in capsys.readouterr().err
