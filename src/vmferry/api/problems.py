"""The Problems service."""

from __future__ import annotations

from vmferry.api.answer import Context, answered
from vmferry.api.control import ProblemControl
from vmferry.api.messages import problem_to_pb
from vmferry.v1 import problems_pb2 as pb
from vmferry.v1.problems_pb2_grpc import ProblemsServicer as GeneratedServicer


class ProblemsServicer(GeneratedServicer):
    """Problems, the worst first."""

    def __init__(self, control: ProblemControl) -> None:
        self._control = control

    async def ListProblems(self, request: pb.ListProblemsRequest, context: Context) -> pb.ListProblemsResponse:  # noqa: N802
        del request
        return await answered(context, self._list())

    async def _list(self) -> pb.ListProblemsResponse:
        return pb.ListProblemsResponse(problems=[problem_to_pb(one) for one in await self._control.problems()])
