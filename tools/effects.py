"""Measure what the nodes do on a toy, judged against the unpatched model: `python tools/effects.py [--only WORDS]`.

The same seeds are sampled unpatched and patched in one run, and the toy's judge says what is in the pictures: whose
emblem, what things, where, on what ground. `--toy dit` measures on the second toy, a transformer, what there is to
choose there. The tables in docs/EFFECTS.md are this command's: `--document docs/EFFECTS.md` makes those anew whose
studies `--only` names, each with the cases and steps that the document quotes, and leaves its words to you.
"""

from __future__ import annotations

import io
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from host import ROOT, Host, find_host
from hosting.command import Parser, enter, run
from hosting.errors import ToolError
from measuring.document import Command, commands_of, made_anew


def main() -> int:
    """The command line; see the module's text."""
    options = _parser().parse_args()
    commands = _asked(options)
    host = find_host()
    enter(host, Path(__file__), sys.argv[1:])
    return _measure(host, commands, options)


def _parser() -> Parser:
    from measuring import STUDIES

    parser = Parser(prog="effects.py", description="Measure what the nodes do on the toy.")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help=f"whole words of: {'; '.join(STUDIES)} (default: all)"
    )
    parser.add_argument("--toy", choices=("first", "dit"), default="first", help="the U-Net or the transformer")
    parser.add_argument("--count", type=int, default=100, help="cases of each study")
    parser.add_argument("--steps", type=int, default=12, help="sampling steps of each picture")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FOLDER",
        help="keep trained concepts there and take those of the same training from there; empty it when the code of "
        "the training changes",
    )
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="make its tables of these studies anew, as its text quotes them"
    )
    return parser


def _command(options: Namespace) -> Command:
    """What options ask for."""
    from measuring import DIT_STUDIES, STUDIES
    from measuring.given import chosen

    studies = chosen(options.only, DIT_STUDIES if options.toy == "dit" else STUDIES)
    return Command(options.toy, tuple(studies), options.count, options.steps)


def _asked(options: Namespace) -> list[Command]:
    """What is to be measured: as the options say, or as the document quotes it of their toy's studies."""
    asked = _command(options)
    if options.document is None:
        return [asked]
    if not options.document.is_file():
        raise ToolError(f"There is no document {options.document}; give the path of one, as of docs/EFFECTS.md.")
    text = options.document.read_text(encoding="utf-8")
    quoted = dict.fromkeys(command for _, command in commands_of(text, _reads))
    return [each for each in quoted if each.toy == asked.toy and set(each.studies) <= set(asked.studies)]


def _reads(words: Sequence[str]) -> Command:
    return _command(_parser().parse_args(words))


class _Told(io.StringIO):
    """What is printed, which is shown at once too."""

    def write(self, text: str) -> int:
        print(text, end="", file=sys.__stdout__, flush=True)
        return super().write(text)


def _measure(host: Host, commands: Sequence[Command], options: Namespace) -> int:
    """Runs the studies, and gives 1 where a table of the document could not be made anew."""
    from hosting.pack import import_host, load_pack
    from measuring import DIT_STUDIES, STUDIES
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
    toy, judge = Toy.load(DIT_CHECKPOINT if dit else CHECKPOINT), load_judge()
    missed: list[str] = []
    for command in commands:
        given = Given(host, toy, judge, command.count, command.steps, SMALL if dit else WHOLE, options.keep)
        with torch.inference_mode(), redirect_stdout(_Told()) as told:
            for name in command.studies:
                print(f"\n## {name[0].upper()}{name[1:]}\n", flush=True)
                (DIT_STUDIES if dit else STUDIES)[name](given)
        if options.document:
            text, left = made_anew(options.document.read_text(encoding="utf-8"), command, told.getvalue(), _reads)
            options.document.write_text(text, encoding="utf-8")
            missed += left
    for each in missed:
        print(f"{options.document}, {each}; the table is as it was.", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    run(main)
