"""ICO and dual-branch integration: a concept's identity and prompt following, along trainings and for several lambdas.

One emblem is trained with words of its pictures' own, by both presets, and with a fixed template, and sampled at
several lengths: the trade-off curve. From the longest training, dual-branch integration then samples the same prompts
and seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .given import Given, Shape, concept_tokens, paired, share

if TYPE_CHECKING:
    from torch import Tensor

# A row has a picture for so many cases.
SHARE_OF_CASES = 5
# Steps after which a training is sampled.
LENGTHS = (20, 40, 80, 160)
VIEWS = 4
RATES = {"learning_rate": 1e-2, "word_learning_rate": 5e-2}
NOUN, WORDS = "emblem", "embedding:study emblem"
NO_MASK = "lambda 1, no mask"
PLAIN = "the concept alone"
SETTINGS: dict[str, dict[str, Any]] = {
    "lambda -1": {"injection_strength": -1.0},
    "lambda 0": {"injection_strength": 0.0},
    "lambda 1": {},
    "lambda 2": {"injection_strength": 2.0},
    "lambda 1, 30 % of the steps": {"end_percent": 0.3},
    "lambda 1, fixed gain": {"gain_mode": "fixed"},
    NO_MASK: {},
    "lambda 1, last layer only": {"sites": "named"},
}
DEFAULTS = {"injection_strength": 1.0, "strength": 1.0, "end_percent": 0.15, "gain_mode": "by resolution"}


@dataclass(frozen=True)
class Score:
    """One picture: identity of its emblem with the training pictures' (cosine), whether an emblem was found, and
    whether the background is the prompt's."""

    identity: float
    emblem: bool
    background: bool


