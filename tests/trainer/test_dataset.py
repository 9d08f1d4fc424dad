"""Reading a prepared dataset: what was written comes back, damage and moves are named."""

from __future__ import annotations

import json
import pickle
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tiny import byte_level_tokenizer
from tests.trainer.data import job, record, tokens, write_json, write_web2code
from trainer.dataset import open_dataset, read_image, tokenizer_hash
from trainer.preparation import prepare
from trainer.samples import IGNORE_INDEX, encode
from w2c_tui.core.errors import ConfigError, ImageError
from w2c_tui.core.image import ImageSpec
from w2c_tui.models.tokenize import PromptTokenizer


@pytest.fixture
def dataset(tmp_path):
    prepare(
        job(("web2code", write_web2code(tmp_path / "w2c", 6))), tmp_path / "out", progress=False
    )
    return open_dataset(tmp_path / "out")


spoken = st.text(max_size=30).filter(lambda text: text.strip() and "<image>" not in text)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    questions=st.lists(st.lists(spoken, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)
)
def test_conversations_and_their_lengths_come_back_exactly(questions, tmp_path):
    values = [[text for each in turns for text in (each, f"<s>{each}</s>")] for turns in questions]
    path = write_json(tmp_path / "m.json", [record(str(n), *v) for n, v in enumerate(values)])
    given_tokens = tokens(max_length=32)
    report = prepare(
        job(("mine", path), tokens=given_tokens), tmp_path / "out", overwrite=True, progress=False
    )
    num_kept = 0
    dataset = open_dataset(tmp_path / "out")
    assert len(dataset) == len(values)
    for at, texts in enumerate(values):
        sample = dataset.record(at)
        assert sample.id == str(at)
        assert [message.text for message in sample.messages] == texts
        encoded = encode(
            sample.messages,
            given_tokens.template,
            given_tokens.tokenizer,
            image_token_id=0,
            tokens_per_image=16,
        )
        assert dataset.lengths[at] == len(encoded.input_ids)
        assert dataset.num_supervised[at] == (encoded.labels != IGNORE_INDEX).sum()
        num_kept += (encoded.labels[:32] != IGNORE_INDEX).sum()
    assert report.total.num_supervised == num_kept


def test_lengths_count_image_tokens_expanded(dataset, tmp_path):
    path = write_json(tmp_path / "m.json", [record("0", "Make this page.", "<p>hi</p>")])
    prepare(job(("mine", path)), tmp_path / "text", progress=False)
    path = write_json(
        tmp_path / "i.json",
        [record("0", "<image>\nMake this page.", "<p>hi</p>", image="pix2code/0.png")],
    )
    images = tmp_path / "w2c/Web2Code_image"
    shutil.copytree(images / "pix2code", tmp_path / "pix2code")
    prepare(job(("mine", path)), tmp_path / "image", progress=False)
    text, image = open_dataset(tmp_path / "text"), open_dataset(tmp_path / "image")
    # v1 puts a line end after the image, and LLaVA tokenises what follows an image by itself.
    assert 16 <= image.lengths[0] - text.lengths[0] <= 19
    assert image.num_supervised[0] == text.num_supervised[0]


def test_numbers_are_mapped_not_loaded(dataset):
    for column in (dataset.lengths, dataset.num_images, dataset.source_index):
        assert isinstance(column, np.memmap)
    assert dataset.lengths.dtype == np.int32
    assert dataset.modality.all()


def test_a_dataset_travels_to_worker_processes_as_its_path(dataset):
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    copy = pickle.loads(data)
    assert copy.record(2) == dataset.record(2)
    assert copy.fingerprint == dataset.fingerprint


def test_images_are_opened_when_they_are_needed(dataset):
    image = dataset.record(1).images[0]
    assert image.data == b""
    assert read_image(image).size == (image.width, image.height) == (21, 10)


def test_an_image_that_vanished_is_named(dataset, tmp_path):
    (tmp_path / "w2c/Web2Code_image/pix2code/1.png").unlink()
    with pytest.raises(ImageError, match=r"pix2code/1\.png"):
        read_image(dataset.record(1).images[0])


