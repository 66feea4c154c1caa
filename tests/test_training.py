"""The running means of training; one step of the outer loop against the same by hand; that no step waits for the
device; the state that checkpoints hold."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipes import parallel
from data_pipes.augment import augment
from data_pipes.parallel import copied_ahead
from mwt.config import ClassifyConfig, InnerLoopConfig, LossConfig, ModelConfig, OptimConfig, ReaderConfig, SirenConfig
from mwt.config_files import config_yaml, load_config
from mwt.errors import InputError, TrainingError
from mwt.evaluation import autocast
from mwt.losses import outer_losses
from mwt.model import MetaWeightTransformer
from mwt.observe import observe
from mwt.optim import clip_gradients, make_optimizer
from mwt.structs import Batch, SignalFacts
from mwt.tracking import MetricsLog
from mwt.training import Meter, train_step
from mwt.training_state import TrainingState


def numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor(float(v)) for v in values]


def test_means_since_the_last_reading() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add(1, numbers(1, 2, 0, 1, 1, 1))
    meter.add(2, numbers(3, 4, 1, 1, 3, 1))
    assert meter.read() == dict(zip(Meter.NAMES, [2, 3, 0.5, 1, 2, 1], strict=True))
    meter.add(3, numbers(7, 7, 7, 7, 7, 7))
    assert set(meter.read().values()) == {7}


@pytest.mark.parametrize("place", range(len(Meter.NAMES)))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_is_named_with_its_samples_and_left_out_of_the_means(
    place: int, value: float
) -> None:
    meter = Meter(torch.device("cpu"))
    bad = [1.0] * len(Meter.NAMES)
    bad[place] = value
    meter.add(1, numbers(*[1.0] * len(bad)), torch.tensor([4, 2]))
    assert meter.bad_steps() == {}
    meter.add(2, numbers(*bad), torch.tensor([9, 7]))
    meter.add(3, numbers(*[4.0] * len(bad)), torch.tensor([0, 1]))
    meter.add(4, numbers(*[float("nan")] * len(bad)))
    assert meter.bad_steps() == {2: [9, 7], 4: []}
    assert meter.bad_steps() == {}, "reported twice"
    assert set(meter.read().values()) == {2.5}


def test_a_meter_refuses_where_nobody_asks_which_steps() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add(1, numbers(*[1.0] * len(Meter.NAMES)))
    meter.check()
    meter.add(2, numbers(*[float("nan")] * len(Meter.NAMES)))
    with pytest.raises(TrainingError, match="not finite at step 2"):
        meter.check()


def test_a_meter_that_nobody_reads_asks_to_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwt.training.PENDING", 3)
    meter = Meter(torch.device("cpu"))
    full = []
    for step in range(4):
        full.append(meter.full)
        meter.add(step, numbers(*[1.0] * len(Meter.NAMES)))
    assert full == [False, False, False, True]
    meter.bad_steps()
    assert not meter.full


def test_with_loss_scaling_an_overflowing_gradient_is_nothing_to_report() -> None:
    meter = Meter(torch.device("cpu"), scaled_loss=True)
    meter.add(1, numbers(1, 1, 1, float("inf"), float("nan"), 1))
    assert meter.bad_steps() == {}
    assert meter.read()["classification_loss"] == 1
    meter.add(2, numbers(float("nan"), 1, 1, 1, 1, 1))
    assert list(meter.bad_steps()) == [2]


def build(size: int = 4, **inner_loop: Any) -> MetaWeightTransformer:
    torch.manual_seed(4)
    return MetaWeightTransformer(
        ModelConfig(
            siren=SirenConfig(hidden=64, hidden_layers=1),
            inner_loop=InnerLoopConfig(**{"steps": 2, "points": 6, **inner_loop}),
            reader=ReaderConfig(blocks=1), loss=LossConfig(),
            signal=SignalFacts(kind="image", channels=1, height=size, width=size, classes=("a", "b")),
        )
    )  # fmt: skip


def test_a_step_by_hand() -> None:
    images = torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8)
    batch = Batch(images=images, labels=torch.tensor([0, 1, 1]), positions=torch.tensor([5, 9, 2]))
    ours, by_hand = build(), build()
    config, meter = OptimConfig(), Meter(torch.device("cpu"))
    train_step(
        ours, batch, step=1, epoch=3, seed=7, inner_loop=ours.config.inner_loop, optimizer=make_optimizer(ours, config),
        clip_norm=1.0, autocast=nullcontext(), backward=torch.Tensor.backward, unscale=lambda: None, meter=meter,
    )  # fmt: skip

    optimizer = make_optimizer(by_hand, config)
    output = by_hand(observe(batch, by_hand.config.inner_loop, seed=7, epoch=3))
    losses = outer_losses(output, batch.labels)
    (losses.classification + losses.reconstruction).backward()
    norms = clip_gradients(optimizer, 1.0)
    optimizer.step()
    for (name, a), b in zip(ours.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(a, b), name
    read = meter.read()
    assert read["classification_loss"] == losses.classification.item()
    assert read["reconstruction_loss"] == losses.reconstruction.item()
    assert [read["norm_siren"], read["norm_alpha"], read["norm_reader"]] == norms.tolist()
    assert read["accuracy"] == pytest.approx((output.logits.argmax(-1) == batch.labels).float().mean().item())


def take_step(model: MetaWeightTransformer, optimizer: Any, batch: Batch, *, step: int = 1, **options: Any) -> Meter:
    meter = Meter(torch.device("cpu"))
    train_step(
        options.pop("forward", model), batch, step=step, epoch=3, seed=7, inner_loop=model.config.inner_loop,
        optimizer=optimizer, clip_norm=options.pop("clip_norm", 1.0), autocast=nullcontext(), unscale=lambda: None,
        meter=meter,
        **{"backward": torch.Tensor.backward, **options},
    )  # fmt: skip
    return meter


def in_double(model: MetaWeightTransformer) -> Any:
    return lambda seen: model(replace(seen, coords=seen.coords.double(), values=seen.values.double()))


def random_batch(count: int) -> Batch:
    images = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8)
    return Batch(images=images, labels=torch.arange(count) % 2, positions=torch.randperm(100)[:count])


@pytest.mark.parametrize("parts", [2, 3, 4, 9], ids=lambda n: f"{n} micro batches")
def test_micro_batches_make_the_gradient_of_the_whole_batch(parts: int) -> None:
    """Also where the parts are of unequal size: 7 signals do not divide. In double precision, to its rounding."""
    batch = random_batch(7)
    whole, in_parts = build().double(), build().double()
    backward_passes = []

    def backward(loss: Tensor) -> None:
        backward_passes.append(loss)
        loss.backward()

    still = {"lr_siren": 1e-30, "lr_alpha": 1e-30, "lr_reader": 1e-30, "clip_norm": None}
    meters = [
        take_step(
            whole, make_optimizer(whole, OptimConfig(**still)), batch, clip_norm=None, forward=in_double(whole)
        ),
        take_step(
            in_parts, make_optimizer(in_parts, OptimConfig(**still)), batch, clip_norm=None, accumulate=parts,
            backward=backward, forward=in_double(in_parts),
        ),
    ]  # fmt: skip
    assert len(backward_passes) == min(parts, 7)
    for (name, a), b in zip(whole.named_parameters(), in_parts.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-9, atol=1e-15, msg=name)
    ours, theirs = (meter.read() for meter in meters)
    assert ours == pytest.approx(theirs, rel=1e-6)  # the losses are summed in fp32


def test_processes_exchange_gradients_once_for_all_micro_batches() -> None:
    entered = []

    @contextmanager
    def no_sync() -> Iterator[None]:
        entered.append("apart")
        yield

    model = build()
    take_step(
        model, make_optimizer(model, OptimConfig()), random_batch(6), accumulate=3, no_sync=no_sync,
        backward=lambda loss: (entered.append("backward"), loss.backward()),
    )  # fmt: skip
    assert entered == ["apart", "backward", "apart", "backward", "backward"]


def values_of(model: MetaWeightTransformer, optimizer: Any) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in (*model.parameters(), *states)]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_at_all(what: str) -> None:
    """Parameters, moments and step counters stay, bit for bit; the next step is as if it had never been."""
    model, undisturbed = build(), build()
    optimizer, other = (make_optimizer(net, OptimConfig()) for net in (model, undisturbed))
    first, second = random_batch(4), random_batch(4)
    for net, its in ((model, optimizer), (undisturbed, other)):
        assert take_step(net, its, first).bad_steps() == {}

    def broken(observations: Any) -> Any:
        output = model(observations)
        output.fit.losses.data[0, -1] = float("inf")
        return output

    def backward(loss: Tensor) -> None:
        loss.backward()
        model.reader.get_parameter(next(iter(dict(model.reader.named_parameters())))).grad.view(-1)[0] = float("nan")

    before = values_of(model, optimizer)
    options = {"forward": broken} if what == "loss" else {"backward": backward}
    forward = options.pop("forward", model)
    meter = Meter(torch.device("cpu"))
    train_step(
        forward, second, step=2, epoch=0, seed=0, inner_loop=model.config.inner_loop, optimizer=optimizer,
        clip_norm=1.0, autocast=nullcontext(), unscale=lambda: None, meter=meter,
        **{"backward": torch.Tensor.backward, **options},
    )  # fmt: skip
    assert meter.bad_steps() == {2: second.positions.tolist()}
    for one, two in zip(before, values_of(model, optimizer), strict=True):
        assert torch.equal(one, two)
    for net, its in ((model, optimizer), (undisturbed, other)):
        take_step(net, its, second, step=3)
    for one, two in zip(values_of(model, optimizer), values_of(undisturbed, other), strict=True):
        assert torch.equal(one, two)


def test_the_very_first_step_can_be_skipped() -> None:
    model = build()
    optimizer, before = make_optimizer(model, OptimConfig()), [p.detach().clone() for p in model.parameters()]
    take_step(model, optimizer, random_batch(2), backward=lambda loss: (loss * float("nan")).backward())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {0.0}


# ---- a step does not wait for the device -------------------------------------------------------------------------

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal",  # .item(), float(x), int(x), bool(x), if x.any()
    "nonzero", "masked_select", "_unique2", "unique_dim",  # results whose size is on the device
    "lift_fresh",  # torch.tensor(numbers): on a device a copy from memory that is not pinned, which waits
}  # fmt: skip
"""Operations that make the host wait for a CUDA device."""


class Waited(AssertionError):
    """Something in a step reads the device."""


class NoWaiting(TorchDispatchMode):
    """Refuses whatever would make the host wait for a CUDA device, also where tensors are on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in tree_leaves(args[1:2])
        )
        if name in READS or masked:
            self.refuse(name)
        result = func(*args, **(kwargs or {}))
        if len({x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}) > 1:
            self.refuse(f"{name} between devices")
        return result

    @staticmethod
    def refuse(what: str) -> None:
        places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
        ours = [place for place in places if "/mwt/" in place or "/data_pipes/" in place or "/tests/" in place]
        raise Waited(f"{what} at {ours[-3] if len(ours) > 2 else places[-3]}")


