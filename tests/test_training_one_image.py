"""Steps of one image: refused before the first epoch where a norm could not train on them."""

import pytest

SMALL = [
    *("data.args={num_images: 12, num_test: 6, num_classes: 2, image_size: 8}", "model.args={}"),
    *("data.augment=[]", "model.name=resnet18", "train.epochs=1"),
]


@pytest.mark.parametrize("mode", [[], ["--dry-run"], ["--find-lr"]], ids=str)
@pytest.mark.parametrize("word", ["data.batch_size=1", "data.limit=1"])
def test_a_norm_that_would_have_one_value_a_channel_is_told_with_what_to_change(
    train, capfd, word, mode
):
    assert train(*SMALL, word, *mode) == 2
    said = capfd.readouterr().err
    assert "data.batch_size: the model cannot train on one image at a time" in said
    assert "Traceback" not in said and "data.image_size may help" in said


def test_what_can_train_on_one_image_does(train):
    larger = "data.args={num_images: 12, num_test: 6, num_classes: 2, image_size: 64}"
    assert train(*SMALL, larger, "data.batch_size=1") == 0
    assert train(*SMALL, "data.batch_size=1", "model.name=lenet5") in (0, 2)
    # norms that are frozen keep the statistics that they have
    assert train(*SMALL, "data.batch_size=1", "optim.groups=[{match: '^(?!fc)', lr_scale: 0}]") == 0
