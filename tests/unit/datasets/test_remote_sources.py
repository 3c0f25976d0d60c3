"""Files behind servers: HTTP with ranges, that can be slow, fail or refuse, and S3."""

import logging
import os
import threading

import pytest

from tests import tables
from tests.processes import in_processes
from tests.servers import google_bucket, s3_bucket, serving
from tests.source_files import images, sample, texts, write_tar
from vlmo.errors import VLMoError
from vlmo.registry import DATASETS
from vlmo.sources import remote
from vlmo.sources.cache import DiskCache
from vlmo.sources.options import SourceOptions

pytest.importorskip("aiohttp")
ROWS = 30


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 5000)
    monkeypatch.setattr("vlmo.sources.tar.BLOCK_BYTES", 5000)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(2):
        rows = range(number * ROWS // 2, (number + 1) * ROWS // 2)
        write_tar(folder / f"{number}.tar", [file for row in rows for file in sample(row, [f"cat {row}"])])
    with serving(folder) as found:
        yield found


@pytest.fixture
def read(tmp_path, server):
    def opened(name="{0..1}.tar", **options):
        options = SourceOptions(cache=tmp_path / "cache", **options)
        return DATASETS[f"tar:{server.url}/{name}"].open("train", options)

    return opened


def check(data):
    assert images(data) == [tables.png(row) for row in range(ROWS)]
    assert texts(data) == [f"cat {row}" for row in range(ROWS)]


def test_everything_is_fetched_once(tmp_path, server, read):
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    check(read())
    assert len(server.fetched) == len(set(server.fetched)) > 20
    assert {first % 5000 for _, first, _ in server.fetched} == {0}
    server.fetched.clear()
    check(read())
    assert not server.fetched
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before  # nothing outside the cache


def test_an_index_that_lies_beside_the_file_is_taken(server, read):
    DATASETS[f"tar:{server.folder}"].open("train", SourceOptions())
    data = read()
    assert not server.fetched
    check(data)


def test_a_file_of_another_tag_is_indexed_and_read_anew(server, read):
    check(read())
    for number in range(2):
        rows = range(40 + number * ROWS // 2, 40 + (number + 1) * ROWS // 2)
        write_tar(server.folder / f"{number}.tar", [file for row in rows for file in sample(row)])
    assert images(read()) == [tables.png(row) for row in range(40, 40 + ROWS)]


def test_a_server_that_fails_every_tenth_request(server, read):
    server.fail_every = 10
    check(read())
    assert any(status == 500 for _, _, status in server.requests)


def test_a_slow_server(server, read):
    server.delay = 0.02
    check(read())


def test_a_server_that_goes_on_failing_is_an_error_after_some_attempts(server, read):
    data = read()
    server.fail_every = 1
    (data.options.cache / "blocks").rename(data.options.cache / "gone")
    with pytest.raises(VLMoError, match=r"tar: cannot be read after 6 attempts; the last: .*500"):
        data.row(0).scalar("image")


def test_what_is_missing_or_refused(server, read):
    with pytest.raises(VLMoError) as caught:
        read("{0..3}.tar")
    assert [line.partition(": ")[2] for line in str(caught.value).splitlines()] == ["is missing on the server"] * 2
    attempts = len(server.requests)
    assert attempts < 10  # it is not asked for again
    server.refuse = True
    with pytest.raises(VLMoError, match="the server refuses .*403"):
        read("0.tar")
    server.refuse, server.ranges = False, False
    with pytest.raises(VLMoError, match="the server knows no ranges"):
        read("1.tar")
    with pytest.raises(VLMoError, match="nosuch:// is unknown"):
        DATASETS["tar:nosuch://bucket/0.tar"].open("train", SourceOptions())


def test_a_missing_package_is_named(monkeypatch, read):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setattr(remote.importlib, "import_module", absent)
    with pytest.raises(VLMoError, match=r"needs the package aiohttp: pip install 'vlmo\[remote\]'"):
        read()


def test_the_cache_stays_within_its_limit(tmp_path, read):
    check(read(cache_bytes=40_000))
    blocks = [path.stat().st_size for path in (tmp_path / "cache" / "blocks").rglob("*") if path.is_file()]
    assert 10_000 < sum(blocks) <= 40_000


def test_what_was_used_last_is_kept(tmp_path):
    cache = DiskCache(tmp_path, 1000)
    for number in range(30):
        cache.open(f"{number}", lambda: bytes(100)).close()
        cache.open("0", lambda: pytest.fail("was removed")).close()


def test_a_full_disk_is_said_once_and_reading_goes_on(tmp_path, server, read, monkeypatch, caplog):
    data = read()
    (tmp_path / "cache" / "blocks").rename(tmp_path / "cache" / "gone")

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    monkeypatch.setattr(DiskCache, "_warned", False)
    with caplog.at_level(logging.WARNING):
        check(data)
    assert caplog.text.count("No space left on device") == 1
    assert not list((tmp_path / "cache" / "blocks").rglob("*.part"))


def test_processes_and_threads_share_what_one_fetches(tmp_path, server, read):
    data = read()
    (tmp_path / "cache" / "blocks").rename(tmp_path / "cache" / "gone")
    server.fetched.clear()
    server.delay = 0.01

    def work(rank):
        threads = [threading.Thread(target=images, args=(read(),)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check(data)
        return True

    (tmp_path / "meeting").mkdir()
    assert in_processes(work, tmp_path / "meeting") == [True, True]
    assert len(server.fetched) == len(set(server.fetched)) > 20


@pytest.mark.slow
def test_s3(tmp_path, server):
    options = SourceOptions(cache=tmp_path / "cache")
    with s3_bucket(server.folder.glob("*.tar")) as bucket:
        for place in ("/*.tar", "/{0..1}.tar", ""):
            check(DATASETS[f"tar:{bucket}{place}"].open("train", options))
        with pytest.raises(VLMoError, match=r"s3://private/pairs/2\.tar: is missing on the server"):
            DATASETS[f"tar:{bucket}/{{0..2}}.tar"].open("train", options)


def test_google_storage(tmp_path, server):
    options = SourceOptions(cache=tmp_path / "cache")
    with google_bucket(server.folder.parent) as bucket:
        for place in ("/*.tar", "/{0..1}.tar", ""):
            check(DATASETS[f"tar:gs://private/served{place}"].open("train", options))
        assert len(bucket.fetched) == len(set(bucket.fetched)) > 20
        with pytest.raises(VLMoError, match=r"gs://private/served/2\.tar: is missing on the server"):
            DATASETS["tar:gs://private/served/{0..2}.tar"].open("train", options)
        bucket.refuse = True
        with pytest.raises(VLMoError, match="the server refuses .*gcloud auth"):
            DATASETS["tar:gs://private/served"].open("train", SourceOptions(cache=tmp_path / "other"))
