"""Every config: it parses, its header tells the truth, and it is the row of the paper that it says it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_pipes.prepare.__main__ import SOURCES
from mwt.config import VARIANTS, ClassifyConfig
from mwt.config_files import list_configs, load_config

FOLDER = Path(__file__).parents[1] / "configs" / "classify"
PATHS = sorted(FOLDER.glob("*.yaml"))
OWN = {"digits", "fashion_mnist_cpu"}
"""Configs that are not the paper's."""

# The paper's rows, typed from the paper and not from the configs: (name, variant, data, width, blocks, k, omega, s,
# w_cls, epochs, augmentation, the figure that the header must state). Sections 4, 4.1, 4.2; Tables 1 to 3, 6; Figure 3.
TABLE_1 = [
    ("mnist_wt", "WT", "mnist", 128, 10, 6, 10.0, 1.0, 0.0, 10, "none", "91.38 ± 1.67 %"),
    ("mnist_mwt", "MWT", "mnist", 128, 10, 6, 10.0, 1.0, 0.01, 10, "none", "98.33 ± 0.11 %"),
    ("mnist_mwt_l", "MWT-L", "mnist", 256, 10, 6, 10.0, 1.0, 0.01, 10, "none", "98.80 ± 0.06 %"),
    ("fashion_mnist_wt", "WT", "fashion_mnist", 128, 10, 6, 10.0, 1.0, 0.0, 10, "none", "83.97 ± 1.38 %"),
    ("fashion_mnist_mwt", "MWT", "fashion_mnist", 128, 10, 6, 10.0, 1.0, 0.01, 10, "none", "89.41 ± 0.25 %"),
    ("fashion_mnist_mwt_l", "MWT-L", "fashion_mnist", 256, 10, 6, 10.0, 1.0, 0.01, 10, "none", "90.43 ± 0.23 %"),
    ("cifar10_wt", "WT", "cifar10", 128, 10, 6, 10.0, 1.0, 0.0, 10, "none", "43.78 ± 0.64 %"),
    ("cifar10_mwt", "MWT", "cifar10", 128, 10, 6, 10.0, 1.0, 0.01, 10, "none", "56.90 ± 0.29 %"),
    ("cifar10_mwt_l", "MWT-L", "cifar10", 256, 10, 6, 10.0, 1.0, 0.01, 10, "none", "59.57 ± 0.52 %"),
]
SECTION_4_1 = [
    ("cifar10_mwt_20blocks_aug", "MWT", "cifar10", 128, 20, 6, 10.0, 1.0, 0.01, 40, "crop_flip", "64.7 %"),
]
TABLE_6 = [
    ("cifar10_trainval_wt", "WT", "cifar10_trainval", 128, 10, 6, 10.0, 0.1, 0.0, 10, "none", "49.8 % and 23.1 dB"),
]
MODELS = {"wt": ("WT", 128, 0.0), "mwt": ("MWT", 128, 0.01), "mwt_l": ("MWT-L", 256, 0.01)}
# Model, s, then accuracy and PSNR without and with augmentation.
TABLE_2_ROWS = [
    ("wt", "0.25", "47.96 ± 0.29 % and 23.23 ± 0.08 dB", "46.83 ± 0.25 % and 23.27 ± 0.05 dB"),
    ("wt", "0.1", "48.11 ± 0.42 % and 22.50 ± 0.02 dB", "47.02 ± 0.37 % and 22.47 ± 0.04 dB"),
    ("wt", "0.05", "49.01 ± 0.17 % and 21.64 ± 0.03 dB", "47.97 ± 1.27 % and 21.79 ± 0.04 dB"),
    ("mwt", "0.25", "48.79 ± 0.36 % and 21.14 ± 0.02 dB", "56.13 ± 0.28 % and 21.14 ± 0.08 dB"),
    ("mwt", "0.1", "50.14 ± 0.87 % and 20.82 ± 0.04 dB", "56.78 ± 0.27 % and 21.14 ± 0.02 dB"),
    ("mwt", "0.05", "50.23 ± 0.31 % and 20.68 ± 0.03 dB", "57.27 ± 0.38 % and 20.98 ± 0.06 dB"),
    ("mwt_l", "0.1", "51.80 ± 0.23 % and 21.94 ± 0.02 dB", "60.62 ± 0.37 % and 22.31 ± 0.03 dB"),
    ("mwt_l", "0.05", "52.04 ± 0.45 % and 21.56 ± 0.02 dB", "60.75 ± 0.65 % and 21.86 ± 0.04 dB"),
    ("mwt_l", "0.02", "52.93 ± 0.90 % and 20.95 ± 0.04 dB", "60.75 ± 0.37 % and 21.14 ± 0.02 dB"),
]


