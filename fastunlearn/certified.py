"""CertifiedTrainer: what HAMU's steps promise, held against the losses, on the step's own batches and on retain rows that are not of it.

A certificate speaks of changes of a loss by a millionth, which bf16 does not tell apart: a subclass says how its losses are taken
precisely (`measuring`). Several processes take the mean of theirs.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastunlearn._modes import evaluating
from fastunlearn.processes import anywhere, summed
from fastunlearn.sharded_trainer import ShardedTrainer
from fastunlearn.updates.hamu import CertificateLog, Hamu


class CertifiedTrainer(ShardedTrainer):
    """What `TwoTermTrainer` adds to its step where the update takes it and certifies it; nothing where it does not."""

    args: Any
    train_dataset: Any
    #: of the retain rows, where they are kept group by group
    group_names: Sequence[str] = ()
    # Of TwoTermTrainer: the terms of a batch, rows of the retain set as a batch has them, the term of such a batch.
    _parts: Any
    retain_batch: Any
    retain_term: Any

    def start_certificates(self) -> None:
        """When the trainer is made."""
        self.certificates = CertificateLog(str(self.args.output_dir), write=self.is_world_process_zero())
        self._step_batches: list[dict[str, Any]] = []
        self._before: list[float] | None = None
        self._no_room = False

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Around the passes that take the losses before and after a step: nothing drops out."""
        with evaluating(self.model), self.compute_loss_context_manager():
            yield

    def note_batch(self, inputs: dict[str, Any]) -> None:
        """A batch of a step whose certificate will be checked."""
        every = self.args.certificate_every
        if self.update.takes_step and every and self.state.global_step % every == 0 and not self._no_room:
            self._step_batches.append(inputs)

    @torch.no_grad()
    def _losses(self) -> list[float] | None:
        """Terms of the step's own batches, with their factors: forget, the retain groups; then rows held out. None: no room."""
        sums: dict[int, Tensor] = {}
        counts: Counter[int] = Counter()
        held_out = self._held_out()
        try:
            with self.measuring():
                for inputs in self._step_batches:
                    for _, number, factor, term, part in self._parts(inputs):
                        value = term(self.model, part).detach().double() * factor
                        sums[number] = sums[number] + value if number in sums else value
                        counts[number] += 1
                if held_out is not None:
                    last = len(self.group_names) + 2
                    sums[last], counts[last] = self.retain_term(self.model, held_out).detach().double(), 1
        except torch.OutOfMemoryError:
            if self.sharded:
                # The others are in the middle of that pass, and wait: they are told by this process's end.
                raise
            self._no_room = True
        self.reshard()
        if anywhere(self._no_room, self.args.device):
            self._no_room = True
            warnings.warn(
                "certificate_every: there is no room to take the losses in fp32; no certificate is checked",
                stacklevel=2,
            )
            return None
        values = torch.stack([sums[number] / counts[number] for number in sorted(sums)])
        return self.accelerator.reduce(values, reduction="mean").tolist()

    def _held_out(self) -> dict[str, Any] | None:
        """A retain batch of which no process has a row in this step; None, in all of them, where there are no other rows."""
        used = torch.zeros(len(self.train_dataset.retain))
        for inputs in self._step_batches:
            used[inputs["retain"]["index"].cpu()] = 1
        others = (summed(used, self.args.device) == 0).nonzero()[:, 0]
        if not len(others):
            return None
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        order = others[torch.randperm(len(others), generator=generator)].tolist()
        size = max(1, self.args.per_device_train_batch_size)
        mine = order[self.args.process_index :: self.args.world_size][:size]
        return self.retain_batch(mine or order[:size])

    def _moves_exactly(self) -> bool:
        """Whether a failed check says that steps are too long: rounding at random fails the shorter ones more often."""
        return all(p.dtype == torch.float32 for p in self.model.parameters() if p.requires_grad)

    def before_step(self, *_: Any) -> None:
        self._before = self._losses() if self._step_batches else None

    def after_step(self, *_: Any) -> None:
        assert isinstance(self.update, Hamu)
        before, batches, step = self._before, self._step_batches, self.state.global_step + 1
        names = [self.group_names[k] for k in self.update.present] if self.group_names else ["retain"]
        certificate = self.update.after_step(step, names)
        if certificate is None:
            self._before, self._step_batches = None, []
            return
        record: dict[str, Any] = {"step": step, **certificate.to_dict(), "groups": names}
        record["binding"] = [names[k] for k in certificate.binding]
        after = self._losses() if before is not None and batches and certificate.taken else None
        if before is not None and after is not None:
            count = len(self.update.present)
            changes = [b - a for a, b in zip(before, after)]
            # A loss of descent on the forget term falls where it is forgotten.
            record["forget_change"], record["retain_change"] = -changes[0], changes[1 : 1 + count]
            record["holds"] = certificate.holds(record["forget_change"], record["retain_change"])
            record["unharmed"] = certificate.unharmed(record["retain_change"])
            record |= {"held_out_change": changes[-1]} if len(changes) > 1 + count else {}
            failed = not (record["holds"] or certificate.flagged)
            if failed and self.update.on_flag == "backtrack" and self._moves_exactly():
                self.update.optimizer.shrink()  # type: ignore[union-attr]
        self._before, self._step_batches = None, []
        self.certificates.add(record)
