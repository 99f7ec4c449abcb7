#!/usr/bin/env python
"""Checks a config without starting anything; see titan_lite/config/check_config.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from titan_lite.config.check_config import main

if __name__ == "__main__":
    sys.exit(main())
