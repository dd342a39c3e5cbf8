# SPDX-License-Identifier: MIT
"""What critic.py and train_reward.py promise, checked offline on a CPU: `pytest`. As a program: the benchmark.

`reference_*` are the plain, slow meaning of the rules, a loop over rows and tokens; the tests compare with them.
"""

import argparse
import copy
import ctypes
import gzip
import json
import math
import os
import pickle
import random
import re
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


def reference_rewards(model, ids, mask, n):
    """One row, its content moved to column 0 and PAD behind, through backbone and head: rewards (T,), content length."""
    T = len(ids)
    first, last = reference_content(ids, mask, n)
    row = ids[first : last + 1] + [PAD] * (T - (last + 1 - first))
    bits = None if mask is None else torch.tensor([mask[first : last + 1] + [0] * (T - (last + 1 - first))])
    hidden = model.rwtransformer(input_ids=torch.tensor([row]), attention_mask=bits, use_cache=False)[0]
    return model.v_head(hidden)[0, :, 0], last + 1 - first, row


def reference_loss(model, input_ids, attention_mask=None, loss_on="tokens", n=0):
    B, rows = len(input_ids) // 2, []
    for index in range(2 * B):
        mask = None if attention_mask is None else attention_mask[index].tolist()
        rows.append(reference_rewards(model, input_ids[index].tolist(), mask, n))
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
    name, attention, loss_on, masked, tokenizer
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


