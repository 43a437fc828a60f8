"""The training loop of ``examples/train.py``: it can be stopped at any step and goes on bit for bit.

Everything random in a step (its examples, their augmentation, dropout) is seeded from the run's seed, the step and the
process, so that no generator's state, nor the order of the data, has to be kept: a checkpoint holds tensors and counts.
Under ``torchrun`` each process takes its share of every batch; process 0 alone writes files, which needs no word from
the others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import random
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tbn_compiler as tbn
from paper.baselines import METHODS, Method, constants, estimators, plain_state, quantise
from paper.devices import RunError, World, sent, true_float32
from paper.graphs import RecordedStep
from paper.recipes import Recipe
from paper.runs import Log, Record, draw_curves, machine, now, versions, write_atomically, write_result
from paper.tasks import NETWORKS, Task

Network = Literal["float", "bwnn", "tbn"] | Method
Amp = Literal["off", "bf16", "fp16"]


@dataclass(frozen=True)
class Options:
    """What decides the result of a run, besides the data.

    Attributes:
        recipe: name in ``paper.recipes.RECIPES``.
        settings: that recipe with its changes.
        changes: the changed settings, name to the recipe's value and the run's.
        network: ``"float"``, ``"bwnn"`` (``p=1``), ``"tbn"``, or a method of :mod:`paper.baselines`.
        tiling: options of ``tbn.TilingConfig`` over the recipe's preset.
        seed: of the initial weights and of every step.
        subset, test_subset: number of examples to take, 0 for all.
        amp: autocast in training.
        compile: backend of ``torch.compile`` for training, if any.
        fast: whether a GPU may compute in ways that are not repeated bit for bit (:func:`paper.devices.joined_world`).
        graph: whether a step is recorded as a CUDA graph (:mod:`paper.graphs`).
    """

    recipe: str
    settings: Recipe
    changes: Mapping[str, Any] = field(default_factory=dict)
    network: Network = "tbn"
    tiling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    subset: int = 0
    test_subset: int = 0
    amp: Amp = "off"
    compile: str | None = None
    fast: bool = False
    graph: bool = False

    @property
    def method(self) -> Method | None:
        """The network's method if it is one of :mod:`paper.baselines`."""
        return self.network if self.network in METHODS else None

    def config(self) -> tbn.TilingConfig | None:
        """How layers are tiled; ``None`` for a network without tiles.

        Raises:
            ConfigError: an option is out of range.
        """
        if self.network == "float" or self.method:
            return None
        return self.settings.tiling({**self.tiling, "p": 1} if self.network == "bwnn" else self.tiling)


@dataclass(frozen=True)
class Files:
    """Where a run is kept, and how often.

    Attributes:
        folder: of the run.
        steps: steps between checkpoints, 0 for none.
        seconds: seconds between checkpoints.
        epochs: epochs between checkpoints, 0 for none.
        curves: draw ``curves.png``.
    """

    folder: Path
    steps: int = 0
    seconds: float = 120.0
    epochs: int = 1
    curves: bool = False

    @property
    def checkpoint(self) -> Path:
        """The file that a run goes on from."""
        return self.folder / "checkpoint.pt"


class Observer(Protocol):
    """Sees a run go by."""

    def on_step(self, trainer: Trainer) -> None:
        """After each step."""

    def on_epoch(self, trainer: Trainer, record: Record) -> None:
        """After each epoch's measurement."""


