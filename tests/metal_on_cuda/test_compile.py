"""Test the translation to CUDA and the compilation of the kernels, without a GPU."""

from __future__ import annotations

import dataclasses
import re

import mlx.core as mx
import pytest

from metal_on_cuda import nvrtc, run_on_gpu
from metal_on_cuda.translation import translated
from metalens.ops.metal import descriptors, formats, library, source

needs_nvrtc = pytest.mark.skipif(nvrtc.unavailable() is not None, reason=f"metal_on_cuda: {nvrtc.unavailable()}")

HEADER = '#include <metal_stdlib>\nusing namespace metal;\n#define METALENS_UNROLL _Pragma("clang loop unroll(full)")\n'


def compiled(body, header=HEADER, output="float", **options):
    text = translated("kernel", [("x", "float")], [("out", output)], body, header)
    return nvrtc.compiled(text, "kernel", 128, **options)


def test_three_edits_and_no_more():
    kernel = descriptors.lens_softmax_grad(mx.float16)
    buffers = [[(a.name, a.element) for a in arguments] for arguments in (kernel.inputs, kernel.outputs)]
    text = translated(kernel.name, *buffers, kernel.body, source.inlined(kernel.header))
    assert "#include" not in text
    assert "clang loop" not in text
    assert len(re.findall(r"^\s*__shared__ ", text, flags=re.MULTILINE)) == 1
    assert f'extern "C" __global__ void {kernel.name}(const float* chunk, ' in text
    own = source.inlined(kernel.header).partition("namespace metalens {")[2]
    assert own in text, "the kernels themselves are not changed"


def test_pragmas_of_loops_get_their_names_in_cuda():
    header = "".join(f'_Pragma("clang loop {how}")\n' for how in ("unroll(full)", "unroll(disable)", "unroll_count(4)"))
    assert re.findall(r'_Pragma\("(.*?)"\)', translated("k", [], [("out", "int")], "", header)) == ["unroll", "unroll 1", "unroll 4"]


@needs_nvrtc
@pytest.mark.parametrize(
    "body",
    [
        "out[0] = simd_sum(x[0]) + simd_max(x[1]) + simd_min(float(x[2])) + (simd_any(x[0] > 0.0f) ? 1.0f : 0.0f);",
        "out[0] = float(simd_shuffle(half(x[0]), ushort(3))) + simd_broadcast(x[0], 1) + simd_shuffle_up(x[1], 1) + float(simd_or(1u));",
        "float4 v = float4(*reinterpret_cast<const device packed_float4*>(x + 1)); v += 2.0f * v; out[0] = v.x + v[3] + dot(v, v);",
        "threadgroup half s[64]; s[simdgroup_index_in_threadgroup] = half(x[0]); half h = s[1]; h = s[2]; out[0] = h * half(2.0f);",
        "threadgroup float4 s[8]; s[0] = float4(x[0]); threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);"
        "out[0] = float4(s[1]).y;",
        "out[0] = float((as_type<half2>(0x64006400u) - half2(half(1024.0f))).x) + precise::exp(x[0]) + clamp(x[1], 0.0f, 1.0f);",
        "simdgroup_matrix<half, 8, 8> a; simdgroup_load(a, reinterpret_cast<const device half*>(x), 8, ulong2(0), true);"
        "simdgroup_matrix<float, 8, 8> c = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);"
        "simdgroup_multiply_accumulate(c, a, a, c); c.thread_elements()[0] += 1.0f; simdgroup_store(c, out, 8);",
    ],
)
def test_what_the_shim_offers_compiles(body):
    assert compiled(body).registers > 0


@needs_nvrtc
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("out[0] = undeclared;", "kernel: .*undeclared"),
        ("float y = 1.0f; half h = y; out[0] = h;", "no suitable constructor|cannot convert"),  # in Metal too a bfloat or half needs a conversion
        ("float2 v = float2(1.0f); out[0] = v;", "no suitable conversion"),
    ],
)
def test_what_does_not_compile_is_reported(body, message):
    with pytest.raises(nvrtc.CompilationError, match=f"(?s){message}"):
        compiled(body)


@needs_nvrtc
def test_functions_are_overloaded_for_threadgroup_memory():
    header = HEADER + (
        "METAL_FUNC float from(const device float* p) { return p[0]; }\n"
        "METAL_FUNC float from(const threadgroup float* p) { return 2.0f * p[0]; }\n"
        "template <typename T> METAL_FUNC T generic(const threadgroup T* p) { return p[1]; }\n"
    )
    compiled("threadgroup float s[8]; s[0] = x[0]; out[0] = from(x) + from(s) + generic(s);", header)


