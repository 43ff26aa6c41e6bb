"""What surrounds a training loop: folder, resume, log, bad samples, signals, the NaN guard, progress, saving.

A Run is no trainer. It never calls the model, the loss, backward() or optimizer.step(). A stage does:

    with Run(cfg) as run:
        run.resume(cfg)                                                 # what there is to go on from
        run.check_data(fingerprint)                                     # it is the same data
        run.restore_model(model)
        run.restore_optimizer(optimizer)
        run.open(num_images)                                            # the folder
        run.begin(schedule, stream, train_set, model, optimizer, ...)
        for step in run.steps():
            for batch in run.micro_batches(batches):
                with run.accumulate(trained):                           # ranks add up gradients once per step
                    ...
                    micro_loss.backward()
            run.guard(loss, lr, grad_norm)                              # NaN, Inf: no step changes a weight
            optimizer.step()
            optimizer.zero_grad()
            run.end_step(loss, lr, grad_norm)                           # logs, saves, stops where that is due
        run.finish(metrics, text)
"""

import contextlib
import functools
import hashlib
import math
from dataclasses import asdict, dataclass

from mff_min.config import knob
from mff_min.errors import UserError
from mff_min.optim import load_optimizer
from mff_min.probe import shown
from mff_run import small
from mff_run.finite import FiniteSteps
from mff_run.flops import peak_img_per_s, product_tflops
from mff_run.log import BadSamples, Log
from mff_run.process import Interrupted, Stopped, StopSignals
from mff_run.progress import Meter
from mff_run.resume import (
    check_same_data,
    load_state,
    open_folder,
    record,
    resumed_state,
    save_run,
    warn_of_space,
)
from mff_run.sharded import full_tensor, maybe_no_sync, own_part
from mff_run.state import check_optimizer, check_scaler
from mff_run.world import start_world

HINT = ("--resume auto goes on from the last checkpoint; --allow-change clip_grad,lr,dtype with --clip-grad, "
        "a lower --lr or --dtype float32 may help")
SLOW = 1e11                                                             # FLOPs: a second or more of a CPU


@dataclass(frozen=True)
class RunFlags:
    """The flags of every stage that do not change its result; a stage adds its own output_dir."""
    resume: str = knob("", "auto: go on where output_dir stopped, if it did; or a checkpoint file")
    allow_change: str = knob("", "comma-separated settings that may differ from the resumed run's")
    workers: int = knob(0, "loader processes for each training process", least=0, most=1024)
    max_bad: float = knob(0.01, "share of the images that may be unreadable before the run stops", least=0)
    device: str = knob("auto", "auto, cpu, cuda or cuda:N")
    ops: str = knob("auto", "implementation of the kernels", choices=["auto", "torch", "triton"])
    deterministic: bool = knob(False, "the same bits in every run on a GPU too, for some speed")
    compile: bool = knob(False, "torch.compile the model; of a probe, the encoder")
    timeout: float = knob(600.0, "seconds that a step waits for another rank or a loader process", above=0)
    log_every: int = knob(20, "steps between lines of the log", above=0)
    save_every: int = knob(500, "steps between checkpoints", above=0)
    cache_dir: str = knob("runs/cache", "where the embedded images are kept")
    small: bool = knob(False, "settings for a small machine where a flag gives no other; the default for "
                              "pre-training vit_test and vit_t")

    @classmethod
    def from_flags(cls, **given):
        """The configuration of the flags that were given. The stage's small_settings says what --small is."""
        cfg = cls(**given)
        by_default = getattr(cfg, "model", "") in small.BY_DEFAULT
        return small.complete(cfg, given, cfg.small_settings, by_default)


