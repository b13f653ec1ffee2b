"""The state for page and metrics is one pass over the active migrations, after any history."""

from __future__ import annotations

from vmferry.daemon.host_state import HostState
from vmferry.ops.state import Check, SecurityView
from vmferry.testing.host import Network


async def test_a_state_looks_at_the_machines_once_although_no_ledger_has_entries() -> None:
    host = Network().host("a")
    for number in range(20):
        host.add_vmm(f"vm-{number}", "running", 100 + number)
    service = await host.start()
    looked: list[int] = []
    machines = service.machines

    async def counted() -> object:
        looked.append(1)
        return await machines()

    service.machines = counted  # type: ignore[method-assign,assignment]
    state = await HostState("a", service, SecurityView).state()
    assert (len(looked), len(state.machines), len(state.ledgers)) == (1, 20, 20)
    await host.kill()


async def test_a_failed_check_is_a_problem_of_the_host() -> None:
    host = Network().host("a")
    source = HostState("a", await host.start(), SecurityView)
    assert list(await source.problems()) == []
    source.note_checks([Check("store", False, "/x is read-only"), Check("pager", True, "")])
    (problem,) = await source.problems()
    assert (problem.reason_code, problem.cause) == ("STORE_FAILED", "store: /x is read-only")
    await host.kill()
