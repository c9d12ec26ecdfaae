"""The run: counts steps, and logs, saves, evaluates and stops between them."""

from __future__ import annotations

import logging
import math
import time
from contextlib import suppress
from typing import Any

from torch import Tensor

from njepa.config import dump_config
from njepa.data.bad_images import BadImages
from njepa.data.batch import Masks
from njepa.data.errors import DataError
from njepa.runs.checkpoints import checkpoint_step, latest_checkpoint, versions
from njepa.runs.collapse import CollapseAlarm, Collapsed
from njepa.runs.folder import run_dir
from njepa.runs.monitors import FeatureMonitor, MetricMeans, Stopwatch
from njepa.runs.place import at_step, here, phase
from njepa.runs.saving import CheckpointFailed, keep_saved
from njepa.runs.signals import Stopped, StopSignals
from njepa.runs.stopping import StopRequest
from njepa.runs.summary import SummaryFailed, device_name
from njepa.training.agreed_batches import agreed_batches
from njepa.training.compiling import compilations
from njepa.training.dumping import dump_bad_steps
from njepa.training.health import BadReading, BadSteps, NonFiniteLoss, StepNote
from njepa.training.scoring import Encoders
from njepa.training.setup import Setup
from njepa.training.start_table import start_table
from njepa.training.step import StepResult

log = logging.getLogger(__name__)


