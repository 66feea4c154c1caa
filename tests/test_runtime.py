"""What programs do to their process: exit status, signals, files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mwt import runtime
from mwt.errors import DivergedError, InputError, NotDefinedError, TrainingError
from mwt.runtime import (
    StopRequested,
    can_compile,
    choose_device,
    environment,
    run_program,
    write_json,
)
from tests.fork_server import Server


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("No such thing."), 2, "error: No such thing."),
        (TrainingError("Not finite at step 3."), 1, "error: Not finite at step 3."),
        (NotDefinedError("No gradient."), 3, "error: No gradient."),
        (DivergedError("Not finite at step 3."), 4, "error: Not finite at step 3."),
        (MemoryError(), 5, "error: out of memory"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), 5, "error: out of memory: CUDA"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "No space left on device: a/b"),
        (PermissionError(errno.EACCES, "Permission denied", "c"), 2, "Permission denied: c"),
    ],
)
def test_what_a_person_can_mend_is_one_sentence(
    error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str] | None) -> int:
        raise error

    with pytest.raises(SystemExit) as left:
        run_program(main)
    assert left.value.code == status
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (143, 143)])
def test_what_main_returns_is_the_exit_status(returned: int | None, status: int) -> None:
    def main(argv: list[str] | None) -> int | None:
        return returned

    with pytest.raises(SystemExit) as left:
        run_program(main)
    assert left.value.code == status


def test_processes_part_before_python_ends() -> None:
    """Else one of gloo's threads may abort a process that is done (SIGABRT). Not after an error: others may wait."""

    def main(argv: list[str] | None) -> int:
        if argv:
            raise InputError(argv[0])
        return 0

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(SystemExit, match="2"):
            run_program(main, ["wrong"])
        assert torch.distributed.is_initialized()
        with pytest.raises(SystemExit, match="0"):
            run_program(main)
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_memory_that_torch_cannot_have_is_told_apart_from_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str] | None) -> int:
        return len(torch.empty(2**55))  # more than any machine addresses

    with pytest.raises(SystemExit) as left:
        run_program(main)
    assert left.value.code == 5
    assert "error: out of memory: " in capsys.readouterr().err


def test_output_that_nobody_reads_any_more_ends_a_program_quietly() -> None:
    """As `program | head` does. In processes of their own: what Python flushes at its very end is a part of it."""
    program = """
import os
from mwt.runtime import run_program
for lines in (1, 100_000):  # kept back until the end, and more than a pipe takes
    child = os.fork()
    if not child:
        run_program(lambda argv: print("line\\n" * lines))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 141
"""
    read, write = os.pipe()
    os.close(read)
    ended = subprocess.run(
        [sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is the whole process's")
def test_the_peak_is_of_what_came_after(server: Server) -> None:
    """ru_maxrss would say 200 MB, and what is free but kept is not used unseen.

    In a process of its own: after many tests the heap may have pieces that malloc_trim leaves alone.
    """
    code = """
import torch
from mwt.peak_memory import PeakMemory
from mwt.runtime import keep_freed_memory

keep_freed_memory()
del (large := [torch.ones(50_000_000)])[:]
measured = PeakMemory(torch.device("cpu"))
del (small := [torch.ones(15_000_000)])[:]
print(measured.read())
"""
    assert 55e6 < int(server.run(program="", code=code)) < 75e6


def test_a_mistake_in_the_program_keeps_its_traceback() -> None:
    def main(argv: list[str] | None) -> int:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        run_program(main)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_a_flag(number: int, status: int) -> None:
    before = signal.getsignal(number)
    with StopRequested() as stop:
        assert stop.signal is None
        assert stop.vote(1, torch.device("cpu"), save=True) == (False, True)
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert stop.exit_status == status
        assert stop.vote(1, torch.device("cpu")) == (True, False)
        os.kill(os.getpid(), signal.SIGTERM)  # what a launcher sends after a Ctrl-C: the save goes on
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once_unless_it_is_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("mwt.runtime.time.monotonic", lambda: now)
    with StopRequested():
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.1
        os.kill(os.getpid(), signal.SIGINT)
        now += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_json_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == {"x": 1}
    write_json(path, [1, 2])
    assert json.loads(path.read_text()) == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(InputError, match=r"run\.device is cuda, but torch sees no CUDA device"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_compilation_without_a_compiler_is_one_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.warns(UserWarning, match=r"g\+\+.*python3-dev") as caught:
        assert not can_compile(torch.device("cpu"))
    assert len(caught) == 1


def test_the_environment_is_json_and_names_what_results_depend_on() -> None:
    facts = json.loads(json.dumps(environment()))
    assert torch.__version__.startswith(facts["versions"]["torch"].split("+")[0])
    assert set(facts) >= {"commit", "modified", "python", "platform", "versions", "cpu", "cpu_threads", "gpus"}
    assert facts["command"] == sys.argv


def test_the_allocator_setting_works_or_says_no(server: Server) -> None:
    said = server.run(program="", code="from mwt.runtime import keep_freed_memory as k; print(k(), k())")
    assert said.split() in (["True", "True"], ["False", "False"])


def test_what_is_compiled_wins_back_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "can_compile", lambda device: True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")

    def asked(choice: str, device: torch.device, steps: int, kept: int) -> bool:
        return runtime.compile_pays(choice, device, steps, kept)

    assert [asked("auto", cpu, steps, 1_300_000_000) for steps in (100, 200)] == [False, True]
    assert [asked("auto", cpu, 1_000_000, kept) for kept in (0, 100, 1_000_000)] == [False, False, True]
    assert [asked("auto", gpu, steps, 0) for steps in (499, 500)] == [False, True]
    assert [asked(choice, cpu, 1, 0) for choice in ("never", "always")] == [False, True]
    monkeypatch.setattr(runtime, "can_compile", lambda device: False)
    assert not asked("always", cpu, 1, 0)
