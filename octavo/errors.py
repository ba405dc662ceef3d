"""Every exception that Octavo raises on purpose.

    OctavoError
    ├── ConfigError              a flag, config value or combination that cannot work
    ├── ModelError               a model cannot be found, read or run
    │   ├── ModelNotFoundError   no such alias, path or reachable hub id
    │   ├── CheckpointError      a file is truncated, lies about itself, or lacks tensors
    │   └── UnsupportedModelError    the checkpoint is sound, but asks for what we lack
    ├── RequestError             one request is wrong; nothing else is affected
    │   ├── ContextLengthError   prompt + output exceed the model's context
    │   ├── CapacityError        the request can never fit the KV pool
    │   ├── InvalidImageError    an image or video is damaged, too large or of no known format
    │   └── UnknownModelError    the request names a model that is not served
    ├── OverloadedError          the queue is full; the same request may succeed later
    │   └── SleepingError        the engine sleeps; the same request succeeds once it is woken
    ├── EngineDeadError          the engine process is gone; nothing will succeed until a restart
    └── IntegrityError           a structure's own recount disagrees with it: a bug of ours

The text of a `RequestError` is shown to remote clients, so it never holds a path, a repr or an
address. `ModelError` and `ConfigError` are shown to the operator and may name files.
"""


class OctavoError(Exception):
    """Base of all errors that Octavo raises on purpose."""


class ConfigError(OctavoError):
    """A flag, config value or combination that cannot work."""


class ModelError(OctavoError):
    """A model cannot be found, read or run.

    `field` names the entry of the config that is wrong, where it is one.
    """

    field: str | None = None


class ModelNotFoundError(ModelError):
    """No such alias, path or reachable hub id."""


class CheckpointError(ModelError):
    """A checkpoint file is truncated, lies about itself, or lacks tensors."""


class UnsupportedModelError(ModelError):
    """The checkpoint is sound, but its architecture or one of its options is not supported."""


class RequestError(OctavoError):
    """One request is wrong.

    `param` names the offending field, `code` is a stable machine-readable word; either may be
    None.
    """

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class ContextLengthError(RequestError):
    """Prompt and requested output together exceed the model's context."""

    code = "context_length_exceeded"


class CapacityError(RequestError):
    """The request could never fit the KV pool, even alone."""

    code = "kv_capacity_exceeded"


class InvalidImageError(RequestError):
    """An image or a video of the request is damaged, too large or in no format that is read."""

    code = "invalid_image"


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"


class OverloadedError(OctavoError):
    """The waiting queue is full; the same request may succeed after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SleepingError(OverloadedError):
    """The engine sleeps, or is on the way there or back."""


class EngineDeadError(OctavoError):
    """The engine is gone; the message carries its last words."""


class IntegrityError(OctavoError):
    """A structure's own recount disagrees with its books. Always a bug of ours."""
