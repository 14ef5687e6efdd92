"""A running server and what the probe in it tells."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosting import base as base_folder
from hosting.client import ApiPrompt
from hosting.location import Host
from hosting.paths import ROOT
from hosting.server import Server

from .homes import home_nodes

MEGABYTE = 2**20
# What hears of a run as it goes on, in lines.
Told = Callable[[str], None]
# Where nodes save, every time, in files of new names.
_SAVES = ("output", "temp", "models/residual_tokens")
# Not the pack's: its checkout, where Python writes as it imports, and what the host keeps of itself.
_OTHERS = ("custom_nodes", "user", "server.log")


@dataclass(frozen=True)
class Held:
    """What a server's process holds: resident memory and tensors in bytes, tensors and hooks of modules by number, what
    is left of sampling runs, threads, and models that the host counts as loaded."""

    resident: int
    tensors: int
    bytes: int
    hooks: int
    runs: int
    threads: int
    models: int

    def __str__(self) -> str:
        return (
            f"{self.resident / MEGABYTE:.0f} MB resident, {self.bytes / MEGABYTE:.1f} MB in {self.tensors} tensors, "
            f"{self.hooks} hooks, {self.runs} of runs, {self.threads} threads, {self.models} models"
        )


def install(base: Path) -> None:
    """Gives a server's base directory the probe, before it starts."""
    add_pack(base, "soak_probe", "import soaking.watched\nfrom soaking.probe import NODE_CLASS_MAPPINGS\n")


def add_pack(base: Path, name: str, text: str, *folders: Path) -> None:
    """Gives a server's base directory a pack, before it starts: `text` is its module, which imports what it has from
    tools/ and these folders."""
    folder = base / "custom_nodes" / name
    folder.mkdir(parents=True)
    paths = [str(each) for each in (*folders, ROOT / "tools")]
    (folder / "__init__.py").write_text(f"import sys\nsys.path[:0] = {paths!r}\n{text}", encoding="utf-8")


@contextmanager
def soaked(host: Host, arguments: Sequence[str] = ()) -> Iterator[Soaked]:
    """A server of its own with the probe, the loaders and the files of small models. Nothing is left of it."""
    from subject_patches.tests.shared.small_flux import write_anystory, write_flux
    from subject_patches.tests.shared.small_server import add_files, add_loaders

    base = Path(tempfile.mkdtemp(prefix="subject-patches-soak-"))
    try:
        add_loaders(base)
        write_flux(base / "models")
        write_anystory(base / "models")
        add_files(base)
        install(base)
        with Server(host, base=base, arguments=arguments) as server:
            yield Soaked(server)
    finally:
        base_folder.remove(base)


class Soaked:
    """A server with the probe in it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._number = 0

    def held(self) -> Held:
        """What the process holds once nothing runs and all that can be collected is."""
        return Held(**self.server.get("/soak/held"))

    def resident(self) -> int:
        """The process's memory, in bytes, as it is."""
        return self.server.get("/soak/resident")

    def interrupt_at(self, progress: int) -> int:
        """Has the next run interrupted when its nodes have told of progress so often, 0 for never; gives how often they
        did since the last time this was asked."""
        return self.server.get(f"/soak/interrupt/{progress}")

    def kept_files(self) -> dict[str, int]:
        """The files of the base directory but for those that nodes save, with their sizes."""
        base, found = self.server.base, {}
        for path in base.rglob("*"):
            name = path.relative_to(base).as_posix()
            if path.is_file() and not name.startswith((*_SAVES, *_OTHERS)):
                found[name] = path.stat().st_size
        return found

    def picture(self, prompt: ApiPrompt) -> str:
        """A workflow's pictures, run anew: the digests that its Digest nodes tell, one after the other."""
        outputs = self.server.queue(prompt)
        return " ".join(outputs[number]["digest"][0] for number in sorted(outputs) if "digest" in outputs[number])

    def saved(self, prompt: ApiPrompt) -> dict[str, str]:
        """A digest of each saving node's pictures."""
        return {number: _digest(several) for number, several in pictures(self.server, prompt).items()}

    def plain(self, home: ApiPrompt, links: dict[str, Any]) -> str:
        """The digest of an unpatched picture of the models that `home` loads, sampled anew; `links` are their MODEL,
        CLIP and VAE."""
        self._number += 1
        return self.picture({**home, **plain_nodes(links, self._number)})

    def settled(self) -> str:
        """The same of the toy, whose loader most workflows have."""
        return self.plain(*home_nodes("toy"))


def plain_nodes(links: dict[str, Any], number: int) -> ApiPrompt:
    """Two steps of a small picture by the host's own nodes, which it cannot take from its cache under a new number."""
    sampling = {"seed": 7, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    prompts = {"positive": ["plain text", 0], "negative": ["plain text", 0]}
    nodes: dict[str, tuple[str, dict[str, Any]]] = {
        "plain text": ("CLIPTextEncode", {"clip": links["CLIP"], "text": "an emblem on grass"}),
        "plain empty": ("EmptyLatentImage", {"width": 64, "height": 96, "batch_size": 2}),
        "plain latent": ("SoakAgain", {"latent": ["plain empty", 0], "number": number}),
        "plain": ("KSampler", {"model": links["MODEL"], "latent_image": ["plain latent", 0], **prompts, **sampling}),
        "plain picture": ("VAEDecode", {"samples": ["plain", 0], "vae": links["VAE"]}),
        "plain digest": ("SoakDigest", {"images": ["plain picture", 0]}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def pictures(server: Server, prompt: ApiPrompt) -> dict[str, list[Any]]:
    """The pictures that each saving node of a workflow gives, by the node's number."""
    outputs = server.queue(prompt)
    saved = {number: entry["images"] for number, entry in outputs.items() if entry.get("images")}
    return {number: [shown(server, each) for each in images] for number, images in saved.items()}


def shown(server: Server, image: dict[str, str]) -> Any:
    """A picture (height, width, 3) of 0 to 255 that a node of a run gave."""
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(server.fetch(image))) as opened:
        return np.asarray(opened.convert("RGB")).astype(np.float32)


def _digest(several: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for picture in several:
        digest.update(str(picture.shape).encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()
