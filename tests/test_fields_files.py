"""Fields on disk, the frames of signals, evaluation in chunks, and ordinary fields in the inner loop."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mwt.config import InnerLoopConfig
from mwt.errors import InputError
from mwt.fields import (
    ActivationConfig,
    AdaptedField,
    EncodingConfig,
    Field,
    FieldConfig,
    Frame,
    HashGridConfig,
    InterpolatedGridConfig,
    MFNConfig,
    MLPConfig,
    WithOffsets,
    build_field,
    evaluate,
    files,
    load_field,
    save_field,
)
from mwt.inner_loop import fit
from mwt.meta_sgd import MetaSGD
from mwt.observe import grid
from mwt.structs import Observations

UNIT = (-1.0, 1.0)
FRAME = Frame(kind="image", axes=("y", "x"), coordinate_range=(UNIT, UNIT), size=(4, 6), data_range=(0.0, 255.0))
SMALL = MLPConfig(width=6, hidden_layers=2, encoding=EncodingConfig(name="fourier", frequencies=4))
CONFIGS = {
    "mlp": FieldConfig(mlp=SMALL),
    "wire": FieldConfig(mlp=replace(SMALL, activation=ActivationConfig(name="wire", omega=3.0, trainable=True))),
    "norm": FieldConfig(mlp=replace(SMALL, batch_norm=True, output="clamp", clamp=(0.0, 1.0))),
    "mfn": FieldConfig(name="mfn", mfn=MFNConfig(width=6, hidden_layers=1, input_scale=5.0)),
    "hash_grid": FieldConfig(
        name="hash_grid", hash_grid=HashGridConfig(levels=2, log2_table=5, finest_resolution=(20,))
    ),
    "grid": FieldConfig(name="grid", grid=InterpolatedGridConfig(size=(5, 4))),
}


def build(name: str, **options: Any) -> Field:
    return build_field(CONFIGS[name], coordinate_dims=2, channels=3, seed=0, **options)


@pytest.mark.parametrize("copies", [None, 2])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_round_trip(name: str, copies: int | None, tmp_path: Path) -> None:
    field = build(name, copies=copies, position=3)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    field(FRAME.grid())  # batch norm: statistics that are not those of a fresh field
    save_field(field, FRAME, tmp_path / "a" / "field")
    loaded, frame = load_field(tmp_path / "a" / "field")
    assert frame == FRAME
    assert loaded.config == field.config or name != "mlp"
    assert torch.equal(evaluate(loaded, frame.grid()), evaluate(field, frame.grid()))
    assert {key: value.dtype for key, value in loaded.state_dict().items()} == {
        key: value.dtype for key, value in field.state_dict().items()
    }
    assert all(p.requires_grad for p in loaded.parameters())
    assert sorted(path.name for path in (tmp_path / "a" / "field").iterdir()) == ["field.json", "field.safetensors"]


def test_the_fourier_matrix_is_saved(tmp_path: Path) -> None:
    field = build("mlp")
    save_field(field, FRAME, tmp_path)
    assert torch.equal(load_file(tmp_path / "field.safetensors")["encoding.matrix"], field.encoding.matrix)
    with torch.no_grad():
        field.encoding.matrix.mul_(2)  # another one than the seed makes
    save_field(field, FRAME, tmp_path)
    assert torch.equal(load_field(tmp_path)[0].encoding.matrix, field.encoding.matrix)


def test_precision_is_kept(tmp_path: Path) -> None:
    field = build("wire").double()
    save_field(field, FRAME, tmp_path)
    coords = FRAME.grid(dtype=torch.float64)
    assert torch.equal(load_field(tmp_path)[0](coords), field(coords))


def edit(path: Path, *keys: str, value: Any) -> None:
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("frame", "axes"), None, "frame.axes is missing"),
        (("frame", "axis"), [1], "frame.axis is not known"),
        (("frame", "size"), [1], "frame.size must have 2 numbers"),
        (("frame", "coordinate_range"), 5, "frame has a value of the wrong form"),
        (("channels",), None, "channels is missing"),
        (("channels",), "three", "channels is 'three'"),
        (("channels",), 4, "last.*should be"),
        (("schema",), 99, "schema is 99; this version reads 1"),
        (("field", "name"), "mpl", "field.name is 'mpl'.*did you mean 'mlp'"),
        (("field", "mlp", "widht"), 5, "widht"),
        (("field", "mlp", "width"), "wide", "field.mlp.width"),
        (("field", "mlp", "hidden_layers"), 1, "hidden.1.*does not belong"),
        (("field", "mlp", "hidden_layers"), 3, "hidden.2.*is missing"),
    ],
)
def test_damaged_descriptions_are_refused(keys: tuple[str, ...], value: Any, message: str, tmp_path: Path) -> None:
    save_field(build("mlp"), FRAME, tmp_path)
    edit(tmp_path / "field.json", *keys, value=value)
    with pytest.raises(InputError, match=message) as caught:
        load_field(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"field\.json is missing"):
        load_field(tmp_path)
    save_field(build("mlp"), FRAME, tmp_path)
    (tmp_path / "field.safetensors").write_bytes(b"\x80\x04no")
    with pytest.raises(InputError, match=r"field\.safetensors is damaged"):
        load_field(tmp_path)
    (tmp_path / "field.safetensors").unlink()
    with pytest.raises(InputError, match=r"field\.safetensors is missing"):
        load_field(tmp_path)
    state = {name: value.int() for name, value in build("mlp").state_dict().items()}
    save_file(state, tmp_path / "field.safetensors")
    with pytest.raises(InputError, match=r"field\.safetensors: .* holds torch\.int32"):
        load_field(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "field.safetensors")
    with pytest.raises(InputError, match=r"field\.safetensors"):
        load_field(tmp_path)
    (tmp_path / "field.json").write_text("[1")
    with pytest.raises(InputError, match=r"field\.json is not readable as JSON"):
        load_field(tmp_path)
    with pytest.raises(InputError, match="frame has 1 axes and the field 2"):
        save_field(build("mlp"), Frame(kind="audio", axes=("t",), coordinate_range=(UNIT,)), tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors hides the system's error; programs tell people of an OSError."""

    def full(state: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_field(build("mlp"), FRAME, tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- frames ------------------------------------------------------------------------------------------------------


def test_grids_of_frames() -> None:
    torch.testing.assert_close(FRAME.grid(), grid(4, 6))
    assert FRAME.grid((2, 2)).tolist() == [[-1, -1], [-1, 1], [1, -1], [1, 1]]
    box = Frame(
        kind="volume",
        axes=("z", "y", "x"),
        coordinate_range=(UNIT, (0.0, 3.0), (-2.0, 2.0)),
        size=(2, 3, 4),
        endpoint=False,
    )
    axes = [
        np.linspace(low, high, n, endpoint=False)
        for n, (low, high) in zip((2, 3, 4), box.coordinate_range, strict=True)
    ]
    expected = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    np.testing.assert_allclose(box.grid(), expected, atol=1e-6)
    audio = Frame(kind="audio", axes=("t",), coordinate_range=((-100.0, 100.0),), size=(5,))
    assert audio.grid().tolist() == [[-100.0], [-50.0], [0.0], [50.0], [100.0]]
    with pytest.raises(InputError, match="axes x, y needs 2 sizes"):
        Frame(kind="points", axes=("x", "y"), coordinate_range=(UNIT, UNIT)).grid()


def test_values_and_data() -> None:
    pixels = torch.tensor([0.0, 127.5, 255.0, 510.0])
    assert FRAME.to_values(pixels).tolist() == [-1.0, 0.0, 1.0, 3.0]
    torch.testing.assert_close(FRAME.to_data(FRAME.to_values(pixels)), pixels)
    assert Frame.from_dict(json.loads(json.dumps(asdict(FRAME)))) == FRAME
    with pytest.raises(InputError, match=r"value_range is 1\.0 to 1.0; it must rise"):
        replace(FRAME, value_range=(1.0, 1.0))
    with pytest.raises(InputError, match="coordinate_range has 1 pairs for 2 axes"):
        replace(FRAME, coordinate_range=(UNIT,))


# ---- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [None, 3])
def test_evaluation_in_chunks(copies: int | None) -> None:
    field = build("norm", copies=copies)
    coords = torch.rand(23, 2) * 2 - 1
    seen: list[int] = []
    field.first.register_forward_hook(lambda m, inputs, o: seen.append(inputs[0].shape[-2] * (copies or 1)))
    values = evaluate(field, coords, chunk=9)
    assert max(seen) <= 9
    assert len(seen) == (3 if copies is None else 8)
    assert field.training
    assert not values.requires_grad
    torch.testing.assert_close(values, field.eval()(coords))
    if copies is not None:
        own = torch.rand(3, 23, 2)
        torch.testing.assert_close(evaluate(field, own, chunk=9), field(own))
    with pytest.raises(InputError, match="chunk is 0"):
        evaluate(field, coords, chunk=0)


# ---- the inner loop ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [("",), ("hidden.",)])
@pytest.mark.parametrize("name", ["mlp", "wire", "mfn", "hash_grid", "grid"])
def test_any_field_in_the_inner_loop(name: str, adapted: tuple[str, ...]) -> None:
    """Offsets of a signal are those that gradient descent on a copy of the field itself would make."""
    if name in ("hash_grid", "grid") and adapted != ("",):
        adapted = ("table", "vertices")
    base = build(name).double()
    field = WithOffsets(base, adapted)
    assert isinstance(field, AdaptedField)
    coords, targets = torch.rand(11, 2).double() * 2 - 1, torch.rand(2, 11, 3).double()
    options = InnerLoopConfig(steps=2, alpha_min=0.05, alpha_max=0.05, engine="func")
    alpha = MetaSGD(options, field.adapted_size).double()
    seen = Observations(coords=coords, values=targets)
    func = fit(field, alpha, seen, steps=2, options=options)
    higher = fit(field, alpha, seen, steps=2, options=replace(options, engine="higher"))
    torch.testing.assert_close(func.offsets, higher.offsets, rtol=1e-9, atol=1e-12)
    gradients = [
        torch.autograd.grad(one.losses.sum() + one.prediction.sum(), list(field.parameters())) for one in (func, higher)
    ]
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-8, atol=1e-10)
    for b in range(2):
        alone = build(name).double()
        chosen = [p for n, p in alone.named_parameters() if n.startswith(adapted)]
        before = torch.cat([p.detach().flatten() for p in chosen])
        optimizer = torch.optim.SGD(chosen, lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            (alone(coords) - targets[b]).square().mean().backward()
            optimizer.step()
        after = torch.cat([p.detach().flatten() for p in chosen])
        torch.testing.assert_close(func.offsets[b].detach(), after - before, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(func.prediction[b], alone(coords), rtol=1e-6, atol=1e-9)


def test_layout_of_offsets() -> None:
    field = WithOffsets(build("mlp"), ("hidden.", "last.bias"))
    assert field.adapted_shapes == [
        ("hidden.0.weight", (6, 6)),
        ("hidden.0.bias", (6,)),
        ("hidden.1.weight", (6, 6)),
        ("hidden.1.bias", (6,)),
        ("last.bias", (3,)),
    ]
    assert field.adapted_size == 87
    offsets: Tensor = field.init_offsets(4)
    assert offsets.shape == (4, 87)
    assert not offsets.any()
    coords = torch.rand(4, 5, 2)
    torch.testing.assert_close(field(offsets, coords), torch.stack([field.field(own) for own in coords]))


def test_what_cannot_be_adapted() -> None:
    with pytest.raises(InputError, match="without copies"):
        WithOffsets(build("mlp", copies=2))
    with pytest.raises(InputError, match="batch_norm"):
        WithOffsets(build("norm"))
    with pytest.raises(InputError, match=r"No parameter begins with head; there are first.weight"):
        WithOffsets(build("mlp"), ("head",))
