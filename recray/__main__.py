"""`python -m recray`, where the script is not on the path."""

from __future__ import annotations

import sys

from recray.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
