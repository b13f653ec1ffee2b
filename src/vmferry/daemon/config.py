"""The daemon's configuration: read once from TOML, frozen, and passed on by sub-tree.

Every key has a default. An unknown key is refused. All problems are reported together. The reference
docs/reference/configuration.md and configs/vmferryd.toml explain each key; tests compare them with this file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmferry.daemon.security_config import Tls, listeners, parse_access, parse_tls
from vmferry.daemon.toml_table import Problem, Table
from vmferry.model.names import HOST_NAME, Address
from vmferry.pager.directory import RUNTIME_DIR_LIMIT
from vmferry.pager.settings import PagerTuning
from vmferry.security.roles import Access

LOG_FORMATS = ("json", "console")
LOG_LEVELS = ("debug", "info", "warning", "error")
DEFAULT_RUNTIME_DIR = Path("/run/vmferry")
DEFAULT_STATE_DIR = Path("/var/lib/vmferry")
SPIN_US_MOST = 10_000
PUSH_LANES_MOST = 64


@dataclass(frozen=True, slots=True)
class Pages:
    """The addresses of this host's source pagers, and the longest wait for a demanded page."""

    ip: str
    ports: tuple[int, int]
    """Half-open."""
    demand_timeout_s: float


@dataclass(frozen=True, slots=True)
class Pager:
    """The pager program, the background push, and the pagers' tuning."""

    program: str
    push_bytes_per_s: int
    """The limit of migrations that request none; 0: no limit. Demand is never delayed."""
    push_lanes: int
    """Push lanes that a destination's pager opens; 0: the pager's default."""
    tuning: PagerTuning


@dataclass(frozen=True, slots=True)
class Qemu:
    """QEMUs that this host adopts: they know nothing of vmferry."""

    monitors: tuple[str, ...]
    """Paths of QMP sockets, with `*`; watched as they come and go."""
    reach_program: str
    """The program that steps into a QEMU."""
    template: Path | None
    """The program that starts a QEMU for a VM that comes; None: somebody else starts it."""


@dataclass(frozen=True, slots=True)
class Timeouts:
    """The longest waits, seconds. Each ends in a named refusal or a paused job, never in a hang."""

    downtime_s: float
    """A blackout before the commit. Longer, and the VM runs on its source again."""
    stop_s: float
    """A graceful stop waits this long for jobs past the point of no return."""
    vmm_s: float
    """A VMM's answer; three times as long to save or reset, six times to make memory or load a state."""
    attach_s: float
    """The attachment of a VMM's memory to its pager."""
    pager_s: float
    """A pager's answer; three times as long to connect lanes, six times to complete."""
    peer_s: float
    """Another daemon's answer; three times as long to start, refuse or finish, six times to prepare or get ready."""


@dataclass(frozen=True, slots=True)
class History:
    """How long ended migrations are kept. Both limits hold."""

    keep_days: float
    keep_migrations: int


@dataclass(frozen=True, slots=True)
class Log:
    format: str
    level: str


@dataclass(frozen=True, slots=True)
class Config:
    host: str
    runtime_dir: Path
    state_dir: Path
    keep_awake: bool
    """Whether this host's CPUs are kept out of idle states during a blackout, and while a guest faults."""
    vmm_socket: Path
    qemu: Qemu
    api: Address
    api_socket: Path | None
    """A unix socket for the API, besides the address."""
    peer: Address
    ops: Address
    pages: Pages
    pager: Pager
    timeouts: Timeouts
    history: History
    log: Log
    tls: Tls
    access: Access

    @property
    def database(self) -> Path:
        return self.state_dir / "vmferry.db"


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has every problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("; ".join(str(problem) for problem in problems))
        self.problems = tuple(problems)


