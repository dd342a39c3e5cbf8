# SPDX-License-Identifier: MIT
# The reward/critic model of RLHF in one file, after DeepSpeed-Chat's `create_critic_model` and `RewardModel`.
"""A pretrained decoder with a linear value head: trained on pairs, then PPO's critic and reward model.

Read from top to bottom: content of a row -> tokens once -> attention -> loss -> model -> create -> save.
Letters in the shape comments: B pairs; R rows (2B of pairs: the B chosen, then the B rejected); T columns a
row; E the most columns that are read; N distinct tokens of a batch; H the hidden width.
"""

import contextlib
import copy
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GenericForSequenceClassification

# Families measured equal to plain rows (test_critic.py): all layers are causal attention over positions that
# are given, full or in a window, through transformers' AttentionInterface. Others run plain rows, as wrong is
# worse than slow: ALiBi counts columns (BLOOM, MPT, Falcon); attention is local, linear or their own
# (GPT-Neo, GPT-J, Falcon, StableLM, Qwen3-Next); sdpa cannot soft-cap scores (Gemma 2).
TREE_FAMILIES = {
    "opt", "gpt2", "gpt_bigcode", "gpt_neox", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3",
    "gemma", "gemma3_text", "phi", "phi3", "olmo2", "starcoder2", "deepseek_v3", "granite", "cohere",
}  # fmt: skip
TREE_ATTENTION = "prefix_tree"  # `tree_attention` below, in transformers' registry
UNREAD = torch.iinfo(torch.long).max  # marks a column that nobody reads; no token id, and sorts last


def is_causal(config: PretrainedConfig) -> bool:
    both_ways = getattr(config, "use_bidirectional_attention", None)
    return getattr(config, "is_causal", True) is not False and not both_ways  # None: not said


