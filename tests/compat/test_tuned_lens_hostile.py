"""Files that are not what they say: a malicious params.pt does nothing, a damaged one is a ValueError, and neither takes memory."""

import contextlib
import copyreg
import io
import json
import os
import pickle
import struct
import sys
import tracemalloc
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalens import TunedLens
from metalens.compat import tuned_lens as files
from metalens.lenses.pickled import Element, Storage, Tensor, read
from metalens.lenses.torch_file import LEGACY_MAGIC
from support.tuned_lens_files import CONFIG, LEGACY, RECORDS, ZIP, legacy, refused, zipped

# ---------------------------------------------------------------- code in pickles


class Payload:
    """Runs `touch owned` in any unpickler that calls what it is told to."""

    def __reduce__(self):
        return os.system, ("touch owned",)


class StatePayload:
    def __reduce__(self):
        return Payload, (), {"x": Payload()}


class Evaluated:
    def __reduce__(self):
        return eval, ("__import__('os').system('touch owned')",)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


REBUILD, ORDERED = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n"
COMMAND = b"S'touch owned'\n"
PAYLOADS = {
    **{f"reduce, protocol {p}": pickle.dumps(Payload(), p) for p in range(6)},
    **{f"inside a dict, protocol {p}": pickle.dumps({"0.weight": Payload()}, p) for p in range(6)},
    **{f"with a state, protocol {p}": pickle.dumps(StatePayload(), p) for p in range(6)},
    "eval": pickle.dumps(Evaluated(), 2),
    "inst": b"(" + COMMAND + b"ios\nsystem\n.",
    "inst of a name that tensors need": b"(" + COMMAND + b"icollections\nOrderedDict\n.",
    "obj": b"(cos\nsystem\n" + COMMAND + b"o.",
    "obj of a name that tensors need": b"(" + ORDERED + b"o.",
    "newobj": b"\x80\x02cos\nsystem\n" + text("touch owned") + b"\x85\x81.",
    "newobj_ex": b"\x80\x04cos\nsystem\n" + text("touch owned") + b"\x85}\x92.",
    "stack_global": b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94\x93" + text("touch owned") + b"\x85R.",
    "stack_global, protocol 2": b"\x80\x02" + text("os") + text("system") + b"\x93" + text("touch owned") + b"\x85R.",
    "global of this package": b"cmetalens.lenses.pickled\nread\n.",
    "global through a tensor's module": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.",
    "global with a longer name": b"ccollections\nOrderedDict.fromkeys\n" + text("a") + b"\x85R.",
    "another constructor of torch": b"ctorch.storage\n_load_from_bytes\n" + text("x") + b"\x85R.",
    "a parameter": b"ctorch._utils\n_rebuild_parameter\n.",
    "getattr": b"cbuiltins\ngetattr\n" + text("x") + text("y") + b"\x86R.",
    "a module that acts when imported": b"cantigravity\ngeohash\n.",
    "build of a function": REBUILD + b"}" + text("__code__") + text("x") + b"sb.",
    "build of a function through slots": REBUILD + b"}}" + text("__defaults__") + b")s\x86b.",
    "build of a class": ORDERED + b"}" + text("__init__") + text("x") + b"sb.",
    "build of a dict with something else": b"}" + text("x") + b"b.",
    "build of a storage's type": b"ctorch\nFloatStorage\n}b.",
    "reduce of a dict": b"}" + text("touch owned") + b"\x85R.",
    "reduce of a string": text("os.system") + text("touch owned") + b"\x85R.",
    "reduce of a storage's type": b"ctorch\nFloatStorage\nK\x01\x85R.",
    "reduce of an ordered dict with arguments": ORDERED + b"}\x85R.",
    "ordered dict as arguments": REBUILD + ORDERED + b")RR.",
    "extension 1": b"\x80\x02\x82\x01" + text("touch owned") + b"\x85R.",
    "extension 2": b"\x80\x02\x83\xf0\x00" + text("touch owned") + b"\x85R.",
    "extension 4": b"\x80\x02\x84\xf0\x00\x00\x00" + text("touch owned") + b"\x85R.",
    "persistent id as text": b"Pstorage\n.",
    "persistent id that is no storage": text("storage") + b"Q.",
    "persistent id with a callable": b"(" + text("storage") + ORDERED + text("0") + text("cpu") + b"K\x09tQ.",
    "out-of-band buffer": b"\x80\x05\x97.",
    "pop": b"NN0.",
    "dup": b"N2.",
    "bytes": b"\x80\x03C\x01x.",
    "set": b"\x80\x04\x8f.",
    "text of protocol 0": b"S'x'\n.",
    "number of protocol 0": b"I3\n.",
}


