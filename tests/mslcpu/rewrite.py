"""Rewrite preprocessed Metal source so that clang's "C++ for OpenCL" accepts it, with few changes and without moving a line.

- ``[[attributes]]`` go (signature.py has read them before).
- ``threadgroup T name[N];`` becomes a reference into the runtime's threadgroup memory, which gives limits, red zones and poison.
- ``float4(a, b)`` and ``vec<T, 4>(a, b)`` become ``msl_make<float4>(a, b)``: OpenCL has no such constructors.
- ``half(x)`` and ``bfloat(x)`` become ``msl_convert<half>(x)``: clang does not convert between the two.
- ``thread`` after a constructor's parameters goes: clang would refuse temporaries. What it forbids, the lint finds.
- Methods without an address space are for objects in thread memory; OpenCL would let them work on any. Deleted overloads for ``device`` and
  ``threadgroup`` objects go before them. (Marking them ``thread`` would be simpler, but then clang rejects calls on temporaries.)
- Function constants become ordinary constants, zero unless given.
- ``1.0bf`` becomes a conversion.
"""

from __future__ import annotations

import re

from .tokens import Token, find_closing, split_at_commas, tokenize, untokenize

VECTOR = re.compile(r"(?:float|half|bfloat|char|uchar|short|ushort|int|uint|long|ulong|bool)[234]$")
_HALVES = {"half", "bfloat", "float16_t", "bfloat16_t"}
_BFLOAT_LITERAL = re.compile(r"(.*\d\.?)(?:bf|BF)$")


def rewrite(source: str, function_constants: dict[int, object] | None = None) -> str:
    tokens = tokenize(source)
    tokens = _function_constants(tokens, function_constants or {})
    tokens = _drop_attributes(tokens)
    tokens = _threadgroup_variables(tokens)
    tokens = _constructors(tokens)
    tokens = _method_qualifiers(tokens)
    tokens = _thread_methods(tokens)
    return untokenize(tokens)


def _replacement(text: str, old: list[Token]) -> Token:
    """Return one token in place of several, with the same number of newlines, so that lines keep their numbers."""
    newlines = "".join(re.sub(r"[^\n]", "", t.before) + re.sub(r"[^\n]", "", t.text) for t in old[1:])
    return Token(text + newlines, "name", old[0].file, old[0].line, old[0].before)


def _is_attribute(tokens: list[Token], i: int) -> bool:
    return tokens[i].text == "[" and i + 1 < len(tokens) and tokens[i + 1].text == "[" and not tokens[i + 1].before


def _function_constants(tokens: list[Token], values: dict[int, object]) -> list[Token]:
    """Replace constant T name [[function_constant(N)]]; by constant constexpr T name = value;."""
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        if tokens[i].text == "function_constant" and len(result) >= 2 and result[-1].text == result[-2].text == "[":
            del result[-2:]
            end = find_closing(tokens, i + 1)
            value = values.get(int(tokens[i + 2].text, 0), 0)
            text = str(value).lower() if isinstance(value, bool) else str(value)
            result.append(_replacement(f" = {text}", tokens[i : end + 3]))
            i = end + 3
            continue
        result.append(tokens[i])
        i += 1
    return result


def _drop_attributes(tokens: list[Token]) -> list[Token]:
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        if _is_attribute(tokens, i):
            end = find_closing(tokens, i)
            result.append(_replacement(" ", tokens[i : end + 1]))
            result[-1].kind = "space"
            i = end + 1
            continue
        result.append(tokens[i])
        i += 1
    # The blank that an attribute leaves goes to the next token, so that it does not hide what precedes that token.
    merged: list[Token] = []
    blank = ""
    for token in result:
        if token.kind == "space":
            blank += token.before + token.text
        else:
            token.before, blank = blank + token.before, ""
            merged.append(token)
    return merged


def threadgroup_declaration(tokens: list[Token], i: int) -> int | None:
    """Return the index of the semicolon if a declaration of threadgroup variables (not pointers or references) starts at i."""
    if tokens[i].text != "threadgroup" or (i > 0 and tokens[i - 1].text not in (";", "{", "}", ":", "static")):
        return None
    depth = 0
    for j in range(i + 1, len(tokens)):
        text = tokens[j].text
        if text == ";" and depth == 0:
            return j
        if text in ("*", "&") and depth == 0:
            return None
        if text == "=" or text in ("{", "}", "end"):
            return None
        if text in ("(", "[", "<"):
            if text == "(" and depth == 0 and tokens[j - 1].text != "decltype":
                return None
            depth += 1
        elif text in (")", "]", ">"):
            depth -= 1
    return None


def _threadgroup_variables(tokens: list[Token]) -> list[Token]:
    result: list[Token] = []
    count = 0
    i = 0
    while i < len(tokens):
        end = threadgroup_declaration(tokens, i)
        if end is None:
            result.append(tokens[i])
            i += 1
            continue
        pieces = []
        kind = ""
        for number, declarator in enumerate(split_at_commas(tokens[i + 1 : end])):
            # The name is the last token before the first [ outside template arguments.
            depth, bracket = 0, len(declarator)
            for j, token in enumerate(declarator):
                depth += (token.text == "<") - (token.text == ">")
                if token.text == "[" and depth == 0:
                    bracket = j
                    break
            name, extents = declarator[bracket - 1].text, " ".join(t.text for t in declarator[bracket:])
            if number == 0:
                kind = " ".join(t.text for t in declarator[: bracket - 1] if t.text != "const")
            count += 1
            pieces.append(f'auto& {name} = msl_threadgroup<{kind} {extents}>({count}, "{name}");')
        result.append(_replacement(" ".join(pieces), tokens[i : end + 1]))
        i = end + 1
    return result


