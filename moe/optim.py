"""A step's gradients, Muon for the matrices, AdamW for the rest, an average of the weights, and how everything moves
over a training.

Notation: N matrices of m rows and n columns.

Muon (Jordan et al. 2024): momentum whose matrix is made orthogonal before it is applied, so that every direction of a
weight learns at the same pace.

    M += (1 - mu) (G - M);    W -= lr sqrt(max(1, m/n)) U V^T,    where U S V^T = G + mu (M - G)

Matrices of hidden layers get it: attention, dense and shared feed-forward, and the stacked experts, orthogonalised
**per expert** (a stack flattened into one matrix would mix experts that have nothing to do with each other). Embedding,
head, norms and the small router matrix get AdamW; with `matrix_optimizer = "adamw"` everything does, and tiny is then
0.123 ± 0.010 bits per byte worse after the same minutes, though Muon's steps take 8 % longer (`python -m moe.lab study
optimizer`). What the average gains five seeds cannot see (`study average`), so it is off.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moe.config import ModelConfig, OptimConfig
from moe.layers import forked_random
from moe.model import Losses, Transformer

# Three odd quintics a x + b x^3 + c x^5 in turn, each the one closest to 1 on the interval to which those before it
# bring [0.02, 1] (Polar Express, arXiv 2505.16932): together they bring it into [0.9, 1.1]
QUINTICS = ((7.7110, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013), (2.2183, -1.5940, 0.4107))


def accumulate(
    losses_of: Callable[..., Losses],
    batches: list[tuple[Tensor, Tensor]],
    autocast: Callable[[], AbstractContextManager[Any]],
    model: Transformer,
    weight: float = 0.0,
) -> Losses:
    """Gradients of the mean over the micro-batches; the means of their losses, and the load of all of them together.
    losses_of: model.losses, or what a compiler made of it. weight: of multi-token prediction."""
    global_load = None
    if weighs_by_whole_batch(model.config, len(batches)):
        # Route all of it once before; under the same dropout, unless the losses are compiled, which draw otherwise
        with torch.no_grad(), autocast(), forked_random(batches[0][0].device):
            global_load = torch.stack([model.losses(*batch).routing.load for batch in batches]).sum(0)  # type: ignore[union-attr]
    parts, mtp = [], torch.tensor(weight, device=batches[0][0].device)
    for tokens, targets in batches:
        with autocast():
            losses = losses_of(tokens, targets, global_load, mtp)
        (losses.objective / len(batches)).backward()
        parts.append(losses)
    return Losses.mean(parts)


def weighs_by_whole_batch(config: ModelConfig, micro_batches: int) -> bool:
    """Whether a balance loss weighs by the load of a whole batch that is cut into micro-batches."""
    return micro_batches > 1 and config.balance_loss == "switch" and config.num_moe_layers > 0


def gradient_norm(model: nn.Module) -> Tensor:
    """Of all gradients together."""
    return torch.nn.utils.get_total_norm([weight.grad for weight in model.parameters() if weight.grad is not None])


def clip_gradients(model: nn.Module, longest: float, norm: Tensor) -> None:
    """Make them no longer than that; 0: as long as they are. norm: theirs."""
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), longest or math.inf, norm)


def not_finite(model: nn.Module, loss: float, norm: float) -> str | None:
    """What is wrong with a step whose loss or gradient is not finite, and where it shows first; None with any other."""
    if math.isfinite(loss) and math.isfinite(norm):
        return None
    named = list(model.named_parameters())
    weights = [f"{name} itself" for name, weight in named if not weight.isfinite().all()]
    gradients = [
        f"the gradient of {name}"
        for name, weight in named
        if weight.grad is not None and not weight.grad.isfinite().all()
    ]
    places = weights or gradients
    first = f" (not finite: {places[0]}, and {len(places) - 1} more)" if places else ""
    return f"the loss is {loss} and the gradient's norm {norm}{first}"


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each, roughly: U V^T of its singular value decomposition. (N, m, n) ->
    (N, m, n).

    What small singular values become depends on the size the matrix begins with, which must not exceed 1. The fourth
    root of the sum of their fourth powers, at hand as the norm of X X^T, is a closer bound on the largest than the
    usual root of the sum of squares: for a flat spectrum of 128 by 3.4 times, which is worth a round.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    gram = x @ x.mT
    bound = 1.01 * torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True, dtype=torch.float32) + 1e-14
    x, gram = x * bound.rsqrt().to(x.dtype), gram / bound.to(x.dtype)
    for number, (a, b, c) in enumerate(QUINTICS):
        gram = x @ x.mT if number else gram
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G^2
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a X + (b G + c G^2) X
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal, for parameters of shape (..., m, n): leading dimensions are a stack of separate
    matrices.

    `fused` in a parameter group says how many equal matrices lie above each other in m (gate and up projection: 2);
    each is treated by itself. The update is scaled by sqrt(max(1, m/n)), Jordan's rule. Parameters of equal shape are
    orthogonalised together.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, weight_decay: float, dtype: torch.dtype) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": weight_decay, "fused": 1})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._update(weights, group)

    def _update(self, weights: list[Tensor], group: dict[str, Any]) -> None:
        momentum = group["momentum"]
        stack = weights[0].new_empty(len(weights), *weights[0].shape, dtype=self.dtype)
        for place, weight in zip(stack, weights, strict=True):
            assert weight.grad is not None
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            buffer = state["momentum"]
            buffer.lerp_(weight.grad, 1 - momentum)
            place.copy_(torch.lerp(weight.grad, buffer, momentum))  # Nesterov's look ahead
        rows, columns = stack.shape[-2] // group["fused"], stack.shape[-1]
        update = orthogonalize(stack.reshape(-1, rows, columns)).reshape(stack.shape).to(weights[0].dtype)
        scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
        for weight, change in zip(weights, update, strict=True):
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=scale)


class Optimizers:
    """Muon and AdamW as one: every parameter in exactly one group of one of them."""

    def __init__(self, model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32) -> None:
        """dtype: what Muon orthogonalises in."""
        self.config = config
        self.names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
        groups = sort_parameters(model)
        by_adam: list[nn.Parameter] = []
        if config.matrix_optimizer == "adamw":
            by_adam = groups["matrices"] + groups["fused"]
            groups["matrices"], groups["fused"] = [], []
        self.muon = Muon(
            [
                {"params": groups["matrices"], "peak_lr": config.muon_lr},
                {"params": groups["fused"], "peak_lr": config.muon_lr, "fused": 2},
            ],
            config.muon_momentum,
            config.muon_weight_decay,
            dtype,
        )
        self.adam = torch.optim.AdamW(
            [
                {"params": groups["embeddings"], "peak_lr": config.adam_lr, "weight_decay": config.adam_weight_decay},
                {"params": groups["norms"], "peak_lr": config.adam_lr},
                {"params": groups["router"], "peak_lr": config.router_lr},
                {"params": by_adam, "peak_lr": config.adam_lr, "weight_decay": config.muon_weight_decay},
            ],
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=1e-10,
            weight_decay=0.0,
            foreach=True,
        )
        self.both: tuple[torch.optim.Optimizer, ...] = (self.muon, self.adam)

    def step(self, progress: float) -> float:
        """One update at this part of the training in [0, 1]; the share of the peak learning rates it was made with."""
        share = lr_share(progress, self.config)
        for optimizer in self.both:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * share
            optimizer.step()
        return share

    def zero_grad(self) -> None:
        for optimizer in self.both:
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor the next step depends on, by `parameter/kind`."""
        for optimizer in self.both:
            for weight, values in optimizer.state.items():
                yield from ((f"{self.names[weight]}/{kind}", value) for kind, value in values.items())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the state, after a step."""
        found: dict[str, tuple[int, ...]] = {}
        for optimizer, kinds in ((self.muon, ("momentum",)), (self.adam, ("exp_avg", "exp_avg_sq"))):
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                found |= {f"{self.names[weight]}/{kind}": tuple(weight.shape) for kind in kinds}
                found |= {f"{self.names[weight]}/step": ()} if optimizer is self.adam else {}
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """tensors: of the names and shapes of `shapes`."""
        weights = {name: weight for weight, name in self.names.items()}
        for key, value in tensors.items():
            name, kind = key.rsplit("/", 1)
            weight = weights[name]
            optimizer = (
                self.muon if any(weight is p for g in self.muon.param_groups for p in g["params"]) else self.adam
            )
            # copies: what is read from a file stays tied to it
            copy = value.float().clone() if kind == "step" else torch.empty_like(weight).copy_(value)
            optimizer.state[weight][kind] = copy


class Average:
    """A running average of every weight and buffer (EMA): w' += (1 - d) (w - w') after each step, with d growing to
    `decay` as (1 + step) / (10 + step), so that the first weights are soon forgotten. A decay of 0 averages nothing.

    It lies beside the model; `with average.applied():` exchanges the two, to evaluate, save or load the average as the
    model and what is trained as its companion.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())} if decay else {}
        self.other = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, tensor in self.tensors.items():
            self.other[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for name, tensor in self.tensors.items():
            tensor.data, self.other[name] = self.other[name], tensor.data

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """While applied: what is trained, by `name/trained`."""
        yield from ((f"{name}/trained", tensor) for name, tensor in self.other.items())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors of `state`."""
        return {f"{name}/trained": tuple(tensor.shape) for name, tensor in self.other.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """While applied: take out of a checkpoint's tensors what is this object's."""
        for name, tensor in self.other.items():
            tensor.copy_(tensors.pop(f"{name}/trained"))


def sort_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Each parameter into exactly one group, by what it is."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "fused": [], "embeddings": [], "norms": [], "router": []}
    for name, weight in model.named_parameters():
        if name.endswith("router.weight"):
            groups["router"].append(weight)
        elif "embed_tokens" in name or "lm_head" in name:
            groups["embeddings"].append(weight)
        elif weight.ndim < 2:
            groups["norms"].append(weight)
        else:
            groups["fused" if "gate_up_proj" in name else "matrices"].append(weight)
    assert sum(map(len, groups.values())) == len(list(model.parameters()))
    return groups


def lr_share(progress: float, config: OptimConfig) -> float:
    """Of the peak learning rate, after this part of the training: linear warm-up, then stable and linear decay, or a
    cosine, to `final_lr`."""
    if progress < config.warmup:
        return max(progress / config.warmup, 0.01)
    if config.schedule == "cosine":
        done = (progress - config.warmup) / (1 - config.warmup) if config.warmup < 1 else 1.0
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    left = (1 - progress) / config.decay if config.decay else 1.0
    return config.final_lr + (1 - config.final_lr) * max(0.0, min(1.0, left))


def mtp_weight(progress: float, config: OptimConfig) -> float:
    """Of multi-token prediction's loss, after this part of the training: one weight, then a smaller one."""
    return config.mtp_weight if progress < config.mtp_final_from else config.mtp_final_weight
