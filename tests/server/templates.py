"""Chat templates that are short, but do what those of real models do, and engines that use them."""

from collections.abc import Mapping, Sequence
from typing import Any

from octavo.engine import ServedModel
from octavo.testing.byte_tokenizer import ByteTokenizer
from octavo.testing.fake_engine import FakeEngine
from octavo.text.chat_template import ChatTemplate

TURNS = """\
{%- for message in messages %}
{{- message.role + ": " }}
{%- if message.content is string %}{{ message.content }}{% endif %}
{%- for call in message.tool_calls or [] %}
{{- CALL }}
{%- endfor %}
{{- " from " + message.name + " for " + message.tool_call_id if message.role == "tool" }}
{{- "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "assistant: " }}{% endif %}"""

HERMES_CALL = (
    '"<tool_call>" + {"name": call.function.name, "arguments": call.function.arguments}|tojson '
    '+ "</tool_call>"'
)
JSON_CALL = '{"name": call.function.name, "parameters": call.function.arguments}|tojson'
TOOLS = '{%- if tools %}{{ "tools: " + tools|tojson + "\\n" }}{% endif %}\n'

PLAIN = TURNS.replace("CALL", "''")
HERMES = TOOLS + TURNS.replace("CALL", HERMES_CALL)  # names the markers in calls only
LLAMA = TOOLS + TURNS.replace("CALL", JSON_CALL)
# As Qwen3: thinks, unless it is told not to, and drops what was thought in earlier turns.
QWEN3 = HERMES.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}") + (
    '{%- if enable_thinking is false %}{{ "<think>\\n\\n</think>\\n\\n" }}{% endif %}'
)
# As DeepSeek-R1: writes the opening tag itself.
R1 = PLAIN + '{%- if add_generation_prompt %}{{ "<think>\\n" }}{% endif %}'


class TemplateTokenizer(ByteTokenizer):
    """One token a byte, and a real template."""

    def __init__(self, source: str):
        self._template = ChatTemplate(source, {})

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_arguments: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        return self._template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            template_arguments=template_arguments or {},
            continue_final_message=continue_final_message,
        )


def engine_of(source: str, reply: str = "") -> FakeEngine:
    """A fake engine that answers every prompt alike."""
    engine = FakeEngine()
    tokenizer = TemplateTokenizer(source)
    engine.model = ServedModel(engine.name, engine.max_model_len, tokenizer.vocab_size, tokenizer)
    engine.script.reply = lambda prompt, index: reply
    return engine


def prompt_of(engine: FakeEngine) -> str:
    """The text of the prompt that came last."""
    token_ids, _ = list(engine.received.values())[-1]
    return engine.model.tokenizer.decode(token_ids)
