"""What an operator may set about the HTTP server. Knows no request and no engine.

Command-line flags and the reference page are made from these fields and their help texts.
"""

from dataclasses import dataclass, field

from octavo.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of one front-end process."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    served_model_name: tuple[str, ...] = field(
        default=(), metadata={"help": "further names under which clients may ask for the model"}
    )
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata={
            "help": "key that clients must send, as a bearer token, to all but /health; better in "
            "the environment, as OCTAVO_API_KEY, where other users of the machine do not see it"
        },
    )
    api_key_file: str | None = field(
        default=None,
        metadata={
            "help": "TOML file of keys with scopes, tenants and limits, see `octavo keys`; read "
            "again when it changes"
        },
    )
    usage_file: str | None = field(
        default=None,
        metadata={"help": "where the tokens that each key used are kept over restarts"},
    )
    ssl_certfile: str | None = field(
        default=None, metadata={"help": "certificate chain, PEM: serve HTTPS instead of HTTP"}
    )
    ssl_keyfile: str | None = field(
        default=None, metadata={"help": "private key of the certificate, PEM"}
    )
    max_request_bytes: int = field(
        default=16 * 2**20, metadata={"help": "larger request bodies are refused while reading"}
    )
    max_prompts: int = field(
        default=1024, metadata={"help": "prompts that one completions request may hold"}
    )
    read_timeout_s: float = field(
        default=30.0, metadata={"help": "seconds a client has to send its headers, then its body"}
    )
    write_timeout_s: float = field(
        default=60.0, metadata={"help": "seconds a client may leave an answer unread in its socket"}
    )
    keep_alive_s: int = field(
        default=60, metadata={"help": "seconds an idle connection is kept open"}
    )
    drain_timeout_s: int = field(
        default=30, metadata={"help": "seconds that running requests get after SIGTERM"}
    )

    @property
    def scheme(self) -> str:
        """Of the server's URL."""
        return "http" if self.ssl_certfile is None else "https"

    @property
    def is_open(self) -> bool:
        """True where nobody needs a key."""
        return self.api_key is None and self.api_key_file is None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in 0..65535, got {self.port}")
        if self.api_key is not None and not self.api_key.strip():
            raise ConfigError("api_key must not be empty: leave it out to serve without a key")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ConfigError("HTTPS needs both ssl_certfile and ssl_keyfile")
        if self.usage_file is not None and self.api_key_file is None:
            raise ConfigError("usage_file counts the use of keys: give api_key_file, too")
        if "" in self.served_model_name:
            raise ConfigError("served_model_name must not be empty")
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s must not be negative, got {self.drain_timeout_s}")
        positive = {
            "max_request_bytes": self.max_request_bytes,
            "max_prompts": self.max_prompts,
            "read_timeout_s": self.read_timeout_s,
            "write_timeout_s": self.write_timeout_s,
            "keep_alive_s": self.keep_alive_s,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")
