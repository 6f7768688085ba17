"""Find code that clang accepts and Metal rejects, in preprocessed tokens. In doubt a rule reports nothing."""

from __future__ import annotations

import re

from .errors import MslError
from .rewrite import VECTOR, threadgroup_declaration
from .structs import Struct, structs
from .tokens import Token, find_closing

SPACES = {"device", "threadgroup", "constant", "thread", "ray_data", "object_data", "threadgroup_imageblock"}
SCALARS = {"void", "bool", "char", "uchar", "short", "ushort", "int", "uint", "long", "ulong", "unsigned", "signed", "float", "half", "bfloat"}
SCALARS |= {f"{u}int{n}_t" for u in ("", "u") for n in (8, 16, 32, 64)} | {"size_t", "ptrdiff_t", "float16_t", "bfloat16_t", "complex64_t"}
LIBRARY = {"vec", "simdgroup_matrix", "atomic", "atomic_int", "atomic_uint", "atomic_float", "array", "tensor"}
QUALIFIERS = {"const", "volatile", "static", "constexpr", "typename", "inline", "unsigned", "signed", "coherent", "restrict"}
FORBIDDEN = {
    "double": "'double' does not exist in Metal",
    "goto": "'goto' is not supported in Metal",
    "new": "'new' is not supported in Metal",
    "delete": "'delete' is not supported in Metal",
    "virtual": "virtual functions are not supported in Metal",
    "dynamic_cast": "'dynamic_cast' is not supported in Metal",
    "typeid": "'typeid' is not supported in Metal",
    "throw": "exceptions are not supported in Metal",
    "try": "exceptions are not supported in Metal",
    "catch": "exceptions are not supported in Metal",
    "thread_local": "'thread_local' is not supported in Metal",
    "asm": "'asm' is not supported in Metal",
    "__global": "OpenCL keyword", "__local": "OpenCL keyword", "__private": "OpenCL keyword", "__generic": "OpenCL keyword",
    "__kernel": "OpenCL keyword", "__constant": "OpenCL keyword",
}  # fmt: skip
ATTRIBUTES = re.compile(
    r"(dispatch_(quadgroups|simdgroups|threads)_per_threadgroup|grid_origin|grid_size|quadgroup_index_in_threadgroup|quadgroups_per_threadgroup"
    r"|simdgroup_index_in_threadgroup|simdgroups_per_threadgroup|thread_execution_width|thread_index_in_(quadgroup|simdgroup|threadgroup)"
    r"|thread_position_in_(grid|threadgroup)|threadgroup_position_in_grid|threadgroups_per_grid|threads_per_(grid|simdgroup|threadgroup)"
    r"|buffer|threadgroup|kernel|host_name|function_constant|max_total_threads_per_threadgroup|maybe_unused|clang|unroll|visible|stage_in"
    r"|texture|sampler|id|user|likely|unlikely|nodiscard|fallthrough|deprecated)$"
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:<([^>]+)>|"([^"]+)")', re.MULTILINE)


def lint_includes(source: str, name: str) -> None:
    """Check that only Metal's headers are included with <>."""
    for match in _INCLUDE.finditer(source):
        if match[1] and not re.match(r"metal_\w+$|simd/|MetalPerformancePrimitives/MetalPerformancePrimitives.h$", match[1]):
            line = source.count("\n", 0, match.start()) + 1
            raise MslError(f"{name}:{line}: error: <{match[1]}> is not a Metal header")


def lint(tokens: list[Token]) -> None:
    """Raise MslError with all findings, one per line, if there are any."""
    findings = [*_forbidden(tokens), *_unqualified_pointers(tokens), *_threadgroup_outside_kernels(tokens), *_attributes(tokens)]
    findings += _recursion(tokens)
    findings += _constructors(tokens)
    if findings:
        raise MslError("\n".join(f"{token.place}: error: {message}" for token, message in findings))


