"""Runs the understanding benchmark: questions in, a journal of answers out.

Knows nothing about terminals; progress is a callback.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from w2c_tui.core.errors import W2CError
from w2c_tui.evaluate.asking import Asker, Attach, inside, shared_out
from w2c_tui.evaluate.journal import Journal
from w2c_tui.evaluate.wub import Answered, Question, WubResult, ask, score


def run_wub(
    askers: Sequence[tuple[Asker, Attach]],
    questions: Sequence[Question],
    images: Path,
    journal: Journal[Answered],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> WubResult:
    """Put every question that has no answer in `journal` yet, and score the whole.

    `askers` share the questions out, each with its way to open a picture; as every question has a
    seed of its own, answers do not depend on how many there are. A question that fails, by a
    missing picture or a crash of the engine, is a row with an error and is tried again by the next
    run. `report(done, total)` hears of the progress. Raises `asking.Stopped` when the user ends
    the run.
    """
    done = latest(journal.rows)
    answered = {ident for ident, row in done.items() if not row.error}
    report(len(answered), len(questions))
    open_ones = [
        (number, question)
        for number, question in enumerate(questions)
        if question.question_id not in answered
    ]

    def put(worker: tuple[Asker, Attach], item: tuple[int, Question]) -> Answered:
        (asker, attach), (number, question) = worker, item
        try:
            image = attach(inside(images, question.image))
            return ask(question, image, lambda messages: asker.ask(messages, number))
        except W2CError as error:
            return Answered(
                question.question_id,
                question.image,
                question.category,
                question.answer,
                error=error.message,
            )

    with contextlib.closing(shared_out(open_ones, askers, put)) as rows:
        for row in rows:
            journal.add(row)
            answered.add(row.question_id)
            report(len(answered), len(questions))
    done = latest(journal.rows)
    return score(done[question.question_id] for question in questions)


def latest(rows: Sequence[Answered]) -> dict[str, Answered]:
    """The last row of each question: a failed one that was tried again counts once."""
    return {row.question_id: row for row in rows}
