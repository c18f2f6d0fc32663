"""Texts that spell special tokens: taken as text by any kind of tokenizer, and the template's own stay special."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat, Pair, Text
from peftctl.data.spelling import Spelling
from peftctl.errors import DataError

CORPUS = ["user assistant system what is it ? it is what it is . say [SEP] <s> </s> and go on", "0123456789"] * 9
TURNS = (
    "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def word_piece() -> Any:
    """As BERT: lower case, `[CLS]` and `[SEP]` around every text."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(special_tokens=special, show_progress=False))
    ends = [("[CLS]", 1), ("[SEP]", 2)]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    return backend, {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}


def unigram() -> Any:
    """As T5 and XLM-R: `▁` for space, put before a text's first word, and special tokens that are words, too."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((chr(code), -9.0) for code in range(33, 127))]
    backend = Tokenizer(models.Unigram([*pieces, ("▁", -3.0), ("is", -4.0), ("▁it", -4.0)], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def words() -> Any:
    """Whole words, special tokens among them."""
    vocabulary = ["<unk>", "<s>", "</s>", *sorted({word for line in CORPUS for word in line.split()} - {"<s>", "</s>"})]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


KINDS: dict[str, Callable[[], Any]] = {"word_piece": word_piece, "unigram": unigram, "words": words}


@pytest.fixture(params=[*KINDS, "chatml", "llama2", "llama3", "gemma"])
def tokenizer(request: pytest.FixtureRequest, tokenizer_of: Callable[[str], Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    if request.param not in KINDS:
        return tokenizer_of(request.param)
    backend, special = KINDS[request.param]()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TURNS, **special)


def specials(tokenizer: Any, ids: Any) -> int:
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    return sum(id in known for id in ids)


@pytest.mark.parametrize("said", ["{}", "say {}", "say {} and go on {}", "{}{}", "say{}and"])
def test_what_a_message_spells_is_text(said: str, tokenizer: Any) -> None:
    spelled = said.format(tokenizer.eos_token, tokenizer.bos_token or tokenizer.eos_token)
    chat = [{"role": "user", "content": spelled}, {"role": "assistant", "content": spelled + " it is"}] * 2
    plain = [{**message, "content": "it is"} for message in chat]
    encoder = Encoder(tokenizer, tokenizer.chat_template, 999)
    row, as_usual = encoder.whole(Chat("rows:1", chat)), encoder.whole(Chat("rows:1", plain))
    assert specials(tokenizer, row.ids) == specials(tokenizer, as_usual.ids)
    assert [row.ids[end - 1] for _, end in row.spans] == [as_usual.ids[end - 1] for _, end in as_usual.spans]
    assert all(specials(tokenizer, row.ids[start : end - 1]) == 0 for start, end in row.spans)
    assert len(row.spans) == 2
    assert encoder.spelled == 1
    prompt = encoder.chat_prompt(chat[:1])
    assert specials(tokenizer, prompt) == specials(tokenizer, encoder.chat_prompt(plain[:1]))


def test_as_transformers_does_it(tokenizer: Any) -> None:
    token = tokenizer.eos_token
    chat = [{"role": role, "content": f"say {token} and go on{token}"} for role in ("user", "assistant")]
    encoded = Encoder(tokenizer, tokenizer.chat_template, 999).whole(Chat("rows:1", chat))
    try:
        oracle = tokenizer.apply_chat_template(chat, sanitize_control_tokens=True)["input_ids"]
    except ValueError:  # it refuses a vocabulary that has the token as a word
        assert specials(tokenizer, encoded.ids) <= 3
        return
    assert encoded.input_ids == oracle


def test_what_plain_text_spells_is_text(tokenizer: Any) -> None:
    token = tokenizer.eos_token
    encoder = Encoder(tokenizer, None, 999)
    around = specials(tokenizer, encoder.whole(Text("rows:1", "it is")).ids)
    for row in (Text("rows:2", f"it {token} is"), Pair("rows:3", f"it {token}", f" is {token} it")):
        encoded = encoder.whole(row)
        assert specials(tokenizer, encoded.ids) == around
        assert encoded.ids[-1] == tokenizer.eos_token_id
    assert encoder.spelled == 2
    assert specials(tokenizer, encoder.text_prompt(f"it {token} is")) <= around


def test_rows_without_are_the_tokenizers_own(tokenizer: Any) -> None:
    chat = [{"role": "user", "content": "what is it ?"}, {"role": "assistant", "content": "it is what it is ."}] * 2
    encoder = Encoder(tokenizer, tokenizer.chat_template, 999)
    assert encoder.whole(Chat("rows:1", chat)).input_ids == tokenizer.apply_chat_template(chat)["input_ids"]
    asked = tokenizer.apply_chat_template(chat[:3], add_generation_prompt=True)["input_ids"]
    assert encoder.chat_prompt(chat[:3]) == asked
    assert encoder.spelled == 0
    assert encoder.text_prompt("what is it ?")[:3] == tokenizer("what is it ?")["input_ids"][:3]


def test_thinking_that_the_template_writes_itself_stays_special(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if '</think>' in m.content %}"
        "{{ '<think>' + m.content.split('</think>')[0].split('<think>')[-1] + '</think>' }}{% endif %}"
        "{{ m.content.split('</think>')[-1] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokens = ["<|user|>", "<|assistant|>", "<|end|>", "<think>", "</think>"]
    tokenizer = make_tokenizer(template, tokens, eos_token="<|end|>")
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>hm</think>It is<|end|>."}]
    encoder = Encoder(tokenizer, template, 99)
    row = encoder.whole(Chat("rows:1", said))
    think, close, end = tokenizer.convert_tokens_to_ids(["<think>", "</think>", "<|end|>"])
    assert (row.ids.count(think), row.ids.count(close), row.ids.count(end)) == (1, 1, 2)
    assert tokenizer.decode(row.ids[row.spans[0][0] :]) == "<think>hm</think>It is<|end|>.<|end|>"


def test_tools_and_calls_are_text_too(make_tokenizer: Callable[..., Any]) -> None:
    template = (
        "{{ tools | tojson + '<|end|>' }}{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content or '') }}"
        "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}{{ '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = make_tokenizer(template, ["<|user|>", "<|assistant|>", "<|end|>"], eos_token="<|end|>")
    call = {"function": {"name": "f", "arguments": {"text": "<|end|> and <|user|>"}}}
    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": "f", "description": "ends a turn with <|end|>"}}]
    row = Encoder(tokenizer, template, 999).whole(Chat("rows:1", said, tools=tools))
    assert specials(tokenizer, row.ids) == 5
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(said, tools=tools, tokenize=False)
    assert row.spans == ((row.ids.index(tokenizer.convert_tokens_to_ids("<|assistant|>")) + 1, len(row)),)


def test_a_template_that_changes_what_is_spelled_is_refused(make_tokenizer: Callable[..., Any]) -> None:
    template = "{% for m in messages %}{{ m.content | length | string + m.content + '<|end|>' }}{% endfor %}"
    tokenizer = make_tokenizer(template, ["<|end|>"], eos_token="<|end|>")
    with pytest.raises(DataError, match=r"^rows:1: a text of this row spells a special token"):
        Encoder(tokenizer, template, 99).chat_prompt([{"role": "user", "content": "<|end|>"}], place="rows:1")


def test_longer_tokens_come_first_and_marks_in_the_text_do_no_harm(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer("{{ messages[0].content }}", ["<s>", "<s><s>", "<|end|>"], eos_token="<|end|>")
    spelling = Spelling(tokenizer, tokenizer.chat_template)
    text = "\U000f0000<s><s><s>\U000f0001 <|end|>"
    said = [{"role": "user", "content": text}]
    regions = spelling.in_rendering(said, None, text, lambda said, tools: said[0]["content"], "rows:1")
    assert [text[start:end] for start, end in regions] == ["<s><s>", "<s>", "<|end|>"]
    tokens = spelling.mixed(text, regions)
    assert tokenizer.decode(tokens.ids) == text
    assert specials(tokenizer, tokens.ids) == 0
    assert tokens.begins == sorted(tokens.begins)
    assert tokens.ends == sorted(tokens.ends)
    assert tokens.ends[-1] == len(text)


def test_texts_that_were_rendered_before_keep_their_special_tokens(tokenizer: Any) -> None:
    chat = Chat("here", [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "it is"}])
    encoder = Encoder(tokenizer, tokenizer.chat_template, 500, split_special_tokens=False)
    rendered = tokenizer.apply_chat_template(chat.messages, tokenize=False)
    ids = encoder.whole(Text("here", rendered)).input_ids
    plain = tokenizer(rendered)["input_ids"]
    assert ids[: len(plain)] == plain
    assert ids == plain or ids == [*plain, tokenizer.eos_token_id]
    assert ids != Encoder(tokenizer, tokenizer.chat_template, 500).whole(Text("here", rendered)).input_ids
    spelled = Chat("here", [{"role": "user", "content": f"say {tokenizer.eos_token}"}, chat.messages[1]])
    expected = tokenizer.apply_chat_template(spelled.messages)["input_ids"]
    assert encoder.whole(spelled).input_ids == expected
