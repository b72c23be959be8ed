"""The two loops: that what an optimizer step sees decides the weights, and what leaves them alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.inputs import IMAGE_SIZE, write_split
from tests.helpers.training import CPU, train
from utils.data.datasets import FILLER, BoxPromptDataset, NpyFolder, TrainingSampler, collate_training
from utils.model.segmenter import Segmenter, build_model
from utils.runtime.device import Precision
from utils.runtime.errors import DivergedError, UserError
from utils.train.optim import build_optimizer


def fresh(sam_file: Path) -> Segmenter:
    return build_model("vit_tiny", sam_file, image_size=IMAGE_SIZE)


@pytest.fixture
def model(sam_file: Path) -> Segmenter:
    return fresh(sam_file)


@pytest.fixture
def dataset(npy: Path) -> Callable[..., BoxPromptDataset]:
    """A function that makes the training set for so many classes per image."""

    def dataset(classes_per_image: int | None) -> BoxPromptDataset:
        return BoxPromptDataset(NpyFolder(npy / "train"), classes_per_image=classes_per_image, bbox_shift=5, seed=0)

    return dataset


def weights(model: Segmenter) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def flat(model: Segmenter) -> Tensor:
    """The trained weights in one vector, in float64."""
    return torch.cat([p.detach().flatten().double() for p in model.mask_decoder.parameters()])


def batched(dataset: BoxPromptDataset, batch_size: int) -> DataLoader:
    sampler = TrainingSampler(dataset.num_prompts(), batch_size=batch_size, rank=0, world_size=1, seed=0)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate_training)


@pytest.mark.parametrize("classes_per_image", [2, None])
@pytest.mark.slow
def test_accumulating_four_batches_of_one_equals_a_batch_of_four(
    classes_per_image: int | None, sam_file: Path, dataset: Callable[..., BoxPromptDataset]
) -> None:
    data = dataset(classes_per_image)
    assert len(data) == 7  # so that the second and last step is one of three images
    start, ends, figures = flat(fresh(sam_file)), [], []
    for batch_size, grad_acc_steps in ((1, 4), (4, 1)):
        model = fresh(sam_file)
        figures.append(train(model, batched(data, batch_size), grad_acc_steps=grad_acc_steps))
        ends.append(flat(model))
    assert figures[0]["optimizer_steps"] == figures[1]["optimizer_steps"] == 2
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-5)
    # Relative to the change, which is much stricter than relative to the weights.
    change = (ends[1] - start).norm()
    assert change > 0.01
    assert (ends[0] - ends[1]).norm() < 1e-5 * change


def test_prompts_that_an_image_has_no_class_for_weigh_nothing(
    sam_file: Path, dataset: Callable[..., BoxPromptDataset]
) -> None:
    samples = [dataset(None)[i] for i in range(7)]
    assert len({len(sample["valid"]) for sample in samples}) > 1
    ends, figures = [], []
    for batches in ([samples], [[sample] for sample in samples]):  # padded to the most classes, and not at all
        model = fresh(sam_file)
        loader = [collate_training(batch) for batch in batches]
        figures.append(train(model, loader, grad_acc_steps=len(batches)))
        ends.append(flat(model))
    assert figures[0]["loss"] == pytest.approx(figures[1]["loss"], rel=1e-5)
    # Rounding differs with the number of prompts, and by processor; one filler that counted would be seen at 1e-2.
    assert (ends[0] - ends[1]).norm() < 1e-4 * (ends[1] - flat(fresh(sam_file))).norm()


def test_a_filler_contributes_nothing(sam_file: Path, dataset: Callable[..., BoxPromptDataset]) -> None:
    data = dataset(2)
    real, filler = (collate_training([data[index]]) for index in (3, FILLER))
    outcomes = []
    for loader in ([real], [real, filler]):
        model = fresh(sam_file)
        figures = train(model, loader, grad_acc_steps=2)
        outcomes.append((figures, weights(model)))
    assert outcomes[0][0] == outcomes[1][0]
    for key, value in outcomes[0][1].items():
        assert torch.equal(value, outcomes[1][1][key]), key


def test_a_step_follows_the_mean_over_its_prompts(sam_file: Path, dataset: Callable[..., BoxPromptDataset]) -> None:
    # A sum would step twice as far on the same image given twice.
    batch = collate_training([dataset(2)[0]])
    once, twice = fresh(sam_file), fresh(sam_file)
    train(once, [batch])
    train(twice, [batch, batch], grad_acc_steps=2)
    assert (flat(twice) - flat(once)).norm() < 1e-5 * (flat(once) - flat(fresh(sam_file))).norm()


def test_only_the_mask_decoder_is_trained(model: Segmenter, dataset: Callable[..., BoxPromptDataset]) -> None:
    optimizer = build_optimizer(model, lr=1e-3, weight_decay=0.01)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.mask_decoder.parameters()}

    before = weights(model)
    train(model, batched(dataset(2), 4))
    changed = {key for key, value in weights(model).items() if not torch.equal(value, before[key])}
    assert changed and all(key.startswith("sam.mask_decoder.") for key in changed)
    frozen = (model.sam.image_encoder, model.sam.prompt_encoder)
    assert not any(part.training for encoder in frozen for part in encoder.modules())
    assert all(p.grad is None for encoder in frozen for p in encoder.parameters())


def test_the_gradient_is_clipped_to_its_norm(model: Segmenter, dataset: Callable[..., BoxPromptDataset]) -> None:
    before = flat(model)
    train(model, [collate_training([dataset(2)[0]])], clip=0.01)
    assert (flat(model) - before).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # learning rate x norm


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(model: Segmenter, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = {}
    for name in ("good", "poisoned", "fine"):
        image = rng.random((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
        items[name] = (image, rng.integers(0, 3, (IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8))
    items["poisoned"][0][5, 5] = np.nan
    source = NpyFolder(write_split(tmp_path / "train", items))
    data = BoxPromptDataset(source, classes_per_image=1, bbox_shift=0, seed=0)
    before = weights(model)
    with pytest.raises(UserError, match=r"epoch 4, step 3: the loss is not finite for poisoned;") as error:
        train(model, [collate_training([data[i]]) for i in range(3)], grad_acc_steps=4, epoch=3)
    assert "weights were not touched" in str(error.value)
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), key


def test_a_gradient_that_is_not_finite_names_its_step_and_images(
    model: Segmenter, dataset: Callable[..., BoxPromptDataset]
) -> None:
    data, before = dataset(2), weights(model)
    parameter = next(model.mask_decoder.parameters())
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    batches = [collate_training([data[i]]) for i in range(2)]
    names = ", ".join(sorted(data[i]["name"] for i in range(2)))
    with pytest.raises(DivergedError) as error:
        train(model, batches, grad_acc_steps=2, epoch=3)
    hook.remove()
    said = f"epoch 4, step 2: the loss is finite, but not its gradient for {names}; the weights were not touched"
    assert str(error.value).startswith(said) and "start a new run with a lower -lr" in str(error.value)
    for key, value in weights(model).items():
        assert torch.equal(value, before[key]), key


def test_an_image_without_a_prompt_in_the_step_is_not_named(
    model: Segmenter, dataset: Callable[..., BoxPromptDataset]
) -> None:
    data = dataset(2)
    parameter = next(model.mask_decoder.parameters())
    hook = parameter.register_hook(lambda gradient: gradient * math.inf)
    filler, good = data[FILLER], data[1]
    assert filler["name"] != good["name"]
    with pytest.raises(DivergedError) as error:
        train(model, [collate_training([good]), collate_training([filler])], grad_acc_steps=2)
    hook.remove()
    assert f"its gradient for {good['name']};" in str(error.value)
    assert "-use_amp" not in str(error.value)  # the run says so, if it has it


def test_a_step_that_overflows_fp16_is_skipped_and_counted(
    sam_file: Path, dataset: Callable[..., BoxPromptDataset]
) -> None:
    batch = collate_training([dataset(2)[0]])
    model, start = fresh(sam_file), flat(fresh(sam_file))
    # Of the second scale, 1, no gradient overflows: what was skipped does not spoil the step that follows it.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-40)
    options: dict[str, Any] = {"scaler": scaler, "precision": Precision(CPU.device, torch.float16)}
    skipped = train(model, [batch], clip=1, schedule="cosine", **options)
    assert (skipped["optimizer_steps"], skipped["skipped_steps"]) == (0, 1)
    assert skipped["lr"] == 0.1  # the schedule waits
    assert torch.equal(flat(model), start)
    assert skipped["loss"] == pytest.approx(train(fresh(sam_file), [batch])["loss"], rel=0.02)

    taken = train(model, [batch], clip=1, schedule="cosine", **options)
    assert (taken["optimizer_steps"], taken["skipped_steps"]) == (1, 0)
    assert taken["lr"] < 0.1 and not torch.equal(flat(model), start)
