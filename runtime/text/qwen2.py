"""Prompts for text encoders that are Qwen language models (Qwen-Image, Z-Image): a chat template around the text."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from safelight.runtime.text.bpe import load_qwen2_bpe
from safelight.runtime.text.clean import check_unicode

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Qwen2Tokenizer:
    """The ids of `prefix` + text + `suffix`, of which the first `max_tokens` are kept, template included.

    `backend` truncates on the right and does not pad.
    """

    backend: Backend
    prefix: str
    suffix: str
    max_tokens: int

    def encode(self, text: str, param: str = "prompt") -> tuple[int, ...]:
        """Nothing is cleaned. Raises InvalidRequest naming `param` for text that is not valid Unicode."""
        check_unicode(text, param)
        encoding = self.backend.encode(self.prefix + text + self.suffix)
        if encoding.overflowing:
            _LOG.warning("%s is longer than the %d tokens that the model reads: it is cut", param, self.max_tokens)
        return tuple(encoding.ids)

    def encode_request(self, prompt: str, negative_prompt: str) -> dict[str, tuple[int, ...]]:
        """The `token_ids` of a GenerationRequest."""
        return {"prompt": self.encode(prompt), "negative": self.encode(negative_prompt, "negative_prompt")}


def load_qwen2(folder: Path, *, prefix: str, suffix: str, max_tokens: int) -> Qwen2Tokenizer:
    """The tokenizer in `folder` (tokenizer.json, or vocab.json and merges.txt), with a family's template as data.

    Raises ModelError naming the file.
    """
    backend = load_qwen2_bpe(folder)
    backend.enable_truncation(max_length=max_tokens)
    return Qwen2Tokenizer(backend, prefix, suffix, max_tokens)
