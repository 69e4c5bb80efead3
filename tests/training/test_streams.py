"""Batches out of several streams: whose rows are where, who reads what, how they go on."""

import functools
import json
from unittest import mock

import jax
import numpy as np
import pytest

from memcache_jax.sharding import make_mesh
from memcache_jax.training import streams
from memcache_jax.training.data import training_iterator
from memcache_jax.training.files import find_files
from memcache_jax.training.records import Records
from memcache_jax.training.streams import Streams, streams_here
from memcache_jax.training.tokenizers import ByteTokenizer


@pytest.fixture
def make(corpus_folder):
    """Makes a stream or several, of rows of 32 tokens out of twelve files."""
    records = Records(find_files(str(corpus_folder)))

    def make(kind=Streams, **options):
        return kind(records, ByteTokenizer(), sequence_length=32, seed=1, **options)

    return make


@pytest.mark.parametrize(("count", "window"), [(1, 8), (2, 4), (4, 2)])
def test_each_stream_gives_its_rows_of_every_batch(make, count, window):
    batches = make(batch_size=4, num_streams=count, shuffle_window=8)
    alone = functools.partial(make, training_iterator, batch_size=4 // count, num_streams=count)
    parts = [alone(stream_index=i, shuffle_window=window) for i in range(count)]
    for _ in range(8):
        rows = np.concatenate([next(part)["tokens"] for part in parts])
        np.testing.assert_array_equal(next(batches), rows, strict=True)


def test_streams_that_are_not_read_change_nothing(make, monkeypatch):
    made = mock.Mock(wraps=training_iterator)
    whole = make(batch_size=6, num_streams=3)
    monkeypatch.setattr(streams, "training_iterator", made)
    part = make(batch_size=6, num_streams=3, read=[1, 2])
    assert [call.kwargs["stream_index"] for call in made.call_args_list] == [1, 2]
    for _ in range(8):
        rows = next(part)
        np.testing.assert_array_equal(rows[2:], next(whole)[2:])
        assert (rows[:2] == -1).all()


@pytest.mark.slow
def test_any_number_of_processes_goes_on_with_the_next_batch(make, monkeypatch):
    """As one process that reads both streams, and as two of which each reads one."""
    make = functools.partial(make, batch_size=4, num_streams=2, shuffle_window=6)
    whole, *parts = make(), make(read=[0]), make(read=[1])
    for _ in range(20):  # until the streams are at different places
        for batches in (whole, *parts):
            next(batches)
    state = whole.get_state()
    assert state[0] != state[1]
    own: list = []  # of the processes so far
    monkeypatch.setattr(streams, "gather", lambda value: own.append(value) or own)
    with pytest.raises(ValueError, match=r"no process reads \[1\] of the 2 streams"):
        parts[0].get_state()
    assert json.loads(json.dumps(parts[1].get_state())) == state
    upcoming = [next(whole) for _ in range(3)]
    for read in ([0, 1], [0], [1]):
        resumed = make(read=read)
        next(resumed)
        resumed.set_state(json.loads(json.dumps(state)))
        for rows in upcoming:
            held = [row for index in read for row in (2 * index, 2 * index + 1)]
            np.testing.assert_array_equal(next(resumed)[held], rows[held])


def test_the_state_of_one_stream_alone_is_that_of_the_only_one(make):
    alone, only, several = (
        make(training_iterator, batch_size=2),
        make(batch_size=2),
        make(batch_size=2, num_streams=2),
    )
    next(alone)
    only.set_state(alone.get_state())
    np.testing.assert_array_equal(next(only), next(alone)["tokens"])
    for state in (alone.get_state(), only.get_state()):
        with pytest.raises(ValueError, match="positions in 2 streams, got 1"):
            several.set_state(state)


def test_bad_numbers_of_streams_are_told(make):
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"multiple of .* data.streams, got 4 and {count}"):
            make(batch_size=4, num_streams=count)
    with pytest.raises(ValueError, match=r"stream_index must be in \[0, 2\), got 2"):
        make(batch_size=4, num_streams=2, read=[2])
    with pytest.raises(ValueError, match="13 streams need at least 13 records, got 12"):
        make(batch_size=13, num_streams=13)


@pytest.mark.parametrize(
    ("devices", "count", "wanted"),
    [
        ([0, 1], 4, [0]),  # two devices that share a stream
        ([2, 3], 8, [2, 3]),
        ([7], 2, [1]),
        ([1], 16, [2, 3]),  # a stream for each row
        ([0, 6], 4, [0, 3]),
        ([3, 4], 1, [0]),
    ],
)
def test_a_process_reads_the_streams_of_its_rows(monkeypatch, devices, count, wanted):
    """Sixteen rows over eight devices, two each, of which a process has some."""
    mesh = make_mesh(dict(data=2, fsdp=4))
    sharding = streams.batch_sharding(mesh)
    indices = sharding.devices_indices_map((16,))
    here = {d: indices[d] for d in mesh.devices.ravel()[devices]}
    of_process = mock.Mock(addressable_devices_indices_map=lambda shape: here)
    monkeypatch.setattr(streams, "batch_sharding", lambda mesh: of_process)
    assert streams_here(mesh, 16, count) == wanted


def test_rows_that_are_not_divided_are_of_all_streams():
    assert streams_here(None, 4, 2) == [0, 1]
    assert streams_here(make_mesh(dict(seq=8), devices=jax.devices()), 4, 2) == [0, 1]
    assert streams_here(make_mesh(dict(fsdp=2, seq=4)), 6, 3) == [0, 1, 2]
