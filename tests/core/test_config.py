"""Settings: which source wins, and what is said about one that cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from w2c_tui.core.config import GenerationParams, Settings, checked, load_settings, paths
from w2c_tui.core.errors import ConfigError


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(config: Path) -> None:
    config.write_text(
        'system = "file"\n[generation]\ntemperature = 0.1\ntop_p = 0.5\ntop_k = 7\n'
        '[model]\nname = "a"\n'
    )
    settings = load_settings(
        {"generation.temperature": 0.3, "ocr": "off"},
        config,
        {"W2C_GENERATION_TEMPERATURE": "0.2", "W2C_GENERATION_TOP_P": "0.6", "W2C_OCR": "on"},
    )
    params = settings.generation
    assert (params.temperature, params.top_p, params.top_k) == (0.3, 0.6, 7)
    assert params.max_new_tokens == GenerationParams().max_new_tokens
    assert (settings.model.name, settings.system, settings.ocr) == ("a", "file", "off")


def test_nothing_set_is_the_defaults(config: Path) -> None:
    assert load_settings(config_file=config, environ={"PATH": "/bin", "W2C": "x"}) == Settings()


def test_lists_and_tables_of_the_environment_are_written_as_in_toml(config: Path) -> None:
    environ = {
        "W2C_GENERATION_STOP": '["</html>", "[end]"]',
        "W2C_MODEL_MAX_MEMORY": '{0 = "6GiB", cpu = "20GiB"}',
        "W2C_MODEL_NAME": "[not toml",
    }
    settings = load_settings(config_file=config, environ=environ)
    assert list(settings.generation.stop) == ["</html>", "[end]"]
    assert dict(settings.model.max_memory) == {"0": "6GiB", "cpu": "20GiB"}
    assert settings.model.name == "[not toml"


def test_the_folders_are_not_settings_and_can_be_moved(tmp_path: Path) -> None:
    environ = {f"W2C_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "CACHE")}
    assert load_settings(environ=environ) == Settings()
    found = paths(environ)
    assert found.config_file == tmp_path / "CONFIG" / "config.toml"
    for path in (found.sessions, found.pages, found.engine_log, found.app_log):
        assert path.is_relative_to(tmp_path / "DATA")
    for path in (found.models, found.renders):
        assert path.is_relative_to(tmp_path / "CACHE")
    assert paths({}).data.is_absolute()


@pytest.mark.parametrize(
    ("text", "environ", "flags", "said", "hint"),
    [
        ("[generation]\ntemprature = 1\n", {}, {}, "config.toml", "Did you mean temperature?"),
        ("[generation]\nxyzzy = 1\n", {}, {}, "config.toml", "Known settings: model"),
        ("[generation]\ntemperature = -1\n", {}, {}, "temperature", "--help"),
        ("[generation\n", {}, {}, "cannot be read", "move it away"),
        (
            "",
            {"W2C_GENERATION_TEMPRATURE": "1"},
            {},
            "is not a setting",
            "_TEMPERATURE?",
        ),
        ("", {"W2C_QQQQQQQQ": "1"}, {}, "W2C_QQQQQQQQ is not a setting", "Unset it."),
        ("", {"W2C_OCR": "maybe"}, {}, "the environment", "--help"),
        ("", {}, {"generation.top_p": 7}, "the command line", "--help"),
    ],
)
def test_a_wrong_setting_is_named_with_its_source(
    config: Path, text: str, environ: dict[str, str], flags: dict[str, object], said: str, hint: str
) -> None:
    config.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(flags, config, environ)
    assert said in caught.value.message
    assert hint in caught.value.hint


def test_a_file_that_is_no_text_is_named(config: Path) -> None:
    config.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read"):
        load_settings(config_file=config, environ={})


def test_values_made_in_code_are_checked_like_those_of_files() -> None:
    assert checked(GenerationParams(top_k=3)).top_k == 3
    with pytest.raises(ConfigError, match="the request"):
        checked(GenerationParams(temperature=-1))
