# SPDX-License-Identifier: MIT
"""What critic.py and train_reward.py promise, checked offline on a CPU: `pytest`. As a program: the benchmark.

`reference_*` are the plain, slow meaning of the rules, a loop over rows and tokens; the tests compare with them.
"""

import argparse
import copy
import ctypes
import fcntl
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
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import critic
from critic import RewardModel, create_critic_model, save_critic_model

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
HERE = Path(__file__).parent
PAD, VOCAB = 0, 96
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
GATED = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "pad_token_id": PAD}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}
# name: (model_type, config, shares the prefix)
FAMILIES = {
    "opt": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": PAD}, True),
    "opt-350m": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": PAD}, True),
    "gpt2": ("gpt2", GPT2, True),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 8}, True),
    "gpt_neo": ("gpt_neo", {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 8, "max_position_embeddings": 256}, False),
    "gpt_neox": ("gpt_neox", SIZES | {"intermediate_size": 48}, True),
    "gpt_bigcode": ("gpt_bigcode", GPT2, True),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 2}, False),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 256}, False),
    "falcon": ("falcon", SIZES | {"alibi": False}, True),
    "falcon-alibi": ("falcon", SIZES | {"alibi": True}, False),
    "llama": ("llama", GATED, True),
    "mistral": ("mistral", GATED | {"sliding_window": None}, True),
    "mistral-window": ("mistral", GATED | {"sliding_window": 8}, False),
    "mixtral": ("mixtral", GATED | {"num_local_experts": 2, "sliding_window": None}, True),
    "qwen2": ("qwen2", GATED, True),
    "qwen2_moe": ("qwen2_moe", GATED | {"num_experts": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 1}, False),
    "qwen3": ("qwen3", GATED | {"head_dim": 16}, True),
    "qwen3_next": ("qwen3_next", GATED | {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}, False),
    "gemma": ("gemma", GATED | {"head_dim": 16}, True),
    "gemma2": ("gemma2", GATED | {"head_dim": 16, "sliding_window": 256}, True),
    "gemma2-window": ("gemma2", GATED | {"head_dim": 16, "sliding_window": 8}, False),
    "gemma3": ("gemma3_text", GATED | {"head_dim": 16, "sliding_window": 256}, True),
    "gemma3-window": ("gemma3_text", GATED | {"head_dim": 16, "sliding_window": 8}, False),
    "phi": ("phi", SIZES | {"intermediate_size": 48}, True),
    "phi3": ("phi3", GATED, True),
    "stablelm": ("stablelm", GATED, True),
    "olmo2": ("olmo2", GATED, True),
    "starcoder2": ("starcoder2", GATED, True),
    "deepseek_v3": ("deepseek_v3", GATED | {"num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}, False),
    "granite": ("granite", GATED, False),
    "cohere": ("cohere", GATED, False),
}  # fmt: skip
PLAIN = ["opt", "opt-350m", "llama", "gpt2", "gpt_neox", "bloom", "qwen3"]


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer of VOCAB - 8 tokens with PAD and EOS; saved and loaded like any other."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>"] + [f"w{index}" for index in range(VOCAB - 11)]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def make_config(name, **overrides):
    model_type, settings_, _ = FAMILIES[name]
    return AutoConfig.for_model(model_type, **settings_ | overrides)


def make_backbone(name, attention=None, seed=0, **overrides):
    torch.manual_seed(seed)
    config = make_config(name, **overrides)
    critic.override_dropout(config, 0.0)
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


def random_pairs(seed, B=3, longest=28, shared=True):
    """2B rows of content ids, none of them PAD: pairs with a common prefix of any length, p = 0 included."""
    random_ = torch.Generator().manual_seed(seed)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=random_))
    ids = lambda count: torch.randint(2, VOCAB - 8, (count,), generator=random_).tolist()
    chosen, rejected = [], []
    for _ in range(B):
        prefix = ids(draw(0, longest - 8)) if shared else []
        chosen.append(prefix + ids(draw(1, longest - len(prefix))))
        rejected.append(prefix + ids(draw(1, longest - len(prefix))))
    return chosen + rejected


def pad_rows(rows, side="right", extra=3):
    T = max(map(len, rows)) + extra
    gaps = [T - len(row) for row in rows]
    if side == "right":
        ids, mask = (
            [r + [PAD] * g for r, g in zip(rows, gaps)],
            [[1] * len(r) + [0] * g for r, g in zip(rows, gaps)],
        )
    else:
        ids, mask = (
            [[PAD] * g + r for r, g in zip(rows, gaps)],
            [[0] * g + [1] * len(r) for r, g in zip(rows, gaps)],
        )
    return torch.tensor(ids), torch.tensor(mask)


# ---- the plain reference ----


def reference_content(ids, mask, n):
    """(first, last) column of a row's content, by the rule's own words."""
    if mask is not None:
        ones = [t for t, bit in enumerate(mask) if bit]
        return ones[0], ones[-1]
    content = [t for t, token in enumerate(ids) if token != PAD]
    return max(0, content[0] - n), content[-1]


def reference_rewards(model, ids, mask, n, T):
    """One row, its content moved to column 0 and PAD behind, through backbone and head: rewards (T,), content length."""
    first, last = reference_content(ids, mask, n)
    padding = T - (last + 1 - first)
    row = ids[first : last + 1] + [PAD] * padding
    bits = None if mask is None else torch.tensor([mask[first : last + 1] + [0] * padding])
    hidden = model.rwtransformer(input_ids=torch.tensor([row]), attention_mask=bits, use_cache=False)[0]
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


