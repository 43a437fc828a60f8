"""Hugging Face transformers: what ``save_pretrained`` writes, ``from_pretrained`` gives back bit for bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import ConfigError, LoweringError, SerializationError, TilingConfig, TransformError
from tbn_compiler.graph.records import get_records

transformers = pytest.importorskip("transformers")
plugin = pytest.importorskip("tbn_compiler.integrations.transformers")

TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE |= {"image_size": 16, "patch_size": 8}
CONFIG = TilingConfig(p=4, min_size=0)
SHARD = "10KB"  # several files for a model


def _ids() -> Tensor:
    return torch.randint(0, 96, (2, 7))


def llama(**options: Any) -> Any:
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0, **options)
    return transformers.LlamaForCausalLM(config).eval()


def bert() -> Any:
    config = transformers.BertConfig(**TEXT, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral() -> Any:
    config = transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def t5() -> Any:
    config = transformers.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config).eval()


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)).eval()


def clip() -> Any:
    text = TEXT | {"max_position_embeddings": 16}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)
    ).eval()


def resnet() -> Any:
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return transformers.ResNetForImageClassification(config).eval()


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    name = type(model).__name__
    inputs = {} if "Image" in name else {"input_ids": _ids()}
    if "Image" in name or "CLIP" in name:
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    if "T5" in name:
        inputs["decoder_input_ids"] = _ids()
    return inputs


def _results(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    result: Tensor = output.logits if "logits" in output else output.logits_per_image
    return result


def _assert_same(first: Any, second: Any) -> None:
    """Equal tilings, and state bit for bit."""
    states = (first.state_dict(), second.state_dict())
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype, name
        assert torch.equal(value, states[1][name]), name
    wanted, found = ([(r.weight, r.spec, r.reason, r.note) for r in get_records(m) or ()] for m in (first, second))
    assert wanted == found


def _written(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {}),
    "tied": (lambda: llama(tie_word_embeddings=True), {}),
    "tile": (llama, {"latent": "tile"}),
    "gradual": (llama, {"gradual": True}),
    "alphas": (llama, {"alpha": "tile"}),
    "one source": (llama, {"alpha_source": "W"}),
    "hadamard": (llama, {"replicate": "hadamard"}),
    "two axes": (llama, {"p": (2, 2)}),
    "int8": (llama, {"activation": "int8"}),
    "int8, learned": (llama, {"activation": "int8", "input_scale": "layer"}),
    "full precision": (llama, {"tile_dtype": "float"}),
    "some": (llama, {"float_layers": ("lm_head", "*.k_proj"), "min_size": 2048, "small": "float"}),
    "bert": (bert, {}),
    "gpt2": (gpt2, {}),
    "mixtral": (mixtral, {}),
    "t5": (t5, {}),
    "vit": (vit, {}),
    "clip": (clip, {}),
    "resnet": (resnet, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_model_comes_back(case: str, tmp_path: Path) -> None:
    build, options = CASES[case]
    model = build()
    inputs = _inputs(model)
    qat = tbn.transform(model, CONFIG.replace(**options))
    if "gradual" in options:
        tbn.set_tiling_strength(qat, 0.5)
    again = type(model).from_pretrained(_written(qat, tmp_path / "qat", max_shard_size=SHARD))
    assert len(list((tmp_path / "qat").glob("*.safetensors"))) > 1
    _assert_same(qat, again)
    assert torch.equal(_results(qat, inputs), _results(again, inputs))
    for trained in (qat, again):
        if "gradual" in options:
            tbn.set_tiling_strength(trained, 1.0)
    packed = tbn.lower(qat)
    _assert_same(packed, tbn.lower(again))
    loaded = type(model).from_pretrained(_written(packed, tmp_path / "packed", max_shard_size=SHARD))
    _assert_same(packed, loaded)
    assert torch.equal(_results(packed, inputs), _results(loaded, inputs))
    _assert_same(packed, type(model).from_pretrained(_written(loaded, tmp_path / "again")))
    assert not hasattr(model.config, "quantization_config")
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("form", ["train", "packed"])
def test_a_float_checkpoint_is_tiled_on_the_way(form: Any, tmp_path: Path) -> None:
    model = llama()
    config = TilingConfig(p=4, min_size=0, alpha_source="W", overrides={"lm_head": {"p": 2}})
    inputs = _inputs(model)
    folder = _written(model, tmp_path / "float")
    loaded = type(model).from_pretrained(folder, quantization_config=plugin.TbnConfig(config, form=form))
    expected = tbn.transform(model, config)
    _assert_same(loaded, expected if form == "train" else tbn.lower(expected))
    assert torch.equal(_results(loaded, inputs), _results(expected if form == "train" else tbn.lower(expected), inputs))
    _assert_same(loaded, type(model).from_pretrained(_written(loaded, tmp_path / "tiled")))
    with pytest.raises(TransformError, match="nothing to tile in LlamaForCausalLM"):
        type(model).from_pretrained(
            folder, quantization_config=plugin.TbnConfig(TilingConfig(min_size=10**6, small="float"))
        )


def test_half_precision(tmp_path: Path) -> None:
    """Alphas have the dtype of the weights; with ``dtype`` they are cast like them."""
    folder = _written(llama(), tmp_path / "float")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    packed = tbn.lower(tbn.transform(model, CONFIG))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(_written(packed, tmp_path / "packed"))
    assert loaded.dtype == torch.bfloat16
    _assert_same(packed, loaded)
    wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    layer = wide.model.layers[0].mlp.up_proj
    assert (layer.weight_tile.dtype, layer.weight_alpha.dtype) == (torch.uint8, torch.float32)


@pytest.fixture(scope="module")
def packed_llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    packed = tbn.lower(tbn.transform(llama(), CONFIG))
    return packed, _written(packed, tmp_path_factory.mktemp("llama") / "packed")


def test_generation_uses_its_cache(packed_llama: tuple[Any, Path]) -> None:
    packed, folder = packed_llama
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = _ids()
    options = {"max_new_tokens": 9, "do_sample": False}
    expected = packed.generate(prompt, **options, use_cache=False)
    assert torch.equal(loaded.generate(prompt, **options), expected)


def test_heads_come_and_go(packed_llama: tuple[Any, Path], tmp_path: Path) -> None:
    """A model takes the checkpoint of itself with a head on it, and the other way round."""
    packed, folder = packed_llama
    ids = _ids()
    base = transformers.AutoModel.from_pretrained(folder)
    _assert_same(base, packed.model)
    assert torch.equal(base(ids)[0], packed.model(ids)[0])
    written = _written(packed.model, tmp_path / "base")
    _assert_same(transformers.AutoModel.from_pretrained(written), packed.model)
    for source in (written, folder):
        judge = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3)
        assert torch.equal(judge.model(ids)[0], packed.model(ids)[0])
        score = judge.score.weight  # new, as transformers initialises it
        assert 0 < score.std() < 0.1
        assert score.isfinite().all()
        reloaded = transformers.AutoModelForSequenceClassification.from_pretrained(
            _written(judge, tmp_path / f"judge {source.name}")
        )
        _assert_same(judge, reloaded)


def test_layers_offloaded_to_the_disk(packed_llama: tuple[Any, Path], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    packed, folder = packed_llama
    other = tbn.lower(tbn.transform(nn.Linear(32, 64), CONFIG))
    x, inputs = torch.randn(3, 32), _inputs(packed)
    before, expected = other(x), _results(packed, inputs)
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=places | {"model.layers.1": "disk"}, offload_folder=tmp_path, offload_buffers=True
    )
    assert loaded.model.layers[1].mlp.up_proj.weight_tile.is_meta
    assert torch.equal(_results(loaded, inputs), expected)
    assert torch.equal(_results(tbn.lower(loaded), inputs), expected)
    with pytest.raises(LoweringError, match=r"'model\.layers\.1\..*' is offloaded: load the model whole"):
        loaded.dequantize()
    # The hooks are those of the loaded layers: others with the same code run as before.
    assert torch.equal(other(x), before)
    assert torch.equal(_results(packed, inputs), expected)


def test_a_dense_model_again(packed_llama: tuple[Any, Path], tmp_path: Path) -> None:
    packed, folder = packed_llama
    ids = _ids()
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder).dequantize()
    assert get_records(dense) is None
    torch.testing.assert_close(dense(ids).logits, packed(ids).logits)
    plain = transformers.AutoModelForCausalLM.from_pretrained(_written(dense, tmp_path))
    assert type(plain.lm_head) is nn.Linear
    assert torch.equal(plain(ids).logits, dense(ids).logits)
    model = gpt2()
    qat = tbn.transform(model, CONFIG.replace(latent="tile"))
    torch.testing.assert_close(qat.dequantize()(ids).logits, qat(ids).logits)


class Functional(transformers.PreTrainedModel):
    """A model with a weight that a function uses."""

    class Config(transformers.PretrainedConfig):
        model_type = "functional"

    config_class = Config
    base_model_prefix = "base"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.w = nn.Parameter(torch.randn(32, 32))
        self.fc = nn.Linear(32, 32)
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fc(x), self.w)


def test_dense_models_keep_what_they_are(tmp_path: Path) -> None:
    qat = tbn.transform(llama(), CONFIG)
    qat.generation_config.max_new_tokens = 5
    qat.save_pretrained(tmp_path)  # which makes a string of the dtype
    state = torch.get_rng_state()
    dense = qat.dequantize()
    assert torch.equal(torch.get_rng_state(), state)
    assert dense.generation_config.max_new_tokens == 5
    assert dense.dtype == torch.float32
    assert qat.to(torch.bfloat16).dequantize().dtype == torch.bfloat16
    assert qat.dequantize(torch.float64).dtype == torch.float64
    packed = tbn.lower(tbn.transform(Functional(Functional.Config()), CONFIG))
    x = torch.randn(3, 32)
    torch.testing.assert_close(packed.dequantize()(x), packed(x))


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("latent", ["weight", "tile"])
def test_a_weight_that_a_function_uses_is_loaded(latent: Any, lowered: bool, tmp_path: Path) -> None:
    tiled = tbn.transform(Functional(Functional.Config()), CONFIG.replace(latent=latent))
    tiled = tbn.lower(tiled) if lowered else tiled
    loaded = Functional.from_pretrained(_written(tiled, tmp_path))
    _assert_same(loaded, tiled)
    x = torch.randn(3, 32)
    assert torch.equal(loaded(x), tiled(x))
    assert torch.equal(tbn.lower(loaded)(x), tbn.lower(tiled)(x))


@pytest.mark.parametrize("lowered", [False, True])
def test_a_part_of_a_composite_model(lowered: bool, tmp_path: Path) -> None:
    whole = tbn.transform(clip(), CONFIG)
    whole = tbn.lower(whole) if lowered else whole
    images, ids = torch.randn(2, 3, 16, 16), _ids()
    folder = _written(whole, tmp_path)
    vision = transformers.CLIPVisionModel.from_pretrained(folder)
    assert torch.equal(vision(images)[0], whole.vision_model(images)[0])
    text = transformers.CLIPTextModel.from_pretrained(folder)
    assert torch.equal(text(ids)[0], whole.text_model(ids)[0])


def test_another_class_takes_what_it_has(tmp_path: Path) -> None:
    model, ids = tbn.transform(t5(), CONFIG), _ids()
    encoder = transformers.T5EncoderModel.from_pretrained(_written(model, tmp_path / "t5"))
    assert torch.equal(encoder(ids)[0], model.encoder(ids)[0])
    with pytest.raises(SerializationError, match="BertModel has none of the tiled layers of the checkpoint"):
        transformers.BertModel.from_pretrained(tmp_path / "t5", config=transformers.BertConfig(
            **TEXT, max_position_embeddings=32, quantization_config=model.config.quantization_config.to_dict()
        ))  # fmt: skip


def test_the_configuration_is_that_of_the_outer_model(packed_llama: tuple[Any, Path], tmp_path: Path) -> None:
    packed, folder = packed_llama
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert "lm_head.weight" in loaded.config.quantization_config.layers
    shutil.copytree(folder, tmp_path / "copy")
    loaded.config.save_pretrained(tmp_path / "copy")
    _assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "copy"), packed)


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("alpha_source", ["A", "W"])
def test_a_float_model_of_a_tiled_configuration(alpha_source: Any, lowered: bool, tmp_path: Path) -> None:
    """``from_config`` builds it; its file would load as tiled layers without values."""
    tiled = tbn.transform(llama(), CONFIG.replace(alpha_source=alpha_source))
    loaded = transformers.LlamaForCausalLM.from_pretrained(
        _written(tbn.lower(tiled) if lowered else tiled, tmp_path / "tiled")
    )
    model = transformers.AutoModelForCausalLM.from_config(loaded.config)
    folder = _written(model, tmp_path / "float")
    with pytest.raises(SerializationError, match=r"no tensor of the \d+ tiled layers in its config.json, such as "):
        transformers.LlamaForCausalLM.from_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    del config.quantization_config
    again = transformers.LlamaForCausalLM.from_pretrained(folder, config=config)
    ids = _ids()
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_a_model_put_together_from_tiled_parts(tmp_path: Path) -> None:
    parts = [tmp_path / "encoder", tmp_path / "decoder"]
    options = {**TEXT, "max_position_embeddings": 32}
    decoder = transformers.BertConfig(**options, is_decoder=True, add_cross_attention=True)
    _written(tbn.transform(transformers.BertModel(transformers.BertConfig(**options)), CONFIG), parts[0])
    _written(tbn.transform(transformers.BertLMHeadModel(decoder), CONFIG), parts[1])
    model = transformers.EncoderDecoderModel.from_encoder_decoder_pretrained(*map(str, parts))
    with pytest.raises(SerializationError, match=r"put together from tiled parts is saved after .*mark\(model\)"):
        transformers.EncoderDecoderModel.from_pretrained(_written(model, tmp_path / "unknown"))
    tbn.integrations.transformers.mark(model)
    loaded = transformers.EncoderDecoderModel.from_pretrained(_written(model, tmp_path / "known"))
    inputs = {"input_ids": _ids(), "decoder_input_ids": _ids()}
    assert torch.equal(loaded(**inputs).logits, model.eval()(**inputs).logits)


def test_what_is_saved_is_what_the_model_is(tmp_path: Path) -> None:
    """The configuration follows the model: lowered since, or rewritten, which no checkpoint holds."""
    qat = transformers.LlamaForCausalLM.from_pretrained(_written(tbn.transform(llama(), CONFIG), tmp_path / "qat"))
    packed = tbn.lower(qat)
    written = json.loads((_written(packed, tmp_path / "packed") / "config.json").read_text())
    assert written["quantization_config"]["form"] == "packed"
    assert (qat.config.quantization_config.form, packed.config.quantization_config.form) == ("train", "packed")
    assert (qat.is_quantized, packed.is_quantized) == (False, True)
    with pytest.raises(SerializationError, match=r"was rewritten by tbn_compiler\.optimize"):
        tbn.optimize(packed, activation="int8").save_pretrained(tmp_path / "optimized")
    mixed = tbn.transform(llama(), CONFIG)
    mixed.lm_head = tbn.lower(mixed.lm_head)
    with pytest.raises(SerializationError, match=r"some layers are lowered, and 'model\.layers\.0.*' is not"):
        mixed.save_pretrained(tmp_path / "mixed")
    path = tmp_path / "packed.safetensors"
    tbn.save(packed, path)
    _assert_same(packed, type(qat).from_pretrained(_written(tbn.load(path, llama()), tmp_path / "loaded")))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "later": (lambda q: q.update(version=2), "has format version 2; this tbn_compiler reads up to 1"),
    "no version": (lambda q: q.update(version="1"), "has format version '1'"),
    "unknown": (lambda q: q.update(colour="red"), "unknown field 'colour'"),
    "form": (lambda q: q.update(form="crumpled"), "form='crumpled' is not one of"),
    "no layers": (lambda q: q.pop("layers"), "does not say how its layers are tiled"),
    "layers": (lambda q: q.update(layers=[1]), "not an object"),
    "field": (lambda q: q["layers"]["lm_head.weight"].pop("p"), "layer 'lm_head.weight': its entry lacks 'p'"),
    "value": (lambda q: q["layers"]["lm_head.weight"].update(p=7), "layer 'lm_head.weight': .*7"),
    "shape": (lambda q: q["layers"]["lm_head.weight"].update(shape=[64, 48]), "has shape .64, 48. in the file"),
    "name": (
        lambda q: q["layers"].update({"model.foot.weight": q["layers"]["lm_head.weight"]}),
        "no linear or conv weight 'model.foot.weight'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_configurations(damage: str, packed_llama: tuple[Any, Path], tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    folder = tmp_path / "damaged"
    shutil.copytree(packed_llama[1], folder)
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((SerializationError, ConfigError), match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_options_of_the_configuration() -> None:
    config = plugin.TbnConfig(TilingConfig(p=8, overrides={"head": {"p": 1}}, filter=lambda layer: True))
    again = plugin.TbnConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.tiling == TilingConfig(p=8, overrides={"head": {"p": 1}})
    assert plugin.TbnConfig({"p": 2}).tiling == TilingConfig(p=2)
    with pytest.raises(ConfigError, match="did you mean 'min_size'"):
        plugin.TbnConfig({"minsize": 2})
    with pytest.raises(ConfigError, match="tiling must be a TilingConfig, got int 4"):
        plugin.TbnConfig(4)
    with pytest.raises(ConfigError, match="form='x'"):
        plugin.TbnConfig(form="x")


def test_gradual_training_has_to_end_before_packing(tmp_path: Path) -> None:
    folder = _written(llama(), tmp_path)
    config = plugin.TbnConfig(CONFIG.replace(gradual=True), form="packed")
    with pytest.raises(LoweringError, match="tiling_strength"):
        transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


def test_either_import_may_come_first(packed_llama: tuple[Any, Path]) -> None:
    """In this process it was tbn_compiler."""
    code = "import transformers.modeling_utils, tbn_compiler\n"
    code += f"m = transformers.AutoModelForCausalLM.from_pretrained({str(packed_llama[1])!r})\n"
    code += "print(type(m.lm_head).__mro__[1].__name__, m.hf_quantizer.quantization_config.form)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["TiledLinear", "packed"]


def test_asking_for_the_library_is_not_importing_it() -> None:
    code = "import tbn_compiler, importlib.util, sys\nimportlib.util.find_spec('transformers.modeling_utils')\n"
    code += "import transformers.modeling_utils\nprint('tbn_compiler.integrations.transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "True"


def test_a_pipeline(packed_llama: tuple[Any, Path], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{index}": index for index in range(95)} | {"unknown": 95}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="unknown"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="unknown", pad_token="w0")
    folder = tmp_path / "whole"
    shutil.copytree(packed_llama[1], folder)
    fast.save_pretrained(folder)
    (result,) = transformers.pipeline("text-generation", model=str(folder))("w1 w2 w3", max_new_tokens=4)
    assert result["generated_text"].startswith("w1 w2 w3")
