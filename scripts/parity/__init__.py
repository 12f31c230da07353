"""Ours beside diffusers: a module a family with its `CHECKPOINT`, `CASES`, `CONTROLS` and `Parity`."""
