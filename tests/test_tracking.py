"""metrics.jsonl: appended, cut back by a resume, readable after a crash."""

from __future__ import annotations

import json
from pathlib import Path

from mwt.tracking import MetricsLog, read_metrics
from tests.fork_server import Server

ROOT = Path(__file__).parents[1]


def write(log: MetricsLog, *steps: int) -> None:
    for step in steps:
        log.write(step=step, epoch=step / 3, split="train", loss=0.5 * step)


def test_one_object_a_line_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    write(log, 1, 2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "epoch": 0.3333, "split": "train", "loss": 0.5},
        {"step": 2, "epoch": 0.6667, "split": "train", "loss": 1.0},
    ]
    log.close()


def test_a_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    write(log, 1, 2)
    position = log.position
    assert position == path.stat().st_size
    write(log, 3)
    log.close()
    with path.open("a") as file:
        file.write('{"step": 4, "ep')  # the line that a crash tore
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]

    log = MetricsLog(path)
    log.truncate(position)
    write(log, 3, 4)
    assert log.position == path.stat().st_size
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]


def test_a_log_that_was_deleted_is_not_filled_with_zeros(tmp_path: Path) -> None:
    """A file cut to a length beyond its end grows by NUL bytes; the lines after them could not be read."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.truncate(1000)
    write(log, 7)
    log.close()
    assert b"\0" not in path.read_bytes()
    assert [row["step"] for row in read_metrics(path)] == [7]


def test_no_log_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_full_disk_leaves_no_torn_line_and_names_the_file(tmp_path: Path, server: Server) -> None:
    """In a process of its own, whose files may not grow beyond 200 bytes: the second line fits in part."""
    path = tmp_path / "metrics.jsonl"
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom mwt.tracking import MetricsLog\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))\nlog = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(3):\n"
        "    try:\n        log.write(step=step, epoch=0.0, split='x' * 80)\n"
        "    except OSError as error:\n        print(step, error.filename)\n"
    )
    assert server.run(str(path), program="", code=code).splitlines() == [f"1 {path}", f"2 {path}"]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0]
