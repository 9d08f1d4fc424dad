"""Model folders from strangers: no code of theirs runs and no file outside of them is read.

Loading goes through the commands and the real engine process; what the readers do with each damaged
file is tested in tests/models/test_checkpoint.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from tests.models import tiny
from tests.security.terminal import piped
from w2c_tui.core.errors import CheckpointError, UnsafeCheckpointError
from w2c_tui.models.checkpoint import load_model
from w2c_tui.models.weights import read_bin, stored_tensors


class Runs:
    """A pickle that runs a command when it is opened in full."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return os.system, (f"touch '{self.ran}'",)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that is there if code ran."""
    return tmp_path / "code ran"


def test_the_trap_works(tmp_path: Path, ran: Path) -> None:
    """What the other tests here would see if the loader were another one."""
    torch.save({"a": Runs(ran)}, tmp_path / "trap.bin")
    torch.load(tmp_path / "trap.bin", weights_only=False)
    assert ran.exists()


def write_trap(path: Path, ran: Path, form: str) -> None:
    content = {"a": torch.ones(2), "b": Runs(ran)}
    if form == "zip":
        torch.save(content, path)
    elif form == "legacy":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif form == "second pickle":
        # A harmless zip to those that look for `data.pkl` by its end, with another one inside.
        torch.save({"a": torch.ones(2)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(f"{path.stem}/other/data.pkl", pickle.dumps(Runs(ran)))
    else:
        path.write_bytes(pickle.dumps(Runs(ran)))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_a_pickle_with_code_is_refused_in_every_form(tmp_path: Path, ran: Path, form: str) -> None:
    path = tmp_path / "pytorch_model.bin"
    write_trap(path, ran, form)
    with pytest.raises(UnsafeCheckpointError, match=r"pytorch_model\.bin"):
        read_bin(path)
    assert not ran.exists()


def test_pickles_that_no_tensor_is_in_are_not_opened(tmp_path: Path, ran: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    write_trap(path, ran, "second pickle")
    assert torch.equal(read_bin(path)["a"][...], torch.ones(2))
    assert not ran.exists()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "mm_projector.bin", "pytorch_model-00002-of-00002.bin"]
)
def test_a_model_with_a_trap_ends_the_command_with_words(
    own_folders: Path, tiny_llama: Path, ran: Path, name: str
) -> None:
    folder = own_folders / "model"
    if name == "mm_projector.bin":
        config, tensors = tiny.published_llava_crystal()
        folder.mkdir()
        kept = {key: tensor for key, tensor in tensors.items() if "mm_projector" not in key}
        tiny.write_safetensors(folder, kept)
        tiny.write_json(folder / "config.json", config)
        tiny.write_tokenizer(folder, bos=False)
    else:
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    if "-of-" in name:
        first = name.replace("00002-of", "00001-of")
        torch.save({"a": torch.ones(1)}, folder / first)
        index = {"weight_map": {"a": first, "b": name}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    write_trap(folder / name, ran, "zip")
    out = own_folders / "out"
    commands = [("chat", "--model", folder)]
    if name == "pytorch_model.bin":
        commands.append(("models", "convert", folder, "--out", out))
        commands.append(("export-gguf", folder, "--out", out))
    for arguments in commands:
        output, status = piped(*arguments, stdin="Hello\n")
        assert status == 1, output
        assert name in output
        assert "holds more than tensors" in output
        assert "Traceback" not in output
        assert not ran.exists()


def test_pickles_beside_the_weights_are_never_opened(
    own_folders: Path, tiny_llama: Path, ran: Path
) -> None:
    folder = own_folders / "model"
    shutil.copytree(tiny_llama, folder)
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "scheduler.pt"):
        write_trap(folder / name, ran, "zip")
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(Runs(ran)))
    flags = ["--model", folder, "--dtype", "float32", "--temperature", "0", "--no-ocr"]
    output, status = piped("chat", *flags, "--max-new-tokens", "4", stdin="Hello\n")
    assert status == 0, output
    assert not ran.exists()


@pytest.mark.parametrize("outside", ["../secret.safetensors", "ABSOLUTE", "a/../../secret.x"])
def test_an_index_names_no_file_outside_of_its_folder(tmp_path: Path, outside: str) -> None:
    secret = tmp_path / "secret.safetensors"
    tiny.write_safetensors(tmp_path / "elsewhere", {"a": torch.ones(1)})
    shutil.move(tmp_path / "elsewhere" / "model.safetensors", secret)
    shutil.copy(secret, tmp_path / "secret.x")
    folder = tmp_path / "model"
    (folder / "a").mkdir(parents=True)
    name = str(secret) if outside == "ABSOLUTE" else outside
    index = {"weight_map": {"a": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        stored_tensors(folder)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__globals__ }}",
        "{% for m in messages %}{{ m.update({'content': 'changed'}) }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}",
    ],
)
def test_a_chat_template_reaches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    from w2c_tui.core.errors import PromptError
    from w2c_tui.core.prompt import ChatTemplate, render

    monkeypatch.chdir(tmp_path)
    messages = [message := tiny_question()]
    with pytest.raises(PromptError):
        render(messages, ChatTemplate(attack, image_token="<image>"))
    assert message.text == "What is it?"
    assert not list(tmp_path.iterdir())


def tiny_question():
    from w2c_tui.core.conversation import Message

    return Message("user", "What is it?")


def test_the_code_in_a_model_folder_is_not_imported(own_folders: Path, tiny_llama: Path, ran: Path):
    folder = own_folders / "model"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.Evil",
    }
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("configuration_evil", "modeling_evil", "torch", "transformers", "sitecustomize"):
        (folder / f"{name}.py").write_text(code)
    output, status = piped("chat", "--model", folder, stdin="y\nHello\n")
    assert status == 1, output
    assert "--trust-remote-code" in output
    assert not ran.exists()
    # Files that bear the names of modules are not found before the real ones, either.
    with pytest.raises(UnsafeCheckpointError):
        load_model(folder)
    assert not ran.exists()
