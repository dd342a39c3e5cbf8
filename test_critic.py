# SPDX-License-Identifier: MIT
"""What critic.py and train_reward.py promise, checked offline on a CPU: `pytest`. As a program: the benchmark.

`reference_*` are the plain, slow meaning of the rules, a loop over rows and tokens; the tests compare with them.
From the model to its loop to the loop's faults; `pytest -k "not loop"` is critic.py alone, without deepspeed.
"""

import argparse
import copy
import ctypes
import fcntl
import functools
import gzip
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import critic
from critic import RewardModel, create_critic_model, save_critic_model

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
HERE = Path(__file__).parent
PAD, VOCAB = 0, 96
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "pad_token_id": PAD}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
MOE = GATED | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
# name: (model_type, config, whether each token is computed once)
FAMILIES = {
    "opt": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": PAD}, True),
    "opt-350m": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": PAD}, True),
    "gpt2": ("gpt2", GPT2, True),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}, False),
    "gpt_neo": ("gpt_neo", {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 256}, False),
    "gpt_neox": ("gpt_neox", SIZES | {"intermediate_size": 48}, True),
    "gpt_bigcode": ("gpt_bigcode", GPT2, True),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2}, False),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 256}, False),
    "falcon": ("falcon", SIZES | {"alibi": False}, False),
    "falcon-alibi": ("falcon", SIZES | {"alibi": True}, False),
    "llama": ("llama", GATED, True),
    "llama-dynamic": ("llama", GATED | {"max_position_embeddings": 24, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, True),
    "mistral": ("mistral", GATED | {"sliding_window": None}, True),
    "mistral-window": ("mistral", GATED | {"sliding_window": 8}, True),
    "mixtral": ("mixtral", GATED | {"num_local_experts": 2, "sliding_window": None}, True),
    "qwen2": ("qwen2", GATED, True),
    "qwen2_moe": ("qwen2_moe", MOE | {"num_experts": 2, "num_experts_per_tok": 1}, True),
    "qwen2_moe-window": ("qwen2_moe", MOE | {"num_experts": 2, "num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}, True),
    "qwen3": ("qwen3", GATED | {"head_dim": 16}, True),
    "qwen3_next": ("qwen3_next", MOE | {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}, False),
    "gemma": ("gemma", GATED | {"head_dim": 16}, True),
    "gemma2": ("gemma2", GATED | {"head_dim": 16, "sliding_window": 256}, False),
    "gemma2-window": ("gemma2", GATED | {"head_dim": 16, "sliding_window": 8}, False),
    "gemma3": ("gemma3_text", GATED | {"head_dim": 16, "sliding_window": 256}, True),
    "gemma3-window": ("gemma3_text", GATED | {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, True),
    "phi": ("phi", SIZES | {"intermediate_size": 48}, True),
    "phi3": ("phi3", GATED, True),
    "phi3-window": ("phi3", GATED | {"sliding_window": 8}, True),
    "stablelm": ("stablelm", GATED, False),
    "olmo2": ("olmo2", GATED, True),
    "starcoder2": ("starcoder2", GATED | {"sliding_window": 8}, True),
    "deepseek_v3": ("deepseek_v3", MOE | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}, True),
    "granite": ("granite", GATED, True),
    "cohere": ("cohere", GATED, True),
}  # fmt: skip
PLAIN = ["opt", "opt-350m", "llama", "gpt2", "gpt_neox", "bloom", "qwen3"]


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of VOCAB - 8 tokens with PAD and EOS; saved and loaded like any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{index}" for index in range(VOCAB - 11)]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def make_config(name, **overrides):
    model_type, config, _ = FAMILIES[name]
    return AutoConfig.for_model(model_type, **config | overrides)


def make_backbone(name, attention=None, seed=0, dropout=0.0, **overrides):
    torch.manual_seed(seed)
    config = make_config(name, **overrides)
    critic.override_dropout(config, dropout)
    model = AutoModel.from_config(config, **({"attn_implementation": attention} if attention else {}))
    with torch.no_grad():  # at the library's initial scale all scores are nearly equal
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_model(name, tokenizer, attention=None, n=0, fp32=False, **overrides):
    model = RewardModel(make_backbone(name, attention, **overrides), tokenizer, n, fp32)
    with torch.no_grad():
        model.v_head.weight.normal_(std=0.1)
    return model


def random_rows(seed, B=3, longest=28, pads=True):
    """2B rows that begin alike in every way: answers to one prompt, three levels of turns, a row that is
    another's beginning or its twin, one token, PAD inside. The first and the last token are content."""
    rng = random.Random(seed)
    ids = lambda low, high: [rng.randrange(2, VOCAB - 8) for _ in range(rng.randint(low, high))]
    turns = list(itertools.accumulate([[], ids(1, 9), ids(1, 6), ids(1, 4)]))
    rows = []
    for _ in range(2 * B):
        row = rng.choice(turns) + ids(1, longest - len(turns[-1]))
        if rows and rng.random() < 0.3:
            row = rng.choice(rows)
            row = row[: rng.randint(1, len(row))] + ids(0, 2) * rng.randint(0, 1)
        if pads and rng.random() < 0.2:
            row[rng.randrange(len(row))] = PAD
        rows.append(
            ([3] if row[0] == PAD else row[:1])
            + row[1:-1]
            + ([4] if row[-1] == PAD else row[-1:]) * (len(row) > 1)
        )
    return rows


def pad_rows(rows, side="right", extra=3):
    """(ids, mask); `extra` columns more than the longest row."""
    T = max(map(len, rows)) + extra
    fill = lambda row, gap: row + gap if side == "right" else gap + row
    gaps = [T - len(row) for row in rows]
    ids = [fill(row, [PAD] * gap) for row, gap in zip(rows, gaps)]
    mask = [fill([1] * len(row), [0] * gap) for row, gap in zip(rows, gaps)]
    return torch.tensor(ids), torch.tensor(mask)


def same(a, b, what="", atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda text: f"{what}: {text}")


def gradients(model, loss):
    """{name: gradient}; of zeros where there is none."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found))


# ---- the plain reference ----


def reference_content(ids, mask, n):
    """(first, last) column of a row's content, by the rule's own words."""
    if mask is not None:
        ones = [t for t, bit in enumerate(mask) if bit]
        return ones[0], ones[-1]
    content = [t for t, token in enumerate(ids) if token != PAD]
    return max(0, content[0] - n), content[-1]


def reference_rewards(model, ids, mask, n, T):
    """One row, its content at column 0 and PAD behind: rewards (T,), content length, the row, its mask."""
    first, last = reference_content(ids, mask, n)
    padding = T - (last + 1 - first)
    row = ids[first : last + 1] + [PAD] * padding
    # Twice, since transformers 4.57 hides padding from Qwen3-Next only where there is more than one row.
    bits = None if mask is None else torch.tensor([mask[first : last + 1] + [0] * padding] * 2)
    hidden = model.rwtransformer(input_ids=torch.tensor([row] * 2), attention_mask=bits, use_cache=False)[0]
    return model.v_head(hidden)[0, :, 0], last + 1 - first, row


def reference_loss(model, input_ids, attention_mask=None, loss_on="tokens", n=0):
    B, ids = len(input_ids) // 2, input_ids.tolist()
    masks = [None] * (2 * B) if attention_mask is None else attention_mask.tolist()
    ends = [reference_content(row, mask, n) for row, mask in zip(ids, masks)]
    T = max(last + 1 - first for first, last in ends)
    rows = [reference_rewards(model, row, mask, n, T) for row, mask in zip(ids, masks)]
    losses = []
    for (chosen, c, chosen_ids), (rejected, r, rejected_ids) in zip(rows[:B], rows[B:]):
        p, e = 0, max(c, r)
        while p < min(c, r) and chosen_ids[p] == rejected_ids[p]:
            p += 1
        if p == e:
            losses.append(0 * chosen[0] + math.log(2))
        elif loss_on == "end":
            losses.append(-F.logsigmoid(chosen[c - 1] - rejected[r - 1]))
        else:
            losses.append(torch.stack([-F.logsigmoid(chosen[t] - rejected[t]) for t in range(p, e)]).mean())
    return torch.stack(losses).mean(), torch.stack([rewards[length - 1] for rewards, length, _ in rows])


def reference_tokens(input_ids, attention_mask, loss_on, n=0):
    """How many distinct (prefix, token) a batch has, as far as the loss or (loss_on=None) the values read it."""
    rows, lengths = [], []
    for index, ids in enumerate(input_ids.tolist()):
        mask = None if attention_mask is None else attention_mask[index].tolist()
        first, last = reference_content(ids, mask, n)
        rows.append([(ids[t], mask is None or bool(mask[t])) for t in range(first, last + 1)])
        lengths.append(last + 1 - first)
    B, found = len(rows) // 2, set()
    for index, row in enumerate(rows):
        read = max(lengths[index % B], lengths[index % B + B]) if loss_on == "tokens" else lengths[index]
        row = row + [(PAD, attention_mask is None)] * (read - len(row))
        found |= {tuple(row[: t + 1]) for t in range(read)}
    return len(found)


def assert_same_as_reference(model, ids, mask, n=0, atol=1e-5):
    loss, scores = reference_loss(model, ids, mask, model.loss_on, n)
    output = model(ids, mask)
    same(output["loss"], loss, "loss", atol)
    same(
        torch.cat([output["chosen_mean_scores"], output["rejected_mean_scores"]]), scores, "end scores", atol
    )
    want, got = gradients(model, loss), gradients(model, output["loss"])
    for name, value in want.items():
        same(got[name], value, f"gradient of {name}", atol)
    return output


# ---- the model ----


def test_shapes_and_names(tokenizer):
    for name in PLAIN:
        model = make_model(name, tokenizer)
        ids, mask = pad_rows(random_rows(8))
        output = model(ids, mask)
        shapes = [output[key].shape for key in ("loss", "chosen_mean_scores", "rejected_mean_scores")]
        assert shapes == [(), (3,), (3,)]
        values = model.forward_value(ids, mask, prompt_length=2)
        assert values["values"].shape == ids.shape and values["chosen_end_scores"].shape == (6,)
        assert model.forward_value(ids, mask, return_value_only=True, use_cache=False).shape == ids.shape
        assert model.v_head.weight.shape == (1, 16 if name == "opt-350m" else 32)
        assert model.v_head.bias is None
        assert {key.split(".")[0] for key in model.state_dict()} == {"rwtransformer", "v_head"}


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_opt_begins_every_text_with_bos_which_may_be_pad(n, masked, tokenizer):
    model = make_model("opt", tokenizer, n=n).eval()
    ids = torch.tensor([[PAD, 5, 6, 7, PAD, PAD], [PAD, 5, 8, PAD, PAD, PAD]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]) if masked else None
    assert_same_as_reference(model, ids, mask, n)
    assert critic.align(ids, mask, PAD, n)[3].tolist() == ([4, 3] if masked or n else [3, 2])


IDS = torch.randint(2, 60, (4, 9), generator=torch.Generator().manual_seed(0))
BAD_CALLS = {
    "an odd batch": (lambda m: m(IDS[:3]), "3 rows"),
    "no rows": (lambda m: m(IDS[:0]), r"shape \(0, 9\)"),
    "1-D ids": (lambda m: m(IDS[0]), r"shape \(9,\)"),
    "a mask of another shape": (lambda m: m(IDS, torch.ones(4, 8)), "attention_mask"),
    "a row of padding": (lambda m: m(IDS * torch.tensor([[1], [1], [0], [1]])), "row 2"),
    "a row masked out": (lambda m: m.forward_value(IDS, torch.tensor([[1], [0], [1], [1]]).expand(4, 9), return_value_only=True), "row 1"),
    "prompt_length 1": (lambda m: m.forward_value(IDS, prompt_length=1), "prompt_length is 1"),
    "prompt_length beyond": (lambda m: m.forward_value(IDS, prompt_length=10), "prompt_length is 10"),
    "loss_on": (lambda m: (setattr(m, "loss_on", "mean"), m(IDS)), "loss_on is 'mean'"),
    "labels for ids": (lambda m: m(IDS.where(IDS != IDS[0, 3], -100)), "ids below 0"),
    "past_key_values": (lambda m: m(IDS, past_key_values=()), "past_key_values: not supported"),
    "head_mask": (lambda m: m.forward_value(IDS, head_mask=torch.ones(2, 2)), "head_mask: not supported"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(call, tokenizer):
    run, message = BAD_CALLS[call]
    with pytest.raises(ValueError, match=message):
        run(make_model("llama", tokenizer))


# ---- each token once ----


def counted(model):
    """A list that grows by the tokens of each call of the backbone."""
    calls = []
    model.rwtransformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return calls


@pytest.mark.parametrize("loss_on", ["tokens", "end"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_token_is_computed_once_and_equals_plain_rows(name, loss_on, tokenizer):
    model = make_model(name, tokenizer).train()
    model.loss_on, calls = loss_on, counted(model)
    tree = FAMILIES[name][2] and model.rwtransformer._supports_attention_backend
    for seed, masked, side in itertools.product(range(2), (True, False), ("left", "right")):
        ids, mask = pad_rows(random_rows(seed + 2 * masked), side)
        bits = mask if masked else None
        model.share_prefix = True
        calls.clear()
        model(ids, bits), model.forward_value(ids, bits, return_value_only=True)
        once = [reference_tokens(ids, bits, reads) for reads in (loss_on, None)]
        assert (calls == once) == tree
        assert_same_as_reference(model, ids, bits)
        values = model.forward_value(ids, bits, return_value_only=True)
        model.share_prefix = False
        same(values, model.forward_value(ids, bits, return_value_only=True), "values")
        assert calls[-1] > once[1]


@pytest.mark.parametrize("name", ["llama", "opt", "mistral-window", "bloom"])
def test_eager_attention_runs_plain_rows(name, tokenizer):
    model = make_model(name, tokenizer, "eager").eval()
    calls = counted(model)
    ids, mask = pad_rows(random_rows(1), "left")
    assert_same_as_reference(model, ids, mask, atol=1 if name == "mistral-window" else 1e-5)
    assert calls[-1] >= 6 * max(map(len, random_rows(1)))


def test_what_is_not_causal_runs_plain_rows(tokenizer):
    for config in ({"is_causal": False}, {"use_bidirectional_attention": True}):
        model = make_model("gemma3", tokenizer, **config)
        calls = counted(model)
        model(*pad_rows(random_rows(1)))
        assert calls[0] == 6 * max(map(len, random_rows(1)))


def test_ids_of_any_integer_type(tokenizer):
    ids, mask = pad_rows(random_rows(1))
    model = make_model("llama", tokenizer)
    assert (
        model(ids.int(), mask.bool())["loss"] == model(ids, mask.float())["loss"] == model(ids, mask)["loss"]
    )


row_of_ids = st.lists(st.integers(0, 5), min_size=1, max_size=12)
RANDOM_MODELS = {}


@settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 3).flatmap(lambda B: st.lists(row_of_ids, min_size=2 * B, max_size=2 * B)),
    prefix=st.lists(st.integers(0, 5), max_size=40),
    side=st.sampled_from(["left", "right"]),
    masked=st.booleans(),
    n=st.integers(0, 2),
    loss_on=st.sampled_from(["tokens", "end"]),
    name=st.sampled_from(["llama", "opt", "bloom"]),
)
def test_random_rows_equal_plain_rows(rows, prefix, side, masked, n, loss_on, name, tokenizer):
    model = RANDOM_MODELS.setdefault(name, make_model(name, tokenizer).eval())
    model.loss_on, model.num_padding_at_beginning = loss_on, n
    ids, mask = pad_rows([prefix + row for row in rows], side, extra=1)
    if not masked and not (ids != PAD).any(1).all():
        with pytest.raises(ValueError, match="only padding"):
            model(ids)
        return
    assert torch.isfinite(assert_same_as_reference(model, ids, mask if masked else None, n)["loss"])


@pytest.mark.parametrize("name", ["mistral-window", "gemma3-window"])
def test_padding_further_from_the_content_than_a_window_sees_nothing(name, tokenizer):
    """Undefined in the original. Here attention gives zeros there: finite, the same in the tree and in rows."""
    model = make_model(name, tokenizer).train()
    ids, mask = pad_rows([list(range(5, 45)), [5, 6, 7]])
    for model.loss_on in ("tokens", "end"):
        assert_same_as_reference(model, ids, mask)
        assert all(value.isfinite().all() for value in gradients(model, model(ids, mask)["loss"]).values())


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, fp32, tokenizer):
    ids, mask = pad_rows([list(range(3, 60)) + row for row in random_rows(6, pads=False)], "left")
    exact = make_model("llama", tokenizer)
    model = make_model("llama", tokenizer, fp32=fp32)
    for parameter in model.parameters():  # not the buffers, as `from_pretrained` does
        parameter.data = parameter.data.to(dtype)
    for model.share_prefix in (True, False):
        for bits in (mask, None):
            output = model(ids, bits)
            assert output["loss"].item() == pytest.approx(exact(ids, bits)["loss"].item(), rel=0.01)
            assert {value.dtype for value in output.values()} == {torch.float32 if fp32 else dtype}
            assert all(value.isfinite().all() for value in gradients(model, output["loss"]).values())
    ids, mask = pad_rows(random_rows(6), extra=0)
    hidden = model.rwtransformer(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    scores = (hidden.double() @ model.v_head.weight.double().T)[range(6), mask.sum(1) - 1, 0]
    model.share_prefix = False
    found = model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"]
    assert ((found.double() - scores).abs().max() < 1e-5) == fp32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_model("llama", tokenizer, fp32=True)(ids, mask)["loss"].dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(tokenizer):
    model = make_model("llama", tokenizer).train()
    ids, mask = pad_rows(random_rows(6))
    model.rwtransformer.get_input_embeddings().requires_grad_(False)  # the reentrant kind would lose all
    calls, found = [], []
    attend = critic.PrefixTree.masks_within
    try:
        critic.PrefixTree.masks_within = lambda *args: calls.append(1) or attend(*args)
        for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
            switch()
            calls.clear()
            found.append((gradients(model, model(ids, mask)["loss"]), len(calls)))
    finally:
        critic.PrefixTree.masks_within = attend
    (recomputed, twice), (kept, once) = found
    assert twice == 2 * once == 4
    for name, value in kept.items():
        same(recomputed[name], value, name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_dropout_runs_and_an_identical_pair_has_no_gradient(name, tokenizer):
    model = make_model(name, tokenizer, dropout=0.5).train()
    ids, mask = pad_rows(random_rows(1))
    assert model(ids, mask)["loss"] != model(ids, mask)["loss"]
    for model.loss_on in ("tokens", "end"):
        output = model(torch.tensor([[3, 4, 5], [3, 4, 5]]))
        assert output["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
        assert not any(value.any() for value in gradients(model, output["loss"]).values())


def test_the_device_is_waited_for_once(tokenizer, monkeypatch):
    """On the meta device every other wait (item, tolist, nonzero, an index by mask) is an error."""
    model = make_model("gpt2", tokenizer).to("meta")
    host = pad_rows(random_rows(2))
    device = tuple(tensor.to("meta") for tensor in host)
    calls = []
    monkeypatch.setattr(
        torch.Tensor,
        "cpu",
        lambda self: calls.append(1) or next(h for h, d in zip(host, device) if d is self),
    )
    for model.loss_on in ("tokens", "end"):
        calls.clear()
        assert model(*device)["loss"].device.type == "meta" and len(calls) == 2  # ids and mask
        assert model.forward_value(*device, return_value_only=True).device.type == "meta"


# ---- the content of a row, and the loss ----


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PLAIN)
def test_padding_is_only_a_way_to_write_a_row(name, side, tokenizer):
    model = make_model(name, tokenizer).eval()
    rows = random_rows(11)
    for masked in (True, False):
        ids, mask = pad_rows(rows, "right", 0)
        expected = model(ids, mask if masked else None)
        ids, mask = pad_rows(rows, side, 9)
        output = model(ids, mask if masked else None)
        for key in expected:
            same(output[key], expected[key], key)
        values = model.forward_value(ids, mask if masked else None, prompt_length=2)
        assert not values["values"][mask == 0].any()  # 0 at padding
        for index, row in enumerate(rows):
            alone = model.forward_value(torch.tensor([row]), return_value_only=True)[0]
            start = ids.size(1) - len(row) if side == "left" else 0
            same(values["values"][index, start : start + len(row)], alone, "values")
            same(values["chosen_end_scores"][index], alone[-1], "end score")


NARROW = {
    "gpt2, 50 positions": ("gpt2", {"n_positions": 50}),
    "gptj, 50 positions": ("gptj", {"n_positions": 50, "rotary_dim": 8}),
    "dynamic rope": ("llama-dynamic", {}),
    "a window shorter than the answer": ("mistral-window", {}),
}


@pytest.mark.parametrize("name", NARROW)
def test_padding_beyond_what_the_backbone_can_take(name, tokenizer):
    family, overrides = NARROW[name]
    model = make_model(family, tokenizer, **overrides).eval()
    results = []
    for extra in (0, 3, 40):
        ids, mask = pad_rows([[5] * 10 + list(range(6, 46)), [5] * 10 + [50]], "right", extra)
        values = model.forward_value(ids, mask, prompt_length=2)
        results.append([*model(ids, mask).values(), values["chosen_end_scores"], values["values"][:, :50]])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            same(a, b)


EDGES = {
    "identical": ([3, 4, 5], [3, 4, 5]),
    "nothing in common": ([3, 4, 5], [6, 7]),
    "chosen goes on": ([3, 4, 5, 6], [3, 4]),
    "rejected goes on": ([3], [3, 4, 5]),
    "interior PAD": ([3, PAD, 4, PAD, 5], [3, PAD, 6]),
    "PAD is the only difference": ([3, 4, PAD, 5], [3, 4, 5]),
    "a prefix that ends in the other's padding": ([3, 4, PAD, PAD, 5], [3, 4]),
}


@pytest.mark.parametrize("loss_on", ["tokens", "end"])
@pytest.mark.parametrize("edge", EDGES)
def test_edges_of_a_pair(edge, loss_on, tokenizer):
    for name in PLAIN:
        model = make_model(name, tokenizer).eval()
        model.loss_on = loss_on
        chosen, rejected = EDGES[edge]
        for side in ("left", "right"):
            ids, mask = pad_rows([chosen, [8, 9, 10], rejected, [8, 11]], side)
            for bits in (mask, None):
                assert_same_as_reference(model, ids, bits)


def test_masks_with_holes_and_foreign_ids_under_padding(tokenizer):
    for name in ("llama", "opt", "mistral-window"):
        model = make_model(name, tokenizer).eval()
        ids, mask = pad_rows(random_rows(3, longest=40))
        mask[0, 1] = mask[4, 0] = mask[1, 2] = 0
        ids[2, -1] = 3  # under padding
        assert mask[4].any() and mask[2, -1] == 0
        for model.loss_on in ("tokens", "end"):
            assert_same_as_reference(model, ids, mask)


def test_a_long_tail_in_fp16_does_not_overflow():
    rewards = torch.zeros(2, 6000, dtype=torch.float16)
    rewards[1] = 12  # 6,000 terms of 12 add up to more than fp16 holds
    length, divergence = torch.tensor([6000, 6000]), torch.tensor([0])
    assert critic.ranking_loss(rewards, length, divergence, "tokens")[0] == 12


# ---- checkpoints ----


def write_base(folder, name, tokenizer, **overrides):
    make_backbone(name, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_deepspeed_chat(folder, model, spelling="rwtransformer"):
    folder.mkdir()
    state = {key.replace("rwtransformer", spelling): value for key, value in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    return str(folder)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama-dynamic"])
@pytest.mark.filterwarnings("ignore:transformers has no sequence classification")
def test_round_trip_and_transformers_own_class(name, tokenizer, tmp_path):
    model = create_critic_model(write_base(tmp_path / "base", name, tokenizer), tokenizer, None).eval()
    with torch.no_grad():
        model.v_head.weight.normal_()
    output = tmp_path / "critic"
    save_critic_model(model, tokenizer, output)
    with pytest.warns(UserWarning, match="a fresh one replaces"):
        create_critic_model(str(output), tokenizer, None)
    loaded = create_critic_model(str(output), AutoTokenizer.from_pretrained(output), None, rlhf_training=True)
    assert_same_weights(loaded, model)
    ids, mask = pad_rows(random_rows(12))
    scores = model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"]
    same(loaded.eval().forward_value(ids, mask, prompt_length=2)["chosen_end_scores"], scores)
    config = json.loads((output / "config.json").read_text())
    assert config["pad_token_id"] == PAD and (config.get("dtype") or config.get("torch_dtype")) == "float32"
    assert config["architectures"][0].endswith("ForSequenceClassification")
    assert critic.TREE_ATTENTION not in json.dumps(config)
    if type(model.config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with pytest.warns(UserWarning, match="no sequence classification"):
            save_critic_model(model, tokenizer, output)
        return
    theirs, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert theirs.config.num_labels == 1 and not any(info.values())
    same(theirs.eval()(input_ids=ids, attention_mask=mask).logits[:, 0], scores, "their logits")


FORMS = ["deepspeed-chat", "older spelling", "transformers", "sharded", ".bin", "openrlhf"]


@pytest.mark.parametrize("name", ["opt", "llama", "bloom", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_reward_checkpoints_of_others(form, name, tokenizer, tmp_path):
    model, folder = make_model(name, tokenizer).eval(), tmp_path / "reward"
    if form in ("deepspeed-chat", "older spelling"):
        write_deepspeed_chat(folder, model, "rwtransformer" if form == "deepspeed-chat" else "rwtranrsformer")
    else:
        config = make_config(name, num_labels=1, pad_token_id=PAD)
        theirs = AutoModelForSequenceClassification.from_config(config)
        theirs.base_model.load_state_dict(model.rwtransformer.state_dict())
        theirs.score.load_state_dict(model.v_head.state_dict())
        theirs.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "5GB")
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (form == "sharded")
        state = theirs.state_dict()
        if form == "openrlhf":
            left = json.loads((folder / "config.json").read_text())
            left = {key: left[key] for key in left.keys() - {"num_labels", "id2label", "label2id"}}
            (folder / "config.json").write_text(json.dumps(left | {"value_head_prefix": "value_head"}))
            state = {key.replace("score.", "value_head."): value for key, value in state.items()}
        if form in ("openrlhf", ".bin"):
            (folder / "model.safetensors").unlink()
            torch.save(state, folder / "pytorch_model.bin")
    assert_same_weights(create_critic_model(str(folder), tokenizer, {}, rlhf_training=True), model)


OLD_BUFFERS = {"gptj": "h.0.attn.bias", "gpt2": "h.1.attn.masked_bias", "gpt_neo": "h.0.attn.attention.bias"}


@pytest.mark.parametrize("name", OLD_BUFFERS)
def test_buffers_that_transformers_once_saved_are_passed_over(name, tokenizer, tmp_path):
    model = make_model(name, tokenizer)
    folder = write_deepspeed_chat(tmp_path / "reward", model)
    damage(folder, lambda s: s.update({f"rwtransformer.{OLD_BUFFERS[name]}": torch.ones(1, 1, 256, 256)}))
    assert_same_weights(create_critic_model(folder, tokenizer, {}, rlhf_training=True), model)


class Payload:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def damage(folder, change):
    state = torch.load(Path(folder, "pytorch_model.bin"))
    change(state)
    torch.save(state, Path(folder, "pytorch_model.bin"))
    return folder


def cut(path, data=None):
    """Replace a file by its beginning, or by `data`; its folder."""
    path.write_bytes(path.read_bytes()[:5000] if data is None else data)
    return str(path.parent)


NORM = "rwtransformer.norm.weight"
BAD_CHECKPOINTS = {
    "a missing key": (lambda f, b: damage(f, lambda s: s.pop(NORM)), r"missing model\.norm\.weight"),
    "an unexpected key": (lambda f, b: damage(f, lambda s: s.update({"rwtransformer.extra": torch.ones(1)})), r"unexpected .*extra"),
    "a key beside the model": (lambda f, b: damage(f, lambda s: s.update({"extra": torch.ones(1)})), r"unexpected .*extra"),
    "a mis-shaped key": (lambda f, b: damage(f, lambda s: s.update({NORM: torch.ones(3)})), r"mismatched .*model\.norm\.weight"),
    "two labels": (lambda f, b: damage(f, lambda s: s.update({"v_head.weight": torch.ones(2, 32)})), r"mismatched .*score\.weight"),
    "no head": (lambda f, b: damage(f, lambda s: s.pop("v_head.weight")), "rlhf_training=False"),
    "a base model": (lambda f, b: b, "missing score.weight.*rlhf_training=False"),
    "no weights": (lambda f, b: (Path(f, "pytorch_model.bin").unlink(), f)[1], "model.safetensors"),
    "a pickle with code": (lambda f, b: cut(Path(f, "pytorch_model.bin"), pickle.dumps(Payload(Path(f).parent / "ran"))), "reward cannot be read"),
    "a truncated .bin": (lambda f, b: cut(Path(f, "pytorch_model.bin")), "reward cannot be read"),
    "a truncated .safetensors": (lambda f, b: cut(Path(b, "model.safetensors")), "base cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused(case, tokenizer, tmp_path):
    folder = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    base = write_base(tmp_path / "base", "llama", tokenizer)
    spoil, message = BAD_CHECKPOINTS[case]
    with pytest.raises(ValueError, match=message):
        create_critic_model(spoil(folder, base), tokenizer, None, rlhf_training=True)
    assert not (tmp_path / "ran").exists()


def test_a_base_model_that_lacks_a_key_is_refused(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    state = transformers.modeling_utils.load_state_dict(f"{base}/model.safetensors")
    Path(base, "model.safetensors").unlink()
    torch.save({key: value for key, value in state.items() if "norm" not in key}, f"{base}/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"missing model\.norm\.weight"):
        create_critic_model(base, tokenizer, None)


def test_bad_arguments_of_create(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    bare, longer = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    bare.pad_token = None
    longer.add_tokens([f"new{index}" for index in range(20)])
    reward = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    others = {"t5": {"vocab_size": 96, "d_model": 32, "num_layers": 1}, "bert": SIZES}
    for model_type, sizes in others.items():
        AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(
            tmp_path / model_type
        )
    edit(Path(write_base(tmp_path / "open", "llama", tokenizer), "config.json"), is_causal=False)
    for path, which, options, message in [
        (base, tokenizer, {"dropout": 1.0}, "dropout is 1.0"),
        (base, tokenizer, {"dropout": -0.1}, "dropout is -0.1"),
        (base, tokenizer, {"zero_stage": 3}, "zero_stage is 3"),
        (base, bare, {}, "pad_token_id"),
        (reward, longer, {"rlhf_training": True}, "the tokenizer has 108 tokens, the checkpoint 96"),
        *((str(tmp_path / name), tokenizer, {}, "a critic needs a causal decoder") for name in ("t5", "bert", "open")),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_critic_model(path, which, {}, **options)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "mpt", "llama", "falcon"])
def test_dropout_overrides_every_field(name, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", name, tokenizer)
    model = create_critic_model(base, tokenizer, None, dropout=0.35)
    found = re.findall(r'"(\w*(?:dropout|pdrop))": ([\d.]+)', json.dumps(model.config.to_dict()))
    assert found and {float(value) for _, value in found} == {0.35}
    ids, mask = pad_rows(random_rows(1))
    assert model.train()(ids, mask)["loss"] != model(ids, mask)["loss"]
    assert "0.35" not in json.dumps(create_critic_model(base, tokenizer, None).config.to_dict())


def test_vocabulary_grows_to_a_multiple_of_8_and_never_shrinks(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    assert create_critic_model(base, tokenizer, None).config.vocab_size == VOCAB  # the tokenizer has 8 fewer
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"new{index}" for index in range(11)])
    model = create_critic_model(base, longer, BF16)
    assert len(longer) == 99 and model.rwtransformer.get_input_embeddings().weight.shape[0] == 104
    save_critic_model(model, longer, tmp_path / "critic")
    assert_same_weights(
        create_critic_model(str(tmp_path / "critic"), longer, BF16, rlhf_training=True), model
    )


DTYPES = [(None, torch.float32), (BF16, torch.bfloat16), (FP16, torch.float16), ({"bf16": {"enabled": False}}, torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("ds_config", "dtype"), DTYPES)
def test_dtype_follows_ds_config(ds_config, dtype, tokenizer, tmp_path):
    model = create_critic_model(write_base(tmp_path / "base", "llama", tokenizer), tokenizer, ds_config)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    save_critic_model(model, tokenizer, tmp_path / "critic")
    loaded = create_critic_model(str(tmp_path / "critic"), tokenizer, ds_config, rlhf_training=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_weights(loaded, model)


def test_a_save_replaces_older_weights_of_any_form(tokenizer, tmp_path):
    folder = tmp_path / "critic"
    write_deepspeed_chat(folder, make_model("llama", tokenizer))
    model = make_model("llama", tokenizer, seed=1)
    save_critic_model(model, tokenizer, folder)
    assert sorted(file.name for file in folder.glob("*model*")) == ["model.safetensors"]
    assert not (folder / ".writing").exists()
    talker = copy.deepcopy(tokenizer)
    talker.chat_template, talker.padding_side = "{{ messages }}", "left"
    save_critic_model(model, talker, folder)
    saved = AutoTokenizer.from_pretrained(folder)
    assert (saved.padding_side, saved.pad_token_id, saved.chat_template) == ("left", PAD, "{{ messages }}")
    mine = {"modeling_mine.py", "model_card.md", "training_args.bin"}
    for name in mine:
        (folder / name).write_text("mine")
    save_critic_model(model, tokenizer, folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    assert mine <= {file.name for file in folder.iterdir()}


def test_a_class_with_another_head_than_ours_is_refused(tokenizer, tmp_path):
    """CTRL's classification head is called otherwise: transformers would draw it at random."""
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "dff": 48, "n_positions": 64}
    backbone = AutoModel.from_config(AutoConfig.for_model("ctrl", **sizes))
    with pytest.raises(ValueError, match="another head than one linear layer"):
        save_critic_model(RewardModel(backbone, tokenizer), tokenizer, tmp_path / "critic")
    backbone.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="missing classifier.weight"):
        create_critic_model(str(tmp_path / "base"), tokenizer, None)
    assert not (tmp_path / "critic").exists()


