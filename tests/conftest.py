"""Loads the pack as the host does, under the package name `subject_patches`, and shares one server with all tests.

Tests import the pack's modules from there (`from subject_patches.patches.call import AttentionCall`), the tools by
their file names (`from host import Server`), and the host's own modules as the host has them (`import comfy.samplers`).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host import Host, Server, ToolError, find_host
from hosting.device import use_cpu_without_gpu
from hosting.pack import load_pack

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


@pytest.fixture(scope="session")
def host() -> Host:
    """The ComfyUI that the tests run in."""
    return find_host(offline=True, development=True)


@pytest.fixture(scope="session")
def server(host: Host) -> Iterator[Server]:
    """One stock server with this checkout as a custom node, for the whole session."""
    with Server(host) as running:
        yield running


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
