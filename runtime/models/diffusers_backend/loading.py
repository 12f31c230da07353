"""A checkpoint's diffusers pipeline, from safetensors only, with the options that were asked for."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
from transformers.utils import logging as transformers_logging

from safelight.configs.families import ModelSpec
from safelight.configs.options import did_you_mean
from safelight.runtime.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions

# What loading may raise for a checkpoint that is not what its model_index.json says.
_LOAD_ERRORS = (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError, SafetensorError)


def load_diffusers(spec: ModelSpec, options: LoadOptions) -> Any:
    """The pipeline on its device. Pickles are never read; nothing is downloaded. Raises ModelError and ConfigError."""
    _quieten()
    options.graphs.switch_off()  # its forwards are not ours to record
    try:
        with torch.inference_mode(False):  # its calls run outside of the executor's inference mode
            pipe = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
                str(spec.root),
                dtype={"default": options.dit_dtype, "vae": options.vae_dtype},
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=options.trust_remote_code,
            )
            pipe.to(options.device)
    except torch.OutOfMemoryError:
        raise
    except _LOAD_ERRORS as error:
        raise ModelError(f"{spec.root}: diffusers cannot load it: {error}", param="model_path") from error
    vae = getattr(pipe, "vae", None)
    for wanted, name in ((options.vae_tiling, "enable_tiling"), (options.vae_slicing, "enable_slicing")):
        if wanted:
            _enable(vae, name, spec)
    if vae is not None and options.vae_dtype != options.dit_dtype:
        _cast_inputs(vae, options.vae_dtype)
    if options.diffusers_attention_backend is not None:
        _set_attention(pipe, options.diffusers_attention_backend, spec)
    return pipe


def _quieten() -> None:
    """No bars and hints of both libraries on the server's stderr; and bars take a lock of threads, since one of
    processes would be reported as leaked when the worker exits."""
    tqdm.set_lock(threading.RLock())
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The components that have weights."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _enable(vae: Any, name: str, spec: ModelSpec) -> None:
    try:
        getattr(vae, name)()
    except (AttributeError, NotImplementedError) as error:
        flag = "--vae-" + name.removeprefix("enable_")
        raise ConfigError(
            f"{flag}: the VAE of {spec.variant} ({type(vae).__name__}) cannot do that; leave it out",
            param=flag[2:].replace("-", "_"),
        ) from error


def _cast_inputs(vae: Any, dtype: torch.dtype) -> None:
    """Latents come in the transformer's precision, which not every pipeline converts to the VAE's."""
    for name in ("encode", "decode"):
        setattr(vae, name, functools.partial(_casting, getattr(vae, name), dtype))


def _casting(function: Any, dtype: torch.dtype, first: torch.Tensor, *others: Any, **named: Any) -> Any:
    return function(first.to(dtype), *others, **named)


def _set_attention(pipe: Any, name: str, spec: ModelSpec) -> None:
    """For the attention layers of diffusers' models in this pipeline alone: `set_attention_backend` would leave it as
    the process's default as well, which the context restores."""
    known = {backend.value for backend in AttentionBackendName}
    if name not in known:
        raise ConfigError(
            f"--diffusers-attention-backend: diffusers has no {name!r}{did_you_mean(name, known)}",
            param="diffusers_attention_backend",
        )
    models: list[Any] = [part for part in modules_of(pipe).values() if hasattr(part, "set_attention_backend")]
    try:
        with attention_backend(name):
            for model in models:
                model.set_attention_backend(name)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"--diffusers-attention-backend {name} cannot be had here: {error}", param="diffusers_attention_backend"
        ) from error
    processors = (getattr(m, "processor", None) for model in models for m in model.modules())
    if not any(getattr(p, "_attention_backend", None) == name for p in processors):
        raise ConfigError(
            f"--diffusers-attention-backend: no attention of {spec.variant} can be chosen; leave it out",
            param="diffusers_attention_backend",
        )
