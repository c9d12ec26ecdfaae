"""The run: build every part from the configuration, then step, log, evaluate, checkpoint."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from njepa_kernels import choose
from torch import Tensor

from njepa.config import Config, ConfigError, dump_config
from njepa.data.batch import Batch
from njepa.data.errors import DataError
from njepa.data.loader import build_loader, choose_backend
from njepa.data.sources import open_source
from njepa.draws.masks import MaskSampler
from njepa.draws.order import SampleOrder
from njepa.evaluation.evaluate import Evaluator, open_test_side, report
from njepa.models.architecture import architecture
from njepa.models.attention_kernels import choose_attention
from njepa.models.encoder import Encoder, build_encoder
from njepa.runs import checkpoints
from njepa.runs.folder import RunFolder, run_dir
from njepa.runs.monitors import FeatureMonitor, MetricMeans, Stopwatch
from njepa.runs.ranks import Ranks
from njepa.runs.signals import StopRequest
from njepa.runs.summary import device_name, summary_table
from njepa.runs.tracking import Tracker
from njepa.training import zero
from njepa.training.compiling import (
    GraphedForward,
    choose_compilation,
    compilations,
    compile_blocks,
    eagerly,
)
from njepa.training.ema import ema_parameters, frozen_copy, make_target, update_target
from njepa.training.module import TrainModule, param_groups
from njepa.training.schedules import Schedules
from njepa.training.zero import BatchSizes

log = logging.getLogger(__name__)

#: The fused ops of every step; VICReg's is the fifth.
OPS = ("patchify", "predictor_tokens", "jepa_loss", "ema_update_")


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; no checkpoint was written after it did."""


