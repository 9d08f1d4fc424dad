"""One stage of training, from a recipe to a checkpoint that the application loads.

On top of transformers' Trainer, which owns the loop, accelerate and DeepSpeed; here is what they
leave open: which samples make a step, the loss over a whole global batch, checkpoints that are
complete or not there, and what stops a run. Knows nothing about the command line.
"""

from __future__ import annotations

import copy
import functools
import os
import shutil
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import LlavaConfig, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer import SCHEDULER_NAME

from trainer.arithmetic import bf16_slowdown_on_cpu, disk_plan, peak_flops, training_flops
from trainer.batches import Collator, StepSampler, TrainingSet, examples_of
from trainer.dataset import open_dataset, tokenizer_hash
from trainer.features import cached_features
from trainer.model import Parts, add_adapters, build, describe, rehearse_writing, write_result
from trainer.monitor import Monitor, TrainingStopped
from trainer.objective import Objective, attention_for
from trainer.recipes import Recipe
from trainer.reshard import reshard
from trainer.run_folder import PARTIAL, RunFolder, add_line
from w2c_tui.core.errors import ConfigError

TRAINED_NAME = "trained.safetensors"
NUM_SAMPLES, SAMPLE_TOKENS = 2, 512


def train(recipe: Recipe, *, resume: bool = False) -> Path | None:
    """Run the stage that `recipe` describes; the result's folder, or None if a signal ended it.

    Every process of a launch calls this. Everything that can be known to fail is found before the
    first step. Raises a W2CError.
    """
    world_size = start_processes(recipe)
    accumulation = recipe.gradient_accumulation(world_size)
    parts = describe(recipe)
    if not recipe.data:
        raise ConfigError("The run has no data.", hint="Name a prepared folder with --data.")
    prepared = open_dataset(Path(recipe.data).expanduser())
    prepared.check_measured(
        tokenizer_hash(parts.tokenizer), recipe.template, parts.tokens_per_image
    )
    training_set = examples_of(prepared, parts, recipe)
    folder = RunFolder(recipe, prepared.fingerprint)
    folder.check(resume=resume)
    # Counted now, as ZeRO-3 takes over how models are made, and on a copy, as models change theirs.
    config = copy.deepcopy(parts.config)
    folder.check_room(disk_plan(config, recipe, num_images=0))
    rehearse_writing(recipe, parts)
    _wait_for_all()
    if _is_first():
        folder.claim()
    _wait_for_all()
    checkpoint = folder.newest()
    other_devices = bool(
        checkpoint and recipe.zero_stage and folder.devices_of(checkpoint) != world_size
    )
    if checkpoint and other_devices and _is_first():
        print(f"Putting {checkpoint.name} together for {world_size} devices.", file=sys.stderr)
        reshard(checkpoint, folder.resharded)
    _wait_for_all()

    model = build(recipe, parts)
    if recipe.cache_features:
        training_set.features = cached_features(
            prepared,
            model,
            parts.image,
            device=_device(),
            rank=torch.distributed.get_rank() if torch.distributed.is_initialized() else 0,
            world_size=world_size,
            wait_for_all=_wait_for_all,
            report=_progress(),
        )
    if _is_first():
        _tell_of_slow_bf16(recipe)
    objective = Objective(_prepared_for(model, recipe))
    num_steps = recipe.steps(len(training_set))
    zero = zero_config(recipe, accumulation, world_size, model.config.get_text_config())
    if zero and other_devices:
        zero["checkpoint"] = {"load_universal": True}
    arguments = _arguments(recipe, accumulation, num_steps, zero)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    monitor = Monitor(
        folder.metrics,
        world_size=world_size,
        stall_timeout_s=recipe.stall_timeout_s,
        step_flops=functools.partial(_step_flops, config, recipe),
        device_flops=peak_flops(gpu),
    )
    trainer = StageTrainer(
        objective, arguments, training_set, recipe=recipe, parts=parts, run=folder, monitor=monitor
    )
    if checkpoint is not None and _is_first():
        folder.forget_after(int(checkpoint.name.rpartition("-")[2]))
        print(f"Going on from {checkpoint}.", file=sys.stderr)
    with monitor:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        finally:
            if _is_first():
                folder.write_report()
    if trainer.state.global_step < num_steps:
        return None
    state = trainer.whole_state()
    # Or models would be split over the processes as they are loaded.
    unset_hf_deepspeed_config()
    if _is_first():
        whole, weights = _result(recipe, parts, objective, state)
        write_result(
            whole,
            folder.path,
            recipe,
            parts,
            state_dict=weights,
            data_fingerprint=prepared.fingerprint,
        )
    _wait_for_all()
    return folder.result


