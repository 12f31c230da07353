"""What bench_denoise.py times: a module a family with a `Bench`."""