@pytest.fixture
def extensions():
    """Codes 1 and 240 stand for os.system in this process."""
    for code in (1, 240):
        copyreg.add_extension("os" if code == 1 else "posix", "system", code)
    yield
    for code in (1, 240):
        copyreg.remove_extension("os" if code == 1 else "posix", "system", code)


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS.keys())
@pytest.mark.parametrize("form", ["zip", "legacy", "legacy, its fourth pickle", "legacy, its last pickle"])
@pytest.mark.usefixtures("extensions")
def test_a_pickle_can_do_nothing(folder, monkeypatch, payload, form):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("something was called")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, forbidden)
    before = set(sys.modules)
    start = pickle.dumps(LEGACY_MAGIC, 2) + pickle.dumps(1001, 2)
    content = {
        "zip": zipped(RECORDS | {"params/data.pkl": payload}),
        "legacy": payload,
        "legacy, its fourth pickle": legacy(start, pickle.dumps({}, 2), payload, pickle.dumps([], 2)),
        "legacy, its last pickle": legacy(start, pickle.dumps({}, 2), pickle.dumps({}, 2), payload),
    }[form]
    refused(folder, content)
    assert not {"antigravity", "torch"} & (set(sys.modules) - before)


def test_the_payloads_would_work_elsewhere(tmp_path, monkeypatch):
    """Else the tests above would show nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("reduce, protocol 2", "reduce, protocol 4", "eval", "inst", "obj", "stack_global", "inside a dict, protocol 2"):
        pickle.loads(PAYLOADS[name])
        (tmp_path / "owned").unlink()


def test_the_error_says_what_it_found(folder):
    refused(
        folder,
        zipped(RECORDS | {"params/data.pkl": PAYLOADS["reduce, protocol 2"]}),
        r"params\.pt is not a tuned lens file.*GLOBAL at byte 2 of its pickle: it names 'posix system', which no file of tensors needs; nothing was",
    )


def test_names_stand_for_marks_that_share_nothing():
    """Two files can't speak to each other through what a name stands for."""
    assert read(io.BytesIO(ORDERED + b")R.")) == {}
    a, b = (read(io.BytesIO(b"\x80\x02" + ORDERED + b")R.")) for _ in range(2))
    a["x"] = 1
    assert b == {}


# ---------------------------------------------------------------- memory and time


def pickled_state(shape, strides, size, offset=0, dtype="Float", key="0", extra=b""):
    """The state dict of the fixtures' lens, its first weight as given here."""

    def numbers(values):
        return b"(" + b"".join(b"\x8a" + bytes([len(pickle.encode_long(n))]) + pickle.encode_long(n) for n in values) + b"t"

    out = b"\x80\x02" + ORDERED + b")R("
    for i in range(3):
        for part, own in (("weight", (4, 4)), ("bias", (4,))):
            first = (i, part) == (0, "weight")
            s, t = (shape, strides) if first else (own, (4, 1)[-len(own) :])
            n = size if first else int(np.prod(own))
            kind = dtype if first else "Float"
            out += text(f"{i}.{part}") + REBUILD + b"((" + text("storage") + f"ctorch\n{kind}Storage\n".encode()
            out += text(key if first else "s" + str(len(own))) + text("cpu") + numbers([n])[1:-1] + b"tQ" + numbers([offset if first else 0])[1:-1]
            out += numbers(s) + numbers(t) + b"\x89" + ORDERED + b")R" + (extra if first else b"") + b"tR"
    return out + b"u."


