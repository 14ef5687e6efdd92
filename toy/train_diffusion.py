"""Trains the toy's U-Net and text encoder together on the autoencoder's latents."""

from __future__ import annotations

from collections import deque
from pathlib import Path

import torch
from comfy.clip_model import CLIPTextModel, CLIPTextModel_
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ops import disable_weight_init
from comfy.taesd.taesd import TAESD
from torch.nn import functional

from .data import batches
from .family import LATENT_CHANNELS, TEXT, UNET
from .runs import Average, Run, load_tensors, save_whole
from .train_autoencoder import to_signal

CAPTION_DROPOUT = 0.1
SNR_CAP = 5.0


def alphas_cumprod(device: torch.device) -> torch.Tensor:
    """Stable Diffusion's schedule: 1,000 betas, evenly spaced in their square root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float().to(device)


class Model(torch.nn.Module):
    """The two trained parts under one roof."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNetModel(**UNET, operations=disable_weight_init)
        self.text = CLIPTextModel(TEXT, None, None, disable_weight_init)


def initialise(model: Model) -> None:
    """Usual initial weights, since the host's layers are made without any: residual branches start at zero,
    and so do the embeddings of words that no caption uses, which keeps them compressible."""
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(layer.weight)
            torch.nn.init.zeros_(layer.bias)
        elif isinstance(layer, torch.nn.Embedding):
            torch.nn.init.zeros_(layer.weight)
    torch.nn.init.normal_(model.text.text_model.embeddings.position_embedding.weight, std=0.05)
    for name, layer in model.unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            torch.nn.init.zeros_(layer.weight)


def initialise_words(model: Model, tokens: torch.Tensor) -> None:
    """Random embeddings for the words of these tokens that have none yet."""
    table = model.text.text_model.embeddings.token_embedding.weight
    used = tokens.unique()
    fresh = used[(table[used] == 0).all(1)]
    with torch.no_grad():
        table[fresh] = torch.randn(len(fresh), table.shape[1], device=table.device) * 0.5


def encode_text(text: CLIPTextModel_, tokens: torch.Tensor) -> torch.Tensor:
    """The host's CLIP text model on token ids (n, 77), giving (n, 77, width). Written with sums that make new
    tensors: the host's own forward adds in place, which autograd refuses."""
    x = text.embeddings(tokens)
    length = tokens.shape[1]
    mask = torch.full((length, length), -torch.finfo(x.dtype).max, dtype=x.dtype, device=x.device).triu(1)
    for layer in text.encoder.layers:
        x = x + layer.self_attn(layer.layer_norm1(x), mask, attention_pytorch)
        x = x + layer.mlp(layer.layer_norm2(x))
    return text.final_layer_norm(x)


class Latents:
    """A store of encoded scenes on the device: every batch adds fresh ones and trains on a random draw of all."""

    def __init__(self, autoencoder: TAESD, data: object, device: torch.device, capacity: int) -> None:
        self.autoencoder, self.data, self.device, self.capacity = autoencoder, data, device, capacity
        self.latents = torch.empty(capacity, LATENT_CHANNELS, 16, 16, dtype=torch.float16, device=device)
        self.tokens = torch.empty(capacity, TEXT["max_position_embeddings"], dtype=torch.int32, device=device)
        self.written = 0
        self.new_tokens: deque[torch.Tensor] = deque()

    @torch.no_grad()
    def add(self) -> torch.Tensor:
        """Encodes one more batch of pictures into the store; gives its token ids."""
        images, tokens = next(self.data)
        with torch.autocast(self.device.type, torch.bfloat16):
            latents = self.autoencoder.encode(to_signal(images, self.device))
        rows = (self.written + torch.arange(len(images), device=self.device)) % self.capacity
        self.latents[rows] = latents.to(self.latents.dtype)
        self.tokens[rows] = tokens.to(self.device, torch.int32)
        self.written += len(images)
        return tokens

    def draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(min(self.written, self.capacity), (count,), device=self.device)
        return self.latents[rows].float(), self.tokens[rows].long()


def diffusion_loss(model: Model, latents: torch.Tensor, tokens: torch.Tensor, schedule: torch.Tensor) -> torch.Tensor:
    """Denoising loss on the predicted noise, weighted as v prediction would be, (SNR + 1) / SNR (Salimans and Ho
    2022), and by min(SNR, 5) / SNR (Hang et al. 2023).

    Flat grounds shine through the strongest noise: there the noise is predicted to half a percent without a look at
    the caption, and unweighted its error teaches next to nothing of words."""
    count = len(latents)
    timestep = torch.randint(len(schedule), (count,), device=latents.device)
    alpha = schedule[timestep].view(-1, 1, 1, 1)
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    with torch.autocast(latents.device.type, torch.bfloat16):
        context = encode_text(model.text.text_model, tokens)
        predicted = model.unet(noisy, timestep, context=context)
    snr = alpha / (1 - alpha)
    weight = (snr + 1) / snr * snr.clamp(max=SNR_CAP) / snr
    error = functional.mse_loss(predicted.float(), noise, reduction="none")
    return (weight * error).mean() / weight.mean().detach()


def train(
    minutes: float, folder: Path, device: torch.device, workers: int, batch: int, seed: int, resume: bool
) -> Path:
    """Trains for `minutes` and writes `folder/diffusion.safetensors`; gives its path.

    Encoding a picture costs about as much as a training step on it, so each step adds a twelfth of a batch of
    new pictures to the store and trains on a batch drawn from all of it.
    """
    torch.manual_seed(seed)
    autoencoder = TAESD(latent_channels=LATENT_CHANNELS).to(device)
    autoencoder.load_state_dict(load_tensors(folder / "autoencoder.safetensors"))
    autoencoder.requires_grad_(False)
    model = Model().to(device)
    initialise(model)
    schedule = alphas_cumprod(device)
    drawn = max(batch // 12, 1)
    capacity = 2_000_000 if device.type == "cuda" else 100_000
    run = Run("diffusion", model, folder / "diffusion.state", minutes, 1e-3, warmup=500, decay=0.9995)
    resumed = resume and run.resume(device)
    path = folder / "diffusion.safetensors"
    if not resumed and path.exists():
        # What a checkpoint brought, or an earlier run: weights to train on from, with a schedule of their own.
        model.load_state_dict(load_tensors(path))
    store = Latents(autoencoder, batches(drawn, workers, seed + 1 + run.step, tokenize=True), device, capacity)
    empty = torch.full((1, TEXT["max_position_embeddings"]), TEXT["eos_token_id"], device=device)
    empty[0, 0] = TEXT["eos_token_id"] - 1
    initialise_words(model, empty)
    while store.written < 2 * batch:
        initialise_words(model, store.add().to(device))
    if not resumed:
        # Begin the average with the words in it.
        run.average = Average(model, run.average.decay)
    going = True
    while going:
        initialise_words(model, store.add().to(device))
        latents, tokens = store.draw(batch)
        dropped = torch.rand(batch, device=device) < CAPTION_DROPOUT
        tokens = torch.where(dropped[:, None], empty, tokens)
        going = run.advance(diffusion_loss(model, latents, tokens, schedule), batch)
    save_whole(path, run.average.module.state_dict())
    print(f"diffusion: {run.step} steps of {batch}, {store.written:,} pictures drawn", flush=True)
    return path
