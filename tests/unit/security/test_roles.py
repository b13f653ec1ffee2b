"""Roles and the calls that they may make."""

from __future__ import annotations

import pytest

from vmferry.security.caller import Caller
from vmferry.security.names import CertificateNames
from vmferry.security.roles import Access, Role, changes, role_needed
from vmferry.v1 import machines_pb2, migrations_pb2, qemus_pb2

ACCESS = Access(
    {
        Role.VIEWER: ("spiffe://d/vmferry/user/*",),
        Role.OPERATOR: ("spiffe://d/vmferry/user/op-*",),
        Role.REPORTER: ("spiffe://d/rack/*/monitor", "user:mcelog"),
        Role.ADMIN: ("user:root",),
    }
)
MIGRATIONS = "/vmferry.v1.Migrations/"
MACHINES = "/vmferry.v1.Machines/"


def certified(*uris: str) -> Caller:
    return Caller("10.0.0.1:1", names=CertificateNames(uris))


def may(caller: Caller | None, method: str) -> bool:
    return ACCESS.problem(caller, method) is None


@pytest.mark.parametrize(
    ("caller", "calls"),
    [
        (certified("spiffe://d/vmferry/user/eve"), {"GetMigration"}),
        (certified("spiffe://d/vmferry/user/op-1"), {"GetMigration", "CreateMigration"}),
        (certified("spiffe://d/rack/7/monitor"), {"ReportMemoryError"}),
        (Caller("unix", user="mcelog"), {"ReportMemoryError"}),
        (Caller("unix", user="root"), {"GetMigration", "CreateMigration", "ReportMemoryError", "Unknown"}),
        (Caller("unix", user="nobody"), set()),
        (certified("spiffe://d/vmferry/user/op-1/x"), set()),
        (certified("spiffe://e/vmferry/user/op-1"), set()),
        (certified("spiffe://d/vmferry/user/op-1", "spiffe://d/vmferry/user/eve"), set()),
        (certified(), set()),
        (certified("user:root"), set()),
        (None, set()),
    ],
)
def test_a_caller_may_make_the_calls_of_its_roles_alone(caller: Caller | None, calls: set[str]) -> None:
    every = {
        "GetMigration": MIGRATIONS,
        "CreateMigration": MIGRATIONS,
        "ReportMemoryError": MACHINES,
        "Unknown": MACHINES,
    }
    assert {call for call, service in every.items() if may(caller, service + call)} == calls


def test_every_role_may_ask_for_health_and_nobody_else() -> None:
    health = "/grpc.health.v1.Health/Check"
    assert may(certified("spiffe://d/rack/7/monitor"), health)
    assert not may(Caller("unix", user="nobody"), health)


def test_calls_that_read_are_for_viewers_and_all_others_are_audited() -> None:
    for file in (migrations_pb2, machines_pb2, qemus_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                reads = method.name.startswith(("Get", "List", "Watch", "Check"))
                assert (role_needed(path) is Role.VIEWER) == reads, path
                assert changes(path) != reads, path
