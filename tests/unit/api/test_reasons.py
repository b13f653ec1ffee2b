"""docs/reference/errors.md lists every reason with the status that the API gives it."""

from __future__ import annotations

import re
from pathlib import Path

from vmferry.errors import Reason
from vmferry.rpc.status import CODE_OF

REFERENCE = Path(__file__).parents[3] / "docs/reference/errors.md"


def test_the_reference_is_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [^|]+ \| [^|]+ \|$", REFERENCE.read_text(), re.MULTILINE)
    assert len(rows) == len({reason for reason, _ in rows})
    assert dict(rows) == {str(reason): CODE_OF[reason].name for reason in Reason}
