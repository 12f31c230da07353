"""Safetensors files -> a module built on the meta device, tensor by tensor: peak memory is about the weights.

Everything that can be checked from the files' headers is checked before the first byte of data is read. Nothing here
can execute code from a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from safelight.kernels.dispatch import KernelSet, select_kernels
from safelight.runtime.errors import ModelError
from safelight.runtime.parallel.mesh import ParallelMesh

if TYPE_CHECKING:
    from safelight.runtime.models.registry import LoadOptions

M = TypeVar("M", bound=nn.Module)
NameMap = Mapping[str, tuple[str, ...]]  # our parameter -> the tensors that it is made of, stacked along dim 0


class Part(NamedTuple):
    """Slices [start, start + size) along `dim` of a tensor that has `total` of them."""

    dim: int
    start: int
    size: int
    total: int


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of a checkpoint, from its file's header; `shape` is that of its part where only one is loaded."""

    file: Path
    shape: tuple[int, ...]
    part: Part | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises ModelError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", param="model_path") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path}: a JSON object expected, got {type(values).__name__}", param="model_path")
    return values


def checkpoint_files(folder: Path, stem: str = "diffusion_pytorch_model") -> list[Path]:
    """The safetensors files of a component: `stem`.safetensors, or the shards that its index names.

    Raises ModelError: neither exists, or the index names a shard that does not, or one outside the folder.
    """
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{folder} has neither {single.name} nor {index.name}", param="model_path")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: a non-empty weight_map expected", param="model_path")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index} names the shard {name!r}; a plain file name expected", param="model_path")
        if not (folder / name).is_file():
            raise ModelError(f"{index} names the shard {name}, which is missing", param="model_path")
    return [folder / name for name in names]


def tensor_names(files: list[Path]) -> frozenset[str]:
    """The names of all tensors in safetensors files. Raises ModelError naming a file that cannot be read."""
    return frozenset(_headers(files))


def load_weights(
    module: nn.Module,
    files: list[Path],
    names: NameMap,
    device: torch.device,
    dtype_of: Callable[[str], torch.dtype],
    ignored: Callable[[str], bool] = lambda name: False,
    parts: Mapping[str, Part] = MappingProxyType({}),
    homes: Mapping[str, torch.device] = MappingProxyType({}),
) -> None:
    """Fills every parameter of `module` (built on the meta device) and moves its buffers to `device`.

    Of the sources in `parts` only that part is read (a rank's share of a matrix). Parameters below a submodule in
    `homes` go to the device given there.
    A source may have more dims than its parameter when its trailing dims flatten to it (a convolution loaded as a
    linear layer). `dtype_of(parameter name)` chooses each dtype; sources for which `ignored` holds may be extra.
    Raises ModelError naming file and tensor: corrupt, missing, extra or mis-shaped ones.
    """
    stored = _with_parts(_headers(files), parts)
    parameters = dict(module.named_parameters())
    _check(stored, parameters, names, ignored)
    sources = {source: target for target, pieces in names.items() for source in pieces}
    starts: dict[str, int] = {}
    for pieces in names.values():
        offset = 0
        for source in pieces:
            starts[source] = offset
            offset += stored[source].shape[0]
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        with _opened(file) as handle:
            for source in [name for name, entry in stored.items() if entry.file == file and name in sources]:
                target = sources[source]
                if target not in loaded:
                    shape = parameters[target].shape
                    home = next((d for name, d in homes.items() if target.startswith(f"{name}.")), device)
                    loaded[target] = torch.empty(shape, dtype=dtype_of(target), device=home)
                rows = loaded[target].narrow(0, starts[source], stored[source].shape[0])
                rows.copy_(_tensor(handle, stored[source], source).view(rows.shape))
    for target, tensor in loaded.items():
        owner, _, leaf = target.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    for child in module.modules():
        for name, buffer in list(child.named_buffers(recurse=False)):
            setattr(child, name, buffer.to(device))


