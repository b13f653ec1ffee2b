"""The words for a step before the commit, and its host. Pure."""

from __future__ import annotations

from vmferry.migration.source import state_machine as m


def step_words(command: m.Command, vm: str, here: str, there: str) -> tuple[str, str]:
    """(words, host). `there` is the destination's name, or its address as long as it has not answered."""
    pager = "the source's pager"
    found = {
        m.StartPager: (f"{pager} to start", here),
        m.ServePages: (f"{pager} to open its port", here),
        m.AttachMemory: (f"the VMM of {vm} to attach its memory", here),
        m.MarkPoison: (f"{pager} to mark memory errors", here),
        m.SendHello: ("vmferryd to answer", there),
        m.RequestPrepare: (f"vmferryd to prepare for {vm}", there),
        m.ReserveJournal: ("the store to write", here),
        m.AppendJournal: ("the store to write", here),
    }
    return found.get(type(command), (f"{vm} to be handed over", there))
