"""A folder of images as tables without texts."""

import pyarrow as pa
import pytest

from tests import tables
from tests.unit.utils.raw import write_images
from vlmo.errors import VLMoError
from vlmo.inference.io import image_files
from vlmo.utils import convert
from vlmo.utils.write_images import make_arrow


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "raw"
    for number in range(12):
        path = root / f"class{number % 3}" / f"{number:02d}.PNG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tables.png(number))
    (root / "notes.txt").write_text("no image")
    (root / "class0" / "broken.jpg").write_bytes(b"no image either")
    return root


def rows(path):
    return pa.ipc.open_file(path).read_all().to_pylist()


def test_images_of_all_folders_in_order(folder, tmp_path):
    report = make_arrow(str(folder), str(tmp_path), val_share=0.25)
    train, val = rows(tmp_path / "images_train_0.arrow"), rows(tmp_path / "images_val_0.arrow")
    names = [f"class{number % 3}/{number:02d}.PNG" for number in (0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11)]
    # the broken image, "broken.jpg", is the fifth of its folder in order: counted, then left out
    assert [row["image_id"] for row in val] == [names[3], names[6], names[10]]
    assert [row["image_id"] for row in train] == [
        name for name in names if name not in {row["image_id"] for row in val}
    ]
    assert train[0]["image"] == tables.png(0) and train[0]["split"] == "train"
    assert report.skipped == {"not an image": 1}


def test_without_validation_and_from_the_command_line(folder, tmp_path):
    assert convert.main(["images", str(folder), str(tmp_path), "--val-share", "0"]) == 0
    assert len(rows(tmp_path / "images_train_0.arrow")) == 12
    assert not (tmp_path / "images_val_0.arrow").exists()


def test_mistakes(tmp_path):
    with pytest.raises(VLMoError, match="is not a folder"):
        make_arrow(str(tmp_path / "absent"), str(tmp_path))
    with pytest.raises(VLMoError, match="val_share=0.9"):
        make_arrow(str(tmp_path), str(tmp_path), val_share=0.9)
    with pytest.raises(VLMoError, match="nothing to convert"):
        make_arrow(str(tmp_path), str(tmp_path))


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
    write_images(tmp_path / "elsewhere", 3)
    write_images(tmp_path / "root" / "here", 2)
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "here" / "._0.jpg").write_bytes(b"Mac OS X")
    report = make_arrow(str(tmp_path / "root"), str(tmp_path / "out"), val_share=0)
    assert report.rows == {"images_train_0.arrow": 5} and not report.skipped
    assert len(image_files(str(tmp_path / "root"))) == 5
