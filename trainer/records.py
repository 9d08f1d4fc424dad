"""One published record: its checks, its repairs, and the reasons to leave it out.

Owns what a LLaVA record must look like and what is known to be wrong with published ones. A record
becomes a `StoredRecord`, or a `Drop` that says why not. Reads images only to check them. Knows
nothing about files of records, tokenizers or processes.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import stat
from collections import Counter
from typing import Any, Literal

import msgspec

from trainer.dataset import StoredImage, StoredRecord
from w2c_tui.core.conversation import Role
from w2c_tui.core.errors import ImageError
from w2c_tui.core.image import ImageSpec, open_image, prepare, read_header
from w2c_tui.core.printable import one_line
from w2c_tui.core.reference import read_reference

ImageCheck = Literal["full", "header", "none"]

REASONS = {
    "broken_record": "the record is no valid JSON",
    "not_a_conversation": "the record has no list of turns with `from` and `value`",
    "unknown_role": "a turn is from somebody unknown",
    "role_order": "questions and answers do not alternate",
    "empty_answer": "an answer is empty",
    "empty_question": "a question has neither text nor image",
    "image_count": "there are not as many `<image>` marks as images",
    "unsafe_path": "an image path leads out of the image folder",
    "image_missing": "an image does not exist",
    "image_broken": "an image cannot be opened",
    "template": "the conversation template cannot express it",
    "duplicate": "the same record was there before",
}
"""Why records are left out, in words."""

REPAIRS = {
    "id_made": "had no id; its place in the file is its id now",
    "id_shared": "had an id that others have, too; a number was added",
    "invalid_unicode": "had halves of characters; they were replaced",
    "leading_answer": "began with an answer; it was left out, as LLaVA does",
    "trailing_question": "ended with a question; it was left out",
    "image_not_marked": "had an image and no `<image>`; the image was put first",
    "image_renamed": "named an image that has another suffix on disk",
    "image_format": "has an image whose content is not what its suffix says; it is read by content",
}
"""What was put right, in words."""

IMAGE_MARK = "<image>"
MAX_IMAGES = 255
_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".mpo"),
    "PNG": (".png", ".apng"),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
_OTHER_SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".webp", ".JPG", ".PNG")


class Drop(msgspec.Struct, frozen=True):
    """Why a record is left out: a key of `REASONS`, and the value that is wrong."""

    id: str
    reason: str
    detail: str = ""


class FittedImages(msgspec.Struct, frozen=True):
    """A record that knows the sizes of its stored images, and those images one after another."""

    record: StoredRecord
    pixels: bytes


class _Refused(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason = reason
        self.detail = one_line(detail, 200)


def convert(
    data: bytes,
    made_id: str,
    images_folder: str,
    check: ImageCheck,
    repairs: Counter[str],
    formats: Counter[str] | None = None,
) -> StoredRecord | Drop:
    """The record in `data` (JSON), checked.

    made_id: its id if it has none. check: how closely images are looked at. Counts what was put
    right in `repairs` and, where images are opened, "FORMAT in .suffix" in `formats`.
    """
    ident = made_id
    try:
        raw = _decoded(data, repairs)
        if not isinstance(raw, dict):
            raise _Refused("not_a_conversation", f"a {type(raw).__name__}")
        given = raw.get("id")
        if isinstance(given, str | int) and not isinstance(given, bool) and str(given).strip():
            ident = one_line(str(given), 200)
        else:
            repairs["id_made"] += 1
        turns = _turns(raw, repairs)
        images = _place_images(_image_paths(raw), turns, repairs)
        _check_turns(turns, {image.message for image in images})
        if check != "none":
            images = [_checked(image, images_folder, check, repairs, formats) for image in images]
        return StoredRecord(ident, [(role, text) for role, text in turns], images)
    except _Refused as refused:
        return Drop(ident, refused.reason, refused.detail)


def fit(record: StoredRecord, images_folder: str, spec: ImageSpec) -> FittedImages | Drop:
    """The images of `record` as PNG files of what a vision tower of `spec` sees."""
    images, pixels = [], b""
    for image in record.images:
        try:
            fitted = _fitted(images_folder, image.path, spec)
        except ImageError as error:
            return Drop(record.id, "image_broken", f"{image.path}: {one_line(error.message, 200)}")
        images.append(msgspec.structs.replace(image, pixel_bytes=len(fitted)))
        pixels += fitted
    return FittedImages(msgspec.structs.replace(record, images=images), pixels)


def image_paths(data: bytes) -> list[str]:
    """The image paths that a record names, unchecked; none if it cannot be read."""
    try:
        raw = _decoded(data, Counter())
        return _image_paths(raw) if isinstance(raw, dict) else []
    except _Refused:
        return []


_decode_json = msgspec.json.Decoder().decode


def _decoded(data: bytes, repairs: Counter[str]) -> Any:
    try:
        return _decode_json(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        first = error
    # Python's reader lets halves of surrogate pairs pass, which people's JSON writers let pass too.
    try:
        text = data.decode("utf-8", "replace")
        repaired = json.loads(text)
    except (ValueError, RecursionError):
        raise _Refused("broken_record", str(first)) from first
    repairs["invalid_unicode"] += 1
    return json.loads(
        json.dumps(repaired, ensure_ascii=False)
        .encode("utf-8", "surrogatepass")
        .decode("utf-8", "replace")
    )


def _turns(raw: dict[str, Any], repairs: Counter[str]) -> list[list[Any]]:
    listed = raw.get("conversations")
    if not isinstance(listed, list) or not listed:
        raise _Refused("not_a_conversation", f"conversations: {type(listed).__name__}")
    turns: list[list[Any]] = []
    for at, turn in enumerate(listed):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _Refused("not_a_conversation", f"turn {at + 1}")
        speaker = turn.get("from")
        role = _ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
        if role is None or (role == "system" and at > 0):
            raise _Refused("unknown_role", f"turn {at + 1} is from {speaker!r}")
        turns.append([role, turn["value"]])
    first = 1 if turns[0][0] == "system" else 0
    if len(turns) > first and turns[first][0] == "assistant":
        del turns[first]
        repairs["leading_answer"] += 1
    if len(turns) > first + 1 and turns[-1][0] == turns[-2][0] == "user":
        raise _Refused("role_order", f"turn {len(turns)} is from {turns[-1][0]} again")
    if len(turns) > first + 2 and turns[-1][0] == "user" and IMAGE_MARK not in turns[-1][1]:
        del turns[-1]
        repairs["trailing_question"] += 1
    for at, (role, _) in enumerate(turns[first:]):
        if role != ("assistant" if at % 2 else "user"):
            raise _Refused("role_order", f"turn {first + at + 1} is from {role} again")
    if len(turns) - first < 2 or turns[-1][0] != "assistant":
        raise _Refused("role_order", "a question without an answer")
    return turns


def _image_paths(raw: dict[str, Any]) -> list[str]:
    given = raw.get("image")
    listed = given if isinstance(given, list) else [given]
    if any(path is not None and not isinstance(path, str) for path in listed):
        raise _Refused("unsafe_path", repr(given))
    paths = [path.strip() for path in listed if path and path.strip()]
    for path in paths:
        parts = re.split(r"[/\\]", path)
        if os.path.isabs(path) or ".." in parts or "\0" in path or re.match(r"\w+:", path):
            raise _Refused("unsafe_path", path)
    return paths


def _place_images(
    paths: list[str], turns: list[list[Any]], repairs: Counter[str]
) -> list[StoredImage]:
    """Take the marks out of what people said and say which image stands at which message.

    A mark in an answer is a part of that answer, such as a page that shows it.
    """
    asked = [at for at, (role, _) in enumerate(turns) if role == "user"]
    marks = {at: turns[at][1].count(IMAGE_MARK) for at in asked}
    num_marks = sum(marks.values())
    if len(paths) > MAX_IMAGES:
        raise _Refused("image_count", f"{len(paths)} images, at most {MAX_IMAGES}")
    if paths and not num_marks:
        repairs["image_not_marked"] += 1
        marks[asked[0]] = len(paths)
    elif num_marks != len(paths):
        raise _Refused("image_count", f"{num_marks} marks for {len(paths)} images")
    placed: list[StoredImage] = []
    for at in asked:
        if marks[at]:
            # As LLaVA's preprocess_multimodal: images first, the rest without outer white space.
            turns[at][1] = turns[at][1].replace(IMAGE_MARK, "").strip()
            start = len(placed)
            placed += [StoredImage(at, path) for path in paths[start : start + marks[at]]]
    return placed


def _check_turns(turns: list[list[Any]], with_images: set[int]) -> None:
    for at, (role, text) in enumerate(turns):
        if text.strip():
            continue
        if role == "assistant":
            raise _Refused("empty_answer", f"turn {at + 1}")
        if role == "user" and at not in with_images:
            raise _Refused("empty_question", f"turn {at + 1}")


class _Look(msgspec.Struct, frozen=True):
    """What was found at an image's path; `problem` is a reason and a detail."""

    path: str
    format: str = ""
    width: int = 0
    height: int = 0
    problem: tuple[str, str] | None = None


