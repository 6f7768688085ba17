"""The server as a process: what it answers to good requests, to bad ones, to pages from elsewhere, and to Ctrl-C."""

import concurrent.futures
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pytest

from metalens import TunedLens, load
from metalens.display.server import work
from metalens.display.server.requests import CompareRequest, FollowRequest, Limits, ReadRequest
from metalens.display.server.serving import hosts_of, listen
from metalens.utils.errors import UnavailableError
from support.coroutines import run_apart
from support.view_server import COMMAND, JSON, Server, need_server_packages
from support.viewer_page import numbers

LIMIT = 60  # --max-tokens of the server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    need_server_packages()
    lens = tmp_path_factory.mktemp("lens") / "lens"
    TunedLens(8, 256).save(lens)
    running = Server("--lens", lens, "--max-tokens", LIMIT, "--top-k", 4)
    yield running
    running.process.kill()
    running.process.wait()


def test_a_text_is_read_through_both_lenses_and_they_are_compared(server):
    lines = server.lines("/api/read", {"texts": ["Click the button"], "tokens": [" the"]})
    parts = [line for line in lines if line["type"] == "part"]
    assert [(line["text"], line["lens"], line["trajectory"]["lens"]["name"]) for line in parts] == [(0, 0, "logit lens"), (0, 1, "tuned lens")]
    assert len(parts[0]["trajectory"]["chosen"]["ids"]) == 1
    assert [(line["start"], line["comparison"]["of"]) for line in lines if line["type"] == "comparison"] == [(0, [[0, 1], [0, 0]])]
    progress = [line for line in lines if line["type"] == "progress" and line["what"] == "reading"]
    assert progress[0]["done"] == 0
    assert progress[-1]["done"] == progress[-1]["total"]
    assert lines[-1] == {"type": "done"}


def name_of_reading(lines):
    return next(line["reading"] for line in lines if line["type"] == "part")


def comparisons(lines):
    return [line["comparison"] for line in lines if line["type"] == "comparison"]


def test_two_texts_of_one_length_are_compared_when_that_is_asked_for(server):
    lines = server.lines("/api/read", {"texts": ["in the", "on the"]})
    assert [each["of"] for each in comparisons(lines)] == [[[0, 1], [0, 0]], [[1, 1], [1, 0]]]
    (found,) = comparisons(server.lines("/api/compare", {"reading": name_of_reading(lines), "of": [[0, 1], [1, 1]]}))
    assert found["of"] == [[0, 1], [1, 1]]
    assert found["statistics"]["js"]["values"]["shape"][0] == 8


def test_every_layer_is_compared_with_the_next_one(server):
    lines = server.lines("/api/read", {"texts": ["Click the button"]})
    (found,) = comparisons(server.lines("/api/compare", {"reading": name_of_reading(lines), "of": [[0, 1], [0, 1]]}))
    assert set(found["statistics"]) == {"kl", "reverse_kl", "js", "tv"}
    assert found["statistics"]["tv"]["values"]["shape"][0] == 7


PART = 16


def test_a_long_text_is_read_followed_and_compared_in_parts(monkeypatch):
    monkeypatch.setattr(work, "PART", PART)
    model = load("demo")
    session = work.Session(model, [None, TunedLens(8, 256)], Limits(top_k=2))
    text = "Click the button " * 6
    count = len(model.encode(text))
    assert PART < count < 2 * PART
    read = list(session.read(ReadRequest([text], [5])))
    sizes = [[len(line["trajectory"]["token_ids"]) for line in read if line["type"] == "part" and line["lens"] == lens] for lens in (0, 1)]
    assert sizes == [[PART, count - PART]] * 2
    followed = [line for line in session.follow(FollowRequest([7, 5], session.reading, [(0, 1)])) if line["type"] == "chosen"]
    assert [(line["lens"], line["start"], line["total"]) for line in followed] == [(1, 0, count), (1, PART, count)]
    compared = [line for line in session.compare(CompareRequest(session.reading, (0, 0), (0, 0))) if line["type"] == "comparison"]
    assert [line["start"] for line in compared] == [0, PART]
    # The curves of token 5, which was followed from the start, are the same.
    was = [line["trajectory"]["chosen"]["log_probabilities"] for line in read if line["type"] == "part" and line["lens"] == 1]
    for before, line in zip(was, followed, strict=True):
        np.testing.assert_allclose(numbers(line["chosen"]["log_probabilities"])[1], numbers(before)[0], rtol=2e-2)
    assert not [name for name, value in vars(session).items() if "rajectory" in repr(value)]  # nothing is kept of what was read


