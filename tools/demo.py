"""Run every workflow of the pack in a real server and write the pictures.

    python tools/demo.py [--workflow NAME [--checkpoint FILE]] [--keep-server] [--thumbnails] [--offline]

Does all set-up by itself. The pictures, `gallery.html`, which holds them all, and `gallery.png` go to demo_output/, and
the path of each is printed. Nothing is opened.

A workflow needs nothing special to appear here: the pictures of each Save Image or Preview Image node make one group,
captioned with the title of the node ("Before: ...", "After: ..."), and the groups come as the nodes lie on the canvas,
from left to right and then downwards. Its thumbnail shows the first picture of the first group and of the last "After".
Workflows for real models have the thumbnail of the nearest one for the small model, which says so.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from host import ROOT, Host, Progress, Server, ToolError, find_host
from hosting.command import Parser, enter, run
from hosting.private import ensure_client

OUTPUT = ROOT / "demo_output"
HELP = ROOT / "web" / "docs"
# GB that stay free while results of this workflow, and of earlier ones, are kept.
_FREE_MEMORY = (2, 4)


def main() -> int:
    """The command line; see the module's text."""
    parser = Parser(prog="demo.py", description="Run every workflow of the pack and write the pictures.")
    parser.add_argument("--workflow", metavar="NAME", help="run only the workflow of this name")
    parser.add_argument("--checkpoint", metavar="FILE", type=Path, help="of the workflow, instead of its own")
    parser.add_argument("--keep-server", action="store_true", help="leave the server running until Ctrl-C")
    parser.add_argument("--thumbnails", action="store_true", help="also refresh the pictures in workflows/, web/docs/")
    parser.add_argument("--offline", action="store_true", help="fetch nothing; fail if something is missing")
    options = parser.parse_args()
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise ToolError(f"There is no checkpoint {options.checkpoint}; give the path of a .safetensors file.")
    if options.checkpoint is not None and options.workflow is None:
        parser.error("--checkpoint is for one workflow; name it, as in --workflow reference_sd15")
    host = find_host(offline=options.offline)
    ensure_client(offline=options.offline)
    enter(host, Path(__file__), sys.argv[1:])
    _demo(host, options.workflow, options.checkpoint, options.keep_server, options.thumbnails)
    return 0


def _demo(host: Host, name: str | None, checkpoint: Path | None, keep_server: bool, thumbnails: bool) -> None:
    # Pillow is there only in the host's interpreter.
    from hosting.gallery import Entry, in_order, look_of, page, wide_sheet
    from hosting.sheet import draw_borrowed, draw_sheet, draw_thumbnail
    from hosting.workflows import (
        borrowed_pictures,
        complete_workflows,
        fetch_groups,
        find_workflow,
        load_workflow,
        use_checkpoint,
    )
    from PIL import Image

    there = {path.stem: path for path in ([find_workflow(name)] if name else complete_workflows())}
    files = [there[stem] for stem in in_order(list(there))]
    if not files:
        raise ToolError(f"There is no workflow in {ROOT / 'workflows'}; get a complete checkout of this pack.")
    OUTPUT.mkdir(exist_ok=True)
    print("Starting ComfyUI ...", file=sys.stderr, flush=True)
    # By itself the host forgets one workflow's results in the next: here two train the same concept.
    keeping = ("--cache-ram", *map(str, _FREE_MEMORY))
    with Server(host, checkpoints=[checkpoint] if checkpoint else [], arguments=keeping) as server:
        workflows = [load_workflow(path) for path in files]
        entries = []
        for path, workflow, prompt in zip(files, workflows, server.to_api_each(workflows), strict=True):
            if checkpoint is not None:
                use_checkpoint(prompt, checkpoint.name)
            outputs = server.queue(prompt, workflow=workflow, progress=_Line(path.stem), seconds=3600)
            groups = fetch_groups(server, workflow, outputs)
            entries.append(Entry(_words(path.stem), look_of(workflow), tuple(groups)))
            for group in groups:
                name = f"{path.stem}_{_slug(group.caption)}"
                for earlier in OUTPUT.glob(f"{name}_*.png"):
                    # An earlier run may have made more of them.
                    if earlier.stem.removeprefix(f"{name}_").isdigit():
                        earlier.unlink()
                for number, picture in enumerate(group.pictures, start=1):
                    _write(OUTPUT / f"{name}_{number}.png", picture)
            if thumbnails:
                draw_thumbnail(groups).save(path.with_suffix(".jpg"), quality=88)
                draw_sheet([(_words(path.stem), groups)]).save(HELP / f"{path.stem}.jpg", quality=88)
        if thumbnails:
            for target, given in borrowed_pictures().items():
                with Image.open(given) as opened:
                    draw_borrowed(opened).save(target, quality=80)
        sheet, gallery = OUTPUT / "gallery.png", OUTPUT / "gallery.html"
        wide_sheet(entries).save(sheet)
        gallery.write_text(page(entries), encoding="utf-8")
        print(sheet, gallery, sep="\n", flush=True)
        if keep_server:
            print(f"{server.url}  (Ctrl-C stops it)", flush=True)
            while server.running:
                time.sleep(0.5)


class _Line:
    """Shows a run's progress on one line of a terminal, or one line a node where stderr is none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._node = ""

    def __call__(self, progress: Progress) -> None:
        count = f" {progress.done}/{progress.total}" if progress.total else ""
        text = f"{self._name}: {progress.title}{count}"
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif progress.node_id != self._node:
            print(text, file=sys.stderr, flush=True)
        self._node = progress.node_id


def _write(path: Path, picture: bytes) -> None:
    path.write_bytes(picture)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    print(path, flush=True)


def _words(stem: str) -> str:
    transformer = stem.endswith("_dit")
    return stem.removesuffix("_dit").replace("_", " ").capitalize() + ", on a transformer" * transformer


def _slug(caption: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", caption.lower()).strip("_")[:60] or "picture"


if __name__ == "__main__":
    run(main)
