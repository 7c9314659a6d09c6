# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, streaming included."""

from __future__ import annotations

import codecs
import json
import operator
import os
import re
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

from mrv1._files import FileError, read_file
from mrv1.chat_template import ChatTemplates
from mrv1.errors import ClosedError, ConfigError, InvalidArgumentError, RequestError
from mrv1.sampling_params import MAX_INT32, SamplingParams
from mrv1.tokenizer_config import TokenizerConfig

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from typing import Any

    import tokenizers
    from typing_extensions import Unpack

    from mrv1.chat_template import ChatOptions, Conversation

Symbol = TypeVar("Symbol", str, int)

TOKENIZER_NAME: Final = "tokenizer.json"
MAX_FILE_BYTES: Final = 256 << 20

# A token of SentencePiece's byte fallback.
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# An unusual decoder may end every text with a replacement character; wait for no more tokens.
_MAX_WINDOW: Final = 64


def _byte_level_alphabet() -> dict[str, int]:
    """Returns character -> byte of byte-level BPE.

    Printable characters of Latin-1 stand for themselves, the other bytes, in order, for the
    characters from U+0100 on (Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners", as released with GPT-2).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = sorted(set(range(256)) - set(printable))
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


def _decoder_kinds(backend: tokenizers.Tokenizer) -> list[str]:
    """Returns the types of a tokenizer's decoders, sequences laid flat, in order."""
    if backend.decoder is None:
        return []
    pending = [json.loads(backend.decoder.__getstate__())]
    kinds = []
    while pending:
        decoder = pending.pop()
        if decoder["type"] == "Sequence":
            pending.extend(reversed(decoder["decoders"]))
        else:
            kinds.append(decoder["type"])
    return kinds


def _check_id(token_id: object) -> int:
    try:
        result = operator.index(token_id)  # type: ignore[arg-type]  # TypeError if it is none
    except TypeError:
        result = -1
    if not 0 <= result <= MAX_INT32:
        raise InvalidArgumentError(
            field="token id", value=token_id, allowed=f"an integer in [0, {MAX_INT32}]"
        )
    return result


