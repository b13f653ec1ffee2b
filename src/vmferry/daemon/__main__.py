"""`python -m vmferry.daemon`."""

from __future__ import annotations

import sys

from vmferry.daemon import main

sys.exit(main())
