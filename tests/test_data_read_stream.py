"""Streaming: from a web server that fails, in lanes that cut uneven shards, and what is never opened."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from data_pipes import remote, shards, streaming
from data_pipes.decode import encode_png
from data_pipes.read import StreamingSplit, open_split
from data_pipes.schema import DatasetInfo, ShardInfo, SplitInfo, read_info
from data_pipes.split import Epoch
from data_pipes.write import Sample, write_dataset
from mwt.config import ClassifyConfig
from mwt.config_files import load_config
from mwt.errors import InputError
from mwt.structs import SignalFacts

CPU = torch.device("cpu")
FACTS = SignalFacts(kind="image", channels=1, height=1, width=2, classes=tuple("abcde"))
COUNT = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images whose value is their position, in 17 shards of three and a last one of two."""
    samples = [
        Sample(extension="png", data=encode_png(torch.full((1, 1, 2), i, dtype=torch.uint8)), label=i % 5)
        for i in range(COUNT)
    ]
    out = tmp_path_factory.mktemp("stream") / "data"
    write_dataset(out, name="t", facts=FACTS, licence="", splits={"train": samples}, shard_bytes=6000)
    return out


class Server:
    """Serves a folder on this machine; `cut` ends the next answers to GET early; `seen` are the paths asked for.

    /elsewhere/dataset.json leads to `redirect`.
    """

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self.cut: list[tuple[str, int]] = []
        self.redirect = ""
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.partition("?")[0].strip("/")
                server.seen.append(self.path)
                if name == "elsewhere/dataset.json":
                    self.send_response(302)
                    self.send_header("Location", server.redirect)
                    self.end_headers()
                    return
                cut = next((cut for cut in server.cut if cut[0] == name), None)
                if cut is None:
                    super().do_GET()
                    return
                server.cut.remove(cut)
                data = (folder / name).read_bytes()
                if cut[1] < 0:
                    self.send_error(-cut[1])
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: cut[1]])

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(folder)))  # type: ignore[arg-type]
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(shards.time, "sleep", lambda seconds: None)
    server = Server(folder)
    yield server
    server.close()


def positions(split: Any, size: int = 8, **options: Any) -> list[int]:
    found = []
    for batch in split.batches(batch_size=size, **options):
        assert batch.images[:, 0, 0, 0].tolist() == batch.positions.tolist()
        found += batch.positions.tolist()
    return found


def test_a_folder_at_a_url(server: Server, folder: Path) -> None:
    small = open_split(server.url, "train", device=CPU)
    assert small.reader == "resident"
    assert positions(small) == list(range(COUNT))
    large = open_split(server.url, "train", device=CPU, resident_mb=0)
    assert large.reader == "stream"
    local = open_split(folder, "train", device=CPU, reader="stream")
    for options in ({}, {"shuffle": True, "epoch": 3}):
        assert positions(large, **options) == positions(local, **options)
    assert large.key(7) == local.key(7) == "00000007"
    with pytest.raises(InputError, match=r"data\.reader=indexed reads local shards"):
        open_split(server.url, "train", device=CPU, reader="indexed")


