"""T5-style tokenization for text encoders that read one prompt: cleaned text -> ids with the final </s>.

Reads `tokenizer/tokenizer.json` with the `tokenizers` library: neither torch nor transformers is imported.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from safelight.configs.families.base import ModelSpec
from safelight.runtime.errors import ModelError
from safelight.runtime.text.clean import check_unicode, clean_prompt

MAX_TOKENS = 512  # diffusers' WanPipeline default for max_sequence_length
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class T5Tokenizer:
    """`backend` truncates to `max_tokens` on the right, keeps the final </s> and does not pad. `cleaned`: prompts are
    cleaned first, as Wan's are."""

    backend: Backend
    max_tokens: int = MAX_TOKENS
    cleaned: bool = True

    def encode(self, text: str, param: str = "prompt") -> tuple[int, ...]:
        """1 to `max_tokens` ids, no padding; a longer prompt is cut as in the reference, with a warning.

        Raises InvalidRequest naming `param` for text that is not valid Unicode.
        """
        check_unicode(text, param)
        encoding = self.backend.encode(clean_prompt(text, param) if self.cleaned else text)
        if encoding.overflowing:
            _LOG.warning("%s is longer than %d tokens: the model reads its beginning only", param, self.max_tokens)
        return tuple(encoding.ids)

    def encode_request(self, prompt: str, negative_prompt: str) -> dict[str, tuple[int, ...]]:
        """The `token_ids` of a GenerationRequest."""
        return {"prompt": self.encode(prompt), "negative": self.encode(negative_prompt, "negative_prompt")}


def load_tokenizer(root: Path, spec: ModelSpec) -> T5Tokenizer:
    """The tokenizer of the model directory `root`. Raises ModelError: no tokenizer.json, or one that cannot be read."""
    return load_t5(root / "tokenizer")


def load_t5(folder: Path, max_tokens: int = MAX_TOKENS, *, cleaned: bool = True) -> T5Tokenizer:
    """The tokenizer in `folder`. Raises ModelError: no tokenizer.json, or one that cannot be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{path} is missing; a T5 tokenizer is read from it", param="model_path")
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ModelError(f"{path} is not a tokenizer: {error}", param="model_path") from error
    if backend.encode("").ids[-1:] != [backend.token_to_id("</s>")]:
        raise ModelError(f"{path} does not end a prompt with </s>; a T5 tokenizer is needed", param="model_path")
    backend.no_padding()
    backend.enable_truncation(max_length=max_tokens)
    return T5Tokenizer(backend, max_tokens, cleaned)
