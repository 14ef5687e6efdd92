"""Trains the toy's autoencoder: the host's TAESD shape with eight latent channels."""

from __future__ import annotations

from pathlib import Path

import torch
from comfy.taesd.taesd import TAESD
from subject_patches.training.files import save_whole
from torch.nn import functional

from .data import batches
from .family import LATENT_CHANNELS
from .runs import Peers, Run

# A latent is stored with unit variance; this is the noise, in that unit, that its decoder must bear.
LATENT_NOISE = 0.12
PRIOR_WEIGHT = 1e-3
# The layers are convolutions, so a part of a picture teaches them as much a pixel as a whole one.
CROP = 64


def initialise(module: torch.nn.Module) -> None:
    """Kaiming weights for the convolutions: the host's layers are made without any."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            # A residual block starts near the identity.
            layer.weight.data.mul_(0.7)
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)


def to_signal(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in -1 to 1."""
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random CROP x CROP part of each of the pictures (n, h, w, 3)."""
    corners = torch.randint(0, images.shape[1] - CROP + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[y : y + CROP, x : x + CROP] for image, (y, x) in zip(images, corners, strict=True)])


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L1 on the pixels, plus L1 on differences of neighbours, which keeps the edges of textures."""
    loss = functional.l1_loss(output, target)
    for axis in (2, 3):
        loss = loss + functional.l1_loss(output.diff(dim=axis), target.diff(dim=axis))
    return loss


def train(
    minutes: float, folder: Path, device: torch.device, peers: Peers, workers: int, batch: int, seed: int, resume: bool
) -> Path:
    """Trains for `minutes` and writes `folder/autoencoder.safetensors`; gives its path."""
    torch.manual_seed(seed)
    model = TAESD(latent_channels=LATENT_CHANNELS).to(device)
    initialise(model)
    model.vae_scale.requires_grad_(False)
    model.vae_shift.requires_grad_(False)
    model.to(memory_format=torch.channels_last)
    run = Run("autoencoder", model, folder / "autoencoder.state", minutes, 1e-3, peers, warmup=200, decay=0.999)
    if resume:
        run.resume(device)
    # From here on every peer draws for itself.
    own = (seed * peers.count + peers.rank) * 2**20 + run.step
    torch.manual_seed(own)
    corners = torch.Generator().manual_seed(own)
    data = batches(batch, workers, own, tokenize=False)
    going = True
    while going:
        signal = to_signal(crop(next(data)[0], corners), device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            latent = model.taesd_encoder(signal * 0.5 + 0.5).float()
            noisy = latent + LATENT_NOISE * torch.randn_like(latent)
            output = model.taesd_decoder(noisy).float() * 2 - 1
        going = run.advance(reconstruction_loss(output, signal) + PRIOR_WEIGHT * latent.square().mean(), batch)
    return finish(run.average.module, folder, device, seed) if peers.rank == 0 else folder


@torch.no_grad()
def finish(model: TAESD, folder: Path, device: torch.device, seed: int) -> Path:
    """Makes the latents' scale part of the model, measures it on held-out scenes, and saves it."""
    model = model.float().eval()
    signal = torch.cat([to_signal(next(batches(64, 0, seed + 10**6 + i, tokenize=False))[0], device) for i in range(4)])
    latent = model.taesd_encoder(signal * 0.5 + 0.5)
    model.vae_scale.fill_(float(latent.std()))
    model.vae_shift.fill_(-float(latent.mean() / latent.std()))
    output = model.decode(model.encode(signal)).clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (output - signal).square().mean((1, 2, 3))).mean()
    print(
        f"autoencoder: held-out PSNR {float(psnr):.2f} dB, latent std {float(latent.std()):.3f} before scaling",
        flush=True,
    )
    path = folder / "autoencoder.safetensors"
    save_whole(path, model.state_dict())
    return path