def test_a_local_list_of_urls(server: Server, folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    for shard in content["splits"]["train"]["shards"]:
        shard["file"] = f"{server.url}/{shard['file']}?token=secret"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert positions(open_split(tmp_path, "train", device=CPU, reader="stream")) == list(range(COUNT))
    assert any(path.endswith("?token=secret") for path in server.seen)
    (folder / "train-000001.tar").rename(folder / "away")
    try:
        with pytest.raises(InputError, match=r"/train-000001\.tar cannot be read: the server answered 404") as caught:
            positions(open_split(tmp_path, "train", device=CPU, reader="stream"))
        assert "secret" not in str(caught.value)
        skipping = open_split(tmp_path, "train", device=CPU, reader="stream", on_bad_sample="skip", max_bad=0.1)
        assert positions(skipping) == [i for i in range(COUNT) if i not in (3, 4, 5)]
    finally:
        (folder / "away").rename(folder / "train-000001.tar")


@pytest.mark.parametrize("cut", [0, 700, 2100, 5000, -503, -429])
def test_a_broken_connection_is_opened_again(server: Server, cut: int) -> None:
    split = open_split(server.url, "train", device=CPU, resident_mb=0, reader="stream")
    server.cut = [("train-000003.tar", cut), ("train-000003.tar", 0 if cut < 0 else cut)]
    assert positions(split) == list(range(COUNT))
    assert server.cut == []
    server.cut = [("train-000003.tar", cut)] * 20
    with pytest.raises(InputError, match=r"/train-000003\.tar cannot be read beyond sample \d: .*\. Tried 5 times\."):
        positions(split)


def test_nothing_at_a_url(server: Server) -> None:
    with pytest.raises(InputError, match=r"/nothing/dataset\.json cannot be read: the server answered 404"):
        read_info(f"{server.url}/nothing")
    with pytest.raises(InputError, match=r"/dataset\.json cannot be read: .*refused"):
        read_info("http://127.0.0.1:9")


def test_another_file_than_recorded(server: Server, folder: Path, tmp_path: Path) -> None:
    """Compared when a shard has been read to its end."""
    content = json.loads((folder / "dataset.json").read_text())
    for shard in content["splits"]["train"]["shards"]:
        shard["file"] = f"{server.url}/{shard['file']}"
    content["splits"]["train"]["shards"][2]["sha256"] = "0" * 64
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    split = open_split(tmp_path, "train", device=CPU, reader="stream")
    with pytest.raises(InputError, match=r"train-000002\.tar has another sha256 than dataset\.json records"):
        positions(split)


# ---- what is never opened ----------------------------------------------------------------------------------------


def test_commands_are_run_only_where_the_configuration_names_them(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    for shard in content["splits"]["train"]["shards"]:
        shard["file"] = f"pipe:touch {tmp_path}/ran; cat {folder}/{shard['file']}"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"pipe: is not among data\.schemes .*It runs a command on this machine"):
        open_split(tmp_path, "train", device=CPU)
    assert not (tmp_path / "ran").exists()
    config = load_config(ClassifyConfig, None, ["data.schemes=[pipe]"]).data
    split = open_split(tmp_path, "train", device=CPU, reader="stream", schemes=config.schemes)
    assert positions(split) == list(range(COUNT))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "address", ["pipe:id", "file:///etc/passwd", "ftp://x/y", "sftp://x/y", "ais://x/y", "PIPE:id"]
)
def test_schemes_that_nobody_named(address: str) -> None:
    with pytest.raises(InputError, match=r"is not among data\.schemes \(https, http, s3, gs\)"):
        remote.open_url(address)
    with pytest.raises(InputError, match=r"is not among data\.schemes"):
        read_info(address)


def test_redirections_keep_to_the_schemes(server: Server, folder: Path) -> None:
    server.redirect = "ftp://127.0.0.1:9/dataset.json"
    with pytest.raises(InputError, match=r"ftp: is not among data\.schemes"):
        read_info(f"{server.url}/elsewhere")
    server.redirect = f"{server.url}/dataset.json"
    assert read_info(f"{server.url}/elsewhere").name == "t"
    server.redirect = "https://127.0.0.1:9/dataset.json"
    with pytest.raises(InputError, match=r"https: is not among data\.schemes \(http\)"):
        read_info(f"{server.url}/elsewhere", schemes=("http",))


