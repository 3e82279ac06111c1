"""Chats: rows, templates, and which tokens the assistant's are, by hand."""

import json
from dataclasses import replace

import pytest

from fedalt.config import DataConfig
from fedalt.data import Chat, Example, Record, encode
from fedalt.data.folders import text_record
from fedalt.errors import InputError
from tests.families import FAMILIES, tokenizer_of

CHAT = Chat(
    (("user", "Hi"), ("assistant", "Hello\nyou"), ("user", "2 + 2?"), ("assistant", "4, surely"))
)
ROWS = [{"role": role, "content": text} for role, text in CHAT.messages]
RULED = Chat((("system", "Be brief."), *CHAT.messages))
# By family, the whole chat; what counts is between ⟦ and ⟧.
TEXTS = {
    "chatml": """<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
⟦Hello
you<|im_end|>⟧
<|im_start|>user
2 + 2?<|im_end|>
<|im_start|>assistant
⟦4, surely<|im_end|>⟧""",
    "llama3": """<s><|start_header_id|>user<|end_header_id|>

Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>

⟦Hello
you<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>

2 + 2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

⟦4, surely<|eot_id|>⟧""",
    "gemma": """<s><start_of_turn>user
Hi<end_of_turn>
<start_of_turn>model
⟦Hello
you<end_of_turn>⟧
<start_of_turn>user
2 + 2?<end_of_turn>
<start_of_turn>model
⟦4, surely<end_of_turn>⟧""",
    "mistral": "<s>[INST] Hi [/INST] ⟦Hello\nyou</s>⟧[INST] 2 + 2? [/INST] ⟦4, surely</s>⟧",
    "phi3": """<|user|>
Hi<|end|>
<|assistant|>
⟦Hello
you<|end|>⟧
<|user|>
2 + 2?<|end|>
<|assistant|>
⟦4, surely<|end|>⟧""",
    "qwen3": """<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
⟦Hello
you<|im_end|>⟧
<|im_start|>user
2 + 2?<|im_end|>
<|im_start|>assistant
<think>

</think>

⟦4, surely<|im_end|>⟧""",
    "zephyr": """<|user|>
Hi</s>
<|assistant|>
⟦Hello
you</s>⟧
<|user|>
2 + 2?</s>
<|assistant|>
⟦4, surely</s>⟧""",
    "words": "User: Hi\nAssistant: ⟦Hello\nyou⟧\nUser: 2 + 2?\nAssistant: ⟦4, surely</s>⟧",
}
CONFIG = DataConfig()


def shown(tokenizer, example: Example) -> str:
    """The example as text, with brackets around what counts."""
    text, inside = tokenizer.decode(example.prompt), False
    counted = example.counted or (True,) * len(example.answer)
    for token, counts in zip(example.answer, counted, strict=True):
        text += {(False, True): "⟦", (True, False): "⟧"}.get((inside, counts), "")
        text += tokenizer.decode([token])
        inside = counts
    return text + "⟧" * inside


def test_there_are_more_than_five_families():
    assert TEXTS.keys() == FAMILIES.keys()
    assert len({kind for kind, _, _ in FAMILIES.values()}) >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_of_the_assistant_counts_with_its_end(family, tiny_base):
    tokenizer = tokenizer_of(family, tiny_base)
    (example,) = encode([CHAT], tokenizer, CONFIG)
    assert shown(tokenizer, example) == TEXTS[family]
    assert example.terms == sum(example.counted)
    assert not example.cut


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_turn_tests(family, tiny_base):
    tokenizer = tokenizer_of(family, tiny_base)
    (example,) = encode([CHAT], tokenizer, CONFIG, tested=True)
    before, _, last = TEXTS[family].rpartition("⟦")
    assert shown(tokenizer, example) == before.replace("⟦", "").replace("⟧", "") + "⟦" + last
    assert example.counted == ()


@pytest.mark.parametrize("family", ["chatml", "llama3", "mistral", "phi3", "zephyr"])
def test_the_systems_text_is_read(family, tiny_base):
    tokenizer = tokenizer_of(family, tiny_base)
    (example,) = encode([RULED], tokenizer, CONFIG)
    assert "Be brief." in tokenizer.decode(example.prompt)
    (without,) = encode([CHAT], tokenizer, CONFIG)
    assert (example.answer, example.counted) == (without.answer, without.counted)