class Run:
    """One run of a stage on this process, from its flags; a context.

    world says who this process is. state is what the run goes on from, or None; begin drops it, since it may
    be gigabytes. start is the step that the run goes on from. folder is the run's, after open.
    """

    def __init__(self, cfg):
        self.cfg, self.state, self.start, self.loss = cfg, None, 0, math.nan
        self.data, self.meter, self.step, self.more = None, None, None, False

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            cfg = self.cfg
            self.world = stack.enter_context(start_world(cfg.device, cfg.deterministic, cfg.timeout))
            self.signals = stack.enter_context(StopSignals())
            self.device, self.say = self.world.device, self.world.say
            self.leave = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self.leave.__exit__(*error)

    # ------------------------------------------------------------ before the loop

    def resume(self, cfg):
        """Read what the run goes on from, if it does: state, the same on all ranks. The folder is now ours.

        cfg is the configuration, completed by the encoder's checkpoint. Raises UserError, as resumed_state
        does.
        """
        self.cfg, self.state = cfg, resumed_state(cfg, self.world)
        if self.state:
            self.start, self.loss = self.state["step"], self.state["loss"]

    def check_data(self, fingerprint):
        """Raise UserError where a resumed run would go on with images of another fingerprint.

        Also where another rank sees other images, as where a disk is not mounted on its host.
        """
        seen = self.world.all_gather((len(fingerprint), hashlib.sha256(fingerprint.numpy()).hexdigest()))
        if len(set(seen)) > 1:
            raise UserError(f"the processes see different images, in numbers {[count for count, _ in seen]}: "
                            f"--data must hold the same on all hosts; is a disk not mounted on one?")
        self.data = fingerprint
        check_same_data(self.cfg, self.state, fingerprint)

    def restore_model(self, model, part="model"):
        """Load the parameters that the run goes on from, if it does. UserError where they do not fit."""
        if self.state and part in self.state:
            load_state(model, self.state[part], f"the checkpoint in {self.cfg.output_dir}")

    def restore_optimizer(self, optimizer, scaler=None):
        """Load what the run goes on from, if it does; of sharded parameters this rank's part.

        Raises UserError where it is not what this optimizer would have saved.
        """
        if self.state:
            check_optimizer(self.state, optimizer)
            load_optimizer(optimizer, own_part(self.state["optimizer"], optimizer))
            saved = self.state.get("scaler")                            # empty unless it was float16
            if scaler and scaler.is_enabled() and saved:
                check_scaler(saved, scaler)
                scaler.load_state_dict(saved)

    def open(self, num_images):
        """Make the run's folder ready. --max-bad is a share of so many images. Raises UserError."""
        self.folder = open_folder(self.cfg, self.world, self.state)
        if self.cfg.small and (flags := small.taken(self.cfg, self.cfg.small_settings)):
            self.say(f"for a small machine: {flags} (--no-small: the paper's settings)")
        self.bad_samples = BadSamples(self.folder, self.world, num_images, self.cfg.max_bad)

    def begin(self, schedule, stream, source, model, optimizer, scaler=None, *, flops, dtype, advice,
              hint=HINT, copies=3, **kept):
        """Prepare the loop; the folder is open.

        source has the names of the samples that stream orders. flops is the work of one image: the log's mfu
        uses it, with the matrix rate in dtype. advice is printed where data is late, hint where a loss is not
        finite. A checkpoint is `copies` times as large as the model. kept are functions, by name, that return
        what else a checkpoint holds.
        """
        world = self.world
        if self.start > schedule.stop:
            raise UserError(f"the run in {self.folder} has come to step {self.start}, and these flags end it "
                            f"at {schedule.stop}: expected more steps, or another --output-dir")
        self.schedule, self.model, self.optimizer, self.scaler = schedule, model, optimizer, scaler
        self.flops, self.dtype, self.advice, self.hint, self.kept = flops, dtype, advice, hint, kept
        warn_of_space(self.folder, world, model, copies)
        self.log = Log(self.folder, world, self.start)
        half, skips = bool(scaler and scaler.is_enabled()), (self.state or {}).get("skips")
        self.finite = FiniteSteps(optimizer, world, self.folder, stream, source, hint, half, skips)
        self.state = None

    # ------------------------------------------------------------ the loop

    def steps(self):
        """The numbers of the steps that are left, from 0. In between, a signal is only noted."""
        peak = peak_img_per_s(self.flops, self.dtype, self.world)
        self.meter = Meter(self.schedule, self.start, self.world, peak, self.advice,
                           functools.partial(small.instead, self.cfg))
        micro_batch = self.flops * self.schedule.images_at_once / self.world.size
        if self.device.type == "cpu" and micro_batch > SLOW:            # else the first steps tell it at once
            rate = product_tflops(self.device, self.dtype, side=512, seconds=0.1)
            self.meter.foresee(micro_batch / rate / 1e12, rate)
        self.signals.start()
        for step in range(self.start, self.schedule.stop):
            self.step, self.world.step = step, step + 1
            yield step
        self.signals.release()

    def micro_batches(self, batches):
        """This step's micro-batches. A signal ends the run before the next one: a step may take minutes.

        The wait for one may take for ever, where a disk hangs: a signal ends it too.
        """
        buffers = []                                                    # each pass changes BatchNorm's
        if self.schedule.accumulation > 1:                              # else there is none before the first
            buffers = [buffer.clone() for buffer in self.model.buffers()]
        for micro in range(self.schedule.accumulation):
            with contextlib.suppress(Interrupted), self.signals.interrupting():
                batch = self.meter.next(batches)
            if number := self.world.max(self.signals.number):
                for buffer, before in zip(self.model.buffers(), buffers, strict=bool(buffers)):
                    buffer.copy_(before)
                self.save(self.step)
                raise Stopped(number, self.step, self.schedule.stop, self.folder)
            self.bad_samples.add(batch["bad"])
            self.more = micro + 1 < self.schedule.accumulation
            yield batch

    def accumulate(self, trained):
        """A context for a micro-batch's passes: ranks add up gradients with the step's last one alone."""
        return maybe_no_sync(trained, self.more)

    def guard(self, loss, lr, grad_norm):
        """Once a loss or gradient was not finite on any rank, let the optimizer's steps change nothing."""
        self.finite.guard(self.step + 1, lr, loss, grad_norm)

    def end_step(self, loss, lr, grad_norm, save=False, **values):
        """Log, save and stop where that is due after an optimizer step; save: it is due in any case.

        loss is this rank's, a tensor; values are functions that return tensors for the log, by name.
        Only steps that are logged or saved wait for the device.
        """
        done, cfg = self.step + 1, self.cfg
        ends, logs = done == self.schedule.stop, done % cfg.log_every == 0 or done == 1
        saves = done % cfg.save_every == 0 or ends or save
        stops = saves and self.world.max(self.signals.number)           # before an evaluation
        if logs or saves:
            self.finite.check()
            self.loss = self.world.mean([loss.item()])[0]
            self.bad_samples.report(self.meter.say)
        if logs:
            more = {name: full_tensor(value()).tolist() for name, value in values.items()}
            self.log.write(step=done, epoch=self.schedule.epoch(done), loss=self.loss, lr=lr,
                           grad_norm=grad_norm.item(), **self.finite.counted(),
                           **self.meter.read(done, self.loss, lr), **more)
        if saves:
            self.save(done)
        if stops:
            raise Stopped(stops, done, self.schedule.stop, self.folder)

    def save(self, step):
        """Write last.pt: all that the run needs to go on from this step."""
        self.finite.check()
        more = {name: value() for name, value in self.kept.items()}
        save_run(self.folder, self.world, self.model, step, self.hint, loss=self.loss,
                 config=asdict(self.cfg), data=self.data, optimizer=self.optimizer.state_dict(),
                 scaler=self.scaler.state_dict() if self.scaler else {}, skips=self.finite.skips, **more)

    def is_due(self, every):
        """Whether this step ends the run, or its number is a multiple of `every`."""
        done = self.step + 1
        return done % every == 0 or done == self.schedule.stop

    # ------------------------------------------------------------ evaluations

    def evaluation_missed(self, was_due):
        """Whether the run was stopped after a save, before the evaluation that was due with it."""
        return 0 < self.start < self.schedule.stop and was_due and not self.log.evaluated

    def paused(self):
        """A context whose time counts neither as training nor as waiting for data."""
        return self.meter.paused() if self.meter else contextlib.nullcontext()

    def note_accuracy(self, done, evaluate, shown=shown):
        """Log and print what evaluate() returns after so many steps, which are saved: a signal ends it.

        shown(metrics) is their text.
        """
        try:
            with self.paused(), self.signals.interrupting():
                metrics = evaluate()
        except Interrupted:
            raise Stopped(self.signals.number, done, self.schedule.stop, self.folder) from None
        self.log.write(step=done, epoch=self.schedule.epoch(done), **metrics)
        (self.meter or self.world).say(f"epoch {self.schedule.epoch(done):.1f}: {shown(metrics)}")

    def record(self, metrics):
        """Write metrics.json: what was measured, with the flags and the environment."""
        record(self.folder, self.cfg, self.world, metrics)

    def finish(self, metrics, text):
        """Log, print and record what the run ended with."""
        self.log.write(done=True, **metrics)
        self.meter.say(f"done: {text}")
        self.record(metrics)
