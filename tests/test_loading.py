"""Tokenizers, weights, packaged configs and LoRA settings, with tiny models made on the spot."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ppo_lab.assembly import load_policy, sampling
from ppo_lab.config import Config, GenerationSection, HeadCritic, LoraSection, ModelSection
from ppo_lab.errors import ConfigError
from ppo_lab.models import sources
from ppo_lab.models.byte_tokenizer import BYTE_VOCABULARY, byte_tokenizer
from ppo_lab.models.loading import (
    ModelUnavailable,
    check_vocabulary,
    choose_dtype,
    disable_dropout,
    eos_ids,
    load_causal_lm,
    load_config,
    load_tokenizer,
    max_context,
    parameter_bytes,
    resolved_revision,
)
from ppo_lab.models.lora import lora_config, wrap_lora
from ppo_lab.models.policy import AutoModelForCausalLMWithValueHead
from ppo_lab.models.value_head import ValueHead, save_value_head

CPU = torch.device("cpu")
IDS = torch.arange(12).reshape(2, 6) + 3


def tiny_config(kind: str, **changes):
    """A config of two layers, all of its dropout at 0.4."""
    vocabulary, size = BYTE_VOCABULARY, 16
    llama = {
        "vocab_size": vocabulary,
        "hidden_size": size,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "attention_dropout": 0.4,
    }
    gpt2 = {"vocab_size": vocabulary, "n_embd": size, "n_layer": 2, "n_head": 2}
    gpt2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.4)
    bloom = {"vocab_size": vocabulary, "hidden_size": size, "n_layer": 2, "n_head": 2}
    bloom |= dict.fromkeys(("hidden_dropout", "attention_dropout"), 0.4)
    makers = {
        "bloom": (transformers.BloomConfig, bloom),
        "gpt2": (transformers.GPT2Config, gpt2),
        "gpt_neox": (transformers.GPTNeoXConfig, llama | {"hidden_dropout": 0.4}),
        "llama": (transformers.LlamaConfig, llama | {"num_key_value_heads": 1}),
        "qwen2": (transformers.Qwen2Config, llama | {"num_key_value_heads": 1}),
        "qwen3": (transformers.Qwen3Config, llama | {"num_key_value_heads": 1, "head_dim": 16}),
    }
    maker, settings = makers[kind]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return maker(**(settings | special | changes))


def tiny_model(kind: str = "bloom", **changes):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(kind, **changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny BLOOM model with the tokenizer of bytes."""
    tiny_model().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def section(path: object, **settings) -> ModelSection:
    return ModelSection(path=str(path), **settings)


def bare_tokenizer() -> PreTrainedTokenizerFast:
    """Three words and no special token at all."""
    backend = Tokenizer(models.WordLevel({"yes": 0, "no": 1, "!": 2}, unk_token="no"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """Words hold the space before them, and a text gets one put before it; no bytes but a line's
    end, and an unknown token.
    """
    words = ["<unk>", "<s>", "▁", "▁the", "▁cat", "s", ".", "▁a"]
    vocabulary = [(word, -float(i)) for i, word in enumerate(words)]
    backend = Tokenizer(models.Unigram([*vocabulary, ("<0x0A>", -20.0)], 0, byte_fallback=False))
    backend.normalizer = normalizers.Replace("\n", "<0x0A>")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", pad_token="<s>"
    )


def tiny_policy() -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead(tiny_model())


def test_a_folder_gives_its_own_weights_in_evaluation_mode(folder):  # ledger C-03
    model = load_causal_lm(section(folder), device="cpu")
    saved = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    torch.testing.assert_close(model(IDS).logits, saved(IDS).logits, rtol=0, atol=0)


def test_dtype_is_as_asked_and_auto_is_float32_without_a_gpu(folder):
    half = load_causal_lm(section(folder, dtype="bfloat16"), device="cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    full = load_causal_lm(section(folder, dtype="bfloat16"), device="cpu", dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    assert choose_dtype("auto", CPU) == torch.float32


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "gpt_neox", "llama", "qwen2", "qwen3"])
def test_two_train_mode_forwards_are_equal_once_dropout_is_off(kind):  # ledger N-09
    model = tiny_model(kind, attn_implementation="eager").train()
    assert not torch.equal(model(IDS).logits, model(IDS).logits), "the test could not fail"
    disable_dropout(model)
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert torch.equal(model(IDS).logits, model.eval()(IDS).logits)


def test_a_config_that_takes_whole_numbers_alone_gets_a_whole_zero():
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(transformers.MptConfig(**sizes, resid_pdrop=0.4))
    disable_dropout(model)
    assert (model.config.attn_config.attn_pdrop, model.config.resid_pdrop) == (0, 0.0)


