"""The steps of a training: precision, progress, cancel, loss map, resume."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor
from tqdm.auto import tqdm

from .state import StateFile

PRECISIONS = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# How many steps a crash of the machine can cost.
SAVE_EVERY = 500
LossMap = dict[str, list[float]]


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What a training computes in: one of PRECISIONS; "auto" is what the host prefers on the device, float32 on a
    CPU. Weights that are trained are float32 in any case."""
    chosen = PRECISIONS[precision]
    if chosen is not None:
        return chosen
    if comfy.model_management.should_use_bf16(device):
        return torch.bfloat16
    return torch.float16 if comfy.model_management.should_use_fp16(device) else torch.float32


@dataclass(frozen=True)
class Group:
    """Parameters by name, and their learning rate."""

    parameters: Mapping[str, Tensor]
    learning_rate: float


class Training:
    """Trains float32 parameters with AdamW, which without `decay` is Adam. With a state file it goes on where a
    training of that name stopped, and the result is that of one that never stopped.

    `device` and `dtype` are those of the computation, `seed` starts the generator, which is on the CPU and the only
    source of chance."""

    def __init__(
        self,
        groups: list[Group],
        *,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        state: StateFile | None = None,
        decay: float = 0.0,
    ) -> None:
        self.parameters = {name: each for group in groups for name, each in group.parameters.items()}
        options = [{"params": list(group.parameters.values()), "lr": group.learning_rate} for group in groups]
        # A step reaches few of a text encoder's millions of weights, and on a CPU Adam would take most of its time.
        fused = device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(options, weight_decay=decay, fused=fused)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.device, self.dtype, self.state = device, dtype, state
        self.generator = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        if state is not None:
            self._resume(state)
        # After the last step that is done, whatever one that is cancelled has drawn by then.
        self.drawn = self.generator.get_state()

    @property
    def step(self) -> int:
        """How many steps are done, those of earlier runs counted."""
        return len(self.losses)

    def run(self, steps: int, loss: Callable[[torch.Generator], Tensor]) -> LossMap:
        """Trains up to `steps` steps in all; gives the loss of each as the host's LOSS_MAP.

        `loss` computes one step's loss with gradients, in autocast, and draws from the generator alone. An interrupt
        ends the training at once; with a state file it can go on from there. Raises ValueError when the loss is no
        number any more."""
        if self.step > steps:
            raise ValueError(
                f"The training '{self.state.name}' has done {self.step} steps already, more than the {steps} asked "
                f"for; raise the steps, give this training another name, or delete {self.state.path}."
            )
        bar = comfy.utils.ProgressBar(steps)
        with tqdm(
            total=steps, initial=self.step, desc="Training", disable=not comfy.utils.PROGRESS_BAR_ENABLED
        ) as line:
            try:
                while self.step < steps:
                    comfy.model_management.throw_exception_if_processing_interrupted()
                    self.losses.append(self._advance(loss))
                    self.drawn = self.generator.get_state()
                    self._tell(bar, line, steps)
                    if self.state is not None and self.step % SAVE_EVERY == 0:
                        self._save(self.state)
            except comfy.model_management.InterruptProcessingException:
                if self.state is not None:
                    self._save(self.state)
                raise
            finally:
                self.optimizer.zero_grad(set_to_none=True)
        if self.state is not None:
            self._save(self.state)
        return {"loss": list(self.losses)}

    def _advance(self, loss: Callable[[torch.Generator], Tensor]) -> float:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            value = loss(self.generator)
        number = float(value.detach())
        if not math.isfinite(number):
            raise ValueError(
                f"The loss is {number} at step {self.step + 1}; lower the learning rate, or train in bf16 or fp32."
            )
        self.scaler.scale(value).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return number

    def _tell(self, bar: comfy.utils.ProgressBar, line: Any, steps: int) -> None:
        bar.update_absolute(self.step, steps)
        line.set_postfix(loss=f"{self.losses[-1]:.4f}", refresh=False)
        shown = line.update()
        server, running = getattr(PromptServer, "instance", None), get_executing_context()
        if not shown or server is None or running is None:
            return
        rate = line.format_dict["rate"]
        left = f", {line.format_interval((steps - self.step) / rate)} left" if rate else ""
        server.send_progress_text(f"step {self.step} of {steps}, loss {self.losses[-1]:.4f}{left}", running.node_id)

    def _save(self, state: StateFile) -> None:
        tensors = {"generator": self.drawn, "losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.parameters.items():
            tensors[f"parameter.{name}"] = parameter
            for part, value in self.optimizer.state[parameter].items():
                tensors[f"{part}.{name}"] = value
        state.save(tensors, self.scaler.state_dict())

    def _resume(self, state: StateFile) -> None:
        saved = state.load()
        if saved is None:
            return
        tensors, values = saved
        self.generator.set_state(tensors["generator"])
        self.losses = tensors["losses"].tolist()
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"parameter.{name}"])
            for part in ("step", "exp_avg", "exp_avg_sq"):
                if f"{part}.{name}" in tensors:
                    self.optimizer.state[parameter][part] = tensors[f"{part}.{name}"].to(parameter.device)
        if values:
            self.scaler.load_state_dict(values)