def state_file(data=bytes(64), **tensor):
    values = {"shape": (4, 4), "strides": (4, 1), "size": 16} | tensor
    records = {"data.pkl": pickled_state(**values), "version": b"3\n", "data/0": data, "data/s1": bytes(16), "data/s2": bytes(64)}
    return zipped({f"x/{name}": content for name, content in records.items()})


def test_the_builder_of_this_file_builds_what_is_read(folder):
    (folder / "params.pt").write_bytes(state_file())
    assert not np.array(files.load(folder).translators[0].bias).any()


@pytest.mark.parametrize(
    "tensor",
    [
        {"size": 10**18},
        {"size": 10**40},
        {"size": 15},
        {"size": 17},
        {"size": 0},
        {"shape": (10**9, 10**9), "strides": (0, 0)},
        {"shape": (10**9, 10**9), "strides": (10**9, 1), "size": 10**18},
        {"strides": (0, 0)},
        {"strides": (0, 0), "size": 1, "data": bytes(4)},
        {"strides": (1, 1)},
        {"strides": (5, 1)},
        {"strides": (2**63, 1)},
        {"strides": (-4, 1)},
        {"offset": 1},
        {"offset": -1},
        {"offset": 2**64},
        {"shape": (16,), "strides": (1,)},
        {"shape": (4, 4, 1), "strides": (4, 1, 1)},
        {"shape": (), "strides": ()},
        {"shape": (-4, -4)},
        {"shape": (0, 4)},
        {"strides": (4,)},
        {"dtype": "Half"},
        {"dtype": "Double"},
        {"dtype": "Long"},
        {"dtype": "Complex"},
        {"dtype": "Untyped"},
        {"key": "../../etc/passwd"},
        {"key": "nothing"},
        {"key": ""},
        {"key": "0\x00"},
        {"data": b""},
        {"data": bytes(60)},
        {"data": bytes(68)},
        {"data": np.full(16, np.nan, "<f4").tobytes()},
        {"data": np.full(16, np.inf, "<f4").tobytes()},
        {"data": np.full(16, 1e300).tobytes(), "dtype": "Double"},
        {"extra": b"}"},
    ],
    ids=str,
)
def test_tensors_that_the_file_does_not_bear_out(folder, tensor):
    tracemalloc.start()
    refused(folder, state_file(**tensor))
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "tensor", [{"offset": -1}, {"strides": (-4, 1)}, {"shape": (-4, -4)}, {"strides": (4,)}, {"size": -1}, {"extra": b"}"}], ids=str
)
def test_numbers_below_zero_are_refused_while_reading(tensor):
    """What comes after relies on it: a view from before its storage would read memory that isn't the file's."""
    with pytest.raises(ValueError, match="no such|no storage|constructor"):
        read(io.BytesIO(pickled_state(**({"shape": (4, 4), "strides": (4, 1), "size": 16} | tensor))))


def test_a_width_that_only_the_config_claims(folder):
    """One number, to be read as a matrix of 10^9 by 10^9."""
    (folder / "config.json").write_text(json.dumps(json.loads(CONFIG) | {"d_model": 10**9}))
    refused(folder, state_file(bytes(4), shape=(10**9, 10**9), strides=(0, 0), size=1), "overlap|has shape")