def test_a_kill_while_saving_leaves_one_whole_critic(tokenizer, tmp_path, monkeypatch):
    """Two critics are saved in turn; after each SIGKILL the folder holds one of them."""
    models = [make_model("llama", tokenizer, seed=seed) for seed in (0, 1)]
    for parameter in models[1].parameters():
        parameter.data += 1
    save_critic_model(models[0], tokenizer, tmp_path / "critic")
    # A bar has a lock that all processes share, and the killed one may hold it.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    rng = random.Random(0)
    for _ in range(12):
        child = os.fork()
        if not child:
            for model in itertools.cycle(models):
                save_critic_model(model, tokenizer, tmp_path / "critic")
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = create_critic_model(
            str(tmp_path / "critic"), tokenizer, None, rlhf_training=True
        ).state_dict()
        assert sum(all(torch.equal(v, m.state_dict()[k]) for k, v in found.items()) for m in models) == 1


def test_a_full_disk_names_the_folder_and_leaves_the_old_critic(tokenizer, tmp_path):
    model, folder = make_model("llama", tokenizer), tmp_path / "critic"
    save_critic_model(model, tokenizer, folder)
    before = (folder / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk with 20 kB left
    try:
        with pytest.raises(OSError, match=str(folder)):
            save_critic_model(model, tokenizer, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "model.safetensors").read_bytes() == before and not (folder / ".writing").exists()
    with pytest.raises(OSError, match="config.json/below"):
        save_critic_model(model, tokenizer, folder / "config.json" / "below")


def test_import_needs_no_deepspeed():
    code = "import sys, critic; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


# ---- the loop, on real processes ----


def command_line(script, *arguments, ranks=2, port=29500):
    launcher = Path(sys.executable).with_name("deepspeed")
    words = [sys.executable, launcher, "--num_accelerators", ranks, "--master_port", port, script, *arguments]
    return [str(word) for word in words]


def surroundings(**environment):
    return os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment


def launch(script, *arguments, ranks=2, check=True, limit=None, **environment):
    """`deepspeed` as a user types it, with its output; with ranks=None `python`. `limit`: bytes of a file."""
    port = free_port()
    command = command_line(script, *arguments, ranks=ranks, port=port)
    run = subprocess.run(
        command if ranks else [command[0], *command[6:]], check=False, text=True, timeout=600,
        env=surroundings(**environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )  # fmt: skip
    forget(port)
    if check:
        assert run.returncode == 0, run.stdout[-6000:]
    return run


def forget(port):
    """DeepSpeed's CPU op leaves 66 MB of shared memory a rank behind."""
    for file in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
        file.unlink()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def write_ds_config(path, stage=0, **overrides):
    config = json.loads((HERE / "ds_config.json").read_text())
    config["optimizer"]["params"]["lr"] = 5e-5
    config |= {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": stage},
    }
    path.write_text(json.dumps(config | overrides))
    return str(path)


def write_rows(path, rows):
    with (gzip.open if str(path).endswith(".gz") else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def make_pairs(count=48, seed=0, chosen="w1", rejected="w2", highest=79):
    """Text pairs: an answer that ends with `chosen` is preferred to one that ends with `rejected`."""
    rng, rows = random.Random(seed), []
    words = lambda least, most: " ".join(
        f"w{rng.randint(3, highest)}" for _ in range(rng.randint(least, most))
    )
    for index in range(count):
        answers = {"chosen": f" {words(1, 6)} {chosen}", "rejected": f" {words(1, 6)} {rejected}"}
        rows.append({"prompt": f"{words(1, 12)} w{index % highest}"} | answers)
    return rows


def read_metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def training(tokenizer, tmp_path_factory):
    """A base model, its data, and the arguments of a run: 48 pairs, 4 epochs of 3 steps on two ranks."""
    folder = tmp_path_factory.mktemp("training")
    base = write_base(folder / "base", "llama", tokenizer)
    data = write_rows(folder / "train.jsonl.gz", make_pairs())
    held_out = write_rows(folder / "eval.jsonl", make_pairs(21, seed=1))
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "run"}}

    def arguments(output, stage=0, accumulation=2, **overrides):
        config = folder / f"{stage}-{accumulation}-{len(overrides)}.json"
        overrides = {"gradient_accumulation_steps": accumulation} | ({} if stage else monitor) | overrides
        return [
            "--model_name_or_path", base, "--data_path", data, "--eval_path", held_out, "--max_seq_len", "64",
            "--output_dir", output, "--deepspeed_config", write_ds_config(config, stage, **overrides),
            "--num_train_epochs", "4", "--dropout", "0.1", "--save_interval", "2", "--eval_interval", "5",
        ]  # fmt: skip

    arguments.folder = folder
    return arguments


@pytest.fixture(scope="session")
def trained(training):
    """Runs on one rank, and on two at every ZeRO stage; {(ranks, stage): (output_dir, metrics, output)}."""
    runs = {}
    for ranks, stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
        output = training.folder / f"{ranks}-{stage}"
        alone = ranks if ranks > 1 else None
        run = launch(HERE / "train_reward.py", *training(output, stage, 4 // ranks), ranks=alone)
        runs[ranks, stage] = (output, read_metrics(output), run.stdout)
    return training.folder / "eval.jsonl", runs


METRICS = {
    "step", "epoch", "loss", "accuracy", "margin", "learning_rate", "grad_norm", "skipped_steps",
    "pairs_per_second", "tokens_per_second",
}  # fmt: skip
EVAL_METRICS = {
    f"eval_{name}" for name in ("loss", "accuracy", "margin", "chosen_score", "rejected_score", "ties")
}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loop_two_ranks_train_and_save_at_every_stage(stage, trained):
    held_out, runs = trained
    output, metrics, _ = runs[2, stage]
    evaluations = [line for line in metrics if "eval_loss" in line]
    steps = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in evaluations] == [0, 5, 10, 12]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert set(steps[0]) == METRICS and set(evaluations[0]) == EVAL_METRICS | {"step"}
    assert steps[-1]["epoch"] == 4 and all(line["grad_norm"] > 0 for line in steps)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = create_critic_model(str(output), tokenizer, None, rlhf_training=True).eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(output).eval()
    margins, losses = [], []
    for line in Path(held_out).read_text().splitlines():
        row = json.loads(line)
        texts = [tokenizer(row["prompt"] + row[side])["input_ids"] + [1] for side in ("chosen", "rejected")]
        ids, mask = pad_rows(texts)
        with torch.no_grad():
            scores = model(ids, mask)
            logits = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        ours = torch.cat([scores["chosen_mean_scores"], scores["rejected_mean_scores"]])
        same(logits, ours, "their logits")
        margins.append((ours[0] - ours[1]).item())
        losses.append(scores["loss"].item())
    last = evaluations[-1]
    assert statistics.mean(margins) == pytest.approx(last["eval_margin"], abs=1e-5)
    assert statistics.mean(margin > 0 for margin in margins) == pytest.approx(last["eval_accuracy"])
    assert statistics.mean(losses) == pytest.approx(last["eval_loss"], abs=1e-5)


def test_loop_two_ranks_evaluate_exactly_as_one(trained):
    first = {key: runs[1][0] for key, runs in trained[1].items()}
    assert first[2, 0] == first[2, 1] == first[2, 2] == first[1, 0]


def test_loop_stages_take_the_same_steps(trained):
    losses = {key: [line["loss"] for line in runs[1] if "loss" in line] for key, runs in trained[1].items()}
    for stage in (1, 2, 3):
        assert losses[2, stage] == pytest.approx(losses[2, 0], abs=1e-4)


def test_loop_metrics_go_through_deepspeeds_monitor(trained, training):
    written = {file.stem for file in (training.folder / "csv").rglob("*.csv")}
    assert {"Train_loss", "Train_eval_accuracy", "Train_grad_norm"} <= written


def test_loop_one_rank_tells_and_a_log_file_gets_two_lines_a_minute(trained):
    said = trained[1][2, 0][2]
    assert said.count("3 steps an epoch, which skip 0 pairs") == said.count("critic saved: load it") == 1
    assert said.count("step 12: eval_loss") == 1
    minutes, seconds = re.findall(r"training: +\d+%.*?\[(\d+):(\d+)<", said)[-1]
    lines = len(re.findall(r"training: +\d+%", said))
    assert 1 <= lines <= 3 + 2 * (int(minutes) + int(seconds) / 60)  # the first, the last as tqdm closes it


WORD = r"w\d+\([+-]\d+\.\d\)"


def test_loop_the_end_shows_the_reward_at_each_word(trained):
    held_out, runs = trained
    said = runs[2, 3][2].splitlines()
    shown = [line for line in said if re.match(r"(chosen|rejected), end score", line)]
    assert [line.split(",")[0] for line in shown] == ["chosen", "rejected"] * 2
    rows = [json.loads(line) for line in Path(held_out).read_text().splitlines()]
    output = runs[2, 3][0]
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = create_critic_model(str(output), tokenizer, None, rlhf_training=True).eval()
    for line, (row, side) in zip(shown, itertools.product(rows[:2], ("chosen", "rejected"))):
        words = re.findall(WORD, line)
        assert [word.split("(")[0] for word in words] == row[side].split()
        ids = torch.tensor([tokenizer(row["prompt"] + row[side])["input_ids"] + [1]])
        values = model.forward_value(ids, return_value_only=True)[0].tolist()
        found = [float(word.split("(")[1][:-1]) for word in words]
        assert found == pytest.approx(values[-1 - len(words) : -1], abs=0.051)
        assert float(re.search(r"end score (\S+):", line).group(1)) == pytest.approx(values[-1], abs=1e-3)


# ---- the loop's data ----

SPEAK = "{% for m in messages %}{{ m.content }} {% endfor %}<eos>\n"


def test_loop_every_row_form_and_the_split_by_prompt(tokenizer, tmp_path):
    import train_reward

    talker = copy.deepcopy(tokenizer)
    talker.chat_template = SPEAK
    say = lambda *texts: [{"role": "user", "content": text} for text in texts]
    hh = "\n\nHuman: w3\n\nAssistant: "
    path = write_rows(tmp_path / "rows.jsonl", [
        {"chosen": hh + "w4", "rejected": hh + "w4 w5"},
        {"chosen": hh + "w6", "rejected": hh + "w7", "a column": [1]},
        {"prompt": say("w3"), "chosen": say("w4"), "rejected": say("w5")},
        {"chosen": say("w3", "w6"), "rejected": say("w3", "w7")},
        {"prompt": "w9", "ranked": [" w1", " w2", " w3", " w2"]},
        {"prompt": say("w3"), "ranked": [say("w7"), say("w8")]},
    ])  # fmt: skip
    pairs = train_reward.read_pairs([path], "train", talker, 64)
    ids = lambda text: tokenizer(text)["input_ids"]
    by_line = lambda n: [pair for pair in pairs if pair["where"] == f"{path}:{n}"]
    assert pairs[0]["prompt"] == pairs[1]["prompt"] == "\n\nHuman: w3"
    assert len({pair["prompt"] for n in (3, 4, 6) for pair in by_line(n)}) == 1
    assert by_line(3)[0]["chosen"] == ids("w3 w4 <eos>") and by_line(6)[0]["rejected"] == ids("w3 w8 <eos>")
    assert pairs[0]["chosen"][-1] == pairs[0]["rejected"][-1] == tokenizer.eos_token_id
    ranked = [(tokenizer.decode(p["chosen"][1]), tokenizer.decode(p["rejected"][1])) for p in by_line(5)]
    assert ranked == [
        ("w1", "w2"),
        ("w1", "w3"),
        ("w1", "w2"),
        ("w2", "w3"),
        ("w3", "w2"),
    ]  # one is identical
    for seed in range(5):
        sides = train_reward.split_by_prompt(pairs, 0.3, seed)
        assert sum(map(len, sides)) == len(pairs) and all(sides)
        assert not {p["prompt"] for p in sides[0]} & {p["prompt"] for p in sides[1]}


def test_loop_pairs_of_a_prompt_stand_together_in_random_order():
    import train_reward

    pairs = [{"prompt": str(n % 7), "n": n} for n in range(30)]
    orders = [train_reward.in_order(pairs, seed) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(pair["n"] for pair in order) == list(range(30))
        assert len(list(itertools.groupby(order, lambda pair: pair["prompt"]))) == 7


def test_loop_ranks_see_disjoint_pairs_and_lose_only_the_last_incomplete_step(training, tmp_path):
    """21 pairs, 2 ranks, micro-batch 2, accumulation 2: 2 steps of 8, 5 pairs over."""
    script = tmp_path / "watch.py"
    script.write_text(WATCH)
    data = write_rows(tmp_path / "some.jsonl", make_pairs(21))
    arguments = [*training(tmp_path / "out", 0, 2, train_micro_batch_size_per_gpu=2), "--data_path", data]
    run = launch(script, *arguments, "--num_train_epochs", "2", "--save_interval", "0", SEEN=str(tmp_path))
    assert "2 steps an epoch, which skip 5 pairs" in run.stdout
    seen = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    for epoch in (0, 1):
        mine = [[row for batch in rank[4 * epoch : 4 * epoch + 4] for row in batch] for rank in seen]
        assert len(mine[0]) == len(mine[1]) == 8 and len({*mine[0], *mine[1]}) == 16
    assert seen[0][:4] != seen[0][4:]


# Notes the lines of each batch that is trained on.
WATCH = """
import json, os, sys
import train_reward
seen, collate = [], train_reward.collate
def watch(pairs, *rest):
    if sys._getframe(1).f_code.co_name == "main":
        seen.append([pair["where"] for pair in pairs])
    return collate(pairs, *rest)
train_reward.collate = watch
train_reward.main()
json.dump(seen, open(f"{os.environ['SEEN']}/seen-{os.environ['RANK']}.json", "w"))
train_reward.dist.destroy_process_group()
"""


def test_loop_a_tie_is_half_right(tokenizer, tmp_path):
    """A head of zeros: every pair ties."""
    model = make_model("llama", tokenizer)
    with torch.no_grad():
        model.v_head.weight.zero_()
    save_critic_model(model, tokenizer, tmp_path / "flat")
    held_out = write_rows(tmp_path / "eval.jsonl", make_pairs(5))
    run = launch(
        HERE / "train_reward.py", "--model_name_or_path", tmp_path / "flat", "--eval_path", held_out, "--max_seq_len", "64",
        "--num_train_epochs", "0", "--output_dir", tmp_path / "none", "--deepspeed_config", write_ds_config(tmp_path / "ds.json", 3),
    )  # fmt: skip
    found = json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"eval_loss')))
    assert (found["eval_accuracy"], found["eval_ties"]) == (0.5, 5) and set(found) == EVAL_METRICS
    assert not (tmp_path / "none").exists() and "chosen, end score +0.000" in run.stdout


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory):
    """`deepspeed train_reward.py` with no data and no network: the README's first command."""
    output = tmp_path_factory.mktemp("demonstration") / "out"
    launch(HERE / "train_reward.py", "--output_dir", output, ranks=1, OMP_NUM_THREADS="2")
    return output


def test_loop_the_demonstration_learns(demonstration):
    assert read_metrics(demonstration)[-1]["eval_accuracy"] >= 0.9
    tokenizer = AutoTokenizer.from_pretrained(demonstration)
    model = create_critic_model(str(demonstration), tokenizer, None, rlhf_training=True).eval()
    text = "The value of the expression is used as the argument of the function call"
    noise = "The value of hte epxresison is sued as hte raugment fo the ufncitno clal"
    ids, mask = pad_rows([tokenizer(line + "<eos>")["input_ids"] for line in (text, noise)])
    chosen, rejected = model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"].tolist()
    assert chosen > rejected


def test_loop_odd_text_trains_and_what_is_left_out_is_counted(demonstration, tmp_path):
    """On the demonstration's byte-level tokenizer."""
    odd = [
        "NUL \0 here",
        "\u05e9\u05dc\u05d5\u05dd \u202ertl",
        "a" * 100_000,
        "\U0001f600 \U0001f468\u200d\U0001f469",
    ]
    rows = [
        {"prompt": f"p{i} {text[:40]}", "chosen": f" {text}", "rejected": " no"} for i, text in enumerate(odd)
    ]
    data, held_out = write_rows(tmp_path / "odd.jsonl", rows), write_rows(tmp_path / "eval.jsonl", rows[:2])
    run = launch(
        HERE / "train_reward.py", "--model_name_or_path", demonstration, "--data_path", data, held_out, "--eval_path", held_out,
        "--max_seq_len", "256", "--output_dir", tmp_path / "out", "--deepspeed_config", write_ds_config(tmp_path / "ds.json"), ranks=None,
    )  # fmt: skip
    assert "5 pairs of 6 rows; left out: 1 longer than 256 tokens" in run.stdout
    assert "warning: 2 prompts of the held-out data are in the training data too" in run.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()


# ---- ZeRO ----

PROLOGUE = """
import json, sys, torch, deepspeed, critic
from transformers import AutoTokenizer
deepspeed.init_distributed()
rank, *arguments, output = torch.distributed.get_rank(), *[word for word in sys.argv[1:] if "local_rank" not in word]
ds_config, results = json.load(open(arguments[0])), {}
"""
EPILOGUE = """
if rank == 0:
    json.dump(results, open(output, "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def on_two_ranks(body, folder, *arguments):
    """Run `body` under the launcher; its `results`. The first argument is a DeepSpeed config."""
    (folder / "script.py").write_text(PROLOGUE + body + EPILOGUE)
    launch(folder / "script.py", *arguments, folder / "results.json")
    return json.loads((folder / "results.json").read_text())


ZERO3 = """
folder, grown, broken = arguments[1:]
ids = torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]])
for name, rlhf, stage in ((folder, True, 0), (folder, True, 3), (grown, False, 3)):
    tokenizer = AutoTokenizer.from_pretrained(grown if name == grown else folder)
    model = critic.create_critic_model(name, tokenizer, ds_config, rlhf_training=rlhf, zero_stage=stage)
    assert not model.rwtransformer.training  # on any rank, as `from_pretrained` leaves it
    for key, parameter in model.named_parameters():
        assert parameter.ds_status.name == "NOT_AVAILABLE" and parameter.numel() == 0, key
        assert parameter.ds_numel and torch.isfinite(parameter.ds_tensor).all(), key
    engine, *_ = deepspeed.initialize(model=model, config=dict(ds_config))
    engine.eval()
    with torch.no_grad():
        values = engine.module.forward_value(ids, return_value_only=True)
    first = values.clone()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(first, values)  # buffers too are rank 0's
    results[name + str(stage)] = values.tolist()
    critic.save_critic_model(engine, tokenizer, f"{output}-{len(results)}")
