"""Test that code which Metal rejects is rejected with its line, and that code which Metal accepts is not."""

from __future__ import annotations

import re

import pytest

import mslcpu
from mslcpu.rewrite import rewrite
from mslcpu.support import needs_clang, run
from mslcpu.tokens import tokenize, untokenize

pytestmark = needs_clang

PREFIX = "#include <metal_stdlib>\nusing namespace metal;\n"  # the code behind it starts on line 3
KERNEL = "\n[[kernel]] void k(device float* out [[buffer(0)]], uint i [[thread_position_in_grid]]) { %s }\n"

ACCEPTED = {
    "kernel": KERNEL % "out[i] = 1;",
    "kernel keyword": "kernel void k(device float* x [[buffer(0)]], constant int& n [[buffer(1)]], uint i [[thread_position_in_grid]]) { x[i] = n; }",
    "threadgroup in kernel": KERNEL % "threadgroup float a[4], b; threadgroup float* p = a; p[i] = b; out[i] = a[0];",
    "pointers": "METAL_FUNC float f(const device float* a, thread const float& b, float thread* c, threadgroup half (&d)[4]) { return a[0] + b; }",
    "nested types": "template <typename F> METAL_FUNC float f(const device typename F::T* a, const threadgroup vec<half, 4>* b) { return a[0]; }",
    "auto": KERNEL % "threadgroup float a[4]; threadgroup auto& b = a[i]; b = 1; auto c = &out[i]; *c = 1;",
    "products": KERNEL % "int n = 3; out[i] = float(n) * n + sizeof(float) * n + (n & 1);",
    "explicit instantiation": "template <typename T> [[kernel]] void k(device T* x [[buffer(0)]]) { x[0] = 1; }\n"
    'template [[host_name("k_float")]] [[kernel]] void k<float>(device float* x [[buffer(0)]]);\n'
    'template [[host_name("k_half")]] [[kernel]] decltype(k<half>) k<half>;',
    "function constant": "constant int n [[function_constant(0)]];" + KERNEL % "out[i] = n;",
    "bfloat": KERNEL % "bfloat b = bfloat(out[i]); half h = out[i]; b = static_cast<bfloat>(h); out[i] = b + h; b += bfloat(1.0f); b = 1.0bf;",
    "overloads": "METAL_FUNC float f(float x) { return x; }\nMETAL_FUNC float f(int x) { return f(float(x)); }",
    "methods": "struct S { float v; float get() const { return v; } float get() const threadgroup { return v; } };"
    + KERNEL % "threadgroup S s; s.v = 1; S t; t.v = 2; out[i] = s.get() + t.get();",
    "method of a temporary": "struct S { float v; S(float x) : v(x) {} float get() const { return v; } };" + KERNEL % "out[i] = S(2).get();",
    "constructors in thread memory": "struct S { float v; S() thread : v(0) {} S(float x) thread : v(x) {} };\n"
    "template <int N> struct A { simdgroup_matrix<float, 8, 8> m[N]; S s; METAL_FUNC A() thread {} };"
    + KERNEL % "A<2> a; S s = S(2.0f); out[i] = a.s.v + s.v;",
    "no constructors": "struct A { simdgroup_matrix<float, 8, 8> m; };" + KERNEL % "A a; out[i] = a.m.thread_elements()[0];",
    "a constructor for each memory": "struct S { float v; S() thread : v(0) {} S() threadgroup {} };"
    + KERNEL % "threadgroup S s; s.v = 1; out[i] = s.v;",
    "an initialized member": "struct S { float v; S(float x) thread : v(x) {} };\nstruct A { S s; A() : s(1.0f) {} };"
    + KERNEL % "A a; out[i] = a.s.v;",
    "names OpenCL reserves": KERNEL % "int local = 1, global = 2, pipe = 3, generic = 4; out[i] = local + global + pipe + generic;",
}  # fmt: skip
REJECTED = {
    "unqualified pointer": ("pointer type must have an explicit address space", "METAL_FUNC float f(const float* a) { return a[0]; }"),
    "unqualified reference": ("reference type must have an explicit address space", "METAL_FUNC float f(float& a) { return a; }"),
    "unqualified template pointer": ("pointer type must have", "template <typename T> METAL_FUNC T f(T* a) { return a[0]; }"),
    "unqualified nested type": ("pointer type must have", "struct S { using T = float; };\nMETAL_FUNC float f(S::T* a) { return a[0]; }"),
    "unqualified vector": ("reference type must have", "METAL_FUNC float f(const vec<float, 4>& a) { return a.x; }"),
    "unqualified array": ("reference type must have", "METAL_FUNC float f(float (&a)[4]) { return a[0]; }"),
    "unqualified local": ("pointer type must have", "METAL_FUNC float f(float a) { float* p = &a; return *p; }"),
    "unqualified cast": ("pointer type must have", "METAL_FUNC uint f(const device float* a) { return *reinterpret_cast<const uint*>(a); }"),
    "wrong address space": ("cannot initialize|changes address space",
        "METAL_FUNC void f(device float* a) { threadgroup float* b = a; }"),
    "write to constant": ("cannot assign|read-only|const", "METAL_FUNC void f(constant float* a) { a[0] = 1; }"),
    "double": ("'double' does not exist", "METAL_FUNC float f(float a) { return double(a); }"),
    "goto": ("'goto'", "METAL_FUNC void f() { again: goto again; }"),
    "new": ("'new'", "METAL_FUNC void f() { auto p = new int; }"),
    "virtual": ("virtual functions", "struct S { virtual void f(); };"),
    "exceptions": ("exceptions", "METAL_FUNC void f() { throw 1; }"),
    "recursion": ("recursion: 'f'", "int f(int n) { return n ? f(n - 1) : 0; }"),
    "mutual recursion": ("recursion: 'f'", "int g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return n ? f(n - 1) : 0; }"),
    "function pointer": ("pointers to functions are not allowed|function", "int f(int n) { return n; }\nint g() { auto p = &f; return p(1); }"),
    "standard header": ("<cmath> is not a Metal header", "#include <cmath>\n"),
    "threadgroup in a function": ("can be declared in kernels only", "METAL_FUNC float f() { threadgroup float a[4]; return a[0]; }"),
    "constructor for any memory with a matrix": ("the constructor of 'A' cannot construct the member 'm', .* declare this one 'thread' too",
        "template <int N> struct A { simdgroup_matrix<float, 8, 8> m[N]; METAL_FUNC A() {} };"),
    "constructor for any memory with a member for thread memory": ("the constructor of 'A' cannot construct the member 's'",
        "struct S { float v; S() thread : v(0) {} }; struct A { float v; S s; A() : v(1) {} };"),
    "object for thread memory in threadgroup memory": ("'S' cannot be constructed in threadgroup memory",
        "struct S { float v; S() thread : v(0) {} }; kernel void k() { threadgroup S s[4]; }"),
    "threadgroup at program scope": ("can be declared in kernels only", "threadgroup float a[4];"),
    "threadgroup initializer": ("cannot have an initializer", KERNEL.strip() % "threadgroup float a[2] = {0, 0}; out[i] = a[0];"),
    "float to bfloat": ("no implicit conversion to bfloat", "METAL_FUNC bfloat f(float a) { return a; }"),
    "float to bfloat by assignment": ("no implicit conversion to bfloat", "METAL_FUNC void f(device bfloat* a, float b) { a[0] = b; }"),
    "float to bfloat by addition": ("no implicit conversion to bfloat", "METAL_FUNC void f(device bfloat* a, float b) { a[0] += b; }"),
    "float to bfloat in a template": ("no implicit conversion to bfloat",
        "template <typename T> METAL_FUNC void g(device T* a, float b) { a[0] = b; }\nMETAL_FUNC void f(device bfloat* a) { g(a, 1.5f * a[0]); }"),
    "uninitialized variable": ("uninitialized", "METAL_FUNC float f() { float a; return a; }"),
    "missing return": ("does not return a value", "METAL_FUNC float f(float a) { if (a > 0) return 1; }"),
    "unknown attribute": ("unknown attribute 'thread_position'",
        "[[kernel]] void k(device float* x [[buffer(0)]], uint i [[thread_position]]) { x[i] = 0; }"),
    "buffer index": ("at most 31 buffers", "[[kernel]] void k(device float* x [[buffer(31)]]) { x[0] = 0; }"),
    "mixed types": ("call to 'max' is ambiguous", "METAL_FUNC float f(float a) { return max(a, 0); }"),
    "method of a threadgroup object": ("deleted member function 'get'",
        "struct S { float v; float get() const { return v; } };" + KERNEL % "threadgroup S s; s.v = 1; out[i] = s.get();"),
    "components of a vector": ("wrong number of components", "METAL_FUNC float4 f() { return float4(1, 2, 3); }"),
    "OpenCL": ("OpenCL keyword", "METAL_FUNC float f(__global float* a) { return a[0]; }"),
    **{f"{name}": (f"undeclared identifier '{name}'", f"METAL_FUNC float f(float a) {{ return {name}(a); }}")
       for name in ("expm1", "log1p", "erf", "erfc", "tgamma", "lgamma", "cbrt", "expf", "hypot")},
}  # fmt: skip


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted(name):
    mslcpu.compile_library(PREFIX + ACCEPTED[name])


