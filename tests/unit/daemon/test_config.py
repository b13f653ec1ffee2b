"""The configuration: defaults, every problem at once, and example and reference in step with the code."""

from __future__ import annotations

import re
import subprocess
import tomllib
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.programs import Programs
from vmferry.daemon.assembly import pager_settings
from vmferry.daemon.config import Config, ConfigError, load, parse
from vmferry.model.names import Address, parse_address
from vmferry.pager.settings import PagerTuning

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "configs/vmferryd.toml"
REFERENCE = ROOT / "docs/reference/configuration.md"


def flat(values: dict[str, object], path: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{path}{key}.")
        else:
            found[f"{path}{key}"] = value
    return found


def problems(values: dict[str, object]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(values, "host-a")
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_the_example_is_the_defaults(programs: Programs) -> None:
    """A default of the tuning is the pager's: the daemon knows none."""
    example, plain = load(EXAMPLE, "other"), parse({}, "host-a")
    assert replace(example, pager=replace(example.pager, tuning=PagerTuning())) == plain
    assert plain.pager.tuning == PagerTuning()
    options = example.pager.tuning.options()
    assert dict(zip(options[::2], options[1::2], strict=True)) == pager_defaults(programs)


def pager_defaults(programs: Programs) -> dict[str, str]:
    """By option, as `vmferry-pager --help` prints them."""
    text = subprocess.run([programs.pager, "--help"], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^ +(--[\w-]+) <\w+>.*\[default: ([^\]]*)\]", text, re.MULTILINE)
    return {option: default.strip('"') for option, default in found}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_example_is_taken(path: Path) -> None:
    assert isinstance(load(path, "host-a"), Config)


def test_example_and_reference_name_every_key() -> None:
    example = flat(tomllib.loads(EXAMPLE.read_text()))
    documented = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+?) \|", REFERENCE.read_text(), re.MULTILINE))
    assert set(documented) == set(example)
    for key, default in documented.items():
        if default.count("`") == 2 and default.endswith("`"):
            value = example[key]
            shown = str(value).lower() if isinstance(value, bool) else value
            assert default == f"`{shown}`", key


def test_the_example_explains_every_key() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+ =", line):
            assert lines[number - 1].startswith("# "), line


def test_unknown_keys_are_refused_with_the_known_ones() -> None:
    found = problems(
        {"hots": "a", "api": {"listne": "h:1"}, "pages": {"port": [1, 2]}, "timeouts": {"x": 1}, "new": {}}
    )
    assert set(found) == {"hots", "api.listne", "pages.port", "timeouts.x", "new"}
    assert "known here: listen" in found["api.listne"]


def test_all_problems_come_together() -> None:
    found = problems(
        {
            "host": "a b",
            "runtime_dir": "run",
            "state_dir": 7,
            "keep_awake": "always",
            "api": "127.0.0.1:1",
            "peer": {"listen": "nowhere"},
            "pages": {"ip": "host", "ports": [9, 9], "demand_timeout_s": True},
            "pager": {
                "program": "",
                "push_bytes_per_s": 5,
                "push_lanes": 65,
                "page_path_cpus": "3-2",
                "lane_cpus": [1],
                "spin_us": 1.5,
                "real_time": 1,
                "huge_pages": "always",
                "congestion_control": "Cubic!",
            },
            "timeouts": {"stop_s": float("nan"), "vmm_s": "1"},
            "log": {"format": "xml", "level": "loud"},
        }
    )
    assert set(found) == {
        "host", "runtime_dir", "state_dir", "keep_awake", "api", "peer.listen", "pages.ip", "pages.ports",
        "pages.demand_timeout_s",
        "pager.program", "pager.push_bytes_per_s", "pager.push_lanes", "pager.page_path_cpus", "pager.lane_cpus",
        "pager.spin_us", "pager.real_time", "pager.huge_pages", "pager.congestion_control", "timeouts.stop_s",
        "timeouts.vmm_s", "log.format", "log.level",
    }  # fmt: skip
    assert found["runtime_dir"] == 'runtime_dir: is "run", must be an absolute path'
    assert found["pager.page_path_cpus"].endswith(
        """must be a list of CPUs like "2-3,7", or ""; '3-2' runs backwards"""
    )
    assert found["pager.push_bytes_per_s"].endswith(
        'is 5, must be 0 (no limit), or from 4096 to 1099511627776 bytes a second, also as "200MiB/s"'
    )


def test_the_pager_section() -> None:
    pager = {"push_bytes_per_s": 5_000_000, "push_lanes": 64, "page_path_cpus": "2-3,7", "lane_cpus": "", "spin_us": 0}
    found = parse({"pager": pager}, "host-a").pager
    named = {"push_bytes_per_s": found.push_bytes_per_s, "push_lanes": found.push_lanes, **asdict(found.tuning)}
    assert {name: named[name] for name in pager} == pager


@pytest.mark.parametrize("key", ["push_bytes_per_s", "push_lanes", "spin_us"])
@pytest.mark.parametrize("value", [True, -1, 5.0, "5", 1 << 41, []])
def test_numbers_of_the_pager_section(key: str, value: object) -> None:
    assert set(problems({"pager": {key: value}})) == {f"pager.{key}"}


def test_only_configured_tuning_is_handed_to_the_pager() -> None:
    assert pager_settings(parse({}, "host-a")).tuning == PagerTuning()
    settings = {
        "page_path_cpus": "2", "lane_cpus": "3", "spin_us": 0, "push_lanes": 4, "real_time": False,
        "huge_pages": False, "congestion_control": "",
    }  # fmt: skip
    found = pager_settings(parse({"keep_awake": False, "pager": settings}, "host-a"))
    assert found.tuning.options() == [
        "--page-path-cpus", "2", "--lane-cpus", "3", "--spin-us", "0", "--real-time", "false",
        "--keep-awake", "false", "--huge-pages", "false", "--congestion-control", "",
    ]  # fmt: skip
    assert found.lanes.push_lanes == 4


@pytest.mark.parametrize("ports", [[0, 5], [5, 5], [6, 5], [1, 65537], [1], [1, 2, 3], ["1", "2"], [True, 5], 7])
def test_a_port_range_is_half_open_and_not_empty(ports: object) -> None:
    assert set(problems({"pages": {"ports": ports}})) == {"pages.ports"}


def test_listeners_may_not_clash() -> None:
    plain = {"tls": {"mode": "off"}}
    found = problems({"api": {"listen": "h:7700"}, "peer": {"listen": "h:9"}, "ops": {"listen": "h:9"}} | plain)
    assert set(found) == {"api.listen", "ops.listen"}
    three = {"api": {"listen": "h:0"}, "peer": {"listen": "h:0"}, "ops": {"listen": "h:0"}}
    assert parse(three | plain, "host-a").api == Address("h", 0)


@pytest.mark.parametrize("key", ["api", "peer", "ops", "pages"])
def test_an_address_that_others_reach_needs_tls(key: str) -> None:
    exposed = {key: {"ip": "10.0.0.1"} if key == "pages" else {"listen": "10.0.0.1:7000"}}
    found = problems(exposed)
    assert set(found) == {"tls.cert", "tls.key", "tls.ca"}
    assert "vmferry pki" in found["tls.cert"]
    assert 'mode = "off"' in found["tls.cert"]
    assert parse(exposed | {"tls": {"mode": "off"}}, "host-a").tls.files is None
    files = {name: f"/etc/vmferry/{name}.pem" for name in ("cert", "key", "ca")}
    found_files = parse(exposed | {"tls": files}, "host-a").tls.files
    assert found_files is not None
    assert (found_files.cert, found_files.crl) == (Path("/etc/vmferry/cert.pem"), None)


def test_a_daemon_on_loopback_is_plain_unless_it_has_a_certificate() -> None:
    assert parse({}, "host-a").tls.files is None
    assert set(problems({"tls": {"cert": "/a"}})) == {"tls.key", "tls.ca"}
    assert set(problems({"tls": {"mode": "off", "cert": "/a"}})) == {"tls.cert"}
    assert set(problems({"tls": {"mode": "prefer"}})) == {"tls.mode"}


def test_the_subjects_of_roles_are_ids_and_users() -> None:
    assert set(problems({"access": {"viewer": ["*"], "admin": "user:root", "boss": []}})) == {
        "access.viewer",
        "access.admin",
        "access.boss",
    }


def test_a_socket_path_must_fit_the_kernel() -> None:
    assert "107" in problems({"runtime_dir": "/" + "x" * 120})["vmm.socket"]
    assert "at most 78 bytes" in problems({"runtime_dir": "/" + "x" * 78})["runtime_dir"]
    assert parse({"runtime_dir": "/" + "x" * 77}, "host-a").runtime_dir == Path("/" + "x" * 77)


def test_the_socket_follows_the_runtime_directory() -> None:
    assert parse({"runtime_dir": "/a"}, "host-a").vmm_socket == Path("/a/vmm.sock")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("h:1", Address("h", 1)),
        ("[::1]:1", Address("::1", 1)),
        ("1.2.3.4:65535", Address("1.2.3.4", 65535)),
        ("h:65536", None),
        ("h", None),
        (":1", None),
        ("::1:1", None),
        ("[h]:1", None),
        ("h:+1", None),
    ],
)
def test_addresses(text: str, address: Address | None) -> None:
    assert parse_address(text) == address
    if address is not None:
        assert str(address) == text


