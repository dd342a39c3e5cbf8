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
import importlib.util
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import critic
from critic import RewardModel, create_critic_model, save_critic_model

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other
HERE = Path(__file__).parent
PAD, VOCAB = 0, 96
BF16, FP16 = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}
SIDES = ("chosen", "rejected")

# What an attribute becomes, in whatever family it occurs.
TINY = {
    r"hidden_size|d_model|n_embd|emb(edding)?_dim|(input_)?embedding_size|word_embed_proj_dim|lru_width|mamba_d_ssm|attention_hidden_size": 32,
    r"intermediate_size|(encoder_|decoder_)?ffn_dim|n_inner|ffn_hidden_size|dim_ff|dff|d_inner": 48,
    r"\w+_intermediate_size|intermediate_size_mlp|expert_ffn_hidden_size|\w+_lora_rank|\w+_embed_dim": 16,
    r"(?!qk_head)(\w+_)?head_?dim|rotary_dim|dim_head|mamba_d_(head|state)|(ssm_)?state_size|kv_channels|index_topk|router_hidden_size": 8,
    r"sliding_window(_size)?|(attention_)?window_size|local_attention|\w*chunk_size|block_size|hidden_size_per_layer_input": 8,
    r"num_(attention_|decoder_attention_|encoder_attention_|linear_)?heads|(encoder_|decoder_)?attention_heads|n_heads?|swa_num_attention_heads|linear_num_\w+_heads|mamba_n(um)?_heads|n_mamba_heads|index_n_heads": 4,
    r"(\w+_)?num_experts|num_local_experts|n_routed_experts|zero_expert_num": 4,
    r"num_experts_per_tok(en)?|moe_k|moe_topk|moe_layer_end_index|\w+_layer_period|num_kv_shared_layers|encoder_layers|num_encoder_layers": 2,
    r"n_groups?|topk_group|num_expert_group|(mamba_)?expand|\w+_layer_offset|first_k_dense_replace|num_dense_layers|max_window_layers|moe_layer_start_index|\w+_shared_experts": 1,
    r"(\w+_)?vocab(_size)?(_per_layer_input)?": 96,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len": 256,
    r"\w+_token_id": 1,
    r"use_sliding_window": True,
    r"attention_types": [[["global", "local"], 1]],
    r"per_layer_config": {},
}  # fmt: skip
LAYERS = r"num_hidden_layers|n_layers?|num_(decoder_)?layers|decoder_layers|num_blocks"
KINDS = r"(mlp_)?layer_types|layers_block_type|block_types"
WINDOWED = {"full_attention", "sliding_attention"}


def tiny_config(family, **overrides):
    """Any family's text decoder, 32 wide, with one layer of each kind; shrunk by the names of its attributes."""
    config = transformers.CONFIG_MAPPING[family] if isinstance(family, str) else family
    default = config().get_text_config(decoder=True)
    given = default.to_dict()
    tiny = {name: size for pattern, size in TINY.items() for name in given if re.fullmatch(pattern, name)}
    tiny |= {
        name: type(given[name])(0) for name in given if re.search("dropout$|_pdrop$", name) and given[name]
    }
    tiny |= {"pad_token_id": 0}
    for name in {"num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"} & given.keys():
        tiny[name] = 4 if given[name] in (given.get("num_attention_heads"), None) else 2
    if given.get("num_experts_per_tok") == 1:  # Zaya takes no more
        tiny["num_experts_per_tok"] = 1
    kinds = {name: set(given[name] or ()) for name in given if re.fullmatch(KINDS, name)}
    # Kinds of layers that released checkpoints have, though not the default config.
    if "sliding_window" in given and kinds.get("layer_types", {""}) <= WINDOWED:
        kinds["layer_types"] |= WINDOWED
    if "conv_L_cache" in given:
        kinds["layer_types"] |= {"conv", "full_attention"}
    if "mamba_d_state" in given and "layer_types" in kinds:
        kinds["layer_types"] |= {"linear_attention", "full_attention"}
    # Gemma's later layers share the keys of an earlier one of their kind, so that each kind is there twice.
    count = max([2, *map(len, kinds.values())]) * (1 + ("num_kv_shared_layers" in given))
    tiny |= {name: count for name in given if re.fullmatch(LAYERS, name)}
    tiny |= {name: (sorted(listed) * count)[:count] for name, listed in kinds.items() if listed}
    for name, part in vars(default).items():  # BLT's byte encoder, Phi-4's eyes and ears
        if isinstance(part, transformers.PretrainedConfig):
            tiny[name] = tiny_config(type(part)).to_dict()
    return type(default)(**tiny | overrides)


# name: (model_type, what differs from its tiny config)
FAMILIES = {
    name: (name, {}) for name in ("llama", "qwen2", "olmo2", "granite", "cohere", "qwen3", "gemma", "gpt2")
}
FAMILIES |= {
    name: (name, {}) for name in ("gpt_bigcode", "opt", "gptj", "gpt_neo", "gpt_neox", "bloom", "mpt", "phi")
}
FAMILIES |= {
    name: (name, {}) for name in ("starcoder2", "deepseek_v3", "stablelm", "qwen3_next", "gemma3_text")
}
FAMILIES |= {
    "opt-350m": ("opt", {"word_embed_proj_dim": 16}),
    "falcon": ("falcon", {"alibi": False}),
    "falcon-alibi": ("falcon", {"alibi": True}),
    "llama-dynamic": ("llama", {"max_position_embeddings": 24, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen2_moe-window": ("qwen2_moe", {}),
    "gemma2-window": ("gemma2", {}),
    "phi3-window": ("phi3", {}),
    "exaone4": ("exaone4", {}),
}  # fmt: skip
TREES = [name for name, (model_type, _) in FAMILIES.items() if model_type in critic.TREE_FAMILIES]
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


def longer_by(count, tokenizer):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"new{index}" for index in range(count)])
    return longer


def make_config(name, **overrides):
    model_type, differences = FAMILIES[name]
    return tiny_config(model_type, **differences | overrides)


def make_backbone(name, attention=None, seed=0, dropout=0.0, **overrides):
    torch.manual_seed(seed)
    config = make_config(name, **overrides)
    vars(config).update({key: dropout for key in vars(config) if dropout and re.search("drop(out)?$", key)})
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
    rng, rows = random.Random(seed), []
    ids = lambda low, high: [rng.randrange(2, VOCAB - 8) for _ in range(rng.randint(low, high))]
    turns = list(itertools.accumulate([[], ids(1, 9), ids(1, 6), ids(1, 4)]))
    for _ in range(2 * B):
        row = rng.choice(turns) + ids(1, longest - len(turns[-1]))
        if rows and rng.random() < 0.3:
            row = rng.choice(rows)
            row = row[: rng.randint(1, len(row))] + ids(0, 2) * rng.randint(0, 1)
        if pads and rng.random() < 0.2:
            row[rng.randrange(len(row))] = PAD
        row[0], row[-1] = row[0] or 3, row[-1] or 4
        rows.append(row)
    return rows


def pad_rows(rows, side="right", extra=3):
    """(ids, mask); `extra` columns more than the longest row."""
    T = max(map(len, rows)) + extra
    fill = lambda row, gap: row + gap if side == "right" else gap + row
    ids = [fill(row, [PAD] * (T - len(row))) for row in rows]
    mask = [fill([1] * len(row), [0] * (T - len(row))) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def same(a, b, what=""):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0, msg=lambda text: f"{what}: {text}")


def gradients(model, loss):
    """{name: gradient}; of zeros where there is none."""
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found))


# ---- the plain reference ----


def reference_content(ids, mask, n):
    """The columns of a row's content, by the rule's own words."""
    if mask is not None:
        return [t for t, bit in enumerate(mask) if bit]
    text = [t for t, token in enumerate(ids) if token != PAD]
    return list(range(max(0, text[0] - n), text[-1] + 1))


def reference_rewards(model, ids, mask, n, T):
    """One row, its content at column 0 and PAD behind: rewards (T,), content length, the row."""
    row = [ids[t] for t in reference_content(ids, mask, n)]
    length, padding = len(row), T - len(row)
    row += [PAD] * padding
    bits = None if mask is None else torch.tensor([[1] * length + [0] * padding])
    hidden = model.rwtransformer(input_ids=torch.tensor([row]), attention_mask=bits, use_cache=False)[0]
    return model.v_head(hidden)[0, :, 0], length, row