def imagenette(model: str, s: str, figure: str, *, augmented: bool) -> tuple:
    variant, width, weight = MODELS[model]
    name = f"imagenette_{model}_s{s.replace('.', '')}{'_aug' if augmented else ''}"
    augment = "affine_flip" if augmented else "none"
    return name, variant, "imagenette", width, 10, 4, 30.0, float(s), weight, 40, augment, figure


TABLE_2 = [
    imagenette(model, s, figure, augmented=augmented)
    for model, s, plain, with_augmentation in TABLE_2_ROWS
    for augmented, figure in ((False, plain), (True, with_augmentation))
]
TABLE_3 = [
    (f"imagenet1k_mwt_l_w{code}", "MWT-L", "imagenet1k", 256, 10, 4, 30.0, 0.01, weight, 40, "affine_flip", figure)
    for code, weight, figure in (
        ("001", 0.01, "24.11 % and 21.78 dB"),
        ("0001", 0.001, "21.87 % and 22.09 dB"),
        ("00001", 0.0001, "19.21 % and 22.14 dB"),
    )
]
FIGURE_3 = [
    ("modelnet40_mwt_l_s01", "MWT-L", "modelnet40", 256, 10, 4, 10.0, 0.1, 0.01, 150, "points", "85.82 %"),
    ("modelnet40_mwt_l_s001", "MWT-L", "modelnet40", 256, 10, 4, 10.0, 0.01, 0.01, 150, "points", "85.41 %"),
    ("modelnet40_mwt_l_s0001", "MWT-L", "modelnet40", 256, 10, 4, 10.0, 0.001, 0.01, 150, "points", "84.04 %"),
    ("modelnet40_mwt_l_s000005", "MWT-L", "modelnet40", 256, 10, 4, 10.0, 0.00005, 0.01, 150, "points", "30.35 %"),
]
PUBLISHED = TABLE_1 + SECTION_4_1 + TABLE_6 + TABLE_2 + TABLE_3 + FIGURE_3


def read(name: str) -> ClassifyConfig:
    return load_config(ClassifyConfig, FOLDER / f"{name}.yaml")