def load_blocks(
    make: Callable[[ParallelMesh, KernelSet], M],
    folder: Path,
    options: LoadOptions,
    names: NameMap,
    dtype_of: Callable[[str, torch.dtype], torch.dtype],
    blocks: Sequence[str],
    apart: Sequence[str] = (),
    ignored: Callable[[str], bool] = lambda name: False,
) -> M:
    """The transformer that `make` builds, with the weights in `folder`, ready for inference.

    If the options say so, its lists of `blocks` are streamed, and each of the lists `apart` beside them.
    `dtype_of(parameter name, dtype of the model)`. Raises ModelError, as `load_weights`.
    """
    with torch.device("meta"):
        model = make(options.mesh, select_kernels(options.device, options.attention_backend))
    load_weights(
        model,
        checkpoint_files(folder),
        names,
        options.device,
        lambda name: dtype_of(name, options.dit_dtype),
        ignored,
        homes=options.residency.homes(*blocks, *apart),
    )
    options.residency.stream(model, *blocks)
    for name in apart:
        options.residency.stream(model, name)
    return model.eval()


def _headers(files: list[Path]) -> dict[str, _Stored]:
    stored: dict[str, _Stored] = {}
    for file in files:
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in stored:
                    raise ModelError(f"{file}: tensor {name} is also in {stored[name].file.name}", param="model_path")
                stored[name] = _Stored(file, tuple(handle.get_slice(name).get_shape()))
    return stored


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a readable safetensors file: {error}", param="model_path") from error


def _with_parts(stored: dict[str, _Stored], parts: Mapping[str, Part]) -> dict[str, _Stored]:
    """Raises ModelError for a tensor that has not as many slices as its part says."""
    made = dict(stored)
    for name, part in parts.items():
        if (entry := stored.get(name)) is None:
            continue  # reported as missing
        if len(entry.shape) <= part.dim or entry.shape[part.dim] != part.total:
            raise ModelError(
                f"{entry.file}: tensor {name} of shape {entry.shape} has not {part.total} slices along dim {part.dim}; "
                "is config.json of the same model?",
                param="model_path",
            )
        shape = (*entry.shape[: part.dim], part.size, *entry.shape[part.dim + 1 :])
        made[name] = _Stored(entry.file, shape, part)
    return made


def _tensor(handle: Any, entry: _Stored, name: str) -> torch.Tensor:
    file, part = entry.file, entry.part
    try:
        if part is None:
            tensor: torch.Tensor = handle.get_tensor(name)
        else:
            tensor = handle.get_slice(name)[(slice(None),) * part.dim + (slice(part.start, part.start + part.size),)]
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: tensor {name} cannot be read: {error}", param="model_path") from error
    return tensor


def _check(
    stored: Mapping[str, _Stored],
    parameters: Mapping[str, nn.Parameter],
    names: NameMap,
    ignored: Callable[[str], bool],
) -> None:
    """Raises ModelError unless the files hold exactly what the map asks for, in the right shapes."""
    assert set(names) == set(parameters), f"name map and module differ: {sorted(set(names) ^ set(parameters))[:4]}"
    wanted = {source for parts in names.values() for source in parts}
    folder = next(iter(stored.values())).file.parent if stored else Path()
    if missing := sorted(wanted - set(stored)):
        raise ModelError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}", param="model_path")
    if extra := sorted(name for name in set(stored) - wanted if not ignored(name)):
        raise ModelError(
            f"{stored[extra[0]].file}: {len(extra)} tensors belong to no known layer, the first is {extra[0]}",
            param="model_path",
        )
    for target, parts in names.items():
        rows, *rest = parameters[target].shape
        shapes = [stored[source].shape for source in parts]
        flat = [(s[0], *s[1:]) if len(s) == len(rest) + 1 else (s[0], torch.Size(s[1:]).numel()) for s in shapes if s]
        fits = len(flat) == len(parts) and sum(s[0] for s in flat) == rows and all([*s[1:]] == rest for s in flat)
        if not fits:
            raise ModelError(
                f"{stored[parts[0]].file}: tensors {', '.join(parts)} of shapes {shapes} do not make up a parameter of "
                f"shape {(rows, *rest)}; is config.json of the same model?",
                param="model_path",
            )
