# SPDX-License-Identifier: MIT
"""Tests of critic.py and train_reward.py, offline and on a CPU. As a program: the benchmark.

`reference_*` are the plain, slow meaning of the rules, a loop over rows and tokens; tests compare
with them. `pytest -k "not loop"` runs the tests of critic.py alone.
"""

import argparse
import copy
import functools
import gzip
import importlib.util
import itertools
import json
import math
import multiprocessing
import operator
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch.autograd.profiler import profile
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import critic
from critic import RewardModel, create_critic_model, save_critic_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
HERE = Path(__file__).parent
README = HERE / "README.md"
PAD = 0
VOCAB = 96
BF16 = {"bf16": {"enabled": True}}
SIDES = ("chosen", "rejected")


# ---- tiny models and random rows (`tiny_config`, of every family, is further below) ----


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of VOCAB - 8 tokens with PAD and EOS; it is saved like any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{index}" for index in range(VOCAB - 11)]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def longer_by(count, tokenizer):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"new{index}" for index in range(count)])
    return longer


@torch.no_grad()
def spread(model):
    """Add noise to the weights: at the library's initial scale all scores are nearly equal."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_backbone(name, attention=None, seed=0, dropout=0.0, **overrides):
    torch.manual_seed(seed)
    family, differences = FAMILIES[name]
    config = tiny_config(family, **differences | overrides)
    for key in vars(config):
        if re.search("drop(out)?$", key):
            vars(config)[key] = dropout
    return spread(AutoModel.from_config(config, attn_implementation=attention)).eval()


def make_model(name, tokenizer, attention=None, num_padding_at_beginning=0, fp32=False, **more):
    loss_on = more.pop("loss_on", "tokens")
    backbone = make_backbone(name, attention, **more)
    model = RewardModel(backbone, tokenizer, num_padding_at_beginning, fp32, loss_on)
    torch.nn.init.normal_(model.v_head.weight, std=0.1)
    return model


def random_rows(seed, B=3, longest=28, pads=True):
    """2B rows, each a prefix of an earlier one and new tokens, PAD inside, content at both ends."""
    rng = random.Random(seed)
    rows = [[5]]
    for _ in range(2 * B):
        other = rng.choice(rows)
        row = other[: rng.randint(1, len(other))]
        for _ in range(rng.randint(-4, longest - len(row))):
            row.append(rng.randrange(2, VOCAB - 8))
        if pads and len(row) > 1 and rng.random() < 0.2:
            row[rng.randrange(1, len(row))] = PAD
        row[-1] = row[-1] or 4
        rows.append(row)
    return rows[1:]


def pad_rows(rows, side="right", extra=3):
    """(ids, mask), with `extra` columns more than the longest row."""
    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    padded = [pad_sequence(part, True, PAD, side) for part in (ids, mask)]
    return [F.pad(part, (extra, 0) if side == "left" else (0, extra)) for part in padded]


def same(a, b, what="", rtol=0):
    """Tensors, or lists or dicts of them, are equal to 1e-5."""
    torch.testing.assert_close(a, b, atol=1e-5, rtol=rtol, msg=lambda text: f"{what}: {text}")


def gradients(model, loss):
    """{name: gradient}, zeros where there is none."""
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    values = list(trained.values())
    found = torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
    return dict(zip(trained, found))


def results(model, ids, mask):
    """Loss, end scores, values and gradients, by name."""
    output = model(ids, mask)
    values = model.forward_value(ids, mask, return_value_only=True)
    return {**output, "values": values, **gradients(model, output["loss"])}


def padded_results(model, ids, mask):
    """The same of the padded batch."""
    with mock.patch.object(model, "share_prefix", False):
        return results(model, ids, mask)


# ---- the plain reference: a loop over rows and tokens ----


def reference_content(ids, mask, num_padding_at_beginning):
    """The tokens of one row's content."""
    if mask is not None:
        return [token for token, bit in zip(ids, mask) if bit]
    text = [t for t, token in enumerate(ids) if token != PAD]
    return ids[max(0, text[0] - num_padding_at_beginning) : text[-1] + 1]


def reference_rows(input_ids, attention_mask, num_padding_at_beginning):
    masks = [None] * len(input_ids) if attention_mask is None else attention_mask.tolist()
    rows = zip(input_ids.tolist(), masks)
    return [reference_content(ids, mask, num_padding_at_beginning) for ids, mask in rows]


