"""Which backend runs what, and what a machine without llama-cpp-python says."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from w2c_tui.backends.choice import choose_backend
from w2c_tui.core.config import LoadSpec
from w2c_tui.core.errors import ConfigError


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        ("gguf", {"name": "smollm2-135m"}),
        ("gguf", {"name": "somewhere/model.gguf"}),
        ("gguf", {"name": "owner/repo:Q4_K_M"}),
        ("hf", {"name": "owner/repo"}),
        ("hf", {"name": "llava-1.5-7b"}),
        ("gguf", {"name": "owner/repo", "backend": "gguf"}),
        ("hf", {"name": "model.gguf", "backend": "hf"}),
        ("hf", {"name": "model.gguf", "quantization": "4bit"}),
        ("hf", {"name": "model.gguf", "dtype": "bfloat16"}),
        ("gguf", {"name": "model.gguf", "cache_type": "q8_0"}),
    ],
)
def test_gguf_files_run_in_llama_cpp_unless_only_transformers_can(expected, changes):
    assert choose_backend(LoadSpec(**changes)) == expected


def test_a_server_answers_where_one_is_named():
    assert choose_backend(LoadSpec(name="model.gguf", base_url="http://h")) == "openai"
    assert choose_backend(LoadSpec(backend="openai", base_url="http://h")) == "openai"


def test_a_folder_with_a_gguf_file_and_no_checkpoint_is_a_gguf_model(tmp_path):
    (tmp_path / "model.gguf").touch()
    assert choose_backend(LoadSpec(name=str(tmp_path))) == "gguf"
    (tmp_path / "config.json").touch()
    assert choose_backend(LoadSpec(name=str(tmp_path))) == "hf"


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--load-4bit", {"backend": "gguf", "quantization": "4bit"}),
        ("--device-map", {"backend": "gguf", "device_map": "cuda:0"}),
        ("--mmproj", {"backend": "hf", "mmproj": "mmproj.gguf"}),
        ("--n-gpu-layers", {"backend": "hf", "n_gpu_layers": 3}),
        ("--load-4bit", {"base_url": "http://h", "quantization": "4bit"}),
        ("--n-gpu-layers", {"backend": "openai", "n_gpu_layers": 3}),
        ("--base-url", {"backend": "gguf", "base_url": "http://h"}),
        ("--base-url", {"backend": "hf", "base_url": "http://h"}),
    ],
)
def test_a_setting_that_the_named_backend_lacks_is_an_error(flag, changes):
    with pytest.raises(ConfigError, match=flag) as caught:
        choose_backend(LoadSpec(name="model.gguf", **changes))
    assert caught.value.hint


def test_without_llama_cpp_python_files_run_in_transformers_or_say_what_to_install():
    program = """
        import sys
        sys.modules["llama_cpp"] = None
        from w2c_tui.backends.choice import choose_backend
        from w2c_tui.core.config import LoadSpec
        from w2c_tui.core.errors import MissingPackageError
        assert choose_backend(LoadSpec(name="model.gguf")) == "hf"
        assert choose_backend(LoadSpec(name="model.gguf", mmproj="m.gguf")) == "gguf"
        try:
            import w2c_tui.backends.gguf
        except MissingPackageError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install llama-cpp-python==0.3.36" in done.stdout


def test_the_release_that_is_asked_for_is_the_one_that_is_installed_with_the_project():
    import tomllib
    from pathlib import Path

    from w2c_tui.backends.llama_library import VERSION

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert f"llama-cpp-python=={VERSION}" in project["project"]["optional-dependencies"]["gguf"]


def test_the_gguf_backend_loads_neither_torch_nor_transformers():
    program = (
        "import sys, w2c_tui.backends.gguf; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"
