"""A microVM boots from an image before the image has arrived.

Builds a real image from distribution packages (or takes --image), serves it from a real registry
behind a link of given speed, converts it there, and boots it from its lazily fetched snapshot:
with nothing on this machine, with a boot pack made from that first boot, and once more. Prints the
program's output, the bytes fetched and when what happened. QEMU and a guest kernel are downloaded
into .guest-kit/ and not installed. Needs root.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.demo import (  # noqa: E402
    STATE,
    convert,
    drop_page_cache,
    imgsnap,
    obtain_image,
    parse_rate,
    registry,
    run,
    say,
    size,
)
from demo.link import Link  # noqa: E402

KIT = ROOT / ".guest-kit"
STEPS = ("attached", "started", "ready", "output", "ended")


@dataclass(frozen=True)
class Boot:
    """One boot, told by `imgsnap vm run --report`, and what the link carried."""

    title: str
    seconds: dict[str, float]
    received: int  # bytes over the link
    output: str


@dataclass(frozen=True)
class Guests:
    """Boots of one snapshot."""

    link: Link
    reference: str
    command: list[str]
    work: Path
    env: dict[str, str]

    def boot(self, title: str, *options: str) -> Boot:
        say(f"$ imgsnap vm run {' '.join([*options, self.reference])}")
        report, received = self.work / "report.json", self.link.received
        kernel = ["--kernel", str(KIT / "vmlinuz"), "--modules", str(KIT / "modules")]
        arguments = [*imgsnap(), "vm", "run", "--plain-http", *kernel, "--report", str(report)]
        override = ["--", *self.command] if self.command else []
        done = subprocess.run(
            [*arguments, *options, self.reference, *override],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"error: the guest's command failed:\n{done.stdout[-2000:]}")
        say(done.stdout.rstrip())
        seconds = json.loads(report.read_text())["seconds"]
        return Boot(title, seconds, self.link.received - received, done.stdout.strip())

    def forget(self) -> None:
        """Everything that this machine has of the image."""
        self.stop()
        shutil.rmtree(self.work / "cache", ignore_errors=True)
        drop_page_cache()

    def stop(self) -> None:
        subprocess.run(
            [*imgsnap(), "daemon", "stop", "--force"],
            env=self.env,
            capture_output=True,
            check=False,
        )


def show(boots: list[Boot]) -> None:
    say("\nseconds since the run began:")
    columns = ("attached", "kernel up", "root mounted", "first output", "ended")
    say(f"{'':<26}{'received':>11}" + "".join(f"{column:>14}" for column in columns))
    for boot in boots:
        times = "".join(f"{boot.seconds.get(step, 0.0):>14.2f}" for step in STEPS)
        say(f"{boot.title:<26}{size(boot.received):>11}{times}")


def boots(guests: Guests) -> list[Boot]:
    trace = guests.work / "boot.json"
    try:
        found = [guests.boot("nothing here", "--trace", str(trace))]
        say(f"$ imgsnap optimize {guests.reference} --trace {trace.name}")
        optimize = [*imgsnap(), "optimize", "--plain-http", guests.reference, "--trace", trace]
        say(run(*optimize, env=guests.env).rstrip())
        guests.forget()
        found.append(guests.boot("nothing here, boot pack"))
        found.append(guests.boot("once more"))
        return found
    finally:
        guests.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--image", help="any image instead of the demo's own")
    parser.add_argument("--command", default="", help="instead of the image's own")
    parser.add_argument("--rate", default="100mbit", help="of the link, or none [100mbit]")
    parser.add_argument("--rtt-ms", type=float, default=10.0, help="round trip [10]")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: the demo serves files through FUSE\nhint: run it as root")
    rate = parse_rate(arguments.rate)
    say("fetching QEMU and a guest kernel into .guest-kit/ (once; nothing is installed)")
    say(run(ROOT / "scripts/guest-kit", KIT).rstrip())
    STATE.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=STATE, prefix="vm-") as directory:
        work = Path(directory)
        env = {
            **os.environ,
            "PATH": f"{KIT}:{os.environ['PATH']}",
            "IMGSNAP_STORE": str(work / "store"),
            "IMGSNAP_CACHE_DIR": str(work / "cache"),
            "IMGSNAP_RUN_DIR": str(work / "run"),
        }
        with registry(work / "registry") as server:
            convert(obtain_image(arguments.image, server), env)
            with Link(server.port, rate, arguments.rtt_ms / 1000) as link:
                reference = f"127.0.0.1:{link.port}/demo:snapshot"
                command = shlex.split(arguments.command)
                found = boots(Guests(link, reference, command, work, env))
    say(f"\nover a link of {arguments.rate} and {arguments.rtt_ms:g} ms")
    show(found)


if __name__ == "__main__":
    main()
