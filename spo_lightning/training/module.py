"""Losses in, a solver's direction out, one optimizer step, logged numbers: the LightningModule."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from spo_lightning import losses
from spo_lightning.data.batch import Microbatches, PairBatch
from spo_lightning.diffusion.reference import Beside
from spo_lightning.errors import Diverged
from spo_lightning.evaluation.totals import Totals
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import kept, write
from spo_lightning.solvers import Problem, Slope, Solver, Step, Tensors, Terms
from spo_lightning.solvers.none import NoLower
from spo_lightning.training import bf16, microbatch
from spo_lightning.training.microbatch import Moved, trainable
from spo_lightning.training.observation import Observation
from spo_lightning.training.reference import MovingReference
from spo_lightning.training.sharding import dealt
from spo_lightning.world import whole

BESIDE = 4  # parts of a pass beside a graph that is kept: second order fits in twice the memory


class Preference(LightningModule):
    """Bilevel preference training with manual optimization.

    A batch of the loader is one outer step: a list of microbatches. The solver asks for gradients
    (``Problem.gradient``), each a loop over the microbatches reduced over ranks, and returns a
    direction that the one optimizer follows. ``outer_step`` and ``pairs_seen`` are our own
    counters; ``numbers`` holds the last observed step's values under their ``train/`` names.
    """

    def __init__(
        self,
        scorer: Scorer,
        loss: losses.Loss,
        solver: Solver,
        optimizer: Callable[..., torch.optim.Optimizer],
        *,
        beta: float,
        whole_batch: bool,
        batch_size: int,
        clip_norm: float | None,
        schedule: Callable[[int], float],
        log_every: int,
        moving: MovingReference | Beside,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.scorer, self.loss, self.solver, self.moving = scorer, loss, solver, moving
        scorer.squares = losses.asks(loss, "squares")
        self.make_optimizer, self.schedule = optimizer, schedule
        self.beta, self.batch_size, self.clip_norm = beta, batch_size, clip_norm
        self.log_every, self.whole_batch = log_every, whole_batch
        self.outer_step = self.pairs_seen = self.num_tokens = 0
        self.tokens: int | None = None  # of a microbatch, where they were found (largest.py)
        self.rehearsing = False
        self.solver_state: Any = None
        self.moments_state: dict[str, float] = {}
        self.ratios = (0.0, 0.0)  # log-ratios of all answers so far: their sum and count
        self.numbers: dict[str, float] = {}
        self.strict_loading = False  # checkpoints hold what trains, not a frozen base

    def trainable(self) -> dict[str, nn.Parameter]:
        return trainable(self.scorer)

    def configure_model(self) -> None:
        """The scorer comes as it is trained: where it is spread, it has been before."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(list(self.trainable().values()))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        if self.solver_state is None:
            self.solver_state = self.solver.init(tuple(self.trainable().values()))
        self.moving.begin(self.scorer)

    def training_step(self, batch: Microbatches, batch_idx: int) -> None:
        """One outer step."""
        observed = self.observes(self.outer_step + 1)
        read = sum(part.read for part in batch)
        self.num_tokens += read if self.trainer.world_size == 1 else int(self._over_ranks(read))
        batch = self.moving.read(self.scorer, batch)
        seen = Observation(self.beta, observed, losses.asks(self.loss, "moments"))
        step = self._solved(batch, seen)
        norm = self._follow(step.direction, step.displacement, seen.objective, batch)
        self.solver_state = step.state
        self.outer_step += 1
        self.moving.follow(self.scorer, self.outer_step)
        self.pairs_seen += self.batch_size
        totals = self._reduce(seen.totals)
        if seen.moments:
            total, count = totals.sums.pop("ratio")
            self.ratios = self.ratios[0] + float(total), self.ratios[1] + float(count)
        means = totals.numbers()
        if seen.moments:
            now = seen.margins(means, self.batch_size)
            self.moments_state = losses.update(self.moments_state, **now)
        self.numbers = {}
        if observed:
            self.numbers = self._named(means, step.logged, norm)

    def rehearse(self, batch: Microbatches) -> None:
        """What an outer step computes, by this process alone; nothing of it stays."""
        self.rehearsing = True
        try:
            seen = Observation(self.beta, True, losses.asks(self.loss, "moments"))
            self._solved(self.moving.read(self.scorer, batch), seen)
        finally:
            self.rehearsing = False

    def _solved(self, batch: Microbatches, seen: Observation) -> Step:
        # without a desirable answer there is no G, and nothing for a solver to remember
        solver = self.solver if batch.below else NoLower()
        return solver.step(self._problem(batch, seen), self.solver_state)

    @property
    def moments(self) -> losses.Moments:
        """What earlier outer steps leave to a loss that follows them."""
        total, count = self.ratios
        found = losses.moments_of(self.moments_state)
        return found._replace(ratio=total / count) if count else found

    def observes(self, step: int) -> bool:
        """Whether outer step ``step`` (from 1) is logged; the first always is."""
        return step == 1 or step % self.log_every == 0

    # -- the problem handed to the solver

    def _problem(self, batch: Microbatches, seen: Observation) -> Problem:
        parameters = tuple(self.trainable().values())
        kernel, at_once = self.scorer.twice(), batch

        def gradient(closure: Callable[[Problem], Terms], theta: Tensors) -> Slope:
            with self._moved_to(theta):
                return self._gradient(closure, at_once, seen, self._kl_of(batch))

        def twice(closure: Callable[[Problem], Terms], theta: Tensors) -> Slope:
            smaller = Microbatches([few for part in batch for few in self.scorer.smaller(part)])
            with kernel(), self._moved_to(theta):  # type: ignore[misc]
                return self._gradient(closure, smaller, seen, self._kl_of(batch))

        def linearized(theta: Tensors) -> tuple[Slope, Callable[[Tensors], Tensors]] | None:
            nonlocal at_once
            if kernel is None or not self._fits(batch):
                return None
            (part,) = batch
            parts = 1 if self.whole_batch else BESIDE
            at_once = Microbatches(part.split(-(-len(part) // parts)))
            with kernel():
                lower = self._part(part, lambda _: None).lower
                return microbatch.linearized_at(theta, parameters, lower, self.batch_size)

        def everywhere(name: str) -> Callable[[Tensors], Any]:
            def evaluated(theta: Tensors) -> Any:
                kl = self._kl_of(batch)
                found = [getattr(self._part(part, kl), name)(theta) for part in batch]
                if isinstance(found[0], tuple):
                    return tuple(torch.cat(column) for column in zip(*found))
                return torch.cat(found)

            return evaluated

        parts = [self._part(part, self._kl_of(batch)) for part in batch]
        return Problem(
            theta=parameters,
            upper=everywhere("upper"),
            lower=everywhere("lower"),
            both=everywhere("both"),
            value=torch.cat([part.value for part in parts if part.value is not None]),
            size=torch.cat([part.size for part in parts]),
            gradient=gradient,
            twice=None if kernel is None else twice,
            linearized=linearized,
        )

    def _part(self, part: PairBatch, kl: Moved, seen: Observation | None = None) -> Problem:
        of = self.scorer, self.loss, self.moments, self.outer_step
        return microbatch.problem_of(part, *of, kl, seen, self.moving.value_moves)

    def _kl_of(self, batch: Microbatches) -> Moved:
        """How far the policy has moved on all mismatched rows of the outer step, at least 0: found
        once in a pass, when it is first asked for, as its theta may not be moved to before."""

        @cache
        def kl(theta: Tensors) -> Tensor | None:
            if not batch.mismatched:
                return None
            others = batch.mismatched
            total, rows = microbatch.moved_from_reference(self.scorer, others, theta)
            return (self._over_ranks(total) / self._over_ranks(rows)).clamp(min=0)

        return kl

    def _fits(self, batch: Microbatches) -> bool:
        """Whether a graph of all lower rows may be kept: there is one part, in one process, and
        nothing of it is computed again, which would be at another theta.
        """
        alone = len(batch) == 1 and self.trainer.world_size == 1
        return alone and all(self.scorer.keeps(part) for part in batch)

    @contextmanager
    def _moved_to(self, theta: Tensors) -> Iterator[None]:
        """The parameters hold ``theta``'s values inside; restored from a copy, bit for bit."""
        parameters = tuple(self.trainable().values())
        if all(mine is given for mine, given in zip(parameters, theta)):
            yield
            return
        bf16.refuse_rounding(parameters)
        kept = [p.detach().clone() for p in parameters]
        write(parameters, theta)
        try:
            yield
        finally:
            write(parameters, kept)

    def _gradient(
        self,
        closure: Callable[[Problem], Terms],
        batch: Microbatches,
        seen: Observation,
        kl: Moved,
    ) -> Slope:
        parameters = tuple(self.trainable().values())
        for p in parameters:
            p.grad = None
        watched = Totals()
        for number, part in enumerate(batch):
            with kept(self.scorer):
                terms = closure(self._part(part, kl, seen))
                summed = torch.stack([term.sum() for term in terms.minimise]).sum()
                seen.close(summed)
                seen.objective = seen.objective + summed.detach()
                with self._reducing(last=number == len(batch) - 1):
                    # ranks are averaged; the mean is over all pairs of the outer step
                    self.manual_backward(summed * (self.trainer.world_size / self.batch_size))
            watched.add(terms.watch)
        direction = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in parameters)
        for p in parameters:
            p.grad = None
        means = self._reduce(watched).means()
        # as precise as theta, yet a mean over rows is no weight: bfloat16 would keep two digits
        kind = torch.promote_types(direction[0].dtype, torch.float32)
        return Slope(direction, {name: m.to(kind) for name, m in means.items()})

    def _follow(
        self,
        direction: Tensors,
        displacement: Tensors | None,
        objective: Tensor,
        batch: Microbatches,
    ) -> float:
        """Displace theta, clip, take the optimizer's step; returns the norm before clipping."""
        parameters = tuple(self.trainable().values())
        total = whole(get_total_norm(direction))
        sizes = [total, objective]
        if displacement is not None:
            sizes.append(whole(get_total_norm(displacement)))
        # the one place where a GPU is waited for: nothing may move before this is known
        norm, *others = torch.stack([size.to(total.device).double() for size in sizes]).tolist()
        if not all(map(math.isfinite, (norm, *others))):
            rows = ", ".join(str(row) for part in batch for row in part.rows.tolist())
            raise Diverged(
                f"outer step {self.outer_step + 1}: the loss or its gradient is not finite; "
                f"training rows of this batch: {rows}. Parameters are as before this step"
            )
        if displacement is not None:
            bf16.refuse_rounding(parameters)
            write(parameters, [p.detach() + d for p, d in zip(parameters, displacement)])
        for p, along in zip(parameters, direction):
            p.grad = along
        if self.clip_norm:
            clip_grads_with_norm_(parameters, self.clip_norm, total)
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr, call-arg]
        return norm

    def _named(self, means: dict[str, float], logged: dict[str, Tensor], norm: float) -> dict:
        optimizer = self.optimizers()
        numbers = {
            **means,
            **{f"solver/{name}": float(value) for name, value in logged.items()},
            "grad_norm": norm,
            "num_tokens": self.num_tokens,
            # of the step just taken: the scheduler already points at the next one
            "learning_rate": self.schedule(self.outer_step - 1)
            * optimizer.param_groups[0]["initial_lr"],  # type: ignore[union-attr]
        }
        return {f"train/{name}": value for name, value in numbers.items()}

    # -- several processes

    def _reducing(self, last: bool) -> Any:
        """Gradients travel between ranks once, in the last microbatch's backward."""
        wrapped = self.trainer.strategy.model
        if (last and not self.rehearsing) or not hasattr(wrapped, "no_sync"):
            return nullcontext()
        return wrapped.no_sync()  # type: ignore[union-attr]

    def _over_ranks(self, value: Tensor | float) -> Tensor:
        wide = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        alone = self.trainer.world_size == 1 or self.rehearsing
        return wide if alone else self.trainer.strategy.reduce(wide, reduce_op="sum")

    def _reduce(self, totals: Totals) -> Totals:
        """The same sums and counts over all ranks."""
        if totals.sums and self.trainer.world_size > 1:
            stacked = torch.stack([torch.stack(pair) for pair in totals.sums.values()])
            summed = self._over_ranks(stacked)
            totals.sums = {name: (row[0], row[1]) for name, row in zip(totals.sums, summed)}
        return totals

    # -- what a checkpoint holds besides parameters, optimizer and schedule

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = {f"scorer.{name}" for name in self.trainable()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: v for name, v in state.items() if name in kept}
        checkpoint["spo_lightning"] = {
            "outer_step": self.outer_step,
            "pairs_seen": self.pairs_seen,
            "num_tokens": self.num_tokens,
            "solver": self.solver_state,
            "moments": self.moments_state,
            "ratios": self.ratios,
            "reference": self.moving.state_dict(),
            "tokens_per_batch": self.tokens,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ours = dealt(checkpoint["spo_lightning"], tuple(self.trainable().values()))
        self.outer_step, self.pairs_seen = ours["outer_step"], ours["pairs_seen"]
        self.num_tokens, self.tokens = ours["num_tokens"], ours.get("tokens_per_batch")
        self.solver_state, self.moments_state = ours["solver"], ours["moments"]
        self.ratios = tuple(ours.get("ratios", self.ratios))
        if "reference" in ours:
            self.moving.load_state_dict(ours["reference"], self.scorer)
