"""Measure what the nodes do on a toy, judged against the unpatched model: `python tools/effects.py [--only WORDS]`.

The same seeds are sampled unpatched and patched in one run, and the toy's judge says what is in the pictures: whose
emblem, what things, where, on what ground. `--toy dit` measures on the second toy, a transformer, what there is to
choose there. The tables in docs/EFFECTS.md are this command's.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from host import ROOT, Host, find_host
from hosting.command import Parser, enter, run


def main() -> int:
    """The command line; see the module's text."""
    from measuring import DIT_STUDIES, STUDIES
    from measuring.given import chosen

    parser = Parser(prog="effects.py", description="Measure what the nodes do on the toy.")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help=f"whole words of: {'; '.join(STUDIES)} (default: all)"
    )
    parser.add_argument("--toy", choices=("first", "dit"), default="first", help="the U-Net or the transformer")
    parser.add_argument("--count", type=int, default=100, help="cases of each study")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps of each picture")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="keep trained concepts there and take those of the same training from there; empty it when the code of "
        "the training changes",
    )
    options = parser.parse_args()
    studies = DIT_STUDIES if options.toy == "dit" else STUDIES
    chosen_studies = {name: studies[name] for name in chosen(options.only, studies)}
    host = find_host()
    enter(host, Path(__file__), sys.argv[1:])
    _effects(host, chosen_studies, options)
    return 0


def _effects(host: Host, studies: dict[str, Callable[..., None]], options: Namespace) -> None:
    from hosting.pack import import_host, load_pack
    from measuring.given import Given

    import_host(host.tree)
    load_pack(ROOT)
    import torch
    from subject_patches.toy.judge import load_judge
    from subject_patches.toy.sampling import CHECKPOINT, DIT_CHECKPOINT, Toy
    from subject_patches.toy.scenes import SMALL, WHOLE

    # Denormal numbers slow a CPU down several times, and mean nothing here.
    torch.set_flush_denormal(True)
    dit = options.toy == "dit"
    toy, world = Toy.load(DIT_CHECKPOINT if dit else CHECKPOINT), SMALL if dit else WHOLE
    given = Given(host, toy, load_judge(), options.count, options.steps, world, options.keep)
    with torch.inference_mode():
        for name, study in studies.items():
            print(f"\n## {name[0].upper()}{name[1:]}\n", flush=True)
            study(given)


if __name__ == "__main__":
    run(main)
