"""Writes docs/reference/api.md from the comments of proto/. `make docs` runs it; a test compares.

Comments come from the compiler's own descriptor set with source info, so the page documents the served contract.
"""

from __future__ import annotations

import sys
import tempfile
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "reference" / "api.md"
WELL_KNOWN = Path(protoc.__file__).parent / "_proto"
ORDER = ("migrations", "machines", "qemus", "peer", "pager", "pages", "reach", "common")

# Field numbers in descriptor.proto: a comment is found by the path of numbers and indices that leads to its element.
FILE_MESSAGES, FILE_ENUMS, FILE_SERVICES = 4, 5, 6
MESSAGE_FIELDS, ENUM_VALUES, SERVICE_METHODS = 2, 2, 2
SYNTAX = 12

SCALARS = {
    value: FieldDescriptorProto.Type.Name(value).removeprefix("TYPE_").lower()
    for value in FieldDescriptorProto.Type.values()
}

INTRODUCTION = """# API reference

`make docs` generates this page from the comments of `proto/`: edit those. Addresses and sizes are
bytes, ranges are half-open. Errors carry `google.rpc.ErrorInfo` with a reason of the domain `vmferry`.

| file | who speaks it |
|---|---|
| [migrations](#migrationsproto), [machines](#machinesproto) | a control plane or the command line, with a daemon |
| [qemus](#qemusproto) | the same, for adopted QEMUs |
| [peer](#peerproto) | the source's daemon, with the destination's |
| [pager](#pagerproto) | a daemon, with a pager on its host, over a unix socket |
| [pages](#pagesproto) | the destination's pager, with the source's |
| [reach](#reachproto) | a daemon, with the program that steps into a VMM on its host |
| [common](#commonproto) | words that all of them share |
"""


class Comments:
    """The comments of one file by descriptor path."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._by_path = {tuple(location.path): location for location in file.source_code_info.location}

    def of(self, *path: int) -> str:
        location = self._by_path.get(path)
        if location is None:
            return ""
        text: str = location.leading_comments or location.trailing_comments
        return _with_fences(textwrap.dedent(text).strip("\n").splitlines())


def _with_fences(lines: list[str]) -> str:
    """Indented lines of a comment become fenced blocks."""
    parts: list[str] = []
    for indented, block in groupby(lines, key=lambda line: line.startswith("  ")):
        body = textwrap.dedent("\n".join(block))
        parts.append(f"```text\n{body}\n```" if indented else body.strip("\n"))
    return "\n\n".join(part for part in parts if part)


def compile_protos() -> list[FileDescriptorProto]:
    """The project's files in the order of the document."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "descriptors"
        paths = [f"vmferry/v1/{name}.proto" for name in ORDER]
        options = [f"-I{ROOT / 'proto'}", f"-I{WELL_KNOWN}", f"--descriptor_set_out={out}", "--include_source_info"]
        if protoc.main(["protoc", *options, *paths]) != 0:
            raise SystemExit("the files in proto/ do not compile")
        files = {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}
    return [files[path] for path in paths]


def in_cell(text: str) -> str:
    """Escapes text for a table cell: comments may hold `|`, line ends, and patterns that look like links."""
    return " ".join(text.split()).replace("|", "\\|").replace("](", "]\\(")


def type_of(field: FieldDescriptorProto) -> str:
    """`repeated [PageRange](#pagerange)`, `uint64`."""
    if field.type_name:
        name = field.type_name.rsplit(".", 1)[-1]
        ours = field.type_name.startswith(".vmferry.")
        text = f"[{name}](#{name.lower()})" if ours else f"`{field.type_name.lstrip('.')}`"
    else:
        text = f"`{SCALARS[field.type]}`"
    return f"repeated {text}" if field.label == FieldDescriptorProto.LABEL_REPEATED else text


def service_lines(service: ServiceDescriptorProto, index: int, comments: Comments) -> Iterator[str]:
    """A service and its calls."""
    yield f"\n### Service {service.name}\n"
    if text := comments.of(FILE_SERVICES, index):
        yield f"{text}\n"
    yield "| call | takes | answers | |\n|---|---|---|---|"
    for number, method in enumerate(service.method):
        takes, answers = (name.rsplit(".", 1)[-1] for name in (method.input_type, method.output_type))
        takes = f"{'stream ' if method.client_streaming else ''}[{takes}](#{takes.lower()})"
        answers = f"{'stream ' if method.server_streaming else ''}[{answers}](#{answers.lower()})"
        text = in_cell(comments.of(FILE_SERVICES, index, SERVICE_METHODS, number))
        yield f"| `{method.name}` | {takes} | {answers} | {text} |"


def message_lines(message: DescriptorProto, index: int, comments: Comments) -> Iterator[str]:
    """A message and its fields."""
    yield f"\n### {message.name}\n"
    if text := comments.of(FILE_MESSAGES, index):
        yield f"{text}\n"
    if not message.field:
        yield "No fields."
        return
    yield "| field | type | |\n|---|---|---|"
    for number, field in enumerate(message.field):
        text = in_cell(comments.of(FILE_MESSAGES, index, MESSAGE_FIELDS, number))
        if field.HasField("oneof_index"):
            text = f"(one of `{message.oneof_decl[field.oneof_index].name}`) {text}".rstrip()
        yield f"| `{field.name}` | {type_of(field)} | {text} |"


def enum_lines(enum: EnumDescriptorProto, index: int, comments: Comments) -> Iterator[str]:
    """An enumeration and its values."""
    yield f"\n### {enum.name}\n"
    if text := comments.of(FILE_ENUMS, index):
        yield f"{text}\n"
    yield "| value | number | |\n|---|---|---|"
    for number, value in enumerate(enum.value):
        text = in_cell(comments.of(FILE_ENUMS, index, ENUM_VALUES, number))
        yield f"| `{value.name}` | {value.number} | {text} |"


def file_lines(file: FileDescriptorProto) -> Iterator[str]:
    """A file: its services, then messages, then enumerations."""
    comments = Comments(file)
    yield f"\n## {file.name.rsplit('/', 1)[-1]}\n"
    yield comments.of(SYNTAX)
    for index, service in enumerate(file.service):
        yield from service_lines(service, index, comments)
    for index, message in enumerate(file.message_type):
        yield from message_lines(message, index, comments)
    for index, enum in enumerate(file.enum_type):
        yield from enum_lines(enum, index, comments)


def render() -> str:
    """The whole document."""
    lines = [INTRODUCTION.rstrip()]
    for file in compile_protos():
        lines.extend(file_lines(file))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render())
    sys.stdout.write(f"wrote {TARGET.relative_to(ROOT)}\n")
