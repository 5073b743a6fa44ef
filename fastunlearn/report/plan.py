"""Memory and time of a run before anything is loaded: from a configuration, by a step on tensors without memory.

Weights, gradients, optimiser states and masks are counted parameter by parameter. Activations are those of the model's own code: two
short stacks of its layers run forward and backward on fake tensors (fastunlearn/report/trace.py), and what a layer adds is
multiplied by the number of layers; so are the seconds of a roofline. ASSUMPTIONS says what is taken for granted; `Plan.text` prints it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn.localize.prune import find_blocks
from fastunlearn.objectives.states import head_of
from fastunlearn.ops import linear_nll
from fastunlearn.ops._linear_loss import BUDGET
from fastunlearn.ops.mask import BitMask
from fastunlearn.parametrize import CompressedNM, full_weights
from fastunlearn.parametrize.compressed_nm import compressed_layers
from fastunlearn.report.configurations import configuration, shortened
from fastunlearn.report.cost import clock
from fastunlearn.report.trace import Rates, Recorder, loss_operands
from fastunlearn.updates import make_update

GIB = 2**30
METHODS = ("sau", "hamu", "sau+hamu", "unlearn", "open-unlearning")
ASSUMPTIONS = (
    "weights are bfloat16 unless `dtype` says otherwise; a run holds them in float32 unless it is told dtype=bfloat16",
    "every row has `sequence` tokens, of which `answer_share` are answer tokens",
    "an operation takes the longest of its products by the measured rate, its bytes by the copy bandwidth, one launch; of this "
    "machine (here) what it took when it was run by itself",
    "sharded runs: weights, gradients, states and masks are cut evenly along rows; two blocks are gathered at a time and one "
    "block's gradient is reduced, in fp32; embeddings and head stay gathered",
    "before it is cut every process has read the whole model into its host's memory, which is not in it",
    "traffic between GPUs goes at 80 % of the link (nodes of 8 with a network port for each GPU) and hides behind the neighbouring "
    "block's products where it is shorter",
    "hamu's checks of its certificates (certificate_every) are in the memory, not in the time",
    "the allocator's rounding, the CUDA context (0.5 GiB or so) and the process itself are not in it",
)


@dataclass(frozen=True)
class Hardware:
    """Attributes: flops: by bytes of an entry, of matrix products, 1/s. copy: bytes/s, read and written. memory: bytes.

    link: bytes/s a GPU sends inside its node of 8; network: between nodes, a GPU. source: where the numbers come from.
    timed: operations are run on this device and timed, one of a kind; None: they take what the rates say.
    """

    flops: dict[int, float]
    copy: float
    launch: float
    memory: float
    link: float
    network: float
    source: str
    timed: torch.device | None = None


_SHARES = "data sheet times the shares of it that the H200 reached (79 % of products, 88 % of bandwidth)"
HARDWARE = {
    "h200": Hardware(
        {2: 782e12, 4: 391e12}, 4228e9, 14e-6, 141e9, 450e9, 50e9,
        "products (bf16; fp32 as TF32 half of it) and copy as in benchmarks/results/nvidia-h200.json; links of the data sheet",
    ),
    "h100": Hardware({2: 782e12, 4: 391e12}, 2950e9, 14e-6, 80e9, 450e9, 50e9, _SHARES),
    "a100": Hardware({2: 246e12, 4: 123e12}, 1790e9, 14e-6, 80e9, 300e9, 25e9, _SHARES),
}  # fmt: skip


@dataclass
class PlanArguments:
    """What is planned."""

    model_name_or_path: str = field(
        metadata={
            "help": "smollm2-135m, llama-3.2-1b, llama-3.1-8b, llama-3.1-70b, a folder with a config.json, or a hub name."
        }
    )
    method: str = field(
        default="sau",
        metadata={
            "help": "sau, hamu, sau+hamu, unlearn, or open-unlearning (dense AdamW, a second model as reference, whole logits)."
        },
    )
    gpus: int = field(default=1, metadata={"help": "Processes with a GPU each; above 1 the model is sharded (FSDP2)."})
    hardware: str = field(default="h200", metadata={"help": "h200, h100, a100, or here: this machine, measured."})
    pattern: str | None = field(default=None, metadata={"help": "n:m of a pruned model (sau: 2:4), or dense."})
    compressed: bool = field(default=False, metadata={"help": "Hold survivors only."})
    dtype: str = field(default="bfloat16", metadata={"help": "Of the weights: bfloat16, float32."})
    optim: str = field(default="adamw_torch", metadata={"help": "adamw_torch or sgd (hamu: its own step)."})
    master_weights: bool = field(default=False, metadata={"help": "fp32 copies of 16-bit weights that move."})
    train_unpruned: bool = field(default=False, metadata={"help": "Of a pruned model what was not pruned moves too."})
    redistribution: str = field(default="none", metadata={"help": "update: a factor for every survivor."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Forget rows of a forward pass."})
    retain_per_forget: int = field(default=1, metadata={"help": "Retain rows for each forget row."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes of one step."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Blocks are computed again in backward."})
    sequence: int = field(default=512, metadata={"help": "Tokens of a row."})
    answer_share: float = field(default=1.0, metadata={"help": "Share of them that are answer tokens."})

    def __post_init__(self) -> None:
        from fastunlearn.objectives.language import closest

        for name, known in (("method", METHODS), ("hardware", (*HARDWARE, "here")), ("dtype", ("bfloat16", "float32")),
                            ("optim", ("adamw_torch", "sgd")), ("redistribution", ("none", "update"))):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r} is unknown; {closest(str(getattr(self, name)), list(known))}"
                )
        if self.pattern is None:
            self.pattern = "2:4" if self.method.startswith("sau") else "dense"
        if self.pattern != "dense":
            n, colon, m = self.pattern.partition(":")
            if not (colon and n.isdigit() and m.isdigit() and 0 < int(n) <= int(m) <= 64):
                raise ValueError(f"pattern: want n:m with 0 < n <= m <= 64, or dense, got {self.pattern!r}")
        if self.compressed and self.pattern == "dense":
            raise ValueError("compressed: of a dense model there is nothing to compress; give pattern=2:4")
        for name in (
            "gpus",
            "per_device_train_batch_size",
            "retain_per_forget",
            "gradient_accumulation_steps",
            "sequence",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: want at least 1, got {getattr(self, name)}")
        if not 0 < self.answer_share <= 1:
            raise ValueError(f"answer_share: want a number in (0, 1], got {self.answer_share}")

    @property
    def hamu(self) -> bool:
        return "hamu" in self.method

    @property
    def nm(self) -> tuple[int, int] | None:
        n, colon, m = str(self.pattern).partition(":")
        return (int(n), int(m)) if colon else None


@dataclass
class Plan:
    """What a process (one GPU) holds, in bytes, and how long a step takes, in seconds.

    Attributes:
        bytes: weights, reference, gradients, states, masks, gathered (what FSDP puts together for a moment), activations (with what
            operations have for themselves, at the moment of the peak). peak: their sum at that moment (gradients not yet there do
            not count). parameters, moving: of the whole model. seconds: forget, retain, reference, optimizer, traffic (what is not
            hidden). memory: of the hardware, None: not known. unpruned: entries of the blocks' matrices that a pattern does not reach.
    """

    arguments: PlanArguments
    bytes: dict[str, float]
    peak: float
    parameters: int
    moving: int
    seconds: dict[str, float]
    traffic: float
    hardware: Hardware
    unpruned: int = 0

    @property
    def step(self) -> float:
        """Seconds of an optimiser step."""
        return sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float:
        """Of all processes together, forget and retain tokens."""
        a = self.arguments
        rows = a.per_device_train_batch_size * (1 + a.retain_per_forget) * a.gradient_accumulation_steps * a.gpus
        return rows * a.sequence / self.step

    @property
    def fits(self) -> bool:
        return self.peak <= self.hardware.memory

    @property
    def smaller(self) -> list[str]:
        """What would lower the peak, of what is asked for; that of the larger part first."""
        a = self.arguments
        passes = [] if a.gradient_checkpointing else ["gradient_checkpointing=true"]
        if a.per_device_train_batch_size > 1:
            passes.append(f"a per_device_train_batch_size below {a.per_device_train_batch_size}")
        state = [] if a.compressed or a.nm is None else ["--compressed"]
        state.append(f"more --gpus than {a.gpus}")
        return passes + state if 2 * self.bytes["activations"] > self.peak else state + passes

    def to_dict(self) -> dict[str, Any]:
        return {
            "arguments": asdict(self.arguments), "parameters": self.parameters, "moving": self.moving, "unpruned": self.unpruned,
            "bytes": {k: round(v) for k, v in self.bytes.items()}, "peak_bytes": round(self.peak), "fits": self.fits,
            "seconds": self.seconds, "step_seconds": self.step, "traffic_bytes": round(self.traffic),
            "tokens_per_second": self.tokens_per_second, "hardware": self.hardware.source, "assumptions": list(ASSUMPTIONS),
        }  # fmt: skip

    def text(self) -> str:
        """For a terminal."""
        a = self.arguments
        form = f"{a.pattern}{' compressed' if a.compressed else ''}"
        lines = [
            f"{a.model_name_or_path}: {self.parameters:,} weights, {self.moving:,} move; {a.method}, {form}, {a.dtype}, "
            f"{a.per_device_train_batch_size} + {a.per_device_train_batch_size * a.retain_per_forget} rows of {a.sequence} tokens, "
            f"{a.gpus} x {a.hardware}",
            *(
                [
                    f"{self.unpruned:,} weights of the blocks are not pruned: in no torch.nn.Linear (fused experts), or in columns that m does not "
                    "divide"
                ]
                if self.unpruned
                else []
            ),
            "",
            f"{'a process holds':<28}{'GiB':>10}",
            *(f"  {name:<26}{size / GIB:>10.3f}" for name, size in self.bytes.items() if size),
            f"  {'peak':<26}{self.peak / GIB:>10.3f}   {'fits' if self.fits else 'DOES NOT FIT'} {self.hardware.memory / GIB:.0f} GiB",
            *([] if self.fits else [f"  less memory: {', '.join(self.smaller)}"]),
            "",
            f"{'a step takes':<28}{'ms':>10}",
            *(f"  {name:<26}{1e3 * s:>10.2f}" for name, s in self.seconds.items() if s),
            f"  {'together':<26}{1e3 * self.step:>10.2f}   {self.tokens_per_second:,.0f} tokens/s",
            "",
            f"rates: {self.hardware.source}",
            "assumed:",
            *(f"  - {text}" for text in ASSUMPTIONS),
        ]
        return "\n".join(lines)


# ---- the model without memory ----------------------------------------------------------------------------------------------


def _build(a: PlanArguments, config: Any) -> nn.Module:
    """The model on meta as the run has it: compressed, frozen where it is."""
    import transformers

    config = copy.deepcopy(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, a.dtype))
    if a.nm is None:
        return model
    masks = _masks(model, a.nm[1])
    if not masks:
        raise ValueError(
            f"pattern: {a.pattern} is for torch.nn.Linear layers inside the blocks, and m must divide their columns; {type(model).__name__} "
            "has none such; give pattern=dense"
        )
    full_weights(model, masks, others=a.train_unpruned)
    if a.compressed:
        CompressedNM(model, masks, *a.nm)
    return model


def _masks(model: Any, m: int) -> dict[str, BitMask]:
    """What `fastunlearn prune` would prune: linear layers inside the blocks."""
    inside = {module for block in find_blocks(model) for module in block.modules() if isinstance(module, nn.Linear)}
    out = {}
    for name, module in model.named_modules():
        if module in inside and module.weight.shape[1] % m == 0:
            shape = module.weight.shape
            bits = torch.empty(shape[0], ceil(shape[1] / 8), dtype=torch.uint8, device="meta")
            out[f"{name}.weight"] = BitMask._of(bits, shape)
    return out


@dataclass
class _Fixed:
    """Bytes of the whole model."""

    weights: float = 0.0
    gradients: float = 0.0
    states: float = 0.0
    masks: float = 0.0
    parameters: int = 0
    moving: int = 0
    #: entries of the blocks' matrices that a pattern does not reach
    unpruned: int = 0
    #: of the largest block: gathered weights, gradients; and of what lies outside of blocks
    block: float = 0.0
    block_gradients: float = 0.0
    ends: float = 0.0


def _fixed(a: PlanArguments, model: nn.Module) -> _Fixed:
    out = _Fixed()
    layers, nm = compressed_layers(model), a.nm
    masked = {} if nm is None or a.compressed else _masks(model, nm[1])
    inside = {p for block in find_blocks(model) for p in block.parameters() if p.dim() > 1} if nm else set()
    blocks: dict[str, list[float]] = {}
    adam = a.optim.startswith("adamw") and not a.hamu
    for name, p in model.named_parameters():
        bits = name.endswith(".bits") and name.removesuffix("bits") + "weight" in layers
        size = p.numel() * p.element_size()
        out.weights += size
        if not bits:
            out.parameters += layers[name].shape.numel() if name in layers else p.numel()
            out.unpruned += p.numel() if p in inside and name not in masked and name not in layers else 0
        moving = p.numel() if p.requires_grad else 0
        if name in masked and nm is not None:
            # The mask, and the optimiser's own bits with a count for every 1,024 entries.
            out.masks += 2 * p.numel() / 8 + p.numel() / 128
            moving = moving * nm[0] // nm[1]
        out.moving += moving
        gradient = size if p.requires_grad else 0
        out.gradients += gradient
        each = 8 * adam + 4 * (a.master_weights and p.element_size() < 4 and not a.hamu)
        each += 4 * (a.redistribution == "update" and (name in layers or name in masked))
        if a.method == "open-unlearning":
            each = 8 * adam
        out.states += moving * each
        number = next((part for part in name.split(".") if part.isdigit()), None)
        if number is None:
            out.ends += size
        else:
            held = blocks.setdefault(number, [0.0, 0.0])
            held[0] += size
            held[1] += gradient
    out.block = max((held[0] for held in blocks.values()), default=0.0)
    out.block_gradients = max((held[1] for held in blocks.values()), default=0.0)
    return out


@dataclass
class _Step:
    """Of one stack of layers: bytes above what is there between steps, and seconds."""

    #: for each moment (end of forward, loss, backward, ...) bytes beside the gradients, and gradients that are there
    moments: list[tuple[float, float]]
    seconds: dict[str, float]


def _loss(a: PlanArguments, model: Any, rows: int) -> Tensor:
    ids = torch.zeros(rows, a.sequence, dtype=torch.int64)
    if a.method == "open-unlearning":
        # As open-unlearning has it: every position's logits, a loss for each row.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].transpose(1, 2).float()
        return nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").sum(-1).mean()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1)
    count = ceil(a.answer_share * len(hidden))
    if count < len(hidden):
        hidden = hidden.index_select(0, torch.zeros(count, dtype=torch.int64))
    head: Any = head_of(model)
    labels = torch.zeros(count, dtype=torch.int64)
    return linear_nll(hidden, head.weight, labels, bias=head.bias, reduction="token")[0].sum()


def _simulate(a: PlanArguments, config: Any, layers: int, rates: Rates, budget: int) -> _Step:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model: Any = _build(a, shortened(config, layers))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        model.train()
        if a.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        params = [p for p in model.parameters() if p.requires_grad]
        dense = max((w.shape.numel() * w.weight.element_size() for w in compressed_layers(model).values()), default=0)

        def workspace(name: str, inputs: Sequence[Any]) -> int:
            if not name.startswith("fastunlearn.linear_loss"):
                return 0
            two = loss_operands(name, inputs)
            return min(budget, two[0].shape[0] * two[1].shape[0] * two[0].element_size()) if two else 0

        recorder = Recorder(rates, [*model.parameters(), *model.buffers()], workspace)
        kept = [0.0]

        def taken(p: Tensor) -> None:
            assert p.grad is not None
            kept[0] += recorder.forget(p.grad)

        for p in params:
            p.register_post_accumulate_grad_hook(taken)
        update = make_update("hamu-q" if a.hamu else "sum")
        moments: list[tuple[float, float]] = []
        seconds: dict[str, float] = {}
        rows = a.per_device_train_batch_size
        with recorder:
            for number, (name, count) in enumerate((("forget", rows), ("retain", rows * a.retain_per_forget))):
                start = recorder.seconds
                recorder.start_phase()
                if a.method == "open-unlearning" and number == 0:
                    with torch.no_grad():
                        _loss(a, model, count)
                    seconds["reference"], start = recorder.seconds, recorder.seconds
                with update.term(params, number):
                    loss = _loss(a, model, count)
                    moments.append((recorder.peak + dense, kept[0]))
                    recorder.start_phase()
                    # While gradients come in, activations go: at both ends, and at the peak in between with all of them.
                    loss.backward()
                    moments.append((recorder.peak + dense, kept[0]))
                    del loss
                seconds[name] = recorder.seconds - start
    return _Step(moments, seconds)


def _extrapolated(steps: Sequence[_Step], counts: Sequence[int], layers: int) -> _Step:
    if len(steps) == 1:
        return steps[0]

    def at(x: float, y: float) -> float:
        return x + (y - x) / (counts[1] - counts[0]) * (layers - counts[0])

    one, two = steps
    moments = [(at(a[0], b[0]), at(a[1], b[1])) for a, b in zip(one.moments, two.moments)]
    return _Step(moments, {name: at(one.seconds[name], two.seconds[name]) for name in one.seconds})


# ---- the plan --------------------------------------------------------------------------------------------------------------


def measured_hardware() -> Hardware:
    """Of this machine: its GPU, or its CPU with the threads that torch uses; takes a second or two."""
    import os

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    def seconds(call: Any, times: int) -> float:
        best, now = float("inf"), clock(device)
        for _ in range(times):
            if cuda:
                torch.cuda.synchronize()
            start = now()
            call()
            if cuda:
                torch.cuda.synchronize()
            best = min(best, now() - start)
        return best

    side = 8192 if cuda else 768
    flops = {}
    for size, dtype in ((4, torch.float32), (2, torch.bfloat16)):
        x = torch.ones(side, side, dtype=dtype, device=device)
        flops[size] = 2 * side**3 / seconds(lambda x=x: x @ x, 4)
    x = torch.ones((256 if cuda else 32) * 2**20, device=device)
    y = torch.empty_like(x)
    copy_rate = 2 * x.nbytes / seconds(lambda: y.copy_(x), 4)
    small = torch.ones(8, device=device)
    launch = seconds(lambda: [small.add(1) for _ in range(200)], 4) / 200
    if cuda:
        memory, name = float(torch.cuda.mem_get_info()[1]), torch.cuda.get_device_name()
    else:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        name = f"this CPU, {torch.get_num_threads()} threads"
    return Hardware(flops, copy_rate, launch, memory, 450e9, 50e9, f"{name}, measured just now", device)


def plan(arguments: PlanArguments, hardware: Hardware | None = None) -> Plan:
    """What a run holds and how long a step takes; loads nothing.

    Raises:
        ValueError: a model whose configuration cannot be read.
    """
    a = arguments
    config = configuration(a.model_name_or_path)
    if hardware is None:
        hardware = measured_hardware() if a.hardware == "here" else HARDWARE[a.hardware]
    layers, gpus = int(config.get_text_config().num_hidden_layers), a.gpus
    fixed = _fixed(a, _build(a, config))
    budget = BUDGET["cpu" if "CPU" in hardware.source else "cuda"]
    rates = Rates(hardware.flops, hardware.copy, hardware.launch, hardware.timed)
    counts = [layers] if layers <= 4 else [2, 4]
    step = _extrapolated([_simulate(a, config, count, rates, budget) for count in counts], counts, layers)

    kept_lists = 2 if a.hamu else 1
    # Processes sum gradients up in fp32.
    reduced = 4 / (2 if a.dtype == "bfloat16" else 4)
    held = {
        "weights": fixed.weights / gpus,
        "reference": fixed.weights / gpus if a.method == "open-unlearning" else 0.0,
        "gradients": kept_lists * fixed.gradients / gpus,
        "states": fixed.states / gpus,
        "masks": fixed.masks / gpus,
        "gathered": 0.0 if gpus == 1 else 2 * fixed.block + (1 + reduced) * fixed.block_gradients + fixed.ends,
    }
    there = held["weights"] + held["reference"] + held["states"] + held["masks"] + held["gathered"]
    highest = max(step.moments, key=lambda moment: moment[0] + moment[1] / gpus)
    # Certificates are checked in fp32, by copies of 16-bit weights beside both gradients.
    copies = 2 * fixed.weights if a.hamu and gpus == 1 and a.dtype == "bfloat16" else 0.0
    peak = there + max(highest[0] + highest[1] / gpus, held["gradients"] + copies)
    held["activations"] = highest[0]

    moved = fixed.moving * 1.0
    itemsize = 2 if a.dtype == "bfloat16" else 4
    masked = 0.0 if a.nm is None or a.compressed else fixed.masks
    if a.hamu:
        # Inner products read both gradients, the step reads them again and writes the weights.
        traffic_bytes = 4 * fixed.gradients + 2 * moved * itemsize + masked
    else:
        # Norm, then weights, gradient and states; of a dense tensor whole lines are read.
        dense = fixed.gradients if masked else moved * itemsize
        traffic_bytes = 2 * dense + 2 * dense + 2 * fixed.states + masked
    micro = a.gradient_accumulation_steps
    seconds = {name: micro * s for name, s in step.seconds.items()}
    seconds["optimizer"] = traffic_bytes / gpus / hardware.copy
    traffic = hidden = 0.0
    if gpus > 1:
        passes = 2 * micro
        share = (gpus - 1) / gpus
        # Gathered in forward and in backward, gradients reduced; once more where a reference runs.
        gathers = 2 * passes + (micro if a.method == "open-unlearning" else 0)
        traffic = share * (gathers * fixed.weights + passes * reduced * fixed.gradients)
        # What a node of 8 receives comes through its 8 network ports and is handed on inside.
        rate = 0.8 * (hardware.link if gpus <= 8 else min(hardware.link, 8 * hardware.network))
        computing = sum(seconds[name] for name in step.seconds)
        # The first block of every pass waits for its weights, and what takes longer than the products shows.
        exposed = passes * fixed.block * share / rate
        hidden = max(0.0, traffic / rate - computing) + exposed
        seconds["traffic"] = hidden
    return Plan(a, held, peak, fixed.parameters, fixed.moving, seconds, traffic, hardware, fixed.unpruned)
