# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Encoding, decoding, and streams of text with stop strings against slow references."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from mrv1 import tokenizer as module
from mrv1.errors import ClosedError, ConfigError, InvalidArgumentError, RequestError
from mrv1.sampling_params import SamplingParams
from mrv1.tokenizer import IncrementalDetokenizer, StreamPiece, Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

# Two-, three- and four-byte characters, a family joined by ZWJ, combining marks, a flag.
TEXTS = ("é", "ß", "你好", "ह", "😀", "👩‍👩‍👧", "e\u0301\u0323", "🇩🇪", "\ufffd", " ", "\n")
WORDS = ("hello", " world", "ab", "abc", "bc", "stop", "st", "op", "</s", "s>", "a", "b", "c")
SPECIAL = ("<s>", "</s>")


def token_bytes() -> list[bytes]:
    """What the tokens of the byte-level vocabulary stand for, by id."""
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [text.encode() for text in (*WORDS, *TEXTS)]
    pieces += [
        "😀".encode()[:2],
        "😀".encode()[2:],
        "你".encode()[1:] + b"x",
        b" " + "é".encode()[:1],
    ]
    return list(dict.fromkeys(pieces))


BYTES = token_bytes()
# Not special: spelled in plain text, once with characters outside of the byte alphabet.
ADDED = {"<tool>": b"<tool>", "日本": "日本".encode()}


def byte_level() -> Tokenizer:
    """A byte-level BPE tokenizer as Llama 3 and Qwen have it."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The pre-tokenizer works on text; what each byte looks like is found by its alphabet's order.
    shown = {byte: char for char, byte in module._byte_level_alphabet().items()}
    assert sorted(shown.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"".join(shown[byte] for byte in piece): index for index, piece in enumerate(BYTES)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return Tokenizer(backend)


def sentence_piece_vocab() -> dict[str, int]:
    tokens = ["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁a"]
    tokens += [text.replace(" ", "▁") for text in (*WORDS, *TEXTS)]
    tokens += ["▁hello", "<0x4>", "<0xZZ>", "x", "y"]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def sentence_piece(decoder: Any = None) -> Tokenizer:
    """A SentencePiece tokenizer with byte fallback as Llama 2 has it."""
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=sentence_piece_vocab(),
            merges=[],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoder or decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend)


def no_decoder() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(vocab=sentence_piece_vocab()))
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend)


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte_level": byte_level,
    "sentence_piece": sentence_piece,
    "metaspace": lambda: sentence_piece(decoders.Metaspace()),
    "metaspace_never": lambda: sentence_piece(decoders.Metaspace(prepend_scheme="never")),
    "word_piece": lambda: sentence_piece(decoders.WordPiece(prefix="s", cleanup=True)),
    "bpe_suffix": lambda: sentence_piece(decoders.BPEDecoder(suffix="op")),
    "strip_two": lambda: sentence_piece(
        decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 2, 0)])
    ),
    "no_decoder": no_decoder,
}
CACHE: dict[str, Tokenizer] = {}


def cached(name: str) -> Tokenizer:
    return CACHE.setdefault(name, TOKENIZERS[name]()) if name not in CACHE else CACHE[name]


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], params: SamplingParams | None = None
) -> list[StreamPiece]:
    """All pieces of a text: one for each token until the stop, then that of finish()."""
    detokenizer = IncrementalDetokenizer(tokenizer, params)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if pieces[-1].stopped is not None:
            return pieces
    return [*pieces, detokenizer.finish()]


def joined(pieces: list[StreamPiece]) -> str:
    return "".join(piece.text for piece in pieces)


ids_of_bytes = st.lists(
    st.integers(0, len(BYTES) + 6)
    | st.integers(0x80, 0xFF)
    | st.sampled_from([0xED, 0xA0, 0xBF, 0xE0, 0xF4])
    | st.integers(256, len(BYTES) + 3)
    | st.sampled_from([BYTES.index(word.encode()) for word in ("a", "b", "c", "st", "op")]),
    max_size=24,
)
VOCAB = sentence_piece_vocab()
ids_of_pieces = st.lists(
    st.integers(0, len(VOCAB) + 2)
    | st.sampled_from([VOCAB[f"<0x{byte:02X}>"] for byte in "😀你é".encode()])
    | st.sampled_from([VOCAB[token] for token in ("▁", "▁▁", "▁▁a", "▁hello", *SPECIAL)]),
    max_size=24,
)
texts = st.lists(
    st.sampled_from((*TEXTS, *WORDS)) | st.text(st.characters(exclude_categories=["Cs"])),
    max_size=8,
).map("".join)


def is_cut(data: bytes) -> bool:
    """Whether `data` is the begin of one character."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def settled_chars(data: bytes) -> int:
    """Number of characters of the text of `data` that no later byte can change."""
    text = data.decode("utf-8", "replace")
    # CPython waits for a third byte here, though no surrogate can become a character.
    if data[-2:-1] == b"\xed" and 0xA0 <= data[-1] <= 0xBF:
        return len(text) - 2
    return len(text) - any(is_cut(data[-size:]) for size in (1, 2, 3))


