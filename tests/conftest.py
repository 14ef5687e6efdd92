"""Loads the pack as the host does, under the package name `subject_patches`, and shares one server with all tests.

Tests import the pack's modules from there (`from subject_patches.patches.engine.call import AttentionCall`), the tools
by their file names (`from host import Server`), and the host's own modules as the host has them (`import
comfy.samplers`).
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from host import Host, Server, ToolError, find_host
from hosting.device import use_cpu_without_gpu
from hosting.pack import load_pack
from soaking.served import install

ROOT = Path(__file__).resolve().parents[1]


def _unwind(_number: int, _frame: object) -> None:
    # As Ctrl-C does, so that fixtures stop the server.
    raise KeyboardInterrupt


use_cpu_without_gpu()
try:
    load_pack(ROOT)
except ToolError as error:
    raise pytest.UsageError(str(error)) from error
signal.signal(signal.SIGTERM, _unwind)


@pytest.fixture(scope="session", autouse=True)
def _imported_for_good() -> None:
    """What was imported is no garbage: collections, which tests ask for, too, pass over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI that the tests run in."""
    return find_host(offline=True, development=True)


@pytest.fixture(scope="session")
def server(host: Host) -> Iterator[Server]:
    """One stock server with this checkout as a custom node, for the whole session."""
    with Server(host) as running:
        yield running


@pytest.fixture(scope="session")
def small_server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A stock server that also has loaders of small models, which stand in a workflow for the host's own, and the probe
    of `tools/soak.py`."""
    from .shared.small_server import add_loaders

    base = tmp_path_factory.mktemp("base")
    add_loaders(base)
    install(base)
    with Server(host, base=base) as running:
        yield running


@pytest.fixture(scope="session")
def flux_server(small_server: Server) -> Server:
    """The same, with a small FLUX.1, its VAE and AnyStory's weights for it as files."""
    from .shared.small_flux import write_anystory, write_flux

    models = small_server.base / "models"
    write_flux(models)
    write_anystory(models)
    return small_server


@pytest.fixture(scope="module")
def model() -> Any:
    """The small SD 1.x MODEL."""
    from .shared.models import small_model

    return small_model()


@pytest.fixture
def host_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with those in which the host saves: its output, and its embeddings."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    embeddings = ([str(tmp_path / "embeddings")], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "embeddings", embeddings)
    return tmp_path


@pytest.fixture
def in_inference_mode() -> Iterator[None]:
    """As the host runs nodes."""
    with torch.inference_mode():
        yield


@pytest.fixture
def solid_workflow() -> dict[str, Any]:
    """A workflow in UI format that needs no checkpoint: it saves two red pictures, 48 wide and 32 high."""
    return {
        "last_node_id": 2,
        "last_link_id": 1,
        "nodes": [
            {
                "id": 1,
                "type": "EmptyImage",
                "pos": [0, 0],
                "size": [200, 100],
                "inputs": [],
                "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
                "widgets_values": [48, 32, 2, 16711680],
            },
            {
                "id": 2,
                "type": "SaveImage",
                "title": "Red",
                "pos": [300, 0],
                "size": [200, 100],
                "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
                "outputs": [],
                "widgets_values": ["red"],
            },
        ],
        "links": [[1, 1, 0, 2, 0, "IMAGE"]],
        "version": 0.4,
    }