def header(path: Path) -> list[str]:
    """The comment that a file begins with, without its signs."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].strip())
    return lines


def test_the_paper_s_rows_are_all_here_and_nothing_is_untested() -> None:
    assert {path.stem for path in PATHS} == {row[0] for row in PUBLISHED} | OWN
    assert [len(rows) for rows in (TABLE_1, TABLE_2, TABLE_3, FIGURE_3)] == [9, 18, 3, 4]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_a_published_row_resolves_to_the_paper_s_settings(row: tuple) -> None:
    name, variant, data, width, blocks, steps, omega, share, weight, epochs, augment, figure = row
    config = read(name)
    assert config.variant == variant
    assert config.data.path == f"data/{data}"
    assert config.siren.hidden == width
    assert config.reader.blocks == blocks
    assert config.inner_loop.steps == steps
    assert config.siren.omega == omega
    assert (config.inner_loop.fraction, config.inner_loop.points) == (share, None)
    assert config.loss.classification_weight == weight
    assert config.optim.epochs == epochs
    assert config.data.augment == augment
    assert config.data.train_split == "train"
    assert config.data.test_split == ("val" if data in {"cifar10_trainval", "imagenette", "imagenet1k"} else "test")
    assert figure in " ".join(header(FOLDER / f"{name}.yaml"))
    assert figure.split(" ")[0] + " %" in header(FOLDER / f"{name}.yaml")[0]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row[0])
def test_a_published_row_shares_the_settings_of_section_4(row: tuple) -> None:
    config = read(row[0])
    in_caption_of_table_6 = row[0] == "cifar10_trainval_wt"
    assert config.siren.hidden_layers == 4
    assert (config.reader.name, config.reader.head_dim, config.reader.layer_scale) == ("transformer", 64, 0.1)
    assert (config.reader.token_scale, config.reader.mlp_ratio) == (500.0, 1.0)
    assert config.data.batch_size == 16
    assert (config.optim.lr_siren, config.optim.lr_reader, config.optim.weight_decay) == (1e-4, 1e-4, 1e-4)
    assert config.optim.lr_alpha == (1e-4 if in_caption_of_table_6 else 1e-2)
    assert config.inner_loop.shared_alpha == in_caption_of_table_6
    assert (config.inner_loop.alpha_min, config.inner_loop.alpha_max) == (0.1, 1.0)
    assert config.data.limit is None
    assert config.run.precision == "bf16"


@pytest.mark.parametrize("name", [row[0] for row in PUBLISHED if row[10] == "affine_flip"])
def test_large_images_are_padded_by_an_eighth(name: str) -> None:
    assert read(name).data.crop_padding == 40


def test_the_quickstart() -> None:
    config = read("digits")
    assert config.data.path == "builtin:digits"
    assert (config.siren.hidden, config.siren.hidden_layers, config.siren.omega) == (64, 2, 10.0)
    assert (config.inner_loop.fraction, config.inner_loop.points) == (1.0, None)
    assert (config.run.precision, config.data.test_split, config.data.limit) == ("fp32", "test", None)


def test_fashion_mnist_on_a_cpu_uses_the_published_data() -> None:
    config = read("fashion_mnist_cpu")
    assert config.data.path == "data/fashion_mnist"
    assert (config.data.test_split, config.data.limit) == ("test", None)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_header_names_the_command_the_data_the_paper_and_the_time(path: Path) -> None:
    lines = header(path)
    command = f"-m train.classify --config configs/classify/{path.name}"
    assert 20 < len(lines[0]) <= 120
    assert not lines[0].endswith(".")
    assert lines[1] == ""
    assert lines[2:4] == [f"python {command}", f"accelerate launch {command}"]
    labels = [line.split(":")[0] for line in lines if re.match(r"(Data|Paper|Time|Note):  ", line)]
    assert labels[:3] == ["Data", "Paper", "Time"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_header_tells_how_to_make_the_data_that_the_config_reads(path: Path) -> None:
    config = load_config(ClassifyConfig, path)
    text = " ".join(header(path))
    if config.data.path.startswith("builtin:"):
        assert "comes with the package" in text
    else:
        (command,) = re.findall(r"python -m data_pipes\.prepare (\w+) (?:.* )?--out (data/\w+)", text)
        assert command[1] == config.data.path
        assert command[0] == config.data.path.removeprefix("data/")
        assert command[0] in SOURCES


def test_no_two_runs_share_a_folder() -> None:
    folders = [load_config(ClassifyConfig, path).run.dir for path in PATHS]
    assert folders == [f"runs/{path.stem}" for path in PATHS]


def test_files_say_only_what_a_base_does_not() -> None:
    for path in PATHS:
        base = re.search(r"^base: (.+)$", path.read_text(), flags=re.MULTILINE)
        assert base is None or (FOLDER / base[1]) in PATHS, f"{path.name}: its base must be a run of its own"
        assert load_config(ClassifyConfig, path).variant in VARIANTS


def test_the_list_shows_every_config_with_its_summary() -> None:
    rows = list_configs(FOLDER)
    assert [name for name, _ in rows] == [path.stem for path in PATHS]
    assert [summary for _, summary in rows] == [header(path)[0] for path in PATHS]
