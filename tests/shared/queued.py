"""The one picture of each saving node of a workflow that runs over the queue of a test's server."""

from __future__ import annotations

from typing import Any

from host import Server
from hosting.client import ApiPrompt
from soaking import served


def pictures(server: Server, api: ApiPrompt) -> dict[str, Any]:
    """The one picture (height, width, 3) that each saving node of a workflow gives, by its node's number."""
    return {number: shown for number, (shown,) in served.pictures(server, api).items()}


def picture(server: Server, api: ApiPrompt) -> Any:
    """The one picture that a workflow saves."""
    (shown,) = pictures(server, api).values()
    return shown