def study(given: Given) -> None:
    """Prints the trade-off curves of three trainings, and dual-branch integration of the longest ICO training."""
    import folder_paths

    count = max(given.count // SHARE_OF_CASES, 1)
    output = folder_paths.get_output_directory()
    with TemporaryDirectory() as folder:
        folder_paths.set_output_directory(folder)
        try:
            case = Case(given, count)
            curves = {
                f"{preset}, {steps} steps": case.scores(case.trained(preset, steps, Path(folder)))
                for preset in ("fixed template", "plain", "for dual-branch")
                for steps in LENGTHS
            }
            print(f"The trade-off along the training, {count} pictures each:\n")
            _table(curves, f"for dual-branch, {LENGTHS[-1]} steps")
            model = case.trained("for dual-branch", LENGTHS[-1], Path(folder))
            mixed = {PLAIN: curves[f"for dual-branch, {LENGTHS[-1]} steps"]}
            mixed |= {name: case.scores(model, name) for name in SETTINGS}
            print(f"\nDual-branch integration, from {LENGTHS[-1]} steps of training:\n")
            _table(mixed, PLAIN)
        finally:
            folder_paths.set_output_directory(output)


class Case:
    """One emblem's views, and the prompts and seeds to sample it with."""

    def __init__(self, given: Given, count: int) -> None:
        import numpy as np
        import torch
        from subject_patches.toy.drawing import draw
        from subject_patches.toy.scenes import (
            TEXTURED_BACKGROUNDS,
            Background,
            describe_background,
            sample_emblem,
            sample_scene,
            view,
        )
        from subject_patches.training.concept import varied
        from subject_patches.training.images import latents_of

        rng = np.random.default_rng((2**45, 0))
        emblem = sample_emblem(rng)
        colours = [c for c in ("white", "gray", "yellow", "cyan", "pink") if c != emblem.plate_colour]
        drawn = [draw(view(emblem, rng, Background("plain", (colour,)))) for colour in colours[:VIEWS]]
        pictures = [torch.from_numpy(each.image).float()[None] / 255 for each in drawn]
        boxes = [torch.from_numpy(each.boxes[:1]).float() for each in drawn]
        vectors = given.judge.identity(torch.cat(pictures), torch.cat(boxes))
        self.identity = torch.nn.functional.normalize(vectors.mean(0), dim=0)
        source = torch.Generator().manual_seed(0)
        versions = [varied(each, 8, 0.75, 0.02, source) for each in pictures]
        self.latents = torch.stack([latents_of(given.toy.vae, each) for each in versions])
        self.given, self.grounds = given, []
        while len(self.grounds) < count:
            ground = sample_scene(rng, 1, 0.0).background
            if ground.kind in TEXTURED_BACKGROUNDS:
                self.grounds.append((ground.kind, describe_background(ground)))

    def trained(self, preset: str, steps: int, folder: Path) -> Any:
        """The toy's MODEL with a concept of so many steps, which is in the prompts from then on. A training goes on
        from its shorter one."""
        import comfy.sd
        from safetensors.torch import save_file
        from subject_patches.training.concept import SCHEMES
        from subject_patches.training.concept_run import Settings, train_concept
        from subject_patches.training.state import StateFile

        toy, state = self.given.toy, StateFile(preset, {"preset": preset})
        settings = Settings(NOUN, SCHEMES[preset], steps, **RATES, gradient_checkpointing=False)
        concept = train_concept(toy.model, toy.clip, self.latents, settings, state)
        save_file(dict(concept.embedding), folder / "study.safetensors")
        self.folder = str(folder)
        return comfy.sd.load_lora_for_models(toy.model, None, dict(concept.difference), 1.0, 0.0)[0]

    def scores(self, model: Any, name: str | None = None) -> list[Score]:
        """A score for each prompt, with this setting of Dual-Branch Integration or without it."""
        from subject_patches.nodes.auxiliary_prompt import AuxiliaryPromptNode

        scores = []
        with _embeddings(self.given.toy.clip, self.folder):
            for number, (kind, words) in enumerate(self.grounds):
                text = f"an {WORDS} {words}"
                concept, auxiliary, _ = AuxiliaryPromptNode.execute(
                    self.given.toy.clip, text, WORDS, noun="red star"
                ).args
                used = model if name is None else _patched(model, concept, auxiliary, name)
                scores.append(self._score(self.given.picture(concept, number, used), kind))
        print(f"{name or PLAIN}: {len(scores)} pictures", file=sys.stderr, flush=True)
        return scores

    def _score(self, image: Tensor, ground: str) -> Score:
        import torch

        (reading,) = self.given.judge.findings(image)
        emblems = [f for f in reading.objects if f.shape == NOUN]
        # Where the judge sees no emblem, what it sees best stands in its place, or the whole picture.
        best = (emblems or list(reading.objects))[:1]
        box = best[0].box if best else (0, 0, image.shape[2], image.shape[1])
        vector = self.given.judge.identity(image, torch.tensor([box], dtype=torch.float32))
        return Score(float((vector * self.identity).sum()), bool(emblems), reading.background == ground)


def _patched(model: Any, concept: Any, auxiliary: Any, name: str) -> Any:
    from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
    from subject_patches.patches.dual_branch import DualBranchIntegration
    from subject_patches.patches.engine import KEY, add_edit
    from subject_patches.patches.sites import attention_sites

    given = {**DEFAULTS, **SETTINGS[name]}
    if given.get("sites") == "named":
        given["named_sites"] = str([site for site in attention_sites(model) if site.kind == "cross"][-1])
    patched = DualBranchIntegrationNode.execute(model, concept, auxiliary, **given).args[0]
    if name != NO_MASK:
        return patched

    class Unmasked(DualBranchIntegration):
        """The paper's Figure 10 without masks: both branches added, each by half so that the size stays."""

        def mix(self, concept: Tensor, auxiliary: Tensor, weight: Tensor) -> Tensor:
            return (concept + auxiliary) / 2

    edit = patched.model_options["transformer_options"][KEY][-1]
    return add_edit(model, Unmasked(**{f.name: getattr(edit, f.name) for f in fields(edit) if f.name[0] != "_"}))


@contextmanager
def _embeddings(clip: Any, folder: str) -> Iterator[None]:
    tokenizer = clip.tokenizer.clip_l
    before = tokenizer.embedding_directory
    tokenizer.embedding_directory = folder
    try:
        yield
    finally:
        tokenizer.embedding_directory = before


def _table(rows: dict[str, Sequence[Score]], base: str) -> None:
    import numpy as np

    print("| | identity | rise, paired | emblem found | background right |\n|---|---|---|---|---|")
    identity = {name: [s.identity for s in scores] for name, scores in rows.items()}
    for name, scores in rows.items():
        print(
            f"| {name} | {np.mean(identity[name]):.3f} | {paired(identity[base], identity[name])} "
            f"| {share([s.emblem for s in scores])} | {share([s.background for s in scores])} |"
        )


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's rows: the paper's window, with both kinds of guidance."""
    import torch
    from subject_patches.nodes.dual_branch import DualBranchIntegrationNode
    from subject_patches.patches.dual_branch import BRANCH_KEY, BranchTokens

    generator = torch.Generator().manual_seed(2)
    pooled = {"pooled_output": torch.randn(1, 1280, generator=generator)} if shape.name == "sdxl" else {}
    auxiliary = {**pooled, BRANCH_KEY: BranchTokens(((1, 7),), ((2, 3),))}

    def integrated(**settings: Any) -> Callable[[Any], Any]:
        def patch(model: Any) -> Any:
            prompt = torch.randn(1, 77, shape.width, generator=generator)
            given = {"injection_strength": 1.0, "strength": 1.0, "end_percent": 0.15, **settings}
            concept = [[prompt, {BRANCH_KEY: concept_tokens()}]]
            return DualBranchIntegrationNode.execute(model, concept, [[prompt, auxiliary]], **given).args[0]

        return patch

    return {
        "dual-branch integration, 15 % of the steps": integrated(),
        "dual-branch integration, 15 % of the steps, guidance of its own": integrated(guidance="own"),
    }
