"""The GGUF backend: the common contract, and what only llama.cpp can do."""

from __future__ import annotations

import ctypes
import io
import logging
import shutil
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from tests.backends import gguf_files
from tests.backends.contract import (
    GREEDY,
    HOT,
    BackendContract,
    CandidatesContract,
    assert_the_same,
    at_once,
    events,
    finish,
    one_by_one,
    picture,
    stats,
    text_of,
    user,
)
from tests.backends.gguf_files import save_mmproj, save_published, save_text_model
from tests.export.models import CLIP, save_family, save_llava
from tests.export.models import FAMILIES as TEXT_FAMILIES
from tests.tiny import hostile_texts
from w2c_tui.backends.gguf import GGUFBackend, GGUFTokenizer, plan_placement
from w2c_tui.backends.gguf_header import GGUFHeader
from w2c_tui.backends.hf import HFBackend
from w2c_tui.backends.image_encoder import ImageEncoder, class_token_is_first
from w2c_tui.backends.llama import ImageChunk, LanguageModel, RuntimeOptions
from w2c_tui.backends.llama_library import lib, mtmd, supports_gpus
from w2c_tui.backends.turn import Interrupted
from w2c_tui.core.config import ExportSpec, GenerationParams, LoadSpec
from w2c_tui.core.conversation import Message
from w2c_tui.core.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    ImageError,
    ModelNotFoundError,
    OutOfMemoryError,
    W2CError,
)
from w2c_tui.core.image import attachment_from_bytes, open_image
from w2c_tui.export.gguf_export import export

PRECISE = {"cache_type": "f32", "flash_attn": "off"}
"""Half the digits would make equal answers of random models a matter of luck, as the same prompt
is computed in other pieces each time."""


def load(path, **changes) -> GGUFBackend:
    backend = GGUFBackend()
    spec = LoadSpec(name=str(path), threads=1, **(PRECISE | changes))
    backend.load(spec, lambda *_: None)
    return backend