def test_generation_sends_a_part_of_each_lens_for_each_token(server):
    lines = server.lines("/api/generate", {"texts": ["Click the button"], "new_tokens": 4})
    tuned = [line["trajectory"] for line in lines if line["type"] == "part" and line["lens"] == 1]
    logit = [line["trajectory"] for line in lines if line["type"] == "part" and line["lens"] == 0]
    assert [len(part["token_ids"]) for part in tuned][1:] == [1, 1, 1]
    first = len(tuned[0]["token_ids"])
    assert [part["first_position"] for part in tuned] == [0, *range(first, first + 3)]
    assert [part["token_ids"] for part in logit] == [part["token_ids"] for part in tuned]
    assert [line["start"] for line in lines if line["type"] == "comparison"] == [0, *range(first, first + 3)]


def test_tokens_are_followed_in_the_last_text(server):
    asked = {"tokens": [" the", 5], "reading": name_of_reading(server.lines("/api/read", {"texts": ["Click the button", "Press"]}))}
    chosen = [line for line in server.lines("/api/follow", asked | {"shown": [[0, 1], [0, 0]]}) if line["type"] == "chosen"]
    assert [(line["text"], line["lens"]) for line in chosen] == [(0, 0), (0, 1)]
    only = [line for line in server.lines("/api/follow", asked | {"shown": [[1, 1]]}) if line["type"] == "chosen"]
    assert [(line["text"], line["lens"]) for line in only] == [(1, 1)]
    assert chosen[0]["chosen"]["ids"][1] == 5
    assert chosen[0]["chosen"]["log_probabilities"]["shape"][0] == 2


def test_tokens_are_not_followed_in_a_text_that_another_tab_has_replaced(server):
    first, second = (
        next(line["reading"] for line in server.lines(path, {"texts": ["Click the button"], **more}) if line["type"] == "part")
        for path, more in (("/api/read", {}), ("/api/generate", {"new_tokens": 1}))
    )
    for path, body in (("/api/follow", {"tokens": [" the"], "shown": [[0, 0]]}), ("/api/compare", {"of": [[0, 0], [0, 0]]})):
        status, text, _ = server.ask(path, body | {"reading": first})
        assert (status, "read another text since" in text) == (422, True)
        assert server.lines(path, body | {"reading": second})[-1] == {"type": "done"}


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/api/follow", {"tokens": [5], "shown": [[2, 0]]}, "There is no text 2 with a lens 0"),
        ("/api/follow", {"tokens": [5], "shown": [[0, 2]]}, "There is no text 0 with a lens 2"),
        ("/api/compare", {"of": [[0, 0], [0, 1]]}, "compared while a text is read"),
        ("/api/compare", {"of": [[0, 0], [1, 0]]}, "Read texts of equal length"),
    ],
)
def test_what_was_not_read_is_not_followed_and_not_compared(server, path, body, says):
    reading = name_of_reading(server.lines("/api/read", {"texts": ["Click the button", "Press"]}))
    status, text, _ = server.ask(path, body | {"reading": reading})
    assert (status, says in text) == (422, True), text


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/api/read", b"{", 422, "no JSON"),
        ("/api/read", b"[" * 100_000, 422, "no JSON"),
        ("/api/read", b"[1]", 422, "JSON object"),
        ("/api/read", {}, 422, "one or 2 texts"),
        ("/api/read", {"texts": []}, 422, "one or 2 texts"),
        ("/api/read", {"texts": [""]}, 422, "none of them empty"),
        ("/api/read", {"texts": [3]}, 422, "one or 2 texts"),
        ("/api/read", {"texts": ["a"] * 3}, 422, "one or 2 texts"),
        ("/api/read", {"texts": ["a"], "layers": [900]}, 422, "'layers', which this server does not know"),
        ("/api/read", {"texts": ["a"], "tokens": ["no single token, this"]}, 422, "token"),
        ("/api/read", {"texts": ["a"], "tokens": [10**9]}, 422, "1000000000"),
        ("/api/read", {"texts": ["a"], "tokens": [-1]}, 422, "-1"),
        ("/api/read", {"texts": ["a"], "tokens": [True]}, 422, "'tokens' must be"),
        ("/api/read", {"texts": ["a"], "tokens": ["a"] * 50}, 422, "at most 6"),
        ("/api/read", {"texts": ["\ud800"]}, 422, "surrogate"),
        ("/api/read", {"texts": ["word " * 100_000]}, 422, f"at most {LIMIT}"),
        ("/api/read", {"texts": ["x" * 2**21]}, 413, "Shorten the text"),
        ("/api/generate", {"texts": ["a"], "new_tokens": 10**9}, 422, "'new_tokens' must be"),
        ("/api/generate", {"texts": ["a"], "new_tokens": 0}, 422, "'new_tokens' must be"),
        ("/api/generate", {"texts": ["a"], "new_tokens": LIMIT}, 422, f"at most {LIMIT}"),
        ("/api/generate", {"texts": ["a", "b"], "new_tokens": 1}, 422, "one text"),
        ("/api/follow", {"tokens": []}, 422, "'tokens' is empty"),
        ("/api/follow", {"tokens": [" the"], "shown": [[0, 0]]}, 422, "'reading' must be"),
        ("/api/follow", {"tokens": [" the"], "reading": "a"}, 422, "'shown' must be a list of 1 to 4 pairs"),
        ("/api/follow", {"tokens": [" the"], "reading": "a", "shown": [[0, -1]]}, 422, "'shown' must be"),
        ("/api/follow", {"tokens": [" the"], "reading": "a", "shown": [[0, True]]}, 422, "'shown' must be"),
        ("/api/follow", {"tokens": [" the"], "reading": "a", "shown": [[0, 0]] * 5}, 422, "'shown' must be"),
        ("/api/compare", {"reading": "a", "of": [[0, 0]]}, 422, "two trajectories"),
        ("/api/compare", {"of": [[0, 0], [0, 0]]}, 422, "'reading' must be"),
        ("/api/nothing", {}, 404, ""),
    ],
)
def test_bad_requests_get_one_clear_answer(server, path, body, status, says):
    found, text, _ = server.ask(path, body)
    assert (found, says in text) == (status, True), text
    assert "Traceback" not in text
    assert server.lines("/api/read", {"texts": ["still here"]})[-1] == {"type": "done"}


