"""Making the host's modules importable in a process of one's own on a machine without a GPU."""

from __future__ import annotations


def use_cpu_without_gpu() -> None:
    """Tell the host to work on the CPU where there is no GPU; call it before the first import of `comfy` modules.

    The host's model management looks for a GPU when it is imported and fails without one unless it was told.
    """
    import torch
    from comfy.cli_args import args

    if not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available()):
        args.cpu = True
