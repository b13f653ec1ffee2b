"""The configuration of this host's daemon, checked by the daemon's own program."""

from __future__ import annotations

import subprocess
from pathlib import Path

from vmferry.cli.probe.finding import Finding, missing, ok
from vmferry.demo.programs import daemon_command

INSTALLED = Path("/etc/vmferry/vmferryd.toml")
"""The file of the systemd unit."""
CHECK_S = 60.0


def check_configuration(path: Path = INSTALLED) -> Finding:
    if not path.exists():
        return ok("configuration", f"{path} is not there; `vmferryd --check-config` checks any other file")
    command = [*daemon_command(), "--config", str(path), "--check-config"]
    try:
        checked = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_S, check=False)
    except subprocess.TimeoutExpired:
        return missing(
            "configuration", f"{path} was not checked within {CHECK_S:g} s", "Look at the load of this host."
        )
    if checked.returncode == 0:
        return ok("configuration", f"{path} is good")
    problems = [line.removeprefix("vmferryd: ") for line in checked.stderr.splitlines()]
    return missing("configuration", "; ".join(problems), "Correct the file: vmferryd does not start with it.")