def align(
    input_ids: Tensor, attention_mask: Tensor | None, pad_id: int, num_padding_at_beginning: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move each row's content to column 0, so that left, right and no padding are one case.

    With a mask, content runs from its first 1 to its last 1. Without, from the first id that is not PAD to
    the last, and `num_padding_at_beginning` ids before: OPT begins every text with BOS, and with pad = eos
    BOS is PAD (DeepSpeedExamples #455). An interior PAD, such as the eos of an earlier turn, ends nothing.

    Returns, on the host (the only wait for a GPU: what goes back to it goes ahead of the model):
        ids (R, T): PAD behind the content. is_key (R, T): where attention may look; without a mask all
        over, as in the original. columns (R, T): where each came from. length (R,): content tokens.

    Raises ValueError: a wrong shape, or a row without content.
    """
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: pass (rows, tokens)")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        shapes = f"{tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
        raise ValueError(f"attention_mask has shape {shapes}: pass the same shape")
    ids = input_ids.cpu().long()
    content = ids != pad_id if attention_mask is None else attention_mask.cpu().bool()  # (R, T)
    T, t = ids.size(1), torch.arange(ids.size(1))
    if not content.any(1).all():
        row = content.any(1).int().argmin().item()
        raise ValueError(f"row {row} of input_ids is only padding: drop the row, or its pair")
    start = content.int().argmax(1)
    if attention_mask is None:
        start = (start - num_padding_at_beginning).clamp(min=0)
    length = T - content.flip(1).int().argmax(1) - start
    columns = (t + start[:, None]) % T
    is_key = torch.ones_like(content) if attention_mask is None else content.gather(1, columns)
    ids = ids.gather(1, columns).masked_fill(t >= length[:, None], pad_id)
    if ids.min() < 0:
        raise ValueError("input_ids has ids below 0 in its content: pass token ids, not labels")
    return ids, is_key, columns, length


def in_blocks(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Split (all tokens, ...), row after row, into (rows, tokens, ...) of each shape."""
    pieces = x.split([rows * tokens for rows, tokens in shapes])
    return [piece.unflatten(0, shape) for piece, shape in zip(pieces, shapes)]


class PrefixTree:
    """Each distinct (prefix, token) of a batch, once: all that a causal model has to compute.

    A token's hidden state depends on the tokens before it in its row and on nothing else, so rows that begin
    alike share their states. Sorted, such rows are neighbours, and a row *owns* what it does not share with
    the row above, from the first difference to its end:

        rows    P Q a b      owned    P Q a b      tokens, N = 7    P Q a b c d R
                P Q a c d             . . . c d    columns          0 1 2 3 3 4 1
                P R                   . R

    Args:
        ids, is_key (R, E): as from `align`. read (R,): tokens of each row that are read. device: the model's.

    Attributes:
        ids, columns (N,): the tokens, and where they stand in their rows. keys_before (N,): OPT's positions.
        index (R, E): which of the N tokens stands there; arbitrary where nobody reads.
        keys: the tokens that each owning row may look at, row after row, as indices into the N.
        query_shapes, key_shapes: (rows, queries), (rows, keys) of each block of neighbours that are alike in
            both, as answers of one length are: one sdpa call. query_columns, key_columns: in these shapes.
    """

    def __init__(self, ids: Tensor, is_key: Tensor, read: Tensor, device: torch.device) -> None:
        t = torch.arange(ids.size(1))
        marked = torch.where(is_key, ids, ~ids)  # hidden, the same id is another token than seen
        marked = marked.masked_fill(t >= read[:, None], UNREAD)
        rows, row_of = torch.unique(marked, dim=0, return_inverse=True)  # sorted; identical rows become one
        differs = F.pad(rows[1:] != rows[:-1], (0, 0, 1, 0), value=True)
        owned = (differs.cumsum(1) > 0) & (rows != UNREAD)
        # Numbered row by row. A token's owner is the last row that owns its column so far: the highest one.
        number = torch.where(owned, owned.flatten().cumsum(0).view_as(owned) - 1, 0).cummax(0).values
        self.index = number[row_of].to(device)

        rows, number, owned = (x[owned.any(1)] for x in (rows, number, owned))
        seen = (rows >= 0) & (rows != UNREAD)
        ids, columns = rows[owned], t.expand_as(rows)[owned]
        self.ids, self.columns = torch.where(ids < 0, ~ids, ids).to(device), columns.to(device)
        self.keys_before = (seen.cumsum(1) * seen - 1)[owned].to(device)
        self.keys = number[seen].to(device)
        lengths = torch.stack([owned.sum(1), seen.sum(1)], 1)  # queries and keys of each row
        lengths, counts = torch.unique_consecutive(lengths, dim=0, return_counts=True)
        self.query_shapes, self.key_shapes = (list(zip(counts.tolist(), x.tolist())) for x in lengths.T)
        self.query_columns = in_blocks(columns, self.query_shapes)
        self.key_columns = in_blocks(t.expand_as(rows)[seen], self.key_shapes)
        self.masks: dict[tuple, list[Tensor | None]] = {}

    def masks_within(self, window: int | None, copies: int, dtype: torch.dtype) -> list[Tensor | None]:
        """What is added to each block's scores, (rows, 1, copies * queries, keys): 0 where a key is seen,
        else -inf; None where `is_causal` says the same. One for all layers, since autograd keeps it."""
        if (window, copies, dtype) not in self.masks:
            masks = self.masks[window, copies, dtype] = []
            for q, k in zip(self.query_columns, self.key_columns):
                if torch.equal(q, k) and not (window and window < q.size(1)):
                    masks.append(None)
                    continue
                hidden = ((distance := q[:, :, None] - k[:, None]) < 0) | (distance >= (window or UNREAD))
                mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf)
                masks.append(mask.repeat(1, copies, 1)[:, None].to(self.ids.device, non_blocking=True))
        return self.masks[window, copies, dtype]


def tree_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention row by row, the only place where tokens meet: a row's own queries over the keys of its path.

    Args:
        query (1, heads, N, D), key, value (1, groups, N, D): a group of heads shares keys (arXiv:2305.13245).
        options: a layer's, and `tree`, a PrefixTree; without, this is transformers' sdpa. `sliding_window`:
            columns that a query sees, its own included. Padding too far from the content sees none: zeros.

    Returns (1, N, heads, D), and None for the attention weights.
    """
    tree = options.pop("tree", None)
    if tree is None:
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, mask, **options)
    window = options.get("sliding_window") or getattr(module, "sliding_window", None)  # Qwen2-MoE passes none
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads or groups, D)
    heads, groups, D = query.size(1), key.size(1), query.size(2)
    queries = in_blocks(query, tree.query_shapes)
    keys, values = (in_blocks(x.index_select(0, tree.keys), tree.key_shapes) for x in (key, value))
    attended, settings = [], {"dropout_p": options.get("dropout", 0.0), "scale": options.get("scaling")}
    for q, k, v, bias in zip(queries, keys, values, tree.masks_within(window, heads // groups, query.dtype)):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (rows, heads or groups, tokens, D)
        if bias is None:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **settings)
        else:  # few kernels take groups and a mask: a group's heads become more queries of one head
            x = F.scaled_dot_product_attention(q.reshape(len(q), groups, -1, D), k, v, bias, **settings)
        attended.append(x.reshape(len(q), heads, -1, v.size(3)).transpose(1, 2).flatten(0, 1))
    return torch.cat(attended)[None], None


transformers.AttentionInterface.register(TREE_ATTENTION, tree_attention)
transformers.AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)  # for plain rows


def ranking_loss(rewards: Tensor, length: Tensor, divergence: Tensor, loss_on: str) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss of B pairs, `-log sigmoid(chosen - rejected)`.

    "tokens" averages it over every position from the divergence to the longer row's end, as DeepSpeed-Chat
    does; the shorter row's padding takes part (DeepSpeedExamples #316). "end" takes the two end scores alone,
    as InstructGPT (arXiv:2203.02155). An identical pair gives log 2 and no gradient.

    Args:
        rewards (2B, E): aligned at column 0. length (2B,). divergence (B,): an identical pair's is its end.

    Returns loss (), end scores (2B,).
    """
    end_scores = rewards.gather(1, length[:, None] - 1).squeeze(1)  # (2B,)
    end = torch.maximum(*length.chunk(2))  # (B,)
    if loss_on == "end":
        chosen, rejected = end_scores.chunk(2)
        return -F.logsigmoid(torch.where(divergence < end, chosen - rejected, 0)).mean(), end_scores
    t = torch.arange(rewards.size(1), device=rewards.device)
    chosen, rejected = rewards.chunk(2)  # (B, E)
    inside = t < end[:, None]
    difference = torch.where(inside & (t >= divergence[:, None]), chosen - rejected, 0)
    counted = inside & (t >= torch.minimum(divergence, end - 1)[:, None])  # an identical pair counts one zero
    loss = (-F.logsigmoid(difference) * counted).sum(1, dtype=torch.float32) / counted.sum(1)  # (B,)
    return loss.mean().to(rewards.dtype), end_scores  # a sum in fp16 would pass 65,504


class ValueHead(nn.Linear):
    """`nn.Linear(H, 1, bias=False)`, in float32 if asked: bf16 scores near 4 move in steps of 0.03 and tie.
    The cast lies in the module's own forward because ZeRO-3 gathers its weight only there."""

    def __init__(self, width: int, in_float32: bool, **factory: Any) -> None:
        super().__init__(width, 1, bias=False, **factory)
        self.in_float32 = in_float32

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.in_float32:
            return super().forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """A decoder with a value head: r(t), one scalar a token. Names and state dict are DeepSpeed-Chat's.

    Args:
        base_model: the decoder without its language-model head, `last_hidden_state` its first output.
        tokenizer: of which only `pad_token_id` is read.
        num_padding_at_beginning: PAD ids with which the tokenizer begins every text: 1 for OPT with pad = eos
            = bos, 0 for nearly all others. Read only where no `attention_mask` is given.
        compute_fp32_loss: head and loss in float32 whatever the backbone's dtype.

    Attributes:
        loss_on: "tokens" (DeepSpeed-Chat) or "end" (InstructGPT, TRL): see `ranking_loss`.
        share_prefix: compute each token once where that is known to be equal: see `PrefixTree`.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: Tokenizer,
        num_padding_at_beginning: int = 0,
        compute_fp32_loss: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token_id: set tokenizer.pad_token, not to EOS")
        self.config = base_model.config
        self.PAD_ID = tokenizer.pad_token_id
        self.num_padding_at_beginning = num_padding_at_beginning
        self.loss_on = "tokens"
        self.share_prefix = True
        by_interface = base_model._supports_attention_backend and self.config._attn_implementation == "sdpa"
        if self.config.model_type in TREE_FAMILIES and by_interface and is_causal(self.config):
            base_model.set_attn_implementation(TREE_ATTENTION)
        self.rwtransformer = base_model
        width = getattr(self.config, "word_embed_proj_dim", self.config.hidden_size)  # OPT-350m: narrower
        self.v_head = ValueHead(width, compute_fp32_loss, dtype=base_model.dtype, device=base_model.device)

    def gradient_checkpointing_enable(self) -> None:
        # The reentrant kind loses every gradient where embeddings are frozen.
        self.rwtransformer.gradient_checkpointing_enable({"use_reentrant": False})

    def gradient_checkpointing_disable(self) -> None:
        self.rwtransformer.gradient_checkpointing_disable()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False, **others: None
    ) -> dict[str, Tensor]:
        """The ranking loss of B pairs. Left, right and no padding are three ways to write the same row.

        Args:
            input_ids (2B, T): chosen rows, then the rejected ones in the same order.
            attention_mask (2B, T): 1 at content. Without one padding is told by PAD, and is seen as a key.

        Returns loss (), and the end scores chosen_mean_scores and rejected_mean_scores (B,).

        Raises ValueError: names the argument or the row, and what to do.
        """
        if self.loss_on not in ("tokens", "end"):
            raise ValueError(f"loss_on is {self.loss_on!r}: use 'tokens' or 'end'")
        ids, is_key, _, length = self._align(input_ids, attention_mask, **others)
        if len(ids) % 2:
            raise ValueError(f"input_ids has {len(ids)} rows: pass B chosen rows, then their B rejected ones")
        chosen, rejected = ids.chunk(2)  # (B, T)
        shorter, longer = torch.aminmax(torch.stack(length.chunk(2)), dim=0)  # (B,)
        differs = (chosen != rejected) | (torch.arange(ids.size(1)) >= shorter[:, None])
        divergence = torch.where(differs.any(1), differs.int().argmax(1), longer)  # (B,)
        read = longer.repeat(2) if self.loss_on == "tokens" else length  # (2B,)
        length, divergence = (x.to(input_ids.device) for x in (length, divergence))  # ahead of the model
        rewards = self._rewards(ids, is_key, read, input_ids.device)  # (2B, E)
        loss, end_scores = ranking_loss(rewards, length, divergence, self.loss_on)
        chosen_scores, rejected_scores = end_scores.chunk(2)
        return {"loss": loss, "chosen_mean_scores": chosen_scores, "rejected_mean_scores": rejected_scores}

    def forward_value(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
        use_cache: bool = False,
        **others: None,
    ) -> Tensor | dict[str, Tensor]:
        """The values of R rows, one a token: what PPO's critic and the frozen reward model give.

        Args:
            input_ids, attention_mask (R, T): as in `forward`; PPO pads prompts left, answers right.
            prompt_length: columns before the answer, in (1, T]; read unless `return_value_only`.

        Returns values (R, T), 0 at padding. Unless `return_value_only`, a dict of `values` and
        `chosen_end_scores` (R,), the rewards at each row's last content token.

        Raises ValueError: names the argument or the row, and what to do.
        """
        ids, is_key, columns, length = self._align(input_ids, attention_mask, **others)
        T, device = ids.size(1), input_ids.device
        if not return_value_only and not 1 < prompt_length <= T:
            raise ValueError(f"prompt_length is {prompt_length}: it must be greater than 1 and at most {T}")
        columns, last = columns.to(device), length[:, None].to(device) - 1  # ahead of the model
        rewards = self._rewards(ids, is_key, length, device)  # (R, E)
        content = torch.arange(rewards.size(1), device=device) <= last
        columns = columns[:, : rewards.size(1)]  # back to where the tokens came from
        values = rewards.new_zeros(len(ids), T).scatter(1, columns, rewards.where(content, 0))
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": rewards.gather(1, last).squeeze(1)}

    def _align(self, input_ids: Tensor, attention_mask: Tensor | None, **others: None) -> tuple[Tensor, ...]:
        if given := [name for name, value in others.items() if value is not None]:
            raise ValueError(f"{', '.join(given)}: not supported, leave it out")
        return align(input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning)

    def _rewards(self, ids: Tensor, is_key: Tensor, read: Tensor, device: torch.device) -> Tensor:
        """r(t) of aligned rows as far as they are read, (R, E): each token once, or as plain rows."""
        E = int(read.max())
        ids, is_key = ids[:, :E], is_key[:, :E]
        if not self.share_prefix or self.config._attn_implementation != TREE_ATTENTION:
            inputs = {"input_ids": ids.to(device), "attention_mask": is_key.long().to(device)}
            return self.v_head(self.rwtransformer(**inputs, use_cache=False)[0]).squeeze(-1)
        tree = PrefixTree(ids, is_key, read, device)
        positions = tree.keys_before if self.config.model_type == "opt" else tree.columns  # OPT's padding: -1
        # 4-D, so that the backbone makes no mask of its own; sdpa refuses integers, should one drop `tree`.
        placeholder = torch.ones(1, 1, 1, 1, dtype=torch.long, device=device)
        inputs = {"input_ids": tree.ids[None], "position_ids": positions[None], "attention_mask": placeholder}
        hidden = self.rwtransformer(**inputs, tree=tree, use_cache=False)[0]  # (1, N, H)
        return self.v_head(hidden).flatten()[tree.index]


def reward_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' `...ForSequenceClassification` of a family, made of its parts where there is none."""
    theirs = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if theirs is None:
        base = transformers.MODEL_MAPPING[type(config)].__base__  # GranitePreTrainedModel, ...
        name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
        theirs = type(name, (GenericForSequenceClassification, base), {})
        warnings.warn(f"transformers has no {name}: what is saved, create_critic_model alone will read")
    return theirs


def load_weights(path: str, config: PretrainedConfig, dtype: torch.dtype, trained: bool) -> PreTrainedModel:
    """Backbone and head in one piece: the file is mapped, and nothing initialised that it then overwrites.
    `trained`: a reward checkpoint, of which every key must fit; else a base model, which lacks the head."""
    theirs = reward_class(config)
    prefix = theirs.base_model_prefix

    def init(self, config: PretrainedConfig) -> None:
        theirs.__init__(self, config)
        self.base_model_prefix = ""  # transformers 4.57 cannot rename and add a prefix: below is both

    renamed = {
        r"^rwtra(?:nsformer|nrsformer)\.": f"{prefix}.",  # DeepSpeed-Chat's name, and its older spelling
        rf"^(?:v_head|{getattr(config, 'value_head_prefix', 'v_head')})\.": "score.",  # OpenRLHF's name
        rf"^(?!{prefix}\.|score\.)(.+)": rf"{prefix}.\1",  # a decoder that was saved by itself
    }
    options = {"key_mapping": renamed, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        loader = type(theirs.__name__, (theirs,), {"__init__": init})
        model, info = loader.from_pretrained(path, config=config, dtype=dtype, **options)
    except Exception as error:  # each format has its own
        raise ValueError(f"the weights in {path} cannot be read, fetch them again: {error}") from error
    model.base_model_prefix = prefix
    kinds = "missing", "unexpected", "mismatched"
    problems = [f"{kind} {key}" for kind in kinds for key in info[f"{kind}_keys"]]
    fresh = "missing score.weight" in problems
    if not trained:  # any head falls away, the language model's and an older one
        problems = [p for p in problems if not p.startswith("unexpected") and "score.weight" not in p]
        if not fresh:
            warnings.warn(f"{path} has a head, which a fresh one replaces: rlhf_training=True keeps it")
    # Causal masks, which transformers once saved with GPT-2, GPT-J, GPT-Neo and GPT-BigCode.
    masks = r"^unexpected.*\.attn(\.attention)?\.(masked_)?bias$"
    problems = [p for p in problems if not re.search(masks, p)]
    if problems:
        hint = "; without a value head it looks like a base model: train it first (rlhf_training=False)"
        raise ValueError(f"the weights in {path} do not fit: {'; '.join(problems)}{hint if fresh else ''}")
    return model


def load_for_zero3(path: str, config: PretrainedConfig, dtype: torch.dtype, trained: bool) -> PreTrainedModel:
    """The same on rank 0; elsewhere memory that its weights are sent into as ZeRO-3 partitions them. Rank 0
    tells the others what is wrong: a bad key is an error on every rank, and never a hang."""
    model, told = None, [None, {}]  # rank 0's error, its buffers
    if dist.get_rank() == 0:
        try:
            model = load_weights(path, config, dtype, trained)
            told[1] = dict(model.named_buffers())
        except ValueError as error:
            told[0] = error
    dist.broadcast_object_list(told)
    if told[0] is not None:
        raise told[0]
    if model is None:
        with torch.device("meta"):
            model = reward_class(config)(config).to(dtype).eval()  # as `from_pretrained` leaves it
        model.to_empty(device="cpu")  # untouched, so that it takes no memory yet
        for name, buffer in model.named_buffers():
            buffer.data = told[1][name]
    return model


def override_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Set every dropout probability of a config, nested ones too: `dropout`, `resid_pdrop`, ..."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and less than 1")
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            override_dropout(value, dropout)
        elif re.search("dropout|pdrop$", name) and type(value) in (int, float):
            vars(config)[name] = dropout or type(value)(0)  # past validation, which types MPT's as an integer


def read_config(path: str, dropout: float | None) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(path, num_labels=1)
    decoder = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    both_ways = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING or not is_causal(config)
    if both_ways or not decoder:
        raise ValueError(f"{path} is a {config.model_type} model: a critic needs a causal decoder")
    if dropout is not None:
        override_dropout(config, dropout)
    return config


def create_critic_model(
    model_name_or_path: str,
    tokenizer: Tokenizer,
    ds_config: dict[str, Any] | None,
    num_padding_at_beginning: int = 0,
    rlhf_training: bool = False,
    dropout: float | None = None,
    zero_stage: int = 0,
    compute_fp32_loss: bool = False,
) -> RewardModel:
    """Make the critic from a pretrained decoder (step 2), or load it from a reward checkpoint (step 3).

    Args:
        model_name_or_path: a local folder or a hub id. With `rlhf_training` a checkpoint of DeepSpeed-Chat's
            (`rwtransformer.*`, `v_head.weight`), or one of transformers' `AutoModelForSequenceClassification`
            with one label, which TRL and OpenRLHF write too; safetensors or pickle, whole or sharded.
        tokenizer: with a pad_token_id; embeddings grow to its length, rounded up to a multiple of 8.
        ds_config: the DeepSpeed config: bf16 or fp16 sets the dtype (else float32), ZeRO stage 3 partitions.
        rlhf_training: load backbone and head from a reward checkpoint, not a backbone and a fresh head.
        dropout: in [0, 1), overrides every dropout probability of the config; None leaves them.
        zero_stage: the original's argument; the stage in `ds_config` is what counts.

    Raises ValueError: names the argument, file or key at fault and the remedy. OSError: no such folder or id.
    """
    sections = {name: (ds_config or {}).get(name) or {} for name in ("bf16", "fp16", "zero_optimization")}
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((dtypes[name] for name in dtypes if sections[name].get("enabled") is True), torch.float32)
    stage = sections["zero_optimization"].get("stage", 0)
    if zero_stage not in (0, stage):
        raise ValueError(f"zero_stage is {zero_stage}, the stage in ds_config {stage}: leave zero_stage out")
    config = read_config(model_name_or_path, dropout)
    if rlhf_training and len(tokenizer) > config.vocab_size:
        sizes = f"the tokenizer has {len(tokenizer)} tokens, the checkpoint {config.vocab_size}"
        raise ValueError(f"{sizes}: use the tokenizer saved in {model_name_or_path}")
    if stage == 3:
        import deepspeed

        deepspeed.get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # where rank 0 sends to
    load = load_for_zero3 if stage == 3 else load_weights
    theirs = load(model_name_or_path, config, dtype, rlhf_training)
    if len(tokenizer) > config.vocab_size:
        theirs.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    model = RewardModel(theirs.base_model, tokenizer, num_padding_at_beginning, compute_fp32_loss)
    if rlhf_training:
        model.v_head.weight = theirs.score.weight
    model.config.pad_token_id = tokenizer.pad_token_id
    if stage == 3:
        settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": sections["zero_optimization"]}
        deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
        for buffer in model.buffers():  # which it leaves where they are
            buffer.data = buffer.to(deepspeed.get_accelerator().current_device_name())
    return model


def save_critic_model(model: nn.Module, tokenizer: Tokenizer, output_dir: str | os.PathLike) -> None:
    """Write the critic as transformers' `AutoModelForSequenceClassification` reads it; so do TRL and vLLM.

    Every rank calls it; under ZeRO-3 parameters are gathered one by one, and rank 0 alone writes. The folder
    is written beside its place and moved in, the weights last: what `output_dir` held stays whole until then.
    `model` is a RewardModel or the DeepSpeed engine around it, at any ZeRO stage.

    Raises OSError, on rank 0 alone: `output_dir` cannot be written. ValueError: a class with another head.
    """
    model = getattr(model, "module", model)
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, model.PAD_ID
    with torch.device("meta"):  # a shell knows names, shards and config, and holds no data
        shell = reward_class(config)(config).to(model.rwtransformer.dtype)
    gather = contextlib.nullcontext
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        from deepspeed.runtime.zero import GatheredParameters as gather
    writes, state = not dist.is_initialized() or dist.get_rank() == 0, {}
    for name, value in model.state_dict(keep_vars=True).items():
        name = name.replace("rwtransformer", shell.base_model_prefix, 1).replace("v_head", "score", 1)
        with gather([value]):
            state[name] = value.detach().to("cpu", copy=True) if writes else None
    if state.keys() != shell.state_dict().keys():
        raise ValueError(f"{type(shell).__name__} has another head than one linear layer `score`: not saved")
    if writes:
        write_folder(Path(output_dir), shell, state, tokenizer)
    if dist.is_initialized():
        dist.barrier()


def write_folder(final: Path, shell: PreTrainedModel, state: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    beside = final / ".writing"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        shell.save_pretrained(beside, state_dict=state)
        tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else one set later is not saved
        tokenizer.save_pretrained(beside)
        new = sorted(beside.iterdir(), key=lambda file: (".safetensors" in file.name, file.name))
        for file in new:
            os.replace(file, final / file.name)
        # What an earlier model left would be read instead of these files, or with them.
        older = r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?"
        older += r"|(chat_template|added_tokens|special_tokens_map)\.\w+"
        for name in {file.name for file in final.iterdir()} - {file.name for file in new}:
            if re.fullmatch(older, name):
                (final / name).unlink()
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise OSError(f"{final} cannot be written, free or change the place ({error})") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
