"""Scripts for TRL 0.11 run with their import lines changed, and what cannot is refused."""

from __future__ import annotations

import copy
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import (
    EOS,
    QUERIES,
    SCORES,
    VOCABULARY,
    causal_lm,
    lora_config,
    policy,
    step,
    tensors,
    tokenizer,
    train_adapter,
    trainer,
    weights,
)
from transformers import HfArgumentParser

from ppo_lab import (
    AutoModelForCausalLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
    respond_to_batch,
    set_seed,
)
from ppo_lab.errors import ConfigError


def test_a_last_batch_that_is_not_full_is_one_of_the_epochs() -> None:
    batches = [PPOConfig(steps=n, batch_size=4).total_ppo_epochs for n in (1, 8, 9)]
    assert batches == [1, 2, 3]


def test_lengths_are_drawn_below_the_largest() -> None:
    draw = LengthSampler(2, 5)
    assert {draw() for _ in range(200)} == {2, 3, 4}


# ------ The settings ---------------------------------------------------------------------------


@dataclass
class ScriptArguments:
    """As TRL's own examples had them."""

    use_peft: bool = field(default=False, metadata={"help": "whether to use peft"})


def test_transformers_parser_reads_the_settings_from_a_command_line() -> None:
    parser = HfArgumentParser((ScriptArguments, PPOConfig))
    words = ["--use_peft", "--learning_rate", "3e-5", "--log_with", "wandb", "--target_kl", "0.3"]
    script, config = parser.parse_args_into_dataclasses(words)
    assert script.use_peft
    assert (config.learning_rate, config.log_with, config.target_kl) == (3e-5, "wandb", 0.3)
    assert "passes over each batch" in parser.format_help()
    with pytest.raises(ConfigError, match=r"cliprange=3\.0: must be above 0"):
        parser.parse_args_into_dataclasses(["--cliprange", "3"])


def test_stack_llamas_settings_are_taken() -> None:
    made = PPOConfig(
        steps=20000,
        model_name="m",
        learning_rate=1.41e-5,
        log_with=None,
        batch_size=32,
        mini_batch_size=4,
        gradient_accumulation_steps=4,
        optimize_cuda_cache=True,
        early_stopping=True,
        target_kl=0.1,
        ppo_epochs=4,
        seed=0,
        init_kl_coef=0.2,
        adap_kl_ctrl=True,
    )
    assert (made.total_ppo_epochs, made.backward_batch_size, made.log_with) == (625, 16, "none")


FIELDS = """
exp_name seed log_with task_name model_name query_dataset reward_model tracker_kwargs steps target
remove_unused_columns accelerator_kwargs project_kwargs tracker_project_name horizon gamma lam
push_to_hub_if_best_kwargs learning_rate adap_kl_ctrl init_kl_coef kl_penalty cliprange vf_coef
cliprange_value batch_size forward_batch_size mini_batch_size world_size whiten_rewards score_clip
gradient_accumulation_steps ppo_epochs max_grad_norm optimize_cuda_cache optimize_device_cache
early_stopping target_kl compare_steps ratio_threshold use_score_scaling use_score_norm
gradient_checkpointing is_encoder_decoder is_peft_model backward_batch_size global_batch_size
global_backward_batch_size dataset_num_proc
"""


def test_every_field_of_trl_0_11_is_a_field_here() -> None:
    config = PPOConfig()
    assert [name for name in FIELDS.split() if not hasattr(config, name)] == []
    defaults = ("steps", "learning_rate", "batch_size", "target_kl", "max_grad_norm")
    assert [getattr(config, name) for name in defaults] == [20000, 1.41e-5, 128, 1.0, 0.0]
    # TRL's own examples load what these say when the command line says nothing.
    assert (config.model_name, config.query_dataset) == ("gpt2", "stanfordnlp/imdb")
    assert config.reward_model == "sentiment-analysis:lvwerra/distilbert-imdb"