def test_dropout_in_an_adapter_goes_off_as_well():
    wrapped = wrap_lora(tiny_model("llama"), LoraSection(r=4, dropout=0.5)).train()
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert not torch.equal(wrapped(IDS).logits, wrapped(IDS).logits)
    disable_dropout(wrapped)
    assert torch.equal(wrapped(IDS).logits, wrapped(IDS).logits)


def test_a_loaded_model_has_no_dropout_left(folder):
    model = load_causal_lm(section(folder), device="cpu").train()
    assert torch.equal(model(IDS).logits, model(IDS).logits)
    assert model.config.hidden_dropout == 0.0


def test_tokenizers_pad_left_with_their_own_pad_token_or_another(folder, tmp_path, assets):
    own = load_tokenizer(section(folder))
    assert (own.padding_side, own.pad_token) == ("left", "<pad>")
    assert load_tokenizer(section(folder, pad_token="<s>")).pad_token_id == 1
    assert load_tokenizer(section(assets / "stories260K")).pad_token == "<unk>"
    padless = byte_tokenizer()
    padless.pad_token = None
    padless.save_pretrained(tmp_path / "padless")
    assert load_tokenizer(section(folder, tokenizer=str(tmp_path / "padless"))).pad_token == "</s>"


def test_what_ends_a_text_pads_before_what_is_unknown_does(tmp_path):
    padless = byte_tokenizer()
    padless.pad_token, padless.unk_token = None, "<s>"
    padless.save_pretrained(tmp_path)
    assert load_tokenizer(section(tmp_path, tokenizer=str(tmp_path))).pad_token == "</s>"


def test_an_end_without_a_row_in_the_embedding_is_none(folder):
    tokenizer, model = load_tokenizer(section(folder)), tiny_model()
    rows = model.get_input_embeddings().weight.shape[0]
    model.generation_config.eos_token_id = [rows - 1, rows, -1]
    assert eos_ids(tokenizer, model) == (rows - 1, 2)


@pytest.mark.parametrize(("top_layers", "adapted"), [(0, {0, 1, 2}), (1, {2}), (3, {0, 1, 2})])
def test_the_layers_that_are_adapted_are_the_upper_ones(top_layers, adapted):
    model = tiny_model("llama", num_hidden_layers=3)
    wrapped = wrap_lora(model, LoraSection(r=4, top_layers=top_layers))
    names = [name for name, _ in wrapped.named_parameters() if "lora_A" in name]
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in names} == adapted
    with pytest.raises(ConfigError, match=r"lora.top_layers=4: this model has 3 layers"):
        lora_config(LoraSection(r=4, top_layers=4), tiny_model("llama", num_hidden_layers=3))


def test_a_part_of_a_name_names_no_layer():
    with pytest.raises(ConfigError, match=r"proj is no linear layer.*did you mean \w+_proj"):
        lora_config(LoraSection(r=4, target_modules=["proj"]), tiny_model("llama"))


def test_a_tokenizer_without_special_tokens_pads_and_never_ends(tmp_path):
    bare_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(section(tmp_path))
    assert (tokenizer.pad_token_id, len(tokenizer)) == (0, 3)
    assert tokenizer.decode(tokenizer("yes !")["input_ids"], skip_special_tokens=True) == "yes !"
    model = tiny_model(eos_token_id=None)
    assert eos_ids(tokenizer, model) == ()


def test_a_token_that_the_tokenizer_lacks_is_refused_with_the_nearest(folder):
    for key in ("pad_token", "eos_token"):
        with pytest.raises(ConfigError, match=rf"model\.{key}=<pat>: .*'<pad>'.*<s>"):
            load_tokenizer(section(folder, **{key: "<pat>"}))


def test_ends_are_those_of_the_generation_config_and_of_the_tokenizer(folder):  # ledger G-04
    tokenizer, model = load_tokenizer(section(folder)), tiny_model()
    model.generation_config.eos_token_id = [7, 9]
    assert eos_ids(tokenizer, model) == (7, 9, 2)
    model.generation_config.eos_token_id = [2, 100_000]
    assert eos_ids(tokenizer, model) == (2,)
    assert eos_ids(tokenizer, model, eos_token="<s>") == (1,)
    chosen = load_tokenizer(section(folder, eos_token="<s>"))
    assert chosen.eos_token_id == 1


@pytest.mark.parametrize("wrong", ["2", [[2]], [2, "7"], 2.0])
def test_an_end_that_is_no_token_id_is_refused_unless_another_is_named(folder, wrong):
    tokenizer, model = load_tokenizer(section(folder)), tiny_model()
    model.generation_config.eos_token_id = wrong
    with pytest.raises(ConfigError, match=r"^model\.path: .*eos_token_id=.*model\.eos_token$"):
        eos_ids(tokenizer, model)
    assert eos_ids(tokenizer, model, eos_token="<s>") == (1,)


def test_bos_may_be_eos_and_unk_may_pad(assets):
    story = section(assets / "stories260K")
    tokenizer, model = load_tokenizer(story), load_causal_lm(story, device="cpu")
    assert eos_ids(tokenizer, model) == (1,)
    check_vocabulary(tokenizer, model)
    assert max_context(model) == 512
    assert resolved_revision(story) == ""