@needs_nvrtc
def test_registers_and_spills_are_counted():
    few = compiled("out[0] = x[0];")
    sums = "float a[200];\nfor (int n = 0; n < int(x[0]); ++n) {\nMETALENS_UNROLL\nfor (int i = 0; i < 200; ++i) a[i] = fma(a[i], x[n], x[i]);\n}\n"
    many = compiled(f"{sums}\nMETALENS_UNROLL\nfor (int i = 0; i < 200; ++i) out[i] = a[i];")
    array = compiled("float a[200]; for (int i = 0; i < 200; ++i) a[i] = x[i]; out[0] = a[int(x[0])];")
    assert 0 < few.instructions < many.instructions
    assert few.registers < many.registers == nvrtc.MOST_REGISTERS
    assert few.spilled == few.stack == array.spilled == 0 < many.spilled
    assert array.stack == 4 * 200
    assert few.image[:4] == b"\x7fELF"
    ptx = compiled("out[0] = x[0];", architecture=nvrtc.PTX)
    assert ptx.registers is None
    assert b".entry kernel" in ptx.image


@needs_nvrtc
def test_the_script_compiles_what_cells_launch(monkeypatch, capsys):
    few = {launch.key: launch for launch in run_on_gpu.measured().values() if launch.name in ("metalens_norm_grad", "metalens_lens_stats_merge")}
    monkeypatch.setattr(run_on_gpu, "measured", lambda: few)
    arguments = ["--compile-only", "--cells", "translate_norm_rms-dense-float16-few|linear-dense-float32-one"]
    assert run_on_gpu.main(arguments) == 0
    out = capsys.readouterr().out
    assert re.search(r"^norm_grad +1 +\d+ +0 +0 +\d{3,4}$", out, flags=re.MULTILINE)
    assert re.search(r"metal_on_cuda: [3-9] kernels compiled by NVRTC [\d.]+ for sm_80, 0 failures", out)
    monkeypatch.setattr(run_on_gpu, "MOST_INSTRUCTIONS", 100)
    assert run_on_gpu.main(arguments) == run_on_gpu.FAILED
    assert "norm_grad exceeds 0 spilled bytes (128 registers) or 100 instructions" in capsys.readouterr().out


@needs_nvrtc
def test_a_kernel_that_does_not_compile_fails_the_script(monkeypatch, capsys):
    kernel = descriptors.norm_grad()
    broken = dataclasses.replace(
        run_on_gpu.as_launch(kernel), text=run_on_gpu.as_launch(kernel).text.replace("metalens::norm_grad(", "metalens::norm_grid(")
    )
    monkeypatch.setattr(run_on_gpu, "measured", lambda: {broken.key: broken})
    assert run_on_gpu.main(["--compile-only", "--cells", "linear-dense-float32-one"]) == run_on_gpu.FAILED
    assert "norm_grid" in capsys.readouterr().out


def test_the_script_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(nvrtc, "_library", lambda: "no compiler")
    for arguments in (["--compile-only"], []):
        assert run_on_gpu.main(arguments) == run_on_gpu.MISSING
        assert "no compiler" in capsys.readouterr().out
    monkeypatch.setattr(run_on_gpu.shutil, "which", lambda _: None)
    assert run_on_gpu.main(["--sanitizer"]) == run_on_gpu.MISSING
    assert "compute-sanitizer was not found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tool", "output", "code", "status"),
    [
        ("", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0),
        ("racecheck", "Warning: Race reported between Write access and Read access [1 hazard]", 0, run_on_gpu.FAILED),
        ("racecheck", "RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0, run_on_gpu.FAILED),
        ("memcheck", "stopped by a signal", -11, run_on_gpu.FAILED),
        ("synccheck", "barrier error", run_on_gpu.FAILED, run_on_gpu.FAILED),
        ("memcheck", "no GPU", run_on_gpu.MISSING, run_on_gpu.MISSING),
    ],
)
def test_a_hazard_or_a_failed_tool_fails_the_sanitizer(monkeypatch, tool, output, code, status):
    commands = []

    def run(command, **_):
        commands.append(command)
        fails = tool in command
        return run_on_gpu.subprocess.CompletedProcess(command, code if fails else 0, output if fails or not tool else "")

    monkeypatch.setattr(run_on_gpu.shutil, "which", lambda _: "compute-sanitizer")
    monkeypatch.setattr(run_on_gpu.subprocess, "run", run)
    assert run_on_gpu.sanitize([]) == status
    assert [command[2] for command in commands] == list(run_on_gpu.TOOLS)
    assert "--racecheck-report all" in " ".join(commands[1])


def test_every_cell_launches_programs_that_can_be_translated():
    chosen = run_on_gpu.cells("affine4g64|translate_norm_rms-dense-bfloat16|nvfp4")
    launches = run_on_gpu.launched(chosen, run_on_gpu.DEVICES["M1"])
    functions = {re.match(r"metalens_[a-z_]*?(?=_(?:float|half|bfloat)|$)", launch.name)[0] for launch in launches.values()}
    assert functions == {f"metalens_{kernel.function}" for kernel in (*library.of_no_format(), *library.of_format(formats.all_formats()[-1]))}
    assert all(launch.threads_of_group <= 1024 and min(launch.groups) > 0 for launch in launches.values())
    assert len({launch.name for launch in launches.values()}) == len(launches), "one name, one program"
