"""A batch: what each position must predict, and that nothing crosses a document's border."""

import time

import numpy as np
import pytest
import torch
from made_samples import made_sample

from torchtune.data.batch import NOT_TRAINED, collate
from torchtune.data.sample import Sample


def random_rows(seed):
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(4):
        lengths = rng.integers(1, 9, rng.integers(1, 4))
        rows.append([made_sample(int(length), row, part) for part, length in enumerate(lengths)])
    for sample in (sample for row in rows for sample in row):
        sample.trained[:] = rng.random(len(sample.trained)) < 0.6
        sample.trained[0] = False
    return rows


def brute_force_labels(rows):
    labels = []
    for sample in (sample for row in rows for sample in row):
        for position in range(len(sample.input_ids)):
            follows = position + 1 < len(sample.input_ids)
            trained = follows and sample.trained[position + 1]
            labels.append(int(sample.input_ids[position + 1]) if trained else -100)
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_labels_are_the_next_trained_token_of_the_same_document(seed):
    rows = random_rows(seed)
    batch = collate(rows)
    assert batch.labels.tolist() == brute_force_labels(rows)
    assert batch.num_trained == sum(label != NOT_TRAINED for label in brute_force_labels(rows))


def test_documents_begin_where_samples_do():
    rows = random_rows(0)
    samples = [sample for row in rows for sample in row]
    batch = collate(rows)
    lengths = [len(sample.input_ids) for sample in samples]
    assert list(batch.documents.lengths) == lengths
    assert batch.documents.positions.tolist() == [position for n in lengths for position in range(n)]
    assert batch.input_ids.tolist() == [int(token) for sample in samples for token in sample.input_ids]
    assert batch.num_tokens == sum(lengths)
    assert batch.sources == tuple(sample.source for sample in samples)
    assert batch.rows == tuple(sample.row for sample in samples)


def test_ids_are_int64():
    """What the embedding and the loss take."""
    batch = collate(random_rows(0))
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_no_label_crosses_a_border():
    """The last position of one document must not predict the first token of the next."""
    everything = [Sample(np.array([5, 6], np.int32), np.array([False, True]), "made.jsonl:1", 0) for _ in range(3)]
    batch = collate([everything[:2], everything[2:]])
    assert batch.labels.tolist() == [6, -100, 6, -100, 6, -100]
    assert batch.num_trained == 3


def test_a_dummy_batch_counts_nothing():
    batch = collate([])
    assert (batch.num_trained, batch.num_tokens, batch.sources, batch.rows) == (0, 0, (), ())
    assert batch.labels.tolist() == [-100]
    assert batch.documents.lengths == (1,)
    assert batch.documents.num_real == 0
    assert len(batch.input_ids) == 1


@pytest.mark.parametrize("multiple", [1, 2, 7, 64])
def test_padding_is_one_dummy_document_that_counts_nothing(multiple):
    batch = collate(random_rows(2))
    padded = batch.padded_to(multiple)
    num_tokens = len(batch.input_ids)
    num_dummy = len(padded.input_ids) - num_tokens
    assert len(padded.input_ids) % multiple == 0
    assert num_dummy < multiple
    assert padded.input_ids[:num_tokens].equal(batch.input_ids)
    assert padded.labels.tolist() == batch.labels.tolist() + [-100] * num_dummy
    assert padded.documents.positions.tolist() == batch.documents.positions.tolist() + list(range(num_dummy))
    assert padded.documents.cu_seqlens.diff().tolist() == list(padded.documents.lengths)
    assert sum(padded.documents.lengths) == len(padded.input_ids)
    assert padded.documents.num_dummy == num_dummy
    assert (padded.num_trained, padded.num_tokens) == (batch.num_trained, batch.num_tokens)
    assert padded.trained.equal(batch.trained)
    assert len(padded.documents.lengths) - len(batch.documents.lengths) == (1 if num_dummy else 0)


def test_moving_a_batch_moves_all_of_it():
    batch = collate(random_rows(1)).to("meta")
    tensors = (batch.input_ids, batch.labels, batch.documents.positions, batch.documents.cu_seqlens)
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_collating_2048_tokens_takes_under_two_milliseconds():
    """It happens between two steps, while the device may be waiting."""
    rows = [[made_sample(128, row) for row in range(16)]]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        collate(rows)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3