def test_other_kinds_of_numbers_and_none_stand_for_what_they_mean() -> None:
    """M-05: an older name stands for the newer one."""
    made = PPOConfig(
        horizon=10000.0,  # type: ignore[arg-type]
        learning_rate=np.float32(0.5),  # type: ignore[arg-type]
        batch_size=np.int64(8),  # type: ignore[arg-type]
        forward_batch_size=4,
        max_grad_norm=None,  # type: ignore[arg-type]
        score_clip=None,  # type: ignore[arg-type]
        tracker_kwargs={"wandb": {"name": "mine"}},
    )
    assert (made.horizon, made.learning_rate, made.batch_size) == (10000, 0.5, 8)
    assert [type(x) for x in (made.horizon, made.learning_rate)] == [int, float]
    assert (made.mini_batch_size, made.max_grad_norm, made.score_clip) == (4, 0.0, 0.0)
    assert made.to_dict()["tracker_kwargs/wandb/name"] == "mine"


def test_what_is_not_done_here_is_refused_or_said() -> None:
    with pytest.raises(ConfigError) as refused:
        PPOConfig(is_encoder_decoder=True, push_to_hub_if_best_kwargs={"repo_id": "me/it"})
    assert len(refused.value.problems) == 2
    with pytest.warns(UserWarning, match="accelerator_kwargs has no effect"):
        PPOConfig(accelerator_kwargs={"cpu": True})


# ------ The loop -------------------------------------------------------------------------------


def rows(n: int = 8) -> list[dict[str, Any]]:
    words = tokenizer()
    texts = [f"w{3 + i} w{4 + i} w{5 + i}" for i in range(n)]
    return [{"input_ids": torch.tensor(words.encode(t)), "query": t} for t in texts]


def collator(data: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [row[key] for row in data] for key in data[0]}


def test_the_sentiment_notebook_s_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    set_seed(3)
    made = trainer(dataset=rows(), data_collator=collator, batch_size=4, mini_batch_size=2)
    assert made.accelerator.device == made.current_device == torch.device("cpu")
    assert made.accelerator.num_processes == 1
    assert made.accelerator.is_main_process
    assert made.accelerator.unwrap_model(made.model) is made.model
    before, length = weights(made.model), LengthSampler(4, 8)
    keywords = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": 1}
    for batch in made.dataloader:
        responses = []
        for query in batch["input_ids"]:
            keywords["max_new_tokens"] = length()
            answer = made.generate(query, **keywords).squeeze()
            responses.append(answer[len(query) :])
            assert 1 <= len(responses[-1]) <= keywords["max_new_tokens"]
        batch["response"] = [made.tokenizer.decode(r) for r in responses]
        scores = [torch.tensor(float(len(set(r.tolist())))) for r in responses]
        stats = made.step(batch["input_ids"], responses, scores)
        made.log_stats(stats, batch, scores)
    assert made.current_step == 2
    assert made.kl_ctl.value == made.config.init_kl_coef
    assert any(not torch.equal(x, before[name]) for name, x in weights(made.model).items())


def test_each_query_of_a_list_has_a_length_of_its_own() -> None:
    made = trainer()
    lengths = iter([3, 7, 5, 1])
    answers = made.generate(
        tensors(QUERIES),
        length_sampler=lambda: next(lengths),
        return_prompt=False,
        eos_token_id=None,
        remove_padding=False,
    )
    assert [len(answer) for answer in answers] == [3, 7, 5, 1]


