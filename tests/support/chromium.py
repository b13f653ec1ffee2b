"""Looks at the dashboard with a headless Chromium, driven through the DevTools protocol.

`watch_dashboard(url, until)` opens the page, and records its DOM until the caller has seen enough. A page
that logs an error, breaks its own Content-Security-Policy or asks another origin for anything has `problems`.

Blocks: call it with `asyncio.to_thread` if a daemon runs in the same process.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import websocket

from vmferry.demo.patience import patient

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--no-first-run",
    "--disable-quic",
    "--remote-debugging-port=0",
)
START_S = patient(60.0)
ANSWER_S = patient(30.0)
LOOK_S = 0.05

SNAPSHOT = """JSON.stringify({
  live: document.getElementById("link").textContent,
  updates: Number(document.body.dataset.updates || 0),
  vms: [...document.querySelectorAll("[data-vm]")].map(
    row => [row.dataset.vm, row.querySelector(".state").textContent]),
  phases: [...document.querySelectorAll("[data-migration]")].map(row => [row.dataset.migration, row.dataset.phase]),
  limits: [...document.querySelectorAll("[data-migration]")].map(
    row => [row.dataset.migration, row.querySelector(".push-limit")?.textContent ?? ""]),
  outcomes: [...document.querySelectorAll("[data-incoming]")].map(row => [row.dataset.incoming, row.dataset.phase]),
  progress: [...document.querySelectorAll("progress")].map(bar => [bar.value, bar.max]),
  errors: [...document.querySelectorAll("[data-gpa]")].map(
    row => [row.dataset.errorVm, row.dataset.gpa, ...[...row.cells].slice(2, 7).map(cell => cell.textContent)]),
})"""


@dataclass
class Findings:
    """The recorded states of the page. States, phases and outcomes are all that were seen, in order."""

    vms: dict[str, list[str]] = field(default_factory=dict)
    phases: dict[str, list[str]] = field(default_factory=dict)
    outcomes: dict[str, list[str]] = field(default_factory=dict)
    limits: dict[str, list[str]] = field(default_factory=dict)
    """Push limits as worded; empty where there is none."""
    errors: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    """(VM, address) → origin, severity, guest was told, hops, count, as shown last."""
    progress: list[tuple[float, float]] = field(default_factory=list)
    """(arrived, total) of each bar, as shown last."""
    updates: int = 0
    """How often server-sent events have changed the page."""
    live: str = ""
    problems: list[str] = field(default_factory=list)

    def note(self, snapshot: dict[str, Any]) -> None:
        in_order = {"vms": self.vms, "phases": self.phases, "outcomes": self.outcomes, "limits": self.limits}
        for name, seen in in_order.items():
            for key, value in snapshot[name]:
                known = seen.setdefault(key, [])
                if not known or known[-1] != value:
                    known.append(value)
        self.errors |= {(vm, gpa): tuple(rest) for vm, gpa, *rest in snapshot["errors"]}
        self.progress = [(value, most) for value, most in snapshot["progress"]]
        self.updates, self.live = snapshot["updates"], snapshot["live"]


class Tab:
    """One tab: requests and answers of the DevTools protocol; events in between are noted."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=ANSWER_S, suppress_origin=True)
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message: dict[str, Any] = json.loads(self._socket.recv())
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def value(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression)
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{expression[:60]}…: {answer['exceptionDetails'].get('exception', answer)}")
        return answer["result"].get("value")

    def close(self) -> None:
        self._socket.close()


@contextmanager
def open_tab(program: str, profile: Path) -> Iterator[Tab]:
    """Starts Chromium with a profile of its own and ends it afterwards."""
    argv = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    with (profile.parent / "chromium.log").open("wb") as log, subprocess.Popen(argv, stdout=log, stderr=log) as process:
        try:
            tab = Tab(_tab_address(process, profile))
            try:
                yield tab
            finally:
                tab.close()
        finally:
            process.terminate()
            try:
                process.wait(patient(10))
            except subprocess.TimeoutExpired:
                process.kill()


def _tab_address(process: subprocess.Popen[bytes], profile: Path) -> str:
    """Chromium writes its port into the profile once it listens."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"Chromium ended with {process.returncode}; see {profile.parent}/chromium.log")
        try:
            port = int((profile / "DevToolsActivePort").read_text().split()[0])
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=ANSWER_S) as answer:
                for target in json.load(answer):
                    if target["type"] == "page":
                        return str(target["webSocketDebuggerUrl"])
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.05)
    raise RuntimeError("Chromium did not open its DevTools port in time")


def watch_dashboard(
    program: str,
    profile: Path,
    url: str,
    until: Callable[[Findings], bool],
    *,
    timeout_s: float = START_S,
    with_script: bool = True,
) -> Findings:
    """Opens `url` and looks until `until` is content, or `timeout_s` have passed: the caller judges the findings."""
    findings = Findings()
    with open_tab(program, profile) as tab:
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.call(f"{domain}.enable")
        if not with_script:
            tab.call("Emulation.setScriptExecutionDisabled", value=True)
        tab.call("Page.navigate", url=url)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if tab.value('document.readyState != "loading" && document.getElementById("link") !== null'):
                findings.note(json.loads(tab.value(SNAPSHOT)))
                if until(findings):
                    break
            time.sleep(LOOK_S)
        findings.problems = list(_problems(tab.events, url))
    return findings


def _problems(events: list[dict[str, Any]], url: str) -> Iterator[str]:
    own = urlsplit(url).netloc
    for event in events:
        match event:
            case {"method": "Runtime.exceptionThrown", "params": {"exceptionDetails": details}}:
                yield f"exception: {details.get('text')} {details.get('exception', {}).get('description', '')}"
            case {"method": "Log.entryAdded", "params": {"entry": {"level": "error", "text": str(text)} as entry}}:
                if not str(entry.get("url", "")).endswith("/favicon.ico"):
                    yield f"log: {text}"
            case {"method": "Network.requestWillBeSent", "params": {"request": {"url": str(asked)}}}:
                if urlsplit(asked).scheme in ("http", "https", "ws", "wss") and urlsplit(asked).netloc != own:
                    yield f"asked another origin: {asked}"
