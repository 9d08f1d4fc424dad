"""The Webpage Understanding Benchmark of Web2Code (arXiv 2406.20098): yes/no questions on pages.

Owns its questions, its protocol (one retry inside the same chat) and its two scores: the published
rule, and a strict one in which every row of the file counts. Knows nothing about screens, files of
results (`journal`) or how a model answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import msgspec

from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Attachment, Message
from w2c_tui.core.errors import ConfigError
from w2c_tui.evaluate.statistics import Interval, wilson

PUBLISHED_PARAMS = GenerationParams(temperature=0.2, max_new_tokens=512, seed=0)
"""As `webpage_understanding/code_eval.py` of the published repository; the seed is ours."""
_ATTEMPTS = 2


class Question(msgspec.Struct, frozen=True):
    """One row of `Web2Code_eval.jsonl`."""

    image: str
    question_id: str
    question: str
    answer: str

    @property
    def category(self) -> str:
        """The image's top folder, which names the source of the page; "all" where there is none."""
        return self.image.replace("\\", "/").split("/")[0] if "/" in self.image else "all"


class Answered(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one question. `replies` are raw, the last one counts; `error` if it failed."""

    question_id: str
    image: str
    category: str
    actual: str
    replies: tuple[str, ...] = ()
    error: str = ""

    @property
    def prediction(self) -> str:
        return self.replies[-1] if self.replies else ""

    @property
    def published_correct(self) -> bool | None:
        """None: the published scripts would have dropped the row."""
        return None if self.error else published_correct(self.prediction, self.actual)

    @property
    def strict_correct(self) -> bool:
        return not self.error and strict_correct(self.prediction, self.actual)


class Accuracy(msgspec.Struct, frozen=True):
    """`num_correct` of `num_rows` with the 95% Wilson interval of their ratio, all in 0..1."""

    num_correct: int
    num_rows: int
    interval: Interval

    @property
    def ratio(self) -> float:
        return self.num_correct / self.num_rows if self.num_rows else 0.0


class WubResult(msgspec.Struct, frozen=True):
    """The benchmark's outcome. `num_dropped` rows are not in the published score but in ours."""

    published: Accuracy
    strict: Accuracy
    by_category: dict[str, Accuracy]
    by_answer: dict[str, Accuracy]
    num_dropped: int
    num_retried: int
    num_unclear: int


def load_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file with rows `{image, question_id, Q, A}`.

    Raises ConfigError that names the line which is not like that.
    """
    questions: list[Question] = []
    seen: set[str] = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The questions {path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line, type=_Row)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"Line {number} of {path} is no question: {error}.",
                hint='A row is {"image": ..., "question_id": ..., "Q": ..., "A": "Yes"}.',
            ) from error
        ident = str(row.question_id)
        if ident in seen:
            ident = f"{ident}#{number}"
        seen.add(ident)
        questions.append(Question(row.image, ident, row.Q, row.A))
    if not questions:
        raise ConfigError(f"{path} holds no questions.")
    return questions


class _Row(msgspec.Struct):
    image: str
    question_id: str | int
    Q: str
    A: str


def ask(
    question: Question, image: Attachment, answer: Callable[[Sequence[Message]], str]
) -> Answered:
    """Put `question` to a model by the published protocol.

    `answer(messages)` is the model's raw reply. A reply that is not plainly yes or no is asked for
    once more in the same chat, without the image being shown again.
    """
    messages = [Message("user", question.question, (image,))]
    replies: list[str] = []
    while True:
        replies.append(answer(messages).strip())
        if is_yes_or_no(replies[-1]) or len(replies) == _ATTEMPTS:
            break
        messages = [
            *messages,
            Message("assistant", replies[-1]),
            Message("user", question.question),
        ]
    return Answered(
        question.question_id, question.image, question.category, question.answer, tuple(replies)
    )


def is_yes_or_no(reply: str) -> bool:
    """The published test for asking again: only the letters "yes" or "no", in any case."""
    text = reply.lower().removesuffix("</s>")
    return re.sub(r"[^a-zA-Z]", "", text) in ("yes", "no")


def published_correct(prediction: str, actual: str) -> bool:
    """The published rule: equal, or the answer stands anywhere in the first five characters.

    So "Not sure" counts as "No".
    """
    said, expected = (text.replace("</s>", "").strip().upper() for text in (prediction, actual))
    return said == expected or expected in said[:5]


def strict_correct(prediction: str, actual: str) -> bool:
    """The first word is the answer: "No." and "No, it is not" are "No", "Not sure" is not."""
    words = re.findall(r"[a-z]+", prediction.lower().replace("</s>", ""))
    expected = re.findall(r"[a-z]+", actual.lower())
    return bool(expected) and words[:1] == expected[:1]


def score(answered: Iterable[Answered]) -> WubResult:
    """Both scores of a finished run."""
    rows = list(answered)
    kept = [row.published_correct for row in rows if row.published_correct is not None]

    def split(key: Callable[[Answered], str]) -> dict[str, Accuracy]:
        names = sorted({key(row) for row in rows})
        return {
            name: _accuracy([row.strict_correct for row in rows if key(row) == name])
            for name in names
        }

    return WubResult(
        published=_accuracy(kept),
        strict=_accuracy([row.strict_correct for row in rows]),
        by_category=split(lambda row: row.category),
        by_answer=split(lambda row: row.actual.strip().capitalize()),
        num_dropped=len(rows) - len(kept),
        num_retried=sum(len(row.replies) > 1 for row in rows),
        num_unclear=sum(not row.error and not is_yes_or_no(row.prediction) for row in rows),
    )


def _accuracy(correct: Sequence[bool]) -> Accuracy:
    return Accuracy(sum(correct), len(correct), wilson(sum(correct), len(correct)))
