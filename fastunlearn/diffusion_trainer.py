"""DiffusionTrainer: machine unlearning of text-to-image models, on the two-term step of `fastunlearn.two_terms`.

Forget and retain sets are prompts with images (`fastunlearn.data.concept_images`), of which latents and text features are computed
once. A step draws noise and timesteps from a counter (seed, step, term), so that a resumed run sees what the run without the
interruption would have seen, and asks the student (the network as it trains) and the teacher (the same network with the adapter off, or
a frozen copy where the weights themselves train). The terms are self-distillation's (`fastunlearn.objectives.diffusion`); methods
override them, or say what trains: `localise`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerCallback

from fastunlearn._modes import checkpoint_blocks, evaluating
from fastunlearn._stored import read_tensors
from fastunlearn.arguments import TwoTermConfig
from fastunlearn.data.concept_images import ConceptImages, Encoded, IndexCollator
from fastunlearn.data.pairs import PairedSet
from fastunlearn.families import Family, family_of
from fastunlearn.localize.unet import unet_parameters
from fastunlearn.objectives.cached_logprobs import adapter_off
from fastunlearn.objectives.diffusion import (
    Denoiser,
    TimestepSampler,
    importance_timesteps,
    interval_timesteps,
    self_distillation_loss,
    uniform_timesteps,
)
from fastunlearn.objectives.language import closest
from fastunlearn.parametrize import lora, name_matcher
from fastunlearn.parametrize.partial_unet import save_partial_unet
from fastunlearn.sharded import check_processes
from fastunlearn.two_terms import TwoTermTrainer

#: in a checkpoint: what trains, and what the timesteps of the forget term are drawn by
TRAINED, DIVERGENCE = "trained.safetensors", "divergence.safetensors"
#: what `save_model` writes for an adapter; weights that moved are in unet.safetensors or transformer.safetensors
ADAPTER = "adapter"
TIMESTEPS = ("uniform", "interval", "importance")


@dataclass
class DiffusionConfig(TwoTermConfig):
    """Arguments of `DiffusionTrainer`: transformers' TrainingArguments, the forget and the retain term, where images come from.

    An epoch is one pass over the forget images; max_steps says it in steps. seed is also that of the images that are drawn.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    num_train_epochs: float = field(default=10.0, metadata={"help": "Passes over the forget images."})
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Forget images of one forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes of one step."})
    warmup_epochs: float = field(default=0.0, metadata={"help": "Epochs of linear warm-up."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "constant, cosine, linear, ..."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    save_strategy: str = field(default="no", metadata={"help": "When to save a checkpoint: no, steps, epoch."})
    report_to: Any = field(default="none", metadata={"help": "Where logs go: none, tensorboard, wandb, ..."})
    dataloader_pin_memory: bool = field(
        default=False, metadata={"help": "Of no use here: batches are gathered where they are."}
    )

    train_method: str | None = field(
        default=None,
        metadata={
            "help": "Weights that train: full, xattn, noxattn, selfattn, xattn_kv (ESD's names); none: an adapter."
        },
    )
    forget_alpha: float = field(default=0.3, metadata={"help": "Factor of the forget term."})
    retain_alpha: float = field(
        default=1.0, metadata={"help": "Factor of the retain term; 0: no retain set is needed."}
    )
    timesteps: str = field(
        default="uniform",
        metadata={
            "help": "Of the forget term: uniform, interval (timestep_interval) or importance (where concept and surrogate differ; a "
            "reconstruction)."
        },
    )
    timestep_interval: list[float] | None = field(
        default=None, metadata={"help": "Of timesteps=interval: low and high, 0 (no noise) to 1 (all noise)."}
    )
    timestep_beta: float = field(default=1.0, metadata={"help": "Of timesteps=importance: p ~ divergence^beta."})
    timestep_bins: int = field(default=20, metadata={"help": "Of timesteps=importance."})
    num_forget_images: int = field(default=64, metadata={"help": "Images of the concept that the model draws itself."})
    num_retain_images: int = field(default=128, metadata={"help": "Images of what must stay, likewise."})
    sampling_steps: int = field(default=30, metadata={"help": "Steps of an image that is drawn to learn from."})
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "help": "Guidance of an image that is drawn to learn from; default: 7.5, of SDXL 5, of SD3 7, of FLUX 3.5."
        },
    )
    sampling_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images that are drawn at once; guidance doubles it. Default: 4 above 256 pixels, else 100 (8 where diffusers' pipeline draws)."
        },
    )
    resolution: int | None = field(default=None, metadata={"help": "Pixels of a side; the pipeline's own by default."})
    cache_dir: str | None = field(default=None, metadata={"help": "Latents are kept in this folder and found again."})

    def __post_init__(self) -> None:
        if self.timesteps not in TIMESTEPS:
            raise ValueError(f"timesteps: {self.timesteps!r} is unknown; {closest(self.timesteps, list(TIMESTEPS))}")
        interval = self.timestep_interval
        if (self.timesteps == "interval") != (interval is not None):
            raise ValueError("timestep_interval: goes with timesteps=interval, and must be there then")
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1):
            raise ValueError(f"timestep_interval: want low and high in [0, 1], got {interval}")
        for name in ("timestep_bins", "num_forget_images", "num_retain_images", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: want at least 1, got {getattr(self, name)}")
        if self.sampling_batch_size is not None and self.sampling_batch_size < 1:
            raise ValueError(f"sampling_batch_size: want at least 1, got {self.sampling_batch_size}")
        for name in ("forget_alpha", "retain_alpha", "timestep_beta"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: want a finite number >= 0, got {getattr(self, name)}")
        if self.retain_groups is not None:
            raise ValueError("retain_groups: is for rows of text; a retain set of images is one group")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel: has kernels for language models alone")
        super().__post_init__()

    def missing_retain_term(self) -> str | None:
        return None if self.retain_alpha else "retain_alpha is 0"

    def fill_steps(self, steps: int) -> None:
        """max_steps and num_train_epochs where they are None: that many steps, unless one of the two was given."""
        if self.max_steps is None:
            self.max_steps = steps if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = DiffusionConfig.num_train_epochs

    def unread_images(self) -> str | None:
        """None where images of the concept are learned from; else why given ones would not be, and what to do, for an error."""
        return None


class DiffusionTrainer(TwoTermTrainer):
    """Makes a text-to-image model forget. After `train`, `merge` gives the pipeline what was learned.

    Args:
        model: a pipeline of diffusers (SD 1.x, 2.x, SDXL, SD3, FLUX), whose unet or transformer is changed.
        args: a `DiffusionConfig`.
        forget_dataset, retain_dataset: `ConceptImages`, or rows {"text", "surrogate", "image"} for it (retain rows without surrogate;
            rows without images: the model draws its own).
        processing_class, quantization_config: not used; they stand where TRL has them.
        peft_config: a PEFT configuration: only the adapter trains.
        callbacks, optimizers: as in Trainer.

    Raises:
        ValueError: a pipeline without its parts, empty sets, a prompt that is in both, images or a retain set that nothing would read, a
            network in float16.
    """

    args: DiffusionConfig
    #: whether the forget set names what each prompt becomes
    needs_surrogates = True
    #: whether a term asks the network as it was
    needs_frozen = True

    def __init__(
        self,
        model: Any,
        args: DiffusionConfig,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        if not isinstance(args, DiffusionConfig):
            raise TypeError(f"args: want a DiffusionConfig, got {type(args).__name__}")
        if quantization_config is not None:
            raise ValueError("quantization_config: is for a model given by name; this pipeline is loaded already")
        check_processes(args)
        self.family: Family = family_of(model, args.resolution)
        self.pipeline = model
        if self.family.device != args.device:
            model.to(args.device)
        network = self.family.network
        # Found before any image is drawn.
        if peft_config is not None:
            _check_adapter(peft_config, args)
        self.check_targets(network, args)
        self._required = {name: p.requires_grad for name, p in network.named_parameters()}
        required = [(p, p.requires_grad) for p in network.parameters()]
        self._digest = _identity(self.family)
        forget, retain = self._sources(forget_dataset, retain_dataset, args)
        with evaluating(network):
            self.sets = self._encode(forget, retain, args)
        self._choose_weights(network, args)
        self._frozen: nn.Module | None = None
        self._adapted: list[nn.Module] = []
        self._timesteps: TimestepSampler = uniform_timesteps(self.family.schedule)
        self.divergence: Tensor | None = None
        self._drawn = (-1, 0)
        #: of the factors and masks, once an adapter is on; 0: none
        self.adapter_bytes = 0
        checkpoint_blocks(args, network)
        pair = PairedSet(self.sets["forget"], self.sets.get("retain"))
        try:
            super().__init__(network, args, pair, IndexCollator(), callbacks=callbacks, optimizers=optimizers)
            if peft_config is not None:
                self.adapt(peft_config)
        except BaseException:
            for parameter, flag in required:
                parameter.requires_grad_(flag)
            raise

    # ---- data -------------------------------------------------------------------------------------------------------

    def _sources(self, forget: Any, retain: Any, args: DiffusionConfig) -> tuple[ConceptImages, ConceptImages | None]:
        if forget is None:
            raise ValueError("forget_dataset: want what must be forgotten, got None")
        if retain is None and args.retain_alpha:
            raise ValueError("retain_dataset: a retain term needs one; retain_alpha=0 keeps nothing on purpose")
        if not isinstance(forget, ConceptImages):
            forget = ConceptImages.of_rows(forget, surrogate=self.needs_surrogates)
        unread = args.unread_images()
        if forget.images is not None and unread is not None:
            raise ValueError(f"forget_dataset: its images would not be looked at: {unread}")
        if self.needs_surrogates and forget.surrogates is None:
            raise ValueError("forget_dataset: every prompt needs a surrogate, what is drawn instead")
        if retain is not None and not args.retain_alpha:
            raise ValueError(
                "retain_dataset: with retain_alpha=0 it would not be used; want retain_alpha above 0, or no retain set"
            )
        if retain is not None and not isinstance(retain, ConceptImages):
            retain = ConceptImages.of_rows(retain)
        if retain is not None:
            both = set(forget.prompts) & set(retain.prompts)
            if both:
                raise ValueError(
                    f"retain_dataset: {sorted(both)[0]!r} is to be forgotten, too; take it out of one of the two"
                )
        return forget, retain

    def _encode(self, forget: ConceptImages, retain: ConceptImages | None, args: DiffusionConfig) -> dict[str, Encoded]:
        return self._encode_each({"forget": forget} | ({} if retain is None else {"retain": retain}), args)

    def _encode_each(self, given: Mapping[str, ConceptImages], args: DiffusionConfig) -> dict[str, Encoded]:
        """By the name of the set; each draws as many images as the settings say of it."""
        low = torch.bfloat16 if args.bf16 else None
        guidance = self.family.guidance_scale if args.guidance_scale is None else args.guidance_scale
        draw = {
            "seed": args.seed, "steps": args.sampling_steps, "guidance_scale": guidance, "autocast": low,
            "progress": not args.disable_tqdm, "batch_size": args.sampling_batch_size,
        }  # fmt: skip
        counts = {"forget": args.num_forget_images, "retain": args.num_retain_images}
        return {
            name: images.encode(self.family, counts[name], cache_dir=args.cache_dir, base=self._digest, **draw)
            for name, images in given.items()
        }

    def data_digests(self) -> dict[str, str]:
        return {"base": self._digest, **{name: part.digest for name, part in self.sets.items()}}

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0

    # ---- what trains ------------------------------------------------------------------------------------------------

    def check_targets(self, network: nn.Module, args: Any) -> None:
        """Whether what is to train is there; for methods to extend.

        Raises:
            ValueError: the network has no such weights (by train_method and trainable_params_regex), or is in float16.
        """
        _trained_weights(network, args)
        # Of an adapter's network, too: saliency runs backward through it, and no loss scale is there.
        if any(p.dtype == torch.float16 for p in network.parameters()):
            raise ValueError(
                "model: gradients and updates in float16 are lost where they are small; load the pipeline in bfloat16 or float32"
            )

    def _choose_weights(self, network: nn.Module, args: DiffusionConfig) -> None:
        """Freezes all but what train_method and trainable_params_regex name; an adapter's parameters are its own."""
        chosen = _trained_weights(network, args)
        network.requires_grad_(False)
        for parameter in chosen.values():
            parameter.requires_grad_(True)

    def adapt(self, peft_config: Any) -> None:
        """Puts an adapter on the network; only it trains. The same seed gives the same factors.

        Raises:
            ValueError: it trains more than its factors (bias, modules_to_save), or weights are to be chosen by saliency, too.
        """
        _check_adapter(peft_config, self.args)
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.args.seed)
            self.model = self.model_wrapped = lora(self.model, peft_config)
        kept = [p for p in self.model.parameters() if p.requires_grad]
        kept += [buffer for name, buffer in self.model.named_buffers() if "lora_mask" in name]
        self.adapter_bytes = sum(t.numel() * t.element_size() for t in kept)
        self._adapted = [
            m for name, m in self.model.named_modules() if hasattr(m, "_disable_adapters") or "lora_dropout" in name
        ]

    def set_mode(self, model: nn.Module) -> None:
        # Dropout of the network itself would give the student another network than the one that draws.
        model.eval()
        for module in self._adapted:
            module.training = True

    def saliency_loss(self, rows: Any) -> Tensor:
        part = self._part("forget", torch.tensor(list(rows)), self._generator(-1, int(rows[0])), uniform=True)
        with self.accelerator.autocast():
            return self.denoising_term(self.family.denoiser(self.model), part)

    def denoising_term(self, student: Denoiser, part: Mapping[str, Any]) -> Tensor:
        """Mean squared error of the prediction (Ho et al. 2020, eq. 14), asked in the network's own type; fp32 scalar."""
        predicted = student(part["noised"], part["timesteps"], part["text"]).float()
        target = self.family.schedule.target(part["latents"], part["noise"], part["timesteps"])
        return F.mse_loss(predicted, target.float())

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _generator(self, *counter: int) -> torch.Generator:
        """Of the CPU: the same numbers on every device, for every counter others.

        A step's are each process' own. What is measured before the first one (counter below 0) all processes must find alike.
        """
        process = self.args.process_index if counter[0] >= 0 else 0
        words = ",".join(map(str, (self.args.seed, process, *counter)))
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "little"))

    def _part(self, name: str, rows: Tensor, generator: torch.Generator, *, uniform: bool = False) -> dict[str, Any]:
        data, schedule = self.sets[name], self.family.schedule
        clean, device = data.latents[rows.to(data.latents.device)], data.latents.device
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sampler = uniform_timesteps(schedule) if uniform or name != "forget" else self._timesteps
        t = sampler(len(clean), generator).to(device)
        prompt = data.prompt[rows.cpu()].to(device)
        text, other = data.texts[prompt], data.others[prompt]
        noised = schedule.add_noise(clean, noise, t).to(text.hidden.dtype)
        return {
            "index": rows,
            "latents": clean,
            "noise": noise,
            "timesteps": t,
            "noised": noised,
            "text": text,
            "other": other,
        }

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        step = self.state.global_step
        self._drawn = (step, self._drawn[1] + 1 if self._drawn[0] == step else 0)
        return {
            name: self._part(name, part["index"], self._generator(*self._drawn, number))
            for number, (name, part) in enumerate(inputs.items())
        }

    def retain_batch(self, rows: Sequence[int]) -> dict[str, Any]:
        return {
            "retain": self._part("retain", torch.tensor(list(rows)), self._generator(self.state.global_step, -1, 1))
        }

    # ---- the terms --------------------------------------------------------------------------------------------------

    @property
    def forget_factor(self) -> float:
        return self.args.forget_alpha

    @property
    def retain_factor(self) -> float:
        return self.args.retain_alpha

    def teacher(self, model: Any) -> Denoiser:
        """The network before unlearning."""
        frozen = self._frozen
        inner = self.family.denoiser(model if frozen is None else frozen)

        def predict(*given: Any) -> Tensor:
            # The student's precision is its wrapper's; a copy has none.
            with self._adapter_off(model) if frozen is None else self.accelerator.autocast():
                return inner(*given)

        return predict

    def _adapter_off(self, model: Any) -> AbstractContextManager[Any]:
        layers = [module for module in self._adapted if hasattr(module, "_disable_adapters")]
        return _layers_off(layers) if layers else adapter_off(model)

    def forget_term(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        part, student = inputs["forget"], self.family.denoiser(model)
        return self_distillation_loss(
            student, self.teacher(model), part["noised"], part["timesteps"], part["text"], part["other"]
        )

    def retain_term(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        part, student = inputs["retain"], self.family.denoiser(model)
        return self_distillation_loss(
            student, self.teacher(model), part["noised"], part["timesteps"], part["text"], part["text"]
        )

    # ---- timesteps --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def concept_divergence(self) -> Tensor:
        """D(t) = mean |teacher(z_t, t, c_forget) - teacher(z_t, t, c_surrogate)|^2 in each bin of timesteps, fp64 [bins].

        Every forget image once in a bin, in the student's first state: the forget term before the first step.
        """
        bins, data = self.args.timestep_bins, self.sets["forget"]
        edges = torch.linspace(0, len(self.family.schedule), bins + 1).long().tolist()
        teacher, size = self.teacher(self.model), self.args.per_device_train_batch_size
        sums = torch.zeros(bins, dtype=torch.float64)
        with evaluating(self.model), self.accelerator.autocast():
            for i in tqdm(range(bins), desc="timesteps of the concept", leave=False, disable=None):
                generator = self._generator(-2, i)
                for at in range(0, len(data), size):
                    rows = torch.arange(at, min(at + size, len(data)))
                    part = self._part("forget", rows, generator, uniform=True)
                    low, high = edges[i], max(edges[i + 1], edges[i] + 1)
                    t = torch.randint(low, high, (len(rows),), generator=generator).to(part["noise"].device)
                    noised = self.family.schedule.add_noise(part["latents"], part["noise"], t).to(part["noised"].dtype)
                    loss = self_distillation_loss(teacher, teacher, noised, t, part["text"], part["other"])
                    sums[i] += float(loss) * len(rows)
        return sums / len(data)

    def _set_timesteps(self) -> None:
        schedule, args = self.family.schedule, self.args
        if args.timesteps == "interval":
            assert args.timestep_interval is not None
            self._timesteps = interval_timesteps(schedule, *args.timestep_interval)
        elif args.timesteps == "importance":
            if self.divergence is None:
                self.divergence = self.concept_divergence()
            self._timesteps = importance_timesteps(schedule, self.divergence, args.timestep_beta)

    # ---- the run ----------------------------------------------------------------------------------------------------

    def before_training(self, checkpoint: str | None) -> None:
        # A second run goes on from the first: its teacher stays the network before both.
        if self._frozen is None and not self._adapted and self.args.train_method is not None and self.needs_frozen:
            self._frozen = copy.deepcopy(self.family.network).eval().requires_grad_(False)

    def prepare_weights(self) -> None:
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError("peft_config: nothing trains; give an adapter's configuration, or train_method")
        self._set_timesteps()

    def save_extra(self, folder: Path) -> None:
        super().save_extra(folder)
        if self.divergence is not None:
            save_file({"divergence": self.divergence}, folder / DIVERGENCE)

    def load_extra(self, checkpoint: Path) -> None:
        super().load_extra(checkpoint)
        if (checkpoint / DIVERGENCE).exists():
            self.divergence = read_tensors(checkpoint / DIVERGENCE)[0].get("divergence")
        self._set_timesteps()

    def _trained(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    @property
    def trained_count(self) -> int:
        """Entries that train: of masked weights those of the mask, of an adapter its factors."""
        masks = self.movable or {}
        return sum(int(masks[name].count()) if name in masks else p.numel() for name, p in self._trained().items())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            folder = Path(output_dir or self.output)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: p.detach().cpu().contiguous().clone() for name, p in self._trained().items()}, folder / TRAINED
            )
            self.save_extra(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        kept, mine = read_tensors(Path(resume_from_checkpoint) / TRAINED)[0], self._trained()
        wrong = sorted(kept.keys() ^ mine.keys()) or [n for n in mine if mine[n].shape != kept[n].shape]
        if wrong:
            raise ValueError(
                f"resume_from_checkpoint: {resume_from_checkpoint} trains other weights than this run: {wrong[0]}"
            )
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(kept[name])

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter's folder (adapter/) or the weights that moved (unet.safetensors, transformer.safetensors); whole or not at all."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        self.assert_sound()
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.output)
        if not self._adapted:
            save_partial_unet(self._trained(), folder / f"{self.family.part}.safetensors", overwrite=True)
            return
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".adapter.", suffix=".tmp", dir=folder))
        aside = temporary.with_suffix(".old")
        try:
            self.accelerator.unwrap_model(self.model).save_pretrained(temporary)
            # The old one is aside until the new one is in its place.
            if (folder / ADAPTER).exists():
                (folder / ADAPTER).rename(aside)
            try:
                temporary.rename(folder / ADAPTER)
            except BaseException:
                if aside.exists():
                    aside.rename(folder / ADAPTER)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)

    def merge(self) -> dict[str, Tensor]:
        """Gives the pipeline its network back as one without an adapter, with what was learned in its weights.

        Returns:
            Name within the network -> new weight, of what moved: what `save_partial_unet` writes.
        """
        model: Any = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        moved = [name for name, p in model.named_parameters() if p.requires_grad]
        if self._adapted:
            plain = (
                name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")
            )
            moved = [f"{name}.weight" for name in plain]
            model = model.merge_and_unload()
        self.model = self.model_wrapped = model
        self._adapted, self._frozen = [], None
        setattr(self.pipeline, self.family.part, model)
        model.eval()
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            parameter.requires_grad_(self._required[name])
            parameter.grad = None
        return {name: parameters[name].detach().clone() for name in moved}

    @classmethod
    def run(
        cls, model: Any, args: Any, forget: Any, retain: Any = None, **options: Any
    ) -> tuple[Self, dict[str, Tensor]]:
        """Trains, merges -> (the trainer, the weights that moved). The pipeline is what it was where that fails."""
        trainer = cls(model, args, forget, retain, **options)
        network = trainer.family.network
        before = {name: p.detach().clone() for name, p in network.named_parameters() if p.requires_grad}
        try:
            trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or None)
            return trainer, trainer.merge()
        except BaseException:
            trainer.restore(before)
            raise

    @torch.no_grad()
    def restore(self, before: Mapping[str, Tensor]) -> None:
        """The pipeline as it was: without an adapter, with these weights."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        model = model.unload() if self._adapted else model
        self._adapted, self._frozen = [], None
        setattr(self.pipeline, self.family.part, model)
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
            parameter.requires_grad_(self._required[name])
            parameter.grad = None


@contextmanager
def _layers_off(layers: Sequence[Any]) -> Iterator[None]:
    """PEFT's layers without their adapter; unlike its own context this leaves requires_grad alone."""
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def _trained_weights(network: nn.Module, args: DiffusionConfig) -> dict[str, nn.Parameter]:
    """Of the network itself, by name: those of train_method that trainable_params_regex matches."""
    patterns = args.trainable_params_regex
    if args.train_method is None:
        if patterns is not None:
            raise ValueError(
                "trainable_params_regex: chooses among the weights of train_method; give one, too (full: all of them)"
            )
        return {}
    named, matches = unet_parameters(network, args.train_method), name_matcher(patterns)
    chosen = {name: parameter for name, parameter in named.items() if matches(name)}
    if not chosen:
        raise ValueError(
            f"trainable_params_regex: {list(patterns or [])} match no parameter of train_method={args.train_method}; names look like "
            f"{next(iter(named))!r}"
        )
    return chosen


