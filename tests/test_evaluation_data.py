"""Where evaluation images come from, and what is said when they do not."""

import io
import zlib
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from PIL import Image

from hf_tokenprune.errors import DataError
from hf_tokenprune.evaluation import load_images
from hf_tokenprune.evaluation.images import to_rgb

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def picture(grey: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    return Image.new("L", size, grey).convert(mode)


def save(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(grey).save(path)
    return path


def greys(images) -> list[int]:
    """What the pictures show, so that the order of images and labels can be told."""
    return [round(np.asarray(images[i]["image"]).mean()) for i in range(len(images))]


def labels(images) -> list[int | None]:
    return [images[i]["label"] for i in range(len(images))]


@pytest.fixture
def listed(tmp_path) -> Path:
    """A folder with labels.csv: one file beside it, two in images/."""
    save(tmp_path / "a.png", 10)
    save(tmp_path / "images" / "b.png", 20)
    save(tmp_path / "images" / "c.png", 30)
    (tmp_path / "labels.csv").write_text("file,label,name\nimages/c.png,7,x\na.png,0,y\nb.png,,z\n")
    return tmp_path


def test_csv_keeps_its_order_and_finds_files_in_both_places(listed):
    images = load_images(listed)
    assert greys(images) == [30, 10, 20]
    assert labels(images) == [7, 0, None]
    assert images[1]["name"] == str(listed / "a.png")
    assert images[0]["image"].mode == "RGB"
    assert labels(load_images(str(listed), label_column=None)) == [None, None, None]


def test_csv_from_a_spreadsheet(listed):
    text = (listed / "labels.csv").read_text()
    (listed / "labels.csv").write_text(
        "\ufeff" + text.replace("label", "class").replace("\n", "\r\n"), encoding="utf-8"
    )
    assert labels(load_images(listed, label_column="class")) == [7, 0, None]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"labels.csv has no column 'file', 'label' \(it has: no header\)"),
        ("path,label\na.png,0\n", r"no column 'file' \(it has: \['path', 'label'\]\); name it so in the first line"),
        ("file,wnid\na.png,n0\n", "no column 'label'.*None to evaluate without labels"),
        ("file,label\n", "labels.csv lists no images; write one line for each"),
        (
            "file,label\na.png,0\ngone.png,1\n",
            "labels.csv, line 3: there is no file 'gone.png'.*add it or delete the line",
        ),
        ("file,label\n,1\n", "line 2: there is no file ''"),
        ("file,label\na.png,dog\nimages/b.png,3\n", "line 2: label 'dog' is not a class index; write 0, 1, 2"),
        ("file,label\na.png,1.0\n", "label '1.0' is not a class index"),
        ("file,label\na.png,-2\n", "label '-2' is not a class index"),
        ("file,label\n\xff\n", "cannot be read as CSV in UTF-8"),
    ],
)
def test_csv_that_cannot_be_used(listed, text, says):
    (listed / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=says):
        load_images(listed)


def test_subfolders_are_classes_in_sorted_order(tmp_path):
    save(tmp_path / "zebra" / "1.JPEG", 40)
    save(tmp_path / "ant" / "deep" / "2.png", 50)
    save(tmp_path / "ant" / "1.png", 60)
    save(tmp_path / ".thumbnails" / "1.png")
    save(tmp_path / "ant" / "._1.png")
    (tmp_path / "bee").mkdir()  # no image of this class: the labels of the others stay what they are
    (tmp_path / "README.txt").write_text("not an image")
    images = load_images(tmp_path)
    assert images.classes == ("ant", "bee", "zebra")
    assert greys(images) == [60, 50, 40]
    assert labels(images) == [0, 0, 2]
    unlabelled = load_images(tmp_path, label_column=None)
    assert labels(unlabelled) == [None] * 3
    assert unlabelled.classes is None


def test_flat_folder_has_no_labels(tmp_path):
    save(tmp_path / "b.png", 1)
    save(tmp_path / "a.bmp", 2)
    images = load_images(tmp_path)
    assert greys(images) == [2, 1]
    assert labels(images) == [None, None]


def test_split_names_a_subfolder(tmp_path):
    save(tmp_path / "val" / "ant" / "1.png", 70)
    save(tmp_path / "train" / "ant" / "1.png", 80)
    assert greys(load_images(tmp_path, split="val")) == [70]
    with pytest.raises(DataError, match="no subfolder 'test'"):
        load_images(tmp_path, split="test")


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="gone does not exist; check the path"):
        load_images(tmp_path / "gone")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty holds no images .*labels.csv with the columns file,label"):
        load_images(tmp_path / "empty")
    file = save(tmp_path / "mixed" / "a.png")
    save(tmp_path / "mixed" / "class" / "a.png")
    with pytest.raises(DataError, match="mixed holds images both directly and in subfolders"):
        load_images(tmp_path / "mixed")
    with pytest.raises(DataError, match=r"a\.png is a file; give the folder"):
        load_images(file)