def step_without_waiting(
    augmentation: str,
    *,
    device: torch.device,
    precision: str = "fp32",
    size: int = 48,
    accumulate: int = 1,
    optim: OptimConfig | None = None,
    **inner_loop: Any,
) -> Meter:
    """Two steps, from augmentation to meter; the second one under `NoWaiting`."""
    with device:
        model = build(size, **inner_loop)
    optimizer, meter = make_optimizer(model, optim or OptimConfig()), Meter(device)
    real = device.type == "cpu" or torch.cuda.is_available()
    average = ModelEmaV3(model) if real else None  # it makes a generator on the device
    count = {"device": device, "dtype": torch.int64}
    images = torch.zeros(3, 1, size, size, dtype=torch.uint8, device=device)
    batch = Batch(images=images, labels=torch.zeros(3, **count), positions=torch.arange(3, **count))

    def backward(loss: Tensor) -> None:
        if real:
            loss.backward()
        else:  # without a CUDA device even fake tensors have no backward pass
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

    for step in (1, 2):
        with NoWaiting() if step == 2 else nullcontext():
            train_step(
                model,
                augment(batch, augmentation, seed=0, epoch=0),
                step=step,
                epoch=0,
                seed=0,
                inner_loop=model.config.inner_loop,
                optimizer=optimizer,
                clip_norm=1.0,
                autocast=autocast(device, precision),
                backward=backward,
                unscale=lambda: None,
                meter=meter,
                accumulate=accumulate,
            )
            if average is not None:
                average.update(model)
    return meter


