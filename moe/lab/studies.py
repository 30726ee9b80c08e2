"""The studies there are, a row each: what is asked, and which trainings would answer it.

A study compares arms. An arm is a preset with some fields changed, some of them in all arms; every arm is trained with
the same seeds under the same budget, by default the same seconds of the training clock. Where arms want different
learning rates, each gets the same number of settings to try first.

On a CPU, arms that the clock shall compare are trained at the same time, each on its share of the cores: a machine's
pace moves by tens of percent within minutes, and then moves for all arms alike. On a GPU they take turns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from moe.config import ModelConfig, MoeError, RunConfig
from moe.machine.cost import count
from moe.machine.parsing import from_dict, to_dict
from moe.presets import presets

Changes = Mapping[str, Any]  # fields of RunConfig by their dotted names


class StudyError(MoeError):
    """A study that cannot be made, or not go on."""


@dataclass(frozen=True)
class Budget:
    """What every training of a study may use: seconds of the training clock, or steps."""

    minutes: float | None = None
    steps: int | None = None

    def changes(self) -> Changes:
        """A training by the clock is never continued, so it saves only at its end."""
        if self.steps is not None:
            return {"steps": self.steps, "minutes": None, "train.keep_best": False}
        return {"minutes": self.minutes, "train.save_interval": 0, "train.keep_best": False}

    def spent(self, step: int, seconds: float) -> bool:
        return step >= self.steps if self.steps else seconds >= 60 * (self.minutes or 0)

    def __str__(self) -> str:
        if self.steps is not None:
            return f"{self.steps:,} steps"
        return "1 minute" if self.minutes == 1 else f"{self.minutes:g} minutes"


@dataclass(frozen=True)
class Arm:
    name: str
    changes: Changes = field(default_factory=dict)
    tries: tuple[Changes, ...] = ({},)  # settings; if there are several, the best by validation loss is chosen first


@dataclass(frozen=True)
class Study:
    question: str
    arms: tuple[Arm, ...]  # the others are compared with the first
    preset: str = "tiny"
    common: Changes = field(default_factory=dict)
    budget: Budget = Budget(minutes=1.0)
    sweep: Budget | None = None  # of each training of the sweep, if it is another
    seeds: int = 5
    race: bool = False  # ask also when an arm reaches what the first one ends with
    together: bool = False  # train the arms at the same time, where there is no GPU


def configure(preset: str, changes: Changes) -> RunConfig:
    """The preset with these fields changed. Raises ConfigError for what it cannot be."""
    values = to_dict(presets()[preset])
    for name, value in changes.items():
        *path, last = name.split(".")
        part = values
        for step in path:
            part = part[step]
        part[last] = value
    return from_dict(RunConfig, values)


def flags(preset: str, changes: Changes) -> list[str]:
    """The same on train.py's command line."""
    given = ["--preset", preset]
    for name, value in changes.items():
        *path, last = name.replace("_", "-").split(".")
        if isinstance(value, bool):
            given.append("--" + ".".join([*path, last if value else f"no-{last}"]))
        elif value is not None:
            given += ["--" + ".".join([*path, last]), str(value)]
    return given


def dense_twin(model: ModelConfig) -> Changes:
    """The model without experts: every layer as wide as makes the active parameters equal, to a multiple of 8."""
    layers = model.num_hidden_layers

    def active(width: int) -> int:
        return count(replace(model, first_k_dense_replace=layers, intermediate_size=width)).active

    wanted, narrowest = count(model).active, active(8)
    width = 8 * max(1 + round((wanted - narrowest) / (active(16) - narrowest)), 1)
    apart = active(width) / wanted - 1
    if abs(apart) > 0.01:
        raise StudyError(f"a dense twin of width {width} has {apart:+.1%} active parameters: choose wider experts")
    return {"model.first_k_dense_replace": layers, "model.intermediate_size": width}


# -- moe-vs-dense ------------------------------------------------------------------------------------------------------
# The validation split is small, because all of it is looked at again and again to draw curves; the test split is
# enwik8's usual last 5 MB and looked at once, at the end.
ENWIK8: Changes = {"data.val_fraction": 0.002, "train.eval_interval": 50, "train.eval_tokens": 0}
RATES = tuple(  # the middle, and half and twice of each
    {"optim.muon_lr": muon, "optim.adam_lr": adam}
    for muon, adam in ((0.014, 0.016), (0.007, 0.016), (0.028, 0.016), (0.014, 0.008), (0.014, 0.032))
)


