"""Named datasets, fetched once over HTTPS into the user's cache folder.

What enters: an `Download`, the record of what is published about a dataset's `.tgz` file, and a cache folder. What
leaves: the folder with the unpacked dataset. One thing always holds: the dataset's folder is there whole or not at all,
since it is built in a temporary folder beside it and renamed in one step.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import ipaddress
import os
import string
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import DownloadError

TIMEOUT_S = 30.0
CHUNK_BYTES = 64 * 1024
FIRST_MIB_BYTES = 2**20
MAX_REDIRECTS = 10
MAX_MEMBERS = 1_000_000
# Removing a folder tree recurses in Python, so a deep one could not be taken away again.
MAX_DEPTH = 32
MAX_UNPACKED_BYTES = 2**30
# A tar file also holds headers and padding, and tarfile reads a long header into memory whole.
MAX_TAR_BYTES = 2 * MAX_UNPACKED_BYTES

# Besides its own errors, tarfile lets through those of the conversions that it does on malformed headers.
_MALFORMED = (ValueError, LookupError, RecursionError)


@dataclass(frozen=True)
class Download:
    """What is published about one dataset's `.tgz` file.

    The MD5 is that of the first 2^20 bytes, because fastai publishes no other and itself checks just that. It tells
    a wrong or changed file from the right one; it is no proof of origin, for which HTTPS stands. The exact size and
    gzip's own CRC-32 guard the bytes after the first 2^20.
    """

    name: str
    url: str
    size_bytes: int
    md5_of_first_mib: str
    folder: str

    @property
    def file_name(self) -> str:
        """The last part of the URL's path."""
        return PurePosixPath(urllib.parse.urlsplit(self.url).path).name


MNIST_SAMPLE = Download(
    name="mnist_sample",
    url="https://s3.amazonaws.com/fast-ai-sample/mnist_sample.tgz",
    size_bytes=3_214_948,
    md5_of_first_mib="2dbc7ec6f9259b583af0072c55816a88",
    folder="mnist_sample",
)


def cache_folder() -> Path:
    """Find the folder for downloads by the XDG base directory rules; it need not exist yet.

    Returns:
        `$XDG_CACHE_HOME/image-baseline` where that variable holds an absolute path, else `~/.cache/image-baseline`.

    Raises:
        DownloadError: If the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as exc:
            raise DownloadError(
                "the cache folder: expected a user with a home folder, got none; set XDG_CACHE_HOME to a folder"
            ) from exc
    return base / "image-baseline"


def fetch(archive: Download, cache: Path, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """Give the folder of a dataset, downloading and unpacking it the first time.

    A file of the archive's name that the user put into `cache` is used in place of a download, and kept. Processes
    that do this at the same time each work in a folder of their own; the first to finish wins.

    Args:
        archive: The dataset.
        cache: The folder to keep it in; made if missing.
        on_progress: Called after each chunk of a download with the bytes received and the bytes expected.

    Returns:
        `cache / archive.folder`.

    Raises:
        DownloadError: If the archive cannot be had, is not the published one, holds what it should not, or cannot be
            written. Nothing new is left in `cache` then.
    """
    folder, by_hand = cache / archive.folder, cache / archive.file_name
    try:
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{archive.name}-", dir=cache) as name:
            if by_hand.is_file():
                source, where, advice = by_hand, str(by_hand), "delete or replace this file and run again"
            else:
                source, where = Path(name, "archive"), archive.url
                advice = f"put {archive.file_name} into {cache} by hand and run again"
                _download(archive, source, advice, on_progress)
            _verify(archive, source, where, advice)
            unpacked = Path(name, "unpacked")
            _unpack(archive.folder, source, unpacked, where, advice)
            _publish(unpacked / archive.folder, folder)
    except OSError as exc:
        raise DownloadError(
            f"{exc.filename or cache}: expected to keep {archive.name} here, got {exc.strerror or exc}; "
            "see to permissions and free space, or set XDG_CACHE_HOME to another folder"
        ) from exc
    return folder


def _download(archive: Download, target: Path, advice: str, on_progress: Callable[[int, int], None] | None) -> None:
    num_bytes = 0
    with target.open("wb") as file:
        for chunk in _receive(archive, advice):
            num_bytes += len(chunk)
            if num_bytes > archive.size_bytes:
                raise DownloadError(
                    f"{archive.url}: expected {archive.size_bytes} bytes, got at least {num_bytes}; {advice}"
                )
            file.write(chunk)
            if on_progress is not None:
                on_progress(num_bytes, archive.size_bytes)


def _receive(archive: Download, advice: str) -> Iterator[bytes]:
    num_bytes = 0
    try:
        with _open(archive.url) as response:
            while chunk := response.read(CHUNK_BYTES):
                num_bytes += len(chunk)
                yield chunk
    except http.client.IncompleteRead as exc:
        # As with an early end that urllib does not notice, `_verify` then says how many bytes are missing.
        yield exc.partial
    # ValueError is what a malformed host name in a redirect gives.
    except (OSError, http.client.HTTPException, ValueError) as exc:
        progress = f" after {num_bytes} of {archive.size_bytes} bytes" if num_bytes else ""
        raise DownloadError(
            f"{archive.url}: expected {archive.file_name}, got {_reason(exc)}{progress}; {advice}"
        ) from exc


def _open(url: str) -> http.client.HTTPResponse:
    # Redirects are followed here: urllib's own handler would ask a plain-http place before it could be refused.
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    for _ in range(MAX_REDIRECTS + 1):
        if not _is_allowed(url):
            raise urllib.error.URLError(f"{url}, which is not an https URL")
        response: http.client.HTTPResponse = opener.open(url, timeout=TIMEOUT_S)
        if response.status == 200:
            return response
        response.close()
        location = response.headers.get("Location")
        if response.status not in (301, 302, 303, 307, 308) or not location:
            raise urllib.error.URLError(f"HTTP {response.status} {response.reason}")
        url = urllib.parse.quote(urllib.parse.urljoin(url, location), safe=string.punctuation)
    raise urllib.error.URLError(f"more than {MAX_REDIRECTS} redirects")


def _is_allowed(url: str) -> bool:
    """Tell whether `url` is https, or http within this machine, which is what the tests serve."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback)