def test_bytes_that_are_no_toml_are_a_problem_with_a_place(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"host = ")
    with pytest.raises(ConfigError, match="end of document"):
        load(path, "h")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(path, "h")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=9,
)
KEYS = st.sampled_from(["host", "runtime_dir", "state_dir", "vmm", "api", "peer", "pages", "ops", "pager", "log", "x"])


@given(st.dictionaries(KEYS, VALUES | st.dictionaries(st.sampled_from(["listen", "ports", "socket"]), VALUES)))
def test_any_document_is_taken_or_refused(values: dict[str, object]) -> None:
    try:
        assert isinstance(parse(values, "host-a"), Config)
    except ConfigError as error:
        assert error.problems


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "[" + ".".join("a" * 20_000) + "]", "a = " + "9" * 5_000, "a = " + "9" * 4_000],
    ids=["nested lists", "nested tables", "a huge number", "a large number"],
)
def test_extreme_documents_are_refused_with_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "vmferryd.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path, "host-a")
    (problem,) = caught.value.problems
    assert len(str(problem)) < 300
    assert "\n" not in str(problem)


def test_a_push_limit_may_have_a_unit() -> None:
    assert parse({"pager": {"push_bytes_per_s": "200MiB/s"}}, "a").pager.push_bytes_per_s == 200 << 20
    with pytest.raises(ConfigError, match=r"'200' has no unit"):
        parse({"pager": {"push_bytes_per_s": "200"}}, "a")


@pytest.mark.parametrize("ip", ["0.0.0.0", "::"])
def test_pages_are_served_on_an_address_that_others_can_dial(ip: str) -> None:
    with pytest.raises(ConfigError, match=r"pages\.ip: .* that the other hosts can dial"):
        parse({"pages": {"ip": ip}}, "a")