message = None
try:
    critic.create_critic_model(broken, AutoTokenizer.from_pretrained(folder), ds_config, rlhf_training=True)
except ValueError as error:
    message = str(error)
assert "missing model.norm.weight" in message and "model.layers.0.input_layernorm.weight" in message, message
"""


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_loop_zero3_loads_partitioned_and_refuses_on_every_rank(name, tokenizer, tmp_path):
    """Mixtral's experts lie apart in a checkpoint; DeepSeek-V3 has a buffer in it."""
    model = make_model(name, tokenizer).eval()
    for name_, buffer in model.named_buffers():
        buffer += 0.5 * torch.randn_like(buffer) if "e_score" in name_ else 0
    save_critic_model(model, tokenizer, tmp_path / "reward")
    folder = str(tmp_path / "reward")
    if name == "llama":
        folder = write_deepspeed_chat(tmp_path / "chat", model)
    broken = write_deepspeed_chat(tmp_path / "broken", model)
    spoiled = {"rwtransformer.layers.0.input_layernorm.weight": torch.ones(3)}
    damage(broken, lambda s: (s.pop("rwtransformer.norm.weight"), s.update(spoiled)))
    tokenizer.save_pretrained(folder)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"new{index}" for index in range(11)])
    grown = write_base(tmp_path / "grown", name, longer)
    config = write_ds_config(tmp_path / "ds.json", 3, scheduler={"type": "WarmupLR", "params": {}})
    scores = on_two_ranks(ZERO3, tmp_path, config, folder, grown, broken)
    ids = torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]])
    expected = model.forward_value(ids, return_value_only=True)
    for stage in ("0", "3"):
        same(torch.tensor(scores[folder + stage]), expected, stage)
    again = create_critic_model(f"{tmp_path}/results.json-3", longer, None, rlhf_training=True).eval()
    assert again.rwtransformer.get_input_embeddings().weight.shape[0] == 104
    same(torch.tensor(scores[grown + "3"]), again.forward_value(ids, return_value_only=True), "grown")


