"""What a model can be asked for, so that whatever it cannot do is refused with the reason."""

import msgspec

from octavo.core.pooling import PoolingParams
from octavo.errors import RequestError


class ModelTasks(msgspec.Struct, frozen=True, kw_only=True):
    """What a model does with prompts.

    generates: it writes on; False of an encoder.
    embedding: how a prompt becomes a vector where a request does not say.
    num_classes: scores that its head of classes makes of a prompt; 0: it has none.
    num_token_types: types of tokens that it tells apart. Ids of type t begin at t * vocab_size.
    """

    generates: bool = True
    embedding: PoolingParams = PoolingParams()
    num_classes: int = 0
    num_token_types: int = 1

    def check_scores(self) -> None:
        """Refuse to take a head of several classes for a score; raises `RequestError`."""
        if self.num_classes > 1:
            raise RequestError(
                f"this model's head has {self.num_classes} classes, none of which is the score of "
                "a pair; a cross-encoder has one",
                param="model",
            )

    def check(self, pooling: PoolingParams | None) -> None:
        """Refuse what the model cannot do; without `pooling` that is to generate.

        Raises:
            RequestError: it says what the model does instead.
        """
        if pooling is None and not self.generates:
            instead = "scores (/score, /rerank)" if self.num_classes else "embeddings"
            raise RequestError(
                f"this model is an encoder: it makes {instead} and generates no text",
                param="model",
            )
        if pooling is None or pooling.uses_head == bool(self.num_classes):
            return
        if pooling.uses_head:
            raise RequestError("this model has no head that makes scores", param="model")
        raise RequestError(
            "this model was made to score texts, not to embed them: use /score or /rerank",
            param="model",
        )
