"""What the pack adds to the host's start."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

from hosting.errors import ServerError
from hosting.location import Host
from hosting.paths import ROOT

from .served import Told

# Seconds of one core, with everything that the host imports by itself already there.
LIMIT = 0.2
PROCESSES = 3
# As the host's main.py does before it loads packs; the seconds are the processor's own.
_LOAD = """
import asyncio, json, sys, time
from hosting.device import use_cpu_without_gpu
use_cpu_without_gpu()
import comfy.options
import server
import nodes
server.PromptServer(asyncio.new_event_loop())
asyncio.run(nodes.init_builtin_extra_nodes())
there = set(sys.modules)
print("packs begin", file=sys.stderr)
started = time.process_time()
loaded = asyncio.run(nodes.load_custom_node({pack!r}))
seconds = time.process_time() - started
print(json.dumps([loaded, seconds, sorted(set(sys.modules) - there)]))
"""
_LINE = re.compile(r"import time:\s+(?P<own>\d+) \|\s+\d+ \|\s+(?P<name>\S+)")


def started(host: Host, told: Told) -> list[str]:
    """Loads the pack in fresh processes of the host and tells the seconds, and which modules take them. Gives what took
    longer than LIMIT."""
    seconds, others = [], set()
    with tempfile.TemporaryDirectory() as compiled:
        for _ in range(1 + PROCESSES):
            took, modules, _ = _loaded(host, compiled)
            seconds.append(took)
            others |= set(modules)
        _, _, errors = _loaded(host, compiled, ("-X", "importtime"))
    # The first had to compile everything.
    del seconds[0]
    least, middle, most = min(seconds), statistics.median(seconds), max(seconds)
    told(f"loading the pack takes {least:.3f} to {most:.3f} s of a core, in the middle {middle:.3f} s")
    told(f"modules that only the pack imports: {', '.join(sorted(others)) or 'none'}")
    found = [match for match in map(_LINE.match, errors.split("packs begin")[-1].splitlines()) if match]
    for match in sorted(found, key=lambda match: -int(match["own"]))[:10]:
        told(f"  {int(match['own']) / 1000:.1f} ms {match['name'].removeprefix(_module())}")
    return [f"loading the pack takes {least:.3f} s, more than {LIMIT} s"] if least > LIMIT else []


def brought(host: Host) -> list[str]:
    """The modules that the host imports for the pack alone, and that are not the pack's own."""
    return _loaded(host)[1]


def _loaded(host: Host, compiled: str | None = None, options: tuple[str, ...] = ()) -> tuple[float, list[str], str]:
    """The seconds, the modules of others that are new, and what the interpreter said. `compiled` is the folder of its
    bytecode where that counts: it may be told elsewhere not to write any."""
    environment = host.environment()
    if compiled is not None:
        environment = {**environment, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [str(host.python), *options, "-c", _LOAD.format(pack=str(ROOT))]
    done = subprocess.run(command, env=environment, cwd=Path(host.tree), capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    good, seconds, modules = json.loads(lines[-1]) if lines and done.returncode == 0 else (False, 0.0, [])
    if not good:
        raise ServerError(f"The host could not load the pack: {done.stderr[-2000:]}")
    return seconds, [name for name in modules if not name.startswith(_module())], done.stderr


def _module() -> str:
    # As the host calls it.
    return str(ROOT).replace(".", "_x_")
