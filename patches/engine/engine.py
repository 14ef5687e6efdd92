"""Hangs edits on the host, by its wrappers.

At node time a MODEL is cloned and an edit is appended to it. While it samples, four wrappers do the rest:
OUTER_SAMPLE opens a session and closes it whatever happens; PREPARE_SAMPLING tells the host what memory the run takes
besides the picture's, before it loads the model (`memory.py`); PREDICT_NOISE runs the companion streams at the
sampler's noise level; APPLY_MODEL puts replacements in the attention slots of a U-Net for one forward (`slots.py`), or
opens the attentions of a transformer (`openings.py`). Nothing is kept outside the model's options and the run's
session.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..families import Transformer, family_of
from ..parts.graph import lost
from ..parts.process import Process
from ..parts.sites import Site
from ..parts.window import Levels
from .companion import companion_call, companion_options, silenced
from .conditionings import entries_of
from .denoising import Denoising, Kept
from .edit import Edit, Start
from .guidance import guidance_of, guide_branch, looks_beside
from .memory import announced, longest, size_kept
from .openings import opened
from .passes import RECORDING, run_stream
from .recording import Recording
from .session import Forward, Session
from .slots import composed, editor, plain, recorder, watched
from .widening import Widening

Wrapper = Callable[..., Any]
KEY = "subject_patches"
SESSION = "subject_patches_session"


def add_edit(model: Any, edit: Edit, models: Sequence[Any] = ()) -> Any:
    """A clone of MODEL with one more edit; the given MODEL stays as it is. `models` are what the host is to move beside
    it for the edit, each once, whichever edits want it. Raises ValueError where PyTorch is too old."""
    if not hasattr(torch.compiler, "set_stance"):
        raise ValueError(
            f"Subject Patches' nodes need PyTorch 2.6 or newer, and this is {torch.__version__}; update ComfyUI's "
            "PyTorch."
        )
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options[KEY] = (*options.get(KEY, ()), edit)
    wanted = {id(each.model) for each in models}
    others = [each for each in patched.get_additional_models_with_key(KEY) if id(each.model) not in wanted]
    patched.set_additional_models(KEY, [*others, *models])
    wrappers = {
        WrappersMP.OUTER_SAMPLE: _sample,
        WrappersMP.PREPARE_SAMPLING: _prepare,
        WrappersMP.PREDICT_NOISE: _predict_noise,
        WrappersMP.APPLY_MODEL: _apply_model,
    }
    wrap(patched, KEY, wrappers)
    return patched


def wrap(patched: Any, key: str, wrappers: Mapping[str, Wrapper]) -> None:
    """Registers the wrappers of a run of a MODEL under a key, by the host's kinds of them, where they are not yet."""
    for kind, wrapper in wrappers.items():
        if not patched.get_wrappers(kind, key):
            patched.add_wrapper_with_key(kind, key, wrapper)


