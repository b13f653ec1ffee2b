"""The settings of every pager of this host. The defaults of the tuning are those of the pager program."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneSettings:
    """The lanes between pagers. `ports` is half-open; a source's pager listens on one of them."""

    listen_ip: str = "127.0.0.1"
    ports: tuple[int, int] = (7700, 7800)
    demand_timeout_s: float = 10.0
    """Longest wait for a demanded page, seconds."""
    push_lanes: int = 0
    """Push lanes that a destination opens; 0: the pager's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PagerDeadlines:
    """Deadlines of calls to a pager, seconds.

    `connect_s` is the pager's own limit for a lane to open; the call gets `call_s` on top. Calls that go through the
    VM's memory get more time on top of `call_s` (`model/allocation.py`).
    """

    call_s: float = 10.0
    connect_s: float = 30.0
    complete_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PagerTuning:
    """The tuning of a pager process: each field is an option of `vmferry-pager`. None: the program's default."""

    page_path_cpus: str | None = None
    """CPU list (cpuset(7)) of the fault thread and of the urgent lane; "": any."""
    lane_cpus: str | None = None
    """CPU list of the push lanes' threads; "": any."""
    spin_us: int | None = None
    """The time for which the fault thread polls before it sleeps, microseconds; 0: it sleeps at once."""
    real_time: bool | None = None
    """Whether the fault thread is real-time during a heavy push."""
    keep_awake: bool | None = None
    """Whether the pager keeps CPUs out of idle states while the guest faults."""
    huge_pages: bool | None = None
    """Whether preallocated memory may use huge pages where they cost no more than small pages."""
    congestion_control: str | None = None
    """TCP congestion control of the lanes; "": the host's."""

    def options(self) -> list[str]:
        """The command-line options of `vmferry-pager` for the fields that are set."""
        words: list[str] = []
        for one in fields(self):
            value = getattr(self, one.name)
            if value is not None:
                shown = str(value).lower() if isinstance(value, bool) else str(value)
                words += [f"--{one.name.replace('_', '-')}", shown]
        return words


@dataclass(frozen=True, slots=True, kw_only=True)
class PagerSettings:
    """All settings of this host's pagers."""

    lanes: LaneSettings = field(default_factory=LaneSettings)
    deadlines: PagerDeadlines = field(default_factory=PagerDeadlines)
    tuning: PagerTuning = field(default_factory=PagerTuning)