TREE = """
from deepspeed.utils import safe_get_full_grad
folder, rows = arguments[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids, mask = torch.tensor(json.load(open(rows))[rank])
for stage in (0, 1, 2, 3):
    ds_config["zero_optimization"]["stage"], found = stage, []
    for share in (True, False):
        model = critic.create_critic_model(folder, tokenizer, ds_config, rlhf_training=True)
        model.share_prefix = share
        if stage % 2:
            model.gradient_checkpointing_enable()
        engine, *_ = deepspeed.initialize(model=model, config=dict(ds_config))
        engine.train()
        shapes = []
        model.rwtransformer.register_forward_pre_hook(lambda m, a, k: shapes.append(len(k["input_ids"])), with_kwargs=True)
        output_ = engine(ids, mask)
        engine.backward(output_["loss"])
        assert shapes[0] == (1 if share else len(ids))
        found.append([*output_.values(), *(safe_get_full_grad(p) for p in model.parameters())])
    assert all(value is not None for value in found[0])
    results[stage] = max((a - b).abs().max().item() for a, b in zip(*found))
    assert max(value.abs().max() for value in found[0][3:]) > 1e-3
"""


def test_loop_each_token_once_at_every_zero_stage(tokenizer, tmp_path):
    """Loss, end scores and every gradient as in plain rows, on two ranks; gradient checkpointing at 1 and 3."""
    folder = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    tokenizer.save_pretrained(folder)
    batches = [torch.stack(pad_rows(random_rows(seed))).tolist() for seed in (1, 2)]
    (tmp_path / "rows.json").write_text(json.dumps(batches))
    options = {"scheduler": {"type": "WarmupLR", "params": {}}, "gradient_clipping": 0}
    config = write_ds_config(tmp_path / "ds.json", **options)
    worst = on_two_ranks(TREE, tmp_path, config, folder, tmp_path / "rows.json")
    assert set(worst) == set("0123") and max(worst.values()) < 1e-5