@pytest.mark.parametrize("eos", [-1, 1000])
def test_responses_of_a_list_end_where_the_tokenizer_s_end_stands(eos: int) -> None:
    made = trainer(policy(initializer_range=0.02))  # nearly flat
    said = {"max_new_tokens": 200, "eos_token_id": eos, "return_prompt": False}
    whole = made.generate(tensors(QUERIES), remove_padding=False, **said)
    assert [len(row) for row in whole] == [200] * 4
    assert all(EOS in row for row in whole)  # or this shows nothing
    cut = made.generate(tensors(QUERIES), pad_to_multiple_of=8, **said)
    for row in cut:
        assert (row == EOS).nonzero().flatten().tolist() == [len(row) - 1]
    made.config.missing_eos_penalty = 5.0
    assert made.step(tensors(QUERIES), cut, tensors(SCORES))["tokens/eos_rate"] == 1.0


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"num_return_sequences": 3}, "repeat the query"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "hides tokens"),
        ({"return_dict_in_generate": True}, "token ids alone"),
    ],
)
def test_what_generate_cannot_give_back_is_refused(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        trainer().generate(torch.tensor([5, 6, 7]), max_new_tokens=2, **keywords)


def test_a_mask_that_hides_nothing_is_taken() -> None:
    mask = torch.ones(1, 3, dtype=torch.long)
    answer = trainer().generate(torch.tensor([5, 6, 7]), max_new_tokens=2, attention_mask=mask)
    assert answer.shape[0] == 1


def test_the_quick_start_answers_to_batches_of_tensors() -> None:
    made = policy()
    queries = torch.tensor([[5, 6, 7], [8, 9, 10]])
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append(respond_to_batch(made, queries, txt_len=30, top_p=0.9))
    assert found[0].shape == (2, 30)
    assert torch.equal(*found)
    assert 0 <= found[0].min() <= found[0].max() < VOCABULARY
    assert not torch.equal(respond_to_batch(made, queries, txt_len=30), found[0])


# ------ The model ------------------------------------------------------------------------------


def wrapped_and_assigned(made: Any) -> None:
    made.pretrained_model = get_peft_model(made.pretrained_model, lora_config())
    made.is_peft_model = True


def wrapped_in_place(made: Any) -> None:
    get_peft_model(made.pretrained_model, lora_config())


def added_by_transformers(made: Any) -> None:
    made.pretrained_model.add_adapter(lora_config())


def another_model(made: Any) -> None:
    made.pretrained_model = causal_lm(seed=5)


@pytest.mark.parametrize(
    "change", [wrapped_and_assigned, wrapped_in_place, added_by_transformers, another_model]
)
def test_what_became_of_the_model_after_the_value_head_is_what_is_trained(change: Any) -> None:
    model = policy()
    change(model)
    made = trainer(model, learning_rate=3e-2)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logits, _, _ = made.model(ids)
        torch.testing.assert_close(logits, made.model.pretrained_model(ids).logits)
    before = weights(made.model.pretrained_model)
    assert step(made)["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    moved = [n for n, x in weights(made.model.pretrained_model).items() if not x.equal(before[n])]
    assert moved
    assert "lora" in moved[0] or change is another_model
    assert abs(step(made)["objective/kl"]) > 1e-4
    with torch.no_grad():
        logits, _, _ = made.model(ids)
        torch.testing.assert_close(logits, made.model.pretrained_model(ids).logits)


def test_a_policy_can_be_saved_as_torch_saves_and_copied(tmp_path: Path) -> None:
    model = policy(lora=True)
    torch.save(model, tmp_path / "policy.pt")
    ids = torch.tensor([[5, 6, 7]])
    for other in (
        torch.load(tmp_path / "policy.pt", weights_only=False),
        copy.deepcopy(model),
    ):
        torch.testing.assert_close(other(ids)[0], model(ids)[0])
        before = weights(other)
        step(trainer(other))
        assert any(
            not x.equal(before[name]) for name, x in weights(other).items() if "lora" in name
        )


def test_a_model_that_is_as_it_was_keeps_its_trunk() -> None:
    model = policy()
    trunk = model.trunk
    model.look_again()
    assert model.trunk is trunk


def test_a_reference_may_share_the_first_layers() -> None:
    model = policy(n_layer=4)
    ref = create_reference_model(model, num_shared_layers=3)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name in frozen if ".h." in name} == {
        name for name, _ in model.named_parameters() if any(f".h.{i}." in name for i in range(3))
    }
    assert any("word_embeddings" in name for name in frozen)
    assert not any(p.requires_grad for p in ref.parameters())
    made = trainer(model, ref)
    assert made.ref_model is ref
    assert step(made)["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="no layer of that number"):
        create_reference_model(model, num_shared_layers=9)


def test_the_trainer_shares_layers_by_itself_too() -> None:
    made = trainer(policy(n_layer=4), num_shared_layers=2)
    named = dict(made.model.named_parameters())
    assert not any(p.requires_grad for name, p in named.items() if ".h.1." in name)
    assert all(p.requires_grad for name, p in named.items() if ".h.2." in name)
    with pytest.warns(UserWarning, match="num_shared_layers has no effect"):
        trainer(policy(), policy(), num_shared_layers=1)


def test_an_adapter_that_acts_in_peft_s_forward_alone_is_refused() -> None:
    adapted = get_peft_model(causal_lm("llama"), lora_config("llama", alora_invocation_tokens=[5]))
    with pytest.raises(ValueError, match="alora_invocation_tokens"):
        trainer(adapted)


def test_adapters_that_act_together_are_refused() -> None:
    adapted = get_peft_model(causal_lm("llama"), lora_config("llama"), adapter_name="sft")
    adapted.add_adapter("ppo", lora_config("llama"))
    model = AutoModelForCausalLMWithValueHead(adapted)
    trainer(model)
    adapted.base_model.set_adapter(["sft", "ppo"])
    for ref_model in (None, policy("llama")):
        with pytest.raises(ValueError, match="the adapters sft and ppo act together"):
            trainer(model, ref_model)


def test_layers_that_an_adapter_repeats_are_not_repeated_again() -> None:
    twice = lora_config("llama", layer_replication=[[0, 2], [0, 2]])
    adapted = get_peft_model(causal_lm("llama"), twice)
    model = AutoModelForCausalLMWithValueHead(adapted)
    train_adapter(model)  # the reference of a fresh one is the adapter off
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = adapted(ids).logits
        made = trainer(model)
        torch.testing.assert_close(adapted(ids).logits, before)
        torch.testing.assert_close(made.model(ids)[0], before)
    assert step(made)["objective/kl"] == pytest.approx(0.0, abs=1e-5)


def test_the_reference_can_be_asked_for() -> None:
    assert trainer().ref_model.generate(torch.tensor([[5]]), max_new_tokens=2).shape[0] == 1
    assert trainer(policy(lora=True)).ref_model is None  # the policy with its adapter off


def test_older_keywords_of_loading(tmp_path: Path) -> None:
    causal_lm().save_pretrained(tmp_path)
    load = AutoModelForCausalLMWithValueHead.from_pretrained
    off = {"load_in_8bit": False, "load_in_4bit": False, "summary_dropout_prob": 0.1}
    made = load(str(tmp_path), v_head_init_strategy=None, use_auth_token=None, **off)
    assert made.v_head.summary.weight.any()
    with pytest.raises(ValueError, match="reward_adapter"):
        load(str(tmp_path), reward_adapter="me/it")


# ------ What would go wrong in silence ---------------------------------------------------------


@pytest.mark.parametrize(("trained", "switch"), [(False, "enable_adapters"), (True, "set_adapter")])
def test_ctrl_c_while_the_adapter_is_switched_leaves_the_policy_whole(
    trained: bool, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook goes on training after it; half of the layers would be the reference's."""
    model = policy(lora=True)
    if trained:
        train_adapter(model)
    made = trainer(model)
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    as_before = [(layer.active_adapters, layer.disable_adapters) for layer in layers]
    own, calls = getattr(layers[0], switch), []

    def struck(*args: Any, **kwargs: Any) -> None:
        own(*args, **kwargs)
        calls.append(args)
        if len(calls) == 2:  # on the way back
            signal.raise_signal(signal.SIGINT)

    # A shell's jobs in the background ignore SIGINT, and what they start does too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(layers[0], switch, struck)
            step(made)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(layer.active_adapters, layer.disable_adapters) for layer in layers] == as_before
    assert step(made)["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert abs(step(made)["objective/kl"]) > 1e-4


def test_methods_that_nothing_would_call_are_refused() -> None:
    with pytest.raises(TypeError, match=r"compute_rewards \(override shape\)"):
        type("Dense", (PPOTrainer,), {"compute_rewards": lambda *_: None})
    assert type("Other", (PPOTrainer,), {"shape": lambda *_: None})


def test_several_processes_of_a_script_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="several processes were launched"):
        trainer()


# ------ Logging --------------------------------------------------------------------------------


def test_tensorboard_shows_a_script_s_statistics_and_the_columns_that_it_names(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = trainer(log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    stats = step(made)
    batch = {"query": ["a"] * 4, "ref_rewards": tensors(SCORES)}
    scores = [torch.tensor(x) for x in SCORES]
    made.log_stats(stats, batch, scores, columns_to_log=["query", "ref_rewards"])
    found = EventAccumulator(str(tmp_path / "ppo_lab")).Reload()
    (mean,), (std,) = found.Scalars("env/reward_mean"), found.Scalars("env/reward_std")
    assert mean.value == pytest.approx(np.mean(SCORES))
    assert std.value == pytest.approx(torch.tensor(SCORES).std().item())
    assert found.Scalars("objective/kl")[0].step == 1
    (table,) = found.Tensors("game_log/text_summary")
    assert b"| query | ref_rewards | reward |" in table.tensor_proto.string_val[0]
    with pytest.raises(ValueError, match="columns_to_log: the batch has no response; it has query"):
        made.log_stats(stats, batch, scores)


def test_wandb_is_open_once_the_trainer_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.chdir(tmp_path)
    options = {"wandb": {"tags": ["mine"]}}
    try:
        made = trainer(log_with="wandb", model_name="tiny", tracker_kwargs=options)
        assert wandb.run is not None
        assert (wandb.run.name, wandb.run.tags) == ("tiny", ("mine",))
        assert wandb.run.config["init_kl_coef"] == made.config.init_kl_coef
        wandb.log({"own": 1})
        first = wandb.run.id
        again = trainer(log_with="wandb", model_name="tiny", init_kl_coef=0.7)
        assert wandb.run.id != first
        assert wandb.run.config["init_kl_coef"] == again.config.init_kl_coef == 0.7
        wandb.run.finish()
        own = wandb.init(mode="offline")
        trainer(log_with="wandb", model_name="tiny")
        assert wandb.run.id == own.id, "what somebody opened is theirs"
        own.finish()
        trainer(log_with="wandb")
        assert wandb.run.name != "gpt2", "a name that nobody chose"
    finally:
        wandb.teardown()


def test_names_of_trl_that_are_not_here_say_why() -> None:
    with pytest.raises(ImportError, match="only decoders are trained here"):
        from ppo_lab import AutoModelForSeq2SeqLMWithValueHead  # noqa: F401
    with pytest.raises(ImportError, match="python -m ppo_lab"):
        from ppo_lab import PPOv2Trainer  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name"):
        from ppo_lab import Nothing  # noqa: F401


def test_the_hub_is_given_what_is_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    seen: dict[str, Any] = {}

    class Api:
        def __init__(self, token: Any) -> None:
            seen["token"] = token

        def create_repo(self, repo_id: str, **said: Any) -> None:
            seen[repo_id] = said

        def upload_folder(self, *, repo_id: str, folder_path: str) -> str:
            seen["files"] = {path.name for path in Path(folder_path).iterdir()}
            return f"https://hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    made = trainer()
    assert made.push_to_hub("me/it", private=True) == "https://hub/me/it"
    assert {"model.safetensors", "value_head.safetensors", "tokenizer.json"} <= seen["files"]
    assert seen["me/it"] == {"private": True, "exist_ok": True}
    made.model.push_to_hub("me/it")
    assert "tokenizer.json" not in seen["files"]
    seen.clear()
    made.model.save_pretrained(tmp_path / "it", push_to_hub=True, repo_id="me/that", private=True)
    assert seen["me/that"]["private"] is True
    assert {"model.safetensors", "value_head.safetensors"} <= seen["files"]