AUGMENTATIONS = ["none", "crop_flip", "coords", "affine_flip"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_no_step_reads_the_device(augmentation: str, precision: str) -> None:
    """On the CPU, where everything is run, the backward pass too."""
    meter = step_without_waiting(augmentation, device=CPU, precision=precision)
    assert meter.read()["classification_loss"] > 0


@pytest.mark.parametrize(
    "inner_loop",
    [
        {"points": None},
        {"checkpoint": True},
        {"accumulate": 3},
        {"engine": "func"},
        {"engine": "higher"},
        {"first_order": True},
    ],
    ids=str,
)
def test_no_step_reads_the_device_however_it_is_computed(inner_loop: dict[str, Any]) -> None:
    assert step_without_waiting("none", device=CPU, size=8, **inner_loop).read()["reconstruction_loss"] > 0


def test_no_step_of_muon_reads_the_device() -> None:
    """Nor copies from one to another, which fake tensors of a CUDA device show."""
    muon = OptimConfig(name="muon")
    assert step_without_waiting("none", device=CPU, optim=muon).read()["classification_loss"] > 0
    with FakeTensorMode():
        assert step_without_waiting("none", device=CUDA, optim=muon)._sums.device.type == "cuda"


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_no_step_copies_between_devices(augmentation: str) -> None:
    """On fake tensors of a CUDA device, which need none: all but the backward pass."""
    with FakeTensorMode():
        meter = step_without_waiting(augmentation, device=CUDA)
        assert meter._sums.device.type == "cuda"


@pytest.mark.parametrize(
    "curious",
    [lambda x: x.sum().item(), lambda x: float(x[0]), lambda x: bool((x > 0).any()), lambda x: x[x > 0],
     lambda x: x.nonzero(), lambda x: torch.tensor([1, 2]), lambda x: torch.equal(x, x)],
)  # fmt: skip
def test_what_would_wait_is_noticed(curious: Any) -> None:
    x = torch.ones(3)
    with NoWaiting(), pytest.raises(Waited):
        curious(x)


def test_copies_between_devices_are_noticed() -> None:
    with FakeTensorMode(), NoWaiting():
        x = torch.zeros(3, device=CUDA)
        with pytest.raises(Waited, match="between devices"):
            x.cpu()
        with pytest.raises(Waited):
            x.tolist()
        with pytest.raises(Waited, match="lift_fresh"):
            torch.tensor([1, 2], device=CUDA)


@pytest.mark.gpu
@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_no_step_waits_for_a_gpu(augmentation: str) -> None:
    """By torch's own watch, after a first step: libraries may wait once."""
    model = build(48).to(CUDA)
    optimizer, meter = make_optimizer(model, OptimConfig()), Meter(CUDA)
    nought = torch.zeros(3, dtype=torch.int64, device=CUDA)
    images = torch.zeros(3, 1, 48, 48, dtype=torch.uint8, device=CUDA)
    batch = Batch(images=images, labels=nought, positions=nought)
    try:
        for step in (1, 2):
            torch.cuda.set_sync_debug_mode("default" if step == 1 else "error")
            train_step(
                model, augment(batch, augmentation, seed=0, epoch=0), step=step, epoch=0, seed=0,
                inner_loop=model.config.inner_loop, optimizer=optimizer, clip_norm=1.0,
                autocast=autocast(CUDA, "bf16"), backward=Tensor.backward, unscale=lambda: None, meter=meter,
            )  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert meter.read()["classification_loss"] > 0


# ---- the next batch is there before it is needed -----------------------------------------------------------------


def make_batches(count: int, device: torch.device = CPU) -> Iterator[Batch]:
    for i in range(count):
        nought = torch.full((2,), i, device=device)
        yield Batch(labels=nought, positions=nought, coords=torch.zeros(2, 5, 3), values=torch.zeros(2, 5, 4)[..., 3:])


def test_batches_are_copied_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first batch is in use, the second is on the device already."""
    copied: list[tuple[int, str]] = []
    to = Batch.to

    def noted(batch: Batch, device: torch.device) -> Batch:
        copied.append((int(batch.labels[0]), threading.current_thread().name))
        return to(batch, device)

    monkeypatch.setattr(Batch, "to", noted)
    batches = copied_ahead(make_batches(4), CPU)
    assert int(next(batches).labels[0]) == 0
    deadline = time.monotonic() + 20
    while len(copied) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert copied[:2] == [(0, "prefetch"), (1, "prefetch")]
    assert [int(batch.labels[0]) for batch in batches] == [1, 2, 3]


def test_copies_to_a_gpu_are_pinned_beside_the_computation_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the calls, without a GPU: pin, copy and event on the copying stream; then the using stream waits."""
    calls: list[str] = []
    used = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            calls.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event: str) -> None:
            calls.append(f"{self.name} waits for {event}")

    @contextmanager
    def using(stream: Stream) -> Iterator[None]:
        used.append(stream.name)
        yield
        used.pop()

    def pin(tensor: Tensor) -> Tensor:
        assert tensor.is_contiguous()  # anything else is copied from memory that is not pinned
        calls.append("pin")
        return tensor

    def to(batch: Batch, device: torch.device) -> Batch:
        calls.append(f"copy on {used[-1]}")
        return batch

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "stream", using)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("computing"))
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: calls.append(f"kept for {stream.name}"))
    monkeypatch.setattr(Batch, "to", to)
    monkeypatch.setattr(parallel, "prefetch", lambda items: items)  # one thread, for an order that is always the same
    assert len(list(copied_ahead(make_batches(2), CUDA))) == 2
    once = ["copy on copying", "event on copying", "computing waits for event"]
    assert calls == 2 * [*4 * ["pin"], *once, *4 * ["kept for computing"]]


