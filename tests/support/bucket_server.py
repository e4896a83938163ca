"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs and tensorstore use, with objects in memory.

`STORAGE_EMULATOR_HOST` leads gcsfs here, `TENSORSTORE_GCS_HTTP_URL` tensorstore; see `environment`.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
OBJECTS = re.compile(r"(?:/upload)?/storage/v1/b/([^/]+)/o")


class Bucket:
    """Objects by name, with the generation that each write gives a new number."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[int, bytes]] = {}
        self.broken = False
        """Every request is refused while this is set, as for someone without rights."""
        self.lock = threading.RLock()
        self._generations = itertools.count(1)
        self.uploads: dict[str, tuple[str, bytes]] = {}

    def write(self, name: str, data: bytes) -> int:
        """Replaces an object; its new generation."""
        generation = next(self._generations)
        self.objects[name] = generation, data
        return generation

    def names(self) -> list[str]:
        """Of all objects, sorted."""
        with self.lock:
            return sorted(self.objects)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    bucket: Bucket

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up when their process ends; anything else is a fault of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer waits 40 ms for its head to be acknowledged
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        with self.server.bucket.lock:
            status, headers, answer = self._answer(self.command, url.path, query, body)
        self._send(status, headers, answer)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

    def _send(self, status: int, headers: dict[str, str], answer: Any) -> None:
        data = answer if isinstance(answer, bytes) else b"" if answer is None else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _chunks(self) -> bytes:
        """The body, if it comes in chunks."""
        found = b""
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return found

    def _answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], Any]:
        bucket = self.server.bucket
        if bucket.broken:
            return 403, {}, {"error": {"code": 403, "message": "no access"}}
        if path.startswith("/batch/"):
            return self._batch(body)
        if found := OBJECT.fullmatch(path):
            return self._object(method, unquote(found[2]), query)
        if OBJECTS.fullmatch(path) and method == "GET":
            return 200, {}, self._list(query)
        if OBJECTS.fullmatch(path):
            return self._upload(query, body)
        if re.fullmatch(r"/storage/v1/b/[^/]+", path):
            return 200, {}, {"name": "bucket", "id": "bucket", "storageClass": "STANDARD"}
        return 404, {}, {"error": {"code": 404, "message": f"no such request: {method} {path}"}}

    def _meta(self, name: str) -> dict[str, Any]:
        generation, data = self.server.bucket.objects[name]
        return {
            "kind": "storage#object", "bucket": "bucket", "name": name, "id": f"bucket/{name}/{generation}",
            "size": str(len(data)), "generation": str(generation), "metageneration": "1", "storageClass": "STANDARD",
            "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z", "etag": str(generation),
        }  # fmt: skip

    def _object(self, method: str, name: str, query: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        objects = self.server.bucket.objects
        generation = objects[name][0] if name in objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return 412, {}, {"error": {"code": 412, "message": "conditionNotMet"}}
        if name not in objects:
            return 404, {}, {"error": {"code": 404, "message": f"No such object: bucket/{name}"}}
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, {}, None
        if method == "DELETE":
            del objects[name]
            return 204, {}, None
        if query.get("alt") != "media":
            return 200, {}, self._meta(name)
        data, headers = objects[name][1], {"x-goog-generation": str(generation)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            if first > last:
                return 416, headers, None
            return 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, data[first : last + 1]
        return 200, headers, data

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.server.bucket.names():
            after_start = name >= query.get("startOffset", "")
            before_end = "endOffset" not in query or name < query["endOffset"]
            if not (name.startswith(prefix) and after_start and before_end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                items.append(self._meta(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _upload(self, query: dict[str, str], body: bytes) -> tuple[int, dict[str, str], Any]:
        bucket, kind = self.server.bucket, query.get("uploadType")
        if "upload_id" in query:  # a piece of a resumable one
            name, begun = bucket.uploads[query["upload_id"]]
            bucket.uploads[query["upload_id"]] = name, begun + body
            if not re.search(r"/\d+$", self.headers.get("Content-Range", "")):
                return 308, {"Range": f"bytes=0-{len(begun + body) - 1}"}, None
            bucket.write(name, begun + body)
            return 200, {}, self._meta(name)
        if kind == "resumable":
            name = query.get("name") or json.loads(body)["name"]
            number = str(len(bucket.uploads))
            bucket.uploads[number] = name, b""
            host = self.headers["Host"]
            place = f"http://{host}/upload/storage/v1/b/bucket/o?uploadType=resumable&upload_id={number}"
            return 200, {"Location": place}, None
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
            assert boundary is not None
            _, about, content, _ = body.split(b"--" + boundary[1].encode())
            name = json.loads(_body_of_part(about))["name"]
            body = _body_of_part(content)
        else:
            name = query["name"]
        generation = bucket.objects[name][0] if name in bucket.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != generation:
            return 412, {}, {"error": {"code": 412, "message": "conditionNotMet"}}
        bucket.write(name, body)
        return 200, {}, self._meta(name)

    def _batch(self, body: bytes) -> tuple[int, dict[str, str], Any]:
        """Deletions, many in one request."""
        parts = []
        for number, path in enumerate(re.findall(rb"DELETE (\S+) HTTP", body), 1):
            found = OBJECT.fullmatch(urlsplit(path.decode()).path)
            assert found is not None
            status, _, _ = self._object("DELETE", unquote(found[2]), {})
            parts.append(
                f"--answer\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} done\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        answer = "".join(parts) + "--answer--"
        return 200, {"Content-Type": "multipart/mixed; boundary=answer"}, answer.encode()


def _body_of_part(part: bytes) -> bytes:
    """What follows the headers of a part of several, without the line end before the next part."""
    return re.sub(rb"\r?\n\Z", b"", re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1])


@contextmanager
def bucket_server() -> Iterator[tuple[Bucket, dict[str, str]]]:
    """Serves a bucket named "bucket" until left; with the environment of processes that are to use it."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.bucket = Bucket()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    environment = {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "TENSORSTORE_GCS_HTTP_VERSION": "1.1",
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else gcsfs asks Google what kind of bucket it is
    }
    try:
        yield server.bucket, environment
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
