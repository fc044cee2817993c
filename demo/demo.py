"""The main job, shown: a program runs from its image before the image has arrived.

Builds a real image from distribution packages (or takes --image), serves it from a real registry
behind a link of given speed, converts it there, and starts its program twice: the usual way, by
pulling and unpacking everything, and from the snapshot with empty caches. Prints bytes, requests
and time to first output. Needs root. Keeps what it builds in .demo/ for the next run.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo.image import TAG, build  # noqa: E402
from demo.link import Link  # noqa: E402

STATE = ROOT / ".demo"
SPEEDS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
OUTPUT_TIMEOUT_S = 120
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IN = 'root=$0; dir=$1; shift; exec unshare --root="$root" --wd="$dir" -- "$@"'


@dataclass(frozen=True)
class Start:
    """One start of the program."""

    title: str
    seconds: float
    requests: int
    received: int  # bytes over the link
    output: str


class Registry:
    """docker-registry with its access log."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self._log = log

    def requests(self) -> int:
        return self._log.read_bytes().count(b'"GET ')


def say(text: str) -> None:
    print(text, flush=True)


def run(*command: object, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(
        [str(part) for part in command], text=True, capture_output=True, env=env, check=False
    )
    if result.returncode:
        raise SystemExit(f"error: {command[0]} failed:\n{result.stderr[-3000:]}")
    return result.stdout


@contextmanager
def registry(storage: Path) -> Iterator[Registry]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = STATE / "registry.yml"
    config.write_text(
        json.dumps(
            {
                "version": "0.1",
                "log": {"level": "error", "accesslog": {"disabled": False}},
                "storage": {"filesystem": {"rootdirectory": str(storage)}},
                "http": {"addr": f"127.0.0.1:{port}", "secret": "demo"},
            }
        )
    )
    log = STATE / "registry.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            ["docker-registry", "serve", config], stdout=out, stderr=subprocess.DEVNULL
        )
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None:
                    raise SystemExit("error: docker-registry does not start") from None
                time.sleep(0.05)
        yield Registry(port, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def drop_page_cache() -> bool:
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def first_output(command: list[str], env: dict[str, str] | None = None) -> tuple[float, str]:
    """Seconds until the command's first line of output, and that line; then it is ended."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        errors="replace",
    )
    assert process.stdout is not None
    overdue = threading.Timer(OUTPUT_TIMEOUT_S, process.terminate)
    overdue.start()
    try:
        line = process.stdout.readline()
        seconds = time.monotonic() - started
        failed = not line or line.startswith("error:")
        rest = process.stdout.read() if failed else ""
    finally:
        overdue.cancel()
        _end(process)
    if failed:
        raise SystemExit(
            f"error: no output from {' '.join(command[-3:])}\n{line}{rest[-2000:]}"
            "hint: name a command that prints something: make demo IMAGE=… CMD='nginx -v'"
        )
    return seconds, line.strip()


def _end(process: "subprocess.Popen[str]") -> None:
    """Lets a short program end by itself, ends a server, and reads what they still say."""
    try:
        process.communicate(timeout=2)
    except subprocess.TimeoutExpired:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def start_pulled(
    reference: str, override: list[str], work: Path, server: Registry, link: Link
) -> Start:
    """skopeo copies every layer, umoci unpacks them, the program runs in the result."""
    before, received = server.requests(), link.received
    started = time.monotonic()
    layout, bundle = work / "layout", work / "bundle"
    run("skopeo", "copy", "--quiet", "--insecure-policy", "--src-tls-verify=false",
        f"docker://{reference}", f"oci:{layout}:{TAG}")  # fmt: skip
    run("umoci", "unpack", "--image", f"{layout}:{TAG}", bundle)
    unpacked = time.monotonic() - started
    image = json.loads(run("skopeo", "inspect", "--config", f"oci:{layout}:{TAG}"))["config"]
    arguments = (image.get("Entrypoint") or []) + (override or image.get("Cmd") or [])
    environment = ["env", "-i", PATH, *(image.get("Env") or [])]
    directory = image.get("WorkingDir") or "/"
    shell = (
        f'mount -t tmpfs tmpfs "$0/dev" && cp -a /dev/null /dev/zero /dev/urandom "$0/dev" && {IN}'
    )
    command = ["unshare", "--mount", "sh", "-c", shell, str(bundle / "rootfs"), directory]
    seconds, output = first_output([*command, *environment, *arguments])
    return Start(
        "pull, unpack, run",
        unpacked + seconds,
        server.requests() - before,
        link.received - received,
        output,
    )


def start_snapshot(
    title: str,
    reference: str,
    override: list[str],
    server: Registry,
    link: Link,
    env: dict[str, str],
) -> Start:
    before, received = server.requests(), link.received
    command = [*imgsnap(), "run", "--plain-http", reference]
    seconds, output = first_output([*command, *(["--", *override] if override else [])], env)
    return Start(title, seconds, server.requests() - before, link.received - received, output)


def imgsnap() -> list[str]:
    """The command beside this interpreter."""
    return [str(Path(sys.executable).parent / "imgsnap")]


def parse_rate(text: str) -> float:
    match = re.fullmatch(r"(\d+)(kbit|mbit|gbit)", text)
    if text != "none" and match is None:
        raise SystemExit(f"error: --rate {text!r}\nhint: for example 100mbit, or none")
    return float(match[1]) * SPEEDS[match[2]] if match else 0.0


def size(count: int) -> str:
    return f"{count / (1 << 20):.1f} MiB"


def show(starts: list[Start]) -> None:
    say("")
    say(f"{'':<28}{'requests':>9}{'received':>12}{'first output':>14}")
    for start in starts:
        say(
            f"{start.title:<28}{start.requests:>9}{size(start.received):>12}"
            f"{start.seconds:>12.2f} s"
        )
    pulled, cold = starts[0], starts[1]
    say("")
    say(
        f"The program spoke {pulled.seconds / cold.seconds:.1f} times sooner after "
        f"{100 * cold.received / pulled.received:.0f} % of the bytes."
    )


def obtain_image(wanted: str | None, server: Registry) -> str:
    """Puts the image into the demo's registry; returns its repository there."""
    if wanted is None:
        layout = STATE / "image"
        if not (layout / "index.json").exists():
            say("building the demo image from distribution packages (once, about half a minute)")
        build(layout, STATE / "work")
        source = f"oci:{layout}:{TAG}"
    else:
        source = wanted if re.match(r"(oci|oci-archive|docker-archive):", wanted) else (
            f"docker://{wanted.removeprefix('docker://')}"
        )  # fmt: skip
    say(f"pushing {wanted or 'the demo image'} to a registry on loopback")
    run("skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false",
        source, f"docker://127.0.0.1:{server.port}/demo:{TAG}")  # fmt: skip
    return f"127.0.0.1:{server.port}/demo"


def convert(repository: str, env: dict[str, str]) -> None:
    command = [*imgsnap(), "convert", "--plain-http", "--progress", "none"]
    say(f"$ imgsnap convert {repository}:{TAG} {repository}:snapshot")
    say(run(*command, f"{repository}:{TAG}", f"{repository}:snapshot", env=env).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--image", help="any image instead of the demo's own")
    parser.add_argument("--command", default="", help="instead of the image's own")
    parser.add_argument("--rate", default="100mbit", help="of the link, or none [100mbit]")
    parser.add_argument("--rtt-ms", type=float, default=10.0, help="round trip [10]")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("error: the demo mounts file systems\nhint: run it as root")
    rate = parse_rate(arguments.rate)
    STATE.mkdir(exist_ok=True)
    with TemporaryDirectory(dir=STATE, prefix="run-") as directory:
        work = Path(directory)
        env = {
            **os.environ,
            "IMGSNAP_STORE": str(work / "store"),
            "IMGSNAP_CACHE_DIR": str(work / "cache"),
            "IMGSNAP_RUN_DIR": str(work / "run"),
        }
        with registry(work / "registry") as server:
            repository = obtain_image(arguments.image, server)
            convert(repository, env)
            with Link(server.port, rate, arguments.rtt_ms / 1000) as link:
                override = shlex.split(arguments.command)
                starts = compare(f"127.0.0.1:{link.port}/demo", override, work, server, link, env)
    say(
        f"\nover a link of {arguments.rate} and {arguments.rtt_ms:g} ms; output: {starts[1].output}"
    )
    show(starts)


def compare(
    repository: str,
    override: list[str],
    work: Path,
    server: Registry,
    link: Link,
    env: dict[str, str],
) -> list[Start]:
    say("starting its program: pulled and unpacked; from the snapshot, cold; and again")
    starts = [start_pulled(f"{repository}:{TAG}", override, work, server, link)]
    if not drop_page_cache():
        say("(the page cache cannot be dropped here: figures are warmer than they should be)")
    shutil.rmtree(work / "cache", ignore_errors=True)
    snapshot = f"{repository}:snapshot"
    starts.append(
        start_snapshot("imgsnap run, nothing cached", snapshot, override, server, link, env)
    )
    starts.append(start_snapshot("imgsnap run, once more", snapshot, override, server, link, env))
    return starts


if __name__ == "__main__":
    main()