def reference_rewards(model, row, T, masked):
    """The rewards (T,) of one row, with its content at column 0."""
    padding = [PAD] * (T - len(row))
    ids = torch.tensor([row + padding])
    mask = torch.tensor([[1] * len(row) + [0] * len(padding)]) if masked else None
    hidden = model.rwtransformer(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    return model.v_head(hidden)[0, :, 0]


def reference_loss(model, input_ids, attention_mask=None, num_padding_at_beginning=0):
    """The loss and the end scores, one pair after the other."""
    rows = reference_rows(input_ids, attention_mask, num_padding_at_beginning)
    T = max(map(len, rows))
    rewards = [reference_rewards(model, row, T, attention_mask is not None) for row in rows]
    scores = torch.stack([values[len(row) - 1] for row, values in zip(rows, rewards)])
    B = len(rows) // 2
    losses = []
    for pair, (chosen, rejected) in enumerate(zip(rows[:B], rows[B:])):
        e = max(len(chosen), len(rejected))
        p = 0
        while p < min(len(chosen), len(rejected)) and chosen[p] == rejected[p]:
            p += 1
        difference = rewards[pair] - rewards[B + pair]
        if p == e:
            losses.append(0 * difference[0] + math.log(2))
        elif model.loss_on == "end":
            losses.append(-F.logsigmoid(scores[pair] - scores[B + pair]))
        else:
            losses.append(-F.logsigmoid(difference[p:e]).mean())
    return torch.stack(losses).mean(), scores


def reference_tokens(input_ids, attention_mask, loss_on, num_padding_at_beginning=0):
    """How many distinct (prefix, token) the loss, or with loss_on=None the values, read."""
    rows = reference_rows(input_ids, attention_mask, num_padding_at_beginning)
    B = len(rows) // 2
    found = set()
    for row, other in zip(rows, rows[B:] + rows[:B]):
        path = [(token, True) for token in row]
        if loss_on == "tokens":
            path += [(PAD, attention_mask is None)] * (len(other) - len(row))
        found |= {tuple(path[: t + 1]) for t in range(len(path))}
    return len(found)


def assert_same_as_reference(model, ids, mask, num_padding_at_beginning=0):
    output = model(ids, mask)
    loss, scores = reference_loss(model, ids, mask, num_padding_at_beginning)
    same(output["loss"], loss, "loss")
    same(torch.cat([output[f"{side}_mean_scores"] for side in SIDES]), scores, "end scores")
    with torch.autograd.set_detect_anomaly(True):  # an error for NaN, even if it is masked later
        found = gradients(model, output["loss"])
    same(found, gradients(model, loss), "gradients")


# ---- shapes ----


def test_shapes_and_names(tokenizer):
    model = make_model("opt-350m", tokenizer)
    ids, mask = pad_rows(random_rows(8))
    output = model(ids.int(), mask.bool())
    assert [value.shape for value in output.values()] == [(), (3,), (3,)]
    output = model.forward_value(ids, mask, prompt_length=2)
    assert not output["values"][mask == 0].any()
    assert output["chosen_end_scores"].shape == (6,)
    assert model.v_head.weight.shape == (1, 16)
    assert {key.split(".")[0] for key in model.state_dict()} == {"rwtransformer", "v_head"}


# ---- OPT's padding offsets ----


@pytest.mark.parametrize(
    ("num_padding_at_beginning", "masked", "length"),
    [(0, False, [3, 2]), (1, False, [4, 3]), (0, True, [4, 3]), (1, True, [4, 3])],
)
def test_num_padding_at_beginning_for_opt(num_padding_at_beginning, masked, length, tokenizer):
    """OPT starts every text with BOS, which has PAD's id with pad = eos."""
    model = make_model("opt", tokenizer, num_padding_at_beginning=num_padding_at_beginning)
    ids = torch.tensor([[PAD, 5, 6, 7, PAD, PAD], [PAD, 5, 8, PAD, PAD, PAD]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]) if masked else None
    assert critic.align(ids, mask, PAD, num_padding_at_beginning)[3].tolist() == length
    assert_same_as_reference(model, ids, mask, num_padding_at_beginning)


# ---- checkpoint round trips ----


def write_base(folder, name, tokenizer, **overrides):
    make_backbone(name, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_deepspeed_chat(folder, model, spelling="rwtransformer", head="v_head"):
    folder.mkdir(parents=True)
    state = {}
    for key, value in model.state_dict().items():
        state[key.replace("rwtransformer", spelling).replace("v_head", head)] = value
    torch.save(state, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    return str(folder)


def read_critic(folder, tokenizer=None):
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    return create_critic_model(str(folder), tokenizer, rlhf_training=True)


def end_scores(model, ids, mask):
    return model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"]


def assert_same_weights(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), atol=0, rtol=0)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_saved(model, tokenizer, folder):
    """create_critic_model, and transformers' own class if there is one, give the same scores."""
    save_critic_model(model, tokenizer, folder)
    batch = pad_rows(random_rows(1, pads=False))
    scores = end_scores(model, *batch)
    same(end_scores(read_critic(folder), *batch), scores, "loaded", rtol=2e-5)
    if type(model.config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        hf_model = AutoModelForSequenceClassification.from_pretrained(folder)
        logits = hf_model(batch[0], attention_mask=batch[1]).logits
        same(logits[:, 0], scores, "transformers", rtol=2e-5)


def test_a_saved_critic_and_training_it_further(tokenizer, tmp_path):
    model = make_model("llama", tokenizer)
    save_critic_model(model, tokenizer, tmp_path)
    assert critic.TREE_ATTENTION not in (tmp_path / "config.json").read_text()
    score = transformers.pipeline("text-classification", str(tmp_path))("w3 w4")[0]["score"]
    ids = torch.tensor(tokenizer(["w3 w4"])["input_ids"])
    assert score == pytest.approx(end_scores(model, ids, None).item(), abs=1e-5)
    further = create_critic_model(str(tmp_path), tokenizer, loss_on="end", share_prefix=False)
    assert_same_weights(further, model)
    assert (further.loss_on, further.share_prefix) == ("end", False)


# (prefix of the decoder's keys, None for transformers' own; head): transformers, OpenRLHF, OpenRLHF
# with a name in its config, UltraRM, Beaver; DeepSpeed-Chat, its older spelling, InternLM2.
HEADS = ("score", "value_head", "my_head", "regression_head", "score_head")
CHECKPOINTS = [(None, head) for head in HEADS]
CHECKPOINTS += [("rwtransformer", "v_head"), ("rwtranrsformer", "v_head"), (None, "v_head")]


@pytest.mark.parametrize("name", ["opt", "llama", "bloom", "gpt2"])
@pytest.mark.parametrize(("prefix", "head"), CHECKPOINTS)
def test_reward_checkpoints_of_others(prefix, head, name, tokenizer, tmp_path):
    model = make_model(name, tokenizer)
    prefix = prefix or model.rwtransformer.base_model_prefix
    folder = write_deepspeed_chat(tmp_path / "reward", model, prefix, head)
    edit(Path(folder, "config.json"), value_head_prefix=head)
    assert_same_weights(read_critic(folder, tokenizer), model)


LM_HEAD = "lm_head.weight"
NEW_HEAD = "value head: newly initialised; weights that are not used: "
# name: (keys that are added to a base model, what the report says)
REPORTS = {
    "a base model": ({}, NEW_HEAD + "0 []"),
    "a language model": ({LM_HEAD: (VOCAB, 32)}, NEW_HEAD + "1 ['lm_head.weight']"),
    "two labels": ({"score.weight": (2, 32)}, NEW_HEAD + "1 ['score.weight']"),
    "another name": (
        {"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)},
        NEW_HEAD + "2 ['v_head.summary.bias', 'v_head.summary.weight']",
    ),
    "an MLP": (
        {f"score.{layer}.weight": (32, 32) for layer in range(6)},
        NEW_HEAD + "6 ['score.0.weight', .* 'score.4.weight']",
    ),
    "a reward model": (
        {"value_head.weight": (1, 32), LM_HEAD: (VOCAB, 32)},
        "value head: from the checkpoint; weights that are not used: 1 ['lm_head.weight']",
    ),
}


@pytest.mark.parametrize("case", REPORTS)
def test_the_report_says_which_head_it_is(case, tokenizer, tmp_path):
    """And with rlhf_training another head than one row without bias is an error that names it."""
    keys, report = REPORTS[case]
    folder = write_base(tmp_path, "llama", tokenizer)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    state |= {key: torch.ones(shape) for key, shape in keys.items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    model = create_critic_model(folder, tokenizer)
    assert re.fullmatch(report.replace("[", r"\["), model.load_report)
    has_head = "from the checkpoint" in report
    assert (model.v_head.weight == 1).all() == has_head
    if not has_head or LM_HEAD in keys:
        with pytest.raises(ValueError, match=HEAD):
            create_critic_model(folder, tokenizer, rlhf_training=True)


def test_a_new_model_is_in_eval_mode_and_trains_after_train(tokenizer, tmp_path):
    """In a loop that forgets `.train()`, all of it is in eval mode."""
    base = write_base(tmp_path, "llama", tokenizer, dropout=0.5)
    model = create_critic_model(base, tokenizer)
    assert not any(module.training for module in model.modules())
    assert model(IDS)["loss"] == model(IDS)["loss"]
    model.train()
    assert model(IDS)["loss"] != model(IDS)["loss"]
    assert RewardModel(model.rwtransformer, tokenizer).training


def test_arguments_of_create_reach_the_model(tokenizer, tmp_path):
    """By their effect on the loss, and by DeepSpeed-Chat's positions."""
    base = write_base(tmp_path, "opt", tokenizer)
    default = create_critic_model(base, tokenizer)
    assert default.share_prefix
    save_critic_model(default, tokenizer, base)
    ids = torch.cat([IDS, torch.full((4, 2), PAD)], 1)
    ids[0, -1] = 5
    ids[:, 0] = PAD
    options = {"loss_on": "end"}, {"share_prefix": False}, {"compute_fp32_loss": True}
    end, padded, in_float32 = (create_critic_model(base, tokenizer, **x) for x in options)
    with_bos = create_critic_model(base, tokenizer, None, 1, True, None, 0, True)
    for model, count in ((default, 0), (end, 0), (padded, 0), (with_bos, 1)):
        assert_same_as_reference(model, ids, None, count)
    losses = [model(ids)["loss"].item() for model in (default, end, padded, with_bos)]
    assert len({round(loss, 5) for loss in losses}) == 3
    assert not padded.share_prefix
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = [model(ids)["loss"].dtype for model in (default, in_float32, with_bos)]
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]


def test_transformers_pads_a_saved_critic_as_it_is(tokenizer, tmp_path):
    """The saved config has the critic's PAD, also where the base model's config has another."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = "w3"
    model = RewardModel(make_backbone("llama"), other)
    save_critic_model(model, other, tmp_path)
    hf_model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert hf_model.config.pad_token_id == other.pad_token_id != PAD
    batch = other(["w5 w6", "w7 w8 w9 w10"], padding=True, return_tensors="pt")
    scores = end_scores(model, batch["input_ids"], batch["attention_mask"])
    same(hf_model(batch["input_ids"]).logits[:, 0], scores)


DTYPES = [  # arguments of create_critic_model, dtype
    ({}, torch.float32),
    ({"ds_config": BF16}, torch.bfloat16),
    ({"ds_config": {"fp16": {"enabled": True}}}, torch.float16),
    ({"ds_config": BF16, "dtype": torch.float16}, torch.float16),
]


@pytest.mark.parametrize(("options", "dtype"), DTYPES)
def test_dtype_and_growing_vocabulary(options, dtype, tokenizer, tmp_path):
    base = write_base(tmp_path, "llama", tokenizer)
    model = create_critic_model(base, tokenizer)
    assert model.config.vocab_size == VOCAB  # the tokenizer has 8 fewer
    longer = longer_by(11, tokenizer)
    model = create_critic_model(base, longer, **options)
    assert model.get_input_embeddings().weight.shape[0] == 104
    save_critic_model(model, longer, base)
    loaded = create_critic_model(base, longer, rlhf_training=True, **options)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_weights(loaded, model)


def test_a_save_replaces_the_older_critic_and_nothing_else(tokenizer, tmp_path):
    model = make_model("llama", tokenizer)
    folder = tmp_path / "critic"
    write_deepspeed_chat(folder, model)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<eos>"}')
    names = [
        "chat_samples.jsonl",
        "special_cases.csv",
        "added_rows.json",
        "model_step1.safetensors",
    ]
    for name in names:
        (folder / name).write_text("the user's")
    other = copy.deepcopy(tokenizer)
    other.padding_side = "left"
    both = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    for template in ("{{ messages }}", both, None):
        other.chat_template = template
        save_critic_model(model, other, folder)
        saved = AutoTokenizer.from_pretrained(folder)
        kept = (saved.chat_template, saved.padding_side, saved.pad_token_id)
        assert kept == (template, "left", PAD)
        assert_same_weights(read_critic(folder), model)
    assert all((folder / name).read_text() == "the user's" for name in names)
    assert not (folder / "pytorch_model.bin").exists()


@pytest.mark.parametrize("name", [*critic.OLDER_WEIGHTS, *critic.OLDER_TOKENIZER])
def test_nothing_of_an_older_critic_is_read(name, tokenizer, tmp_path):
    """Each file that a loader would prefer, or add, to the new ones."""
    (tmp_path / name).write_text('{"w3": 90, "pad_token": "<eos>", "weight_map": {}}')
    model = make_model("llama", tokenizer)
    save_critic_model(model, tokenizer, tmp_path)
    assert_same_weights(read_critic(tmp_path), model)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.pad_token, saved.chat_template, len(saved)) == ("<pad>", None, len(tokenizer))


def test_a_tokenizer_that_cannot_be_saved_leaves_no_critic(tokenizer, tmp_path, monkeypatch):
    """Weights come last: a folder that loads is complete."""
    model = make_model("llama", tokenizer)
    save_critic_model(model, tokenizer, tmp_path)
    full_disk = mock.Mock(side_effect=OSError("No space left on device"))
    monkeypatch.setattr(type(tokenizer), "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_critic_model(model, tokenizer, tmp_path)
    with pytest.raises(ValueError, match="no file named .*; if damaged, download it again"):
        read_critic(tmp_path, tokenizer)


def test_a_kill_between_shards_leaves_no_wrong_critic(tokenizer, tmp_path, monkeypatch):
    """Nothing runs after the interruption, as after a SIGKILL."""
    library = transformers.modeling_utils
    save = library.PreTrainedModel.save_pretrained
    in_shards = functools.partialmethod(save, max_shard_size="30KB")
    monkeypatch.setattr(library.PreTrainedModel, "save_pretrained", in_shards)
    save_file = mock.Mock(wraps=library.safe_save_file)
    monkeypatch.setattr(library, "safe_save_file", save_file)
    save_critic_model(make_model("llama", tokenizer, seed=1), tokenizer, tmp_path)
    model = make_model("llama", tokenizer)
    for written in range(3):
        save_file.side_effect = [mock.DEFAULT] * written + [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            save_critic_model(model, tokenizer, tmp_path)
        with pytest.raises((OSError, ValueError)):
            read_critic(tmp_path, tokenizer)
    save_file.side_effect = None
    save_critic_model(model, tokenizer, tmp_path)
    assert_same_weights(read_critic(tmp_path), model)


def test_a_save_makes_the_folder(tokenizer, tmp_path):
    model = make_model("llama", tokenizer)
    save_critic_model(model, tokenizer, str(tmp_path / "run" / "critic"))
    assert_same_weights(read_critic(tmp_path / "run" / "critic"), model)


def test_under_a_live_config_of_zero_3(tokenizer, tmp_path):
    """As TrainingArguments(deepspeed=...) keeps one: one process saves and loads whole weights."""
    from transformers.integrations import HfDeepSpeedConfig

    model = make_model("llama", tokenizer)
    zero = {"zero_optimization": {"stage": 3}}
    alive = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1} | zero)
    save_critic_model(model, tokenizer, tmp_path)
    assert_same_weights(read_critic(tmp_path), model)
    del alive


# ---- what cannot be loaded or saved ----


def damage(folder, change):
    state = torch.load(Path(folder, "pytorch_model.bin"))
    change(state)
    torch.save(state, Path(folder, "pytorch_model.bin"))
    return folder


def without(key):
    return lambda folder: damage(folder, lambda state: state.pop(key))


def with_key(key, *shape):
    return lambda folder: damage(folder, lambda state: state.update({key: torch.ones(shape)}))


def with_config(**changes):
    return lambda folder: edit(Path(folder, "config.json"), **changes)


def many_keys(folder):
    damage(folder, lambda state: state.update({f"extra.{n}": torch.ones(1) for n in range(9)}))


def truncated(folder):
    path = Path(folder, "pytorch_model.bin")
    path.write_bytes(path.read_bytes()[:-1000])


NORM = "rwtransformer.norm.weight"
WRONG = "reward does not match its config.json: missing, unexpected or mis-shaped are .*"
HEAD = ".*a head is score.weight, .1, H., without bias"
# name: (what is done to a reward checkpoint, message)
BAD_CHECKPOINTS = {
    "a missing key": (without(NORM), WRONG + "model.norm.weight"),
    "an unexpected key": (with_key("extra", 1), WRONG + "extra"),
    "a mis-shaped key": (with_key(NORM, 3), WRONG + "model.norm.weight"),
    "fewer tokens in the config": (with_config(vocab_size=90), WRONG + "embed_tokens.weight"),
    "two labels": (with_key("v_head.weight", 2, 32), WRONG + "score.weight" + HEAD),
    "a head with a bias": (with_key("v_head.bias", 1), WRONG + "score.bias" + HEAD),
    "many unexpected keys": (many_keys, WRONG[:-2] + r"\[('model.extra.\d'(, )?){5}\];"),
    "a truncated file": (truncated, "failed finding central directory"),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_errors(case, tokenizer, tmp_path):
    folder = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    spoil, message = BAD_CHECKPOINTS[case]
    spoil(folder)
    for needs_head in (True, False):
        if needs_head or not re.search("head|label|unexpected", case):
            with pytest.raises((ValueError, RuntimeError), match=message):
                create_critic_model(folder, tokenizer, rlhf_training=needs_head)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n"


@pytest.mark.parametrize("damage", [lambda _: LFS_POINTER, lambda data: data[:-100]])
def test_a_damaged_shard_is_named(damage, tokenizer, tmp_path):
    """A Git LFS pointer, and a truncated file."""
    make_backbone("llama").save_pretrained(tmp_path, max_shard_size="30KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(damage(shards[1].read_bytes()))
    with pytest.raises(ValueError, match=f"^{shards[1]}: .*; if damaged, download it again"):
        create_critic_model(str(tmp_path), tokenizer)


def test_bad_arguments_of_create(tokenizer, tmp_path):
    base = write_base(tmp_path, "llama", tokenizer)
    for name in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"\"enabled\" of {name} in ds_config is 'auto'"):
            create_critic_model(base, tokenizer, {name: {"enabled": "auto"}})
    save_critic_model(make_model("llama", tokenizer), tokenizer, tmp_path / "reward")
    create_critic_model(str(tmp_path / "reward"), longer_by(8, tokenizer), rlhf_training=True)
    with pytest.raises(ValueError, match="has 97 tokens, but .*reward 96 embeddings: pass"):
        create_critic_model(str(tmp_path / "reward"), longer_by(9, tokenizer), rlhf_training=True)
    with pytest.raises(ValueError, match=r"mis-shaped are \['score.weight'\]" + HEAD):
        create_critic_model(base, tokenizer, rlhf_training=True)
    with pytest.raises(RuntimeError, match="LOCAL_RANK"):
        create_critic_model(base, tokenizer, {"zero_optimization": {"stage": 3}})


NO_DECODER = "a critic needs a causal text decoder"


def test_a_family_without_a_class_in_transformers_warns(tokenizer, tmp_path):
    """When the critic is made and when it is saved: only create_critic_model can load it."""
    base = write_base(tmp_path, "granite", tokenizer)
    warning = "transformers has no GraniteForSequenceClassification: only create_critic_model"
    with pytest.warns(UserWarning, match=warning):
        model = create_critic_model(base, tokenizer)
    with pytest.warns(UserWarning, match=warning):
        save_critic_model(model, tokenizer, tmp_path)
    assert_same_weights(read_critic(tmp_path), model)


@pytest.mark.parametrize("kind", ["t5", "bert", "vit", "markuplm", "xlnet"])
def test_other_models_are_errors(kind, tokenizer, tmp_path):
    tiny_config(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=NO_DECODER):
        create_critic_model(str(tmp_path), tokenizer)


def test_what_cannot_be_saved_says_what_to_do(tokenizer, tmp_path):
    def fails(message, model):
        with pytest.raises(RuntimeError, match=message) as raised:
            save_critic_model(model, tokenizer, tmp_path / "critic")
        assert "merge_and_unload, unwrap _orig_mod, or use FSDP1's" in raised.value.__notes__[0]

    model = make_model("llama", tokenizer)
    fails("_orig_mod", torch.compile(model))
    model.rwtransformer.norm.weight = torch.nn.Parameter(torch.ones(16))  # as FSDP1 leaves it
    fails("size mismatch for model.norm.weight", model)
    model.rwtransformer.layers[0].lora_A = torch.nn.Parameter(torch.ones(2))
    fails("lora_A", model)
    assert not (tmp_path / "critic").exists()


def test_saving_warns_where_pad_is_eos(tokenizer, tmp_path):
    same_id = copy.deepcopy(tokenizer)
    same_id.pad_token = same_id.eos_token
    with pytest.warns(UserWarning, match="PAD is EOS, .*add_special_tokens"):
        save_critic_model(make_model("llama", same_id), same_id, tmp_path)


# ---- arguments, precision, kernels ----

IDS = torch.randint(2, 60, (4, 9), generator=torch.Generator().manual_seed(0))
ROW_2_EMPTY = torch.tensor([[1], [1], [0], [1]])
# name: (arguments of forward, message)
BAD_CALLS = {
    "no rows": ({"input_ids": IDS[:0]}, r"input_ids \(0, 9\)"),
    "no pairs": ({"input_ids": IDS[:3]}, "input_ids has 3 rows: pass B chosen"),
    "another shape": ({"input_ids": IDS, "attention_mask": IDS[:, 1:]}, r"mask \(4, 8\): pass"),
    "a row of padding": ({"input_ids": IDS * ROW_2_EMPTY}, "row 2 of input_ids is only padding"),
    "a row masked out": ({"input_ids": IDS, "attention_mask": IDS * ROW_2_EMPTY}, "row 2"),
    "labels as ids": ({"input_ids": IDS - 100}, "index out of range"),
    "a cache": ({"input_ids": IDS, "past_key_values": ()}, "argument 'past_key_values'"),
    "labels": ({"input_ids": IDS, "labels": IDS}, "argument 'labels'"),
}


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(call, tokenizer):
    arguments, message = BAD_CALLS[call]
    with pytest.raises((ValueError, IndexError, TypeError), match=message):
        make_model("llama", tokenizer)(**arguments)


def test_bad_arguments_of_the_constructor(tokenizer):
    def fails(message, config, cls=AutoModel, tokenizer=tokenizer, **options):
        with pytest.raises(ValueError, match=message):
            RewardModel(cls.from_config(config), tokenizer, **options)

    llama = tiny_config("llama")
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    longer = longer_by(8, tokenizer)
    longer.add_special_tokens({"pad_token": "<new>"})
    fails("pad_token_id None of 96.*set tokenizer.pad_token", llama, tokenizer=bare)
    fails("pad_token_id 96 of 96 embeddings.*resize_token_embeddings", llama, tokenizer=longer)
    fails("loss_on is 'mean'", llama, loss_on="mean")
    fails("has a head: pass its base_model", llama, transformers.AutoModelForCausalLM)
    fails(NO_DECODER, multimodal_config("llava"))
    fails(NO_DECODER, tiny_config("gemma3_text", is_causal=False))
    fails(NO_DECODER, tiny_config("gemma3_text", use_bidirectional_attention=True))
    fails(NO_DECODER, tiny_config("gemma4_text", use_bidirectional_attention="all"))
    fails(NO_DECODER, tiny_config("embedding_gemma2_text"))
    images_only = tiny_config("gemma4_text", use_bidirectional_attention="vision")
    RewardModel(AutoModel.from_config(images_only), tokenizer)


def test_data_parallel_is_an_error(tokenizer):
    model = make_model("llama", tokenizer)
    with pytest.raises(ValueError, match="nn.DataParallel .*: launch one process per device"):
        model._replicate_for_data_parallel()(IDS)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "llama", "falcon", "biogpt"])
def test_dropout_overrides_every_field(name, tokenizer, tmp_path):
    AutoModel.from_config(tiny_config(name)).save_pretrained(tmp_path)
    model = create_critic_model(str(tmp_path), tokenizer, dropout=0.35).train()
    fields = json.dumps(model.config.to_dict())
    assert set(re.findall(r'(?:dropout|pdrop|_prob)": ([\d.]+)', fields)) == {"0.35"}
    assert model(IDS)["loss"] != model(IDS)["loss"]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_no_cache_of_keys_is_kept(share_prefix, tokenizer, monkeypatch):
    """It would hold the keys and values of all layers until the end of a forward."""
    model = make_model("llama", tokenizer)
    model.share_prefix = share_prefix
    no_cache = mock.Mock(side_effect=AssertionError("a cache"))
    monkeypatch.setattr(transformers.models.llama.modeling_llama, "DynamicCache", no_cache)
    model(IDS)
    model.forward_value(IDS)


def test_cudnn_attention_is_off_in_the_backbone_only(tokenizer):
    """It gives NaN gradients on Hopper (pytorch#196678); the import leaves it on."""
    model = make_model("llama", tokenizer)
    found = []
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    model.rwtransformer.register_forward_pre_hook(lambda *_: found.append(enabled()))
    model(IDS)
    assert [*found, enabled()] == [False, True]


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, fp32, tokenizer):
    model = make_model("llama", tokenizer, fp32=fp32)
    batch = pad_rows(random_rows(6), "left")
    expected = model(*batch)["loss"].item()
    for parameter in model.parameters():  # not the buffers, as `from_pretrained` does
        parameter.data = parameter.data.to(dtype)
    for compute in (results, padded_results):
        found = compute(model, *batch)
        assert found["loss"].item() == pytest.approx(expected, rel=0.01)
        assert found["loss"].dtype == (torch.float32 if fp32 else dtype)
        assert torch.equal(found["values"], found["values"].to(dtype).float()) != fp32
        assert all(value.isfinite().all() for value in found.values())
    with torch.autocast("cpu", dtype):
        assert model(*batch)["loss"].dtype == (torch.float32 if fp32 else dtype)


def test_a_long_tail_in_fp16_does_not_overflow():
    rewards = torch.tensor([[0], [12]], dtype=torch.float16).expand(2, 6000)  # they sum to 72,000
    length = torch.tensor([6000, 6000])
    assert critic.ranking_loss(rewards, length, torch.tensor([0]), "tokens")[0] == 12


@pytest.mark.parametrize("kind", [None, {"use_reentrant": False}])
def test_gradient_checkpointing_changes_no_gradient(kind, tokenizer):
    model = make_model("llama", tokenizer).train()
    embeddings = model.get_input_embeddings()
    embeddings.requires_grad_(False)  # the reentrant kind would lose all gradients
    batch = pad_rows(random_rows(6))
    expected = results(model, *batch)
    model.gradient_checkpointing_enable(kind)
    assert model.rwtransformer.layers[0].gradient_checkpointing
    same(results(model, *batch), expected)
    model.gradient_checkpointing_disable()
    assert not model.rwtransformer.layers[0].gradient_checkpointing
    model.gradient_checkpointing_enable(every_n_layers=2)  # an option of transformers' method
    assert sum(layer.gradient_checkpointing for layer in model.rwtransformer.layers) == 1


def test_recomputed_activations_do_not_use_cudnn_attention(tokenizer):
    """The backward pass, in which they are recomputed, is outside of the model's own switch."""
    model = make_model("llama", tokenizer).train()
    found = []
    attention = model.rwtransformer.layers[0].self_attn
    enabled = torch.backends.cuda.cudnn_sdp_enabled
    attention.register_forward_pre_hook(lambda *_: found.append(enabled()))
    try:
        model.gradient_checkpointing_enable()
        model(IDS)["loss"].backward()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
    assert found == [False, False]


# ---- tiny models of every family ----

# What an attribute becomes, in whatever family it occurs; of several patterns, the last counts.
TINY = {
    r"(?!\w*(kv|key_value))\w*_heads|n_head|\w*_experts|zero_expert_num": 4,
    r"\w*hidden_size|d_model|n_embd|\w*emb(edding)?_(dim|size)|lru_width|mamba_d_ssm": 32,
    r"word_embed_proj_dim|projection_dim|(vision_|projector_)(in|out)put_dim": 32,
    r"(intermediate|ffn_hidden)_size|\w*ffn_dim|n_inner|dim_ff|dff|d_inner|mlp_dim": 48,
    r"\w+_intermediate_size\w*|intermediate_size_mlp|expert_ffn_hidden_size|\w+_lora_rank": 16,
    r"num_position_embeddings|\w+_embed_dim|image_size": 16,
    r"(?!qk_head)\w*head_?dim|rotary_dim|dim_head|(mamba_)?d_head|kv_channels|index_topk": 8,
    r"\w*(window|chunk|state)(_size)?|block_size|local_attention": 8,
    r"router_hidden_size|hidden_size_per_layer_input|patch_size": 8,
    r"moe_k|moe_topk|moe_layer_end_index|\w+_layer_period|num_kv_shared_layers|depth": 2,
    r"(num_)?encoder_layers|num_experts_per_tok(en)?": 2,
    r"n_groups?|topk_group|num_expert_group|(mamba_)?expand|\w+_layer_offset|max_window_layers": 1,
    r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|\w+(shared_experts|token_id)": 1,
    r"(\w+_)?vocab(_size)?(_per_layer_input)?": VOCAB,
    "max_position_embeddings|n_positions|n_ctx|max_seq_len": 256,
    "pad_token_id": PAD,
    "use_sliding_window": True,
    "attention_types": [[["global", "local"], 1]],
    "deepstack_visual_indexes": [0],
    "per_layer_config": {},
}
LAYERS = r"num_hidden_layers|n_layers?|num_(decoder_)?layers|decoder_layers|num_blocks"
WINDOWED = {"full_attention", "sliding_attention"}


def tiny_config(family, **overrides):
    """Any family's text decoder, shrunk by its attributes' names, with a layer of each kind."""
    config_class = transformers.CONFIG_MAPPING[family] if isinstance(family, str) else family
    default = config_class().get_text_config(decoder=True)
    given = default.to_dict()
    tiny = {}
    kinds = {}
    for name, value in given.items():
        for pattern, size in TINY.items():
            if re.fullmatch(pattern, name):
                tiny[name] = size
        if re.fullmatch("(swa_)?num_(key_value|kv)_heads", name):
            tiny[name] = 4 if value in (given.get("num_attention_heads"), None) else 2
        if re.fullmatch(r"(mlp_)?layer_types|layers_block_type|block_types", name):
            kinds[name] = set(value or ())
    # Released checkpoints have windows, though not every default config.
    if "sliding_window" in given and kinds.get("layer_types", {""}) <= WINDOWED:
        kinds["layer_types"] = WINDOWED
    count = max([2, *map(len, kinds.values())])
    if "num_kv_shared_layers" in given:  # Gemma's later layers share the keys of earlier ones
        count *= 2
    tiny |= {name: count for name in given if re.fullmatch(LAYERS, name)}
    tiny |= {name: (sorted(kind) * count)[:count] for name, kind in kinds.items() if kind}
    return type(default)(**tiny | tiny_parts(default) | overrides)


def tiny_parts(config):
    """The configs inside of a config: text, vision, BLT's byte encoder."""
    parts = {}
    for name, part in vars(config).items():
        if isinstance(part, transformers.PretrainedConfig):
            parts[name] = tiny_config(type(part)).to_dict()
    return parts


ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
# name: (model_type, what differs from its tiny config)
FAMILIES = {
    "opt-350m": ("opt", {"word_embed_proj_dim": 16, "is_causal": True}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "llama-dynamic": ("llama", {"max_position_embeddings": 24, "rope_scaling": ROPE}),
    "gpt2": ("gpt2", {"n_positions": 32}),  # rows are shorter, padded batches longer
}
SAME_NAME = """
llama mistral mixtral qwen2 olmo2 granite cohere qwen3 gemma gpt_bigcode opt gptj gpt_neo gpt_neox
bloom mpt phi starcoder2 deepseek_v3 qwen2_moe stablelm qwen3_next gemma2 gemma3_text phi3 exaone4
"""
FAMILIES |= {name: (name, {}) for name in SAME_NAME.split()}
TREE_FAMILIES = critic.TREE_FAMILIES
TREES = [name for name, (family, _) in FAMILIES.items() if family in TREE_FAMILIES]


# ---- the prefix tree: each token once ----


def counted(model):
    """A list that grows by the number of tokens in each call of the backbone."""
    calls = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda module, args: calls.append(args[0].numel()))
    return calls


EDGES = [  # (chosen, rejected)
    ([3, 4, 5], [3, 4, 5]),  # identical
    ([3, 4, 5], [6, 7]),  # nothing in common
    ([3], [3, 4, 5]),  # one begins the other
    ([3, PAD, 4, PAD, 5], [3, PAD, 6]),  # interior PAD
    ([3, 4, PAD, 5], [3, 4, 5]),  # PAD is the only difference
    ([3, 4, PAD, PAD, 5], [3, 4]),  # a prefix that ends in the other's padding
]


def make_batch(seed):
    """Edge cases and random trees: with a mask, with a hole after every token, or without a mask;
    padded on either side, further than a window reaches."""
    rows = random_rows(seed, B=1 + seed % 3)
    if seed < 2:
        rows = [pair[side] for side in (0, 1) for pair in EDGES]
    ids, mask = pad_rows(rows, "left" if seed % 2 else "right", extra=seed)
    if seed % 3 == 0:
        return ids, None
    if seed % 3 == 1:
        return ids, mask
    with_holes = torch.stack([ids, ids + 1], 2), torch.stack([mask, 0 * mask], 2)
    return [part.flatten(1) for part in with_holes]


@pytest.mark.parametrize("loss_on", ["tokens", "end"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_token_is_computed_once_and_equals_the_reference(name, loss_on, tokenizer):
    """However the rows are padded, also beyond the positions that the backbone has."""
    model = make_model(name, tokenizer, loss_on=loss_on)
    calls = counted(model)
    assert model.share_prefix == (name in TREES)
    for seed in range(24 if name in ("opt", "llama", "bloom") else 9):
        ids, mask = make_batch(seed)
        count = seed % 2
        model.num_padding_at_beginning = count
        calls.clear()
        assert_same_as_reference(model, ids, mask, count)
        found = results(model, ids, mask)
        if name in TREES:
            assert calls[0] == reference_tokens(ids, mask, loss_on, count)
            assert calls[-1] == reference_tokens(ids, mask, None, count)
        same(found, padded_results(model, ids, mask), "padded")


def reference_nodes(ids, visible, needed):
    """The prefix tree as a trie: {(parent, column, token, visible): node}, and each row's nodes."""
    found = {}
    paths = []
    for row, bits, count in zip(ids.tolist(), visible.tolist(), needed.tolist()):
        path = [None]
        for column in range(count):
            key = (path[-1], column, row[column], bits[column])
            path.append(found.setdefault(key, len(found)))
        paths.append(path[1:])
    return found, paths


@pytest.mark.parametrize("seed", range(12))
def test_the_prefix_tree_equals_the_trie(seed):
    ids, visible, _, length = critic.align(*make_batch(seed), PAD)
    longer = torch.maximum(*length.chunk(2)).repeat(2)
    for needed in (length, longer):
        E = needed.max()
        tree = critic.PrefixTree(ids[:, :E], visible[:, :E], needed, torch.Tensor.cpu)
        found, paths = reference_nodes(ids, visible, needed)
        assert len(tree.ids) == len(found)
        pairs = set()
        for row, path in enumerate(paths):
            nodes = tree.node_index[row, : len(path)]
            assert torch.equal(tree.ids[nodes], ids[row, : len(path)])
            assert torch.equal(tree.visible[nodes], visible[row, : len(path)])
            assert tree.columns[nodes].tolist() == list(range(len(path)))
            pairs |= set(zip(path, nodes.tolist()))
        assert len(pairs) == len(found)  # one node of the tree for each of the trie


def test_a_backbone_that_loses_the_tree_raises(tokenizer, monkeypatch):
    """A family whose attention does not get the keyword must not run without a mask."""
    model = make_model("llama", tokenizer)
    attention = type(model.rwtransformer.layers[0].self_attn)
    forward = attention.forward

    def forward_without_tree(self, *args, tree, **options):
        return forward(self, *args, **options)

    monkeypatch.setattr(attention, "forward", forward_without_tree)
    with pytest.raises(RuntimeError, match="attn_mask"):
        model(*pad_rows(random_rows(1)))


def test_the_tree_is_off_with_eager_attention_or_several_devices(tokenizer):
    assert not make_model("llama", tokenizer, "eager").share_prefix
    backbone = make_backbone("llama")
    backbone.hf_device_map = {"embed_tokens": 0, "layers": 1}  # of device_map="auto"
    assert not RewardModel(backbone, tokenizer).share_prefix
    assert backbone.config._attn_implementation == "sdpa"


def test_an_actor_may_share_the_backbone(tokenizer):
    """The constructor switches attention, which is sdpa in calls without a tree."""
    actor = spread(transformers.AutoModelForCausalLM.from_config(tiny_config("llama"))).eval()
    expected = actor.generate(IDS, max_new_tokens=5, do_sample=False)
    assert critic.supports_tree(actor.model)
    RewardModel(actor.model, tokenizer)
    assert actor.config._attn_implementation == critic.TREE_ATTENTION
    assert torch.equal(actor.generate(IDS, max_new_tokens=5, do_sample=False), expected)


def test_unknown_options_of_attention_are_errors():
    query = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match="does not know softcap: pass share_prefix=False"):
        critic.tree_attention(torch.nn.Module(), query, query, query, None, "a tree", softcap=1.0)


# ---- blocks of attention ----


def set_blocks(monkeypatch, causal_from, step):
    """Causal blocks for rows of `causal_from` tokens and more; lengths differ by less than step."""
    group_spans = critic.group_spans

    def group_such_spans(*args):
        return group_spans(*args[:-1], step)

    monkeypatch.setattr(critic, "CAUSAL_FROM", causal_from)
    monkeypatch.setattr(critic, "group_spans", group_such_spans)


@pytest.mark.parametrize("step", [8, 1 << 30])
@pytest.mark.parametrize("causal_from", [0, 8, 20])
@pytest.mark.parametrize("name", TREES)
def test_any_blocks_equal_the_padded_batch(name, causal_from, step, tokenizer, monkeypatch):
    """In value and every gradient; without a mask, through the code of dropout (of probability
    1e-9), and on another default device."""
    set_blocks(monkeypatch, causal_from, step)
    for seed, loss_on in itertools.product((0, 1), ("tokens", "end")):
        model = make_model(name, tokenizer, dropout=1e-9 * seed, loss_on=loss_on).train()
        ids, mask = pad_rows(random_rows(100 + seed, B=4), "left")
        bits = mask if seed else None
        with torch.device("meta" if name == "llama" else "cpu"):
            found = results(model, ids, bits)
        same(found, padded_results(model, ids, bits))


# (shared, visible, needed) tokens of a row: (is_causal, first query, last, keys) of its spans
SPANS = {
    (0, 511, 511): [(False, 0, 511, 511)],
    (0, 512, 512): [(True, 0, 512, 512)],
    (299, 600, 600): [(True, 0, 600, 600)],
    (300, 600, 600): [(False, 300, 600, 600)],  # only half is new
    (300, 600, 650): [(False, 300, 650, 600)],
    (299, 600, 650): [(True, 0, 600, 600), (False, 600, 650, 600)],  # hidden padding
}


@pytest.mark.parametrize("counts", SPANS)
def test_rows_of_512_tokens_that_are_mostly_new_are_causal(counts):
    groups = critic.group_spans(*torch.tensor([counts]).T, 128)
    found = []
    for (is_causal, *_), spans in groups.items():
        found += [(is_causal, *span[1:]) for span in spans]
    assert found == SPANS[counts]


def test_lengths_in_a_block_differ_little_on_a_cpu():
    """Padding costs time: at most 128 tokens, and the rest of a multiple of 8."""
    lengths = [1, 8, 9, 120, 127, 128, 255, 256, 300]
    ids, visible, _, length = critic.align(*pad_rows([[5 + n] * n for n in lengths]), PAD)
    tree = critic.PrefixTree(ids, visible, length, torch.Tensor.cpu)
    shapes = [(*block.query_nodes.shape, block.key_nodes.size(1)) for block in tree.blocks]
    assert shapes == [(5, 128, 128), (2, 256, 256), (2, 304, 304)]  # rows, Q, K


def test_causal_blocks_pass_no_mask(monkeypatch):
    """But in layers with a window. Hidden padding of a causal row is a row of a masked block."""
    monkeypatch.setattr(critic, "CAUSAL_FROM", 8)
    ids, mask = pad_rows([[3] * 9, [4] * 8], extra=0)
    tree = critic.PrefixTree(ids, mask == 1, torch.tensor([9, 9]), torch.Tensor.cpu)
    assert sorted(block.is_causal for block in tree.blocks) == [False, True]
    full, windowed = (tree.masks(window, torch.float32) for window in (None, 8))
    for block, *masks in zip(tree.blocks, full, windowed):
        assert [mask is None for mask in masks] == [block.is_causal, False]
    again = tree.masks(8, torch.float32)
    assert all(map(operator.is_, windowed, again))  # one copy for all layers


def test_an_accelerator_gets_at_most_two_blocks_of_each_kind():
    """However many rows there are, and however their lengths differ."""
    for seed, longest in itertools.product(range(3), (28, 1500)):
        rows = random_rows(seed, B=20, longest=longest)
        ids, visible, _, length = critic.align(*pad_rows(rows), PAD)
        tree = critic.PrefixTree(ids, visible, length, lambda x: x.to("meta"))
        kinds = [block.is_causal for block in tree.blocks]
        assert max(kinds.count(True), kinds.count(False)) <= 2


def operations_per_layer(name, tokenizer, pairs, share_prefix=True):
    """What a second layer dispatches, forward and backward."""
    batch = pad_rows(random_rows(0, B=pairs, longest=120))
    counts = []
    for layers in (1, 2):
        model = make_model(name, tokenizer, num_hidden_layers=layers)
        model.share_prefix = share_prefix
        with profile(use_cpu=True) as profiled:
            model(*batch)["loss"].backward()
        counts.append(len(profiled.function_events))
    return counts[1] - counts[0]


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_operations_per_layer_do_not_grow_with_the_pairs(name, tokenizer, monkeypatch):
    """With an accelerator's blocks: from some number of pairs on, their number is constant."""
    set_blocks(monkeypatch, critic.CAUSAL_FROM, 1 << 30)
    few, many, more = (operations_per_layer(name, tokenizer, pairs) for pairs in (8, 96, 192))
    padded = operations_per_layer(name, tokenizer, 8, share_prefix=False)
    assert padded < few <= many == more < 2 * padded


@pytest.mark.parametrize("causal_from", [0, 512])
@pytest.mark.parametrize("loss_on", ["tokens", "end"])
def test_nothing_is_read_back_from_the_device(loss_on, causal_from, tokenizer, monkeypatch):
    """On the meta device every read (item, tolist, nonzero, an index by mask) is an error. Ids and
    mask are the only tensors that are copied to the CPU."""
    monkeypatch.setattr(critic, "CAUSAL_FROM", causal_from)
    model = make_model("opt", tokenizer, loss_on=loss_on).to("meta")
    host = pad_rows(random_rows(2))
    device = [tensor.to("meta") for tensor in host]
    on_host = {id(copy): tensor for copy, tensor in zip(device, host)}
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: on_host.get(id(tensor), tensor))
    for batch in (host, device):
        found = results(model, *batch)
        assert {value.device.type for value in found.values()} == {"meta"}


# ---- every family of the installed transformers ----

# A padded batch differs from its rows: attention picks the top few of all keys, or a layer needs
# arguments of its own. Or the class for sequences has another head.
OTHERS = {"axk2", "cpmant", "deepseek_v32", "glm_moe_dsa", "longcat_flash", "xmod", "zamba2"}
OTHERS |= {"blt", "ctrl", "modernbert-decoder"}
EVERY = {config.model_type for config in transformers.MODEL_FOR_CAUSAL_LM_MAPPING} - OTHERS


def tiny_language_model(family):
    """None where the config does not shrink by the names of its attributes."""
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            assert transformers.AutoModelForCausalLM.from_config(config).num_parameters() < 5e6
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        assert type(model.config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    except Exception:  # noqa: BLE001
        return None
    model.config.use_cache = False
    return spread(model).eval()


@pytest.mark.parametrize("family", sorted(EVERY))
def test_every_family(family, tokenizer, tmp_path, monkeypatch):
    """From a saved language model: its last hidden state, the tree with blocks of both kinds,
    saving and loading."""
    monkeypatch.setattr(critic, "CAUSAL_FROM", 8)
    language = tiny_language_model(family)
    if language is None:
        assert family not in TREE_FAMILIES
        return
    language.save_pretrained(tmp_path)
    config_class = type(language.config)
    is_encoder = config_class in transformers.MODEL_FOR_MASKED_LM_MAPPING
    is_encoder |= config_class in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if is_encoder or family in ("trocr", "prophetnet", "xlnet"):
        with pytest.raises(ValueError, match=f"{NO_DECODER}|does not match its config.json"):
            create_critic_model(str(tmp_path), tokenizer)
        return
    model = create_critic_model(str(tmp_path), tokenizer).eval()
    assert model.share_prefix == (model.config.model_type in TREE_FAMILIES)
    torch.nn.init.normal_(model.v_head.weight, std=0.1)
    rows = random_rows(1, B=2, pads=False)
    batch = pad_rows(rows, "left")
    found = results(model, *batch)
    for row, values in zip(rows, found["values"]):
        hidden = getattr(language, "model", language.base_model)(torch.tensor([row]))[0]
        expected = model.v_head(hidden)[0, :, 0]
        same(values[-len(row) :], expected, "values", rtol=2e-5)
    same(found, padded_results(model, *batch), "padded", rtol=2e-5)
    assert_saved(model, tokenizer, tmp_path)


MULTIMODAL = """gemma3 qwen2_vl qwen2_5_vl qwen3_vl qwen3_5 qwen3_5_moe mistral3 llama4 llava
internvl idefics3 aya_vision"""


def multimodal_config(name):
    config_class = transformers.CONFIG_MAPPING[name]
    parts = tiny_parts(config_class())
    if name.startswith("qwen2"):  # how half of a head is shared out
        parts["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 2]
    return config_class(**parts)


@pytest.mark.parametrize("name", MULTIMODAL.split())
def test_the_text_decoder_of_a_multimodal_checkpoint(name, tokenizer, tmp_path):
    """Its hidden states are those inside the multimodal model; a text model is saved."""
    torch.manual_seed(0)
    config = multimodal_config(name)
    whole = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    whole.save_pretrained(tmp_path)
    model = create_critic_model(str(tmp_path), tokenizer).eval()
    assert model.config.model_type == config.get_text_config(decoder=True).model_type
    ids = torch.tensor([range(9, 30), [*range(9, 20), *range(50, 60)]])
    expected = model.v_head(whole(ids, output_hidden_states=True).hidden_states[-1]).squeeze(-1)
    values = model.forward_value(ids, return_value_only=True)
    same(values, expected, "values", rtol=2e-5)
    assert_saved(model, tokenizer, tmp_path)


# ---- chapters alone ----


def without_chapters(number, folder):
    """critic.py without the chapters from this one on, and without the lines that lead there."""
    kept, mark, _ = Path(critic.__file__).read_text().partition(f"# ---- Chapter {number}")
    assert mark
    lines = [line for line in kept.splitlines() if not line.endswith("# chapter 3")]
    path = folder / f"before_chapter_{number}.py"
    path.write_text("\n".join(lines))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_chapter_1_alone_is_a_complete_reward_model(tokenizer, tmp_path):
    alone = without_chapters(2, tmp_path).RewardModel(make_backbone("opt"), tokenizer)
    model = RewardModel(make_backbone("opt"), tokenizer)
    model.v_head = alone.v_head
    for ids, mask in (make_batch(seed) for seed in range(6)):
        same(results(alone, ids, mask), results(model, ids, mask))
        assert_same_as_reference(alone, ids, mask)


def test_without_chapter_3_steps_2_and_3_are_the_same(tokenizer, tmp_path):
    padded = without_chapters(3, tmp_path)
    base = write_base(tmp_path, "opt", tokenizer)
    padded.save_critic_model(padded.create_critic_model(base, tokenizer), tokenizer, base)
    step3 = padded.create_critic_model(base, tokenizer, rlhf_training=True)
    ids, mask = pad_rows(random_rows(4))
    for bits in (mask, None):
        same(results(step3, ids, bits), results(read_critic(base), ids, bits))


# ---- clients ----


def as_a_batch(pairs):
    ids, mask = pad_rows([pair[side] for side in SIDES for pair in pairs])
    return {"input_ids": ids, "attention_mask": mask}


def some_pairs(count=8):
    rows = random_rows(5, B=count, pads=False)
    return [dict(zip(SIDES, pair)) for pair in zip(rows[::2], rows[1::2])]


def test_other_losses_are_built_from_the_scores(tokenizer):
    """Llama 2's margin, for instance: end scores carry gradients."""
    model = make_model("llama", tokenizer)
    output = model(**as_a_batch(some_pairs(3)))
    difference = output["chosen_mean_scores"] - output["rejected_mean_scores"]
    found = gradients(model, -F.logsigmoid(difference - 1).mean())
    assert all(gradient.any() for name, gradient in found.items() if "v_head" in name)
    assert model.device == torch.device("cpu")


def test_transformers_trainer_trains_and_evaluates(tokenizer, tmp_path):
    pytest.importorskip("accelerate")
    model = make_model("llama", tokenizer)
    before = copy.deepcopy(model.state_dict())
    options = {"max_steps": 2, "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    options |= {"gradient_checkpointing": True, "neftune_noise_alpha": 5, "report_to": []}
    options |= {"eval_strategy": "steps", "remove_unused_columns": False, "use_cpu": True}
    settings = transformers.TrainingArguments(str(tmp_path), **options)
    pairs = some_pairs()
    trainer = transformers.Trainer(model, settings, as_a_batch, pairs, pairs)
    trainer.train()
    for name in ("v_head.weight", "rwtransformer.layers.0.mlp.up_proj.weight"):
        assert not torch.equal(before[name], model.state_dict()[name])
    loss = model.eval()(**as_a_batch(pairs))["loss"].item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, abs=1e-5)


def test_lora_by_peft(tokenizer, tmp_path):
    """The tree is on, and the head trains in full."""
    peft = pytest.importorskip("peft")
    model = make_model("llama", tokenizer)
    batch = as_a_batch(some_pairs(3))
    options = {"init_lora_weights": False, "modules_to_save": ["v_head"]}
    trained = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], **options))
    calls = counted(model)
    trained(**batch)["loss"].backward()
    assert calls == [reference_tokens(*batch.values(), "tokens")]
    for name, parameter in trained.named_parameters():
        assert (parameter.grad is not None) == bool(re.search("lora|v_head.*default", name))
    with pytest.raises(RuntimeError, match="lora"):
        save_critic_model(trained, tokenizer, tmp_path)


# ---- the loop, on real processes ----

PORTS = itertools.count(20_000 + os.getpid() % 10_000)  # below those that a system hands out
ENVIRONMENT = {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
# Ranks are processes forked from a server that has imported what takes seconds.
FORKS = multiprocessing.get_context("forkserver")
IMPORTS = """test_critic train_reward deepspeed.runtime.zero.muon.muon_optimizer
transformers.models.llama.modeling_llama"""
FORKS.set_forkserver_preload(IMPORTS.split())


def train():
    import train_reward

    train_reward.main()


def run_rank(rank, ranks, port, log, main, arguments):
    """What a launcher does for a rank, then `main`. With ranks=None there is no launcher."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if ranks:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in variables.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    sys.argv = ["train_reward.py", *arguments]
    main()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def run_ranks(arguments="", main=train, ranks=2, code=0):
    """What all ranks print. `code` is the exit code of each, None for any but 0."""
    with tempfile.NamedTemporaryFile("r") as log:
        common = (ranks, next(PORTS), log.name, main, arguments.split())
        processes = []
        for rank in range(ranks or 1):
            processes.append(FORKS.Process(target=run_rank, args=(rank, *common), daemon=True))
        with mock.patch.dict(os.environ, ENVIRONMENT):
            for process in processes:
                process.start()
        for process in processes:
            process.join(300)
        printed = log.read()
    codes = {process.exitcode for process in processes}  # None of a rank that hangs
    assert all(codes) if code is None else codes == {code}, printed[-6000:]
    return printed


def make_ds_config(stage=0, **overrides):
    """ds_config.json in float32, since many CPUs emulate bf16."""
    config = json.loads((HERE / "ds_config.json").read_text())
    config |= {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": False}}
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # partition small ones too
    config |= {"zero_optimization": zero, **overrides}
    return {name: value for name, value in config.items() if value is not None}


def write_ds_config(path, stage=0, **overrides):
    path.write_text(json.dumps(make_ds_config(stage, **overrides)))
    return path


def write_rows(path, rows):
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def make_pairs(count=48, seed=0):
    """Text pairs: a response that ends with w1 is preferred to one that ends with w2."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        prompt, *words = [f"w{rng.randint(3, 79)}" for _ in range(rng.randint(2, 9))]
        chosen = " ".join(["", *words, "w1"])
        rejected = " ".join(["", *words[::2], "w2"])
        pairs.append(row(chosen, rejected, prompt=f"w{number} {prompt}"))
    return pairs


def row(chosen, rejected, **others):
    return {"chosen": chosen, "rejected": rejected} | others


@pytest.fixture(scope="session")
def training(tokenizer, tmp_path_factory):
    """The flags of a run on a base model: 48 pairs, on two ranks 4 epochs of 3 steps."""
    folder = tmp_path_factory.mktemp("training")
    base = write_base(folder / "base", "llama", tokenizer)
    edit(folder / "base" / "tokenizer_config.json", pad_token="<eos>")
    data = write_rows(folder / "train.jsonl.gz", make_pairs())
    held_out = write_rows(folder / "eval.jsonl.gz", make_pairs(21, seed=1))

    def arguments(output, stage=0, accumulation=2, **overrides):
        overrides["gradient_accumulation_steps"] = accumulation
        more = "--gradient_checkpointing " if stage % 2 else ""
        config = write_ds_config(folder / f"{output.name}.json", stage, **overrides)
        return (
            f"--model_name_or_path {base} --data_path {data} --eval_path {held_out} "
            f"--max_seq_len 64 --output_dir {output} --deepspeed_config {config} "
            "--num_train_epochs 4 --dropout 0.1 --save_interval 2 --eval_interval 5 " + more
        )

    arguments.folder = folder
    return arguments


@pytest.fixture(scope="session")
def trained(training):
    """A function: the output folder of a run on some ranks at a ZeRO stage."""

    @functools.cache
    def run(ranks, stage):
        output = training.folder / f"{ranks}-{stage}"
        arguments = training(output, stage, 4 // ranks)
        start = time.time()
        printed = run_ranks(arguments, ranks=ranks)
        seconds = time.time() - start
        for text in ("48 pairs; dropped 0", "value head: newly", "critic saved: load it with"):
            assert printed.count(text) == 1  # only rank 0 prints
        assert "LOAD REPORT" not in printed
        lines = (output / "metrics.jsonl").read_text()
        speeds = [float(speed) for speed in re.findall('"pairs_per_second": ([^}]+)', lines)]
        assert len(speeds) == 12
        assert 0 < sum(16 / speed for speed in speeds) < seconds  # a step has 16 pairs
        return output

    return run


METRICS = "step epoch loss accuracy margin learning_rate grad_norm pairs_per_second"
MEANS = ("loss", "accuracy", "margin", "chosen_score", "rejected_score")


def read_metrics(output):
    """The lines of the steps, and those of the evaluations."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line.pop("pairs_per_second", None)]
    return steps, [line for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loop_two_ranks_train_and_save_at_every_stage(stage, trained, tokenizer):
    output = trained(2, stage)
    steps, evaluations = read_metrics(output)
    assert set(steps[0]) | {"pairs_per_second"} == set(METRICS.split())
    assert set(evaluations[0]) == {"step", "eval_pairs", *(f"eval_{name}" for name in MEANS)}
    assert [line["eval_pairs"] for line in evaluations] == [21] * 4
    assert [line["step"] for line in evaluations] == [0, 5, 10, 12]
    assert [line["step"] for line in steps] == list(range(1, 13))
    for line in steps:  # in float32 at ZeRO 0 DeepSpeed does not give the norm
        assert line["grad_norm"] > 0 if stage else line["grad_norm"] is None
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    # An evaluation is the same on one rank, and as computed here with the saved critic.
    its_steps, (first, *_) = read_metrics(trained(1, 0))
    assert evaluations[0] == pytest.approx(first, abs=1e-5)
    assert steps[0]["loss"] == pytest.approx(its_steps[0]["loss"], rel=0.2)  # dropout differs
    losses = [line["loss"] for line in read_metrics(trained(2, 0))[0]]
    assert [line["loss"] for line in steps] == pytest.approx(losses, abs=1e-4)
    assert read_critic(output).PAD_ID == len(tokenizer)  # new, since the base's PAD is EOS
    expected = reference_evaluation(read_critic(output), encode(make_pairs(21, seed=1), tokenizer))
    assert evaluated(evaluations[-1]) == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory):
    """The README's first command on two ranks, offline, in float32."""
    folder = tmp_path_factory.mktemp("demonstration")
    port = next(PORTS)
    config = write_ds_config(folder / "ds.json", 1, train_micro_batch_size_per_gpu=8)
    command = f"{Path(sys.executable).parent}/deepspeed --num_accelerators 2 --master_port {port} "
    command += f"{HERE}/train_reward.py --output_dir {folder}/output --deepspeed_config {config}"
    subprocess.run(command.split(), env=os.environ | ENVIRONMENT, check=True, timeout=600)
    for file in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):  # 66 MB of DeepSpeed's CPU op
        file.unlink()
    return folder / "output"


def test_loop_the_demonstration_learns(demonstration):
    first, *_, last = read_metrics(demonstration)[1]
    assert 0.6 < first["eval_loss"] < 0.8
    assert last["eval_loss"] < 0.2
    assert last["eval_accuracy"] >= 0.9


def test_loop_the_demonstrations_files_are_always_the_same(demonstration, loop, tmp_path):
    loop.demonstration(tmp_path)
    files = [path.name for path in tmp_path.iterdir()]
    assert {"model.safetensors", "manual.jsonl"} < set(files)
    for name in files:
        assert (tmp_path / name).read_bytes() == (demonstration / "demo" / name).read_bytes()


def test_loop_only_rank_0_draws_a_progress_bar(loop, monkeypatch):
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        assert loop.progress([]).disable == (rank > 0)


# ---- the loop, beside a plain one ----


def encode(rows, tokenizer, max_seq_len=64):
    """[prompt, chosen ids, rejected ids] of rows that are short enough."""
    pairs = []
    for row in rows:
        texts = [row["prompt"] + row[side] + " <eos>" for side in SIDES]
        ids = tokenizer(texts)["input_ids"]
        if max(map(len, ids)) <= max_seq_len:
            pairs.append([row["prompt"], *ids])
    return pairs


def batch_of(pairs):
    return pad_rows([pair[1] for pair in pairs] + [pair[2] for pair in pairs])


@torch.no_grad()
def reference_evaluation(model, pairs):
    """The means of a plain loop over pairs."""
    values = []
    for pair in pairs:
        loss, chosen, rejected = map(float, model.eval()(*batch_of([pair])).values())
        values.append([loss, chosen > rejected, chosen - rejected, chosen, rejected])
    return torch.tensor(values, dtype=torch.float64).mean(0).tolist()


def evaluated(line):
    """The same of a line of metrics.jsonl."""
    return [line[f"eval_{name}"] for name in MEANS]


def reference_rate(step, steps, warmup):
    """WarmupCosineLR after a step, as a share of the learning rate: both minima are 0.1."""
    if step <= warmup:
        return 0.1 + 0.9 * math.log(step) / math.log(warmup)
    progress = min(1, (step - warmup) / (steps - warmup))
    return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2


def reference_steps(model, pairs, epochs, seed, rate):
    """Each step's METRICS, without the last, of a plain loop with one batch of 8 per step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0, betas=(0.9, 0.95), weight_decay=0)
    model.train()
    epoch_steps = len(pairs) // 8
    step_rate = 0.0  # DeepSpeed's, of the first step
    for epoch in range(epochs):
        shuffled = random.Random(seed + epoch).sample(pairs, len(pairs))
        for at in range(epoch_steps):
            step = epoch * epoch_steps + at + 1
            optimizer.zero_grad()
            loss, chosen, rejected = model(*batch_of(shuffled[8 * at :][:8])).values()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            means = [loss, (chosen > rejected).float().mean(), (chosen - rejected).mean()]
            yield [step, step / epoch_steps, *map(float, means), step_rate, float(norm)]
            step_rate = rate * reference_rate(step, epochs * epoch_steps, 3)
            optimizer.param_groups[0]["lr"] = step_rate


def long_row(chosen, rejected):
    """The texts have this many tokens, with EOS."""
    texts = [" w6" * (count - 3) for count in (chosen, rejected)]
    return row(*texts, prompt=f"w{chosen} w{rejected}")


FLAGS = "--num_train_epochs 4 --seed 7 --max_seq_len 16 --loss_on end --no-compute_fp32_loss "
FLAGS += "--learning_rate 0.01 --dropout 0 --gradient_checkpointing --eval_interval 3 "
FLAGS += "--save_interval 2 "
# (ranks, ZeRO stage, flags, their meaning, steps with an evaluation, checkpoints)
DEFAULTS = (2, 1, "", (1, 1234, 512, "tokens", 1e-4), [0, 3], [])
OTHERS = (1, 0, FLAGS, (4, 7, 16, "end", 0.01), [0, 3, 6, 9, 12], [10, 12])


@pytest.mark.parametrize(("ranks", "stage", "flags", "meaning", "at", "saved"), [DEFAULTS, OTHERS])
def test_loop_equals_a_plain_loop(ranks, stage, flags, meaning, at, saved, tokenizer, tmp_path):
    """Without flags, also the held-out tenth of the prompts. With them, a monitor, and "auto" where
    it is allowed. One text is as long as allowed, another has a token more."""
    from hashlib import sha256

    epochs, seed, max_seq_len, loss_on, rate = meaning
    base = write_base(tmp_path / "base", "llama", tokenizer, max_position_embeddings=512)
    edit(tmp_path / "base" / "config.json", attention_dropout=int("--dropout 0" in flags))
    rows = [*make_pairs(28), long_row(max_seq_len, 9), long_row(9, max_seq_len + 1)]
    rows.append(row(" w1", " w1", prompt="w2"))
    train = [pair for pair in encode(rows, tokenizer, max_seq_len) if pair[1] != pair[2]]
    if flags:
        held_out = [*make_pairs(9, seed=1), long_row(9, max_seq_len), long_row(max_seq_len + 1, 9)]
        flags += f"--eval_path {write_rows(tmp_path / 'eval.jsonl.gz', held_out)}"
        held_out = encode(held_out, tokenizer, max_seq_len)
    else:
        held_out = sorted(train, key=lambda pair: sha256(pair[0].encode()).digest())[::10]
        train = [pair for pair in train if pair not in held_out]
    config = make_ds_config(stage, gradient_accumulation_steps=2 // ranks, gradient_clipping=0.2)
    config["zero_optimization"]["stage3_max_live_parameters"] = "auto"
    config["scheduler"]["params"]["warmup_num_steps"] = 3
    csv = {"enabled": True, "output_path": str(tmp_path), "job_name": "csv"}
    (tmp_path / "ds.json").write_text(json.dumps(config | {"csv_monitor": csv}))
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.jsonl").touch()  # what a run that failed before its first step leaves
    data = write_rows(tmp_path / "train.jsonl.gz", rows)
    printed = run_ranks(
        f"--model_name_or_path {base} --data_path {data} --output_dir {output} "
        f"--deepspeed_config {tmp_path}/ds.json {flags}",
        ranks=ranks,
    )
    assert f"29 pairs; dropped 2 that are identical or longer than {max_seq_len} tok" in printed
    torch.manual_seed(seed)
    model = create_critic_model(base, tokenizer, dropout=0, loss_on=loss_on)
    before = reference_evaluation(model, held_out)
    expected = list(reference_steps(model, train, epochs, seed, rate))
    after = reference_evaluation(model, held_out)
    steps, evaluations = read_metrics(output)
    assert [line["step"] for line in evaluations] == at
    assert {line["eval_pairs"] for line in evaluations} == {len(held_out)}
    assert evaluated(evaluations[0]) == pytest.approx(before, abs=1e-5)
    assert evaluated(evaluations[-1]) == pytest.approx(after, abs=2e-4)
    for line, numbers in zip(steps, expected, strict=True):
        if stage == 0:  # DeepSpeed gives no norm
            numbers.pop()
            assert line["grad_norm"] is None
        found = [line[name] for name in METRICS.split()[: len(numbers)]]
        assert found == pytest.approx(numbers, rel=1e-3)
    names = sorted(path.name for path in output.glob("checkpoints/*"))
    assert names == [f"step-{step:09d}" for step in saved]
    text = (tmp_path / "csv" / "Train_loss.csv").read_text()
    assert text.split() == ["step,loss", *(f"{line['step']},{line['loss']}" for line in steps)]
    assert (tmp_path / "csv" / "Train_grad_norm.csv").exists() == (stage > 0)


# (ranks, pairs, precision, flags). The rounding of a bf16 head is seen on one pair.
EVALUATIONS = [(1, 21, {}, ""), (2, 21, {}, "--loss_on end")]
EVALUATIONS += [(1, 1, BF16, ""), (1, 1, BF16, "--no-compute_fp32_loss")]


@pytest.mark.parametrize(("ranks", "count", "precision", "flags"), EVALUATIONS)
def test_loop_evaluation_equals_a_plain_loop(ranks, count, precision, flags, tokenizer, tmp_path):
    """Of a saved critic, whose config has dropout, without an optimizer."""
    saved = tmp_path / "critic"
    save_critic_model(make_model("llama", tokenizer, dropout=0.5), tokenizer, saved)
    rows = make_pairs(count)
    data = write_rows(tmp_path / "eval.jsonl.gz", rows)
    config = write_ds_config(tmp_path / "ds.json", optimizer=None, scheduler=None, **precision)
    run_ranks(
        f"--model_name_or_path {saved} --eval_path {data} --output_dir {tmp_path}/out "
        f"--deepspeed_config {config} --max_seq_len 64 --learning_rate 1 {flags}",
        ranks=ranks,
    )
    options = {"loss_on": "end" if "end" in flags else "tokens", "rlhf_training": True}
    options["compute_fp32_loss"] = "--no" not in flags
    model = create_critic_model(saved, tokenizer, precision, **options)
    expected = reference_evaluation(model, encode(rows, tokenizer))
    _, [line] = read_metrics(tmp_path / "out")
    assert evaluated(line) == pytest.approx(expected, rel=1e-5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.jsonl"]


def train_and_print_losses():
    ranking_loss = critic.ranking_loss

    def print_loss(rewards, *others):
        loss, scores = ranking_loss(rewards, *others)
        kind = "training" if rewards.requires_grad else "evaluation"
        print(f"\n{kind} loss: {loss.item()}", flush=True)
        return loss, scores

    critic.ranking_loss = print_loss
    train()


def test_loop_dropout_differs_between_ranks_and_steps(training, tmp_path):
    """And there is none in an evaluation, nor a gradient. All pairs are equal, the rate is 0."""
    rows = write_rows(tmp_path / "rows.jsonl.gz", make_pairs(1) * 16)
    arguments = training(tmp_path / "out", accumulation=1) + (
        f"--data_path {rows} --eval_path {rows} --dropout 0.5 --num_train_epochs 1 "
        "--learning_rate 0 --eval_interval 1"
    )
    printed = run_ranks(arguments, main=train_and_print_losses)
    losses = re.findall("training loss: (.*)", printed)
    assert len(losses) == len(set(losses)) == 2 * 2
    evaluations = re.findall("evaluation loss: (.*)", printed)
    assert len(evaluations) == 3 * 2 * 2  # of 2 batches per rank
    expected = read_metrics(tmp_path / "out")[1][0]["eval_loss"]
    assert list(map(float, evaluations)) == pytest.approx([expected] * 12, abs=1e-5)


def test_loop_recomputes_activations_with_gradient_checkpointing(loop, training, monkeypatch):
    attention = mock.Mock(wraps=critic.sdpa_attention_forward)
    monkeypatch.setattr(critic, "sdpa_attention_forward", attention)
    counts = [0]
    for flag in ("", "--gradient_checkpointing"):
        arguments = f"loop --model_name_or_path {training.folder}/base --data_path none {flag}"
        monkeypatch.setattr(sys, "argv", [*arguments.split(), "--max_seq_len=64"])
        model, _ = loop.load_model(loop.parse_args(), {})
        model(*pad_rows(random_rows(1)))["loss"].backward()
        counts.append(attention.call_count)
    assert counts[2] == 3 * counts[1] > 0


def train_in(folder):
    os.chdir(folder)
    train()


def test_loop_without_flags_uses_its_own_config_and_output(training, tokenizer, tmp_path):
    """ds_config.json, in bf16, with 8 pairs per step and its learning rate."""
    base = write_base(tmp_path / "base", "llama", tokenizer, max_position_embeddings=512)
    arguments = f"--model_name_or_path {base} --data_path {training.folder}/train.jsonl.gz"
    run_ranks(arguments, main=functools.partial(train_in, tmp_path), ranks=1)
    steps, evaluations = read_metrics(tmp_path / "output")
    assert [line["step"] for line in steps] == list(range(1, 43 // 8 + 1))
    assert evaluations[0]["eval_pairs"] == 5
    assert steps[1]["learning_rate"] == pytest.approx(1e-5)
    assert AutoConfig.from_pretrained(tmp_path / "output").dtype == torch.bfloat16


def train_in_fp16():
    """DeepSpeed does not know that torch computes fp16 on every CPU."""
    from deepspeed import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    train()


SEEKS_ITS_SCALE = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}


@pytest.mark.parametrize(("ranks", "stage", "precision"), [(1, 1, SEEKS_ITS_SCALE), (2, 3, BF16)])
def test_loop_trains_in_16_bits(ranks, stage, precision, training, tmp_path):
    """In fp16, the first steps overflow, until the loss scale is low enough."""
    arguments = training(tmp_path / "out", stage, 2 // ranks, **precision)
    run_ranks(arguments, main=train_in_fp16, ranks=ranks)
    steps, evaluations = read_metrics(tmp_path / "out")
    has_norm = [line["grad_norm"] is not None for line in steps]
    assert has_norm == sorted(has_norm)
    assert has_norm[0] == (precision is BF16)
    assert has_norm[5]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]


def test_loop_stops_if_a_static_loss_scale_overflows(training, tmp_path):
    fp16 = {"enabled": True, "loss_scale": 2**20}
    arguments = training(tmp_path / "out", 1, fp16=fp16)
    printed = run_ranks(arguments, main=train_in_fp16, ranks=1, code=1)
    assert "error: step 1: the gradient is not finite: check the data" in printed
    assert "last checkpoint: none, see --save_interval" in printed


# ---- the loop's data ----

TEMPLATE = (
    "<bos>{% if tools %}{{ tools | tojson }} {% endif %}{% for m in messages %}"
    "{% if 'robot' in m.role %}{{ raise_exception('role ' ~ m.role) }}{% endif %}"
    "{{ m.role[0] }}:{{ m.content if 'content' in m else m.tool_calls }};{% endfor %}END"
)
NEWLINE = "{{ '\\n' }}"


@pytest.fixture(scope="session")
def loop():
    import train_reward

    return train_reward


@pytest.fixture(scope="session")
def chat_tokenizer():
    """On bytes, so that it decodes to the exact text; with BOS, and a template that writes BOS."""
    from tokenizers import ByteLevelBPETokenizer, processors

    bpe = ByteLevelBPETokenizer()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    bpe.train_from_iterator(["How are you? Fine."] * 9, 400, special_tokens=list(special.values()))
    bpe._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $0", special_tokens=[("<bos>", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)
    tokenizer.chat_template = TEMPLATE.replace("END", "<eos>" + NEWLINE)
    return tokenizer


def set_special_tokens(tokenizer, special, monkeypatch):
    from tokenizers import processors

    tokens = [("<bos>", 2), ("<eos>", 1)]
    processor = processors.TemplateProcessing(single=special, special_tokens=tokens)
    monkeypatch.setattr(tokenizer.backend_tokenizer, "post_processor", processor)


@pytest.fixture
def read_pairs(loop, chat_tokenizer, tmp_path):
    """`read_pairs` of a file with these rows."""

    def read(rows, max_seq_len=512):
        path = write_rows(tmp_path / "rows.jsonl.gz", rows)
        return loop.read_pairs([str(path)], chat_tokenizer, max_seq_len)

    return read


def message(content, role="user", **others):
    return {"role": role, "content": content} | others


Q = [message("Q")]
YES = [message("yes", "assistant")]
NO = [message("no", "assistant")]
CALL = [message(None, "assistant", tool_calls=[{"at": None}])]
ANSWER = [message("42", "tool"), *YES]
TOOLS = [{"name": "look", "default": None}]
TOOLS_IN_JSON = json.dumps(TOOLS)
CALLED = """[{"name": "look"}] u:Q;a:[{}];t:42;a:yes;"""
WITH_TOOLS = f'{CALLED} > [{{"name": "look"}}] u:Q;a:no;'
# name: (row, texts between BOS and EOS)
ROWS = {
    "texts": (row(" yes", " no", prompt="Q:"), "Q: yes > Q: no"),
    "complete texts": (row("Q: yes", "Q: no", other=1), "Q: yes > Q: no"),
    "null": (row("Q: yes", "Q: no", prompt=None, ranked=None), "Q: yes > Q: no"),
    "odd text": (row("NUL \0", "\u05dd", prompt="\u200d"), "\u200dNUL \0 > \u200d\u05dd"),
    "ranked": ({"prompt": "Q", "ranked": ["1", "2", "3"]}, "Q1 > Q2, Q1 > Q3, Q2 > Q3"),
    "messages": (row(YES, NO, prompt=Q), "u:Q;a:yes; > u:Q;a:no;"),
    "complete dialogues": (row(Q + YES, Q + NO), "u:Q;a:yes; > u:Q;a:no;"),
    "ranked messages": ({"prompt": Q, "ranked": [YES, NO]}, "u:Q;a:yes; > u:Q;a:no;"),
    "tools": (row(CALL + ANSWER, NO, prompt=Q, tools=TOOLS), WITH_TOOLS),
    "tools in JSON": (row(CALL + ANSWER, NO, prompt=Q, tools=TOOLS_IN_JSON), WITH_TOOLS),
    "a repeated prompt": (row("Q: yes", " no", prompt="Q:"), "Q:Q: yes > Q: no"),
    "written EOS": (row(" yes<eos>", " no<eos><eos>", prompt="Q:"), "Q: yes > Q: no"),
    "written BOS": (row("<bos>Q: yes", "<bos>Q: no<eos>"), "Q: yes > Q: no"),
    "BOS in a prompt": (row(" yes", " no", prompt="<bos>Q:"), "Q: yes > Q: no"),
}


def tokens_of(pair):
    return [pair.chosen.tolist(), pair.rejected.tolist()]


@pytest.mark.parametrize("special", ["<bos> $0", "<bos> $0 <eos>"])
@pytest.mark.parametrize("form", ROWS)
def test_loop_every_form_of_a_row(form, special, read_pairs, chat_tokenizer, monkeypatch):
    """The texts in full, between one BOS and one EOS, with a template's newline, also if the
    tokenizer appends EOS itself."""
    set_special_tokens(chat_tokenizer, special, monkeypatch)
    given, expected = ROWS[form]
    end = "<eos>\n" if ":Q;" in expected else "<eos>"
    pairs = read_pairs([given])
    texts = [chat_tokenizer.batch_decode(tokens_of(pair)) for pair in pairs]
    pairs_expected = [pair.split(" > ") for pair in expected.split(", ")]
    assert texts == [[f"<bos>{text}{end}" for text in pair] for pair in pairs_expected]
    assert len({pair.prompt for pair in pairs}) == 1


def test_loop_many_rows_are_read_as_each_by_itself(read_pairs):
    """More than are tokenized at once, and all forms in turn."""
    rows = [row(f"yes {number}", "no", prompt="Q") for number in range(1001)]
    rows += [given for given, _ in ROWS.values()]
    assert read_pairs(rows) == [pair for given in rows for pair in read_pairs([given])]


@pytest.mark.parametrize("end", ["<eos>", "<eos>" + NEWLINE, NEWLINE, ""])
def test_loop_trains_what_the_template_renders(end, read_pairs, chat_tokenizer, monkeypatch):
    """As clients score it: ChatML's templates write a newline after EOS, Gemma's no EOS."""
    monkeypatch.setattr(chat_tokenizer, "chat_template", TEMPLATE.replace("END", end))
    texts = [chat_tokenizer.apply_chat_template(Q + turn, tokenize=False) for turn in (YES, NO)]
    (pair,) = read_pairs([row(YES, NO, prompt=Q)])
    assert tokens_of(pair) == chat_tokenizer(texts, add_special_tokens=False)["input_ids"]
    both = len(pair.chosen) + len(pair.rejected)
    assert pair.tokens == both - len(os.path.commonprefix(tokens_of(pair)))


HH = "\n\nHuman: Q\n\nAssistant:"
TOLD = message("42", "tool")
TALK_R = [*Q, *YES, message("R")]
GROUPS = [  # rows of one prompt
    [row("Q\nA: 1", "Q\nA: 2"), row("A: 3", "A: 4", prompt="Q\n")],
    [row("\n1", "\n2", prompt="R"), row("R\nyes", "R\nyet")],
    [
        row(f"{HH} 1", f"{HH} 2"),
        row(f"{HH} line\n3", f"{HH} line\n4"),
        row(f"{HH} 5\n\nHuman: R{HH} 6", f"{HH} 7"),
        row(" 8", " 9", prompt=HH),
        row(" 8", " 9", prompt=HH + " "),
        row("\n\nAssistant: 1", "\n\nAssistant: 2", prompt="\n\nHuman: Q"),
        {"ranked": [f"{HH} 1", f"{HH} 2", f"{HH} 3"]},
    ],
    [row(f"{HH} 1{HH} 2", f"{HH} 1{HH} 3"), row(" 4", " 5", prompt=f"{HH} 1{HH}")],
    [
        ROWS["messages"][0],
        ROWS["complete dialogues"][0],
        ROWS["ranked messages"][0],
        row([*Q, *CALL, TOLD, *YES], [*Q, *CALL, TOLD, *NO]),
        row([*Q, *YES, *YES], [*Q, *YES, *NO]),
        row(YES, NO, prompt=[*Q, *CALL, TOLD]),
        row(YES, NO, prompt=[{"content": "Q", "role": "user"}]),
    ],
    [row(YES, NO, prompt=TALK_R), row([*TALK_R, *NO], [*TALK_R, *YES])],
    [row(YES, NO, prompt=[message("R")])],
    [row(YES, [message("R"), *NO])],
]
# What stands between a prompt and the response in the texts of well-known models.
TAGS = ["\n\nAssistant:", "\nAssistant:", "\nA:", "<|assistant|>", "<|im_start|>assistant"]
TAGS += ["<start_of_turn>model", "### Response:", "[/INST]"]


def test_loop_finds_the_pairs_of_a_prompt(read_pairs):
    groups = list(GROUPS)
    for number, tag in enumerate(TAGS):
        text = f"{number} ?{tag}"
        groups.append([row(f"{text} a", f"{text} b"), row("c", "d", prompt=text)])
        groups[-1].append(row(f"{tag} e", f"{tag} f", prompt=f"{number} ?"))
    prompts = [{pair.prompt for pair in read_pairs(group)} for group in groups]
    assert [len(found) for found in prompts] == [1] * len(groups)
    assert len(set.union(*prompts)) == len(groups)


def test_loop_counts_what_is_dropped_and_what_has_no_prompt(read_pairs, capsys):
    """Here the prompt is under another key."""
    rows = [row(f"{n} yes", "no", question=f"Q{n}") for n in range(600)]
    rows += [row("yes", "yes"), row("a" * 600, "no", prompt="Q"), row("yes", "no", prompt="Q")]
    pairs = read_pairs(rows, 256)
    assert len(pairs) == len({pair.prompt for pair in pairs}) == 601
    printed = capsys.readouterr().out
    assert "601 pairs; dropped 2 that are identical or longer than 256 tokens" in printed
    assert "600 rows have no prompt or common prefix" in printed
    read_pairs([row("Q yes", "no", prompt="Q"), row(Q + YES, NO, prompt=Q), row("Q", "R")])
    assert "2 have a response that begins with the prompt" in capsys.readouterr().out


def draw_ids(rng, mean):
    return array("i", rng.choices(range(3, 90), k=1 + int(mean * rng.lognormvariate(-0.3, 0.8))))


def draw_pairs(loop, count, per_prompt, seed=0):
    """Pairs of random lengths; the prompt's number is their first token."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        prompt = number // per_prompt
        if number % per_prompt == 0:
            shared = array("i", [prompt]) + draw_ids(rng, 60)
        chosen = shared + array("i", [2 * number]) + draw_ids(rng, 30)
        rejected = shared + array("i", [2 * number + 1]) + draw_ids(rng, 30)
        tokens = len(chosen) + len(rejected) - len(shared)
        pairs.append(loop.Pair(prompt, chosen, rejected, tokens))
    return pairs


@pytest.mark.parametrize(("ranks", "per_prompt"), [(2, 1), (4, 3), (8, 2)])
def test_loop_dealing_is_complete_and_reproducible_and_balances(ranks, per_prompt, loop):
    """The fullest rank holds fewer tokens than if pairs were dealt in their order."""
    fullest = 0
    fullest_in_order = 0
    for seed in range(20):
        pairs = draw_pairs(loop, 8 * ranks, per_prompt, seed)
        dealt = loop.deal(pairs, ranks)
        assert dealt == loop.deal(list(pairs), ranks)
        assert [len(part) for part in dealt] == [8] * ranks
        assert sorted(itertools.chain(*dealt)) == sorted(pairs)
        fullest += max(sum(pair.tokens for pair in part) for part in dealt)
        in_order = [pairs[at : at + 8] for at in range(0, 8 * ranks, 8)]
        fullest_in_order += max(sum(pair.tokens for pair in part) for part in in_order)
    assert fullest < fullest_in_order


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        # Prompt 2's pairs fit only on the rank that has more tokens; then, exactly.
        ((0, 1, 1, 1, 2, 2, 3, 4), [[0, 2, 2, 4], [1, 1, 1, 3]]),
        ((0, 1, 1, 2, 2, 3), [[0, 2, 2], [1, 1, 3]]),
    ],
)
def test_loop_dealing_keeps_a_prompt_together(prompts, expected, loop):
    pairs = []
    for prompt in prompts:
        chosen = array("i", range(200 // (1 + 3 * prompt)))
        pairs.append(loop.Pair(prompt, chosen, array("i", [99]), len(chosen) + 1))
    assert [[pair.prompt for pair in part] for part in loop.deal(pairs, 2)] == expected


def test_loop_shuffles_prompts_and_keeps_their_pairs_together(loop):
    pairs = draw_pairs(loop, 40, 2)
    orders = [loop.shuffle_prompts(pairs, seed) for seed in (0, 0, 1)]
    prompts = [[pair.prompt for pair in order] for order in orders]
    assert prompts[0] == prompts[1] != prompts[2]
    for order in prompts:
        assert order[::2] == order[1::2]
        assert sorted(order[::2]) == list(range(20))


def test_loop_batches_of_each_rank(loop, monkeypatch):
    """16 pairs on 2 ranks in micro-batches of 4."""
    pairs = draw_pairs(loop, 16, 2)
    engine = mock.Mock()
    engine.train_micro_batch_size_per_gpu.return_value = 4
    monkeypatch.setattr(loop.dist, "get_world_size", lambda: 2)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(loop.dist, "get_rank", mock.Mock(return_value=rank))
        batches = list(loop.batches_of_rank(pairs, engine, PAD))
        assert [len(batch["input_ids"]) for batch in batches] == [8, 8]
        for ids, mask in (batch.values() for batch in batches):
            rows = [row[bits == 1].tolist() for row, bits in zip(ids, mask)]
            assert not ids[mask == 0].any()
            found += zip(rows[:4], rows[4:])
    expected = [(pair.chosen.tolist(), pair.rejected.tolist()) for pair in pairs]
    assert sorted(found) == sorted(expected)


def test_loop_holds_out_the_same_tenth_of_the_prompts_in_every_process(
    loop, chat_tokenizer, tmp_path
):
    prompts = [f"Q{number}" for number in range(60)]
    rows = [row("yes", side, prompt=prompt) for side in SIDES for prompt in prompts]
    paths = [str(write_rows(tmp_path / "rows.jsonl.gz", rows))]
    args = mock.Mock(data_path=paths, eval_path=None, max_seq_len=64)
    found = []
    for part in loop.read_data(args, chat_tokenizer):
        texts = chat_tokenizer.batch_decode([pair.chosen.tolist() for pair in part])
        found.append([text.removeprefix("<bos>").split("yes")[0] for text in texts])
    held_out = ["Q15", "Q35", "Q38", "Q46", "Q56", "Q59"]
    assert found[1] == held_out * 2
    assert found[0] == [prompt for prompt in prompts if prompt not in held_out] * 2


def test_loop_a_fingerprint_has_every_file(loop, monkeypatch, tmp_path):
    """By content and by role, not by name: the last two are equal."""
    monkeypatch.setattr(loop.dist, "get_world_size", lambda: 1)
    for name in "abcA":
        (tmp_path / name).write_text(name.lower())
    found = []
    for data, held_out in ("a", ""), ("b", "a"), ("ac", "b"), ("a", "bc"), ("a", "b"), ("A", "b"):
        paths = [[tmp_path / name for name in names] for names in (data, held_out)]
        args = mock.Mock(data_path=paths[0], eval_path=paths[1] or None)
        settings = loop.fingerprint(args, {})
        found.append([settings["data_path"], settings["eval_path"]])
    assert [found.index(files) for files in found] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("stage", [1, 3])
def test_loop_without_data_evaluates_all_pairs(stage, training, tokenizer, tmp_path):
    """A head of zeros, where all are ties; 5 pairs on two ranks, of which one has none in the last
    batch. PAD is EOS and the vocabulary full, as in many a reward model."""
    full = longer_by(8, tokenizer)
    full.pad_token = full.eos_token
    model = make_model("llama", full)
    torch.nn.init.zeros_(model.v_head.weight)
    save_critic_model(model, full, tmp_path / "flat")
    rows = write_rows(tmp_path / "eval.jsonl.gz", make_pairs(5))
    config = write_ds_config(tmp_path / "ds.json", stage, train_micro_batch_size_per_gpu=1)
    arguments = f"--model_name_or_path {tmp_path}/flat --eval_path {rows} --max_seq_len 64 "
    printed = run_ranks(f"{arguments} --output_dir {tmp_path}/out --deepspeed_config {config}")
    assert printed.count("flat: value head: from the checkpoint; weights that are not used: 0") == 1
    assert printed.count("eval.jsonl.gz']: 5 pairs; dropped 0") == 1
    steps, [found] = read_metrics(tmp_path / "out")
    assert (steps, found["step"], found["eval_accuracy"]) == ([], 0, 0.5)
    assert found["eval_pairs"] == 5
    assert not (tmp_path / "out" / "config.json").exists()


def test_loop_trains_a_reward_model_further(trained, training, tmp_path):
    arguments = training(tmp_path / "out") + f"--model_name_or_path {trained(1, 0)}"
    run_ranks(arguments, ranks=1)
    before = read_metrics(trained(1, 0))[1][-1]["eval_loss"]
    after = read_metrics(tmp_path / "out")[1]
    assert after[0]["eval_loss"] == pytest.approx(before, abs=1e-6)
    assert after[-1]["eval_loss"] < before


# ---- ZeRO, FSDP, and step 3, on two ranks ----


def make_engine(folder, stage, **overrides):
    import deepspeed

    deepspeed.init_distributed()
    config = make_ds_config(stage, scheduler=None, **overrides)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = create_critic_model(folder, tokenizer, config, rlhf_training=True, zero_stage=stage)
    assert stage < 3 or not any(parameter.numel() for parameter in model.parameters())
    return deepspeed.initialize(model=model, config=config)[0], tokenizer


def ppo_step(folder):
    """A trainable critic and a frozen reward model; then the critic is saved."""
    batch = pad_rows(random_rows(1), side="left")
    engine, tokenizer = make_engine(folder, 3)
    reward_model, _ = make_engine(folder, 3, optimizer=None)
    with torch.no_grad():
        before = reward_model.module.forward_value(*batch)
        same(before, read_critic(folder).forward_value(*batch), "loaded")
    values = engine.module.forward_value(*batch)["values"]
    same(values, before["values"], "trainable")
    engine.backward((values - before["values"] - 1).square().mean())
    engine.step()
    save_critic_model(engine, tokenizer, f"{folder}/saved")
    assert not any(value.numel() for value in engine.parameters())  # partitioned again
    with torch.no_grad():
        same(reward_model.module.forward_value(*batch), before, "frozen")
        after = engine.module.forward_value(*batch)
        same(after, read_critic(f"{folder}/saved").forward_value(*batch), "saved")
    assert (after["values"] - before["values"]).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_loop_step_3_at_zero_3(name, tokenizer, tmp_path):
    """Mixtral's experts are separate in a checkpoint; DeepSeek-V3 has a buffer in it."""
    model = make_model(name, tokenizer)
    for key, buffer in model.named_buffers():
        if "e_score" in key:
            buffer += torch.randn_like(buffer)
    folder = tmp_path / "critic"
    if name == "llama":  # DeepSpeedExamples #429
        write_deepspeed_chat(folder, model)
        tokenizer.save_pretrained(folder)
    else:
        save_critic_model(model, tokenizer, folder)
    run_ranks(main=functools.partial(ppo_step, str(folder)))


def save_under_fsdp(folder):
    """Also: only the group that waits for rank 0's disk waits longer than DeepSpeed's default."""
    from deepspeed.constants import default_pg_timeout
    from torch.distributed.fsdp import fully_shard

    import train_reward

    train_reward.start_ranks()
    model = read_critic(folder)
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    model(*pad_rows(random_rows(1)))["loss"].backward()
    save_critic_model(model, AutoTokenizer.from_pretrained(folder), f"{folder}/saved")
    assert_same_weights(read_critic(f"{folder}/saved"), read_critic(folder))
    world = torch.distributed.group.WORLD
    groups = (world, critic.patient_group(world))
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    hours = [backend.options._timeout.total_seconds() / 3600 for backend in backends]
    assert hours == [default_pg_timeout.total_seconds() / 3600, 6]


def test_loop_fsdp_saves_the_same_weights(tokenizer, tmp_path):
    save_critic_model(make_model("llama", tokenizer), tokenizer, tmp_path)
    run_ranks(main=functools.partial(save_under_fsdp, str(tmp_path)))


def wait_for_rank_0():
    """The other ranks wait for it longer than the default group's timeout."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=3))
    assert critic.on_rank_0(slowly, 5) == 5
    with pytest.raises(KeyError, match="of rank 0"):
        critic.on_rank_0(fails_on_rank_0)
    calls = []
    critic.on_rank_0(calls.append, "a call")
    assert len(calls) == 1 - torch.distributed.get_rank()
    state = {"weight": torch.ones(3)}
    gathered = critic.gather_on_rank_0(state)
    assert list(gathered) == [["weight"], []][torch.distributed.get_rank()]  # 140 GB, once


def slowly(seconds):
    time.sleep(seconds)
    return seconds


def fails_on_rank_0():
    raise KeyError("of rank 0")


def test_loop_ranks_wait_for_rank_0_and_have_its_result_or_error():
    run_ranks(main=wait_for_rank_0)


def as_deepspeed_chat(base, folder):
    """Every call in the form of its step 2, its `save_hf_format`, its RLHF engine and PPO."""
    import deepspeed

    deepspeed.init_distributed()
    ds_config = make_ds_config(scheduler=None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    options = {"dropout": None, "zero_stage": 0, "compute_fp32_loss": False}
    step2 = create_critic_model(base, tokenizer, ds_config, 1, **options)
    step2.gradient_checkpointing_enable()
    engine, *_ = deepspeed.initialize(model=step2, config=ds_config, dist_init_required=True)
    ids, mask = pad_rows(random_rows(1), extra=0)
    batch = {"input_ids": ids, "attention_mask": mask}
    engine.train()
    output = engine(**batch, use_cache=False)
    same(output["loss"], engine(**batch)["loss"])
    engine.backward(output["loss"])
    engine.step()
    model = engine.module if hasattr(engine, "module") else engine
    torch.save(model.state_dict(), f"{folder}/pytorch_model.bin")
    model.config.to_json_file(f"{folder}/config.json")

    step3 = create_critic_model(
        model_name_or_path=folder,
        tokenizer=tokenizer,
        ds_config=ds_config,
        num_padding_at_beginning=1,
        rlhf_training=True,
        dropout=0.0,
        zero_stage=0,
        compute_fp32_loss=False,
    )
    engine, *_ = deepspeed.initialize(model=step3, config=ds_config)
    engine.gradient_checkpointing_enable()
    engine.eval()
    assert_same_weights(step3, step2)
    values = engine.forward_value(ids, mask, prompt_length=2)["values"].detach()
    assert torch.equal(engine.forward_value(ids, mask, return_value_only=True), values)
    engine.train()
    found = engine.forward_value(**batch, return_value_only=True, use_cache=False)[:, :-1]
    same(found, values[:, :-1])
    engine.backward((found - 1).square().mean())
    engine.step()
    engine.eval()
    assert not torch.equal(engine.forward_value(ids, mask)["values"], values)


def test_loop_deepspeed_chats_own_calls(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "opt", tokenizer)
    (tmp_path / "step2").mkdir()
    main = functools.partial(as_deepspeed_chat, base, str(tmp_path / "step2"))
    run_ranks(main=main, ranks=1)


def test_loop_without_a_launcher_is_one_process(training, tmp_path):
    run_ranks(training(tmp_path / "out", 1, 4), ranks=None)
    assert len(read_metrics(tmp_path / "out")[0]) == 12


@pytest.mark.parametrize("tasks", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_loop_several_tasks_without_rank_are_an_error(tasks, loop, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv(tasks, "2")
    with pytest.raises(
        SystemExit, match=f"several tasks .{tasks}. without RANK: run srun torchrun"
    ):
        loop.start_ranks()


def run_block(block, folder, demonstration):
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    if not Path("output").exists():
        Path("output").symlink_to(demonstration)
    exec(block, {})  # noqa: S102


def run_blocks(blocks, folder, demonstration):
    """In order, and each alone."""
    for number, block in enumerate(blocks):
        run_block(block, folder / "in-order", demonstration)
        run_block(block, folder / str(number), demonstration)
    assert read_critic(folder / "in-order" / "merged")(IDS)["loss"].isfinite()


def test_loop_the_readmes_python_runs_as_printed(demonstration, tmp_path):
    """Steps 2 and 3, and LoRA; the folder `output` is the demonstration's."""
    pytest.importorskip("peft")
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    main = functools.partial(run_blocks, blocks, tmp_path, demonstration)
    run_ranks(main=main, ranks=None)


def test_loop_the_readmes_memory_is_right():
    """2 bytes of weights, 2 of gradients and 12 of AdamW per parameter, at ZeRO 1, 2, 3."""
    gib = [size * 8e9 / 2**30 for size in (4 + 12 / 8, 2 + 14 / 8, 16 / 8)]
    assert f"on 8 GPUs take {' / '.join(f'{size:.0f}' for size in gib)} GiB" in README.read_text()


# ---- kills and faults ----

# when: (ZeRO stage, checkpoints that are left, module, function, call in which a rank is killed; of
# a negative number, after it)
DEATHS = {
    "after an evaluation and a checkpoint of one step": (0, "08 10", "train_reward", "log", 15),
    "before the first checkpoint": (1, "", "train_reward", "batches_of_rank", 2),
    "in the middle of a checkpoint": (3, "02 unfinished", "torch", "save", 3),
    "before a checkpoint is renamed": (2, "02 unfinished", "os", "replace", 2),
    "after that, before an older one is deleted": (2, "02 04 06", "os", "replace", -3),
}


def train_until_killed(module, name, last):
    module = importlib.import_module(module)
    function = getattr(module, name)
    calls = itertools.count(1)

    def call(*arguments, **options):
        number = next(calls)
        if number != last:
            result = function(*arguments, **options)
        if number == abs(last):
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, call)
    train()


@pytest.mark.parametrize("when", DEATHS)
def test_loop_a_killed_run_resumes_bitwise_identical(when, trained, training):
    """In float32, with dropout and accumulation."""
    stage, left, *death = DEATHS[when]
    output = training.folder / f"killed-{len(when)}"
    arguments = training(output, stage)
    printed = run_ranks(arguments, main=functools.partial(train_until_killed, *death), code=None)
    assert "killed" in printed
    checkpoints = output / "checkpoints"
    names = sorted(path.name.removeprefix("step-0000000") for path in checkpoints.glob("*/"))
    assert names == left.split()
    assert not (output / "model.safetensors").exists()
    run_ranks(arguments + "--resume")
    expected = trained(2, stage)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (output / file).read_bytes() == (expected / file).read_bytes(), file
    assert read_metrics(output) == read_metrics(expected)
    names = sorted(path.name for path in checkpoints.iterdir() if path.is_dir())
    assert names == ["step-000000010", "step-000000012"]


DIFFERENT = """model_name_or_path data_path eval_path seed dropout loss_on compute_fp32_loss
max_seq_len num_train_epochs deepspeed_config"""


def test_loop_resume_of_another_run_is_an_error(trained, training, tokenizer, tmp_path):
    """It names what differs; the folder stays as it is."""
    output = trained(2, 0)
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    other = write_rows(tmp_path / "other.jsonl.gz", make_pairs()[::-1])
    arguments = training(output) + (
        f"--resume --data_path {other} --eval_path {other} --seed 1 --dropout 0 --loss_on end "
        "--no-compute_fp32_loss --max_seq_len 63 --num_train_epochs 5 "
        f"--model_name_or_path {write_base(tmp_path / 'other', 'llama', tokenizer)}"
    )
    config = write_ds_config(tmp_path / "ds.json", gradient_clipping=0.5)
    printed = run_ranks(f"{arguments} --deepspeed_config {config}", ranks=1, code=1)
    assert "checkpoints/step-000000012; if it cannot be read, delete it" in printed
    named = re.search("--resume: .(.*). changed since .*step-000000012: undo that", printed)[1]
    expected = [*DIFFERENT.split(), "number of ranks"]
    assert sorted(named.split(", ")) == sorted(map(repr, expected))
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*")}


def train_on_a_full_disk():
    """As if rank 0 had 50 kB left."""
    if os.environ["RANK"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    train()


@pytest.mark.parametrize("save_interval", [0, 2])
def test_loop_a_full_disk_ends_all_ranks(save_interval, training, tmp_path):
    """While the critic or a checkpoint is written. No rank hangs."""
    arguments = training(tmp_path / "out", 1) + f"--save_interval {save_interval}"
    printed = run_ranks(arguments, main=train_on_a_full_disk, code=None)
    assert "Traceback" in printed and "critic saved" not in printed
    assert save_interval or "closed by peer" not in printed  # each rank has rank 0's error
    assert not (tmp_path / "out" / "model.safetensors").exists()


def train_with_nan(what, bad_call, bad_rank):
    """The loss, or the gradient of the rewards, of one micro-batch of a rank is not finite."""
    ranking_loss = critic.ranking_loss
    calls = itertools.count(1)

    def spoil(value):
        return value * math.nan if next(calls) == bad_call else value

    def spoiled_loss(rewards, *others):
        loss, scores = ranking_loss(rewards, *others)
        if what == "gradient" and rewards.requires_grad:
            rewards.register_hook(spoil)
        if what == ("loss" if rewards.requires_grad else "held-out loss"):
            loss = spoil(loss)
        return loss, scores

    if int(os.environ["RANK"]) == bad_rank:
        critic.ranking_loss = spoiled_loss
    train()


# (what, step, number of the call that is spoiled: the second micro-batch of the step)
FAULTS = [("loss", 2, 4), ("gradient", 3, 6)]
PRECISIONS = [(1, {}, 1), (0, BF16, 1), (3, {}, 2)]


@pytest.mark.parametrize(("stage", "overrides", "ranks"), PRECISIONS)
@pytest.mark.parametrize(("what", "step", "call"), FAULTS)
def test_loop_stops_at_what_is_not_finite(
    what, step, call, stage, overrides, ranks, training, tmp_path
):
    """It happens on the last rank; all ranks stop, and nothing more is written."""
    main = functools.partial(train_with_nan, what, call, ranks - 1)
    arguments = training(tmp_path / "out", stage, **overrides) + "--save_interval 1"
    printed = run_ranks(arguments, main=main, ranks=ranks, code=1)
    assert printed.count(f"error: step {step}: the {what} is not finite: check the data") == ranks
    assert printed.count(f"out/checkpoints/step-00000000{step - 1}\n") == ranks
    assert len(read_metrics(tmp_path / "out")[0]) == step - 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def train_with_an_edited_critic():
    import train_reward

    train_reward.create_critic_model = mock.Mock(side_effect=KeyError("my_new_option"))
    train_reward.main()


def test_loop_errors_of_the_code_keep_their_traceback(training, tmp_path):
    arguments = training(tmp_path / "out")
    printed = run_ranks(arguments, main=train_with_an_edited_critic, ranks=1, code=1)
    assert re.search(r"Traceback.*\nKeyError: 'my_new_option'", printed, re.DOTALL)


def test_loop_stops_if_the_held_out_loss_is_not_finite(training, tmp_path):
    main = functools.partial(train_with_nan, "held-out loss", 2, 0)
    printed = run_ranks(training(tmp_path / "out"), main=main, ranks=1, code=1)
    fix = "check the data, or lower the learning rate; last checkpoint: none, see --save_interval"
    assert f"error: step 0: the held-out loss is not finite: {fix}" in printed
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == ""


def train_and_first(name, action):
    """Do something before each call of a function of the loop."""
    import train_reward

    function = getattr(train_reward, name)

    def call(*arguments):
        action()
        return function(*arguments)

    setattr(train_reward, name, call)
    train()


def wait_for_text(path):
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_loop_a_second_run_in_a_folder_leaves_the_first_alone(trained, training, tmp_path):
    """The first waits before its first step. The second could resume it, if it had ended."""
    from concurrent.futures import ThreadPoolExecutor

    output = training.folder / "busy"
    arguments = training(output, 0, 4)
    wait = functools.partial(wait_for_text, tmp_path / "go")
    main = functools.partial(train_and_first, "shuffle_prompts", wait)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run_ranks, arguments, main, 1)
        wait_for_text(output / "metrics.jsonl")
        try:
            printed = run_ranks(arguments + "--resume", ranks=1, code=1)
        finally:
            (tmp_path / "go").write_text("go")
        first.result()
    assert "metrics.jsonl: another run writes there: end it, or pass another" in printed
    assert read_metrics(output) == read_metrics(trained(1, 0))


def test_loop_does_not_write_over_a_run_that_has_just_ended(training, tmp_path):
    """It starts and ends while this one loads the model."""
    metrics = tmp_path / "out" / "metrics.jsonl"
    metrics.parent.mkdir()
    write = functools.partial(metrics.write_text, "{}")
    main = functools.partial(train_and_first, "load_model", write)
    printed = run_ranks(training(metrics.parent), main=main, ranks=1, code=1)
    assert "holds metrics.jsonl: pass another --output_dir" in printed
    assert metrics.read_text() == "{}"


def demonstrate_briefly():
    import train_reward

    train_reward.topics = {"words": " ".join(f"word{n}" for n in range(800))}
    train()


def test_loop_a_demo_resumes_or_replaces_an_earlier_one(tmp_path):
    """Each step is a line. The second run ends where the first did; the third starts anew."""
    output = tmp_path / "out"
    config = write_ds_config(tmp_path / "ds.json")
    arguments = f"--output_dir {output} --deepspeed_config {config} "
    found = []
    for flags in ("--save_interval 1", "--save_interval 1 --resume", "--seed 2"):
        run_ranks(arguments + flags, main=demonstrate_briefly, ranks=1)
        found.append((output / "metrics.jsonl").read_text().splitlines())
        assert (output / "checkpoints").exists() == ("save" in flags)
    first, resumed, replaced = found
    assert first == resumed
    assert len(replaced) == len(first) > 3
    assert not set(replaced) & set(first)


# ---- bad input ----

GOOD = row(" w4 w1", " w5 w2", prompt="w3")
TALK = [message("w3")]
FORMS = ':1: pass "chosen" and "rejected", or "ranked", with or without "prompt": all texts, or'
MANY = gzip.compress(b"\n".join(json.dumps(pair).encode() for pair in make_pairs(1500)))
BAD_ROWS = {  # name: (row, or bytes of the file, message)
    "no gzip": (b"{}\n", ":0: Not a gzipped file"),
    "broken UTF-8": (b'{"chosen": "\xff"}\n', ":1: .*utf-8"),
    "a lone surrogate": (b'{"chosen": "\\ud800 a", "rejected": "b"}\n', ":1: "),
    "broken JSON": (b"\n" * 6 + b"{,}\n", ":7: Expecting property name"),
    "gzip, cut off": (MANY[:-9], r":1499: .*ended before"),
    "gzip, a byte changed": (MANY[:10_000] + b"\xff" + MANY[10_001:], r":[1-9]\d*: "),
    "gzip, its header changed": (
        MANY[:10] + b"\xff" + MANY[11:],
        ":0: Error -3 while decompressing",
    ),
    "an empty list": (row([], TALK), FORMS),
    "JSON within JSON": (b"[" * 100_000, ":1: .*recursion"),
    "no object": ([1], FORMS),
    "a missing key": ({"chosen": "w4"}, FORMS),
    "an empty text": (GOOD | {"rejected": " "}, FORMS),
    "one ranked": ({"ranked": ["w4"]}, FORMS),
    "a ranked text": ({"ranked": "w4"}, FORMS),
    "only identical pairs": (row("w4", "w4"), "no pairs remain"),
    "ranked of two kinds": ({"ranked": ["w4", TALK]}, FORMS),
    "a text before messages": (row(TALK, TALK, prompt="w3"), FORMS),
    "a message without role": (row([{"content": "w3"}], TALK), FORMS),
    "a prompt without role": (row(TALK, TALK, prompt=[{}]), FORMS),
    "a long complaint": (row([message("w3", "robot " * 99)], TALK), ":1: role robot.{100,150}$"),
    "tools as a text": (row(TALK, TALK, tools="w3"), ":1: Expecting value"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_loop_bad_rows_are_named(case, loop, chat_tokenizer, tmp_path):
    content, expected = BAD_ROWS[case]
    path = tmp_path / ("rows.jsonl.gz" if "gzip" in case else "rows.jsonl")
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{expected}"):
        loop.read_pairs([str(path)], chat_tokenizer, 256)


# flags, added to others unless they begin with "only": message
BAD_FLAGS = {
    "--data_path {folder}/missing.jsonl": "error: .*missing.jsonl: no such file",
    "--model_name_or_path none --eval_path {folder}/none": "error: .*none: no such file",
    "--data_path {folder}/one.jsonl.gz": "0 training pairs give no step of 4: pass more",
    "--max_seq_len 300": "--max_seq_len is 300, but .* has 256 positions",
    "--model_name_or_path no/such-model": "--model_name_or_path no/such-model: no tokenizer: ",
    "--model_name_or_path {folder}/no-eos": "the tokenizer has no EOS token",
    "--num_train_epochs 0": "--num_train_epochs must be at least 1; to evaluate, omit --data_path",
    "--output_dir {folder}/used": "used holds metrics.jsonl: pass another --output_dir",
    "--output_dir {folder}/left": "left holds checkpoints: pass another --output_dir",
    "--output_dir {folder}/demonstrated --resume": "demonstrated holds demo: pass another --outp",
    "only --output_dir {folder}/used": "holds metrics.jsonl: pass another --output_dir(?!, or)",
    "only --output_dir {folder}/used --resume": "used holds metrics.jsonl: pass another --output",
    "--output_dir {folder}/base --resume": "base holds config.json: pass another --output_dir",
    "--deepspeed_config {folder}/missing.json": "missing.json",
    "--deepspeed_config {folder}/good.jsonl.gz": "good.jsonl.gz: 'utf-8' codec",
    "--deepspeed_config {folder}/broken": "broken: Expecting property name",
    "only --data_path {folder}/good.jsonl.gz": "give --model_name_or_path together with",
    "only --model_name_or_path {folder}/base": "give --model_name_or_path together with",
    "only --model_name_or_path x --eval_path y --resume": "--resume continues training: give",
    "only --model_name_or_path {folder}/base --eval_path {folder}/good.jsonl.gz --output_dir "
    "{folder}/out": "base does not match its config.json: .* a head is score.weight",
}
# name: (changes of ds_config.json, message). It is read before the model, which does not exist.
BAD_CONFIGS = {
    "no-optimizer": ({"optimizer": None}, '"optimizer" is missing, or its "type": add it, as'),
    "auto": ({"bf16": {"enabled": "auto"}}, r'"auto" at .*bf16.enabled.*: write a value'),
    "sizes": ({"train_batch_size": 7}, "train_batch_size"),
    "own-rate": ({"scheduler": {"type": "OneCycle"}}, "OneCycle sets its own: change its params"),
}
for name, (_, expected) in BAD_CONFIGS.items():
    flags = f"--model_name_or_path none --learning_rate 1 --deepspeed_config {{folder}}/{name}"
    BAD_FLAGS[flags] = f"error: --deepspeed_config .*/{name}: .*{expected}"


@pytest.fixture(scope="session")
def bad_input(tokenizer, tmp_path_factory):
    """A folder with what BAD_FLAGS name."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("base", "no-eos"):
        write_base(folder / name, "llama", tokenizer)
    edit(folder / "no-eos" / "tokenizer_config.json", eos_token=None)
    write_rows(folder / "good.jsonl.gz", make_pairs(24))
    write_rows(folder / "one.jsonl.gz", [GOOD])
    for name, (changes, _) in {"ds_config": ({}, ""), **BAD_CONFIGS}.items():
        write_ds_config(folder / name, **changes)
    (folder / "broken").write_text("{")
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text("{}")
    (folder / "left" / "checkpoints" / "step-000000002").mkdir(parents=True)
    (folder / "demonstrated" / "demo").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("words", BAD_FLAGS)
def test_loop_bad_input_is_one_line_and_changes_nothing(words, bad_input):
    usual = "--model_name_or_path {folder}/base --data_path {folder}/good.jsonl.gz "
    usual += "--output_dir {folder}/out --deepspeed_config {folder}/ds_config --max_seq_len 64 "
    arguments = words[5:] if words.startswith("only ") else usual + words
    before = sorted(bad_input.rglob("*"))
    printed = run_ranks(arguments.format(folder=bad_input), ranks=1, code=None)
    assert "train_reward.py: error: " in printed and "Traceback" not in printed, printed
    assert re.search(BAD_FLAGS[words], printed), printed
    assert sorted(bad_input.rglob("*")) == before
    assert (bad_input / "used" / "metrics.jsonl").read_text() == "{}"


# ---- the benchmark: python test_critic.py [--only long] ----

SIZES = {
    "long": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2}
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 16384},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 16384},
}


def make_benchmark_model(size, options):
    config = AutoConfig.for_model("llama", vocab_size=4096, **SIZES[size])
    with torch.device(options.device):
        backbone = AutoModel.from_config(config, dtype=getattr(torch, options.dtype))
    return RewardModel(backbone, argparse.Namespace(pad_token_id=0)).train()


def random_ids(rng, count):
    return [rng.randrange(10, 4096) for _ in range(count)]


def pairs_of_lengths(rng, count, prompt, response, spread):
    """Pairs of random tokens, whose lengths differ by up to `spread` from the given ones."""
    pairs = []
    for _ in range(count):
        shared = random_ids(rng, int(prompt * rng.uniform(1 - spread, 1 + spread)))
        lengths = [int(response * rng.uniform(1 - spread, 1 + spread)) for _ in SIDES]
        pairs.append([shared + [first] + random_ids(rng, n) for first, n in zip((8, 9), lengths)])
    return pairs


def as_batches(pairs, size):
    groups = [pairs[at : at + size] for at in range(0, len(pairs), size)]
    return [pad_rows([row for rows in zip(*group) for row in rows], extra=0) for group in groups]


def cases_of_dialogues(options):
    """{case: (loss_on or None for values, padded batches, the tree's batches)}."""
    rng = random.Random(0)
    pairs = pairs_of_lengths(rng, 3 * options.batch, 120, 58, 0.8)
    in_order = as_batches(pairs, options.batch)
    by_length = as_batches(sorted(pairs, key=lambda pair: len(max(pair, key=len))), options.batch)
    ranked = []
    for prompt in (random_ids(rng, 256), random_ids(rng, 256)):
        responses = [prompt + [20 + k] + random_ids(rng, 63) for k in range(4)]
        ranked += itertools.combinations(responses, 2)
    ranked = as_batches(ranked, 12)
    shared = random_ids(rng, 256)
    samples = [pad_rows([shared + random_ids(rng, 64) for _ in range(8)], extra=0)] * 3
    return {
        "pairs in random order": ("tokens", in_order, in_order),
        "the same, padded batches of like length": ("tokens", by_length, in_order),
        "all 6 pairs of 4 responses, 2 prompts": ("tokens", ranked, ranked),
        "8 samples of a prompt scored, no gradient": (None, samples, samples),
    }


def cases_of_long_rows(options):
    rng = random.Random(0)
    cases = {}
    for count, length, prompt in ((4, 2048, 128), (2, 4096, 128), (2, 8192, 128), (2, 8192, 6000)):
        shared = random_ids(rng, prompt)
        rows = [shared + random_ids(rng, length - prompt) for _ in range(count)]
        batches = [pad_rows(rows, extra=0)]
        cases[f"values, {count} rows of {length}, prompt {prompt}"] = ("values", batches, batches)
    for count, prompt, response, spread in (
        (4, 1000, 1000, 0.5),
        (2, 200, 3800, 0.3),
        (2, 3000, 1000, 0.3),
    ):
        batches = as_batches(pairs_of_lengths(rng, count, prompt, response, spread), count)
        for loss_on in ("end", "tokens"):
            name = f'{count} pairs, prompt {prompt}, responses {response}, "{loss_on}"'
            cases[name] = (loss_on, batches, batches)
    return cases


def seconds_of(model, what, batches):
    start = time.perf_counter()
    for batch in batches:
        model.zero_grad()
        if what is None:
            with torch.no_grad():
                model.forward_value(*batch)
        elif what == "values":
            model.forward_value(*batch, return_value_only=True).sum().backward()
        else:
            model(*batch)["loss"].backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def benchmark_steps(model, cases, options):
    """Print padded time / tree time, measured in turn after a warm-up."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"\n{parameters / 1e6:.0f}M parameters, {options.dtype}, {options.device}\n")
    print("| case | fewer tokens | padded time / tree time |\n| --- | --- | --- |")
    calls = counted(model)
    for name, (what, padded, shared) in cases.items():
        model.loss_on = what if what in ("tokens", "end") else "tokens"
        ratios = []
        tokens = {}
        for _ in range(options.repeats + 1):
            times = {}
            for share, batches in ((False, padded), (True, shared)):
                model.share_prefix = share
                calls.clear()
                times[share] = seconds_of(model, what, batches)
                tokens[share] = sum(calls)
            ratios.append(times[False] / times[True])
        fewer = tokens[False] / tokens[True]
        print(f"| {name} | {fewer:.1f}x | {statistics.median(ratios[1:]):.2f}x |", flush=True)


def benchmark_masks():
    """Print the GiB of all masks for 8 pairs of about 16k tokens, on a device without data."""
    print("\n| padded batch's mask, GiB | tree's masks, GiB |\n| --- | --- |")
    pairs = pairs_of_lengths(random.Random(0), 8, 12000, 4000, 0.05)
    [(ids, mask)] = as_batches(pairs, 8)
    ids, visible, _, length = critic.align(ids, mask, PAD)
    tree = critic.PrefixTree(ids, visible, length, lambda x: x.to("meta"))
    padded = ids.size(0) * ids.size(1) ** 2  # one byte each, for all heads
    masks = [mask for mask in tree.masks(None, torch.bfloat16) if mask is not None]
    size = sum(mask.numel() * mask.element_size() for mask in masks)
    print(f"| {padded / 2**30:.1f} | {size / 2**30:.1f} |")


def benchmark():
    parser = argparse.ArgumentParser(description="Ratios, measured side by side in one run.")
    parser.add_argument("--only", choices=["steps", "long"])
    parser.add_argument("--size", default="long", choices=SIZES, help="of the model for steps")
    parser.add_argument("--batch", type=int, default=8, help="pairs per batch for steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    if options.only != "long":
        model = make_benchmark_model(options.size, options)
        benchmark_steps(model, cases_of_dialogues(options), options)
    if options.only != "steps":
        model = make_benchmark_model("long", options)
        benchmark_steps(model, cases_of_long_rows(options), options)
        benchmark_masks()


if __name__ == "__main__":
    benchmark()
