"""Whether a chat template reads the content of a message as a text or as a list of parts."""

from octavo.errors import RequestError
from octavo.text.interface import Tokenizer

PROBE = "octavo"


def shows_plain_text(tokenizer: Tokenizer) -> bool:
    """Whether a message whose content is a plain text comes out of the model's chat template.

    Templates of models that see go through the parts of a content, and many leave out what is none,
    without a word.
    """
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": PROBE}])
    except RequestError:
        return False
    return PROBE in text
