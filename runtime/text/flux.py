"""FLUX.1 reads a prompt twice: CLIP takes its gist, T5 its words. Nothing is cleaned, as in diffusers' FluxPipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safelight.configs.families.base import ModelSpec
from safelight.configs.families.flux_costs import text_tokens
from safelight.runtime.text.clip import ClipTokenizer, load_clip
from safelight.runtime.text.t5 import T5Tokenizer, load_t5


@dataclass(frozen=True, slots=True)
class FluxTokenizer:
    clip: ClipTokenizer
    t5: T5Tokenizer

    def encode_request(self, prompt: str, negative_prompt: str) -> dict[str, tuple[int, ...]]:
        """The `token_ids` of a GenerationRequest: T5's as "prompt" and "negative", CLIP's with "clip." before that."""
        return {
            "prompt": self.t5.encode(prompt),
            "negative": self.t5.encode(negative_prompt, "negative_prompt"),
            "clip.prompt": self.clip.encode(prompt),
            "clip.negative": self.clip.encode(negative_prompt, "negative_prompt"),
        }


def load_tokenizer(root: Path, spec: ModelSpec) -> FluxTokenizer:
    """The tokenizers of the model directory `root`. Raises ModelError naming the file."""
    t5 = load_t5(root / "tokenizer_2", text_tokens(spec), cleaned=False)
    return FluxTokenizer(load_clip(root / "tokenizer"), t5)
