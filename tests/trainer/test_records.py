"""Single records: what is refused and why, what is put right and how."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.trainer.data import record, write_image
from trainer.dataset import StoredImage, StoredRecord
from trainer.records import REASONS, REPAIRS, Drop, convert

IMAGE = "<image>\n"


def converted(raw, folder="", check="none"):
    """What becomes of `raw` (JSON, or its bytes), and what was put right."""
    repairs: Counter[str] = Counter()
    data = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    found = convert(data, "file-7", str(folder), check, repairs)
    assert repairs.keys() <= REPAIRS.keys()
    assert not isinstance(found, Drop) or found.reason in REASONS
    return found, dict(repairs)


def test_a_published_record_becomes_turns_with_the_image_at_its_question():
    raw = record("a", "<image>\nMake it.", "<p>1</p>", "Red?", "No.", image="x/1.png")
    assert converted(raw) == (
        StoredRecord(
            "a",
            [
                ("user", "Make it."),
                ("assistant", "<p>1</p>"),
                ("user", "Red?"),
                ("assistant", "No."),
            ],
            [StoredImage(0, "x/1.png")],
        ),
        {},
    )


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", " What? <image> "])
def test_the_place_of_the_mark_in_the_question_does_not_matter(question):
    found, _ = converted(record("a", question, "That.", image="1.png"))
    assert found.turns[0] == ("user", "What?")
    assert found.images == [StoredImage(0, "1.png")]


def test_answers_stay_exactly_as_they_are():
    answer = "  <s>old</s> <image> \n</s> <unk>\t "
    found, _ = converted(record("a", IMAGE + "Q", answer, image="1.png"))
    assert found.turns[1] == ("assistant", answer)
    assert len(found.images) == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{not json}", "broken_record"),
        (b'{"id": "a", "conversations": [}', "broken_record"),
        (7, "not_a_conversation"),
        ({"id": "a"}, "not_a_conversation"),
        ({"id": "a", "conversations": []}, "not_a_conversation"),
        ({"id": "a", "conversations": [{"from": "human"}]}, "not_a_conversation"),
        ({"id": "a", "conversations": ["human", "gpt"]}, "not_a_conversation"),
        ({"id": "a", "conversations": [{"from": "bot", "value": "x"}]}, "unknown_role"),
        ({"id": "a", "conversations": [{"from": None, "value": "x"}]}, "unknown_role"),
        (record("a", "Q"), "role_order"),
        (record("a", "Q", ""), "empty_answer"),
        (record("a", "Q", " \n"), "empty_answer"),
        (record("a", "", "A"), "empty_question"),
        (record("a", "Q", "A", " ", "B"), "empty_question"),
        (record("a", "<image>\nQ", "A"), "image_count"),
        (record("a", "<image><image>\nQ", "A", image="1.png"), "image_count"),
        (record("a", "<image>\nQ", "A", image=["1.png", "2.png"]), "image_count"),
        (record("a", "<image>\nQ", "A", image="../../etc/passwd"), "unsafe_path"),
        (record("a", "<image>\nQ", "A", image="/etc/passwd"), "unsafe_path"),
        (record("a", "<image>\nQ", "A", image="https://example.com/1.png"), "unsafe_path"),
        (record("a", "<image>\nQ", "A", image={"path": "1.png"}), "unsafe_path"),
    ],
)
def test_a_record_that_cannot_be_trained_on_is_refused_with_its_reason(raw, reason):
    found, _ = converted(raw)
    assert isinstance(found, Drop)
    assert found.reason == reason


def test_two_questions_in_a_row_are_refused():
    raw = record("a", "Q", "A")
    raw["conversations"].insert(1, {"from": "human", "value": "And?"})
    assert converted(raw)[0].reason == "role_order"


@pytest.mark.parametrize(
    ("raw", "repair", "turns"),
    [
        (record(None, "Q", "A"), "id_made", [("user", "Q"), ("assistant", "A")]),
        (record("a", "Q", "A", "More?"), "trailing_question", [("user", "Q"), ("assistant", "A")]),
        (
            b'{"id": "a", "conversations": [{"from": "human", "value": "Q \\ud83d"},'
            b' {"from": "gpt", "value": "A"}]}',
            "invalid_unicode",
            [("user", "Q \ufffd"), ("assistant", "A")],
        ),
    ],
)
def test_what_is_known_to_be_wrong_is_put_right(raw, repair, turns):
    found, repairs = converted(raw)
    assert repairs == {repair: 1}
    # One replacement character or several, as decoders differ.
    assert [(role, text.replace("\ufffd\ufffd\ufffd", "\ufffd")) for role, text in found.turns] == (
        turns
    )
    assert found.id == ("file-7" if repair == "id_made" else "a")


def test_an_answer_before_the_first_question_is_left_out_as_llava_does():
    raw = record("a", "Q", "A")
    raw["conversations"].insert(0, {"from": "gpt", "value": "Hello!"})
    found, repairs = converted(raw)
    assert repairs == {"leading_answer": 1}
    assert found.turns == [("user", "Q"), ("assistant", "A")]


def test_an_image_without_a_mark_goes_to_the_first_question():
    found, repairs = converted(record("a", "Q", "A", image="1.png"))
    assert repairs == {"image_not_marked": 1}
    assert found.images == [StoredImage(0, "1.png")]


@pytest.mark.parametrize("ident", [7, "7"])
def test_numbers_are_ids_too(ident):
    assert converted(record(ident, "Q", "A"))[0].id == "7"


@settings(max_examples=100, deadline=None)
@given(
    questions=st.lists(st.text(min_size=1).filter(lambda t: t.strip()), min_size=1, max_size=4),
    answer=st.text(min_size=1).filter(lambda t: t.strip()),
)
def test_any_text_survives(questions, answer):
    values = [text for question in questions for text in (question, answer)]
    found, _ = converted(record("a", *values))
    if any("<image>" in question for question in questions):
        return
    assert [text for _, text in found.turns] == values


# --- Images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", ["header", "full"])
def test_the_size_of_an_image_is_stored_upright(check, tmp_path):
    picture = Image.new("RGB", (30, 10))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "1.jpg", exif=exif)
    found, repairs = converted(record("a", IMAGE, "A", image="1.jpg"), tmp_path, check)
    assert found.images == [StoredImage(0, "1.jpg", 10, 30)]
    assert repairs == {}


@pytest.mark.parametrize("check", ["header", "full"])
def test_a_missing_image_is_named(check, tmp_path):
    found, _ = converted(record("a", IMAGE, "A", image="x/1.jpg"), tmp_path, check)
    assert found == Drop("a", "image_missing", "x/1.jpg")


@pytest.mark.parametrize("content", [b"", b"<html>404 not found</html>", b"\x89PNG\r\n\x1a\nxx"])
def test_a_file_that_is_no_image_is_refused(content, tmp_path):
    (tmp_path / "1.jpg").write_bytes(content)
    found, _ = converted(record("a", IMAGE, "A", image="1.jpg"), tmp_path, "header")
    assert (found.reason, found.detail[:7]) == ("image_broken", "1.jpg: ")


def test_an_image_that_was_cut_off_is_found_by_opening_it_whole(tmp_path):
    write_image(tmp_path / "whole.png", (300, 300))
    noise = Image.effect_noise((300, 300), 90)
    noise.save(tmp_path / "1.png")
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    raw = record("a", IMAGE, "A", image="1.png")
    assert isinstance(converted(raw, tmp_path, "header")[0], StoredRecord)
    assert converted(raw, tmp_path, "full")[0].reason == "image_broken"


def test_a_gif_under_a_jpg_name_is_read_by_its_content(tmp_path):
    write_image(tmp_path / "1.jpg", format="GIF")
    found, repairs = converted(record("a", IMAGE, "A", image="1.jpg"), tmp_path, "full")
    assert found.images == [StoredImage(0, "1.jpg", 20, 10)]
    assert repairs == {"image_format": 1}


def test_an_image_that_was_saved_under_another_suffix_is_found(tmp_path):
    write_image(tmp_path / "ocr_vqa/images/1.gif")
    raw = record("a", IMAGE, "A", image="ocr_vqa/images/1.jpg")
    found, repairs = converted(raw, tmp_path, "full")
    assert found.images == [StoredImage(0, "ocr_vqa/images/1.gif", 20, 10)]
    assert repairs == {"image_renamed": 1}


def test_images_are_not_touched_when_nobody_asks(tmp_path):
    found, _ = converted(record("a", IMAGE, "A", image="missing.png"), tmp_path, "none")
    assert found.images == [StoredImage(0, "missing.png", 0, 0)]
