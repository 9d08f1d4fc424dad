"""What every backend must do. A backend's test module subclasses `BackendContract`.

The subclass gives two fixtures: `vision` and `text`, each a loaded backend with a small random
model that is deterministic in greedy decoding; `fresh` makes another one with the same model.
`CandidatesContract` is for those that write several answers at once.
"""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import pytest
from PIL import Image

from tests.tiny import hostile_texts
from w2c_tui.backends.base import Backend, Event, Finished, Prefill, Stats, Text, Trimmed
from w2c_tui.backends.turn import MAX_BRANCHES
from w2c_tui.core.config import GenerationParams
from w2c_tui.core.conversation import Attachment, Message, TextLine
from w2c_tui.core.errors import ConfigError, ContextOverflowError, ImageError, PromptError
from w2c_tui.core.image import attachment_from_bytes

GREEDY = GenerationParams(temperature=0, max_new_tokens=24)


def picture(color: str, size: tuple[int, int] = (90, 60)) -> Attachment:
    image = Image.new("RGB", size, color)
    image.paste("white", (10, 10, 40, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return attachment_from_bytes(buffer.getvalue(), name=f"{color}.png")


def user(text: str, *images: Attachment) -> Message:
    return Message("user", text, images)


def events(
    backend: Backend,
    messages: Sequence[Message],
    params: GenerationParams = GREEDY,
    cancelled: Callable[[], bool] = lambda: False,
    ahead: int = 0,
    until: str = "",
) -> list[Event]:
    return list(backend.stream(messages, params, cancelled, ahead, until))


def text_of(found: Sequence[Event]) -> str:
    return "".join(event.delta for event in found if isinstance(event, Text))


def finish(found: Sequence[Event]) -> Finished:
    assert isinstance(found[-1], Finished)
    assert not any(isinstance(event, Finished) for event in found[:-1])
    return found[-1]


def stats(found: Sequence[Event]) -> Stats:
    return finish(found).stats


class BackendContract:
    @pytest.fixture
    def red(self) -> Attachment:
        return picture("red")

    def test_events_come_in_order_and_the_statistics_are_true(self, vision, red):
        found = events(vision, [user("Code?", red)])
        prefill = [event for event in found if isinstance(event, Prefill)]
        assert found[: len(prefill)] == prefill
        assert [p.done for p in prefill] == sorted(p.done for p in prefill)
        assert prefill[-1].done == prefill[-1].total == stats(found).prompt_tokens
        measured = stats(found)
        assert 0 < measured.new_tokens <= 24
        assert measured.context_used == measured.prompt_tokens + measured.new_tokens
        assert 0 < measured.time_to_first_token_s <= measured.total_s
        assert measured.peak_memory_bytes > 1_000_000

    def test_the_picture_and_the_words_matter(self, vision, red):
        one = text_of(events(vision, [user("Code?", red)]))
        assert one != text_of(events(vision, [user("Code?", picture("blue", (40, 90)))]))
        assert one != text_of(events(vision, [user("Other", red)]))
        assert one == text_of(events(vision, [user("Code?", red)]))

    def test_five_turns_with_an_edit_and_a_swapped_image_equal_fresh_runs(self, vision, fresh, red):
        """Greedy text after an edit of the second question and another image in the first."""
        conversations = []
        messages = [user("Turn 0", red)]
        for turn in range(1, 5):
            conversations.append(list(messages))
            answer = text_of(events(vision, messages))
            messages += [Message("assistant", answer), user(f"Turn {turn}")]
        conversations.append(list(messages))
        edited = [*messages[:2], user("Edited"), *messages[3:]]
        swapped = [user("Turn 0", picture("green")), *edited[1:]]
        conversations += [edited, swapped, list(messages)]
        for conversation in conversations:
            kept = events(vision, conversation)
            other = fresh("vision")
            assert text_of(kept) == text_of(events(other, conversation))
            assert stats(kept).prompt_tokens == stats(events(other, conversation)).prompt_tokens
            other.close()

    def test_only_the_first_difference_onward_is_computed(self, vision, red):
        first = [user("Code?", red)]
        answered = [*first, Message("assistant", "<p>Shop</p>"), user("Bigger")]
        before = stats(events(vision, first))
        again = stats(events(vision, answered))
        assert again.reused_tokens >= before.prompt_tokens - 4
        assert stats(events(vision, answered)).reused_tokens == again.prompt_tokens - 1
        swapped = [user("Code?", picture("blue")), *answered[1:]]
        assert stats(events(vision, swapped)).reused_tokens < 16

    def test_what_was_read_ahead_is_not_read_again(self, vision, fresh, red):
        earlier = [user("Hi"), Message("assistant", "<p>Shop</p>")]
        plain = events(fresh("vision"), [*earlier, user("Code?", red)])
        events(vision, [user("Something else")])
        steps = list(vision.prefill([*earlier, user("", red)], GREEDY, lambda: False))
        assert steps[-1].done == steps[-1].total > 0
        found = events(vision, [*earlier, user("Code?", red)])
        assert stats(found).reused_tokens > stats(found).prompt_tokens // 2
        assert text_of(found) == text_of(plain)
        # The same once more: all but the last token is there.
        list(vision.prefill([*earlier, user("Code?", red)], GREEDY, lambda: False))
        again = events(vision, [*earlier, user("Code?", red)])
        assert stats(again).reused_tokens == stats(again).prompt_tokens - 1
        assert text_of(again) == text_of(plain)

    def test_reading_ahead_ends_when_it_is_told_to(self, vision, fresh, red):
        plain = events(fresh("vision"), [user("Code? " * 60, red)])
        events(vision, [user("Something else")])
        steps = list(vision.prefill([user("Code? " * 60, red)], GREEDY, lambda: True))
        assert len(steps) == 1
        assert steps[0].done < steps[0].total
        assert text_of(events(vision, [user("Code? " * 60, red)])) == text_of(plain)

    def test_same_seed_same_text_other_seed_other_text(self, text):
        params = GenerationParams(temperature=1.0, max_new_tokens=24, seed=7, top_k=50, top_p=0.95)
        messages = [user("Write")]
        one = events(text, messages, params)
        assert text_of(one) == text_of(events(text, messages, params))
        assert stats(one).seed == 7
        others = {
            text_of(events(text, messages, GenerationParams(temperature=1.0, max_new_tokens=24)))
            for _ in range(3)
        }
        assert len(others) > 1

    def test_length_limit_and_its_reason(self, text):
        found = events(text, [user("Write")], GenerationParams(temperature=0, max_new_tokens=5))
        assert stats(found).new_tokens == 5
        assert finish(found).reason == "length"

    def test_stop_strings_end_the_answer_and_are_never_shown(self, text):
        whole = text_of(events(text, [user("Write a page")]))
        assert len(whole) > 12
        for start, length in ((6, 1), (5, 3), (4, 6)):
            stop = whole[start : start + length]
            params = GenerationParams(temperature=0, max_new_tokens=24, stop=("@@never@@", stop))
            found = events(text, [user("Write a page")], params)
            assert text_of(found) == whole[: whole.index(stop)]
            assert finish(found).reason == "stop"

    def test_an_answer_ends_with_the_text_it_was_asked_for_until(self, text):
        whole = text_of(events(text, [user("Code?")], GREEDY))
        for start, length in ((0, 1), (3, 4), (6, 9)):
            until = whole[start : start + length].swapcase()
            end = re.search(re.escape(until), whole, re.I).end()
            found = events(text, [user("Code?")], GREEDY, until=until)
            assert text_of(found) == whole[:end]
            assert finish(found).reason == "stop"
        never = events(text, [user("Code?")], GREEDY, until=whole + "more")
        assert text_of(never) == whole
        assert finish(never).reason == finish(events(text, [user("Code?")], GREEDY)).reason

    def test_what_ends_an_answer_may_begin_in_what_it_goes_on_from(self, text):
        begun = [user("Code?"), Message("assistant", "<p>Prices</p")]
        first = text_of(events(text, begun, GREEDY))[0]
        found = events(text, begun, GREEDY, until=f"Prices</p{first}")
        assert text_of(found) == first
        # What was there already does not end it.
        assert len(text_of(events(text, begun, GREEDY, until="prices"))) > 1

    def test_text_held_back_for_a_stop_string_is_shown_in_the_end(self, text):
        whole = text_of(events(text, [user("Write a page")]))
        params = GenerationParams(temperature=0, max_new_tokens=24, stop=(whole[-3:] + "\0more",))
        assert text_of(events(text, [user("Write a page")], params)) == whole

    @pytest.mark.parametrize("draft", [2, 10])
    def test_prompt_lookup_changes_no_text(self, text, draft):
        page = "<li>Price</li><li>Price</li><li>Price</li>"
        messages = [user(f"Repeat {page} {page}")]
        plain = GenerationParams(temperature=0, max_new_tokens=80)
        looked_up = GenerationParams(temperature=0, max_new_tokens=80, prompt_lookup=draft)
        expected = events(text, messages, plain)
        found = events(text, messages, looked_up)
        assert text_of(found) == text_of(expected)
        assert stats(found).new_tokens == stats(expected).new_tokens
        again = [*messages, Message("assistant", text_of(found)), user("more")]
        assert text_of(events(text, again, looked_up)) == text_of(events(text, again, plain))

    def test_cancel_while_writing_keeps_what_came_and_the_backend(self, vision, red):
        messages = [user("Code?", red)]
        whole = text_of(events(vision, messages))
        flag = threading.Event()
        found: list[Event] = []
        for event in vision.stream(messages, GREEDY, flag.is_set):
            found.append(event)
            if sum(isinstance(e, Text) for e in found) == 3:
                flag.set()
        assert finish(found).reason == "cancelled"
        assert text_of(found)
        assert whole.startswith(text_of(found))
        assert text_of(events(vision, messages)) == whole

    def test_cancel_while_reading_the_prompt(self, vision, red):
        messages = [user("word " * 150, red)]
        whole = text_of(events(vision, messages))
        events(vision, [user("something else")])
        asked = 0

        def after_some_asking() -> bool:
            nonlocal asked
            asked += 1
            return asked > 4

        began = time.monotonic()
        found = events(vision, messages, GREEDY, after_some_asking)
        assert finish(found).reason == "cancelled"
        assert not text_of(found)
        assert time.monotonic() - began < 20
        assert text_of(events(vision, messages)) == whole

    def test_leaving_the_stream_early_leaves_a_working_backend(self, text):
        messages = [user("Write")]
        whole = text_of(events(text, messages))
        stream = text.stream(messages, GREEDY, lambda: False)
        for event in stream:
            if isinstance(event, Text):
                break
        stream.close()
        assert text_of(events(text, messages)) == whole

    def test_an_unfinished_answer_is_continued(self, text):
        params = GenerationParams(temperature=0, max_new_tokens=12)
        found = events(text, [user("Write"), Message("assistant", "<html><bo")], params)
        closed = events(
            text, [user("Write"), Message("assistant", "<html><bo"), user("Go on")], params
        )
        assert stats(found).prompt_tokens < stats(closed).prompt_tokens

    def test_a_conversation_that_does_not_fit_loses_its_oldest_turns_but_no_image(
        self, vision, red
    ):
        messages = [user("Turn 0", red)]
        for turn in range(12):
            messages += [Message("assistant", "word " * 120), user(f"Turn {turn + 1}")]
        found = events(vision, messages)
        trimmed = [event for event in found if isinstance(event, Trimmed)]
        assert len(trimmed) == 1
        left = trimmed[0].num_messages
        assert 0 < left < len(messages)
        kept = [user(messages[left].text, red), *messages[left + 1 :]]
        assert text_of(found) == text_of(events(vision, kept))

    def test_a_message_that_alone_is_too_long_is_refused(self, text):
        with pytest.raises(ContextOverflowError, match="tokens"):
            events(text, [user("word " * 5000)])
        assert text_of(events(text, [user("Write")]))

    @pytest.mark.parametrize("content", hostile_texts()[:8])
    def test_special_strings_go_through_prompt_and_history_unharmed(self, text, content):
        messages = [user(content), Message("assistant", content), user(content)]
        found = events(text, messages)
        assert stats(found).new_tokens > 0
        plain = [user("x"), Message("assistant", "x"), user("x")]
        assert stats(found).prompt_tokens > stats(events(text, plain)).prompt_tokens

    def test_a_text_model_says_that_it_reads_no_images(self, text, red):
        with pytest.raises(PromptError, match=r"red\.png"):
            events(text, [user("Code?", red)])

    def test_a_text_model_reads_the_page_text(self, text, red):
        seen = msgspec.structs.replace(red, page_text=(TextLine("Prices", (1, 2, 30, 12)),))
        with_text = stats(events(text, [user("Code?", seen)])).prompt_tokens
        assert with_text > stats(events(text, [user("Code?")])).prompt_tokens

    def test_an_image_that_cannot_be_decoded_changes_nothing(self, vision, red):
        messages = [user("Code?", red)]
        whole = text_of(events(vision, messages))
        broken = msgspec.structs.replace(red, data=red.data[:50], sha256="f" * 64)
        with pytest.raises(ImageError):
            events(vision, [user("Code?", broken)])
        assert text_of(events(vision, messages)) == whole

    def test_parameters_out_of_range_are_refused(self, text):
        for params in (
            GenerationParams(temperature=-1),
            GenerationParams(top_p=0),
            GenerationParams(max_new_tokens=0),
        ):
            with pytest.raises(ConfigError):
                events(text, [user("Write")], params)


HOT = GenerationParams(temperature=1.0, max_new_tokens=24, seed=7)


def seeded(params: GenerationParams, number: int) -> GenerationParams:
    assert params.seed is not None
    return msgspec.structs.replace(params, seed=(params.seed + number) % 2**63)


def one_by_one(
    backend: Backend, messages: Sequence[Message], params: GenerationParams, count: int = 3
) -> list[list[Event]]:
    return [events(backend, messages, seeded(params, number)) for number in range(count)]


def at_once(
    backend: Backend, messages: Sequence[Message], params: GenerationParams, count: int = 3
) -> list[list[Event]]:
    """As `one_by_one`, with the backend told that more will follow."""
    return [
        events(backend, messages, seeded(params, number), ahead=count - 1 - number)
        for number in range(count)
    ]


def outcome(found: Sequence[Event]) -> tuple[object, ...]:
    """What must not depend on what was written beside it."""
    measured = stats(found)
    return (
        text_of(found),
        finish(found).reason,
        measured.seed,
        measured.prompt_tokens,
        measured.new_tokens,
        measured.context_used,
    )


def assert_the_same(batch: Sequence[Sequence[Event]], alone: Sequence[Sequence[Event]]) -> None:
    assert [outcome(found) for found in batch] == [outcome(found) for found in alone]


class _PatientStop:
    """Says yes when it was asked more than `patience` times since there was text."""

    def __init__(self, found: Sequence[Event], patience: int) -> None:
        self._found, self._left = found, patience

    def __call__(self) -> bool:
        self._left -= any(isinstance(event, Text) for event in self._found)
        return self._left < 0


class CandidatesContract:
    """With the fixtures of `BackendContract`, in which equal picks must give equal answers."""

    @pytest.fixture
    def asked(self) -> list[Message]:
        return [user("Code?", picture("red"))]

    @pytest.mark.parametrize("repetition_penalty", [1.0, 1.3])
    def test_candidates_written_at_once_are_what_each_seed_gives(
        self, vision, asked, repetition_penalty
    ):
        params = msgspec.structs.replace(HOT, repetition_penalty=repetition_penalty)
        alone = one_by_one(vision, asked, params)
        assert len({text_of(found) for found in alone}) == 3
        batch = at_once(vision, asked, params)
        assert_the_same(batch, alone)
        for found in batch[1:]:
            total = stats(found).prompt_tokens
            # They were there already.
            assert found[0] == Prefill(total, total)
            assert stats(found).reused_tokens == total
            assert 0 < stats(found).tokens_per_s < 100_000
            assert stats(found).total_s < stats(batch[0]).total_s
        assert vision.candidates is None

    def test_candidates_may_be_asked_for_in_any_order_and_once(self, text):
        messages = [user("Write")]
        params = msgspec.structs.replace(HOT, seed=2**63 - 2)
        alone = one_by_one(text, messages, params)
        found = [events(text, messages, seeded(params, n), ahead=2) for n in (0, 2, 1)]
        assert_the_same([found[n] for n in (0, 2, 1)], alone)
        again = events(text, messages, seeded(params, 1))
        assert outcome(again) == outcome(alone[1])
        assert stats(again).reused_tokens < stats(again).prompt_tokens

    def test_more_candidates_than_run_at_once(self, text):
        messages = [user("Write")]
        params = msgspec.structs.replace(HOT, max_new_tokens=8)
        count = MAX_BRANCHES + 3
        batch = at_once(text, messages, params, count)
        assert_the_same(batch, one_by_one(text, messages, params, count))
        computed = [stats(found).reused_tokens < stats(found).prompt_tokens for found in batch]
        assert [n for n, alone in enumerate(computed) if alone] == [0, MAX_BRANCHES]

    def test_another_request_drops_what_was_kept_and_is_right(self, vision, fresh, asked):
        alone = one_by_one(vision, asked, HOT)
        others: list[tuple[list[Message], GenerationParams]] = [
            ([user("Other")], HOT),
            (asked, seeded(HOT, 9)),
            (asked, msgspec.structs.replace(seeded(HOT, 1), temperature=0.9)),
        ]
        for messages, params in others:
            other = fresh("vision")
            expected = outcome(events(other, messages, params))
            other.close()
            assert outcome(events(vision, asked, HOT, ahead=2)) == outcome(alone[0])
            assert outcome(events(vision, messages, params)) == expected
            assert vision.candidates is None
            assert outcome(events(vision, asked, seeded(HOT, 1))) == outcome(alone[1])

    @pytest.mark.parametrize("leave", ["cancel", "close"])
    def test_a_candidate_that_is_left_in_the_middle_harms_no_other(self, vision, asked, leave):
        alone = one_by_one(vision, asked, HOT)
        for number in range(3):
            flag = threading.Event()
            found: list[Event] = []
            params = seeded(HOT, number)
            stream = vision.stream(asked, params, flag.is_set, ahead=2 - number)
            for event in stream:
                found.append(event)
                if sum(isinstance(e, Text) for e in found) == 3 and number != 1:
                    if leave == "close":
                        stream.close()
                        break
                    flag.set()
            if number == 1:
                assert outcome(found) == outcome(alone[1])
            else:
                assert text_of(found)
                assert text_of(alone[number]).startswith(text_of(found))
        assert vision.candidates is None
        assert_the_same(at_once(vision, asked, HOT), alone)

    @pytest.mark.parametrize("number", [0, 1])
    @pytest.mark.parametrize("leave", ["cancel", "close"])
    def test_who_leaves_one_candidate_leaves_them_all(self, text, number, leave):
        messages = [user("Write")]
        alone = one_by_one(text, messages, HOT)
        until = text_of(alone[0])[:8]
        for before in range(number):
            events(text, messages, seeded(HOT, before), ahead=2 - before, until=until)
            assert text.candidates is not None
        flag = threading.Event()
        stream = text.stream(messages, seeded(HOT, number), flag.is_set, 2 - number, until)
        next(event for event in stream if isinstance(event, Text))
        if leave == "cancel":
            flag.set()
            assert list(stream)[-1].reason == "cancelled"
        else:
            stream.close()
        assert text.candidates is None
        assert outcome(events(text, messages, seeded(HOT, 2))) == outcome(alone[2])

    def test_candidates_end_at_a_text_where_single_answers_do(self, text):
        messages = [user("Write a page")]
        whole = [text_of(events(text, messages, seeded(HOT, n))) for n in range(3)]
        for at in range(3):
            until = whole[at][4:7]
            alone = [events(text, messages, seeded(HOT, n), until=until) for n in range(3)]
            assert text_of(alone[at]).endswith(until)
            assert len({stats(found).new_tokens for found in alone}) > 1
            batch = [
                events(text, messages, seeded(HOT, n), ahead=2 - n, until=until) for n in range(3)
            ]
            assert_the_same(batch, alone)
            reused = [stats(found).reused_tokens for found in batch[1:]]
            assert reused == [stats(found).prompt_tokens for found in batch[1:]]
        # One that was kept for another end is not given out.
        events(text, messages, HOT, ahead=1, until=whole[1][4:7])
        assert_the_same(
            [events(text, messages, seeded(HOT, 1))], one_by_one(text, messages, HOT)[1:2]
        )

    def test_a_stop_anywhere_in_a_step_loses_nothing(self, vision, asked):
        alone = one_by_one(vision, asked, HOT)
        for patience in (8, 9, 11, 14, 19):
            found: list[Event] = []
            stop = _PatientStop(found, patience)
            for event in vision.stream(asked, HOT, stop, ahead=2):
                found.append(event)
            assert finish(found).reason == "cancelled"
            assert text_of(alone[0]).startswith(text_of(found))
            rest = [events(vision, asked, seeded(HOT, n), ahead=2 - n) for n in (1, 2)]
            assert_the_same(rest, alone[1:])

    def test_candidates_of_unequal_length(self, text):
        messages = [user("Write a page")]
        whole = [text_of(found) for found in one_by_one(text, messages, HOT)]
        for at in range(3):
            stop = whole[at][4:7]
            params = msgspec.structs.replace(HOT, stop=(stop,))
            alone = one_by_one(text, messages, params)
            assert finish(alone[at]).reason == "stop"
            assert len({stats(found).new_tokens for found in alone}) > 1
            assert_the_same(at_once(text, messages, params), alone)
        shortest = msgspec.structs.replace(HOT, max_new_tokens=1)
        assert_the_same(at_once(text, messages, shortest), one_by_one(text, messages, shortest))

    def test_the_turn_after_candidates_goes_on_from_the_prompt(self, vision, fresh, asked):
        batch = at_once(vision, asked, HOT)
        more = [*asked, Message("assistant", text_of(batch[1])), user("Bigger")]
        found = events(vision, more)
        assert stats(found).reused_tokens >= stats(batch[0]).prompt_tokens - 4
        other = fresh("vision")
        assert text_of(found) == text_of(events(other, more))
        other.close()

    def test_candidates_of_a_conversation_that_had_to_be_shortened(self, text):
        messages = [user("Turn 0")]
        for turn in range(12):
            messages += [Message("assistant", "word " * 120), user(f"Turn {turn + 1}")]
        alone = one_by_one(text, messages, HOT)
        batch = at_once(text, messages, HOT)
        assert_the_same(batch, alone)
        assert all(isinstance(found[0], Trimmed) for found in batch)
        assert [found[0] for found in batch] == [found[0] for found in alone]

    def test_prompt_lookup_changes_no_candidate(self, text):
        messages = [user("Repeat <li>Price</li><li>Price</li> <li>Price</li><li>Price</li>")]
        params = msgspec.structs.replace(HOT, prompt_lookup=4)
        assert_the_same(at_once(text, messages, params), one_by_one(text, messages, params))