def parse(values: Mapping[str, object], default_host: str) -> Config:
    """Checks `values` (a TOML document) and returns the configuration.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[Problem] = []
    root = Table("", values, problems)
    runtime_dir = root.path("runtime_dir", DEFAULT_RUNTIME_DIR, RUNTIME_DIR_LIMIT, "the unix sockets of pagers in it")
    vmm, api, peer = root.section("vmm"), root.section("api"), root.section("peer")
    ops, log = root.section("ops"), root.section("log")
    keep_awake = root.truth("keep_awake", None)
    api_address = api.address("listen", Address("127.0.0.1", 7600))
    peer_address = peer.address("listen", Address("127.0.0.1", 7601))
    ops_address = ops.address("listen", Address("127.0.0.1", 7680))
    pages = _pages(root.section("pages"))
    config = Config(
        host=root.text("host", default_host, HOST_NAME, "1 to 63 letters, digits, '.', '_' or '-'"),
        runtime_dir=runtime_dir,
        state_dir=root.path("state_dir", DEFAULT_STATE_DIR),
        keep_awake=keep_awake is not False,
        vmm_socket=vmm.socket("socket", runtime_dir / "vmm.sock"),
        qemu=_qemu(root.section("qemu")),
        api=api_address,
        api_socket=api.optional_socket("socket"),
        peer=peer_address,
        ops=ops_address,
        pages=pages,
        pager=_pager(root.section("pager"), keep_awake),
        timeouts=_timeouts(root.section("timeouts")),
        history=_history(root.section("history")),
        log=Log(log.choice("format", "json", LOG_FORMATS), log.choice("level", "info", LOG_LEVELS)),
        tls=parse_tls(root.section("tls"), listeners(api_address, peer_address, ops_address, pages.ip)),
        access=parse_access(root.section("access")),
    )
    for table in (root, vmm, api, peer, ops, log):
        table.finish()
    problems.extend(_clashes(config))
    if problems:
        raise ConfigError(problems)
    return config


def load(path: Path, default_host: str) -> Config:
    """Reads the file.

    Raises:
        OSError: it cannot be read.
        ConfigError: it is not TOML, or not a configuration.
    """
    try:
        return parse(tomllib.loads(path.read_bytes().decode()), default_host)
    except UnicodeDecodeError as error:
        raise ConfigError([Problem("the file", f"not UTF-8 at byte {error.start}", "TOML in UTF-8")]) from error
    except RecursionError as error:
        raise ConfigError([Problem("the file", "nested too deeply", "TOML with tables and lists as above")]) from error
    except ValueError as error:  # TOMLDecodeError, or a number with too many digits.
        raise ConfigError([Problem("the file", str(error), "TOML")]) from error


def _pages(table: Table) -> Pages:
    pages = Pages(
        ip=table.ip("ip", "127.0.0.1"),
        ports=table.port_range("ports", (7700, 7800)),
        demand_timeout_s=table.seconds("demand_timeout_s", 10.0, 0.1, 600.0),
    )
    table.finish()
    return pages


def _pager(table: Table, keep_awake: bool | None) -> Pager:
    """The tuning keeps None for an absent key: the default is the pager's."""
    tuning = PagerTuning(
        page_path_cpus=table.cpu_list("page_path_cpus"),
        lane_cpus=table.cpu_list("lane_cpus"),
        spin_us=table.whole("spin_us", None, SPIN_US_MOST),
        real_time=table.truth("real_time", None),
        keep_awake=keep_awake,
        huge_pages=table.truth("huge_pages", None),
        congestion_control=table.text("congestion_control", None, r"[a-z0-9_-]{0,15}", 'a name like "cubic", or ""'),
    )
    pager = Pager(
        program=table.text("program", "vmferry-pager", r"[^\0]+", "a program name or path"),
        push_bytes_per_s=table.push_limit("push_bytes_per_s"),
        push_lanes=table.whole("push_lanes", 0, PUSH_LANES_MOST),
        tuning=tuning,
    )
    table.finish()
    return pager


def _qemu(table: Table) -> Qemu:
    qemu = Qemu(
        monitors=table.patterns("monitors"),
        reach_program=table.text("reach_program", "vmferry-reach", r"[^\0]+", "a program name or path"),
        template=table.optional_path("template"),
    )
    table.finish()
    return qemu


def _history(table: Table) -> History:
    history = History(
        keep_days=table.number("keep_days", 30.0, 0.01, 36_500.0, "days"),
        keep_migrations=table.whole("keep_migrations", 10_000, 100_000),
    )
    table.finish()
    return history


def _timeouts(table: Table) -> Timeouts:
    timeouts = Timeouts(
        downtime_s=table.seconds("downtime_s", 1.0, 0.05, 600.0),
        stop_s=table.seconds("stop_s", 60.0, 0.0, 3600.0),
        vmm_s=table.seconds("vmm_s", 10.0, 0.1, 600.0),
        attach_s=table.seconds("attach_s", 10.0, 0.1, 600.0),
        pager_s=table.seconds("pager_s", 10.0, 0.1, 600.0),
        peer_s=table.seconds("peer_s", 10.0, 0.1, 600.0),
    )
    table.finish()
    return timeouts


def _clashes(config: Config) -> list[Problem]:
    """Finds two listeners on one port, and a listener inside the pagers' range."""
    problems: list[Problem] = []
    seen: dict[int, str] = {}
    first, end = config.pages.ports
    for key, address in (("api.listen", config.api), ("peer.listen", config.peer), ("ops.listen", config.ops)):
        if address.port == 0:
            continue
        if address.port in seen:
            problems.append(Problem(key, f'"{address}"', f"on another port than {seen[address.port]}"))
        seen.setdefault(address.port, key)
        if first <= address.port < end:
            problems.append(Problem(key, f'"{address}"', f"outside pages.ports [{first}, {end})"))
    return problems
