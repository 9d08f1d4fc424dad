"""The one prompt renderer: a conversation and a template become a list of segments.

Inference, training and export all start from the segments made here; whoever has a tokenizer turns
the text runs into ids (`w2c_tui.models.tokenize`, or llama.cpp's tokenizer) and whoever has an
encoder puts features where an image stands. Content, meaning everything that a person typed or a
model wrote, stays content: only what the template itself says ever becomes a special token.

Knows nothing about tokenizers, token ids, pixels or models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import PromptError
from w2c_tui.core.page_layout import described

if TYPE_CHECKING:
    import jinja2

SegmentKind = Literal["text", "start", "eos", "token", "image"]


PAGE_PROMPT = "Please generate html code for the given image"
"""The instruction of the Web2Code benchmark (arXiv 2406.20098), which its models know."""


class Segment(msgspec.Struct, frozen=True):
    """One piece of a prompt.

    kind        what stands here
    ----------  ---------------------------------------------------------------------------------
    `text`      `text`, never parsed for special tokens
    `start`     whatever the tokenizer puts before a text by its own rule (BOS, or nothing)
    `eos`       the tokenizer's end-of-sequence token
    `token`     the special token spelled `text`
    `image`     the features of image number `image` (counted over the conversation from 0)

    `supervised` says that training takes its loss here.
    """

    kind: SegmentKind
    text: str = ""
    supervised: bool = False
    image: int = -1


class Template(msgspec.Struct, frozen=True, tag="roles"):
    """A conversation format that is written down as data.

    `user` and `answer` are the texts around what each side says. The prompt for an answer ends
    before `answer_lead`, because tokenizers join a leading space with the first word: the model
    writes the lead itself (so it is supervised) and the reader of its output takes it off again.
    """

    name: str
    system: str = ""
    after_system: str = ""
    before_user: str = ""
    after_user: str = ""
    before_answer: str = ""
    answer_lead: str = ""
    after_answer: str = ""
    eos_after_answer: bool = True
    user_text: bool = True
    image_newline: bool = True


PLAIN = Template(
    name="plain",
    after_answer="\n",
    eos_after_answer=False,
    user_text=False,
    image_newline=False,
)
"""LLaVA's stage-1 format: the image, the caption, a newline; what the user said is dropped."""

V1 = Template(
    name="v1",
    system=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    after_system=" ",
    before_user="USER: ",
    after_user=" ",
    before_answer="ASSISTANT:",
    answer_lead=" ",
)
"""Vicuna v1 as LLaVA uses it; the format of both published CrystalChat multimodal models."""

TEMPLATES = {template.name: template for template in (PLAIN, V1)}


class ChatTemplate(msgspec.Struct, frozen=True, tag="jinja"):
    """A tokenizer's own Jinja chat template, with what is needed to read its output.

    `tokens` are the strings that are special tokens when the template itself writes them;
    `image_token` is the one that marks the place of an image, if the model takes images.
    """

    source: str
    tokens: tuple[str, ...] = ()
    image_token: str | None = None
    bos_token: str = ""
    eos_token: str = ""
    name: str = "chat"
    answer_lead: str = ""


AnyTemplate = Template | ChatTemplate


def render(
    messages: Sequence[Message],
    template: AnyTemplate,
    *,
    images: bool = True,
    for_answer: bool = True,
) -> list[Segment]:
    """Lay `messages` out as segments; neighbouring text of one kind is joined.

    `images`: False for a model that reads text only; the images are then left out and what text
    recognition found on them stays. `for_answer`: end where the model goes on, which is after the
    answer prefix, or inside the last message if that is an unfinished answer; otherwise every
    message is closed, as in training.

    Raises PromptError if the messages are out of order or the template cannot express them.
    """
    _check(messages)
    if isinstance(template, ChatTemplate):
        segments = _render_chat(messages, template, images, for_answer)
    else:
        segments = _render_roles(messages, template, images, for_answer)
    return list(_joined(segments))


def image_list(messages: Sequence[Message]) -> list[Attachment]:
    """All images of the conversation in the order in which segments count them."""
    return [image for message in messages for image in message.attachments]


def as_text(segments: Sequence[Segment], *, image: str = "<image>", eos: str = "</s>") -> str:
    """The prompt as a person would read it."""
    shown = {"image": image, "eos": eos, "start": ""}
    return "".join(shown.get(segment.kind, segment.text) for segment in segments)


