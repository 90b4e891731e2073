"""What token ids stand for, for byte-level tokenizers and those in the manner of SentencePiece."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from stages.student.data.token_names import END, TokenNames, token_names
from storage.errors import UserError

TEXTS = ("A red square, naïve: 3 € or 2½.", "ein zweiter Satz\nmit Zeilen  und 雪", "🦉 an owl")


def byte_level() -> Tokenizer:
    merges = [("e", "d"), ("a", "n"), ("Ġ", "r"), ("Ġ", "an")]
    pieces = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """As Llama's: bytes where a character has no token, and a mark in the place of each space."""
    pieces = ["<unk>", "<s>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"]
    pieces += sorted({char for text in TEXTS for char in text if ord(char) < 256 and char not in " \n"})
    merges = [("\u2581", "r"), ("e", "d"), ("\u2581r", "ed"), ("a", "n")]
    vocab = {piece: number for number, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "<eos>"])
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((char, -2.0) for char in "\u2581abcdeinr"), ("\u2581red", -1.0)], 0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def spelled(names: TokenNames, tokenizer: Tokenizer, text: str) -> bytes:
    found = [names[number] for number in tokenizer.encode(text, add_special_tokens=False).ids]
    assert all(isinstance(name, bytes) for name in found)
    return b"".join(name for name in found if isinstance(name, bytes))


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_spell_the_text_that_they_were_made_of_byte_by_byte(text: str) -> None:
    assert spelled(token_names(byte_level(), None, "it"), byte_level(), text) == text.encode()
    # The space before the first word is a token's own.
    assert spelled(token_names(sentencepiece_like(), None, "it"), sentencepiece_like(), text) == f" {text}".encode()


def test_marks_of_words_and_single_bytes_are_the_same_in_both_kinds() -> None:
    one, other = (set(token_names(kind, None, "it")) for kind in (byte_level(), sentencepiece_like()))
    assert {b" ", b"\n", b"e", b"ed", b"\xe9", b"\xf0"} <= one & other
    assert b" red" in other & set(token_names(metaspace(), None, "it"))


def test_special_tokens_have_their_names_and_the_end_has_one_in_every_tokenizer() -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool é>", special=False)])
    end = tokenizer.token_to_id("<eos>")
    names, ended = token_names(tokenizer, None, "it"), token_names(tokenizer, end, "it")
    assert (names[end], ended[end]) == ("<eos>", END)
    assert names[tokenizer.token_to_id("<tool é>")] == "<tool é>".encode()
    assert names[:end] + names[end + 1 :] == ended[:end] + ended[end + 1 :]


def test_ids_without_a_token_have_no_name() -> None:
    rules = json.loads(metaspace().to_str())
    rules["model"] = {"type": "WordLevel", "vocab": {"<unk>": 0, "\u2581red": 3}, "unk_token": "<unk>"}
    assert token_names(Tokenizer.from_str(json.dumps(rules)), None, "it") == (b"<unk>", None, None, b" red")


def test_a_tokenizer_whose_tokens_do_not_say_where_words_begin_is_refused() -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "red": 1}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match=r"not known of the tokenizer of x: its decoder is .*WordPiece.*kd_weight to 0"):
        token_names(tokenizer, None, "x")
