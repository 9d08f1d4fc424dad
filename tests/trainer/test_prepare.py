"""Preparing whole data sets: layouts, drops, mixing, going on after any end, the report."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.data import (
    job,
    page,
    record,
    tokens,
    write_image,
    write_json,
    write_web2code,
)
from trainer.dataset import open_dataset
from trainer.preparation import prepare
from trainer.prepare import command
from trainer.sources import find_source
from w2c_tui.console import run
from w2c_tui.core.errors import ConfigError


def prepared(out, *sources, **fields):
    report = prepare(job(*sources, **fields), out, progress=False)
    return open_dataset(out), report


def ids(dataset):
    return [dataset.record(at).id for at in range(len(dataset))]


# --- Layouts --------------------------------------------------------------------------------------


def test_web2code_is_read_as_published(tmp_path):
    dataset, report = prepared(tmp_path / "out", ("web2code", write_web2code(tmp_path / "w2c")))
    assert len(dataset) == 12
    sample = dataset.record(3)
    assert (sample.id, sample.source) == ("0003", "web2code")
    assert [(m.role, m.text) for m in sample.messages] == [
        ("user", "Make this page."),
        ("assistant", page(3)),
    ]
    (image,) = sample.images
    assert Path(image.source) == tmp_path / "w2c/Web2Code_image/pix2code/3.png"
    assert (image.width, image.height) == (23, 10)
    assert report.sources[0].missing_files == ["GPT4_QA.json", "WebSRC_QA.json"]
    assert report.sources[0].formats == {"PNG in .png": 12}


def test_llava_pretrain_is_found_beside_its_images(tmp_path):
    folder = tmp_path / "LLaVA-Pretrain"
    write_image(folder / "images/00001/1.jpg")
    records = [record("1", "Describe.\n<image>", "a shop", image="00001/1.jpg")]
    write_json(folder / "blip_laion_cc_sbu_558k.json", records)
    dataset, _ = prepared(tmp_path / "out", ("llava-pretrain", folder))
    assert Path(dataset.record(0).images[0].source) == folder / "images/00001/1.jpg"


def test_mix665k_keeps_text_only_records_and_says_where_missing_images_come_from(tmp_path):
    folder = tmp_path / "mix"
    write_image(folder / "coco/train2017/1.jpg")
    write_image(folder / "ocr_vqa/images/2.png")
    records = [
        record("1", "<image>\nQ", "A", image="coco/train2017/1.jpg"),
        record("2", "<image>\nQ", "A", image="ocr_vqa/images/2.jpg"),
        record("3", "<image>\nQ", "A", image="ocr_vqa/images/3.jpg"),
        record("4", "Hello", "Hi", model=""),
    ]
    write_json(folder / "llava_v1_5_mix665k.json", records)
    dataset, report = prepared(tmp_path / "out", ("mix665k", folder), max_drops=0.5)
    assert ids(dataset) == ["1", "2", "4"]
    assert dataset.modality.tolist() == [True, True, False]
    assert report.sources[0].repaired == {"image_renamed": 1}
    assert report.total.num_text_only == 1
    assert list(report.missing) == ["mix665k: ocr_vqa/images"]
    assert "OCR-VQA" in report.missing["mix665k: ocr_vqa/images"]["fetch"]


def test_a_source_that_is_not_there_says_where_to_fetch_it(tmp_path):
    with pytest.raises(ConfigError) as caught:
        find_source("web2code", tmp_path / "nowhere")
    assert "huggingface.co/datasets/MBZUAI/Web2Code" in caught.value.hint
    with pytest.raises(ConfigError, match=r"no llava_v1_5_mix665k\.json"):
        find_source("mix665k", tmp_path)
    with pytest.raises(ConfigError, match="no known data set"):
        find_source("mine", tmp_path)


def test_images_that_were_not_unpacked_are_noticed_at_once(tmp_path):
    write_json(tmp_path / "Web2Code.json", [record("1", "<image>\nQ", "A", image="pix2code/1.png")])
    with pytest.raises(ConfigError, match="none of its first 1 images exists") as caught:
        prepared(tmp_path / "out", ("web2code", tmp_path))
    assert "Web2Code_image.zip" in caught.value.hint
    assert "--images web2code=FOLDER" in caught.value.hint


# --- What is kept ---------------------------------------------------------------------------------


def test_every_drop_is_written_down_with_its_line(tmp_path):
    records = [record(str(at), "Q", "A") for at in range(8)]
    records[5]["conversations"][1]["value"] = " "
    path = write_json(tmp_path / "mine.json", records, indent=None)
    path.write_text(path.read_text().replace('}, {"id"', '},\n{"id"'))
    dataset, report = prepared(tmp_path / "out", ("mine", path), max_drops=0.2)
    assert ids(dataset) == ["0", "1", "2", "3", "4", "6", "7"]
    assert report.sources[0].dropped == {"empty_answer": 1}
    (line,) = (tmp_path / "out/drops.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "source": "mine",
        "file": str(path),
        "line": 6,
        "record": 6,
        "id": "5",
        "reason": "empty_answer",
        "detail": "turn 2",
    }


def test_the_same_record_twice_is_kept_once_and_a_shared_id_loses_nothing(tmp_path):
    records = [
        record("a", "Q", "A"),
        record("b", "Q", "A"),
        record("a", "Q", "A"),
        record("a", "Other", "A"),
        record("a", "Third", "A"),
    ]
    dataset, report = prepared(tmp_path / "out", ("mine", write_json(tmp_path / "m.json", records)))
    assert ids(dataset) == ["a", "b", "a#2", "a#3"]
    assert report.sources[0].dropped == {"duplicate": 1}
    assert report.sources[0].repaired == {"id_shared": 2}


def test_ids_of_different_sources_do_not_meet(tmp_path):
    one = write_json(tmp_path / "one.json", [record("a", "Q", "A")])
    two = write_json(tmp_path / "two.json", [record("a", "Q", "A")])
    dataset, _ = prepared(tmp_path / "out", ("one", one), ("two", two))
    assert [(dataset.record(at).source, dataset.record(at).id) for at in range(2)] == [
        ("one", "a"),
        ("two", "a"),
    ]


def test_sources_are_mixed_by_weight_and_limit(tmp_path):
    one = write_json(tmp_path / "one.json", [record(str(at), "Q", "A") for at in range(100)])
    two = write_json(tmp_path / "two.json", [record(str(at), "Q", "B") for at in range(50)])
    dataset, _ = prepared(
        tmp_path / "out",
        ("one", one),
        ("two", two),
        weights={"one": 0.25, "two": 2.5},
        limits={"two": 10},
    )
    counts = np.bincount(dataset.source_index)
    assert counts.tolist() == [25, 25]
    of_two = [dataset.record(at).id for at in range(25, 50)]
    assert sorted(set(of_two), key=int) == [str(at) for at in range(10)]
    again, _ = prepared(tmp_path / "again", ("one", one), weights={"one": 0.25}, seed=1)
    assert ids(again) != [dataset.record(at).id for at in range(25)]


def test_too_many_drops_are_an_error_that_names_the_reason(tmp_path):
    records = [record(str(at), "Q", "A" if at % 2 else "") for at in range(20)]
    with pytest.raises(ConfigError, match=r"10 of 20 records .* empty_answer") as caught:
        prepared(tmp_path / "out", ("mine", write_json(tmp_path / "m.json", records)))
    assert "drops.jsonl" in caught.value.hint
    dataset, _ = prepared(tmp_path / "out", ("mine", tmp_path / "m.json"), max_drops=0.5)
    assert len(dataset) == 10


def test_broken_json_is_named_with_its_line_and_what_came_before_is_kept(tmp_path):
    lines = [json.dumps(record(str(at), "Q", "A")) for at in range(700)]
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join([*lines, '{"id": "x", "value": "y', *lines]))
    with pytest.raises(ConfigError, match="broken JSON at line 701 "):
        prepared(tmp_path / "out", ("mine", path))
    journal = json.loads((tmp_path / "out/unfinished/journal.json").read_text())
    assert journal["num_rows"] == 700


# --- The same whatever happens --------------------------------------------------------------------


def content(folder):
    """Every file of a dataset."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".html"}