def assert_same_as_reference(model, ids, mask, n=0, atol=1e-5):
    expected, scores = reference_loss(model, ids, mask, model.loss_on, n)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    want = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    output = model(ids, mask)
    got = torch.autograd.grad(output["loss"], parameters, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(output["loss"], expected, atol=atol, rtol=0)
    torch.testing.assert_close(
        torch.cat([output["chosen_mean_scores"], output["rejected_mean_scores"]]), scores, atol=atol, rtol=0
    )
    for name, a, b in zip((name for name, _ in model.named_parameters()), got, want):
        torch.testing.assert_close(
            a, b, atol=atol, rtol=0, msg=lambda text, name=name: f"gradient of {name}: {text}"
        )
    return output


# ---- the loss ----


@pytest.mark.parametrize("loss_on", ["tokens", "end"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_scores_and_gradients_equal_the_plain_loop(name, loss_on, tokenizer):
    attentions = ["sdpa", "eager"] if AutoModel.from_config(make_config(name))._supports_sdpa else ["eager"]
    for attention in attentions:
        model = make_model(name, tokenizer, attention).eval()
        model.loss_on = loss_on
        for seed, masked in ((1, True), (2, False), (3, True)):
            ids, mask = pad_rows(random_pairs(seed, longest=28), "right" if seed < 3 else "left")
            assert_same_as_reference(model, ids, mask if masked else None)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("loss_on", ["tokens", "end"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_pair_in_one_row_runs_where_it_is_equal_and_only_there(
    name, attention, loss_on, masked, tokenizer, monkeypatch
):
    if attention == "sdpa" and not AutoModel.from_config(make_config(name))._supports_sdpa:
        attention = "eager"
    model = make_model(name, tokenizer, attention)
    model.loss_on = loss_on
    prefix = torch.randint(2, VOCAB - 8, (3, 70), generator=torch.Generator().manual_seed(5)).tolist()
    tails = random_pairs(7, longest=24, shared=False)
    ids, mask = pad_rows([prefix[index % 3] + tail for index, tail in enumerate(tails)])
    shapes = []
    model.rwtransformer.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sdpa, widths = F.scaled_dot_product_attention, []
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda query, *args, **kwargs: widths.append(query.size(2)) or sdpa(query, *args, **kwargs),
    )
    results = []
    for model.share_prefix in (True, False):
        model.zero_grad()
        output = model(ids, mask if masked else None)
        output["loss"].backward()
        results.append(
            list(output.values())
            + [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        )
    for shared, two_rows in zip(*results, strict=True):
        torch.testing.assert_close(shared, two_rows, atol=1e-5, rtol=0)
    assert shapes[1][0] == 6
    assert shapes[0][0] == (3 if FAMILIES[name][2] else 6)
    if FAMILIES[name][2]:  # p + 2 (e - p) tokens of the longest pair, rounded up
        assert shapes[0][1] <= critic.round_up(70 + 2 * 23)
        if attention == "sdpa":  # attention over the columns of two rows, where the family lets it be given
            dense = model.config._attn_implementation == "sdpa"
            assert not dense or name in ("gptj", "falcon", "stablelm", "gpt_bigcode")
            assert shapes[1][1] < shapes[0][1] and set(widths) == {shapes[1][1], shapes[dense - 1][1]}


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pair_in_one_row_in_half_precision(dtype, fp32, tokenizer):
    model = make_model("llama", tokenizer, fp32=fp32).to(dtype)
    prefix = list(range(3, 60))
    ids, mask = pad_rows([prefix + row for row in random_pairs(6, shared=False)], "left")
    exact = make_model("llama", tokenizer)(ids, mask)["loss"]
    for model.share_prefix in (True, False):
        for bits in (mask, None):
            assert abs(model(ids, bits)["loss"].float() - exact) < 0.02 * exact


def test_what_else_keeps_a_pair_in_two_rows():
    llama = {"rope_theta": 10000.0, "factor": 2.0}
    for rope, shares in (("linear", True), ("dynamic", False)):
        config = AutoModel.from_config(make_config("llama", rope_scaling=llama | {"rope_type": rope})).config
        assert critic.can_share_prefix(config, 64, 96) == shares
    config = AutoModel.from_config(make_config("gpt2")).config
    assert critic.can_share_prefix(config, 200, 256) and not critic.can_share_prefix(config, 200, 288)
    config = AutoModel.from_config(make_config("llama", hidden_size=576)).config
    # Measured, two rows against one: 1.53, 1.24, and 0.71 times as long.
    assert critic.can_share_prefix(config, 48, 64) and critic.can_share_prefix(config, 80, 128)
    assert not critic.can_share_prefix(config, 1040, 2048)
    config._attn_implementation = critic.ATTEND_IN_TWO_ROWS
    assert critic.can_share_prefix(config, 1040, 1920) and not critic.can_share_prefix(config, 1040, 2112)
    config._attn_implementation = "flash_attention_2"
    assert not critic.can_share_prefix(config, 64, 96)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PLAIN)
def test_padding_is_only_a_way_to_write_a_row(name, side, tokenizer):
    model = make_model(name, tokenizer).eval()
    rows = random_pairs(11)
    for masked in (True, False):
        first, first_mask = pad_rows(rows, "right", 0)
        expected = model(first, first_mask if masked else None)
        ids, mask = pad_rows(rows, side, 9)
        output = model(ids, mask if masked else None)
        for key in expected:
            torch.testing.assert_close(output[key], expected[key], atol=1e-5, rtol=0)
        values = model.forward_value(ids, mask if masked else None, prompt_length=2)
        for index, row in enumerate(rows):
            alone = model.forward_value(torch.tensor([row]), return_value_only=True)[0]
            start = ids.size(1) - len(row) if side == "left" else 0
            torch.testing.assert_close(
                values["values"][index, start : start + len(row)], alone, atol=1e-5, rtol=0
            )
            torch.testing.assert_close(values["chosen_end_scores"][index], alone[-1], atol=1e-5, rtol=0)


NARROW = {
    "gpt2, 50 positions": ("gpt2", {"n_positions": 50}),
    "gptj, 50 positions": ("gptj", {"n_positions": 50, "rotary_dim": 8}),
    "dynamic rope": ("llama", {"max_position_embeddings": 32, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "a window shorter than the answer": ("mistral-window", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NARROW)
def test_padding_beyond_what_the_backbone_can_take(name, tokenizer):
    family, overrides = NARROW[name]
    model = make_model(family, tokenizer, "eager", **overrides).eval()
    rows = [[5] * 10 + list(range(6, 46)), [5] * 10 + [50]]
    results = []
    for extra in (0, 3, 40):
        ids, mask = pad_rows(rows, "right", extra)
        values = model.forward_value(ids, mask, prompt_length=2)
        content = torch.cat([values["values"][0, :50], values["values"][1, :11]])
        results.append([*model(ids, mask).values(), values["chosen_end_scores"], content])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_long_tail_in_fp16_does_not_overflow():
    rewards = torch.zeros(2, 6000, dtype=torch.float16)
    rewards[1] = 12  # 6,000 terms of 12 add up to more than fp16 holds
    length, divergence = torch.tensor([6000, 6000]), torch.tensor([0])
    assert critic.ranking_loss(rewards, length, divergence, "tokens")[0] == 12


EDGES = {
    "identical": ([3, 4, 5], [3, 4, 5]),
    "nothing in common": ([3, 4, 5], [6, 7]),
    "chosen goes on": ([3, 4, 5, 6], [3, 4]),
    "rejected goes on": ([3], [3, 4, 5]),
    "interior PAD": ([3, PAD, 4, PAD, 5], [3, PAD, 6]),
    "PAD is the only difference": ([3, 4, PAD, 5], [3, 4, 5]),
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
    if edge == "identical":
        model.train()  # no gradient even where dropout would tell the two rows apart
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        output = model(torch.tensor([chosen, rejected]))
        output["loss"].backward()
        assert output["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("masked", [True, False])
def test_opt_begins_every_text_with_bos_which_may_be_pad(n, masked, tokenizer):
    model = make_model("opt", tokenizer, n=n).eval()
    ids = torch.tensor([[PAD, 5, 6, 7, PAD, PAD], [PAD, 5, 8, PAD, PAD, PAD]])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
    assert_same_as_reference(model, ids, mask if masked else None, n)
    length = critic.align(ids, mask if masked else None, PAD, n)[3]
    assert length.tolist() == ([4, 3] if masked or n else [3, 2])


@pytest.mark.parametrize("masked", [True, False])
def test_masks_with_holes_and_foreign_ids_under_padding(masked, tokenizer):
    model = make_model("llama", tokenizer).eval()
    ids, mask = pad_rows(random_pairs(3, longest=40))
    mask[0, 1] = mask[4, 0] = 0
    ids[1, 0], mask[1, 0] = 3, 1
    expected = model(ids, mask)
    again = (
        model(ids.masked_fill(mask.cumsum(1) == mask.sum(1, keepdim=True), 9).where(mask == 0, ids), mask)
        if masked
        else expected
    )
    for key in expected:
        assert torch.isfinite(expected[key]).all()
        torch.testing.assert_close(again[key], expected[key])
    model.share_prefix = False
    for key, value in model(ids, mask).items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compute_fp32_loss(dtype, tokenizer):
    for fp32 in (False, True):
        model = make_model("llama", tokenizer, fp32=fp32).to(dtype).eval()
        ids, mask = pad_rows(random_pairs(4))
        output = model(ids, mask)
        assert {value.dtype for value in output.values()} == {torch.float32 if fp32 else dtype}
        hidden = model.rwtransformer(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        exact = (hidden.double() @ model.v_head.weight.double().T).squeeze(-1)
        values = model.forward_value(ids, mask, return_value_only=True)
        assert ((values - exact).abs().max() < 1e-5) == fp32
        output["loss"].backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_model("llama", tokenizer, fp32=True)(ids, mask)["loss"].dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(tokenizer):
    model = make_model("llama", tokenizer).train()
    prefix = list(range(3, 60))
    ids, mask = pad_rows([prefix + row for row in random_pairs(6, shared=False)])
    model.rwtransformer.get_input_embeddings().requires_grad_(False)  # the reentrant kind would lose all
    gradients = []
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        model.zero_grad()
        model(ids, mask)["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


rows_of_ids = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 2).flatmap(lambda B: st.lists(rows_of_ids, min_size=2 * B, max_size=2 * B)),
    prefix=st.lists(st.integers(0, 5), max_size=40),
    side=st.sampled_from(["left", "right"]),
    masked=st.booleans(),
    n=st.integers(0, 2),
    loss_on=st.sampled_from(["tokens", "end"]),
    name=st.sampled_from(["llama", "opt", "bloom"]),
)
def test_random_rows_equal_the_plain_loop(rows, prefix, side, masked, n, loss_on, name, tokenizer):
    model = RANDOM_MODELS.setdefault(name, make_model(name, tokenizer).eval())
    model.loss_on, model.num_padding_at_beginning = loss_on, n
    rows = [prefix + row for row in rows]
    ids, mask = pad_rows(rows, side, extra=1)
    if not masked and not (ids != PAD).any(1).all():
        with pytest.raises(ValueError, match="only padding"):
            model(ids)
        return
    assert torch.isfinite(assert_same_as_reference(model, ids, mask if masked else None, n)["loss"])


RANDOM_MODELS = {}


# ---- values, arguments, errors ----


def test_shapes_and_names(tokenizer):
    for name in PLAIN:
        model = make_model(name, tokenizer)
        ids, mask = pad_rows(random_pairs(8))
        output = model(ids, mask)
        assert [output[key].shape for key in ("loss", "chosen_mean_scores", "rejected_mean_scores")] == [
            (),
            (3,),
            (3,),
        ]
        values = model.forward_value(ids, mask, prompt_length=2)
        assert values["values"].shape == ids.shape and values["chosen_end_scores"].shape == (6,)
        assert model.forward_value(ids, mask, return_value_only=True).shape == ids.shape
        assert (
            model.v_head.weight.shape == (1, 16 if name == "opt-350m" else 32) and model.v_head.bias is None
        )
        assert {key.split(".")[0] for key in model.state_dict()} == {"rwtransformer", "v_head"}


def test_the_originals_other_arguments(tokenizer):
    model = make_model("llama", tokenizer).eval()
    model.loss_on = "end"  # reads no padding position, so `positions` may say anything there
    ids, mask = pad_rows(random_pairs(9), "left")
    expected = model(ids, mask)
    positions = (mask.cumsum(1) - 1) * mask
    embeds = model.rwtransformer.get_input_embeddings()(ids)
    for options in ({"position_ids": positions}, {"inputs_embeds": embeds}, {"use_cache": True}):
        for key, value in model(ids, mask, **options).items():
            torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=0)
        model.forward_value(ids, mask, return_value_only=True, **options)
    for options in (
        {"head_mask": torch.ones(2, 2)},
        {"past_key_values": ()},
        {"position_ids": positions[:, 1:]},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            model(ids, mask, **options)
    with pytest.raises(ValueError, match="position_ids"):
        make_model("bloom", tokenizer)(ids, mask, position_ids=positions)


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
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(call, tokenizer):
    run, message = BAD_CALLS[call]
    with pytest.raises(ValueError, match=message):
        run(make_model("llama", tokenizer))


def test_forward_makes_at_most_one_sync(tokenizer, monkeypatch):
    model = make_model("llama", tokenizer)
    ids, mask = pad_rows(random_pairs(2, B=6))
    calls = []
    for method in ("tolist", "item", "__bool__", "cpu", "__int__", "__index__", "nonzero"):
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(
            torch.Tensor, method, lambda self, *a, o=original, m=method: calls.append(m) or o(self, *a)
        )
    for share in (True, False):
        model.share_prefix = share
        model.rwtransformer.forward = (
            lambda input_ids=None, attention_mask=None, position_ids=None, use_cache=None, two_rows=None: (
                torch.zeros(*input_ids.shape, 32),
            )
        )
        calls.clear()
        model(ids, mask)
        assert calls == ["tolist"]


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


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:transformers has no sequence classification")
def test_round_trip_and_transformers_own_class(name, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", name, tokenizer)
    model = create_critic_model(base, tokenizer, None).eval()
    with torch.no_grad():
        model.v_head.weight.normal_()
    save_critic_model(model, tokenizer, tmp_path / "critic")
    with pytest.warns(UserWarning, match="a fresh one replaces"):
        create_critic_model(str(tmp_path / "critic"), tokenizer, None)
    loaded = create_critic_model(
        str(tmp_path / "critic"), AutoTokenizer.from_pretrained(tmp_path / "critic"), None, rlhf_training=True
    ).eval()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    ids, mask = pad_rows(random_pairs(12))
    scores = model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"]
    torch.testing.assert_close(loaded.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"], scores)
    config = json.loads((tmp_path / "critic" / "config.json").read_text())
    assert config["pad_token_id"] == PAD and (config.get("dtype") or config.get("torch_dtype")) == "float32"
    if type(model.config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with pytest.warns(UserWarning, match="no sequence classification"):
            save_critic_model(model, tokenizer, tmp_path / "critic")
        return
    assert config["architectures"][0].endswith("ForSequenceClassification")
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "critic", output_loading_info=True
    )
    assert theirs.config.num_labels == 1 and not any(info.values())
    logits = theirs.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(logits[:, 0], scores, atol=1e-5, rtol=0)


FORMS = [
    "deepspeed-chat",
    "older spelling",
    "transformers",
    "transformers sharded",
    "transformers .bin",
    "openrlhf",
]


@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
@pytest.mark.parametrize("form", FORMS)
def test_reward_checkpoints_of_others(form, name, tokenizer, tmp_path):
    model = make_model(name, tokenizer).eval()
    folder = tmp_path / "reward"
    if form in ("deepspeed-chat", "older spelling"):
        write_deepspeed_chat(folder, model, "rwtransformer" if form == "deepspeed-chat" else "rwtranrsformer")
    else:
        theirs = AutoModelForSequenceClassification.from_config(
            make_config(name, num_labels=1, pad_token_id=PAD)
        )
        theirs.base_model.load_state_dict(model.rwtransformer.state_dict())
        theirs.score.load_state_dict(model.v_head.state_dict())
        theirs.save_pretrained(folder, max_shard_size="20KB" if form == "transformers sharded" else "5GB")
        if form == "transformers sharded":
            assert len(list(folder.glob("*.safetensors"))) > 1
        if form == "transformers .bin":
            (folder / "model.safetensors").unlink()
            torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
        if form == "openrlhf":
            config = json.loads((folder / "config.json").read_text())
            config = {
                key: value
                for key, value in config.items()
                if key not in ("num_labels", "id2label", "label2id")
            }
            config["value_head_prefix"] = "value_head"
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "model.safetensors").unlink()
            state = {
                key.replace("score.", "value_head."): value for key, value in theirs.state_dict().items()
            }
            torch.save(state, folder / "pytorch_model.bin")
    loaded = create_critic_model(str(folder), tokenizer, {}, rlhf_training=True).eval()
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("name", "key"),
    [("gptj", "h.0.attn.bias"), ("gpt2", "h.1.attn.masked_bias"), ("gpt_neo", "h.0.attn.attention.bias")],
)
def test_buffers_that_transformers_once_saved_are_passed_over(name, key, tokenizer, tmp_path):
    model = make_model(name, tokenizer)
    folder = write_deepspeed_chat(tmp_path / "reward", model)
    damage(folder, lambda s: s.update({f"rwtransformer.{key}": torch.ones(1, 1, 256, 256)}))
    loaded = create_critic_model(folder, tokenizer, {}, rlhf_training=True)
    for name_, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name_])


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


def replace(path, text):
    Path(path).write_bytes(text)
    return str(Path(path).parent)


BAD_CHECKPOINTS = {
    "a missing key": (lambda f, b: damage(f, lambda s: s.pop("rwtransformer.norm.weight")), "missing norm.weight"),
    "an unexpected key": (lambda f, b: damage(f, lambda s: s.update({"rwtransformer.extra": torch.ones(1)})), "unexpected .*extra"),
    "a mis-shaped key": (lambda f, b: damage(f, lambda s: s.update({"rwtransformer.norm.weight": torch.ones(3)})), "mis-shaped norm.weight"),
    "two labels": (lambda f, b: damage(f, lambda s: s.update({"v_head.weight": torch.ones(2, 32)})), r"shape \(2, 32\)"),
    "a base model": (lambda f, b: b, "rlhf_training=False"),
    "no weights": (lambda f, b: (Path(f, "pytorch_model.bin").unlink(), f)[1], "model.safetensors"),
    "a pickle with code": (lambda f, b: replace(Path(f, "pytorch_model.bin"), pickle.dumps(Payload(Path(f).parent / "ran"))), "pytorch_model.bin cannot be read"),
    "a truncated .bin": (lambda f, b: replace(Path(f, "pytorch_model.bin"), Path(f, "pytorch_model.bin").read_bytes()[:5000]), "pytorch_model.bin cannot be read"),
    "a truncated .safetensors": (lambda f, b: replace(Path(b, "model.safetensors"), Path(b, "model.safetensors").read_bytes()[:5000]), "model.safetensors cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused(case, tokenizer, tmp_path):
    folder = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    base = write_base(tmp_path / "base", "llama", tokenizer)
    spoil, message = BAD_CHECKPOINTS[case]
    with pytest.raises(ValueError, match=message):
        create_critic_model(spoil(folder, base), tokenizer, None, rlhf_training=True)
    assert not (tmp_path / "ran").exists()


BAD_DS_CONFIGS = [
    {"bf16": {"enabled": "auto"}}, {"fp16": {"enabled": "false"}}, {"bf16": True}, {"zero_optimization": True},
    {"zero_optimization": {"stage": "3"}}, {"zero_optimization": {"stage": 4}}, BF16 | FP16,
]  # fmt: skip


@pytest.mark.parametrize("ds_config", BAD_DS_CONFIGS)
def test_a_ds_config_that_says_it_in_no_known_way(ds_config, tokenizer):
    with pytest.raises(ValueError, match="ds_config has "):
        create_critic_model("no such folder", tokenizer, ds_config)
    assert critic.read_precision_and_stage({"fp16": None, "zero_optimization": None}) == (torch.float32, 0)


def test_bad_arguments_of_create(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    for options, message in [
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"zero_stage": 3}, "zero_stage is 3"),
    ]:
        with pytest.raises(ValueError, match=message):
            create_critic_model(base, tokenizer, {}, **options)
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    with pytest.raises(ValueError, match="pad_token_id"):
        create_critic_model(base, bare, {})
    with pytest.raises(ValueError, match="pad_token_id"):
        RewardModel(make_backbone("llama"), bare)
    for model_type, settings_ in (
        ("t5", {"vocab_size": 96, "d_model": 32, "num_layers": 1}),
        ("bert", SIZES),
    ):
        AutoModel.from_config(AutoConfig.for_model(model_type, **settings_)).save_pretrained(
            tmp_path / model_type
        )
        with pytest.raises(ValueError, match=f"{model_type} model: a critic needs a causal decoder"):
            create_critic_model(str(tmp_path / model_type), tokenizer, {})
    config = json.loads(Path(base, "config.json").read_text())
    Path(base, "config.json").write_text(json.dumps(config | {"is_causal": False}))
    with pytest.raises(ValueError, match="a critic needs a causal decoder"):
        create_critic_model(base, tokenizer, {})
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"new{index}" for index in range(20)])
    reward = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    with pytest.raises(ValueError, match="the tokenizer has 108 tokens, the checkpoint 96"):
        create_critic_model(reward, longer, {}, rlhf_training=True)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "mpt", "llama", "falcon"])
def test_dropout_overrides_every_field(name, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", name, tokenizer)
    model = create_critic_model(base, tokenizer, None, dropout=0.35)
    nested = json.dumps(model.config.to_dict())
    found = re.findall(r'"(\w*(?:dropout|pdrop))": ([\d.]+)', nested)
    assert found and {float(value) for _, value in found} == {0.35}
    ids, mask = pad_rows(random_pairs(1))
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
    again = create_critic_model(str(tmp_path / "critic"), longer, BF16, rlhf_training=True)
    assert torch.equal(again.rwtransformer.embed_tokens.weight, model.rwtransformer.embed_tokens.weight)


@pytest.mark.parametrize(
    ("ds_config", "dtype"), [(None, torch.float32), (BF16, torch.bfloat16), (FP16, torch.float16)]
)
def test_dtype_follows_ds_config(ds_config, dtype, tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    model = create_critic_model(base, tokenizer, ds_config)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    save_critic_model(model, tokenizer, tmp_path / "critic")
    loaded = create_critic_model(str(tmp_path / "critic"), tokenizer, ds_config, rlhf_training=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert torch.equal(loaded.v_head.weight, model.v_head.weight)


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
    mine = {"modeling_mine.py", "model_card.md"}
    for name in mine:
        (folder / name).write_text("mine")
    save_critic_model(model, tokenizer, folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    assert mine <= {file.name for file in folder.iterdir()}


def test_a_class_with_another_head_than_ours_is_not_pretended(tokenizer, tmp_path):
    """CTRL's classification head is called otherwise: transformers would draw it at random."""
    torch.manual_seed(0)
    settings_ = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "dff": 48, "n_positions": 64}
    model = RewardModel(AutoModel.from_config(AutoConfig.for_model("ctrl", **settings_)), tokenizer).eval()
    with pytest.warns(UserWarning, match="no sequence classification with one linear head"):
        save_critic_model(model, tokenizer, tmp_path / "critic")
    loaded = create_critic_model(str(tmp_path / "critic"), tokenizer, None, rlhf_training=True).eval()
    ids, mask = pad_rows(random_pairs(2))
    assert torch.equal(model(ids, mask)["loss"], loaded(ids, mask)["loss"])


def test_import_needs_no_deepspeed():
    code = "import sys, critic; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


# ---- the loop, on real processes; `pytest -k "not loop"` needs no deepspeed ----


def command_line(script, *arguments, ranks=2, port=29500):
    launcher = Path(sys.executable).with_name("deepspeed")
    words = [sys.executable, launcher, "--num_accelerators", ranks, "--master_port", port, script, *arguments]
    return [str(word) for word in words]


def surroundings(**environment):
    return os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment


def launch(script, *arguments, ranks=2, check=True, **environment):
    """`deepspeed` as a user types it, with its output; with ranks=None `python`. Ranks share the cores."""
    port = free_port()
    command = command_line(script, *arguments, ranks=ranks, port=port)
    run = subprocess.run(
        command if ranks else [command[0], *command[6:]], check=False, text=True, timeout=600,
        env=surroundings(**environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
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
    rows, rng = [], random.Random(seed)
    for index in range(count):
        words = lambda least, most: " ".join(
            f"w{rng.randint(3, highest)}" for _ in range(rng.randint(least, most))
        )
        prompt = f"{words(1, 12)} w{index % highest}"
        rows.append(
            {"prompt": prompt, "chosen": f" {words(1, 6)} {chosen}", "rejected": f" {words(1, 6)} {rejected}"}
        )
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

    def arguments(output, stage=0, accumulation=2, **overrides):
        config = folder / f"{stage}-{accumulation}-{len(overrides)}.json"
        monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "run"}}
        write_ds_config(
            config, stage, gradient_accumulation_steps=accumulation, **({} if stage else monitor) | overrides
        )
        return [
            "--model_name_or_path", base, "--data_path", data, "--eval_path", held_out, "--max_seq_len", "64",
            "--output_dir", output, "--deepspeed_config", config, "--num_train_epochs", "4", "--dropout", "0.1",
            "--compute_fp32_loss", "--save_interval", "2", "--eval_interval", "5",
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loop_two_ranks_train_and_save_at_every_stage(stage, trained):
    held_out, runs = trained
    output, metrics, _ = runs[2, stage]
    evaluations = [line for line in metrics if "eval_loss" in line]
    steps = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in evaluations] == [0, 5, 10, 12]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert set(steps[0]) >= {
        "step", "epoch", "loss", "accuracy", "margin", "learning_rate", "grad_norm", "pairs_per_second", "tokens_per_second",
    }  # fmt: skip
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
        torch.testing.assert_close(logits, ours, atol=1e-5, rtol=0)
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
    for stage in (1, 2):
        assert losses[2, stage] == pytest.approx(losses[2, 0], abs=1e-4)


def test_loop_metrics_go_through_deepspeeds_monitor(trained, training):
    written = {file.stem for file in (training.folder / "csv").rglob("*.csv")}
    assert {"Train_loss", "Train_eval_accuracy", "Train_grad_norm"} <= written


def test_loop_ranks_see_disjoint_pairs_of_like_length():
    import train_reward

    lengths = [random.Random(index).randint(10, 500) for index in range(203)]
    samplers = [
        train_reward.DistributedLengthGroupedSampler(
            8, num_replicas=2, rank=rank, seed=3, drop_last=True, lengths=lengths
        )
        for rank in (0, 1)
    ]
    epochs = [list(train_reward.batches(sampler, 4, 2)) for sampler in samplers]
    first = [[index for _, batch in batches[:26] for index in batch] for batches in epochs]
    assert not set(first[0]) & set(first[1]) and len(first[0]) == len(set(first[0])) == 101
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for _, batch in epochs[0]]
    assert statistics.mean(spread) < 100  # random batches of 4: 294
    assert epochs[0] == list(train_reward.batches(samplers[0], 4, 2)) and epochs[0][:26] != epochs[0][26:]


ZERO3 = """
import json, sys, torch, deepspeed, critic
from transformers import AutoTokenizer
from transformers.utils import logging
folder, grown, broken, ds_config, output = sys.argv[-5:]
deepspeed.init_distributed()
ds_config = json.load(open(ds_config))
tokenizer = AutoTokenizer.from_pretrained(grown)
ids = torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]])
scores = {}
for name, rlhf, stage in ((folder, True, 0), (folder, True, 3), (grown, False, 3)):
    tokenizer = AutoTokenizer.from_pretrained(grown if name == grown else folder)
    model = critic.create_critic_model(name, tokenizer, ds_config, rlhf_training=rlhf, zero_stage=stage)
    for key, parameter in model.named_parameters():
        assert parameter.ds_status.name == "NOT_AVAILABLE" and parameter.numel() == 0, key
        assert parameter.ds_numel and torch.isfinite(parameter.ds_tensor).all(), key
    engine, *_ = deepspeed.initialize(model=model, config=dict(ds_config))
    engine.eval()
    with torch.no_grad():
        scores[name + str(stage)] = engine.module.forward_value(ids, return_value_only=True).tolist()
    critic.save_critic_model(engine, tokenizer, f"{output}-{len(scores)}")
message = None
try:
    critic.create_critic_model(broken, AutoTokenizer.from_pretrained(folder), ds_config, rlhf_training=True)
except ValueError as error:
    message = str(error)
assert "missing norm.weight" in message and "(3,)" in message, message
if torch.distributed.get_rank() == 0:
    json.dump(scores, open(output, "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


SHARED = """
import json, sys, torch, deepspeed, critic
from deepspeed.utils import safe_get_full_grad
from transformers import AutoTokenizer
folder, ds_config, output = sys.argv[-3:]
deepspeed.init_distributed()
ds_config, tokenizer = json.load(open(ds_config)), AutoTokenizer.from_pretrained(folder)
torch.manual_seed(torch.distributed.get_rank())
ids = torch.randint(2, 80, (4, 80))
ids[2:, :60] = ids[:2, :60]
mask = torch.ones_like(ids)
ids[3, 70:] = mask[3, 70:] = 0
worst = {}
for stage in (0, 1, 2, 3):
    ds_config["zero_optimization"]["stage"], found = stage, []
    for share in (True, False):
        model = critic.create_critic_model(folder, tokenizer, ds_config, rlhf_training=True)
        model.share_prefix = share
        if stage % 2:
            model.gradient_checkpointing_enable()
        engine, *_ = deepspeed.initialize(model=model, config=dict(ds_config))
        rows = []
        model.rwtransformer.register_forward_pre_hook(lambda m, a, k: rows.append(len(k["input_ids"])), with_kwargs=True)
        output_ = engine(ids, mask)
        engine.backward(output_["loss"])
        assert rows[0] == (2 if share else 4)
        found.append([*output_.values(), *(safe_get_full_grad(p) for p in model.parameters())])
    assert all(value is not None for value in found[0])
    worst[stage] = max((a - b).abs().max().item() for a, b in zip(*found))
    assert max(value.abs().max() for value in found[0][3:]) > 1e-3
if torch.distributed.get_rank() == 0:
    json.dump(worst, open(output, "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_loop_the_pair_in_one_row_at_every_zero_stage(tokenizer, tmp_path):
    """Loss, end scores and every gradient as in two rows, on two ranks; with gradient checkpointing at 1 and 3."""
    folder = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    tokenizer.save_pretrained(folder)
    (tmp_path / "shared.py").write_text(SHARED)
    config = write_ds_config(
        tmp_path / "ds.json", 0, scheduler={"type": "WarmupLR", "params": {}}, gradient_clipping=0
    )
    launch(tmp_path / "shared.py", folder, config, tmp_path / "worst.json")
    worst = json.loads((tmp_path / "worst.json").read_text())
    assert set(worst) == set("0123") and max(worst.values()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_loop_zero3_loads_partitioned_and_refuses_on_every_rank(name, tokenizer, tmp_path):
    model = make_model(name, tokenizer).eval()
    if name == "mixtral":  # whose experts lie in one tensor each in transformers 5, and apart in a checkpoint
        save_critic_model(model, tokenizer, tmp_path / "reward")
        folder = str(tmp_path / "reward")
    else:
        folder = write_deepspeed_chat(tmp_path / "reward", model)
    broken = write_deepspeed_chat(tmp_path / "broken", model)
    damage(
        broken,
        lambda s: (
            s.pop("rwtransformer.norm.weight"),
            s.update({"rwtransformer.layers.0.input_layernorm.weight": torch.ones(3)}),
        ),
    )
    tokenizer.save_pretrained(folder)
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"new{index}" for index in range(11)])
    grown = write_base(tmp_path / "grown", name, longer)
    (tmp_path / "zero3.py").write_text(ZERO3)
    config = write_ds_config(tmp_path / "ds.json", 3, scheduler={"type": "WarmupLR", "params": {}})
    launch(tmp_path / "zero3.py", folder, grown, broken, config, tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    expected = model.forward_value(torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]]), return_value_only=True)
    for stage in ("0", "3"):
        torch.testing.assert_close(torch.tensor(scores[folder + stage]), expected, atol=1e-5, rtol=0)
    again = create_critic_model(f"{tmp_path}/scores.json-3", longer, None, rlhf_training=True).eval()
    assert again.rwtransformer.get_input_embeddings().weight.shape[0] == 104
    values = again.forward_value(torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]]), return_value_only=True)
    torch.testing.assert_close(torch.tensor(scores[grown + "3"]), values, atol=1e-5, rtol=0)


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
    started = lambda out: (out / "metrics.jsonl").exists()
    many = write_rows(tmp_path / "many.jsonl", make_pairs(2000, seed=3))
    arguments = [*training(output), "--eval_path", many]
    assert run_and_kill(arguments, output, started, (1,), tmp_path / "log") != 0
    assert not read_whole_lines(output) and not (output / "model.safetensors").exists()


@pytest.mark.parametrize("interval", ["2", "0"])
def test_loop_a_full_disk_ends_the_run_with_the_folders_name(interval, training, tmp_path):
    """As if 50 kB were left: a checkpoint, or the critic at the end, cannot be written by rank 0."""
    output, port = tmp_path / "out", free_port()
    run = subprocess.run(
        command_line(HERE / "train_reward.py", *training(output), "--save_interval", interval, port=port), text=True, check=False,
        env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )  # fmt: skip
    forget(port)
    assert run.returncode != 0 and not (output / "model.safetensors").exists()
    place = "out/checkpoints: a checkpoint cannot be written" if interval == "2" else "out cannot be written"
    assert f"{place}" in run.stdout, run.stdout[-3000:]


def test_loop_resume_of_another_run_is_refused(training, trained, tmp_path):
    output = trained[1][2, 0][0]
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    other = write_rows(tmp_path / "other.jsonl", make_pairs(seed=5))
    changes = {
        "the training data": ["--data_path", other], "--seed": ["--seed", "1"], "--loss_on": ["--loss_on", "end"],
        "optimizer in the DeepSpeed config": ["--deepspeed_config", write_ds_config(
            tmp_path / "lr.json", gradient_accumulation_steps=2, optimizer={"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}})],
    }  # fmt: skip
    script = tmp_path / "drive.py"
    script.write_text(DRIVE)
    results = drive(
        script, {name: [*training(output), "--resume", *change] for name, change in changes.items()}, tmp_path
    )
    for name, (code, message) in results.items():
        assert (
            code == 1
            and f"{name}" in message
            and "the number of ranks" in message
            and "put it back" in message
        )
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*")}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "float32"), (0, "bf16"), (2, "float32"), (3, "float32")]
)
def test_loop_a_step_that_is_not_finite_is_skipped(stage, precision, training, tokenizer, tmp_path):
    """The embedding of w79 is NaN: one pair with it costs one step an epoch; nothing but such pairs, the run."""
    model = make_backbone("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("w79")["input_ids"][0]] = math.nan
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    good, held_out = (
        make_pairs(31, highest=78),
        write_rows(tmp_path / "eval.jsonl", make_pairs(8, 2, highest=78)),
    )
    bad = {"prompt": "w5 w79", "chosen": " w3 w1", "rejected": " w4 w2"}
    config = write_ds_config(tmp_path / "ds.json", stage, bf16={"enabled": precision == "bf16"})
    run = lambda output, *more: launch(
        HERE / "train_reward.py", "--model_name_or_path", tmp_path / "base", "--eval_path", held_out, "--max_seq_len", "64",
        "--data_path", tmp_path / f"{output}.jsonl", "--output_dir", tmp_path / output, "--num_train_epochs", "2",
        "--deepspeed_config", config, "--save_interval", "2", *more, ranks=None, check=False,
    )  # fmt: skip
    write_rows(tmp_path / "one.jsonl", [*good, bad])
    write_rows(tmp_path / "every.jsonl", [{**row, "prompt": row["prompt"] + " w79"} for row in good])
    one = run("one")
    assert one.returncode == 0, one.stdout[-3000:]
    metrics = read_metrics(tmp_path / "one")
    steps = [line for line in metrics if "epoch" in line]
    assert [line["loss"] for line in steps].count(None) == 2 == steps[-1]["skipped_steps"]
    assert metrics[-1]["eval_loss"] < metrics[0]["eval_loss"]
    every = run("every")
    assert every.returncode not in (0, None) and not (tmp_path / "every" / "model.safetensors").exists()
    said = next(line for line in every.stdout.splitlines() if "train_reward.py: error" in line)
    assert "step 5: loss nan" in said and str(tmp_path / "every/checkpoints/step-000000004") in said
    if precision == "bf16":  # the checkpoint is whole, and the count goes on
        again = run("every", "--resume")
        assert "step 5: loss nan" in again.stdout


# ---- bad input ----

# Calls train_reward.main() once for each case of a JSON file, in one process: {case: [exit code, what it said]}.
DRIVE = """
import contextlib, io, json, os, sys, traceback
os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
import train_reward
results = {}
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
    results[name] = code, said.getvalue()
json.dump(results, open(os.environ["RESULTS"], "w"))
"""


def drive(script, cases, folder):
    (folder / "cases.json").write_text(json.dumps({k: [str(word) for word in v] for k, v in cases.items()}))
    subprocess.run(
        [sys.executable, script, folder / "cases.json"], check=True,
        env=surroundings(RESULTS=str(folder / "results.json")),
    )  # fmt: skip
    return json.loads((folder / "results.json").read_text())


GOOD = {"prompt": "w3", "chosen": " w4 w1", "rejected": " w5 w2"}
TALK = [{"role": "user", "content": "w3"}]
# data: (bytes of the file, file name, what the message must hold)
BAD_DATA = {
    "an empty file": (b"", "pairs.jsonl", "no rows"),
    "not gzip though named so": (b"{}\n", "pairs.jsonl.gz", "pairs.jsonl.gz: cannot be read"),
    "broken UTF-8": (b'{"chosen": "\xff"}\n', "pairs.jsonl", "pairs.jsonl:1: not a JSON object in UTF-8"),
    "broken JSON in line 7": (json.dumps(GOOD).encode() + b"\n" * 6 + b"{,}\n", "pairs.jsonl", "pairs.jsonl:7: not a JSON"),
    "a JSON list": (b"[1, 2]\n", "pairs.jsonl", "pairs.jsonl:1: a list"),
    "a missing key": ({"prompt": "w3", "chosen": "w4"}, "pairs.jsonl", "rejected: NoneType"),
    "null": (GOOD | {"chosen": None}, "pairs.jsonl", "pairs.jsonl:1: chosen, rejected .*chosen: NoneType"),
    "a number for text": (GOOD | {"rejected": 3}, "pairs.jsonl", "rejected: int"),
    "an empty text": (GOOD | {"chosen": " "}, "pairs.jsonl", "pairs.jsonl:1: chosen or rejected is empty"),
    "equal in every row": (GOOD | {"rejected": GOOD["chosen"]}, "pairs.jsonl", "0 training pairs remain"),
    "every pair too long": (GOOD | {"prompt": "w3 " * 300}, "pairs.jsonl", "0 training pairs remain.*larger --max_seq_len"),
    "one pair only": (GOOD, "pairs.jsonl", "0 training pairs remain, at least 1"),
    "texts and messages": (GOOD | {"chosen": TALK}, "pairs.jsonl", "all be texts or all be messages"),
    "messages without a template": ({"chosen": TALK, "rejected": TALK}, "pairs.jsonl", "no chat template"),
}  # fmt: skip
BAD_TALK = {
    "a message without role": ([{"content": "w3"}], 'must be {"role": text'),
    "an unknown role": ([{"role": "robot", "content": "w3"}], "unknown role 'robot'"),
    "a message that is none": (["w3"], 'must be {"role": text'),
    "no message": ([], "no message"),
    "content that is no text": ([{"role": "user", "content": 3}], 'must be {"role": text'),
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
    "evaluating a base model": (["--num_train_epochs", "0"], "no value head"),
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
    "two precisions": ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "cannot be simultaneously"),
    "more accumulation than data": ({"gradient_accumulation_steps": 99}, "gradient_accumulation_steps: lower it"),
}  # fmt: skip
BAD_MODELS = {
    "config without weights": (lambda f: (f / "model.safetensors").unlink(), "holds no weights: none of"),
    "a truncated safetensors": (lambda f: cut(f / "model.safetensors"), "model.safetensors cannot be read"),
    "a truncated .bin": (lambda f: cut(as_bin(f)), "pytorch_model.bin cannot be read"),
    "a pickle with code": (lambda f: as_bin(f).write_bytes(pickle.dumps(Payload(f.parent / "ran"))), "pytorch_model.bin cannot be read"),
    "not a decoder": (lambda f: make_bert(f), "a critic needs a causal decoder"),
    "an unknown model type": (lambda f: edit(f / "config.json", model_type="nonesuch"), "nonesuch"),
    "a config that is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json"),
    "a tokenizer without EOS": (lambda f: edit(f / "tokenizer_config.json", eos_token=None), "no EOS token"),
    "no tokenizer": (lambda f: [file.unlink() for file in f.glob("tokenizer*")], "tokenizer"),
}  # fmt: skip


def cut(path):
    path.write_bytes(path.read_bytes()[:5000])


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
    write_rows(folder / "good.jsonl", make_pairs(24))
    (folder / "used").mkdir()
    (folder / "used" / "metrics.jsonl").write_text("{}\n")
    config = write_ds_config(folder / "good.json")
    usual = lambda **changed: [
        word
        for name, value in ({"model_name_or_path": "base", "data_path": "good.jsonl", "output_dir": "out", "max_seq_len": 64,
                             "deepspeed_config": config} | changed).items()
        for word in (f"--{name}", value)
    ]  # fmt: skip
    cases, expected = {}, {}
    for name, (content, file, message) in BAD_DATA.items():
        place = folder / name.replace(" ", "_")
        place.mkdir()
        (place / file).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        cases[name], expected[name] = usual(data_path=place / file), message
    talker = copy.deepcopy(tokenizer)
    talker.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    write_base(folder / "talker", "llama", talker)
    for name, (messages, message) in BAD_TALK.items():
        path = folder / f"{name.replace(' ', '_')}.jsonl"
        write_rows(path, [{"chosen": messages, "rejected": TALK}])
        cases[name], expected[name] = (
            usual(data_path=path, model_name_or_path="talker"),
            rf"\.jsonl:1: .*{message}",
        )
    for name, (arguments, message) in BAD_ARGUMENTS.items():
        cases[name], expected[name] = [*usual(), *arguments], message
    for name, (change, message) in BAD_CONFIGS.items():
        path = folder / f"{name.replace(' ', '_')}.json"
        good = json.loads(Path(config).read_text())
        kept = {} if isinstance(change, str) else {k: v for k, v in (good | change).items() if v is not None}
        path.write_text(change if isinstance(change, str) else json.dumps(kept))
        cases[name], expected[name] = usual(deepspeed_config=path), message
    for name, (spoil, message) in BAD_MODELS.items():
        path = folder / name.replace(" ", "_")
        write_base(path, "llama", tokenizer)
        spoil(path)
        cases[name], expected[name] = usual(model_name_or_path=path), message
    cases["no model"], expected["no model"] = ["--data_path", "good.jsonl"], "--model_name_or_path is None"
    cases["no data"], expected["no data"] = ["--model_name_or_path", "base"], "--data_path is None"
    (folder / "drive.py").write_text(DRIVE)
    os.chdir(folder)
    results = drive(folder / "drive.py", cases, folder)
    os.chdir(HERE)
    left = (
        sorted(path.name for path in folder.glob("out*")) + list(folder.glob("ran")),
        (folder / "used" / "metrics.jsonl").read_text(),
    )
    return {name: (*results[name], expected[name]) for name in cases}, left


CASES = [*BAD_DATA, *BAD_TALK, *BAD_ARGUMENTS, *BAD_CONFIGS, *BAD_MODELS, "no model", "no data"]


@pytest.mark.parametrize("case", CASES)
def test_loop_bad_input_is_told_plainly_and_touches_nothing(case, refusals):
    code, said, message = refusals[0][case]
    assert code in (1, 2), said
    assert "Traceback" not in said and "train_reward.py: error: " in said
    assert re.search(message, said, re.DOTALL), said
    assert refusals[1] == ([], "{}\n")


def test_loop_fewer_pairs_than_ranks(training, tmp_path):
    data = write_rows(tmp_path / "one.jsonl", [GOOD])
    run = launch(HERE / "train_reward.py", *training(tmp_path / "out"), "--data_path", data, check=False)
    assert run.returncode != 0 and "1 training pairs remain, at least 2" in run.stdout
    assert not (tmp_path / "out").exists()


def test_loop_odd_text_trains_and_an_untrained_rest_is_counted(demonstration, tmp_path):
    """On the demonstration's byte-level tokenizer; then the same files only evaluate."""
    odd = [
        "\ud800 lone",
        "NUL \0 here",
        "\u05e9\u05dc\u05d5\u05dd \u202ertl",
        "a" * 100_000,
        "\U0001f600 \U0001f468\u200d\U0001f469",
    ]
    rows = [
        {"prompt": f"p{i} {text[:40]}", "chosen": f" {text}", "rejected": " no"} for i, text in enumerate(odd)
    ]
    data, held_out = write_rows(tmp_path / "odd.jsonl", rows), write_rows(tmp_path / "eval.jsonl", rows[:2])
    arguments = ["--model_name_or_path", demonstration, "--eval_path", held_out, "--max_seq_len", "256"]
    run = launch(
        HERE / "train_reward.py", *arguments, "--data_path", data, held_out, "--output_dir", tmp_path / "out", ranks=None
    )  # fmt: skip
    assert "6 pairs remain of 7; left out, 1 longer than 256 tokens" in run.stdout
    assert "warning: 2 prompts of the held-out data are in the training data too" in run.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
    run = launch(
        HERE / "train_reward.py", *arguments, "--num_train_epochs", "0", "--output_dir", tmp_path / "none"
    )
    evaluated = json.loads(next(line for line in run.stdout.splitlines() if line.startswith('{"eval_loss')))
    assert set(evaluated) == {
        "eval_loss", "eval_accuracy", "eval_margin", "eval_chosen_score", "eval_rejected_score"
    }  # fmt: skip
    assert not (tmp_path / "none").exists() and "chosen   ..." in run.stdout


def test_loop_dialogues_and_messages_split_by_prompt(tokenizer):
    import train_reward

    talker = copy.deepcopy(tokenizer)
    talker.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}<eos>\n"
    say = lambda *texts: [{"role": "user", "content": text} for text in texts]
    rows = [
        (
            "a:1",
            {"chosen": "\n\nHuman: w3\n\nAssistant: w4", "rejected": "\n\nHuman: w3\n\nAssistant: w4 w5"},
        ),
        ("a:2", {"chosen": "\n\nHuman: w3\n\nAssistant: w6", "rejected": "\n\nHuman: w3\n\nAssistant: w7"}),
        ("a:3", {"prompt": say("w3"), "chosen": say("w4"), "rejected": say("w5")}),
        ("a:4", {"chosen": say("w3", "w6"), "rejected": say("w3", "w7")}),
    ]
    pairs = train_reward.tokenize(rows, talker, 64, "data")
    assert (
        pairs[0]["prompt"] == pairs[1]["prompt"] == "\n\nHuman: w3"
        and pairs[2]["prompt"] == pairs[3]["prompt"]
    )
    ids = lambda text: tokenizer(text)["input_ids"]
    assert pairs[2]["chosen"] == ids("w3 w4 <eos>") and pairs[2]["divergence"] == 1
    assert pairs[0]["chosen"][-1] == pairs[0]["rejected"][-1] == tokenizer.eos_token_id
    for seed in range(5):
        train, held_out = train_reward.split_by_prompt(pairs, 0.5, seed)
        assert len(train) == len(held_out) == 2 and train[0]["prompt"] != held_out[0]["prompt"]


# ---- saving ----


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
        loaded = create_critic_model(str(tmp_path / "critic"), tokenizer, None, rlhf_training=True)
        same = [
            all(torch.equal(v, m.state_dict()[k]) for k, v in loaded.state_dict().items()) for m in models
        ]
        assert sum(same) == 1


def test_a_full_disk_names_the_folder_and_leaves_the_old_critic(tokenizer, tmp_path):
    model = make_model("llama", tokenizer)
    save_critic_model(model, tokenizer, tmp_path / "critic")
    before = (tmp_path / "critic" / "model.safetensors").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk with 20 kB left
    try:
        with pytest.raises(OSError, match=str(tmp_path / "critic")):
            save_critic_model(model, tokenizer, tmp_path / "critic")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "critic" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "critic" / ".writing").exists()
    with pytest.raises(OSError, match="config.json/below"):
        save_critic_model(model, tokenizer, tmp_path / "critic" / "config.json" / "below")


# ---- step 3 ----

PPO = """
import json, sys, torch, deepspeed, critic
from transformers import AutoTokenizer
folder, ds_config, data, output = sys.argv[-4:]
deepspeed.init_distributed()
ds_config = json.load(open(ds_config))
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
if torch.distributed.get_rank() == 0:
    json.dump(results, open(output, "w"))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("stage", [0, 3])
def test_loop_step_3_as_a_ppo_trainer_takes_it(stage, trained, tmp_path):
    folder = trained[1][2, stage][0]
    rows = [json.loads(line) for line in trained[0].read_text().splitlines()][:5]
    texts = [row["prompt"] for row in rows], [row["chosen"] + " <eos>" for row in rows]
    (tmp_path / "ppo.py").write_text(PPO)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    config = write_ds_config(
        tmp_path / "ds.json", stage, scheduler={"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3}}
    )
    launch(tmp_path / "ppo.py", folder, config, tmp_path / "texts.json", tmp_path / "scores.json")
    results = json.loads((tmp_path / "scores.json").read_text())
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


# ---- the benchmark: python test_critic.py [--model PATH --data FILE] ----


def resident(name="VmRSS"):
    """MiB of memory that this process has (VmRSS), or had at most (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def peak_above_start(run, device):
    if device.type == "cuda":
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - start) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what an earlier run left in the allocator would hide this one's need
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start = resident()
    run()
    return resident("VmHWM") - start


def seconds(run, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def deepspeed_chat_loss(model, input_ids, attention_mask):
    """The way of DeepSpeed-Chat: two rows of the whole width, a Python loop with device syncs in each pair."""
    hidden = model.rwtransformer(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
    rewards, B, loss = model.v_head(hidden).squeeze(-1), len(input_ids) // 2, 0
    for c_ids, r_ids, c_rewards, r_rewards in zip(input_ids[:B], input_ids[B:], rewards[:B], rewards[B:]):
        ends = [ids.eq(model.PAD_ID).nonzero() for ids in (c_ids, r_ids)]
        end = max(found[0].item() if len(found) else len(c_ids) for found in ends)
        p = (c_ids != r_ids).nonzero()[0].item()
        loss = loss - F.logsigmoid(c_rewards[p:end] - r_rewards[p:end]).mean()
    return loss / B


def benchmark_pairs(arguments, tokenizer, vocab):
    import train_reward

    if arguments.data:
        return train_reward.tokenize(train_reward.read_rows(arguments.data), tokenizer, 512, arguments.data)
    rng, pairs = random.Random(0), []
    for _ in range(8 * arguments.pairs):  # dialogue-like: p about 120, e - p about 60
        ids = lambda count: [rng.randrange(10, vocab) for _ in range(count)]
        scale = arguments.length / 180
        prefix, tails = (
            ids(int(scale * rng.randint(60, 180))),
            [ids(int(scale * rng.randint(30, 70))) for _ in "cr"],
        )
        pairs.append(
            {
                "prompt": "",
                "chosen": prefix + [8] + tails[0],
                "rejected": prefix + [9] + tails[1],
                "divergence": len(prefix),
            }
        )
    return pairs


def benchmark_steps(arguments):
    import train_reward

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        backbone = AutoModel.from_pretrained(arguments.model, dtype=dtype)
    else:
        tokenizer = argparse.Namespace(pad_token_id=0)
        config = AutoConfig.for_model(
            "llama", vocab_size=4096, hidden_size=arguments.hidden_size, intermediate_size=arguments.hidden_size * 8 // 3,
            num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden_size // 64, max_position_embeddings=8192,
        )  # fmt: skip
        backbone = AutoModel.from_config(config, dtype=dtype)
    model = RewardModel(backbone, tokenizer).to(device).train()
    pairs = benchmark_pairs(arguments, tokenizer, backbone.config.vocab_size)
    fixed, size = max(512, arguments.length * 2), 8
    groups = lambda rows: [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
    # Batches of like length over the whole data, and of these some, from short to long; the same pairs in all ways.
    every = groups(sorted(pairs, key=lambda pair: train_reward.cost(pair, model)))
    count = min(max(1, arguments.pairs // size), len(every))
    by_length = [pair for n in range(count) for pair in every[(2 * n + 1) * len(every) // (2 * count)]]
    pairs = random.Random(1).sample(by_length, len(by_length))
    collate = lambda rows: train_reward.collate(rows, model.PAD_ID, fixed, device)

    def step(rows, share, loop=False):
        model.zero_grad()
        model.share_prefix = share
        batch = collate(rows)
        if loop:
            batch["input_ids"] = F.pad(
                batch["input_ids"], (0, fixed - batch["input_ids"].size(1)), value=model.PAD_ID
            )
            batch["attention_mask"] = F.pad(
                batch["attention_mask"], (0, fixed - batch["attention_mask"].size(1))
            )
            deepspeed_chat_loss(model, **batch).backward()
        else:
            model(**batch)["loss"].backward()

    ways = {
        f"two rows padded to {fixed}, loop over pairs": [
            lambda rows=rows: step(rows, False, True) for rows in groups(pairs)
        ],
        "two rows padded to the longest": [lambda rows=rows: step(rows, False) for rows in groups(pairs)],
        "two rows of like length": [lambda rows=rows: step(rows, False) for rows in groups(by_length)],
        "shared prefix, like length": [lambda rows=rows: step(rows, True) for rows in groups(by_length)],
    }
    count = size * len(groups(pairs))
    computed = []
    hook = model.rwtransformer.register_forward_pre_hook(
        lambda module, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    tokens, memory = {}, {}
    for name, steps in tqdm(ways.items(), desc="warming up", leave=False):  # every shape is met once
        computed.clear()
        memory[name] = max(peak_above_start(run, device) for run in steps)
        tokens[name] = sum(computed) / count
    hook.remove()
    times = {name: [] for name in ways}
    for _ in tqdm(range(arguments.repeats), desc="measuring", leave=False):
        for name, steps in ways.items():
            times[name].append(sum(seconds(run, device) for run in steps))
    median = {name: statistics.median(values) for name, values in times.items()}
    like, ideal = (
        median["two rows of like length"],
        statistics.mean(train_reward.cost(pair, model) for pair in pairs),
    )
    cores = f"{torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name()
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"\n1. A training step, forward and backward: {parameters:.0f}M parameters, {arguments.dtype}, {cores}, {count} pairs, "
          f"batch {size}; p + 2 (e - p) is {ideal:.0f} tokens; median of {arguments.repeats}")  # fmt: skip
    print("| way | pairs a second | speed | tokens a pair | peak MiB |\n| --- | --- | --- | --- | --- |")
    for name in ways:
        print(
            f"| {name} | {count / median[name]:.2f} | {like / median[name]:.2f} | {tokens[name]:.0f} | {memory[name]:.0f} |"
        )
    promised = tokens["two rows of like length"] / tokens["shared prefix, like length"]
    gained = like / median["shared prefix, like length"]
    print(
        f"The ratio of tokens promises {promised:.2f}, the clock gives {gained:.2f}: {gained / promised:.2f} of it."
    )

    rows = groups(by_length)[len(by_length) // size // 2]
    model.share_prefix, batch, hidden = True, collate(rows), {}
    whole, rest = [], []
    forward = model.rwtransformer.forward
    for repeat in range(arguments.repeats + 1):
        model.zero_grad()
        took = seconds(lambda: model(**batch)["loss"].backward(), device)

        def without_backbone(input_ids, **kwargs):
            shape = (*input_ids.shape, model.v_head.in_features)
            if "states" not in hidden:
                hidden["states"] = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
            return (hidden["states"],)

        model.rwtransformer.forward = without_backbone
        model(**batch)["loss"].backward()
        alone = seconds(lambda: model(**batch)["loss"].backward(), device)
        model.rwtransformer.forward = forward
        if repeat:
            whole.append(took)
            rest.append(alone)
    print(
        f"\n2. Everything that is not the backbone: {100 * statistics.median(rest) / statistics.median(whole):.2f}% of a step."
    )


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


def benchmark_load(arguments):
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.for_model(
            "llama",
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=22,
            num_attention_heads=16,
        )
        model = RewardModel(AutoModel.from_config(config), argparse.Namespace(pad_token_id=0))
        parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        write_deepspeed_chat(Path(folder) / "reward", model)
        del model
        found = {"plain": [], "create_critic_model": []}
        for _ in tqdm(range(3), desc="loading", leave=False):
            for way, results in found.items():
                command = [sys.executable, "-c", LOAD, way, str(Path(folder) / "reward")]
                run = subprocess.run(
                    command,
                    cwd=HERE,
                    check=True,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                results.append([float(word) for word in run.stdout.split()[-2:]])
        (plain, plain_memory), (ours, memory) = (
            [statistics.median(column) for column in zip(*results)] for results in found.values()
        )
    print(f"\n3. Loading a checkpoint of {parameters:.0f}M parameters in float32, median of 3")
    print("| way | seconds | peak MiB above the start |\n| --- | --- | --- |")
    print(f"| build, `torch.load`, `load_state_dict` | {plain:.2f} | {plain_memory:.0f} |")
    print(f"| `create_critic_model(..., rlhf_training=True)` | {ours:.2f} | {memory:.0f} |")
    print(f"{plain / ours:.1f} times faster, {memory / plain_memory:.2f} of the memory.")


def benchmark():
    parser = argparse.ArgumentParser(description="The benchmark: ratios measured side by side in one run.")
    parser.add_argument("--model", help="a decoder's folder or hub id (default: a Llama made on the spot)")
    parser.add_argument(
        "--data", help="preference pairs, .jsonl or .jsonl.gz (default: dialogue-like ones made on the spot)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--pairs", type=int, default=32, help="pairs to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--length", type=int, default=180, help="longest row, about, of the pairs made on the spot"
    )
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    arguments = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count())
    benchmark_steps(arguments)
    benchmark_load(arguments)


if __name__ == "__main__":
    benchmark()
