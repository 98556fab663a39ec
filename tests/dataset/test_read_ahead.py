"""utils.sampler and utils.blocks: the order of an epoch, and what is read from the disk for it, by
all ranks and workers.
"""

import json
import os
import signal
import sys
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # also started by torchrun, below

import numpy as np
import pytest
from torch.utils.data import DataLoader

from config.load import load_config
from data.make_synthetic import write_training_set
from data.synth.render_pool import open_studio
from tests.commands import ROOT, run
from train import train_standalone
from train.engine import Engine
from utils import distributed
from utils.dataset.base import keep_batch
from utils.dataset.order import WINDOW, EpochBatches
from utils.dataset.read_ahead import ReadAhead, RecordBlocks
from utils.dataset.records import MXFaceDataset
from utils.dataset.workers import start_worker
from utils.errors import InputError
from utils.inputs import to_input
from utils.recordio.format import IRHeader, pack
from utils.recordio.indexed import IndexedRecordIO
from utils.recordio.reader import RecordFile

IMAGES, SHARDS, BLOCK, BATCH = 1003, (400, 603), 5, 24  # 80 + 121 blocks: 4 windows


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A set of two shards; the keys of the second are shuffled, as im2rec's are.

    The records tell shard and place in the file, and are no images.
    """
    folder = tmp_path_factory.mktemp("shards")
    for number, count in enumerate(SHARDS):
        keys = np.random.default_rng(1).permutation(count) if number else np.arange(count)
        with IndexedRecordIO(
            folder / f"train_{number}.idx", folder / f"train_{number}.rec", "w"
        ) as writer:
            for at, key in enumerate(keys):
                writer.write_idx(
                    int(key),
                    pack(
                        IRHeader(0, 0.0, int(key), 0), b"%d %d" % (number, at) + bytes(900 + at % 7)
                    ),
                )
    (folder / "property").write_text("1,112,112\n")
    return MXFaceDataset(folder)


def sampler(dataset, rank=0, world=1, batch=BATCH, seed=3, block=BLOCK):
    return EpochBatches(
        len(dataset),
        batch,
        rank,
        world,
        seed,
        True,
        ReadAhead(RecordBlocks(dataset.record_files(), block)),
    )


def epoch(dataset, world=1, number=0, samples=0, **more):
    """The global batches of an epoch, from all ranks."""
    samplers = [sampler(dataset, rank, world, BATCH // world, **more) for rank in range(world)]
    for one in samplers:
        one.seek(number, samples)
    return [sum(parts, []) for parts in zip(*samplers, strict=True)]


def test_order_without_blocks_is_that_of_published_checkpoints():
    """A state that was saved before blocks existed goes on with the very next image."""
    for length, world, samples in ((103, 1, 0), (1000, 2, 48), (1000, 4, 960)):
        order = np.random.default_rng([7, 2]).permutation(length)
        for rank in range(world):
            ours = EpochBatches(length, 24 // world, rank, world, 7)
            ours.seek(2, samples)
            starts = range(
                samples + rank * (24 // world), length - 24 + 1 + rank * (24 // world), 24
            )
            assert list(ours) == [
                order[first : first + 24 // world].tolist() for first in starts
            ] and len(ours) == len(starts)
    # all ranks hold it once, in 32 bits
    assert (
        sum(EpochBatches(10_000, 5, rank, 4, 7)._own_part().nbytes for rank in range(4))
        == 4 * 10_000
    )
    unshuffled = EpochBatches(10, 2, 1, 2, 0, shuffle=False)
    assert list(unshuffled) == [[2, 3], [6, 7]]


def test_blocks_every_image_once_whatever_the_ranks_and_the_position(shards):
    whole = epoch(shards)
    assert len(whole) == IMAGES // BATCH and len(set(sum(whole, []))) == IMAGES // BATCH * BATCH
    assert sorted(sum(epoch_of_ones(shards), [])) == list(range(IMAGES))
    assert epoch(shards, world=2) == epoch(shards, world=4) == whole
    for done in (1, 13, 14, 30, 40):
        assert (
            epoch(shards, samples=done * BATCH)
            == epoch(shards, world=2, samples=done * BATCH)
            == whole[done:]
        )
    assert epoch(shards, number=1) != whole != epoch(shards, seed=4)


def epoch_of_ones(dataset):
    return list(sampler(dataset, batch=1))


def test_blocks_are_runs_of_the_file_and_windows_mix_them(shards):
    blocks = RecordBlocks(shards.record_files(), BLOCK)
    assert len(blocks) == 80 + 121 and blocks.sizes.sum() == IMAGES and blocks.sizes[-1] == 3
    places = [
        place(shards, index) for block in range(len(blocks)) for index in blocks.indices(block)
    ]
    # in the order of the files
    assert places == [(number, at) for number, count in enumerate(SHARDS) for at in range(count)]
    order = sum(epoch_of_ones(shards), [])
    window = [place(shards, index) for index in order[: WINDOW * BLOCK]]
    # so many whole blocks
    assert len({(number, at // BLOCK) for number, at in window}) == WINDOW
    # mixed: 256 of 320 without
    assert (
        sum(
            left[0] == right[0] and right[1] - left[1] == 1
            for left, right in zip(window, window[1:], strict=False)
        )
        < 20
    )
    ends = [blocks.extent(block) for block in range(len(blocks))]
    assert [(number, start) for number, start, _ in ends[1:80]] == [
        (number, end) for number, _, end in ends[:79]
    ]
    assert ends[-1][2] == os.path.getsize(shards.record_files()[1].path)


def place(dataset, index):
    """(shard, place in the file) that the record says."""
    number, at = dataset.stored(index)[0][:12].tobytes().split(b"\0")[0].split(b" ")
    return int(number), int(at)


class Logged:
    """Notes reads of record files by all processes of this test, one line each, in the order of
    their ends.
    """

    def __init__(self, monkeypatch, log):
        self.log = os.open(log, os.O_CREAT | os.O_RDWR | os.O_APPEND)
        read, read_through = RecordFile.read, RecordFile.read_through

        def noting(kind, function):
            def call(records, start, *arguments):
                result = function(records, start, *arguments)
                os.write(
                    self.log,
                    json.dumps(
                        [
                            kind,
                            os.getpid(),
                            Path(records.path).name,
                            start,
                            arguments[0] if kind == "block" else 0,
                        ]
                    ).encode()
                    + b"\n",
                )
                return result

            return call

        monkeypatch.setattr(RecordFile, "read", noting("record", read))
        monkeypatch.setattr(RecordFile, "read_through", noting("block", read_through))

    def lines(self):
        return [json.loads(line) for line in os.pread(self.log, 1 << 24, 0).splitlines()]


def test_workers_read_what_was_read_ahead(shards, monkeypatch, tmp_path):
    """An epoch through a DataLoader with two workers: each block is read once, those of a window in
    the order of the disk, and before any record of it.
    """
    # the records are no images
    monkeypatch.setattr("utils.dataset.base.decode_into", lambda encoded, out: None)
    logged = Logged(monkeypatch, tmp_path / "reads")
    batches = sampler(shards)
    loader = DataLoader(
        shards,
        batch_sampler=batches,
        collate_fn=keep_batch,
        num_workers=2,
        worker_init_fn=start_worker,
    )
    assert sum(len(batch.labels) for batch in loader) == IMAGES // BATCH * BATCH
    reads = logged.lines()
    blocks = [(name, start, end) for kind, _, name, start, end in reads if kind == "block"]
    assert len(blocks) == len(set(blocks)) == 80 + 121
    for first in range(0, len(blocks), WINDOW):
        assert blocks[first : first + WINDOW] == sorted(blocks[first : first + WINDOW])
    done, records = {}, 0
    for kind, process, name, start, end in reads:
        if kind == "block":
            assert process == os.getpid()
            done.update({(name, at): end for at in range(start, end, 4)})
        else:
            # and so its page is in memory
            assert process != os.getpid() and (name, start) in done
            records += 1
    assert records == IMAGES // BATCH * BATCH


def test_ranks_of_a_machine_share_the_reading(shards, monkeypatch, tmp_path):
    """The first window every rank reads for itself, not to begin among blocks that others still
    read; then each its part.
    """
    logged = Logged(monkeypatch, tmp_path / "reads")
    for rank in range(2):
        ahead = ReadAhead(RecordBlocks(shards.record_files(), BLOCK), rank, 2)
        for _ in EpochBatches(len(shards), BATCH // 2, rank, 2, 3, True, ahead):
            pass
    blocks = [(name, start) for _, _, name, start, _ in logged.lines()]
    assert (
        sorted(blocks.count(block) for block in set(blocks))
        == [1] * (80 + 121 - WINDOW) + [2] * WINDOW
    )


@pytest.mark.skipif(
    not hasattr(os, "RWF_NOWAIT"), reason="this Python cannot ask whether bytes are in memory"
)
def test_blocks_are_in_memory_when_they_are_needed(tmp_path):
    """On a real disk, with nothing of the file in memory before: 8 MB in blocks of 100 records."""
    with IndexedRecordIO(tmp_path / "train.idx", tmp_path / "train.rec", "w") as writer:
        for key in range(4000):
            writer.write_idx(key, pack(IRHeader(0, 0.0, key, 0), bytes(2000)))
    (tmp_path / "property").write_text("1,112,112\n")
    dataset = MXFaceDataset(tmp_path)
    with open(tmp_path / "train.rec", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        def in_memory(index):
            try:
                return (
                    os.preadv(
                        file.fileno(),
                        [bytearray(2000)],
                        dataset.record_files()[0].offset(index),
                        os.RWF_NOWAIT,
                    )
                    == 2000
                )
            except BlockingIOError:
                return False

        try:
            if all(in_memory(index) for index in range(4000)):
                pytest.skip("this file system keeps its files in memory")
        except OSError as error:
            pytest.skip(f"this file system cannot tell what is in memory: {error.strerror}")
        batches = iter(
            EpochBatches(
                4000, 32, 0, 1, 3, True, ReadAhead(RecordBlocks(dataset.record_files(), 100))
            )
        )
        assert all(in_memory(index) for _ in range(20) for index in next(batches))


def test_an_epoch_that_is_left_leaves_no_reads(shards):
    batches = sampler(shards)
    iterator = iter(batches)
    next(iterator)
    reading = batches.read_ahead._reading[1]
    iterator.close()
    assert not batches.read_ahead._reading
    for future in reading:
        assert future.cancelled() or future.exception(timeout=500) is None


@pytest.mark.parametrize(
    "options, message",
    [
        (["db_file_format=folder", "data_path=x"], "shuffle_block reads records"),
        (["shuffle=False"], "shuffle_block is a way of shuffling"),
        (["shuffle_block=-1"], "shuffle_block=-1 has the wrong type or value"),
    ],
)
def test_combinations_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        load_config(
            ROOT / "config" / "config.py", ["dataset=synthetic", "shuffle_block=8", *options]
        )


@pytest.mark.processes
def test_a_run_with_blocks_on_two_ranks_resumes_on_one(tmp_path):
    """Through the real commands: every image of the epoch is trained on once, over a change of
    ranks in the middle of it.
    """
    (tmp_path / "faces").mkdir()
    with open_studio(1, 3, 1.0) as studio:
        write_training_set(tmp_path / "faces", studio, 6, 8)
    arguments = [
        "dataset=synthetic",
        f"rec={tmp_path / 'faces'}",
        "embedding_size=32",
        "num_epoch=1",
        "val_targets=[]",
        "log_every=1",
        "shuffle_block=3",
        "num_workers=2",
        "flip=False",
        "channels_last=False",
        "precision=fp32",
        f"output={tmp_path / 'run'}",
    ]
    assert "Stopped by a signal at step 3 of 6" in run(
        Path(__file__), "stop", *arguments, "batch_size=4", ranks=2
    )
    assert "Resumed at step 3, epoch 0, 24 of its images done" in run(
        Path(__file__), "go", "--resume", *arguments, "batch_size=8"
    )
    seen = [
        line
        for name in ("stop0", "stop1", "go0")
        for line in (tmp_path / f"{name}.seen").read_text().split()
    ]
    images = to_input(MXFaceDataset(tmp_path / "faces").__getitems__(range(48)).images)
    assert sorted(seen) == sorted(map(digest, images))


def digest(image):
    return sha256(image.numpy().tobytes()).hexdigest()


def train_noting_images(what):
    """What the test above starts: training that notes the images of every step, and asks itself to
    stop in the second if it is to.
    """
    folder = Path(
        next(word for word in sys.argv if word.startswith("output=")).removeprefix("output=")
    ).parent
    train_step = Engine.train_step

    def noted(source):
        for batch in source:
            with open(folder / f"{what}{distributed.rank()}.seen", "a") as file:
                file.writelines(f"{digest(image)}\n" for image in batch.images)
            yield batch

    def noting_step(self, source):
        if what == "stop" and self.position.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, noted(source))

    Engine.train_step = noting_step
    train_standalone.main()


if __name__ == "__main__":
    train_noting_images(sys.argv.pop(1))
