"""Sources: what is an item, its id and its label, in one fixed order, and errors that name the culprit."""

import contextlib
import csv
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import unicodedata

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ood_core.data import (
    FewShot,
    ImageFolder,
    Manifest,
    ParquetImages,
    PILImages,
    match_labels,
    open_source,
)
from ood_core.data.augment import Views
from ood_core.data.joined import JoinedSources
from ood_core.errors import DataError, ImageError, MissingDataError, UsageError
from PIL import Image


def image_bytes(value, kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write_images(root, *names):
    """Image number i is the colour (i, 0, 0)."""
    for value, name in enumerate(names):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(image_bytes(value))


def values(source):
    return [image.getpixel((0, 0))[0] for _, image in source]


# ---- folders


def test_folder_ids_are_sorted_paths_and_labels_the_first_folder(tmp_path):
    write_images(tmp_path, "dog/b.png", "cat/deep/z.PNG", "top.jpeg", "cat/a.JpG", "cat/deeper/still/c.webp")
    write_images(tmp_path, ".hidden.png", ".git/x.png", "cat/.thumb/y.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    source = ImageFolder(tmp_path)
    assert source.ids == ["cat/a.JpG", "cat/deep/z.PNG", "cat/deeper/still/c.webp", "dog/b.png", "top.jpeg"]
    assert source.label_names == ["cat", "dog"]
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 0, 0, 1, -1]
    assert values(source) == [3, 1, 4, 0, 2]


def test_a_folder_without_subfolders_has_no_labels(tmp_path):
    write_images(tmp_path, "b.png", "a.png")
    source = ImageFolder(str(tmp_path))
    assert (source.ids, source.labels, source.label_names) == (["a.png", "b.png"], None, [])


def test_one_subfolder_is_one_label(tmp_path):
    write_images(tmp_path, "images/b.png", "images/a.png")
    source = ImageFolder(tmp_path)
    assert (source.ids, source.label_names) == (["images/a.png", "images/b.png"], ["images"])


def test_the_order_of_the_file_system_does_not_matter(tmp_path, monkeypatch):
    write_images(tmp_path, *(f"{folder}/{name}.png" for folder in "cab" for name in "zxy"))
    (tmp_path / "b" / "\udcff.png").write_bytes(image_bytes(77))
    (tmp_path / "b" / "\\udcff.png").write_bytes(image_bytes(78))  # the other's id as a name
    scandir = os.scandir

    def listed(reverse):
        @contextlib.contextmanager
        def in_order(path):
            with scandir(path) as entries:
                yield sorted(entries, key=lambda entry: entry.name, reverse=reverse)

        monkeypatch.setattr(os, "scandir", in_order)
        source = ImageFolder(tmp_path)
        return source.ids, values(source), source.fingerprint

    assert listed(reverse=True) == listed(reverse=False)


def test_odd_names_are_items_with_printable_unique_ids(tmp_path):
    odd = ["comma, quote'\".png", "new\nline.png", "\udcff.png", "\\udcff.png", "日本.png"]
    write_images(tmp_path, *odd)
    source = ImageFolder(tmp_path)
    by_id = dict(zip(source.ids, values(source), strict=True))
    assert [by_id[name] for name in (odd[0], odd[1], odd[4])] == [0, 1, 4]
    assert sorted([by_id["\\udcff.png"], by_id["\\udcff.png#2"]]) == [2, 3]
    "".join(source.ids).encode("utf-8")


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_images(tmp_path / "data", "cat/a.png")
    write_images(tmp_path / "elsewhere", "b.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "self").symlink_to(tmp_path / "elsewhere")
    assert ImageFolder(tmp_path / "data").ids == ["cat/a.png", "dog/b.png"]


def test_broken_links_fail_when_opened(tmp_path):
    write_images(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    source = ImageFolder(tmp_path)
    assert source.ids == ["a.png", "b.png"]
    with pytest.raises(ImageError, match=r"b\.png"):
        source.open(1)
    assert len(source.fingerprint) == 64


def test_bad_folders_are_named(tmp_path, monkeypatch):
    with pytest.raises(MissingDataError, match="nowhere"):
        ImageFolder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("")
    with pytest.raises(DataError, match=r"empty.*no image"):
        ImageFolder(tmp_path / "empty")
    write_images(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"a\.png' is a file"):
        ImageFolder(tmp_path / "a.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="empty' cannot be listed: Permission denied"):
        ImageFolder(tmp_path / "empty")


KINDS = {
    "jfif": "JPEG", "jp2": "JPEG2000", "j2k": "JPEG2000", "tga": "TGA", "pnm": "PPM", "pcx": "PCX", "sgi": "SGI",
    "dib": "DIB", "dds": "DDS", "apng": "PNG", "mpo": "MPO", "icns": "ICNS", "xbm": "XBM",
}  # fmt: skip


def test_everything_that_pillow_reads_is_found(tmp_path):
    for suffix, kind in KINDS.items():
        image = Image.new("1" if kind == "XBM" else "RGB", (16, 16))
        image.save(tmp_path / f"a.{suffix}", kind)
    source = ImageFolder(tmp_path)
    assert source.ids == sorted(f"a.{suffix}" for suffix in KINDS)
    assert all(image.mode == "RGB" for _, image in source)
    assert not source.skipped


def test_files_that_look_like_images_and_are_skipped_are_named(tmp_path):
    write_images(tmp_path, "cat/a.png", "cat/photo.jpg_large", "cat/bare", ".hidden", "notes.txt")
    others = {
        "b.heic": b"",
        "c.NEF": b"II*\0",
        "slide.unknown": b"MM\0*",
        "d.xyz": b"nothing",
        "run.sh": b"#!",
        "e": b"",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    source = ImageFolder(tmp_path)
    assert source.ids == ["cat/a.png"]
    assert source.skipped == ["b.heic", "c.NEF", "cat/bare", "cat/photo.jpg_large", "slide.unknown"]
    os.remove(tmp_path / "cat" / "a.png")
    with pytest.raises(DataError, match=r"holds no image.*5 files look like images .* first '.*b\.heic'"):
        ImageFolder(tmp_path)


# ---- manifests


ROWS = [
    {"path": "b,comma.png", "label": "dog", "id": "two"},
    {"path": "sub/a.png", "label": "cat", "id": "one"},
    {"path": "new\nline.png", "label": "", "id": "three"},
]


def write_manifest(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV"])
def test_manifests_of_every_kind(tmp_path, suffix):
    write_images(tmp_path, *(row["path"] for row in ROWS))
    path = tmp_path / f"set{suffix.lower()}"
    write_manifest(path, ROWS)
    source = Manifest(path.rename(tmp_path / f"set{suffix}"))
    assert source.ids == ["one", "three", "two"]
    assert (source.labels.tolist(), source.label_names) == ([0, -1, 1], ["cat", "dog"])
    assert values(source) == [1, 2, 0]


def test_manifest_paths_are_the_ids_and_may_have_another_root(tmp_path):
    write_images(tmp_path / "images", "b.png", "a.png")
    absolute = str(tmp_path / "images" / "b.png")
    rows = [{"path": absolute}, {"path": "a.png"}]
    (tmp_path / "lists").mkdir()
    source = Manifest(write_manifest(tmp_path / "lists" / "m.csv", rows), root=tmp_path / "images")
    assert (source.ids, source.labels) == ([absolute, "a.png"], None)
    assert values(source) == [0, 1]


def test_numbers_as_labels_are_in_numerical_order_in_every_kind_of_manifest(tmp_path):
    rows = [{"path": f"{n}.png", "label": n} for n in (10, 9, 2)]
    for suffix in (".csv", ".jsonl", ".parquet"):
        source = Manifest(write_manifest(tmp_path / f"m{suffix}", rows))
        assert (source.ids[0], source.labels[0], source.label_names) == ("10.png", 2, ["2", "9", "10"])


def test_an_integer_column_with_gaps(tmp_path):
    rows = [{"path": "a.png", "label": 3.0}, {"path": "b.png", "label": None}]
    source = Manifest(write_manifest(tmp_path / "m.parquet", rows))
    assert (source.labels.tolist(), source.label_names) == ([0, -1], ["3"])


def test_a_csv_that_is_no_utf_8(tmp_path):
    write_images(tmp_path, "\udce9.png", "é.png")
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xe9.png,cafe\n")  # the bytes of a file's name
    source = Manifest(tmp_path / "m.csv")
    assert (source.ids, source.label_names, values(source)) == (["\\udce9.png"], ["cafe"], [0])
    for text in (b"path,label\n\xe9.png,caf\xe9\n", b"path,label\ngone-\xe9.png,cafe\n"):
        (tmp_path / "m.csv").write_bytes(text)
        with pytest.raises(DataError, match=r"m\.csv' is no UTF-8 text .*encoding='latin-1' \(--encoding latin-1\)"):
            Manifest(tmp_path / "m.csv")
    (tmp_path / "m.csv").write_bytes(b"path,label\n\xe9.png,caf\xe9\n")
    source = Manifest(tmp_path / "m.csv", encoding="latin-1")
    assert (source.ids, source.label_names, values(source)) == (["é.png"], ["café"], [1])
    with pytest.raises(UsageError, match="Unknown encoding 'latin-x'"):
        Manifest(tmp_path / "m.csv", encoding="latin-x")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("m.csv", "file,label\na.png,1\n", r"m\.csv' has no column 'path'; its columns are 'file', 'label'"),
        ("m.csv", "path\na.png\na.png\n", r"'a\.png' occurs more than once"),
        ("m.csv", "path,id\na.png,1\n,2\n", r"m\.csv' has no path in data row 2"),
        ("m.csv", "path\n", r"m\.csv' has no rows"),
        ("m.csv", "", r"m\.csv' has no column 'path'"),
        ("m.csv", 'path\n"a.png', r"m\.csv' cannot be read"),
        ("m.jsonl", '{"path": "a"}\n[1]\n', r"m\.jsonl' cannot be read: line 2 is no JSON object"),
        ("m.jsonl", "{'path'", "line 1 is no JSON object"),
        ("m.jsonl", '{"path": 3}', r"no path in data row 1 \(it holds 3\)"),
        ("m.jsonl", '{"path": "a", "label": ["x"]}', r"label \['x'\]"),
        ("m.parquet", "no parquet", r"m\.parquet' cannot be read"),
        ("m.doc", "path\n", r"m\.doc' is no manifest: it must end in \.csv, "),
        ("m.csv", "path,path\na.png,b.png\n", r"m\.csv' has 2 columns 'path'"),
        ("m.csv", "path,label\nx.png,dog, brown\n", r"line 2 has 3 cells for 2 columns; .*quotes around .* a comma"),
        ("m.csv", 'path,label\n"new\nline.png",dog\nx.png\n', r"line 4 has 1 cell for 2 columns"),
        ("m.csv", "sep=;\npath;label\nx.png;dog;brown\n", r"line 3 has 3 cells for 2 columns; .*a semicolon"),
        ("m.csv", "Path,label\na.png,1\n", r"Column 'Path' may hold the paths: say path_column='Path' \(--path-column"),
        ("m.csv", "path,label\nhttps://x.org/a.png,1\n", r"address 'https://x.org/a.png' in data row 1.*Download"),
        ("m.csv", "p\0a\0t\0h\0", r"zero bytes, as UTF-16 does.*encoding='utf-16-le'"),
        ("m.jsonl", '{"path": "a", "path": "b"}', r"line 1 has 'path' twice"),
        ("m.csv.gz", "path\n", r"m\.csv\.gz' cannot be unpacked as gzip"),
    ],
)
def test_bad_manifests_are_named(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=sentence):
        Manifest(tmp_path / name)


def as_manifest(tmp_path, text, name="m.csv", **options):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return Manifest(tmp_path / name, **options)


def table_of(source):
    names = [*source.label_names, None]
    labels = [-1] * len(source) if source.labels is None else source.labels
    return {id: names[label] for id, label in zip(source.ids, labels, strict=True)}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding):
    assert table_of(as_manifest(tmp_path, "path,label\nä.png,Größe\n".encode(encoding))) == {"ä.png": "Größe"}


def test_the_encoding_of_latin_1_and_utf_16_without_a_mark_may_be_named(tmp_path):
    text = "path,label\nä.png,Größe\n"
    for encoding in ("latin-1", "utf-16-le"):
        assert table_of(as_manifest(tmp_path, text.encode(encoding), encoding=encoding)) == {"ä.png": "Größe"}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".csv.gz", ".txt"])
def test_the_header_shows_the_separator(tmp_path, separator, suffix):
    rows = [["path", "label"], ["b.png", "dog, brown; old"], ["a.png", "cat"]]
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows(rows)
    data = text.getvalue().encode()
    source = as_manifest(tmp_path, gzip.compress(data) if suffix.endswith("gz") else data, f"m{suffix}")
    assert table_of(source) == {"a.png": "cat", "b.png": "dog, brown; old"}
    said = f"sep={separator}\r\n".encode() + data
    assert table_of(as_manifest(tmp_path, said)) == table_of(source)


def test_blanks_around_cells_do_not_count_and_are_told_once(tmp_path, caplog):
    text = 'path , label\na.png, red\n b.png,red \nc.png, "red, dark"\nd.png, "red, dark" \n'
    expected = {"a.png": "red", "b.png": "red", "c.png": "red, dark", "d.png": "red, dark"}
    assert table_of(as_manifest(tmp_path, text)) == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"{str(tmp_path / 'm.csv')!r} has blanks around its cells: they are left out."
    ]
    write_images(tmp_path, " a.png")  # a file's name may begin with one
    assert as_manifest(tmp_path, "path,label\n a.png,red\n").ids == [" a.png"]


