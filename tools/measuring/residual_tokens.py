"""Residual tokens: is a learned emblem in the picture, alone and beside others, and is the prompt still followed?"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .given import Given, centred, drawn_boxes, paired, share

if TYPE_CHECKING:
    from torch import Tensor

EMBLEMS, VIEWS = 4, 4
# What the node is given: the toy's encoder is small, and learns at rates that would break one of CLIP's size. The loss
# is that of v, as in the toy's own training: of its noise, the strongest teaches next to nothing.
TRAININGS: dict[str, dict[str, Any]] = {
    "residual alone": {"steps": 150, "learning_rate": 0.05, "batch_size": 4, "preservation": 0.1, "loss": "v"},
    "text encoder": {"steps": 150, "learning_rate": 0.001, "batch_size": 4, "preservation": 0.1, "loss": "v"},
}
PLAIN = "the plain noun"
# What a picture is made with: what was tuned, and the strength at which its residual is applied.
APPLIED: dict[str, tuple[str, float]] = {
    "residual alone": ("residual alone", 1.0),
    "residual alone, strength 0.5": ("residual alone", 0.5),
    "text encoder": ("text encoder", 1.0),
    "text encoder, strength 0.5": ("text encoder", 0.5),
}
# Each makes a phrase of its own, and says nothing of an emblem.
ORDINALS = ("first", "second", "third", "fourth")
SIDE = 128
BOXES = {
    2: ((6, 34, 62, 94), (66, 34, 122, 94)),
    4: ((6, 6, 61, 61), (67, 6, 122, 61), (6, 67, 61, 122), (67, 67, 122, 122)),
}


@dataclass(frozen=True)
class Score:
    """One place of a picture: how alike its emblem is to the one wanted there, whether an emblem is there at all,
    whether it is more alike to that one than to the picture's others, and whether the picture's background is right."""

    identity: float
    emblem: bool
    right_one: bool
    background: bool


@dataclass(frozen=True)
class Learned:
    """One emblem: the mean of its views' identities (96), and by what was tuned its residual tokens and the seconds of
    their training."""

    identity: Tensor
    residuals: dict[str, Any]
    seconds: dict[str, float]


def study(given: Given) -> None:
    """Trains the emblems on a server and prints a table for each number of them in a picture."""
    emblems = _train_all(given)
    for tunes, inputs in TRAININGS.items():
        seconds = sum(emblem.seconds[tunes] for emblem in emblems)
        print(
            f"{EMBLEMS} emblems of {VIEWS} views each, {tunes} tuned, {inputs['steps']} steps of batch "
            f"{inputs['batch_size']} at a learning rate of {inputs['learning_rate']:g}: {seconds / EMBLEMS:.0f} s "
            f"each, {EMBLEMS * inputs['steps'] / seconds:.1f} steps a second.\n"
        )
    for things, cases in ((1, given.count // 5), (2, given.count // 10), (4, given.count // 5)):
        scores: dict[str, list[Score]] = {name: [] for name in (PLAIN, *APPLIED)}
        groups = list(itertools.combinations(emblems, things))
        for number in range(max(cases, 1)):
            case = Case(given, things, number)
            for name in scores:
                for group in groups:
                    scores[name] += case.scores(group, name)
            print(f"{things} of the emblems: {number + 1} of {cases}", file=sys.stderr, flush=True)
        where = "Each alone" if things == 1 else f"{things} in their boxes of a layout"
        print(f"{where}, {max(cases, 1) * len(groups)} pictures:\n")
        _table(scores, several=things > 1)


def _train_all(given: Given) -> list[Learned]:
    from hosting.server import Server

    with Server(given.host) as server:
        learned = []
        for number in range(EMBLEMS):
            learned.append(_train(given, server, number))
            print(f"emblem {number + 1} of {EMBLEMS}: {learned[-1].seconds}", file=sys.stderr, flush=True)
        return learned


def _train(given: Given, server: Any, number: int) -> Learned:
    import numpy as np
    import torch
    from PIL import Image
    from subject_patches.toy.drawing import draw
    from subject_patches.toy.scenes import describe_background, sample_emblem, view

    rng = np.random.default_rng((2**44, number))
    emblem = sample_emblem(rng)
    drawn = [draw(view(emblem, rng)) for _ in range(VIEWS)]
    images, vectors = {}, []
    for index, each in enumerate(drawn):
        name = f"emblem_{number}_{index}.png"
        Image.fromarray(each.image).save(server.base / "input" / name)
        images[str(10 + index)] = {"class_type": "LoadImage", "inputs": {"image": name}}
        picture = torch.from_numpy(each.image).float()[None] / 255
        vectors.append(given.judge.identity(picture, torch.from_numpy(each.boxes[:1]).float()))
    captions = [f"an {{}} {describe_background(each.scene.background)}" for each in drawn]
    learned = Learned(torch.nn.functional.normalize(torch.cat(vectors).mean(0), dim=0), {}, {})
    for tunes in TRAININGS:
        prompt = _workflow(images, captions, tunes, f"emblem_{number}")
        learned.residuals[tunes], learned.seconds[tunes] = _trained(server, prompt)
    return learned


def _trained(server: Any, prompt: dict[str, Any]) -> tuple[Any, float]:
    """The residual token that a workflow saves, and how many seconds its steps took."""
    from subject_patches.nodes.model_files import RESIDUAL_TOKENS
    from subject_patches.nodes.residual import read_residual_token

    # Loading the models is no part of a training's time.
    started: list[float] = []

    def begun(step: Any) -> None:
        if step.node_id == "3" and step.done and not started:
            started.append(time.monotonic())

    outputs = server.queue(prompt, progress=begun, seconds=3600)
    seconds = time.monotonic() - started[0]
    (file,) = outputs["4"]["text"]
    return read_residual_token(Path(server.base) / "models" / RESIDUAL_TOKENS.name / file), seconds


def _workflow(images: dict[str, Any], captions: Sequence[str], tunes: str, name: str) -> dict[str, Any]:
    batch = {f"images.image{index}": [node, 0] for index, node in enumerate(images)}
    training = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "noun": "emblem", "size": SIDE,
        "captions": "\n".join(captions), "more_templates": "", "seed": 0, "precision": "fp32",
        "gradient_checkpointing": False, "resume_name": "", "tunes": tunes, **TRAININGS[tunes],
    }  # fmt: skip
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "subject-patches-toy.safetensors"}},
        **images,
        "2": {"class_type": "BatchImagesNode", "inputs": batch},
        "3": {"class_type": "SubjectPatchesTrainResidualToken", "inputs": training},
        "4": {
            "class_type": "SubjectPatchesSaveResidualToken",
            "inputs": {"residual": ["3", 0], "filename_prefix": name},
        },
    }


class Case:
    """One prompt and seed, with its layout where there are several emblems."""

    def __init__(self, given: Given, things: int, number: int) -> None:
        import numpy as np
        from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
        from subject_patches.nodes.layout import LayoutBiasNode, LayoutNode
        from subject_patches.toy.scenes import describe_background, sample_background

        from .layout import DEFAULTS

        self.given, self.seed, self.model = given, number, None
        self.boxes: Sequence[Sequence[int]] = BOXES.get(things, ((0, 0, SIDE, SIDE),))
        self.background = sample_background(np.random.default_rng((2**45, number)))
        ground = describe_background(self.background)
        self.phrases = ["emblem"] if things == 1 else [f"{ordinal} emblem" for ordinal in ORDINALS[:things]]
        text = f"an emblem {ground}"
        if things > 1:
            text = f"{', '.join(f'a {phrase}' for phrase in self.phrases[:-1])} and a {self.phrases[-1]} {ground}"
            layout = LayoutNode.execute(SIDE, SIDE, "\n".join(self.phrases), boxes=drawn_boxes(self.boxes)).args[0]
            self.model = LayoutBiasNode.execute(given.toy.model, layout, **DEFAULTS).args[0]
        phrases = "\n".join(["emblem", *self.phrases])
        self.positive = EncodePromptWithSubjects.execute(given.toy.clip, text, phrases).args[0]
        self.plain: tuple[Tensor, Any] | None = None

    def scores(self, emblems: Sequence[Learned], name: str) -> list[Score]:
        """A score for each of these emblems in a picture with their residuals, or in the plain noun's, which is one
        for all emblems."""
        image, reading = self._picture(emblems, name)
        ground = reading.background == self.background.kind
        places = enumerate(self.boxes)
        return [_score(self.given, image, reading, emblems, index, box, ground) for index, box in places]

    def _picture(self, emblems: Sequence[Learned], name: str) -> tuple[Tensor, Any]:
        from subject_patches.nodes.residual import ApplyResidualTokens

        if name == PLAIN and self.plain is not None:
            return self.plain
        positive = self.positive
        for emblem, phrase in zip(emblems, self.phrases, strict=True) if name != PLAIN else ():
            tunes, strength = APPLIED[name]
            positive = ApplyResidualTokens.execute(positive, emblem.residuals[tunes], strength, phrase).args[0]
        image = self.given.picture(positive, self.seed, self.model)
        made = image, self.given.judge.findings(image)[0]
        if name == PLAIN:
            self.plain = made
        return made


def _score(
    given: Given, image: Tensor, reading: Any, emblems: Sequence[Learned], index: int, box: Sequence[int], ground: bool
) -> Score:
    import torch

    here = [f for f in reading.objects if centred(f.box, box)]
    found = [f for f in here if f.shape == "emblem"]
    # Where the judge sees no emblem, what it sees best stands in its place, or the whole box.
    best = (found or here)[:1]
    where = best[0].box if best else box
    vector = given.judge.identity(image, torch.tensor([where], dtype=torch.float32))[0]
    alike = [float(vector @ emblem.identity) for emblem in emblems]
    return Score(alike[index], bool(found), alike[index] == max(alike), ground)


def _table(scores: dict[str, list[Score]], several: bool) -> None:
    import numpy as np

    columns = {"emblem": "emblem found", "right_one": "the right one", "background": "background right"}
    if not several:
        del columns["right_one"]
    print(f"| | identity | rise, paired | {' | '.join(columns.values())} |\n{'|---' * (3 + len(columns))}|")
    identity = {name: [score.identity for score in rows] for name, rows in scores.items()}
    for name, rows in scores.items():
        shares = [share([getattr(score, field) for score in rows]) for field in columns]
        rise = paired(identity[PLAIN], identity[name])
        print(f"| {name} | {np.mean(identity[name]):.3f} | {rise} | {' | '.join(shares)} |")
    print()