@pytest.mark.parametrize(
    "headers",
    [
        {**JSON, "Origin": "https://elsewhere.example"},
        {**JSON, "Origin": "null"},
        {**JSON, "Origin": "http://localhost:1"},
        {**JSON, "Sec-Fetch-Site": "cross-site"},
        {**JSON, "Host": "elsewhere.example"},
        {**JSON, "Host": "127.0.0.1"},
        {**JSON, "Host": "localhost.elsewhere.example:80"},
    ],
)
def test_pages_from_elsewhere_are_refused(server, headers):
    status, text, answer = server.ask("/api/read", {"texts": ["a"]}, headers)
    assert status == 403
    assert "only" in text
    assert "access-control-allow-origin" not in answer


def test_a_form_of_another_page_is_no_json(server):
    assert server.ask(body={"texts": ["a"]}, headers={"Content-Type": "text/plain"})[0] == 415


def test_the_page_has_its_headers_and_the_name_localhost_works_too(server):
    status, text, headers = server.ask("/", b"", {"Host": f"localhost:{server.port}"}, "GET")
    assert (status, "<!doctype html>" in text) == (200, True)
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert server.ask("/api/read", b"", {}, "GET")[0] == 405


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("path", ["/", "/api/read"])
def test_without_its_key_the_server_answers_nobody(server, path, method):
    for key in ("", "x", server.key[:-1], server.key + "x", server.key.swapcase(), "%2e%2e", "%ff", "api", f"x/{server.key}"):
        status, text, headers = server.ask(path, {"texts": ["a"]}, method=method, key=key)
        assert (status, "lacks the key" in text) == (403, True), key
        assert "doctype" not in text
        assert server.key not in text + str(headers)


def test_only_this_machine_is_listened_to(server):
    with socket.socket() as other:
        other.settimeout(2)
        with pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", server.port))  # this machine too, but another address of it


def test_ten_requests_at_once_get_an_answer_each(server):
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        asked = [pool.submit(server.ask, "/api/generate", {"texts": ["Click the"], "new_tokens": 30}) for _ in range(10)]
        answers = [each.result() for each in asked]
    statuses = [status for status, _, _ in answers]
    assert set(statuses) <= {200, 409}
    assert 200 in statuses
    assert all("one at a time" in text for status, text, _ in answers if status == 409)


