"""Files that a server cannot write: they cost what they would have held, and nothing else."""

import logging
from pathlib import Path

import httpx
import pytest
from server.helpers import client_of

from octavo.cli import main
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine


async def test_F48_a_usage_file_that_cannot_be_written_costs_no_answer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    keys, usage = tmp_path / "keys.toml", tmp_path / "usage.json"
    assert main(["keys", "someone", "--file", str(keys), "--max-tokens", "1000"]) == 0
    key = capsys.readouterr().out.split()[0]
    (tmp_path / "usage.json.new").mkdir()  # what is written first cannot be
    config = ServerConfig(api_key_file=str(keys), usage_file=str(usage))
    headers = {"authorization": f"Bearer {key}"}
    client: httpx.AsyncClient
    async with client_of(FakeEngine(), config) as client:
        body = {"prompt": "Hello", "max_tokens": 5}
        for _ in range(2):
            response = await client.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 200
        state = client._transport.app.state.octavo
        with caplog.at_level(logging.ERROR):
            state.keys.usage.save()
    assert "usage.json is not written" in caplog.text
    assert not usage.exists()
