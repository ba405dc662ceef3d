"""What is fetched of a model on a hub, here on 127.0.0.1: who only looks gets no weights."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from octavo.testing.tiny_models import write_tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


class Hub(BaseHTTPRequestHandler):
    """The part of Hugging Face's API that its library asks for a model that is not here."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[list[tuple[str, int]]] = []  # (file, bytes that were sent of it)

    def do_GET(self):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/name"):
            names = sorted(self.files)
            if "/tree/" in path:
                body = [self._entry(name) for name in names]
            else:
                siblings = [{"rfilename": name} for name in names]
                body = {"id": "org/name", "sha": COMMIT, "siblings": siblings}
            return self._send(200, json.dumps(body).encode(), "application/json")
        return self._file(path)

    def do_HEAD(self):
        self._file(self.path.split("?")[0])

    def log_message(self, *_):
        """Not to the terminal of the tests."""

    def _entry(self, name):
        size = len(self.files[name])
        return {"type": "file", "path": name, "size": size, "oid": f"{len(name):040x}"}

    def _file(self, path):
        name = path.rpartition("/")[2]
        if name not in self.files:
            return self._send(404, b"", "text/plain")
        data, status = self.files[name], 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")):
            data, status = data[int(found[1]) : int(found[2]) + 1], 206
        if self.command == "GET":
            self.fetched.append((name, len(data)))
        return self._send(status, data, "application/octet-stream", name)

    def _send(self, status, body, kind, name=""):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(name):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with weights of more than the 100 kB in which the library looks for a head."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(directory, "llama")
    assert (directory / WEIGHTS).stat().st_size > 400_000
    return directory


@pytest.fixture
def hub(model, tmp_path):
    """(the hub's bookkeeping, a function that runs a command with it as the only hub)"""
    Hub.files = {path.name: path.read_bytes() for path in model.iterdir()}
    Hub.files |= {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"a pickle"}
    Hub.fetched = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }

    def run(*command, offline=False):
        program = [] if command[0] == "-c" else ["-m", "octavo.cli"]
        return subprocess.run(
            [sys.executable, *program, *command],
            env=environment | ({"HF_HUB_OFFLINE": "1"} if offline else {}),
            capture_output=True,
            text=True,
            timeout=120,
        )

    yield Hub, run
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_plan_fetches_no_weights(hub):
    on_hub, run = hub
    done = run("plan", "org/name", "--device", "h100-80gb")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("org/name on NVIDIA H100 80GB")
    fetched = {name for name, _ in on_hub.fetched}
    assert "config.json" in fetched
    assert all(name.endswith((".json", ".jinja")) for name in fetched)


def test_an_inspection_fetches_the_heads_of_weights_alone(hub, model):
    on_hub, run = hub
    done = run("inspect", "org/name", "--json", "--fit")
    assert done.returncode == 0, done.stderr
    found, local = json.loads(done.stdout), json.loads(run("inspect", str(model), "--json").stdout)
    assert found["tensors"] == local["tensors"] and len(found["tensors"]) > 10
    assert found["fit_problems"] == found["tensor_problems"] == []
    [(_, num_bytes)] = [one for one in on_hub.fetched if one[0] == WEIGHTS]
    assert num_bytes < len(on_hub.files[WEIGHTS]) / 3


def test_weights_whose_head_is_damaged_are_a_problem_with_a_name(hub):
    on_hub, run = hub
    on_hub.files |= {WEIGHTS: b"\xff" * 1000}
    done = run("inspect", "org/name", "--json")
    [problem] = json.loads(done.stdout)["tensor_problems"]
    assert problem.startswith(f"the head of {WEIGHTS} cannot be had from the hub: Safetensors")


def test_who_loads_a_model_gets_its_weights_and_needs_no_hub_after_that(hub):
    on_hub, run = hub
    find = ["-c", "from octavo.config import locate; print(locate('org/name').path)"]
    assert run("plan", "org/name", "--device", "h100-80gb").returncode == 0
    alone = run(*find, offline=True)
    assert alone.returncode != 0
    assert "neither on this machine nor could it be had from the hub" in alone.stderr
    done = run(*find)
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / WEIGHTS).read_bytes() == on_hub.files[WEIGHTS]
    assert (WEIGHTS, len(on_hub.files[WEIGHTS])) in on_hub.fetched
    assert not {"modeling.py", "pytorch_model.bin"} & {name for name, _ in on_hub.fetched}
    num_fetched = len(on_hub.fetched)
    again = run(*find, offline=True)
    assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
    assert len(on_hub.fetched) == num_fetched


def test_random_weights_need_none_of_the_hubs(hub):
    on_hub, run = hub
    flags = ["--load-format", "dummy", "--prompt", "a", "--max-tokens", "2"]
    done = run("generate", "org/name", *flags)
    assert done.returncode == 0, done.stderr
    assert WEIGHTS not in {name for name, _ in on_hub.fetched}