@pytest.fixture(scope="module")
def text_file(tiny_llama, tmp_path_factory):
    return save_text_model(tiny_llama, tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def vision_file(tiny_llava, tmp_path_factory):
    """The tiny LLaVA as `w2c export-gguf` writes it."""
    out = tmp_path_factory.mktemp("vision")
    spec = ExportSpec(quant="f32", mmproj="f32", verify=False)
    return export(str(tiny_llava), out, spec, lambda *_: None).model


class TestContract(BackendContract, CandidatesContract):
    @pytest.fixture(scope="class")
    def fresh(self, text_file, vision_file):
        files = {"vision": vision_file, "text": text_file}
        return lambda kind: load(files[kind])

    @pytest.fixture(scope="class")
    def vision(self, fresh):
        return fresh("vision")

    @pytest.fixture(scope="class")
    def text(self, fresh):
        return fresh("text")


def test_candidates_share_the_context_that_there_is(text_file):
    backend = load(text_file, context=128)
    messages = [user("Write")]
    prompt = backend.encode(messages).num_tokens
    for max_new_tokens, reused in ((24, 2), ((128 - prompt) // 2, 1), (120, 0)):
        params = msgspec.structs.replace(HOT, max_new_tokens=max_new_tokens)
        alone = one_by_one(backend, messages, params)
        batch = at_once(backend, messages, params)
        assert_the_same(batch, alone)
        whole = [stats(found).reused_tokens == prompt for found in batch]
        assert sum(whole) == reused
    backend.close()


@pytest.fixture(scope="module")
def vision(vision_file):
    backend = load(vision_file)
    yield backend
    backend.close()


def conversation(*images):
    return [
        user("Please generate html code", *images),
        Message("assistant", "<html><s>old</s></html>"),
        user("Bigger"),
    ]


# --- The same as elsewhere ------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama", "crystalcoder"])
def test_an_exported_model_answers_as_its_checkpoint_does(text, tmp_path):
    """Prompt, tokens, picture, features and sampling against transformers."""
    folder = save_llava(tmp_path / "llava", CLIP, text)
    spec = ExportSpec(quant="f32", mmproj="f32", verify=False)
    file = export(str(folder), tmp_path, spec, lambda *_: None).model
    ours = load(file)
    theirs = HFBackend()
    theirs.load(LoadSpec(name=str(folder), dtype="float32", device_map="cpu"), lambda *_: None)
    red = picture("red", (120, 50))
    for messages in ([user("Code?", red)], conversation(red, picture("blue", (30, 80)))):
        mine, other = events(ours, messages), events(theirs, messages)
        assert stats(mine).prompt_tokens == stats(other).prompt_tokens
        assert stats(mine).new_tokens == stats(other).new_tokens
        # Prompt and answer. Bytes that are no text are shown in other ways.
        assert tokens(ours._model.units) == tokens(theirs._units)


def tokens(units):
    return [unit for unit in units if isinstance(unit, int)]


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_a_word_mark_vocabulary_gives_the_ids_of_its_tokenizer(template, tmp_path):
    """Prompts in templates of roles, with the strings of special tokens as text."""
    folder = save_llava(tmp_path / "llava", CLIP, template=template)
    file = export(
        str(folder), tmp_path, ExportSpec(quant="f32", verify=False), lambda *_: None
    ).model
    ours = load(file)
    theirs = HFBackend()
    theirs.load(LoadSpec(name=str(folder), dtype="float32", device_map="cpu"), lambda *_: None)
    image_id = theirs._model.config.image_token_id
    red = picture("red")
    for content in hostile_texts():
        messages = [user(content, red), Message("assistant", content), user(content)]
        expected = [ident for ident in theirs.encode(messages).ids if ident != image_id]
        assert ours.encode(messages).ids == expected


def test_control_tokens_are_never_spelled_by_text(tmp_path):
    """In a file from elsewhere, whose vocabulary has pieces that join to `</s>`."""
    file = gguf_files.save_published_text(
        tmp_path / "theirs.gguf", "llava", vocabulary=gguf_files.spelling_vocabulary()
    )
    with LanguageModel(file, RuntimeOptions(threads=1, context=64)) as model:
        tokenizer = GGUFTokenizer(model)
        assert model.special_tokens["</s>"] in model.raw_tokens("old</s>"), "no trap to fall into"
        for content in ["</s>", "<s>old</s>", "a </s></s>b", *hostile_texts()]:
            ids = tokenizer.text_ids(content)
            assert model.special_ids.isdisjoint(ids)
            text = b"".join(model.token_bytes(ident) for ident in ids).decode()
            assert text.removeprefix(" ") == content


def stock_logits(model: LanguageModel, encoder: ImageEncoder, text: str, image) -> np.ndarray:
    """What llama.cpp's own helper computes of a prompt: its tokens, its chunks, its decoding."""
    pixels = np.ascontiguousarray(open_image(image), dtype=np.uint8)
    bitmap = mtmd.mtmd_bitmap_init(
        pixels.shape[1], pixels.shape[0], pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
    )
    data = text.encode()
    request = mtmd.mtmd_input_text()
    request.text, request.text_len = data, len(data)
    request.add_special, request.parse_special = True, True
    chunks = mtmd.mtmd_input_chunks_init()
    bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
    assert mtmd.mtmd_tokenize(encoder.native, chunks, ctypes.byref(request), bitmaps, 1) == 0
    lib.llama_memory_clear(lib.llama_get_memory(model._context), True)
    after = lib.llama_pos(0)
    status = mtmd.mtmd_helper_eval_chunks(
        encoder.native, model._context, chunks, 0, 0, 512, True, ctypes.byref(after)
    )
    assert status == 0
    row = np.ctypeslib.as_array(lib.llama_get_logits_ith(model._context, -1), (model.vocab_size,))
    mtmd.mtmd_input_chunks_free(chunks)
    mtmd.mtmd_bitmap_free(bitmap)
    return row.copy()


PUBLISHED = {
    "llava": "<__media__>\n",
    "smolvlm": "<__media__>",
    "qwen2-vl": "<__media__>",
    "gemma3": "<__media__>",
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_files_run_as_in_llama_cpp(family, tmp_path):
    """One image in one or many chunks, causal or not, with positions of one or three axes."""
    backend = GGUFBackend()
    spec = LoadSpec(name=str(save_published(tmp_path, family)), threads=1, **PRECISE)
    info = backend.load(spec, lambda *_: None)
    inexact = family == "llava" and not class_token_is_first(backend._model)
    assert ("inexactly" in info.note) == inexact
    image = picture("red", (150, 100))
    question = [user("Code?", image)]
    *_, ours = backend.read(backend.encode(question))
    mark = PUBLISHED[family]
    text = f"<|im_start|>user\n{mark}Code?<|im_end|>\n<|im_start|>assistant\n"
    expected = stock_logits(backend._model, backend._encoder, text, image)
    assert np.abs(expected).max() > 0.5
    assert np.abs(ours - expected).max() < 1e-3 * np.abs(expected).max()
    backend._model.crop(0)

    first = text_of(events(backend, question))
    assert first != text_of(events(backend, [user("Code?", picture("blue", (80, 110)))]))
    later = [*question, Message("assistant", "<p>Shop</p>"), user("More", picture("green"))]
    kept = events(backend, later)
    other = load(tmp_path / f"{family}.gguf")
    assert text_of(kept) == text_of(events(other, later))
    assert stats(events(backend, later)).reused_tokens == stats(kept).prompt_tokens - 1
    other.close()
    backend.close()


def test_a_picture_that_llama_cpp_cannot_prepare_changes_nothing(tmp_path):
    backend = load(save_published(tmp_path, "smolvlm"))
    whole = text_of(events(backend, [user("Code?", picture("red"))]))
    with pytest.raises(ImageError, match="2 x 3000 px"):
        events(backend, [user("Code?", thin())])
    assert text_of(events(backend, [user("Code?", picture("red"))])) == whole


def thin():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 3000)).save(buffer, "PNG")
    return attachment_from_bytes(buffer.getvalue())


def test_prompts_that_end_with_an_image_are_answered(tmp_path):
    """The format of LLaVA's first stage: an image, and the caption after it."""
    folder = save_llava(tmp_path / "llava", CLIP, template="plain")
    spec = ExportSpec(quant="f32", mmproj="f32", verify=False)
    file = export(str(folder), tmp_path, spec, lambda *_: None).model
    ours = load(file)
    theirs = HFBackend()
    theirs.load(LoadSpec(name=str(folder), dtype="float32", device_map="cpu"), lambda *_: None)
    messages = [user("", picture("red", (120, 50)))]
    for _ in range(2):
        events(ours, messages)
        events(theirs, messages)
        assert tokens(ours._model.units) == tokens(theirs._units)


# --- Images ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bare(text_file):
    with LanguageModel(text_file, RuntimeOptions(threads=1, context=128)) as model:
        yield model


def features(path, model, image) -> np.ndarray:
    with ImageEncoder(path, model, RuntimeOptions()) as encoder:
        (chunk,) = encoder.prepare(open_image(image), image.sha256)
        return encoder.encode(chunk)


def test_a_layout_that_this_llama_cpp_computes_wrongly_is_refused(bare, tmp_path):
    right, wrong = ("standard", "last") if class_token_is_first(bare) else ("last", "standard")
    red = picture("red", (120, 50))
    rolled = features(save_mmproj(tmp_path / "rolled.gguf", 64, layout="rolled"), bare, red)
    other = features(save_mmproj(tmp_path / "right.gguf", 64, layout=right), bare, red)
    # "last" moves all by one: its first row is the rolled file's second.
    same = (rolled, other) if right == "standard" else (rolled[1:], other[:-1])
    assert np.abs(same[0] - same[1]).max() < 2e-3 * np.abs(rolled).max()
    with pytest.raises(CheckpointError, match=wrong) as caught:
        features(save_mmproj(tmp_path / "wrong.gguf", 64, layout=wrong), bare, red)
    assert "rolled" in caught.value.hint


def test_features_are_computed_once_and_their_memory_is_bounded(vision, monkeypatch):
    import w2c_tui.backends.gguf as module

    images = [picture(f"#{at * 12:02x}4080") for at in range(8)]
    messages = [user("many", *images)]
    first = text_of(events(vision, messages))
    kept = {id(unit) for units in vision._images.values() for unit in units}
    assert text_of(events(vision, [*messages, Message("assistant", "x"), user("more")])) != ""
    assert kept <= {id(unit) for units in vision._images.values() for unit in units}
    one = vision._image_units(images[0])[0].features.nbytes
    monkeypatch.setattr(module, "_MAX_FEATURE_BYTES", 3 * one)
    events(vision, [user("one", picture("red"))])
    events(vision, [user("two", picture("green"))])
    assert len(vision._images) <= 5
    assert text_of(events(vision, messages)) == first


def test_an_image_is_left_half_way_when_nobody_waits_for_it(text_file, tmp_path):
    mmproj = save_mmproj(tmp_path / "mmproj.gguf", 64, layout="rolled", hidden=128, layers=8)
    backend = load(text_file, mmproj=str(mmproj))
    messages = [user("Code?", picture("red"))]
    whole = text_of(events(backend, messages))
    unseen = [user("Code?", picture("blue"))]
    asked = 0

    def second_time() -> bool:
        nonlocal asked
        asked += 1
        return asked > 2

    found = events(backend, unseen, GREEDY, second_time)
    assert finish(found).reason == "cancelled"
    (chunk,) = backend._image_units(unseen[0].attachments[0])
    assert isinstance(chunk, ImageChunk)
    assert chunk.features is None
    assert text_of(events(backend, unseen)) != ""
    assert text_of(events(backend, messages)) == whole


# --- The context ----------------------------------------------------------------------------------


def test_a_prompt_is_left_in_the_middle_of_one_native_call(text_file):
    with LanguageModel(text_file, RuntimeOptions(threads=1, context=1024)) as model:
        ids = model.raw_tokens("word " * 150)
        expected = model.run(ids)
        model.crop(0)
        asked = 0

        def later() -> bool:
            nonlocal asked
            asked += 1
            return asked > 10

        model.run(ids[:5])
        model.cancelled = later
        model.watch(True)
        with pytest.raises(Interrupted):
            model.run(ids[5:])
        assert asked == 11
        assert model.units == ids[:5]
        model.watch(False)
        assert np.abs(model.run(ids[5:]) - expected).max() < 1e-3


@pytest.mark.parametrize(
    "changes",
    [
        {"flash_attn": "off"},
        {"flash_attn": "on"},
        {"cache_type": "f32"},
        {"cache_type": "bf16"},
        {"cache_type": "q8_0", "flash_attn": "on"},
        {"n_gpu_layers": 0},
    ],
)
def test_settings_change_speed_and_memory_and_hardly_the_answer(changes, tmp_path):
    folder = save_family(tmp_path / "llama", TEXT_FAMILIES["llama-wide-heads"])
    file = save_text_model(folder, tmp_path)
    rows = []
    for settings in ({}, changes):
        options = RuntimeOptions(context=128, threads=1, **settings)
        with LanguageModel(file, options) as model:
            rows.append(model.run(model.raw_tokens("Write a page with prices"), keep=3))
    assert np.abs(rows[0] - rows[1]).max() < 0.05 * np.abs(rows[0]).max()


@pytest.mark.skipif(supports_gpus(), reason="with a GPU llama.cpp decides")
def test_attention_on_a_cpu_is_the_plain_one_unless_the_cache_is_packed(tmp_path):
    folder = save_family(tmp_path / "llama", TEXT_FAMILIES["llama-wide-heads"])
    file = save_text_model(folder, tmp_path)

    def row(**settings):
        with LanguageModel(file, RuntimeOptions(context=128, threads=1, **settings)) as model:
            return model.run(model.raw_tokens("Write a page with prices"))[0]

    assert np.array_equal(row(), row(flash_attn="off"))
    assert not np.array_equal(row(), row(flash_attn="on"))
    packed = row(cache_type="q8_0")
    assert np.array_equal(packed, row(cache_type="q8_0", flash_attn="on"))


def test_a_packed_cache_without_flash_attention_says_what_to_do(tmp_path):
    folder = save_family(tmp_path / "llama", TEXT_FAMILIES["llama-wide-heads"])
    file = save_text_model(folder, tmp_path)
    with pytest.raises(W2CError, match="q8_0") as caught:
        load(file, cache_type="q8_0", flash_attn="off", context=64)
    assert "--flash-attn on" in caught.value.hint


def test_context_can_be_capped(text_file):
    backend = load(text_file, context=64)
    found = events(backend, [user("Write")], GenerationParams(temperature=0, max_new_tokens=500))
    assert stats(found).context_length == 64
    assert stats(found).context_used <= 64


def test_a_context_that_no_memory_holds_is_refused_before_loading(tmp_path):
    file = gguf_files.save_published_text(tmp_path / "long.gguf", "llava", context=2**31 - 1)
    with pytest.raises(OutOfMemoryError, match=r"2,147,483,647 tokens .* GB") as caught:
        load(file, context=2**31 - 1)
    assert "--context" in caught.value.hint
    backend = load(file)
    assert backend.context_length <= 32_768
    backend.close()


def test_native_lines_go_to_the_log_and_never_to_the_screen(vision_file, tmp_path, capfd, caplog):
    caplog.set_level(logging.INFO, "llama.cpp")
    backend = load(vision_file)
    text_of(events(backend, [user("Code?", picture("red"))]))
    backend.close()
    with pytest.raises(CheckpointError):
        GGUFHeader(gguf_files.damaged(Path(vision_file), tmp_path / "damaged.gguf"))
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    assert any("llama_model_loader" in record.message for record in caplog.records)


def test_the_stream_may_be_read_from_another_thread(text_file):
    backend = load(text_file)
    expected = text_of(events(backend, [user("Write")]))
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.append(text_of(events(backend, [user("Write")])))
    )
    thread.start()
    thread.join()
    assert found == [expected]


# --- Files ----------------------------------------------------------------------------------------


def test_the_mmproj_beside_the_model_is_found_by_itself(text_file, tmp_path):
    model = shutil.copy(text_file, tmp_path / "model.gguf")
    save_mmproj(tmp_path / "a-mmproj.gguf", 32)
    assert not load(model).reads_images
    mine = save_mmproj(tmp_path / "z-mmproj-f16.gguf", 64)
    assert load(model)._encoder.path == mine
    assert load(tmp_path)._encoder.path == mine
    other = save_mmproj(tmp_path / "elsewhere.gguf", 64)
    assert load(model, mmproj=str(other))._encoder.path == other


def test_a_foreign_mmproj_is_refused_with_both_sizes(text_file, tmp_path):
    with pytest.raises(CheckpointError, match=r"gives embeddings of 32, and the model takes 64"):
        load(text_file, mmproj=str(save_mmproj(tmp_path / "mmproj.gguf", 32)))
    with pytest.raises(CheckpointError, match="is no mmproj file: its architecture is 'llama'"):
        load(text_file, mmproj=str(text_file))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(text_file, mmproj=str(tmp_path / "missing.gguf"))


def test_files_that_are_no_whole_models_are_refused(text_file, tmp_path):
    data = text_file.read_bytes()
    for content, words in (
        (b"PK\x03\x04 a zip file", "is not a GGUF file"),
        (b"", "is not a GGUF file"),
        (data[:100], "damaged or incomplete"),
        (data[:-1000], r"is incomplete: it has [\d,]+ of [\d,]+ bytes"),
        (data.replace(b"llama", b"llamx"), "'llamx' model, which llama-cpp-python .* not know"),
        (data.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"), "cannot load .*attn_q"),
    ):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=words) as caught:
            load(path)
        assert caught.value.hint


def test_a_model_without_a_chat_template_says_so(tmp_path):
    file = gguf_files.save_published_text(tmp_path / "base.gguf", "llava", template="")
    with pytest.raises(CheckpointError, match="no chat template"):
        load(file)
    save_mmproj(tmp_path / "mmproj.gguf", 64)
    assert load(file)._template.name == "v1"


def test_a_folder_of_several_models_asks_which(text_file, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.gguf").write_bytes(text_file.read_bytes())
    with pytest.raises(ModelNotFoundError, match="2 GGUF models") as caught:
        load(tmp_path)
    assert "one.gguf, two.gguf" in caught.value.hint


def test_a_failed_load_leaves_no_model_and_another_load_works(text_file, tmp_path):
    backend = load(text_file)
    with pytest.raises(W2CError):
        backend.load(LoadSpec(name=str(tmp_path)), lambda *_: None)
    with pytest.raises(EngineError, match="No model"):
        events(backend, [user("Write")])
    backend.load(LoadSpec(name=str(text_file), threads=1), lambda *_: None)
    assert text_of(events(backend, [user("Write")]))


def test_loading_reports_progress_and_can_be_stopped(text_file):
    steps = []
    backend = GGUFBackend()
    backend.load(LoadSpec(name=str(text_file)), lambda *step: steps.append(step))
    assert steps[-1][1] == steps[-1][2] == text_file.stat().st_size

    def stop(*_):
        raise EngineError("Loading was cancelled.")

    with pytest.raises(EngineError, match="cancelled"):
        backend.load(LoadSpec(name=str(text_file)), stop)


def test_two_ways_of_placing_a_model_exclude_each_other(text_file):
    with pytest.raises(ConfigError, match="--tensor-split"):
        load(text_file, tensor_split=(1.0, 1.0), main_gpu=0)


def test_the_plan_counts_every_byte_of_model_and_encoder(vision_file):
    shares = plan_placement(LoadSpec(name=str(vision_file)), lambda *_: None)
    files = [Path(vision_file), *Path(vision_file).parent.glob("*mmproj*")]
    assert len(files) == 2
    expected = sum(GGUFHeader(file).num_bytes for file in files)
    assert sum(share.num_bytes for share in shares) == expected
