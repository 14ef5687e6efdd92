"""The server that the tools start: that it starts, answers, says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import hosting.server
import pytest
from hosting.base import PACK_FOLDER, prepare
from hosting.client import Progress
from hosting.errors import ServerError, ToolError, WorkflowError, WorkflowInterrupted
from hosting.location import Host
from hosting.paths import ROOT
from hosting.pip import clean_environment
from hosting.server import Server, check_port

TOOLS = ROOT / "tools"


def _solid(side: int) -> dict[str, dict[str, Any]]:
    return {
        "1": {"class_type": "EmptyImage", "inputs": {"width": side, "height": side, "batch_size": 1, "color": 255}},
        "2": {
            "class_type": "SaveImage",
            "inputs": {"images": ["1", 0], "filename_prefix": "blue"},
            "_meta": {"title": "Blue"},
        },
    }


def _blurs(count: int) -> dict[str, dict[str, Any]]:
    prompt = _solid(1024)
    for number in range(count):
        inputs = {"image": ["1" if number == 0 else f"b{number - 1}", 0], "blur_radius": 31, "sigma": 1.0 + number / 97}
        prompt[f"b{number}"] = {"class_type": "ImageBlur", "inputs": inputs}
    prompt["2"]["inputs"]["images"] = [f"b{count - 1}", 0]
    return prompt


def test_queue_gives_pictures_and_progress(server: Server) -> None:
    """A workflow runs, its progress names the nodes by their titles, and the picture can be fetched."""
    seen: list[Progress] = []
    outputs = server.queue(_solid(24), progress=seen.append)
    assert [(step.node_id, step.title) for step in seen] == [("1", "EmptyImage"), ("2", "Blue")]
    (image,) = outputs["2"]["images"]
    assert server.fetch(image).startswith(b"\x89PNG")


def test_pack_is_loaded(server: Server) -> None:
    """The server found this checkout among its custom nodes and could import it."""
    assert (server.base / "custom_nodes" / PACK_FOLDER).resolve() == ROOT
    times = server.log.read_text(encoding="utf-8").split("Import times for custom nodes")[1]
    assert PACK_FOLDER in times
    assert "IMPORT FAILED" not in times


def test_refused_workflow_names_the_node(server: Server) -> None:
    """Both kinds of refusal: a value that is not on offer, and a node that does not exist."""
    prompt = _solid(24)
    prompt["1"]["inputs"]["width"] = -1
    with pytest.raises(WorkflowError, match=r"refused EmptyImage \(node 1\): .*width") as refused:
        server.queue(prompt)
    assert (refused.value.node_id, refused.value.node_type) == ("1", "EmptyImage")
    with pytest.raises(WorkflowError, match="'Nonesuch' not found"):
        server.queue(_solid(24) | {"1": {"class_type": "Nonesuch", "inputs": {}}})


def test_one_refused_output_of_two_is_a_refusal(server: Server) -> None:
    """The host would run the other one and say nothing more."""
    other = _solid(-1)
    prompt = _solid(24) | {"3": other["1"], "4": {**other["2"], "inputs": {**other["2"]["inputs"], "images": ["3", 0]}}}
    with pytest.raises(WorkflowError, match=r"refused EmptyImage \(node 3\): .*width"):
        server.queue(prompt)
    assert "2" in server.queue(_solid(24))


def test_failing_node_is_named(server: Server) -> None:
    """An exception in a node arrives with the node and its message, and the server goes on."""
    (server.base / "input" / "broken.png").write_bytes(b"no picture")
    prompt = _solid(24) | {"1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}}
    with pytest.raises(WorkflowError, match=r"LoadImage \(node 1\)"):
        server.queue(prompt)
    assert server.queue(_solid(25))["2"]["images"]


def test_interrupt_ends_a_run(server: Server) -> None:
    """Interrupting from another thread ends the run early, and the next one is not touched by it."""
    started = threading.Event()
    threading.Thread(target=lambda: started.wait(30) and server.interrupt()).start()
    with pytest.raises(WorkflowInterrupted):
        server.queue(_blurs(60), progress=lambda step: started.set() if step.node_id == "b1" else None)
    assert server.queue(_solid(26))["2"]["images"]


def test_too_slow_a_run_is_interrupted(server: Server) -> None:
    """A run that takes longer than it may is ended with a sentence."""
    with pytest.raises(ServerError, match=r"did not end within 0\.5 seconds"):
        server.queue(_blurs(61), seconds=0.5)
    assert server.queue(_solid(27))["2"]["images"]


def test_stop_leaves_nothing(host: Host, tmp_path: Path) -> None:
    """After a with block that an exception left, the process, the port and the temporary folder are gone."""
    checkpoint = tmp_path / "small.safetensors"
    checkpoint.write_bytes(b"x")
    with contextlib.suppress(ZeroDivisionError), Server(host, checkpoints=[checkpoint]) as server:
        process, base, port = server._process, server.base, server.port
        names = server.object_info()["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"]
        assert "small.safetensors" in str(names)
        with pytest.raises(WorkflowError, match="CheckpointLoaderSimple"):
            server.queue(
                {
                    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "small.safetensors"}},
                    "2": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["1", 2]}},
                    "3": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
                    "4": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}},
                }
            )
        raise ZeroDivisionError
    assert process is not None
    assert process.poll() is not None
    assert not base.exists()
    assert check_port(port) == port
    assert checkpoint.exists()
    assert (ROOT / "tools" / "host.py").exists()


def test_base_can_be_kept_and_used_again(host: Host, tmp_path: Path) -> None:
    """A folder that was chosen stays, and a link in it to a checkout that has moved does not stop the next start."""
    link = tmp_path / "custom_nodes" / PACK_FOLDER
    link.parent.mkdir()
    link.symlink_to(tmp_path / "moved")
    prepare(tmp_path)
    assert link.resolve() == ROOT
    link.unlink()
    link.mkdir()
    with pytest.raises(ToolError, match="is in the way of a link"), Server(host, base=tmp_path):
        pass
    assert link.is_dir()


def test_failing_start_shows_the_log(host: Host) -> None:
    """What main.py complains of reaches the person, and nothing is left."""
    server = Server(host, arguments=["--nonesuch"])
    with pytest.raises(ServerError, match=r"(?s)did not start; its log ends: .*unrecognized arguments: --nonesuch"):
        server.start()
    assert not server.running
    with pytest.raises(ServerError, match="has not been started"):
        _ = server.base


def test_a_port_that_is_taken_meanwhile_is_given_up(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may take a free port before the server does: the server then starts on another."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        free = hosting.server._free_port
        ports = iter([taken.getsockname()[1], free()])
        monkeypatch.setattr(hosting.server, "_free_port", lambda: next(ports))
        with Server(host) as server:
            assert server.port != taken.getsockname()[1]
            assert server.running


def test_missing_checkpoint_is_one_sentence(host: Host, tmp_path: Path) -> None:
    """A checkpoint that is not there is named before anything starts."""
    with pytest.raises(ToolError, match="There is no checkpoint"), Server(host, checkpoints=[tmp_path / "none"]):
        pass


def test_port_in_use_is_one_sentence() -> None:
    """`serve` on a port that another program has ends at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = _tool("host.py", "serve", "--port", port)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: Port {port} cannot be used")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("host.py", "serve", "--nonesuch"), ("--nonesuch",)),
        (("host.py",), ("command",)),
        (("host.py", "serve", "--port", "x"), ("--port", "'x'")),
        (("host.py", "serve", "--port", "70000"), ("70000 is no port",)),
        (("demo.py", "--nonesuch"), ("--nonesuch",)),
        (("demo.py", "--workflow", "nonesuch"), ("no workflow 'nonesuch'",)),
        (("demo.py", "--checkpoint", "nonesuch.safetensors"), ("no checkpoint nonesuch.safetensors",)),
        (("demo.py", "--checkpoint", __file__), ("--checkpoint is for one workflow",)),
        (("manifest.py", "--add", "x"), ("--add needs",)),
        (("author.py", "nonesuch.json"), ("nonesuch.json is no readable workflow",)),
        (("effects.py", "--only", "outs"), ("no 'outs' to measure", "layout", "dual branch")),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_argument_is_one_sentence(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """Every tool answers what it cannot use with one sentence that names it, and a code that is not zero."""
    done = _tool(*arguments)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def test_host_python_runs_here_with_the_hosts_modules() -> None:
    """`host.py python` has this folder as its own, the host's `nodes` before ours, and gives the exit code on."""
    code = (
        "import os, sys; from hosting.device import use_cpu_without_gpu; use_cpu_without_gpu(); "
        "import nodes, toy; print(os.getcwd(), nodes.__file__); sys.exit(7)"
    )
    done = _tool("host.py", "python", "-c", code)
    assert done.returncode == 7, done.stderr
    folder, module = done.stdout.split()
    assert Path(folder) == ROOT
    assert Path(module).name == "nodes.py"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_stops_serve_and_its_server(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and a plain kill end `serve` with a word, and its server with it."""
    port = _unused_port()
    command = [sys.executable, str(TOOLS / "host.py"), "serve", "--port", str(port)]
    serving = subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert serving.stdout is not None
        assert f"http://127.0.0.1:{port}" in serving.stdout.readline()
        serving.send_signal(number)
        _, errors = serving.communicate(timeout=30)
    finally:
        serving.kill()
    assert serving.returncode == 130
    assert errors.strip().splitlines()[-1] == "Stopped."
    assert check_port(port) == port


def _tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / arguments[0]), *arguments[1:]]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False)


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
