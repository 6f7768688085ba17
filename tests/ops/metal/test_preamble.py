"""Test that the kernels compile behind the text that MLX puts before every just-in-time kernel."""

import pytest

import mslcpu
from metalens.ops.metal import library, source
from support.metal_emulation import needs_clang

pytestmark = needs_clang

UNITS = library.translation_units()


@pytest.mark.parametrize("name", ["shared", "affine_b4_g64_bfloat", "dense_half", "mxfp4"])
def test_kernels_compile_behind_mlx_preamble(name):
    mslcpu.compile_library(library.text(UNITS[name]), f"{name}.metal", [source.folder()], with_mlx=True)


@pytest.mark.parametrize(
    "clash",
    [
        "template <typename T> struct Limits { static constexpr constant int wrong = 1; };",
        "METAL_FUNC bfloat16_t f(bfloat16_t x) { return metal::fast::exp(x, 1); }",
        "namespace metal { METAL_FUNC bfloat abs(bfloat x) { return x; } }",
    ],
)
def test_what_clashes_with_the_preamble_is_found(clash):
    with pytest.raises(mslcpu.MslError, match="clash.metal:1"):
        mslcpu.compile_library(clash, "clash.metal", with_mlx=True)