def many(path, count=3000):
    return write_json(path, [record(str(at), "Q", page(at) * 3) for at in range(count)], indent=1)


def test_worker_processes_change_nothing(tmp_path):
    folder = write_web2code(tmp_path / "w2c", 40)
    one, _ = prepared(tmp_path / "one", ("web2code", folder), workers=1)
    two, _ = prepared(tmp_path / "two", ("web2code", folder), workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert one.fingerprint == two.fingerprint


_KILLED = """
import sys
from pathlib import Path
from tests.trainer.data import job
from trainer import preparation
preparation.JOURNAL_EVERY_S = 0
preparation.prepare(job(("mine", Path(sys.argv[1]))), Path(sys.argv[2]), progress=False)
"""


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(tmp_path):
    path = many(tmp_path / "m.json")
    _, whole = prepared(tmp_path / "whole", ("mine", path))
    out = tmp_path / "out"
    journal = out / "unfinished/journal.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED, str(path), str(out)], env=environment
    ) as process:
        deadline = time.monotonic() + 120
        while not (journal.is_file() and json.loads(journal.read_text())["num_rows"] > 0):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = json.loads(journal.read_text())["num_rows"]
    assert 0 < done < 3000
    with pytest.raises(ConfigError, match="unfinished"):
        open_dataset(out)
    _, report = prepared(out, ("mine", path))
    assert content(out) == content(tmp_path / "whole")
    assert report == whole


