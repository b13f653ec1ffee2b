"""The result of the demo as one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmferry.demo.verdict import Evidence, healed, problems
from vmferry.v1.migrations_pb2 import Migration


@dataclass(frozen=True, slots=True)
class DemoResult:
    """The result. `network` is "namespaces" or "loopback"; `logs` is the directory of the logs, if they were kept."""

    accel: str
    network: str
    migration: Migration
    evidence: Evidence
    found_by: dict[str, int]
    """The memory errors of the destination's ledger, counted by origin."""
    logs: str = ""

    @property
    def problems(self) -> list[str]:
        return problems(self.evidence)

    @property
    def ok(self) -> bool:
        return not self.problems

    def plain(self) -> dict[str, Any]:
        """The object of `--json`. Addresses are hexadecimal strings, as in all JSON of the CLI."""
        move, page, end = self.migration, self.migration.progress, self.evidence.at_end
        touch = page.first_touch
        return {
            "ok": self.ok,
            "accel": self.accel,
            "network": self.network,
            "downtime_ms": round(move.downtime_s * 1000, 3),
            "total_s": round(move.total_s, 3),
            "first_touch_us": {"p50": touch.p50_us, "p99": touch.p99_us, "max": touch.max_us, "count": touch.count},
            "pages": {
                "total": page.total,
                "demand": page.demand,
                "push": page.push,
                "zero": page.zero,
                "poison": page.poison,
                "discarded": page.discarded,
            },
            "bytes_received": page.bytes_received,
            "poisoned": {
                "before": len(self.evidence.poisoned_before),
                "during": len(self.evidence.poisoned_during),
                "healed": len(healed(self.evidence)),
                "found_by": self.found_by,
            },
            "guest": {
                "touches": end.touches,
                "touches_on_destination": max(0, end.touches - self.evidence.at_source.touches),
                "passes": end.passes,
                "pages_touched_on_destination": end.pages_touched_here,
                "wrong_bytes": end.wrong_bytes,
                "first_touch_us": dict(end.first_touch_us),
                "machine_checks": self._checks(),
            },
            "source_running": self.evidence.source_running,
            "problems": self.problems,
            "logs": self.logs,
        }

    def _checks(self) -> list[dict[str, Any]]:
        told_at_home = {check.gpa for check in self.evidence.at_source.machine_checks}
        return [
            {
                "gpa": f"{check.gpa:#x}",
                "severity": check.severity,
                "vcpu": check.vcpu,
                "lsb": check.lsb,
                "host": "source" if check.gpa in told_at_home else "destination",
            }
            for check in self.evidence.at_end.machine_checks
        ]
