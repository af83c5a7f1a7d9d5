"""A worker of a sweep; see :func:`.engine.main`."""

from __future__ import annotations

import sys

from .engine import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