def bytes_of(ids: Sequence[int], skip_special_tokens: bool) -> bytes:
    """What byte-level ids stand for, from the way the vocabulary was made."""
    special = [b"" if skip_special_tokens else text.encode() for text in SPECIAL]
    table = [*BYTES, *special, *ADDED.values()]
    return b"".join(table[token_id] if token_id < len(table) else b"" for token_id in ids)


@settings(max_examples=500, deadline=None)
@given(ids_of_bytes, st.booleans())
def test_byte_level_streams(ids: list[int], skip: bool) -> None:
    tokenizer = cached("byte_level")
    params = SamplingParams(skip_special_tokens=skip)
    pieces = stream(tokenizer, ids, params)
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert joined(pieces) == whole == bytes_of(ids, skip).decode("utf-8", "replace")
    # Each token's piece goes exactly as far as characters are complete.
    for count in range(1, len(ids) + 1):
        settled = settled_chars(bytes_of(ids[:count], skip))
        assert joined(pieces[:count]) == whole[:settled]


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "byte_level"])
@settings(max_examples=250, deadline=None)
@given(ids=ids_of_pieces, skip=st.booleans())
def test_other_streams(name: str, ids: list[int], skip: bool) -> None:
    tokenizer = cached(name)
    params = SamplingParams(skip_special_tokens=skip)
    pieces = stream(tokenizer, ids, params)
    assert joined(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)
    # What was said is never taken back, whatever comes next.
    for count in range(1, len(ids) + 1):
        assert tokenizer.decode(ids, skip_special_tokens=skip).startswith(joined(pieces[:count]))


@pytest.mark.parametrize("name", ["byte_level", "sentence_piece"])
@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_texts_go_round(name: str, text: str) -> None:
    tokenizer = cached(name)
    # Read as a special token, it would be left out of the text; "▁" is read as a space.
    text = text.replace("<", "(").replace("▁", "_")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    pieces = stream(tokenizer, ids)
    assert joined(pieces) == text
    assert "\ufffd" not in joined(pieces).replace("\ufffd", "", text.count("\ufffd"))


def reference_stop(
    text: str, needed: Callable[[int], int], params: SamplingParams
) -> tuple[str, str | None]:
    """The text cut at its stop, by trying each end and each string.

    Args:
        text: The whole text.
        needed: Tokens that the first n characters need.
        params: Of the request.
    """
    for end in range(1, len(text) + 1):
        stops = [stop for stop in params.stop if text[:end].endswith(stop)]
        if stops and needed(end) > params.min_tokens:
            stop = max(stops, key=len)
            return text[: end if params.include_stop_str_in_output else end - len(stop)], stop
    return text, None


