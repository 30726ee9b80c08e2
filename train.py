"""Train a mixture-of-experts language model: without a flag preset tiny, on the bundled Shakespeare, in minutes on a
laptop's CPU.

python train.py --preset debug                seconds: does it work here?
python train.py --data my-text.txt            your own text
python train.py --out out/tiny --resume auto  go on where it stopped
python train.py --model.n-routed-experts 16   any field by its name
"""

import argparse
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import moe
from moe.checkpoint import Run, RunFolder, State, folder_of, open_run, read_state
from moe.config import ConfigError, MoeError, RunConfig
from moe.corpus import prepare
from moe.data import Batches, TokenStream
from moe.lab.report.make import make_report
from moe.lab.score import check_length, evaluate
from moe.machine.command import out_of_memory, print_anything
from moe.machine.device import resolve, reuse_memory, working_losses
from moe.machine.display import Display, Eta, Pace
from moe.machine.flags import build, checked, flags_of
from moe.machine.help import Manual, help_if_asked, without_help
from moe.machine.nearest import instead_of
from moe.machine.outcome import outcome
from moe.machine.peak import peak_of
from moe.machine.plan import Forecast, memory_warning, model_warnings, plan, preset_lines
from moe.machine.reproduce import random_state, set_random_state
from moe.machine.signals import Requests
from moe.machine.start import begun, check_unchanged, default_folder, fit_vocabulary, is_to_be_resumed, starting_from
from moe.machine.stored import MODEL, CheckpointError
from moe.machine.tracking import Wandb
from moe.machine.weights import load_model, tensors_of
from moe.metrics import CollapseAlarm, MetricsLog, load_record, routing_record
from moe.model import Transformer
from moe.optim import Average, Optimizers, accumulate, clip_gradients, gradient_norm, mtp_weight, not_finite
from moe.presets import presets
from moe.tokenizer import Tokenizer


class TrainingError(MoeError):
    """A training that cannot go on."""


@dataclass(frozen=True)
class Session:
    """What holds for this start only and is not stored with the run."""

    out: Path | None = None  # the run's folder; by default out/PRESET, then out/PRESET-2, and so on
    resume: Literal["never", "auto", "must"] = (
        "never"  # auto: continue the run in the folder, if there is one; must: or refuse
    )
    wandb: Literal["off", "offline", "online"] = "off"  # the curves to Weights & Biases as well
    plain: bool = False  # lines instead of a progress bar
    quiet: bool = False  # only what went wrong
    plan: bool = False  # say what the training would take, by three steps of it that leave nothing behind, and stop
    report: bool = True  # at the end, a page with curves, experts and a text coloured by them
    list_presets: bool = False  # say what presets there are, and stop


@dataclass(frozen=True)
class Arguments:
    session: Annotated[Session, tyro.conf.arg(name="")] = field(default_factory=Session)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)


EVERYDAY = {
    "The run": ("--preset", "--data", "--out", "--resume", "--init-from", "--seed"),
    "Its length": ("--steps", "--minutes", "--tokens-per-step"),
    "The machine": ("--device", "--dtype", "--compile", "--deterministic"),
    "Watching": ("--plan", "--plain", "--quiet", "--report", "--wandb", "--list-presets"),
}
MANUAL = Manual("python train.py", __doc__ or "", EVERYDAY)


def parse(arguments: list[str]) -> tuple[Session, RunConfig, RunFolder]:
    """The command line, over the preset it names or over the configuration of the run it continues."""
    given = checked(without_help(arguments), flags_of(Arguments), MANUAL.usage)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--out", "--resume", "--init-from", "--steps", "--minutes"):
        first.add_argument(name)
    known, _ = first.parse_known_args(given)
    name = known.preset or "tiny"
    if name not in presets():
        raise ConfigError(f"--preset {name} is not known: {instead_of(name, presets())}")
    folder = RunFolder(Path(known.out)) if known.out else default_folder(name, new=known.resume in (None, "never"))
    stored = None
    if known.resume in ("auto", "must") and folder.checkpoints():
        folder.check_continuable()
        stored = folder.read_setup()[0]
    base = stored if stored and known.preset in (None, stored.preset) else presets()[name]
    if known.init_from and not stored:  # the model is that run's, unless told otherwise
        base = starting_from(folder_of(Path(known.init_from))[0].read_setup()[0].model, base)
    if known.steps and known.minutes:
        raise ConfigError("--steps and --minutes exclude each other: give the length that shall count")
    if known.steps:
        base = replace(base, minutes=None)
    start = Arguments(Session(), base)
    help_if_asked(arguments, MANUAL, flags_of(Arguments, start))
    asked = build(Arguments, given, start)
    if stored:
        check_unchanged(stored, asked.run, folder)
    return asked.session, asked.run, folder


