"""An emblem learnt as an ICO concept from a few views of it, as a study's personalised model, and what comes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .emblems import NOUN, alike, places
from .given import Given, share

if TYPE_CHECKING:
    from torch import Tensor

# Of an emblem, and of each view for a training.
VIEWS, VERSIONS = 4, 8


@dataclass(frozen=True)
class Score:
    """One picture: its emblem's identity with the concept's views (cosine), whether an emblem and the prompt's
    background were found, and the emblem's centre in pixels, if any."""

    identity: float
    emblem: bool
    background: bool
    centre: tuple[float, float] | None


@dataclass(frozen=True)
class Pictured:
    """An emblem of the toy's scenes, views of it (n, 128, 128, 3), and the mean of their identities (96)."""

    emblem: Any
    views: Tensor
    identity: Tensor

    @classmethod
    def sampled(cls, judge: Any, rng: Any) -> Pictured:
        """A random emblem on plain backgrounds of other colours than its own plate."""
        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import sample_emblem, view

        emblem = sample_emblem(rng)
        return cls.drawn(judge, emblem, [draw(view(emblem, rng, ground)) for ground in plain_grounds(emblem)])

    @classmethod
    def drawn(cls, judge: Any, emblem: Any, scenes: Sequence[Any]) -> Pictured:
        """An emblem in drawn scenes, of each of which it is the first thing."""
        import torch

        views = torch.stack([torch.from_numpy(each.image) for each in scenes]).float() / 255
        boxes = torch.cat([torch.from_numpy(each.boxes[:1]) for each in scenes]).float()
        return cls(emblem, views, torch.nn.functional.normalize(judge.identity(views, boxes).mean(0), dim=0))

    def latents(self, vae: Any, seed: int, mirrored: bool = False) -> Tensor:
        """What Train ICO Concept learns from, by its defaults for the toy: latents of versions of each view, and then,
        where asked for, of the mirrored ones."""
        import torch
        from subject_patches.toy.family import LATENT_CHANNELS
        from subject_patches.training.images import varied, version_latents

        source = torch.Generator().manual_seed(seed)
        versions = [varied(each[None], VERSIONS, 0.75, 0.02, source) for each in self.views]
        return version_latents(vae, versions, LATENT_CHANNELS, mirrored)


@dataclass(frozen=True)
class Concept(Pictured):
    """An emblem with the MODEL that knows it, and its words in a prompt."""

    model: Any
    words: str

    def scores(self, judge: Any, images: Tensor, grounds: Sequence[Any]) -> list[Score]:
        """A score for each picture (n, 128, 128, 3), whose prompts name these backgrounds."""
        readings = judge.findings(images)
        boxes, seen = places(readings)
        likeness = alike(judge, images, boxes, self.identity[None])[:, 0].tolist()
        scores = []
        for identity, found, box, reading, ground in zip(likeness, seen, boxes, readings, grounds, strict=True):
            centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) if found else None
            scores.append(Score(identity, found, reading.background == ground.kind, centre))
        return scores


def plain_grounds(emblem: Any) -> list[Any]:
    """As many plain backgrounds as there are views, of other colours than the emblem's plate."""
    from subject_patches.toy.scenes import Background

    colours = [each for each in ("white", "gray", "yellow", "cyan", "pink") if each != emblem.plate_colour]
    return [Background("plain", (colour,)) for colour in colours[:VIEWS]]


def followed(scores: Sequence[Score]) -> str:
    """How often prompts are followed: in their emblem, their background, both."""
    parts = ([s.emblem for s in scores], [s.background for s in scores], [s.emblem and s.background for s in scores])
    return " | ".join(share(part) for part in parts)


def spread(groups: Sequence[Sequence[Score]]) -> str:
    """How far a concept's centres lie apart from prompt to prompt: their variance over x and y as a share of the
    picture's side squared, the mean over the groups, one a concept, with its standard error."""
    import numpy as np

    found = np.array([each for each in map(variance, groups) if each is not None])
    if len(found) < 2:
        return "too few found"
    return f"{found.mean():.4f} ± {found.std(ddof=1) / len(found) ** 0.5:.4f}"


def variance(group: Sequence[Score]) -> float | None:
    """The same of one concept; None where fewer than two emblems are found."""
    import numpy as np

    centres = np.array([score.centre for score in group if score.centre is not None])
    return float(centres.var(0, ddof=1).mean() / 128**2) if len(centres) > 1 else None