def reference_loss(model, input_ids, attention_mask=None, loss_on="tokens", n=0):
    B, ids = len(input_ids) // 2, input_ids.tolist()
    masks = [None] * (2 * B) if attention_mask is None else attention_mask.tolist()
    T = max(len(reference_content(row, mask, n)) for row, mask in zip(ids, masks))
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
    masks = [None] * len(input_ids) if attention_mask is None else attention_mask.tolist()
    rows, found = [], set()
    for ids, mask in zip(input_ids.tolist(), masks):
        rows.append([(ids[t], True) for t in reference_content(ids, mask, n)])
    for row, other in zip(rows, rows[len(rows) // 2 :] + rows[: len(rows) // 2]):
        read = max(len(row), len(other)) if loss_on == "tokens" else len(row)
        row = row + [(PAD, attention_mask is None)] * (read - len(row))
        found |= {tuple(row[: t + 1]) for t in range(read)}
    return len(found)


def assert_same_as_reference(model, ids, mask, n=0):
    loss, scores = reference_loss(model, ids, mask, model.loss_on, n)
    output = model(ids, mask)
    same(output["loss"], loss, "loss")
    same(torch.cat([output[f"{side}_mean_scores"] for side in SIDES]), scores, "end scores")
    found = gradients(model, output["loss"])
    for name, value in gradients(model, loss).items():
        same(found[name], value, f"gradient of {name}")


# ---- the model ----


def test_shapes_and_names(tokenizer):
    for name in PLAIN:
        model = make_model(name, tokenizer)
        ids, mask = pad_rows(random_rows(8))
        shapes = [value.shape for value in model(ids, mask).values()]
        assert shapes == [(), (3,), (3,)]
        values = model.forward_value(ids, mask, prompt_length=2)
        assert values["values"].shape == ids.shape and values["chosen_end_scores"].shape == (6,)
        assert model.forward_value(ids, mask, return_value_only=True, use_cache=False).shape == ids.shape
        assert model(ids.int(), mask.bool())["loss"] == model(ids, mask.float())["loss"]
        width = 16 if name == "opt-350m" else 32
        assert model.v_head.weight.shape == (1, width) and model.v_head.bias is None
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
    "no rows": (lambda m: m(IDS[:0]), r"input_ids \(0, 9\)"),
    "1-D ids": (lambda m: m(IDS[0]), r"input_ids \(9,\)"),
    "a mask of another shape": (lambda m: m(IDS, torch.ones(4, 8)), r"input_ids \(4, 9\), mask \(4, 8\): pass"),
    "a row of padding": (lambda m: m(IDS * torch.tensor([[1], [1], [0], [1]])), "row 2"),
    "a row masked out": (lambda m: m.forward_value(IDS, torch.tensor([[1], [0], [1], [1]]).expand(4, 9), return_value_only=True), "row 1"),
    "loss_on": (lambda m: (setattr(m, "loss_on", "mean"), m(IDS)), "loss_on is 'mean'"),
    "labels for ids": (lambda m: m(IDS.where(IDS != IDS[0, 3], -100)), "index out of range"),
    "a negative id": (lambda m: m.forward_value(torch.tensor([[3, -100, 5]])), "index out of range"),
    "past_key_values": (lambda m: m(IDS, past_key_values=()), "past_key_values: not supported"),
    "head_mask": (lambda m: m.forward_value(IDS, head_mask=torch.ones(2, 2)), "head_mask: not supported"),
}  # fmt: skip


@pytest.mark.parametrize("call", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(call, tokenizer):
    run, message = BAD_CALLS[call]
    with pytest.raises((ValueError, IndexError), match=message):
        run(make_model("llama", tokenizer))


# ---- each token once ----


def counted(model):
    """A list that grows by the tokens of each call of the backbone."""
    calls = []
    note = lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel())
    model.rwtransformer.register_forward_pre_hook(note, with_kwargs=True)
    return calls


# (chosen, rejected)
EDGES = [
    ([3, 4, 5], [3, 4, 5]),  # identical
    ([3, 4, 5], [6, 7]),  # nothing in common
    ([3, 4, 5, 6], [3, 4]),  # one begins the other
    ([3], [3, 4, 5]),
    ([3, PAD, 4, PAD, 5], [3, PAD, 6]),  # interior PAD
    ([3, 4, PAD, 5], [3, 4, 5]),  # PAD is the only difference
    ([3, 4, PAD, PAD, 5], [3, 4]),  # a prefix that ends in the other's padding
]


@pytest.mark.parametrize("loss_on", ["tokens", "end"])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_token_is_computed_once_and_equals_plain_rows(name, loss_on, tokenizer):
    """Edges and random trees against the loop: with a mask, with holes in it, or without; padded on either side,
    further than a window reaches; PAD at the beginning or not."""
    model = make_model(name, tokenizer).train()
    model.loss_on, calls = loss_on, counted(model)
    tree = name in TREES and model.rwtransformer._supports_attention_backend
    for seed in range(100 if name in ("opt", "llama", "bloom") else 9):
        rows = [*zip(*EDGES)] if seed < 2 else [random_rows(seed, B=1 + seed % 3)]
        side = "left" if seed % 2 else "right"
        ids, mask = pad_rows([list(row) for part in rows for row in part], side, extra=seed)
        if seed % 6 == 3:
            inside = (mask.cumsum(1) > 1) & (mask.flip(1).cumsum(1).flip(1) > 1)
            mask = mask.masked_fill(inside & (torch.rand(mask.shape) < 0.2), 0)
            ids = ids.where(mask == 1, 7)  # what stands under padding does not matter
        bits, n = None if seed % 3 else mask, seed // 3 % 2
        model.num_padding_at_beginning, model.share_prefix = n, True
        calls.clear()
        model(ids, bits), model.forward_value(ids, bits, return_value_only=True)
        once = [reference_tokens(ids, bits, reads, n) for reads in (loss_on, None)]
        assert (calls == once) == tree
        assert_same_as_reference(model, ids, bits, n)
        values = model.forward_value(ids, bits, return_value_only=True)
        model.share_prefix = False
        same(values, model.forward_value(ids, bits, return_value_only=True), "values")
        assert calls[-1] == len(ids) * max(
            len(reference_content(*row, n))
            for row in zip(ids.tolist(), [None] * len(ids) if bits is None else bits.tolist())
        )


EAGER = {"attention": "eager"}
OTHERS = [("llama", EAGER), ("opt", EAGER), ("bloom", EAGER)]


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_eager_attention_runs_padded_batches(name, options, tokenizer):
    model = make_model(name, tokenizer, **options)
    calls, rows = counted(model), random_rows(1)
    ids, mask = pad_rows(rows, "left")
    model(ids, mask)
    assert calls == [6 * max(map(len, rows))]
    if options is EAGER:
        assert_same_as_reference(model, ids, mask)


@pytest.mark.parametrize("fp32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, fp32, tokenizer):
    ids, mask = pad_rows([list(range(3, 60)) + row for row in random_rows(6, pads=False)], "left")
    exact, model = make_model("llama", tokenizer), make_model("llama", tokenizer, fp32=fp32)
    for parameter in model.parameters():  # not the buffers, as `from_pretrained` does
        parameter.data = parameter.data.to(dtype)
    for model.share_prefix, bits in itertools.product((True, False), (mask, None)):
        output = model(ids, bits)
        assert output["loss"].item() == pytest.approx(exact(ids, bits)["loss"].item(), rel=0.01)
        assert {value.dtype for value in output.values()} == {torch.float32 if fp32 else dtype}
        assert all(value.isfinite().all() for value in gradients(model, output["loss"]).values())
    ids, mask = pad_rows(random_rows(6), extra=0)
    hidden = model.rwtransformer(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    scores = (hidden.double() @ model.v_head.weight.double().T)[range(6), mask.sum(1) - 1, 0]
    found = model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"]
    assert ((found.double() - scores).abs().max() < 1e-5) == fp32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert make_model("llama", tokenizer, fp32=True)(ids, mask)["loss"].dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient(tokenizer, monkeypatch):
    model = make_model("llama", tokenizer).train()
    model.rwtransformer.get_input_embeddings().requires_grad_(False)  # the reentrant kind would lose all
    calls, found, masks_for = [], [], critic.PrefixTree.masks_for
    count = lambda *args: calls.append(1) or masks_for(*args)
    monkeypatch.setattr(critic.PrefixTree, "masks_for", count)
    standard = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    for switch in (
        model.gradient_checkpointing_enable,
        functools.partial(model.gradient_checkpointing_enable, **standard),
        model.gradient_checkpointing_disable,
    ):
        switch()
        found.append(gradients(model, model(*pad_rows(random_rows(6)))["loss"]))
    assert len(calls) == 2 * (2 * 2) + 2  # of two layers, the first two times forward and backward
    for name, value in found[2].items():
        same(found[0][name], value, name)
        same(found[1][name], value, name)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_dropout_runs_and_an_identical_pair_has_no_gradient(name, tokenizer):
    model = make_model(name, tokenizer, dropout=0.5).train()
    ids, mask = pad_rows(random_rows(1))
    assert model(ids, mask)["loss"] != model(ids, mask)["loss"]
    for model.loss_on, model.share_prefix in itertools.product(("tokens", "end"), (True, False)):
        output = model(torch.tensor([[3, 4, 5], [3, 4, 5]]))
        assert output["loss"].item() == pytest.approx(math.log(2), abs=1e-6)
        assert not any(value.any() for value in gradients(model, output["loss"]).values())


STEPS = {
    f"a step of {n}": functools.partial(lambda n, q, k, _: -(-torch.stack([q, k], 1) // n), n)
    for n in (1, 16, 64)
}
STEPS["one block"] = lambda q, k, _: torch.zeros_like(q)
ON_A_GPU = functools.partial(lambda rule, q, k, _: rule(q, k, torch.device("meta")), critic.block_labels)
STEPS["a GPU's two blocks"] = lambda q, k, _: ON_A_GPU(64 * q, 64 * k, _)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", TREES)
def test_blocks_of_any_step_equal_the_padded_batch(name, step, tokenizer, monkeypatch):
    """In value and every gradient, with windows, and through the code path of dropout (of probability 1e-9)."""
    monkeypatch.setattr(critic, "block_labels", STEPS[step])
    for seed, loss_on in itertools.product(range(3), ("tokens", "end")):
        model = make_model(name, tokenizer, dropout=1e-9 * (seed == 1)).train()
        ids, mask = pad_rows(random_rows(100 + seed, B=4), ("left", "right")[seed % 2])
        found, model.loss_on = [], loss_on
        for model.share_prefix in (True, False):
            output = model(ids, mask if seed else None)
            values = model.forward_value(ids, mask if seed else None, return_value_only=True)
            found.append({**output, "values": values, **gradients(model, output["loss"])})
        for key, value in found[1].items():
            same(found[0][key], value, key)


def test_nothing_is_read_back_from_the_device(tokenizer, monkeypatch):
    """On the meta device every read (item, tolist, nonzero, an index by mask) is an error. Ids that lie there are
    read once, mask included."""
    model, host, calls = make_model("opt", tokenizer).to("meta").train(), pad_rows(random_rows(2)), []
    device = tuple(tensor.to("meta") for tensor in host)
    to_host = lambda self: calls.append(1) or next((h for h, d in zip(host, device) if d is self), self)
    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    for batch, model.loss_on in itertools.product((host, device), ("tokens", "end")):
        calls.clear()
        loss = model(*batch)["loss"]
        loss.backward()
        assert loss.device.type == "meta" and len(calls) == 2
        assert model.forward_value(*batch, prompt_length=2)["chosen_end_scores"].device.type == "meta"


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations_per_layer(build, batch, share):
    """What one layer more dispatches, forward and backward, with the blocks of an accelerator."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(critic, "block_labels", ON_A_GPU)
        counts = []
        for layers in (1, 2):
            model, passes = build(layers).train(), (Operations(), Operations())
            model.share_prefix = share
            with passes[0]:
                loss = model(*batch)["loss"]
            with passes[1]:
                loss.backward()
            counts.append([each.count for each in passes])
    return [two - one for one, two in zip(*counts)]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_operations_do_not_grow_with_the_pairs(name, tokenizer):
    """Prompts of 60 tokens, responses of 10 to 100: one block for 8 pairs, two for any large number."""
    build = lambda n: make_model(
        name, tokenizer, **({"n_layer": n} if name == "gpt2" else {"num_hidden_layers": n})
    )
    found = {}
    rng = random.Random(0)
    ids = lambda n: [rng.randrange(2, 80) for _ in range(n)]
    for pairs, share in ((8, True), (48, True), (192, True), (8, False)):
        rows = [
            prompt + [side] + ids(rng.randint(9, 99))
            for side in (81, 82)
            for prompt in map(ids, [60] * pairs)
        ]
        found[pairs, share] = operations_per_layer(build, pad_rows(rows), share)
    for one_block, many, more, padded in zip(*found.values()):
        assert padded < one_block < many == more < 2 * padded


def test_compiling_ends_after_two_batches(tokenizer):
    """The second brings dynamic shapes; from then on nothing recompiles, whatever the lengths."""
    from torch._dynamo.utils import counters

    model, graphs = make_model("llama", tokenizer), []
    compiled = torch.compile(model, backend="eager")
    for seed in range(4):
        ids, mask = pad_rows(random_rows(seed, B=4), extra=0)
        same(compiled(ids, mask)["loss"], model(ids, mask)["loss"])
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[3]


# ---- every family of the installed transformers ----

EVERY = sorted({config.model_type for config in transformers.MODEL_FOR_CAUSAL_LM_MAPPING})
OUTCOMES = {}
# Padded rows are not rows: attention picks the top few of all keys, or a layer needs its own arguments.
NO_DECODER = {"trocr", "prophetnet"}
# Its class for sequences has another head, or its keys fit no common scheme: an error that says which.
NO_HEAD = {"blt", "ctrl", "modernbert-decoder", "xlnet"}
NOT_EQUAL = {"axk2", "deepseek_v32", "cpmant", "zamba2", "xmod", "longcat_flash"}


def close(a, b, what):
    """Equal to 2e-5 of the larger of 1 and the reference."""
    torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("family", EVERY)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_family_from_a_saved_language_model(family, tokenizer, tmp_path):
    """Create, a gradient, save and load, equal to the language model's last hidden state; the tree to the padded
    batch, in value and gradient."""
    OUTCOMES[family] = "not built"
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = sum(
                parameter.numel()
                for parameter in transformers.AutoModelForCausalLM.from_config(config).parameters()
            )
        assert size < 5e6
        torch.manual_seed(0)
        language = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    except Exception:  # not every config shrinks by the names of its attributes
        return
    if type(language.config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    language.config.use_cache = False
    with torch.no_grad():
        for parameter in language.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    language.save_pretrained(tmp_path / "base")
    encoders = transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    if family in NO_DECODER or any(type(language.config) in mapping for mapping in encoders):
        with pytest.raises(ValueError, match="a critic needs a causal text decoder"):
            create_critic_model(str(tmp_path / "base"), tokenizer, None)
        OUTCOMES[family] = "no critic"
        return
    if family in NO_HEAD:
        with pytest.raises(ValueError, match="do not match the model: missing|cannot be read"):
            create_critic_model(str(tmp_path / "base"), tokenizer, None)
        OUTCOMES[family] = "error"
        return
    OUTCOMES[family] = "fails"
    if family in NOT_EQUAL:
        return
    model = create_critic_model(str(tmp_path / "base"), tokenizer, None).eval()
    with torch.no_grad():
        model.v_head.weight.normal_(std=0.1)
    rows = [*random_rows(1, B=2, pads=False)]
    for side in ("left", "right"):
        ids, mask = pad_rows(rows, side)
        values = model.forward_value(ids, mask, return_value_only=True)
        for row, found, bits in zip(rows, values, mask):
            with torch.no_grad():
                hidden = language(torch.tensor([row]), output_hidden_states=True).hidden_states[-1]
                if hidden.dim() > 3:  # Gemma 3n has four of them
                    hidden = language.base_model(torch.tensor([row]))[0]
                close(found[bits == 1], model.v_head(hidden)[0, :, 0], side)
    loss = model(ids, mask)["loss"]
    first, uses_tree = gradients(model, loss), model.config._attn_implementation == critic.TREE_ATTENTION
    assert all(value.isfinite().all() for value in first.values()) and first["v_head.weight"].any()
    if uses_tree:
        model.share_prefix = False
        close(loss, model(ids, mask)["loss"], "the tree's loss")
        for name, value in gradients(model, model(ids, mask)["loss"]).items():
            close(first[name], value, name)
    OUTCOMES[family] = "cannot be saved"
    save_critic_model(model, tokenizer, tmp_path / "critic")
    loaded = read_critic(tmp_path / "critic", tokenizer)
    close(end_scores(loaded, ids, mask), end_scores(model, ids, mask), "loaded")
    OUTCOMES[family] = "tree" if uses_tree else "padded"


def test_every_family_counts(capsys):
    """Of what ran before it in this session: all of them, unless tests were selected."""
    if len(OUTCOMES) < len(EVERY):
        return
    groups = {
        kind: sorted(f for f in OUTCOMES if OUTCOMES[f] == kind) for kind in sorted(set(OUTCOMES.values()))
    }
    with capsys.disabled():
        print(
            f"\n{transformers.__version__}:",
            *(f"{len(names)} {kind}" for kind, names in groups.items()),
            sep=" ",
        )
    assert len(groups["tree"]) >= 70 and len(groups["padded"]) >= 25
    assert set(groups.get("fails", [])) <= NOT_EQUAL and "cannot be saved" not in groups


# ---- chapter 1 alone ----

HANDOVER = """        if self.share_prefix and use_tree(self.rwtransformer):
            return tree_rewards(self, ids, is_key, needed)
"""


def test_chapter_1_is_a_complete_reward_model(tokenizer, tmp_path):
    """Without chapter 2 and the statement that hands over: step 2, then step 3, and OPT's BOS that is PAD."""
    chapter, mark, rest = Path(critic.__file__).read_text().partition("# ---- Chapter 2")
    assert mark and chapter.count(HANDOVER) == 1
    (tmp_path / "chapter_1.py").write_text(chapter.replace(HANDOVER, ""))
    spec = importlib.util.spec_from_file_location("chapter_1", tmp_path / "chapter_1.py")
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    base, (ids, mask) = write_base(tmp_path / "base", "opt", tokenizer), pad_rows(random_rows(4))
    model = alone.create_critic_model(base, tokenizer, None, num_padding_at_beginning=1).eval()
    model(ids, mask)["loss"].backward()
    assert not hasattr(alone, "PrefixTree") and model.v_head.weight.grad.any()
    alone.save_critic_model(model, tokenizer, tmp_path / "critic")
    step3 = alone.create_critic_model(str(tmp_path / "critic"), tokenizer, None, 1, rlhf_training=True).eval()
    full = read_critic(tmp_path / "critic", tokenizer)
    full.num_padding_at_beginning = 1
    for bits in (mask, None):
        for found, expected in zip(step3(ids, bits).values(), full(ids, bits).values()):
            same(found, expected)
        same(step3.forward_value(ids, bits, prompt_length=2)["values"], full.forward_value(ids, bits, True))
    rows = torch.tensor([[PAD, 5, 6, 7, PAD, PAD], [PAD, 5, 8, PAD, PAD, PAD]])
    assert [alone.align(rows, None, PAD, n)[3].tolist() for n in (0, 1)] == [[3, 2], [4, 3]]


# ---- the content of a row, and the loss ----

LONG = [[5] * 10 + list(range(6, 46)), [5] * 10 + [50]]
WRITTEN = {name: (name, {}, random_rows(11)) for name in PLAIN} | {
    "gpt2, 50 positions": ("gpt2", {"n_positions": 50}, LONG),
    "dynamic rope": ("llama-dynamic", {}, LONG),
    "a window shorter than the answer": ("mistral-window", {}, LONG),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("case", WRITTEN)
def test_padding_is_only_a_way_to_write_a_row(case, masked, tokenizer):
    """Left, right, none, and beyond what the backbone can take."""
    name, overrides, rows = WRITTEN[case]
    model, results = make_model(name, tokenizer, **overrides).eval(), []
    for side, extra in (("right", 0), ("left", 0), ("right", 9), ("left", 40)):
        ids, mask = pad_rows(rows, side, extra)
        values = model.forward_value(ids, mask if masked else None, prompt_length=2)
        assert not values["values"][mask == 0].any()  # 0 at padding
        ends, content = values["chosen_end_scores"], values["values"][mask == 1]
        results.append([*model(ids, mask if masked else None).values(), ends, content])
    if masked:  # the same with holes, as between a prompt that is padded right and its response
        at = torch.arange(ids.size(1)).repeat_interleave(torch.tensor([1, 2] * ids.size(1))[: ids.size(1)])
        hole = at.diff(prepend=at[:1] - 1) == 0
        ids, mask = ids[:, at].masked_fill(hole, 7), mask[:, at].masked_fill(hole, 0)
        values = model.forward_value(ids, mask, prompt_length=2)
        ends, content = values["chosen_end_scores"], values["values"][mask == 1]
        results.append([*model(ids, mask).values(), ends, content])
    for a, b in itertools.product(results[:1], results[1:]):
        assert all(same(x, y) is None for x, y in zip(a, b, strict=True))


def test_a_long_tail_in_fp16_does_not_overflow():
    rewards = torch.tensor([[0], [12]], dtype=torch.float16).expand(2, 6000)  # the sum passes 65,504
    length, divergence = torch.tensor([6000, 6000]), torch.tensor([0])
    assert critic.ranking_loss(rewards, length, divergence, "tokens")[0] == 12


# ---- checkpoints ----


def write_base(folder, name, tokenizer, **overrides):
    make_backbone(name, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_deepspeed_chat(folder, model, spelling="rwtransformer"):
    folder.mkdir(parents=True)
    state = {key.replace("rwtransformer", spelling): value for key, value in model.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    model.config.save_pretrained(folder)
    return str(folder)


def read_critic(folder, tokenizer=None, ds_config=None):
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    return create_critic_model(str(folder), tokenizer, ds_config, rlhf_training=True).eval()


def end_scores(model, ids, mask):
    return model.forward_value(ids, mask, prompt_length=2)["chosen_end_scores"]


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama-dynamic"])
@pytest.mark.filterwarnings("ignore:transformers has no .*ForSequence")
def test_round_trip_and_transformers_own_class(name, tokenizer, tmp_path):
    model, output = make_model(name, tokenizer).eval(), tmp_path / "critic"
    save_critic_model(model, tokenizer, output)
    with pytest.warns(UserWarning, match="is reinitialised"):
        create_critic_model(str(output), tokenizer, None)
    loaded = read_critic(output)
    assert_same_weights(loaded, model)
    ids, mask = pad_rows(random_rows(12))
    scores = end_scores(model, ids, mask)
    same(end_scores(loaded, ids, mask), scores)
    config = (output / "config.json").read_text()
    assert f'"pad_token_id": {PAD}' in config and 'dtype": "float32"' in config
    assert "ForSequenceClassification" in config and critic.TREE_ATTENTION not in config
    if type(model.config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        with pytest.warns(UserWarning, match="transformers has no .*ForSequence"):
            save_critic_model(model, tokenizer, output)
        return
    theirs, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert theirs.config.num_labels == 1 and not any(info.values())
    same(theirs.eval()(input_ids=ids, attention_mask=mask).logits[:, 0], scores, "their logits")


FORMS = ["rwtransformer", "rwtranrsformer", "transformers", "sharded", ".bin", "openrlhf"]


@pytest.mark.parametrize("name", ["opt", "llama", "bloom", "gpt2"])
@pytest.mark.parametrize("form", FORMS)
def test_reward_checkpoints_of_others(form, name, tokenizer, tmp_path):
    model, folder = make_model(name, tokenizer).eval(), tmp_path / "reward"
    if form.startswith("rwtra"):  # DeepSpeed-Chat's spelling, and its older one
        write_deepspeed_chat(folder, model, form)
    else:
        config = make_config(name, num_labels=1, pad_token_id=PAD)
        theirs = AutoModelForSequenceClassification.from_config(config)
        theirs.base_model.load_state_dict(model.rwtransformer.state_dict())
        theirs.score.load_state_dict(model.v_head.state_dict())
        theirs.save_pretrained(folder, max_shard_size="20KB" if form == "sharded" else "5GB")
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (form == "sharded")
        head = "value_head" if form == "openrlhf" else "score"
        if form == "openrlhf":  # it writes no number of labels (OpenRLHF #1039)
            make_config(name, pad_token_id=PAD, value_head_prefix=head).save_pretrained(folder)
        if form in ("openrlhf", ".bin"):
            (folder / "model.safetensors").unlink()
            state = {key.replace("score.", f"{head}."): value for key, value in theirs.state_dict().items()}
            torch.save(state, folder / "pytorch_model.bin")
    assert_same_weights(read_critic(folder, tokenizer), model)


def damage(folder, change):
    state = torch.load(Path(folder, "pytorch_model.bin"))
    change(state)
    torch.save(state, Path(folder, "pytorch_model.bin"))
    return folder


OLD_BUFFERS = {"gptj": "h.0.attn.bias", "gpt2": "h.1.attn.masked_bias", "gpt_neo": "h.0.attn.attention.bias"}


@pytest.mark.parametrize("name", OLD_BUFFERS)
def test_buffers_that_transformers_once_saved_are_passed_over(name, tokenizer, tmp_path):
    model = make_model(name, tokenizer)
    folder = write_deepspeed_chat(tmp_path / "reward", model)
    damage(folder, lambda s: s.update({f"rwtransformer.{OLD_BUFFERS[name]}": torch.ones(1, 1, 256, 256)}))
    assert_same_weights(read_critic(folder, tokenizer), model)


class Payload:
    """Pickled, it makes the folder `ran` when it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def cut(path, data=None):
    """Replace a file by its beginning, or by `data`; its folder."""
    path.write_bytes(path.read_bytes()[:5000] if data is None else data)
    return str(path.parent)


NORM = "rwtransformer.norm.weight"
# name: (what is done to a reward checkpoint and a base model, and which is loaded; what the message holds)
BAD_CHECKPOINTS = {
    "a missing key": (lambda f, b: damage(f, lambda s: s.pop(NORM)), r"missing model\.norm\.weight"),
    "an unexpected key": (lambda f, b: damage(f, lambda s: s.update({"rwtransformer.extra": torch.ones(1)})), r"unexpected .*extra"),
    "a key beside the model": (lambda f, b: damage(f, lambda s: s.update({"extra": torch.ones(1)})), r"unexpected .*extra"),
    "a mis-shaped key": (lambda f, b: damage(f, lambda s: s.update({NORM: torch.ones(3)})), r"mismatched .*model\.norm\.weight"),
    "two labels": (lambda f, b: damage(f, lambda s: s.update({"v_head.weight": torch.ones(2, 32)})), r"mismatched .*score\.weight"),
    "no head": (lambda f, b: damage(f, lambda s: s.pop("v_head.weight")), "missing score.weight.*rlhf_training=False"),
    "a base model": (lambda f, b: b, "missing score.weight.*rlhf_training=False"),
    "a base model without a key": (lambda f, b: damage(f, lambda s: (s.pop("v_head.weight"), s.pop(NORM))), r"missing model\.norm\.weight"),
    "no weights": (lambda f, b: (Path(f, "pytorch_model.bin").unlink(), f)[1], "model.safetensors"),
    "a pickle with code": (lambda f, b: cut(Path(f, "pytorch_model.bin"), pickle.dumps(Payload())), "reward cannot be read"),
    "a truncated .bin": (lambda f, b: cut(Path(f, "pytorch_model.bin")), "reward cannot be read"),
    "a truncated .safetensors": (lambda f, b: cut(Path(b, "model.safetensors")), "base cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints_are_refused(case, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    base = write_base(tmp_path / "base", "llama", tokenizer)
    spoil, message = BAD_CHECKPOINTS[case]
    path, trained = str(spoil(folder, base)), "without a key" not in case
    with pytest.raises(ValueError, match=message):
        create_critic_model(path, tokenizer, None, rlhf_training=trained)
    assert not Path("ran").exists()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_other(folder, model_type, **sizes):
    AutoModel.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(folder)
    return str(folder)


def test_bad_arguments_of_create(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    bare, longer = copy.deepcopy(tokenizer), longer_by(20, tokenizer)
    bare.pad_token = None
    reward = write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer))
    t5 = write_other(tmp_path / "t5", "t5", vocab_size=96, d_model=32, num_layers=1)
    vit = write_other(tmp_path / "vit", "vit", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    bert, both_ways = (
        write_other(
            tmp_path / "bert",
            "bert",
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        ),
        tmp_path / "open",
    )
    edit(Path(write_base(both_ways, "llama", tokenizer), "config.json"), is_causal=False)
    for path, which, options, message in [
        (base, tokenizer, {"dropout": 1.0}, "dropout is 1.0"),
        (base, tokenizer, {"dropout": -0.1}, "dropout is -0.1"),
        (base, tokenizer, {"zero_stage": 3}, "zero_stage is 3"),
        (base, bare, {}, "pad_token_id"),
        (reward, longer, {"rlhf_training": True}, "the tokenizer has more tokens than .*reward: use"),
        *((path, tokenizer, {}, "a critic needs a causal text decoder") for path in (t5, bert, both_ways, vit)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            create_critic_model(str(path), which, {}, **options)


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "mpt", "llama", "falcon", "biogpt"])
def test_dropout_overrides_every_field(name, tokenizer, tmp_path):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = tmp_path / "base"
    base = write_base(base, name, tokenizer) if name in FAMILIES else write_other(base, name, **sizes)
    model = create_critic_model(base, tokenizer, None, dropout=0.35)
    found = re.findall(r'"(\w*(?:dropout|pdrop|dropout_prob))": ([\d.]+)', json.dumps(model.config.to_dict()))
    assert found and {float(value) for _, value in found} == {0.35}
    ids, mask = pad_rows(random_rows(1))
    assert model.train()(ids, mask)["loss"] != model(ids, mask)["loss"]
    assert "0.35" not in json.dumps(create_critic_model(base, tokenizer, None).config.to_dict())


DTYPES = [(None, torch.float32), (BF16, torch.bfloat16), (FP16, torch.float16), ({"bf16": {"enabled": False}}, torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("ds_config", "dtype"), DTYPES)
def test_dtype_follows_ds_config_and_vocabulary_grows(ds_config, dtype, tokenizer, tmp_path):
    base, longer = write_base(tmp_path / "base", "llama", tokenizer), longer_by(11, tokenizer)
    assert create_critic_model(base, tokenizer, None).config.vocab_size == VOCAB  # the tokenizer has 8 fewer
    model = create_critic_model(base, longer, ds_config)
    assert len(longer) == 99 and model.rwtransformer.get_input_embeddings().weight.shape[0] == 104
    save_critic_model(model, longer, tmp_path / "critic")
    loaded = read_critic(tmp_path / "critic", longer, ds_config)
    assert {p.dtype for p in (*model.parameters(), *loaded.parameters())} == {dtype}
    assert_same_weights(loaded, model)


def test_a_save_replaces_older_weights_of_any_form(tokenizer, tmp_path):
    folder, model, talker = tmp_path / "critic", make_model("llama", tokenizer), copy.deepcopy(tokenizer)
    Path(write_deepspeed_chat(folder, model), "special_tokens_map.json").write_text('{"pad_token": "<eos>"}')
    talker.chat_template, talker.padding_side = "{{ messages }}", "left"
    save_critic_model(model, talker, folder)
    assert sorted(file.name for file in folder.glob("*model*")) == ["model.safetensors"]
    saved = AutoTokenizer.from_pretrained(folder)
    assert (saved.padding_side, saved.pad_token_id, saved.chat_template) == ("left", PAD, "{{ messages }}")
    talker.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}  # these fill a directory
    for _ in range(2):
        save_critic_model(model, talker, folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == talker.chat_template
    shutil.rmtree(folder / "additional_chat_templates")
    mine = {"modeling_mine.py", "model_card.md", "training_args.bin"}
    for name in mine:
        (folder / name).write_text("mine")
    save_critic_model(model, tokenizer, folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    assert mine <= {file.name for file in folder.iterdir()} and not (folder / ".writing").exists()


def test_a_class_with_another_head_than_ours_is_refused(tokenizer, tmp_path):
    """CTRL's classification head is called otherwise: transformers would draw it at random."""
    sizes = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 2, "dff": 48, "n_positions": 64}
    base = write_other(tmp_path / "base", "ctrl", **sizes)
    model = RewardModel(AutoModel.from_pretrained(base), tokenizer)
    with pytest.raises(
        ValueError, match="not saved as CTRLForSequenceClassification, .*classifier.weight, score.weight"
    ):
        save_critic_model(model, tokenizer, tmp_path / "critic")
    with pytest.raises(ValueError, match="missing classifier.weight"):
        create_critic_model(base, tokenizer, None)
    assert not (tmp_path / "critic").exists()


def test_a_kill_while_saving_leaves_one_whole_critic(tokenizer, tmp_path, monkeypatch):
    """Two critics are saved in turn; after each SIGKILL the folder holds one of them."""
    models, rng = [make_model("llama", tokenizer, seed=seed) for seed in (0, 1)], random.Random(0)
    save_critic_model(models[0], tokenizer, tmp_path / "critic")
    # A bar has a lock that all processes share, and the killed one may hold it.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", False)
    for _ in range(12):
        child = os.fork()
        if not child:
            for model in itertools.cycle(models):
                save_critic_model(model, tokenizer, tmp_path / "critic")
        time.sleep(rng.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = read_critic(tmp_path / "critic", tokenizer).state_dict()
        assert sum(all(torch.equal(v, m.state_dict()[k]) for k, v in found.items()) for m in models) == 1


def test_a_full_disk_leaves_the_old_critic(tokenizer, tmp_path):
    model, folder = make_model("llama", tokenizer), tmp_path / "critic"
    save_critic_model(model, tokenizer, folder)
    before, limits = (folder / "model.safetensors").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a disk with 20 kB left
    try:
        with pytest.raises(Exception, match="File too large"):
            save_critic_model(model, tokenizer, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (folder / "model.safetensors").read_bytes() == before
    save_critic_model(model, tokenizer, folder)
    assert not (folder / ".writing").exists()


@pytest.mark.parametrize("family", ["olmoe", "glm4_moe", "minimax_m2", "granitemoe"])
@pytest.mark.filterwarnings("ignore:transformers has no .*ForSequence")
def test_experts_of_a_model_that_transformers_loaded_are_saved(family, tokenizer, tmp_path):
    AutoModel.from_config(tiny_config(family)).save_pretrained(tmp_path / "base")
    model = RewardModel(AutoModel.from_pretrained(tmp_path / "base"), tokenizer).eval()
    ids, mask = pad_rows(random_rows(2, pads=False))
    model(ids, mask)["loss"].backward()
    save_critic_model(model, tokenizer, tmp_path / "critic")
    loaded = read_critic(tmp_path / "critic")
    close(end_scores(loaded, ids, mask), end_scores(model, ids, mask), "loaded")


# ---- multimodal checkpoints, heads of others, clients ----

EYES = {
    "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 2, "depth": 2, "num_layers": 2,
    "num_attention_heads": 2, "num_heads": 2, "image_size": 28, "patch_size": 14, "num_position_embeddings": 16,
    "out_hidden_size": 32, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    "deepstack_visual_indexes": [0], "head_dim": 16, "d_model": 32, "mlp_dim": 48, "projection_dim": 32,
}  # fmt: skip
MULTIMODAL = ["gemma3", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "mistral3", "llama4", "llava", "internvl", "idefics3", "smolvlm", "aya_vision"]  # fmt: skip


def tiny_multimodal(name):
    kind = transformers.CONFIG_MAPPING[name]
    default, parts = kind(), {}
    text = default.get_text_config(decoder=True)
    for key, value in vars(default).items():
        if value is text:
            parts[key] = tiny_config(type(text)).to_dict()
        elif isinstance(value, transformers.PretrainedConfig):
            sizes = {size: number for size, number in EYES.items() if size in value.to_dict()}
            parts[key] = {"model_type": value.model_type} | sizes
        elif key.endswith(("token_id", "token_index")) and isinstance(value, int):
            parts[key] = 90
    return kind(**parts)


@pytest.mark.parametrize("name", MULTIMODAL)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_text_decoder_of_a_multimodal_checkpoint(name, tokenizer, tmp_path):
    """Its hidden states are those inside the multimodal model; what is saved is a text model of the decoder's type."""
    torch.manual_seed(0)
    both = transformers.AutoModelForImageTextToText.from_config(
        tiny_multimodal(name), dtype=torch.float32
    ).eval()
    both.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = create_critic_model(str(tmp_path / "base"), tokenizer, None).eval()
    ids, mask = pad_rows(random_rows(3, pads=False), extra=0)
    with torch.no_grad():
        hidden = both(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    found = model.forward_value(ids, mask, return_value_only=True)
    close(found[mask == 1], model.v_head(hidden).squeeze(-1)[mask == 1], "values")
    model(ids, mask)["loss"].backward()
    save_critic_model(model, tokenizer, tmp_path / "critic")
    loaded = read_critic(tmp_path / "critic")
    assert loaded.config.model_type == both.config.get_text_config(decoder=True).model_type
    close(end_scores(loaded, ids, mask), end_scores(model, ids, mask), "loaded")
    if hasattr(getattr(both, "model", None), "language_model"):
        with pytest.raises(ValueError, match="a critic needs a causal text decoder"):
            RewardModel(both.model, tokenizer)


@pytest.mark.parametrize("head", ["value_head", "regression_head", "score_head", "v_head"])
def test_heads_of_other_projects(head, tokenizer, tmp_path):
    model = make_model("llama", tokenizer)
    folder = write_deepspeed_chat(tmp_path / "reward", model)
    damage(folder, lambda state: state.update({f"{head}.weight": state.pop("v_head.weight")}))
    assert_same_weights(read_critic(folder, tokenizer), model)


def adapter(folder):
    Path(folder, "adapter_config.json").write_text("{}")
    return folder


def deepspeed_checkpoint(folder):
    Path(folder, "mp_rank_00_model_states.pt").write_bytes(b"")
    return folder


def renamed(head, more=()):
    change = lambda state: state.update(
        {f"{head}.weight": state.pop("v_head.weight")} | {key: torch.ones(1) for key in more}
    )
    return lambda folder: damage(folder, change)


def custom_code(folder):
    edit(
        Path(folder, "config.json"),
        model_type="internlm2",
        auto_map={"AutoConfig": "configuration_internlm2.InternLM2Config"},
    )
    return folder


OTHERS_FOLDERS = {
    "an unknown head": (renamed("reward_head"), "unexpected model.reward_head.weight; the head must be score.weight.*: rename it"),
    "a head with a bias": (renamed("v_head", ["v_head.bias"]), "unexpected score.bias; the head must be score.weight, one row and no bias"),
    "trl's value head": (renamed("v_head.summary", ["v_head.summary.bias"]), "unexpected score.summary.*no bias"),
    "a PEFT adapter": (adapter, "is a PEFT adapter: pass what save_critic_model wrote, after merge_and_unload"),
    "a DeepSpeed checkpoint": (deepspeed_checkpoint, "is a DeepSpeed checkpoint: pass what save_critic_model wrote"),
    "custom code": (custom_code, "trust_remote_code|custom code|does not recognize"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS_FOLDERS)
def test_folders_of_others_get_an_error_that_says_what_they_are(case, tokenizer, tmp_path):
    spoil, message = OTHERS_FOLDERS[case]
    path = spoil(write_deepspeed_chat(tmp_path / "reward", make_model("llama", tokenizer)))
    with pytest.raises(ValueError, match=message) as error:
        create_critic_model(path, tokenizer, None, rlhf_training=True)
    assert "rlhf_training=False" not in str(error.value)


def test_bad_ds_config_and_stage_3_without_a_launcher(tokenizer, tmp_path):
    base = write_base(tmp_path / "base", "llama", tokenizer)
    for name in ("bf16", "fp16"):
        with pytest.raises(
            ValueError, match='bf16 or fp16 in ds_config has "enabled": "auto": write true or false'
        ):
            create_critic_model(base, tokenizer, {name: {"enabled": "auto"}})
    with pytest.raises(
        ValueError, match="ds_config has ZeRO stage 3, which partitions over ranks: launch with deepspeed"
    ):
        create_critic_model(base, tokenizer, {"zero_optimization": {"stage": 3}})


def test_models_with_a_head_or_that_look_both_ways_are_errors_at_construction(tokenizer):
    config = make_config("llama")
    for kind in (transformers.AutoModelForCausalLM, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match="has a head: pass its base_model"):
            RewardModel(kind.from_config(config), tokenizer)
    both_ways = AutoModel.from_config(make_config("gemma3_text", is_causal=False))
    bert = AutoModel.from_config(
        AutoConfig.for_model(
            "bert", vocab_size=VOCAB, hidden_size=32, num_attention_heads=2, num_hidden_layers=1
        )
    )
    for model in (both_ways, bert):
        with pytest.raises(ValueError, match="a critic needs a causal text decoder"):
            RewardModel(model, tokenizer)


def test_what_cannot_be_saved_says_what_to_do(tokenizer, tmp_path):
    model = make_model("llama", tokenizer)
    with pytest.raises(ValueError, match="unwrap a compiled model ._orig_mod."):
        save_critic_model(torch.compile(model), tokenizer, tmp_path / "critic")
    model.rwtransformer.layers[0].lora_A = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"lora_A.*; merge adapters .merge_and_unload."):
        save_critic_model(model, tokenizer, tmp_path / "critic")
    assert not (tmp_path / "critic").exists()


def test_the_pipeline_returns_the_score_and_others_train_on(tokenizer, tmp_path):
    model = make_model("llama", tokenizer).eval()
    save_critic_model(model, tokenizer, tmp_path / "critic")
    score = transformers.pipeline("text-classification", str(tmp_path / "critic"))("w3 w4 w5")[0]["score"]
    ids = tokenizer("w3 w4 w5", return_tensors="pt")["input_ids"]
    assert score == pytest.approx(end_scores(model, ids, None).item(), abs=1e-5)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    theirs(input_ids=ids, labels=torch.tensor([1.0])).loss.backward()
    assert theirs.score.weight.grad.any()


def as_a_batch(pairs):
    ids, mask = pad_rows([pair[side] for side in SIDES for pair in pairs])
    return {"input_ids": ids, "attention_mask": mask}


def some_pairs(count=8):
    rows = random_rows(5, B=count, pads=False)
    return [dict(zip(SIDES, pair)) for pair in zip(rows[::2], rows[1::2])]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_trainer_trains_it(checkpointing, tokenizer, tmp_path):
    pytest.importorskip("accelerate")
    model = make_model("llama", tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=2, gradient_checkpointing=checkpointing, report_to=[],
        remove_unused_columns=False, save_strategy="no", use_cpu=True, disable_tqdm=True, label_names=[],
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=some_pairs(), data_collator=as_a_batch).train()
    after = model.state_dict()
    assert model.config._attn_implementation == critic.TREE_ATTENTION
    assert not any(
        torch.equal(before[name], after[name])
        for name in ("v_head.weight", "rwtransformer.layers.0.mlp.up_proj.weight")
    )
    batch = as_a_batch(some_pairs(2))
    for ignored in (
        {"return_dict": True},
        {"num_items_in_batch": 3},
        {"output_attentions": None},
        {"output_hidden_states": False},
    ):
        assert model(**batch, **ignored)["loss"] == model(**batch)["loss"]
    for meant in ("position_ids", "inputs_embeds", "past_key_values", "labels"):
        with pytest.raises(ValueError, match=f"{meant}: not supported"):
            model(**batch, **{meant: torch.ones(1)})


PEFT_TASKS = ["FEATURE_EXTRACTION", "SEQ_CLS", "TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM", "QUESTION_ANS"]


@pytest.mark.parametrize("task", ["backbone", None, *PEFT_TASKS])
def test_lora_by_peft(task, tokenizer, tmp_path):
    """Around the backbone, or around the whole model: tree on, head trained in full, merged and saved."""
    peft = pytest.importorskip("peft")
    model, batch = make_model("llama", tokenizer).train(), as_a_batch(some_pairs(3))
    plain = model(**batch)["loss"].item()
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    if task == "backbone":
        model.rwtransformer = peft.get_peft_model(model.rwtransformer, peft.LoraConfig(**options))
        trained = model
    else:
        trained = peft.get_peft_model(
            model, peft.LoraConfig(**options, modules_to_save=["v_head"], task_type=task)
        )
    calls = counted(model)
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1)
    loss = trained(**batch)["loss"]
    loss.backward()
    optimizer.step()
    assert (
        loss.item() != pytest.approx(plain)
        and calls
        and calls[0] == reference_tokens(*batch.values(), "tokens")
    )
    names = {name for name, parameter in trained.named_parameters() if parameter.grad is not None}
    assert any("v_head" in name for name in names) and all(
        "lora" in name or "v_head" in name for name in names
    )
    with pytest.raises(ValueError, match="merge adapters .merge_and_unload."):
        save_critic_model(trained, tokenizer, tmp_path / "critic")
    scores = trained(**batch)["chosen_mean_scores"]
    if task == "backbone":
        model.rwtransformer = model.rwtransformer.merge_and_unload()
    else:
        model = trained.merge_and_unload()
    save_critic_model(model, tokenizer, tmp_path / "critic")
    same(read_critic(tmp_path / "critic")(**batch)["chosen_mean_scores"], scores, "merged")


def test_the_readmes_lora_runs_as_printed(tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    block = re.search(r"```python\n(from peft.*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1)
    scope = {
        "model": make_model("llama", tokenizer),
        "batch": as_a_batch(some_pairs(3)),
        "tokenizer": tokenizer,
    }
    exec(block, scope | {"save_critic_model": save_critic_model})
    assert read_critic(tmp_path / "merged")(**scope["batch"])["loss"].isfinite()


def test_other_losses_need_the_returned_scores_only(tokenizer):
    """The README's recipe: Llama 2's margin, TRL's center_rewards_coefficient."""
    block = re.search(
        r"```python\n(output = model.*?)```", (HERE / "README.md").read_text(), re.DOTALL
    ).group(1)
    model, batch = make_model("llama", tokenizer), as_a_batch(some_pairs(3))
    scope = {"model": model, "batch": batch, "margin": torch.tensor([0.0, 1.0, 2.0]), "F": F}
    exec(block, scope)
    output = model(**batch)
    chosen, rejected = (output[f"{side}_mean_scores"] for side in SIDES)
    expected = (
        -F.logsigmoid(chosen - rejected - scope["margin"]).mean() + 0.01 * ((chosen + rejected) ** 2).mean()
    )
    same(scope["loss"], expected, "loss")
    assert all(value.isfinite().all() for value in gradients(model, scope["loss"]).values())


# ---- the loop, on real processes ----


PORTS = itertools.count(20_000 + os.getpid() % 10_000)  # below those that a system hands out


def surroundings(**environment):
    usual = {
        "PYTHONPATH": str(HERE),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return os.environ | usual | environment


def launch(*arguments, script=HERE / "train_reward.py", ranks=2, code=0, limit=None, moment=None, victims=()):
    """`deepspeed` as a user types it (`ranks=None`: `python`), and what it said. `code`: that of its exit, None for
    any but 0. `limit`: bytes of a file. At the `moment` the victims get SIGKILL; the launcher must end the rest."""
    port = next(PORTS)
    command = [sys.executable, script, *arguments]
    if ranks:
        deepspeed = Path(sys.executable).with_name("deepspeed")
        command[1:1] = [deepspeed, "--num_accelerators", ranks, "--master_port", port]
    command = [*(["prlimit", f"--fsize={limit}"] if limit else []), *map(str, command)]
    with tempfile.TemporaryFile("w+") as log:
        run = subprocess.Popen(command, cwd=script.parent, env=surroundings(), stdout=log, stderr=log)
        while moment and run.poll() is None and not moment():
            time.sleep(0.001)
        processes = ranks_of(run) if moment else {}
        for rank in victims:
            processes[rank].kill()
        ended = run.wait(timeout=600)
        log.seek(0)
        said = log.read()
    for file in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):  # DeepSpeed's CPU op leaves 66 MB a rank
        file.unlink()
    assert ended == code if code is not None else ended != 0, said[-6000:]
    assert not any(process.is_running() for process in processes.values())
    return said


def two_at_a_time(run, cases):
    """{case: run(case)}, as one launch imports while the other waits."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(cases, pool.map(run, cases)))


def ranks_of(run):
    """{local rank: process} of a launcher."""
    import psutil

    children = psutil.Process(run.pid).children(recursive=True)
    words = [(child, word) for child in children for word in child.cmdline()]
    return {int(word[13:]): child for child, word in words if word.startswith("--local_rank=")}


def flags(**options):
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def write_ds_config(path, stage=0, **overrides):
    usual = {"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": False}}
    usual["zero_optimization"] = {"stage": stage}
    config = json.loads((HERE / "ds_config.json").read_text()) | usual | overrides
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return path


def write_rows(path, rows):
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def make_pairs(count=48, seed=0, highest=79, answers=1):
    """Text pairs: an answer that ends with w1 is preferred to one that ends with w2."""
    rng, pairs = random.Random(seed), []
    words = lambda most: " ".join(f"w{rng.randint(3, highest)}" for _ in range(rng.randint(1, most)))
    for index in range(count):
        if index % answers == 0:
            prompt = f"{words(12)} w{index % highest}"
        pairs.append({"prompt": prompt, "chosen": f" {words(6)} w1", "rejected": f" {words(6)} w2"})
    return pairs


def read_lines(path):
    """The whole lines of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def read_texts(path, tokenizer):
    """Token ids of a file's chosen texts, and of its rejected ones."""
    texts = [[row["prompt"] + row[side] + " <eos>" for row in read_lines(path)] for side in SIDES]
    return [tokenizer(side)["input_ids"] for side in texts]


@pytest.fixture(scope="session")
def training(tokenizer, tmp_path_factory):
    """A base model, its data, and the arguments of a run: 48 pairs, 4 epochs of 3 steps on two ranks."""
    folder = tmp_path_factory.mktemp("training")
    base = write_base(folder / "base", "llama", tokenizer)
    data = write_rows(folder / "train.jsonl.gz", make_pairs())
    held_out = write_rows(folder / "eval.jsonl", make_pairs(21, seed=1))
    monitor = {"csv_monitor": {"enabled": True, "output_path": str(folder / "csv"), "job_name": "run"}}

    def arguments(output, stage=0, accumulation=2, **overrides):
        overrides = {"gradient_accumulation_steps": accumulation} | ({} if stage else monitor) | overrides
        config = write_ds_config(folder / f"{stage}-{accumulation}-{len(overrides)}.json", stage, **overrides)
        return flags(
            model_name_or_path=base, data_path=data, eval_path=held_out, max_seq_len=64, output_dir=output,
            deepspeed_config=config, num_train_epochs=4, dropout=0.1, save_interval=2, eval_interval=5,
        )  # fmt: skip

    arguments.folder, arguments.held_out = folder, held_out
    return arguments


@pytest.fixture(scope="session")
def trained(training):
    """Runs on one rank, and on two at every ZeRO stage; {(ranks, stage): (output_dir, metrics, what it said)}."""

    def run(case):
        (ranks, stage), output = case, training.folder / f"{case[0]}-{case[1]}"
        said = launch(*training(output, stage, 4 // ranks), ranks=ranks if ranks > 1 else None)
        return output, read_lines(output / "metrics.jsonl"), said

    return two_at_a_time(run, [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)])


METRICS = {"step", "epoch", "loss", "accuracy", "margin", "learning_rate", "grad_norm", "skipped_steps"}
METRICS |= {"pairs_per_second", "tokens_per_second"}
EVALUATED = ("loss", "accuracy", "margin", "chosen_score", "rejected_score", "ties")
EVAL_METRICS = {f"eval_{name}" for name in EVALUATED}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_loop_two_ranks_train_and_save_at_every_stage(stage, trained, training):
    output, metrics, _ = trained[2, stage]
    evaluations = [line for line in metrics if "eval_loss" in line]
    steps = [line for line in metrics if "loss" in line]
    assert [line["step"] for line in evaluations] == [0, 5, 10, 12]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert set(steps[0]) == METRICS and set(evaluations[0]) == EVAL_METRICS | {"step"}
    assert steps[-1]["epoch"] == 4
    # In float32 at ZeRO 0 DeepSpeed does not tell the norm.
    assert all(line["grad_norm"] > 0 if stage else line["grad_norm"] is None for line in steps)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    chosen, rejected = read_texts(training.held_out, AutoTokenizer.from_pretrained(output))
    batch, last = pad_rows(chosen + rejected), evaluations[-1]
    with torch.no_grad():
        loss, chosen, rejected = read_critic(output)(*batch).values()
        theirs = AutoModelForSequenceClassification.from_pretrained(output).eval()
        same(theirs(*batch).logits[:, 0], torch.cat([chosen, rejected]), "their logits")
    expected = [loss, (chosen > rejected).float().mean(), (chosen - rejected).mean(), chosen.mean()]
    found = [last[f"eval_{name}"] for name in ("loss", "accuracy", "margin", "chosen_score")]
    assert found == pytest.approx([value.item() for value in expected], abs=1e-5)


def test_loop_two_ranks_evaluate_exactly_as_one_and_stages_take_the_same_steps(trained):
    losses = {key: [line["loss"] for line in run[1] if "loss" in line] for key, run in trained.items()}
    assert all(run[1][0] == trained[1, 0][1][0] for run in trained.values() if run is not trained[2, 3])
    assert all(losses[2, stage] == pytest.approx(losses[2, 0], abs=1e-4) for stage in (1, 2, 3))


def test_loop_one_rank_tells_and_a_log_file_gets_two_lines_a_minute(trained, training):
    said = trained[2, 0][2]
    for once in (
        "3 steps per epoch; 0 pairs, others in each epoch, are not used",
        "critic saved: load it",
        "step 12: eval_loss",
    ):
        assert said.count(once) == 1
    bars = re.findall(r"training: +\d+%.*?\[(\d+):(\d+)<", said)
    minutes = int(bars[-1][0]) + int(bars[-1][1]) / 60
    assert 1 <= len(bars) <= 3 + 2 * minutes  # the first, and the last twice
    monitored = {file.stem for file in (training.folder / "csv").rglob("*.csv")}
    assert {"Train_loss", "Train_eval_accuracy", "Train_learning_rate"} <= monitored


# ---- the loop's data ----

SPEAK = (
    "<bos>{% if tools %}{{ tools | tojson }} {% endif %}{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('role ' ~ m.role) }}{% endif %}"
    "{{ m.role[0] }}:{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content or [] %}"
    "{{ part.text }}{% endfor %}{% endif %}{% for call in m.tool_calls or [] %}{{ call.name }}({{ call.arguments }}){% endfor %};"
    "{% endfor %}<eos>\n"
)


@pytest.fixture(scope="session")
def talker():
    """A byte-level tokenizer, which decodes to the exact text, with BOS and a chat template that writes it."""
    from tokenizers import ByteLevelBPETokenizer, processors

    bpe, special = ByteLevelBPETokenizer(), ["<pad>", "<eos>", "<bos>"]
    bpe.train_from_iterator(["How are you today? I am fine, thanks."] * 9, 400, special_tokens=special)
    bpe._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $0", special_tokens=[("<bos>", 2)]
    )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    tokenizer.chat_template = SPEAK
    return tokenizer


def message(content, role="user", **more):
    return {"role": role, "content": content} | more


def dialogue(*contents):
    return [message(content, ("user", "assistant")[turn % 2]) for turn, content in enumerate(contents)]


YES, NO, CALL = (message(text, "assistant") for text in ("yes", "no", None))
CALL |= {"tool_calls": [{"name": "look", "arguments": {"at": None}}]}
TOLD = message("42", "tool", name="look")
ROWS = {
    "texts": ({"prompt": "Q:", "chosen": " yes", "rejected": " no"}, "Q: yes > Q: no"),
    "a prompt of whitespace": ({"prompt": "\n", "chosen": "yes", "rejected": "no"}, "\nyes > \nno"),
    "complete texts": ({"chosen": "Q: yes", "rejected": "Q: no", "other": 1}, "Q: yes > Q: no"),
    "null counts as absent": ({"prompt": None, "ranked": None, "chosen": "Q: yes", "rejected": "Q: no"}, "Q: yes > Q: no"),
    "ranked": ({"prompt": "Q", "ranked": ["1", "2", "3"]}, "Q1 > Q2, Q1 > Q3, Q2 > Q3"),
    "lists of texts": ({"prompt": "Q", "chosen": ["1", "2"], "rejected": ["3", "4"]}, "Q1 > Q3, Q1 > Q4, Q2 > Q3, Q2 > Q4"),
    "messages": ({"prompt": dialogue("Q"), "chosen": [YES], "rejected": [NO]}, "u:Q;a:yes; > u:Q;a:no;"),
    "complete dialogues": ({"chosen": dialogue("Q", "yes"), "rejected": dialogue("Q", "no")}, "u:Q;a:yes; > u:Q;a:no;"),
    "a prompt text beside them": ({"prompt": "Q", "chosen": dialogue("Q", "yes"), "rejected": dialogue("Q", "no")}, "u:Q;a:yes; > u:Q;a:no;"),
    "a system message first": ({"prompt": "Q", "chosen": [message("S", "system"), message("Q"), YES], "rejected": [message("S", "system"), message("Q"), NO]}, "s:S;u:Q;a:yes; > s:S;u:Q;a:no;"),
    "messages alone": ({"prompt": message("Q"), "chosen": YES, "rejected": NO}, "u:Q;a:yes; > u:Q;a:no;"),
    "lists of lists of messages": ({"prompt": dialogue("Q"), "chosen": [[YES]], "rejected": [[NO], [CALL]]}, "u:Q;a:yes; > u:Q;a:no;, u:Q;a:yes; > u:Q;a:look({'at': None});"),
    "ranked messages": ({"prompt": dialogue("Q"), "ranked": [YES, [NO]]}, "u:Q;a:yes; > u:Q;a:no;"),
    "content parts": ({"prompt": message([{"type": "text", "text": "Q"}]), "chosen": YES, "rejected": NO}, "u:Q;a:yes; > u:Q;a:no;"),
    "tools": ({"tools": [{"name": "look"}], "prompt": dialogue("Q"), "chosen": [CALL, TOLD, YES], "rejected": NO}, '[{"name": "look"}] u:Q;a:look({\'at\': None});t:42;a:yes; > [{"name": "look"}] u:Q;a:no;'),
}  # fmt: skip


@pytest.mark.parametrize("form", ROWS)
def test_loop_every_row_form_as_the_model_sees_it(form, talker, tmp_path):
    """The texts in full, between one BOS and one EOS; the pairs of a row have one prompt, known or found."""
    import train_reward

    row, expected = ROWS[form]
    path = write_rows(tmp_path / "rows.jsonl.gz", [row])
    pairs = train_reward.read_pairs([str(path)], talker, 512)
    texts = [[talker.decode(pair[side].tolist()) for side in SIDES] for pair in pairs]
    assert all(text.startswith("<bos>") and text.endswith("<eos>") for pair in texts for text in pair)
    assert ", ".join(f"{chosen[5:-5]} > {rejected[5:-5]}" for chosen, rejected in texts) == expected
    assert {pair["where"] for pair in pairs} == {f"{path}:1"} and len({pair["prompt"] for pair in pairs}) == 1


def test_loop_pairs_of_one_prompt_are_found_in_every_form(talker, tmp_path):
    import train_reward

    forms = "messages", "complete dialogues", "a prompt text beside them", "messages alone", "ranked messages"
    groups = [
        [
            {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " 1", "rejected": " 2"},
            {"chosen": "\n\nHuman: Q\n\nAssistant: 3", "rejected": "\n\nHuman: Q\n\nAssistant: 4"},
        ],
        [{"prompt": "Q", "chosen": "\n1", "rejected": "\n2"}, {"chosen": "Q\nyes", "rejected": "Q\nyet"}],
        [ROWS[form][0] for form in forms],
        [{"prompt": "\n\nHuman: Q\n\nAssistant: A\n\nHuman: R", "chosen": "\n\nAssistant: 1", "rejected": "\n\nAssistant: 2"}],
    ]  # fmt: skip
    path = write_rows(tmp_path / "rows.jsonl", [row for group in groups for row in group])
    prompts = [pair["prompt"] for pair in train_reward.read_pairs([str(path)], talker, 512)]
    found = [{prompts.pop(0) for _ in group} for group in groups]
    assert [len(group) for group in found] == [1, 1, 1, 1] and len(set().union(*found)) == 4


def test_loop_a_prompt_under_another_key_is_told_with_the_count(talker, tmp_path, capsys):
    import train_reward

    orca = [{"system": "", "question": f"Q{n}", "chosen": f"{n} yes", "rejected": "no"} for n in range(600)]
    fine = [ROWS["texts"][0], ROWS["messages"][0], ROWS["complete texts"][0]]
    paths = [
        str(write_rows(tmp_path / name, rows)) for name, rows in (("fine.jsonl", fine), ("orca.jsonl", orca))
    ]
    for path, told in zip((paths[:1], paths), (False, True)):
        train_reward.read_pairs(path, talker, 512)
        said = capsys.readouterr().out
        assert (f"warning: 600 pairs, the first in {paths[1]}:1, have no prompt" in said) == told


def test_loop_batches_of_texts_become_the_tokens_of_single_ones(talker, tmp_path):
    """Rows of text and of messages mixed, more than a batch, with texts that recur; 4 bytes per token."""
    import train_reward

    rng, rows, expected = random.Random(0), [], []
    say = lambda: (
        "".join(rng.choice("How are you? \n\u00e9\U0001f469") for _ in range(rng.randint(1, 40))) + "."
    )
    for number in range(1300):
        prompt, responses = say() if number % 7 else "Q", [f" {say()}", rng.choice([" yes", f" {say()}"])]
        is_text = number < 600 or number % 3
        if is_text:
            texts = [prompt + response for response in responses]
        else:
            prompt, responses = dialogue(prompt), [[message(text, "assistant")] for text in responses]
            texts = [talker.apply_chat_template(prompt + r, tokenize=False).rstrip() for r in responses]
        rows.append({"prompt": prompt, "chosen": responses[0], "rejected": responses[1]})
        ids = [talker(text, add_special_tokens=bool(is_text))["input_ids"] for text in texts]
        expected.append(
            [text if text[-1] == talker.eos_token_id else [*text, talker.eos_token_id] for text in ids]
        )
    path = write_rows(tmp_path / "rows.jsonl", rows)
    pairs = train_reward.read_pairs([str(path)], talker, 512)
    assert [[pair[side].tolist() for side in SIDES] for pair in pairs] == expected
    assert [pair["where"] for pair in pairs] == [f"{path}:{n}" for n in range(1, 1301)]
    assert {pair[side].itemsize for side in SIDES for pair in pairs} == {4}


def test_loop_prompts_are_shuffled_with_all_their_pairs(talker, tmp_path):
    import train_reward

    rows = [{"prompt": f"Q{n // 2}", "chosen": f" yes{n}", "rejected": " no"} for n in range(200)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    pairs = train_reward.read_pairs([str(path)], talker, 512)
    lines = lambda seed: [
        int(pair["where"].rpartition(":")[2]) for pair in train_reward.shuffle_prompts(pairs, seed)
    ]
    orders = [lines(seed) for seed in range(4)]
    assert orders[0] == lines(0) and all(sorted(order) == list(range(1, 201)) for order in orders)
    assert all(a % 2 == 1 and b == a + 1 for order in orders for a, b in zip(order[::2], order[1::2]))
    for one, other in itertools.combinations(orders, 2):  # of 100 prompts about one stays in its place
        assert sum(a == b for a, b in zip(one, other)) < 20


# Notes the lines and prompts of each batch, and for what it was made.
WATCH = """
import json, os, sys, train_reward
seen, collate = {"main": [], "evaluate": []}, train_reward.collate
def watch(pairs, *rest):
    seen[sys._getframe(1).f_code.co_name].append([(pair["where"], pair["prompt"].hex()) for pair in pairs])
    return collate(pairs, *rest)
train_reward.collate = watch
train_reward.main()
json.dump(seen, open(f"{os.path.dirname(__file__)}/seen-{os.environ['RANK']}.json", "w"))
train_reward.dist.barrier(), train_reward.dist.destroy_process_group()
"""


def test_loop_what_each_rank_sees(training, tmp_path):
    """24 pairs of 8 prompts, 1 held out; 2 ranks, micro-batch 2, accumulation 2: 2 steps of 8, 5 pairs over."""
    (tmp_path / "watch.py").write_text(WATCH)
    data = write_rows(tmp_path / "some.jsonl", make_pairs(24, answers=3))
    arguments = training(tmp_path / "out", 0, 2, train_micro_batch_size_per_gpu=2)
    del arguments[4:6]  # held-out data
    more = ["--num_train_epochs", "2", "--save_interval", "0", "--data_path", data]
    assert "2 steps per epoch; 5 pairs, others in each epoch, are not used" in launch(
        *arguments, *more, script=tmp_path / "watch.py"
    )
    seen, epochs = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in (0, 1)], []
    for epoch in (0, 4):  # two batches of each rank in a step
        steps = [[rank["main"][epoch + at : epoch + at + 2] for rank in seen] for at in (0, 2)]
        for step in steps:
            for batches in step:
                together = [prompt for prompt, _ in itertools.groupby(sum(batches, []), lambda row: row[1])]
                assert len(together) == len(set(together))  # the pairs of a prompt stand next to each other
            assert len({row[1] for batches in step for batch in batches for row in batch}) <= 4
        epochs.append(
            [tuple(row) for step in steps for batches in step for batch in batches for row in batch]
        )
        assert len(set(epochs[-1])) == 16
    assert set(epochs[0]) != set(epochs[1])
    held_out = {tuple(row) for rank in seen for batch in rank["evaluate"] for row in batch}
    assert len(held_out) == 3 and not {p for _, p in held_out} & {p for epoch in epochs for _, p in epoch}


@pytest.mark.parametrize(("ranks", "answers"), [(1, 1), (2, 1), (4, 3), (8, 2)])
def test_loop_dealing_is_complete_and_reproducible_and_balances(ranks, answers):
    """No pair is lost or repeated, each rank has as many, and the fullest holds less than dealt in turn."""
    import train_reward

    worst = []
    for seed in range(20):
        rng = random.Random(seed)
        ids = lambda mean: array(
            "i", [rng.randrange(90) for _ in range(1 + int(mean * rng.lognormvariate(-0.32, 0.8)))]
        )
        pairs = []
        for prompt in range(8 * ranks // answers + 1):
            common = ids(60)
            pairs += [
                {"prompt": prompt, "chosen": common + ids(30), "rejected": common + ids(30)}
                for _ in range(answers)
            ]
        pairs = [pair | {"number": n} for n, pair in enumerate(pairs[: 8 * ranks])]
        dealt = train_reward.deal(pairs, ranks)
        assert dealt == train_reward.deal(list(pairs), ranks)
        assert sorted(pair["number"] for part in dealt for pair in part) == list(range(8 * ranks))
        assert {len(part) for part in dealt} == {8}
        fullest = lambda parts: max(map(train_reward.count_nodes, parts))
        worst.append((fullest(dealt), fullest([pairs[at : at + 8] for at in range(0, len(pairs), 8)])))
    dealt, in_turn = map(sum, zip(*worst))
    assert dealt < in_turn if ranks > 1 else dealt == in_turn
    # The third prompt's two pairs stay together, although the rank with one place left has fewer tokens.
    sizes = {0: [200], 1: [50, 50, 50], 2: [40, 40], 3: [10], 4: [10]}
    pairs = [
        {"prompt": p, "chosen": array("i", [p, n, *range(size)]), "rejected": array("i", [p, n])}
        for p in sizes
        for n, size in enumerate(sizes[p])
    ]
    prompts = [[pair["prompt"] for pair in part] for part in train_reward.deal(pairs, 2)]
    assert [[p for p in part if p < 3] for part in sorted(map(sorted, prompts))] == [[0, 2, 2], [1, 1, 1]]


def test_loop_a_tie_is_half_right(tokenizer, tmp_path):
    """A head of zeros: every pair ties. 5 pairs on two ranks: one has none of its own in the last batch. PAD is
    EOS and the vocabulary full, as in many a reward model."""
    full = longer_by(8, tokenizer)
    full.pad_token = full.eos_token
    model = make_model("llama", full)
    torch.nn.init.zeros_(model.v_head.weight)
    save_critic_model(model, full, tmp_path / "flat")
    held_out, cases = write_rows(tmp_path / "eval.jsonl", make_pairs(5)), {}
    for stage, more in ((0, BF16), (2, BF16), (3, {})):
        config = write_ds_config(tmp_path / f"{stage}.json", stage, train_micro_batch_size_per_gpu=1, **more)
        cases[stage] = flags(
            model_name_or_path=tmp_path / "flat", eval_path=held_out, deepspeed_config=config,
            max_seq_len=64, output_dir=tmp_path / "none",
        ) + ["--eval_only"]  # fmt: skip
    for said in launch(*cases.pop(3)), *(said for _, said, _ in drive(cases, tmp_path).values()):
        found = json.loads(next(line for line in said.splitlines() if line.startswith('{"eval_loss')))
        assert (found["eval_accuracy"], found["eval_ties"]) == (0.5, 5) and set(found) == EVAL_METRICS
    assert not (tmp_path / "none").exists()


@pytest.fixture(scope="session")
def demonstration(tmp_path_factory):
    """`deepspeed train_reward.py` with no data and no network: the README's first command, on two ranks."""
    output = tmp_path_factory.mktemp("demonstration") / "out"
    launch("--output_dir", output)
    return output


def test_loop_the_demonstration_learns(demonstration):
    assert read_lines(demonstration / "metrics.jsonl")[-1]["eval_accuracy"] >= 0.9


ODD = ["NUL \0 here", "\u05e9\u05dc\u05d5\u05dd \u202ertl", "\U0001f468\u200d\U0001f469"]


def test_loop_odd_text_is_read_and_what_is_left_out_is_counted(demonstration, tmp_path, capsys):
    """By the demonstration's byte-level tokenizer, which loses nothing."""
    import train_reward

    tokenizer, long = AutoTokenizer.from_pretrained(demonstration), "a" * 100_000
    rows = [{"prompt": "p", "chosen": text, "rejected": " no"} for text in (*ODD, long, " no")]
    path = write_rows(tmp_path / "odd.jsonl", rows)
    pairs = train_reward.read_pairs([str(path)], tokenizer, 256)
    assert [tokenizer.decode(pair["chosen"].tolist()) for pair in pairs] == [f"p{text}<eos>" for text in ODD]
    assert "3 pairs; dropped: 1 identical, 1 longer than 256 tokens" in capsys.readouterr().out


# ---- ZeRO, and step 3 ----

# Three tests share a launch, whose imports take longer than they do; {name of the test: what it found}.
TWO_RANKS = """
import json, torch, deepspeed
from deepspeed.utils import safe_get_full_grad
from transformers import AutoTokenizer
from critic import create_critic_model, save_critic_model
deepspeed.init_distributed()
rank, results = torch.distributed.get_rank(), {"zero3": {}, "tree": {}, "ppo": {}}
ds_config, (names, batches, prompts, answers) = json.load(open("ds.json")), json.load(open("arguments.json"))

def create(folder, stage, trained=True):
    ds_config["zero_optimization"]["stage"], tokenizer = stage, AutoTokenizer.from_pretrained(folder)
    return create_critic_model(folder, tokenizer, ds_config, rlhf_training=trained, zero_stage=stage), tokenizer

ids = torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]])
for name in names:
    for folder, trained in ((f"{name}/reward", True), (f"{name}/grown", False)):
        model, tokenizer = create(folder, 3, trained)
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
        results["zero3"].setdefault(name, []).append(values.tolist())
        save_critic_model(engine, tokenizer, f"{name}/saved")
    message = None
    try:
        create(f"{name}/broken", 3)
    except ValueError as error:
        message = str(error)
    assert "missing model.norm.weight" in message and "model.layers.0.input_layernorm.weight" in message, message

ids, mask = torch.tensor(batches[rank])
for stage in (0, 1, 2, 3):
    found = []
    for share in (True, False):
        (model, _), shapes = create("llama/reward", stage), []
        model.share_prefix = share
        if stage % 2:
            model.gradient_checkpointing_enable()
        engine, *_ = deepspeed.initialize(model=model, config=dict(ds_config))
        engine.train()
        model.rwtransformer.register_forward_pre_hook(lambda m, a, k: shapes.append(len(k["input_ids"])), with_kwargs=True)
        output = engine(ids, mask)
        engine.backward(output["loss"])
        assert shapes[0] == (1 if share else len(ids))
        found.append([*output.values(), *(safe_get_full_grad(p) for p in model.parameters())])
    results["tree"][stage] = max((a - b).abs().max().item() for a, b in zip(*found))
    assert max(value.abs().max() for value in found[0][3:]) > 1e-3

def score(model):
    left, right = (tokenizer(texts, padding=True, padding_side=side, add_special_tokens=side == "left", return_tensors="pt")
                   for texts, side in ((prompts, "left"), (answers, "right")))
    ids, mask = (torch.cat([left[name], right[name]], 1) for name in ("input_ids", "attention_mask"))
    return getattr(model, "module", model).forward_value(ids, mask, prompt_length=left["input_ids"].size(1))

for stage in (0, 3):
    (model, tokenizer), reward_model = create("trained", stage), create("trained", stage)[0].requires_grad_(False)
    trainable, *_ = deepspeed.initialize(model=model, config=dict(ds_config))
    if stage == 3:
        settings = {name: ds_config[name] for name in ("train_micro_batch_size_per_gpu", "zero_optimization")}
        reward_model, *_ = deepspeed.initialize(model=reward_model, config=settings)
    reward_model.eval(), trainable.eval()
    with torch.no_grad():
        before, frozen = score(trainable)["values"], score(reward_model)
    assert torch.allclose(before, frozen["values"], atol=1e-6)
    values = score(trainable)
    trainable.backward(((values["values"][:, -4:] - values["chosen_end_scores"].detach()[:, None] - 1) ** 2).mean())
    trainable.step()
    with torch.no_grad():
        results["ppo"][stage] = [frozen["chosen_end_scores"].tolist(), score(reward_model)["chosen_end_scores"].tolist()]
        assert (score(trainable)["values"] - before).abs().max() > 1e-4

if rank == 0:
    json.dump(results, open("results.json", "w"))
torch.distributed.barrier(), torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="session")
def two_ranks(tokenizer, trained, training, tmp_path_factory):
    """What TWO_RANKS finds, its folder, and the models in it. Mixtral's experts lie apart in a checkpoint;
    DeepSeek-V3 has a buffer in it."""
    folder, longer, models = tmp_path_factory.mktemp("two"), longer_by(11, tokenizer), {}
    mis_shaped = {"rwtransformer.layers.0.input_layernorm.weight": torch.ones(3)}
    spoil = lambda state: (state.pop(NORM), state.update(mis_shaped))
    for name in ("llama", "mixtral", "deepseek_v3"):
        place, models[name] = folder / name, make_model(name, tokenizer).eval()
        for key, buffer in models[name].named_buffers():
            buffer += 0.5 * torch.randn_like(buffer) if "e_score" in key else 0
        if name == "llama":  # DeepSpeedExamples #429
            write_deepspeed_chat(place / "reward", models[name])
            tokenizer.save_pretrained(place / "reward")
        else:
            save_critic_model(models[name], tokenizer, place / "reward")
        tokenizer.save_pretrained(damage(write_deepspeed_chat(place / "broken", models[name]), spoil))
        write_base(place / "grown", name, longer)
    (folder / "trained").symlink_to(trained[2, 3][0])
    (folder / "script.py").write_text(TWO_RANKS)
    schedule = {"type": "WarmupLR", "params": {"warmup_min_lr": 1e-3}}
    write_ds_config(folder / "ds.json", scheduler=schedule, gradient_clipping=0)
    batches = [torch.stack(pad_rows(random_rows(seed))).tolist() for seed in (1, 2)]
    rows = read_lines(training.held_out)[:5]
    texts = [row["prompt"] for row in rows], [row["chosen"] + " <eos>" for row in rows]
    (folder / "arguments.json").write_text(json.dumps([list(models), batches, *texts]))
    launch(script=folder / "script.py")
    return json.loads((folder / "results.json").read_text()), folder, models


def test_loop_zero3_loads_partitioned_and_refuses_on_every_rank(two_ranks):
    results, folder, models = two_ranks
    ids = torch.tensor([[3, 4, 5, 0], [3, 6, 0, 0]])
    for name, model in models.items():
        scores, grown = torch.tensor(results["zero3"][name])
        same(scores, model.forward_value(ids, return_value_only=True), name)
        saved = read_critic(folder / name / "saved")
        assert saved.rwtransformer.get_input_embeddings().weight.shape[0] == 104
        same(grown, saved.forward_value(ids, return_value_only=True), "grown")


def test_loop_each_token_once_at_every_zero_stage(two_ranks):
    """Loss, end scores and every gradient as in plain rows; gradient checkpointing at 1 and 3."""
    worst = two_ranks[0]["tree"]
    assert set(worst) == set("0123") and max(worst.values()) < 1e-5


def test_loop_step_3_as_a_ppo_trainer_takes_it(two_ranks, trained, training):
    """Prompts padded left, answers right: a trainable critic and a frozen reward model, at ZeRO 0 and 3."""
    folder = trained[2, 3][0]
    texts = read_texts(training.held_out, AutoTokenizer.from_pretrained(folder))  # as step 2 wrote them
    step2 = end_scores(read_critic(folder), *pad_rows(texts[0][:5])).tolist()
    assert set(two_ranks[0]["ppo"]) == {"0", "3"}
    for before, after in two_ranks[0]["ppo"].values():
        assert before == pytest.approx(step2, abs=1e-5) and after == before


def test_loop_the_readmes_python_runs_as_printed(trained, tmp_path):
    """Step 2 to step 3; the folder `output` is a critic that step 2 left."""
    block = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL).group(1)
    os.symlink(trained[1, 0][0], tmp_path / "output")
    subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=surroundings(), check=True)


# ---- kills and faults ----

# stage: (when the victims are killed, who they are)
MOMENTS = {
    0: (lambda out: (out / "checkpoints" / "step-000000002").exists(), (0, 1)),
    1: (lambda out: len(read_lines(out / "metrics.jsonl")) > 5, (1,)),
    2: (lambda out: (out / "checkpoints" / "unfinished").exists(), (0, 1)),
    3: (lambda out: (out / "checkpoints" / "step-000000002").exists() and (out / "checkpoints" / "unfinished").exists(), (0,)),
}  # fmt: skip


@pytest.fixture(scope="session")
def resumed(training, trained):
    """A run of each stage, killed at its moment, then resumed: its output_dir."""

    def run(stage, attempts=5):
        (moment, victims), output = MOMENTS[stage], training.folder / f"killed-{stage}-{attempts}"
        arguments = training(output, stage)
        launch(*arguments, code=None, moment=functools.partial(moment, output), victims=victims)
        if stage > 1 and not (output / "checkpoints" / "unfinished").exists():
            assert attempts, "no kill while a checkpoint was being written"
            return run(stage, attempts - 1)
        assert not (output / "model.safetensors").exists()
        assert "step 12: eval_loss" in launch(*arguments, "--resume")
        return output

    return two_at_a_time(run, MOMENTS)


@pytest.mark.parametrize("stage", MOMENTS)
def test_loop_a_killed_run_resumes_to_the_same_bits(stage, resumed, trained):
    """float32, dropout, accumulation; the run that was never killed is `trained`'s."""
    output, (whole, expected, _) = resumed[stage], trained[2, stage]
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (output / file).read_bytes() == (whole / file).read_bytes(), file
    untimed = lambda lines: [{k: v for k, v in line.items() if "per_second" not in k} for line in lines]
    assert untimed(read_lines(output / "metrics.jsonl")) == untimed(expected)
    checkpoints = {path.name for path in (output / "checkpoints").iterdir() if path.is_dir()}
    assert checkpoints == {"step-000000010", "step-000000012"}


def test_loop_a_full_disk_ends_the_run_with_the_folders_name(training, tmp_path):
    """As if 50 kB were left: a checkpoint cannot be written by rank 0."""
    said = launch(*training(tmp_path / "out"), code=None, limit=50_000)
    assert "out/checkpoints: a checkpoint cannot be written" in said
    assert not (tmp_path / "out" / "model.safetensors").exists()


RANK_FAULTS = """
import builtins, os, sys, time, torch, train_reward, critic
fault, rank = os.path.basename(sys.argv[sys.argv.index("--output_dir") + 1]), int(os.environ["RANK"])
if fault == "loss" and rank == 1:
    create = train_reward.create_critic_model
    def spoilt(*arguments, **options):
        model, calls = create(*arguments, **options), []
        def spoil(module, inputs, output):
            if module.training and calls.append(1) is None and len(calls) == 2:
                return output * float("nan")
        model.v_head.register_forward_hook(spoil)
        return model
    train_reward.create_critic_model = spoilt
if fault == "critic" and rank == 0:
    def no_space(*arguments):
        raise OSError("No space left on device")
    critic.write_folder = no_space
if fault == "metrics" and rank == 0:
    def no_space(*words, file=None, **options):
        if file is not None and getattr(file, "name", "").endswith("metrics.jsonl"):
            raise OSError("No space left on device")
        builtins.print(*words, file=file, **options)
    train_reward.print = no_space
if fault == "checkpoint" and rank == 0:
    save = torch.save
    def no_space(state, path, **options):
        if "mp_rank" in str(path):
            raise OSError("No space left on device")
        return save(state, path, **options)
    torch.save = no_space
try:
    train_reward.main()
except (Exception, SystemExit) as error:
    open(f"{os.path.dirname(__file__)}/{fault}-{rank}", "w").write(str(error))
"""


def test_loop_an_error_on_one_rank_ends_all_ranks(training, tmp_path):
    """Rank 1's loss is not finite; rank 0 cannot write the critic, metrics or a checkpoint. No rank exits by itself:
    each notes the error that reached it. Seconds, not the six hours after which a collective gives up."""
    (tmp_path / "faults.py").write_text(RANK_FAULTS)
    loss, critic = (
        "step 2: the loss is not finite: check ",
        "the critic cannot be saved .No space left",
    )
    messages = {
        "loss": (loss + "the rows that another rank names", loss + r"(\S*train.jsonl.gz:\d+, ){4}or lower"),
        "critic": (critic, critic),
        "metrics": ("metrics cannot be written; free space, then rerun .*No space left", "closed by peer"),
        "checkpoint": ("a checkpoint cannot be written; the older .*No space left", "closed by peer"),
    }

    def run(fault):
        arguments = training(tmp_path / fault, 1, 1, train_micro_batch_size_per_gpu=4)
        launch(*arguments, script=tmp_path / "faults.py")
        return [(tmp_path / f"{fault}-{rank}").read_text() for rank in (0, 1)]

    for fault, found in two_at_a_time(run, messages).items():
        assert all(map(re.search, messages[fault], found)), found
        assert not (tmp_path / fault / "model.safetensors").exists()


# Calls train_reward.main() once for each case of a JSON file, in one process: {case: [exit code, what it said,
# whether the model's weights are finite]}. With FAULT the fifth gradient of the head is not, though the loss is.
DRIVE = """
import contextlib, io, json, math, os, sys, train_reward
create, results, models = train_reward.create_critic_model, {}, []
def create_watched(*arguments, **options):
    models[:], gradients = [create(*arguments, **options)], []
    if os.environ.get("FAULT"):
        models[0].v_head.weight.register_hook(lambda g: g * math.nan if gradients.append(1) or len(gradients) == 5 else g)
    return models[0]
train_reward.create_critic_model = create_watched
for name, arguments in json.load(open("cases.json")).items():
    said, sys.argv = io.StringIO(), ["train_reward.py", *arguments]
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = train_reward.main() or 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            print(stop.code, file=said)
    weights = [getattr(p, "ds_tensor", p) for model in models for n, p in model.named_parameters() if "embed" not in n]
    results[name] = code, said.getvalue(), all(weight.isfinite().all().item() for weight in weights)
json.dump(results, open("results.json", "w"))
"""


def drive(cases, folder, **environment):
    cases = {name: [str(word) for word in words] for name, words in cases.items()}
    (folder / "cases.json").write_text(json.dumps(cases))
    subprocess.run([sys.executable, "-c", DRIVE], cwd=folder, check=True, env=surroundings(**environment))
    return json.loads((folder / "results.json").read_text())


def test_loop_resume_of_another_run_is_refused(training, trained, tmp_path):
    output = trained[2, 0][0]
    before = {file: file.stat().st_mtime_ns for file in output.rglob("*")}
    config = write_ds_config(tmp_path / "ds.json", gradient_accumulation_steps=2, gradient_clipping=0.5)
    pairs = make_pairs()
    fewer = write_rows(tmp_path / "fewer.jsonl", pairs[:-1])
    more_held_out = write_rows(tmp_path / "held_out.jsonl", [pairs[-1], *read_lines(training.held_out)])
    one_token = write_rows(tmp_path / "token.jsonl", [pairs[0] | {"rejected": " w3"}, *pairs[1:]])
    changes = {
        "the data": ["--data_path", write_rows(tmp_path / "other.jsonl", make_pairs()[::-1])],
        "the data, moved": ["--data_path", training.held_out, "--eval_path", training.folder / "train.jsonl.gz"],
        "the data, one held out": ["--data_path", fewer, "--eval_path", more_held_out], "the data, a token": ["--data_path", one_token],
        "seed": ["--seed", "1"], "loss_on": ["--loss_on", "end"], "compute_fp32_loss": ["--no-compute_fp32_loss"],
        "gradient_clipping": ["--deepspeed_config", config],
    }  # fmt: skip
    cases = {name: [*training(output), "--resume", *change] for name, change in changes.items()}
    for name, (code, message, _) in drive(cases, tmp_path).items():
        assert code == 1 and "undo that" in message
        assert name.partition(",")[0] in message and "the number of ranks" in message
        assert ("the data" in message) == ("data" in name)
    assert before == {file: file.stat().st_mtime_ns for file in output.rglob("*")}


def test_loop_nothing_is_made_of_ruins(training, trained, tmp_path):
    """A checkpoint that is damaged; a critic whose checkpoints are gone; a last step that ruins the weights."""
    for name, lost in {"damaged": "mp_rank*", "done": "step-*"}.items():
        shutil.copytree(trained[1, 0][0], tmp_path / name, ignore=shutil.ignore_patterns(lost))
    ruin = {"optimizer": {"type": "AdamW", "params": {"lr": math.inf, "torch_adam": True}}, "scheduler": None}
    cases = {
        "step-000000012: cannot be read; delete it": [*training(tmp_path / "damaged", 0, 4), "--resume"],
        "holds config.json: pass another --output_dir, or --resume a run with checkpoints": [*training(tmp_path / "done", 0, 4), "--resume"],
        "step 1: the held-out loss is not finite": [*training(tmp_path / "new", 0, 12, **ruin), "--num_train_epochs", 1],
    }  # fmt: skip
    for message, (code, said, _) in drive(cases, tmp_path).items():
        assert code == 1 and message in said and "critic saved" not in said, said[-3000:]
    assert not (tmp_path / "new" / "model.safetensors").exists()


GOOD = {"prompt": "w3", "chosen": " w4 w1", "rejected": " w5 w2"}
STATIC = {"fp16": {"enabled": True, "loss_scale": 64}}
FAULTY = {"float32": (1, {}), "bf16": (0, BF16), "fp16": (1, STATIC), "ZeRO-2": (2, {}), "ZeRO-3": (3, {})}


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_loop_stops_before_a_step_that_is_not_finite(fault, training, tokenizer, tmp_path):
    """The embedding of w79 is NaN and one pair has it, in the first micro-batch of the second step; or the fifth
    gradient is NaN, that of the third step's first micro-batch, though its loss is not. Not every CPU has fp16."""
    from deepspeed.accelerator import get_accelerator

    runs = {k: v for k, v in FAULTY.items() if k != "fp16" or get_accelerator().is_fp16_supported()}
    model = make_backbone("llama")
    model.get_input_embeddings().weight.data[tokenizer("w79")["input_ids"][0]] = math.nan
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    bad = GOOD | ({"prompt": "w5 w79"} if fault == "loss" else {})
    data = write_rows(tmp_path / "pairs.jsonl", [*make_pairs(31, highest=78), bad])
    held_out, cases = write_rows(tmp_path / "eval.jsonl", make_pairs(8, highest=78)), {}
    for name, (stage, precision) in runs.items():
        config = write_ds_config(tmp_path / f"{name}.json", stage, gradient_accumulation_steps=2, **precision)
        cases[name] = flags(
            model_name_or_path=tmp_path / "base", data_path=data, eval_path=held_out, max_seq_len=64,
            output_dir=tmp_path / name, deepspeed_config=config, save_interval=1, num_train_epochs=2, seed=10,
        )  # fmt: skip
    for name, (code, said, finite) in drive(cases, tmp_path, FAULT="" if fault == "loss" else "1").items():
        output = tmp_path / name
        taken = len([line for line in read_lines(output / "metrics.jsonl") if "loss" in line])
        error = next(line for line in said.splitlines() if "train_reward.py: error" in line)
        assert code == 1 and finite and not (output / "model.safetensors").exists(), said[-3000:]
        assert f"step {taken + 1}: the {fault} is not finite" in error
        assert f"{data}:32" in error if fault == "loss" else taken == 2
        assert error.count(f"{data}:") == 8
        assert error.endswith(f"checkpoints/step-{taken:09d}" if taken else "none, see --save_interval")


# ---- bad input ----


def with_data(content):
    """--data_path with these bytes, or this row."""

    def write(folder):
        path = folder / ("pairs.jsonl.gz" if "gzip" in folder.name else "pairs.jsonl")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return ["--data_path", path]

    return write


def with_config(change):
    """--deepspeed_config with these changes."""
    return lambda folder: ["--deepspeed_config", write_ds_config(folder / "ds.json", **change)]


def with_model(spoil):
    """--model_name_or_path with a copy of the base model that is then spoilt."""

    def write(folder):
        shutil.copytree(folder.parent / "base", folder, dirs_exist_ok=True)
        spoil(folder)
        return ["--model_name_or_path", folder]

    return write


TALK = [{"role": "user", "content": "w3"}]
with_talk = lambda messages: with_data({"chosen": messages, "rejected": TALK})
AT = r"pairs\.jsonl:1: "
MESSAGES = r'expected a text, or a list of \{"role", "content"\} messages'
# name: (arguments, or what writes a file and gives them; what the message must hold)
BAD_INPUT = {
    "an empty file": (with_data(b""), "no pairs remain"),
    "blank lines": (with_data(b"\n \n"), "no pairs remain"),
    "not gzip though named so": (with_data(b"{}\n"), r"pairs\.jsonl\.gz: cannot be read"),
    "broken UTF-8": (with_data(b'{"chosen": "\xff"}\n'), AT + "not JSON in UTF-8"),
    "a lone surrogate": (with_data(b'{"chosen": "\\ud800 a", "rejected": "b"}\n'), AT + "not JSON in UTF-8.*surrogates not allowed"),
    "broken JSON in line 7": (with_data(json.dumps(GOOD).encode() + b"\n" * 6 + b"{,}\n"), r"pairs\.jsonl:7: not JSON"),
    "JSON within JSON within": (with_data(b"[" * 100_000), AT + "not JSON in UTF-8.*recursion"),
    "a line that is no object": (with_data([1]), AT + '"chosen" is missing'),
    "a missing key": (with_data({"prompt": "w3", "chosen": "w4"}), AT + '"rejected" is missing or null; ' + MESSAGES),
    "a number for text": (with_data(GOOD | {"rejected": 3}), AT + '"rejected" is 3; ' + MESSAGES),
    "an empty text": (with_data(GOOD | {"chosen": " "}), AT + '"chosen" is " "; ' + MESSAGES),
    "a number for the prompt": (with_data(GOOD | {"prompt": 3}), AT + '"prompt" is 3; ' + MESSAGES),
    "a prompt that is no message": (with_data(GOOD | {"prompt": {"text": "w3"}}), AT + r'"prompt" is \{"text": "w3"\}; ' + MESSAGES),
    "one ranked answer": (with_data({"prompt": "w3", "ranked": ["w4"]}), AT + '"chosen" is missing or null'),
    "ranked that is a text": (with_data({"prompt": "w3", "ranked": "w4 w5"}), AT + '"chosen" is missing or null'),
    "ranked of two kinds": (with_data({"prompt": "w3", "ranked": ["w4", TALK]}), AT + "texts and messages are mixed"),
    "a prompt of messages beside texts": (with_data(GOOD | {"prompt": TALK}), AT + "texts and messages are mixed"),
    "a prompt that the dialogue lacks": (with_data({"prompt": "w4", "chosen": TALK, "rejected": TALK}), AT + '"prompt" is not a message of each response'),
    "a message among texts": (with_data(GOOD | {"chosen": ["w3", TALK[0]]}), AT + "texts and messages are mixed"),
    "equal in every row": (with_data(GOOD | {"rejected": GOOD["chosen"]}), "no pairs remain .1 identical"),
    "every pair too long": (with_data(GOOD | {"prompt": "w3 " * 300}), "no pairs remain .*larger --max_seq_len"),
    "one pair only": (with_data(GOOD), "0 training pairs and 1 epochs give no step of 4 pairs: pass more data"),
    "a message without role": (with_talk([{"content": "w3"}]), AT + r'"chosen" is \[\{"content": "w3"\}\]; ' + MESSAGES),
    "a long list of no messages": (with_talk([{"content": "w3 " * 99}]), AT + '"chosen" is .*' + MESSAGES),
    "a role that is a number": (with_talk([{"role": 3, "content": "w3"}]), AT + '"chosen" is .*' + MESSAGES),
    "an unknown role": (with_talk([{"role": "robot", "content": "w3"}]), AT + "the chat template fails; fix the row, or set a template .*role robot"),
    "a template's long complaint": (with_talk([{"role": "robot " * 99, "content": "w3"}]), AT + "the chat template fails"),
    "a message that is none": (with_talk(["w3"]), AT + "texts and messages are mixed"),
    "a message and a text": (with_talk([TALK[0], "w3"]), AT + '"chosen" is .*' + MESSAGES),
    "no message": (with_talk([]), AT + r'"chosen" is \[\]; ' + MESSAGES),
    "content that is no text": (with_talk([{"role": "user", "content": 3}]), AT + "the chat template fails"),
    "tools that are none": (with_data({"tools": "w3", "chosen": TALK, "rejected": TALK}), AT + "the chat template fails"),
    "messages without a template": (lambda f: [*with_talk(TALK)(f), "--model_name_or_path", "mute"], r"pairs\.jsonl:1: .*chat_template is not set"),
    "no such file": (["--data_path", "missing.jsonl"], "missing.jsonl: cannot be read"),
    "a hub dataset": (["--data_path", "some/pairs"], "some/pairs: cannot be read; pass a .jsonl or .jsonl.gz file"),
    "max_seq_len 0": (["--max_seq_len", "0"], "no pairs remain"),
    "beyond the positions": (["--max_seq_len", "300"], "--max_seq_len is 300, but .* has 256 positions"),
    "negative epochs": (["--num_train_epochs", "-1"], "21 training pairs and -1 epochs give no step"),
    "dropout 1.5": (["--dropout", "1.5"], "dropout is 1.5"),
    "an unknown loss": (["--loss_on", "mean"], "--loss_on: invalid choice: 'mean'"),
    "an unknown flag": (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    "an unknown model": (["--model_name_or_path", "no/such-model"], "no/such-model"),
    "evaluating a base model": (["--eval_only", "--eval_path", "good.jsonl"], "looks like a base model"),
    "a run in output_dir": (["--output_dir", "used"], "used holds metrics.jsonl: pass another --output_dir, or --resume"),
    "another run in output_dir": (["--output_dir", "used", "--resume"], "used: cannot be written, or another run is writing there"),
    "a model in output_dir": (["--output_dir", "base", "--resume"], "base holds config.json: pass another --output_dir"),
    "output_dir below a file": (["--output_dir", "base/config.json/out"], "base/config.json/out"),
    "no config": (["--deepspeed_config", "missing.json"], "missing.json"),
    "a config that is not JSON": (["--deepspeed_config", "good.jsonl"], "good.jsonl: pass JSON for DeepSpeed"),
    "no batch size": (with_config({"train_micro_batch_size_per_gpu": None}), "train_micro_batch_size_per_gpu needs to be"),
    "no optimizer": (with_config({"optimizer": None}), "like ds_config.json .'optimizer'"),
    "an unknown optimizer": (with_config({"optimizer": {"type": "Adamm", "params": {}}}), "Adamm is not a supported"),
    "an unknown schedule": (with_config({"scheduler": {"type": "Cosine", "params": {}}}), "LR scheduler Cosine"),
    "two precisions": (with_config(BF16 | FP16), "cannot be simultaneously"),
    "more accumulation than data": (with_config({"gradient_accumulation_steps": 99}), "21 training pairs and 1 epochs give no step of 396 pairs"),
    "a truncated safetensors": (with_model(lambda f: cut(f / "model.safetensors")), "safetensors cannot be read"),
    "an unknown model type": (with_model(lambda f: edit(f / "config.json", model_type="nonesuch")), "nonesuch"),
    "a tokenizer without EOS": (with_model(lambda f: edit(f / "tokenizer_config.json", eos_token=None)), "no EOS token"),
    "no tokenizer": (with_model(lambda f: [file.unlink() for file in f.glob("tokenizer*")]), "tokenizer"),
    "no model": (lambda f: ["only", "--data_path", "good.jsonl"], "give --model_name_or_path with --data_path"),
    "no data": (lambda f: ["only", "--model_name_or_path", "base"], "give --model_name_or_path with --data_path"),
}  # fmt: skip


@pytest.fixture(scope="session")
def refusals(tokenizer, tmp_path_factory):
    """Every bad input given to train_reward.py, in one process: {case: (code, message, ...)}, and what is left."""
    folder, cases = tmp_path_factory.mktemp("refusals"), {}
    write_base(folder / "mute", "llama", tokenizer)
    speaker = copy.deepcopy(tokenizer)
    speaker.chat_template = SPEAK
    write_base(folder / "base", "llama", speaker)
    write_rows(folder / "good.jsonl", make_pairs(24))
    write_ds_config(folder / "good.json")
    usual = flags(model_name_or_path="base", data_path="good.jsonl", output_dir="out", max_seq_len=64)
    usual += flags(deepspeed_config="good.json")
    for name, (arguments, _) in BAD_INPUT.items():
        (folder / name.replace(" ", "_")).mkdir()
        arguments = arguments(folder / name.replace(" ", "_")) if callable(arguments) else arguments
        cases[name] = arguments[1:] if arguments[0] == "only" else [*usual, *arguments]
    # A checkpoint that would be refused too, were it read before the lock is taken.
    (folder / "used" / "checkpoints" / "step-000000001").mkdir(parents=True)
    with (folder / "used" / "metrics.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as ranks that outlive their launcher do
        file.write("{}\n")
        file.flush()
        results = drive(cases, folder)
    return results, (folder / "out").exists(), (folder / "used" / "metrics.jsonl").read_text()


@pytest.mark.parametrize("case", BAD_INPUT)
def test_loop_bad_input_is_told_plainly_and_touches_nothing(case, refusals):
    results, left, used = refusals
    code, said, _ = results[case]
    assert code in (1, 2) and "train_reward.py: error: " in said, said
    assert re.search(BAD_INPUT[case][1], said, re.DOTALL), said
    if found := re.search(
        r"pairs\.jsonl(\.gz)?:.*", said[said.index("error: ") :], re.DOTALL
    ):  # without the folder
        assert len(f"train_reward.py: error: {found[0].strip()}") <= 200 and "\n" not in found[0].strip()
    assert not left and used == "{}\n"


# ---- the benchmark: python test_critic.py [--model PATH --data FILE] ----


def resident(name):
    """MiB of memory that this process has (VmRSS), or had at most (VmHWM)."""
    return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024


def measured(run, memory=True):
    """(seconds, peak MiB above the start) of a call; a call whose memory is measured is slower."""
    cuda, start_memory = torch.cuda.is_available(), 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start_memory = torch.cuda.memory_allocated() / 2**20
    elif memory:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what an earlier run left in the allocator would hide this one's need
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        start_memory = resident("VmRSS")
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - start
    return took, (torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")) - start_memory


def dialogues(count, seed=0):
    """[chosen, rejected] token ids, as long as dialogues are: a prefix of 120 tokens or so, responses of 59."""
    rng = random.Random(seed)
    ids = lambda count: [rng.randrange(10, 4096) for _ in range(count)]
    draw = lambda mean: int(min(3 * mean, 1 + mean * rng.lognormvariate(-0.32, 0.8)))
    prompts = [ids(draw(120)) for _ in range(count)]
    return [[prompt + [first] + ids(draw(58)) for first in (8, 9)] for prompt in prompts]


def benchmark_cases(options, tokenizer):
    """{case: (padded batches, batches for the tree, whether it trains)}; a batch: ids, mask (2B, T)."""
    rng = random.Random(0)
    ids = lambda count: [rng.randrange(10, 4096) for _ in range(count)]
    if options.data:
        import train_reward

        pairs = train_reward.shuffle_prompts(train_reward.read_pairs([options.data], tokenizer, 512), 0)
        pairs = [[pair[side].tolist() for side in SIDES] for pair in pairs[: options.pairs]]
    else:
        pairs = dialogues(options.pairs)
    common = statistics.mean(len(os.path.commonprefix(pair)) for pair in pairs)
    answer = statistics.mean(len(text) for pair in pairs for text in pair) - common
    print(f"\n{len(pairs)} pairs: a prefix of {common:.0f} tokens on average, responses of {answer:.0f}.")
    rows = lambda texts: pad_rows(texts, extra=0)
    batch = lambda pairs: rows([text for texts in zip(*pairs) for text in texts])
    size = options.batch
    batches = lambda pairs: [batch(pairs[at : at + size]) for at in range(0, len(pairs) - size + 1, size)]
    by_length = batches(sorted(pairs, key=lambda pair: max(map(len, pair))))
    prompts = [ids(256) for _ in range(2)]
    answers = [[prompt + [20 + k] + ids(63) for k in range(4)] for prompt in prompts]
    ranked = [batch([pair for texts in answers for pair in itertools.combinations(texts, 2)])] * 2
    samples = [rows([prompts[0] + [20 + k] + ids(63) for k in range(8)])] * 10
    return {
        "pairs in random order; rows padded to the longest": (batches(pairs), batches(pairs), True),
        "the same; rows in batches of like length": (by_length, batches(pairs), True),
        "4 answers to one prompt, all 6 pairs, 2 prompts": (ranked, ranked, True),
        "8 samples of one prompt scored, no gradient": (samples, samples, False),
    }


SIZES = {
    "24M": ("llama", {"vocab_size": 4096, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "opt-350m": ("opt", {"hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "do_layer_norm_before": False, "dropout": 0.0}),
    "llama-1b": ("llama", {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}),
}  # fmt: skip


def benchmark_steps(options):
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, options.dtype)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        backbone = AutoModel.from_pretrained(options.model, dtype=dtype)
    else:
        tokenizer, (model_type, sizes) = argparse.Namespace(pad_token_id=0), SIZES[options.size]
        with torch.device(device):
            backbone = AutoModel.from_config(AutoConfig.for_model(model_type, **sizes), dtype=dtype)
    model = RewardModel(backbone, tokenizer).to(device).train()
    calls, cases = counted(model), benchmark_cases(options, tokenizer)

    def run(batches, share, trains):
        model.share_prefix = share
        for batch in batches:
            model.zero_grad()
            with torch.set_grad_enabled(trains):
                result = model(*batch)["loss"] if trains else model.forward_value(*batch, True)
            if trains:
                result.backward()

    results = {}  # (case, whether by the tree): [(seconds, MiB, tokens), ...]
    for name, (*batches, trains) in tqdm(cases.items(), desc="measuring", leave=False):
        for number, share in itertools.product(
            range(options.repeats + 1), (False, True)
        ):  # the first to warm up
            calls.clear()
            found = measured(functools.partial(run, batches[share], share, trains), memory=not number)
            results.setdefault((name, share), []).append((*found, sum(calls)))
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters, {options.dtype}"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n1. {size}, {where}, {options.batch} pairs per batch, median of {options.repeats}\n")
    print("| case | tokens | time | peak MiB, padded and tree |\n| --- | --- | --- | --- |")
    for name in cases:
        rows, once = results[name, False][1:], results[name, True][1:]
        time_, tokens = (statistics.median(a[i] / b[i] for a, b in zip(rows, once)) for i in (0, 2))
        memory = [results[name, share][0][1] for share in (False, True)]
        print(f"| {name} | {tokens:.2f}x | {time_:.2f}x | {memory[0]:.0f}, {memory[1]:.0f} |")

    batch, times = next(iter(cases.values()))[1][0], []
    hidden = torch.randn(1, batch[0].numel(), model.v_head.in_features, device=device, dtype=dtype)
    without = lambda input_ids, **_: (hidden[:, : input_ids.numel()].requires_grad_(),)
    for forward in (backbone.forward, without):
        backbone.forward = forward
        step = functools.partial(run, [batch], True, True)
        times.append(statistics.median(measured(step, memory=False)[0] for _ in range(options.repeats + 2)))
    print(f"\n2. Laying out, head, loss: {100 * times[1] / times[0]:.2f}% of a step.")


def benchmark_operations():
    """Dispatched operations of one more layer: what a GPU is told to do, one after the other."""
    config = lambda layers: AutoConfig.for_model(
        "llama",
        vocab_size=4096,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=9,
    )
    build = lambda layers: RewardModel(
        AutoModel.from_config(config(layers)), argparse.Namespace(pad_token_id=0)
    )
    print("\n3. Operations per layer with an accelerator's blocks, forward and backward\n")
    print("| pairs | padded batch | tree |\n| --- | --- | --- |")
    for count in (8, 32):
        batch = pad_rows([text for texts in zip(*dialogues(count)) for text in texts])
        padded, tree = (
            "{}, {}".format(*operations_per_layer(build, batch, share)) for share in (False, True)
        )
        print(f"| {count} | {padded} | {tree} |")


def benchmark_ranks(steps=20):
    """The fullest rank's tokens over the mean, 8 pairs per rank: consecutive pairs, and as `deal` gives them."""
    import train_reward

    print("\n4. Tokens of the fullest rank over the mean, 8 pairs per rank and step\n")
    print("| ranks | consecutive pairs | dealt by tokens |\n| --- | --- | --- |")
    for ranks in (8, 64):
        loads = []
        for step in range(steps):
            pairs = [
                dict(zip(SIDES, (array("i", text) for text in pair))) for pair in dialogues(8 * ranks, step)
            ]
            pairs = [pair | {"prompt": number} for number, pair in enumerate(pairs)]
            in_turn = [pairs[at : at + 8] for at in range(0, len(pairs), 8)]
            tokens = [
                list(map(train_reward.count_nodes, parts))
                for parts in (in_turn, train_reward.deal(pairs, ranks))
            ]
            loads.append([max(each) / statistics.mean(each) for each in tokens])
        print(f"| {ranks} | {' | '.join(f'{statistics.mean(load):.2f}x' for load in zip(*loads))} |")


def benchmark_load():
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 22}
    config = AutoConfig.for_model("llama", num_attention_heads=16, **sizes)
    tokenizer = type("Tokenizer", (), {"pad_token_id": PAD, "__len__": lambda self: 100})()
    build = lambda: RewardModel(AutoModel.from_config(config), tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = write_deepspeed_chat(Path(folder) / "reward", build())
        size = os.path.getsize(f"{path}/pytorch_model.bin") / 4e6  # four bytes each
        plain = lambda: build().load_state_dict(torch.load(f"{path}/pytorch_model.bin", weights_only=True))
        mapped = functools.partial(create_critic_model, path, tokenizer, None, rlhf_training=True)
        print(f"\n5. Loading a checkpoint of {size:.0f}M parameters in float32, median of 3\n")
        print("| way | seconds | peak MiB above the start |\n| --- | --- | --- |")
        ways = "build, `torch.load`, `load_state_dict`", "`create_critic_model(..., rlhf_training=True)`"
        for name, way in zip(ways, (plain, mapped)):
            seconds, memory = map(statistics.median, zip(*[measured(way) for _ in range(4)][1:]))
            print(f"| {name} | {seconds:.2f} | {memory:.0f} |")


def benchmark_data(options):
    """Reading, against the tokenizer alone on the same texts in batches of 1000; at least 80,000 rows."""
    import train_reward

    with tempfile.TemporaryDirectory() as folder:
        train_reward.demonstration(Path(folder), 0)
        tokenizer, path = AutoTokenizer.from_pretrained(options.model or folder), options.data
        if path is None:
            words = Path(folder, "manual.jsonl").read_text().replace("\\n", " ").split()
            rng, path, say = (
                random.Random(0),
                f"{folder}/rows.jsonl",
                lambda *sizes: " ".join(
                    words[(at := rng.randrange(len(words) - sizes[1])) : at + rng.randint(*sizes)]
                ),
            )
            write_rows(Path(path), (
                {"prompt": say(5, 120), "chosen": f" {say(5, 200)}", "rejected": f" {say(5, 200)}"}
                for _ in range(80_000)
            ))  # fmt: skip

        def alone():
            rows = train_reward.read_rows(path)
            texts = (
                text
                for row in rows
                for _, _, pair, _ in train_reward.render(*row, tokenizer)
                for text in pair
            )
            seconds = 0
            for batch in iter(lambda: list(itertools.islice(texts, 1000)), []):
                start = time.perf_counter()
                tokenizer(batch)
                seconds += time.perf_counter() - start
            return seconds

        before, found = alone(), []
        took, peak = measured(lambda: found.append(train_reward.read_pairs([path], tokenizer, 1 << 20)))
        alone, (pairs,) = (before + alone()) / 2, found
    tokens, copies = sum(len(pair[side]) for pair in pairs for side in SIDES), 10**6 // len(pairs) + 1
    million = [pair | {"prompt": pair["prompt"] + bytes([n])} for n in range(copies) for pair in pairs][
        : 10**6
    ]
    shuffled = measured(lambda: train_reward.shuffle_prompts(million, 1))[0]
    print(f"\n6. Reading {len(pairs)} pairs of {tokens / len(pairs):.0f} tokens, {os.cpu_count()} cores\n")
    print(
        "| rows per second | time over the tokenizer's alone | peak bytes per token | shuffling a million, s |"
    )
    print("| --- | --- | --- | --- |")
    print(f"| {len(pairs) / took:.0f} | {took / alone:.2f}x | {peak * 2**20 / tokens:.1f} | {shuffled:.2f} |")


def benchmark():
    parser = argparse.ArgumentParser(description="The benchmark: ratios measured side by side in one run.")
    add = parser.add_argument
    add("--model", help="a decoder's folder or hub id (default: made on the spot, see --size)")
    add("--data", help="pairs, .jsonl[.gz], for --model's tokenizer (default: made on the spot)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    add("--size", default="24M", choices=SIZES, help="of the model made on the spot")
    add("--batch", type=int, default=8, help="pairs per batch of the first two cases")
    add("--pairs", type=int, default=24, help="pairs of the first two cases")
    add("--repeats", type=int, default=3)
    add(
        "--only",
        choices=["steps", "operations", "ranks", "load", "data"],
        help="one of the benchmark's parts",
    )
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count())
    parts = {
        "steps": lambda: benchmark_steps(options), "operations": benchmark_operations, "ranks": benchmark_ranks,
        "load": benchmark_load, "data": lambda: benchmark_data(options),
    }  # fmt: skip
    for part in [options.only] if options.only else parts:
        parts[part]()


if __name__ == "__main__":
    benchmark()