GAPS = ["", "-1", "nan", "NaN", "NA", "N/A", "<NA>", "None", "null"]


def test_missing_labels_are_missing_in_every_kind_of_table(tmp_path):
    text = "".join(f"{row}.png,{gap}\n" for row, gap in enumerate(GAPS))
    assert table_of(as_manifest(tmp_path, f"path,label\n{text}x.png,none\n"))["x.png"] == "none"
    for gap in [*GAPS, None, -1, -1.0, float("nan")]:
        rows = [{"path": "a.png", "label": gap}]
        kinds = [".csv", ".jsonl", ".parquet"] if isinstance(gap, str) else [".jsonl", ".parquet"]
        for suffix in kinds:
            assert Manifest(write_manifest(tmp_path / f"m{suffix}", rows)).labels is None
        pack = write_pack(tmp_path / "p.parquet", label=[gap])
        assert ParquetImages(pack).labels is None


def test_whole_floats_are_integers_in_every_kind_of_table(tmp_path):
    assert as_manifest(tmp_path, "path,label\na.png,10.0\nb.png,\nc.png,9.0\nd.png,2\n").label_names == [
        "2", "9", "10",
    ]  # fmt: skip
    assert as_manifest(tmp_path, "path,label\na.png,1.0\nb.png,1.5\n").label_names == ["1.0", "1.5"]
    rows = [{"path": "a.png", "label": 10.0}, {"path": "b.png", "label": None}, {"path": "c.png", "label": 9.0}]
    for suffix in (".jsonl", ".parquet"):
        source = Manifest(write_manifest(tmp_path / f"m{suffix}", rows))
        assert (source.label_names, source.labels.tolist()) == (["9", "10"], [1, -1, 0])
    assert ParquetImages(write_pack(tmp_path / "p.parquet", label=[10.0, None, 9.0])).label_names == ["9", "10"]


