"""Every node of the pack, and what it tells the host of itself."""

from __future__ import annotations

import asyncio
from typing import Any

import subject_patches


async def _nodes() -> list[Any]:
    pack = subject_patches.SubjectPatches()
    await pack.on_load()
    return await pack.get_node_list()


NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(_nodes())}
SCHEMAS = [node.GET_SCHEMA() for node in NODES.values()]
