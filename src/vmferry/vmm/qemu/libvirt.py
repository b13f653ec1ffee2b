"""The XML of a libvirt domain that waits for a VM, from that of the VM's domain. Pure."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

from vmferry.errors import Reason, VmferryError

NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
"""https://libvirt.org/drvqemu.html, "Pass-through of arbitrary qemu commands"."""
_COMMANDLINE = f"{{{NAMESPACE}}}commandline"
_ARGUMENT = f"{{{NAMESPACE}}}arg"
_WAITS = ("-incoming", "defer")


def waiting_domain(xml: str, machine_type: str) -> str:
    """The same domain, which waits for a state once it is started with `--paused`, and with the machine type in full.

    Raises: VmferryError INVALID_ARGUMENT.
    """
    ElementTree.register_namespace("qemu", NAMESPACE)
    try:
        domain = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        raise _wrong(f"is no XML ({error})") from error
    kind = domain.find("os/type")
    if domain.tag != "domain" or kind is None:
        raise _wrong("is no <domain> with an <os><type>")
    if not _monitors(domain):
        raise _wrong("has no <qemu:commandline> with a monitor for vmferry (-qmp)")
    kind.set("machine", machine_type)
    domain.attrib.pop("id", None)
    arguments = domain.find(_COMMANDLINE)
    if arguments is not None and not {one.get("value") for one in arguments} & {_WAITS[0]}:
        for word in _WAITS:
            ElementTree.SubElement(arguments, _ARGUMENT, value=word)
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode")


def _monitors(domain: ElementTree.Element) -> list[str]:
    words = [one.get("value", "") for one in domain.iterfind(f"{_COMMANDLINE}/{_ARGUMENT}")]
    return [after for word, after in pairwise(words) if word in ("-qmp", "--qmp")]


def _wrong(what: str) -> VmferryError:
    return VmferryError(
        Reason.INVALID_ARGUMENT, f"--libvirt: the input {what}.", "Give it the output of `virsh dumpxml --migratable`."
    )
