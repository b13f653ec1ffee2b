"""Reads one TOML table key by key and collects every problem instead of stopping at the first.

Each reader takes its key out of the table, checks type and range, and returns the default if the key is absent or
wrong. A wrong value becomes a `Problem`. `finish` reports the remaining keys, so a misspelt key is a problem and no
silent default.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vmferry.daemon.cpu_list import CpuListError, parse_cpu_list
from vmferry.model.names import SOCKET_PATH_LIMIT, Address, is_ip, parse_address
from vmferry.units import PUSH_LIMIT_LEAST, PUSH_LIMIT_MOST, parse_rate

Default = TypeVar("Default")

PATH_LIMIT = 4095
"""PATH_MAX without its NUL (limits.h)."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem: the key (`api.listen`), the actual value, and the required one."""

    key: str
    actual: str
    required: str

    def __str__(self) -> str:
        return f"{self.key}: is {self.actual}, must be {self.required}"


class Table:
    """A TOML table during its reading. `path` is its dotted name, "" for the root."""

    def __init__(self, path: str, values: Mapping[str, object], problems: list[Problem]) -> None:
        self._path = path
        self._values = dict(values)
        self._known: list[str] = []
        self._problems = problems

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _take(self, key: str) -> object | None:
        self._known.append(key)
        return self._values.pop(key, None)

    def problem(self, key: str, actual: object, required: str) -> None:
        self._problems.append(Problem(self._name(key), _shown(actual), required))

    def section(self, key: str) -> Table:
        value = self._take(key)
        if value is not None and not isinstance(value, dict):
            self.problem(key, value, "a table")
            value = None
        return Table(self._name(key), value or {}, self._problems)

    def text(self, key: str, default: Default, pattern: str, required: str) -> str | Default:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, str) and re.fullmatch(pattern, value):
            return value
        self.problem(key, value, required)
        return default

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, str) and value in choices:
            return value
        self.problem(key, value, "one of " + ", ".join(f'"{c}"' for c in choices))
        return default

    def path(self, key: str, default: Path, limit: int = PATH_LIMIT, purpose: str = "any call") -> Path:
        """An absolute path of at most `limit` bytes, which `purpose` sets."""
        value = self._take(key)
        path = default
        if isinstance(value, str) and value.startswith("/") and "\0" not in value:
            path = Path(value)
        elif value is not None:
            self.problem(key, value, "an absolute path")
        if (length := len(os.fsencode(path))) > limit:
            self.problem(key, str(path), f"a path of at most {limit} bytes for {purpose}; it has {length}")
        return path

    def optional_path(self, key: str) -> Path | None:
        """None: the key is absent, or its text is empty."""
        if self._values.get(key) == "":
            self._take(key)
            return None
        nowhere = Path()
        path = self.path(key, nowhere)
        return None if path is nowhere else path

    def texts(self, key: str, default: Sequence[str], pattern: str, required: str) -> tuple[str, ...]:
        value = self._take(key)
        if value is None:
            return tuple(default)
        if isinstance(value, list) and all(isinstance(one, str) and re.fullmatch(pattern, one) for one in value):
            return tuple(value)
        self.problem(key, value, required)
        return ()

    def optional_socket(self, key: str) -> Path | None:
        return self.socket(key, Path()) if self._values.get(key) else self.optional_path(key)

    def socket(self, key: str, default: Path) -> Path:
        return self.path(key, default, SOCKET_PATH_LIMIT, "a unix socket")

    def patterns(self, key: str) -> tuple[str, ...]:
        """Absolute paths, each may hold `*`, `?` and `[...]`."""
        value = self._take(key)
        if value is None:
            return ()
        if isinstance(value, list) and all(isinstance(one, str) and re.fullmatch(r"/[^\0]+", one) for one in value):
            return tuple(value)
        self.problem(key, value, "a list of absolute paths, each of which may hold *")
        return ()

    def address(self, key: str, default: Address) -> Address:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, str) and (address := parse_address(value)):
            return address
        self.problem(key, value, '"host:port" or "[v6-address]:port" with a port from 0 to 65535')
        return default

    def ip(self, key: str, default: str) -> str:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, str) and is_ip(value) and not ipaddress.ip_address(value).is_unspecified:
            return value
        self.problem(key, value, "an IPv4 or IPv6 address of this host that the other hosts can dial")
        return default

    def port_range(self, key: str, default: tuple[int, int]) -> tuple[int, int]:
        value = self._take(key)
        if value is None:
            return default
        match value:
            case [int(first), int(end)] if 1 <= first < end <= 65536 and not isinstance(first, bool):
                return first, end
        self.problem(key, value, "[first, end] with 1 <= first < end <= 65536; end is not used")
        return default

    def seconds(self, key: str, default: float, least: float, most: float) -> float:
        return self.number(key, default, least, most, "seconds")

    def number(self, key: str, default: float, least: float, most: float, unit: str) -> float:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
            return float(value)
        self.problem(key, value, f"a number of {unit} from {least:g} to {most:g}")
        return default

    def whole(self, key: str, default: Default, most: int) -> int | Default:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most:
            return value
        self.problem(key, value, f"a whole number from 0 to {most}")
        return default

    def truth(self, key: str, default: Default) -> bool | Default:
        value = self._take(key)
        if value is None:
            return default
        if isinstance(value, bool):
            return value
        self.problem(key, value, "true or false")
        return default

    def push_limit(self, key: str) -> int:
        """Bytes per second, a number or text like "200MiB/s"; 0, the default: no limit."""
        least, most = PUSH_LIMIT_LEAST, PUSH_LIMIT_MOST
        value = self._take(key)
        if value is None:
            return 0
        rate = value
        if isinstance(value, str):
            try:
                rate = parse_rate(value)
            except ValueError as error:
                self.problem(key, value, f'a rate like "200MiB/s": {error}')
                return 0
        if isinstance(rate, int) and not isinstance(rate, bool) and (rate == 0 or least <= rate <= most):
            return rate
        self.problem(key, value, f'0 (no limit), or from {least} to {most} bytes a second, also as "200MiB/s"')
        return 0

    def cpu_list(self, key: str) -> str | None:
        """The list as it is written; None: the key is absent."""
        value = self._take(key)
        if value is None:
            return None
        why = ""
        if isinstance(value, str):
            try:
                parse_cpu_list(value)
            except CpuListError as error:
                why = f"; {error}"
            else:
                return value
        self.problem(key, value, f'a list of CPUs like "2-3,7", or ""{why}')
        return None

    def finish(self) -> None:
        for key, value in self._values.items():
            known = ", ".join(sorted(self._known))
            self.problem(key, value, f"absent: no such key (known here: {known})")


def _shown(value: object) -> str:
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