def test_folders_may_be_called_what_tables_call_missing(tmp_path):
    write_images(tmp_path, "NA/a.png", "-1/b.png", "None/c.png")
    assert ImageFolder(tmp_path).label_names == ["-1", "NA", "None"]


def test_another_column_of_paths_and_of_labels(tmp_path, caplog):
    write_images(tmp_path, "a.png")
    for suffix in (".csv", ".jsonl", ".parquet"):
        path = write_manifest(tmp_path / f"m{suffix}", [{"file_name": "a.png", "Label": "x"}])
        with pytest.raises(DataError, match="say path_column='file_name'"):
            Manifest(path)
        assert Manifest(path, path_column="file_name").labels is None
        assert "say label='Label' (--label-column Label)" in caplog.text
        caplog.clear()
        source = open_source(path, path_column="file_name", label="Label")
        assert (source.ids, source.label_names, values(source)) == (["a.png"], ["x"], [0])
        with pytest.raises(DataError, match=r"no column 'label2'.* Column 'Label' may hold the labels"):
            Manifest(path, path_column="file_name", label="label2")


def test_labels_are_composed_as_one_class(tmp_path):
    text = f"path,label\na.png,{unicodedata.normalize('NFD', 'café')}\nb.png,café\n"
    assert as_manifest(tmp_path, text).label_names == ["café"]