def test_a_template_that_refuses_is_told_with_its_words(tiny_base):
    with pytest.raises(InputError, match=r"refuses the chat .Be brief\..: System role not"):
        encode([RULED], tokenizer_of("gemma", tiny_base), CONFIG)


def test_instructions_become_chats_where_that_is_asked(tiny_base):
    tokenizer = tokenizer_of("chatml", tiny_base)
    records = [Record("Add", "4", "2 and 2"), Record("Say", "yes")]
    asked = encode(records, tokenizer, replace(CONFIG, prompt="chat"))
    assert [shown(tokenizer, each).split("user\n")[1] for each in asked] == [
        "Add\n\n2 and 2<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧",
        "Say<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧",
    ]
    mixed = encode([records[0], CHAT, records[1]], tokenizer, CONFIG)
    assert mixed[1] == encode([CHAT], tokenizer, CONFIG)[0]
    assert [mixed[0], mixed[2]] == encode(records, tokenizer, CONFIG)


def test_a_long_chat_keeps_its_last_words_before_and_its_first_of_the_answers(tiny_base):
    tokenizer = tokenizer_of("chatml", tiny_base)
    (whole,) = encode([CHAT], tokenizer, CONFIG)
    (cut,) = encode([CHAT], tokenizer, replace(CONFIG, max_length=20))
    assert cut.cut
    assert (cut.prompt, cut.answer) == (whole.prompt[-10:], whole.answer[:10])


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not tell which tokens"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "does not tell which"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}",
            "does not tell which tokens",
        ),
        ("{{ nothing.at.all }}", "refuses the chat 'Hi'"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(template, fault, tiny_base):
    tokenizer = tokenizer_of("chatml", tiny_base)
    tokenizer.chat_template = template or None
    with pytest.raises(InputError, match=fault) as caught:
        encode([CHAT], tokenizer, CONFIG)
    assert "\n" not in str(caught.value)


def test_content_may_be_parts_of_text():
    parts = [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?"}]
    rows = [*ROWS[:2], {"role": "user", "content": parts}, ROWS[3]]
    chat = text_record({"messages": rows, "category": "sums"}, "f:1")
    assert chat == replace(CHAT, category="sums")
    assert (chat.instruction, chat.output) == ("2 + 2?", "4, surely")
    assert chat.fingerprint_bytes() != CHAT.fingerprint_bytes()
    with_both = {"instruction": "say", "output": "yes", "messages": rows}
    assert text_record(with_both, "f:1") == Record("say", "yes")


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        ("hi", "must be a list of two messages or more"),
        (ROWS[:1], "must be a list of two messages or more"),
        (ROWS[:3], "must end with a question and the assistant's answer"),
        (["hi", *ROWS[1:]], "message 1 must be an object with role and content"),
        ([{"role": "tool", "content": "x"}, *ROWS], "message 1: role must be one of system, user"),
        ([*ROWS[:2], {"role": "system", "content": "x"}, *ROWS[2:]], "message 3: only the first"),
        ([{"role": "user", "content": " "}, ROWS[1]], "message 1 is empty"),
        ([{"role": "user"}, ROWS[1]], "message 1: content must be text or a list"),
        ([{"role": "user", "content": [{"type": "image"}]}, ROWS[1]], "part of type 'image'"),
        ([{"role": "user", "content": ["x"]}, ROWS[1]], "part of type 'str'"),
        ([{"role": "user", "content": "\ud800"}, ROWS[1]], "half of a surrogate pair"),
        ([{"role": "system", "content": "x"}, ROWS[1]], "must end with a question"),
    ],
)
def test_rows_that_are_no_chats_are_refused_by_line_and_message(messages, fault):
    row = json.loads(json.dumps({"messages": messages}))
    with pytest.raises(InputError, match=r"^f:1: field .messages.") as caught:
        text_record(row, "f:1")
    assert fault in str(caught.value)
