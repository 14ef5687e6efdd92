"""Queueing one workflow on a running server and following it over the websocket."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import ServerError, WorkflowError, WorkflowInterrupted

ApiPrompt = dict[str, dict[str, Any]]
_LARGEST_MESSAGE = 64 * 2**20


@dataclass(frozen=True)
class Progress:
    """Where a run is: the node that works now, and how many of its steps are done (0 of 0 where it counts none)."""

    node_id: str
    node_type: str
    title: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


async def follow(
    address: str,
    prompt: ApiPrompt,
    extra: dict[str, Any],
    progress: ProgressCallback | None,
    seconds: float,
) -> str:
    """Queue `prompt` at `address` (host:port) and wait for its end; gives the id under which the history has it.

    Raises:
        WorkflowError: the host refused it or a node failed.
        WorkflowInterrupted: it was interrupted.
        ServerError: the connection broke, or the run took longer than `seconds`.
    """
    import aiohttp

    client = uuid.uuid4().hex
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"http://{address}/ws?clientId={client}", max_msg_size=_LARGEST_MESSAGE) as socket,
        ):
            body = {"prompt": prompt, "client_id": client, "extra_data": extra}
            async with session.post(f"http://{address}/prompt", json=body) as response:
                answer = await response.json(content_type=None)
                if response.status != 200:
                    raise _refusal(answer)
            prompt_id = answer["prompt_id"]
            if answer.get("node_errors"):
                # The host runs what it does not refuse of a workflow with several outputs, as if that were all of it.
                await session.post(f"http://{address}/queue", json={"delete": [prompt_id]})
                await session.post(f"http://{address}/interrupt", json={"prompt_id": prompt_id})
                raise _refusal(answer)
            try:
                await asyncio.wait_for(_watch(socket, prompt, prompt_id, progress), seconds)
            except asyncio.TimeoutError as error:
                await session.post(f"http://{address}/interrupt")
                raise ServerError(
                    f"The workflow did not end within {seconds:g} seconds and was interrupted; make it smaller or "
                    "allow it more time."
                ) from error
            return prompt_id
    except aiohttp.ClientError as error:
        raise ServerError(f"The connection to the server at {address} broke ({error}); its log says why.") from error


async def _watch(socket: Any, prompt: ApiPrompt, prompt_id: str, progress: ProgressCallback | None) -> None:
    import aiohttp

    async for message in socket:
        if message.type != aiohttp.WSMsgType.TEXT:
            continue
        event = message.json()
        data = event.get("data", {})
        if data.get("prompt_id") != prompt_id:
            continue
        kind = event["type"]
        # The news of success comes before the history has the outputs, and this after.
        if kind == "executing" and data.get("node") is None:
            return
        if kind == "execution_error":
            raise _failure(data)
        if kind == "execution_interrupted":
            raise WorkflowInterrupted("The workflow was interrupted before it ended.", data.get("node_id"))
        if progress is not None and data.get("node") in prompt:
            node = prompt[data["node"]]
            title = node.get("_meta", {}).get("title", node["class_type"])
            if kind == "executing":
                progress(Progress(data["node"], node["class_type"], title, 0, 0))
            elif kind == "progress":
                progress(Progress(data["node"], node["class_type"], title, int(data["value"]), int(data["max"])))
    raise ServerError("The server closed the connection while a workflow ran; its log says why.")


def _failure(data: dict[str, Any]) -> WorkflowError:
    message = " ".join(str(data.get("exception_message", "")).split()) or data.get("exception_type", "unknown error")
    node_type, node_id = data.get("node_type"), data.get("node_id")
    return WorkflowError(f"{node_type} (node {node_id}) failed: {message}", node_id, node_type, data)


def _refusal(answer: dict[str, Any]) -> WorkflowError:
    for node_id, node in (answer.get("node_errors") or {}).items():
        reasons = "; ".join(f"{error['message']}: {error['details']}" for error in node["errors"])
        if reasons:
            message = f"The host refused {node['class_type']} (node {node_id}): {reasons}"
            return WorkflowError(message, node_id, node["class_type"], answer)
    error = answer.get("error") or {}
    if isinstance(error, str):
        error = {"message": error}
    reasons = " ".join(str(error[key]) for key in ("message", "details") if error.get(key))
    node_id = (error.get("extra_info") or {}).get("node_id")
    return WorkflowError(f"The host refused the workflow: {reasons or answer}", node_id, report=answer)