def _is_expression(before: list[Token]) -> bool:
    """Return whether a type's name at this position starts a conversion instead of a declaration."""
    return bool(before) and before[-1].text not in ("operator", "const", "constexpr", "device", "threadgroup", "constant", "thread", "::", ">")


def _constructors(tokens: list[Token]) -> list[Token]:
    result: list[Token] = []
    i = 0
    while i < len(tokens):
        token = tokens[i]
        end = i
        if token.text in ("vec", "packed_vec") and tokens[i + 1].text == "<":
            end = find_closing(tokens, i + 1)
        elif token.kind == "number" and (match := _BFLOAT_LITERAL.match(token.text)):
            result.append(Token(f"((bfloat){match[1]}f)", "number", token.file, token.line, token.before))
            i += 1
            continue
        elif token.text in _HALVES and tokens[i + 1].text == "(" and tokens[i + 2].text not in ("*", "&", ")") and _is_expression(result):
            result.append(Token(f"msl_convert<{token.text}>", "name", token.file, token.line, token.before))
            i += 1
            continue
        elif not VECTOR.match(token.text):
            result.append(token)
            i += 1
            continue
        called = tokens[end + 1].text == "(" and tokens[end + 2].text not in ("*", "&")
        if called and not (result and result[-1].text == "operator"):
            inner = "".join(t.before + t.text for t in tokens[i + 1 : end + 1])
            result.append(Token(f"msl_make<{token.text}{inner}>", "name", token.file, token.line, token.before))
        else:
            result.extend(tokens[i : end + 1])
        i = end + 1
    return result


def _struct_names(tokens: list[Token]) -> set[str]:
    return {tokens[i + 1].text for i, t in enumerate(tokens[:-1]) if t.text in ("struct", "class") and tokens[i + 1].kind == "name"}


def _method_qualifiers(tokens: list[Token]) -> list[Token]:
    structs = _struct_names(tokens)
    result: list[Token] = []
    callee: list[str] = []  # the token before each open parenthesis
    closed = ""  # the token before the last parenthesis that was closed
    for original in tokens:
        token = original
        previous = result[-1].text if result else ""
        after_parameters = previous == ")" or (previous == "const" and len(result) > 1 and result[-2].text == ")")
        if token.text == "(":
            callee.append(previous)
        elif token.text == ")" and callee:
            closed = callee.pop()
        elif token.text == "thread" and after_parameters and closed in structs:
            result.append(Token("", "space", token.file, token.line, token.before))
            continue
        elif token.text == "constant" and after_parameters:
            token = Token("__constant", "name", token.file, token.line, token.before)
        result.append(token)
    return result


def _thread_methods(tokens: list[Token]) -> list[Token]:
    structs = _struct_names(tokens)
    qualified = _qualified_methods(tokens)
    deleted: list[tuple[int, Token]] = []
    scopes: list[bool] = []  # for each open brace: is it a struct's?
    start = 0  # start of the declaration
    for i, token in enumerate(tokens):
        if token.text in ("{", ";") and scopes and scopes[-1]:
            name = _thread_method(tokens[start:i], structs)
            if name and name not in qualified:
                declaration = " ".join(t.text for t in tokens[start:i])
                text = " ".join(f"{declaration} {space} = delete;" for space in ("__global", "__local"))
                deleted.append((start, Token(text, "name", token.file, token.line, " ")))
        if token.text == "{":
            words = [t.text for t in tokens[start:i]]
            scopes.append(bool({"struct", "class", "union"} & set(_without_template_head(words))) and "(" not in words)
            start = i + 1
        elif token.text == "}":
            if scopes:
                scopes.pop()
            start = i + 1
        elif token.text == ";" or (token.text == ":" and tokens[i - 1].text in ("public", "private", "protected")):
            start = i + 1
    for at, token in reversed(deleted):
        tokens.insert(at, token)
    return tokens


def _qualified_methods(tokens: list[Token]) -> set[str]:
    """Return the names of methods that have an overload with an address space."""
    names = set()
    for i, token in enumerate(tokens):
        if token.text in ("device", "threadgroup", "thread") and tokens[i + 1].text in ("{", ";"):
            end = i - 1 - (tokens[i - 1].text == "const")
            depth = 0
            while end > 0:
                depth += (tokens[end].text == ")") - (tokens[end].text == "(")
                end -= 1
                if depth == 0:
                    break
            names.add(tokens[end].text)
    return names


def _without_template_head(words: list[str]) -> list[str]:
    if not words or words[0] != "template":
        return words
    depth = 0
    for i, word in enumerate(words):
        depth += (word == "<") - (word == ">")
        if word == ">" and depth == 0:
            return words[i + 1 :]
    return words


def _thread_method(declaration: list[Token], structs: set[str]) -> str | None:
    """Return the name of the method that is declared without an address space, if any. Conversion operators and constructors do not count."""
    words = [t.text for t in declaration]
    # A lone colon starts a constructor's initializers.
    if {"static", "using", "typedef", "friend", "struct", "class", ":"} & set(_without_template_head(words)) or "(" not in words:
        return None
    last = len(words) - 1
    while last > 0 and words[last] in ("const", "volatile"):
        last -= 1
    if words[last] != ")":
        return None  # it has an address space, or it is no method
    depth, opening = 0, last
    while opening > 0:
        depth += (words[opening] == ")") - (words[opening] == "(")
        if depth == 0:
            break
        opening -= 1
    if "operator" in words[:opening]:
        symbol = words[words.index("operator") + 1]
        return None if symbol[0].isalpha() or symbol[0] == "_" else words[opening - 1]
    returns_something = opening >= 2 and words[opening - 2] not in ("~", "}") and words[opening - 1] not in structs  # so not static_assert either
    return words[opening - 1] if returns_something and "=" not in words[:opening] else None
