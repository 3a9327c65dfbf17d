"""Chat templates: from a list of messages to the text that a chat model was trained on.

A template is Jinja source that ships with a model, so it is somebody else's program: it runs in Jinja's immutable
sandbox, and whatever goes wrong inside it is told as an `InputError`. The environment offers what published templates
rely on: trimmed blocks, `break` and `continue`, a `{% generation %}` mark (which prints its body), `raise_exception`,
`strftime_now`, and a `tojson` that leaves non-ASCII letters and HTML alone.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import InputError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]] | str,
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """Returns the text of a conversation as the template writes it.

    Args:
        template: Jinja source.
        messages: the turns in order, each with a `role` and a `content`; a string is one user turn.
        add_generation_prompt: whether to end with the header of an assistant turn, ready to be continued.
        special_tokens: what the template may print by name, such as `bos_token`; a name left out prints nothing.

    Raises:
        InputError: no message, a message without role or content, or a template that fails or refuses the messages.
    """
    turns = _checked_messages(messages)
    try:
        return _compiled(template).render(
            messages=turns,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **special_tokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"the chat template is not valid Jinja: {error.message} (line {error.lineno}); "
            "correct it in the tokenizer's files, or pass plain text instead of messages."
        ) from error
    except Exception as error:  # A template is foreign code: all it raises speaks of itself or of the messages.
        roles = ", ".join(turn["role"] for turn in turns)
        raise InputError(
            f"the chat template failed on messages with roles [{roles}]: {type(error).__name__}: {error}; "
            "give the roles in the order that this model accepts, or pass plain text instead of messages."
        ) from error


def _checked_messages(messages: Sequence[Mapping[str, str]] | str) -> list[dict[str, str]]:
    """Returns the messages as new dictionaries, after checking that each has a role and a content."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not messages:
        raise InputError(
            f"a chat needs at least one message, got {messages!r}; "
            "pass a string, or a list such as [{'role': 'user', 'content': 'Hello'}]."
        )
    for index, message in enumerate(messages):
        keys = ("role", "content")
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in keys):
            raise InputError(
                f"message {index} of the chat is {message!r}; "
                "each message needs the strings 'role' and 'content', such as {'role': 'user', 'content': 'Hello'}."
            )
    return [dict(message) for message in messages]


class _GenerationMark(Extension):
    """The `{% generation %} ... {% endgeneration %}` mark around what the assistant wrote; here it prints its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Returns the nodes between the two marks, unchanged."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    """Lets a template refuse its messages."""
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    """Returns today's date and time in the form a template asks for."""
    return datetime.datetime.now().strftime(pattern)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Returns JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    """Compiles a template, once per source text."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMark, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(template)
