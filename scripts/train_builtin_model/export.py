"""Checkpoints -> the shipped folder: diffusers format, bf16 safetensors, and vocabulary.json.

Usage: python -m train_builtin_model.export --out work --folder runtime/models/builtin_model
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import logging

from train_builtin_model.checkpoint import load_checkpoint, with_prefix
from train_builtin_model.denoiser import Denoiser
from train_builtin_model.models import make_scheduler, make_text_encoder, make_transformer, make_vae
from train_builtin_model.tokenizer import build_tokenizer, vocabulary_words
from train_builtin_model.vocab import BACKGROUND_SYNONYMS, BACKGROUNDS, RECOLOURS, core_sprites, load_vocabulary


def build_pipeline(out: Path) -> WanPipeline:
    """The pipeline with the averaged weights of the checkpoints in `out`, in fp32 on the CPU."""
    tokenizer = build_tokenizer(load_vocabulary())
    denoiser = Denoiser(make_text_encoder(len(tokenizer)), make_transformer())
    denoiser.load_weights(load_checkpoint(out, "dit")[0])
    weights, meta = load_checkpoint(out, "vae")
    vae = make_vae()
    vae.load_state_dict(with_prefix("vae", weights))
    vae.register_to_config(latents_mean=meta["latents_mean"], latents_std=meta["latents_std"])
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=denoiser.text_encoder, vae=vae, scheduler=make_scheduler(),
        transformer=denoiser.transformer,
    )  # fmt: skip


def vocabulary_file(core: bool) -> dict[str, list[str]]:
    """What the model knows, for a front end that wants to say so: lower-case words, subjects, colours."""
    vocabulary = load_vocabulary()
    if core:
        kept = {vocabulary.sprites[i].subject for i in core_sprites(vocabulary)}
        vocabulary = replace(vocabulary, subjects=tuple(vocabulary.subjects[i] for i in sorted(kept)), sprites=())
    subjects = {name for s in vocabulary.subjects for name in (s.noun, *s.synonyms)}
    synonyms = {name for names in BACKGROUND_SYNONYMS.values() for name in names}
    words = {word for entry in vocabulary_words(vocabulary) for word in re.findall(r"[^\s,.]+", entry)}
    return {
        "words": sorted(words),
        "subjects": sorted(subjects),
        "colours": sorted({*BACKGROUNDS, *RECOLOURS, *synonyms}),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--folder", type=Path, required=True, help="folder to write")
    parser.add_argument("--core", action="store_true", help="only the small vocabulary was trained to the end")
    args = parser.parse_args()
    logging.set_verbosity_error()
    pipeline = build_pipeline(args.out)
    pipeline.to(torch.bfloat16)
    pipeline.save_pretrained(args.folder, safe_serialization=True)
    text = json.dumps(vocabulary_file(args.core), indent=1, ensure_ascii=False)
    (args.folder / "vocabulary.json").write_text(text + "\n", encoding="utf-8")
    size = sum(p.stat().st_size for p in args.folder.rglob("*.safetensors"))
    print(f"{args.folder}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