def _step_flops(config: LlavaConfig, recipe: Recipe, counts: dict[str, int]) -> float:
    return training_flops(
        config,
        counts["tokens"],
        # A tower whose features are there already does no work.
        0 if recipe.cache_features else counts["images"],
        recipe.stage,
        num_samples=counts["samples"],
        squared_lengths=counts["squared_lengths"],
        num_supervised=counts["supervised"],
        lora=bool(recipe.lora_rank),
    )


# --- Processes ------------------------------------------------------------------------------------


def start_processes(recipe: Recipe) -> int:
    """Join the processes of this launch (torchrun, deepspeed or none); their number."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _quieten_libraries()
    if recipe.zero_stage:
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError(
                f"ZeRO stage {recipe.zero_stage} needs the package deepspeed ({error}).",
                hint="Install it with: pip install 'w2c-tui[train]', or set --zero-stage 0.",
            ) from error
        # Only speeds up what runs on one host, and would be compiled now.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if world_size == 1:
            alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            for name, value in {**alone, "MASTER_PORT": str(_free_port())}.items():
                os.environ.setdefault(name, value)
        deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo")
    elif world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return world_size


def _quieten_libraries() -> None:
    """Keep what libraries say to their own developers off the terminal."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def _tell_of_slow_bf16(recipe: Recipe) -> None:
    if recipe.precision == "fp32" or torch.cuda.is_available():
        return
    slowdown = bf16_slowdown_on_cpu()
    if slowdown > 2:
        print(
            f"This CPU multiplies in bf16 {slowdown:.0f} times slower than in float32: "
            "--precision fp32 trains faster.",
            file=sys.stderr,
        )


def _progress() -> Callable[[str, int, int], None]:
    """Shows the first process's share of some work, with rate and time left."""
    bar: Any = None

    def report(phase: str, done: int, total: int) -> None:
        nonlocal bar
        if _is_first():
            bar = bar or tqdm(total=total, desc=phase, unit="image")
            bar.update()
            if done == total:
                bar.close()

    return report


def _is_first() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


# --- Settings of the libraries --------------------------------------------------------------------


