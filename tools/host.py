"""The ComfyUI that this pack runs in: set it up, serve the pack with it, run Python in it.

    python tools/host.py setup               make the private ComfyUI ready, or check the one that COMFYUI_PATH names
    python tools/host.py serve [--port P]    serve the pack, for trying it in a browser, until Ctrl-C
    python tools/host.py path                print where the ComfyUI is
    python tools/host.py python ARGS         run its Python with this pack's folder as working directory

With --offline before the command nothing is fetched. Without COMFYUI_PATH the private ComfyUI lives in the user's cache
folder (or in SUBJECT_PATCHES_CACHE).

Other tools and the tests import this module:

    from host import Server, find_host
    with Server(find_host()) as server:
        outputs = server.queue(server.to_api(workflow))
        png = server.fetch(outputs["9"]["images"][0])
"""

from __future__ import annotations

import os
import sys
import time

from hosting.base import PACK_FOLDER
from hosting.client import ApiPrompt, Progress
from hosting.command import Parser, replace_process, run
from hosting.errors import ServerError, ToolError, WorkflowError, WorkflowInterrupted
from hosting.location import Host, find_host
from hosting.lock import held_alone
from hosting.paths import ROOT, cache_folder
from hosting.private import ensure_client
from hosting.server import Server, check_port

__all__ = [
    "PACK_FOLDER",
    "ROOT",
    "ApiPrompt",
    "Host",
    "Progress",
    "Server",
    "ServerError",
    "ToolError",
    "WorkflowError",
    "WorkflowInterrupted",
    "find_host",
]

_DEFAULT_PORT = 8188


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="host.py", description="The ComfyUI that this pack runs in.")
    parser.add_argument("--offline", action="store_true", help="fetch nothing; fail if something is missing")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("setup", help="make everything ready that the other commands need")
    serve = commands.add_parser("serve", help="serve the pack until Ctrl-C")
    serve.add_argument("--port", type=int, default=_DEFAULT_PORT, help=f"the port to listen on ({_DEFAULT_PORT})")
    commands.add_parser("path", help="print where the ComfyUI is")
    # Its arguments are taken off before parsing: argparse would keep some of them for itself.
    commands.add_parser("python", help="run the host's Python with the arguments that follow", add_help=False)
    given = sys.argv[1:]
    passed: list[str] = []
    if "python" in given:
        cut = given.index("python") + 1
        given, passed = given[:cut], given[cut:]
    options = parser.parse_args(given)
    if options.command == "serve":
        check_port(options.port)
    host = find_host(offline=options.offline)
    if options.command == "setup":
        ensure_client(offline=options.offline)
        print(f"ComfyUI is ready in {host.tree}")
    elif options.command == "path":
        print(host.tree)
    elif options.command == "python":
        _python(host, passed)
    else:
        _serve(host, options.port)
    return 0


def _python(host: Host, arguments: list[str]) -> None:
    os.chdir(ROOT)
    if sys.version_info < (3, 11) and arguments[:1] == ["-m"] and len(arguments) > 1:
        # Such an interpreter puts the working directory first, where this pack's `nodes` hides the host's.
        start = (
            "import runpy, sys; sys.path = [p for p in sys.path if p]; del sys.argv[0]; "
            "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
        )
        arguments = ["-c", start, *arguments[1:]]
    replace_process([str(host.python), *arguments], host.environment())


def _serve(host: Host, port: int) -> None:
    base = cache_folder() / "serve"
    print("Starting ComfyUI ...", file=sys.stderr, flush=True)
    alone = held_alone(base.with_suffix(".lock"), f"Another `host.py serve` is at work in {base}; stop that one first.")
    with alone, Server(host, port=port, base=base) as server:
        print(f"{server.url}  (Ctrl-C stops it; pictures go to {base / 'output'})", flush=True)
        while server.running:
            time.sleep(0.5)
        raise ServerError(f"ComfyUI ended by itself; {server.log} says why.")


if __name__ == "__main__":
    run(main)