# ---- step 3 ----

PPO = """
folder, data = arguments[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
make = lambda: critic.create_critic_model(folder, tokenizer, ds_config, rlhf_training=True)
trainable, *_ = deepspeed.initialize(model=make(), config=dict(ds_config))
frozen = make().requires_grad_(False)
settings = {name: ds_config[name] for name in ("train_micro_batch_size_per_gpu", "zero_optimization")}
reward_model, *_ = deepspeed.initialize(model=frozen, config=settings) if settings["zero_optimization"]["stage"] == 3 else (frozen,)
reward_model.eval()
trainable.eval()
prompts, answers = json.load(open(data))

def batch(chosen, extra):
    left, right = (tokenizer([texts[i] for i in chosen], padding=True, padding_side=side, return_tensors="pt")
                   for texts, side in ((prompts, "left"), (answers, "right")))
    pad = torch.full((len(chosen), extra), tokenizer.pad_token_id)
    ids = torch.cat([pad, left["input_ids"], right["input_ids"], pad], 1)
    mask = torch.cat([0 * pad, left["attention_mask"], right["attention_mask"], 0 * pad], 1)
    return {"input_ids": ids, "attention_mask": mask}, extra + left["input_ids"].size(1)

def score(model, extra=0, chosen=range(len(prompts))):
    inputs, prompt_length = batch(chosen, extra)
    return getattr(model, "module", model).forward_value(**inputs, prompt_length=prompt_length)

with torch.no_grad():
    results = {"all": score(reward_model)["chosen_end_scores"].tolist(),
               "padded": score(reward_model, 5)["chosen_end_scores"].tolist(),
               "alone": [score(reward_model, 2, [i])["chosen_end_scores"].item() for i in range(len(prompts))]}
    before = score(trainable)["values"]
    assert torch.allclose(before, score(reward_model)["values"], atol=1e-6)
values = score(trainable)
loss = ((values["values"][:, -4:] - values["chosen_end_scores"].detach()[:, None] - 1) ** 2).mean()
trainable.backward(loss)
trainable.step()
with torch.no_grad():
    results["after"] = score(reward_model)["chosen_end_scores"].tolist()
    results["moved"] = (score(trainable)["values"] - before).abs().max().item()
"""


