"""A server that answers the reading part of S3's API from a folder, each request after a set time.

Input: a folder of buckets, and the latency. Output: HTTP on a port of this machine, whose number is the first line on
standard output. Invariant: a request is answered no sooner than its latency, however many wait beside it.

It is for benchmarks and tests: no signature is looked at, and nothing can be written. `stored` starts it. The API:
https://docs.aws.amazon.com/AmazonS3/latest/API/API_ListObjectsV2.html
"""

from __future__ import annotations

import asyncio
import bisect
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote_to_bytes
from xml.sax.saxutils import escape

_MAX_KEYS = 1000
# From which size on the system sends a file by itself, which costs less than to read it and more than one write.
_SENT_BYTES = 2**16
_LAST_MODIFIED = f"Last-Modified: {formatdate(0, usegmt=True)}"
_RANGE = re.compile(rb"^range: *bytes=(\d*)-(\d*)\r?$", re.IGNORECASE | re.MULTILINE)


@dataclass
class Bucket:
    """The objects below a folder.

    Attributes:
        folder: Where their files are.
        keys: Their names, sorted as S3 does, by bytes.
        sizes: Of each, in bytes.
    """

    folder: bytes
    keys: list[bytes] = field(default_factory=list)
    sizes: dict[bytes, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        waiting = [b""]
        while waiting:
            above = waiting.pop()
            with os.scandir(self.folder + b"/" + above) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(above + entry.name + b"/")
                    else:
                        self.sizes[above + entry.name] = entry.stat().st_size
        self.keys = sorted(self.sizes)


@dataclass(frozen=True)
class Part:
    """The bytes of a file from `start` up to `stop`."""

    path: bytes
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self) -> bytes:
        """Read these bytes."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, len(self), self.start)
        finally:
            os.close(descriptor)


@dataclass
class Faults:
    """What goes wrong, decided by a seeded stream.

    Attributes:
        refused: Share of the requests that are answered by 503.
        cut: Share of the bodies that end in their middle.
    """

    refused: float = 0.0
    cut: float = 0.0
    stream: random.Random = field(default_factory=lambda: random.Random(0))


class Connection(asyncio.Protocol):
    """One client's connection: requests are answered one after the other."""

    def __init__(self, buckets: dict[bytes, Bucket], latency_s: float, faults: Faults, counts: dict[str, int]) -> None:
        self._buckets, self._latency_s, self._faults, self._counts = buckets, latency_s, faults, counts
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._sending: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where answers go."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Have every complete request answered when its time has come."""
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            asyncio.get_running_loop().call_later(self._latency_s, self._answer, head)

    def _answer(self, head: bytes) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        method, target, *_ = head.split(b" ", 2)
        self._counts[method.decode()] = self._counts.get(method.decode(), 0) + 1
        faults = self._faults
        is_refused = faults.refused and faults.stream.random() < faults.refused
        status, headers, body = _fault(503, "SlowDown") if is_refused else self._find(target.decode(), head)
        size = len(body)
        is_cut = faults.cut and size > 1 and faults.stream.random() < faults.cut
        sent = 0 if method == b"HEAD" else size // 2 if is_cut else size
        first = "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {size}", "", ""]).encode()
        if isinstance(body, Part) and sent >= _SENT_BYTES:
            self._transport.write(first)
            self._send(body, sent, is_cut=bool(is_cut))
            return
        self._transport.write(first + (body.read() if isinstance(body, Part) else body)[:sent])
        if is_cut:
            self._transport.close()

    def _send(self, part: Part, num_bytes: int, *, is_cut: bool) -> None:
        """Have the system send a part of a file, which nothing here reads."""
        assert self._transport is not None
        connection = self._transport.get_extra_info("socket").fileno()
        file, sent = os.open(part.path, os.O_RDONLY), 0
        # What there is room for goes at once: to have the loop send it costs as much again.
        with suppress(BlockingIOError, ConnectionError):  # the client may be gone
            while not self._transport.get_write_buffer_size() and sent < num_bytes:
                now = os.sendfile(connection, file, part.start + sent, num_bytes - sent)
                if not now:  # the file has become shorter: the client sees a body that is cut off
                    num_bytes, is_cut = sent, True
                sent += now
        if sent < num_bytes:
            rest = self._send_rest(file, part.start + sent, num_bytes - sent, is_cut=is_cut)
            self._sending = asyncio.create_task(rest)
            return
        os.close(file)
        if is_cut:
            self._transport.close()

    async def _send_rest(self, descriptor: int, start: int, num_bytes: int, *, is_cut: bool) -> None:
        assert self._transport is not None
        with os.fdopen(descriptor, "rb") as file, suppress(ConnectionError, RuntimeError):
            await asyncio.get_running_loop().sendfile(self._transport, file, start, num_bytes)
        if is_cut:
            self._transport.close()

    def _find(self, target: str, head: bytes) -> tuple[str, list[str], bytes | Part]:
        place, _, query = target.partition("?")
        name, _, key = unquote_to_bytes(place.lstrip("/")).partition(b"/")
        bucket = self._buckets.get(name)
        if bucket is None:
            return _fault(404, "NoSuchBucket")
        if not key:
            return "200 OK", ["Content-Type: application/xml"], _list(bucket, dict(parse_qsl(query)))
        if key not in bucket.sizes:
            return _fault(404, "NoSuchKey")
        size = bucket.sizes[key]
        about = [f'ETag: "{size:x}"', _LAST_MODIFIED, "Accept-Ranges: bytes"]
        path = bucket.folder + b"/" + key
        if (found := _RANGE.search(head)) is None:
            return "200 OK", about, Part(path, 0, size)
        first, last = found.groups()
        start = int(first) if first else size - int(last)
        stop = min(size, int(last) + 1) if first and last else size
        if start >= size:
            return _fault(416, "InvalidRange")
        about.append(f"Content-Range: bytes {start}-{stop - 1}/{size}")
        return "206 Partial Content", about, Part(path, start, stop)


