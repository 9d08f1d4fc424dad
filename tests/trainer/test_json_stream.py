"""Huge JSON files record by record: the same values as json.loads, from anywhere, in order."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainer import json_stream
from trainer.json_stream import Position, read_records
from w2c_tui.core.errors import ConfigError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
quiet = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quiet
@given(
    content=st.lists(values, max_size=6),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_every_array_is_read_as_json_reads_it(
    content, indent, ascii_only, chunk, tmp_path, monkeypatch
):
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    path = tmp_path / "array.json"
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    found = [json.loads(raw.data) for raw in read_records(path)]
    assert found == json.loads(text)


@quiet
@given(content=st.lists(st.dictionaries(st.text(), values), min_size=1, max_size=6), at=st.data())
def test_reading_goes_on_from_after_any_record(content, at, tmp_path):
    path = tmp_path / "array.json"
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    whole = list(read_records(path))
    stop = at.draw(st.integers(0, len(whole) - 1))
    rest = list(read_records(path, whole[stop].after))
    assert rest == whole[stop + 1 :]


@quiet
@given(content=st.lists(st.dictionaries(st.text(), values), min_size=1, max_size=6))
def test_json_lines_are_records_too(content, tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text("\n".join(map(json.dumps, content)) + "\n\n", encoding="utf-8")
    found = list(read_records(path))
    assert [json.loads(raw.data) for raw in found] == content
    assert [raw.line for raw in found] == list(range(1, len(content) + 1))


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[\n{"a": 1},\n{"a": "b\nc"}\n]', 3, "not closed"),
        ('[\n{"a": 1},\n{"a": [1}\n]', 3, "closes nothing"),
        ('[\n{"a": 1}\n{"a": 2}\n]', 3, "comma is missing"),
        ('[\n{"a": 1},\n{"a": {"b": 2}', 3, "ends inside the record"),
        ('[\n{"a": 1},\n{"a": "b', 3, "ends inside the text"),
        ('[\n{"a": 1},', 2, "ends inside the list"),
        ('[\n{"a": 1}\n]\n[]', 4, "after the end"),
        ("<html>\n", 1, "starts with"),
    ],
)
@pytest.mark.parametrize("chunk", [3, 4096])
def test_a_broken_file_is_named_with_its_line(text, line, problem, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk)
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=problem) as caught:
        list(read_records(path))
    assert f"{path}: broken JSON at line {line} " in caught.value.message


def test_the_records_before_a_broken_place_come(tmp_path):
    path = tmp_path / "broken.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a": "x\n', encoding="utf-8")
    records = read_records(path)
    assert [json.loads(next(records).data) for _ in range(2)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ConfigError, match="not closed"):
        next(records)


def test_an_endless_record_ends_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 100)
    path = tmp_path / "wrapped.json"
    path.write_text(json.dumps({"data": [{"a": "b" * 50}] * 100}), encoding="utf-8")
    with pytest.raises(ConfigError, match="longer than"):
        list(read_records(path))


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", 64 * 1024)
    path = tmp_path / "large.json"
    record = json.dumps({"id": "x", "value": "y" * 2000})
    path.write_text("[" + ",\n".join([record] * 5_000) + "]", encoding="utf-8")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_records(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 5_000
    assert peak < 1_000_000 < path.stat().st_size


def test_an_empty_array_has_no_records_and_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "array.json").write_text(" [ ]\n")
    assert list(read_records(tmp_path / "array.json")) == []
    (tmp_path / "nothing.json").write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        list(read_records(tmp_path / "nothing.json"))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(read_records(tmp_path / "missing.json", Position()))