stop_strings = st.lists(
    st.sampled_from((*WORDS, *TEXTS, "\ufffd\ufffd", "aab", "ca", "topst"))
    | st.text("abc", min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(max_examples=1000, deadline=None)
@given(ids_of_bytes, stop_strings, st.booleans(), st.booleans(), st.integers(0, 6))
def test_stop_strings(
    ids: list[int], stop: list[str], include: bool, skip: bool, min_tokens: int
) -> None:
    params = SamplingParams(
        stop=stop,
        include_stop_str_in_output=include,
        skip_special_tokens=skip,
        min_tokens=min_tokens,
    )
    whole = bytes_of(ids, skip).decode("utf-8", "replace")
    settled = [settled_chars(bytes_of(ids[:count], skip)) for count in range(len(ids) + 1)]

    def needed(chars: int) -> int:
        return next((n for n, end in enumerate(settled) if end >= chars), len(ids))

    text, stopped = reference_stop(whole, needed, params)
    pieces = stream(cached("byte_level"), ids, params)
    assert joined(pieces) == text
    assert pieces[-1].stopped == stopped
    assert [piece.stopped for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    if stopped is not None and len(pieces) <= len(ids):
        # It was found as soon as it was there.
        end = len(text) if include else len(text) + len(stopped)
        assert len(pieces) == needed(end)
    # Held back is exactly what may still begin a stop string.
    for count in range(1, len(pieces) - 1):
        seen = whole[: settled[count]]
        held = seen[len(joined(pieces[:count])) :]
        longest = 0
        for string in () if include else stop:
            for size in range(1, len(string)):
                if seen.endswith(string[:size]):
                    longest = max(longest, size)
        assert len(held) == longest


def ids_for(*pieces: str) -> list[int]:
    return [BYTES.index(piece.encode()) for piece in pieces]


def test_a_stop_string_across_tokens() -> None:
    ids = ids_for("hello", "st", "op", " world")
    pieces = stream(cached("byte_level"), ids, SamplingParams(stop="stop"))
    assert pieces == [("hello", None), ("", None), ("", "stop")]
    params = SamplingParams(stop="stop", include_stop_str_in_output=True)
    pieces = stream(cached("byte_level"), ids, params)
    assert pieces == [("hello", None), ("st", None), ("op", "stop")]
    params = SamplingParams(stop="sto", include_stop_str_in_output=True)
    assert stream(cached("byte_level"), ids, params)[-1] == ("o", "sto")
    # Not the string after all: what was held back comes out.
    pieces = stream(cached("byte_level"), ids_for("st", "a"), SamplingParams(stop="stop"))
    assert pieces == [("", None), ("sta", None), ("", None)]
    pieces = stream(cached("byte_level"), ids_for("hello", "st"), SamplingParams(stop="stop"))
    assert pieces == [("hello", None), ("", None), ("st", None)]


def test_the_first_complete_stop_string_counts() -> None:
    ids = ids_for("a", "b", "c")
    for stop, text, stopped in (
        (["abc", "b"], "a", "b"),
        (["c", "abc", "bc"], "", "abc"),
        (["ac", "c"], "ab", "c"),
    ):
        pieces = stream(cached("byte_level"), ids, SamplingParams(stop=stop))
        assert (joined(pieces), pieces[-1].stopped) == (text, stopped)


def test_min_tokens_lets_stop_strings_pass() -> None:
    ids = ids_for("a", "b", "a", "b", "a")
    for min_tokens, text in ((0, "a"), (1, "a"), (2, "aba"), (4, "ababa"), (5, "ababa")):
        params = SamplingParams(stop="b", min_tokens=min_tokens)
        assert joined(stream(cached("byte_level"), ids, params)) == text


def test_a_stop_string_within_the_flush() -> None:
    ids = [*ids_for("a"), 0xF0]
    pieces = stream(cached("byte_level"), ids, SamplingParams(stop="\ufffd"))
    assert pieces == [("a", None), ("", None), ("", "\ufffd")]


def test_a_stop_string_after_byte_fallback() -> None:
    ids = [
        VOCAB["a"],
        *(VOCAB[f"<0x{byte:02X}>"] for byte in "😀".encode()),
        VOCAB["b"],
        VOCAB["c"],
    ]
    pieces = stream(cached("sentence_piece"), ids, SamplingParams(stop="b"))
    assert pieces[-1] == ("😀", "b")
    assert len(pieces) == 6


def test_after_the_end_nothing_is_taken() -> None:
    for params in (None, SamplingParams(stop="a")):
        detokenizer = IncrementalDetokenizer(cached("byte_level"), params)
        assert detokenizer.push(BYTES.index(b"a")).stopped == (params and "a")
        if params is None:
            detokenizer.finish()
        with pytest.raises(ClosedError):
            detokenizer.push(0)
        with pytest.raises(ClosedError):
            detokenizer.finish()


@pytest.mark.parametrize("token_id", [-1, 2**31, 1.0, "1", None])
def test_bad_ids(token_id: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="token id = "):
        IncrementalDetokenizer(cached("byte_level")).push(token_id)
    with pytest.raises(InvalidArgumentError, match="token id = "):
        cached("byte_level").decode([0, token_id])


@pytest.mark.parametrize("token", ["hello", "▁", "<0xE2>"])
def test_the_cost_of_a_token_does_not_grow(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = sentence_piece()
    decoded = []
    original = module._WindowDecoder._decode

    def counting(self: module._WindowDecoder, ids: Sequence[int]) -> str:
        decoded.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(module._WindowDecoder, "_decode", counting)
    ids = [VOCAB[token]] * 2000
    assert joined(stream(tokenizer, ids)) == tokenizer.decode(ids)
    assert sum(decoded) <= 8 * len(ids)


def test_encode_adds_what_the_post_processor_says() -> None:
    tokenizer = byte_level()
    bos = len(BYTES)
    tokenizer._backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert tokenizer.encode("ab") == [bos, 97, 98]
    assert tokenizer.encode("ab", add_special_tokens=False) == [97, 98]
    assert tokenizer.decode([bos, 97]) == "a"
    assert tokenizer.decode([bos, 97], skip_special_tokens=False) == "<s>a"


@pytest.mark.parametrize("text", ["a\ud800", b"a", None, 3])
def test_prompts_that_are_no_text(text: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        cached("byte_level").encode(text)


def test_from_dir(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: there is no such file"):
        Tokenizer.from_dir(tmp_path)
    path = tmp_path / "tokenizer.json"
    for content in (b"", b"{}", b"[]", b"\xff", b'{"model": {"type": "BPE"}}'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"tokenizer\.json: is not a valid tokenizer"):
            Tokenizer.from_dir(tmp_path)
    backend = byte_level()._backend
    # A prompt shall not be cut or padded because the file was saved that way.
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    path.write_text(backend.to_str(), encoding="utf-8")
    num_ids = len(BYTES) + len(SPECIAL) + len(ADDED)
    tokenizer = Tokenizer.from_dir(tmp_path, vocab_size=num_ids)
    assert len(tokenizer.encode("a")) == 1
    assert len(tokenizer.encode("abc" * 10)) == 30
    Tokenizer.from_dir(tmp_path, vocab_size=num_ids + 100)
    with pytest.raises(ConfigError, match="tokenizer and model disagree") as caught:
        Tokenizer.from_dir(tmp_path, vocab_size=num_ids - 1)
    assert caught.value.path == str(path)
    assert caught.value.value == num_ids - 1
    assert caught.value.allowed == f"below the model's vocab_size = {num_ids - 1}"


def test_importing_is_light() -> None:
    code = (
        "import sys, json, mrv1.tokenizer, mrv1.config, mrv1.safetensors_reader, mrv1.envs\n"
        "print(json.dumps([name for name in ('tokenizers', 'torch') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == []


# --- bad words, and single tokens ----------------------------------------------------------------


def merging(pre_tokenizer: Any, space: str, normalizer: Any = None) -> Tokenizer:
    """A BPE that knows "bad", "bad" behind a space, and "b", "a", "d" and "!" of "bad!"."""
    merges = [("b", "a"), ("ba", "d"), (space, "bad")]
    tokens = ["<unk>", "</s>", *"abd!", space, "ba", "bad", f"{space}bad"]
    backend = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return Tokenizer(backend)


def spelled(tokenizer: Tokenizer, words: Sequence[str]) -> list[list[str | None]]:
    """The sequences as tokens."""
    return [
        [tokenizer._backend.id_to_token(token_id) for token_id in sequence]
        for sequence in tokenizer.encode_bad_words(words)
    ]


def test_bad_words_of_byte_level() -> None:
    tokenizer = merging(pre_tokenizers.ByteLevel(add_prefix_space=False), "Ġ")
    # No token is added at the end, and white space before a word is not part of it.
    for word in ("bad", "  bad", "\nbad"):
        assert spelled(tokenizer, [word]) == [["bad"], ["Ġbad"]]
    # The pre-tokenizer splits "!" off, in both forms.
    assert spelled(tokenizer, ["bad!"]) == [["bad", "!"], ["Ġbad", "!"]]
    # "Ġ", "a" ends with "a", which forbids more; and words that repeat count once.
    assert spelled(tokenizer, ["a", "bad", " bad"]) == [["a"], ["bad"], ["Ġbad"]]
    # Longer words whose end is forbidden by itself add nothing.
    assert spelled(tokenizer, ["bad!", "!", "bad"]) == [["!"], ["bad"], ["Ġbad"]]
    assert spelled(tokenizer, ["</s>"]) == [["</s>"]]
    assert spelled(tokenizer, []) == []


def test_bad_words_of_a_prefix_space() -> None:
    # As GPT-2's with add_prefix_space: a word at the begin of a text has a space before it too.
    tokenizer = merging(pre_tokenizers.ByteLevel(add_prefix_space=True), "Ġ")
    assert spelled(tokenizer, ["bad"]) == [["Ġbad"]]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        # " bad" is "▁▁bad" or "▁bad", by whether a space is put before it: both end alike.
        ("always", [["▁bad"]]),
        ("first", [["▁bad"]]),
        ("never", [["bad"], ["▁bad"]]),
    ],
)
def test_bad_words_of_metaspace(scheme: Any, expected: list[list[str]]) -> None:
    tokenizer = merging(pre_tokenizers.Metaspace(prepend_scheme=scheme), "▁")
    assert spelled(tokenizer, ["bad"]) == expected


def test_bad_words_of_sentence_piece_as_llama_2_has_it() -> None:
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend = merging(None, "▁", normalizer)._backend
    tokenizer = Tokenizer(backend)
    # " bad" becomes "▁", "▁bad", whose end the form without a space forbids anywhere.
    assert tokenizer.encode("bad", False) == [backend.token_to_id("▁bad")]
    assert len(tokenizer.encode(" bad", False)) == 2
    assert spelled(tokenizer, ["bad"]) == [["▁bad"]]
    assert spelled(tokenizer, ["bad!"]) == [["▁bad", "!"]]


def test_a_bad_word_without_tokens_is_refused() -> None:
    vocab = {"known": 0, "[UNK]": 1}
    silent = tokenizers.Tokenizer(models.BPE({"a": 0}, []))  # drops what it does not know
    assert Tokenizer(silent).encode_bad_words(["ab"]) == [(0,)]
    with pytest.raises(RequestError) as caught:
        Tokenizer(silent).encode_bad_words(["a", "zz"])
    assert (caught.value.field, caught.value.value) == ("bad_words[1]", "zz")
    with pytest.raises(RequestError, match=r"bad_words\[0\] = 5: must be a string"):
        Tokenizer(silent).encode_bad_words([5])  # type: ignore[list-item]
    unknown = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    assert Tokenizer(unknown).encode_bad_words(["other"]) == [(1,)]


def test_long_bad_words_take_no_longer_than_their_tokens() -> None:
    tokenizer = cached("sentence_piece")
    word = "ab c" * 20_000
    start = time.perf_counter()
    sequences = tokenizer.encode_bad_words([word])
    # By the square of the tokens it would be a minute.
    assert time.perf_counter() - start < 10.0
    assert tuple(tokenizer.encode(word, False)) in sequences
    assert min(len(sequence) for sequence in sequences) > 10_000


@settings(max_examples=200, deadline=None)
@given(st.lists(texts.filter(lambda text: bool(text.strip())), max_size=4))
def test_bad_words_forbid_both_forms(words: list[str]) -> None:
    """Whatever is encoded is forbidden, by itself or by its end, and nothing twice."""
    for name in ("byte_level", "sentence_piece"):
        tokenizer = cached(name)
        sequences = tokenizer.encode_bad_words(words)
        assert len(set(sequences)) == len(sequences)
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = tuple(tokenizer.encode(text, add_special_tokens=False))
                assert any(ids[-len(s) :] == s for s in sequences), (name, text)
        for sequence in sequences:
            others = [s for s in sequences if s != sequence]
            assert not any(sequence[-len(s) :] == s for s in others)


def test_the_text_of_one_token() -> None:
    tokenizer = cached("byte_level")
    for token_id, piece in enumerate(BYTES):
        for _ in range(2):
            assert tokenizer.decode_token(token_id) == piece.decode("utf-8", "replace")
    assert tokenizer.decode_token(len(BYTES)) == "<s>"  # special
    assert tokenizer.decode_token(2**31 - 1) == ""  # of no token
    assert len(tokenizer._texts) == len(BYTES) + 1
    with pytest.raises(InvalidArgumentError):
        tokenizer.decode_token(-1)