def test_limit_is_spread_over_the_source(tmp_path):
    rows = [{"image": picture(i), "label": i // 4} for i in range(10)]
    images = load_images(rows, limit=4)
    assert greys(images) == [0, 2, 5, 7]
    assert labels(images) == [0, 0, 1, 1]
    assert images[2]["name"] == "item 5"
    assert len(load_images(rows, limit=99)) == 10
    with pytest.raises(DataError, match="limit=0"):
        load_images(rows, limit=0)


def test_images_become_upright_rgb(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to see it upright
    picture(5, (12, 10)).save(tmp_path / "turned.jpg", exif=exif)
    picture(5, (12, 10), "RGBA").save(tmp_path / "alpha.png")
    picture(5, (12, 10), "CMYK").save(tmp_path / "print.jpg")
    images = load_images(tmp_path)
    assert [images[i]["image"].size for i in range(3)] == [(12, 10), (12, 10), (10, 12)]
    assert {images[i]["image"].mode for i in range(3)} == {"RGB"}


def test_transparent_is_white_and_16_bits_are_scaled():
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    clear.putpixel((1, 0), (200, 0, 0, 0))
    assert [to_rgb(clear).getpixel((x, 0)) for x in (0, 1)] == [(200, 0, 0), (255, 255, 255)]
    deep = Image.fromarray(np.array([[0, 100 * 257, 65535]], dtype=np.uint16))
    for image in (deep, deep.convert("I")):
        assert [to_rgb(image).getpixel((x, 0))[0] for x in range(3)] == [0, 100, 255]
    assert to_rgb(Image.fromarray(np.array([[7, 200]], dtype=np.int32))).getpixel((1, 0)) == (200, 200, 200)


def jpeg(tmp_path: Path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    return (tmp_path / "whole.jpg").read_bytes()


@pytest.mark.parametrize("damage", ["garbage", "empty", "jpeg", "png"])
def test_broken_files_are_found_up_front(tmp_path, damage):
    whole = jpeg(tmp_path)
    Image.open(tmp_path / "whole.jpg").save(tmp_path / "whole.png")
    bad = {
        "garbage": ("bad.jpg", b"this is no image"),
        "empty": ("bad.jpg", b""),
        "jpeg": ("bad.jpg", whole[: len(whole) // 2]),
        "png": ("bad.png", (tmp_path / "whole.png").read_bytes()[:-3000]),
    }[damage]
    (tmp_path / bad[0]).write_bytes(bad[1])
    with pytest.raises(DataError, match=rf"{bad[0]} \(.*\); delete or replace it"):
        load_images(tmp_path)


def test_damage_inside_a_file_is_named_when_it_is_decoded(tmp_path):
    """The pixel data of a PNG broken with its checksum mended: only decoding can see it."""
    path = tmp_path / "bad.png"
    jpeg(tmp_path)
    Image.open(tmp_path / "whole.jpg").save(path)
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start], "big")
    data[start + 4 + 2 : start + 4 + length] = bytes(length - 2)
    data[start + 4 + length : start + 8 + length] = zlib.crc32(data[start : start + 4 + length]).to_bytes(4, "big")
    path.write_bytes(data)
    (tmp_path / "whole.jpg").unlink()
    images = load_images(tmp_path)
    with pytest.raises(DataError, match=r"cannot read .*bad.png \(.*\); delete or replace it"):
        images[0]


def test_bytes_after_a_jpeg_do_no_harm(tmp_path):
    (tmp_path / "padded.jpg").write_bytes(jpeg(tmp_path) + b"\0\0trailer")
    assert len(load_images(tmp_path)) == 2


def test_many_broken_files_are_counted(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"4\.jpg \(.*\) and 2 more; delete or replace it"):
        load_images(tmp_path)


def test_sequence_of_mappings(tmp_path):
    buffer = io.BytesIO()
    picture(4).save(buffer, "PNG")
    rows = [
        {"image": picture(1), "label": 5},
        {"image": np.full((6, 6, 3), 2, np.uint8), "label": np.int64(6)},
        {"image": save(tmp_path / "c.png", 3), "label": None},
        {"image": buffer.getvalue(), "label": -1},
    ]
    images = load_images(rows)
    assert greys(images) == [1, 2, 3, 4]
    assert labels(images) == [5, 6, None, None]
    assert greys(load_images([{"img": picture(9)}], image_column="img", label_column=None)) == [9]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([], "holds no images"),
        (3, "cannot read images from int; give a folder, a dataset, or a sequence"),
        ([picture(1)], "item 0 is of type Image; expected a mapping with 'image' and 'label'"),
        ([{"image": picture(1)}], "item 0 is a mapping with 'image'; expected a mapping with 'image' and 'label'"),
        ([{"image": picture(1), "label": 1.5}], "item 0: label 1.5 is not a class index"),
        ([{"image": picture(1), "label": True}], "item 0: label True is not a class index"),
    ],
)
def test_sequences_that_cannot_be_used(source, says):
    with pytest.raises(DataError, match=says):
        load_images(source)


def test_an_item_that_is_no_image():
    images = load_images([{"image": 3.5, "label": 0}])
    with pytest.raises(
        DataError, match="item 0 is of type float; expected a PIL image, a path, encoded bytes or an array"
    ):
        images[0]
    with pytest.raises(DataError, match="splits; leave split out"):
        load_images([{"image": 3.5, "label": 0}], split="test")


@pytest.fixture
def dataset() -> datasets.Dataset:
    return datasets.Dataset.from_dict(
        {
            "image": [picture(g) for g in (11, 12, 13)],
            "label": [1, 0, -1],
            "animal": [0, 1, 1],
            "text": ["a", "b", "c"],
        },
    ).cast_column("animal", datasets.ClassLabel(names=["cat", "dog"]))


def test_dataset_in_memory(dataset):
    images = load_images(dataset)
    assert greys(images) == [11, 12, 13]
    assert labels(images) == [1, 0, None]
    assert images.classes is None
    assert images[2]["name"] == "row 2"
    assert load_images(dataset, label_column="animal").classes == ("cat", "dog")
    assert labels(load_images(dataset, label_column=None)) == [None] * 3
    assert greys(load_images(dataset.with_transform(lambda batch: {"image": ["no image"]}), limit=2)) == [11, 12]


def test_dataset_dict_needs_a_split(dataset):
    both = datasets.DatasetDict(train=dataset, test=dataset.select([2]))
    assert greys(load_images(both, split="test")) == [13]
    assert len(load_images(datasets.DatasetDict(train=dataset))) == 3
    with pytest.raises(DataError, match="split=None: the dataset has the splits 'train', 'test'; name one"):
        load_images(both)
    with pytest.raises(DataError, match="single split already"):
        load_images(dataset, split="test")


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"image_column": "img"}, "image_column='img': the dataset has the columns 'image', 'label'.*name one of them"),
        ({"label_column": "labels"}, "label_column='labels'.*or None to evaluate without labels"),
    ],
)
def test_dataset_columns(dataset, columns, says):
    with pytest.raises(DataError, match=says):
        load_images(dataset, **columns)


