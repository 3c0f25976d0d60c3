"""Complete files or none, bounded batches, everything counted."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from tests.unit.utils.raw import image_bytes, read_rows, write_images, write_karpathy
from vlmo.errors import VLMoError
from vlmo.utils import arrow_writer, record_batches, write_own_karpathy
from vlmo.utils.arrow_writer import Conversion, Table
from vlmo.utils.record_batches import Row, Skipped

SCHEMA = pa.schema({"image": pa.binary(), "text": pa.string()})


def rows_of(sources, key="t"):
    return lambda: [(key, Row({"text": str(n)}, {"image": source})) for n, source in enumerate(sources)]


def convert(out, sources, table="table", **options):
    with Conversion(str(out), "test", **options) as conversion:
        conversion.write({"t": Table(table, SCHEMA)}, rows_of(sources))
    return conversion.report


def test_rows_and_bytes_arrive(tmp_path, capsys):
    images = [image_bytes(color) for color in range(5)]
    report = convert(tmp_path / "out", images)
    assert [row["image"] for row in read_rows(tmp_path / "out" / "table.arrow")] == images
    assert report.rows == {"table.arrow": 5} and not report.skipped
    assert sorted(os.listdir(tmp_path / "out")) == ["table.arrow"]
    assert "5 rows" in capsys.readouterr().out


def test_batches_are_bounded(tmp_path, monkeypatch):
    images = [image_bytes(color) for color in range(10)]
    monkeypatch.setattr(record_batches, "BATCH_BYTES", 2 * len(images[0]))
    monkeypatch.setattr(arrow_writer, "CHUNK_ROWS", 5)
    convert(tmp_path, images)
    reader = pa.ipc.open_file(str(tmp_path / "table.arrow"))
    assert [reader.get_batch(n).num_rows for n in range(reader.num_record_batches)] == [2, 2, 1, 2, 2, 1]


def test_shards_hold_written_rows_and_old_ones_go(tmp_path):
    sources = [image_bytes(1), str(tmp_path / "missing.jpg"), *(image_bytes(color) for color in range(5))]
    for number in (1, 2, 7):
        (tmp_path / f"t_{number}.arrow").write_text("of an earlier conversion")
    (tmp_path / "t_other.arrow").write_text("something else")
    with Conversion(str(tmp_path), "test") as conversion:
        conversion.write({"t": Table("t_{shard}", SCHEMA, shard_rows=3)}, rows_of(sources))
    assert conversion.report.rows == {"t_0.arrow": 3, "t_1.arrow": 3}
    assert sorted(path.name for path in tmp_path.glob("t_*")) == ["t_0.arrow", "t_1.arrow", "t_other.arrow"]
    assert [row["text"] for row in read_rows(tmp_path / "t_1.arrow")] == ["4", "5", "6"]


def test_left_out_images_are_counted_and_listed(tmp_path, capsys):
    good, damaged = tmp_path / "good.jpg", tmp_path / "damaged.jpg"
    good.write_bytes(image_bytes())
    damaged.write_bytes(image_bytes()[:-60])
    sources = [str(tmp_path / "missing.jpg"), str(good), str(damaged), b"text", b""]
    report = convert(tmp_path / "out", sources)
    assert report.skipped == {"file not found": 1, "damaged or truncated": 1, "not an image": 1, "empty file": 1}
    assert "left out 4" in capsys.readouterr().out
    listed = (tmp_path / "out" / "test_skipped.txt").read_text().splitlines()
    assert listed[0] == f"{tmp_path / 'missing.jpg'}\tfile not found" and len(listed) == 4
    convert(tmp_path / "out", [str(good)])
    assert not (tmp_path / "out" / "test_skipped.txt").exists()


def test_only_unreadable_images_is_an_error(tmp_path):
    with pytest.raises(VLMoError, match="none of 2 rows has readable images; the first: .*file not found"):
        convert(tmp_path / "out", [str(tmp_path / "a.jpg"), b"text"])
    assert os.listdir(tmp_path / "out") == []


def test_nothing_to_convert_is_an_error(tmp_path):
    with pytest.raises(VLMoError, match="nothing to convert"), Conversion(str(tmp_path), "test") as conversion:
        conversion.write({"t": Table("table", SCHEMA)}, lambda: [("t", Skipped("a", "no caption"))])


def test_a_failed_conversion_leaves_what_was_there(tmp_path):
    convert(tmp_path, [image_bytes(1)])
    before = (tmp_path / "table.arrow").read_bytes()

    def failing():
        yield "t", Row({"text": "a"}, {"image": image_bytes(2)})
        raise VLMoError("annotation 2 is wrong")

    with pytest.raises(VLMoError, match="annotation 2"), Conversion(str(tmp_path), "test") as conversion:
        conversion.write({"t": Table("table", SCHEMA)}, failing)
    assert os.listdir(tmp_path) == ["table.arrow"]
    assert (tmp_path / "table.arrow").read_bytes() == before


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arrow_writer, "sync", full)
    with pytest.raises(VLMoError, match="No space left on device; nothing was written"):
        convert(tmp_path, [image_bytes()])
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(VLMoError, match="cannot write into"):
        convert(tmp_path / "file" / "out", [image_bytes()])


def test_text_that_utf8_cannot_hold(tmp_path):
    with Conversion(str(tmp_path), "test") as conversion:
        conversion.write(
            {"t": Table("t", SCHEMA)}, lambda: [("t", Row({"text": "a\ud800b"}, {"image": image_bytes()}))]
        )
    assert read_rows(tmp_path / "t.arrow")[0]["text"] == "a?b"


def test_copy_rows_takes_a_range_over_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_writer, "CHUNK_ROWS", 2)
    with Conversion(str(tmp_path), "test") as conversion:
        conversion.write({"t": Table("all", SCHEMA)}, rows_of([image_bytes(color) for color in range(7)]))
        conversion.copy_rows("all", "part", 1, 6)
        conversion.copy_rows("all", "nothing", 7, 7)
    assert [row["text"] for row in read_rows(tmp_path / "part.arrow")] == ["1", "2", "3", "4", "5"]
    assert read_rows(tmp_path / "nothing.arrow") == []


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_conversion_leaves_no_table(workers, tmp_path):
    """Killed while it reads: no file at a final name, no worker stays behind, and the next run clears up."""
    write_karpathy(tmp_path / "raw", 1200)
    out = tmp_path / "out"
    fifo = tmp_path / "raw" / "1100.jpg"  # reading blocks here, long after the first batches were written
    fifo.unlink()
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "vlmo.utils.convert", "own_karpathy", str(tmp_path / "raw"), str(out)]
    process = subprocess.Popen([*command, "--num-workers", str(workers)], start_new_session=True)
    wait_for(lambda: any(path.stat().st_size > 100_000 for path in out.glob(".*/coco_caption_karpathy_train.arrow")))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(out.glob("*.arrow"))
    assert len(os.listdir(out)) == 1  # the hidden folder
    wait_for(lambda: not group_is_alive(process.pid))
    fifo.unlink()
    write_own_karpathy.make_arrow(str(tmp_path / "raw"), str(out))
    assert len(read_rows(out / "coco_caption_karpathy_train.arrow")) == 1199
    assert not list(out.glob(".*"))


def test_killed_at_any_line_every_table_is_whole(tmp_path):
    """Killed before any line of the writer: a reader finds the old table or the new one, complete, and nothing else."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_karpathy(raw, 6)
    context = multiprocessing.get_context("fork")
    lines = context.Value("i", 0)

    def convert_until(last):
        """Counts the writer's lines; kills itself before the line `last`."""

        def trace(frame, event, _):
            if frame.f_code.co_filename != arrow_writer.__file__:
                return None
            lines.value += event == "line"
            if lines.value == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        write_own_karpathy.make_arrow(str(raw), str(out))

    def run(last):
        lines.value = 0
        process = context.Process(target=convert_until, args=(last,))
        process.start()
        process.join()
        return process.exitcode

    assert run(-1) == 0
    total = lines.value
    write_karpathy(raw, 8)  # what is converted from now on
    publishing = range(total - 60, total, 2)
    for last in sorted({*range(1, total, total // 15), *publishing}):
        assert run(last) == -signal.SIGKILL
        visible = {path.name for path in out.iterdir() if not path.name.startswith(".")}
        assert visible == {f"coco_caption_karpathy_{split}.arrow" for split in ("train", "restval", "val", "test")}
        assert len(read_rows(out / "coco_caption_karpathy_train.arrow")) in (6, 8)
        assert [read_rows(out / f"coco_caption_karpathy_{split}.arrow") for split in ("restval", "val", "test")] == [
            []
        ] * 3
    assert run(-1) == 0
    assert len(list(out.iterdir())) == 4


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def group_is_alive(leader):
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def test_termination_clears_up(tmp_path):
    write_karpathy(tmp_path / "raw", 4)
    fifo = tmp_path / "raw" / "2.jpg"
    fifo.unlink()
    os.mkfifo(fifo)
    command = [sys.executable, "-m", "vlmo.utils.convert", "own_karpathy", str(tmp_path / "raw"), str(tmp_path / "out")]
    process = subprocess.Popen([*command, "--num-workers", "1"])
    wait_for(lambda: list((tmp_path / "out").glob(".*")))
    process.terminate()
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path / "out") == []


def test_chunks_of_several_tables_keep_the_order_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_writer, "CHUNK_ROWS", 2)
    write_images(tmp_path / "images", 9)
    sources = [str(tmp_path / "images" / f"{n}.jpg") for n in range(9)]
    rows = [("ab"[n % 2], Row({"text": str(n)}, {"image": source})) for n, source in enumerate(sources)]
    with Conversion(str(tmp_path), "test") as conversion:
        conversion.write({key: Table(key, SCHEMA) for key in "ab"}, lambda: rows)
    assert [row["text"] for row in read_rows(tmp_path / "a.arrow")] == ["0", "2", "4", "6", "8"]
    assert [row["text"] for row in read_rows(tmp_path / "b.arrow")] == ["1", "3", "5", "7"]


def test_files_and_lists_are_the_same_with_workers(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 9)
    found = {}
    for workers in (1, 2):
        monkeypatch.setattr(arrow_writer, "CHUNK_ROWS", 4)

        def rows():
            for number in range(30):
                image = str(tmp_path / "images" / f"{number % 10}.jpg")  # the tenth is missing
                row = Row({"text": str(number)}, {"image": image})
                yield "ab"[number % 2], Skipped(str(number), "no caption") if number % 7 == 3 else row

        out = tmp_path / str(workers)
        with Conversion(str(out), "test", num_workers=workers) as conversion:
            conversion.write({key: Table(key, SCHEMA) for key in "ab"}, rows)
        found[workers] = {path.name: path.read_bytes() for path in out.iterdir()}
    assert found[1] == found[2]
    assert found[1].keys() == {"a.arrow", "b.arrow", "test_skipped.txt"}


def test_with_workers_mistakes_in_annotations_are_found_long_before_the_images_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_writer, "CHUNK_ROWS", 1)
    os.mkfifo(tmp_path / "slow.jpg")  # nobody writes to it

    def rows():
        for number in range(20):
            yield "t", Row({"text": str(number)}, {"image": str(tmp_path / "slow.jpg")})
        writer = os.open(tmp_path / "slow.jpg", os.O_RDWR)  # so that the readers come to an end
        os.write(writer, b"x")
        raise VLMoError("annotation 21 is wrong")

    conversion = Conversion(str(tmp_path / "out"), "test", num_workers=2)
    with pytest.raises(VLMoError, match="annotation 21"), conversion:
        conversion.write({"t": Table("table", SCHEMA)}, rows)
    assert os.listdir(tmp_path / "out") == []
