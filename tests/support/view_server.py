"""`metalens view` as a process, for the tests of its server and of its page."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys

import pytest


def need_server_packages():
    """Skip the test where the server's packages are missing."""
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason=f"{package} is optional and not installed: pip install 'metalens[view]'")


COMMAND = "import sys; from metalens.cli import main; sys.argv[0] = 'metalens'; main()"
JSON = {"Content-Type": "application/json"}


class Server:
    """`metalens view` in a process of its own."""

    def __init__(self, *options):
        command = [sys.executable, "-c", COMMAND, "view", "demo", *map(str, options)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "METALENS_NUM_THREADS": "1"})
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/([\w-]+)/", line):
                self.port, self.key = int(found[1]), found[2]
                return
        raise AssertionError(f"the server did not start: exit code {self.process.wait()}")

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}/{self.key}/"

    def ask(self, path="/api/read", body=b"{}", headers=JSON, method="POST", key=None):
        """Ask for a path behind the key of the server, or behind another one."""
        path = f"/{self.key if key is None else key}{path}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers

    def written(self, path, body):
        """Return a request as it goes over the wire, for a connection that the test itself ends."""
        data = json.dumps(body).encode()
        fields = {"Host": f"127.0.0.1:{self.port}", "Content-Length": len(data), **JSON}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"POST /{self.key}{path} HTTP/1.1\r\n{head}\r\n".encode() + data

    def lines(self, path, body):
        status, text, _ = self.ask(path, body)
        assert status == 200, text
        return [json.loads(line) for line in text.splitlines()]

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
