"""Planted models: attention on the object alone, and the same map for all images."""

import pytest
import torch
from torch import Tensor

from stages.evaluation.attention.observe import Observed, observed
from stages.evaluation.attention.tally import LayerTally

OBJECT = torch.tensor([False, True, False, False])


def seen(map_NN: Tensor, text_N: Tensor | None = None) -> Observed:
    keep = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    return observed(map_NN[None], keep, None if text_N is None else text_N[None])


def looks_at_object() -> Tensor:
    maps = torch.zeros(4, 4)
    maps[:, 1] = 0.5
    return maps.tril()


def test_a_model_that_attends_to_the_object_alone_has_auc_1_in_both_and_maps_that_do_not_differ() -> None:
    tally = LayerTally([(3,)], with_objects=True, with_text=True)
    for image in "abc":
        tally.add(image, seen(looks_at_object(), OBJECT.float() / 2), (OBJECT, ~OBJECT), OBJECT[None].float())
    found = tally.result(with_similarity=True)
    assert found.layers == ((3,),)
    for measure, value in ((found.objects, 1), (found.text_objects, 1), (found.text_share, 0.5)):
        assert measure[0] is not None
        assert measure[0].value == value
        assert measure[0].interval_95 == (value, value)
        assert measure[0].num_images == 3
    assert found.between_images[0] is not None
    assert found.between_images[0].value == pytest.approx(0, abs=1e-12)


def test_maps_on_other_tokens_in_each_image_differ_by_1() -> None:
    tally = LayerTally([(0,)], with_objects=False, with_text=False)
    for column, image in enumerate("abc"):
        maps = torch.zeros(4, 4)
        maps[:, column] = 0.5
        tally.add(image, seen(maps))
    found = tally.result()
    assert found.between_images[0] is not None
    assert found.between_images[0].value == pytest.approx(1)
    assert (found.objects, found.text_objects, found.text_share, found.text_similarity) == ((), (), (), ())


def test_samples_about_one_image_give_no_pair_and_a_token_that_is_a_sink_throughout_does_not_count() -> None:
    tally = LayerTally([(0,)], with_objects=True, with_text=False)
    keep = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    keep[0, :, 0] = False
    maps = looks_at_object()
    maps[:, 0] = 9.0
    for _ in range(2):
        tally.add("a", observed(maps[None], keep), (OBJECT, ~OBJECT))
    found = tally.result()
    assert found.between_images == (None,)
    assert found.objects[0] is not None
    assert found.objects[0].value == 1
    assert found.objects[0].interval_95 is None