def train(session: Session, config: RunConfig, folder: RunFolder, display: Display, requests: Requests) -> None:
    # -- the run's folder, and how to compute --------------------------------------------------------------------------
    if not session.plan:  # which writes nothing
        folder.acquire()
    resuming, state = is_to_be_resumed(folder, session.resume), State()
    if resuming:
        stored, runtime, reasons, kept = begun(folder, config)
        state = read_state(folder.checkpoints()[-1])
        if state.progress(config) >= 1:
            return display.say(f"finished {folder.path} has made its {state.step:,} steps: nothing to do")
    else:
        if not session.plan:
            folder.clear()
        runtime, reasons = resolve(config)
    torch.set_num_threads(runtime.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(config.deterministic)
    if runtime.device == "cpu":
        reuse_memory()

    # -- text ----------------------------------------------------------------------------------------------------------
    start = open_run(config.init_from) if config.init_from and not resuming else None
    tokenizer = start.tokenizer if start else None
    if config.init_from and resuming:  # the weights are the run's own by now, and so is the tokenizer
        tokenizer = Tokenizer.load(folder.path / "tokenizer.json")
    corpus = prepare(config.data, tokenizer=tokenizer, advance=display.advance)
    display.close()
    identity = {"text": corpus.hash, "tokenizer": corpus.tokenizer.hash}
    if resuming and kept != identity:
        raise CheckpointError(f"{config.data.source} is not the text that {folder.path} began with: give that one back")
    config = fit_vocabulary(config, corpus.tokenizer.vocab_size)
    if not resuming:
        runtime, reasons = resolve(config)  # again: now the vocabulary is known
    if (warning := memory_warning(config, runtime)) is not None:
        display.warn(warning)
    peak = peak_of(runtime.device, runtime.torch_dtype)  # before a model fills the memory
    training, validation, test = (TokenStream(corpus, split) for split in ("train", "val", "test"))
    check_length(validation, config.train.sequence_length)
    characters_per_token = corpus.characters("train") / corpus.tokens("train")

    # -- model and optimizer -------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    model = Transformer(config.model)
    if start:
        load_model(model, start.checkpoint / MODEL, optional="mtp.")
        had, has = start.config.model.num_nextn_predict_layers, config.model.num_nextn_predict_layers
        if had != has:
            display.warn(f"notice: {config.init_from} has {had} modules of multi-token prediction, this run has {has}")
    model.to(runtime.device)
    optimizers = Optimizers(model, config.optim, runtime.torch_dtype)
    average = Average(model, config.optim.ema_decay)
    intended = runtime
    losses_of, runtime = working_losses(model, config, runtime, not resuming, display.warn)
    for name in (name for name in reasons if getattr(runtime, name) != getattr(intended, name)):
        reasons[name] = "found by trying"
    if resuming:
        state = folder.restore(model, optimizers, average)
    window, micro_batches = config.train.sequence_length, config.train.sequences_per_step // runtime.micro_batch_size
    batches = Batches(training, runtime.micro_batch_size, window, config.seed, state.cursor)

    # -- what is planned, and where it is written down -----------------------------------------------------------------
    planned = {"run": str(folder.path), **plan(config, runtime, reasons, corpus, peak)}
    for name, fact in planned.items():
        display.say(f"{name:8} {fact}")
    for warning in model_warnings(config):
        display.warn(warning)
    forecast, eta = Forecast(config, len(training), runtime.device), Eta(state.progress(config))
    alarm = CollapseAlarm(config.model.num_experts_per_tok, state.balance, model.moe_layer_numbers())
    lowest = {tokens: loss for tokens, (loss, _) in folder.best().items()}
    if not session.plan:
        if not resuming or config != stored or runtime != intended:
            folder.write_setup(config, runtime, corpus.tokenizer, identity, peak.flops)
        log = MetricsLog(folder.metrics, keep_steps=state.step)
        settings = asdict(config) | {"runtime": asdict(runtime), "peak_flops": peak.flops}
        tell = display.say, display.warn
        wandb = Wandb(session.wandb, folder.path, settings, *tell, alarm.layers, resuming, session.quiet)
        display.start(folder.path.name, numbers=alarm.layers)
    if resuming:
        set_random_state(state.rng)
    requests.listen()
    model.train()

    # -- the loop ------------------------------------------------------------------------------------------------------
    began = time.perf_counter()
    while True:
        parts, weight = config.train.parts(state.progress(config)), mtp_weight(state.progress(config), config.optim)
        step_batches = [batches.next(runtime.device, parts) for _ in range(micro_batches)]
        losses = accumulate(losses_of, step_batches, runtime.autocast, model, weight)
        loss, norm, load, lr_share, skipped = losses.loss.item(), gradient_norm(model), None, 0.0, 0
        trouble = not_finite(model, loss, norm.item())
        if trouble is None:
            clip_gradients(model, config.optim.grad_clip, norm)
            lr_share = optimizers.step(state.progress(config))
            if losses.routing is not None:
                model.update_expert_bias(losses.routing.load)
                load = losses.routing.load.cpu()
            average.update(state.step)
        elif (skipped := state.skipped + 1) > config.train.skip_non_finite:
            raise TrainingError(
                f"step {state.step + 1}: {trouble}, so training stops; the last checkpoint in {folder.path} is "
                "untouched. Lower --optim.muon-lr and --optim.adam-lr"
            )
        else:
            display.warn(f"step {state.step + 1} is left out: {trouble}")
        optimizers.zero_grad()
        took, began = time.perf_counter() - began, time.perf_counter()
        tokens, seconds = state.tokens + config.train.tokens_per_step, state.seconds + took
        state = replace(
            state, step=state.step + 1, tokens=tokens, seconds=seconds, skipped=skipped, val_loss=None, val_tokens=0
        )

        done, speed = state.progress(config) >= 1, config.train.tokens_per_step / took
        enough = forecast.step(took, parts) or done
        if enough and (session.plan or not done):
            display.say(f"time     {forecast.line(state)}")
        if session.plan:
            if enough or requests.end:
                return display.say("next     the same without --plan: of this nothing is kept")
            continue
        record = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "loss": loss,
            **{f"mtp_{depth}_loss": term for depth, term in enumerate(losses.mtp.tolist(), 1)},
            "nats_per_character": loss / characters_per_token,
            "grad_norm": norm.item(),
            "lr_share": lr_share,
            **routing_record(
                losses.routing, detailed=done or state.step == 1 or every(config.train.log_interval, state.step)
            ),
            "skipped": skipped,
        }
        if done or every(config.train.eval_interval, state.step):
            with average.applied():
                limit = 0 if done else config.train.eval_tokens
                score, val_load = evaluate(model, validation, window, runtime.autocast, limit)
                if done and len(test):
                    record |= evaluate(model, test, window, runtime.autocast)[0].record("test")
            record |= score.record() | {f"val_{name}": value for name, value in load_record(val_load).items()}
            if math.isfinite(price := record["val_loss"]):
                state = replace(state, val_loss=price, val_tokens=score.tokens)
            else:
                display.warn(f"step {state.step}: the validation loss is {price}")
            began = time.perf_counter()  # the training clock counts all but evaluation and saving
        log.write(record)
        pace = Pace(
            state.progress(config), speed, forecast.flops[parts] / took / peak.flops, eta(state.progress(config))
        )
        wandb.log(record, {"tokens_per_second": speed, "utilisation": pace.utilisation})
        display.step(record, pace, load)
        if not skipped and (warning := alarm.check(load)) is not None:
            display.warn(warning)
        folder.saved(patient=False)
        ending, improved = done or requests.end, False
        if state.val_loss is not None and state.val_loss < lowest.get(state.val_tokens, math.inf):
            lowest[state.val_tokens], improved = state.val_loss, config.train.keep_best
        if ending or improved or requests.save or every(config.train.save_interval, state.step):
            requests.save = False
            broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
            if broken:
                raise TrainingError(
                    f"step {state.step}: {broken[0]} is no longer finite, so this is not saved; the last checkpoint in "
                    f"{folder.path} is untouched. Lower --optim.muon-lr and --optim.adam-lr"
                )
            epoch, place = batches.cursor.epoch, batches.cursor.window
            state = replace(state, epoch=epoch, window=place, rng=random_state(), balance=alarm.streaks)
            with average.applied():
                folder.save_meanwhile(
                    tensors_of(model), chain(optimizers.state(), average.state()), state, config.train
                )
            began = time.perf_counter()
        if ending:
            break
    folder.saved()
    display.close()

    # -- what came of it -----------------------------------------------------------------------------------------------
    if not done:
        wandb.close()
        again = f"python train.py --out {folder.path} --resume auto"
        return display.say(f"\nstopped and saved after step {state.step:,}; go on with: {again}")
    for line in outcome(folder, state, record):
        display.say(line)
    run = Run(model.eval(), corpus.tokenizer, config, folder.checkpoints()[-1])
    with average.applied():
        if session.report:
            try:
                display.say(f"report   {(page := make_report(folder.path, run, corpus))}")
                wandb.report(page)
            except Exception as error:  # whatever it is, what was trained is there all the same
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                again = f"python -m moe.lab report {folder.path} tries again"
                display.warn(f"notice: there is no report ({reason}); {again}")
        text = moe.generate_text(run, max_new_tokens=200, seed=config.seed)
    wandb.close()
    display.say(f"sample\n{text.strip()}\n")
    display.say(f"next     python sample.py {folder.path} --prompt TEXT\n         python train.py --data YOUR-TEXT.txt")


def every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def main(arguments: list[str]) -> int:
    try:
        session, config, folder = parse(arguments)
        if session.list_presets:
            print("\n".join(preset_lines()))
            return 0
        display, requests = Display(session.plain, session.quiet, config.train.log_interval), Requests()
        try:
            train(session, config, folder, display, requests)
        finally:
            display.close()
            requests.over()
            if (failed := folder.release()) is not None:
                print(f"error: {failed}", file=sys.stderr)
    except MoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        advice = "lower --train.micro-batch-size, pass --train.activation-checkpointing, or choose a smaller model"
        print(f"error: out of memory: {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stderr.close()
        return 141
    except OSError as error:  # a full disk, a folder that may not be read
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    print_anything()
    sys.exit(main(sys.argv[1:]))
