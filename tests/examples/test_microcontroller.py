"""The microcontroller examples run end to end, read their data right, and their page comes from the result file."""

from __future__ import annotations

import dataclasses
import gzip
import json
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import tbn_compiler as tbn
from tests.backends.c.toolchain import needs_arm, needs_cc

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A task whose networks were trained on made-up data: its name, and the arguments and files of the trial."""

    name: str
    arguments: list[str]
    results: Path
    models: Path

    def networks(self):
        return json.loads(self.results.read_text())["tasks"][self.name]["networks"]


def few_networks(patch, name):
    """Where each network is exported twice, two of them are enough."""
    from microcontroller import TASKS

    task = TASKS[name]
    if task.calibration:
        few = {key: task.networks[key] for key in ("float", "tbn4")}
        patch.setitem(TASKS, name, dataclasses.replace(task, networks=few))


@pytest.fixture(scope="module", params=["mlp", "cnn", "keywords", "forecast", "dscnn", "resnet8"])
def trained(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        from microcontroller import main

        few_networks(patch, request.param)
        folder = tmp_path_factory.mktemp(request.param)
        results, models = folder / "results.json", folder / "models"
        arguments = ["--made-up", "--results", str(results), "--models", str(models), "--task", request.param]
        assert main(["train", *arguments, "--epochs", "6", "--seeds", "1"]) == 0
    return Trial(request.param, arguments, results, models)


@pytest.fixture
def trial(trained, monkeypatch):
    few_networks(monkeypatch, trained.name)
    return trained


def test_networks_train_and_are_stored(trial, capsys):
    from mcu.task import scores
    from mcu.training import predict
    from microcontroller import TASKS, load, main, restore

    task, networks = TASKS[trial.name], trial.networks()
    assert list(networks) == list(task.networks)
    _, test = load(task, folder=None).for_results()
    untrained = scores(predict(task.build().eval(), test.x), test.y)
    for key, network in task.networks.items():
        model = restore(task, network, trial.models / f"{trial.name}-{key}.safetensors")
        found = scores(predict(model, test.x), test.y)
        assert found == pytest.approx(networks[key]["scores"]["0"])
        if key == "float":
            better = found["accuracy"] > 60 if "accuracy" in found else found["mse"] < 0.9 * untrained["mse"]
            assert better, found
        else:
            copies = {layer.p for layer in tbn.summary(model).layers}
            assert copies == ({1} if key == "binary" else {1, 4}), key
    capsys.readouterr()
    assert main(["train", *trial.arguments, "--epochs", "6", "--seeds", "1"]) == 0  # everything is there
    assert capsys.readouterr().out == ""


@needs_cc
@needs_arm
def test_networks_run_as_c_on_the_host_and_on_the_core(trial, capsys):
    from mcu import report
    from microcontroller import TASKS, main

    assert main(["measure", *trial.arguments, "--emulate", "2"]) == 0
    networks = trial.networks()
    for key, entry in networks.items():
        target, emulated = entry["target"], entry["target"]["emulated"]
        assert target["scores"] == pytest.approx(entry["scores"]["0"], rel=1e-5), key
        assert target["host"]["scores"] == pytest.approx(entry["scores"]["0"], rel=1e-5), key
        assert emulated["examples"] == 2
        for place in (target["host"], emulated):
            assert place["max_error"] < 1e-4 * place["max_output"], key
            assert place.get("other_classes", 0) == 0
        assert emulated["flash_bytes"] > target["weight_bytes"]
        assert 262_144 > emulated["static_bytes"] >= target["scratch_bytes"]
        assert 0 < emulated["stack_bytes"] < 2048
        row = next(
            line
            for line in report.tables(json.loads(trial.results.read_text()), TASKS)["target"].splitlines()
            if TASKS[trial.name].networks[key].title in line
        )
        ram = emulated["static_bytes"] + emulated["stack_bytes"]
        assert f"| {emulated['flash_bytes']:,} | {target['weight_bytes']:,} | {ram:,} |" in row
        assert row.endswith(f"| {emulated['instructions']:,} |")
    tiled, *others = (networks[key]["target"] for key in ("tbn4", "binary", "float") if key in networks)
    assert tiled["weight_bytes"] < others[0]["weight_bytes"] <= others[-1]["weight_bytes"]
    tiled, *others = (target["emulated"] for target in (tiled, *others))
    assert tiled["flash_bytes"] < others[0]["flash_bytes"] <= others[-1]["flash_bytes"]
    # Signs alone may take longer than floats in so small a network: the scales of many short rows are applied apart.
    assert tiled["instructions"] < min(other["instructions"] for other in others)
    if TASKS[trial.name].calibration:
        check_int8(trial, networks)
    else:
        assert all("int8" not in entry for entry in networks.values())
    capsys.readouterr()
    assert main(["measure", *trial.arguments]) == 0  # everything is there
    assert capsys.readouterr().out == ""


def check_int8(trial, networks):
    from mcu import report, tiny
    from microcontroller import TASKS

    task, peer = TASKS[trial.name], networks["float"]["int8"]
    model, shape = task.build().eval(), task.made_up().test.x.shape[1:]
    assert peer["instructions"] == tiny.int8_instructions(model, shape)
    assert peer["weight_bytes"] == sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)
    assert peer["scores"]["accuracy"] > networks["float"]["scores"]["0"]["accuracy"] - 10
    table = report.tables(json.loads(trial.results.read_text()), TASKS)["int8"].splitlines()
    assert f"| {peer['instructions']:,} | 1.00 | {peer['weight_bytes']:,} | {peer['weight_bytes']:,} |" in table[3]
    for key, entry in networks.items():
        if key == "float":
            continue
        in_float, target = entry["target"]["emulated"], entry["int8"]["emulated"]
        assert entry["int8"]["scores"]["accuracy"] > entry["scores"]["0"]["accuracy"] - 10, key
        # A sum at the middle of two steps may be rounded to the other one than in PyTorch.
        assert entry["int8"]["host"]["max_error"] < 0.05 * entry["int8"]["host"]["max_output"], key
        assert target["max_error"] <= entry["int8"]["host"]["max_error"] + 1e-6, key  # the same integers on every core
        assert target["static_bytes"] < 0.4 * in_float["static_bytes"], key
        share = f"| {target['instructions']:,} | {target['instructions'] / peer['instructions']:.2f} |"
        assert [line for line in table if f"| {task.networks[key].title} | int8 |" in line and share in line], key
    assert networks["tbn4"]["int8"]["emulated"]["instructions"] < peer["instructions"]


def test_networks_that_were_not_trained_are_named(tmp_path, capsys):
    from microcontroller import main

    folder = ["--results", str(tmp_path / "results.json"), "--models", str(tmp_path)]
    assert main(["measure", "--made-up", "--task", "mlp", *folder]) == 1
    assert "mlp-float.safetensors or its result is missing: train first" in capsys.readouterr().err


def test_training_goes_on_where_it_stopped(tmp_path, capsys):
    """A network that has a result is not trained again, and the stored float network teaches the others."""
    from microcontroller import main

    results, models = tmp_path / "results.json", tmp_path / "models"
    command = ["train", "--made-up", "--results", str(results), "--models", str(models), "--task", "mlp"]
    command += ["--epochs", "2", "--seeds", "1"]

    def train():
        capsys.readouterr()
        assert main(command) == 0
        networks = json.loads(results.read_text())["tasks"]["mlp"]["networks"]
        assert list(networks) == ["float", "binary", "tbn4"]
        trained = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
        return trained, {name: network["scores"] for name, network in networks.items()}, stored("tbn4").read_bytes()

    def stored(name):
        return models / f"mlp-{name}.safetensors"

    trained, *whole = train()
    assert trained == ["float", "binary", "tbn4"]
    stopped = json.loads(results.read_text())
    del stopped["tasks"]["mlp"]["networks"]["tbn4"]
    for teacher_is_stored in (True, False):
        results.write_text(json.dumps(stopped))
        stored("tbn4").unlink()
        if not teacher_is_stored:
            stored("float").unlink()
        assert train() == (["tbn4"] if teacher_is_stored else ["float", "tbn4"], *whole)


def test_networks_of_mlperf_tiny_have_the_sizes_of_its_reference_models():
    from mcu.tiny import NETWORKS, multiply_adds

    # Parameters of the Keras models, which count running statistics and have a bias in every layer; multiply-adds.
    reference = {
        "keywords, DS-CNN": (24_908, 2_656_768),
        "images, ResNet8": (78_666, 12_501_632),
        "wake words, MobileNetV1 0.25": (221_794, 7_489_664),
        "anomalies, autoencoder": (269_992, 264_192),
    }
    assert set(reference) == set(NETWORKS)
    for name, (make, shape) in NETWORKS.items():
        model = make().eval()
        tensors = [*model.parameters(), *(value for value in model.buffers() if value.is_floating_point())]
        layers = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
        biases = sum(len(layer.weight) for layer in layers if layer.bias is None)
        found = sum(value.numel() for value in tensors) + biases, sum(multiply_adds(model, shape).values())
        assert found == reference[name], name


def test_parts_share_no_example_and_choices_leave_the_test_alone():
    from mcu.task import Dataset, Examples

    train, validation, test = (Examples(torch.full((n, 1), n), torch.full((n,), n)) for n in (3, 4, 5))
    data = Dataset("", "", train, validation, test, retrain=True)
    assert [part.y.unique().tolist() for part in data.for_choices()] == [[3], [4]]
    assert [part.y.unique().tolist() for part in data.for_results()] == [[3, 4], [5]]
    kept = dataclasses.replace(data, retrain=False)
    assert [part.y.unique().tolist() for part in kept.for_results()] == [[3], [5]]


def test_examples_for_scales_are_evenly_spaced():
    from mcu.task import Examples

    examples = Examples(torch.arange(10.0)[:, None], torch.arange(10))
    assert examples.spread(4).y.tolist() == examples.spread(4).x.flatten().tolist() == [0, 2, 5, 7]
    assert examples.spread(20).y.tolist() == list(range(10))
    assert len(examples.spread(0)) == 0


def test_starting_alphas_are_spread():
    from mcu.images import MLP
    from mcu.training import tile

    network = MLP.networks["tbn4"]
    packed = tbn.lower(tile(MLP.build(), network, teacher=None))
    alphas = packed.state_dict()["0.weight_alpha"]
    torch.testing.assert_close(alphas / alphas[1], torch.tensor(network.recipe.alpha_start), rtol=0.05, atol=0)


def test_a_start_from_the_float_network_takes_its_magnitudes():
    from mcu.keywords import TASK
    from mcu.task import Network, Recipe
    from mcu.training import tile

    teacher = TASK.build()
    network = Network("", Recipe(epochs=1, from_float=True), tbn.TilingConfig(p=1, min_size=0))
    packed = tbn.lower(tile(TASK.build(), network, teacher))
    expected = teacher.state_dict()["0.weight"].abs().mean()
    torch.testing.assert_close(packed.state_dict()["0.weight_alpha"], expected.reshape(1))


def test_a_tone_fills_its_mel_band():
    from mcu import keywords

    filters = keywords.mel_filters()
    assert filters.shape == (keywords.BANDS, 129)
    assert filters.max() <= 1
    assert (filters.max(axis=1) > 0).all()
    covered = filters.sum(axis=0)
    np.testing.assert_allclose(covered[5:110], 1)  # neighbours overlap so that they add up to one
    assert covered[[0, 128]].max() < 1e-9  # 0 and 4,000 Hz
    assert covered[[2, 127]].min() > 0
    for hertz in (300, 1000, 3000):
        tone = 8000 * np.sin(2 * np.pi * hertz * np.arange(keywords.duration(50)) / keywords.RATE)
        spectrum = keywords.log_mel(tone.astype(np.int16))
        assert spectrum.shape == (keywords.BANDS, keywords.FRAMES)
        band = spectrum.mean(axis=1).argmax()
        assert filters[band, round(hertz / keywords.RATE * 256)] == filters[:, round(hertz / keywords.RATE * 256)].max()


def test_loudness_is_the_first_coefficient():
    from mcu import dscnn, keywords

    noise = np.random.default_rng(0).integers(-9000, 9000, keywords.duration(dscnn.FRAMES)).astype(np.int16)
    loud, quiet = dscnn.cepstrum(noise), dscnn.cepstrum((noise / 2).astype(np.int16))
    assert loud.shape == (1, 49, 10)
    np.testing.assert_allclose((loud - quiet)[..., 0], np.log(4) * np.sqrt(keywords.BANDS), rtol=0.02)
    np.testing.assert_allclose((loud - quiet)[..., 1:], 0, atol=0.1)
    # Parseval: with as many coefficients as bands, nothing would be lost.
    spectra = keywords.log_mel(noise, dscnn.FRAMES)
    assert (np.square(loud[0]).sum(1) < np.square(spectra).sum(0)).all()


def test_augmented_recordings_move_as_a_whole():
    from mcu import dscnn

    x = torch.arange(49.0)[:, None].expand(3, 1, 49, 10).clone()
    moved = dscnn.augment(x.clone())
    assert (moved[..., 1:] == moved[..., 1:2]).all()  # all coefficients of a frame stay together
    steps = (moved[:, 0, :, 1] - x[:, 0, :, 1]) % 49
    assert (steps == steps[:, :1]).all()
    louder = moved[..., 0] - moved[..., 1]
    torch.testing.assert_close(louder, louder[..., :1].expand_as(louder))
    assert louder.unique().numel() > 1


def test_images_are_standardised_and_divided(monkeypatch):
    from mcu import cifar
    from paper.data import Images

    x = torch.randint(0, 256, (5_010, 3, 32, 32), dtype=torch.uint8)
    y = torch.arange(5_010) % 10
    monkeypatch.setattr(cifar, "read_images", lambda folder, name: Images("CIFAR-10", x, y, x[:7], y[:7], "a note"))
    data = cifar.read(Path("nowhere"))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [10, 5_000, 7]
    assert data.split.endswith("7 test (a note)")
    pixel = (x[4, 1, 2, 3].item() / 255 - 0.4822) / 0.2435
    assert data.train.x[4, 1, 2, 3].item() == pytest.approx(pixel, abs=1e-5)
    torch.testing.assert_close(data.test.x, data.train.x[:7])
    changed = cifar.augment(data.test.x)
    assert changed.shape == data.test.x.shape
    assert not torch.equal(changed, data.test.x)


def test_recordings_are_centred():
    from mcu import keywords

    silence = np.log(np.float32(1e-6))
    short = keywords.log_mel(np.full(1000, 5000, np.int16))
    assert short[:, 0].max() == pytest.approx(silence)
    assert short[:, -1].max() == pytest.approx(silence)
    assert short[0, keywords.FRAMES // 2] > silence + 0.1
    noise = np.random.default_rng(0).integers(-9000, 9000, keywords.duration(50) + 20).astype(np.int16)
    assert (keywords.log_mel(noise) == keywords.log_mel(noise[10:-10])).all()


@pytest.fixture
def recordings():
    """(samples, digit, index) of one speaker; the samples tell which recording it is."""
    random = np.random.default_rng(0)
    return [
        (random.integers(-9000, 9000, 900 + 7 * digit + index).astype(np.int16), digit, index)
        for digit in range(10)
        for index in range(12)
    ]


def write_wavs(folder, recordings):
    folder.mkdir(parents=True)
    for samples, digit, index in recordings:
        with wave.open(str(folder / f"{digit}_nobody_{index}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(samples.astype("<i2").tobytes())


def write_npz(path, recordings):
    samples, digits, indices = zip(*recordings, strict=True)
    np.savez(path, audio=np.concatenate(samples), length=[len(s) for s in samples], label=digits, index=indices)


def test_recordings_are_read_and_divided_by_index(recordings, tmp_path):
    from mcu import keywords

    write_wavs(tmp_path / "wav" / "fsdd" / "recordings", recordings)
    (tmp_path / "npz" / "fsdd").mkdir(parents=True)
    write_npz(tmp_path / "npz" / "fsdd" / "fsdd.npz", recordings)
    from_wav, from_npz = (keywords.read(tmp_path / kind) for kind in ("wav", "npz"))
    assert [len(part) for part in (from_npz.train, from_npz.validation, from_npz.test)] == [20, 50, 50]
    train, test = (
        np.stack([keywords.log_mel(samples) for samples, _, index in recordings if index in part])
        for part in (range(10, 12), range(5))
    )
    mean, std = train.mean(axis=(0, 2), keepdims=True), train.std(axis=(0, 2), keepdims=True, ddof=1)
    np.testing.assert_allclose(from_npz.test.x, (test - mean) / std, rtol=1e-4, atol=1e-4)
    for name in ("train", "validation", "test"):
        one, other = getattr(from_wav, name), getattr(from_npz, name)
        order, other_order = (x.flatten(1).sum(1).argsort() for x in (one.x, other.x))
        torch.testing.assert_close(one.x[order], other.x[other_order], rtol=1e-5, atol=1e-5)
        assert (one.y[order] == other.y[other_order]).all()


def test_windows_of_the_forecast_stay_in_their_months(tmp_path):
    from mcu import forecast

    hours = 20 * 720 + 50
    (tmp_path / "ett").mkdir()
    rows = "".join(f"2016-07-01,{','.join(str(hour + 0.5 * column) for column in range(7))}\n" for hour in range(hours))
    content = "date,a,b,c,d,e,f,g\n" + rows
    (tmp_path / "ett" / "ETTh1.csv.gz").write_bytes(gzip.compress(content.encode()))
    data = forecast.read(tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [8640 - 191, 2880 - 95, 2880 - 95]
    assert data.test.x.shape[1:] == data.test.y.shape[1:] == (96, 7)
    std = np.arange(8640).std()
    for part, first, last in ((data.train, 96, 8640), (data.validation, 8640, 11520), (data.test, 11520, 14400)):
        forecast_hours = part.y[:, :, 0] * std + np.arange(8640).mean()
        assert forecast_hours[0, 0] == pytest.approx(first, abs=0.01)
        assert forecast_hours[-1, -1] == pytest.approx(last - 1, abs=0.01)
        torch.testing.assert_close(part.x[96], part.y[0])


def test_series_are_forecast_by_themselves():
    from mcu.forecast import Forecaster

    model = Forecaster().eval()
    x = torch.randn(2, 96, 7)
    changed = x.clone()
    changed[:, :, 3] = torch.randn(2, 96)
    same = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(model(x)[:, :, same], model(changed)[:, :, same])
    torch.testing.assert_close(model(x + 5), model(x) + 5, rtol=1e-4, atol=1e-4)


def test_missing_and_damaged_data_is_named(recordings, tmp_path, capsys):
    from microcontroller import main

    command = ["train", "--data", str(tmp_path), "--results", str(tmp_path / "r.json"), "--models", str(tmp_path)]
    (tmp_path / "ett").mkdir()
    (tmp_path / "fsdd").mkdir()
    cases = [
        ("mlp", None, b"", "train-images-idx3-ubyte.gz"),
        ("keywords", None, b"", "no recordings/*.wav and no fsdd.npz"),
        ("dscnn", None, b"", "no recordings/*.wav and no fsdd.npz"),
        ("keywords", "fsdd/fsdd.npz", b"no archive", "cannot read"),
        ("resnet8", None, b"", "no cifar-10-python.tar.gz"),
        ("forecast", None, b"", "no ETTh1.csv"),
        ("forecast", "ett/ETTh1.csv", b"date,a\n2016,1\n", "2 columns and 1 rows"),
        ("forecast", "ett/ETTh1.csv", b"date,a\n2016,x\n", "cannot read"),
    ]
    for task, path, content, message in cases:
        if path:
            (tmp_path / path).write_bytes(content)
        assert main([*command, "--task", task]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "fsdd" / "recordings").mkdir()
    assert main([*command, "--task", "keywords"]) == 1
    assert "no recordings in" in capsys.readouterr().err
    for name, message in (("3_nobody.wav", "as {digit}_{speaker}_{index}.wav"), ("3_nobody_1.wav", "cannot read")):
        (tmp_path / "fsdd" / "recordings" / name).write_bytes(b"no sound")
        assert main([*command, "--task", "keywords"]) == 1
        assert message in capsys.readouterr().err
        (tmp_path / "fsdd" / "recordings" / name).unlink()


def test_trials_keep_away_from_the_results(capsys):
    from microcontroller import main

    for arguments, message in (
        (["train", "--made-up"], "a trial needs --results"),
        (["train", "--data", "x", "--validate"], "a trial needs --results"),
        (["measure", "--made-up"], "a trial needs --results"),
        (["train", "--data", "x", "--seeds", "0"], "--seeds must be at least 1"),
        (["measure", "--data", "x", "--emulate", "0"], "--emulate must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_page_holds_the_tables_of_the_result_file():
    from mcu import report
    from microcontroller import DOCUMENT, RESULTS, TASKS, read_results

    document, results = DOCUMENT.read_text(encoding="utf-8"), read_results(RESULTS)
    assert report.fill(document, results, TASKS) == document
    for name in report.tables(results, TASKS):
        assert f"<!-- {name} -->" in document


def test_recorded_recipes_are_the_present_ones():
    from microcontroller import RESULTS, TASKS, is_trained, read_results

    results = read_results(RESULTS)
    assert set(results["tasks"]) == set(TASKS)
    for task in TASKS.values():
        assert is_trained(task, 0, results), task.name


def test_a_forecast_row_shows_both_errors():
    from mcu.report import score

    assert score({"accuracy": 96.504}) == "96.50 %"
    assert score({"mse": 0.38655, "mae": 0.4}) == "0.387 / 0.400"