@contextmanager
def workplace(clip: Any) -> Iterator[Path]:
    """An empty folder, as long as it lasts, in which a CLIP looks for `embedding:name` and trainings keep their
    states."""
    import folder_paths

    tokenizer, output = clip.tokenizer.clip_l, folder_paths.get_output_directory()
    before = tokenizer.embedding_directory
    with TemporaryDirectory() as folder:
        tokenizer.embedding_directory = folder
        folder_paths.set_output_directory(folder)
        try:
            yield Path(folder)
        finally:
            tokenizer.embedding_directory = before
            folder_paths.set_output_directory(output)


def training_settings(
    toy: Any, preset: str, steps: int, rates: tuple[float, float], seed: int = 0, **settings: Any
) -> Any:
    """The settings of a training as the node has them for the toy; `rates` are those of the projections and of all
    words, `settings` others than the usual."""
    from dataclasses import replace

    from subject_patches.training.concept_run import Settings
    from subject_patches.training.concept_words import SCHEMES
    from subject_patches.training.usual import usual_words

    usual = usual_words(toy.model)
    scheme = replace(SCHEMES[preset], template=usual.template, rare=usual.rare)
    given = {"scheme": scheme, "held": usual.held, "learning_rate": rates[0], "word_learning_rate": rates[1]}
    given |= {"concept_learning_rate": rates[1], "gradient_checkpointing": False}
    return Settings(noun=NOUN, steps=steps, seed=seed, **{**given, **settings})


def learnt(given: Given, number: int, folder: Path, steps: int, rates: tuple[float, float]) -> Concept:
    """Trains emblem `number` with Train ICO Concept's plain preset."""
    import numpy as np

    pictured = Pictured.sampled(given.judge, np.random.default_rng((2**44, number)))
    return learnt_of(given, pictured, number, folder, steps, rates)


def learnt_of(
    given: Given, pictured: Pictured, number: int, folder: Path, steps: int, rates: tuple[float, float]
) -> Concept:
    """The same of these views, with the seed `number`. A training goes on from the shorter one in the same
    workplace."""
    from subject_patches.training.state import StateFile

    toy, settings, name = given.toy, training_settings(given.toy, "plain", steps, rates, number), f"study {number}"
    concept = kept_or_trained(given, pictured.latents(toy.vae, number), settings, StateFile(name, {"training": name}))
    model = in_use(toy.model, concept, folder / f"study_{number}.safetensors")
    return Concept(pictured.emblem, pictured.views, pictured.identity, model, f"embedding:study_{number} {NOUN}")


def kept_or_trained(given: Given, latents: Tensor, settings: Any, state: Any = None, others: Any = None) -> Any:
    """What `train_concept` makes of these latents with the toy; where the run keeps concepts, one of the same training
    that an earlier study or run has kept."""
    from safetensors.torch import load_file
    from subject_patches.training.concept_files import Concept as Trained
    from subject_patches.training.concept_run import train_concept
    from subject_patches.training.files import save_whole

    parts = ("embedding", "difference")
    file = given.kept and given.kept / f"{_key(latents, settings, others)}.safetensors"
    if file and file.exists():
        found: dict[str, dict[str, Any]] = {part: {} for part in parts}
        for name, tensor in load_file(file).items():
            part, own = name.split(":", 1)
            found[part][own] = tensor
        return Trained(found["embedding"], found["difference"], {"loss": []})
    concept = train_concept(given.toy.model, given.toy.clip, latents, settings, state, others)
    if file:
        save_whole(file, {f"{part}:{name}": each for part in parts for name, each in getattr(concept, part).items()})
    return concept


def _key(latents: Tensor, settings: Any, others: Any) -> str:
    """Stands for all that a training of the toy depends on but its code: weights, pictures and settings."""
    from subject_patches.toy.sampling import CHECKPOINT

    key = hashlib.sha256(CHECKPOINT.read_bytes())
    key.update(repr((settings, others and others.captions)).encode())
    for each in (latents, *([others.latents] if others else [])):
        key.update(each.contiguous().numpy().tobytes())
    return key.hexdigest()[:24]


def in_use(model: Any, concept: Any, file: Path) -> Any:
    """The MODEL with a trained concept's difference; its words are saved, to be written as `embedding:name`."""
    import comfy.sd
    from safetensors.torch import save_file

    save_file(dict(concept.embedding), file)
    return comfy.sd.load_lora_for_models(model, None, dict(concept.difference), 1.0, 0.0)[0]
