"""What the toy's trainers share: a wall-clock schedule, progress, peers, and a run that can go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from subject_patches.training.averages import Average, shared
from subject_patches.training.files import load_state, save_state


class Clock:
    """A budget of minutes that is spent step by step and goes on where a resumed run stopped."""

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.budget = max(minutes * 60.0, 1.0)
        self.start = time.monotonic() - spent

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    @property
    def share(self) -> float:
        """Share of the budget that is spent, 0 to 1."""
        return min(self.spent / self.budget, 1.0)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return max(self.budget - self.spent, 0.0)


def learning_rate(peak: float, step: int, share: float, warmup: int = 200) -> float:
    """Linear warm-up over `warmup` steps, then a cosine over the budget down to 1% of `peak`."""
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def held_rate(peak: float, step: int, share: float, warmup: int = 200, fall: float = 0.25) -> float:
    """Linear warm-up, then `peak` until the last `fall` of the budget, which brings it down to 1%: a run that is given
    more minutes goes on at full rate."""
    return peak * min(1.0, (step + 1) / warmup) * max(0.01, min(1.0, (1 - share) / fall))


class Progress:
    """Prints a line every few seconds: the step, the loss averaged since the last line, speed and time left."""

    def __init__(self, name: str, every: float = 10.0) -> None:
        self.name, self.every = name, every
        self.last = time.monotonic()
        self.losses: list[torch.Tensor] = []
        self.samples = 0

    def step(self, number: int, loss: torch.Tensor, samples: int, left: float) -> None:
        """`left` is how many seconds there are to come."""
        self.losses.append(loss.detach())
        self.samples += samples
        now = time.monotonic()
        if now - self.last < self.every:
            return
        mean = float(torch.stack(self.losses).mean())
        rate = self.samples / (now - self.last)
        print(
            f"{self.name}: step {number}, loss {mean:.4f}, {rate:,.0f} samples/s, {left / 60:.1f} min left", flush=True
        )
        self.losses, self.samples, self.last = [], 0, now


class Peers:
    """The `count` processes that train one model together, each on batches of its own; they meet at a file.

    On a CPU, processes of one thread each bear other work beside them; threads of one process wait for one another
    at every operation."""

    def __init__(self, rank: int = 0, count: int = 1, meeting: Path | None = None) -> None:
        self.rank, self.count = rank, count
        if count > 1:
            distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count)

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            distributed.barrier()

    def average(self, module: torch.nn.Module, number: float) -> float:
        """Makes the module's gradients the peers' mean, and gives the mean of their `number`s."""
        if self.count == 1:
            return number

        def mean(flat: torch.Tensor) -> torch.Tensor:
            distributed.all_reduce(flat)
            return flat / self.count

        return shared([p.grad for p in module.parameters() if p.grad is not None], number, mean)


class Run:
    """One trainer's run: the model, its average, its optimiser, how far it is, and the file that lets it go on. With
    `steps` it takes so many, whatever time they need, and `minutes` says nothing."""

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        file: Path,
        minutes: float,
        rate: float,
        peers: Peers,
        warmup: int,
        decay: float,
        optimiser: Any = None,
        schedule: Callable[[float, int, float, int], float] = learning_rate,
        steps: int | None = None,
    ) -> None:
        self.name, self.model, self.file = name, model, file
        self.minutes, self.rate, self.warmup, self.steps = minutes, rate, warmup, steps
        self.peers = peers
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimiser = optimiser or torch.optim.AdamW(parameters, rate, (0.9, 0.99), weight_decay=1e-3)
        self.schedule = schedule
        self.average, self.step, self.clock = Average(model, decay), 0, Clock(minutes)
        self.progress, self.saved = Progress(name), 0.0

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "average": self.average.module, "optimiser": self.optimiser}

    def resume(self, device: torch.device) -> bool:
        """Goes on from the last save, if there is one."""
        state = load_state(self.file, device)
        if state is None:
            return False
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.clock, self.saved = state["step"], Clock(self.minutes, state["spent"]), state["spent"]
        self.progress = Progress(self.name)
        return True

    @property
    def share(self) -> float:
        """Share of the run that is over with the step at hand, 0 to 1."""
        return self.clock.share if self.steps is None else min((self.step + 1) / self.steps, 1.0)

    def save(self) -> None:
        """Writes what `resume` goes on from."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
        save_state(self.file, {**state, "step": self.step, "spent": self.clock.spent})
        self.saved = self.clock.spent

    def advance(self, loss: torch.Tensor, samples: int) -> bool:
        """One step down the gradient of `loss`, with the peers; saves every three minutes, and at the end. False when
        the run is over."""
        loss.backward()
        share = self.peers.average(self.model, self.share)
        for group in self.optimiser.param_groups:
            # A group may learn so many times as fast.
            group["lr"] = self.schedule(self.rate, self.step, share, self.warmup) * group.get("times", 1.0)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average.update(self.model, self.step)
        self.step += 1
        going = share < 1
        if self.peers.rank == 0:
            left = self.clock.left if self.steps is None else self.clock.spent * (1 - share) / share
            self.progress.step(self.step, loss, samples * self.peers.count, left)
            if not going or self.clock.spent - self.saved > 180:
                self.save()
        return going
