"""One training of an ICO concept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .concept import ConceptPrompts, as_lora, hold_start, key_value_weights
from .concept_files import Concept
from .concept_words import Scheme
from .copies import loaded, with_gradients
from .denoising import Denoiser
from .loop import Group, Training, compute_dtype
from .regularisation import Regularisation, regularised
from .residual import filled, shipped_templates
from .state import StateFile
from .text import TextEncoder

# Of the sentences that come with the pack every eighth, some thirty, say what prompts are like.
SENTENCES_STEP = 8
# AdamW's own, which the authors' code takes.
DECAY = 0.01


@dataclass(frozen=True)
class Settings:
    """How a concept is trained; the names are those of the node's inputs. With `held` the start token's keys and values
    are not trained."""

    noun: str
    scheme: Scheme
    steps: int
    batch_size: int = 2
    learning_rate: float = 2e-5
    word_learning_rate: float = 2e-4
    concept_learning_rate: float = 2e-5
    seed: int = 0
    precision: str = "auto"
    gradient_checkpointing: bool = True
    rank: int = 0
    held: bool = True


def train_concept(
    model: Any,
    clip: Any,
    latents: Tensor,
    settings: Settings,
    state: StateFile | None = None,
    others: Regularisation | None = None,
) -> Concept:
    """Trains a concept on `latents` (pictures, versions of each, channels, h, w), as the VAE gave them; with `others`
    half of each step's pictures are those. The given model and CLIP stay as they are."""
    with with_gradients():
        encoder = TextEncoder(clip)
        dtype = compute_dtype(settings.precision, model.load_device)
        denoiser = Denoiser(model, dtype, settings.gradient_checkpointing)
        with loaded(encoder.patcher, denoiser.patcher):
            source = torch.Generator().manual_seed(settings.seed)
            prompts = ConceptPrompts(encoder, settings.noun, settings.scheme, len(latents), source)
            network = denoiser.patcher.model.diffusion_model
            if settings.held:
                hold_start(network)
            weights = key_value_weights(network)
            before = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
            words = {name: each for name, each in prompts.vectors.items() if name.startswith("concept.")}
            own = {name: each for name, each in prompts.vectors.items() if name not in words}
            training = Training(
                [
                    Group(weights, settings.learning_rate),
                    Group(words, settings.concept_learning_rate),
                    *([Group(own, settings.word_learning_rate)] if own else []),
                ],
                device=denoiser.device,
                dtype=dtype,
                seed=settings.seed,
                state=state,
                decay=DECAY,
            )
            shots = Shots(denoiser, encoder, prompts, latents.clone(), others)
            losses = training.run(settings.steps, lambda generator: shots.loss(settings.batch_size, generator))
            sentences = [filled(line, settings.noun) for line in shipped_templates()[::SENTENCES_STEP]]
            spread = prompts.spread(encoder, sentences)
            return Concept(prompts.embedding(), as_lora(before, weights, spread, settings.rank), losses)


class Shots:
    """What a training sees: the concept's pictures, each with its prompt of Eq. 2, and beside them others, with
    captions in which nothing learns."""

    def __init__(
        self,
        denoiser: Denoiser,
        encoder: TextEncoder,
        prompts: ConceptPrompts,
        latents: Tensor,
        others: Regularisation | None,
    ) -> None:
        self.denoiser, self.encoder, self.prompts, self.latents, self.others = denoiser, encoder, prompts, latents, None
        if others is not None:
            self.others = (others.latents.clone(), *others.encoded(encoder))

    def loss(self, batch: int, generator: torch.Generator) -> Tensor:
        """Eq. 1 for so many pictures, drawn evenly; with others, half of them are those."""
        other = regularised(batch, generator) if self.others is not None else 0
        parts = []
        if other < batch:
            numbers, versions = _drawn(self.latents, batch - other, generator)
            parts.append((self.latents[numbers, versions], *self.prompts.encode(self.encoder, numbers.tolist())))
        if other and self.others is not None:
            latents, contexts, pooled = self.others
            numbers, versions = _drawn(latents, other, generator)
            rows = numbers.tolist()
            parts.append((latents[numbers, versions], contexts[rows], None if pooled is None else pooled[rows]))
        latents, contexts, pooled = (None if each[0] is None else torch.cat(each) for each in zip(*parts, strict=True))
        return self.denoiser.loss(latents, contexts, pooled, generator)


def _drawn(latents: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of pictures, and of a version of each."""
    numbers = torch.randint(len(latents), (count,), generator=generator)
    return numbers, torch.randint(latents.shape[1], (count,), generator=generator)