def moe_vs_dense() -> Study:
    base = configure("wiki", ENWIK8)
    return Study(
        "Does a mixture of experts learn more than a dense model of the same active parameters in the same time?",
        (Arm("dense", dense_twin(base.sized_model), RATES), Arm("moe", {}, RATES)),
        preset="wiki",
        common=ENWIK8,
        budget=Budget(minutes=12.0),
        sweep=Budget(steps=600),  # an arm's settings are compared with each other alone: by steps, no clock disturbs
        race=True,
        together=True,
    )


# -- one thing changed in preset tiny ----------------------------------------------------------------------------------
# Differences are small there, so on a CPU the arms share the machine: a minute of all of it for each of them.
def one_thing(question: str, *arms: Arm) -> Study:
    sweep = Budget(steps=300) if any(len(arm.tries) > 1 for arm in arms) else None
    at_the_end: Changes = {"train.eval_interval": 0}
    return Study(question, arms, common=at_the_end, budget=Budget(minutes=len(arms)), sweep=sweep, together=True)


def model_arms(name: str, *values: Any) -> tuple[Arm, ...]:
    return tuple(Arm(str(value), {f"model.{name}": value}) for value in values)


def experts_of(experts: int, chosen: int, width: int) -> Arm:
    """Cut finer, with as much width in all, chosen and shared."""
    changes = {"n_routed_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
    shared = {"model.n_shared_experts": 256 // width}
    return Arm(f"{chosen} of {experts}, width {width}", {f"model.{name}": n for name, n in changes.items()} | shared)


def adam_tries(adam: tuple[float, ...], decays: tuple[float, ...]) -> tuple[Changes, ...]:
    """Every pair of AdamW's learning rate and the matrices' decay. Muon keeps its own rate, which tiny's was tuned for;
    AdamW takes both for the matrices too, and since a step decays by their product, wants more decay at less of a
    rate."""
    return tuple({"optim.adam_lr": rate, "optim.muon_weight_decay": decay} for rate in adam for decay in decays)


def studies() -> dict[str, Study]:
    no_bias, no_loss = {"model.bias_update_speed": 0.0}, {"model.balance_loss": "none"}
    tiny = presets()["tiny"]
    adamw = {"optim.matrix_optimizer": "adamw"}
    return {
        "moe-vs-dense": moe_vs_dense(),
        "shared": one_thing(
            "Is a shared expert better than one more routed expert that every token may choose?",
            Arm("1 shared", {}),
            Arm(
                "0 shared",
                {
                    "model.n_shared_experts": 0,
                    "model.n_routed_experts": tiny.model.n_routed_experts + 1,
                    "model.num_experts_per_tok": tiny.model.num_experts_per_tok + 1,
                },
            ),
        ),
        "balance": one_thing(
            "What do the two means of balancing do to the loss, and to the balance?",
            Arm("both", {}),
            Arm("bias", no_loss),
            Arm("loss", {**no_bias, "model.aux_loss_alpha": 0.001}),  # alone it gets the weight of DeepSeek-V2
            Arm("none", {**no_bias, **no_loss}),
        ),
        "scores": one_thing(
            "Sigmoid scores, as DeepSeek-V3 has them, or softmax, as those before it?",
            *model_arms("scoring_func", "sigmoid", "softmax"),
        ),
        "experts": one_thing(
            "How many experts, of one width, when each token gets two of them?",
            *model_arms("n_routed_experts", 8, 16, 32, 64),
        ),
        "granularity": one_thing(
            "Few wide experts or many narrow ones, at the same total and active width?",
            *(experts_of(*sizes) for sizes in ((8, 2, 256), (16, 4, 128), (32, 8, 64))),
        ),
        "attention": one_thing(
            "Latent attention, or grouped queries?",
            Arm("latent", {}),
            Arm("grouped", {"model.attention": "grouped", "model.num_key_value_heads": 2}),
        ),
        "mtp": one_thing(
            "Does predicting one token more pay for its time?",
            Arm("off", {}),
            Arm("1 module", {"model.num_nextn_predict_layers": 1}),
        ),
        "optimizer": one_thing(
            "Muon for the matrices, or AdamW for everything?",
            Arm("muon", {}, adam_tries((0.006, 0.012, 0.024), (0.15, 0.3, 0.6))),
            Arm("adamw", adamw, adam_tries((0.0015, 0.003, 0.006), (0.6, 2.0, 6.0))),
        ),
        "average": one_thing(
            "Is a running average of the weights better than the last ones?",
            *(Arm(f"decay {decay:g}", {"optim.ema_decay": decay}) for decay in (0.0, 0.95, 0.99)),
        ),
        "tiny": Study(
            "What does preset tiny reach, and how much does that move with the seed?",
            (Arm("tiny", {}),),
            common={"train.eval_interval": 50},
            budget=Budget(steps=tiny.steps),
        ),
    }
