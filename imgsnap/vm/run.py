"""One run of a command in a microVM: what it takes, checked first, and the boot."""

import contextlib
import fcntl
import math
import os
import shutil
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from imgsnap.errors import ImgsnapError, InvalidArgument, ResourceExhausted, Unsupported
from imgsnap.mount.container import Command
from imgsnap.units import BLOCK_SIZE, MIB
from imgsnap.vm import initramfs, kvm
from imgsnap.vm.kernel import (
    BASE,
    DAX,
    FASTER_VERITY,
    NETWORK,
    SCRATCH,
    VERITY,
    GuestKernel,
    find_kernel,
)
from imgsnap.vm.launcher import launcher
from imgsnap.vm.machine import GuestStopped, Machine, Output, write_initramfs
from imgsnap.vm.network import TAP, Network, guest_network
from imgsnap.vm.qemu import Accelerator, Boot, Drive, Hardware
from imgsnap.vm.verity import PROGRAM, VerifiedRoot, verity_program

ARCHITECTURE = "amd64"
"""Of guests: QEMU's microvm is an x86 machine."""
MEMORY_MIN_MIB = 128
SCRATCH_MIN = 16 * MIB
KVM_START_S = 10.0
"""From QEMU's start to the guest's init under KVM: a second where KVM works."""
_STRUCT_PAGE = 64
_QEMU = "qemu-system-x86_64"
_LAUNCH = "launch"

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asked for."""

    memory_mib: int = 512
    cpus: int = 1
    kernel: Path | None = None
    modules: Path | None = None
    network: bool = False
    scratch: int | None = None  # bytes of a disk for changes; None: they are kept in memory
    limit_s: float | None = None  # for boot and command
    emulate: bool = False  # even where KVM works
    root_hash: str | None = None  # hex; the guest takes no snapshot but one with this
    dax: bool = False  # map the disk into the guest; all its bytes must be local


@dataclass(frozen=True, slots=True)
class Tools:
    """Everything that a run needs of the machine, found."""

    qemu: str
    busybox: Path
    kernel: GuestKernel
    accelerator: Accelerator


@dataclass(slots=True)
class TimeLine:
    """When things happened, in seconds since `began`."""

    began: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Now."""
        self.began = time.monotonic()

    def mark(self, what: str) -> None:
        self.seconds.setdefault(what, round(time.monotonic() - self.began, 4))


def prepare(wanted: Wanted, state: Path, say: Say) -> Tools:
    """Finds what a run needs before anything is attached; `state` is where runs keep what they
    learnt of the machine.

    Raises InvalidArgument, NotFound, Unsupported, ResourceExhausted.
    """
    if os.uname().machine != "x86_64":
        raise Unsupported(f"microVMs run on x86-64 machines; this one is {os.uname().machine}")
    _check_size(wanted)
    qemu, busybox = _program(_QEMU, "qemu-system-x86"), _program("busybox", "busybox-static")
    if wanted.scratch is not None:
        _program("mkfs.ext4", "e2fsprogs")
    kernel = _kernel(wanted, verity=wanted.root_hash is not None)
    return Tools(qemu, Path(busybox), kernel, _accelerator(wanted, state, say))


def with_verity(tools: Tools, wanted: Wanted) -> Tools:
    """The same with a kernel that can verify its disk; raises as `prepare`."""
    return replace(tools, kernel=_kernel(wanted, verity=True))


def _kernel(wanted: Wanted, *, verity: bool) -> GuestKernel:
    needed = dict(BASE)
    needed |= DAX if wanted.dax else {}
    needed |= NETWORK if wanted.network else {}
    needed |= SCRATCH if wanted.scratch is not None else {}
    needed |= VERITY if verity else {}
    also = FASTER_VERITY if verity else ()
    return find_kernel(wanted.kernel, wanted.modules, needed, also)


def _check_size(wanted: Wanted) -> None:
    if wanted.memory_mib < MEMORY_MIN_MIB:
        raise InvalidArgument(
            f"a guest needs {MEMORY_MIN_MIB} MiB of memory; {wanted.memory_mib} are too little",
            hint=f"give it --memory {MEMORY_MIN_MIB}MiB or more",
        )
    available = _available_mib()
    if available is not None and wanted.memory_mib > available:
        raise ResourceExhausted(
            f"the guest is to have {wanted.memory_mib} MiB of memory; {available} MiB are free",
            hint="give it less with --memory",
        )
    if wanted.scratch is not None and wanted.scratch < SCRATCH_MIN:
        raise InvalidArgument(
            "the scratch disk is too small", hint=f"it needs {SCRATCH_MIN // MIB}MiB or more"
        )


def _check_mapped(wanted: Wanted, disk: Path) -> None:
    """The guest's kernel keeps a struct page, 64 bytes, for each page that is mapped into it.

    At most half of its memory may go there. Raises InvalidArgument."""
    least = 2 * (disk.stat().st_size // BLOCK_SIZE * _STRUCT_PAGE) // MIB
    if wanted.memory_mib < least:
        raise InvalidArgument(
            f"a guest needs {least} MiB of memory to map this snapshot; "
            f"{wanted.memory_mib} are too little",
            hint=f"give it --memory {least}MiB or more, or leave out --dax",
        )


def _available_mib() -> int | None:
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) >> 10
    return None


def _program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Unsupported(f"{name} is not installed", hint=f"apt-get install {package}")
    return found


