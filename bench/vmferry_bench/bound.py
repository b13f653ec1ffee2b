"""The bound: a guest is served by the work that every move by userfaultfd and TCP has to do, and no more."""

from __future__ import annotations

from vmferry.units import MIB
from vmferry_bench.native import guest_arguments, native
from vmferry_bench.processes import warm_memory
from vmferry_bench.shape import BOUND, Round, Shape


async def serve(shape: Shape, number: int) -> Round:
    """One round. The guest is stopped for long before it, because all of its memory is copied."""
    await warm_memory(shape.memory_mib * MIB)
    limit = ("--push-mib-s", str(shape.push_mib_s))
    found = await native("bound", *guest_arguments(shape), "--backing", shape.backing, *limit)
    said = found["report"]
    return Round(
        side=BOUND,
        shape=shape,
        number=number,
        buckets=said["first_touch_buckets"],
        longest_us=said["first_touch_us"]["max"],
        blackout_guest_s=None,
        blackout_vmm_s=None,
        total_s=None,
        postcopy_s=found["seconds"],
        postcopy_bytes=found["bytes"],
        machinery_cpu_s=found["machinery_cpu_s"],
        vcpu_cpu_s=found["vcpu_cpu_s"],
        wrong_bytes=said["wrong_bytes"],
        faults=said["fatal"] or (f"{said['wrong_bytes']} wrong bytes" if said["wrong_bytes"] else ""),
    )
