"""What identifies the data of a run: recorded when the run is made, compared whenever it goes on.

Which documents are held out, and in which order the others come, follows from their number. If the data changes, a run
that goes on as if it had not is evaluated on what it was trained on.

| what is read                     | its identity                                                                      |
|----------------------------------|-----------------------------------------------------------------------------------|
| files that are read into memory  | size and SHA-256; above 1 GiB the SHA-256 of 1,024 blocks of 64 KiB               |
| ArrayRecord, prepared datasets   | size and SHA-256; above 1 MiB the SHA-256 of 16 blocks of 64 KiB                  |
| objects in a bucket              | size, and the checksum that the bucket keeps; SHA-256 where it keeps none         |
| python-docs                      | SHA-256 of its text, which differs between versions of Python                     |
| every source                     | the number of its documents                                                       |

Blocks are spread evenly, the first and the last one are among them: a large file that is changed between them and keeps
its size is taken for the same. Times are no identity, nor are paths: data may be moved.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mod_star.config import DataConfig
from mod_star.data import sources
from mod_star.data.files import file_type
from mod_star.errors import InputError
from mod_star.storage import file_system, is_address, read_file

BLOCK = 2**16
"""Bytes of a block that is read of a large file."""
IN_MEMORY, AS_NEEDED = (2**30, 1024), (2**20, 16)
"""(largest size that is read whole, blocks of a larger file), by how the pipeline reads it."""

Identity = list[dict[str, Any]]
"""Of every source: "spec", "documents", and "files" (each with "name", "bytes", "digest") or "content"."""


def identify(config: DataConfig, documents: Sequence[int] | None = None) -> Identity:
    """The identity of what `config.source` names at this moment.

    Args:
      config: the run's.
      documents: number of documents of each source, None: not known.

    Raises:
      InputError: a source can't be read.
    """
    identity: Identity = []
    for index, spec in enumerate(config.source):
        entry: dict[str, Any] = {"spec": spec, "documents": None if documents is None else documents[index]}
        try:
            identity.append(entry | _content(spec))
        except OSError as error:
            raise InputError(f"{error.filename or spec}: cannot be read ({error.strerror or error})") from error
    return identity


def fingerprint(identity: Identity) -> str:
    """A digest of what is read, wherever it stands."""
    content = [
        (entry["documents"], entry.get("content"), [[file["bytes"], file["digest"]] for file in entry.get("files", [])])
        for entry in identity
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def changes(old: Identity, new: Identity) -> list[str]:
    """What differs, such as "a.jsonl: 120 → 150 bytes" and "40 → 41 documents"; empty: nothing that matters."""
    if len(old) != len(new):
        return [f"{len(old)} → {len(new)} sources"]
    differences = []
    for before, after in zip(old, new, strict=True):
        own = _changed_files(before.get("files", []), after.get("files", []))
        if before.get("content") != after.get("content"):
            own.append(f"{before['spec']} has other content")
        if None not in (before["documents"], after["documents"]) and before["documents"] != after["documents"]:
            own.append(f"{before['documents']:,} → {after['documents']:,} documents")
        differences += own
    return differences


def _changed_files(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[str]:
    key = lambda file: (file["bytes"], file["digest"])  # noqa: E731
    if [key(file) for file in old] == [key(file) for file in new]:
        return []
    before, after = ({file["name"]: key(file) for file in files} for files in (old, new))
    differences = [f"{name} is gone" for name in before.keys() - after.keys()]
    differences += [f"{name} is new" for name in after.keys() - before.keys()]
    for name in before.keys() & after.keys():
        if before[name] != after[name]:
            (size, _), (now, _) = before[name], after[name]
            differences.append(f"{name}: {size:,} → {now:,} bytes" if size != now else f"{name} has other content")
    return sorted(differences) or ["its files come in another order"]


def _content(spec: str) -> dict[str, Any]:
    if spec == "python-docs":
        return {"content": _sha256([str(text).encode() for text in sources.python_docs()])}
    if spec.startswith("tfds:"):
        return _tfds_content(spec)
    paths = sources.source_paths(spec)
    if is_address(paths[0]):
        files = [_object(path) for path in paths]
    else:
        files = [_file(path, AS_NEEDED if file_type(path).format == "arrayrecord" else IN_MEMORY) for path in paths]
    return {"files": _named(paths, files)}


def _tfds_content(spec: str) -> dict[str, Any]:
    import tensorflow_datasets as tfds

    name, _, split = spec.removeprefix("tfds:").partition(":")
    builder = sources.tfds_builder(tfds, name)
    split = split or "train"
    # Of the split's own files; of a part of a split such as train[:10%] all of them.
    prefix = f"-{split.partition('[')[0]}."
    folder = Path(str(builder.data_dir))
    paths = sorted(str(path) for path in folder.iterdir() if path.is_file() and prefix in path.name)
    version = f"{builder.info.name} {builder.info.version}, {split}"
    return {"content": version, "files": _named(paths, [_file(path, AS_NEEDED) for path in paths])}


def _named(paths: Sequence[str], files: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The files with their names, relative to the directory that they are all in."""
    if paths and not is_address(paths[0]) and all(map(os.path.dirname, paths)):
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, common) for path in paths]
    else:
        names = [os.path.basename(path) for path in paths]
        names = names if len(set(names)) == len(names) else list(paths)
    return [{"name": name, **file} for name, file in zip(names, files, strict=True)]


def _file(path: str, limits: tuple[int, int]) -> dict[str, Any]:
    whole, count = limits
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= whole:
            return {"bytes": size, "digest": "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()}
        blocks = []
        for number in range(count):
            file.seek((size - BLOCK) * number // (count - 1))
            blocks.append(file.read(BLOCK))
        return {"bytes": size, "digest": f"sha256 of {count} blocks:{_sha256(blocks)}"}


def _object(address: str) -> dict[str, Any]:
    """An object in a bucket: by the bucket's own checksum."""
    about = file_system(address).info(address)
    for kind in ("md5Hash", "crc32c"):
        if about.get(kind):
            return {"bytes": about["size"], "digest": f"{kind}:{about[kind]}"}
    return {"bytes": about["size"], "digest": "sha256:" + _sha256([read_file(address)])}


def _sha256(parts: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()