@pytest.mark.parametrize(
    "content",
    {
        "a memo of 4 GB": b"\x80\x02Nr\xff\xff\xff\xff.",
        "text of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
        "text of 2^63 bytes": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        "bytes of 2^63 bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
        "a frame of 2^63 bytes": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        "a number of 2^31 bytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "a hundred thousand marks": b"(" * 100_000 + b".",
        "tuples a hundred thousand deep": b")" + b"\x85" * 100_000 + b".",
        "tuples that double a hundred times": b")q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b".",
        "the same as a key": b"})q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"Ns.",
        "the same as a name": b"})q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"\x85R.",
        "the same as a storage": b")q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"Q.",
        "the same as a shape": REBUILD + b")q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"h\x00h\x00h\x00h\x00h\x00h\x00t(R.",
        "a dict in itself": b"}q\x00" + text("a") + b"h\x00s.",
        "a list in itself": b"]q\x00h\x00a.",
        "a million pairs of marks": b"(t" * 400_000 + b".",
        "no end": b"\x80\x02N",
        "nothing": b"",
        "an empty stack": b".",
        "two results": b"NN.",
        "a mark left over": b"N(.",
        "no mark": b"Nt.",
        "an unknown memo": b"h\x07.",
        "a memo of nothing": b"q\x00.",
        "tuples of nothing": b"\x87.",
        "a key without a value": b"}(Nu.",
        "items below the mark": b"}" + text("a") + b"N(su.",
        "keys of numbers": b"}K\x01K\x02s.",
        "keys twice": b"}" + 2 * (text("a") + b"Ns") + b".",
        "items of a list": b"]" + text("a") + b"Ns.",
        "items for a dict": b"}Na.",
        "another protocol": b"\x80\x03}.",
        "an unknown opcode": b"\x80\x02\xff.",
    }.items(),
    ids=lambda item: item[0],
)
def test_pickles_that_ask_for_too_much_or_make_no_sense(folder, content):
    tracemalloc.start()
    refused(folder, zipped(RECORDS | {"params/data.pkl": content[1]}))
    assert tracemalloc.get_traced_memory()[1] < 2e8
    tracemalloc.stop()


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def lens_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text(CONFIG)
    return folder


def lens_or_value_error(folder, content, name="params.pt"):
    (folder / name).write_bytes(content)
    with warnings.catch_warnings(), contextlib.suppress(ValueError):
        warnings.simplefilter("ignore")
        assert isinstance(files.load(folder), TunedLens)


@settings(max_examples=1500)
@given(
    st.sampled_from([ZIP, LEGACY]),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["set", "cut", "insert", "remove"])), min_size=1, max_size=3),
)
def test_damaged_bytes_give_a_lens_or_a_value_error(lens_folder, original, changes):
    content = original
    for place, byte, how in changes:
        at = place % max(1, len(content))
        rest = {"set": bytes([byte]) + content[at + 1 :], "cut": b"", "insert": bytes([byte]) + content[at:], "remove": content[at + 1 :]}[how]
        content = content[:at] + rest
    lens_or_value_error(lens_folder, content)


@settings(max_examples=400)
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_a_damaged_config_gives_a_lens_or_a_value_error(lens_folder, place, byte):
    (lens_folder / "params.pt").write_bytes(ZIP)
    content = CONFIG.encode()
    lens_or_value_error(lens_folder, content[: place % len(content)] + bytes([byte]) + content[place % len(content) + 1 :], "config.json")
    (lens_folder / "config.json").write_text(CONFIG)


@settings(max_examples=1000)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_pickle_of_plain_values_or_a_value_error(content):
    allowed = (int, float, str, tuple, list, dict, type(None), Tensor, Storage)
    with contextlib.suppress(ValueError):
        assert isinstance(read(io.BytesIO(content)), allowed)


SIMPLE = ["(", ")", "}", "]", "t", "\x85", "\x86", "\x87", "N", "\x88", "K\x01", "q\x00", "h\x00", "a", "e", "s", "u", "R", "b", "Q"]
WORDS = [text("storage"), text("0"), text("x"), REBUILD, ORDERED, b"ctorch\nFloatStorage\n"]


@settings(max_examples=1500)
@given(st.lists(st.sampled_from([*(opcode.encode("latin-1") for opcode in SIMPLE), *WORDS]), max_size=40))
def test_any_opcodes_in_any_order(sequence):
    allowed = (int, float, str, tuple, list, dict, type(None), Tensor, Storage)
    with contextlib.suppress(ValueError):
        result = read(io.BytesIO(b"".join(sequence) + b"."))
        assert isinstance(result, allowed) or type(result).__name__ in ("Name", "Element")


def test_every_storage_type_has_its_size():
    assert {element.name: element.itemsize for element in Element} == {"FLOAT32": 4, "FLOAT16": 2, "BFLOAT16": 2, "FLOAT64": 8}