def _accelerator(wanted: Wanted, state: Path, say: Say) -> Accelerator:
    if wanted.emulate:
        return Accelerator.EMULATION
    reason = kvm.why_not()
    if reason is None and kvm.Refusals(state).known():
        reason = "no guest came up under it since this machine started"
    if reason is None:
        return Accelerator.KVM
    say(f"no KVM ({reason}): the guest is emulated, which is slow")
    return Accelerator.EMULATION


def run(
    tools: Tools,
    wanted: Wanted,
    disk: Path,
    root: VerifiedRoot | None,
    command: Command,
    state: Path,
    say: Say,
    line: TimeLine,
    output: Output,
) -> int:
    """Boots a guest from `disk` and runs the command in it; its exit status. With a `root` the
    guest verifies each block by its hash. `line` is told when what happened.

    What the command prints goes to `output`; a command with a terminal has standard input's.
    Raises GuestStopped, IntegrityError for a disk that the guest refuses, OutOfTime, OSError,
    InvalidArgument for a guest that is too small to map the disk, and what building the network
    raises.
    """
    if wanted.dax:
        _check_mapped(wanted, disk)
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(prefix="imgsnap-vm-")))
        network = stack.enter_context(guest_network()) if wanted.network else None
        scratch = _scratch_disk(work, wanted.scratch) if wanted.scratch is not None else None
        hardware = _hardware(tools, wanted, disk, scratch, network)
        boot = _boot(tools, work, root, command, hardware, network)
        prefix = network.command_prefix if network else []
        if network:
            say(f"the guest is {network.guest}, this machine {network.host}")

        def machine_of(accelerator: Accelerator) -> Machine:
            parts = replace(hardware, accelerator=accelerator)
            deadline = _deadline(wanted, line)
            return Machine(tools.qemu, parts, boot, prefix=prefix, deadline=deadline)

        line.mark("qemu")
        machine = _start(stack, tools.accelerator, machine_of, state, say)
        line.mark("started")
        machine.wait_ready()
        line.mark("ready")
        return _command(machine, command, line, output)


def _deadline(wanted: Wanted, line: TimeLine) -> float:
    return math.inf if wanted.limit_s is None else line.began + wanted.limit_s


def _hardware(
    tools: Tools, wanted: Wanted, disk: Path, scratch: Path | None, network: Network | None
) -> Hardware:
    drives = [] if wanted.dax else [Drive(disk)]
    if scratch is not None:
        drives.append(Drive(scratch, read_only=False))
    return Hardware(
        tools.accelerator,
        wanted.memory_mib,
        wanted.cpus,
        tuple(drives),
        pmem=disk if wanted.dax else None,
        tap=TAP if network else None,
    )


def _boot(
    tools: Tools,
    work: Path,
    root: VerifiedRoot | None,
    command: Command,
    hardware: Hardware,
    network: Network | None,
) -> Boot:
    programs = [initramfs.file(_LAUNCH, launcher(command), executable=True)]
    if root is not None:
        programs.append(initramfs.file(PROGRAM, verity_program(root), executable=True))
    data = initramfs.guest(tools.busybox, tools.kernel.modules, programs)
    path = write_initramfs(work, data)
    parameters = network.parameters if network else []
    if hardware.pmem is not None:
        parameters.append("imgsnap.dax=/dev/pmem0")
    if any(not drive.read_only for drive in hardware.drives):
        parameters.append("imgsnap.scratch=/dev/" + ("vda" if hardware.pmem else "vdb"))
    return Boot(tools.kernel.image, path, tuple(parameters))


def _start(
    stack: ExitStack,
    accelerator: Accelerator,
    machine_of: Callable[[Accelerator], Machine],
    state: Path,
    say: Say,
) -> Machine:
    """A guest whose kernel is up: under KVM, or emulated when none comes up there."""
    if accelerator is Accelerator.KVM:
        with ExitStack() as attempt:
            machine = attempt.enter_context(machine_of(accelerator))
            try:
                machine.wait_started(KVM_START_S)
                stack.enter_context(attempt.pop_all())
                return machine
            except GuestStopped as error:
                say(f"KVM does not work here ({error}): the guest is emulated, which is slow")
    emulated = stack.enter_context(machine_of(Accelerator.EMULATION))
    emulated.wait_started()
    if accelerator is Accelerator.KVM:
        kvm.Refusals(state).note()  # it was KVM, and nothing else, that this guest did not start by
    return emulated


def _command(machine: Machine, command: Command, line: TimeLine, output: Output) -> int:
    def printed(data: bytes) -> None:
        line.mark("output")
        output(data)

    if command.terminal:
        rows, columns = _window()
        script = f"stty sane rows {rows} cols {columns}; exec /{_LAUNCH}"
        with _raw_terminal():
            status = machine.run(script, printed, keyboard=sys.stdin.fileno())
    else:
        status = machine.run(f"exec /{_LAUNCH} </dev/null", printed)
    line.mark("ended")
    return status


def _window() -> tuple[int, int]:
    answer = fcntl.ioctl(sys.stdin.fileno(), termios.TIOCGWINSZ, bytes(8))
    rows, columns, _, _ = struct.unpack("4H", answer)
    return rows or 24, columns or 80


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Every key goes to the guest, Ctrl-C too."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _scratch_disk(work: Path, size: int) -> Path:
    """An empty ext4 in a sparse file. Raises ImgsnapError when it cannot be made."""
    path = work / "scratch.ext4"
    with path.open("wb") as file:
        file.truncate(size)
    # Nobody reads it after the run: no journal.
    command = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "nodiscard", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImgsnapError(f"the scratch disk: {done.stderr.strip()[-200:]}")
    return path
