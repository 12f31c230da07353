"""From `--model-path` to a model directory: the built-in model, a local directory, or a download. Torch-free."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from safelight.runtime.errors import ModelError

INDEX = "model_index.json"
# Weights are safetensors only, so nothing that is downloaded can execute code. In the repository's top folder they are
# those of a single component: FLUX.1 has there, once more and in another format, all that its folders hold.
WEIGHTS = ("*/*.safetensors", "diffusion_pytorch_model*.safetensors", "model*.safetensors")
ALLOWED_FILES = (*WEIGHTS, "*.json", "tokenizer*/*.txt", "tokenizer*/*.model", "LICENSE*", "README.md")
_READ = (".json", ".safetensors", ".txt", ".model", ".py")  # suffixes of what models are loaded from
_SAMPLE = 1 << 20  # bytes
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def builtin_model() -> Path:
    """The directory of the model that ships with the package. Raises ModelError when the package lacks it."""
    path = Path(str(resources.files("safelight.runtime.models") / "builtin_model"))
    if not (path / "model_index.json").is_file():
        raise ModelError(
            f"the built-in model expected at {path} is not installed; pass --model-path", param="model_path"
        )
    return path


def is_hub_id(text: str) -> bool:
    """Whether `text`, which names no local file, reads as `organisation/name`."""
    return _HUB_ID.fullmatch(text) is not None


def resolve(
    text: str | None,
    param: str = "model_path",
    *,
    quiet: bool = False,
    code: bool = False,
    inspect: Callable[[Path], None] | None = None,
) -> Path:
    """The local directory of a model or component; None is the built-in model. `code`: download its Python files, too.
    `inspect`: sees the model_index.json of a repository, and may refuse it, before the rest is fetched.

    Raises ModelError naming `param`: no such directory, or a Hugging Face id that can be neither downloaded nor found
    in the local cache.
    """
    if text is None:
        return builtin_model()
    path = Path(text).expanduser()
    if path.exists() or not is_hub_id(text):
        if not path.is_dir():
            flag = "--" + param.replace("_", "-")
            raise ModelError(f"model directory expected at {path}, none is there; check {flag}", param=param)
        return path.resolve()
    return download(text, param, quiet=quiet, code=code, inspect=inspect)


def fingerprint(root: Path) -> str:
    """A sha256 that tells the model in one directory from another, wherever that is.

    Of the names and sizes of all files, the content of the small ones, and head and tail of the weights, which hold
    the names, shapes and last tensors: a hash of all weights would take minutes.
    """
    digest = hashlib.sha256()
    for path in sorted(found for found in root.rglob("*") if found.suffix in _READ):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(file.tell(), size - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def download(
    repo_id: str,
    param: str = "model_path",
    *,
    quiet: bool = False,
    code: bool = False,
    endpoint: str | None = None,
    cache_dir: Path | None = None,
    inspect: Callable[[Path], None] | None = None,
) -> Path:
    """Fetches what is missing of a Hugging Face repository into its cache, with progress on stderr unless `quiet`.

    Without a network the cached copy is used. Raises ModelError, and what `inspect` raises (see `resolve`).
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its HTTP library's
        EntryNotFoundError,
        GatedRepoError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet:
        disable_progress_bars()
    try:
        if inspect is not None:
            inspect(Path(hf_hub_download(repo_id, INDEX, endpoint=endpoint, cache_dir=cache_dir)))
        wanted = [*ALLOWED_FILES, *(("*.py",) if code else ())]
        found = snapshot_download(repo_id, allow_patterns=wanted, endpoint=endpoint, cache_dir=cache_dir)
    except GatedRepoError as error:
        message = f"{repo_id} asks for its licence to be accepted on huggingface.co; then log in with `hf auth login`"
        raise ModelError(message, param=param) from error
    except RepositoryNotFoundError as error:
        message = f"{repo_id} is neither a local directory nor a model on the hub that you may read; check its spelling"
        raise ModelError(message, param=param) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{repo_id} is not a local directory, and the hub cannot be reached to download it (no copy is cached "
            "either); check the network, or pass a directory",
            param=param,
        ) from error
    except EntryNotFoundError as error:
        message = f"{repo_id} has no {INDEX}, so it is not in diffusers format, which --model-path takes"
        raise ModelError(message, param=param) from error
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(f"{repo_id} could not be downloaded: {error}", param=param) from error
    return Path(str(found))
