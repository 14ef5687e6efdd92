"""AnyLogo's tuning on the toy: Table 3's rows, Table 4's, and Figure 7's, each trained.

`toy.train_anylogo` makes what is measured: the rows of Table 4 and Figure 7 read the two files that each run left in a
folder below `toy/runs`, those of Table 3 the shipped ones, trained longer. The cases are those of the trained subject
encoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .given import Given, Shape, heading, row
from .learned import Case, Shown, table, the_encoder
from .recycled_attention import UNPATCHED

# The noise level of the paper's training, and the node's usual one.
CURRENT, CLEAN = "current", "nearly clean"


@dataclass(frozen=True)
class Row:
    """Of which run a row is, whether it is shown the tokens, and at which noise level the reference; None: not."""

    run: str
    tokens: bool = False
    level: str | None = None


TOY, ENCODER, SHIPPED = "", "encoder", "shipped"
UNTRAINED = Row(TOY, level=CURRENT)
TABLES: dict[str, dict[str, Row]] = {
    "Table 3: blocked, semantic tokens alone, a ReferenceNet, recycling": {
        "untrained": UNTRAINED,
        "untrained, nearly clean": Row(TOY, level=CLEAN),
        "trained, blocked": Row(SHIPPED),
        "trained without a reference, 9,600 pairs: semantic tokens": Row("anylogo-none", True),
        "ReferenceNet and its tokens, trained ten times as long": Row(ENCODER),
        "recycling, reference alone": Row(SHIPPED, level=CURRENT),
        "recycling, semantic tokens and reference": Row(SHIPPED, True, CURRENT),
        "recycling, semantic tokens and reference, nearly clean": Row(SHIPPED, True, CLEAN),
    },
    "Table 4, where the reference is delivered, and Figure 7, lambda of the training": {
        "delivered in the encoder": Row("anylogo-encoder", True, CURRENT),
        "in the decoder": Row("anylogo", True, CURRENT),
        "in both": Row("anylogo-both", True, CURRENT),
        "lambda 0": Row("anylogo-none", True),
        "lambda 0.3": Row("anylogo-0.3", True, CURRENT),
        "lambda 0.6": Row("anylogo", True, CURRENT),
        "lambda 1": Row("anylogo-1", True, CURRENT),
    },
}
SITES = {"anylogo-none": "none", "anylogo-encoder": "encoder", "anylogo-both": "encoder and decoder"}
# The rows of the noise's error: a run, and which layers deliver where the toy is untrained.
ERRORS: dict[str, tuple[str, str]] = {
    "untrained, decoder": (TOY, "decoder"),
    "untrained, encoder": (TOY, "encoder"),
    "untrained, both": (TOY, "encoder and decoder"),
    "encoder": ("anylogo-encoder", ""),
    "lambda 0: semantic tokens alone": ("anylogo-none", ""),
    "decoder, lambda 0.3": ("anylogo-0.3", ""),
    "decoder, lambda 0.6": ("anylogo", ""),
    "the same, 14,400 pairs: the shipped files": (SHIPPED, ""),
    "decoder, lambda 1": ("anylogo-1", ""),
    "encoder and decoder": ("anylogo-both", ""),
}


@dataclass
class Tuned:
    """A run's result: the toy with its LoRA, its semantic maps, and where both are."""

    model: Any
    semantics: Any
    files: Any = None


def tuned(given: Given, run: str) -> Tuned | None:
    """What a run left, or None where it has not been."""
    import comfy.sd
    from safetensors.torch import load_file
    from subject_patches.encoders.semantic_injection import read_semantic_maps
    from subject_patches.toy.command import RUNS
    from subject_patches.toy.train_anylogo import LORA, MAPS

    if run in (TOY, ENCODER):
        return Tuned(given.toy.model, None)
    files = (MAPS, LORA) if run == SHIPPED else (RUNS / run / MAPS.name, RUNS / run / LORA.name)
    if not all(path.is_file() for path in files):
        return None
    model, _ = comfy.sd.load_lora_for_models(given.toy.model, None, load_file(files[1]), 1.0, 0.0)
    return Tuned(model, read_semantic_maps(files[0]), files)