@pytest.mark.parametrize("aspect", ["pad", "crop", "stretch"])
def test_stored_images_are_what_the_files_would_give(aspect, tmp_path):
    spec = ImageSpec(size=56, aspect=aspect, shortest_edge=64 if aspect == "crop" else None)
    folder = tmp_path / "images"
    folder.mkdir()
    for at in range(3):
        Image.effect_noise((90, 130 + at), 90).save(folder / f"{at}.png")
    records = [
        record("one", "<image>\nQ", "A", image="0.png"),
        record("none", "Q", "A"),
        record("two", "<image>\n<image>\nQ", "A", image=["1.png", "2.png"]),
    ]
    path = write_json(folder / "m.json", records)
    prepare(job(("mine", path), weights={"mine": 2}), tmp_path / "files", progress=False)
    prepare(
        job(("mine", path), weights={"mine": 2}, pixels=spec), tmp_path / "stored", progress=False
    )
    files, stored = open_dataset(tmp_path / "files"), open_dataset(tmp_path / "stored")
    assert not (tmp_path / "files/pixels.bin").exists()
    expected = [[each.tobytes() for each in files.pictures(at, spec)] for at in range(6)]
    other = ImageSpec(size=28, aspect=aspect)
    assert [each.size for each in stored.pictures(2, other)] == [(28, 28)] * 2
    for at in range(3):
        (folder / f"{at}.png").unlink()
    found = [[each.tobytes() for each in stored.pictures(at, spec)] for at in range(6)]
    assert found == expected
    assert [len(row) for row in found] == [1, 0, 2] * 2


def test_an_image_that_was_cut_off_is_found_when_images_are_stored(tmp_path):
    Image.effect_noise((300, 300), 90).save(tmp_path / "1.png")
    data = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[: len(data) // 2])
    records = [record("1", "<image>\nQ", "A", image="1.png"), record("2", "Q", "A")]
    path = write_json(tmp_path / "m.json", records)
    report = prepare(
        job(("mine", path), pixels=ImageSpec(), max_drops=1), tmp_path / "out", progress=False
    )
    assert report.sources[0].dropped == {"image_broken": 1}
    assert "1.png" in (tmp_path / "out/drops.jsonl").read_text()


def test_data_that_moved_is_found_through_its_new_folder(dataset, tmp_path):
    (tmp_path / "w2c").rename(tmp_path / "elsewhere")
    roots = {"web2code": tmp_path / "elsewhere/Web2Code_image"}
    moved = open_dataset(tmp_path / "out", roots)
    assert read_image(moved.record(0).images[0]).size == (20, 10)
    assert pickle.loads(pickle.dumps(moved)).record(0) == moved.record(0)
    with pytest.raises(ConfigError, match="has no source 'other'"):
        open_dataset(tmp_path / "out", {"other": tmp_path})


def test_rows_outside_are_index_errors(dataset):
    for index in (-1, 6):
        with pytest.raises(IndexError):
            dataset.record(index)
    assert len(list(range(len(dataset)))) == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: shutil.rmtree(out), "holds no dataset"),
        (lambda out: (out / "dataset.json").unlink(), "holds an unfinished dataset"),
        (lambda out: (out / "dataset.json").write_text("{"), "is damaged"),
        (lambda out: (out / "dataset.json").write_text('{"format_version": 99}'), "format 99"),
        (lambda out: (out / "lengths.npy").unlink(), r"lengths\.npy cannot be read"),
        (lambda out: (out / "lengths.npy").write_bytes(b"xx"), r"lengths\.npy cannot be read"),
        (lambda out: np.save(out / "lengths.npy", np.zeros(2, np.int32)), r"lengths\.npy has"),
        (lambda out: (out / "records.bin").write_bytes(b"x"), r"records\.bin has 1 of"),
    ],
)
def test_a_damaged_dataset_is_named_when_it_is_opened(spoil, message, dataset, tmp_path):
    spoil(tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        open_dataset(tmp_path / "out")


def test_a_damaged_record_is_named_by_its_row(dataset, tmp_path):
    data = bytearray((tmp_path / "out/records.bin").read_bytes())
    start = int(np.load(tmp_path / "out/starts.npy")[3])
    data[start] = 0xC1
    (tmp_path / "out/records.bin").write_bytes(data)
    again = open_dataset(tmp_path / "out")
    again.record(2)
    with pytest.raises(ConfigError, match="row 3 cannot be read"):
        again.record(3)


def test_lengths_belong_to_one_tokenizer_template_and_image_size(dataset):
    measured = dataset.measured
    dataset.check_measured(tokenizer_hash(tokens().tokenizer), "v1", 16)
    other = tokenizer_hash(PromptTokenizer(byte_level_tokenizer()))
    for given_values, what in (
        ((other, "v1", 16), "the tokenizer"),
        ((measured.tokenizer, "plain", 16), "the template"),
        ((measured.tokenizer, "v1", 576), "tokens per image"),
    ):
        with pytest.raises(ConfigError, match=what):
            dataset.check_measured(*given_values)


def test_the_hash_of_a_tokenizer_ignores_added_image_tokens():
    plain, extended = byte_level_tokenizer(), byte_level_tokenizer()
    extended.add_tokens(["<image_patch>"], special_tokens=True)
    assert tokenizer_hash(PromptTokenizer(plain)) == tokenizer_hash(PromptTokenizer(extended))
    assert json.dumps(tokenizer_hash(tokens(bos=True).tokenizer)) != json.dumps(
        tokenizer_hash(tokens(bos=False).tokenizer)
    )
