"""The waiting domain, from the VM's."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from vmferry.errors import Reason, VmferryError
from vmferry.vmm.qemu.libvirt import NAMESPACE, waiting_domain

DOMAIN = """<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web-1</name>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices><disk type='file'><target dev='vda' bus='virtio'/><address type='pci' slot='0x05'/></disk></devices>
  <qemu:commandline>
    <qemu:arg value='-qmp'/><qemu:arg value='unix:/run/qemu/web-1.qmp,server=on,wait=off'/>{more}
  </qemu:commandline>
</domain>"""
ARGUMENT = f"{{{NAMESPACE}}}commandline/{{{NAMESPACE}}}arg"


def words(xml: str) -> list[str | None]:
    return [one.get("value") for one in ElementTree.fromstring(xml).iterfind(ARGUMENT)]


def test_the_domain_waits_with_the_machine_type_in_full():
    made = waiting_domain(DOMAIN.format(more=""), "pc-i440fx-7.2")
    root = ElementTree.fromstring(made)
    kind = root.find("os/type")
    assert kind is not None and kind.get("machine") == "pc-i440fx-7.2"
    assert words(made) == ["-qmp", "unix:/run/qemu/web-1.qmp,server=on,wait=off", "-incoming", "defer"]
    assert "qemu:commandline" in made and root.get("id") is None
    assert root.find("devices/disk/address") is not None, "places of devices stay"


def test_a_waiting_domain_stays_as_it_is():
    waiting = DOMAIN.format(more="<qemu:arg value='-incoming'/><qemu:arg value='defer'/>")
    assert words(waiting_domain(waiting, "pc-q35-9.0"))[-2:] == ["-incoming", "defer"]
    assert len(words(waiting_domain(waiting, "pc-q35-9.0"))) == 4


@pytest.mark.parametrize(
    ("xml", "what"),
    [
        ("web-1", "no XML"),
        ("<network/>", "no <domain>"),
        ("<domain><name>a</name></domain>", "no <domain> with"),
        ("<domain><os><type>hvm</type></os></domain>", "-qmp"),
    ],
)
def test_an_input_that_is_no_such_domain_is_refused(xml: str, what: str):
    with pytest.raises(VmferryError, match=what) as caught:
        waiting_domain(xml, "pc-q35-9.0")
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert "virsh dumpxml" in caught.value.remedy