@pytest.mark.parametrize("name", REJECTED)
def test_rejected(name):
    message, text = REJECTED[name]
    with pytest.raises(mslcpu.MslError, match=f"(?s)(error|note): .*({message})") as caught:
        mslcpu.compile_library(PREFIX + text, "lib.metal")
    assert re.search("^lib.metal:[3-5]:", str(caught.value), re.MULTILINE), caught.value


def test_every_finding_of_the_lint_has_its_line():
    with pytest.raises(mslcpu.MslError) as caught:
        mslcpu.compile_library(f"{PREFIX}float f(float* a);\n\nfloat g(float& a);\ndouble d;", "lib.metal")
    assert {line.split(" ")[0] for line in str(caught.value).splitlines()} == {"lib.metal:3:", "lib.metal:5:", "lib.metal:6:"}


def test_included_files_keep_their_names(tmp_path):
    (tmp_path / "part.h").write_text("METAL_FUNC float g(float a) { return a; }\n\nMETAL_FUNC float f(float* a) { return a[0]; }\n")
    with pytest.raises(mslcpu.MslError, match=r"part\.h:3: error: pointer type"):
        mslcpu.compile_library(f'{PREFIX}#include "part.h"\n', include_dirs=[tmp_path])


def test_kernels_report_lines_of_header_and_source():
    with pytest.raises(mslcpu.MslError, match=r"test\.header:2:\d+: error"):
        run("out[i] = 0;", header="\nfloat f() { return undeclared; }")
    with pytest.raises(mslcpu.MslError, match=r"test\.source:5:\d+: error"):
        run("\nout[i] = undeclared;")


def test_rewriting_keeps_every_line():
    text = "a [[buffer(0)]]\n[[kernel]] void f() {\nthreadgroup float\n  x[2],\n  y;\nfloat4 v = float4(1,\n 2);\n}\n"
    assert untokenize(tokenize(text)) == text
    assert rewrite(text).count("\n") == text.count("\n")
    assert rewrite(text).split("\n")[5].startswith("float4 v = msl_make<float4>(1,")