def study(given: Given) -> None:
    """Prints the tables, over `given.count` cases, and what each run does to the noise's error; rows of runs that have
    not been are left out."""
    rows = {each for named in TABLES.values() for each in named.values()}
    tried = {run: tuned(given, run) for run in sorted({each.run for each in rows})}
    models = {run: made for run, made in tried.items() if made is not None}
    encoder = the_encoder()
    scores: dict[Any, list[Shown]] = {
        each: [] for each in (UNPATCHED, *rows) if each == UNPATCHED or each.run in models
    }
    for number in range(given.count):
        case = Case(given, number)
        for each, seen in scores.items():
            if each == UNPATCHED:
                seen.append(case.seen(None))
            elif each.run == ENCODER:
                seen.append(case.shown(encoder, "tokens and references"))
            else:
                seen.append(case.seen(patched_by(models[each.run], case.subject, each)))
        print(f"case {number + 1} of {given.count}", file=sys.stderr, flush=True)
    for title, named in TABLES.items():
        print(f"\n{title}:\n")
        mine = {name: scores[each] for name, each in named.items() if each in scores}
        table({UNPATCHED: scores[UNPATCHED], **mine}, scores[UNTRAINED], "over untrained")
    print(f"\nThe error of the noise in {given.count} held-out emblems, against the untouched toy without a reference;")
    print("blocked: in their whole pictures, with neither tokens nor reference:\n")
    made = {name: models[run] for name, (run, _) in ERRORS.items() if run in models}
    print(heading("tokens", "reference", "both", "blocked"))
    for name, each in made.items():
        run, sites = ERRORS[name]
        found = falls(encoder.vision, each, sites or SITES.get(run, "decoder"), given.count)
        by_what: dict[str, list[float]] = {}
        for what, fall in found.items():
            by_what.setdefault(what.rsplit(" at ", 1)[0], []).append(fall)
        print(row(name, *(", ".join(f"{100 * fall:+.1f}" for fall in falling) + "%" for falling in by_what.values())))


def patched_by(made: Tuned, subject: Any, shown: Row) -> Any:
    """A tuned model with the nodes that a row is of."""
    from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
    from subject_patches.nodes.semantic_injection import SemanticInjectionNode

    model = made.model
    if shown.tokens:
        model = SemanticInjectionNode.execute(model, subject, made.semantics).args[0]
    if shown.level is not None:
        given = {"sites": SITES.get(shown.run, "decoder"), "noise_level": shown.level}
        model = RecycledSelfAttentionNode.execute(model, subject, **given).args[0]
    return model


def falls(vision: Any, made: Tuned, sites: str, count: int) -> dict[str, float]:
    """See `Lesson.falls`; of other pairs than the training's log. `vision` is for what brings none."""
    import numpy as np
    import torch
    from safetensors.torch import load_file
    from subject_patches.toy.anylogo import Symbiosis, Tuning
    from subject_patches.toy.data import Words
    from subject_patches.toy.pair_training import CHECKPOINT, frozen
    from subject_patches.toy.pairs import Pairs
    from subject_patches.toy.train_anylogo import start

    model, autoencoder = frozen(CHECKPOINT)
    if made.files is None:
        tuning = Tuning(model.unet, 1)
    else:
        downs = (each for name, each in load_file(made.files[1]).items() if name.endswith("lora_down.weight"))
        tuning = Tuning(model.unet, next(downs).shape[0])
        start(tuning, *made.files)
        vision = made.semantics.vision
    symbiosis = Symbiosis(model, vision.model.float(), Words()([""]), sites)
    pairs = Pairs(autoencoder, np.random.default_rng((2**41, 6)), count, grounds=True)
    pairs.add(count)
    return symbiosis.falls(tuning, pairs.draw(count, torch.Generator().manual_seed(6)))


def costs(shape: Shape) -> dict[str, Callable[[Any], Any]]:
    """The benchmark's row, of U-Nets: random tokens, as many as the vision model sees patches (DINOv2's of 518 pixels,
    on the toy its own's), and the background's one."""
    import torch
    from subject_patches.patches.engine.engine import add_edit
    from subject_patches.patches.families import attention_sites
    from subject_patches.patches.families.unet import scales
    from subject_patches.patches.mechanisms.semantic_injection import SemanticInjection, grouped
    from subject_patches.patches.parts.window import Window

    if shape.flux:
        return {}
    source = torch.Generator().manual_seed(4)
    count = 1 + (12 if shape.name == "toy" else 37) ** 2

    def patch(model: Any) -> Any:
        groups = grouped(attention_sites(model), scales(model.model.diffusion_model))
        tokens = {group: torch.randn(1, count, shape.width, generator=source) for group in set(groups.values())}
        return add_edit(model, SemanticInjection(frozenset(groups), Window(), tokens, groups))

    return {f"semantic injection, {count} tokens": patch}
