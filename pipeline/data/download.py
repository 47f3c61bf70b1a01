"""The dataset `mnist_sample`, downloaded once into the user's cache folder.

Input: fast.ai's archive, over HTTPS or put into the cache folder by hand. Output: a folder of class folders.
Invariant: the folder is there whole and verified, or not at all: it is unpacked beside its place and then renamed.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import tarfile
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import DownloadError

URL = "https://s3.amazonaws.com/fast-ai-sample/mnist_sample.tgz"
SIZE_BYTES = 3_214_948
# fast.ai publishes no other. The bytes after the first MiB are checked by size and gzip's CRC-32; the origin, by HTTPS.
MD5_OF_FIRST_MIB = "2dbc7ec6f9259b583af0072c55816a88"
MAX_TAR_BYTES = 2**26  # of the tar file in memory; it has about 22 MB
TIMEOUT_S = 30.0
_NAME = "mnist_sample"
_CHUNK_BYTES = 2**16


def cache_folder() -> Path:
    """Find the folder for downloads by the XDG base directory rules; it need not exist yet.

    Raises:
        DownloadError: If the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as exc:
            raise DownloadError("the cache folder: expected a home folder, got none; set XDG_CACHE_HOME") from exc
    return base / "image-baseline"


def fetch(cache: Path, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """Return the folder of `mnist_sample`, downloading and unpacking it the first time.

    A file `mnist_sample.tgz` in `cache` is used in place of a download, and kept. Of processes that do this at the same
    time the first to finish wins.

    Args:
        cache: The folder to keep it in; made if missing.
        on_progress: Called after each chunk of a download with the bytes received and the bytes expected.

    Raises:
        DownloadError: If the archive cannot be had, is not the published one, or cannot be unpacked. Nothing new is
            left in `cache` then.
    """
    folder, by_hand = cache / _NAME, cache / f"{_NAME}.tgz"
    try:
        if folder.is_dir():
            return folder
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{_NAME}-", dir=cache) as temporary:
            if by_hand.is_file():
                with by_hand.open("rb") as file:
                    data = file.read(SIZE_BYTES + 1)
                _unpack(data, temporary, str(by_hand), "delete or replace this file and run again")
            else:
                advice = f"put {by_hand.name} into {cache} by hand and run again"
                _unpack(_download(advice, on_progress), temporary, URL, advice)
            try:
                Path(temporary, _NAME).rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was faster
                    raise
    except OSError as exc:
        raise DownloadError(
            f"{exc.filename or cache}: expected to keep {_NAME} here, got {exc.strerror or exc}; "
            "check permissions and free space, or set XDG_CACHE_HOME to another folder"
        ) from exc
    return folder


def _download(advice: str, on_progress: Callable[[int, int], None] | None) -> bytes:
    # Without urllib's handler of redirects, which follows them to plain HTTP too.
    opener = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()):
        opener.add_handler(handler)
    data = b""
    try:
        with opener.open(URL, timeout=TIMEOUT_S) as response:
            if response.status != 200:
                raise urllib.error.URLError(f"HTTP {response.status} {response.reason}")
            while len(data) <= SIZE_BYTES and (chunk := response.read(_CHUNK_BYTES)):
                data += chunk
                if on_progress is not None:
                    on_progress(len(data), SIZE_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        reason = getattr(exc, "reason", exc)
        raise DownloadError(f"{URL}: expected {SIZE_BYTES} bytes, got {reason} after {len(data)}; {advice}") from exc
    return data


def _unpack(data: bytes, target: str, where: str, advice: str) -> None:
    if len(data) != SIZE_BYTES:
        found = len(data) if len(data) < SIZE_BYTES else "more"
        raise DownloadError(f"{where}: expected {SIZE_BYTES} bytes, got {found}; {advice}")
    md5 = hashlib.md5(data[: 2**20], usedforsecurity=False).hexdigest()
    if md5 != MD5_OF_FIRST_MIB:
        raise DownloadError(f"{where}: expected first MiB of MD5 {MD5_OF_FIRST_MIB}, got {md5}; {advice}")
    try:
        # To the end before unpacking, as the CRC-32 stands there.
        tar_data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MAX_TAR_BYTES + 1)
        if len(tar_data) > MAX_TAR_BYTES:
            raise DownloadError(f"{where}: expected at most {MAX_TAR_BYTES} bytes unpacked, got more; {advice}")
        with tarfile.open(fileobj=io.BytesIO(tar_data)) as tar:
            tar.extractall(target, filter="data")
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as exc:
        raise DownloadError(f"{where}: expected a sound gzipped tar file, got {exc}; {advice}") from exc
