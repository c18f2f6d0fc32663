"""`python -m peftctl`."""

from __future__ import annotations

import sys

from peftctl.cli import main

if __name__ == "__main__":
    sys.exit(main())
