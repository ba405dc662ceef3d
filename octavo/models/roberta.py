"""RoBERTa (arXiv 1907.11692) and XLM-RoBERTa (arXiv 1911.02116): BERT under other names.

Positions are counted from behind the padding token's id.
"""

from typing import ClassVar

from octavo.config.families.bert import PADDING_ID
from octavo.models.bert import Bert


class Roberta(Bert):
    """As BERT's."""

    prefix: ClassVar = "roberta."
    num_skipped_positions: ClassVar = PADDING_ID + 1
    head_names: ClassVar = ("classifier.dense", "classifier.out_proj")
