"""The macOS check itself: that it reads Mach-O files, hides no missing symbol, and fails where it must. CI runs the check as a step of its own."""

import importlib
import struct
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "macos"
TOOLCHAIN = "/kit"


@pytest.fixture(scope="module")
def tool():
    """A module of tools/macos, by name: they are scripts beside each other, no package."""
    names = ("check", "cxx", "macho", "xcrun")
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path = sys.path[:]
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module
    sys.path[:] = path
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


class TestCompiler:
    def test_flags_of_apples_tools_become_zigs(self, tool):
        arguments = ["-arch", "arm64", "-march=armv8.2-a+bf16", "-O3", "-flto=thin", "-framework", "Metal", "-c", "a.cpp", "-o", "a.o"]
        translated = tool("cxx").translate(arguments, TOOLCHAIN)
        assert translated[:4] == ["-target", "aarch64-macos.14.0", "-isystem", "/kit/include"]
        assert translated[4:] == ["-mcpu=apple_m2", "-O3", "-c", "a.cpp", "-o", "a.o"]

    def test_a_link_gets_the_libraries_of_names(self, tool):
        translated = tool("cxx").translate(
            ["-bundle", "a.o", "-Wl,@/nanobind/cmake/darwin-ld-cpython.sym", "-Wl,-rpath,@loader_path/x", "-o", "a.so"], TOOLCHAIN
        )
        assert translated[4:] == ["-shared", "a.o", "-Wl,-rpath,@loader_path/x", "-o", "a.so", "-L/kit/lib", "-lobjc", "-lpython"]

    @pytest.mark.parametrize("flag", [["-undefined", "dynamic_lookup"], ["-Wl,-undefined,dynamic_lookup"], ["-Wl,-U,_f"], ["-Wl,-flat_namespace"]])
    def test_no_flag_may_hide_a_missing_symbol(self, tool, flag):
        with pytest.raises(ValueError, match="would hide a symbol"):
            tool("cxx").translate(["-bundle", "a.o", *flag], TOOLCHAIN)


def mach_o(*, cpu=0x0100000C):
    """An image that exports _f, wants _g of the second of its two libraries and _h of none, and hides _s."""

    def command(kind, layout, values, text=b""):
        size = 8 + struct.calcsize(f"<{layout}") + len(text)
        padding = -size % 8
        return struct.pack(f"<II{layout}", kind, size + padding, *values) + text + bytes(padding)

    names = b"\0_f\0_g\0_h\0_s\0"
    symbols = [(1, 0x0F, 1, 0), (4, 0x01, 0, 2 << 8), (7, 0x01, 0, 0xFE << 8), (10, 0x1F, 1, 0)]
    rest = [
        command(0xC, "IIII", (24, 0, 0, 0), b"/usr/lib/libSystem.B.dylib\0"),
        command(0xC, "IIII", (24, 0, 0, 0), b"@rpath/libmlx.dylib\0"),
        command(0x8000001C, "I", (12,), b"@loader_path/../mlx/lib\0"),
        command(0x32, "IIII", (1, 14 << 16, 0, 0)),
    ]
    at = 32 + 24 + sum(map(len, rest))
    table = command(0x2, "IIII", (at, len(symbols), at + 16 * len(symbols), len(names)))
    header = struct.pack("<IIIIIIII", 0xFEEDFACF, cpu, 0, 6, 1 + len(rest), 24 + sum(map(len, rest)), 0, 0)
    return (
        header
        + table
        + b"".join(rest)
        + b"".join(struct.pack("<IBBHQ", name, kind, section, about, 0) for name, kind, section, about in symbols)
        + names
    )


