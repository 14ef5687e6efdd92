"""A training of modules on one process or many (accelerate): precision, accumulation, average, saves, going on.

Processes share gradients by one sum a step; what a process draws depends on the seed, the step and its rank alone. So a
training that was stopped goes on, on as many processes, to exactly what it would have become. Another rate
holds from there on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .averages import Average, shared
from .copies import loaded, with_gradients
from .files import load_state, save_state
from .frozen import Frozen
from .samples import Batches, Folder, Raw, Shards, loader

STATE = "state.pt"


class Kind(Protocol):
    """What is trained: its `modules` beside what is `frozen`, on which data, and the files that come of it. `decode`
    makes a sample of its files, `settings` says by name what a command chose that the result depends on."""

    name: str
    decode: Callable[[Raw, int, str], Any]
    settings: Mapping[str, Any]
    frozen: Frozen
    modules: nn.Module

    def groups_of_parameters(self, rate: float) -> list[dict[str, Any]]:
        """For an optimiser: all learn alike."""
        return [{"params": list(self.modules.parameters()), "lr": rate}]

    def loss(self, samples: Sequence[Any], generator: torch.Generator) -> Tensor: ...

    def write(self, modules: Any, folder: Path) -> Sequence[Path]: ...


@dataclass(frozen=True)
class Plan:
    """`steps` in all, each of `batch` samples on every process, `accumulation` times; the side of pictures in pixels;
    `save_every` is in steps, `average` the moving average's decay."""

    folder: Path
    steps: int
    batch: int
    size: int
    rate: float
    accumulation: int = 1
    average: float = 0.9999
    save_every: int = 500
    seed: int = 0
    workers: int = 0


class Accelerated:
    """One training of a `kind`; the same call goes on with one that has a state in its folder."""

    def __init__(self, kind: Kind, source: Folder | Shards, plan: Plan, accelerator: Any) -> None:
        self.kind, self.source, self.plan, self.accelerator = kind, source, plan, accelerator
        kind.modules.to(kind.frozen.device, torch.float32)
        self.optimiser = torch.optim.AdamW(kind.groups_of_parameters(plan.rate), plan.rate, weight_decay=1e-2)
        self.average = Average(kind.modules, plan.average)
        self.step, self.losses = 0, []
        state = load_state(plan.folder / STATE, kind.frozen.device)
        if state is not None:
            self._resume(state)

    def _parts(self) -> dict[str, Any]:
        return {"modules": self.kind.modules, "average": self.average.module, "optimiser": self.optimiser}

    def _about(self) -> dict[str, Any]:
        plan = self.plan
        about = {"kind": self.kind.name, "batch": plan.batch, "accumulation": plan.accumulation, "seed": plan.seed}
        about |= {"size": plan.size, "average": plan.average, "processes": self.accelerator.num_processes}
        return {**about, **self.kind.settings, **self.kind.frozen.fingerprints}

    def _resume(self, state: dict[str, Any]) -> None:
        missing = {"about", "step", "losses", *self._parts()} - state.keys()
        if missing:
            raise ValueError(
                f"{self.plan.folder / STATE} is no state of a training, it lacks {', '.join(sorted(missing))}; take "
                "another folder, or delete it to begin anew."
            )
        for name, value in self._about().items():
            if state["about"].get(name) != value:
                raise ValueError(
                    f"The training in {self.plan.folder} was begun with {name} {state['about'].get(name)}, now it is "
                    f"{value}; take the same, or another folder."
                )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.losses = state["step"], list(state["losses"])
        self._take_rate()

    def _take_rate(self) -> None:
        """Takes the plan's rate in the place of the one that the training had before."""
        groups, plan = self.optimiser.param_groups, self.plan
        before = groups[0]["lr"]
        for group, own in zip(groups, self.kind.groups_of_parameters(plan.rate), strict=True):
            group["lr"] = own["lr"]
        if before != plan.rate and self.accelerator.is_main_process:
            print(f"from step {self.step + 1} on the rate is {plan.rate:g}, before it was {before:g}", flush=True)

    def run(self) -> list[float]:
        """Trains up to the plan's steps; gives the loss of every step, those of earlier runs too. Writes the state and
        the files as the plan says, and at the end."""
        plan, main = self.plan, self.accelerator.is_main_process
        with with_gradients(), loaded(*self.kind.frozen.patchers):
            start = self.step * plan.accumulation
            data = Batches(
                self.source, plan.size, plan.batch, plan.seed, self.accelerator.process_index,
                self.accelerator.num_processes, start, self.kind.decode,
            )  # fmt: skip
            batches = loader(data, plan.workers)
            said = time.monotonic()
            while self.step < plan.steps:
                self.losses.append(self._advance(batches))
                self.step += 1
                over = self.step == plan.steps
                if main and (over or time.monotonic() - said > 10):
                    print(f"step {self.step} of {plan.steps}, loss {self.losses[-1]:.4f}", flush=True)
                    said = time.monotonic()
                if main and (over or self.step % plan.save_every == 0):
                    self.save()
        self.accelerator.wait_for_everyone()
        return self.losses

    def _advance(self, batches: Iterator[list[Any]]) -> float:
        plan, mean = self.plan, 0.0
        for part in range(plan.accumulation):
            number = self.step * plan.accumulation + part
            place = number * self.accelerator.num_processes + self.accelerator.process_index
            generator = torch.Generator().manual_seed((plan.seed * 2**40 + place) % 2**63)
            with self.accelerator.autocast():
                loss = self.kind.loss(next(batches), generator) / plan.accumulation
            self.accelerator.backward(loss)
            mean += float(loss.detach())
        mean = self._shared(mean)
        if not torch.isfinite(torch.tensor(mean)):
            raise ValueError(f"The loss is {mean} at step {self.step + 1}; lower the rate, or train in bf16 or fp32.")
        torch.nn.utils.clip_grad_norm_(self.kind.modules.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.kind.modules, self.step)
        return mean

    def _shared(self, number: float) -> float:
        """Makes the gradients the processes' mean, and gives the mean of their `number`s."""
        if self.accelerator.num_processes == 1:
            return number
        gradients = []
        for parameter in filter(lambda each: each.requires_grad, self.kind.modules.parameters()):
            # A part that no row of a process used has a gradient of zero there.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(parameter.grad)
        return shared(gradients, number, lambda flat: self.accelerator.reduce(flat, "mean"))

    def save(self) -> None:
        """Writes what a later call goes on from, and the files of the averaged modules."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        about = {"about": self._about(), "step": self.step, "losses": self.losses}
        save_state(self.plan.folder / STATE, {**state, **about})
        for path in self.kind.write(self.average.module, self.plan.folder):
            print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", flush=True)
