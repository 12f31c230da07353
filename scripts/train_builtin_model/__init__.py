"""Makes the data of the built-in model, trains it, evaluates it and exports it. See README.md for the commands."""