class TestMachO:
    def test_says_what_an_image_has_and_wants(self, tool, tmp_path):
        (tmp_path / "image").write_bytes(mach_o())
        image = tool("macho").read(tmp_path / "image")
        assert image.arm64
        assert image.minimum_macos == "14.0"
        assert image.libraries == ["/usr/lib/libSystem.B.dylib", "@rpath/libmlx.dylib"]
        assert image.rpaths == ["@loader_path/../mlx/lib"]
        assert image.exports == {"_f"}
        assert image.imports == {"_g": "@rpath/libmlx.dylib", "_h": ""}
        assert image.imported_from("libmlx.dylib") == ["_g"]

    def test_knows_another_machine(self, tool, tmp_path):
        (tmp_path / "image").write_bytes(mach_o(cpu=0x01000007))
        assert not tool("macho").read(tmp_path / "image").arm64

    @pytest.mark.parametrize("data", [b"", b"\x7fELF" + bytes(60)])
    def test_refuses_other_files(self, tool, tmp_path, data):
        (tmp_path / "image").write_bytes(data)
        with pytest.raises(ValueError, match="not a 64-bit Mach-O"):
            tool("macho").read(tmp_path / "image")


class TestMetalStandIn:
    def test_follows_includes_and_writes_what_cmake_waits_for(self, tool, tmp_path):
        (tmp_path / "metal").mkdir()
        (tmp_path / "metal" / "a.h").write_text('#include <metal_stdlib>\n#include "b.h"\n')
        (tmp_path / "metal" / "b.h").write_text("")
        (tmp_path / "k.metal").write_text('#include "a.h"\n')
        output = tmp_path / "k.air"
        options = [f"-I{tmp_path / 'metal'}", "-MF", str(tmp_path / "k.d"), "-c", str(tmp_path / "k.metal"), "-o", str(output)]
        tool("xcrun").metal(options)
        assert output.exists()
        assert str(tmp_path / "metal" / "b.h") in (tmp_path / "k.d").read_text()
        (tmp_path / "metal" / "b.h").unlink()
        with pytest.raises(FileNotFoundError, match=r"a\.h includes b\.h"):
            tool("xcrun").metal(options)

    def test_a_library_needs_its_objects(self, tool, tmp_path):
        for objects in ([], [str(tmp_path / "gone.air")]):
            with pytest.raises((ValueError, FileNotFoundError)):
                tool("xcrun").metal([*objects, "-o", str(tmp_path / "k.metallib")])


class TestSelfTest:
    def kit(self, tool, tmp_path, cxx):
        check = tool("check")
        check.write(tmp_path / "kit" / "cxx", f"#!/bin/sh\n{cxx}\n", executable=True)
        return check.Kit(tmp_path / "mlx", tmp_path / "kit", {})

    @pytest.mark.parametrize(
        ("cxx", "complaint"),
        [
            pytest.param("exit 0", "must fail in linking", id="everything passes"),
            pytest.param("echo is_nax_available set_output_array; exit 1", "without a fault was refused", id="nothing passes"),
            pytest.param('case "$*" in *fits*) exit 0; esac; echo disk full; exit 1', "for is_nax_available", id="failures for another reason"),
        ],
    )
    def test_a_compiler_that_cannot_tell_right_from_wrong_fails_it(self, tool, tmp_path, cxx, complaint):
        check = tool("check")
        with pytest.raises(check.CheckError, match=complaint):
            check.self_test(self.kit(tool, tmp_path, cxx), tmp_path / "sources")

    def test_the_real_tools_tell_right_from_wrong(self, tool, tmp_path):
        check = tool("check")
        cache = check.ROOT / "build" / "macos"
        if not (cache / f"zig-{check.ZIG}").exists() or not any(cache.glob(f"mlx-{check.pinned_mlx()}-*/")):
            pytest.skip("zig and MLX for macOS are not in build/macos: tools/macos/check.py fetches them, and runs this test too")
        check.self_test(check.prepare(cache, check.pinned_mlx()), tmp_path)


def test_mlx_is_fetched_in_the_version_that_is_pinned(tool):
    import mlx.core as mx

    assert tool("check").pinned_mlx() == mx.__version__
