"""Conversations that call tools, on the templates of many families: turns begin and end where they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from known_templates import SPECIAL, TEMPLATES, TRAINING

from peftctl.data.encode import Encoder
from peftctl.data.formats import Chat
from peftctl.errors import DataError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
# As Mistral's third: ids of nine characters, tools before the last question, no generation prompt.
MISTRAL = (
    "{{- bos_token }}{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- if tools and m == asked[-1] %}{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
    "{%- if call.id | length != 9 %}{{- raise_exception('ids have nine characters') }}{%- endif %}"
    "{{- (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (', ' if not loop.last else '') }}"
    "{%- endfor %}{{- ']' + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
)
MISTRAL_TOKENS = [
    f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS", "TOOL_CALLS") for slash in ("", "/")
]
# As DeepSeek's third: special tokens inside of and behind a call, before the one that ends the turn.
NESTED = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
    "{% if m.tool_calls %}{{ (m.content or '') + '<|calls|>' }}{% for call in m.tool_calls %}"
    "{{ '<|call|>' + call.function.name + '<|sep|>' + call.function.arguments | tojson + '<|done|>' }}"
    "{% endfor %}{{ '<|all_done|><|eos|>' }}{% else %}"
    "{{ m.content }}{{ '<|eos|>' if m.role == 'assistant' else '' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
NESTED_TOKENS = [f"<|{name}|>" for name in ("calls", "call", "sep", "done", "all_done", "tool")]


def called(content: str | None, *arguments: Any) -> list[dict[str, Any]]:
    """A question, one or more calls, their results, an answer."""
    calls = [
        {"type": "function", "id": f"abcdefgh{i}", "function": {"name": "weather", "arguments": given}}
        for i, given in enumerate(arguments)
    ]
    results = [{"role": "tool", "content": "rain", "name": "weather", "tool_call_id": call["id"]} for call in calls]
    return [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": content, "tool_calls": calls},
        *results,
        {"role": "assistant", "content": "It rains."},
    ]


CHAT = [{"role": "user", "content": "Why is it?"}, {"role": "assistant", "content": "It is because."}] * 2
THANKS = [{"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": "Welcome."}]


@pytest.fixture
def tokenizer(make_tokenizer: Callable[..., Any]) -> Callable[..., Any]:
    def make(template: str, *more: str, **special: str) -> Any:
        roles = {f"<|{role}|>" for role in ("bos", "eos", "user", "assistant", "system", "end", "tool")}
        tokens = sorted(roles | set(SPECIAL.findall(template)) | set(more))
        return make_tokenizer(template, tokens, **{"bos_token": "<|bos|>", "eos_token": "<|eos|>"} | special)

    return make


def trained(tokenizer: Any, messages: list[dict[str, Any]], **how: Any) -> list[str]:
    row = Encoder(tokenizer, tokenizer.chat_template, 4096, **how).whole(Chat("rows:1", messages, tools=[WEATHER]))
    assert row.input_ids == tokenizer.apply_chat_template(messages, tools=[WEATHER])["input_ids"]
    return [tokenizer.decode(row.ids[start:end]) for start, end in row.spans]


JSON = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
XML = "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
FAMILIES = {
    "qwen2_5": (JSON % '{"city": "Oslo"}' + "<|im_end|>", "<|im_end|>", ""),
    "qwen3": (JSON % '{"city": "Oslo"}' + "<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\n"),
    "llama3_1": ('{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>', "<|eot_id|>", ""),
    "gptoss": (
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>',
        "<|return|>",
        "<|channel|>final<|message|>",
    ),
    "qwen3_5_think": (XML + "<|im_end|>", "<|im_end|>", "\n</think>\n\n"),
    "lfm2_v2": ("<|tool_call_start|>[weather(city='Oslo')]<|tool_call_end|><|im_end|>", "<|im_end|>", ""),
}


@pytest.mark.skipif(not TEMPLATES, reason="trl, which holds the templates, is not installed")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", ["", None])
def test_calls_are_trained_with_their_stop_token(family: str, content: str | None, tokenizer: Any) -> None:
    tok = tokenizer(TEMPLATES[family].read_text("utf-8"))
    call, stop, lead = FAMILIES[family]
    first, answer, last = trained(tok, called(content, {"city": "Oslo"}) + THANKS)
    assert first == call
    assert answer.endswith("It rains." + stop.replace("return", "end"))
    assert last == lead + "Welcome." + stop
    assert trained(tok, called(content, {"city": "Oslo"}) + THANKS, train_on="last") == [last]


@pytest.mark.skipif(not TEMPLATES, reason="trl, which holds the templates, is not installed")
@pytest.mark.parametrize("arguments", [{}, {"n": 3}, {"a": {"b": ["x", 1]}, "c": None}, {"q": 'say "<|im_end|>'}])
def test_any_arguments(arguments: dict[str, Any], tokenizer: Any) -> None:
    tok = tokenizer(TEMPLATES["qwen2_5"].read_text("utf-8"))
    messages = called("Let me see.", {"city": "Rome"}, arguments)
    row = Encoder(tok, tok.chat_template, 4096).whole(Chat("rows:1", messages, tools=[WEATHER]))
    call, answer = [tok.decode(row.ids[start:end]) for start, end in row.spans]
    assert call.startswith("Let me see.\n<tool_call>")
    assert call.endswith("}\n</tool_call><|im_end|>")
    assert call.count("<tool_call>") == 2
    assert answer == "It rains.<|im_end|>"
    end = tok.convert_tokens_to_ids("<|im_end|>")
    assert sum(row.ids[start:stop].count(end) for start, stop in row.spans) == 2  # one that is an argument is text


def test_a_template_without_a_generation_prompt(tokenizer: Any) -> None:
    tok = tokenizer(MISTRAL, *MISTRAL_TOKENS)
    call = '[TOOL_CALLS] [{"name": "weather", "arguments": {"n": 3}, "id": "abcdefgh0"}]<|eos|>'
    assert trained(tok, called("", {"n": 3})) == [call, " It rains.<|eos|>"]
    with pytest.raises(DataError, match="writes other text before"):  # the tools move on to the last question
        trained(tok, called("", {"n": 3}) + THANKS)
    assert trained(tok, called("", {"n": 3}) + THANKS, train_on="last") == [" Welcome.<|eos|>"]


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, {"n": 3}, {}])
def test_special_tokens_that_close_a_call_do_not_end_the_turn(arguments: dict[str, Any], tokenizer: Any) -> None:
    import json

    tok = tokenizer(NESTED, *NESTED_TOKENS)
    one = f"<|call|>weather<|sep|>{json.dumps(arguments)}<|done|>"
    expected = ["Hm.<|calls|>" + one * 2 + "<|all_done|><|eos|>", "It rains.<|eos|>"]
    assert trained(tok, called("Hm.", arguments, arguments)) == expected


def test_a_template_that_knows_no_calls_is_refused(tokenizer_of: Callable[[str], Any]) -> None:
    tok = tokenizer_of("chatml")
    with pytest.raises(DataError, match=r"^rows:1: messages\[1\]: the chat template .* this call of a tool"):
        Encoder(tok, tok.chat_template, 99).whole(Chat("rows:1", called("", {"city": "Oslo"})))


def test_results_of_tools_are_trained_only_when_asked_for(tokenizer_of: Callable[[str], Any]) -> None:
    tok = tokenizer_of("chatml")
    messages = [{**message, "tool_calls": None} for message in called("Hm.", {})]
    row = Chat("rows:1", messages)
    for roles, expected in (
        (["tool"], ["rain<|im_end|>"]),
        (["user", "tool"], ["How is it?<|im_end|>", "rain<|im_end|>"]),
        (["assistant"], ["Hm.<|im_end|>", "It rains.<|im_end|>"]),
    ):
        made = Encoder(tok, tok.chat_template, 999, train_on=roles).whole(row)
        assert [tok.decode(made.ids[start:end]) for start, end in made.spans] == expected


NO_ORACLE = {"idefics3", "llava_next", "smolvlm"}  # these expect lists of parts, with images
NO_CALLS = {"cohere2", "cohere", "deepseek_r1_distill", "diffusion_gemma", "gemma3", "gemma", "lfm2", "llama3"}
NO_CALLS |= {"phi3_5", "phi3", "qwen2_5_vl"} | NO_ORACLE


@pytest.mark.skipif(not TRAINING, reason="trl, which holds the templates, is not installed")
@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("kind", ["chat", "calls"])
def test_the_mask_is_that_of_templates_that_mark_what_is_generated(name: str, kind: str, tokenizer: Any) -> None:
    """transformers' `assistant_masks`, but for what the generation prompt writes and white space after the stop."""
    template = TRAINING[name].read_text("utf-8")
    tok = tokenizer(template, eos_token="<|END_OF_TURN_TOKEN|>" if name == "cohere2" else "<|eos|>")
    messages, tools = (CHAT, None) if kind == "chat" else (called("", {"city": "Oslo"}) + THANKS, [WEATHER])
    row = Chat("rows:1", messages, tools=tools)
    if name in (NO_ORACLE if kind == "chat" else NO_CALLS):
        with pytest.raises(DataError):
            Encoder(tok, template, 4096).whole(row)
        return
    encoded = Encoder(tok, template, 4096).whole(row)
    oracle = tok.apply_chat_template(messages, tools=tools, return_assistant_tokens_mask=True)
    assert encoded.input_ids == oracle["input_ids"]
    masks = list(oracle["assistant_masks"])
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for (start, end), turn in zip(encoded.spans, turns, strict=True):
        assert all(masks[start:end])
        prompt = tok.apply_chat_template(messages[:turn], tools=tools, tokenize=False, add_generation_prompt=True)
        before = next(i for i in range(start, -1, -1) if i == 0 or not masks[i - 1])
        # The generation prompt may open a thought that the answer lacks, or closes at once.
        prompts = (prompt, prompt.rstrip(), prompt.removesuffix("<think>\n"))
        assert any(prompt.endswith(tok.decode(encoded.ids[before:start])) for prompt in prompts)
        after = next((i for i in range(end, len(masks)) if not masks[i]), len(masks))
        assert tok.decode(encoded.ids[end:after]).removesuffix(tok.eos_token).strip() == ""
        masks[before:after] = [0] * (after - before)
    assert not any(masks)