class Trainer:
    """One run on this rank. Building it checks everything that can be checked without training.

    Args:
        config: the resolved recipe.
        ds: the DeepSpeed file as ``load_ds_config`` returns it.
        ranks: this process among the others.

    Raises:
        ConfigError: inputs that cannot work; nothing was trained or written over.
    """

    def __init__(self, config: Config, ds: dict[str, Any], ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.sizes = zero.resolve_batch(ds, ranks.world)
        check_vicreg_batch(config, self.sizes)
        # Pure checks, before anything is read or written.
        self.parts = parts = architecture(config)
        choose_backend(config.data.backend, ranks.device)
        self.impl = choose_impls(config, ranks.device)
        stacks = parts.encoder, parts.predictor
        self.attention = choose_attention(
            config.model,
            config.mask,
            {stack.width // stack.heads for stack in stacks},
            ranks.device,
            zero.compute_dtype(ds, ranks.device),
        )
        self.compilation = choose_compilation(config, zero.zero_stage(ds), ranks.device)
        # Kc is the minimum over all ranks, or, as published, over each on its own.
        ranks_together = ranks.world if config.mask.compat == "fixed" else 1
        self.masks = MaskSampler(
            config.mask, config.grid, config.run.seed, self.sizes.micro * ranks_together
        )
        self.evaluator: Evaluator | None = None  # rank 0, where there are labelled test images
        self.folder: RunFolder | None = None  # rank 0 only
        ranks.on_main(lambda: self._claim(ds))
        try:
            self._build(ds)
        except BaseException:
            self.close()
            raise

    def _build(self, ds: dict[str, Any]) -> None:
        config, ranks = self.config, self.ranks
        self.index = open_source(
            config.data.path,
            config.data.cache_dir,
            progress=config.run.progress and ranks.main,
        )
        ranks.on_main(self._open_test_side)
        order = SampleOrder(
            self.index.n,
            self.sizes.micro,
            self.sizes.accumulation,
            ranks.world,
            ranks.rank,
            config.run.seed,
        )
        self.steps_per_epoch = order.steps_per_epoch
        self.total_steps = config.run.max_steps or config.optim.epochs * self.steps_per_epoch
        warmup = round(self.total_steps * config.optim.warmup_epochs / config.optim.epochs)
        self.schedules = Schedules(config.optim, self.total_steps, warmup)

        module = TrainModule(config, ranks.group, self.attention)
        encoder = module.jepa.encoder
        self.target = make_target(encoder).to(ranks.device)
        self.online = ema_parameters(encoder)
        if self.compilation.mode == "blocks":
            compile_blocks((module, self.target), config.mask.static_shapes)
        self.engine = zero.build_engine(
            module,
            param_groups(module, config.optim.weight_decay),
            ds,
            self.sizes,
            config.optim,
            ranks.device,
        )
        self._target_forward: Callable[[Tensor], Tensor] = self.encode_target
        if config.run.cuda_graphs == "target":
            self._target_forward = GraphedForward(
                self.target, lambda: zero.autocast(self.engine, ranks.device)
            )
        self._compiled_before, self._compilations = compilations(), 0  # the second: in the log
        self._norm: Tensor | None = None
        self._tracker: Tracker | None = None  # rank 0, while running
        self._means, self._features, self._watch = MetricMeans(), FeatureMonitor(), Stopwatch()
        self.step = self._resume() if config.run.resume else 0
        self.loader = build_loader(
            config, self.index, order, self.masks, ranks.device, self.step, self.total_steps
        )

    def close(self) -> None:
        """Release the run folder."""
        if self.folder is not None:
            self.folder.close()

    # ---- the run -----------------------------------------------------------------------------

    def run(self) -> dict[str, Any] | None:
        """Train to the end, or until a stop is asked for; returns the summary on rank 0.

        Raises:
            NonFiniteLoss: the loss is no longer a number.
            DataError: the loader cannot go on; the steps done are saved.
        """
        run = self.config.run
        if self.folder is not None:
            self.folder.begin()
            self._tracker = Tracker(
                self.folder.path,
                self.step,
                self.total_steps,
                tensorboard=run.tensorboard,
                progress=run.progress,
            )
        self._say(self.describe())
        stop, began, first_step = StopRequest(self.ranks), time.perf_counter(), self.step
        self._watch.lap()
        try:
            self._train(stop)
            if self.step < self.total_steps:
                self._say(
                    f"stopped after step {self.step} of {self.total_steps}; the checkpoint is in "
                    f"{run_dir(self.config)}; go on with run.resume=true"
                )
                return None
            images = (self.step - first_step) * self.sizes.total
            return self._summarise(images, time.perf_counter() - began)
        except DataError:
            # Of several ranks one alone meets the image, and a checkpoint needs all of them.
            if self.ranks.world == 1 and self.engine.micro_steps % self.sizes.accumulation == 0:
                self._save()
            raise
        finally:
            stop.close()
            self.loader.close()
            if self._tracker is not None:
                self._tracker.close()
            self.close()

    def _train(self, stop: StopRequest) -> None:
        """Step until the end or a stop; log, save and evaluate in between."""
        run, every_eval = self.config.run, self.config.eval.every
        every_save = run.checkpoint_every or self.steps_per_epoch
        batches, last = iter(self.loader), False
        while self.step < self.total_steps and not last:
            self._train_step(batches)
            self.step += 1
            stopped = stop.agreed() or self.step == run.stop_after
            last = stopped or self.step == self.total_steps
            if self._tracker is not None:
                self._tracker.advance()
            if self.step % run.log_every == 0 or self.step == 1 or last:
                self._log()
            pause = time.perf_counter()
            if self.step % every_save == 0 or last:
                self._save()
            if every_eval and self.step % every_eval == 0 and not last:
                self._evaluate()
            self._watch.pause(time.perf_counter() - pause)

    def _train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step: ``accumulation`` micro-batches, the update, the target's update."""
        lr, weight_decay, momentum = self.schedules.at(self.step)
        zero.set_rates(self.engine, lr, weight_decay)
        with self.attention.ordered():
            for _ in range(self.sizes.accumulation):
                self._micro_step(next(batches))
        with zero.full_parameters(self.engine, self.online) as online:
            update_target(self.target, online, momentum, impl=self.config.impl.default)

    def _micro_step(self, batch: Batch) -> None:
        """Forward and backward of one micro-batch; at the last of a step the optimizer's too."""
        h = self._target_forward(batch.images)
        loss, metrics = self.engine(batch, h)
        self.engine.backward(loss)
        if self.engine.is_gradient_accumulation_boundary():
            self._norm = zero.unsharded_gradient_norm(self.engine)
        self.engine.step()
        self._means.add(metrics)
        context_idx, target_idx, lengths = batch.masks
        self._means.add_counts(
            k_context=sum(lengths.counts) / len(lengths.counts)
            if lengths is not None
            else context_idx.shape[-1],
            k_target=target_idx.shape[-1],
            context_cut_frac=batch.cut_frac,
        )
        self._features.add(h)

    def encode_target(self, images: Tensor) -> Tensor:
        """Target features of all patches, [B, N, D], in the precision of the engine."""
        return self._encode(self.target, images)

    @torch.no_grad()
    def _encode(self, encoder: Encoder, images: Tensor) -> Tensor:
        with zero.autocast(self.engine, self.ranks.device):
            features: Tensor = encoder(images)
        return features

    # ---- what happens between steps ------------------------------------------------------------

    def _log(self) -> None:
        steps = self._means.steps / self.sizes.accumulation
        metrics = self._means.read(self.ranks.group)
        seconds = self._watch.lap()
        waited, self.loader.wait_s = self.loader.wait_s, 0.0
        if self._tracker is not None:
            lr, weight_decay, momentum = self.schedules.at(self.step - 1)
            norm = zero.gradient_norm(self.engine, self._norm)
            self._tracker.log(
                self.step,
                {
                    "epoch": round(self.step / self.steps_per_epoch, 4),
                    **metrics,
                    "lr": lr,
                    "wd": weight_decay,
                    "ema": momentum,
                    **({} if norm is None else {"grad_norm": norm}),
                    **self._features.read(),
                    **self._new_compilations(),
                    "images_per_s": round(steps * self.sizes.total / seconds, 2),
                    "data_wait_frac": round(waited / seconds, 4),
                },
            )
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLoss(
                f"the loss is {metrics['loss']} at step {self.step}; the last good checkpoint is "
                f"{checkpoints.latest_checkpoint(run_dir(self.config)) or 'none'}. Lower "
                f"optim.lr, lengthen optim.warmup_epochs, or set gradient_clipping in the "
                f"DeepSpeed file"
            )

    def _new_compilations(self) -> dict[str, int]:
        """``compilations`` so far, where there are more than in the last line."""
        known, self._compilations = self._compilations, compilations() - self._compiled_before
        return {"compilations": self._compilations} if self._compilations > known else {}

    def _save(self) -> None:
        norm = zero.gradient_norm(self.engine, self._norm)
        if not self._means.finite(self.ranks.group) or not math.isfinite(norm or 0.0):
            raise NonFiniteLoss(
                f"loss or gradient is not finite at step {self.step} (gradient norm {norm}); "
                f"nothing was saved, the last good checkpoint stays"
            )
        checkpoints.save_checkpoint(
            run_dir(self.config),
            self.step,
            self.engine,
            self.target,
            {
                "total_steps": self.total_steps,
                "global_batch": self.sizes.total,
                "data_digest": self.index.digest,
                "config": dump_config(self.config),
                "impl": self.impl,
                "attention": str(self.attention),
                "versions": checkpoints.versions(),
            },
            self.ranks,
            self.config.run.keep_checkpoints,
        )

    def _evaluated(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """The encoders of ``eval.which`` by the suffix of their keys. Every rank must call it.

        The context encoder is a copy outside of the engine: evaluating it moves nothing there.
        """
        which = self.config.eval.which
        found: dict[str, Encoder] = {} if which == "context" else {"": self.target}
        if which != "target":
            with zero.full_parameters(self.engine, self.online) as online:
                if self.evaluator is not None:
                    found["_context" if found else ""] = frozen_copy(self.target, online)
        return {suffix: partial(self._encode, encoder) for suffix, encoder in found.items()}

    def _evaluate(self) -> None:
        encoders = self._evaluated()
        if self.evaluator is not None and self._tracker is not None:
            scores: dict[str, Any] = {}
            with eagerly(self.compilation):
                for suffix, encode in encoders.items():
                    scores |= report(f"knn_top1{suffix}", self.evaluator.knn(encode))
            self._tracker.log(self.step, scores)
        self.ranks.barrier()

    def _summarise(self, images: int, seconds: float) -> dict[str, Any] | None:
        skipped = self.ranks.sum(self.loader.skipped)
        encoders = self._evaluated()
        if self._tracker is None or self.folder is None:
            self.ranks.barrier()
            return None
        self._tracker.end_bar()
        lines = [json.loads(x) for x in (self.folder.path / "metrics.jsonl").open()]
        losses = [line["loss"] for line in lines if "loss" in line]
        scores: dict[str, Any] = {}
        which = self.config.eval.which
        if self.evaluator is not None:
            names = {"both": "target and context encoder"}.get(which, f"{which} encoder")
            self._say(f"evaluating: {names}, untrained network, raw pixels")
            untrained = build_encoder(self.config).to(self.ranks.device).eval()
            with eagerly(self.compilation):
                for suffix, encode in encoders.items():
                    scores |= self.evaluator.final(encode, suffix)
                scores |= self.evaluator.floors(untrained)
        summary = {
            "recipe": self.config.recipe,
            "method": self.config.method,
            "steps": self.step,
            "images_per_s": round(images / seconds, 2),
            "loss_first": losses[0],
            "loss_last": losses[-1],
            "eval_which": which,
            **scores,
            "feature_std": lines[-1].get("feature_std"),
            "rankme": lines[-1].get("rankme"),
            "device": device_name(self.ranks.device),
            "impl": self.impl,
            "attention": str(self.attention),
            "compile": self.compilation.mode,
            "compilations": compilations() - self._compiled_before,
            "skipped_images": skipped,
            "seconds": round(seconds, 1),
        }
        self.folder.write_summary(summary)
        self._say(summary_table(summary))
        self._say(f"all numbers are in {self.folder.path / 'summary.json'}")
        self.ranks.barrier()
        return summary

    def _say(self, text: str) -> None:
        if self._tracker is not None:
            self._tracker.say(text)

    # ---- set-up --------------------------------------------------------------------------------

    def _claim(self, ds: dict[str, Any]) -> None:
        self.folder = RunFolder(self.config, ds)

    def _open_test_side(self) -> None:
        test = open_test_side(self.config, self.index)
        if test is not None:
            self.evaluator = Evaluator(self.config, self.index, test, self.ranks.device)

    def _resume(self) -> int:
        path = checkpoints.latest_checkpoint(run_dir(self.config))
        if path is None:
            log.warning(
                "run.resume=true, but %s has no checkpoint: starting at step 0",
                run_dir(self.config),
            )
            return 0
        state = checkpoints.load_checkpoint(
            path, self.engine, self.target, self.ranks, self.index.digest, self.sizes.total
        )
        return int(state["step"])

    def describe(self) -> str:
        """What will run, for the first lines of the log."""
        config, sizes, parts = self.config, self.sizes, self.parts
        trainable = sum(
            getattr(p, "ds_numel", p.numel()) for p in self.engine.parameters() if p.requires_grad
        )
        rows = {
            "run": f"{run_dir(config)} (recipe {config.recipe}, method {config.method})",
            "data": f"{self.index.n} images, {self.loader.backend} loader "
            f"({self.loader.backend_reason})",
            "batch": f"effective {sizes.total} = {sizes.micro} x {sizes.accumulation} accumulated "
            f"x {sizes.world} ranks",
            "steps": f"{self.step} of {self.total_steps} done, {self.steps_per_epoch} an epoch",
            "model": f"{config.model.encoder}/{config.model.patch_size} at "
            f"{config.data.image_size} px: {len(self.target.blocks)} blocks of width "
            f"{parts.encoder.width}; {trainable / 1e6:.2f} M trainable parameters in all",
            "predictor": f"{parts.predictor.depth} blocks of width {parts.predictor.width}, "
            f"context {config.model.predictor.context}",
            "device": device_name(self.ranks.device),
            "ops": ", ".join(f"{op}: {impl}" for op, impl in self.impl.items()),
            "attention": str(self.attention),
            "compile": str(self.compilation),
        }
        if config.mask.static_shapes:
            rows["shapes"] = ", ".join(
                f"{count} + {math.prod(target)}"
                for count, target in sorted({(n, t) for (t, _), n in self.masks.counts.items()})
            )
        return "\n".join(f"{name:>9}  {text}" for name, text in rows.items())


def choose_impls(config: Config, device: torch.device) -> dict[str, str]:
    """The implementation that will run for each op of this training.

    Raises:
        ConfigError: ``impl.default`` asks for one that cannot run here; says why.
    """
    try:
        ops = (*OPS, "vicreg") if config.vicreg.weight > 0 else OPS
        return {op: choose(op, config.impl.default, device) for op in ops}
    except RuntimeError as error:
        raise ConfigError(f"impl.default={config.impl.default}: {error}") from None


def check_vicreg_batch(config: Config, sizes: BatchSizes) -> None:
    """VICReg needs at least two images in the global micro-batch."""
    if config.vicreg.weight > 0 and sizes.micro * sizes.world < 2:
        raise ConfigError(
            f"vicreg.weight={config.vicreg.weight} compares images and needs a micro-batch of at "
            f"least 2 over all ranks, got {sizes.micro} x {sizes.world} ranks; raise "
            f"train_micro_batch_size_per_gpu or set vicreg.weight=0"
        )
