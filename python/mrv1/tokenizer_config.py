# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""What a model directory says about its tokens besides tokenizer.json: names and chat templates."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Final, NamedTuple

from mrv1._files import FileError, parse_json, read_file
from mrv1.errors import ConfigError

TOKENIZER_CONFIG_NAME: Final = "tokenizer_config.json"
SPECIAL_TOKENS_MAP_NAME: Final = "special_tokens_map.json"
CHAT_TEMPLATE_NAME: Final = "chat_template.jinja"
CHAT_TEMPLATES_DIR: Final = "chat_templates"
CHAT_TEMPLATE_JSON_NAME: Final = "chat_template.json"
DEFAULT_TEMPLATE: Final = "default"

_MAX_FILE_BYTES: Final = 16 << 20
_MAX_JSON_VALUES: Final = 1_000_000
_MAX_TEMPLATE_BYTES: Final = 4 << 20

# Names that transformers gives to the special tokens of any tokenizer.
_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class AddedTokenInfo(NamedTuple):
    """A token beside the vocabulary; the fields are those of `tokenizers.AddedToken`."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Named tokens and chat templates of a model directory.

    Attributes:
        special_tokens: Name ("bos_token") -> text, of the special tokens that have a name.
        added_tokens: Id -> token, of tokenizer_config.json's added_tokens_decoder.
        chat_templates: Name -> Jinja source; a single template is named "default".
        chat_template_path: The file that the templates are from, or None where there are none.
    """

    special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    added_tokens: dict[int, AddedTokenInfo] = dataclasses.field(default_factory=dict)
    chat_templates: dict[str, str] = dataclasses.field(default_factory=dict)
    chat_template_path: Path | None = None

    @classmethod
    def from_dir(cls, directory: str | os.PathLike[str]) -> TokenizerConfig:
        """Reads tokenizer_config.json and the files beside it; none of them has to be there.

        Templates are taken from chat_template.jinja and chat_templates/, else from
        tokenizer_config.json, else from chat_template.json. special_tokens_map.json counts where
        tokenizer_config.json has no added_tokens_decoder, as for transformers.

        Raises:
            ConfigError: A file is damaged.
        """
        root = Path(directory)
        path = root / TOKENIZER_CONFIG_NAME
        fields = _load(path)
        added = _added_tokens(path, fields.get("added_tokens_decoder"))
        named = _named_tokens(path, fields)
        if not added:
            map_path = root / SPECIAL_TOKENS_MAP_NAME
            named.update(_named_tokens(map_path, _load(map_path)))
        templates, template_path = _template_files(root)
        if not templates:
            templates, template_path = _templates(path, fields.get("chat_template")), path
        if not templates:
            template_path = root / CHAT_TEMPLATE_JSON_NAME
            templates = _templates(template_path, _load(template_path).get("chat_template"))
        return cls(named, added, templates, template_path if templates else None)


def _load(path: Path) -> dict[str, object]:
    """The object in a JSON file; an empty one where there is no file."""
    if not os.path.lexists(path):
        return {}
    try:
        value = parse_json(read_file(path, _MAX_FILE_BYTES), _MAX_JSON_VALUES)
    except FileError as error:
        raise ConfigError(str(error), path=path) from None
    if not isinstance(value, dict):
        raise ConfigError("does not hold a JSON object", path=path)
    return value


def _token_text(value: object) -> str | None:
    """The text of a token that is spelled as a string or as an object; None if it is neither."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named_tokens(path: Path, fields: dict[str, object]) -> dict[str, str]:
    named = {}
    for name in _SPECIAL_TOKENS:
        value = fields.get(name)
        if value is None:
            continue
        text = _token_text(value)
        if text is None:
            raise ConfigError(path=path, field=name, value=value, allowed="a token's text")
        named[name] = text
    # Tokens of one family ("image_token"), by either spelling of transformers.
    extra = fields.get("extra_special_tokens")
    for name, value in {**fields, **(extra if isinstance(extra, dict) else {})}.items():
        text = _token_text(value)
        if name.endswith("_token") and text is not None:
            named.setdefault(name, text)
    return named


def _added_tokens(path: Path, value: object) -> dict[int, AddedTokenInfo]:
    if value is None:
        return {}
    field = "added_tokens_decoder"
    if not isinstance(value, dict):
        raise ConfigError(path=path, field=field, value=value, allowed="an object of tokens by id")
    added = {}
    for name, token in value.items():
        text = _token_text(token)
        if not (name.isascii() and name.isdigit()) or not isinstance(token, dict) or not text:
            raise ConfigError(
                path=path, field=f"{field}.{name}", value=token, allowed="a token with its content"
            )
        flags = {
            flag: token[flag]
            for flag in AddedTokenInfo._fields[1:]
            if isinstance(token.get(flag), bool)
        }
        added[int(name)] = AddedTokenInfo(text, **flags)
    return added


def _template_files(root: Path) -> tuple[dict[str, str], Path | None]:
    """The templates that have files of their own, and the first of these files."""
    files = {}
    directory = root / CHAT_TEMPLATES_DIR
    if directory.is_dir():
        files = {path.stem: path for path in sorted(directory.glob("*.jinja"))}
    if os.path.lexists(root / CHAT_TEMPLATE_NAME):
        files = {DEFAULT_TEMPLATE: root / CHAT_TEMPLATE_NAME, **files}
    templates = {name: _read_text(path) for name, path in files.items()}
    return templates, next(iter(files.values()), None)


def _read_text(path: Path) -> str:
    try:
        return read_file(path, _MAX_TEMPLATE_BYTES).decode("utf-8")
    except FileError as error:
        raise ConfigError(str(error), path=path) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"is not UTF-8: {error.reason} at byte {error.start}", path=path
        ) from None


def _templates(path: Path, value: object) -> dict[str, str]:
    """The templates of a JSON file: one, or a list of named ones."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {DEFAULT_TEMPLATE: value}
    templates = {}
    for entry in value if isinstance(value, list) else [value]:
        name = entry.get("name") if isinstance(entry, dict) else None
        source = entry.get("template") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not isinstance(source, str):
            raise ConfigError(
                path=path,
                field="chat_template",
                value=entry,
                allowed="a template, or a list of objects with name and template",
            )
        templates[name] = source
    return templates
