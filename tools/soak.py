"""Ask much of the pack, at length, over the queue of a stock server: `python tools/soak.py SUBJECT [options]`.

    fuzz [--count N] [--first N]   generated cases over every node's inputs: a picture or one sentence, and the next
                                   plain picture the same to the bit
    soak [--runs N]                all workflows in turn on one server: same pictures, nothing left behind
    interrupt [--only WORDS]       each workflow interrupted at each of its steps
    clients                        two clients at once
    flags [--only WORDS]           the host's options for caches, memory and precision
    start                          what the pack adds to the host's start

Everything is small: the toys, and random weights in the shapes of other families (`tests/shared`). The exit code is 1
where something was at fault; faulty cases are written to soak_output/. docs/SOAK.md has what the last runs gave; a
small sample of each is in `tests/host/test_soak.py`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

from host import ROOT, Host, find_host
from hosting.command import Parser, enter, run

OUTPUT = ROOT / "soak_output"


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="soak.py", description="Ask much of the pack, at length, over a server's queue.")
    subjects = parser.add_subparsers(dest="subject", required=True, parser_class=Parser)
    fuzz = subjects.add_parser("fuzz", help="generated cases over every node's inputs")
    fuzz.add_argument("--count", type=int, default=1000, help="how many cases (1000)")
    fuzz.add_argument("--first", type=int, default=0, metavar="N", help="the first case's number (0)")
    fuzz.add_argument("--seed", type=int, default=0, help="of all cases; another one gives other cases (0)")
    soak = subjects.add_parser("soak", help="all workflows in turn on one server")
    soak.add_argument("--runs", type=int, default=100, help="how many runs (100)")
    interrupt = subjects.add_parser("interrupt", help="each workflow interrupted at each of its steps")
    flags = subjects.add_parser("flags", help="the host's options for caches, memory and precision")
    for each in (soak, interrupt, flags):
        each.add_argument("--only", default="", metavar="WORDS", help="only what has these whole words in its name")
    subjects.add_parser("clients", help="two clients at once")
    subjects.add_parser("start", help="what the pack adds to the host's start")
    options = parser.parse_args()
    host = find_host(development=True)
    enter(host, Path(__file__), sys.argv[1:])
    return _soak(host, options)


def _soak(host: Host, options: Namespace) -> int:
    from hosting.pack import import_host, load_pack

    import_host(host.tree)
    load_pack(ROOT)
    from soaking import SUBJECTS

    faults = SUBJECTS[options.subject](host, options, OUTPUT)
    print(f"{faults} at fault" if faults else "Nothing at fault")
    return 1 if faults else 0


if __name__ == "__main__":
    run(main)
