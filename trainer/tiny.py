"""Tiny random models for the debug recipes, so that every command runs without a download.

Owns what `debug:crystalcoder`, `debug:llama` and `debug:clip` are: two-layer models with random
weights and a tokenizer of little more than bytes, written once into the application's cache. They
learn, but know nothing. Knows nothing about recipes or training.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from w2c_tui.core.config import paths
from w2c_tui.core.errors import ModelNotFoundError

PREFIX = "debug:"
VERSION = 1
IMAGE_PX, PATCH_PX = 56, 14


def resolve(source: str) -> str:
    """The folder of a `debug:` model, written on first use; any other source as it is."""
    if not source.startswith(PREFIX):
        return source
    name = source.removeprefix(PREFIX)
    if name not in _WRITERS:
        raise ModelNotFoundError(
            f"There is no model {source}.",
            hint=f"Known: {', '.join(PREFIX + known for known in _WRITERS)}.",
        )
    folder = paths().models / "debug" / f"{name}-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            transformers.utils.logging.disable_progress_bar()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _WRITERS[name](scratch)
            # Another process of the same launch may have been faster.
            if not folder.is_dir():
                scratch.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return str(folder)


def _crystalcoder(folder: Path) -> None:
    from w2c_tui.models.crystal import CrystalCoderConfig, CrystalCoderForCausalLM

    tokenizer = small_tokenizer()
    config = CrystalCoderConfig(
        vocab_size=len(tokenizer),
        n_positions=2048,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_inner=192,
        rotary_dim=8,
        mup_embeddings_scale=14.6,
        mup_output_alpha=2.22,
        mup_width_scale=0.5,
        mup_scale_qk_dot_by_d=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    CrystalCoderForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = small_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _clip(folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    square = {"height": IMAGE_PX, "width": IMAGE_PX}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_PX}, crop_size=square).save_pretrained(
        folder
    )


_WRITERS: dict[str, Callable[[Path], None]] = {
    "crystalcoder": _crystalcoder,
    "llama": _llama,
    "clip": _clip,
}


_CORPUS = (
    "<!DOCTYPE html><html><head><title></title></head><body></body></html>",
    "<div class=''></div><h1></h1><p></p><a href=''></a><ul><li></li></ul> style='color: #'",
)


def small_tokenizer() -> Any:
    """Bytes and some tags, with the special tokens of Llama; no BOS is added, as in Crystal's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
