from pathlib import Path

from stages.inspection.stored_sample import NUM_LIKELIEST, view_sample
from storage.codecs.answer_logits import AnswerLogitsCodec
from storage.targets.store import TargetStore


def test_a_view_holds_what_the_store_holds_of_the_sample_by_key_and_by_number(targets: Path) -> None:
    store = TargetStore.open(targets)
    fingerprint = store.manifest.fingerprint
    row = len(store.shard(1)) - 1
    key = store.shard(1).keys[row]
    view = view_sample(store, key)
    assert (view.key, view.shard, view.row) == (key, 1, row)
    by_number = view_sample(store, str(len(store.shard(0)) + row))
    assert (by_number.key, by_number.runs, by_number.predictions) == (key, view.runs, view.predictions)
    sample, maps = store.shard(1).read(row)
    assert maps is not None
    assert sum(len(run.texts) for run in view.runs) == len(sample.token_ids)
    assert [window.layers for window in view.windows] == list(fingerprint.windows)
    assert {window.map_NN.shape for window in view.windows} == {(maps.num_tokens, maps.num_tokens)}
    assert all(0 < window.sink_share < 1 for window in view.windows)
    decoded = AnswerLogitsCodec(fingerprint.logit_codec).decode(sample.logits_RQ)
    positions = sample.answer_mask.nonzero()[:, 0].tolist()
    assert [each.position for each in view.predictions] == positions
    probs_RK, _, _ = decoded.probabilities()
    for number, each in enumerate(view.predictions):
        assert [probability for _, probability in each.likeliest] == probs_RK[number, :NUM_LIKELIEST].tolist()
        kept = decoded.ids_RK[number].tolist()
        token = int(sample.token_ids[each.position])
        assert each.is_kept == (token in kept)
        assert each.probability == probs_RK[number, kept.index(token) if each.is_kept else -1]
    answer = "".join(text for run in view.runs if run.part == "answer" for text in run.texts)
    assert answer == "".join(each.text for each in view.predictions)


def test_a_sample_without_an_image_has_no_maps(targets: Path) -> None:
    store = TargetStore.open(targets)
    shard, row = next(
        (number, row)
        for number, record in store.commits.items()
        for row in range(record.num_samples)
        if store.shard(number).read(row, with_maps=False)[0].map_row is None
    )
    assert view_sample(store, store.shard(shard).keys[row]).windows == ()
