"""The LoRA adapters that an engine has loaded, by name. Knows no tensors and no HTTP."""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from octavo.config import LoRAConfig
from octavo.config.adapter_files import digest_of
from octavo.config.lora import inside
from octavo.core import Adapter, Request
from octavo.errors import ConfigError, ModelError, RequestError, UnknownModelError

MAX_NAME_CHARS = 256


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter for `LLM.generate`, as vLLM names one.

    lora_name: what it is called.
    lora_int_id: a positive number; another one, or another name, has the files read again.
    lora_path: a directory as PEFT saves it.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        if type(self.lora_int_id) is not int or self.lora_int_id < 1:
            raise RequestError("lora_int_id must be a positive integer", param="lora_int_id")
        check_name(self.lora_name)


def check_name(name: str) -> None:
    """Refuse what cannot be the name of an adapter."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise RequestError(
            f"lora_name must be 1 to {MAX_NAME_CHARS} printable characters", param="lora_name"
        )


class AdapterRegistry:
    """Names, versions and host copies. Sole writer: the engine's loop. Without a config it is off.

    A copy stays until nobody needs it: while it has a name, and after that while requests live
    that began with it.

    read: the weights in a directory, checked against `shapes`.
    """

    def __init__(
        self,
        config: LoRAConfig | None = None,
        read: Callable[[Path, Mapping[str, Any]], Any] = lambda directory, shapes: None,
    ):
        self._config = config
        self._read = read
        self.in_use: Callable[[], Set[str]] = frozenset  # by requests
        self.shapes: Mapping[str, Any] = {}  # of what adapters may change in the model
        self._names: dict[str, Adapter] = {}
        self._copies: dict[str, Any] = {}  # by digest

    @property
    def loaded(self) -> tuple[Adapter, ...]:
        """Those that requests may name, in the order in which they came."""
        return tuple(self._names.values())

    def copy_of(self, digest: str) -> Any:
        """The weights of an adapter that requests live with."""
        return self._copies[digest]

    def current(self, request: Request) -> Request:
        """The request with the version of its adapter that has the name now.

        Whoever sent it may not have heard yet of one that was replaced.

        Raises:
            UnknownModelError: none has the name any more.
        """
        asked = request.options.adapter
        if asked is None:
            return request
        if asked.name not in self._names:
            raise UnknownModelError("the adapter was unloaded; see /v1/models", param="model")
        options = structs.replace(request.options, adapter=self._names[asked.name])
        return structs.replace(request, options=options)

    def load(
        self, name: str, path: str, *, replace: bool = False, from_outside: bool = False
    ) -> Adapter:
        """Read an adapter; requests may name it from now on.

        Args:
            name: for requests.
            path: its directory; from outside, below `lora_dir` and perhaps relative to it.
            replace: it may take the name of another, which its requests finish with.
            from_outside: a client of the server says so, not its operator.

        Raises:
            RequestError: it cannot be read, does not fit, or there is no room for one more.
        """
        config = self._need_config()
        check_name(name)
        self.drop_unused()
        if name in self._names and not replace:
            raise RequestError(
                f"the adapter {name!r} is loaded already: unload it first, or set load_inplace",
                param="lora_name",
            )
        directory = _allowed(config, path) if from_outside else Path(path)
        try:
            adapter = Adapter(name, digest_of(directory))
            if adapter.digest not in self._copies:
                self._check_room(config.max_cpu_loras, replaced=self._names.get(name))
                self._copies[adapter.digest] = self._read(directory, self.shapes)
        except ModelError as error:
            # Files are named without their directory: clients may see this.
            text = str(error).replace(f"{directory}/", "")
            raise RequestError(f"the adapter cannot be loaded: {text}", param="lora_path") from None
        self._names[name] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Requests may not name it any more; those that did finish with it.

        Raises:
            UnknownModelError: there is none of that name.
        """
        self._need_config()
        if self._names.pop(name, None) is None:
            raise UnknownModelError("no adapter of that name is loaded", param="lora_name")

    def drop_unused(self) -> None:
        """Forget copies that have neither a name nor a request."""
        named = {adapter.digest for adapter in self._names.values()}
        if len(named) < len(self._copies):
            for digest in self._copies.keys() - named - self.in_use():
                del self._copies[digest]

    def _need_config(self) -> LoRAConfig:
        if self._config is None:
            raise RequestError(
                "this engine serves no adapters: start it with enable_lora", param="lora_name"
            )
        return self._config

    def _check_room(self, most: int, replaced: Adapter | None) -> None:
        if len(self._copies) - (replaced is not None) >= most:
            raise RequestError(
                f"{most} adapters are loaded, and no more may be: unload one, or raise "
                "max_cpu_loras",
                param="lora_name",
            )


def _allowed(config: LoRAConfig, path: str) -> Path:
    """A directory that a client named."""
    if config.lora_dir is None:
        raise RequestError(
            "this server loads no adapters while it runs: start it with --lora-dir",
            param="lora_path",
        )
    try:
        return inside(config.lora_dir, path)
    except ConfigError as error:
        raise RequestError(str(error), param="lora_path") from None
