"""HAMU on images: a ResNet-20 forgets airplanes of CIFAR-10, the more of them stay in the retain set the harder it is.

    python -m benchmarks.cifar_hamu run --size cpu --work FOLDER [--minutes 4]
    python -m benchmarks.cifar_hamu plot --size cpu

As in the paper (arXiv 2606.02119) a share rho of the forget set, images of class 0, is replaced by random images of the rest: 0 is a
class, 1 a random part; the retain set is what remains. Batch norm keeps its statistics, every gradient is clipped to norm 1 by itself,
plain SGD. Two questions: does the mean hardness of a run rise with rho (Pearson's r), and which methods at rho = .75 improve one of
the two losses without hurting the other. What a step promises it promises on its batch, so the second is asked with large batches too. Size "paper" is the paper's, "cpu" is small enough for one core: 16 x 16 pixels, two fifths of the images,
six epochs of training, 12 steps of 256 images whose lengths add up to 1.6 times the paper's.

Q is half of what the ball holds (share 0.5), not the paper's Q = lr / 2: with clipped gradients whose norms do not add up, that
can be more than the ball holds. Every run is a row of benchmarks/results/quality/hamu_images[_paper].json, written as it ends: a study
that stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import RESULTS, machine
from benchmarks.cifar_hamu_results import COMPARED, METHODS, OURS, RHOS, plot, summary
from benchmarks.resnet import ResNet
from fastunlearn.data.cifar10 import CLASSES, load_cifar10
from fastunlearn.report.files import write_json
from fastunlearn.updates import Separate, make_update
from fastunlearn.updates.hamu import Hamu

FORGET = 0


@dataclass(frozen=True)
class Size:
    """Images of training and their side, what training costs, and an unlearning run: steps of `rows` images of either set. With
    `large` the methods are compared once more, by `large_steps` steps of so many.

    Losses before and after are taken on `asked` images of either set; every `check` steps a certificate is checked.
    """

    pixels: int
    images: int
    epochs: int
    batch: int
    rate: float
    steps: int
    rows: int
    lr: float
    asked: int
    check: int
    blocks: int = 3
    large: int = 0
    large_steps: int = 0


SIZES = {
    # 25 epochs of nine batches of the retain set.
    "paper": Size(32, 50_000, 50, 128, 0.1, 225, 5000, 1e-4, 5000, 5),
    "cpu": Size(16, 20_000, 6, 128, 0.1, 12, 256, 3e-3, 2000, 2, large=2000, large_steps=4),
    "tiny": Size(8, 40, 1, 8, 0.05, 2, 4, 1e-3, 8, 1, 1, 6, 1),
}


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float() / 127.5 - 1


class Study:
    """Data, the classifier that knows all, and runs.

    Args:
        work: where images and the classifier are kept. data: folder of CIFAR-10. until: time.monotonic() after which nothing is begun.
    """

    def __init__(
        self, size: str, work: Path, device: str = "cpu", *, data: Path | None = None, until: float = math.inf
    ):
        self.name, self.size, self.work, self.until = size, SIZES[size], work, until
        self.device = torch.device(device)
        work.mkdir(parents=True, exist_ok=True)
        kept = work / f"images-{self.size.pixels}.pt"
        if not kept.is_file():
            sets = {split: load_cifar10(split, folder=data, size=self.size.pixels) for split in ("train", "test")}
            temporary = kept.with_suffix(".tmp")
            torch.save(sets, temporary)
            temporary.replace(kept)
        sets = torch.load(kept)
        images, labels = sets["train"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: self.size.images]
        self.images, self.labels, self.test = images[order], labels[order], sets["test"]

    def late(self) -> bool:
        return time.monotonic() > self.until

    # ---- the classifier ---------------------------------------------------------------------------------------------

    def classifier(self) -> ResNet | None:
        """The trained classifier, made where it is not there; training is kept after each epoch. None: time is over."""
        s = self.size
        torch.manual_seed(0)
        model = ResNet(s.blocks).to(self.device)
        optimizer = torch.optim.SGD(model.parameters(), s.rate, 0.9, weight_decay=5e-4, nesterov=True)
        per_epoch = math.ceil(len(self.labels) / s.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, s.rate, total_steps=s.epochs * per_epoch)
        path = self.work / f"resnet-{6 * s.blocks + 2}-{s.pixels}-{s.images}-{s.epochs}.pt"
        first = 0
        if path.is_file():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            first = state["epoch"]
        for epoch in range(first, s.epochs):
            if self.late():
                return None
            model.train()
            draw = torch.Generator().manual_seed(epoch)
            order, total = torch.randperm(len(self.labels), generator=draw), 0.0
            for rows in tqdm(order.split(s.batch), desc=f"  epoch {epoch + 1} of {s.epochs}", disable=None):
                x = _pixels(self.images[rows], self.device)
                turned = torch.rand(len(rows), generator=draw).to(self.device)[:, None, None, None] < 0.5
                loss = F.cross_entropy(model(torch.where(turned, x.flip(3), x)), self.labels[rows].to(self.device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                total += float(loss.detach()) * len(rows)
            print(f"epoch {epoch + 1}: loss {total / len(order):.3f}", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}  # fmt: skip
            temporary = path.with_suffix(".tmp")
            torch.save({**state, "epoch": epoch + 1}, temporary)
            temporary.replace(path)
        # Statistics of batch norm are frozen from here on.
        return model.eval()

    # ---- the two sets -----------------------------------------------------------------------------------------------

    def sets(self, rho: float, seed: int) -> tuple[Tensor, Tensor]:
        """(forget, retain): numbers of images. The forget set is as large as the class, a share rho of it is of other classes."""
        draw = torch.Generator().manual_seed(1000 + seed)
        mine, others = (self.labels == FORGET).nonzero()[:, 0], (self.labels != FORGET).nonzero()[:, 0]
        mine, others = (x[torch.randperm(len(x), generator=draw)] for x in (mine, others))
        swapped = round(rho * len(mine))
        return torch.cat([mine[swapped:], others[:swapped]]), torch.cat([mine[:swapped], others[swapped:]])

    @torch.no_grad()
    def measure(self, model: nn.Module, rows: Tensor, test: bool = False) -> tuple[float, float]:
        """(mean loss in nats, accuracy in percent)."""
        images, labels = self.test if test else (self.images, self.labels)
        loss, right = 0.0, 0
        for part in rows.split(1000):
            logits, want = model(_pixels(images[part], self.device)), labels[part].to(self.device)
            loss += float(F.cross_entropy(logits, want, reduction="sum"))
            right += int((logits.argmax(1) == want).sum())
        return loss / len(rows), 100 * right / len(rows)

    # ---- one run ----------------------------------------------------------------------------------------------------

    def batches(self, forget: Tensor, retain: Tensor, seed: int, batch: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """For each step images and labels of forget and retain rows, a whole set where it is smaller than a batch; a set's rows come
        once before any comes again."""
        draw = torch.Generator().manual_seed(2000 + seed)
        queues = [torch.empty(0, dtype=torch.int64) for _ in range(2)]
        for _ in range(self.size.steps if batch == self.size.rows else self.size.large_steps):
            out = []
            for i, rows in enumerate((forget, retain)):
                count = min(batch, len(rows))
                while len(queues[i]) < count:
                    queues[i] = torch.cat([queues[i], rows[torch.randperm(len(rows), generator=draw)]])
                chosen, queues[i] = queues[i][:count], queues[i][count:]
                out.append((_pixels(self.images[chosen], self.device), self.labels[chosen].to(self.device)))
            yield out

    def run(self, method: str, rho: float, seed: int, batch: int, model: ResNet) -> dict[str, Any]:
        """A row of a method: changes of both losses, and of HAMU hardness and certificates of its steps."""
        s, (name, down, keep) = self.size, METHODS[method]
        params = list(model.parameters())
        args = SimpleNamespace(
            learning_rate=s.lr, seed=seed, stochastic_rounding=False, hamu_share=0.5, max_grad_norm=1.0, gru_ema=0.8, on_infeasible="error",
        )  # fmt: skip
        # What has no rule of its own keeps its gradients apart all the same: they are clipped one by one.
        update = Separate() if name == "sum" else make_update(name, args)
        ours = update if isinstance(update, Hamu) else None
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(params, s.lr)
            if ours is None
            else ours.make_optimizer(list(model.named_parameters()), [None] * len(params), args)
        )
        forget, retain = self.sets(rho, seed)
        seen = [rows[: s.asked] for rows in (forget, retain[torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed))])]  # fmt: skip
        before = [self.measure(model, rows) for rows in seen]
        start, records, checked = time.perf_counter(), [], []
        for step, parts in enumerate(self.batches(forget, retain, seed, batch)):
            losses = []
            for number, ((x, y), factor) in enumerate(zip(parts, (-down, keep))):
                if factor == 0:
                    continue
                with update.term(params, number):
                    loss = F.cross_entropy(model(x), y)
                    (factor * loss).backward()
                    if ours is None:
                        nn.utils.clip_grad_norm_(params, abs(factor))
                losses.append(float(loss.detach()))
            if name == "sum":
                gradients = list(update.buffers.values())  # type: ignore[attr-defined]
                update.buffers = {}  # type: ignore[attr-defined]
                for p, *grads in zip(params, *gradients):
                    p.grad = sum(grads[1:], grads[0])
            else:
                update.combine(params, [None] * len(params))
            optimizer.step()
            optimizer.zero_grad()
            if ours is None:
                continue
            certificate = ours.optimizer.certificate  # type: ignore[union-attr]
            records.append(certificate)
            if step % s.check == 0:
                with torch.no_grad():
                    change = [float(F.cross_entropy(model(x), y)) - a for (x, y), a in zip(parts, losses)]
                checked.append(certificate.holds(change[0], change[1:]))
        seconds = time.perf_counter() - start
        after = [self.measure(model, rows) for rows in seen]
        row: dict[str, Any] = {
            "method": method, "rho": rho, "seed": seed, "batch": batch, "forget loss": before[0][0], "retain loss": before[1][0],
            "forget change": after[0][0] - before[0][0], "retain change": after[1][0] - before[1][0],
            "forget accuracy": after[0][1], "retain accuracy": after[1][1],
        }  # fmt: skip
        if records:
            row["hardness"] = sum(r.kappa for r in records) / len(records)
            row["hardness, share"] = sum(r.hardness for r in records) / len(records)
            row |= {"flagged": sum(r.flagged for r in records), "held": sum(checked), "checked": len(checked)}
            row["kappa"] = [float(f"{r.kappa:.4g}") for r in records]
        return row | {"seconds": seconds}


def plan(size: Size, seeds: Sequence[int]) -> list[tuple[str, float, int, int]]:
    """(method, rho, seed, images of a batch) of every run: seed by seed, so that a study that ends early has whole seeds."""
    out = []
    for seed in seeds:
        out += [(method, rho, seed, size.rows) for rho in RHOS for method in OURS]
        out += [(method, COMPARED, seed, batch) for batch in (size.rows, size.large) if batch for method in METHODS]
    return out


def run(study: Study, seeds: Sequence[int], out: Path) -> dict[str, Any] | None:
    """Every run that the file does not hold yet; None: time was over before the first one.

    Raises:
        ValueError: the file is of another size.
    """
    result = json.loads(out.read_text()) if out.is_file() else {"rows": []}
    facts = machine.meta(study.device)
    settings = asdict(study.size)
    if result.get("meta", {}).get("settings", settings) != settings:
        raise ValueError(f"out: {out} is of other settings; move it away")
    model = study.classifier()
    if model is None:
        return None
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result["meta"] = {
        "model": f"ResNet-{6 * study.size.blocks + 2}, {study.size.images:,} images of {study.size.pixels} x {study.size.pixels}",
        "forget": CLASSES[FORGET], "machine": facts["device"], "threads": facts["threads"], "torch": facts["torch"], "commit": facts["commit"],
        "date": facts["date"], "settings": settings,
    }  # fmt: skip
    result["meta"]["accuracy, test"] = study.measure(model, torch.arange(len(study.test[1])), test=True)[1]
    there = {(row["method"], row["rho"], row["seed"], row["batch"]) for row in result["rows"]}
    for method, rho, seed, batch in plan(study.size, seeds):
        if (method, rho, seed, batch) in there:
            continue
        if study.late():
            break
        model.load_state_dict(start)
        row = study.run(method, rho, seed, batch, model)
        made = {"commit": facts["commit"], "machine": facts["device"], "date": facts["date"]}
        result["rows"].append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} | made)
        result["summary"] = summary(result["rows"])
        write_json(out, result)
        shown = ", ".join(f"{k} {row[k]:.4g}" for k in ("forget change", "retain change", "hardness") if k in row)
        print(f"{method}, rho {rho:g}, seed {seed}, {batch} images: {shown}, {row['seconds']:.1f} s", flush=True)
    return result


def result_file(size: str) -> Path:
    return RESULTS / "quality" / ("hamu_images.json" if size == "cpu" else f"hamu_images_{size}.json")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cifar_hamu", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("what", nargs="?", choices=("run", "plot"), default="run")
    parser.add_argument("--size", choices=tuple(SIZES), default="paper" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path("out/cifar_hamu"), help="images and the classifier")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10; default: FASTUNLEARN_DATA, else the hub")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/quality/hamu_images[_<size>].json")
    args = parser.parse_args(argv)
    out = args.out or result_file(args.size)
    try:
        if args.what == "plot":
            plot(json.loads(out.read_text()), out.with_suffix(".svg"))
            return 0
        until = time.monotonic() + 60 * args.minutes
        result = run(Study(args.size, args.work, args.device, data=args.data, until=until), args.seeds, out)
    except (ValueError, FileNotFoundError, ImportError) as error:
        parser.exit(2, f"python -m benchmarks.cifar_hamu: {error}\n")
    left = len(plan(SIZES[args.size], args.seeds)) - len(result["rows"] if result else ())
    print(f"{left} runs are left; run it again" if left > 0 else f"done -> {out}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