def as_jinja(template: Template) -> str:
    """`template` as a Jinja chat template that renders the same text.

    It goes into checkpoints and GGUF files for other programs; we render from the data.
    """
    user = (
        f"{{{{ {template.before_user!r} }}}}{_JINJA_IMAGES[template.image_newline]}"
        + (_JINJA_TEXT if template.user_text else "")
        + f"{{{{ {template.after_user!r} }}}}"
    )
    eos = " + eos_token" if template.eos_after_answer else ""
    return (
        f"{{%- set ns = namespace(system={template.system!r}) -%}}"
        "{%- for m in messages -%}{%- if m['role'] == 'system' -%}"
        "{%- set ns.system = m['content'] if m['content'] is string"
        " else m['content'] | map(attribute='text') | join('') -%}"
        "{%- endif -%}{%- endfor -%}"
        + (
            f"{{%- if ns.system -%}}{{{{ ns.system + {template.after_system!r} }}}}{{%- endif -%}}"
            if template.system or template.after_system
            else ""
        )
        + "{%- for m in messages -%}{%- if m['role'] == 'user' -%}"
        + user
        + "{%- elif m['role'] == 'assistant' -%}"
        + f"{{{{ {template.before_answer + template.answer_lead!r} }}}}"
        + _JINJA_TEXT
        + f"{{{{ {template.after_answer!r}{eos} }}}}"
        + "{%- endif -%}{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{{{{ {template.before_answer!r} }}}}{{%- endif -%}}"
    )


_JINJA_TEXT = (
    "{%- if m['content'] is string -%}{{ m['content'] }}{%- else -%}"
    "{%- for part in m['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}"
    "{%- endif -%}{%- endfor -%}{%- endif -%}"
)
_JINJA_IMAGES = {
    newline: (
        "{%- if m['content'] is not string -%}{%- for part in m['content'] -%}"
        "{%- if part['type'] == 'image' -%}{{ '<image>' }}"
        + ("{{ '\\n' }}" if newline else "")
        + "{%- endif -%}{%- endfor -%}{%- endif -%}"
    )
    for newline in (True, False)
}


def _check(messages: Sequence[Message]) -> None:
    turns = [message.role for message in messages if message.role != "system"]
    if not turns:
        raise PromptError("The conversation is empty.", hint="Add a message or an image first.")
    if any(message.role == "system" for message in messages[1:]):
        raise PromptError("A system message may only come first.")
    for at, role in enumerate(turns):
        expected = "assistant" if at % 2 else "user"
        if role != expected:
            raise PromptError(f"Message {at + 1} is from {role}, expected {expected}.")


def user_content(message: Message) -> str:
    """What a user message says to a model: what was read off its images, then its own text."""
    blocks = [
        described(image.page_text, (image.width, image.height))
        for image in message.attachments
        if image.page_text
    ]
    return "\n".join([*blocks, message.text]) if blocks else message.text


def _render_roles(
    messages: Sequence[Message], template: Template, images: bool, for_answer: bool
) -> Iterator[Segment]:
    yield Segment("start")
    system = template.system
    turns = list(messages)
    if turns[0].role == "system":
        system = turns.pop(0).text
    if system:
        yield Segment("text", system + template.after_system)
    next_image = 0
    for at, message in enumerate(turns):
        if message.role == "user":
            yield Segment("text", template.before_user)
            for _ in message.attachments if images else ():
                yield Segment("image", image=next_image)
                next_image += 1
                if template.image_newline:
                    yield Segment("text", "\n")
            if template.user_text:
                yield Segment("text", user_content(message))
            yield Segment("text", template.after_user)
            continue
        yield Segment("text", template.before_answer)
        yield Segment("text", template.answer_lead + message.text, supervised=True)
        if for_answer and at == len(turns) - 1:
            return
        yield Segment("text", template.after_answer, supervised=True)
        if template.eos_after_answer:
            yield Segment("eos", supervised=True)
    if for_answer and turns[-1].role == "user":
        yield Segment("text", template.before_answer)


def _joined(segments: Iterator[Segment]) -> Iterator[Segment]:
    held: Segment | None = None
    for segment in segments:
        if segment.kind == "text" and not segment.text:
            continue
        if held is not None:
            if segment.kind == "text" and segment.supervised == held.supervised:
                held = Segment("text", held.text + segment.text, held.supervised)
                continue
            yield held
            held = None
        if segment.kind == "text":
            held = segment
        else:
            yield segment
    if held is not None:
        yield held


# --- the tokenizer's own chat template -----------------------------------------------------------
#
# The template is rendered with a placeholder in place of every content, so that what it writes by
# itself can be told from what people and models wrote, whatever that is.


def _placeholder(at: int) -> str:
    return f"\ue0ff{at}\ue0fe"


_PLACEHOLDER = re.compile("\ue0ff([0-9]+)\ue0fe")


def _render_chat(
    messages: Sequence[Message], template: ChatTemplate, images: bool, for_answer: bool
) -> Iterator[Segment]:
    open_answer = for_answer and messages[-1].role == "assistant"
    images = images and template.image_token is not None
    laid_out, contents = _lay_out(messages, template, images, for_answer and not open_answer)
    pieces = _PLACEHOLDER.split(laid_out)
    next_image = 0
    closing = False
    for piece, at in zip(pieces[::2], [*map(int, pieces[1::2]), None], strict=True):
        for segment in _template_text(piece, template, images):
            if segment.kind == "image":
                segment = Segment("image", image=next_image)
                next_image += 1
            elif segment.kind != "text" and closing:
                segment = Segment(segment.kind, segment.text, supervised=True)
            closing = False
            yield segment
        if at is not None:
            closing = messages[at].role == "assistant"
            yield Segment("text", contents[at], supervised=closing)
            if open_answer and at == len(messages) - 1:
                break
    expected = len(image_list(messages)) if images else 0
    if next_image != expected:
        raise PromptError(
            f"The model's chat template has places for {next_image} image(s), "
            f"the conversation has {expected}.",
            hint="Remove images, or pick a model that takes several.",
        )