@pytest.mark.parametrize("stage", [0, 3])
def test_loop_step_3_as_a_ppo_trainer_takes_it(stage, trained, tmp_path):
    folder = trained[1][2, stage][0]
    rows = [json.loads(line) for line in trained[0].read_text().splitlines()][:5]
    texts = [row["prompt"] for row in rows], [row["chosen"] + " <eos>" for row in rows]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    schedule = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3}}
    config = write_ds_config(tmp_path / "ds.json", stage, scheduler=schedule)
    results = on_two_ranks(PPO, tmp_path, config, folder, tmp_path / "texts.json")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = create_critic_model(str(folder), tokenizer, None, rlhf_training=True).eval()
    ids, mask = pad_rows([tokenizer(p + a)["input_ids"] for p, a in zip(*texts)])  # as step 2 wrote them
    step2 = model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"].tolist()
    for way in ("all", "padded", "alone", "after"):
        assert results[way] == pytest.approx(step2, abs=1e-5), way
    assert results["moved"] > 1e-4


def test_loop_the_readmes_python_runs_as_printed(trained, tokenizer, tmp_path):
    """Step 2 to step 3; the folder `output` is a critic that step 2 left."""
    block = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1)
    os.symlink(trained[1][1, 0][0], tmp_path / "output")
    subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(HERE)}, check=True
    )


# ---- kills and faults ----


def ranks_of(output):
    """{local rank: process id} of a running train_reward.py."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_text().split("\0")
        except OSError:
            continue
        ours = [word for word in words if word.startswith("--local_rank=")]
        if str(output) in words and ours and any(word.endswith("train_reward.py") for word in words):
            found[int(ours[0].split("=")[1])] = int(folder.name)
    return found


def run_and_kill(arguments, output, moment, victims, log):
    """Start two ranks, SIGKILL the victims as soon as `moment(output)`; the launcher must take the rest down."""
    port = free_port()
    with open(log, "w") as file:
        run = subprocess.Popen(
            command_line(HERE / "train_reward.py", *arguments, port=port), env=surroundings(), stdout=file, stderr=file
        )  # fmt: skip
        while run.poll() is None and not moment(output):
            pass
        for rank, process in ranks_of(output).items():
            if rank in victims:
                os.kill(process, signal.SIGKILL)
        code = run.wait(timeout=60)
    forget(port)
    assert not ranks_of(output)
    return code


MOMENTS = {
    0: ("the first checkpoint is whole", lambda out: (out / "checkpoints" / "step-000000002").exists(), (0, 1)),
    1: ("five steps are logged", lambda out: (out / "metrics.jsonl").exists() and len(read_whole_lines(out)) > 5, (1,)),
    2: ("a checkpoint is being written", lambda out: (out / "checkpoints" / "unfinished").exists(), (0, 1)),
    3: ("the second is being written", lambda out: (out / "checkpoints" / "step-000000002").exists() and (out / "checkpoints" / "unfinished").exists(), (0,)),
}  # fmt: skip


def read_whole_lines(output):
    return (output / "metrics.jsonl").read_text().split("\n")[:-1]


@pytest.mark.parametrize("stage", MOMENTS)
def test_loop_a_killed_run_resumes_to_the_same_bits(stage, training, trained, tmp_path):
    """float32, dropout, accumulation; the run that was never killed is `trained`'s."""
    name, moment, victims = MOMENTS[stage]
    whole, expected, _ = trained[1][2, stage]
    for attempt in range(5):
        output = tmp_path / f"killed-{attempt}"
        arguments = training(output, stage)
        assert run_and_kill(arguments, output, moment, victims, tmp_path / "log") != 0
        caught = (output / "checkpoints" / "unfinished").exists()
        if caught or "written" not in name:
            break
    assert caught or "written" not in name  # a kill while a checkpoint was being written
    assert not (output / "model.safetensors").exists()
    if stage == 1:  # ranks that outlive their launcher hold a lock
        with (output / "metrics.jsonl").open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            refused = launch(HERE / "train_reward.py", *arguments, "--resume", check=False)
        assert refused.returncode != 0 and "metrics.jsonl: another run is writing here" in refused.stdout
    run = launch(HERE / "train_reward.py", *arguments, "--resume")
    assert "step 12: eval_loss" in run.stdout
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (output / file).read_bytes() == (whole / file).read_bytes(), file
    untimed = lambda lines: [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]
    assert untimed(read_metrics(output)) == untimed(expected)
    checkpoints = sorted(path.name for path in (output / "checkpoints").iterdir())
    assert [name for name in checkpoints if name.startswith("step")] == ["step-000000010", "step-000000012"]
    assert "unfinished" not in checkpoints


def test_loop_a_rank_that_dies_in_evaluation_ends_the_run(training, tmp_path):
    output = tmp_path / "out"  # metrics.jsonl is made before the first evaluation, and written after it
    many = write_rows(tmp_path / "many.jsonl", make_pairs(2000, seed=3))
    arguments = [*training(output), "--eval_path", many]
    started = lambda out: (out / "metrics.jsonl").exists()
    assert run_and_kill(arguments, output, started, (1,), tmp_path / "log") != 0
    assert not read_whole_lines(output) and not (output / "model.safetensors").exists()


@pytest.mark.parametrize("interval", ["2", "0"])
def test_loop_a_full_disk_ends_the_run_with_the_folders_name(interval, training, tmp_path):
    """As if 50 kB were left: a checkpoint, or the critic at the end, cannot be written by rank 0."""
    output = tmp_path / "out"
    arguments = [*training(output), "--save_interval", interval]
    run = launch(HERE / "train_reward.py", *arguments, check=False, limit=50_000)
    assert run.returncode != 0 and not (output / "model.safetensors").exists()
    place = "out/checkpoints: a checkpoint cannot be written" if interval == "2" else "out cannot be written"
    assert place in run.stdout, run.stdout[-3000:]