class Loop:
    """The training of one set-up; every rank runs it alike.

    Attributes:
        step: optimizer steps done.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup, self.step = setup, setup.first_step
        self._config, self._ranks = setup.plan.config, setup.plan.ranks
        self._length, self._recorder = setup.length, setup.recorder
        self._bad_images = BadImages(self._config.data, setup.index)
        self._means, self._features = MetricMeans(), FeatureMonitor()
        self._bad, self._watch = BadSteps(), Stopwatch()
        self._norm: Tensor | None = None  # of the last gradient
        self._alarm = CollapseAlarm("off", [])  # until the run begins
        self._compiled_before, self._compilations = compilations(), 0  # the second: in the log

    def run(self, signals: StopSignals | None = None) -> dict[str, Any] | None:
        """Train to the end; returns the summary on rank 0, None after ``run.stop_after``.

        Raises:
            Stopped: ``signals`` asked for it, and nothing is lost.
            NonFiniteLoss: too many steps in a row had no finite loss and gradient.
            DataError: the loader cannot go on; the steps done are saved.
            Collapsed: with ``run.on_collapse=stop``; the steps done are saved.
            ConfigError: the run folder cannot be written. SummaryFailed: at the end, alone.
        """
        say, total = self._recorder.say, self._length.total_steps
        stop, first_step = StopRequest(self._ranks, signals), self.step
        try:
            self._ranks.on_main(lambda: self._recorder.begin(first_step, total))
            self._alarm = CollapseAlarm(self._config.run.on_collapse, self._recorder.lines())
            say(start_table(self.setup))
            began = time.perf_counter()
            if signals is not None:
                signals.lost = self._lost
            self._watch.lap()
            asked = stop.agreed_now() or self._train(stop)
            here.phase = "ending"
            self.setup.writer.finish()
            if asked or self.step < total:
                where = "before the first step"
                if self.step:
                    where = f"after step {self.step} of {total}; the checkpoint is in"
                say(f"stopped {where} {run_dir(self._config)}; continue with run.resume=true")
                if asked:
                    raise Stopped
                return None
            images = (self.step - first_step) * self.setup.plan.sizes.total
            summary = self._summarise(stop, images, time.perf_counter() - began)
            self._report()
            if told := self._ranks.on_main(lambda: self._recorder.unwritten):
                raise SummaryFailed(f"{told}; make room, and run.resume=true writes it")
            return summary
        except (NonFiniteLoss, Collapsed):
            self._report()
            raise
        except DataError:
            if self.setup.engine.between_steps:  # on all ranks or on none
                self._save()
                with suppress(CheckpointFailed):  # it was said; the images are the end
                    self.setup.writer.finish()  # a launcher ends the others when one has ended
            raise
        except KeyboardInterrupt:  # in haste
            self.setup.writer.abandon()
            raise
        finally:
            stop.close()
            self.setup.close()

    def _train(self, stop: StopRequest) -> bool:
        """Step until the end or a stop; log, save and evaluate in between.

        Returns:
            Whether a signal asked to stop.
        """
        run, every_eval = self._config.run, self._config.eval.every
        every_save = run.checkpoint_every or self._length.steps_per_epoch
        asked = last = False
        while self.step < self._length.total_steps and not last:
            self.advance()
            asked = stop.agreed()
            last = asked or self.step in (run.stop_after, self._length.total_steps)
            self._recorder.advance()
            collapse = None
            if self.step % run.log_every == 0 or self.step == 1 or last:
                self._log()
                collapse = self._alarm.rings(self._ranks)
            pause = time.perf_counter()
            if self.step % every_save == 0 or last or collapse:
                with phase("saving"):
                    self._save()
            if collapse:
                self._keep_collapsed(collapse, last)
            if every_eval and self.step % every_eval == 0 and not last:
                with phase("evaluating"):
                    self._evaluate(stop)
            self._watch.pause(time.perf_counter() - pause)
        return asked

    def advance(self) -> StepResult:
        """One optimizer step, and the notes of the monitors on it."""
        at_step(self.step + 1)
        rates = self._length.schedules.at(self.step)
        accumulation = self.setup.plan.sizes.accumulation
        batches = agreed_batches(self.setup.loader, self._ranks, accumulation, self.step + 1)
        result = self.setup.take_step(batches, rates)
        terms = [seen.metrics for seen in result.micro_batches]
        self._bad.add(StepNote(self.step, result.update.bad, terms, result.update.norms))
        self.step += 1
        for seen in result.micro_batches:
            counts = token_counts(seen.masks)
            self._means.add(
                seen.metrics, result.update.bad, **counts, context_cut_frac=seen.cut_frac
            )
            self._features.add(seen.features)
            if self.setup.online_probe is not None:
                self.setup.online_probe.add(seen.features, seen.sample_ids)
        self._norm = result.update.norm
        return result

    def _log(self) -> None:
        steps = self._means.steps / self.setup.plan.sizes.accumulation
        metrics = self._means.read(self._ranks.group)
        reading = self._bad.read()
        bad = len(reading.notes)
        loader, seconds = self.setup.loader, self._watch.lap()
        waited, loader.wait_s = loader.wait_s, 0.0
        skipped = self._count_skipped()
        rates = self._length.schedules.at(self.step - 1)
        self._recorder.log(
            self.step,
            lambda: {
                "epoch": round(self.step / self._length.steps_per_epoch, 4),
                **metrics,
                "lr": rates.lr,
                "wd": rates.weight_decay,
                "ema": rates.momentum,
                **self._gradient_norm(),
                **self._alarm.see(self.step, self._features.read()),
                **(self.setup.online_probe.read() if self.setup.online_probe else {}),
                **self._new_compilations(),
                **({"bad_steps": bad} if bad else {}),
                **({"skipped_images": skipped} if skipped else {}),
                "images_per_s": round(steps * self.setup.plan.sizes.total / seconds, 2),
                "data_wait_frac": round(waited / seconds, 4),
            },
        )
        if bad:
            self._judge(reading, steps)
        self._bad_images.check()

    def _count_skipped(self) -> int:
        """Images that were replaced since the last line, on all ranks; ``_bad_images`` learns."""
        mine, self.setup.loader.skipped = self.setup.loader.skipped, []
        count = self._ranks.sum(len(mine))
        if count:
            for samples in self._ranks.gather(mine):
                self._bad_images.add(samples)
        return count

    def _keep_collapsed(self, told: str, last: bool) -> None:
        """The features collapse: keep the checkpoint of this step, say so, perhaps stop."""
        kept = keep_saved(self.setup.writer, run_dir(self._config), self.step, self._ranks)
        if self._config.run.on_collapse == "stop" and not last:
            raise Collapsed(
                f"{told}; {kept}; run.resume=true run.on_collapse=warn goes on from here"
            )
        log.warning("%s; %s", told, kept)

    def _judge(self, reading: BadReading, steps: float) -> None:
        """Some of the last ``steps`` steps were bad: say so, write them down, perhaps give up."""
        log.warning(
            "%d of the last %g steps up to step %d had no finite loss and gradient and were "
            "skipped, %d of them in a row",
            len(reading.notes),
            steps,
            self.step,
            reading.in_a_row,
        )
        dump_bad_steps(self.setup, reading.notes)
        if reading.in_a_row >= self._config.run.max_bad_steps:
            raise NonFiniteLoss(
                f"loss or gradient was not finite in {reading.in_a_row} steps in a row up to step "
                f"{self.step} (run.max_bad_steps={self._config.run.max_bad_steps})",
                self.step,
                reading.row_began,
            )

    def _gradient_norm(self) -> dict[str, float]:
        """``grad_norm`` of the last step, before clipping; none of a step that was skipped."""
        norm = math.nan if self._norm is None else float(self._norm)
        return {"grad_norm": norm} if math.isfinite(norm) else {}

    def _new_compilations(self) -> dict[str, int]:
        """``compilations`` so far, where there are more than in the last line."""
        known, self._compilations = self._compilations, compilations() - self._compiled_before
        return {"compilations": self._compilations} if self._compilations > known else {}

    def _save(self) -> None:
        plan, engine = self.setup.plan, self.setup.engine
        sharding = engine.sharding()
        self.setup.writer.save(
            self.step,
            sharding.pieces(),
            self.setup.state.target.state_dict(),
            {
                "total_steps": self._length.total_steps,
                "global_batch": plan.sizes.total,
                "micro": plan.sizes.micro,
                "accumulation": plan.sizes.accumulation,
                "zero_stage": engine.stage,
                "shared": sharding.shared(),
                "data_digest": self.setup.index.digest,
                "config": dump_config(self._config),
                "impl": {op: choice.name for op, choice in plan.impl.items()},
                "attention": str(plan.attention),
                "precision": plan.precision.name,
                "versions": versions(),
            },
        )

    def _lost(self) -> str | None:
        """What the checkpoints do not have, for people."""
        last = latest_checkpoint(run_dir(self._config))
        steps = self.step - (checkpoint_step(last) if last else 0)
        if steps <= 0:
            return None
        return f"{steps} steps are lost, the last good checkpoint is {last or 'none'}"

    def _evaluate(self, stop: StopRequest) -> None:
        """Left unfinished where rank 0 is asked to stop: the checkpoint comes first."""
        encoders = self._encoders(stop)
        with suppress(Stopped):
            self._recorder.log(self.step, lambda: self.setup.scoring.knn(encoders))
        self._ranks.barrier()

    def _encoders(self, stop: StopRequest) -> Encoders:
        """Collective."""
        encoders = self.setup.scoring.encoders()
        return {suffix: stop.until_asked(encode) for suffix, encode in encoders.items()}

    def _summarise(self, stop: StopRequest, images: int, seconds: float) -> dict[str, Any] | None:
        scoring, plan, config = self.setup.scoring, self.setup.plan, self._config
        encoders, device = self._encoders(stop), self._ranks.device

        def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
            losses = [line["loss"] for line in lines if "loss" in line] or [None]
            which = config.eval.which
            if scoring.evaluator is not None:
                names = {"both": "target and context encoder"}.get(which, f"{which} encoder")
                self._recorder.say(f"evaluating: {names}, untrained network, raw pixels")
            return {
                "recipe": config.recipe,
                "method": config.method,
                "steps": self.step,
                "images_per_s": round(images / seconds, 2),
                "loss_first": losses[0],
                "loss_last": losses[-1],
                "eval_which": which,
                **scoring.final(encoders, device),
                "feature_std": lines[-1].get("feature_std"),
                "rankme": lines[-1].get("rankme"),
                "device": device_name(device),
                "impl": {op: choice.name for op, choice in plan.impl.items()},
                "attention": str(plan.attention),
                "precision": plan.precision.name,
                "compile": plan.compilation.name,
                "compilations": compilations() - self._compiled_before,
                "skipped_images": sum(line.get("skipped_images", 0) for line in lines),
                "seconds": round(seconds, 1),
            }

        summary: dict[str, Any] | None = None
        with suppress(Stopped):
            summary = self._recorder.finish(summarise)
        if stop.agreed_now() and self._ranks.on_main(lambda: summary is None):
            self._recorder.say(
                f"stopped in the evaluation after the last step; {run_dir(self._config)} has the "
                f"checkpoint; run.resume=true evaluates it"
            )
            raise Stopped
        return summary

    def _report(self) -> None:
        """Draw the run folder on rank 0, while the others wait; a failure there is a warning."""
        if self._config.eval.report and self._ranks.main:
            from njepa.report.write import report_of_run  # what draws is needed here only

            folder = run_dir(self._config)
            if title := report_of_run(folder, self._ranks.device):
                self._recorder.say(f"health: {title}; curves and pictures: {folder}/report.html")
        self._ranks.barrier()


def token_counts(masks: Masks) -> dict[str, float]:
    """Tokens of a micro-batch per image and per target block."""
    context_idx, target_idx, lengths = masks
    context = float(context_idx.shape[-1])
    if lengths is not None:
        context = sum(lengths.counts) / len(lengths.counts)
    return {"k_context": context, "k_target": target_idx.shape[-1]}
