"""Prompts of Z-Image: Qwen3's chat template around a user's message, thinking left on."""

from __future__ import annotations

from pathlib import Path

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.zimage_costs import MOST_TEXT_TOKENS
from safelight.runtime.text.qwen2 import Qwen2Tokenizer, load_qwen2

PREFIX, SUFFIX = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def load_tokenizer(root: Path, spec: ModelSpec) -> Qwen2Tokenizer:
    """The tokenizer of the model directory `root`. Raises ModelError naming the file."""
    return load_qwen2(root / "tokenizer", prefix=PREFIX, suffix=SUFFIX, max_tokens=MOST_TEXT_TOKENS)