# Calls train_reward.main() once for each case of a JSON file, in one process: {case: [exit code, what it said,
# whether the model's weights are finite]}. With FAULT the fifth gradient of the head is not, though the loss is.
DRIVE = """
import contextlib, io, json, math, os, sys, traceback
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import train_reward
create, results, models = train_reward.create_critic_model, {}, []
def create_watched(*arguments):
    models[:], gradients = [create(*arguments)], []
    if os.environ.get("FAULT"):
        models[0].v_head.weight.register_hook(lambda g: g * math.nan if gradients.append(1) or len(gradients) == 5 else g)
    return models[0]
train_reward.create_critic_model = create_watched
for name, arguments in json.load(open(sys.argv[1])).items():
    said, sys.argv = io.StringIO(), ["train_reward.py", *arguments]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            train_reward.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print("" if isinstance(stop.code, int) else stop.code, file=said)
        except BaseException:
            code = -1
            traceback.print_exc()
    weights = [getattr(p, "ds_tensor", p) for model in models for n, p in model.named_parameters() if "embed" not in n]
    results[name] = code, said.getvalue(), all(weight.isfinite().all().item() for weight in weights)
json.dump(results, open(os.environ["RESULTS"], "w"))
"""


def drive(cases, folder, **environment):
    cases = {name: [str(word) for word in words] for name, words in cases.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "drive.py").write_text(DRIVE)
    environment = surroundings(RESULTS=str(folder / "results.json"), **environment)
    subprocess.run(
        [sys.executable, folder / "drive.py", "cases.json"], cwd=folder, check=True, env=environment
    )
    return json.loads((folder / "results.json").read_text())


def test_loop_resume_of_another_run_is_refused(training, trained, tmp_path):
    output = trained[1][2, 0][0]
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    other = write_rows(tmp_path / "other.jsonl", make_pairs(seed=5))
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    config = write_ds_config(tmp_path / "lr.json", gradient_accumulation_steps=2, optimizer=optimizer)
    changes = {
        "the data": ["--data_path", other], "--seed": ["--seed", "1"], "--loss_on": ["--loss_on", "end"],
        "--compute_fp32_loss": ["--no-compute_fp32_loss"],
        "optimizer in the DeepSpeed config": ["--deepspeed_config", config],
    }  # fmt: skip
    cases = {name: [*training(output), "--resume", *change] for name, change in changes.items()}
    for name, (code, message, _) in drive(cases, tmp_path).items():
        assert code == 1 and "put it back" in message
        assert name in message and "the number of ranks" in message
        assert ("the data" in message) == (name == "the data")
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*")}