def _checked(
    image: StoredImage,
    folder: str,
    check: ImageCheck,
    repairs: Counter[str],
    formats: Counter[str] | None,
) -> StoredImage:
    look = _look(folder, image.path, check)
    if look.problem is not None:
        raise _Refused(*look.problem)
    suffix = os.path.splitext(look.path)[1].lower()
    if look.path != image.path:
        repairs["image_renamed"] += 1
    elif suffix not in _SUFFIXES.get(look.format, ()):
        repairs["image_format"] += 1
    if formats is not None:
        formats[f"{look.format} in {suffix or 'no suffix'}"] += 1
    return StoredImage(image.message, look.path, look.width, look.height)


@functools.lru_cache(maxsize=16384)
def _look(folder: str, path: str, check: ImageCheck) -> _Look:
    """Many records of one page or photo stand near each other, so the last looks are kept."""
    found = _existing(folder, path)
    if found is None:
        return _Look(path, problem=("image_missing", path))
    full = os.path.join(folder, found)
    try:
        data = read_reference(full)
        header = read_header(data, found)
        size = open_image(data).size if check == "full" else (header.width, header.height)
    except ImageError as error:
        return _Look(path, problem=("image_broken", f"{path}: {error.message}"))
    return _Look(found, header.format, *size)


@functools.lru_cache(maxsize=128)
def _fitted(folder: str, path: str, spec: ImageSpec) -> bytes:
    picture = prepare(open_image(read_reference(os.path.join(folder, path))), spec)
    buffer = io.BytesIO()
    # Fast to write and to read; the pictures are small.
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _existing(folder: str, path: str) -> str | None:
    """`path`, or the same name under another suffix: OCR-VQA's pictures keep their own."""
    stem = os.path.splitext(path)[0]
    for name in (path, *(stem + suffix for suffix in _OTHER_SUFFIXES)):
        try:
            status = os.stat(os.path.join(folder, name))
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            return name
    return None