@pytest.mark.gpu
def test_batches_arrive_on_a_gpu_whole() -> None:
    for i, batch in enumerate(copied_ahead(make_batches(50), CUDA)):
        assert batch.labels.device.type == "cuda"
        assert batch.labels.tolist() == [i, i]


# ---- the state of a run ------------------------------------------------------------------------------------------


def begin(*overrides: str, run: Path = Path("unused"), epochs: int = 4) -> TrainingState:
    config = load_config(ClassifyConfig, None, [f"optim.epochs={epochs}", f"run.dir={run}", *overrides])
    return TrainingState.begin(build(), config, steps_per_epoch=5)


def test_evaluations_are_due_after_epochs_and_once() -> None:
    state = begin()
    assert state.total_steps == 20
    due = {every: [] for every in (1, 2)}
    for state.step in range(21):
        for every, steps in due.items():
            if state.evaluation_due(every):
                steps.append(state.step)
    assert due == {1: [5, 10, 15, 20], 2: [10, 20]}
    state.monitored_step = 20
    assert not state.evaluation_due(1)
    assert state.epoch == 4


def test_time_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    state = begin()
    state.seconds = 7.0  # of before a resumption
    state.start_clock()
    for state.step in (1, 2):
        now += 2
        state.stop_clock()
        state.meter.add(state.step, numbers(*[1.0] * len(Meter.NAMES)))
    line = state.numbers(8, CPU)
    assert (line["seconds"], line["images_per_second"], line["accuracy"]) == (11.0, 4.0, 1.0)
    assert line["lr_siren"] == state.optimizer.param_groups[0]["lr"]
    assert line["peak_memory_gb"] > 0.01
    now += 1
    state.start_clock()  # an evaluation is not training
    now += 4
    state.step = 3
    state.stop_clock()
    line = state.numbers(8, CPU)
    assert (line["seconds"], line["images_per_second"]) == (15.0, 2.0)