def test_lists_of_paths_with_labels_behind_them(tmp_path):
    write_images(tmp_path, "odd.png dir/x.png")
    lines = [
        "a.png 10",
        "my dir/b c.JPG 9",
        "d.png golden retriever",
        "e.png",
        "my dir/f g.png",
        "IM0001 2",
        "IM0002",
        "odd.png dir/x.png",
        "tab stop.png\tcat",
        "h.png -1",
        "",
    ]
    expected = {
        "a.png": "10",
        "my dir/b c.JPG": "9",
        "d.png": "golden retriever",
        "e.png": None,
        "my dir/f g.png": None,
        "IM0001": "2",
        "IM0002": None,
        "odd.png dir/x.png": None,
        "tab stop.png": "cat",
        "h.png": None,
    }
    assert table_of(as_manifest(tmp_path, "\n".join(lines), "m.txt")) == expected
    assert table_of(as_manifest(tmp_path, "path label\na.png x\n", "m.txt")) == {"a.png": "x"}
    assert values(as_manifest(tmp_path, "odd.png dir/x.png 3\n", "m.txt")) == [0]


def test_addresses_homes_and_backslashes_are_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_images(tmp_path, "home/a b.png", "dir/b.png", "back\\slash.png", "~tilde.png")
    home = (tmp_path / "home").as_uri()
    rows = [
        {"path": path} for path in (f"{home}/a%20b.png", "~/a b.png", "dir\\b.png", "back\\slash.png", "~tilde.png")
    ]
    source = Manifest(write_manifest(tmp_path / "m.csv", rows))
    assert source.ids == sorted(row["path"] for row in rows)
    assert dict(zip(source.ids, values(source), strict=True)) == {
        row["path"]: value for row, value in zip(rows, [0, 0, 1, 2, 3], strict=True)
    }


# ---- parquet packs


def write_pack(path, **columns):
    count = len(next(iter(columns.values())))
    images = columns.pop("image", [image_bytes(value) for value in range(count)])
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=2)
    return path


@pytest.fixture
def pack(tmp_path):
    return write_pack(
        tmp_path / "pack.parquet",
        label=["n2", "n1", "n2", "n1", "n3"],
        name=["a dog", "cat", "a dog", "cat", "eel"],
        split=["train", "train", "test", "test", "train"],
        source=["e", "d", "c", "b", "a"],
    )


def test_a_pack_is_sorted_by_source_and_named_by_name(pack):
    source = ParquetImages(pack)
    assert source.ids == ["a", "b", "c", "d", "e"]
    assert values(source) == [4, 3, 2, 1, 0]
    assert source.labels.tolist() == [2, 0, 1, 0, 1]
    assert source.label_names == ["cat", "a dog", "eel"]
    assert source.label_values == ["n1", "n2", "n3"]


