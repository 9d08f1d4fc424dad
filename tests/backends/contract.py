"""What every backend must do. A backend's test module subclasses `BackendContract`.

The subclass gives two fixtures: `vision` and `text`, each a loaded backend with a small random
model that is deterministic in greedy decoding; `fresh` makes another one with the same model.
"""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from PIL import Image

from tests.tiny import hostile_texts
from w2c_tui.backends.base import Backend, Event, Finished, Prefill, Stats, Text, Trimmed
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
) -> list[Event]:
    return list(backend.stream(messages, params, cancelled))


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
        import msgspec

        seen = msgspec.structs.replace(red, page_text=(TextLine("Prices", (1, 2, 30, 12)),))
        with_text = stats(events(text, [user("Code?", seen)])).prompt_tokens
        assert with_text > stats(events(text, [user("Code?")])).prompt_tokens

    def test_an_image_that_cannot_be_decoded_changes_nothing(self, vision, red):
        import msgspec

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
