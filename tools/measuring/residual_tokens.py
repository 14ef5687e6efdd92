"""Residual tokens: is a learned emblem in the picture, alone and beside others, and is the prompt still followed?"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .given import Given, paired, share

if TYPE_CHECKING:
    from torch import Tensor

EMBLEMS, VIEWS = 4, 4
# What the node is given: the toy's encoder is small, and learns at rates that would break one of CLIP's size.
TRAINING: dict[str, Any] = {"steps": 300, "learning_rate": 0.003, "batch_size": 4, "preservation": 0.1}
PLAIN, LEARNED = "the plain noun", "the residual token"
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
    """One emblem: the mean of its views' identities (96), its residual token, and the seconds of its training."""

    identity: Tensor
    residual: Any
    seconds: float


def study(given: Given) -> None:
    """Trains the emblems on a server and prints a table for each number of them in a picture."""
    emblems = _train_all(given)
    seconds = sum(emblem.seconds for emblem in emblems)
    speed = EMBLEMS * TRAINING["steps"] / seconds
    print(
        f"{EMBLEMS} emblems of {VIEWS} views each, {TRAINING['steps']} steps of batch {TRAINING['batch_size']} at a "
        f"learning rate of {TRAINING['learning_rate']:g}: {seconds / EMBLEMS:.0f} s each, {speed:.1f} steps a second.\n"
    )
    for things, cases in ((1, given.count // 4), (2, given.count // 8), (4, given.count // 4)):
        scores: dict[str, list[Score]] = {PLAIN: [], LEARNED: []}
        groups = list(itertools.combinations(range(EMBLEMS), things))
        for number in range(max(cases, 1)):
            for group in groups:
                chosen = [emblems[index] for index in group]
                for name in scores:
                    scores[name] += _scores(given, chosen, number, learned=name == LEARNED)
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
            print(f"emblem {number + 1} of {EMBLEMS}: {learned[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        return learned


def _train(given: Given, server: Any, number: int) -> Learned:
    import numpy as np
    import torch
    from PIL import Image
    from subject_patches.nodes.residual import FOLDER, read_residual_token
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
    # Loading the models is no part of a training's time.
    started: list[float] = []

    def begun(step: Any) -> None:
        if step.node_id == "3" and step.done and not started:
            started.append(time.monotonic())

    captions = [f"an {{}} {describe_background(each.scene.background)}" for each in drawn]
    outputs = server.queue(_workflow(images, captions, f"emblem_{number}"), progress=begun, seconds=3600)
    seconds = time.monotonic() - started[0]
    (file,) = outputs["4"]["text"]
    identity = torch.nn.functional.normalize(torch.cat(vectors).mean(0), dim=0)
    return Learned(identity, read_residual_token(Path(server.base) / "models" / FOLDER / file), seconds)


def _workflow(images: dict[str, Any], captions: Sequence[str], name: str) -> dict[str, Any]:
    batch = {f"images.image{index}": [node, 0] for index, node in enumerate(images)}
    training = {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "images": ["2", 0], "noun": "emblem", "resolution": SIDE,
        "captions": "\n".join(captions), "more_templates": "", "seed": 0, "precision": "fp32",
        "gradient_checkpointing": False, "resume_name": "", **TRAINING,
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


def _scores(given: Given, emblems: Sequence[Learned], number: int, learned: bool) -> list[Score]:
    """The scores of one picture with these emblems in it, or with as many plain ones."""
    import numpy as np
    from subject_patches.nodes.encode_prompt import EncodePromptWithSubjects
    from subject_patches.nodes.layout import LayoutBiasNode, LayoutNode
    from subject_patches.nodes.residual import ApplyResidualTokens
    from subject_patches.toy.scenes import describe_background, sample_background

    from .layout import DEFAULTS

    background = sample_background(np.random.default_rng((2**45, number)))
    ground = describe_background(background)
    model, boxes = None, ((0, 0, SIDE, SIDE),)
    if len(emblems) == 1:
        phrases = ["emblem"]
        text = f"an emblem {ground}"
    else:
        phrases = [f"{ordinal} emblem" for ordinal in ORDINALS[: len(emblems)]]
        text = f"{', '.join(f'a {phrase}' for phrase in phrases[:-1])} and a {phrases[-1]} {ground}"
        boxes = BOXES[len(emblems)]
        drawn = [{"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0} for x0, y0, x1, y1 in boxes]
        layout = LayoutNode.execute(SIDE, SIDE, "\n".join(phrases), boxes=drawn).args[0]
        model = LayoutBiasNode.execute(given.toy.model, layout, **DEFAULTS).args[0]
    positive = EncodePromptWithSubjects.execute(given.toy.clip, text, "\n".join(["emblem", *phrases])).args[0]
    for emblem, phrase in zip(emblems, phrases, strict=True) if learned else ():
        positive = ApplyResidualTokens.execute(positive, emblem.residual, 1.0, phrase).args[0]
    image = given.picture(positive, number, model)
    reading = given.judge.findings(image)[0]
    ground_right = reading.background == background.kind
    return [_score(given, image, reading, emblems, index, box, ground_right) for index, box in enumerate(boxes)]


def _score(
    given: Given, image: Tensor, reading: Any, emblems: Sequence[Learned], index: int, box: Sequence[int], ground: bool
) -> Score:
    import torch

    here = [f for f in reading.objects if _centred(f.box, box)]
    found = [f for f in here if f.shape == "emblem"]
    # Where the judge sees no emblem, what it sees best stands in its place, or the whole box.
    best = (found or here)[:1]
    where = best[0].box if best else box
    vector = given.judge.identity(image, torch.tensor([where], dtype=torch.float32))[0]
    alike = [float(vector @ emblem.identity) for emblem in emblems]
    return Score(alike[index], bool(found), alike[index] == max(alike), ground)


def _centred(found: Sequence[float], box: Sequence[int]) -> bool:
    x, y = (found[0] + found[2]) / 2, (found[1] + found[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]


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
