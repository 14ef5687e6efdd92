"""Routes of a server that tell what its process holds, and that have a run interrupted at a certain step.
Imported by the server alone (`served.install`)."""

from __future__ import annotations

import gc
import threading
from typing import Any

import comfy.model_management
import comfy.utils
import psutil
import torch
from aiohttp import web
from server import PromptServer
from torch import Tensor

# Classes of which nothing may live when no run does, by the end of their module's name.
RUNS = {
    "Session": "patches.engine.session",
    "Forward": "patches.engine.session",
    "Recording": "patches.engine.recording",
}


def _held() -> dict[str, Any]:
    gc.collect()
    memory, count, hooks, runs = {}, 0, 0, 0
    for item in gc.get_objects():
        kind = type(item)
        if issubclass(kind, Tensor):
            count += 1
            if item.layout == torch.strided and item.device.type != "meta":
                storage = item.untyped_storage()
                memory[storage.data_ptr()] = storage.nbytes()
        elif issubclass(kind, torch.nn.Module):
            parts = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
            hooks += sum(len(item.__dict__.get(part, ())) for part in parts)
        elif kind.__name__ in RUNS and str(kind.__module__).endswith(RUNS[kind.__name__]):
            runs += 1
    return {
        "resident": psutil.Process().memory_info().rss,
        "tensors": count,
        "bytes": sum(memory.values()),
        "hooks": hooks,
        "runs": runs,
        "threads": threading.active_count(),
        "models": len(comfy.model_management.current_loaded_models),
    }


@PromptServer.instance.routes.get("/soak/held")
async def held(_request: web.Request) -> web.Response:
    """How much there is of what runs could leave."""
    return web.json_response(_held())


@PromptServer.instance.routes.get("/soak/resident")
async def resident(_request: web.Request) -> web.Response:
    """The process's memory, in bytes, as it is: nothing is collected for it."""
    return web.json_response(psutil.Process().memory_info().rss)


class _Interrupts:
    """Counts what nodes tell of their progress, and interrupts as the page's button does when it was so often."""

    def __init__(self) -> None:
        self.at = self.seen = 0
        self.inner: Any = None

    def begin(self, at: int) -> None:
        if self.inner is None:
            # The server puts its own there after it has imported us.
            self.inner = comfy.utils.PROGRESS_BAR_HOOK
            comfy.utils.set_progress_bar_global_hook(self)
        self.at, self.seen = at, 0

    def __call__(self, *given: Any, **more: Any) -> Any:
        self.seen += 1
        if self.seen == self.at:
            comfy.model_management.interrupt_current_processing()
        return self.inner(*given, **more)


_interrupts = _Interrupts()


@PromptServer.instance.routes.get("/soak/interrupt/{at}")
async def interrupt(request: web.Request) -> web.Response:
    """Has the run that comes interrupted at its `at`-th progress (0: never); tells how many the last one had."""
    seen = _interrupts.seen
    _interrupts.begin(int(request.match_info["at"]))
    return web.json_response(seen)
