"""AnyLogo's tuning on the toy: Table 3's rows, Table 4's, and Figure 7's, each trained.

`toy.train_anylogo` makes what is measured: each row reads the two files that its run left in a folder below `toy/runs`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from .given import Given
from .recycled_attention import UNPATCHED, Pair, Score, table

# What each row was trained as, by the folder of its run, and whether it is shown the tokens and the reference.
TABLES: dict[str, dict[str, tuple[str, bool, bool]]] = {
    "Table 3: blocked, semantic tokens alone, both (a ReferenceNet's row is of the subject encoder's study)": {
        "untrained": ("", False, True),
        "trained, blocked": ("anylogo", False, False),
        "trained without a reference: semantic tokens": ("anylogo-none", True, False),
        "trained, reference alone": ("anylogo", False, True),
        "trained, semantic tokens and reference": ("anylogo", True, True),
    },
    "Table 4: where the reference is delivered": {
        "encoder": ("anylogo-encoder", True, True),
        "decoder": ("anylogo", True, True),
        "encoder and decoder": ("anylogo-both", True, True),
    },
    "Figure 7: lambda of the training, released when sampling": {
        "0": ("anylogo-none", True, False),
        "0.3": ("anylogo-0.3", True, True),
        "0.6": ("anylogo", True, True),
        "1": ("anylogo-1", True, True),
    },
}
SITES = {"anylogo-encoder": "encoder", "anylogo-both": "encoder and decoder"}


@dataclass
class Tuned:
    """A run's result: the toy with its LoRA, and its semantic maps."""

    model: Any
    semantics: Any


def tuned(given: Given, run: str) -> Tuned | None:
    """What a run left, or None where it has not been."""
    import comfy.sd
    from safetensors.torch import load_file
    from subject_patches.encoders.semantic_injection import read_semantic_maps
    from subject_patches.toy.command import RUNS
    from subject_patches.toy.train_anylogo import LORA, MAPS

    if not run:
        return Tuned(given.toy.model, None)
    path = RUNS / run / MAPS.name
    if not path.is_file():
        return None
    model, _ = comfy.sd.load_lora_for_models(given.toy.model, None, load_file(path.with_name(LORA.name)), 1.0, 0.0)
    return Tuned(model, read_semantic_maps(path))


def study(given: Given) -> None:
    """Prints the tables, over `given.count` emblem-and-scene pairs; rows of runs that have not been are left out."""
    rows = {row for named in TABLES.values() for row in named.values()}
    models = {run: tuned(given, run) for run in {run for run, _, _ in rows}}
    scores: dict[Any, list[Score]] = {row: [] for row in (UNPATCHED, *rows)}
    for number in range(given.count):
        pair = Pair(given, number)
        scores[UNPATCHED].append(pair.carried(None))
        for row in rows:
            run, tokens, reference = row
            if (made := models[run]) is not None:
                patched = patched_by(made, pair.subject, tokens, reference, SITES.get(run, "decoder"))
                scores[row].append(pair.score_of(patched))
        print(f"pair {number + 1} of {given.count}", file=sys.stderr, flush=True)
    for title, named in TABLES.items():
        print(f"\n{title}:\n")
        table({UNPATCHED: scores[UNPATCHED], **{name: scores[row] for name, row in named.items() if scores[row]}})


def patched_by(made: Tuned, subject: Any, tokens: bool, reference: bool, sites: str) -> Any:
    """A tuned model with the nodes that a row is of."""
    from subject_patches.nodes.recycled_attention import RecycledSelfAttentionNode
    from subject_patches.nodes.semantic_injection import SemanticInjectionNode

    model = made.model
    if tokens:
        model = SemanticInjectionNode.execute(model, subject, made.semantics).args[0]
    if reference:
        # As in the paper's training.
        model = RecycledSelfAttentionNode.execute(model, subject, sites=sites, noise_level="current").args[0]
    return model
