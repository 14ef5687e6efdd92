"""What the toy's trainings of what shows subjects share: its frozen parts, the loss, and the measure of what it does.

`subjects.py` and `anylogo.py` say how the U-Net predicts with what they train from pairs of one emblem, and what of it
rows are shown; `routing.py` trains the router, from scenes of several.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from .pairs import Batch
from .train_diffusion import alphas_cumprod, encode_text, noise_weights, noised

EMBLEM_WEIGHT = 6.0
# The timesteps of the measure, and what of it is of rows that see nothing of a reference.
LOGGED, BLOCKED = (500, 700), "blocked"


class Scenes(Protocol):
    """Of any batch: `latents` (n, 8, 16, 16) of scenes, and `tokens` (n, 77) of their captions."""

    latents: Tensor
    tokens: Tensor


class Lesson(ABC):
    """The toy's frozen parts, with a `vision` model and the tokens (1, 77) of the `empty` caption."""

    def __init__(self, model: Any, vision: nn.Module, empty: Tensor) -> None:
        self.unet, self.text, self.vision, self.empty = model.unet.eval(), model.text.text_model, vision, empty
        self.schedule = alphas_cumprod(torch.device("cpu"))

    @abstractmethod
    def loss(self, modules: Any, batch: Any) -> Tensor:
        """What a step goes down, of what is trained."""

    @abstractmethod
    def told(self, modules: Any, held_out: Any) -> str:
        """What the training's log says of it, measured in held-out rows."""

    def noised(self, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return noised(latents, noise, self.schedule[timestep])

    def contexts(self, batch: Scenes, apart: Tensor) -> Tensor:
        """The captions, encoded; of rows (n, bool) that are `apart` the empty one."""
        return encode_text(self.text, torch.where(apart[:, None], self.empty, batch.tokens))

    def called(self, noisy: Tensor, timestep: Tensor, context: Tensor, slots: Mapping[str, Any]) -> Tensor:
        """The U-Net's prediction with these in the host's slots for its attentions."""
        options = {"patches_replace": slots}
        return self.unet(noisy, timestep, context=context, transformer_options=options).float()

    def drawn_noise(self, batch: Scenes) -> tuple[Tensor, Tensor]:
        """For each row a timestep (n) and noise."""
        return torch.randint(len(self.schedule), (len(batch.latents),)), torch.randn_like(batch.latents)

    def weighed(self, guess: Tensor, noise: Tensor, timestep: Tensor, inside: Tensor) -> Tensor:
        """The square error of the noise, weighted as the toy's own training weights it, where emblems are, `inside` (n,
        1, 16, 16) of 0 and 1, and right beside them EMBLEM_WEIGHT times as much as on the ground."""
        places = 1 + (EMBLEM_WEIGHT - 1) * functional.max_pool2d(inside, 3, 1, 1)
        error = (places / places.mean() * (guess - noise).square()).mean((1, 2, 3))
        weights = noise_weights(self.schedule)
        return (weights[timestep] * error).mean() / weights.mean()


class PairLesson(Lesson):
    """A training from pairs of one emblem."""

    @abstractmethod
    def guess(self, modules: Any, batch: Batch, noisy: Tensor, timestep: Tensor) -> Tensor:
        """The U-Net's prediction of the noise with what is trained, each row shown what the training draws for it."""

    @abstractmethod
    def guesses(
        self, modules: Any, batch: Batch, noisy: Tensor, timestep: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Predictions by what rows are shown. The first is the one that the others are compared with; what is called
        BLOCKED is compared in the whole picture, the others in the emblem."""

    def loss(self, modules: Any, batch: Batch) -> Tensor:
        """The error of the noise; see `weighed`."""
        timestep, noise = self.drawn_noise(batch)
        guess = self.guess(modules, batch, self.noised(batch.latents, noise, timestep), timestep)
        return self.weighed(guess, noise, timestep, _inside(batch))

    def told(self, modules: Any, held_out: Batch) -> str:
        falls = self.falls(modules, held_out).items()
        return "error of the noise: " + ", ".join(f"{name} {share:+.1%}" for name, share in falls)

    @torch.no_grad()
    def falls(self, modules: Any, held_out: Batch) -> dict[str, float]:
        """By how much the error of the noise falls, of held-out rows under the same noise, as a share: -0.08 is 8 %
        less. At LOGGED timesteps, for each of `guesses`."""
        found, inside = {}, _inside(held_out)
        generator = torch.Generator().manual_seed(1)
        for at in LOGGED:
            noise = torch.randn(held_out.latents.shape, generator=generator)
            timestep = torch.full((len(held_out.latents),), at)
            noisy = self.noised(held_out.latents, noise, timestep)
            made = self.guesses(modules, held_out, noisy, timestep, generator)
            errors = {name: (guess - noise).square() for name, guess in made.items()}
            first, *others = errors
            for name in others:
                places = torch.ones_like(inside) if name == BLOCKED else inside
                after, before = (float((errors[each] * places).sum()) for each in (name, first))
                found[f"{name} at {at}"] = after / before - 1
        return found


def _inside(batch: Batch) -> Tensor:
    """Where the emblem is in the scenes (n, 1, 16, 16)."""
    return (batch.emblem[:, None] > 0.3).float()