def open_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(config_yaml(ClassifyConfig()))
    return folder


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_a_state_comes_back_whole(tmp_path: Path, ema: str) -> None:
    run, options = open_run(tmp_path / "run"), (f"optim.ema={ema}", "run.on_nonfinite=skip")
    state = begin(*options, run=run)
    state.save("last")  # of a process that is not the main one
    assert not (run / "checkpoints").exists()
    state.log = MetricsLog(run / "metrics.jsonl")
    for _ in range(2):
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()
        state.advance()
    state.meter.add(1, numbers(*[3.0] * len(Meter.NAMES)))
    state.step, state.best, state.monitored_step, state.seconds, state.skipped = 5, 0.25, 5, 12.5, 3
    state.log.write(step=5, epoch=1.0, split="train")
    state.save("last")
    state.log.write(step=6, epoch=1.2, split="train")

    other = begin(*options, run=run)
    other.log = MetricsLog(run / "metrics.jsonl")
    other.restore()
    for name in ("step", "best", "monitored_step", "seconds", "skipped"):
        assert getattr(other, name) == getattr(state, name), name
    assert other.schedule.state_dict() == state.schedule.state_dict()
    assert other.meter.state() == state.meter.state()
    for a, b in zip(other.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(other.optimizer.state[a]["exp_avg"], state.optimizer.state[b]["exp_avg"])
    for a, b in zip(other.evaluated_model.parameters(), state.evaluated_model.parameters(), strict=True):
        assert torch.equal(a, b)
    averaged = [not torch.equal(a, b) for a, b in zip(
        other.model.parameters(), other.evaluated_model.parameters(), strict=True)]  # fmt: skip
    assert all(averaged) if ema != "null" else not any(averaged)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1
    with pytest.raises(InputError, match=r"train for 20 steps, this configuration asks for 15"):
        begin(*options, run=run, epochs=3).restore()
    for log in (state.log, other.log):
        log.close()


def test_a_run_that_came_to_no_checkpoint_begins_at_its_beginning(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    state = begin(run=run)
    before = [p.detach().clone() for p in state.model.parameters()]
    state.log = MetricsLog(run / "metrics.jsonl")
    state.log.write(step=1, epoch=0.2, split="train")
    state.restore()
    assert state.step == 0
    assert (run / "metrics.jsonl").read_text() == ""
    assert all(torch.equal(a, b) for a, b in zip(before, state.model.parameters(), strict=True))
    state.log.close()


def test_the_average_of_the_weights_against_its_closed_form() -> None:
    """ema_n = decay^n w_0 + (1 - decay) sum_i decay^(n - i) w_i; it never enters the training."""
    state, plain = begin("optim.ema=0.8"), begin()
    history = []
    for _ in range(4):
        history.append([p.detach().clone() for p in state.model.parameters()])
        for one in (state, plain):
            torch.manual_seed(len(history))
            for parameter in one.model.parameters():
                parameter.grad = torch.randn_like(parameter)
            one.optimizer.step()
            one.advance()
    history.append([p.detach().clone() for p in state.model.parameters()])
    for index, average in enumerate(state.evaluated_model.parameters()):
        expected = 0.8**4 * history[0][index].double()
        for i in range(1, 5):
            expected += 0.2 * 0.8 ** (4 - i) * history[i][index].double()
        torch.testing.assert_close(average.double(), expected, rtol=0, atol=1e-6)
    for a, b in zip(state.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plain.evaluated_model is plain.model


def add_bad_steps(state: TrainingState, *steps: int) -> None:
    for step in steps:
        state.meter.add(step, numbers(*[float("nan")] * len(Meter.NAMES)), torch.tensor([step, 100 + step]))


def test_skipped_steps_are_written_down_counted_and_bounded(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    state = begin("run.on_nonfinite=skip", "run.max_skipped=2", run=run)
    state.locate = lambda position: {"shard": "a.tar", "key": f"{position:06d}"}
    state.log = MetricsLog(run / "metrics.jsonl")
    add_bad_steps(state, 7)
    with pytest.warns(UserWarning, match=r"Step 7 was skipped.*step-00000007\.json"):
        state.check()
    report = json.loads((run / "nonfinite" / "step-00000007.json").read_text())
    assert report == {
        "step": 7, "epoch": 1,  # 5 steps an epoch, the epochs counted from 0
        "samples": [{"position": n, "shard": "a.tar", "key": f"{n:06d}"} for n in (7, 107)],
    }  # fmt: skip
    state.check()
    assert state.skipped == 1
    add_bad_steps(state, 8, 9)
    with (
        pytest.warns(UserWarning, match="Step 8 was skipped"),
        pytest.raises(TrainingError, match=r"3 steps were not finite, of which run\.max_skipped allows 2.*step 9"),
    ):
        state.check()
    assert (run / "nonfinite" / "step-00000009.json").is_file()
    state.log.close()


def test_by_default_the_first_step_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run")
    state = begin(run=run)
    state.log = MetricsLog(run / "metrics.jsonl")
    add_bad_steps(state, 3, 4)
    with pytest.raises(TrainingError, match=r"not finite at step 3; .*step-00000003\.json.*--resume") as caught:
        state.save("last")
    assert "run.on_nonfinite=skip" in str(caught.value)
    assert not (run / "checkpoints").exists()
    state.log.close()
