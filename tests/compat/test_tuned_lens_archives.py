"""Archives and older files that are not what torch writes: refused, or read as torch reads them."""

import io
import itertools
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest

from metalens.compat import tuned_lens as files
from metalens.lenses.pickled import read
from metalens.lenses.torch_file import LEGACY_MAGIC, PICKLE_LIMIT
from support.tuned_lens_files import DATA, LEGACY, PICKLE, RECORDS, ZIP, legacy, refused, zipped


def test_a_compressed_archive_is_refused_before_it_is_unpacked(folder):
    """A zip bomb: 64 MB of zeros in 64 KB."""
    bomb = zipped(RECORDS | {"params/data/0": bytes(1 << 26)}, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    refused(folder, bomb, "compressed or encrypted")
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_records_that_are_larger_than_the_file(folder):
    """The same bytes under many names, as in archives whose records overlap."""
    content = bytearray(ZIP)
    at = content.index(b"PK\x01\x02")
    while at >= 0:
        name = struct.unpack_from("<H", content, at + 28)[0]
        if content[at + 46 : at + 46 + name].endswith(b"data/0"):
            struct.pack_into("<II", content, at + 20, 1 << 30, 1 << 30)
        at = content.find(b"PK\x01\x02", at + 4)
    refused(folder, bytes(content), "larger than the file")


@pytest.mark.parametrize(
    ("records", "message"),
    {
        "two of a name": ([*RECORDS.items(), ("params/data/0", RECORDS["params/data/0"])], "same name"),
        "two pickles": (RECORDS | {"other/data.pkl": PICKLE}, "or several"),
        "no pickle": ({k: v for k, v in RECORDS.items() if k != "params/data.pkl"}, "no <name>/data.pkl"),
        "a pickle at the root": ({k.removeprefix("params/"): v for k, v in RECORDS.items()}, "no <name>/data.pkl"),
        "a pickle too deep": ({f"a/{k}": v for k, v in RECORDS.items()}, "no <name>/data.pkl"),
        "a large pickle": (RECORDS | {"params/data.pkl": PICKLE + bytes(PICKLE_LIMIT)}, "data.pkl has .* more than"),
        "no version": ({k: v for k, v in RECORDS.items() if k != "params/version"}, "version"),
        "version 99": (RECORDS | {"params/version": b"99\n"}, "unknown version"),
        "version of words": (RECORDS | {"params/version": b"three"}, "not a tuned lens file"),
        "a long version": (RECORDS | {"params/version": b"3" * 5000}, "version has 5000 bytes"),
        "an order of bytes of its own": (RECORDS | {"params/byteorder": b"middle"}, "order of bytes"),
        "a lost storage": ({k: v for k, v in RECORDS.items() if k != "params/data/3"}, "not a tuned lens file"),
        "an archive in the archive": ({"params/data.pkl": ZIP, "params/version": b"3"}, "not a tuned lens file"),
        "no records": ({}, "not a tuned lens file"),
    }.values(),
    ids=lambda value: None,
)
def test_archives_of_other_shapes(folder, records, message):
    refused(folder, zipped(records), message)


def test_archives_with_surplus_records_are_read(folder):
    """torch adds one from time to time (.format_version, .data/serialization_id)."""
    (folder / "params.pt").write_bytes(zipped(RECORDS | {"params/.new": b"x", "params/extra/lens.zip": ZIP}))
    files.load(folder)


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_orders_of_bytes(folder, order):
    records = {}
    for name, content in RECORDS.items():
        records[name] = np.frombuffer(content, "<f4").astype(order + "f4").tobytes() if "/data/" in name else content
    (folder / "params.pt").write_bytes(zipped(records | {"params/byteorder": b"little" if order == "<" else b"big"}))
    for found, expected in zip(files.load(folder).translators, files.load(DATA / "zip-float32").translators, strict=True):
        np.testing.assert_array_equal(np.array(found.weight), np.array(expected.weight))


def test_archives_without_an_order_are_little_endian(folder):
    (folder / "params.pt").write_bytes(zipped({k: v for k, v in RECORDS.items() if not k.endswith("byteorder")}))
    files.load(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"version https://git-lfs.github.com/spec/v1\n",
        bytes(1000),
        np.lib.format.MAGIC_PREFIX + bytes(100),
        b"\x1f\x8b\x08" + bytes(50),
        pickle.dumps({"0.weight": [1.0]}),
        pickle.dumps(LEGACY_MAGIC, 2),
        pickle.dumps(LEGACY_MAGIC, 2) + pickle.dumps(1002, 2),
    ],
    ids=range(9),
)
def test_files_of_other_kinds(folder, content):
    refused(folder, content)


def test_a_folder_in_place_of_the_file(folder):
    (folder / "params.pt").mkdir()
    with pytest.raises(FileNotFoundError, match="No lens at"):
        files.load(folder, repo_id="not a repository")


@pytest.mark.parametrize("value", [3, None, "x", [], {"0.weight": 1}, {"0.weight": (1, 2)}], ids=str)
def test_pickles_of_other_objects(folder, value):
    refused(folder, zipped(RECORDS | {"params/data.pkl": pickle.dumps(value, 2)}))


# ---------------------------------------------------------------- the older format


def legacy_parts():
    """The five pickles of the older fixture, and what comes after them."""
    stream = io.BytesIO(LEGACY)
    ends = [0]
    for _ in range(5):
        read(stream)
        ends.append(stream.tell())
    return [LEGACY[a:b] for a, b in itertools.pairwise(ends)], LEGACY[ends[-1] :]


def test_the_older_format_is_read_to_its_end(folder):
    pickles, data = legacy_parts()
    (folder / "params.pt").write_bytes(legacy(*pickles, after=data))
    files.load(folder)
    refused(folder, legacy(*pickles, after=data + b"\x00"), "bytes, and its tensors take")
    refused(folder, legacy(*pickles, after=data[:-1]), "bytes, and its tensors take")
    refused(folder, legacy(*pickles), "bytes, and its tensors take")


@pytest.mark.parametrize(
    "change",
    [
        {1: pickle.dumps(1000, 2)},
        {2: pickle.dumps([1], 2)},
        {4: pickle.dumps([], 2)},
        {4: pickle.dumps(["0", "0"], 2)},
        {4: pickle.dumps(["nothing"], 2)},
        {4: pickle.dumps([3], 2)},
        {4: pickle.dumps({}, 2)},
        {3: pickle.dumps([], 2)},
        {3: PICKLE},
    ],
    ids=str,
)
def test_the_older_format_with_other_pickles(folder, change):
    pickles, data = legacy_parts()
    refused(folder, legacy(*[change.get(i, p) for i, p in enumerate(pickles)], after=data))


def test_the_older_format_with_another_size(folder):
    pickles, data = legacy_parts()
    refused(folder, legacy(*pickles, after=struct.pack("<q", 2**62) + data[8:]), "another size")


def test_a_flipped_bit_in_the_numbers_is_noticed(folder):
    """The archive's checksums."""
    content = bytearray(ZIP)
    content[content.index(RECORDS["params/data/2"]) + 5] ^= 4
    refused(folder, bytes(content), "CRC")
    assert zlib.crc32(RECORDS["params/data/2"])