def seed_of(*parts: object) -> int:
    """A seed below 2^63 for a purpose, unlike those of other purposes."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def _seed_all(seed: int, device: torch.device) -> None:
    """Seed what a run on a device draws from; ``torch.manual_seed`` takes 0.3 ms for the devices that are not there."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def parameters_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Trainer:
    """A network in training.

    Attributes:
        model: the network; for ``bwnn`` and ``tbn`` what ``tbn.transform`` made of it.
        stored: what a method of :mod:`paper.baselines` stores.
        step: steps that are done.
        steps_per_epoch: full batches in the training examples.

    Raises:
        RunError: there are fewer examples than a batch has, or processes cannot share a batch.
    """

    def __init__(self, task: Task, options: Options, world: World) -> None:
        self.task, self.options, self.world = task, options, world
        recipe = options.settings
        task.place(world.device)
        self._train, self._test = (
            _choice(count, wanted) for count, wanted in ((task.train_size, options.subset),
                                                         (task.test_size, options.test_subset))
        )  # fmt: skip
        self.steps_per_epoch = len(self._train) // recipe.batch_size
        if not self.steps_per_epoch:
            raise RunError(f"{len(self._train)} training examples fill no batch of {recipe.batch_size}")
        if recipe.batch_size % world.size:
            raise RunError(f"a batch of {recipe.batch_size} cannot be shared equally by {world.size} processes")
        if options.amp == "fp16" and world.device.type == "cpu":
            raise RunError("fp16 is for accelerators: use bf16 on a CPU")
        alone = world.device.type == "cuda" and world.size == 1
        if options.graph and not (alone and options.compile is None and options.amp != "fp16"):
            raise RunError("--graph records steps of one process on a GPU, without --compile and fp16")
        self.config = options.config()

        _seed_all(seed_of(options.seed, "weights"), world.device)  # alike for float and tiled networks
        model = NETWORKS[recipe.network](**task.sizes)
        self.float_parameters = sum(parameter.numel() for parameter in model.parameters())
        # A method changes the layers that the recipe would tile.
        self.stored = quantise(model, options.method, recipe.tiling({})) if options.method else None
        self.model = model if self.config is None else tbn.transform(model, self.config)
        self.model.to(world.device)
        if task.images:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # In training the module may be wrapped; its parameters are the model's.
        module = task.training_form(self.model)
        if world.size > 1:
            module = DistributedDataParallel(module)
        self._module: Any = torch.compile(module, backend=options.compile) if options.compile else module
        self._training = False  # whether the modules are in that mode
        self.optimizer = make_optimizer(recipe, self.model, world.device)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: recipe.rate(step, self.steps_per_epoch)
        )
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp == "fp16")
        self._recorded = RecordedStep(self._learn, self.optimizer, world.device) if options.graph else None
        self._estimators = estimators(self.model)
        self.step = 0
        self._tell_progress()
        self._order, self._order_epoch = torch.empty(0), -1
        self._loss = torch.zeros((), dtype=torch.float64, device=world.device)  # sum over the epoch's steps

    @property
    def epoch(self) -> int:
        """Epochs that are done."""
        return self.step // self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return self.epoch >= self.options.settings.epochs

    def _tell_progress(self) -> None:
        """Tell the estimators of gradients how many of the steps are done."""
        for estimator in self._estimators:
            estimator.set_progress(self.step / (self.options.settings.epochs * self.steps_per_epoch))

    def _batch(self) -> Tensor:
        """This process's share of the examples of the step."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if epoch != self._order_epoch:
            generator = torch.Generator().manual_seed(seed_of(self.options.seed, "order", epoch))
            order = self._train[torch.randperm(len(self._train), generator=generator)]
            self._order, self._order_epoch = sent(order, self.task.device), epoch
        size = self.options.settings.batch_size
        return self._order[place * size : (place + 1) * size][self.world.rank :: self.world.size]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.options.amp == "off":
            return contextlib.nullcontext()
        dtype = torch.float16 if self.options.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.world.device.type, dtype)

    def advance(self) -> None:
        """Do one step."""
        seed = seed_of(self.options.seed, "step", self.step, self.world.rank)
        inputs, target = self._moved(self.task.train_batch(self._batch(), torch.Generator().manual_seed(seed)))
        _seed_all(seed, self.world.device)
        if not self._training:  # a walk over all modules
            self.model.train()
            self._module.train()
            self._training = True
        if self._recorded is None:
            self._learn(inputs, target)
        else:
            self._recorded(inputs, target)
        self.schedule.step()
        self.step += 1
        self._tell_progress()

    def _learn(self, inputs: tuple[Tensor, ...], target: Tensor) -> None:
        """Learn from a batch."""
        with self._autocast():
            loss = self.task.loss(self._module(*inputs), target)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._loss += self.world.total(loss.detach().double())

    def take_loss(self) -> float:
        """Mean loss of the epoch's steps, once it is done."""
        loss = self._loss.item() / (self.steps_per_epoch * self.world.size)
        self._loss.zero_()
        return loss

    def _moved(self, batch: tuple[tuple[Tensor, ...], Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        inputs, target = batch
        device = self.world.device
        return tuple(sent(part, device) for part in inputs), sent(target, device)

    @torch.no_grad()
    def evaluate(self, model: nn.Module | None = None, *, amp: bool = False) -> dict[str, float]:
        """Measures on the test examples, which the processes share.

        Args:
            model: the network to measure, by default the one in training.
            amp: measure under the autocast that training has.
        """
        model = self.model if model is None else model
        model.eval()
        self._training = False
        if self.world.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():  # the running statistics of each process are those of its share
                    dist.broadcast(buffer, 0)
        sums: Tensor | None = None
        share = sent(self._test[self.world.rank :: self.world.size], self.task.device)
        for index in share.split(self.options.settings.eval_batch_size):
            inputs, target = self._moved(self.task.test_batch(index))
            with self._autocast() if amp else contextlib.nullcontext():
                output = model(*inputs)
            score = self.task.score(output.float(), target)
            sums = score if sums is None else sums + score
        if sums is None:
            raise RunError(f"process {self.world.rank} has no test examples")
        return self.task.metrics(self.world.total(sums))

    @torch.no_grad()
    def difference(self, other: nn.Module) -> float:
        """Largest difference between the results of the network and ``other`` on a batch, over the largest result."""
        index = sent(self._test[: self.options.settings.eval_batch_size], self.task.device)
        inputs, _ = self._moved(self.task.test_batch(index))
        self._training = False
        ours, theirs = (module.eval()(*inputs) for module in (self.model, other))
        return float((ours - theirs).abs().amax() / ours.abs().amax())

    def state(self) -> dict[str, Any]:
        """All that training goes on from."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "loss": self._loss,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self._tell_progress()
        self._loss.copy_(state["loss"])


def _choice(count: int, wanted: int) -> Tensor:
    """Places of ``wanted`` of ``count`` examples, the same in every run, or of all."""
    if not 0 < wanted < count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].sort().values


def make_optimizer(recipe: Recipe, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """The recipe's optimiser over all parameters; on a GPU in one kernel for many parameters.

    Weight decay is not for the logarithms of input scales: it would pull the scales to 1.
    """
    named, fused = dict(model.named_parameters()), device.type == "cuda" or None
    scales = [value for name, value in named.items() if name.endswith("input_log_scale")]
    others = [value for name, value in named.items() if not name.endswith("input_log_scale")]
    parameters: Any = [{"params": others}, {"params": scales, "weight_decay": 0.0}] if scales else others
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=fused)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, recipe.lr, weight_decay=recipe.weight_decay, fused=fused)


def _header(trainer: Trainer) -> Record:
    options, task = trainer.options, trainer.task
    config = trainer.config
    shown = ("p", "alpha", "alpha_source", "min_size", "small", "replicate", "latent", "overrides")
    tiling = {} if config is None else {name: _plain(getattr(config, name)) for name in shown}
    if options.method:  # how its layers are chosen, and its own constants
        chosen = options.settings.tiling({})
        tiling = {"min_size": chosen.min_size, "small": chosen.small, **constants(options.method)}
    return {
        "recipe": options.recipe,
        "settings": {name: value for name, value in dataclasses.asdict(options.settings).items()
                     if name not in ("stated", "note")},
        "changes": dict(options.changes),
        "stated": list(options.settings.stated),
        "note": options.settings.note,
        "network": options.network,
        "tiling": tiling,
        "seed": options.seed,
        "amp": options.amp,
        "compile": options.compile,
        "fast": options.fast,
        "graph": options.graph,
        "device": trainer.world.device.type,
        "processes": trainer.world.size,
        "data": {
            "name": task.name, "note": task.note,
            "train": len(trainer._train), "train_of": task.train_size,
            "test": len(trainer._test), "test_of": task.test_size,
        },
        "metric": task.metric,
        "parameters": trainer.float_parameters,
        "steps_per_epoch": trainer.steps_per_epoch,
        "machine": machine(trainer.world.device),
        "versions": versions(),
        "started": now(),
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Tuples as lists, as JSON reads them."""
    return [_plain(part) for part in value] if isinstance(value, tuple) else value


# Fields of a header that may differ between the starts of one run. Other versions would not go on bit for bit.
_VARYING = ("kind", "machine", "started")


def _load(files: Files, trainer: Trainer, header: Record) -> dict[str, Any] | None:
    """The checkpoint of a run with this header, put into ``trainer``; ``None`` if there is none yet."""
    if not files.checkpoint.is_file():
        return None
    saved: dict[str, Any] = torch.load(files.checkpoint, map_location=trainer.world.device, weights_only=True)
    before = saved["records"][0]
    differing = [name for name in header if name not in _VARYING and header[name] != before.get(name, False)]
    if differing:
        told = "; ".join(f"{name}: {before.get(name, False)!r} there, {header[name]!r} now" for name in differing)
        raise RunError(f"the run to resume is another one: {told}")
    trainer.load_state(saved["state"])
    return saved


def run(
    task: Task, options: Options, world: World, files: Files, *, resume: bool = False, observer: Observer | None = None
) -> Record:
    """Train, measure after each epoch, lower, measure again, and write the files; returns the document of the run.

    Args:
        task: the data.
        options: what to train.
        world: the processes.
        files: where the run is kept.
        resume: go on from the checkpoint if there is one.
        observer: is told of steps and epochs.

    Raises:
        RunError: the folder holds a run that is not to be resumed, or another run than this one; or the loss is not
            finite.
    """
    if files.checkpoint.is_file() and not resume:
        raise RunError(f"{files.folder} holds a run: resume it with --resume, or choose another folder with --out")
    trainer = Trainer(task, options, world)
    header = _header(trainer)
    saved = _load(files, trainer, header) if resume else None
    spent, restarts, records = 0.0, 0, [{"kind": "header", **header}]
    if saved:
        spent, restarts, records = saved["spent"], saved["restarts"] + 1, saved["records"]
    main = world.rank == 0
    if main:
        files.folder.mkdir(parents=True, exist_ok=True)
    log = Log(files.folder if main else None, records)

    def save() -> None:
        if main:
            content = io.BytesIO()
            # A result without the lowered network is left out: the run is then finished again when it is resumed.
            kept = [record for record in log.records if record.get("failure") is None]
            known = {"state": trainer.state(), "records": kept, "spent": spent, "restarts": restarts}
            torch.save(known, content)
            write_atomically(files.checkpoint, content.getbuffer())

    last_saved = clock = time.monotonic()
    while not trainer.finished:
        trainer.advance()
        epoch_ends = trainer.step % trainer.steps_per_epoch == 0
        if epoch_ends:
            world.wait()  # for what is timed
        clock, before = time.monotonic(), clock
        spent += clock - before
        if epoch_ends:
            _finish_epoch(trainer, log, spent, observer)
            spent, due = 0.0, bool(files.epochs and trainer.epoch % files.epochs == 0)
        else:
            due = bool(files.steps and trainer.step % files.steps == 0) or clock - last_saved > files.seconds
        if due:
            save()
            last_saved = time.monotonic()
        clock = time.monotonic()
        if observer:
            observer.on_step(trainer)
    done = any(record["kind"] == "result" for record in log.records)
    if not done:
        _finish_run(trainer, log, files, restarts)
    if main:
        write_result(files.folder, log.records)
        if files.curves:
            title = f"{options.recipe}, {options.network}"
            draw_curves(files.folder / "curves.png", log.records, title, task.metric)
    if not done:
        save()
    return {"header": log.records[0], "epochs": log.epochs(), "result": log.records[-1]}


def _finish_epoch(trainer: Trainer, log: Log, seconds: float, observer: Observer | None) -> None:
    loss = trainer.take_loss()
    if not np.isfinite(loss):
        raise RunError(f"the loss of epoch {trainer.epoch} is {loss}: lower the learning rate (--set lr=...)")
    start, recipe = time.monotonic(), trainer.options.settings
    test = trainer.evaluate(amp=True)
    record = log.add(
        "epoch",
        epoch=trainer.epoch,
        step=trainer.step,
        loss=loss,
        lr=float(recipe.lr * recipe.rate(trainer.step - 1, trainer.steps_per_epoch)),  # of the last step
        seconds=seconds,
        test_seconds=time.monotonic() - start,
        test=test,
    )
    if observer:
        observer.on_epoch(trainer, record)


def _finish_run(trainer: Trainer, log: Log, files: Files, restarts: int) -> None:
    """Lower the network, measure both without autocast, and write the file."""
    digest = parameters_digest(trainer.model) if trainer.world.size == 1 else _common_digest(trainer)
    packed: nn.Module = trainer.model
    lowered = difference = failure = None
    path = files.folder / ("model.safetensors" if trainer.config is None else "packed.safetensors")
    main = trainer.world.rank == 0
    with true_float32():
        trained = trainer.evaluate()
        try:
            if trainer.config is not None:
                packed = tbn.lower(trainer.model)
                if main:
                    tbn.save(packed, path)
                lowered, difference = trainer.evaluate(packed), trainer.difference(packed)
        except Exception as error:  # whatever it is, what was trained is kept
            if trainer.world.size > 1:  # where the other processes wait for this one
                raise
            traceback.print_exc()
            lowered, failure = None, f"{type(error).__name__}: {error}"[:1000]
    if trainer.config is not None:
        totals = tbn.summary(packed).totals
        tensors = [value for value in packed.state_dict().values() if isinstance(value, Tensor)]
    else:
        if trainer.stored is not None:
            totals = trainer.stored
        else:  # the weights that would be tiled or binary, in float
            weights = tbn.summary(tbn.transform(trainer.model, trainer.options.settings.tiling({}))).totals["weights"]
            totals = {"weights": weights, "stored_bits": 32 * weights, "bits_per_weight": 32.0, "alphas": 0}
            totals["tiled_layers"] = 0
        state = {name: value.contiguous() for name, value in plain_state(trainer.model).items()}
        tensors = list(state.values())
        if main:
            write_atomically(path, safetensors.torch.save(state))
    size = path.stat().st_size if main and path.is_file() else 0
    log.add(
        "result",
        metric=trainer.task.metric,
        trained=trained,
        lowered=lowered,
        output_difference=difference,
        failure=failure,
        packed=packed is not trainer.model,
        epochs=trainer.epoch,
        train_seconds=sum(record["seconds"] for record in log.epochs()),
        file_bytes=size,
        tensor_bytes=sum(value.numel() * value.element_size() for value in tensors),
        weights=totals["weights"],
        stored_bits=totals["stored_bits"],
        bits_per_weight=float(totals["bits_per_weight"]),
        alphas=totals["alphas"],
        tiled_layers=totals["tiled_layers"],
        parameters_sha256=digest,
        restarts=restarts,
    )


def _common_digest(trainer: Trainer) -> str:
    """The digest, which all processes must agree on."""
    digests: list[str | None] = [None] * trainer.world.size
    dist.all_gather_object(digests, parameters_digest(trainer.model))
    if len(set(digests)) > 1:
        raise RunError(f"the processes' parameters differ: {digests}")
    return str(digests[0])
