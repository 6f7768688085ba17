"""The server as a process: what it answers to good requests, to bad ones, to pages from elsewhere, and to Ctrl-C."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys
import time

import pytest

from metalens import TunedLens
from metalens.display.server.serving import hosts_of, listen
from metalens.utils.errors import UnavailableError
from support.coroutines import run_apart
from support.view_server import COMMAND, JSON, Server

LIMIT = 60  # --max-tokens of the server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
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
    assert [line["comparison"]["of"] for line in lines if line["type"] == "comparison"] == [[[0, 1], [0, 0]]]
    progress = [line for line in lines if line["type"] == "progress" and line["what"] == "reading"]
    assert progress[0]["done"] == 0
    assert progress[-1]["done"] == progress[-1]["total"]
    assert lines[-1] == {"type": "done"}


def test_two_texts_of_one_length_are_compared(server):
    lines = server.lines("/api/read", {"texts": ["in the", "on the"]})
    of = [line["comparison"]["of"] for line in lines if line["type"] == "comparison"]
    assert [[0, 1], [1, 1]] in of
    assert len(of) == 4


def test_generation_sends_a_part_for_each_token_and_then_the_other_lens(server):
    lines = server.lines("/api/generate", {"texts": ["Click the button"], "new_tokens": 4})
    tuned = [line["trajectory"] for line in lines if line["type"] == "part" and line["lens"] == 1]
    logit = [line["trajectory"] for line in lines if line["type"] == "part" and line["lens"] == 0]
    assert [len(part["token_ids"]) for part in tuned][1:] == [1, 1, 1]
    assert [part["first_position"] for part in tuned] == [0, *range(len(tuned[0]["token_ids"]), len(tuned[0]["token_ids"]) + 3)]
    assert [i for part in logit for i in part["token_ids"]] == [i for part in tuned for i in part["token_ids"]]


def test_tokens_are_followed_in_the_last_text(server):
    part = next(line for line in server.lines("/api/read", {"texts": ["Click the button"]}) if line["type"] == "part")
    chosen = [line for line in server.lines("/api/follow", {"tokens": [" the", 5], "reading": part["reading"]}) if line["type"] == "chosen"]
    assert [(line["text"], line["lens"]) for line in chosen] == [(0, 0), (0, 1)]
    assert chosen[0]["chosen"]["ids"][1] == 5
    assert chosen[0]["chosen"]["log_probabilities"]["shape"][0] == 2


def test_tokens_are_not_followed_in_a_text_that_another_tab_has_replaced(server):
    first, second = (
        next(line["reading"] for line in server.lines(path, {"texts": ["Click the button"], **more}) if line["type"] == "part")
        for path, more in (("/api/read", {}), ("/api/generate", {"new_tokens": 1}))
    )
    status, text, _ = server.ask("/api/follow", {"tokens": [" the"], "reading": first})
    assert (status, "read another text since" in text) == (422, True)
    assert server.lines("/api/follow", {"tokens": [" the"], "reading": second})[-1] == {"type": "done"}


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
        ("/api/follow", {"tokens": [" the"]}, 422, "'reading' must be"),
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
    body = json.dumps({"texts": ["Click the"], "new_tokens": 50}).encode()
    head = f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(100)
    for _ in range(100):
        status, text, _ = server.ask("/api/read", {"texts": ["still here"]})
        if status == 200:
            return
        time.sleep(0.1)
    raise AssertionError(text)


def test_ctrl_c_in_the_middle_of_a_job_ends_it():
    server = Server("--max-tokens", 400)
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        body = json.dumps({"texts": ["Click the"], "new_tokens": 250}).encode()
        head = (
            f"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
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
    responses = pytest.importorskip("starlette.responses")
    from metalens.display.server.application import Guard

    def status(port, **headers):
        sent = []

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message):
            sent.append(message)

        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": raw}
        run_apart(Guard(responses.PlainTextResponse("the page"), hosts_of(port))(scope, receive, send))
        return sent[0]["status"]

    assert status(80, Host="localhost", Origin="http://localhost") == 200
    assert status(80, Host="127.0.0.1:80", Origin="http://127.0.0.1") == 200
    assert status(80, Host="elsewhere.example") == 403
    assert status(8000, Host="localhost", Origin="http://localhost") == 403


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
