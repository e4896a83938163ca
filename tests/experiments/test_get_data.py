"""The files that experiments use come whole, or not at all."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments import get_data
from mod_star.errors import InputError

TEXT = b'{"question": "1 + 1?", "answer": "2"}\n' * 100_000  # several blocks
NAME = "gsm8k_test.jsonl"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory behind an HTTP server on this machine; the published address of NAME points there."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / NAME).write_bytes(TEXT)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "served"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/{NAME}"
    published = get_data.Published(url, hashlib.sha256(TEXT).hexdigest(), "MIT")
    monkeypatch.setitem(get_data.FILES, NAME, published)
    yield tmp_path / "served"
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once(served: Path, tmp_path: Path) -> None:
    path = get_data.fetch(NAME, tmp_path / "data")
    assert path.read_bytes() == TEXT
    (served / NAME).unlink()
    assert get_data.fetch(NAME, tmp_path / "data") == path, "it is there already"


def test_a_file_that_differs_is_refused_and_not_kept(served: Path, tmp_path: Path) -> None:
    (served / NAME).write_bytes(TEXT[:-1])
    for source in (None, served):
        with pytest.raises(InputError, match=r"sha256 = \w+: must be \w+"):
            get_data.fetch(NAME, tmp_path / "data", source)
        assert list((tmp_path / "data").iterdir()) == []


def test_a_directory_that_has_it_is_used_instead_of_the_network(served: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (served / NAME).rename(tmp_path / "other" / NAME)
    assert get_data.fetch(NAME, tmp_path / "data", tmp_path / "other").read_bytes() == TEXT
    with pytest.raises(InputError, match="cannot be read"):
        get_data.fetch(NAME, tmp_path / "elsewhere", served)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_every_file_has_its_own_checksum_address_and_licence() -> None:
    files = get_data.FILES.values()
    assert len({file.sha256 for file in files}) == len({file.url for file in files}) == len(files)
    assert all(len(file.sha256) == 64 and file.url.startswith("https://") and file.licence for file in files)
