"""Checkpoints with random weights: a module a family, whose `CHECKPOINTS` are found by make_checkpoint.py."""
