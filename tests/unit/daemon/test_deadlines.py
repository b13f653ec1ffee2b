"""The configured time-outs reach every call."""

from __future__ import annotations

from dataclasses import asdict

from vmferry.daemon import deadlines
from vmferry.daemon.config import parse
from vmferry.pager.settings import PagerDeadlines
from vmferry.vmm.session import VmmDeadlines


def test_the_defaults_are_those_of_the_adapters() -> None:
    limits = parse({}, "host-a").timeouts
    assert deadlines.vmm(limits) == VmmDeadlines()
    assert deadlines.pager(limits) == PagerDeadlines()


def test_each_limit_moves_its_calls_and_no_other() -> None:
    plain = parse({}, "host-a").timeouts
    for key in ("vmm_s", "attach_s", "pager_s", "peer_s"):
        changed = parse({"timeouts": {key: 20.0}}, "host-a").timeouts
        moved = {
            name
            for name in ("vmm", "pager", "peer")
            if asdict(getattr(deadlines, name)(changed)) != asdict(getattr(deadlines, name)(plain))
        }
        assert moved == {"vmm" if key == "attach_s" else key.removesuffix("_s")}
