"""The commands of the guide to debugging a pager, with a pager."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.support.house.markdown import fences
from tests.support.programs import Programs
from vmferry.demo.patience import patient

TEXT = (Path(__file__).parents[2] / "docs" / "how-to" / "debug-a-pager.md").read_text()


def test_a_pager_answers_the_program_that_asks_for_its_status(programs: Programs, tmp_path: Path) -> None:
    (shown,) = [fence.text for fence in fences(TEXT) if "GetStatusRequest" in fence.text]
    command, program = shown.split("\n", 1)
    assert command == "python3.11 - /run/vmferry/vms/KEY/pager.sock <<'END'"
    asked = program.removesuffix("END\n")
    with subprocess.Popen(
        [programs.pager, "--runtime-dir", tmp_path, "--vm", "web-1", "--role", "source"], stderr=subprocess.DEVNULL
    ) as pager:
        try:
            end = time.monotonic() + patient(30)
            while not (tmp_path / "pager.sock").exists() and time.monotonic() < end:
                time.sleep(0.05)
            said = subprocess.run(
                [sys.executable, "-", tmp_path / "pager.sock"],
                input=asked,
                capture_output=True,
                text=True,
                check=True,
                timeout=patient(60),
            )
        finally:
            pager.terminate()
    assert 'vm: "web-1"' in said.stdout
    assert "role: PAGER_ROLE_SOURCE" in said.stdout
