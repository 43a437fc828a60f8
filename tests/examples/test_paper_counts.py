"""The paper's networks have the published sizes as nearly as docs/paper.md says."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


# Millions of bits by the rule of each network.
COUNTED = {
    "ResNet18, CIFAR": {"float": "351.54", "binary": "10.99", 4: "2.827", 8: "1.437", 16: "0.743"},
    "ResNet50, CIFAR": {"float": "750.26", "binary": "23.45", 4: "6.068", 8: "3.168", 16: "1.718"},
    "VGG-small": {"float": "146.28", "binary": "4.657", 4: "1.339", 8: "0.786", 16: "0.509"},
    "ResNet34, ImageNet": {"float": "674.76", "binary": "21.09", 2: "11.128"},
    "PointNet, classification": {"float": "111.09", "binary": "3.47", 4: "0.894", 8: "0.468"},
    "PointNet, part segmentation": {"float": "266.96", "binary": "8.34", 4: "2.675", 8: "1.730"},
    "PointNet, semantic segmentation": {"float": "112.95", "binary": "3.53", 4: "1.517", 8: "1.185"},
    "ViT, CIFAR": {"float": "303.68", "binary": "9.49", 4: "2.399", 8: "1.219"},
    "Swin-t, CIFAR": {"float": "851.14", "binary": "26.60", 4: "6.893", 8: "3.613"},
    "Swin-t, ImageNet": {"float": "879.31", 2: "14.750"},
    "Time series, Electricity": {"float": "145.2", "binary": "4.5", 4: "1.131"},
    "Time series, Weather": {"float": "11.8", "binary": "0.3685", 4: "0.1965"},
    "MLPMixer, CIFAR": {4: "0.620", 8: "0.423", 16: "0.325", 32: "0.275"},
    "ConvMixer, CIFAR": {4: "0.528", 8: "0.397", 16: "0.331", 32: "0.298"},
}

# Published float figures that are not 32 times the counted number, by their difference; docs/paper.md has the reasons.
FLOAT_DIFFERS = {
    "VGG-small": 0.04,
    "ResNet34, ImageNet": -0.12,
    "PointNet, classification": -0.19,
    "PointNet, semantic segmentation": -0.01,
    "Swin-t, ImageNet": 5.71,
}


def megabits(bits, like):
    """A count with as many digits behind the point as ``like`` has."""
    return f"{bits / 1e6:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", COUNTED)
def test_counted_sizes(name):
    from paper.counts import NETWORKS, counted_bits

    figures = {stored: rule for stored, _, rule in NETWORKS[name].figures()}
    assert figures.keys() == COUNTED[name].keys()
    for stored, expected in COUNTED[name].items():
        assert megabits(counted_bits(NETWORKS[name].build, stored, figures[stored]), expected) == expected, stored


def test_every_network_is_counted():
    from paper.counts import NETWORKS

    assert NETWORKS.keys() == COUNTED.keys()


def test_published_float_sizes():
    from paper.counts import NETWORKS, counted_bits

    differ = {}
    for name, network in NETWORKS.items():
        published = network.dense.get("float")
        if published is not None:
            bits = counted_bits(network.build, "float", network.dense_rule)
            if megabits(bits, published) != published:
                differ[name] = round(float(megabits(bits, published)) - float(published), 2)
    assert differ == FLOAT_DIFFERS


def test_some_float_sizes_are_rounded_parameters():
    """Published float sizes that are 32 times the number of parameters *after* rounding it to 10,000."""
    from paper.counts import NETWORKS, counted_bits

    for name in ("VGG-small", "ResNet34, ImageNet", "PointNet, semantic segmentation"):
        network = NETWORKS[name]
        millions = counted_bits(network.build, "float", network.dense_rule) / 32e6
        assert f"{32 * round(millions, 2):.2f}" == network.dense["float"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("PointNet, classification", {"classes": 64}),
        ("PointNet, semantic segmentation", {"classes": 16}),
        ("PointNet, semantic segmentation", {"channels": 12}),
    ],
)
def test_other_point_networks_have_all_published_sizes(name, options):
    from paper.counts import NETWORKS, counted_bits

    network = NETWORKS[name]
    build = functools.partial(network.build, **options)
    for stored, published, rule in network.figures():
        assert megabits(counted_bits(build, stored, rule), published) == published


def test_position_tables_of_swin_at_one_bit():
    from paper.counts import NETWORKS, counted_bits, on_meta

    network = NETWORKS["Swin-t, CIFAR"]
    tables = sum(
        value.numel() for name, value in on_meta(network.build).named_parameters() if name.endswith("position")
    )
    assert tables == 12 * 7 * 7
    counted = [counted_bits(network.build, p, network.rule) + tables for p in (4, 8)]
    assert [f"{bits / 1e6:.3f}" for bits in counted] == ["6.894", "3.613"]


def test_a_rule_that_fits_resnet18_and_not_resnet50():
    """Four numbers of each norm's channel at one bit, an alpha for each copy at 32 bits."""
    import torch
    from paper.counts import NETWORKS, counted_bits, on_meta

    import tbn_compiler as tbn

    fits = {}
    for name in ("ResNet18, CIFAR", "ResNet50, CIFAR"):
        network = NETWORKS[name]
        model = on_meta(network.build)
        norms = sum(module.num_features for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
        fits[name] = []
        for p, published in network.tiled.items():
            config = tbn.TilingConfig.cifar(p=p, min_size=network.rule.min_size)
            alphas = tbn.summary(tbn.transform(model, config)).totals["alphas"]
            bits = counted_bits(network.build, p, network.rule) + 4 * norms + 32 * alphas
            fits[name].append(megabits(bits, published) == published)
    assert all(fits["ResNet18, CIFAR"])
    assert not any(fits["ResNet50, CIFAR"])


def test_resnet18_at_the_stated_lambda():
    from paper.counts import NETWORKS, Rule, counted_bits

    bits = [counted_bits(NETWORKS["ResNet18, CIFAR"].build, p, Rule(min_size=64_000)) for p in (4, 8, 16)]
    assert [f"{found / 1e6:.2f}" for found in bits] == ["2.94", "1.57", "0.88"]


def test_a_whole_in_proj_is_compared_with_lambda():
    from paper.counts import NETWORKS, Rule, counted_bits

    build = NETWORKS["Time series, Weather"].build
    separate, whole = (counted_bits(build, 4, Rule("biases", 32_000, (), choice)) for choice in (False, True))
    # Two layers whose packed weight of 3 * 128 * 128 is over lambda, and its thirds under it.
    assert separate - whole == 2 * 3 * 128 * 128 * 3 // 4
    with pytest.warns(UserWarning, match="under min_size=49153"):
        binary = counted_bits(build, 4, Rule("biases", 3 * 128 * 128 + 1, (), True))
    assert binary == counted_bits(build, "binary", Rule("biases"))


@pytest.mark.parametrize(
    ("case", "saving", "operations"),
    [
        (("ResNet18, CIFAR", 32, 4, 64_000), "2.19", "35.03"),
        (("ResNet18, CIFAR", 32, 4, 0), "4.00", "35.03"),
        (("VGG-small", 32, 4, 64_000), "4.00", "38.65"),
        (("ResNet34, ImageNet", 224, 2, 150_000), "1.39", "225.66"),
    ],
)
def test_deduplicated_operations(case, saving, operations):
    from paper.counts import OPERATION_CASES
    from paper.counts import operations as count

    assert case in OPERATION_CASES
    found = count(*case)
    assert f"{found.saving:.2f}" == saving
    assert f"{found.dense_operations:.2f}" == operations
    assert found.saving <= case[2]


def test_the_page_has_these_tables(capsys):
    from documents import fill
    from paper_counts import DOCUMENT, main, tables

    document = DOCUMENT.read_text()
    assert fill(document, tables()) == document
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "| ResNet34, ImageNet | p = 2 | 11.13 | 11.128 |" in printed
    assert printed.strip() == "\n\n".join(tables().values())
