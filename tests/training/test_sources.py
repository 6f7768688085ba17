import gzip
import json
import sys
import tracemalloc
import types

import pytest

from metalens.training.data import documents, find_sources, readers


def texts(*names, **options):
    return list(documents(find_sources(list(names), **options)))


def lines(*records):
    return "".join(json.dumps(r) + "\n" for r in records)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def test_a_text_is_one_document_as_it_is(tmp_path):
    assert texts(write(tmp_path / "a.txt", "one\r\n\r\ntwö \n")) == ["one\r\n\r\ntwö \n"]
    assert texts(write(tmp_path / "README", "no ending")) == ["no ending"]
    assert texts(write(tmp_path / "b.txt.gz", "packed")) == ["packed"]
    assert texts(write(tmp_path / "c.txt", b"\xef\xbb\xbfmarked")) == ["marked"]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json-lines", ".ndjson", ".json"])
def test_json_lines(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", lines({"text": "one\ntwo", "id": 1}) + "\n" + lines({"text": ""}, {"text": "thrée"}))
    assert texts(path) == ["one\ntwo", "", "thrée"]


def test_another_field(tmp_path):
    assert texts(write(tmp_path / "a.jsonl", lines({"text": "no", "body": "yes"})), field="body") == ["yes"]


def test_a_folder_is_read_in_order_with_what_is_below_it(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/.hidden/d.txt", ".e.txt", "notes.md"):
        write(tmp_path / name, name)
    write(tmp_path / "b.jsonl", lines({"text": "from json"}))
    assert texts(tmp_path) == ["a.txt", "from json", "b.txt", "sub/c.txt"]
    assert texts(tmp_path / "b.txt", tmp_path / "sub", str(tmp_path / "b.txt")) == ["b.txt", "sub/c.txt", "b.txt"]


@pytest.mark.parametrize("text", ["word " * 50, "line\n" * 50, "a\n\nb\n" * 40, "长" * 200, "é\n" + "x" * 150 + " y", "\n" * 100 + "a"])
def test_a_long_text_comes_in_parts_that_are_one_document(tmp_path, monkeypatch, text):
    monkeypatch.setattr(readers, "BLOCK", 16)
    path = write(tmp_path / "a.txt", text)
    (source,) = find_sources(path)
    pieces = list(source.pieces())
    assert len(pieces) > 1
    assert "".join(p.text for p in pieces) == text
    assert [p.starts for p in pieces] == [True] + [False] * (len(pieces) - 1)
    assert max(len(p.text) for p in pieces) <= 2 * 16
    assert texts(path, path) == [text, text]


@pytest.mark.parametrize(
    ("text", "end"),
    [("one\ntwo\nthree four", 8), ("one\n\ntwo three", 5), ("one two three", 7), ("one\ntwo\n\nthree", 4), ("onetwo", 6), (" one", 4), ("\nx", 1)],
)
def test_texts_are_cut_where_words_do_not_change(text, end):
    assert readers.cut(text) == end


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a\.txt is empty"),
        ("a.txt", " \n ", r"a\.txt is empty"),
        ("a.txt", b"good\ngo\xc3\xa4d\nb\xffd", r"a\.txt, line 3: not UTF-8 .*Convert"),
        ("a.txt", b"cut off \xc3", r"a\.txt, line 1: not UTF-8"),
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": ', r"a\.jsonl, line 3: not JSON"),
        ("a.jsonl", '{"body": "a", "id": 3}', r"a\.jsonl, line 1: there is no field 'text'; there are 'body', 'id'\. Name"),
        ("a.jsonl", "{}", r"there is no field 'text'; there are none"),
        ("a.jsonl", '{"text": null}', r"field 'text' must be text, got NoneType"),
        ("a.jsonl", '["a"]', r"a\.jsonl, line 1: expected one JSON object per line.*got list"),
        ("a.jsonl", r'{"text": "\ud800"}', r"a\.jsonl, line 1: not Unicode text"),
    ],
)
def test_errors_name_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        texts(write(tmp_path / name, content))


