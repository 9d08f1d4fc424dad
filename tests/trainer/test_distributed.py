"""Two processes under DeepSpeed: the same numbers as one, through kills and resumes."""

from __future__ import annotations

import shutil
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.conftest import launch, losses
from trainer.loop import train
from trainer.recipes import resolve

# Samples one by one, so that the devices see images and text in every combination.
FIELDS = {"global_batch": 4, "per_device_batch": 1, "epochs": 2, "warmup_ratio": 0.1}
NUM_STEPS = 8


def flags(**fields):
    return [part for key, value in fields.items() for part in (f"--{key.replace('_', '-')}", value)]


def saved(run) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("stage", "zero_stage", "launcher"),
    [("pretrain", 2, "deepspeed"), ("finetune", 3, "torchrun")],
)
def test_two_processes_equal_one_and_a_killed_run_goes_on_to_the_bit(
    prepared, tmp_path, stage, zero_stage, launcher
):
    data = prepared("mixed", stage)
    alone = tmp_path / "alone"
    train(resolve("debug", stage, flags={"data": str(data), "out": str(alone), **FIELDS}))
    given = flags(data=data, zero_stage=zero_stage, save_every=2, **FIELDS)

    whole = tmp_path / "whole"
    launch(stage, *given, "--out", whole, processes=2, launcher=launcher)
    assert losses(whole).keys() == set(range(1, NUM_STEPS + 1))
    assert losses(whole) == pytest.approx(losses(alone), abs=1e-5)
    for name, tensor in saved(alone).items():
        torch.testing.assert_close(saved(whole)[name], tensor, rtol=0, atol=1e-4)

    killed = tmp_path / "killed"
    process = launch(stage, *given, "--out", killed, processes=2, wait=False)
    while not ((killed / "metrics.jsonl").is_file() and max(losses(killed), default=0) >= 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    # The launcher starts its processes in sessions of their own.
    for victim in psutil.Process(process.pid).children(recursive=True):
        victim.kill()
    process.kill()
    process.communicate()
    assert max(losses(killed)) < NUM_STEPS
    assert not (killed / "model").exists()
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(killed, elsewhere)
    launch(stage, *given, "--out", killed, "--resume", processes=2)
    assert losses(killed) == losses(whole)
    for name, tensor in saved(whole).items():
        assert torch.equal(saved(killed)[name], tensor)

    # The parts of two devices are put together for one.
    said = launch(stage, *given, "--out", elsewhere, "--resume", processes=1)
    assert "together for 1 devices" in said
    assert losses(elsewhere) == pytest.approx(losses(whole), abs=1e-5)
    for name, tensor in saved(whole).items():
        torch.testing.assert_close(saved(elsewhere)[name], tensor, rtol=0, atol=1e-4)
    assert not list((elsewhere / ".partial").rglob("*.pt"))
