"""Byte-level BPE tokenizers, read with the `tokenizers` library: CLIP's and Qwen2's.

A folder holds `tokenizer.json`, or `vocab.json` and `merges.txt` (FLUX's CLIP, Qwen-Image), of which the tokenizer is
put together by the rules of its class in transformers. Added tokens are in `tokenizer_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from safelight.runtime.errors import ModelError

CLIP_START, CLIP_END, QWEN_END = "<|startoftext|>", "<|endoftext|>", "<|endoftext|>"
_CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_clip_bpe(folder: Path) -> Backend:
    """CLIP's: lower case, words end in </w>, a prompt is framed by start and end. No padding, no truncation.

    Raises ModelError naming the file.
    """
    backend = _load(folder, _clip, (CLIP_START, CLIP_END))
    start, end = backend.token_to_id(CLIP_START), backend.token_to_id(CLIP_END)
    ids = backend.encode("").ids
    if ids != [start, end]:
        raise ModelError(f"{folder} does not frame a prompt as CLIP's tokenizer does: {ids}", param="model_path")
    return backend


def load_qwen2_bpe(folder: Path) -> Backend:
    """Qwen2's (also Qwen2.5's and Qwen3's): adds no token to a text. No padding, no truncation.

    Raises ModelError naming the file.
    """
    backend = _load(folder, _qwen2, (QWEN_END,))
    if ids := backend.encode("").ids:
        raise ModelError(f"{folder} adds {ids} to every text, which Qwen2's tokenizer does not", param="model_path")
    return backend


def _load(folder: Path, build: Callable[[BPE], Backend], special: tuple[str, ...]) -> Backend:
    whole, vocabulary, merges = folder / "tokenizer.json", folder / "vocab.json", folder / "merges.txt"
    try:
        if whole.is_file():
            backend = Backend.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            backend = build(BPE.from_file(str(vocabulary), str(merges)))
            _add_tokens(backend, folder, special)
        else:
            raise ModelError(
                f"{folder} has neither tokenizer.json nor vocab.json and merges.txt, of which the tokenizer is read",
                param="model_path",
            )
    except ModelError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{folder} is not a tokenizer: {error}", param="model_path") from error
    if missing := [token for token in special if backend.token_to_id(token) is None]:
        raise ModelError(f"{folder}: the tokenizer lacks {', '.join(missing)}", param="model_path")
    backend.no_padding()
    backend.no_truncation()
    return backend


def _clip(model: BPE) -> Backend:
    model.end_of_word_suffix, model.continuing_subword_prefix, model.unk_token = "</w>", "", CLIP_END
    backend = Backend(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_CLIP_WORDS), behavior="removed", invert=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    start, end = backend.token_to_id(CLIP_START), backend.token_to_id(CLIP_END)
    if start is not None and end is not None:
        frame = processors.RobertaProcessing(
            (CLIP_END, end), (CLIP_START, start), trim_offsets=False, add_prefix_space=False
        )
        backend.post_processor = frame
    return backend


def _qwen2(model: BPE) -> Backend:
    backend = Backend(model)
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated", invert=False)
    by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, by_byte])
    return backend


def _add_tokens(backend: Backend, folder: Path, special: tuple[str, ...]) -> None:
    """The added tokens, which are found in a text before it is split; their ids must be what the config says."""
    path = folder / "tokenizer_config.json"
    config: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    listed: Mapping[str, Any] = config.get("added_tokens_decoder") or {}
    ordered = [listed[number] for number in sorted(listed, key=int)]
    named = {entry["content"] for entry in ordered}
    backend.add_tokens([AddedToken(**entry) for entry in ordered])
    backend.add_tokens([AddedToken(token, special=True) for token in special if token not in named])
    for number, entry in listed.items():
        if backend.token_to_id(entry["content"]) != int(number):
            raise ModelError(
                f"{path}: the added token {entry['content']} has the id {number}, but comes to "
                f"{backend.token_to_id(entry['content'])}",
                param="model_path",
            )
