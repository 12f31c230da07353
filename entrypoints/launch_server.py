"""`python -m safelight.entrypoints.launch_server FLAGS` is `safelight serve FLAGS`."""

from __future__ import annotations

import sys

from safelight.entrypoints.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()
