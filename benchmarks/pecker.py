"""The study behind PECKER's table: a class-conditional model of CIFAR-10 forgets airplanes and draws automobiles instead.

    python -m benchmarks.pecker run --size cifar10 --work FOLDER [--methods sfd pecker ...] [--seeds 0 1] [--device cuda]
    python -m benchmarks.pecker run --size small --work FOLDER        two cores: three classes, 16 x 16 pixels
    python -m benchmarks.pecker time --size small                     seconds of one iteration of every part, and of the whole study

Parts, each saved in the work folder and skipped when it is there (training goes on from its last checkpoint): a classifier, the teacher
(DDPM), its one-step generator (SiD, the first stage), then one run a method and seed from that same generator, with the same draws.
UA and FID of the classes that stay are measured every `every` iterations on the averaged weights and written as a row to
benchmarks/results/quality/pecker_<size>.json after every run, with the final numbers on more images. FID is by Inception features where
the package that carries the network is there (fastunlearn.evaluation.inception), else by the classifier's; the file says which.

`python -m benchmarks table` and `plot` make the README's of it (benchmarks/pecker_results.py).

Targets: iterations to UA >= 99 % with FID within 5 % of SFD's final one, over SFD's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import RESULTS, machine
from benchmarks.pecker_results import summary
from fastunlearn.data.cifar10 import CLASSES, load_cifar10
from fastunlearn.evaluation.classes import classify, draw_classes, unlearning_accuracy
from fastunlearn.evaluation.classifiers import Classifier
from fastunlearn.evaluation.frechet import Moments, frechet_distance, moments
from fastunlearn.evaluation.inception import inception_features, inception_file, load_inception
from fastunlearn.report.files import write_json

FORGET, OVERRIDE = 0, 1


@dataclass
class Size:
    """What a study costs. Iterations are those of each part; images of a measurement and of the final one; save_every: a multiple of
    every, so that the time a run has taken is known at each of its checkpoints."""

    classes: tuple[int, ...]
    pixels: int
    channels: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    batch: int
    teacher_steps: int
    teacher_rate: float
    classifier_steps: int
    distill_steps: int
    steps: int
    every: int
    images: int
    final_images: int
    k_forget: float
    rate: float
    ema: float
    save_every: int = 250
    teacher_ema: float = 0.999


SIZES = {
    # For a GPU: the teacher about six minutes, a distillation at most ninety seconds.
    "cifar10": Size(
        tuple(range(10)), 32, (96, 128, 160), 2, (False, True, True), 128, 20_000, 2e-4, 3000, 3000, 1500, 250, 2000, 5000,
        0.01, 1e-5, 0.99,
    ),
    "small": Size(
        (0, 1, 8), 16, (16, 32, 64), 1, (False, False, True), 64, 8000, 5e-4, 800, 600, 320, 20, 1200, 3000, 1.0, 1e-4, 0.95, 80,
    ),
    # Of the tests: nothing is learned, everything runs.
    "tiny": Size((0, 1, 8), 16, (8, 8), 1, (False, False), 4, 3, 1e-3, 2, 2, 2, 1, 6, 6, 0.05, 1e-3, 0.5, 2),
}  # fmt: skip

#: method -> settings of PECKERConfig; rate_factor: on both learning rates
RUNS: dict[str, dict[str, Any]] = {
    "sfd": {"method": "sfd"},
    "pecker": {"method": "pecker", "density": 0.5},
    "pecker, row": {"method": "pecker", "granularity": "row", "density": 0.5},
    "pecker, tile": {"method": "pecker", "granularity": "tile", "block": 64, "density": 0.5},
    "pecker, tile 10%": {"method": "pecker", "granularity": "tile", "block": 64, "density": 0.1},
    "pecker, forget term": {"method": "pecker", "mask_terms": "forget", "density": 0.5},
    "gradient_ascent": {"method": "gradient_ascent", "k_forget": 1.0},
    "sfd, twice the rate": {"method": "sfd", "rate_factor": 2.0},
    "pecker, twice the rate": {"method": "pecker", "density": 0.5, "rate_factor": 2.0},
    "sfd, four times the rate": {"method": "sfd", "rate_factor": 4.0},
    "pecker, four times the rate": {"method": "pecker", "density": 0.5, "rate_factor": 4.0},
    "pecker, row, four times the rate": {"method": "pecker", "granularity": "row", "density": 0.5, "rate_factor": 4.0},
    "sfd, forget term fourfold": {"method": "sfd", "k_forget": 4.0},
    "pecker, forget term fourfold": {"method": "pecker", "density": 0.5, "k_forget": 4.0},
    "pecker, only that term masked, fourfold": {
        "method": "pecker",
        "mask_terms": "forget",
        "density": 0.5,
        "k_forget": 4.0,
    },
}


class Study:
    """One work folder, one size, one device."""

    def __init__(self, size: str, work: Path, device: str, *, data: Path | None = None):
        self.name, self.size, self.work, self.device = size, SIZES[size], work / size, torch.device(device)
        self.data = data
        self.work.mkdir(parents=True, exist_ok=True)
        self._cache: dict[str, Any] = {}

    # ---- data and judges ------------------------------------------------------------------------------------------------

    def images(self, split: str = "train") -> tuple[Tensor, Tensor]:
        if split not in self._cache:
            self._cache[split] = load_cifar10(split, folder=self.data, classes=self.size.classes, size=self.size.pixels)
        return self._cache[split]

    def classifier(self) -> Classifier:
        """Trained on the real images, flips as augmentation; its test accuracy is kept beside it."""
        path = self.work / "classifier.safetensors"
        model = Classifier(tuple(CLASSES[i] for i in self.size.classes), width=24)
        if path.is_file():
            model.load_state_dict(load_file(path))
            return model.eval().to(self.device)
        torch.manual_seed(0)
        model = Classifier(tuple(CLASSES[i] for i in self.size.classes), width=24).to(self.device)
        images, labels = self.images()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=self.size.classifier_steps)
        generator = torch.Generator().manual_seed(0)
        for _ in tqdm(range(self.size.classifier_steps), desc="classifier", leave=False, disable=None):
            at = torch.randint(len(images), (128,), generator=generator)
            x = self._flipped(images[at], generator).to(self.device)
            loss = F.cross_entropy(model(x), labels[at].to(self.device))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        model.eval()
        test, truth = self.images("test")
        accuracy = float((classify(model, test, device=self.device) == truth).float().mean())
        save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, path)
        write_json(self.work / "classifier.json", {"test_accuracy": accuracy, "steps": self.size.classifier_steps})
        return model

    @staticmethod
    def _flipped(images: Tensor, generator: torch.Generator) -> Tensor:
        flip = torch.rand(len(images), generator=generator) < 0.5
        return torch.where(flip[:, None, None, None], images.flip(3), images)

    @property
    def features_name(self) -> str:
        return "fid_inception" if inception_file() is not None and self.size.pixels == 32 else "fid_classifier_features"

    def features(self, images: Tensor) -> Tensor:
        if self.features_name == "fid_inception":
            if "inception" not in self._cache:
                self._cache["inception"] = load_inception(self.device)
            return inception_features(self._cache["inception"], images, device=self.device)
        model = self._judge()
        with torch.no_grad():
            return torch.cat([model.features(part.to(self.device)).float().cpu() for part in images.split(500)])

    def _judge(self) -> Classifier:
        if "classifier" not in self._cache:
            self._cache["classifier"] = self.classifier()
        return self._cache["classifier"]

    def real(self) -> Moments:
        """Of the real images of the classes that stay."""
        if "real" not in self._cache:
            images, labels = self.images()
            self._cache["real"] = moments(self.features(images[labels != FORGET]))
        return self._cache["real"]

    def measure(
        self, unet: Any, scheduler: Any, count: int, *, one_step: int | None, seed: int = 7
    ) -> dict[str, float]:
        """UA on the forgotten label, FID and accuracy on the others: a third of the images, and two thirds."""
        classes = len(self.size.classes)
        gone = torch.full((max(1, count // 3),), FORGET)
        kept = torch.arange(max(2, count - len(gone))) % (classes - 1) + 1
        asked = torch.cat([gone, kept])
        drawn = draw_classes(unet, scheduler, asked, one_step=one_step, seed=seed, batch_size=250, progress=False)
        said = classify(self._judge(), drawn, device=self.device)
        among = asked != FORGET
        return {
            "UA": 100 * unlearning_accuracy(said, asked, FORGET),
            "override": 100 * float((said[~among] == OVERRIDE).double().mean()),
            "kept_accuracy": 100 * float((said[among] == asked[among]).double().mean()),
            self.features_name: frechet_distance(moments(self.features(drawn[among])), self.real()),
        }

    # ---- models ---------------------------------------------------------------------------------------------------------

    def unet(self) -> Any:
        from diffusers import UNet2DModel

        s = self.size
        down = tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in s.attention)
        up = tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(s.attention))
        return UNet2DModel(
            sample_size=s.pixels, in_channels=3, out_channels=3, layers_per_block=s.layers, block_out_channels=s.channels,
            down_block_types=down, up_block_types=up, norm_num_groups=8, attention_head_dim=32 if s.channels[-1] % 32 == 0 else 8,
            num_class_embeds=len(s.classes),
        )  # fmt: skip

    @staticmethod
    def scheduler() -> Any:
        from diffusers import DDPMScheduler

        return DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)

    def teacher(self, *, without: int | None = None, steps: int | None = None) -> Path:
        """A DDPM (Ho et al. 2020) of the real images, its average; `without` a class: the retrained baseline."""
        s = self.size
        folder = self.work / ("teacher" if without is None else "retrain")
        if (folder / "unet" / "config.json").is_file():
            return folder
        total = s.teacher_steps if steps is None else steps
        torch.manual_seed(0)
        model, scheduler = self.unet().to(self.device), self.scheduler()
        average = copy.deepcopy(model).requires_grad_(False)
        optimiser = torch.optim.Adam(model.parameters(), lr=s.teacher_rate)
        images, labels = self.images()
        if without is not None:
            images, labels = images[labels != without], labels[labels != without]
        state = folder.with_name(folder.name + "-checkpoint.pt")
        first = 0
        if state.is_file():
            saved = torch.load(state, map_location=self.device, weights_only=True)
            model.load_state_dict(saved["model"])
            average.load_state_dict(saved["average"])
            optimiser.load_state_dict(saved["optimiser"])
            first = int(saved["step"])
        alphas = scheduler.alphas_cumprod.to(self.device)
        for step in tqdm(range(first, total), initial=first, total=total, desc=folder.name, disable=None):
            generator = torch.Generator().manual_seed(step)
            at = torch.randint(len(images), (s.batch,), generator=generator)
            x = self._flipped(images[at], generator).to(self.device).float() / 127.5 - 1
            noise = torch.randn(x.shape, generator=generator).to(self.device)
            t = torch.randint(len(alphas), (s.batch,), generator=generator).to(self.device)
            a = alphas[t].view(-1, 1, 1, 1)
            for group in optimiser.param_groups:
                group["lr"] = s.teacher_rate * min(1.0, (step + 1) / 500)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"):
                guess = model(a.sqrt() * x + (1 - a).sqrt() * noise, t, class_labels=labels[at].to(self.device)).sample
            loss = F.mse_loss(guess.float(), noise)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            decay = min(s.teacher_ema, (1 + step) / (10 + step))
            with torch.no_grad():
                for p, q in zip(average.parameters(), model.parameters(), strict=True):
                    p.lerp_(q, 1 - decay)
            if (step + 1) % 500 == 0 or step + 1 == total:
                saved = {
                    "model": model.state_dict(), "average": average.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1
                }  # fmt: skip
                temporary = state.with_suffix(".tmp")
                torch.save(saved, temporary)
                temporary.replace(state)
        for name, part in (("scheduler", scheduler), ("unet", average)):
            part.save_pretrained(folder / name)
        return folder

    def config(self, output: Path, seed: int, **options: Any) -> Any:
        from fastunlearn import PECKERConfig

        s, factor = self.size, options.pop("rate_factor", 1.0)
        common = {
            "output_dir": str(output), "max_steps": s.steps, "per_device_train_batch_size": s.batch, "seed": seed, "logging_steps": s.every,
            "save_steps": s.save_every, "save_total_limit": 1, "report_to": [], "use_cpu": self.device.type == "cpu",
            "k_forget": s.k_forget, "learning_rate": factor * s.rate, "pseudo_learning_rate": 3 * factor * s.rate, "ema_decay": s.ema,
            "bf16": self.device.type == "cuda",
        }  # fmt: skip
        return PECKERConfig(**{**common, **options})

    def _train(self, trainer: Any) -> None:
        from fastunlearn.resuming import last_checkpoint

        output = Path(trainer.args.output_dir)
        going_on = output.is_dir() and last_checkpoint(output) is not None
        # What is there without a checkpoint is a run's that was killed before its first one.
        trainer.args.overwrite_output_dir = not going_on
        trainer.train(resume_from_checkpoint=True if going_on else None)

    @staticmethod
    def kept_curve(folder: Path) -> list[dict[str, float]]:
        """Measurements of a run that was killed, up to the checkpoint it goes on from: what came after is done, and timed, again."""
        from fastunlearn.resuming import last_checkpoint

        file, checkpoint = folder / "curve.json", last_checkpoint(folder)
        if checkpoint is None or not file.is_file():
            return []
        step = int(Path(checkpoint).name.rpartition("-")[2])
        return [row for row in json.loads(file.read_text()) if row["iteration"] <= step]

    def generator(self) -> Path:
        """The first stage: one for all methods and seeds."""
        from fastunlearn import PECKERTrainer
        from fastunlearn.methods._pecker_setup import load_unet

        folder = self.work / "generator"
        if (folder / "pecker.json").is_file():
            return folder
        unet, scheduler = load_unet(self.teacher())
        args = self.config(folder, 0, method="sid", max_steps=self.size.distill_steps, stages="single")
        trainer = PECKERTrainer(unet, args, processing_class=scheduler)
        self._train(trainer)
        trainer.save_model()
        return folder

    # ---- one run --------------------------------------------------------------------------------------------------------

    def run(self, method: str, seed: int) -> dict[str, Any]:
        """A row: settings, curve, final numbers, seconds."""
        from transformers import TrainerCallback

        from fastunlearn import PECKERTrainer
        from fastunlearn.methods._pecker_setup import load_unet

        study, s = self, self.size
        unet, scheduler = load_unet(self.teacher())
        generator = self.generator()
        folder = self.work / f"{method.replace(', ', '-').replace(' ', '-').replace('%', '')}-{seed}"
        trainer = PECKERTrainer(
            unet,
            self.config(folder, seed, **RUNS[method]),
            FORGET,
            None,
            scheduler,
            override=OVERRIDE,
            generator=generator,
        )
        one_step = trainer.setup.t_init if RUNS[method]["method"] != "gradient_ascent" else None
        curve_file = folder / "curve.json"
        # Checkpoints are at multiples of `every`: the last row that is kept holds the seconds up to its checkpoint.
        curve = self.kept_curve(folder)
        spent = [curve[-1]["seconds"] if curve else 0.0, 0.0]
        localize = trainer.localize

        def timed(iteration: int = 0) -> None:
            study._wait()
            start = time.perf_counter()
            localize(iteration)
            study._wait()
            # One that is taken anew is a part of its iteration, which is timed as a whole.
            spent[0] += time.perf_counter() - start if iteration == 0 else 0.0

        trainer.localize = timed

        class Measure(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                study._wait()
                spent[1] = time.perf_counter()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                study._wait()
                spent[0] += time.perf_counter() - spent[1]
                if state.global_step % s.every == 0 and all(row["iteration"] != state.global_step for row in curve):
                    with trainer.ema.applied(trainer.generator):
                        numbers = study.measure(trainer.generator, scheduler, s.images, one_step=one_step)
                    curve.append({"iteration": state.global_step, "seconds": spent[0], **numbers})
                    write_json(curve_file, curve)

        trainer.add_callback(Measure())
        self._train(trainer)
        trainer.save_model()
        with trainer.ema.applied(trainer.generator):
            final = self.measure(trainer.generator, scheduler, s.final_images, one_step=one_step, seed=8)
        masked = trainer.masked_model
        return {
            "method": method, "seed": seed, "settings": RUNS[method], **final, "iterations": s.steps, "seconds": spent[0],
            "gradient_products": None if masked is None else masked.share, "curve": curve,
        }  # fmt: skip

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def before(self) -> dict[str, Any]:
        """The teacher (50 steps of DDIM) and the one-step generator, which have forgotten nothing."""
        from fastunlearn.methods._pecker_setup import load_unet

        rows = {}
        for name, folder, start in (("teacher", self.teacher(), None), ("generator", self.generator(), 440)):
            unet, scheduler = load_unet(folder)
            rows[name] = self.measure(unet.to(self.device), scheduler, self.size.images, one_step=start)
        return rows

    def retrain(self) -> dict[str, Any]:
        """A teacher that never saw the class, drawn in 50 steps."""
        from fastunlearn.methods._pecker_setup import load_unet

        start = time.perf_counter()
        unet, scheduler = load_unet(self.teacher(without=FORGET))
        final = self.measure(unet.to(self.device), scheduler, self.size.final_images, one_step=None, seed=8)
        return {
            "method": "retrain",
            "seed": 0,
            "settings": {},
            **final,
            "seconds": time.perf_counter() - start,
            "curve": [],
        }


#: Methods of other trainers that draw the same classes put themselves here: name -> (study, seed) -> row.
OTHERS: dict[str, Callable[[Study, int], dict[str, Any]]] = {"retrain": lambda study, seed: study.retrain()}


def result_file(size: str) -> Path:
    return RESULTS / "quality" / f"pecker_{size}.json"


def run(study: Study, methods: Sequence[str], seeds: Sequence[int], out: Path) -> dict[str, Any]:
    """Every method and seed that the file does not hold yet."""
    result = json.loads(out.read_text()) if out.is_file() else {"rows": []}
    size = json.loads(json.dumps(asdict(study.size)))
    if result["rows"] and result["meta"]["size"] != size:
        raise ValueError(f"out: {out} holds runs of another size; choose another file")
    parameters = sum(p.numel() for p in study.unet().parameters())
    facts = machine.meta(study.device)
    result["meta"] = {name: facts[name] for name in ("device", "cpu", "threads", "torch", "fastunlearn", "commit", "date")} | {
        "size": asdict(study.size), "parameters": parameters, "fid": study.features_name, "forget": CLASSES[study.size.classes[FORGET]],
        "override": CLASSES[study.size.classes[OVERRIDE]],
    }  # fmt: skip
    if "before" not in result:
        result["before"] = study.before()
        write_json(out, result)
    judge = study.work / "classifier.json"
    if judge.is_file():
        result["meta"]["judge accuracy, test"] = round(json.loads(judge.read_text())["test_accuracy"], 4)
        write_json(out, result)
    for seed in seeds:
        for method in methods:
            if any(row["method"] == method and row["seed"] == seed for row in result["rows"]):
                continue
            row = OTHERS[method](study, seed) if method in OTHERS else study.run(method, seed)
            # Of the row: the file's own facts are those of its latest run.
            result["rows"].append({**row, "commit": facts["commit"], "date": facts["date"]})
            result["summary"] = summary(result)
            write_json(out, result)
            shown = ", ".join(
                f"{key} {row[key]:.4g}" for key in ("UA", "kept_accuracy", study.features_name, "seconds")
            )
            print(f"{method}, seed {seed}: {shown}", flush=True)
    return result


def step_seconds(study: Study, repeats: int = 5) -> dict[str, float]:
    """Median seconds of an iteration of each part, with random weights, and of the whole study as `run` does it."""
    import statistics
    import tempfile

    from fastunlearn import PECKERTrainer

    s = study.size
    out: dict[str, float] = {}
    unet, scheduler = study.unet(), study.scheduler()
    x, labels = (
        torch.randn(s.batch, 3, s.pixels, s.pixels).to(study.device),
        torch.zeros(s.batch, dtype=torch.int64).to(study.device),
    )
    model = copy.deepcopy(unet).to(study.device)

    def timed(call: Callable[[], Any]) -> float:
        call()
        found = []
        for _ in range(repeats):
            study._wait()
            start = time.perf_counter()
            call()
            study._wait()
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    out["teacher"] = timed(lambda: model(x, labels + 500, class_labels=labels).sample.square().mean().backward())
    with tempfile.TemporaryDirectory() as folder:
        for name in ("sfd", "pecker", "pecker, tile 10%"):
            trainer = PECKERTrainer(
                unet, study.config(Path(folder) / name, 0, **RUNS[name], stages="single", saliency_batches=1), FORGET, None, scheduler,
                override=OVERRIDE,
            )  # fmt: skip
            if trainer.args.masked:
                trainer.localize()
            trainer.create_optimizer()

            def one(trainer: Any = trainer) -> None:
                trainer.training_step(trainer.model, {})
                trainer.optimizer.step()
                trainer.optimizer.zero_grad()

            out[name] = timed(one)
    measured = timed(
        lambda: draw_classes(model, scheduler, torch.zeros(s.batch, dtype=torch.int64), one_step=440, progress=False)
    )
    out["drawing one image"] = measured / s.batch
    methods = len(RUNS)
    per_run = s.steps * out["sfd"] + (s.steps // s.every * s.images + s.final_images) * out["drawing one image"]
    out["study, one seed"] = 2 * s.teacher_steps * out["teacher"] + s.distill_steps * out["sfd"] + methods * per_run
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pecker", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", nargs="?", choices=("run", "time"), default="run")
    parser.add_argument("--size", choices=tuple(SIZES), default="small")
    parser.add_argument("--work", type=Path, default=Path("out/pecker"), help="where parts and checkpoints are kept")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; default: FASTUNLEARN_DATA, else the hub")
    parser.add_argument("--methods", nargs="+", choices=(*RUNS, *OTHERS), default=list(RUNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/quality/pecker_<size>.json")
    args = parser.parse_args(argv)
    out = args.out or result_file(args.size)
    try:
        study = Study(args.size, args.work, args.device, data=args.data)
        if args.what == "time":
            print(json.dumps(step_seconds(study), indent=2))
            return 0
        run(study, args.methods, args.seeds, out)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.exit(2, f"python -m benchmarks.pecker: {error}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
