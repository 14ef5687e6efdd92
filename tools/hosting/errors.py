"""The errors that the tools show to a person: each message is one sentence with a way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ToolError(Exception):
    """Something the person who typed the command can act on; its text is printed without a traceback."""


class ServerError(ToolError):
    """The server did not start, died, or answered what it should not."""


class WorkflowError(ToolError):
    """The host refused a workflow or a node in it failed.

    `node_id` and `node_type` name the node where the host said which one it was, else they are None; `report` is all
    that the host said of it, of a node that failed with its `exception_type` and `traceback`.
    """

    def __init__(
        self,
        message: str,
        node_id: str | None = None,
        node_type: str | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type
        self.report = report or {}


class WorkflowInterrupted(WorkflowError):
    """The run was stopped by an interrupt before it ended."""
