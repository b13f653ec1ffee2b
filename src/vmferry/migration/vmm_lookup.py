"""Finds the VMM of a VM on this host. It waits while the VMM's connection is broken."""

from __future__ import annotations

from vmferry.errors import Reason, VmferryError
from vmferry.migration.environment import Environment
from vmferry.model.vmm import VmmIdentity
from vmferry.ports import Vmm

SOURCE_STATES: frozenset[str] = frozenset({"running", "stopped"})


async def vmm_by_pid(environment: Environment, vm: str, pid: int | None) -> Vmm:
    """The VMM of `vm` on this host. It waits for a VMM whose connection is broken.

    `pid` tells two VMMs of one VM apart (a move within the host). None: unknown, so the VMM that holds the VM is taken.
    Raises: VmferryError VMM_GONE if its process has ended, or if it does not connect again in time.
    """
    deadline = environment.clock.monotonic_s() + environment.timeouts.vmm_return_s
    while True:
        found = _connected(environment, vm, pid)
        if found is not None:
            return found
        if pid is not None and not environment.vmm_lives(pid):
            raise VmferryError(
                Reason.VMM_GONE, f"the VMM of {vm} (pid {pid}) has ended.", "Look at the VMM's own log for why."
            )
        if environment.clock.monotonic_s() >= deadline:
            raise VmferryError(
                Reason.VMM_GONE,
                f"the VMM of {vm} (pid {pid or 'unknown'}) has not been connected for "
                f"{environment.timeouts.vmm_return_s:g} s.",
                "Look at the VMM's own log for why it ended.",
            )
        await environment.clock.sleep(0.05)


def _connected(environment: Environment, vm: str, pid: int | None) -> Vmm | None:
    held = [vmm for vmm in environment.vmms.all() if vmm.identity.vm == vm]
    if pid is not None:
        return next((vmm for vmm in held if vmm.identity.pid == pid), None)
    return next((vmm for vmm in held if _holds_vm(vmm.identity)), None)


def _holds_vm(identity: VmmIdentity) -> bool:
    return identity.state in SOURCE_STATES
