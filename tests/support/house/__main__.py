"""The gates by hand.

`python -m tests.support.house FILE…` prints the faults of files, exempt or not.
`python -m tests.support.house` prints the figures of every file's prose.
`python -m tests.support.house --tidy` takes files that pass, or are gone, off the lists of exempt files.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.support.house.comments import prose
from tests.support.house.files import ROOT, text_of
from tests.support.house.gates import EXEMPT, GATES, PROSE, Gate, exempt
from tests.support.house.prose import measure

HEAD = """# Files that do not pass a gate of tests/house yet. The lists only shrink: take a mended file off by hand, or
# with `python -m tests.support.house --tidy`. payload.rs stays: cutting its one assembly listing would break the
# register contract.
"""


def at_fault(path: Path) -> list[str]:
    """Each fault of a file, at any gate."""
    return [fault for gate in GATES if path in gate.files() for fault in gate.faults(path)]


def tidy() -> None:
    """Writes the list anew, without the files that need no exemption."""
    lists = "\n".join(
        listed(gate, sorted(path for path in exempt(gate) & set(gate.files()) if gate.faults(path))) for gate in GATES
    )
    (ROOT / EXEMPT).write_text(HEAD + "\n" + lists)


def listed(gate: Gate, paths: list[Path]) -> str:
    """One list in TOML."""
    return f"{gate.name} = [\n" + "".join(f'    "{path}",\n' for path in paths) + "]\n"


def figures() -> None:
    """Prints a line for each file."""
    for path in PROSE.files():
        found = measure(prose(path, text_of(path)))
        rate = 100 * len(found.relatives) / max(found.words, 1)
        counts = f"{rate:6.2f} {len(found.long):4} long {len(found.banned):4} banned"
        sys.stdout.write(f"{counts} {found.words:6} words {path}\n")


def main() -> None:
    """Does as the arguments say."""
    match sys.argv[1:]:
        case []:
            figures()
        case ["--tidy"]:
            tidy()
        case names:
            for path in (Path(name).resolve().relative_to(ROOT) for name in names):
                for fault in at_fault(path):
                    sys.stdout.write(f"{path}: {fault}\n")


if __name__ == "__main__":
    main()