def _template_text(piece: str, template: ChatTemplate, images: bool) -> Iterator[Segment]:
    tokens = sorted({*template.tokens, template.image_token or ""} - {""}, key=len, reverse=True)
    if not tokens:
        yield Segment("text", piece)
        return
    parts = re.split("(" + "|".join(map(re.escape, tokens)) + ")", piece)
    for at, part in enumerate(parts):
        if not part:
            continue
        if at % 2 == 0:
            yield Segment("text", part)
        elif part == template.image_token and images:
            yield Segment("image")
        else:
            yield Segment("token", part)


def _lay_out(
    messages: Sequence[Message], template: ChatTemplate, images: bool, add_prompt: bool
) -> tuple[str, list[str]]:
    """The rendered template with placeholders, and the content that stands at each."""
    contents = [user_content(m) if m.role == "user" else m.text for m in messages]
    roles: list[str] = [message.role for message in messages]
    counts = [len(message.attachments) if images else 0 for message in messages]
    holders = [_placeholder(at) for at in range(len(messages))]

    def run(texts: Sequence[str], parts: bool) -> str:
        shaped = [
            {"role": role, "content": _content(text, count, parts, template.image_token or "")}
            for role, text, count in zip(roles, texts, counts, strict=True)
            if text or count or role != "system"
        ]
        return _run_jinja(template, shaped, add_prompt)

    expected = sum(counts)
    failure: PromptError | None = None
    best: tuple[str, list[str]] | None = None
    for parts in (True, False) if any(counts) else (False, True):
        for texts in (holders, _system_in_user(roles, holders)):
            if texts is None:
                continue
            try:
                laid_out = run(texts, parts)
            except PromptError as error:
                failure = failure or error
                continue
            found = [int(at) for at in _PLACEHOLDER.findall(laid_out)]
            if found != list(range(len(messages))):
                continue
            fitting = laid_out, _as_the_template_trims(laid_out, contents, texts, run, parts)
            # A template that knows no images shows one that was written into the text.
            if not expected or laid_out.count(template.image_token or "") == expected:
                return fitting
            best = best or fitting
    if best is not None:
        return best
    raise failure or PromptError(
        "The model's chat template does not show every message of the conversation.",
        hint="Start a new conversation, or use a model with another template.",
    )


def _system_in_user(roles: Sequence[str], holders: Sequence[str]) -> list[str] | None:
    """For templates without a system role: its text goes before the first question."""
    if len(roles) < 2 or roles[0] != "system":
        return None
    return ["", f"{holders[0]}\n\n{holders[1]}", *holders[2:]]


def _as_the_template_trims(
    laid_out: str, contents: list[str], texts: Sequence[str], run: Any, parts: bool
) -> list[str]:
    """The contents, stripped of outer white space if the template would have done that."""
    stripped = [content.strip() for content in contents]
    if stripped == contents:
        return contents

    def fill(text: str, values: Sequence[str]) -> str:
        return _PLACEHOLDER.sub(lambda match: values[int(match[1])], text)

    try:
        direct: str = run([fill(text, contents) for text in texts], parts)
    except PromptError:
        return contents
    if direct != fill(laid_out, contents) and direct == fill(laid_out, stripped):
        return stripped
    return contents


def _content(text: str, num_images: int, parts: bool, image_token: str) -> Any:
    if not parts:
        return f"{image_token}\n" * num_images + text
    images: list[dict[str, str]] = [{"type": "image"}] * num_images
    return [*images, {"type": "text", "text": text}]


def _run_jinja(template: ChatTemplate, messages: list[dict[str, Any]], add_prompt: bool) -> str:
    import jinja2

    try:
        return _compiled(template.source).render(
            messages=messages,
            add_generation_prompt=add_prompt,
            bos_token=template.bos_token,
            eos_token=template.eos_token,
            tools=None,
            documents=None,
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise PromptError(
            f"The model's chat template refused the conversation: {error}",
            hint="The template comes with the model; a system message is the usual reason.",
        ) from error


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    """The template as transformers compiles it (`chat_template_utils`), in Jinja's sandbox."""
    import json
    from datetime import datetime

    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise PromptError(f"The model's chat template says: {message}")

    def tojson(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


@lru_cache(maxsize=1)
def _generation_tag() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension

    class GenerationTag(Extension):
        """`{% generation %}` marks answers for training in some templates; here it is plain."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return GenerationTag
