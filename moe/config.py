"""Everything that can be set, in frozen dataclasses: the model, the text, the optimizer, the training.

The model's fields carry the names of transformers' `DeepseekV3Config`, so a reader of either knows the other. Values
are checked here and nowhere else; a message names the field, its value and the way out.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

MOST_LAYERS = 10_000  # so that a damaged file costs an error instead of hours
MOST_TOKENS = 1 << 50  # of a step: likewise
LONGEST = 2000  # letters of a message


class MoeError(Exception):
    """A mistake a user can mend. Its message is one line: what was given, what was expected, what helps. The scripts
    print no more than it, so it stays one line of some length whatever is quoted from a stranger's file."""

    def __init__(self, message: str) -> None:
        half = LONGEST // 2
        short = message if len(message) <= LONGEST else f"{message[:half]} ... {message[-half:]}"
        super().__init__("".join(letter if letter.isprintable() else "?" for letter in short))


class ConfigError(MoeError):
    """A configuration that cannot work."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def require_above(bound: float, config: Any, names: str, prefix: str = "") -> None:
    for name in names.split():
        value = getattr(config, name)
        require(bound < value < math.inf, f"{prefix}{name} = {value} must be finite and greater than {bound}")


def require_not_negative(config: Any, names: str, prefix: str = "") -> None:
    for name in names.split():
        value = getattr(config, name)
        require(0 <= value < math.inf, f"{prefix}{name} = {value} must be finite and not negative")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary embedding reaches beyond the context a model was trained on (see rotary.py), by the names of
    transformers' `rope_parameters`."""

    rope_type: Literal["default", "yarn", "llama3"] = "default"  # the way; default: no scaling
    factor: float = 1.0  # how many times longer the context becomes
    original_max_position_embeddings: int = 0  # the context before; has to be given with a scaling

    # YaRN
    beta_fast: float = 32.0  # pairs that turn more often than this in the original context stay as they are
    beta_slow: float = 1.0  # pairs that turn less often than this are slowed down by the whole factor
    truncate: bool = True  # both limits rounded to whole pairs, outwards

    # YaRN's sharper attention: the rotated part by the ratio of both mscale, or where one is 0 by a rule that knows
    # `factor` alone; latent attention's scores by mscale_all_dim
    mscale: float = 0.0  # above the ratio's line; 0: not given
    mscale_all_dim: float = 0.0  # below the ratio's line; 0: not given
    attention_factor: float | None = None  # for the rotated part, instead of ratio and rule

    # Llama 3.1
    low_freq_factor: float = 1.0  # pairs that turn less often than this are slowed down by the whole factor
    high_freq_factor: float = 4.0  # pairs that turn more often than this stay as they are

    def __post_init__(self) -> None:
        name, factor = "rope_scaling.", self.factor
        if self.rope_type == "default":
            require(factor == 1, f"{name}factor = {factor} does nothing without a {name}rope_type: yarn or llama3")
            return
        require(
            1 <= factor < math.inf, f"{name}factor = {factor} must be at least 1 and finite: it stretches the context"
        )
        original = self.original_max_position_embeddings
        require(
            0 < original < 2**40,
            f"{name}original_max_position_embeddings = {original}: {self.rope_type} needs the context before scaling",
        )
        low, high = self.low_freq_factor, self.high_freq_factor
        require(0 < low < high, f"{name}low_freq_factor = {low} must lie between 0 and {name}high_freq_factor = {high}")
        slow, fast = self.beta_slow, self.beta_fast
        require(1e-9 < slow <= fast < 1e9, f"{name}beta_slow = {slow} must lie between 0 and {name}beta_fast = {fast}")
        for part in ("mscale", "mscale_all_dim"):
            require(0 <= getattr(self, part) < math.inf, f"{name}{part} = {getattr(self, part)} must not be negative")
        attention = self.attention_factor
        given = attention is None or 0 < attention < math.inf
        require(given, f"{name}attention_factor = {attention}: give None to have it computed")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: DeepSeek-V3 (arXiv 2412.19437). The defaults are the size of preset `tiny`."""

    vocab_size: int = 512  # token ids; 0, as in the presets: the tokenizer's, rounded up
    hidden_size: int = 128  # the width of the residual stream
    num_hidden_layers: int = 4  # attention and feed-forward each
    max_position_embeddings: int = 256  # the context length, in tokens
    rms_norm_eps: float = 1e-6  # keeps normalisation from dividing by 0
    initializer_range: float = 0.02  # standard deviation of the first weights
    tie_word_embeddings: bool = False  # the output's matrix is the input's
    hidden_dropout: float = 0.0  # on what attention and feed-forward add to the residual stream

    # Attention: DeepSeek's latent one, or grouped queries as Llama, Qwen, OLMoE and Mixtral have them
    attention: Literal["latent", "grouped"] = "latent"  # which of the two
    num_attention_heads: int = 4  # query heads
    attention_bias: bool = False  # of what makes queries, keys and values; latent: of q_a_proj and kv_a_proj_with_mqa
    attention_output_bias: bool = False  # of o_proj; where transformers has an attention_bias, it means both
    rope_theta: float = 10_000.0  # the base of rotary embedding's wavelengths
    rope_interleave: bool = True  # rotated pairs are neighbours, as in DeepSeek; False: half a head apart
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)

    # Latent attention (section 2.1.1)
    q_lora_rank: int | None = None  # the width that queries are compressed to; by default they are not
    kv_lora_rank: int = 64  # the width that keys and values are compressed to, which is what the cache holds
    qk_nope_head_dim: int = 16  # numbers in each head's query and key that are not rotated
    qk_rope_head_dim: int = 16  # and that are; this part of the key is shared by all heads
    v_head_dim: int = 32  # numbers in each head's value

    # Grouped-query attention
    num_key_value_heads: int | None = None  # by default as many as query heads
    head_dim: int | None = None  # by default hidden_size / num_attention_heads
    qk_norm: Literal["none", "head", "projection"] = "none"  # of each head's query and key (Qwen3), or of all (OLMoE)

    # Feed-forward: the first layers dense, the others a mixture of experts (section 2.1.2)
    intermediate_size: int = 384  # the inner width of a dense layer
    first_k_dense_replace: int = 1  # how many layers at the start are dense
    mlp_only_layers: tuple[int, ...] = ()  # further dense layers in between (Qwen3-MoE), counted from 0
    n_routed_experts: int = 8  # E, in each layer
    num_experts_per_tok: int = 2  # K, chosen for each token
    n_shared_experts: int = 1  # that work on every token
    moe_intermediate_size: int = 128  # the inner width of an expert
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"  # from the router's logits to its scores
    norm_topk_prob: bool = True  # the chosen experts' gates add up to 1
    routed_scaling_factor: float = 1.0  # times what the routed experts add up to
    n_group: int = 1  # groups that the experts of a layer are divided into
    topk_group: int = 1  # the groups that a token's experts may come from
    topk_method: Literal["noaux_tc", "group_limited_greedy", "greedy"] = (
        "noaux_tc"  # a group is worth its two best biased scores (V3), or its best alone (V2); greedy: all are kept
    )

    # Multi-token prediction (section 2.2)
    num_nextn_predict_layers: int = 0  # modules behind the last layer, each of which looks one token further

    # Load balancing: 0 turns a means off
    bias_update_speed: float = 1e-3  # added to the bias of an expert with too little load after each optimizer step
    balance_loss: Literal["sequence", "switch", "none"] = (
        "sequence"  # over each sequence (DeepSeek-V3), or over the whole batch (Switch Transformer)
    )
    aux_loss_alpha: float = 1e-4  # the weight of that loss
    router_z_loss: float = 0.0  # the weight of ST-MoE's z-loss

    # How it is computed
    expert_backend: Literal["auto", "loop", "grouped", "gather"] = "auto"  # auto: by rule, and training says which

    def __post_init__(self) -> None:
        require_above(0, self, "hidden_size num_hidden_layers max_position_embeddings rms_norm_eps num_attention_heads")
        require_above(0, self, "kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim rope_theta intermediate_size")
        require_above(0, self, "n_routed_experts num_experts_per_tok moe_intermediate_size n_group topk_group")
        require_above(0, self, "routed_scaling_factor")
        require_not_negative(self, "vocab_size first_k_dense_replace n_shared_experts initializer_range")
        require_not_negative(self, "hidden_dropout bias_update_speed aux_loss_alpha router_z_loss")
        require_not_negative(self, "num_nextn_predict_layers")
        require(self.hidden_dropout < 1, f"hidden_dropout = {self.hidden_dropout} must be below 1")
        require(
            self.q_lora_rank is None or self.q_lora_rank > 0, f"q_lora_rank = {self.q_lora_rank}: give None for none"
        )
        for name in ("num_hidden_layers", "num_nextn_predict_layers"):
            require(getattr(self, name) <= MOST_LAYERS, f"{name} = {getattr(self, name)} is more than any model has")
        strange = [layer for layer in self.mlp_only_layers if not 0 <= layer < self.num_hidden_layers]
        require(
            not strange,
            f"mlp_only_layers = {self.mlp_only_layers}: {strange} are not among num_hidden_layers = "
            f"{self.num_hidden_layers}, counted from 0",
        )
        self._check_attention()
        self._check_routing()

    def _check_attention(self) -> None:
        theta = self.rope_theta
        require(self.rope_scaling.rope_type != "yarn" or theta > 1, f"rope_theta = {theta} must be above 1 for YaRN")
        if self.attention == "latent":
            for name, unset in (("num_key_value_heads", None), ("head_dim", None), ("qk_norm", "none")):
                value = getattr(self, name)
                why = "latent attention makes every head's keys from one normalised vector: leave it out, or choose"
                require(value == unset, f'{name} = {value}: {why} attention = "grouped"')
            rotary, name = self.qk_rope_head_dim, "qk_rope_head_dim"
        else:
            width, heads, groups = self.hidden_size, self.num_attention_heads, self.key_value_heads
            require(
                groups > 0 and heads % groups == 0,
                f"num_key_value_heads = {groups} must divide num_attention_heads = {heads}",
            )
            require(
                self.head_dim is not None or width % heads == 0,
                f"num_attention_heads = {heads} must divide hidden_size = {width}, or give a head_dim",
            )
            rank = self.q_lora_rank
            require(rank is None, f"q_lora_rank = {rank} belongs to latent attention: leave it out, or choose that")
            rotary, name = self.query_head_dim, "head_dim"
        require(rotary > 0 and rotary % 2 == 0, f"{name} = {rotary} must be even, and above 0: rotation acts on pairs")

    def _check_routing(self) -> None:
        experts, chosen, groups, kept = self.n_routed_experts, self.num_experts_per_tok, self.n_group, self.topk_group
        advice = "lower one or raise the other"
        require(
            chosen <= experts, f"num_experts_per_tok = {chosen} is more than n_routed_experts = {experts}: {advice}"
        )
        require(experts % groups == 0, f"n_group = {groups} must divide n_routed_experts = {experts}")
        require(kept <= groups, f"topk_group = {kept} is more than n_group = {groups}: {advice}")
        room = kept * (experts // groups)
        require(
            chosen <= room,
            f"num_experts_per_tok = {chosen} is more than topk_group = {kept} groups hold: {room}; {advice}",
        )

    @property
    def key_value_heads(self) -> int:
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def query_head_dim(self) -> int:
        """Numbers in each head's query, and in its key."""
        if self.attention == "latent":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim if self.attention == "latent" else self.query_head_dim

    @property
    def rotary_dim(self) -> int:
        """How many of the query's numbers are rotated."""
        return self.qk_rope_head_dim if self.attention == "latent" else self.query_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers that a token leaves behind in each layer for those after it."""
        if self.attention == "latent":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.key_value_heads * self.query_head_dim

    @property
    def num_moe_layers(self) -> int:
        return sum(not self.is_dense(layer) for layer in range(self.num_hidden_layers))

    def is_dense(self, layer: int) -> bool:
        """Whether this layer has no experts. Those of multi-token prediction, which come after, are like the last."""
        layer = min(layer, self.num_hidden_layers - 1)
        return layer < self.first_k_dense_replace or layer in self.mlp_only_layers

    @property
    def router_learns_nothing(self) -> bool:
        """With one expert per token and normalised gates every gate is 1, and the language-model loss says nothing to
        the router."""
        return self.num_moe_layers > 0 and self.num_experts_per_tok == 1 and self.norm_topk_prob

    @property
    def balanced(self) -> bool:
        return self.bias_update_speed > 0 or (self.balance_loss != "none" and self.aux_loss_alpha > 0)


@dataclass(frozen=True)
class DataConfig:
    """Which text, cut into which tokens."""

    source: Annotated[str, tyro.conf.arg(aliases=("--data",), metavar="PATH|NAME")] = (
        "tinyshakespeare"  # a prepared folder, a text, .jsonl or .parquet file, a folder of them, or a data set's name
    )
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"  # learnt from the text, plain bytes, or GPT-2's
    vocab_size: int = 512  # of the byte-level BPE, its 256 bytes and the end-of-text token included
    val_fraction: float = 0.1  # the last bytes of the text, before those of the test split
    test_fraction: float = 0.0  # the very last bytes, which training never looks at
    errors: Literal["strict", "replace"] = "strict"  # what undecodable bytes do: stop, or become U+FFFD
    field: str = "text"  # of JSON lines and .parquet files: where the text is
    max_bytes: int = 0  # read no more text than this; 0: all

    def __post_init__(self) -> None:
        require(
            bool(self.source.strip()), f"data.source = {self.source!r}: give a file, a folder, or a data set's name"
        )
        require(
            self.tokenizer != "bpe" or self.vocab_size >= 257,
            f"data.vocab_size = {self.vocab_size} must be at least 257: 256 bytes and the end of text",
        )
        require(self.vocab_size <= 2**31, f"data.vocab_size = {self.vocab_size} does not fit a token id of 32 bits")
        require(0 < self.val_fraction < 1, f"data.val_fraction = {self.val_fraction} must lie between 0 and 1")
        require(0 <= self.test_fraction < 1, f"data.test_fraction = {self.test_fraction} must lie between 0 and 1")
        held_out = f"data.val_fraction = {self.val_fraction} and data.test_fraction = {self.test_fraction}"
        require(self.val_fraction + self.test_fraction < 1, f"{held_out} leave nothing to train on")
        require(self.max_bytes >= 0, f"data.max_bytes = {self.max_bytes} must not be negative; 0 means all")


@dataclass(frozen=True)
class OptimConfig:
    """Muon for matrices, AdamW for the rest (see optim.py), and how their learning rates move."""

    matrix_optimizer: Literal["muon", "adamw"] = "muon"  # adamw: the matrices too, with adam_lr
    muon_lr: float = 0.026  # peak learning rate of matrices
    muon_momentum: float = 0.95  # how much of the last steps' direction is kept
    muon_weight_decay: float = 0.3  # of matrices; for a text that is read several times, for one read once 0.1
    adam_lr: float = 0.012  # peak learning rate of embeddings, head and norms
    router_lr: float = 0.001  # peak learning rate of routers
    adam_beta1: float = 0.9  # decay of AdamW's first moment
    adam_beta2: float = 0.99  # decay of its second
    adam_weight_decay: float = 0.0  # of what AdamW moves
    grad_clip: float = 1.0  # the largest norm of a step's gradient; 0: any

    # The schedule, in fractions of the whole training
    schedule: Literal["wsd", "cosine"] = "wsd"  # warm-up, stable, linear decay; or warm-up and a cosine
    warmup: float = 0.01  # the part in which learning rates rise
    decay: float = 0.7  # the part at the end in which they fall (wsd)
    final_lr: float = 0.05  # what they end at, of their peak

    # The weight of multi-token prediction's mean loss in what is minimised (DeepSeek-V3, section 4.2)
    mtp_weight: float = 0.3  # at first
    mtp_final_weight: float = 0.1  # at last
    mtp_final_from: float = 0.67  # the part of the training after which the final weight holds

    # A running average of the weights
    ema_decay: float = 0.0  # of the average that is evaluated and saved; 0: no average

    def __post_init__(self) -> None:
        require_above(0, self, "muon_lr adam_lr router_lr", "optim.")
        require_not_negative(self, "muon_weight_decay adam_weight_decay warmup decay final_lr grad_clip", "optim.")
        require_not_negative(self, "mtp_weight mtp_final_weight mtp_final_from", "optim.")
        require(self.mtp_final_from <= 1, f"optim.mtp_final_from = {self.mtp_final_from} must lie in [0, 1]")
        for name in ("muon_momentum", "adam_beta1", "adam_beta2", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.{name} = {getattr(self, name)} must lie in [0, 1)")
        decay = self.decay if self.schedule == "wsd" else 0.0
        require(
            self.warmup + decay <= 1,
            f"optim.warmup = {self.warmup} and optim.decay = {decay} add up to more than the whole training",
        )


@dataclass(frozen=True)
class TrainConfig:
    """How a step is made and how often a run looks at itself."""

    tokens_per_step: Annotated[int, tyro.conf.arg(aliases=("--tokens-per-step",))] = 4096  # for one optimizer step
    sequence_length: int = 256  # tokens in a window
    short_until: float = 0.6  # so far into the training, each window is cut into `short_parts`: attention costs less
    short_parts: int = 2  # into how many
    micro_batch_size: int | Literal["auto"] = "auto"  # sequences at a time; the gradients of a step are accumulated
    activation_checkpointing: bool = False  # less memory, a third more work: layers are computed again for gradients
    skip_non_finite: int = 0  # steps on end that may be left out for their loss or gradient; one more ends training

    # Looking and saving
    eval_interval: int = 150  # steps between evaluations; 0: only at the end
    eval_tokens: int = 0  # of the validation split that evaluations before the last one read; 0: all
    save_interval: int = 300  # steps between checkpoints; 0: only at the end
    log_interval: int = 50  # steps between records of each layer's load, and between lines where there is no terminal
    keep_last: int = 2  # so many of the newest checkpoints
    keep_best: bool = True  # and the one of lowest validation loss: each evaluation below those before is saved

    def __post_init__(self) -> None:
        require_above(0, self, "tokens_per_step sequence_length short_parts log_interval keep_last", "train.")
        require_not_negative(self, "short_until eval_interval eval_tokens save_interval skip_non_finite", "train.")
        tokens, length, micro = self.tokens_per_step, self.sequence_length, self.micro_batch_size
        require(tokens <= MOST_TOKENS, f"train.tokens_per_step = {tokens} is more than any step has")
        nearest = max(round(tokens / length), 1) * length
        require(
            tokens % length == 0,
            f"train.tokens_per_step = {tokens} must be a multiple of train.sequence_length = {length}: {nearest} is",
        )
        require(self.short_until <= 1, f"train.short_until = {self.short_until} must lie in [0, 1]")
        require(
            self.short_until == 0 or length % self.short_parts == 0,
            f"train.short_parts = {self.short_parts} must divide train.sequence_length = {length}",
        )
        if micro != "auto" and (micro <= 0 or self.sequences_per_step % micro):
            sizes = ", ".join(map(str, self.micro_batch_sizes()))
            raise ConfigError(
                f"train.micro_batch_size = {micro} must divide the {self.sequences_per_step} sequences of a step: "
                f"{sizes} do, and auto chooses one"
            )

    def parts(self, progress: float) -> int:
        """Into how many each window is cut, after this part of the training."""
        return self.short_parts if progress < self.short_until else 1

    @property
    def sequences_per_step(self) -> int:
        return self.tokens_per_step // self.sequence_length

    def micro_batch_sizes(self) -> list[int]:
        """What may be chosen, the largest first: micro-batches are equal, so that their mean is the large batch's."""
        total = self.sequences_per_step
        small = [size for size in range(1, math.isqrt(total) + 1) if total % size == 0]
        return sorted({*small, *(total // size for size in small)}, reverse=True)


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is drawn. The filters are applied in this order."""

    temperature: float = 0.8  # below 1: closer to the most likely; 0: always the most likely token
    top_k: int = 0  # keep the k most likely; 0: all
    top_p: float = 1.0  # keep the smallest set of tokens that holds this much probability
    min_p: float = 0.0  # drop what is less likely than this fraction of the most likely

    def __post_init__(self) -> None:
        require_not_negative(self, "temperature top_k")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p} must lie in (0, 1]")
        require(0 <= self.min_p <= 1, f"min_p = {self.min_p} must lie in [0, 1]")


@dataclass(frozen=True)
class RunConfig:
    """A whole training run: what `config.json` stores and a resumed run keeps. Its defaults are preset `tiny`."""

    preset: Annotated[str, tyro.conf.arg(metavar="NAME")] = (
        "tiny"  # the configuration that the other flags change; see --list-presets
    )
    steps: int = 600  # optimizer steps
    minutes: float | None = None  # instead of steps: the schedule follows the training clock
    seed: int = 1  # of the first weights and the order of the text
    init_from: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None  # whose weights and tokenizer to start from
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: a GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; auto: bfloat16 where the hardware has it
    compile: Literal["auto", "on", "off"] = "auto"  # auto: where the time that takes is won back
    deterministic: bool = False  # the same bits again on a GPU too, more slowly
    model: ModelConfig = field(default_factory=lambda: ModelConfig(vocab_size=0))
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(self.steps > 0, f"steps = {self.steps} must be greater than 0")
        require(0 <= self.seed < 2**63, f"seed = {self.seed} must lie between 0 and 2**63 - 1")
        minutes = self.minutes
        require(minutes is None or 0 < minutes < float("inf"), f"minutes = {minutes} must be finite and greater than 0")
        window, context = self.train.sequence_length, self.model.max_position_embeddings
        name = "model.max_position_embeddings"
        require(window <= context, f"train.sequence_length = {window} is more than the context, {name} = {context}")
        part = self.train.eval_tokens
        require(
            part == 0 or part > window,
            f"train.eval_tokens = {part} must be more than train.sequence_length = {window}, or 0 for the whole split",
        )
        ahead = self.model.num_nextn_predict_layers
        shortest = window // self.train.short_parts if self.train.short_until else window
        require(
            ahead < shortest,
            f"model.num_nextn_predict_layers = {ahead} looks past the end of every window: it must be less than "
            f"their length, {shortest}",
        )

    @property
    def sized_model(self) -> ModelConfig:
        """The model, with the vocabulary to expect where that is left to the tokenizer."""
        expected = {"bpe": self.data.vocab_size, "bytes": 264, "gpt2": 50_304}[self.data.tokenizer]
        return replace(self.model, vocab_size=self.model.vocab_size or expected)