def test_a_full_disk_is_an_error_and_the_run_goes_on_afterwards(tmp_path):
    path = many(tmp_path / "m.json")
    prepared(tmp_path / "whole", ("mine", path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(ConfigError, match="File too large") as caught:
            prepared(tmp_path / "out", ("mine", path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "goes on where it stopped" in caught.value.hint
    prepared(tmp_path / "out", ("mine", path))
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_an_unfinished_run_of_other_data_is_not_gone_on_with(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(record("1", "Q", "A")) + '\n{"a": "')
    with pytest.raises(ConfigError, match="broken JSON"):
        prepared(tmp_path / "out", ("mine", path))
    path.write_text(json.dumps(record("1", "Q", "A")))
    with pytest.raises(ConfigError, match="other sources or settings"):
        prepared(tmp_path / "out", ("mine", path))
    report = prepare(job(("mine", path)), tmp_path / "out", overwrite=True, progress=False)
    assert report.total.num_rows == 1


def test_a_finished_dataset_and_a_foreign_folder_are_left_alone(tmp_path):
    path = write_json(tmp_path / "m.json", [record("1", "Q", "A")])
    prepared(tmp_path / "out", ("mine", path))
    with pytest.raises(ConfigError, match="finished dataset"):
        prepared(tmp_path / "out", ("mine", path))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/1.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty"):
        prepared(tmp_path / "photos", ("mine", path))


def test_the_fingerprint_follows_the_content(tmp_path):
    records = [record(str(at), "Q", "A") for at in range(3)]
    path = write_json(tmp_path / "m.json", records)
    first, _ = prepared(tmp_path / "1", ("mine", path))
    same, _ = prepared(tmp_path / "2", ("mine", path), tokens=tokens(max_length=64, bos=True))
    records[2]["conversations"][1]["value"] = "B"
    other, _ = prepared(tmp_path / "3", ("mine", write_json(tmp_path / "n.json", records)))
    assert first.fingerprint == same.fingerprint != other.fingerprint


# --- The report -----------------------------------------------------------------------------------


def test_the_report_counts_lengths_and_what_is_cut_off(tmp_path):
    records = [record("short", "Q", "A"), record("long", "Q", "word " * 500)]
    records.append(record("all question", "word " * 500, "A"))
    dataset, report = prepared(tmp_path / "out", ("mine", write_json(tmp_path / "m.json", records)))
    total = report.total
    assert total.num_tokens == dataset.lengths.sum()
    assert total.num_truncated == 2
    assert total.num_masked_out == 1
    assert total.num_lost_tokens == total.num_tokens - total.num_kept_tokens
    assert total.longest == dataset.lengths.max()
    assert sum(total.bins) == 3
    assert json.loads((tmp_path / "out/report.json").read_text())["fingerprint"] == (
        dataset.fingerprint
    )


def test_the_page_needs_no_network_and_names_everything(tmp_path):
    records = [record("<b>", "Q", "A"), record("2", "Q", "")]
    prepared(
        tmp_path / "out",
        ("<script>", write_json(tmp_path / "m.json", records)),
        max_drops=0.5,
    )
    text = (tmp_path / "out/report.html").read_text()
    assert "an answer is empty" in text
    assert "&lt;script&gt;" in text
    assert "<script" not in text
    assert "src=" not in text
    assert "href=" not in text


# --- The command line -----------------------------------------------------------------------------


def test_the_command_prepares_for_a_recipe(tmp_path, capsys):
    folder = write_web2code(tmp_path / "w2c", 4)
    out = tmp_path / "out"
    arguments = [str(out), "--recipe", "debug", "--stage", "finetune", "--workers", "1"]
    assert run(command, [*arguments, "--source", f"web2code={folder}"]) == 0
    printed = capsys.readouterr().out
    assert "web2code: 4 records, 4 kept, 4 rows" in printed
    assert "Raise --max-length" not in printed
    assert open_dataset(out).measured.template == "v1"
    arguments[0] = str(tmp_path / "short")
    arguments += ["--max-length", "24", "--source", f"web2code={folder}"]
    assert run(command, arguments) == 0
    printed = capsys.readouterr().out
    assert ", 4 masked out" in printed
    assert "Raise --max-length" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source", "web2code"], "--source cannot be 'web2code'"),
        (["--source", "web2code={w2c}", "--weight", "web2code=0"], "--weight cannot be"),
        (["--source", "web2code={w2c}", "--limit", "web2code=few"], "--limit cannot be"),
        (["--source", "web2code={w2c}", "--weight", "other=1"], "there is no source 'other'"),
        (["--source", "web2code={w2c}", "--source", "web2code={w2c}"], "Two sources are called"),
    ],
)
def test_flags_that_cannot_be_meant_are_named(flags, message, tmp_path, capsys):
    folder = write_web2code(tmp_path / "w2c", 1)
    flags = [flag.format(w2c=folder) for flag in flags]
    arguments = [str(tmp_path / "out"), "--recipe", "debug", "--stage", "finetune"]
    assert run(command, [*arguments, *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
