"""The waits of the demo and the tests, on machines of any speed."""

from __future__ import annotations

import math
import os

from vmferry.errors import Reason, VmferryError

VARIABLE = "VMFERRY_PATIENCE"


def patience(text: str | None) -> float:
    """The factor that `VMFERRY_PATIENCE` sets.

    Raises:
        VmferryError: `text` is not a positive number.
    """
    try:
        factor = float(text or 1)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        remedy = "Set it to a positive number: each deadline of the demo and the tests is multiplied by it."
        raise VmferryError(Reason.INVALID_ARGUMENT, f"{VARIABLE}: {text!r} is not a positive number", remedy)
    return factor


FACTOR = patience(os.environ.get(VARIABLE))


def patient(seconds: float) -> float:
    """A deadline that is generous on an idle machine, in seconds of this one."""
    return seconds * FACTOR