FAULTY = {"float32": (0, False), "bf16": (0, True), "ZeRO-2": (2, False), "ZeRO-3": (3, False)}


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_loop_what_is_not_finite_stops_the_run_before_the_weights_are_touched(
    fault, training, tokenizer, tmp_path
):
    """The embedding of w79 is NaN and one pair has it; or the fifth gradient is NaN, though its loss is not."""
    model = make_backbone("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("w79")["input_ids"][0]] = math.nan
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    bad = {"prompt": "w5 w79", "chosen": " w3 w1", "rejected": " w4 w2"} if fault == "loss" else GOOD
    data = write_rows(tmp_path / "pairs.jsonl", [*make_pairs(31, highest=78), bad])
    held_out = write_rows(tmp_path / "eval.jsonl", make_pairs(8, 2, highest=78))
    cases = {}
    for name, (stage, bf16) in FAULTY.items():
        config = write_ds_config(tmp_path / f"{name}.json", stage, bf16={"enabled": bf16})
        cases[name] = [
            "--model_name_or_path", tmp_path / "base", "--data_path", data, "--eval_path", held_out, "--max_seq_len", "64",
            "--output_dir", tmp_path / name, "--deepspeed_config", config, "--save_interval", "1", "--num_train_epochs", "2",
        ]  # fmt: skip
        if fault == "loss":
            cases[f"{name} resumed"] = [*cases[name], "--resume"]
    results = drive(cases, tmp_path, FAULT="" if fault == "loss" else "1")
    for name, (code, said, finite) in results.items():
        assert code == 1 and finite, said[-3000:]
        output = tmp_path / name.split()[0]
        taken = len([line for line in read_metrics(output) if "loss" in line])
        said = next(line for line in said.splitlines() if "train_reward.py: error" in line)
        assert (
            f"step {taken + 1}: loss " in said
            and "not finite" in said
            and not (output / "model.safetensors").exists()
        )
        assert (f"{data}:32" in said or fault == "gradient") and f"{data}:" in said
        last = f"checkpoints/step-{taken:09d}" if taken else "none, see --save_interval"
        assert said.endswith(last) and (fault == "loss" or taken == 4)


# ---- bad input ----

GOOD = {"prompt": "w3", "chosen": " w4 w1", "rejected": " w5 w2"}
TALK = [{"role": "user", "content": "w3"}]
AT = r"pairs\.jsonl:1: mend or delete the line .*"
# data: (the row or the bytes of the file, what the message must hold)
BAD_DATA = {
    "an empty file": (b"", "no rows"),
    "not gzip though named so": (b"{}\n", r"pairs\.jsonl\.gz: cannot be read"),
    "broken UTF-8": (b'{"chosen": "\xff"}\n', AT + "Invalid JSON"),
    "a lone surrogate": (b'{"chosen": "\\ud800 a", "rejected": "b"}\n', AT + "Invalid JSON"),
    "broken JSON in line 7": (json.dumps(GOOD).encode() + b"\n" * 6 + b"{,}\n", r"pairs\.jsonl:7: .*Invalid JSON"),
    "a JSON list": (b"[1, 2]\n", AT + "should be an object"),
    "a missing key": ({"prompt": "w3", "chosen": "w4"}, AT + "give chosen and rejected"),
    "null": (GOOD | {"chosen": None}, AT + "give chosen and rejected"),
    "a number for text": (GOOD | {"rejected": 3}, AT + "rejected.* should be a valid string"),
    "an empty text": (GOOD | {"chosen": " "}, AT + "an answer is empty"),
    "one ranked answer": ({"prompt": "w3", "ranked": ["w4"]}, AT + "ranked .*at least 2 items"),
    "ranked of two kinds": ({"prompt": "w3", "ranked": ["w4", TALK]}, AT + "all be texts, or all be messages"),
    "equal in every row": (GOOD | {"rejected": GOOD["chosen"]}, "1 identical.*0 held-out pairs remain"),
    "every pair too long": (GOOD | {"prompt": "w3 " * 300}, "0 held-out pairs remain.*larger --max_seq_len"),
    "one pair only": (GOOD, "0 training pairs remain, 4 are needed"),
    "texts and messages": (GOOD | {"chosen": TALK}, AT + "all be texts, or all be messages"),
    "messages without a template": ({"chosen": TALK, "rejected": TALK}, r"pairs\.jsonl:1: .*no chat template"),
}  # fmt: skip
BAD_TALK = {
    "a message without role": ([{"content": "w3"}], "role Field required"),
    "an unknown role": ([{"role": "robot", "content": "w3"}], "role Input should be 'system'"),
    "a message that is none": (["w3"], r"chosen\.list\[Message\]\.0 Input should be an object"),
    "no message": ([], "an answer is empty"),
    "content that is no text": ([{"role": "user", "content": 3}], "content Input should be a valid string"),
}
BAD_ARGUMENTS = {
    "no such file": (["--data_path", "missing.jsonl"], "missing.jsonl: cannot be read"),
    "a directory": (["--data_path", "."], r"\.: cannot be read"),
    "a hub dataset without the library": (["--data_path", "some/pairs"], "pip install datasets"),
    "no such held-out file": (["--eval_path", "missing.jsonl"], "missing.jsonl: cannot be read"),
    "max_seq_len 0": (["--max_seq_len", "0"], "--max_seq_len is 0: it must be at least 2"),
    "beyond the positions": (["--max_seq_len", "300"], "--max_seq_len is 300, but .* has 256 positions"),
    "a fraction of 1": (["--eval_fraction", "1"], "--eval_fraction is 1.0"),
    "negative epochs": (["--num_train_epochs", "-1"], "--num_train_epochs is -1"),
    "a negative interval": (["--save_interval", "-1"], "--save_interval is -1"),
    "dropout 1.5": (["--dropout", "1.5"], "dropout is 1.5"),
    "an unknown loss": (["--loss_on", "mean"], "--loss_on: invalid choice: 'mean'"),
    "an unknown flag": (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    "an unknown model": (["--model_name_or_path", "no/such-model"], "no/such-model"),
    "evaluating a base model": (["--num_train_epochs", "0"], "no value head|without a value head"),
    "a run in output_dir": (["--output_dir", "used"], "already holds metrics.jsonl: pass --resume"),
    "a model in output_dir": (["--output_dir", "base", "--resume"], "no checkpoint to --resume from"),
    "output_dir below a file": (["--output_dir", "base/config.json/out"], "base/config.json/out"),
    "no config": (["--deepspeed_config", "missing.json"], "missing.json"),
}  # fmt: skip
BAD_CONFIGS = {
    "not JSON": ("{,}", "pass a JSON file"),
    "no batch size": ({"train_micro_batch_size_per_gpu": None}, "train_micro_batch_size_per_gpu needs to be"),
    "no optimizer": ({"optimizer": None}, "no optimizer"),
    "an unknown optimizer": ({"optimizer": {"type": "Adamm", "params": {}}}, "Adamm is not a supported"),
    "an unknown schedule": ({"scheduler": {"type": "Cosine", "params": {}}}, "LR scheduler Cosine"),
    "an unknown stage": ({"zero_optimization": {"stage": 7}}, "Input should be 0, 1, 2"),
    "two precisions": (BF16 | FP16, "cannot be simultaneously"),
    "more accumulation than data": ({"gradient_accumulation_steps": 99}, "21 training pairs remain, 396 are needed"),
}  # fmt: skip
BAD_MODELS = {
    "config without weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
    "a truncated safetensors": (lambda f: cut(f / "model.safetensors"), "safetensors cannot be read"),
    "a truncated .bin": (lambda f: cut(as_bin(f)), ".bin cannot be read"),
    "a pickle with code": (lambda f: cut(as_bin(f), pickle.dumps(Payload(f.parent / "ran"))), "code cannot be read"),
    "not a decoder": (lambda f: make_bert(f), "a critic needs a causal decoder"),
    "an unknown model type": (lambda f: edit(f / "config.json", model_type="nonesuch"), "nonesuch"),
    "a config that is not JSON": (lambda f: cut(f / "config.json", b"{"), "config.json"),
    "a tokenizer without EOS": (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no EOS token"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "tokenizer"),
}  # fmt: skip


def as_bin(folder):
    state = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    torch.save({key: value.clone() for key, value in state.items()}, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_bert(folder):
    AutoModel.from_config(AutoConfig.for_model("bert", **SIZES)).save_pretrained(folder)


@pytest.fixture(scope="session")
def refusals(tokenizer, tmp_path_factory):
    """Every bad input given to train_reward.py, in one process; {case: (code, message, expected)}."""
    folder = tmp_path_factory.mktemp("refusals")
    write_base(folder / "base", "llama", tokenizer)
    talker = copy.deepcopy(tokenizer)
    talker.chat_template = SPEAK
    write_base(folder / "talker", "llama", talker)
    write_rows(folder / "good.jsonl", make_pairs(24))
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text("{}\n")
    good = json.loads(Path(write_ds_config(folder / "good.json")).read_text())
    cases, expected = {}, {}

    def case(name, message, *more, **changed):
        usual = {
            "model_name_or_path": "base",
            "data_path": "good.jsonl",
            "output_dir": "out",
            "max_seq_len": 64,
        }
        flags = usual | {"deepspeed_config": folder / "good.json"} | changed
        cases[name] = [word for flag, value in flags.items() for word in (f"--{flag}", value)] + list(more)
        expected[name] = message

    def place(name, file):
        path = folder / name.replace(" ", "_") / file
        path.parent.mkdir()
        return path

    for name, (content, message) in BAD_DATA.items():
        path = place(name, "pairs.jsonl.gz" if "gzip" in name else "pairs.jsonl")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        case(name, message, data_path=path)
    for name, (messages, message) in BAD_TALK.items():
        path = write_rows(place(name, "pairs.jsonl"), [{"chosen": messages, "rejected": TALK}])
        case(name, AT + message, data_path=path, model_name_or_path="talker")
    for name, (arguments, message) in BAD_ARGUMENTS.items():
        case(name, message, *arguments)
    for name, (change, message) in BAD_CONFIGS.items():
        path = place(name, "ds.json")
        kept = {} if isinstance(change, str) else {k: v for k, v in (good | change).items() if v is not None}
        path.write_text(change if isinstance(change, str) else json.dumps(kept))
        case(name, message, deepspeed_config=path)
    for name, (spoil, message) in BAD_MODELS.items():
        path = folder / name.replace(" ", "_")
        write_base(path, "llama", tokenizer)
        spoil(path)
        case(name, message, model_name_or_path=path)
    cases["no model"], expected["no model"] = ["--data_path", "good.jsonl"], "--model_name_or_path is None"
    cases["no data"], expected["no data"] = ["--model_name_or_path", "base"], "given with data"
    results = drive(cases, folder)
    left = [path.name for pattern in ("out*", "ran") for path in folder.glob(pattern)]
    untouched = (folder / "used" / "metrics.jsonl").read_text() == "{}\n"
    return {name: (*results[name][:2], expected[name]) for name in cases}, left, untouched


CASES = [*BAD_DATA, *BAD_TALK, *BAD_ARGUMENTS, *BAD_CONFIGS, *BAD_MODELS, "no model", "no data"]


@pytest.mark.parametrize("case", CASES)
def test_loop_bad_input_is_told_plainly_and_touches_nothing(case, refusals):
    (code, said, message), left, untouched = refusals[0][case], *refusals[1:]
    assert code in (1, 2), said
    assert "Traceback" not in said and "train_reward.py: error: " in said
    assert re.search(message, said, re.DOTALL), said
    assert not left and untouched


# ---- the benchmark: python test_critic.py [--model PATH --data FILE] ----


def resident(name="VmRSS"):
    """MiB of memory that this process has (VmRSS), or had at most (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def measured(run, device):
    """(seconds, peak MiB above the start) of a call."""
    cuda = device.type == "cuda"
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier run left in the allocator would hide this one's need
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    memory, start = torch.cuda.memory_allocated() / 2**20 if cuda else resident(), time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    return took, (torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")) - memory


def benchmark_model(arguments, device):
    dtype, tokenizer = getattr(torch, arguments.dtype), argparse.Namespace(pad_token_id=0)
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        backbone = AutoModel.from_pretrained(arguments.model, dtype=dtype)
    else:
        config = AutoConfig.for_model(
            "llama", vocab_size=4096, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
            num_key_value_heads=3, num_hidden_layers=arguments.layers, max_position_embeddings=8192,
        )  # fmt: skip
        backbone = AutoModel.from_config(config, dtype=dtype)
    return RewardModel(backbone, tokenizer).to(device).train(), tokenizer


def benchmark_cases(arguments, model, tokenizer, device):
    """{case: (batches as rows, batches as each token once, whether it trains)}; a batch: ids, mask (2B, T)."""
    import train_reward

    rng = random.Random(0)
    ids = lambda count: [rng.randrange(10, 4096) for _ in range(count)]
    draw = lambda mean: int(min(3 * mean, 1 + mean * rng.lognormvariate(-0.32, 0.8)))
    if arguments.data:
        pairs = train_reward.read_pairs([arguments.data], "train", tokenizer, 512)
        pairs = train_reward.in_order(pairs, 0)[: arguments.pairs]
    else:  # as long as dialogues: a common beginning of 120 tokens or so, answers of 59
        prompts = [ids(draw(120)) for _ in range(arguments.pairs)]
        pairs = [{"chosen": p + [8] + ids(draw(58)), "rejected": p + [9] + ids(draw(58))} for p in prompts]
    rows = lambda texts: tuple(tensor.to(device) for tensor in pad_rows(texts, extra=0))
    batches = lambda pairs: [
        rows([pair[side] for side in ("chosen", "rejected") for pair in pairs[at : at + 8]])
        for at in range(0, len(pairs) - 7, 8)
    ]
    longest = lambda pair: max(len(pair["chosen"]), len(pair["rejected"]))
    prompts = [ids(256) for _ in range(2)]
    answers = [[prompt + [20 + k] + ids(63) for k in range(4)] for prompt in prompts]
    ranked = [pair for texts in answers for pair in itertools.combinations(texts, 2)]
    ranked = [rows([pair[side] for side in (0, 1) for pair in ranked])] * 2
    samples = [rows([prompts[0] + [20 + k] + ids(63) for k in range(8)])] * 10
    by_length = batches(sorted(pairs, key=longest))
    rng.shuffle(by_length)
    return {
        "pairs in random order; rows padded to the longest": (batches(pairs), batches(pairs), True),
        "the same; rows in batches of like length": (by_length, batches(pairs), True),
        "4 answers to one prompt, all 6 pairs, 2 prompts": (ranked, ranked, True),
        "8 samples of one prompt scored, no gradient": (samples, samples, False),
    }


def benchmark_steps(arguments):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = benchmark_model(arguments, device)
    model.loss_on = arguments.loss_on
    cases = benchmark_cases(arguments, model, tokenizer, device)
    calls = counted(model)

    def run(batches, share, trains):
        model.share_prefix = share
        for batch in batches:
            model.zero_grad()
            if trains:
                model(*batch)["loss"].backward()
            else:
                with torch.no_grad():
                    model.forward_value(*batch, return_value_only=True)

    times, memory, tokens = {}, {}, {}
    for repeat in tqdm(range(arguments.repeats + 1), desc="measuring", leave=False):  # the first to warm up
        for name, (rows, once, trains) in cases.items():
            for share, batches in ((False, rows), (True, once)):
                calls.clear()
                took, peak = measured(functools.partial(run, batches, share, trains), device)
                times.setdefault((name, share), []).append(took)
                memory[name, share], tokens[name, share] = peak, sum(calls)
    cores = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"\n1. {parameters:.0f}M parameters, {arguments.dtype}, loss on {arguments.loss_on}, {cores}, batch 8, "
          f"median of {arguments.repeats}; rows over each token once\n")  # fmt: skip
    print("| case | tokens | time | peak MiB, rows and once |\n| --- | --- | --- | --- |")
    for name in cases:
        fewer = tokens[name, False] / tokens[name, True]
        ratios = [rows / once for rows, once in zip(times[name, False][1:], times[name, True][1:])]
        print(f"| {name} | {fewer:.2f} | {statistics.median(ratios):.2f} | "
              f"{memory[name, False]:.0f}, {memory[name, True]:.0f} |")  # fmt: skip

    batch, states = cases[next(iter(cases))][1][0], {}
    model.share_prefix, backbone = True, model.rwtransformer.forward

    def without_backbone(input_ids, **kwargs):
        if "hidden" not in states:
            states["hidden"] = torch.randn(*input_ids.shape, model.v_head.in_features, device=device)
            states["hidden"] = states["hidden"].to(model.v_head.weight.dtype).requires_grad_()
        return (states["hidden"],)

    shares = []
    for _ in range(arguments.repeats + 1):
        whole = measured(lambda: run([batch], True, True), device)[0]
        model.rwtransformer.forward = without_backbone
        run([batch], True, True)
        shares.append(measured(lambda: run([batch], True, True), device)[0] / whole)
        model.rwtransformer.forward = backbone
    print(f"\n2. Laying out, head, loss: {100 * statistics.median(shares[1:]):.2f}% of a step.")


LOAD = """
import sys, time, torch, test_critic, transformers
from critic import RewardModel, create_critic_model
way, folder = sys.argv[1:]
tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "__len__": lambda self: 100})()
config = transformers.AutoConfig.from_pretrained(folder)
transformers.AutoModel.from_config(transformers.LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1))
open("/proc/self/clear_refs", "w").write("5")
memory, start = test_critic.resident(), time.perf_counter()
if way == "plain":
    model = RewardModel(transformers.AutoModel.from_config(config), tokenizer)
    model.load_state_dict(torch.load(folder + "/pytorch_model.bin", map_location="cpu", weights_only=True))
else:
    model = create_critic_model(folder, tokenizer, None, rlhf_training=True)
print(time.perf_counter() - start, test_critic.resident("VmHWM") - memory)
"""


def benchmark_load():
    found = {"plain": [], "create_critic_model": []}
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(
            "llama", vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=22,
            num_attention_heads=16,
        )  # fmt: skip
        model = RewardModel(AutoModel.from_config(config), argparse.Namespace(pad_token_id=0))
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        write_deepspeed_chat(Path(folder) / "reward", model)
        del model
        for _, way in itertools.product(tqdm(range(3), desc="loading", leave=False), found):
            command = [sys.executable, "-c", LOAD, way, str(Path(folder) / "reward")]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            run = subprocess.run(command, cwd=HERE, check=True, text=True, **pipes)
            found[way].append([float(word) for word in run.stdout.split()[-2:]])
    print(f"\n3. Loading a checkpoint of {parameters:.0f}M parameters in float32, median of 3\n")
    print("| way | seconds | peak MiB above the start |\n| --- | --- | --- |")
    ways = ("build, `torch.load`, `load_state_dict`", "`create_critic_model(..., rlhf_training=True)`")
    for way, results in zip(ways, found.values()):
        seconds, memory = (statistics.median(column) for column in zip(*results))
        print(f"| {way} | {seconds:.2f} | {memory:.0f} |")


def benchmark():
    parser = argparse.ArgumentParser(description="The benchmark: ratios measured side by side in one run.")
    parser.add_argument("--model", help="a decoder's folder or hub id (default: a Llama made on the spot)")
    parser.add_argument(
        "--data", help="pairs, .jsonl[.gz], for --model's tokenizer (default: made on the spot)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--loss_on", default="tokens", choices=["tokens", "end"])
    parser.add_argument("--pairs", type=int, default=24, help="pairs of the first two cases")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6, help="of the Llama made on the spot")
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count())
    benchmark_steps(arguments)
    benchmark_load()


if __name__ == "__main__":
    benchmark()
