"""Several tries at one page, each an answer of its own beside or below the others.

Owns the thread's side: it runs the loop of `web.better`, writes every try to the store as it comes
and keeps its page as a version. Knows nothing about widgets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

import msgspec

from w2c_tui.backends.base import Finished, ModelInfo
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Attachment
from w2c_tui.core.errors import W2CError
from w2c_tui.core.iteration import Iteration, given
from w2c_tui.core.store import Store
from w2c_tui.engine.client import EngineClient
from w2c_tui.tui.answer import Answer
from w2c_tui.tui.pages import Pages

Outcome = Literal["running", "done", "stopped", "failed"]


class Step(msgspec.Struct):
    """One try: what it was, and what came of it."""

    kind: str
    message_id: int
    score: float | None = None
    version: str = ""
    error: str = ""


class BetterRun:
    """`run` belongs on a thread; `steps` and `outcome` may be read at any time.

    `began` and `ended` are called on that thread with each try's answer.
    """

    def __init__(
        self,
        question_id: int,
        screenshot: Attachment,
        params: GenerationParams,
        *,
        iteration: Iteration,
        best_of: int,
        refine: int,
        begins_pages: Callable[[], bool],
        began: Callable[[Answer], None],
        ended: Callable[[Answer], None],
    ) -> None:
        self.question_id = question_id
        self.total = best_of + refine
        self.steps: list[Step] = []
        self.outcome: Outcome = "running"
        self.error: W2CError | None = None
        self._screenshot = screenshot
        self._params, self._iteration = params, iteration
        self._best_of, self._refine = best_of, refine
        self._begins_pages = begins_pages
        self._began, self._ended = began, ended
        self._answer: Answer | None = None
        self._stopped = False

    @property
    def best(self) -> Step | None:
        """The nearest so far, the earliest of equals."""
        scored = [step for step in self.steps if step.version]
        return max(scored, key=lambda step: step.score or 0.0, default=None)

    def has(self, answer: Answer) -> bool:
        """Whether `answer` is one of its tries."""
        return any(step.message_id == answer.message_id for step in self.steps)

    def cancel(self) -> None:
        """End it soon; what there is stays."""
        self._stopped = True
        # Once, as the other thread may be done with it in between.
        answer = self._answer
        if answer is not None:
            answer.cancel()

    def stopped(self) -> bool:
        answer = self._answer
        return self._stopped or (answer is not None and answer.stopping)

    def run(self, engine: EngineClient, store: Store, pages: Pages, info: ModelInfo) -> None:
        """Each candidate is asked for as a plain answer is, see `Answer.run`.

        Raises nothing: a failure ends up in `error`.
        """
        try:
            self._run(engine, store, pages, info)
        except W2CError as error:
            self.error, self.outcome = error, "failed"
            if self._answer is not None:
                self._answer.fail(error)
                self._ended(self._answer)
        else:
            self.outcome = "stopped" if self.stopped() else "done"
        best = self.best
        if best is not None:
            with contextlib.suppress(W2CError):
                store.go_back_to(best.message_id)
                session_id = store.message(best.message_id).session_id
                pages.versions(session_id).select(int(best.version[1:]))

    def _run(self, engine: EngineClient, store: Store, pages: Pages, info: ModelInfo) -> None:
        from w2c_tui.engine.page_writer import begun
        from w2c_tui.web.better import Begun, Try, better_pages

        session_id = store.message(self.question_id).session_id
        messages = given(store.conversation(session_id, self.question_id), self._iteration)
        params = self._params
        if self._begins_pages() and (helped := begun(messages, params)) is not None:
            messages, params = helped
        finished: Finished | None = None
        tries = better_pages(
            engine,
            pages.renderer,
            messages,
            params,
            pages.reference(self._screenshot),
            info,
            best_of=self._best_of,
            refine=self._refine,
            cancelled=self.stopped,
        )
        for event in tries:
            if isinstance(event, Begun):
                parent = self.question_id
                if event.kind == "correction" and (best := self.best) is not None:
                    # What was asked stands below the page that it is about.
                    request = event.asked[-1]
                    asked = store.add_message(session_id, request, parent=best.message_id)
                    parent = asked.id
                writer = store.begin_answer(session_id, parent=parent, model=info.name)
                answer = Answer(writer, store.message(writer.message_id))
                self._answer = answer
                self.steps.append(Step(event.kind, answer.message_id))
                if event.asked[-1].role == "assistant":
                    answer.begin(event.asked[-1].text)
                self._began(answer)
                if self._stopped:
                    answer.cancel()
            elif isinstance(event, Try):
                self._judge(event, finished, pages)
            elif self._answer is not None:
                if isinstance(event, Finished):
                    finished = event
                    self._answer.written()
                else:
                    self._answer.take(event, engine)
        if self._answer is not None:
            # Left in the middle: what came of it stays.
            self._answer.finish("cancelled", finished, self._iteration)
            self._ended(self._answer)
            self._answer = None

    def _judge(self, done: object, finished: Finished | None, pages: Pages) -> None:
        from w2c_tui.web.better import Try

        assert isinstance(done, Try)
        answer, step = self._answer, self.steps[-1]
        assert answer is not None
        step.error = done.error
        if done.answer is not None:
            answer.finish(done.answer.reason, finished, self._iteration)
            version = pages.keep_try(answer.message_id, done, self._params)
            if version is not None:
                step.version, step.score = version.name, done.score
        else:
            answer.fail(W2CError(done.error))
        self._stopped = self._stopped or answer.stopping
        self._answer = None
        self._ended(answer)