def _sample(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    guider = executor.class_obj
    # The host gives every run its own copy of these options, and drops it afterwards.
    options = guider.model_options["transformer_options"]
    edits = options.get(KEY, ())
    if not edits or SESSION in options:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    _check(guider, noise)
    prompts = entries_of(guider, conditioned=True)
    for edit in edits:
        try:
            edit.check(prompts)
        except ValueError as error:
            # All that nodes of ours say in a prompt's dictionary begins so.
            known = any(str(name).startswith(KEY) for prompt in prompts for name in prompt)
            raise ValueError(f"{error}{'' if known else lost()}") from error
    # Some samplers write into the levels they are given (uni_pc), and the host keeps these for the next run.
    sigmas = sigmas.clone()
    start = _start(guider, noise, latent_image, sigmas, denoise_mask)
    begun = [edit.begin() for edit in edits]
    for edit in begun:
        edit.start(start)
    parts = [part for edit in begun for part in edit.parts()]
    session = Session(parts, KEY, family_of(guider.model_patcher), start.levels)
    options[SESSION] = session
    _put_innermost(options["wrappers"][WrappersMP.PREDICT_NOISE])
    try:
        result = executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
        session.tell()
        session.warn_of_left()
        return result
    finally:
        del options[SESSION]
        session.close()


def _put_innermost(wrappers: dict[Any, Any]) -> None:
    """Puts ours of a run's wrappers behind all others, in their order: these may change what ours goes by, as CFG
    Override does."""
    for key in [key for key in wrappers if str(key).startswith(KEY)]:
        wrappers[key] = wrappers.pop(key)


def _prepare(
    executor: Any,
    model: Any,
    noise_shape: Sequence[int],
    conds: Mapping[str, Any],
    model_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    session: Session | None = (model_options or {}).get("transformer_options", {}).get(SESSION)
    if session is None:
        return executor(model, noise_shape, conds, model_options=model_options, **kwargs)
    network, dtype = model.model.diffusion_model, model.model.get_dtype_inference()
    size = size_kept(session.edits, session.levels, session.family, network, dtype, longest(conds))
    taking = announced(conds, KEY, size)
    prepared, conds, models = executor(model, noise_shape, taking, model_options=model_options, **kwargs)
    return prepared, {name: listed for name, listed in conds.items() if name != KEY}, models


def _check(guider: Any, noise: Tensor) -> None:
    """Raises ValueError for a run in which edits cannot act."""
    if noise.ndim == 5 and noise.shape[2] > 1:
        raise ValueError(
            f"This run makes {noise.shape[2]} frames, but Subject Patches' nodes work on pictures; set the length of "
            "the latent to 1, or take the nodes out of the model's way."
        )
    # So the host's MultiGPU CFG Split names its copies of the model.
    copies = guider.model_patcher.get_additional_models_with_key("multigpu")
    if copies:
        raise ValueError(
            f"This model's prompts are split over {1 + len(copies)} GPUs, but Subject Patches' nodes need them on one; "
            "bypass MultiGPU CFG Split, or take the nodes out of the model's way."
        )


def _start(guider: Any, noise: Tensor, latents: Tensor, sigmas: Tensor, mask: Tensor | None) -> Start:
    """As the host's samplers begin."""
    patcher = guider.model_patcher
    model_sampling = patcher.get_model_object("model_sampling")
    # The host does not shift an empty latent.
    latent_format = patcher.get_model_object("latent_format")
    clean = latent_format.process_in(latents) if bool(latents.any()) else latents
    most = float(model_sampling.sigma_max)

    def noised(other: Tensor, sigma: float) -> Tensor:
        whole = math.isclose(sigma, most, rel_tol=1e-5) or sigma > most
        # The host's own sampler may hold its noise levels on another device than the noise.
        level = torch.tensor(sigma, device=other.device)
        return model_sampling.noise_scaling(level, other.float(), clean.to(other.device), whole)

    # Noise that is all zeros is all that the host tells of a run that goes on with another's picture.
    levels = Levels(tuple(sigmas.flatten().tolist()), bool(noise.any()), model_sampling.percent_to_sigma)

    def kept(other: Tensor) -> Kept | None:
        return None if mask is None else _kept(guider, other, clean, sigmas, mask)

    return Start(noise, noised, clean, levels, Process.of(model_sampling), mask, kept)


def _kept(guider: Any, noise: Tensor, clean: Tensor, sigmas: Tensor, mask: Tensor) -> Kept:
    """What the host's samplers keep of `clean` under a noise mask, with another noise than theirs."""
    device = mask.device
    noise, clean = noise.to(device), clean.to(device).float()

    def levels(sigma: float) -> Tensor:
        return torch.full((len(noise),), sigma, device=device)

    def mask_at(sigma: float) -> Tensor:
        # The host gives the function of a model (DifferentialDiffusion's) the same.
        function = guider.model_options.get("denoise_mask_function")
        options = {"model": guider, "sigmas": sigmas}
        return mask if function is None else function(levels(sigma), mask, extra_options=options)

    def noised(sigma: float) -> Tensor:
        return guider.inner_model.scale_latent_inpaint(
            x=noise, sigma=levels(sigma), noise=noise.float(), latent_image=clean
        )

    return Kept(clean, mask_at, noised)


def _predict_noise(
    executor: Any, x: Tensor, timestep: Tensor, model_options: dict[str, Any], seed: Any = None
) -> Tensor:
    session = model_options.get("transformer_options", {}).get(SESSION)
    if session is None:
        return executor(x, timestep, model_options, seed)
    session.enter(executor.class_obj, x, timestep)
    requests = session.requests(model_options)
    options = companion_options(model_options, KEY) if requests else {}
    for stream, sites, parts in requests:
        run_stream(session, stream, sites, parts, timestep, options)
    branches = list(dict.fromkeys(stream for stream, *_ in requests if isinstance(stream, Denoising)))
    if not branches:
        return executor(x, timestep, model_options, seed)
    # A sampler that asks for the unconditional prediction goes on with its noise.
    plus = looks_beside(executor.class_obj, model_options)
    seen: list[dict[str, Any]] = []

    def look(arguments: dict[str, Any]) -> Tensor:
        seen.append(arguments)
        return arguments["denoised"]

    others = model_options.get("sampler_post_cfg_function", [])
    result = executor(x, timestep, {**model_options, "sampler_post_cfg_function": [look, *others]}, seed)
    guidance = guidance_of(seen[0]) if seen else None
    if guidance is not None:
        for branch in branches:
            guide_branch(session, branch, guidance, timestep, options, plus)
    for branch in branches if guidance is None else ():
        if branch.own_guidance:
            session.warn_once(
                f"{branch.node}'s guidance is 'own', but no negative prompt is in this run (CFG 1, as distilled models "
                "are run); its branch goes without guidance, as the picture does."
            )
    return result


def _apply_model(
    executor: Any,
    x: Tensor,
    t: Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Tensor:
    options = transformer_options or {}
    session: Session | None = options.get(SESSION)
    # A guider may run other models with these options, as the host's with a model for the negative prompt does.
    if session is not None and session.runs(executor.class_obj):
        recording: Recording | None = options.get(RECORDING)
        if recording is None:
            forward = session.forward(options, x, c_crossattn, float(t[0]))
        else:
            # Without sites it is the pass for a branch's guidance, which no prompt conditions.
            denoises = isinstance(recording.stream, Denoising) and recording.sites
            forward = session.branch(recording.stream, x.shape[0]) if denoises else None
        if recording is not None:
            options = companion_call(options, recording.left_out)
            if recording.stream.how.without_cross_attention:
                # What a layer adds to its input, output projection and its bias included, and whoever made it.
                listed = options["patches"].get("attn2_output_patch", [])
                options["patches"]["attn2_output_patch"] = [*listed, silenced]
        else:
            # A compiled network remembers what its options are named, and would miss ours in another run.
            options = {name: value for name, value in options.items() if name not in (KEY, SESSION)}
        if forward is not None or recording is not None:
            network = executor.class_obj.diffusion_model
            options = _patched(session, forward, recording, network, x, c_crossattn, kwargs, options)
            # The host's node for torch.compile lets a network go on with the patches that it was traced with.
            with torch.compiler.set_stance("force_eager"):
                return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


def _patched(
    session: Session,
    forward: Forward | None,
    recording: Recording | None,
    network: Any,
    x: Tensor,
    context: Tensor | None,
    given: Mapping[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options of one forward with what edits and recordings have to do in it."""
    if isinstance(session.family, Transformer):
        length, ahead = session.family.context_length(context, given), session.family.tokens_ahead(given)
        return opened(session, forward, recording, network, x, length, ahead, options)
    patches: dict[Site, Any] = {}
    if forward is not None:
        widenings = {"self": Widening(), "cross": Widening()}
        patches = {site: editor(session, forward, site, widenings[site.kind]) for site in forward.sites}
        options = {**options, "patches": watched(options.get("patches", {}), widenings)}
    if recording is not None:
        patches |= {site: recorder(session, recording, site, patches.get(site, plain)) for site in recording.sites}
    return {**options, "patches_replace": composed(options.get("patches_replace", {}), patches)} if patches else options