def _forbidden(tokens: list[Token]) -> list[tuple[Token, str]]:
    found = []
    for i, token in enumerate(tokens):
        if token.kind != "name" or token.text not in FORBIDDEN:
            continue
        if token.text == "delete" and i > 0 and tokens[i - 1].text == "=":
            continue  # a deleted function
        found.append((token, FORBIDDEN[token.text]))
    return found


def _type_names(tokens: list[Token]) -> set[str]:
    names = SCALARS | LIBRARY
    for i, token in enumerate(tokens[:-2]):
        name, after = tokens[i + 1], tokens[i + 2].text
        declares = token.text in ("struct", "class", "union", "enum")
        declares |= token.text == "typename" and after in (",", ">", "=")
        declares |= token.text == "using" and after == "="
        if declares and name.kind == "name":
            names.add(name.text)
    return names


def _unqualified_pointers(tokens: list[Token]) -> list[tuple[Token, str]]:
    """Find pointers and references without an address space; `auto&` deduces its own."""
    types = _type_names(tokens)
    found = []
    for i, token in enumerate(tokens):
        if token.kind != "name" or not (token.text in types or VECTOR.match(token.text)):
            continue
        if i > 0 and tokens[i - 1].text in (".", "->", "struct", "class", "enum", "using"):
            continue
        after = i + 1
        if tokens[after].text == "<":
            try:
                after = find_closing(tokens, after) + 1
            except MslError:
                continue  # a comparison
        qualified = False
        while tokens[after].text in QUALIFIERS | SPACES:
            qualified |= tokens[after].text in SPACES
            after += 1
        array_reference = (
            tokens[after].text == "(" and tokens[after + 1].text == "&" and tokens[after + 3].text == ")" and tokens[after + 4].text == "["
        )
        if tokens[after].text not in ("*", "&") and not array_reference:
            continue
        before = _before_scope(tokens, i) - 1
        while before >= 0 and tokens[before].text in QUALIFIERS | SPACES:
            qualified |= tokens[before].text in SPACES
            before -= 1
        if not qualified:
            kind = "pointer" if tokens[after].text == "*" else "reference"
            found.append((token, f"{kind} type must have an explicit address space qualifier (device, threadgroup, constant or thread)"))
    return found


def _before_scope(tokens: list[Token], i: int) -> int:
    """Return the index at which a possibly qualified name such as ``A<int>::B`` starts, given the index of its last part."""
    while i >= 2 and tokens[i - 1].text == "::":
        i -= 2
        if tokens[i].text == ">":
            depth = 0
            while i > 0:
                depth += (tokens[i].text == ">") - (tokens[i].text == "<")
                i -= 1
                if depth == 0:
                    break
    return i


def _functions(tokens: list[Token]) -> list[tuple[str, bool, bool, int, int]]:
    """Return (name, is kernel, is template, first, last token of the body) of every function with a body, including methods."""
    result = []
    start = 0  # start of the declaration
    i = 0
    while i < len(tokens):
        text = tokens[i].text
        if text == "{":
            head = tokens[start:i]
            words = [t.text for t in head]
            template = bool(words) and words[0] == "template"
            if template:
                close = find_closing(head, 1)
                words = words[close + 1 :]
            parenthesis = next((j for j, w in enumerate(words) if w == "(" and words[j - 1] not in ("alignas", "decltype", "[")), None)
            kinds = words[:parenthesis] if parenthesis is not None else words
            if parenthesis and "=" not in kinds and not {"struct", "class", "union", "enum", "namespace"} & set(kinds):
                end = find_closing(tokens, i)
                result.append((words[parenthesis - 1], "kernel" in kinds, template, i, end))
                i = end
            elif "=" in words or "enum" in words:
                i = find_closing(tokens, i)  # an initializer
            start = i + 1
        elif text in (";", "}") or (text == ":" and i > 0 and tokens[i - 1].text in ("public", "private", "protected")):
            start = i + 1
        i += 1
    return result