def test_what_else_keeps_a_pair_in_two_rows():
    llama = {"rope_theta": 10000.0, "factor": 2.0}
    for rope, shares in (("linear", True), ("dynamic", False)):
        config = AutoModel.from_config(make_config("llama", rope_scaling=llama | {"rope_type": rope})).config
        assert critic.can_share_prefix(config, 64, 96) == shares
    config = AutoModel.from_config(make_config("gpt2")).config
    assert critic.can_share_prefix(config, 64, 256) and not critic.can_share_prefix(config, 64, 288)
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
    length = critic.align_content(ids, mask if masked else None, PAD, n)[1]
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
    gradients = []
    for switch in (model.gradient_checkpointing_enable, model.gradient_checkpointing_disable):
        switch()
        model.zero_grad()
        model(ids, mask)["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


rows_of_ids = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
    "no rows": (lambda m: m(IDS[:0]), "0 rows"),
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


def test_forward_makes_at_most_one_sync_and_no_loop(tokenizer, monkeypatch):
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
            lambda input_ids=None, attention_mask=None, position_ids=None, use_cache=None: (
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


class Payload:
    def __reduce__(self):
        return (os.mkdir, (str(Path(os.environ["PAYLOAD"])),))


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
    "a mis-shaped key": (lambda f, b: damage(f, lambda s: s.update({"rwtransformer.norm.weight": torch.ones(3)})), r"norm.weight is \(3,\)"),
    "two labels": (lambda f, b: damage(f, lambda s: s.update({"v_head.weight": torch.ones(2, 32)})), r"shape \(2, 32\)"),
    "a base model": (lambda f, b: b, "rlhf_training=False"),
    "no weights": (lambda f, b: (Path(f, "pytorch_model.bin").unlink(), f)[1], "model.safetensors"),
    "a pickle with code": (lambda f, b: replace(Path(f, "pytorch_model.bin"), pickle.dumps(Payload())), "pytorch_model.bin cannot be read"),
    "a truncated .bin": (lambda f, b: replace(Path(f, "pytorch_model.bin"), Path(f, "pytorch_model.bin").read_bytes()[:5000]), "pytorch_model.bin cannot be read"),
    "a truncated .safetensors": (lambda f, b: replace(Path(b, "model.safetensors"), Path(b, "model.safetensors").read_bytes()[:5000]), "model.safetensors cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused(case, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "ran"))
    folder = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    base = write_base(tmp_path / "base", "llama", tokenizer)
    spoil, message = BAD_CHECKPOINTS[case]
    with pytest.raises(ValueError, match=message):
        create_critic_model(spoil(folder, base), tokenizer, None, rlhf_training=True)
    assert not (tmp_path / "ran").exists()


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
        with pytest.raises(ValueError, match=f"{model_type} model: a critic needs a decoder"):
            create_critic_model(str(tmp_path / model_type), tokenizer, {})
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


def test_import_needs_no_deepspeed():
    code = "import sys, critic; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


# ---- the loop, on real processes ----


def launch(script, *arguments, ranks=2, check=True, **environment):
    """`deepspeed` as a user types it, with its output; two ranks share the machine's cores."""
    launcher = Path(sys.executable).with_name("deepspeed")
    command = [
        sys.executable,
        launcher,
        "--num_accelerators",
        ranks,
        "--master_port",
        free_port(),
        script,
        *arguments,
    ]
    environment = (
        os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
    )
    run = subprocess.run(
        [str(word) for word in command],
        check=False,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    if check:
        assert run.returncode == 0, run.stdout[-6000:]
    return run


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


def write_pairs(path, count=48, seed=0, chosen="w1", rejected="w2"):
    """Text pairs: an answer that ends with `chosen` is preferred to one that ends with `rejected`."""
    rows, rng = [], random.Random(seed)
    for index in range(count):
        words = lambda least, most: " ".join(
            f"w{rng.randint(3, 80)}" for _ in range(rng.randint(least, most))
        )
        rows.append(
            {
                "prompt": words(1, 12) + f" w{index}",
                "chosen": f" {words(1, 6)} {chosen}",
                "rejected": f" {words(1, 6)} {rejected}",
            }
        )
    with (gzip.open if str(path).endswith(".gz") else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture(scope="session")
def trained(tokenizer, tmp_path_factory):
    """Train on one rank, and on two at every ZeRO stage; {(ranks, stage): (output_dir, metrics, output)}."""
    folder = tmp_path_factory.mktemp("trained")
    base = write_base(folder / "base", "llama", tokenizer)
    data, held_out = write_pairs(folder / "train.jsonl.gz"), write_pairs(folder / "eval.jsonl", 21, seed=1)
    runs = {}
    for ranks, stage in ((1, 0), (2, 0), (2, 1), (2, 2), (2, 3)):
        config, output = write_ds_config(folder / f"{ranks}-{stage}.json", stage), folder / f"{ranks}-{stage}"
        run = launch(
            HERE / "train_reward.py", "--model_name_or_path", base, "--data_path", data, "--eval_path", held_out, "--max_seq_len", "64",
            "--output_dir", output, "--deepspeed_config", config, "--num_train_epochs", "2", "--compute_fp32_loss", ranks=ranks,
        )  # fmt: skip
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        runs[ranks, stage] = (output, metrics, run.stdout)
    return held_out, runs


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_and_save_at_every_stage(stage, trained):
    held_out, runs = trained
    output, metrics, _ = runs[2, stage]
    evaluations = [line for line in metrics if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 12]  # 2 epochs of 48 pairs, 2 ranks of 4
    assert evaluations[1]["eval_loss"] < evaluations[0]["eval_loss"]
    tokenizer = AutoTokenizer.from_pretrained(output)
    model = create_critic_model(str(output), tokenizer, None, rlhf_training=True).eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(output).eval()
    margins, losses = [], []
    for line in Path(held_out).read_text().splitlines():
        row = json.loads(line)
        ids, mask = pad_rows(
            [tokenizer(row["prompt"] + row[side])["input_ids"] + [1] for side in ("chosen", "rejected")]
        )
        with torch.no_grad():
            scores = model(ids, mask)
            logits = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        torch.testing.assert_close(
            logits,
            torch.cat([scores["chosen_mean_scores"], scores["rejected_mean_scores"]]),
            atol=1e-5,
            rtol=0,
        )
        margins.append((scores["chosen_mean_scores"] - scores["rejected_mean_scores"]).item())
        losses.append(scores["loss"].item())
    assert sum(margins) / len(margins) == pytest.approx(evaluations[1]["eval_margin"], abs=1e-5)
    assert sum(margin > 0 for margin in margins) / len(margins) == pytest.approx(
        evaluations[1]["eval_accuracy"]
    )
    assert sum(losses) / len(losses) == pytest.approx(evaluations[1]["eval_loss"], abs=1e-5)


def test_two_ranks_evaluate_exactly_as_one(trained):
    first = {key: runs[1][0] for key, runs in trained[1].items()}
    assert first[2, 0] == first[2, 1] == first[2, 2] == first[1, 0]


def test_stages_take_the_same_steps(trained):
    losses = {
        key: [line["loss"] for line in runs[1] if "loss" in line]
        for key, runs in trained[1].items()
        if key[0] == 2
    }
    for stage in (1, 2):
        assert losses[2, stage] == pytest.approx(losses[2, 0], abs=1e-4)


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


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_zero3_loads_partitioned_and_refuses_on_every_rank(name, tokenizer, tmp_path):
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


def test_the_demonstration_learns(tmp_path):
    """`deepspeed train_reward.py` with no data and no network: the README's first command."""
    launch(HERE / "train_reward.py", "--output_dir", tmp_path / "out", ranks=1, OMP_NUM_THREADS="2")
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["eval_accuracy"] >= 0.9
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = create_critic_model(str(tmp_path / "out"), tokenizer, None, rlhf_training=True).eval()
    text = "The value of the expression is used as the argument of the function call"
    noise = "The value of hte epxresison is sued as hte raugment fo the ufncitno clal"
    ids, mask = pad_rows([tokenizer(line + "<eos>")["input_ids"] for line in (text, noise)])
    chosen, rejected = model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"].tolist()
    assert chosen > rejected


def test_the_readmes_python_runs_as_printed(trained, tokenizer, tmp_path):
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
    for _ in range(arguments.pairs):  # dialogue-like: p about 120, e - p about 60
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
    random.Random(1).shuffle(pairs)
    fixed, size = max(512, arguments.length * 2), 8
    pairs = pairs[: arguments.pairs]
    by_length = sorted(pairs, key=lambda pair: train_reward.cost(pair, model))
    groups = lambda rows: [rows[at : at + size] for at in range(0, len(rows) - size + 1, size)]
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
    for name, steps in ways.items():  # the warm-up: every shape is met once
        computed.clear()
        memory[name] = max(peak_above_start(run, device) for run in steps)
        tokens[name] = sum(computed) / count
    hook.remove()
    times = {name: [] for name in ways}
    for _ in range(arguments.repeats):
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
        for _ in range(3):
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
    parser.add_argument("--repeats", type=int, default=5)
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