def test_the_line_of_an_error_is_counted_over_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK", 7)
    with pytest.raises(ValueError, match="line 21: not UTF-8"):
        texts(write(tmp_path / "a.txt", b"\xc3\xa4bc\n" * 20 + b"\xff"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_beyond_the_limit_is_named_and_not_read(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(readers, "LONGEST_LINE", 2 << 20)
    longest = {"text": "x" * ((2 << 20) - len('{"text": ""}') - 1)}
    content = lines({"text": "short"}, longest).encode()
    assert len(content.splitlines(keepends=True)[1]) == 2 << 20
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    assert len("".join(texts(path))) == len("short") + len(longest["text"])
    content += lines({"text": "short"}).encode() + b'{"text": "' + b"x" * (20 << 20)
    path.write_bytes(gzip.compress(content) if suffix else content)
    taken = []
    with monkeypatch.context() as patch:
        patch.setattr(readers.json, "loads", lambda line: taken.append(len(line)) or {"text": ""})
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"a\.jsonl(\.gz)?, line 4: longer than 2 MiB, the limit of a line\. Divide that document"):
            texts(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(taken) == 3
    assert peak < 12 << 20  # the line has 20 MiB


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_damaged_compression(tmp_path, name):
    whole = gzip.compress(lines(*[{"text": str(i)} for i in range(3000)]).encode())
    for data in (whole[: len(whole) // 2], b"not gzip at all"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="is damaged or cut off"):
            texts(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="There is no file or folder"):
        find_sources(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="There is no file or folder"):
        find_sources("missing.jsonl")
    with pytest.raises(ValueError, match="There is no file or folder"):
        find_sources(tmp_path / "owner" / "name")
    with pytest.raises(ValueError, match=r"no text in the folder.*\.parquet"):
        find_sources(tmp_path)
    with pytest.raises(ValueError, match="No text was given"):
        find_sources([])


def test_a_file_is_known_by_its_content(tmp_path):
    a, b, c = write(tmp_path / "a.jsonl", "{}"), write(tmp_path / "b.jsonl", "{}"), write(tmp_path / "c.jsonl", "[]")
    one, same, other = (find_sources(p)[0].identity() for p in (a, b, c))
    assert one == same != other
    assert find_sources(a, field="body")[0].identity() != one
    assert json.loads(json.dumps(one)) == one


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    class Memory(dict):
        recall = dict.get
        remember = dict.__setitem__

    memory, path = Memory(), write(tmp_path / "a.txt", "one")
    first = find_sources(path)[0].identity(memory)
    assert not memory  # too young: it could change within the same tick of the clock
    monkeypatch.setattr(readers, "SETTLED", -1)
    find_sources(path)[0].identity(memory)
    assert len(memory) == 1
    with monkeypatch.context() as context:
        context.setattr("hashlib.file_digest", None)
        assert find_sources(path)[0].identity(memory) == first
    write(path, "two")
    assert find_sources(path)[0].identity(memory)["sha256"] != first["sha256"]


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path / "a.txt", "one")
    (source,) = find_sources(path)
    source.identity()
    source.require_unchanged()
    write(path, "longer")
    with pytest.raises(ValueError, match="changed while it was read"):
        source.require_unchanged()


class TestParquet:
    @pytest.fixture
    def table(self, tmp_path):
        arrow = pytest.importorskip("pyarrow", reason="pyarrow is optional and not installed")
        parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is optional and not installed")

        def make(**columns):
            parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
            return tmp_path / "a.parquet"

        return make

    def test_rows_are_documents(self, table):
        rows = [f"row {i}" for i in range(700)]
        assert texts(table(text=rows, id=list(range(700)))) == rows
        assert texts(table(text=["no"], body=["yes"]), field="body") == ["yes"]

    def test_errors(self, table, tmp_path):
        with pytest.raises(ValueError, match=r"a\.parquet: there is no column 'text'; there are 'body'"):
            texts(table(body=["a"]))
        with pytest.raises(ValueError, match=r"a\.parquet, row 2: field 'text' must be text, got NoneType"):
            texts(table(text=["a", None]))
        with pytest.raises(ValueError, match=r"a\.parquet is empty"):
            texts(table(text=[]))
        with pytest.raises(ValueError, match="can't be read as Parquet"):
            texts(write(tmp_path / "b.parquet", "no table"))

    def test_without_pyarrow(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ValueError, match=r"needs pyarrow.*metalens\[data\]"):
            texts(write(tmp_path / "a.parquet", "any"))


class TestHub:
    """Against stand-ins for the packages: the tests have no network."""

    @pytest.fixture
    def hub(self, monkeypatch):
        calls = types.SimpleNamespace(loads=[], asked=[], rows=[{"text": "one"}, {"text": "two"}], commit="c" * 40, offline=False, load_error=None)

        class HfApi:
            def dataset_info(self, name, revision):
                calls.asked.append((name, revision))
                if calls.offline:
                    raise ConnectionError("no route")
                return types.SimpleNamespace(sha=calls.commit)

        def load_dataset(*args, **kwargs):
            calls.loads.append((args, kwargs))
            if calls.load_error:
                raise calls.load_error
            return calls.rows

        monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
        monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(HfApi=HfApi))
        return calls

    def test_rows_are_streamed_at_one_commit(self, hub):
        (source,) = find_sources("owner/name:part@v2", split="validation", field="text")
        assert source.identity() == {
            "kind": "hub",
            "dataset": "owner/name",
            "configuration": "part",
            "commit": hub.commit,
            "split": "validation",
            "field": "text",
        }
        assert list(documents([source])) == ["one", "two"]
        assert hub.asked == [("owner/name", "v2")]
        assert hub.loads == [(("owner/name", "part"), {"split": "validation", "revision": hub.commit, "streaming": True})]

    @pytest.mark.parametrize("name", ["owner/name", "hf:owner/name", "name"])
    def test_the_default_is_the_main_branch(self, hub, name):
        (source,) = find_sources(name)
        source.identity()
        assert hub.asked == [(name.removeprefix("hf:"), "main")]

    def test_a_commit_need_not_be_asked_for(self, hub):
        assert find_sources("owner/name@" + "a" * 40)[0].identity()["commit"] == "a" * 40
        assert not hub.asked

    def test_without_a_connection_the_last_commit_is_used(self, hub, caplog):
        class Memory(dict):
            recall = dict.get
            remember = dict.__setitem__

        memory = Memory()
        first = find_sources("owner/name")[0].identity(memory)
        hub.offline = True
        assert find_sources("owner/name")[0].identity(memory) == first
        assert "using the revision of the last time" in caplog.text
        with pytest.raises(ValueError, match="no file or folder 'owner/other'.*no route"):
            find_sources("owner/other")[0].identity(memory)

    def test_errors(self, hub):
        hub.rows = [{"body": "a"}]
        with pytest.raises(ValueError, match=r"owner/name@main \(train\), row 1: there is no field 'text'; there are 'body'"):
            texts("owner/name")
        hub.rows = []
        with pytest.raises(ValueError, match="is empty. Name another split"):
            texts("owner/name")
        hub.load_error = ValueError("Bad split: train. Available splits: ['test']")
        with pytest.raises(ValueError, match="can't be read: Bad split.*Check the name"):
            texts("owner/name")

    def test_a_connection_that_breaks(self, hub):
        def rows():
            yield {"text": "one"}
            raise ConnectionError("reset")

        hub.rows = rows()
        with pytest.raises(ValueError, match="can't be read: reset"):
            texts("owner/name")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"no file or folder 'owner/name'.*metalens\[data\]"):
            texts("owner/name")


@pytest.mark.parametrize("content", ["ASCII as UTF-16".encode("utf-16-le"), b"text\0and more", b"\0" * 100])
def test_nul_characters_are_no_text(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.txt: it holds NUL characters.*UTF-16.*Convert it to UTF-8"):
        texts(write(tmp_path / "a.txt", content))


def test_an_error_of_the_system_names_the_file(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    for name in ("/proc/self/mem", str(tmp_path / "a.jsonl")):
        with pytest.raises(OSError, match=name):
            texts(name)
    (source,) = find_sources(["/proc/self/mem"])
    with pytest.raises(OSError, match="/proc/self/mem"):  # while its content is hashed
        source.identity()


@pytest.mark.parametrize("damage", ["page", "not UTF-8"])
def test_damaged_parquet_names_the_file(tmp_path, damage):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    content = ["words " * 50] * 500 if damage == "page" else [b"\xff\xfe"]
    column = arrow.array(content) if damage == "page" else arrow.Array.from_buffers(arrow.string(), 1, arrow.array(content, arrow.binary()).buffers())
    parquet.write_table(arrow.table({"text": column}), path, compression="snappy")
    if damage == "page":
        data = bytearray(path.read_bytes())
        data[20:60] = bytes(40)
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet can't be read as Parquet"):
        texts(path)
