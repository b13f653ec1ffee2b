"""The last table of the demo."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from vmferry.client.plain import duration_words, size_words
from vmferry.demo.result import DemoResult

ADDRESSES_A_LINE = 6


def print_result(result: DemoResult, console: Console) -> None:
    """Prints figures, machine checks and the verdict."""
    plain = result.plain()
    page, touch, guest = plain["pages"], plain["first_touch_us"], plain["guest"]
    poisoned = plain["poisoned"]
    console.print(
        _rows(
            ("guest", f"{result.accel}, network: {result.network}"),
            ("downtime", duration_words(result.migration.downtime_s)),
            ("total", duration_words(result.migration.total_s)),
            ("received", f"{size_words(plain['bytes_received'])} for {page['total']} pages"),
            (
                "pages came by",
                f"demand {page['demand']}, push {page['push']}, zero {page['zero']}, poison {page['poison']}",
            ),
            (
                "first touch",
                f"p50 {touch['p50']:.0f} µs, p99 {touch['p99']:.0f} µs, "
                f"max {touch['max']:.0f} µs ({touch['count']} faults)",
            ),
            (
                "poisoned",
                f"{poisoned['before']} before, {poisoned['during']} during postcopy, of which {poisoned['healed']} "
                "had their good copy there already (healed)",
            ),
            (
                "guest verified",
                f"{guest['touches']} times a page, {guest['touches_on_destination']} of them on the destination, "
                f"{guest['pages_touched_on_destination']} different pages there",
            ),
            ("wrong bytes", str(guest["wrong_bytes"])),
            ("source runs", "yes" if result.evidence.source_running else "no"),
        )
    )
    _print_checks(guest["machine_checks"], console)
    for problem in result.problems:
        console.print(f"✗ {problem}", style="bold red", markup=False)
    if result.ok:
        console.print("✓ the guest moved, and its memory errors with it", style="bold green")
    if result.logs:
        console.print(f"logs: {result.logs}", markup=False)


def _rows(*rows: tuple[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


def _print_checks(checks: list[dict[str, object]], console: Console) -> None:
    for host in ("source", "destination"):
        seen = [f"{check['gpa']} {check['severity']}" for check in checks if check["host"] == host]
        console.print(f"machine checks taken by the guest on the {host}: {len(seen)}", highlight=False)
        for first in range(0, len(seen), ADDRESSES_A_LINE):
            console.print("  " + "  ".join(seen[first : first + ADDRESSES_A_LINE]), highlight=False, soft_wrap=True)