def test_a_browser_that_goes_away_frees_the_server(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(server.written("/api/generate", {"texts": ["Click the"], "new_tokens": 50}))
        assert connection.recv(100)
    for _ in range(100):
        status, text, _ = server.ask("/api/read", {"texts": ["still here"]})
        if status == 200:
            return
        time.sleep(0.1)
    raise AssertionError(text)


def test_ctrl_c_in_the_middle_of_a_job_ends_it(server):
    first, server = server, Server("--max-tokens", 400)
    assert server.key != first.key  # each server has its own
    assert len(server.key) >= 22  # 128 bits in base64
    assert server.ask(key=first.key)[0] == 403
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(server.written("/api/generate", {"texts": ["Click the"], "new_tokens": 250}))
        received = connection.recv(100)
        assert server.stop() == 0
        while more := connection.recv(2**16):
            received += more
    assert b'"done":250' not in received


def test_a_port_that_is_taken_is_one_clear_error(server):
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "view", "demo", "--port", str(server.port)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 1
    assert f"Port {server.port} is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_is_taken_as_soon_as_one_server_starts():
    with listen(0) as first, pytest.raises(UnavailableError, match="is in use"):
        listen(first.getsockname()[1])


def test_browsers_leave_out_port_80():
    need_server_packages()
    responses = import_module("starlette.responses")
    from metalens.display.server.application import Guard

    def status(port, **headers):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/key/", "query_string": b"", "headers": raw}
        run_apart(Guard(responses.PlainTextResponse("the page"), hosts_of(port), "key")(scope, receive, send))
        return sent[0]["status"]

    assert status(80, Host="localhost", Origin="http://localhost") == 200
    assert status(80, Host="127.0.0.1:80", Origin="http://127.0.0.1") == 200
    assert status(80, Host="elsewhere.example") == 403
    assert status(8000, Host="localhost", Origin="http://localhost") == 403


def test_no_websocket_comes_past_the_guard():
    need_server_packages()
    from metalens.display.server.application import Guard

    sent = []

    async def served(scope, receive, send):
        sent.append("served")

    async def send(message):
        sent.append(message)

    run_apart(Guard(served, ["localhost"], "key")({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize(("model", "code", "says"), [("no-such-model", 1, "Error: "), ("demo", 130, "")])
def test_an_end_while_the_model_is_loaded_has_its_exit_code(model, code, says):
    slow = "import time; from metalens.cli import view; load = view.load_model; view.load_model = lambda name: time.sleep(60) or load(name)"
    # Tests that a shell runs in the background inherit that SIGINT is ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = f"{heard}; {slow}; {COMMAND}" if code == 130 else COMMAND
    process = subprocess.Popen([sys.executable, "-c", command, "view", model], stderr=subprocess.PIPE, text=True)
    assert "Loading" in process.stderr.readline()
    if code == 130:
        time.sleep(1)
        process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == code
    assert says in rest
    assert "Traceback" not in rest


def test_the_embedding_is_a_layer_of_everything_that_is_sent():
    session = work.Session(load("demo"), [None, TunedLens(8, 256, embedding=True)], Limits(top_k=2), embedding=True)
    lines = [*session.read(ReadRequest(["Click the button"], [5])), *session.generate(ReadRequest(["Click the"], [5], 2))]
    parts = [line["trajectory"] for line in lines if line["type"] == "part"]
    assert {tuple(layer["layer"] for layer in part["layers"]) for part in parts} == {("embedding", *range(8))}
    assert all(layer["translated"] for part in parts for layer in part["layers"])
    compared = comparisons(lines)
    assert {line["statistics"]["js"]["values"]["shape"][0] for line in compared} == {9}
    followed = [line for line in session.follow(FollowRequest([7], session.reading, [(0, 1)])) if line["type"] == "chosen"]
    assert {line["chosen"]["log_probabilities"]["shape"][1] for line in followed} == {9}
    layers = [line for line in session.compare(CompareRequest(session.reading, (0, 0), (0, 0))) if line["type"] == "comparison"]
    assert {line["comparison"]["statistics"]["js"]["values"]["shape"][0] for line in layers} == {8}
