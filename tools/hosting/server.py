"""A stock ComfyUI server in a process of its own, with this checkout as a custom node."""

from __future__ import annotations

import asyncio
import ctypes
import functools
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from . import base as base_folder
from .client import ApiPrompt, ProgressCallback, follow
from .errors import ServerError, ToolError, WorkflowError
from .location import Host
from .pip import clean_environment
from .private import ensure_client

ADDRESS = "127.0.0.1"
_START_SECONDS = 300.0
_STOP_SECONDS = 10.0
_HTTP_SECONDS = 60.0
# For the first answer: what has taken the port may listen and never answer.
_FIRST_SECONDS = 3.0
_LOG_LINES = 15
_SPARE_PORTS = 3
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CONVERTER = Path(__file__).with_name("convert.py")


class Server:
    """A running server, for a `with` block; nothing is left of it after the block, however that ends.

    Args:
        host: the ComfyUI to run, as `find_host` gives it.
        port: the port on this machine; by default any free one.
        checkpoints: files that are linked into the server's checkpoints folder, under their own names.
        base: a base directory that is kept; by default a temporary one.
        arguments: more options for ComfyUI's main.py.
    """

    def __init__(
        self,
        host: Host,
        *,
        port: int | None = None,
        checkpoints: Sequence[Path] = (),
        base: Path | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.host = host
        self.port = port or 0
        self._fixed_port = port is not None
        self._checkpoints = tuple(checkpoints)
        self._arguments = tuple(arguments)
        self._kept_base = base
        self._base = base
        self._process: subprocess.Popen[bytes] | None = None
        self._object_info: dict[str, Any] | None = None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The address of the server's page."""
        return f"http://{ADDRESS}:{self.port}"

    @property
    def base(self) -> Path:
        """The server's base directory, with its models, input and output folders."""
        if self._base is None:
            raise ServerError("The server has not been started; use it in a with block.")
        return self._base

    @property
    def log(self) -> Path:
        """The file with everything that the server printed."""
        return self.base / "server.log"

    @property
    def running(self) -> bool:
        """Whether the server's process lives."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the server and wait until it answers; raises ServerError with the end of its log if it does not."""
        if self._process is not None:
            raise ServerError("This server is already running; make another Server for a second one.")
        try:
            if self._base is None:
                self._base = Path(tempfile.mkdtemp(prefix="subject-patches-"))
            base_folder.prepare(self._base, self._checkpoints)
            compute = [] if has_gpu(self.host) else ["--cpu"]
            for spare in range(_SPARE_PORTS, -1, -1):
                self.port = check_port(self.port) if self._fixed_port else _free_port()
                self._launch(compute)
                if self._wait_until_ready(may_retry=spare > 0 and not self._fixed_port):
                    break
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server's process and delete its temporary base directory; harmless when it has ended."""
        process = self._process
        try:
            if process is not None and process.poll() is None:
                process.terminate()
                process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
            self._process = None
            self._object_info = None
            if self._kept_base is None and self._base is not None:
                base_folder.remove(self._base)
                self._base = None

    def queue(
        self,
        prompt: ApiPrompt,
        *,
        workflow: dict[str, Any] | None = None,
        progress: ProgressCallback | None = None,
        seconds: float = 600.0,
    ) -> dict[str, dict[str, Any]]:
        """Run a workflow in API format and give its outputs by node id, as the server's history has them.

        `workflow` is the same in UI format, kept in the pictures' metadata; `progress` is called as the run goes on.

        Raises:
            WorkflowError: the host refused the workflow or a node failed; the message names the node.
            WorkflowInterrupted: the run was interrupted.
            ServerError: the server died or took longer than `seconds`.
        """
        extra = {} if workflow is None else {"extra_pnginfo": {"workflow": workflow}}
        try:
            prompt_id = asyncio.run(follow(f"{ADDRESS}:{self.port}", prompt, extra, progress, seconds))
        except ServerError as error:
            if self.running:
                raise
            raise ServerError(f"The server died while a workflow ran; its log ends: {self._log_end()}") from error
        return self.get(f"/history/{prompt_id}")[prompt_id]["outputs"]

    def fetch(self, image: dict[str, str]) -> bytes:
        """The file of one entry of an output's `images` list, as the server wrote it."""
        query = urllib.parse.urlencode({key: image[key] for key in ("filename", "subfolder", "type")})
        return self._request("GET", f"/view?{query}")

    def interrupt(self) -> None:
        """Stop what runs now; its `queue` call, in another thread or from its progress, raises WorkflowInterrupted."""
        self._request("POST", "/interrupt")

    def object_info(self) -> dict[str, Any]:
        """What the server knows of every node type, by its name."""
        if self._object_info is None:
            self._object_info = self.get("/object_info")
        return self._object_info

    def get(self, path: str) -> Any:
        """What the server answers to a path that gives JSON."""
        return json.loads(self._request("GET", path))

    def blueprints(self) -> dict[str, Any]:
        """The subgraph blueprints that the server offers, by number."""
        return self.get("/global_subgraphs")

    def to_api(self, workflow: dict[str, Any], *, offline: bool = False) -> ApiPrompt:
        """Convert a workflow from the UI format, which people save, to the API format, which the server runs.

        The conversion is comfy-cli's, in an environment of its own that is set up on first use.
        """
        return self.to_api_each([workflow], offline=offline)[0]

    def to_api_each(self, workflows: Sequence[dict[str, Any]], *, offline: bool = False) -> list[ApiPrompt]:
        """`to_api` for several workflows at once: the converter takes longer to start than to convert them."""
        question = json.dumps({"workflows": workflows, "object_info": self.object_info()})
        command = [str(ensure_client(offline=offline)), str(_CONVERTER)]
        done = subprocess.run(
            command, input=question, env=clean_environment(), capture_output=True, encoding="utf-8", check=False
        )
        if done.returncode != 0:
            reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
            raise WorkflowError(f"The workflow could not be converted to API format: {reason[0]}.")
        return json.loads(done.stdout)

    def _launch(self, compute: Sequence[str]) -> None:
        command = [str(self.host.python), str(self.host.tree / "main.py"), "--base-directory", str(self.base)]
        command += ["--listen", ADDRESS, "--port", str(self.port), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes", *compute, *self._arguments]
        environment = clean_environment() | {"PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1"}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.base,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C is for the tool, which then stops the server in its own time.
                start_new_session=os.name != "nt",
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )

    def _wait_until_ready(self, may_retry: bool) -> bool:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if not self.running:
                if may_retry and any("already in use" in line.lower() for line in self._log_lines()):
                    return False
                raise ServerError(f"ComfyUI did not start; its log ends: {self._log_end()}")
            try:
                self._request("GET", "/system_stats", _FIRST_SECONDS)
            except (OSError, http.client.HTTPException, ServerError):
                time.sleep(0.2)
                continue
            self._require_pack()
            return True
        raise ServerError(f"ComfyUI did not answer within {_START_SECONDS:g} seconds; its log ends: {self._log_end()}")

    def _require_pack(self) -> None:
        for line in self._log_lines():
            if "Cannot import" in line and base_folder.PACK_FOLDER in line:
                raise ServerError(f"ComfyUI could not load this pack: {line.strip()}; its log ends: {self._log_end()}")

    def _log_end(self) -> str:
        return "\n" + "\n".join(self._log_lines()[-_LOG_LINES:])

    def _log_lines(self) -> list[str]:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return _COLOUR.sub("", text).splitlines()

    def _request(self, method: str, path: str, seconds: float = _HTTP_SECONDS) -> bytes:
        connection = http.client.HTTPConnection(ADDRESS, self.port, timeout=seconds)
        try:
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise ServerError(f"The server answered {path} with {response.status} {response.reason}.")
        return body


def check_port(port: int) -> int:
    """Give `port` back if it is free on this machine; raises ToolError otherwise."""
    if not 1 <= port <= 65535:
        raise ToolError(f"{port} is no port; give one from 1 to 65535.")
    with socket.socket() as probe:
        if os.name != "nt":
            # As the server does; without it a port that was let go of a moment ago seems taken.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((ADDRESS, port))
        except OSError as error:
            raise ToolError(f"Port {port} cannot be used ({error.strerror}); give another with --port.") from error
    return port


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((ADDRESS, 0))
        return probe.getsockname()[1]


@functools.cache
def has_gpu(host: Host) -> bool:
    """Whether the host's torch finds one; without, the host is told to work on the CPU."""
    if sys.platform == "linux" and not _has_driver():
        # To ask torch takes two seconds.
        return False
    kinds = " or ".join(f"torch.{kind}.is_available()" for kind in ("cuda", "xpu", "backends.mps"))
    question = f"import torch; print({kinds})"
    command = [str(host.python), "-c", question]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    return done.returncode == 0 and done.stdout.split()[-1:] == ["True"]


def _has_driver() -> bool:
    """Whether a Linux has what CUDA, XPU or ROCm begin with: NVIDIA's or Intel's library, AMD's device."""
    for library in ("libcuda.so.1", "libze_loader.so.1"):
        with suppress(OSError):
            ctypes.CDLL(library)
            return True
    return Path("/dev/kfd").exists()