def test_a_column_of_texts_names_classes(dataset):
    images = load_images(dataset, label_column="text")
    assert images.classes == ("a", "b", "c") and labels(images) == [0, 1, 2]


def test_streaming_dataset_is_refused(dataset):
    with pytest.raises(DataError, match="streaming=False"):
        load_images(dataset.to_iterable_dataset())


def test_broken_row_of_a_dataset_is_named(dataset):
    rows = [{"bytes": b"no image", "path": None}]
    broken = datasets.Dataset.from_dict({"image": rows, "label": [0]}).cast_column("image", datasets.Image())
    with pytest.raises(DataError, match=r"cannot read row 0 \(.*\); delete or replace it"):
        load_images(broken)[0]


def test_datasets_on_disk(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    dataset.save_to_disk(tmp_path / "one")
    assert greys(load_images(tmp_path / "one")) == [11, 12, 13]
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert greys(load_images(tmp_path / "two", split="test")) == [12]
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    dataset.select([2]).to_parquet(tmp_path / "parquet" / "test.parquet")
    assert greys(load_images(tmp_path / "parquet", split="test")) == [13]
    with pytest.raises(DataError, match=r"parquet cannot be loaded .*nosuch"):
        load_images(tmp_path / "parquet", split="nosuch")


def test_neither_a_folder_nor_a_dataset(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="'nobody/nothing', neither a folder here nor a Hub dataset, cannot be loaded"):
        load_images("nobody/nothing", split="test")


@pytest.mark.skipif(not (SHARED / "nips17_dev").is_dir(), reason="needs ../shared/data/nips17_dev")
def test_real_images():
    images = load_images(SHARED / "nips17_dev")
    assert len(images) == 1000
    assert len({label for label in images.labels if label is not None}) == 430
    assert all(label is not None and 0 <= label < 1000 for label in images.labels)
    assert images[0]["image"].size == (256, 256)
