"""CLIP's tokenization: a prompt between start and end, cut to 77 tokens; nothing is cleaned, no padding."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend

from safelight.runtime.text.bpe import load_clip_bpe
from safelight.runtime.text.clean import check_unicode

MAX_TOKENS = 77
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClipTokenizer:
    """`backend` truncates on the right, keeps the end token and does not pad."""

    backend: Backend

    def encode(self, text: str, param: str = "prompt") -> tuple[int, ...]:
        """2 to MAX_TOKENS ids. A longer prompt is cut as in the reference, and said at debug level: CLIP gives FLUX the
        prompt's gist, and T5 reads the rest.

        Raises InvalidRequest naming `param` for text that is not valid Unicode.
        """
        check_unicode(text, param)
        encoding = self.backend.encode(text)
        if encoding.overflowing:
            _LOG.debug("CLIP reads the first %d tokens of %s", MAX_TOKENS, param)
        return tuple(encoding.ids)


def load_clip(folder: Path) -> ClipTokenizer:
    """The tokenizer in `folder`. Raises ModelError naming the file."""
    backend = load_clip_bpe(folder)
    backend.enable_truncation(max_length=MAX_TOKENS)
    return ClipTokenizer(backend)