def test_a_split_of_a_pack(pack):
    source = ParquetImages(pack, "test")
    assert (source.ids, values(source), source.label_names) == (["b", "c"], [3, 2], ["cat", "a dog"])
    with pytest.raises(UsageError, match=r"'tset'. Did you mean 'test'\? Known: test, train"):
        ParquetImages(pack, "tset")


def test_names_that_are_not_one_per_label_are_not_used(tmp_path):
    path = write_pack(tmp_path / "p.parquet", label=["x", "x", "y"], name=["one", "two", "three"])
    assert ParquetImages(path).label_names == ["x", "y"]


def test_other_columns_may_be_chosen(tmp_path):
    path = write_pack(tmp_path / "p.parquet", picture=[image_bytes(9)], kind=["k"], key=["K"], image=["no bytes"])
    source = ParquetImages(path, image="picture", label="kind", id="key")
    assert (source.ids, source.label_names, values(source)) == (["K"], ["k"], [9])


def test_row_numbers_are_ids_where_there_is_no_column(tmp_path):
    source = ParquetImages(write_pack(tmp_path / "p.parquet", x=list(range(11))))
    assert source.ids == [f"{row:02d}" for row in range(11)]
    assert (values(source), source.labels) == (list(range(11)), None)


def test_repeated_ids_are_numbered(tmp_path):
    source = ParquetImages(write_pack(tmp_path / "p.parquet", source=["a", "b", "a", "a#2", None, "a"]))
    assert source.ids == ["4", "a", "a#2", "a#3", "a#4", "b"]
    assert values(source) == [4, 0, 3, 2, 5, 1]


def test_structs_with_bytes_and_rows_without(tmp_path):
    images = [{"bytes": image_bytes(5), "path": None}, {"bytes": None, "path": "x.png"}, None]
    source = ParquetImages(write_pack(tmp_path / "p.parquet", label=[1, 2, 1], image=images))
    assert source.open(0).getpixel((0, 0)) == (5, 0, 0)
    for row in (1, 2):
        with pytest.raises(ImageError, match=rf"p\.parquet: {row}' .*holds no bytes"):
            source.open(row)


def test_a_broken_image_in_a_pack_is_named(tmp_path):
    source = ParquetImages(write_pack(tmp_path / "p.parquet", id=["x"], image=[b"<html>"]))
    with pytest.raises(ImageError, match=r"p\.parquet: x'.*HTML"):
        source.open(0)


def test_bad_packs_are_named(tmp_path):
    with pytest.raises(MissingDataError, match=r"none\.parquet"):
        ParquetImages(tmp_path / "none.parquet")
    path = write_pack(tmp_path / "p.parquet", label=[1])
    with pytest.raises(DataError, match="no column 'picture'; its columns are 'image', 'label'"):
        ParquetImages(path, image="picture")
    with pytest.raises(DataError, match="no column 'wnid'"):
        ParquetImages(path, label="wnid")
    with pytest.raises(DataError, match="no column 'key'"):
        ParquetImages(path, id="key")
    with pytest.raises(DataError, match=r"'label' .*holds int64"):
        ParquetImages(path, image="label")
    with pytest.raises(UsageError, match="no column 'split'"):
        ParquetImages(path, "test")
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    with pytest.raises(DataError, match=r"p\.parquet' has no rows"):
        ParquetImages(path)


def test_a_pickled_pack_leaves_its_bytes_behind(tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for _ in range(5):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
        images.append(buffer.getvalue())
    source = ParquetImages(write_pack(tmp_path / "p.parquet", label=[1] * 5, image=images))
    source.open(0)
    data = pickle.dumps(source)
    assert len(data) < len(images[0])
    assert pickle.loads(data).open(4).tobytes() == source.open(4).tobytes()


def test_subsets_of_a_pack_share_its_bytes(pack, monkeypatch):
    source, reads = ParquetImages(pack), []
    read = pq.ParquetFile.iter_batches
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", lambda *a, **k: reads.append(1) or read(*a, **k))
    assert values(source.subset([0, 4])) + values(source.subset([1])) + values(source)[:1] == [4, 0, 3, 4]
    assert reads == [1]


def described(file, features, **columns):
    """A parquet file with the features that Hugging Face's data sets describe themselves by."""
    table = pa.table(columns)
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(metadata), file)
    return file


HF = {"img": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["plane", "cat", "dog"]}}


def test_names_and_the_image_column_that_hugging_face_writes(tmp_path):
    images = [{"bytes": image_bytes(value), "path": None} for value in range(4)]
    path = described(tmp_path / "p.parquet", HF, img=images, label=[2, 0, -1, 2])
    source = open_source(path)
    assert (source.label_names, source.label_values) == (["plane", "dog"], [0, 2])
    assert (source.labels.tolist(), values(source)) == ([1, 0, -1, 1], [0, 1, 2, 3])
    write_images(tmp_path, "a.png", "b.png")
    table = described(tmp_path / "m.parquet", HF, path=["a.png", "b.png"], label=[1, 0])
    assert (Manifest(table).label_names, Manifest(table).labels.tolist()) == (["plane", "cat"], [1, 0])
    with pytest.raises(DataError, match="has the label 3 and names for 0 to 2 only"):
        open_source(described(path, HF, img=images, label=[3, 0, 1, 2]))


