"""A plain parallel download: ranges of blobs over kept connections, bytes thrown away.

`python -m harness.download_probe HOST:PORT REPOSITORY THREADS RANGE DIGEST:SIZE...` prints seconds.
"""

import http.client
import sys
import threading
import time
from queue import Empty, SimpleQueue


def main() -> None:
    address, repository, threads, size, *blobs = sys.argv[1:]
    ranges: SimpleQueue[tuple[str, int, int]] = SimpleQueue()
    for blob in blobs:
        digest, _, total = blob.rpartition(":")
        for start in range(0, int(total), int(size)):
            ranges.put((digest, start, min(start + int(size), int(total)) - 1))
    workers = [
        threading.Thread(target=_download, args=(address, repository, ranges))
        for _ in range(int(threads))
    ]
    started = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    print(time.perf_counter() - started)


def _download(address: str, repository: str, ranges: "SimpleQueue[tuple[str, int, int]]") -> None:
    connection = http.client.HTTPConnection(address, timeout=60)
    buffer = memoryview(bytearray(1 << 20))
    while True:
        try:
            digest, start, end = ranges.get_nowait()
        except Empty:
            return
        headers = {"Range": f"bytes={start}-{end}"}
        connection.request("GET", f"/v2/{repository}/blobs/{digest}", headers=headers)
        response = connection.getresponse()
        if response.status != 206:
            raise SystemExit(f"status {response.status}")
        while response.readinto(buffer):
            pass


if __name__ == "__main__":
    main()
