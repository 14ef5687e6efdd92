"""The host's options for caches, memory and precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hosting.client import ApiPrompt
from hosting.location import Host
from hosting.server import has_gpu

from .served import Soaked, Told, pictures, soaked
from .workflows import again, small_workflows

Pictures = dict[tuple[str, str], list[Any]]
# Which change no number, which do not and are refused beside --cpu, and which compute in half precision.
EXACT: tuple[Sequence[str], ...] = (
    ("--cache-none",),
    ("--cache-lru", "10"),
    ("--cache-classic",),
    ("--disable-smart-memory",),
)
OF_A_GPU: tuple[Sequence[str], ...] = (("--lowvram",), ("--novram",))
HALF: tuple[Sequence[str], ...] = (("--fp16-unet",), ("--bf16-unet",))
# One workflow or more of each mechanism.
NAMES = (
    "anystory_flux",
    "emblem_in_a_scene",
    "emblem_in_a_scene_dit",
    "layout_and_retouch",
    "layout_by_boxes",
    "three_nodes_in_the_same_layers",
    "train_a_residual_token",
    "two_emblems_by_attention_maps",
    "two_emblems_by_masks",
)
# By how much half precision may move a picture of 0 to 255, on average.
_MOVES = 40.0


def flagged(
    host: Host, chosen: Sequence[Sequence[str]], usual: Pictures, names: Sequence[str], told: Told
) -> list[str]:
    """Runs workflows twice under each option, and compares their pictures with the `usual` ones of a server without: to
    the bit, or in half precision by how far they move. Gives what was not as it should be."""
    faults: list[str] = []
    for flags in chosen:
        if flags in OF_A_GPU and not has_gpu(host):
            told(f"{' '.join(flags)}: the host takes it with a GPU alone, and there is none")
            continue
        with soaked(host, flags) as served:
            name = " ".join(flags)
            shown, found = twice(served, small_workflows(served.server, names))
            faults += [f"{name}: {each}" for each in found]
            moves = {key: _moved(usual[key], shown[key]) for key in usual.keys() & shown}
            limit = _MOVES if flags in HALF else 0.0
            faults += [f"{name}: {key} differs by {move:.2f}" for key, move in moves.items() if move > limit]
            if "invalid value encountered" in served.server.log.read_text(encoding="utf-8", errors="replace"):
                faults.append(f"{name}: a picture has values that are no numbers")
            told(f"{name}: {len(moves)} pictures, at most {max(moves.values()):.3f} of 255 from the usual on average")
    return faults


def twice(served: Soaked, prompts: Mapping[str, ApiPrompt]) -> tuple[Pictures, list[str]]:
    """Every workflow's pictures by its name and the saving node's number, and what was another the second time."""
    plain, faults, rounds = served.settled(), [], []
    for number in (1, 2):
        shown: Pictures = {}
        for name, prompt in prompts.items():
            for node, several in pictures(served.server, again(prompt, number)).items():
                shown[name, node] = several
        if served.settled() != plain:
            faults.append(f"the plain picture after round {number} is another")
        rounds.append(shown)
    first, second = rounds
    faults += [f"{key} is another the second time" for key in first.keys() & second if _moved(first[key], second[key])]
    return first, faults


def _moved(first: list[Any], second: list[Any]) -> float:
    """The mean difference of pictures' bytes."""
    import numpy as np

    if [each.shape for each in first] != [each.shape for each in second]:
        return float("inf")
    return max(float(np.abs(one - other).mean()) for one, other in zip(first, second, strict=True))
