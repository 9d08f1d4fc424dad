"""The renderer: exact texts, supervised spans, and content that stays content."""

from __future__ import annotations

import pytest

from tests.tiny import CHAT_TEMPLATE, byte_level_tokenizer, hostile_texts
from w2c_tui.core.conversation import Attachment, Message, TextLine
from w2c_tui.core.errors import PromptError
from w2c_tui.core.prompt import PLAIN, V1, ChatTemplate, Segment, as_jinja, as_text, render

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
IMAGE = Attachment(data=b"x", sha256="0" * 64, width=10, height=20)
CHAT = ChatTemplate(
    source=CHAT_TEMPLATE,
    tokens=("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<image>"),
    image_token="<image>",
    bos_token="<|im_start|>",
    eos_token="<|im_end|>",
)


def user(text: str, *images: Attachment) -> Message:
    return Message("user", text, images)


def answer(text: str) -> Message:
    return Message("assistant", text)


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([user("Hi")], f"{SYSTEM} USER: Hi ASSISTANT:"),
        ([user("Code?", IMAGE)], f"{SYSTEM} USER: <image>\nCode? ASSISTANT:"),
        (
            [user("Code?", IMAGE), answer("<html>"), user("Bigger.")],
            f"{SYSTEM} USER: <image>\nCode? ASSISTANT: <html></s>USER: Bigger. ASSISTANT:",
        ),
        (
            [Message("system", "Be brief."), user("Hi"), answer("Yo"), user("Bye")],
            "Be brief. USER: Hi ASSISTANT: Yo</s>USER: Bye ASSISTANT:",
        ),
        ([user("Hi"), answer("An unfin")], f"{SYSTEM} USER: Hi ASSISTANT: An unfin"),
        (
            [user("Both", IMAGE, IMAGE)],
            f"{SYSTEM} USER: <image>\n<image>\nBoth ASSISTANT:",
        ),
    ],
)
def test_v1_is_exactly_the_published_text(messages, expected):
    assert as_text(render(messages, V1)) == expected


def test_v1_for_training_closes_every_answer_and_supervises_answers_and_eos():
    segments = render(
        [user("Q1", IMAGE), answer("A1"), user("Q2"), answer("A2")], V1, for_answer=False
    )
    assert as_text(segments) == (
        f"{SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"
    )
    assert as_text([s for s in segments if s.supervised]) == " A1</s> A2</s>"


def test_plain_is_image_caption_newline_with_everything_but_the_image_supervised():
    segments = render([user("Describe.", IMAGE), answer("A red page.")], PLAIN, for_answer=False)
    assert as_text(segments) == "<image>A red page.\n"
    assert [s.kind for s in segments if not s.supervised] == ["start", "image"]
    assert as_text(render([user("dropped", IMAGE)], PLAIN)) == "<image>"


def test_chat_template_gives_tokens_images_and_supervised_answers():
    segments = render([user("Code?", IMAGE), answer("<p>")], CHAT, for_answer=False)
    assert segments == [
        Segment("token", "<|im_start|>"),
        Segment("text", "user\n"),
        Segment("image", image=0),
        Segment("text", "\nCode?"),
        Segment("token", "<|im_end|>"),
        Segment("text", "\n"),
        Segment("token", "<|im_start|>"),
        Segment("text", "assistant\n"),
        Segment("text", "<p>", supervised=True),
        Segment("token", "<|im_end|>", supervised=True),
        Segment("text", "\n"),
    ]


def test_chat_template_leaves_an_unfinished_answer_open():
    text = as_text(render([user("Hi"), answer("<ht")], CHAT))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<ht"


@pytest.mark.parametrize("template", [V1, CHAT], ids=["v1", "chat"])
@pytest.mark.parametrize("content", hostile_texts())
def test_content_is_never_parsed(template, content):
    segments = render([user(content, IMAGE), answer(content), user(content)], template)
    own = render([user("Q", IMAGE), answer("A"), user("Q")], template)
    assert [s.kind for s in segments] == [s.kind for s in own]
    texts = "\0".join(s.text for s in segments if s.kind == "text")
    assert texts.count(content) >= 3
    assert next(s.text for s in segments if s.supervised) == template.answer_lead + content


@pytest.mark.parametrize("template", [V1, PLAIN], ids=lambda t: t.name)
@pytest.mark.parametrize("for_answer", [True, False])
def test_jinja_form_renders_the_same_text_in_transformers(template, for_answer):
    tokenizer = byte_level_tokenizer()
    messages = [user('It\'s "it"\\n', IMAGE), answer("A'1"), user("Q2"), answer("A2")]
    for count in (1, 3) if for_answer else (2, 4):
        for system in ([], [Message("system", "S")]) if template is V1 else ([],):
            given = [*system, *messages[:count]]
            parts = [
                {
                    "role": m.role,
                    "content": [{"type": "image"} for _ in m.attachments]
                    + [{"type": "text", "text": m.text}],
                }
                for m in given
            ]
            text = tokenizer.apply_chat_template(
                parts,
                chat_template=as_jinja(template),
                add_generation_prompt=for_answer,
                tokenize=False,
            )
            segments = render(given, template, for_answer=for_answer)
            assert text == as_text(segments, eos=tokenizer.eos_token)


def test_template_without_a_system_role_gets_the_system_text_in_the_first_question():
    source = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] | trim }}{% endfor %}"
    )
    segments = render([Message("system", "S"), user("Q")], ChatTemplate(source))
    assert as_text(segments) == "[user]S\n\nQ"


def test_template_that_trims_is_followed_and_one_that_edits_is_not():
    trims = ChatTemplate("{% for m in messages %}[{{ m['content'] | trim }}]{% endfor %}")
    assert as_text(render([user("  Q \n")], trims)) == "[Q]"
    edits = ChatTemplate(
        "{% for m in messages %}[{{ m['content'].replace('a', 'b') }}]{% endfor %}"
    )
    assert as_text(render([user(" a ")], edits)) == "[ a ]"


def test_page_text_stands_before_the_question_and_stays_when_images_are_left_out():
    seen = Attachment(b"x", "0" * 64, 100, 200, page_text=(TextLine("Welcome", (10, 20, 60, 30)),))
    text = as_text(render([user("Code?", seen)], CHAT, images=False))
    assert "<image>" not in text
    assert text.index("Welcome") < text.index("Code?")


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [Message("system", "S")],
        [answer("A")],
        [user("a"), user("b")],
        [user("a"), Message("system", "S")],
    ],
)
def test_messages_out_of_order_are_refused(messages):
    with pytest.raises(PromptError):
        render(messages, V1)


def test_templates_are_sandboxed_and_their_errors_are_ours():
    for source in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no') }}",
        "{{ messages[99].content.x }}",
        "{% for m in %}",
        "nothing of the conversation",
    ):
        with pytest.raises(PromptError):
            render([user("Q")], ChatTemplate(source))


def test_a_template_that_knows_no_images_has_them_written_into_the_text():
    template = ChatTemplate(
        source="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}",
        image_token="<mark>",
    )
    segments = render([user("Code <mark>?", IMAGE, IMAGE), answer("a"), user("b")], template)
    assert [segment.kind for segment in segments if segment.kind != "text"] == ["image", "image"]
    shown = as_text(segments, image="(picture)")
    assert shown == "[user](picture)\n(picture)\nCode <mark>?[assistant]a[user]b"
