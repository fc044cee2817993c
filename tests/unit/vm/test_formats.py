"""What is printed for each VMM, judged by their published schemas (tests/golden/vmm-apis.json)."""

import json
from pathlib import Path

import jsonschema
import pytest

from imgsnap.errors import InvalidArgument
from imgsnap.vm.formats import FORMATS, MAPPED
from imgsnap_cli import cmd_attach
from imgsnap_cli.cmd_attach import VMMS

APIS = json.loads((Path(__file__).parents[2] / "golden/vmm-apis.json").read_text())
PATH = Path("/run/imgsnap/node/dev/1f0c.disk/layer.erofs")
OPTIONS = ["qemu", "qemu-microvm", "cloud-hypervisor", "cloud-hypervisor-pmem"]
HOSTILE = [Path("/run/a,readonly=off/x"), Path("/run/a b"), Path('/run/"'), Path("/run/\n")]


def test_the_command_line_offers_them_all() -> None:
    assert set(VMMS) == set(FORMATS)
    assert cmd_attach.MAPPED == MAPPED


def test_the_page_describes_them_all() -> None:
    page = (Path(__file__).parents[3] / "docs/vmm.md").read_text()
    assert all(f"`{name}`" in page for name in FORMATS)


@pytest.mark.parametrize(
    ("name", "schema"), [("firecracker", "Drive"), ("firecracker-pmem", "Pmem")]
)
def test_firecracker_takes_it(name: str, schema: str) -> None:
    for path in (PATH, *HOSTILE):
        value = json.loads(FORMATS[name](path))
        jsonschema.validate(value, APIS["firecracker"][schema])
        assert value["path_on_host"] == str(path)
    assert True in (value.get("is_read_only"), value.get("read_only"))


def test_the_schema_refuses_what_firecracker_does_not_know() -> None:
    value = json.loads(FORMATS["firecracker"](PATH))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**value, "readonly": True}, APIS["firecracker"]["Drive"])


def test_cloud_hypervisor_knows_the_options() -> None:
    option, _, text = FORMATS["cloud-hypervisor"](PATH).partition(" ")
    given = dict(part.split("=", 1) for part in text.split(","))
    known = APIS["cloud-hypervisor"]
    assert option == "--disk" and set(given) <= set(known["disk"])
    assert given["path"] == str(PATH) and given["readonly"] == "on"
    assert given["image_type"] in known["image_type"]


def test_cloud_hypervisor_maps_it_without_opening_it_for_writing() -> None:
    option, _, text = FORMATS["cloud-hypervisor-pmem"](PATH).partition(" ")
    given = dict(part.split("=", 1) for part in text.split(","))
    assert option == "--pmem" and set(given) <= set(APIS["cloud-hypervisor"]["pmem"])
    assert (given["file"], given["discard_writes"]) == (str(PATH), "on")


def test_qemus_options_are_a_backend_and_a_device() -> None:
    words = FORMATS["qemu"](PATH).split(" ")
    assert words[0::2] == ["-blockdev", "-device"]
    assert f"file.filename={PATH}" in words[1].split(",") and "read-only=on" in words[1].split(",")
    assert words[3] == "virtio-blk-pci,drive=rootfs"
    assert FORMATS["qemu-microvm"](PATH).split(" ")[3] == "virtio-blk-device,drive=rootfs"


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("path", HOSTILE)
def test_a_path_that_would_be_syntax_is_refused(name: str, path: Path) -> None:
    with pytest.raises(InvalidArgument):
        FORMATS[name](path)


def test_katas_mount_info() -> None:
    value = json.loads(FORMATS["kata"](PATH))
    jsonschema.validate(value, APIS["kata"]["MountInfo"])
    assert value == {
        "volume-type": "directvol",
        "device": str(PATH),
        "fstype": "erofs",
        "options": ["ro"],
    }