def _reason(exc: Exception) -> str:
    cause = exc.reason if isinstance(exc, urllib.error.URLError) else exc
    if isinstance(cause, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return str(cause) or type(cause).__name__


def _verify(archive: Download, source: Path, where: str, advice: str) -> None:
    size_bytes = source.stat().st_size
    if size_bytes != archive.size_bytes:
        raise DownloadError(f"{where}: expected {archive.size_bytes} bytes, got {size_bytes}; {advice}")
    with source.open("rb") as file:
        md5 = hashlib.md5(file.read(FIRST_MIB_BYTES), usedforsecurity=False).hexdigest()
    if md5 != archive.md5_of_first_mib:
        raise DownloadError(
            f"{where}: expected first 2^20 bytes of MD5 {archive.md5_of_first_mib}, got {md5}; {advice}"
        )


def _unpack(folder: str, source: Path, target: Path, where: str, advice: str) -> None:
    num_members = unpacked_bytes = 0
    try:
        with gzip.open(source) as stream:
            _check_stream(stream, where, advice)
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for member in tar:
                    num_members += 1
                    unpacked_bytes += member.size
                    if refusal := _refusal(member, folder, num_members, unpacked_bytes):
                        raise DownloadError(f"{where}: {refusal} at member {member.name!r}; {advice}")
                    # Owners, modes and times are the archive's own affair.
                    tar.extract(member, target, set_attrs=False, filter="data")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, *_MALFORMED) as exc:
        raise DownloadError(
            f"{where}: expected a sound gzipped tar file, got {type(exc).__name__} ({exc}); {advice}"
        ) from exc
    if not (target / folder).is_dir():
        raise DownloadError(f"{where}: expected a folder {folder}, got none; {advice}")


def _check_stream(stream: gzip.GzipFile, where: str, advice: str) -> None:
    # Read to the end before unpacking: tarfile stops short of gzip's CRC-32, the only check on the later bytes.
    num_bytes = 0
    while chunk := stream.read(CHUNK_BYTES):
        num_bytes += len(chunk)
        if num_bytes > MAX_TAR_BYTES:
            raise DownloadError(f"{where}: expected at most {MAX_TAR_BYTES} bytes of tar, got more; {advice}")


def _refusal(member: tarfile.TarInfo, folder: str, num_members: int, unpacked_bytes: int) -> str | None:
    """Say why a member is not unpacked, or None where it is, before any of its bytes are read."""
    parts = PurePosixPath(member.name).parts
    if parts[:1] != (folder,) or ".." in parts or "\0" in member.name or len(parts) > MAX_DEPTH:
        return f"expected members below {folder}/ of at most {MAX_DEPTH} parts, got another"
    if not (member.isreg() or member.isdir()) or member.issparse():
        return "expected regular files and folders, got another kind"
    if num_members > MAX_MEMBERS:
        return f"expected at most {MAX_MEMBERS} members, got more"
    if unpacked_bytes > MAX_UNPACKED_BYTES or member.size < 0:
        return f"expected 0 to {MAX_UNPACKED_BYTES} bytes unpacked, got {unpacked_bytes}"
    return None


def _publish(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        # Another process was faster, and its folder is as good.
        if not folder.is_dir():
            raise
