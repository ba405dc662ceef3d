"""`octavo chat`, `generate` and `explain` as processes, on a tiny model."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from octavo.cli import main
from octavo.testing.tiny_llama import write_tiny_llama

pytestmark = pytest.mark.server

SMALL = ["--kv-cache-memory-bytes", str(2**23), "--device", "cpu", "--num-threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_llama(tmp_path_factory.mktemp("models") / "tiny"))


def octavo(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "octavo.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_generate_prints_an_answer(model):
    run = octavo("generate", model, "--prompt", "Hello", "--max-tokens", "5", *SMALL)
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.strip()


def test_generate_answers_a_file_line_by_line(model, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        {"prompt": "one", "id": 7},
        {"messages": [{"role": "user", "content": "two"}], "max_tokens": 3},
        {"prompt_token_ids": [1, 2, 3], "temperature": 0.5, "seed": 1},
    ]
    source.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    flags = ["--max-tokens", "6", "--temperature", "0"]
    run = octavo("generate", model, "--input", str(source), "--output", str(target), *flags, *SMALL)
    assert run.returncode == 0, run.stderr
    assert "3/3" in run.stderr  # the progress bar
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert [len(a["token_ids"]) for a in answers] == [6, 3, 6]
    assert answers[0]["id"] == 7 and answers[0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "line 1, is not JSON"),
        ('{"text": "x"}', "line 1: each line must be an object with one of prompt"),
        ("\n", "holds no prompts"),
        ('{"prompt": "a", "temperature": -1}', "line 1: temperature"),
        ('{"prompt": "a", "max_tokens": 100000}', "100001"),
    ],
)
def test_a_bad_input_file_is_refused_with_its_line(model, tmp_path, content, expected):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(content)
    run = octavo("generate", model, "--input", str(source), "--output", str(target), *SMALL)
    assert run.returncode == 1
    assert expected in run.stderr and "Traceback" not in run.stderr
    assert not target.exists()


def test_explain_names_the_source_of_every_value(model):
    run = octavo("explain", model, "--max-num-seqs", "9", *SMALL)
    assert run.returncode == 0, run.stderr
    rows = {line.split()[0]: line.split()[1:3] for line in run.stdout.splitlines()[2:] if line}
    assert rows["max_num_seqs"] == ["9", "user"]
    assert rows["dtype"] == ["float32", "checkpoint"]
    assert rows["max_model_len"] == ["512", "checkpoint"]
    assert rows["max_num_batched_tokens"] == ["1024", "rule"]


def test_an_unknown_flag_value_is_refused(model):
    assert octavo("explain", model, "--dtype", "int3").returncode == 2
    run = octavo("explain", model, "--block-size", "-1")
    assert run.returncode == 1 and "block_size must be a positive integer" in run.stderr


class Terminal:
    """A program on a terminal of its own, so that Ctrl-C reaches it as it reaches a user's."""

    def __init__(self, *arguments):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execv(sys.executable, [sys.executable, "-m", "octavo.cli", *arguments])
        self.seen = ""

    def wait_for(self, text, timeout_s=30.0):
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], deadline - time.monotonic())
            assert ready, f"no {text!r} in {self.seen!r}"
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def wait_for_more(self, timeout_s=30.0):
        ready, _, _ = select.select([] if self.seen else [self.fd], [], [], timeout_s)
        assert ready or self.seen, "nothing more came"

    def send(self, text):
        os.write(self.fd, text.encode())

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.fd)  # afterwards: it would hang up on a program that still runs
        if error is None:
            assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.filterwarnings("ignore:.*use of forkpty.*:DeprecationWarning")
def test_chat_streams_stops_resets_and_reports(tmp_path):
    # A long context, so that the answer is surely not over when it is stopped.
    model = str(write_tiny_llama(tmp_path / "tiny", max_position_embeddings=16384, eos_token_id=[]))
    flags = ["--temperature", "0", "--max-tokens", "16000", *SMALL]
    with Terminal("chat", model, *flags) as chat:
        chat.wait_for("\n> ")
        chat.send("hello\n")
        chat.wait_for("hello\r\n")
        chat.wait_for_more()  # the answer has begun
        chat.send("\x03")  # Ctrl-C during the answer: it ends, the program does not
        chat.wait_for("[stopped]")
        chat.wait_for("\n> ")
        chat.send("/stats\n")
        assert "2 messages" in chat.wait_for("blocks in use: 0 of")
        chat.wait_for("\n> ")
        time.sleep(0.2)  # Python notices a Ctrl-C only once it really reads
        chat.send("\x03")  # Ctrl-C at the prompt drops the line
        chat.wait_for("\n> ")
        chat.send("/reset\n")
        chat.wait_for("a new conversation")
        chat.wait_for("\n> ")
        chat.send("/stats\n")
        assert "0 messages" in chat.wait_for("tokens/s")
        chat.wait_for("\n> ")
        chat.send("/exit\n")


def test_the_end_of_the_input_ends_a_chat(model):
    run = subprocess.run(
        [sys.executable, "-m", "octavo.cli", "chat", model, "--max-tokens", "4", *SMALL],
        input="hi\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr


def test_a_batch_file_is_answered_and_taken_up_again(model, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "Hello", "max_tokens": 3, "temperature": 0}
    requests = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        for i in range(5)
    ]
    requests[3] = requests[3] | {"body": body | {"max_tokens": -1}}
    source.write_text("\n".join(map(json.dumps, requests)))
    command = ("run-batch", model, "-i", str(source), "-o", str(target), *SMALL)
    run = octavo(*command)
    assert run.returncode == 1 and "5 answers, 1 of them errors" in run.stderr
    lines = map(json.loads, target.read_text().splitlines())
    answers = {line["custom_id"]: line["response"] for line in lines}
    assert [answers[str(i)]["status_code"] for i in range(5)] == [200, 200, 200, 400, 200]
    assert len({answers[i]["body"]["choices"][0]["text"] for i in "0124"}) == 1
    assert "exists" in octavo(*command).stderr, "nothing is overwritten"
    requests[3]["body"] = body
    source.write_text("\n".join(map(json.dumps, requests)))
    run = octavo(*command, "--resume")
    assert run.returncode == 0 and "1 answers, 0 of them errors" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "usage", "said"),
    [
        (["serve", "--max-num-seq", "3"], "octavo serve", "--max-num-seq; like it: --max-num-seqs"),
        (
            ["generate", "--model", "x", "--prompt", "a"],
            "octavo generate",
            "--model; like it: --mod",
        ),
        (["bench", "serve", "--input-len=3"], "octavo bench serve", "like it: --random-input-len"),
        (["plan", "--xyzzy"], "octavo plan", "unrecognized arguments: --xyzzy\n"),
    ],
)
def test_an_unknown_flag_is_refused_by_its_command_with_those_like_it(
    capsys, arguments, usage, said
):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"usage: {usage} [-h]") and said in error