@pytest.mark.parametrize("with_bytes", [True, False])
def test_a_struct_with_a_path_alone_is_read_from_there(tmp_path, with_bytes):
    write_images(tmp_path / "images", "a.png", "b.png")
    rows = [{"path": "images/b.png"}, {"path": str(tmp_path / "images" / "a.png")}, {"path": "images/c.png"}]
    images = [row | {"bytes": None} for row in rows] if with_bytes else rows
    if with_bytes:
        images.append({"path": "images/a.png", "bytes": image_bytes(9)})
    path = write_pack(tmp_path / "p.parquet", image=images, label=[1] * len(images))
    source = open_source(path)
    assert [source.open(row).getpixel((0, 0))[0] for row in (0, 1)] == [1, 0]
    with pytest.raises(ImageError, match=r"holds no bytes, and there is no file .*c\.png"):
        source.open(2)
    if with_bytes:
        assert source.open(3).getpixel((0, 0))[0] == 9
    before = source.fingerprint
    os.utime(tmp_path / "images" / "a.png", ns=(1, 1))
    assert open_source(path).fingerprint != before


def test_a_folder_of_packs_is_a_source(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    described(folder / "train-00001-of-00002.parquet", HF, img=[image_bytes(2)], label=[2])
    described(folder / "train-00000-of-00002.parquet", HF, img=[image_bytes(0), image_bytes(1)], label=[1, 2])
    described(folder / "test-00000-of-00001.parquet", HF, img=[image_bytes(3)], label=[1])
    source = open_source(folder)
    assert source.ids == [
        "test-00000-of-00001/0",
        "train-00000-of-00002/0",
        "train-00000-of-00002/1",
        "train-00001-of-00002/0",
    ]
    assert (source.label_names, source.labels.tolist(), values(source)) == (["cat", "dog"], [0, 0, 1, 1], [3, 0, 1, 2])
    train = open_source(f"{folder}:train")
    assert (train.ids, values(train)) == (source.ids[1:], [0, 1, 2])
    again = pickle.loads(pickle.dumps(train))
    assert (again.fingerprint, values(again)) == (train.fingerprint, [0, 1, 2])
    assert values(train.subset([2, 0])) == [2, 0]
    with pytest.raises(UsageError, match=r"'trian'. Did you mean 'train'\? Known: test, train"):
        open_source(f"{folder}:trian")
    write_images(folder, "a.png")  # then it is a folder of images, as ever
    assert type(open_source(folder)) is ImageFolder


def test_ids_and_splits_of_the_packs_of_a_folder(tmp_path):
    write_pack(tmp_path / "b.parquet", id=["x", "z"], split=["train", "test"], label=["k", "l"])
    write_pack(tmp_path / "a.parquet", id=["x", "y"], split=["train", "train"], label=["m", "k"])
    source = open_source(tmp_path)
    assert (source.ids, source.label_names) == (["x", "x#2", "y", "z"], ["k", "l", "m"])
    assert table_of(source) == {"x": "m", "x#2": "k", "y": "k", "z": "l"}
    assert open_source(f"{tmp_path}:test").ids == ["z"]
    with pytest.raises(UsageError, match="Known: test, train"):
        open_source(f"{tmp_path}:val")


def test_a_column_of_paths_in_the_place_of_images(tmp_path):
    write_images(tmp_path, "a.png")
    path = write_pack(tmp_path / "p.parquet", image=["a.png"])
    with pytest.raises(DataError, match=r"holds string.* path_column='image'"):
        open_source(path)
    assert values(open_source(path, path_column="image")) == [0]


# ---- images in memory


def test_images_in_memory():
    images = [Image.new("L", (2, 2), value) for value in range(12)]
    source = PILImages(images, ["b", "a"] * 6)
    assert source.ids[:3] == ["00", "01", "02"]
    assert (source.labels[:2].tolist(), source.label_names) == ([1, 0], ["a", "b"])
    assert values(source) == list(range(12))
    assert source.open(0).mode == "RGB"


def test_labels_in_memory_may_be_indices_of_names():
    source = PILImages([Image.new("L", (2, 2))] * 4, np.array([2, -1, 0, 2]), label_names=["x", "y", "z"])
    assert (source.labels.tolist(), source.label_names) == ([2, -1, 0, 2], ["x", "y", "z"])
    with pytest.raises(DataError, match="Label 3 is no index into the 2"):
        PILImages([Image.new("L", (2, 2))], [3], label_names=["x", "y"])


def test_bad_images_in_memory():
    image = Image.new("L", (2, 2))
    with pytest.raises(DataError, match="empty list"):
        PILImages([])
    with pytest.raises(TypeError, match="ndarray"):
        PILImages([np.zeros((2, 2))])
    with pytest.raises(DataError, match="2 images were given with 1 labels"):
        PILImages([image, image], ["a"])
    with pytest.raises(DataError, match="'a' occurs more than once"):
        PILImages([image, image], ids=["a", "a"])
    with pytest.raises(ImageError, match=r"'0'.*max_pixels is 3"):
        PILImages([image]).open(0, max_pixels=3)
    broken = Image.open(io.BytesIO(image_bytes(1)[:50]))
    with pytest.raises(ImageError, match="'0' cannot be read"):
        PILImages([broken]).open(0)


# ---- what all sources share


def test_subsets_keep_order_and_labels(pack):
    source = ParquetImages(pack)
    part = source.subset(np.array([3, 0]))
    assert (part.ids, part.labels.tolist(), part.label_names) == (["d", "a"], [0, 2], source.label_names)
    assert values(part) == [1, 4]
    assert source.subset(source.labels == 1).ids == source.subset([2, -1]).ids == ["c", "e"]
    assert source.subset(slice(1, 3)).ids == ["b", "c"]
    assert (len(source.subset([])), len(source)) == (0, 5)
    with pytest.raises(IndexError):
        source.subset([5])


def test_the_fingerprint_follows_ids_bytes_and_labels(tmp_path):
    write_images(tmp_path, "cat/a.png", "dog/b.png")
    first = ImageFolder(tmp_path).fingerprint
    assert ImageFolder(tmp_path).fingerprint == first
    assert ImageFolder(tmp_path).subset([0]).fingerprint != first
    stamp = os.stat(tmp_path / "cat" / "a.png").st_mtime_ns
    os.utime(tmp_path / "cat" / "a.png", ns=(stamp, stamp + 1))
    touched = ImageFolder(tmp_path).fingerprint
    (tmp_path / "cat").rename(tmp_path / "cow")
    renamed = ImageFolder(tmp_path).fingerprint
    relabelled = ImageFolder(tmp_path).with_labels_from(["dog", "cow"]).fingerprint
    assert len({first, touched, renamed, relabelled}) == 4


def test_the_fingerprint_of_packs_and_images(pack):
    prints = {ParquetImages(pack, split).fingerprint for split in (None, "train", "test")}
    assert len(prints) == 3
    whole = write_pack(pack.with_name("whole.parquet"), split=["test"])
    assert ParquetImages(whole).fingerprint != ParquetImages(whole, "test").fingerprint
    black, white = Image.new("L", (2, 2)), Image.new("L", (2, 2), 255)
    prints = {PILImages(*given).fingerprint for given in [([black],), ([white],), ([black], ["a"]), ([black], ["b"])]}
    assert len(prints) == 4
    assert PILImages([black] * 2, ["a", "b"]).fingerprint != PILImages([black] * 2, ["b", "a"]).fingerprint
    assert PILImages([black]).fingerprint == PILImages([black.convert("RGB")]).fingerprint


def test_labels_are_matched_by_name():
    mapping, unknown = match_labels(["ring_tail", "fox", "cat"], ["cat", "ring tail", "cat"])
    assert (mapping.tolist(), unknown) == ([1, -1, 0], ["fox"])
    mapping, unknown = match_labels([unicodedata.normalize("NFD", "café"), " ring  tail"], ["ring_tail", "café"])
    assert (mapping.tolist(), unknown) == ([1, 0], [])


def test_labels_by_position_in_class_names(pack):
    source = ParquetImages(pack).with_labels_from(["a_dog", "cat"])
    assert (source.labels.tolist(), source.label_names) == ([-1, 1, 0, 1, 0], ["a_dog", "cat"])
    assert ParquetImages(pack).labels.tolist() == [2, 0, 1, 0, 1]
    with pytest.raises(DataError, match="no labels"):
        PILImages([Image.new("L", (2, 2))]).with_labels_from(["cat"])


def test_every_source_survives_pickling(tmp_path, pack):
    write_images(tmp_path / "images", "cat/a.png", "dog/\udcff.png")
    manifest = write_manifest(tmp_path / "images" / "m.csv", [{"path": "cat/a.png", "label": "x"}])
    folder = ImageFolder(tmp_path / "images")
    memory = PILImages([Image.new("RGB", (2, 2), (8, 0, 0))], ["y"])
    for source in (folder, Manifest(manifest), ParquetImages(pack, "test"), memory, FewShot(folder, 1, 1)):
        again = pickle.loads(pickle.dumps(source))
        assert (again.ids, again.fingerprint) == (source.ids, source.fingerprint)
        assert values(again) == values(source)


def test_what_a_command_line_names(tmp_path, pack):
    write_images(tmp_path / "images", "a.png")
    manifest = write_manifest(tmp_path / "m.csv", [{"path": "a.png"}])
    table = write_manifest(tmp_path / "m.parquet", [{"path": "a.png"}])
    pack.rename(tmp_path / "odd:name.parquet")
    pack = tmp_path / "odd:name.parquet"
    kinds = {tmp_path / "images": ImageFolder, manifest: Manifest, table: Manifest, pack: ParquetImages}
    for path, kind in kinds.items():
        assert type(open_source(path)) is type(open_source(str(path))) is kind
    assert open_source(f"{pack}:test").ids == ["b", "c"]
    assert open_source([Image.new("L", (2, 2))]).ids == ["0"]
    source = open_source(pack)
    assert open_source(source) is source


def test_sources_that_cannot_be_opened(tmp_path, pack):
    for missing in ("nowhere", "none.csv", "none.parquet:test"):
        with pytest.raises(MissingDataError, match=missing.partition(":")[0]):
            open_source(str(tmp_path / missing))
    with pytest.raises(UsageError, match="'val'"):
        open_source(f"{pack}:val")
    (tmp_path / "a.doc").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.doc' is no manifest"):
        open_source(tmp_path / "a.doc")


def test_one_image_file_is_a_source_of_one(tmp_path):
    write_images(tmp_path, "a.png", "b.jfif", "bare")
    (tmp_path / "broken.jpg").write_bytes(b"<html>")
    for value, name in enumerate(("a.png", "b.jfif", "bare")):
        source = open_source(tmp_path / name)
        assert (source.ids, values(source), source.labels) == ([name], [value], None)
    with pytest.raises(ImageError, match=r"broken\.jpg'.*HTML"):
        open_source(tmp_path / "broken.jpg").open(0)


# ---- how images are read


def words_png(path, values):
    Image.fromarray(np.asarray(values, np.uint16)).save(path)


def test_a_value_range_belongs_to_the_source(tmp_path, pack):
    words_png(tmp_path / "a.png", [[0, 2048, 4095]])
    (tmp_path / "m.csv").write_text("path\na.png\n")
    table = pa.table({"image": [(tmp_path / "a.png").read_bytes()]})
    pq.write_table(table, tmp_path / "p.parquet")
    makers = [
        lambda **options: ImageFolder(tmp_path, **options),
        lambda **options: Manifest(tmp_path / "m.csv", **options),
        lambda **options: ParquetImages(tmp_path / "p.parquet", **options),
        lambda **options: PILImages([Image.fromarray(np.array([[0, 2048, 4095]], np.uint16))]).reading(**options),
        lambda **options: open_source(tmp_path / "a.png", **options),
    ]
    for make in makers:
        plain, ranged = make(), make(value_range=(0, 4095))
        assert np.asarray(plain.open(0))[0, :, 0].tolist() == [0, 8, 15]
        assert np.asarray(ranged.open(0))[0, :, 0].tolist() == [0, 128, 255]
        assert np.asarray(plain.open(0, value_range=(0, 4095)))[0, :, 0].tolist() == [0, 128, 255]
        prints = {plain.fingerprint, ranged.fingerprint, make(value_range=(0, 4094)).fingerprint}
        assert len(prints) == 3
        assert plain.reading(value_range=(0, 4095)).fingerprint == ranged.fingerprint
        with pytest.raises(UsageError, match=r"value_range=\(9, 1\)"):
            make(value_range=(9, 1))


def test_sources_of_sources_heed_how_those_are_read(tmp_path):
    os.makedirs(tmp_path / "cat")
    words_png(tmp_path / "cat" / "a.png", [[0, 2048, 4095]])
    folder = ImageFolder(tmp_path)

    def wrapped(source):
        return [
            FewShot(source, 1, 1),
            JoinedSources({"one": source}),
            Views(source, 1, size=(1, 3), scale=(1.0, 1.0)),
            source.subset([0]),
        ]

    inside = wrapped(folder.reading(value_range=(0, 4095), max_pixels=2))
    for plain, inner in zip(wrapped(folder), inside, strict=True):
        outer = plain.reading(value_range=(0, 4095), max_pixels=3)
        assert np.asarray(plain.open(0)).max() < 16
        assert np.asarray(outer.open(0)).max() > 100
        with pytest.raises(ImageError, match="max_pixels is 2"):
            inner.open(0)
        assert np.asarray(inner.open(0, max_pixels=3)).max() > 100
        assert len({plain.fingerprint, outer.fingerprint, inner.fingerprint}) >= 2
        assert plain.fingerprint not in (outer.fingerprint, inner.fingerprint)


def test_a_limit_of_pixels_belongs_to_the_source(tmp_path):
    write_images(tmp_path, "a.png")
    source = ImageFolder(tmp_path)
    assert source.reading() is source
    assert source.reading(max_pixels=12).open(0).size == (4, 3)
    with pytest.raises(ImageError, match="4 x 3 pixels and max_pixels is 11"):
        source.reading(max_pixels=11).open(0)
    with pytest.raises(UsageError, match="max_pixels=0 must be at least 1"):
        source.reading(max_pixels=0)


def test_importing_the_package_is_light():
    heavy = "{'torch', 'pyarrow', 'pandas', 'rich', 'sklearn'}"
    code = f"import sys, ood_core.data; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