def _list(bucket: Bucket, query: dict[str, str]) -> bytes:
    """List up to a thousand keys and folders behind the last page's end."""
    prefix, delimiter = os.fsencode(query.get("prefix", "")), os.fsencode(query.get("delimiter", ""))
    after = os.fsencode(query.get("continuation-token") or query.get("start-after", ""))
    limit = min(_MAX_KEYS, int(query.get("max-keys", _MAX_KEYS)))
    shown: list[str] = []
    last = b""
    is_truncated = False
    for item, is_folder in _below(bucket, prefix, delimiter, after):
        if len(shown) == limit:
            is_truncated = True
            break
        last = item + b"\xff" if is_folder else item  # behind everything in that folder
        text = escape(os.fsdecode(item))
        shown.append(
            f"<CommonPrefixes><Prefix>{text}</Prefix></CommonPrefixes>"
            if is_folder
            else f"<Contents><Key>{text}</Key><LastModified>1970-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>&quot;{bucket.sizes[item]:x}&quot;</ETag><Size>{bucket.sizes[item]}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    more = f"<NextContinuationToken>{quote(last)}</NextContinuationToken>" if is_truncated else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>bucket</Name>'
        f"<Prefix>{escape(os.fsdecode(prefix))}</Prefix><KeyCount>{len(shown)}</KeyCount><MaxKeys>{limit}</MaxKeys>"
        f"<IsTruncated>{str(is_truncated).lower()}</IsTruncated>{more}{''.join(shown)}</ListBucketResult>"
    ).encode("utf-8", "surrogateescape")


def _below(bucket: Bucket, prefix: bytes, delimiter: bytes, after: bytes) -> Iterator[tuple[bytes, bool]]:
    after = unquote_to_bytes(after)
    at = max(bisect.bisect_left(bucket.keys, prefix), bisect.bisect_right(bucket.keys, after) if after else 0)
    while at < len(bucket.keys) and bucket.keys[at].startswith(prefix):
        key = bucket.keys[at]
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        if end < 0:
            yield key, False
            at += 1
        else:
            yield key[: end + 1], True
            at = bisect.bisect_left(bucket.keys, key[: end + 1] + b"\xff", at)


def _fault(status: int, code: str) -> tuple[str, list[str], bytes | Part]:
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
    return f"{status} {code}", ["Content-Type: application/xml"], body.encode()


@dataclass
class Stored:
    """A server that runs: the options by which a URI leads to it; when it has ended, its requests by method."""

    query: str
    port: int
    num_requests: dict[str, int] = field(default_factory=dict)


@contextmanager
def stored(folder: Path, latency_ms: float = 0, refused: float = 0, cut: float = 0, port: int = 0) -> Iterator[Stored]:
    """Serve the folders in `folder` as buckets, by a process of its own.

    Args:
        folder: Of the buckets.
        latency_ms: From a request to its answer.
        refused: Share of the requests that are answered by 503.
        cut: Share of the bodies that end in their middle.
        port: Of this machine; 0 for any that is free.
    """
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, (folder, latency_ms, refused, cut, port))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            server = Stored(f"region=us-east-1&scheme=http&endpoint_override=127.0.0.1:{port}", port)
            yield server
            process.stdin.close()
            server.num_requests = json.loads(process.stdout.read())
        finally:
            process.kill()


async def serve(folder: Path, latency_s: float, faults: Faults, port: int) -> None:
    """Serve each folder in `folder` as a bucket until standard input ends; say the port first, the counts last."""
    buckets = {os.fsencode(each.name): Bucket(os.fsencode(each)) for each in folder.iterdir() if each.is_dir()}
    counts: dict[str, int] = {}
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(buckets, latency_s, faults, counts), "127.0.0.1", port, backlog=4096
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)
    sys.stdout.write(json.dumps(counts))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    where, *numbers = sys.argv[1:]
    delay_ms, refused_share, cut_share, listen_on = map(float, numbers)
    asyncio.run(serve(Path(where), delay_ms / 1000, Faults(refused_share, cut_share), int(listen_on)))
