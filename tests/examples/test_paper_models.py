"""The paper's networks have the shapes that their docstrings say, and are tiled, trained and lowered."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(build, *arguments, **options):
    with torch.device("meta"):
        return build(*arguments, **options)


def test_resnets_are_the_public_ones():
    """Parameters of torchvision's models, and of He et al.'s for CIFAR."""
    from paper import convnets
    from paper.convnets import BasicBlock, Bottleneck, ResNet

    imagenet = functools.partial(on_meta, ResNet, classes=1000, stem="imagenet")
    assert parameters(imagenet(BasicBlock, (2, 2, 2, 2))) == 11_689_512
    assert parameters(on_meta(convnets.resnet34_imagenet)) == 21_797_672
    assert parameters(imagenet(Bottleneck, (3, 4, 6, 3))) == 25_557_032
    assert parameters(on_meta(convnets.resnet18_cifar)) == 11_173_962
    assert parameters(on_meta(convnets.resnet50_cifar)) == 23_520_842
    assert parameters(on_meta(convnets.resnet8)) == 75_290
    assert parameters(on_meta(convnets.resnet20)) == 269_722
    assert parameters(on_meta(convnets.small_resnet, 20, shortcut="project")) == 272_474
    keys = on_meta(convnets.resnet18_cifar).state_dict()
    assert {"conv1.weight", "layer2.0.downsample.1.running_var", "layer4.1.bn2.bias", "fc.bias"} <= set(keys)
    with pytest.raises(ValueError, match="depth must be 6 n"):
        convnets.small_resnet(18)


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet50_cifar", "resnet34_imagenet", "resnet8", "VGGSmall"])
def test_convolutional_networks_give_logits(name):
    from paper import convnets

    imagenet = "imagenet" in name
    size = 224 if imagenet else 32
    logits = on_meta(getattr(convnets, name))(torch.empty(2, 3, size, size, device="meta"))
    assert logits.shape == (2, 1000 if imagenet else 10)


def test_other_networks_give_their_results():
    from paper import mixers, pointnet, transformers

    def shape(model, *sizes):
        return tuple(model(*(torch.empty(size, device="meta") for size in sizes)).shape)

    for build in (transformers.ViT, transformers.Swin, mixers.MLPMixer, mixers.ConvMixer):
        assert shape(on_meta(build), (2, 3, 32, 32)) == (2, 10)
    assert shape(on_meta(transformers.swin_imagenet), (2, 3, 224, 224)) == (2, 1000)
    assert shape(on_meta(transformers.TimeSeriesTransformer, 21, 128), (2, 96, 21)) == (2, 21)
    assert shape(on_meta(pointnet.PointNetClassification, 40, 6), (2, 6, 100)) == (2, 40)
    assert shape(on_meta(pointnet.PointNetPartSegmentation), (2, 3, 100), (2, 16)) == (2, 50, 100)
    assert shape(on_meta(pointnet.PointNetSemanticSegmentation), (2, 9, 100)) == (2, 13, 100)


def test_shortcuts_without_parameters_keep_every_second_pixel():
    from paper.convnets import PadShortcut

    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    y = PadShortcut(2, 5, 2)(x)
    assert y.shape == (1, 5, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, [0, 3, 4]].any()


def test_patches_are_rows_of_pixels_with_channels_last():
    from paper.mixers import patches

    image = torch.randn(2, 3, 4, 6)
    rows = patches(image, 2)
    assert rows.shape == (2, 6, 12)
    assert torch.equal(rows[1, 4], image[1, :, 2:4, 2:4].permute(1, 2, 0).flatten())


def test_even_kernels_keep_the_size():
    from paper.mixers import ConvMixer

    assert ConvMixer(dim=4, depth=1, kernel_size=8).layers(torch.randn(1, 3, 9, 9)).shape == (1, 4, 9, 9)
    assert ConvMixer(dim=4, depth=1, kernel_size=5).layers(torch.randn(1, 3, 9, 9)).shape == (1, 4, 9, 9)


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_see_their_own_tokens(shifted):
    """A changed token changes its window and, where windows are shifted, nothing across the edge of the image."""
    from paper.transformers import WindowAttention

    torch.manual_seed(0)
    attention = WindowAttention(8, 2, size=8, window=4, shifted=shifted).double()
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    before = attention(x)
    assert before.shape == x.shape
    window = [min((place + 2) // 4, 2) if shifted else place // 4 for place in range(8)]
    for row, column in ((0, 0), (1, 5), (3, 3), (7, 7), (7, 0), (4, 6)):
        changed = x.clone()
        changed[0, row, column, 0] += 1.0
        differs = (attention(changed) - before).abs().amax(-1)[0] > 1e-12
        expected = torch.tensor([[(r, c) == (window[row], window[column]) for c in window] for r in window])
        assert torch.equal(differs, expected)


def test_windows_use_relative_positions():
    from paper.transformers import WindowAttention

    relative = WindowAttention(8, 2, size=4, window=2, shifted=False).relative
    # Tokens (0, 0), (0, 1), (1, 0), (1, 1): the offset from the row's to the column's, (0, 0) being entry 4 of 3 x 3.
    assert relative.tolist() == [[4, 5, 7, 8], [3, 4, 6, 7], [1, 2, 4, 5], [0, 1, 3, 4]]


def test_patch_merging_is_a_convolution():
    from paper.transformers import PatchMerging

    merging = PatchMerging(3, 5, 2)
    x = torch.randn(2, 4, 6, 3)
    weight = merging.linear.weight.unflatten(1, (2, 2, 3)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight, merging.linear.bias, stride=2)
    torch.testing.assert_close(merging(x), expected.permute(0, 2, 3, 1))


def test_positions_are_sines_and_cosines():
    from paper.transformers import positions

    found = positions(torch.zeros(2, 5, 8))
    assert found.shape == (5, 8)
    torch.testing.assert_close(found[3, 4:6], torch.stack([torch.tensor(0.03).sin(), torch.tensor(0.03).cos()]))


def test_point_networks_do_not_depend_on_the_order_of_points():
    from paper.pointnet import PointNetClassification, PointNetPartSegmentation, orthogonality

    torch.manual_seed(0)
    cloud, order = torch.randn(2, 3, 20), torch.randperm(20)
    classify = PointNetClassification(5).eval()
    logits, matrix = classify.logits_and_transform(cloud)
    torch.testing.assert_close(classify(cloud[:, :, order]), logits)
    assert matrix.shape == (2, 64, 64)
    assert orthogonality(torch.eye(4).expand(3, 4, 4)) == 0
    torch.testing.assert_close(orthogonality(2 * torch.eye(4)[None]), torch.tensor(6.0))
    parts = PointNetPartSegmentation().eval()
    category = torch.eye(16)[:2]
    torch.testing.assert_close(parts(cloud[:, :, order], category), parts(cloud, category)[:, :, order])


def small_networks():
    from paper import convnets, mixers, pointnet, transformers

    image = (4, 3, 16, 16)
    return {
        "resnet": (convnets.resnet8, image),
        "bottleneck": (functools.partial(convnets.ResNet, convnets.Bottleneck, (1, 1), (8, 16)), image),
        "vit": (functools.partial(transformers.ViT, 10, 16, 4, 32, 1, 4, 32), image),
        "swin": (functools.partial(transformers.Swin, 10, 16, (2, 2), 4, 16, (2, 2), (2, 4)), image),
        "series": (functools.partial(transformers.TimeSeriesTransformer, 7, 32, width=64), (4, 12, 7)),
        "mixer": (functools.partial(mixers.MLPMixer, image_size=16, dim=32, depth=1), image),
        "convmixer": (functools.partial(mixers.ConvMixer, dim=16, depth=1, kernel_size=4, patch_size=2), image),
        "points": (functools.partial(pointnet.PointNetClassification, 10), (4, 3, 30)),
    }


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "vit", "swin", "series", "mixer", "convmixer", "points"])
def test_networks_are_tiled_trained_and_lowered(name):
    build, shape = small_networks()[name]
    torch.manual_seed(0)
    model: nn.Module = build()
    qat = tbn.transform(model, tbn.TilingConfig.cifar(min_size=256))
    layers = [row for row in tbn.summary(qat).layers if row.kind.startswith(("linear", "conv"))]
    assert all(row.tiled for row in layers)
    assert any(row.p == 4 for row in layers)
    x = torch.randn(shape)
    qat.train()(x).square().mean().backward()
    assert all(value.grad is not None for name, value in qat.named_parameters() if name.endswith("alpha_source"))
    qat.eval()
    with torch.no_grad():
        torch.testing.assert_close(tbn.lower(qat)(x), qat(x), rtol=1e-4, atol=1e-4)
