"""Parts that several tests share: scripted partners, rigs around the real programs, and the limits on waiting."""

from __future__ import annotations

from pathlib import Path

SUPPORT = Path(__file__).parent
TESTS = SUPPORT.parent
ROOT = TESTS.parent
