# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Conversations to text, by the Jinja template of a model directory.

What a template sees is what `apply_chat_template` of transformers gives it, so that the text is the
same. Templates are code of whoever made the model: they run in Jinja's sandbox and see plain JSON
values only.
"""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypedDict

from mrv1.errors import ConfigError, Mrv1Error, RequestError
from mrv1.tokenizer_config import DEFAULT_TEMPLATE, TokenizerConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeAlias

    import jinja2

    Message: TypeAlias = Mapping[str, Any]
    Conversation: TypeAlias = Sequence[Message]

# Template that is taken where tools are given.
_TOOL_TEMPLATE: Final = "tool_use"
# Variables that arguments of `render` set.
_ARGUMENTS: Final = frozenset({"messages", "tools", "add_generation_prompt"})
# Where the final message ends, while it is continued. The space shows whether a template trims.
_END_MARK: Final = "CONTINUE_FINAL_MESSAGE_TAG "
# Names that reasoning has had; templates read one of them, the first being today's.
_REASONING_FIELDS: Final = ("reasoning_content", "thinking", "reasoning")
_MAX_COMPILED: Final = 16


class ChatOptions(TypedDict, total=False):
    """The keyword arguments of `ChatTemplates.render`."""

    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool | str
    tools: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None


class ChatTemplates:
    """The chat templates of a model directory.

    Args:
        config: Templates and special tokens of the directory.
        directory: The directory, for errors; None if there is none.
    """

    def __init__(
        self, config: TokenizerConfig, directory: str | os.PathLike[str] | None = None
    ) -> None:
        self._config = config
        self._directory = directory
        self._compiled: dict[str, jinja2.Template] = {}

    @property
    def is_present(self) -> bool:
        """Whether the directory has any."""
        return bool(self._config.chat_templates)

    def render(
        self,
        messages: Conversation,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the text of a conversation, special tokens spelled out in it.

        Args:
            messages: Messages with "role" and, mostly, "content": JSON values. Entries that are
                None are left out.
            chat_template: A Jinja template, or the name of one of the directory's; None takes
                "tool_use" where tools are given and there is one, else "default".
            add_generation_prompt: Whether the text ends with the head of the answer.
            continue_final_message: Whether the text ends inside of the last message, which the
                answer then continues; a string names the field to continue instead of "content".
                Excludes add_generation_prompt.
            tools: JSON schemas of functions.
            chat_template_kwargs: More variables for the template, such as enable_thinking or
                documents; they win over the special tokens.

        Raises:
            RequestError: The messages are none, or the template refuses them; with its own words.
            ConfigError: The directory has no template, or one that is not valid.
        """
        if not isinstance(add_generation_prompt, bool):
            raise RequestError(
                field="add_generation_prompt", value=add_generation_prompt, allowed="True or False"
            )
        if not isinstance(continue_final_message, bool | str):
            raise RequestError(
                field="continue_final_message",
                value=continue_final_message,
                allowed="True, False or the name of a field",
            )
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                field="continue_final_message",
                value=continue_final_message,
                allowed="False where add_generation_prompt is True: an answer either continues the "
                "last message or begins its own",
            )
        chat = _conversation(messages)
        schemas = _tools(tools)
        variables = _variables(chat_template_kwargs)
        source, of_directory = self._choose(chat_template, schemas is not None)
        template = self._compile(source, of_directory)
        continued = ""
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            continued = _mark_end(chat, field, source)
        try:
            text = template.render(
                {
                    "documents": None,
                    **self._config.special_tokens,
                    **variables,
                    "messages": chat,
                    "tools": schemas,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except Exception as error:
            # A template is code: it may raise anything, on its own or by what a message lacks.
            raise _refusal(error) from error
        return _cut_at_mark(text, continued) if continue_final_message else text

    def _choose(self, chosen: object, with_tools: bool) -> tuple[str, bool]:
        """The source of the template to use, and whether it is one of the directory's."""
        templates = self._config.chat_templates
        if chosen is not None:
            if not isinstance(chosen, str):
                raise RequestError(
                    field="chat_template", value=chosen, allowed="None, a Jinja template or a name"
                )
            return templates.get(chosen, chosen), chosen in templates
        if with_tools and _TOOL_TEMPLATE in templates:
            return templates[_TOOL_TEMPLATE], True
        if DEFAULT_TEMPLATE in templates:
            return templates[DEFAULT_TEMPLATE], True
        if templates:
            raise ConfigError(
                "has no default chat template",
                path=self._config.chat_template_path,
                field="chat_template",
                allowed=f"given as one of {', '.join(sorted(templates))}",
            )
        raise ConfigError(
            "has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json); give one as the argument chat_template",
            path="the tokenizer" if self._directory is None else self._directory,
        )

    def _compile(self, source: str, of_directory: bool) -> jinja2.Template:
        template = self._compiled.get(source)
        if template is None:
            import jinja2

            try:
                template = _environment().from_string(source)
            except (jinja2.TemplateError, RecursionError) as error:
                line = (
                    f", line {error.lineno}"
                    if isinstance(error, jinja2.TemplateSyntaxError)
                    else ""
                )
                message = f"is not a valid Jinja template{line}: {error}"
                failure: Mrv1Error
                if of_directory:
                    path = self._config.chat_template_path
                    failure = ConfigError(message, path=path, field="chat_template")
                else:
                    failure = RequestError(message, field="chat_template")
                raise failure from None
            if len(self._compiled) >= _MAX_COMPILED:
                self._compiled.clear()
            self._compiled[source] = template
        return template


def _environment() -> jinja2.Environment:
    """Jinja as chat templates expect it; the same as in transformers."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks text for training; here its body is just text."""

        tags = {"generation"}  # noqa: RUF012, Jinja's own declaration

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(form: str) -> str:
        return dt.datetime.now().strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


def _plain(field: str, value: object) -> Any:
    """A copy of a JSON value, made of Python's own types."""
    if value is None or isinstance(value, bool):
        return value
    # Of a subclass too, which could bring methods into the sandbox.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RequestError(field=field, value=value, allowed="an object whose keys are strings")
        return {str(key): _plain(f"{field}.{key}", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(f"{field}[{index}]", item) for index, item in enumerate(value)]
    raise RequestError(field=field, value=value, allowed="a JSON value")


def _conversation(messages: object) -> list[dict[str, Any]]:
    """A checked copy of a conversation."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(
            field="messages", value=messages, allowed="a list of at least one message"
        )
    chat = []
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                field=field, value=message, allowed="an object with a role, which is a string"
            )
        # Templates print None where they would do without a field that is missing.
        plain = {key: item for key, item in _plain(field, message).items() if item is not None}
        reasoning = next((plain[key] for key in _REASONING_FIELDS if key in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        chat.append(plain)
    return chat


def _tools(tools: object) -> list[dict[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise RequestError(field="tools", value=tools, allowed="None or a list of JSON schemas")
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise RequestError(field=f"tools[{index}]", value=tool, allowed="a JSON schema")
    return [_plain(f"tools[{index}]", tool) for index, tool in enumerate(tools)]


def _variables(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise RequestError(
            field="chat_template_kwargs", value=given, allowed="None or variables by name"
        )
    taken = _ARGUMENTS & set(given)
    if taken:
        raise RequestError(
            f"{sorted(taken)[0]} is an argument of its own", field="chat_template_kwargs"
        )
    return {name: _plain(f"chat_template_kwargs.{name}", item) for name, item in given.items()}


def _refusal(error: Exception) -> RequestError:
    import jinja2

    if type(error) is jinja2.TemplateError:
        # What the template says by raise_exception, about the messages.
        return RequestError(f"the chat template refuses them: {error}", field="messages")
    return RequestError(
        f"the chat template fails on them: {type(error).__name__}: {error}", field="messages"
    )


def _mark_end(chat: list[dict[str, Any]], field: str, source: str) -> str:
    """Marks the end of the last message; returns the text that is continued."""
    final = chat[-1]
    fields = [field]
    if field in _REASONING_FIELDS:
        fields = [name for name in _REASONING_FIELDS if final.get(name) == final.get(field)]
    content = final.get(field)
    if content is None or not any(name in source for name in fields):
        raise RequestError(
            f"there is no {field!r} to continue in the last message, or the chat template does not "
            "show it",
            field="continue_final_message",
        )
    if isinstance(content, list):
        for block in reversed(content):
            if isinstance(block, dict) and isinstance(block.get("text"), str):
                text: str = block["text"]
                block["text"] = text + _END_MARK
                return text
        content = None
    if not isinstance(content, str):
        raise RequestError(
            f"the last message has no text in {field!r}", field="continue_final_message"
        )
    for name in fields:
        final[name] = content + _END_MARK
    return content


def _cut_at_mark(text: str, continued: str) -> str:
    mark = _END_MARK.strip()
    if continued.strip() not in text or mark not in text:
        raise RequestError(
            "the chat template does not show the last message as it is",
            field="continue_final_message",
        )
    at = text.rindex(mark)
    kept = text[:at]
    # A template that trims messages took the mark's space, and would take that of the message.
    return kept if text.startswith(_END_MARK, at) else kept.rstrip()
