"""What an operator may set about the HTTP server. Knows no request and no engine.

Command-line flags and the reference page are made from these fields and their help texts.
"""

from dataclasses import dataclass, field

from octavo.core import POOLING_TYPES, PoolingType
from octavo.engine.logs import LOG_FORMATS
from octavo.errors import ConfigError
from octavo.vision.prompts import MAX_VIDEO_FRAMES


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
    tool_call_parser: str = field(
        default="auto",
        metadata={
            "help": "how the model writes calls of tools: hermes between markers, json as the "
            "whole answer; auto asks the chat template",
            "choices": ("auto", "hermes", "json"),
        },
    )
    reasoning_parser: str = field(
        default="auto",
        metadata={
            "help": "think splits what is between think tags from answers, off leaves it in "
            "them; auto asks the chat template",
            "choices": ("auto", "think", "off"),
        },
    )
    pooling: PoolingType | None = field(
        default=None,
        metadata={
            "help": "what vectors of /v1/embeddings are made of, where a request does not say: the "
            "hidden state of the last or the first token, or the mean over all; default: as the "
            "model was made",
            "choices": POOLING_TYPES,
        },
    )
    max_request_bytes: int = field(
        default=16 * 2**20, metadata={"help": "larger request bodies are refused while reading"}
    )
    allowed_media_domains: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "hosts that images and videos are fetched from, as host or host:port; nothing "
            "is fetched where none is named, and never from an address inside a network that is "
            "not named itself"
        },
    )
    media_timeout_s: float = field(
        default=10.0,
        metadata={"help": "seconds that all images and videos of a request have to be fetched"},
    )
    max_video_frames: int = field(
        default=MAX_VIDEO_FRAMES,
        metadata={
            "help": "frames of one video that a model looks at; longer videos are sampled more "
            "thinly, lists of more frames refused"
        },
    )
    max_prompts: int = field(
        default=1024, metadata={"help": "prompts that one completions request may hold"}
    )
    max_stored_responses: int = field(
        default=1000,
        metadata={
            "help": "responses of /v1/responses kept in memory to be asked for again; oldest go "
            "first, 0 keeps none"
        },
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
        default=60, metadata={"help": "seconds that running requests get after SIGTERM"}
    )
    watchdog_timeout_s: float = field(
        default=60.0,
        metadata={
            "help": "seconds without a finished step, with requests there, after which the engine "
            "counts as stuck and the server as not ready; must exceed the longest step"
        },
    )
    watchdog_action: str = field(
        default="exit",
        metadata={
            "help": "what becomes of an engine that is stuck for twice that time: exit ends all "
            "streams with an error and the server with status 1; log only tells",
            "choices": ("exit", "log"),
        },
    )
    otlp_traces_endpoint: str | None = field(
        default=None,
        metadata={
            "help": "URL to which traces are sent by OTLP over HTTP, such as "
            "http://127.0.0.1:4318/v1/traces; needs the extra octavo[otel]"
        },
    )
    cost_file: str | None = field(
        default=None,
        metadata={
            "help": "TOML file of what the machine costs, by GPU-hour or by joule; /metrics then "
            "tells the cost by tenant and phase"
        },
    )
    log_format: str = field(
        default="text",
        metadata={
            "help": "of log lines on standard error: json has one object a line",
            "choices": LOG_FORMATS,
        },
    )
    log_requests: bool = field(
        default=False,
        metadata={"help": "log each response: route, status, seconds, tokens; never any text"},
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
        for host in self.allowed_media_domains:
            if not host or host != host.lower() or "/" in host or "*" in host:
                raise ConfigError(
                    f"allowed_media_domains takes hosts in lower case, such as images.example.com "
                    f"or 127.0.0.1:9000, got {host!r}"
                )
        if not self.media_timeout_s > 0:
            raise ConfigError(f"media_timeout_s must be above 0, got {self.media_timeout_s}")
        if self.max_video_frames < 1:
            raise ConfigError(f"max_video_frames must be at least 1, got {self.max_video_frames}")
        if "" in self.served_model_name:
            raise ConfigError("served_model_name must not be empty")
        if self.watchdog_action not in ("exit", "log"):
            raise ConfigError(f"watchdog_action must be exit or log, got {self.watchdog_action!r}")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format must be text or json, got {self.log_format!r}")
        if self.tool_call_parser not in ("auto", "hermes", "json"):
            raise ConfigError(
                f"tool_call_parser must be auto, hermes or json, got {self.tool_call_parser!r}"
            )
        if self.reasoning_parser not in ("auto", "think", "off"):
            raise ConfigError(
                f"reasoning_parser must be auto, think or off, got {self.reasoning_parser!r}"
            )
        if self.pooling is not None and self.pooling not in POOLING_TYPES:
            known = ", ".join(POOLING_TYPES)
            raise ConfigError(f"pooling must be one of {known}, got {self.pooling!r}")
        endpoint = self.otlp_traces_endpoint
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"otlp_traces_endpoint must be an http or https URL, got {endpoint!r}: traces go "
                "by OTLP over HTTP, for which collectors listen on port 4318"
            )
        if self.drain_timeout_s < 0:
            raise ConfigError(f"drain_timeout_s must not be negative, got {self.drain_timeout_s}")
        if self.max_stored_responses < 0:
            raise ConfigError(
                f"max_stored_responses must not be negative, got {self.max_stored_responses}"
            )
        positive = {
            "max_request_bytes": self.max_request_bytes,
            "max_prompts": self.max_prompts,
            "read_timeout_s": self.read_timeout_s,
            "write_timeout_s": self.write_timeout_s,
            "keep_alive_s": self.keep_alive_s,
            "watchdog_timeout_s": self.watchdog_timeout_s,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")
