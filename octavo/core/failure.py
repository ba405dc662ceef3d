"""What kind of failure ended a request."""

import enum


class FailureCode(enum.StrEnum):
    """A stable word for what went wrong, which clients may act on."""

    GENERATION_FAILED = "generation_failed"  # the request, or the step that it was in, went wrong
    # The model's output for it was not a finite number, or what was drawn from it was no token.
    NUMERICAL_ERROR = "numerical_error"
    DEADLINE_EXCEEDED = "deadline_exceeded"  # its first token was due before it had begun
    OUT_OF_MEMORY = "out_of_memory"  # it gave way so that the others of its step could go on