def _add_tokens(
    backend: tokenizers.Tokenizer, config: TokenizerConfig, vocab_size: int | None
) -> None:
    """Adds what tokenizer_config.json says about tokens, as transformers does.

    Tokens keep their ids: one is added where it has its place in the vocabulary or comes next.
    """
    import tokenizers

    named = set(config.special_tokens.values())
    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for token_id, info in sorted(config.added_tokens.items()):
        token = tokenizers.AddedToken(
            **{**info._asdict(), "special": info.special or info.content in named}
        )
        known = backend.token_to_id(info.content)
        if known is None and token_id == backend.get_vocab_size(with_added_tokens=True):
            known = token_id if vocab_size is None or token_id < vocab_size else None
        if known == token_id and repr(present.get(info.content)) != repr(token):
            backend.add_tokens([token])
            present[info.content] = token
    for text in sorted(named - set(present)):
        if text and backend.token_to_id(text) is not None:
            backend.add_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _without_extensions(sequences: Collection[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Leaves out the sequences that end with another one; each is there once, and not empty."""
    # From a sequence's last token to its first; the end of a whole one has None.
    trie: dict[int | None, Any] = {}
    extensions = set()
    for sequence in sorted(sequences, key=len):
        node = trie
        for token in reversed(sequence):
            node = node.setdefault(token, {})
            if None in node:
                extensions.add(sequence)
                break
        node[None] = None
    return [sequence for sequence in sequences if sequence not in extensions]


class Tokenizer:
    """The tokenizer of a model directory.

    Args:
        backend: The tokenizer of the `tokenizers` library. Its truncation and padding are turned
            off: tokenizer.json may ask for them, and prompts must not change silently.
        path: File that errors name, or None.
        config: Chat templates and named tokens; none by default.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        path: str | os.PathLike[str] | None = None,
        config: TokenizerConfig | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._path = path
        self._chat = ChatTemplates(
            TokenizerConfig() if config is None else config,
            None if path is None else Path(path).parent,
        )
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        kinds = _decoder_kinds(backend)
        self._alphabet = _byte_level_alphabet() if kinds == ["ByteLevel"] else None
        self._byte_fallback = "ByteFallback" in kinds
        # Whether a text may end in the middle of a character.
        self._may_cut = "ByteLevel" in kinds
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    @classmethod
    def from_dir(
        cls, directory: str | os.PathLike[str], vocab_size: int | None = None
    ) -> Tokenizer:
        """Reads tokenizer.json of a model directory, and tokenizer_config.json if there is one.

        Tokens that only tokenizer_config.json names are added, and those that it calls special are.

        Args:
            directory: The directory.
            vocab_size: The model's vocabulary size to check against, or None.

        Raises:
            ConfigError: A file is missing or damaged, or holds ids that the model has not.
        """
        import tokenizers

        path = Path(directory) / TOKENIZER_NAME
        try:
            backend = tokenizers.Tokenizer.from_buffer(read_file(path, MAX_FILE_BYTES))
        except FileError as error:
            raise ConfigError(str(error), path=path) from None
        except Exception as error:
            # The library raises plain Exception for whatever is wrong with the content.
            raise ConfigError(f"is not a valid tokenizer: {error}", path=path) from error
        config = TokenizerConfig.from_dir(directory)
        _add_tokens(backend, config, vocab_size)
        tokenizer = cls(backend, path, config)
        if vocab_size is not None:
            tokenizer.check_vocab_size(vocab_size)
        return tokenizer

    def check_vocab_size(self, vocab_size: int) -> None:
        """Checks that the model has every id that the tokenizer can give; it may have more.

        Raises:
            ConfigError: Tokenizer and model disagree.
        """
        vocab = self._backend.get_vocab(with_added_tokens=True)
        token = max(vocab, key=vocab.__getitem__, default=None)
        if token is not None and vocab[token] >= vocab_size:
            raise ConfigError(
                "tokenizer and model disagree",
                path=self._path,
                field=f"id of token {token[:80]!r}",
                value=vocab[token],
                allowed=f"below the model's vocab_size = {vocab_size}",
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of a text.

        Args:
            text: The text; special tokens spelled out in it become their ids.
            add_special_tokens: Whether to add what the post-processor of tokenizer.json adds, such
                as the token that begins a sequence.

        Raises:
            RequestError: It is not a string, or holds a lone surrogate, which UTF-8 cannot encode.
        """
        if not isinstance(text, str):
            raise RequestError(field="prompt", value=text, allowed="a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                field=f"prompt[{error.start}]",
                value=text[error.start],
                allowed="a character that UTF-8 can encode",
            ) from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_bad_words(self, words: Iterable[str]) -> list[tuple[int, ...]]:
        """Returns the token sequences that `SamplingParams.bad_words` forbid.

        White space before a word does not count: each is encoded without a space and with one, as
        at the begin of a text and within it, and without special tokens. A sequence that ends with
        another one of them is left out, as that one forbids all that it does.

        Raises:
            RequestError: A word is no string, or the tokenizer has no token for it.
        """
        found: dict[tuple[int, ...], None] = {}
        for index, word in enumerate(words):
            if not isinstance(word, str):
                raise RequestError(field=f"bad_words[{index}]", value=word, allowed="a string")
            bare = word.lstrip()
            forms = [
                tuple(self.encode(text, add_special_tokens=False)) for text in (bare, " " + bare)
            ]
            if not forms[0]:
                raise RequestError(
                    field=f"bad_words[{index}]",
                    value=word,
                    allowed="a text that the tokenizer has tokens for",
                )
            found.update(dict.fromkeys(form for form in forms if form))
        return _without_extensions(found)

    def decode_token(self, token_id: int) -> str:
        """Returns the text of one token alone, special or not; "" for an id of no token.

        Part of a character is a replacement character, and decoders that drop a space at the begin
        of a text drop it here.
        """
        text = self._texts.get(token_id)
        if text is None:
            text = self.decode((token_id,), skip_special_tokens=False)
            if self._backend.id_to_token(token_id) is not None:
                self._texts[token_id] = text
        return text

    def to_json(self) -> str:
        """Returns tokenizer.json as it is in use, with the tokens that were added."""
        return self._backend.to_str()

    @property
    def has_chat_template(self) -> bool:
        """Whether the directory has a chat template."""
        return self._chat.is_present

    def render_chat(self, messages: Conversation, **options: Unpack[ChatOptions]) -> str:
        """Returns the text of a conversation by the directory's chat template.

        Args:
            messages: Messages with "role" and "content".
            **options: As for `ChatTemplates.render`.

        Raises:
            RequestError: The messages are none, or the template refuses them.
            ConfigError: The directory has no chat template, or one that is not valid.
        """
        return self._chat.render(messages, **options)

    def encode_chat(self, messages: Conversation, **options: Unpack[ChatOptions]) -> list[int]:
        """Returns the token ids of a conversation: a prompt for `LLM.stream` or `Engine`.

        The template spells out the token that begins a sequence, so that no other is added.

        Args:
            messages: Messages with "role" and "content".
            **options: As for `ChatTemplates.render`.

        Raises:
            RequestError, ConfigError: As `render_chat`.
        """
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of token ids. Ids of no token have no text.

        Raises:
            InvalidArgumentError: An id is not an integer in [0, 2**31).
        """
        ids = [_check_id(token_id) for token_id in token_ids]
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _text_decoder(self, skip_special_tokens: bool) -> _TextDecoder:
        skipped: frozenset[int] = self._special_ids if skip_special_tokens else frozenset()
        if self._alphabet is not None:
            return _ByteLevelDecoder(self, skipped)
        return _WindowDecoder(self, skipped)

    def _token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that a token stands for, for a byte-level vocabulary."""
        found = self._bytes.get(token_id)
        if found is None:
            assert self._alphabet is not None
            token = self._backend.id_to_token(token_id) or ""
            try:
                found = bytes(map(self._alphabet.__getitem__, token))
            except KeyError:
                # An added token that is spelled in plain text.
                found = token.encode("utf-8")
            self._bytes[token_id] = found
        return found


class _TextDecoder(Protocol):
    """Turns tokens into text that no later token can change."""

    def push(self, token_id: int) -> tuple[str, str]:
        """Takes a token; returns the text settled of the tokens before it, and of it."""

    def finish(self) -> str:
        """Returns the rest of the text, when no token follows."""


class _ByteLevelDecoder:
    """For byte-level BPE: tokens are bytes, and each complete UTF-8 character is settled."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._token_bytes = tokenizer._token_bytes
        self._skipped = skipped
        # Like the tokenizers library, it gives one replacement character for each maximal prefix of
        # a character that is cut short (Unicode standard, section 3.9, U+FFFD substitution).
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> tuple[str, str]:
        if token_id in self._skipped:
            return "", ""
        return "", self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowDecoder:
    """For any other decoder: the text of a token is what it adds to that of the tokens before.

    What a decoder does at the start of a text (it drops a space, say) must not hit the middle, so a
    few settled tokens are decoded again in front of the new ones, just enough to have some text.
    Byte-fallback tokens wait for the end of their run: whether a run is text or a row of
    replacement characters is known only then.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._backend = tokenizer._backend
        self._byte_fallback = tokenizer._byte_fallback
        self._may_cut = tokenizer._may_cut
        self._skipped = skipped
        # Settled tokens, whose text alone is self._settled_text, then the run that waits.
        self._ids: list[int] = []
        self._settled_text = ""
        self._waiting = False

    def push(self, token_id: int) -> tuple[str, str]:
        token = self._backend.id_to_token(token_id)
        if token is None or token_id in self._skipped:
            return "", ""
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            self._ids.append(token_id)
            self._waiting = True
            return "", ""
        before = self.finish() if self._byte_fallback else ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        self._waiting = (
            self._may_cut and text.endswith(_REPLACEMENT) and len(self._ids) < _MAX_WINDOW
        )
        return before, "" if self._waiting else self._settle(text)

    def finish(self) -> str:
        if not self._waiting:
            return ""
        self._waiting = False
        return self._settle(self._decode(self._ids))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def _settle(self, text: str) -> str:
        """Settles all tokens, whose text is `text`; returns the part that is new."""
        new = text[len(self._settled_text) :]
        self._settled_text = text
        count = 1
        while count < len(self._ids):
            tail = self._decode(self._ids[-count:])
            if tail:
                self._ids, self._settled_text = self._ids[-count:], tail
                break
            count *= 2
        return new


class StopMatcher(Generic[Symbol]):
    """Finds the stop that is complete first, a symbol (character or token id) at a time.

    An Aho-Corasick automaton (1975): a state is the longest end of the input that begins a stop.
    State 0 is the empty one.

    Args:
        stops: Strings, or sequences of token ids.
    """

    def __init__(self, stops: Sequence[Sequence[Symbol]]) -> None:
        self._next: list[dict[Symbol, int]] = [{}]
        self._fail = [0]
        # Index of the longest stop that ends in a state, and the symbols to hold back there: the
        # longest end of the input that can still become a stop.
        self.match: list[int | None] = [None]
        self.hold = [0]
        depth = [0]
        for index, stop in enumerate(stops):
            state = 0
            for symbol in stop:
                if symbol not in self._next[state]:
                    self._next[state][symbol] = len(self._next)
                    self._next.append({})
                    self._fail.append(0)
                    self.match.append(None)
                    self.hold.append(0)
                    depth.append(depth[state] + 1)
                state = self._next[state][symbol]
            self.match[state] = index
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            fail = self._fail[state]
            if self.match[state] is None:  # the state's own one would be the longest
                self.match[state] = self.match[fail]
            self.hold[state] = depth[state] if self._next[state] else self.hold[fail]
            for symbol, child in self._next[state].items():
                self._fail[child] = self.step(fail, symbol)
                queue.append(child)

    def step(self, state: int, symbol: Symbol) -> int:
        """Returns the state after one more symbol."""
        while state and symbol not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(symbol, 0)


class StreamPiece(NamedTuple):
    """What a token adds to a request's text.

    Attributes:
        text: The text that is new; the pieces of a request joined are its text.
        stopped: The stop string that ended the text, or None.
    """

    text: str
    stopped: str | None


class IncrementalDetokenizer:
    """Makes a request's text while its tokens come, and finds its stop strings.

    The pieces never cut a UTF-8 character, and joined, with `finish`, they are what
    `Tokenizer.decode` makes of all tokens, cut at the stop string that is complete first in that
    text (of several that end at once, the longest). Text that may be the begin of a stop string is
    held back until that is known. The cost of a token does not grow with the text.

    Tokens that end a request (end of sequence, stop_token_ids) are not text: do not push them,
    unless they are wanted there.

    Args:
        tokenizer: The tokenizer.
        params: Of the request: stop, include_stop_str_in_output, skip_special_tokens, and
            min_tokens, which lets pass the stop strings that are complete within that many tokens.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams | None = None) -> None:
        params = params or SamplingParams()
        self._decoder = tokenizer._text_decoder(params.skip_special_tokens)
        self._stops = params.stop
        self._matcher = StopMatcher[str](params.stop) if params.stop else None
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._state = 0
        self._held = ""
        self._num_pushed = 0
        self._ended = False

    def push(self, token_id: int) -> StreamPiece:
        """Takes the next token; returns the text that is certain now.

        Raises:
            ClosedError: The text has ended, by a stop string or `finish`.
            InvalidArgumentError: The id is not an integer in [0, 2**31).
        """
        if self._ended:
            raise ClosedError("push() of a token after the end of the text")
        before, new = self._decoder.push(_check_id(token_id))
        self._num_pushed += 1
        text, stop = self._take(before, self._num_pushed - 1) if before else ("", None)
        if stop is None and new:
            piece, stop = self._take(new, self._num_pushed)
            text += piece
        return StreamPiece(text, stop)

    def finish(self) -> StreamPiece:
        """Ends the text; returns what was held back. It may still hold a stop string.

        Raises:
            ClosedError: The text has ended already.
        """
        if self._ended:
            raise ClosedError("finish() after the end of the text")
        text, stop = self._take(self._decoder.finish(), self._num_pushed)
        self._ended = True
        if stop is None:
            text += self._held
            self._held = ""
        return StreamPiece(text, stop)

    def _take(self, new: str, num_tokens: int) -> tuple[str, str | None]:
        """Adds the text that the tokens up to `num_tokens` settled; returns text, and the stop."""
        text = self._held + new
        hold = 0
        if self._matcher is not None:
            state = self._state
            for index, char in enumerate(new):
                state = self._matcher.step(state, char)
                found = self._matcher.match[state]
                if found is not None and num_tokens > self._min_tokens:
                    stop = self._stops[found]
                    # What is cut off was held back: it begins the stop string.
                    end = len(self._held) + index + 1 - (0 if self._include_stop else len(stop))
                    self._ended, self._held = True, ""
                    return text[:end], stop
            self._state = state
            hold = 0 if self._include_stop else self._matcher.hold[state]
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None