def _check_adapter(peft_config: Any, args: DiffusionConfig) -> None:
    if getattr(peft_config, "bias", "none") != "none":
        raise ValueError(
            f"peft_config: bias={peft_config.bias!r} trains what merging and the adapter's teacher do not take back; want none"
        )
    if getattr(peft_config, "modules_to_save", None):
        raise ValueError(
            f"peft_config: modules_to_save={list(peft_config.modules_to_save)} train whole, beside the adapter; want none of them"
        )
    if args.localize == "saliency":
        raise ValueError("localize: saliency chooses among the network's own weights; with an adapter leave it at all")
    if args.trainable_params_regex is not None:
        raise ValueError("trainable_params_regex: with an adapter only the adapter trains; choose target_modules there")


def _identity(family: Family) -> str:
    """A hash of all that images, latents and text features depend on: the network, VAE, text encoders, the scheduler's settings."""
    said, pipeline = hashlib.sha256(), family.pipeline
    for part in (family.part, "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipeline, part, None)
        if module is not None:
            said.update(f"{part} {_beginnings(module)}\n".encode())
    settings = {k: v for k, v in dict(pipeline.scheduler.config).items() if k[0] != "_" or k == "_class_name"}
    settings["class"] = type(pipeline.scheduler).__name__
    said.update(json.dumps(settings, sort_keys=True, default=str).encode())
    settings = {k: v for k, v in dict(pipeline.vae.config).items() if k.endswith("_factor")}
    said.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return said.hexdigest()


def _beginnings(module: nn.Module) -> str:
    """A hash of names, shapes and the first entries of all parameters: enough to know a model by."""
    said = hashlib.sha256()
    for name, parameter in module.named_parameters():
        said.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        said.update(json.dumps(parameter.detach().flatten()[:256].double().tolist()).encode())
    return said.hexdigest()
