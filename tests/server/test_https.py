"""HTTPS with a certificate of the operator's."""

import ssl
from pathlib import Path

import httpx
import pytest
import trustme
from server.helpers import serving

from octavo.errors import ConfigError
from octavo.server import ServerConfig
from octavo.testing.fake_engine import FakeEngine


def test_a_stream_over_https_and_no_answer_over_http(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(str(chain), append=True)
    certificate.private_key_pem.write_to_path(str(key))
    config = ServerConfig(ssl_certfile=str(chain), ssl_keyfile=str(key))
    assert config.scheme == "https"
    body = {"prompt": "Hello", "max_tokens": 5, "stream": True}
    with serving(FakeEngine(), config) as server:
        url = f"https://127.0.0.1:{server.port}"
        trusting = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        with httpx.Client(verify=trusting, base_url=url) as client:
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(url + "/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{server.port}/health")


def test_half_of_a_certificate_is_refused() -> None:
    with pytest.raises(ConfigError, match="ssl_keyfile"):
        ServerConfig(ssl_certfile="chain.pem")