def test_a_vocabulary_larger_than_the_embedding_is_refused():  # ledger T-06
    check_vocabulary(byte_tokenizer(), tiny_model())
    with pytest.raises(ConfigError, match=r"259 tokens.*258 rows"):
        check_vocabulary(byte_tokenizer(), tiny_model(vocab_size=258))


def test_ids_may_leave_gaps_and_the_largest_is_the_one_that_counts():  # ledger T-06
    backend = Tokenizer(models.WordLevel({"yes": 0, "far": 300}, unk_token="yes"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(tokenizer) == 2
    with pytest.raises(ConfigError, match=r"301 tokens.*300 rows"):
        check_vocabulary(tokenizer, tiny_model(vocab_size=300))


@pytest.mark.parametrize(
    ("kind", "changes", "bound"),
    [
        ("bloom", {"seq_length": 2048}, None),
        ("gpt2", {"n_positions": 64}, 64),
        ("llama", {"max_position_embeddings": 128}, 128),
    ],
)
def test_context_is_bounded_but_for_alibi(kind, changes, bound):
    config = tiny_config(kind, **changes)
    assert max_context(config) == bound
    assert max_context(AutoModelForCausalLM.from_config(config)) == bound


def test_the_biases_of_mpt_end_where_its_context_does():
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 32, "max_seq_len": 8}
    model = AutoModelForCausalLM.from_config(transformers.MptConfig(**sizes))
    assert max_context(model) == 8
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.shape[1] == 8
    with pytest.raises(RuntimeError):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_falcon_with_alibi_has_no_bound():
    assert max_context(transformers.FalconConfig(alibi=True)) is None
    assert max_context(transformers.FalconConfig(alibi=False)) == 2048


# Parameters as the authors count them; a wrong width, depth or vocabulary changes the sum.
PARAMETERS = {
    "bigscience/bloom-560m": 559_214_592,
    "bigscience/bloom-1b1": 1_065_314_304,
    "gpt2": 124_439_808,
    "lvwerra/gpt2-imdb": 124_439_808,
    "EleutherAI/pythia-160m": 162_322_944,
    "cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr": 1_011_781_632,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen3-0.6B-Base": 596_049_920,
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_packaged_configs_have_the_published_number_of_parameters(path):
    config = load_config(section(path, weights="random"))
    assert parameter_bytes(config, torch.float32) == 4 * PARAMETERS[path]
    assert parameter_bytes(config, torch.bfloat16) == 2 * PARAMETERS[path]


def test_random_weights_keep_the_shape_and_speak_bytes(folder):
    random = section(folder, weights="random", dtype="bfloat16")
    model = load_causal_lm(random, device="cpu", seed=3)
    tokenizer = load_tokenizer(random)
    check_vocabulary(tokenizer, model)
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert [p.shape for p in model.parameters()] == [p.shape for p in saved.parameters()]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not torch.equal(model.lm_head.weight.float(), saved.lm_head.weight)
    assert eos_ids(tokenizer, model) == (tokenizer.eos_token_id,)
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["bloom", "gpt2", "gpt_neox", "llama", "qwen2"])
def test_random_weights_are_those_of_a_model_made_the_usual_way(tmp_path, kind):
    tiny_config(kind, initializer_range=0.3).save_pretrained(tmp_path)
    model = load_causal_lm(section(tmp_path, weights="random"), device="cpu")
    usual = AutoModelForCausalLM.from_config(tiny_config(kind, initializer_range=0.3))
    for (name, buffer), (_, expected) in zip(
        model.named_buffers(), usual.named_buffers(), strict=True
    ):
        torch.testing.assert_close(buffer, expected, msg=name)
    for (name, weight), (_, expected) in zip(
        model.named_parameters(), usual.named_parameters(), strict=True
    ):
        same = weight.std().item() == pytest.approx(expected.std().item(), rel=0.35, abs=1e-6)
        assert same, name


def test_random_weights_follow_their_seed_and_leave_the_generators_alone(folder):
    random = section(folder, weights="random")
    before = torch.get_rng_state()
    first, again, other = (
        load_causal_lm(random, device="cpu", seed=seed).lm_head.weight for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_random_weights_take_another_tokenizer_where_one_is_named(tmp_path, assets):
    story = str(assets / "stories260K")
    random = section(story, weights="random", tokenizer=story)
    assert load_tokenizer(random).eos_token == "<s>"
    assert load_causal_lm(random, device="cpu").config.eos_token_id == 1


def test_a_vocabulary_too_small_for_bytes_is_refused(tmp_path):
    tiny_config("llama", vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocabulary of 100 is too small"):
        load_causal_lm(section(tmp_path, weights="random"), device="cpu")


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_attention_that_there_is_not_is_refused_by_its_key(folder, weights):
    load_config(section(folder, weights=weights, attn_implementation="eager"))
    with pytest.raises(ConfigError, match=r"^model\.attn_implementation=flesh: .*not supported"):
        load_config(section(folder, weights=weights, attn_implementation="flesh"))


def test_random_weights_of_an_unknown_hub_model_say_that_its_config_is_missing():
    with pytest.raises(ModelUnavailable, match=r"no-such/model.*HF_HOME") as caught:
        load_config(section("no-such/model", weights="random"))
    assert "model.weights=random" not in str(caught.value)


@pytest.mark.slow
def test_the_exact_shape_of_bloom_560m_runs_on_random_weights():
    random = section("bigscience/bloom-560m", weights="random", dtype="bfloat16")
    model, tokenizer = load_causal_lm(random, device="cpu"), load_tokenizer(random)
    ids = tokenizer("How do I reset my password?", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, 27, 250_880)


@pytest.mark.parametrize(
    "text",
    [
        "How do I reset my password?",
        "  two  spaces,\ttabs\r\nand lines \n\n",
        "naïve 日本語 \U0001f600 e\u0301 \u200d \x00\x7f",
        "<s>specials</s> <pad> are only text",
        "it 's , a test . n't",
    ],
)
def test_bytes_are_lossless_on_any_text(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_bytes_survive_saving(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(section(tmp_path))
    assert tokenizer("</s>é")["input_ids"] == [byte + 3 for byte in "</s>é".encode()]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == BYTE_VOCABULARY


def test_an_adapter_folder_gives_its_base_and_trains_its_adapter(folder, tmp_path):  # ledger P-08
    base = load_causal_lm(section(folder), device="cpu")
    wrapped = wrap_lora(base, LoraSection(r=4, alpha=8.0))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    wrapped.save_pretrained(tmp_path / "adapter")
    adapter = section(tmp_path / "adapter")
    loaded = load_causal_lm(adapter, device="cpu")
    assert isinstance(loaded, PeftModel)
    torch.testing.assert_close(loaded(IDS).logits, wrapped.eval()(IDS).logits)
    trained = {name for name, weight in loaded.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if "lora_" in name}
    assert load_tokenizer(adapter).eos_token == "</s>"
    assert load_config(adapter).model_type == "bloom"
    assert wrap_lora(loaded, LoraSection(r=4, alpha=8.0)) is loaded
    with pytest.raises(ConfigError, match=r"lora.r=16: .* has 4; set lora.r=4"):
        wrap_lora(loaded, LoraSection(r=16, alpha=8.0))
    for other in ("use_dora", "use_rslora"):
        with pytest.raises(ConfigError, match=rf"lora.{other}=True: .* has False"):
            wrap_lora(loaded, LoraSection(r=4, alpha=8.0, **{other: True}))


@pytest.mark.parametrize("own", [["dense"], ["dense", "query_key_value"], ["all-linear"]])
def test_an_adapter_is_trained_on_where_it_is_and_nowhere_else(folder, tmp_path, own):
    base = load_causal_lm(section(folder), device="cpu")
    wrap_lora(base, LoraSection(r=4, target_modules=own)).save_pretrained(tmp_path / "adapter")

    def wrapped(*targets):
        loaded = load_causal_lm(section(tmp_path / "adapter"), device="cpu")
        return wrap_lora(loaded, LoraSection(r=4, target_modules=list(targets)))

    for same in (
        [],
        own,
        list(reversed(own)),
        [f"self_attention.{n}" for n in own if "-" not in n],
    ):
        assert isinstance(wrapped(*same), PeftModel)
    for other in (["dense_h_to_4h"], ["query_key_value"], {"all-linear"} - set(own)):
        if other:
            with pytest.raises(ConfigError, match=r"lora.target_modules=\[.*\]: the adapter in"):
                wrapped(*other)


def test_an_adapter_that_is_no_lora_is_refused_with_a_way_out(folder, tmp_path):
    base = load_causal_lm(section(folder), device="cpu")
    other = IA3Config(target_modules=["dense"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(base, other).save_pretrained(tmp_path / "adapter")
    loaded = load_causal_lm(section(tmp_path / "adapter"), device="cpu")
    with pytest.raises(ConfigError, match=r"lora.r=4: .* is IA3, .*; lora=none merges"):
        wrap_lora(loaded, LoraSection(r=4))


@pytest.mark.parametrize("layers", [1, [1]])
def test_an_adapter_of_one_layer_is_trained_on_however_it_says_so(folder, layers):
    base = load_causal_lm(section(folder), device="cpu")
    own = LoraConfig(r=4, lora_alpha=8, target_modules=["dense"], layers_to_transform=layers)
    adapted = get_peft_model(base, own)
    assert wrap_lora(adapted, LoraSection(r=4, alpha=8.0, top_layers=1)) is adapted
    with pytest.raises(ConfigError, match=r"lora.top_layers=0: .* has 1"):
        wrap_lora(adapted, LoraSection(r=4, alpha=8.0))


def test_without_lora_the_adapter_of_a_folder_is_merged_and_every_weight_trained(folder, tmp_path):
    wrapped = wrap_lora(load_causal_lm(section(folder), device="cpu"), LoraSection(r=4))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    wrapped.save_pretrained(tmp_path / "adapter")
    config = Config(model=section(tmp_path / "adapter"), lora=LoraSection(r=0), critic=HeadCritic())
    policy = load_policy(config, load_tokenizer(config.model), "cpu")
    assert not policy.is_peft_model
    assert all(weight.requires_grad for weight in policy.parameters())
    torch.testing.assert_close(policy(IDS)[0], wrapped.eval()(IDS).logits)


def test_an_adapter_is_loaded_from_any_folder_whatever_names_its_base(
    folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    fresh = wrap_lora(load_causal_lm(section("model"), device="cpu"), LoraSection(r=4))
    fresh.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    base = json.loads(file.read_text())
    assert base["base_model_name_or_path"] == str(folder)
    file.write_text(json.dumps(base | {"base_model_name_or_path": "model"}))
    load_causal_lm(section("adapter"), device="cpu").save_pretrained(tmp_path / "again")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("adapter", "again"):
        file.write_text(json.dumps(base))
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(loaded(IDS).logits, fresh(IDS).logits)


def test_a_saved_model_ends_its_texts_where_the_run_did(folder, tmp_path):
    config = Config(
        model=section(folder, eos_token="a"), lora=LoraSection(r=0), critic=HeadCritic()
    )
    tokenizer = load_tokenizer(config.model)
    policy = load_policy(config, tokenizer, "cpu")
    policy.save_pretrained(tmp_path / "saved")
    found = sampling(config.generation, policy, tokenizer, eos_token="a").eos_ids
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (again.generation_config.eos_token_id,) == found
    assert found != (2,)


@pytest.mark.parametrize(
    ("token", "name"),
    [(".", "."), ("▁cat", "▁cat"), ("\n", "<0x0A>"), (" the", "▁the"), ("<s>", "<s>")],
)
def test_a_stop_token_is_one_of_the_vocabulary_or_what_one_says(token, name):
    made = sentencepiece_tokenizer()
    found = sampling(GenerationSection(stop_token=token), tiny_policy(), made)
    assert found.eos_ids == (made.vocab[name],)


def test_the_name_of_a_byte_is_not_the_letter_it_looks_like(folder):
    made = load_tokenizer(section(folder))
    assert "é" in made.get_vocab()
    with pytest.raises(ConfigError, match="takes 2 for it"):
        sampling(GenerationSection(stop_token="é"), tiny_policy(), made)


@pytest.mark.parametrize(
    ("token", "why"), [("the cat", "takes 2 for it"), ("€", "does not have it")]
)
def test_a_stop_token_that_is_not_one_token_is_refused(token, why):
    with pytest.raises(ConfigError, match=f"stop_token='{token}': must be one token .*{why}"):
        sampling(GenerationSection(stop_token=token), tiny_policy(), sentencepiece_tokenizer())


def test_the_base_of_an_adapter_may_lie_beside_it(folder, tmp_path):
    wrap_lora(tiny_model(), LoraSection(r=4)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text())
    for base, error in (("../model", None), (str(tmp_path / "gone"), "gone: no such folder")):
        file.write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        if error is None:
            assert load_causal_lm(section(tmp_path / "adapter"), device="cpu").config.n_layer == 2
        else:
            with pytest.raises(ConfigError, match=error):
                load_causal_lm(section(tmp_path / "adapter"), device="cpu")
    file.write_text(json.dumps(settings | {"base_model_name_or_path": "", "task_type": "SEQ_CLS"}))
    with pytest.raises(ConfigError, match="SEQ_CLS, not for CAUSAL_LM"):
        load_causal_lm(section(tmp_path / "adapter"), device="cpu")


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("bloom", {"query_key_value"}),
        ("gpt2", {"c_attn"}),
        ("gpt_neox", {"query_key_value"}),
        ("llama", {"q_proj", "v_proj"}),
        ("qwen2", {"q_proj", "v_proj"}),
    ],
)
def test_lora_adapts_the_attention_where_no_module_is_named(kind, modules):
    wrapped = wrap_lora(tiny_model(kind), LoraSection(r=4))
    adapted = {n.split(".lora_A")[0].rpartition(".")[2] for n in trained_names(wrapped, "lora_A")}
    assert adapted == modules
    assert len(trained_names(wrapped, "lora_A")) == 2 * len(modules)


def trained_names(model, part: str = "") -> list[str]:
    return [n for n, p in model.named_parameters() if p.requires_grad and part in n]


def test_an_architecture_unknown_to_peft_is_adapted_everywhere_but_at_its_head():
    model = tiny_model("llama")
    model.config.model_type = "brand_new"
    wrapped = wrap_lora(model, LoraSection(r=2))
    assert len(trained_names(wrapped, "lora_A")) == 2 * 7
    assert not trained_names(wrapped, "lm_head")


def test_lora_is_float32_on_a_bfloat16_trunk_and_only_it_is_trained():
    model = tiny_model("llama").to(torch.bfloat16)
    wrapped = wrap_lora(model, LoraSection(r=4, alpha=8.0))
    kinds = {(p.requires_grad, p.dtype) for p in wrapped.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert all("lora_" in name for name in trained_names(wrapped))
    with wrapped.disable_adapter():
        assert wrapped(IDS).logits.dtype == torch.bfloat16


def test_every_lora_setting_reaches_peft():
    model = tiny_model("gpt2")
    chosen = LoraSection(
        r=3, alpha=7.0, dropout=0.1, target_modules=["c_fc"], use_rslora=True, use_dora=True
    )
    config = lora_config(chosen, model)
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7.0, 0.1)
    assert (config.target_modules, config.use_rslora, config.use_dora) == ({"c_fc"}, True, True)
    assert config.fan_in_fan_out, "GPT-2 keeps its weights transposed"
    assert trained_names(wrap_lora(model, chosen), "lora_magnitude")


def test_lora_targets_that_the_model_lacks_are_refused_all_at_once():
    wrong = LoraSection(r=4, target_modules=["q_prj", "lm_head", "mlp", "v_proj"])
    with pytest.raises(ConfigError) as caught:
        wrap_lora(tiny_model("llama"), wrong)
    unknown, head, container = caught.value.problems
    assert "q_prj" in unknown
    assert "did you mean q_proj?" in unknown
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in unknown
    assert "lm_head is the output head" in head
    assert "mlp is no linear layer" in container


def test_layers_that_peft_does_not_adapt_are_refused_with_the_ways_out():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 32}
    model = AutoModelForCausalLM.from_config(transformers.MambaConfig(**sizes))
    ways_out = "choose among in_proj, x_proj, or train all weights with lora=none"
    for target in ("out_proj", "dt_proj"):
        with pytest.raises(ConfigError, match=rf"lora\.target_modules: {target} .*; {ways_out}"):
            wrap_lora(model, LoraSection(r=4, target_modules=[target]))
    wrapped = wrap_lora(type(model)(model.config), LoraSection(r=4, target_modules=["in_proj"]))
    assert len(trained_names(wrapped)) == 2


EXPERTS = {
    "llama4_text": {"intermediate_size_mlp": 32, "head_dim": 8, "interleave_moe_layer_step": 1},
    "phimoe": {},
    "falcon": {},  # whose linear layers are of a class of their own, and give products
}


@pytest.mark.parametrize("top_layers", [0, 1])
@pytest.mark.parametrize("kind", EXPERTS)
def test_a_layer_that_chooses_experts_is_not_adapted(kind, top_layers):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = transformers.AutoConfig.for_model(kind, **sizes, pad_token_id=0, **EXPERTS[kind])
    section = LoraSection(r=4, top_layers=top_layers, target_modules=["all-linear"])
    wrapped = wrap_lora(AutoModelForCausalLM.from_config(config), section)
    assert not trained_names(wrapped, "router")
    assert trained_names(wrapped, "query_key_value" if kind == "falcon" else "q_proj")
    AutoModelForCausalLMWithValueHead(wrapped)  # passes a few tokens, or is refused
    with pytest.raises(ConfigError, match="router is no linear layer"):
        lora_config(
            LoraSection(target_modules=["router"]), AutoModelForCausalLM.from_config(config)
        )


def test_a_full_module_name_is_a_target_too():
    wrapped = wrap_lora(
        tiny_model("llama"), LoraSection(r=4, target_modules=["layers.1.mlp.up_proj"])
    )
    assert len(trained_names(wrapped)) == 2


def broken(folder: Path, what: str) -> Path:
    """The folder with one thing wrong."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    settings = json.loads(config.read_text())
    if what == "no config":
        config.unlink()
    elif what == "config not json":
        config.write_text("{bad")
    elif what == "unknown architecture":
        config.write_text(json.dumps({"model_type": "nonesuch"}))
    elif what == "no weights":
        weights.unlink()
    elif what == "cut weights":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif what == "too few layers":
        config.write_text(json.dumps(settings | {"n_layer": 3}))
    elif what == "other shape":
        config.write_text(json.dumps(settings | {"vocab_size": 300}))
    elif what == "classifier":
        config.write_text(json.dumps(settings | {"architectures": ["XForSequenceClassification"]}))
    elif what == "encoder":
        config.write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no config", "holds no config.json"),
        ("config not json", "config cannot be read.*JSON"),
        ("unknown architecture", "config cannot be read.*nonesuch"),
        ("no weights", "model cannot be read.*no file named model.safetensors"),
        ("cut weights", "model is damaged"),
        ("too few layers", r"lack 12 weights of BloomForCausalLM; transformer\.h\.2\."),
        ("other shape", "in another shape; .*word_embeddings.weight is one"),
        ("encoder", "BertModel is not a causal language model"),
        ("classifier", "XForSequenceClassification is not a causal language model.*reward.path"),
    ],
)
def test_a_damaged_folder_is_said_to_be_so(folder, what, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_causal_lm(section(broken(folder, what)), device="cpu")
    assert str(caught.value).startswith(f"model.path={folder}: ")
    assert "\n" not in str(caught.value)


def test_a_config_whose_sizes_do_not_go_together_is_said_to_be_so(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    sizes = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"num_attention_heads": 3}))
    with pytest.raises(ConfigError, match=r"^model\.path=.*: the config is not valid: .*16.*3"):
        load_causal_lm(section(tmp_path), device="cpu")


@pytest.mark.parametrize("what", ["cut", "of another width"])
def test_a_value_head_that_cannot_be_taken_is_said_to_be_so(folder, tmp_path, what):
    policy = AutoModelForCausalLMWithValueHead(load_causal_lm(section(folder), device="cpu"))
    policy.save_pretrained(tmp_path)
    file = tmp_path / "value_head.safetensors"
    if what == "cut":
        file.write_bytes(file.read_bytes()[:20])
    else:
        save_value_head(ValueHead(8).state_dict(), tmp_path)
    with pytest.raises(ConfigError, match=r"value head .* cannot be taken .*remove value_head"):
        AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


def test_a_folder_in_the_home_folder_brings_its_value_head(folder, tmp_path, monkeypatch):
    policy = AutoModelForCausalLMWithValueHead(load_causal_lm(section(folder), device="cpu"))
    policy.save_pretrained(tmp_path / "saved")
    load_tokenizer(section(folder)).save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(model=section("~/saved"), lora=LoraSection(r=0), critic=HeadCritic())
    loaded = load_policy(config, load_tokenizer(config.model), "cpu")
    assert torch.equal(loaded.v_head.summary.weight, policy.v_head.summary.weight)
    config.model.weights, config.model.tokenizer = "random", "~/saved"
    fresh = load_policy(config, load_tokenizer(config.model), "cpu")
    assert not torch.equal(fresh.v_head.summary.weight, policy.v_head.summary.weight)


@pytest.mark.parametrize("beside", [True, False], ids=["its own file", "among the weights"])
def test_a_policy_of_the_hub_brings_its_value_head(folder, tmp_path, monkeypatch, beside):
    """In our file, or where TRL 0.11 put it."""
    policy = AutoModelForCausalLMWithValueHead(load_causal_lm(section(folder), device="cpu"))
    head = policy.v_head.summary.weight
    there = in_the_cache_of_the_hub(tmp_path, monkeypatch, "my/policy")
    policy.save_pretrained(there)
    load_tokenizer(section(folder)).save_pretrained(there)
    if not beside:
        (there / "value_head.safetensors").unlink()
        weights = load_file(there / "model.safetensors")
        named = {f"v_head.{name}": x for name, x in policy.v_head.state_dict().items()}
        save_file({**weights, **named}, there / "model.safetensors", metadata={"format": "pt"})
    loaded = AutoModelForCausalLMWithValueHead.from_pretrained("my/policy")
    assert torch.equal(loaded.v_head.summary.weight, head)
    config = Config(model=section("my/policy"), lora=LoraSection(r=0), critic=HeadCritic())
    begun = load_policy(config, load_tokenizer(config.model), "cpu")
    assert torch.equal(begun.v_head.summary.weight, head)
    assert not policy.load_value_head("my/other")


def in_the_cache_of_the_hub(folder, monkeypatch, name):
    """An empty folder that stands for what the hub has under this name."""
    import huggingface_hub.constants

    cache = folder / "hub" / f"models--{name.replace('/', '--')}"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    return cache / "snapshots" / "abc"


def test_a_folder_without_tokenizer_says_which_key_names_one(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"holds no tokenizer.*model\.tokenizer"):
        load_tokenizer(section(folder))


def test_paths_that_can_be_no_model_are_refused_without_asking_the_hub(folder):
    for path, message in (
        ("", "model.path: empty"),
        ("some/where/else", "no such folder"),
        ("/nowhere", "no such folder"),
        (str(folder / "config.json"), "a file; give the folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_causal_lm(section(path), device="cpu")


def test_four_bits_need_a_gpu_and_real_weights(folder):
    quantised = section(folder, load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"model\.load_in_4bit=true: needs a CUDA GPU"):
        load_causal_lm(quantised, device="cpu")
    with pytest.raises(ConfigError, match="only pretrained weights"):
        load_causal_lm(replace(quantised, weights="random"), device="cpu")


def test_weights_in_pytorch_format_load_and_a_pickle_that_runs_code_does_not(folder):
    model = tiny_model()
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    loaded = load_causal_lm(section(folder), device="cpu")
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight)
    marker = folder / "ran"
    torch.save({"lm_head.weight": _Touch(str(marker))}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"holds more than tensors.*safetensors"):
        load_causal_lm(section(folder), device="cpu")
    assert not marker.exists()


class _Touch:
    """What makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_hub_model_without_hub_and_cache_names_the_ways_out():
    for loads in (load_tokenizer, lambda s: load_causal_lm(s, device="cpu")):
        with pytest.raises(ModelUnavailable) as caught:
            loads(section("bigscience/bloom-560m"))
        message = str(caught.value)
        assert message.startswith("model.path=bigscience/bloom-560m: ")
        assert "\n" not in message
        for way in ("model=local model.path=FOLDER", "model.weights=random", "HF_HOME"):
            assert way in message


def test_a_hub_that_cannot_be_reached_is_given_up_in_seconds():
    asked = (
        "from ppo_lab.models.sources import locate, ModelUnavailable\n"
        "import sys\n"
        "try: locate('bigscience/bloom-560m')\n"
        "except ModelUnavailable as error: print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - start < 15
    assert "the hub cannot be reached" in done.stdout, done.stderr
    assert done.stderr == ""


def test_a_silent_hub_is_waited_for_no_longer_than_the_deadline(monkeypatch, hub):
    monkeypatch.setattr(sources, "DEADLINE", 0.3)
    monkeypatch.setattr(sources, "_SILENT", set())
    start = time.monotonic()
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        sources.locate("slow/model")
    assert time.monotonic() - start < 5


def test_a_silent_hub_is_waited_for_once_whatever_is_asked_of_it(monkeypatch, hub):
    monkeypatch.setattr(sources, "DEADLINE", 0.3)
    monkeypatch.setattr(sources, "_SILENT", set())
    asked = []
    head = sources._commit_at
    monkeypatch.setattr(sources, "_commit_at", lambda url: asked.append(url) or head(url))
    for entries in (("config.json",), ("tokenizer.json",)):
        with pytest.raises(ModelUnavailable, match="cannot be reached"):
            sources.locate("slow/model", entries=entries)
    assert len(asked) == 1


def test_what_has_no_timeout_of_its_own_gets_one_and_errors_pass_through():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer"):
        sources._within(0.1, lambda: time.sleep(3) or "late")
    assert time.monotonic() - start < 2
    with pytest.raises(ZeroDivisionError):
        sources._within(5, lambda: str(1 / 0))
    assert sources._within(5, lambda: "commit") == "commit"


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine that answers as the real one does."""
    import huggingface_hub.constants

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            code, headers = answer(self.path)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()


def answer(path: str) -> tuple[int, dict[str, str]]:
    commit = {"X-Repo-Commit": "c0ffee"}
    if path.startswith("/slow/"):
        time.sleep(2)
    if path.startswith("/gated/"):
        return 403, {"X-Error-Code": "GatedRepo"}
    if path.startswith("/bigscience/"):
        return 401, {"X-Error-Code": "RepoNotFound"}
    if "/missing/" in path:
        return 404, {"X-Error-Code": "RevisionNotFound"}
    if path.endswith("/config.json") and path.startswith("/some/model/"):
        return 307, commit | {"Location": "/api/resolve-cache/config"}
    if path.startswith("/api/"):
        return 200, {}
    return 404, commit | {"X-Error-Code": "EntryNotFound"}


def test_a_cached_model_is_taken_from_the_cache_where_the_hub_is_silent(monkeypatch, tmp_path):
    there = in_the_cache_of_the_hub(tmp_path, monkeypatch, "my/cached")
    tiny_model().save_pretrained(there)
    byte_tokenizer().save_pretrained(there)
    found = sources.locate("my/cached")
    assert (found.entry, found.local_files_only) == ("config.json", True)
    model = load_causal_lm(section("my/cached"), device="cpu")
    assert model.config.n_layer == 2
    assert resolved_revision(section("my/cached")) == "abc"
    assert load_tokenizer(section("my/cached")).eos_token == "</s>"


def test_a_model_on_the_hub_is_pinned_to_its_commit(hub):
    found = sources.locate("some/model", revision="main")
    assert (found.entry, found.revision, found.local_files_only) == ("config.json", "c0ffee", False)


@pytest.mark.parametrize(
    ("path", "revision", "message"),
    [
        ("gated/model", "", r"agreement.*hf auth login.*model=local"),
        ("bigscience/blom-560m", "", r"no public model.*did you mean bigscience/bloom-560m\?"),
        ("some/model", "missing", "no revision 'missing'"),
        ("other/data", "", r"repository on the hub holds no config\.json"),
    ],
)
def test_what_the_hub_refuses_is_told_apart(hub, path, revision, message):
    with pytest.raises(ConfigError, match=message):
        sources.locate(path, revision=revision)
