"""The page of fits: everything inside, floors, runs that are not finished."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.gallery import main, read_floor
from mwt.errors import InputError
from train.fit import main as fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    Image.fromarray(np.full((16, 16), 90, np.uint8)).save(folder / "grey.png")
    small = ["--debug", "field.mlp.hidden_layers=1", "task=denoising", f"signal.path={folder}/grey.png"]
    assert fit([*small, f"run.dir={folder}/run"]) == 0
    return folder / "run"


def test_the_page_loads_nothing_and_is_well_formed(run: Path, tmp_path: Path) -> None:
    assert main(["--runs", str(run), "--out", str(tmp_path / "page.html")]) == 0
    html = (tmp_path / "page.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,20})', html)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert "total variation" in html
    assert html.count("<img") >= 5

    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    parser = Balance()
    parser.feed(html)
    assert parser.open == []


def test_floors(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--runs", str(run), "--out", str(tmp_path / "page.html"), "--floor"]
    assert main([*out, "denoising.psnr=1"]) == 0
    assert main([*out, "denoising.psnr=1", "image.psnr=1", "denosing.psnr=1"]) == 1
    said = capsys.readouterr().err
    assert "floors without a finished run: image.psnr=1, denosing.psnr=1; the runs are of denoising." in said
    assert main([*out, "denoising.psnr=noisy+90"]) == 1
    assert "at least" in capsys.readouterr().err
    assert 'class="low"' in (tmp_path / "page.html").read_text()
    assert read_floor("tomography.psnr=filtered back-projection+2").baseline == "filtered back-projection"
    with pytest.raises(InputError, match=r"no baseline .noise."):
        main([*out, "denoising.psnr=noise+3"])
    with pytest.raises(InputError, match=r"TASK\.METRIC"):
        main([*out, "denoising"])


def test_what_is_no_number_is_below_its_floor(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    result = json.loads((copied / "result.json").read_text())
    result["final"]["psnr"] = float("nan")
    (copied / "result.json").write_text(json.dumps(result))
    assert main(["--runs", str(copied), "--out", str(tmp_path / "page.html"), "--floor", "denoising.psnr=1"]) == 1
    assert "psnr is nan; at least 1.00 was wanted" in (tmp_path / "page.html").read_text()


def test_a_film_is_shown_before_single_frames(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    frame = next((copied / "reconstruction").glob("*.png"))
    for number in range(20):
        shutil.copy(frame, copied / "reconstruction" / f"{number:05d}.png")
    shutil.copy(frame, copied / "reconstruction/psnr.png")
    for name in ("video.error.gif", "video.gif"):
        shutil.copy(copied / "progress.gif", copied / "reconstruction" / name)
    assert main(["--runs", str(copied), "--out", str(tmp_path / "page.html")]) == 0
    names = re.findall(r"<figcaption>([^<]+)</figcaption>", (tmp_path / "page.html").read_text())
    assert names[:4] == ["video.gif", "video.error.gif", "psnr.png", "00000.png"]


def test_runs_that_are_none(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a run of train\.fit"):
        main(["--runs", str(tmp_path), "--out", str(tmp_path / "page.html")])
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "config.yaml").write_text("")
    with pytest.raises(InputError, match="finished"):
        main(["--runs", str(tmp_path / "open"), "--out", str(tmp_path / "page.html")])