def _threadgroup_outside_kernels(tokens: list[Token]) -> list[tuple[Token, str]]:
    kernels = [(first, last) for _, is_kernel, _, first, last in _functions(tokens) if is_kernel]
    found = []
    for i, token in enumerate(tokens):
        if token.text != "threadgroup":
            continue
        starts_statement = i == 0 or tokens[i - 1].text in (";", "{", "}", "static")
        inside = any(first < i < last for first, last in kernels)
        if threadgroup_declaration(tokens, i) is not None and not inside:
            found.append((token, "threadgroup variables can be declared in kernels only"))
        elif starts_statement and inside:
            end = next(j for j in range(i, len(tokens)) if tokens[j].text in (";", ""))
            words = [t.text for t in tokens[i:end]]
            if "=" in words and not {"*", "&"} & set(words[: words.index("=")]):
                found.append((token, "a threadgroup variable cannot have an initializer"))
    return found


def _attributes(tokens: list[Token]) -> list[tuple[Token, str]]:
    found = []
    for i in range(len(tokens) - 2):
        if tokens[i].text == "[" and tokens[i + 1].text == "[" and not tokens[i + 1].before and tokens[i + 2].kind == "name":
            if not ATTRIBUTES.match(tokens[i + 2].text):
                found.append((tokens[i + 2], f"unknown attribute '{tokens[i + 2].text}'"))
            elif tokens[i + 2].text == "buffer" and tokens[i + 4].kind == "number" and int(tokens[i + 4].text, 0) > 30:
                found.append((tokens[i + 4], "buffer index above 30: a kernel has at most 31 buffers"))
    return found


def _recursion(tokens: list[Token]) -> list[tuple[Token, str]]:
    """Find calls that lead back to their function. Overloads and templates may call their own name, so only names of one plain function count."""
    functions = _functions(tokens)
    names = [f[0] for f in functions]
    plain = {f[0]: f for f in functions if names.count(f[0]) == 1 and not f[2] and f[0] not in SCALARS}
    calls = {
        name: {
            tokens[i].text: tokens[i]
            for i in range(first, last)
            if tokens[i].text in plain and tokens[i + 1].text == "(" and tokens[i - 1].text not in (".", "->", "::")
        }
        for name, (_, _, _, first, last) in plain.items()
    }
    found = []
    for name, callees in calls.items():
        reachable: set[str] = set()
        todo = list(callees)
        while todo:
            callee = todo.pop()
            if callee not in reachable:
                reachable.add(callee)
                todo += calls[callee]
        if name in reachable:
            found.append((next(iter(callees.values())), f"recursion: '{name}' leads back to itself, which Metal does not support"))
    return found


def _constructors(tokens: list[Token]) -> list[tuple[Token, str]]:
    """Find objects that are constructed where their constructors do not work.

    From Metal 4.1 on, constructors that are declared `thread` construct objects in thread memory only, and a constructor without an address space
    is one for objects anywhere. So it cannot construct a member whose constructors are all `thread`, as those of simdgroup_matrix are.
    """
    known = {s.name: s for s in structs(tokens)} | {"simdgroup_matrix": Struct("simdgroup_matrix", spaces={"thread"})}
    found = []
    for struct in known.values():
        for constructor in struct.generic_constructors:
            for kind, member in struct.members:
                if kind in known and known[kind].is_thread_only and member not in constructor.initialized:
                    text = f"the constructor of '{struct.name}' cannot construct the member '{member}', whose constructors are declared 'thread'"
                    found.append((constructor.token, f"{text}; declare this one 'thread' too"))
    for i, token in enumerate(tokens):
        if threadgroup_declaration(tokens, i) is not None and (kind := known.get(tokens[i + 1].text)) is not None and kind.is_thread_only:
            found.append((token, f"'{kind.name}' cannot be constructed in threadgroup memory: its constructors are declared 'thread'"))
    return found
