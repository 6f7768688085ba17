"""`metalens view` as a process, for the tests of its server and of its page."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys

COMMAND = "import sys; from metalens.cli import main; sys.argv[0] = 'metalens'; main()"
JSON = {"Content-Type": "application/json"}


class Server:
    """`metalens view` in a process of its own."""

    def __init__(self, *options):
        command = [sys.executable, "-c", COMMAND, "view", "demo", *map(str, options)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "METALENS_NUM_THREADS": "1"})
        for line in self.process.stderr:
            if found := re.search(r"http://127\.0\.0\.1:(\d+)/", line):
                self.port = int(found[1])
                return
        raise AssertionError(f"the server did not start: exit code {self.process.wait()}")

    @property
    def address(self):
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, path="/api/read", body=b"{}", headers=JSON, method="POST"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers

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
