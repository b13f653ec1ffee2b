"""The VMMs of a host, of both kinds: those that speak the VMM protocol, and adopted QEMUs. Implements `ports.Vmms`."""

from __future__ import annotations

from collections.abc import Sequence

from vmferry.ports import Vmm, Vmms


class EveryVmm:
    """Several `Vmms` as one."""

    def __init__(self, *kinds: Vmms) -> None:
        self._kinds = kinds

    def running(self, vm: str) -> Vmm | None:
        """The one that runs, of any kind; else one that is stopped."""
        found = [one for kind in self._kinds if (one := kind.running(vm))]
        return next((one for one in found if one.identity.state == "running"), found[0] if found else None)

    def incoming(self, vm: str) -> Vmm | None:
        return next((one for kind in self._kinds if (one := kind.incoming(vm))), None)

    def all(self) -> Sequence[Vmm]:
        return [one for kind in self._kinds for one in kind.all()]
