"""The bound: a guest that is served with what every move by userfaultfd and TCP has to do, and nothing else."""

from __future__ import annotations

from vmferry.units import MIB
from vmferry_bench.native import guest_arguments, native
from vmferry_bench.processes import warm_memory
from vmferry_bench.shape import BOUND, Round, Shape


async def serve(shape: Shape, number: int) -> Round:
    """One round, of a guest that stands still for long before, since all of its memory is copied meanwhile."""
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