@pytest.mark.parametrize(
    "address", ["http://x y/z?token=secret", "http://x:port/z?token=secret", "http://[x/?token=secret"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(InputError, match="cannot be opened: it is no valid address") as raised:
        remote.open_url(address)
    with pytest.raises(InputError, match="cannot be opened: it is no valid address"):
        read_info(address)
    assert "secret" not in str(raised.value)


def test_a_server_that_speaks_another_language() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"220 mail.example.org ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(InputError, match=r"dataset\.json cannot be read: .*BadStatusLine"):
            read_info(address)
        thread.join()


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/b.tar", "..", "./x.tar"])
def test_shards_outside_of_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    content["splits"]["train"]["shards"][0]["file"] = name
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"is neither a plain file name nor a URL"):
        read_info(tmp_path)


# ---- the order ---------------------------------------------------------------------------------------------------


def split_of(counts: list[int], folder: Path) -> StreamingSplit:
    """A split of shards that are not there: its order needs none."""
    shards_ = tuple(ShardInfo(file=f"http://x/{i}", count=c, bytes=1, sha256="") for i, c in enumerate(counts))
    info = DatasetInfo(
        name="t", signal="image", channels=1, height=1, width=2, classes=("a",), licence="", folder=folder,
        splits={"train": SplitInfo(count=sum(counts), shards=shards_)},
    )  # fmt: skip
    return StreamingSplit(info, "train", device=CPU)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    world=st.integers(1, 9),
    size=st.integers(1, 16),
    epoch=st.integers(0, 3),
    start=st.integers(0, 3),
    buffer=st.sampled_from([1, 8, 64, 8192]),
    shuffle=st.booleans(),
)
def test_every_sample_once_from_any_shards(
    tmp_path: Path, counts: list[int], world: int, size: int, epoch: int, start: int, buffer: int, shuffle: bool
) -> None:
    """The reading itself, on shards of which only the counts exist: each gives (shard, number) for its samples."""
    split = split_of(counts, tmp_path)
    asked = Epoch(number=epoch, shuffle=shuffle)
    read: Counter[int] = Counter()

    def stream(source: str, shard: ShardInfo, **_: Any) -> Iterator[dict[str, Any]]:
        number = int(source.rpartition("/")[2])
        for i in range(shard.count):
            read[number] += 1
            yield {"__key__": f"{number}/{i}"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "stream_shard", stream)
        patch.setattr(streaming, "SHUFFLE_BUFFER", buffer)
        order = split.order(asked).tolist()
        assert sorted(order) == list(range(sum(counts)))
        lanes = len(split._plan(asked)[1])
        whole = size * world
        for rank in range(world):
            read.clear()
            shares = [
                range(first + rank, min(first + whole, len(split)), world)
                for first in range(start * whole, len(split), whole)
            ]
            places = [place for share in shares for place in share]
            found = list(split._undecoded(shares, asked))
            assert [position for position, _ in found] == [order[place] for place in places]
            for position, sample in found:
                assert sample is not None
                number, _, inside = sample["__key__"].partition("/")
                assert split._first[int(number)] + int(inside) == position
            if shuffle and lanes % world == 0:  # a process reads its own lanes: a shard twice where they are cut
                assert read.total() <= sum(counts) // world + (lanes // world + 1) * 2 * max(counts)


def test_an_order_of_many_lanes(tmp_path: Path) -> None:
    """128 shards of 8 in 32 lanes: each sample is at any place alike, each shard in each lane alike; and the limit."""
    split = split_of([8] * 128, tmp_path)
    epochs = 300
    orders = np.stack([split.order(Epoch(number=epoch, shuffle=True)).numpy() for epoch in range(epochs)])
    assert len(split._plan(Epoch(shuffle=True))[1]) == 32
    places = np.argsort(orders, axis=1)  # [epoch, sample]
    for part in (places % 32, places // 32):  # lane, and place within it
        for sample in (0, 500, 1023):
            assert stats.chisquare(np.bincount(part[:, sample], minlength=32)).pvalue > 1e-4
    correlations = [stats.spearmanr(order, np.arange(1024)).statistic for order in orders[:100]]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(100 * 1023)
    together = (places // 32).reshape(epochs, 128, 8)  # batches of 32
    assert all(len(set(batches)) == 8 for batches in together.reshape(-1, 8)), "the docstring says never"


def test_lanes_keep_processes_off_each_others_shards(folder: Path, server: Server) -> None:
    """Two processes: no shard is fetched whole by both, but those that are cut between lanes."""
    asked = []
    for rank in range(2):
        split = open_split(server.url, "train", device=CPU, resident_mb=0, reader="stream")
        server.seen.clear()
        positions(split, size=4, shuffle=True, rank=rank, world=2)
        asked.append(Counter(server.seen))
    assert sum(asked[0].values()) + sum(asked[1].values()) <= 17 + 4
    assert all(counter.total() < 14 for counter in asked)


def test_starting_within_an_epoch_passes_over_shards(server: Server) -> None:
    split = open_split(server.url, "train", device=CPU, resident_mb=0, reader="stream")
    whole = positions(split, size=4)
    server.seen.clear()
    assert positions(split, size=4, start=10) == whole[40:]
    assert len(server.seen) == 4  # of 17
