"""What each image token receives, with and without sinks, and from which rows words are said."""

import pytest
import torch

from stages.attention.capture import AttentionCapture
from stages.checkpoints.processors import load_processor
from stages.evaluation.attention.received import sample_attention, word_means
from stages.evaluation.attention.words import Word, answer_words, rows_of
from stages.student.data.batch import Batch
from stages.student.losses.attention import below_sink_threshold
from stages.student.model.student import Student
from tests.checkpoints import make_tiny_llava
from tests.stages.evaluation.attention.matched import MATCHING


def test_a_student_whose_own_maps_are_stored_receives_what_the_teacher_receives(
    student_and_batch: tuple[Student, Batch],
) -> None:
    student, batch = student_and_batch
    found = sample_attention(student, batch, MATCHING)
    assert [one is None for one in found] == [maps is None for maps in batch.maps]
    for one in found:
        if one is not None:
            torch.testing.assert_close(one.student_WN, one.teacher_WN, atol=1e-3, rtol=1e-2)
            torch.testing.assert_close(one.student_with_sinks_WN, one.teacher_with_sinks_WN, atol=1e-3, rtol=1e-2)
            assert one.words == ()
            assert one.student_words_WSN.shape == (2, 0, one.student_WN.shape[1])


def test_received_attention_is_the_mean_over_kept_queries_of_the_map(
    student_and_batch: tuple[Student, Batch],
) -> None:
    student, batch = student_and_batch
    row = next(n for n, maps in enumerate(batch.maps) if maps is not None)
    capture = AttentionCapture(frozenset(MATCHING.student_layers), batch.image_positions)
    with torch.no_grad():
        student.model(**batch.inputs, capture=capture)
    found = sample_attention(student, batch, MATCHING)[row]
    assert found is not None
    n = len(batch.image_positions[row])
    for w, layer in enumerate(MATCHING.student_layers):
        map_NN = capture.maps[layer][row, :n, :n].double()
        threshold = float(map_NN.mean() + map_NN.std())
        for token in range(n):
            seen = [float(map_NN[query, token]) for query in range(token, n)]
            kept = [value for value in seen if value <= threshold]
            assert float(found.student_with_sinks_WN[w, token]) == pytest.approx(sum(seen) / len(seen), rel=1e-4)
            expected = sum(kept) / len(kept) if kept else 0.0
            assert float(found.student_WN[w, token]) == pytest.approx(expected, rel=1e-4)
        assert not bool(below_sink_threshold(map_NN[None]).all()), "without a sink the two would be one"


def test_words_of_an_answer_are_said_from_the_rows_before_their_tokens(
    student_and_batch: tuple[Student, Batch], tmp_path_factory: pytest.TempPathFactory
) -> None:
    student, batch = student_and_batch
    tokenizer = load_processor(make_tiny_llava(tmp_path_factory.mktemp("words") / "m")).tokenizer
    words = answer_words(tokenizer, batch)
    for row, of_sample in enumerate(words):
        assert of_sample, "every sample has an answer"
        ids = batch.inputs["input_ids"][row]
        for word in of_sample:
            assert word.text in tokenizer.decode(ids[word.rows_U + 1])
    found = sample_attention(student, batch, MATCHING, words)
    capture = AttentionCapture(frozenset(MATCHING.student_layers), batch.image_positions, [rows_of(w) for w in words])
    with torch.no_grad():
        student.model(**batch.inputs, capture=capture)
    for row, one in enumerate(found):
        if one is not None:
            assert one.words == tuple(word.text for word in words[row])
            first = words[row][0]
            expected = capture.text_maps[3][row][: len(first.rows_U)].mean(0)
            torch.testing.assert_close(one.student_words_WSN[1, 0], expected)


def test_the_attention_of_a_word_is_the_mean_of_its_rows() -> None:
    rows = torch.arange(12.0).view(1, 3, 4)
    words = [Word("two", torch.tensor([5, 6])), Word("one", torch.tensor([9]))]
    assert word_means(rows, words).tolist() == [[[2.0, 3.0, 4.0, 5.0], [8.0, 9.0, 10.0, 11.0]]]