def _arguments(
    recipe: Recipe, accumulation: int, num_steps: int, zero: dict[str, Any] | None
) -> TrainingArguments:
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=recipe.out,
        per_device_train_batch_size=recipe.per_device_batch,
        gradient_accumulation_steps=accumulation,
        max_steps=num_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(
            recipe.schedule, recipe.schedule
        ),
        warmup_steps=recipe.warmup_steps(num_steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim="adamw_torch",
        bf16=recipe.precision == "bf16",
        tf32=True if gpu and recipe.precision == "bf16" else None,
        use_cpu=not gpu,
        seed=recipe.seed,
        deepspeed=zero,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        report_to=[] if recipe.log_to == "none" else [recipe.log_to],
        run_name=recipe.name,
        remove_unused_columns=False,
        label_names=["targets"],
        dataloader_num_workers=recipe.workers,
        dataloader_pin_memory=gpu,
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        log_level="warning",
    )
    # One process drives one device: transformers would spread a batch over all it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def zero_config(
    recipe: Recipe, accumulation: int, world_size: int, text_config: Any
) -> dict[str, Any] | None:
    """DeepSpeed's configuration, as it follows from the recipe; None without DeepSpeed."""
    if not recipe.zero_stage:
        return None
    # The sizes that transformers' "auto" takes.
    matrix = text_config.hidden_size**2
    zero: dict[str, Any] = {
        "stage": recipe.zero_stage,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": max(matrix, 2**16),
    }
    if recipe.zero_stage == 2:
        zero["allgather_bucket_size"] = max(matrix, 2**16)
    else:
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * matrix),
            "stage3_param_persistence_threshold": 10 * text_config.hidden_size,
            "stage3_gather_16bit_weights_on_model_save": True,
        }
    if recipe.offload != "none":
        place: dict[str, Any] = {"device": recipe.offload, "pin_memory": torch.cuda.is_available()}
        if recipe.offload == "nvme":
            place["nvme_path"] = recipe.offload_folder
        zero["offload_optimizer"] = place
        if recipe.zero_stage == 3:
            zero["offload_param"] = place
    return {
        "train_micro_batch_size_per_gpu": recipe.per_device_batch,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": recipe.per_device_batch * accumulation * world_size,
        "gradient_clipping": recipe.max_grad_norm,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "fp16": {"enabled": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def _prepared_for(model: Any, recipe: Recipe) -> Any:
    """`model` with the recipe's attention, checkpointing and adapters."""
    model.model.language_model.set_attn_implementation(attention_for(model, recipe))
    if recipe.gradient_checkpointing:
        model.model.language_model.activation_checkpointing_enable(
            activation_checkpointing_kwargs={"use_reentrant": False}
        )
    return add_adapters(model, recipe) if recipe.lora_rank else model


# --- The loop -------------------------------------------------------------------------------------


class StageTrainer(Trainer):
    """transformers' loop over whole global batches, with checkpoints of what trains."""

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        objective: Objective,
        arguments: TrainingArguments,
        training_set: TrainingSet,
        *,
        recipe: Recipe,
        parts: Parts,
        run: RunFolder,
        monitor: Monitor,
    ) -> None:
        self._recipe = recipe
        self._run = run
        self._monitor = monitor
        self._tokenizer = parts.tokenizer
        self._sampled_at = 0
        super().__init__(
            model=objective,
            args=arguments,
            train_dataset=training_set,
            data_collator=Collator(
                parts.image,
                parts.tokens_per_image,
                packed=recipe.batching == "packed",
                attention=objective.llava.model.language_model.config._attn_implementation,
                features=training_set.features,
            ),
            callbacks=[monitor, _SaveWhenAsked(monitor)],
        )
        self.remove_callback(PrinterCallback)

    def _get_train_sampler(self, train_dataset: Any = None) -> StepSampler:
        training_set: Any = self.train_dataset
        return StepSampler(
            training_set.lengths,
            self._recipe,
            num_micro_batches=self.args.world_size * self.args.gradient_accumulation_steps,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one step here, and the supervised tokens of the step everywhere."""
        self._monitor.began_waiting()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        records = [record for batch in batches for record in batch.pop("records")]
        lengths = [length for batch in batches for length in batch.pop("lengths")]
        mine = {
            "supervised": sum(len(batch["targets"]) for batch in batches),
            "tokens": sum(lengths),
            "squared_lengths": sum(length**2 for length in lengths),
            "images": sum(batch.pop("num_images") for batch in batches),
            "samples": len(records),
        }
        counts: torch.Tensor = self.accelerator.reduce(
            torch.tensor(list(mine.values()), device=device), reduction="sum"
        )
        self._monitor.got_samples(records, dict(zip(mine, counts.tolist(), strict=True)))
        self._records = records
        if not counts[0]:
            raise TrainingStopped(
                f"No token of step {self.state.global_step + 1} carries loss: there is nothing to "
                f"learn from {', '.join(records)}.",
                hint="Check the template, and --max-length against the samples' lengths.",
            )
        return batches, counts[0]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean over the supervised tokens of the whole global batch.

        Gradients are averaged over processes, so each process weighs its sum by their number.
        """
        assert num_items_in_batch is not None
        total: torch.Tensor = model(**inputs)
        loss = total * (self.accelerator.num_processes / num_items_in_batch)
        if not torch.isfinite(loss.detach()):
            raise TrainingStopped(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. The samples of "
                f"this step on this device: {', '.join(self._records)}.",
                hint="Lower --learning-rate, or look at these samples; --resume goes on from the "
                "last checkpoint.",
            )
        return loss

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        step, every = self.state.global_step, self._recipe.sample_every
        if every and step % every == 0 and step != self._sampled_at:
            self._sampled_at = step
            self._write_samples()

    def _write_samples(self) -> None:
        """What the model writes about the first pictures now; every process does the same."""
        training_set: Any = self.train_dataset
        objective: Any = self.model
        model = objective.llava
        rows = np.flatnonzero(training_set.prepared.modality)[:NUM_SAMPLES].tolist()
        objective.eval()
        for row in rows:
            prompt = training_set.prompt(row)
            ids = torch.tensor(prompt.encoded.input_ids[None], dtype=torch.long)
            pixels = torch.from_numpy(np.stack(prompt.pixels))
            with torch.no_grad(), self.accelerator.autocast():
                written = model.generate(
                    input_ids=ids.to(self.args.device),
                    attention_mask=torch.ones_like(ids).to(self.args.device),
                    pixel_values=pixels.to(self.args.device, model.model.vision_tower.dtype),
                    max_new_tokens=min(SAMPLE_TOKENS, self._recipe.max_length),
                    do_sample=False,
                    use_cache=True,
                    eos_token_id=self._tokenizer.eos_id,
                    pad_token_id=self._tokenizer.eos_id,
                    synced_gpus=self._recipe.zero_stage == 3,
                )
            if self.is_world_process_zero():
                text = self._tokenizer.decode(written[0, ids.shape[1] :].tolist())
                line = {"step": self.state.global_step, "record": prompt.record, "text": text}
                add_line(self._run.samples, line)
        objective.train()
        if self.is_world_process_zero():
            self._run.write_report()

    # --- checkpoints -----------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run.path / PARTIAL)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        if (self._run.path / name).is_dir():
            return
        try:
            super()._save_checkpoint(model, trial)
            _wait_for_all()
            if self.is_world_process_zero():
                self._run.publish(name, self.args.world_size)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._run.path / PARTIAL, ignore_errors=True)
            kept = [path.name for path in self._run.checkpoints()]
            raise TrainingStopped(
                f"The checkpoint of step {self.state.global_step} cannot be written to "
                f"{self._run.path}: {error}",
                hint=f"Free some space and add --resume; "
                f"{kept[-1] if kept else 'no earlier checkpoint'} is there.",
            ) from error
        _wait_for_all()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What trains; the rest is in the model that the recipe names. DeepSpeed saves its own."""
        if self.is_deepspeed_enabled or not self.args.should_save:
            return
        assert output_dir is not None
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        state = {name: p.detach().cpu().contiguous() for name, p in self._trained()}
        save_file(state, Path(output_dir) / TRAINED_NAME)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        engine: Any = self.model_wrapped
        engine.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        # The schedule is transformers' own and none that DeepSpeed saves.
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        """Nothing: `_prepare_for_training` restores everything at one place."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if resume_from_checkpoint is None:
            return prepared
        if self.is_deepspeed_enabled:
            engine: Any = self.model_wrapped
            universal = engine.load_universal_checkpoint()
            source = str(self._run.resharded) if universal else resume_from_checkpoint
            path, _ = engine.load_checkpoint(source, load_module_strict=False)
            if path is None:
                raise TrainingStopped(
                    f"{resume_from_checkpoint} cannot be read by DeepSpeed.",
                    hint="Remove it to go on from an earlier one.",
                )
            if universal:
                # DeepSpeed gives all groups one counter of steps (seen in 0.19), so that each of
                # them would count for all.
                for state in engine.optimizer.optimizer.state.values():
                    if isinstance(step := state.get("step"), torch.Tensor):
                        state["step"] = step.clone()
            _wait_for_all()
            if self.is_world_process_zero():
                shutil.rmtree(self._run.resharded, ignore_errors=True)
        else:
            state = load_file(Path(resume_from_checkpoint) / TRAINED_NAME)
            for name, parameter in self._trained():
                parameter.data.copy_(state[name])
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        model: Any = self.model
        return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def whole_state(self) -> dict[str, torch.Tensor]:
        """All weights by the names of the model under the objective; on the first process only."""
        if self.is_deepspeed_enabled:
            state = self.accelerator.get_state_dict(self.deepspeed)
        else:
            model: Any = self.model
            state = model.state_dict() if self.is_world_process_zero() else None
        return {
            name.removeprefix(
                "model.",
            ): tensor
            for name, tensor in (state or {}).items()
        }


class _SaveWhenAsked(TrainerCallback):
    """Turns a signal that reached any process into a checkpoint of all, after the same step."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        urgency: dict[int | None, int] = {None: 0, signal.SIGUSR1: 1, signal.SIGTERM: 2}
        asked = torch.tensor(urgency[self._monitor.signalled], device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            control.should_save = True
            control.should_training_stop = control.should_training_stop or int(asked) == 2
            if self._monitor.signalled != signal.SIGTERM:
                self._monitor.signalled = None


def _result(
    recipe: Recipe, parts: Parts, objective: Objective, state: dict[str, torch.Tensor]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model to save and its weights in the precision of the run, adapters merged in."""
    model: Any = objective.model
    if recipe.lora_rank:
        trained = {
            name: state[name] for name, p in objective.model.named_parameters() if p.requires_grad
        }
        # Over the weights as they were read: adapters are not merged into 4 bit.
        whole = msgspec.structs.replace(recipe, quantization="none")
        adapted = add_adapters(build(whole, parts), whole)
        adapted.load_state_dict(trained, strict=False)
        model = adapted.merge_and_unload()
        state = model.state_dict()
    if model.config.tie_word_embeddings:
        # Gathering and casting make two tensors of the one that is tied.
        state.pop("lm_head.weight", None)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return model, {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }
