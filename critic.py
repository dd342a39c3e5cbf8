# SPDX-License-Identifier: MIT
# The reward/critic model of RLHF in one file, after DeepSpeed-Chat's `create_critic_model` and `RewardModel`.
"""A pretrained decoder with a linear value head: trained on pairs, then PPO's critic and reward model.

Read from top to bottom: content of a row -> a pair as one row -> the loss -> the model -> create -> save.
Letters in the shape comments: B pairs (or rows), T tokens a row, E the longest content of a batch, W the
columns of a row that holds a pair, H the width of the hidden states. Of 2B rows the first B are chosen, the
others rejected.
"""

import contextlib
import copy
import inspect
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.modeling_utils import load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

ATTEND_IN_TWO_ROWS = "attend_in_two_rows"  # the attention implementation below, in transformers' registry
ROW_MULTIPLE = 16  # row lengths are rounded up to it: kernels and allocator meet few shapes

# Families for which a pair in one row was measured equal to two rows (test_critic.py): their layers add a 4-D
# mask as it is given and take `position_ids`. Not among them: ALiBi (BLOOM, MPT: no position_ids), local or
# linear attention (GPT-Neo, Mamba, Qwen3-Next), and whatever nobody has measured.
SHARED_PREFIX_FAMILIES = {
    "opt", "llama", "gpt2", "gptj", "gpt_neox", "gpt_bigcode", "falcon", "mistral", "mixtral",
    "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "stablelm", "olmo2",
    "starcoder2",
}  # fmt: skip


def round_up(length: int, multiple: int = ROW_MULTIPLE) -> int:
    return -(-length // multiple) * multiple


def align(
    input_ids: Tensor, attention_mask: Tensor | None, pad_id: int, num_padding_at_beginning: int = 0
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Move each row's content to column 0, so that left, right and no padding are one case.

    With a mask, content runs from its first 1 to its last 1. Without, from the first to the last id that is
    not PAD, and `num_padding_at_beginning` ids before: OPT begins every text with BOS, and with pad = eos BOS
    is PAD (DeepSpeedExamples #455). An interior PAD, such as the eos of an earlier turn, ends nothing.

    Returns:
        ids (R, T): PAD behind the content. mask (R, T), boolean, or None as it came.
        columns (R, T): where each column came from, a rotation of 0..T-1.
        length (R,): content tokens; 0 in a row without content.
    """
    content = attention_mask.bool() if attention_mask is not None else input_ids != pad_id  # (R, T)
    T = content.size(1)
    t = torch.arange(T, device=input_ids.device)
    start = content.int().argmax(1)
    if attention_mask is None:
        start = (start - num_padding_at_beginning).clamp(min=0)
    length = torch.where(content.any(1), T - content.flip(1).int().argmax(1) - start, 0)
    columns = (t + start[:, None]) % T
    ids = input_ids.gather(1, columns).masked_fill(t >= length[:, None], pad_id)
    return ids, None if attention_mask is None else content.gather(1, columns), columns, length


def rotate(rows: Tensor, columns: Tensor) -> Tensor:
    """(R, T, ...) read in the order of `columns` (R, T)."""
    return rows[torch.arange(len(rows), device=rows.device)[:, None], columns]


def length_matters(config: PretrainedConfig, longest: int) -> bool:
    """Whether columns beyond its content change a row of `longest` tokens, or what its padding sees."""
    if longest > (getattr(config, "sliding_window", None) or longest):
        return True  # a padding column may see no key at all
    # These rotary embeddings of one token change with the longest position of its row.
    rope = f"{getattr(config, 'rope_parameters', None)} {getattr(config, 'rope_scaling', None)}"
    return "dynamic" in rope or "longrope" in rope


def row_columns(config: PretrainedConfig, longest: int, T: int) -> int:
    """E: how many of T columns to compute when the longest row has `longest` tokens."""
    if length_matters(config, longest):
        return longest
    positions = getattr(config, "max_position_embeddings", None) or T  # padding may not go beyond the last
    return max(longest, min(round_up(longest), T, positions))


def can_share_prefix(config: PretrainedConfig, longest: int, columns: int) -> bool:
    """Whether a batch of pairs runs with each as one row. Wrong is worse than slow: elsewhere as two rows.

    Args:
        longest: content tokens of the longest row; columns: W, of the row that holds the longest pair.
    """
    if config.model_type not in SHARED_PREFIX_FAMILIES:
        return False  # not measured: see the list
    if config._attn_implementation not in ("sdpa", "eager", ATTEND_IN_TWO_ROWS):
        return False  # flash and flex kernels refuse a 4-D mask
    if getattr(config, "alibi", False):
        return False  # Falcon's ALiBi counts columns, not positions
    if length_matters(config, longest):
        return False  # our mask replaces the layer's own, which cuts old tokens off; one row goes further than two
    # Older versions of these keep a triangular buffer of that many columns.
    if config.model_type in ("gpt2", "gptj", "gpt_bigcode") and columns > config.max_position_embeddings:
        return False
    # Worth it? Attention over the columns of two rows costs the same either way, and the copying 2 to 4%.
    H, E = config.hidden_size, round_up(longest)
    if config._attn_implementation == ATTEND_IN_TWO_ROWS:
        return columns < 0.95 * 2 * E
    # Under a W x W mask a token costs about 6H in a layer's products and 2 a column of its row (as measured;
    # below by half): a long row with a short prefix loses there what it saves.
    return columns * (3 * H + columns) < 2 * E * (3 * H + E)


def pair_in_one_row(
    backbone: PreTrainedModel, ids: Tensor, mask: Tensor | None, divergence: Tensor, tail: Tensor, W: int
) -> tuple[dict[str, Any], Tensor]:
    """Lay each pair out as `prefix | chosen tail | rejected tail`, so that the prompt is computed once.

    In a causal model the hidden states of the common prefix are the same in both rows, and the loss reads
    none of them. What may be seen, for a prefix `P Q`, chosen tail `a b` and rejected tail `x y`:

                      key  P Q a b x y     position
        query  P           # . . . . .     0   # is seen, . is not
               Q           # # . . . .     1
               a           # # # . . .     2
               b           # # # # . .     3
               x           # # . . # .     2   the rejected tail does not see the chosen one,
               y           # # . . # #     3   and its positions go on from the prefix

    Args:
        ids, mask (2B, E): aligned at column 0, without holes; padding is no key where there is a mask.
        divergence (B,): tokens of the prefix. tail (2B,): tokens of each row from there on.

    Returns:
        The backbone's arguments for B rows of W columns, and (2B, E): the column of each row's token t.
    """
    B, E = len(divergence), ids.size(1)
    t = torch.arange(E, device=ids.device)
    prefix, chosen_tail, rejected_tail = divergence[:, None], *tail[:, None].chunk(2)  # (B, 1) each
    column = torch.arange(W, device=ids.device).expand(B, W)
    in_rejected = column >= prefix + chosen_tail
    filler = column >= prefix + chosen_tail + rejected_tail
    # Which row's which token a column holds: into the pair's `chosen row | rejected row`, (B, 2E); and back.
    token = (column - in_rejected * chosen_tail).clamp(max=E - 1)
    source = token + in_rejected * E
    moved = torch.where(t >= prefix, t + chosen_tail, t)
    moved = torch.cat([t.expand_as(moved), moved]).clamp(max=W - 1)  # (2B, E)

    def lay_out(rows: Tensor, fill: int) -> Tensor:
        return torch.cat(rows.chunk(2), 1).gather(1, source).masked_fill(filler, fill)  # (2B, E) -> (B, W)

    positions = t.expand_as(ids)
    if mask is not None and backbone.config.model_type == "opt":
        positions = mask.cumsum(1) * mask - 1  # OPT alone derives them from the mask: padding gets -1
    inputs = {"input_ids": lay_out(ids, 0), "position_ids": lay_out(positions, 0)}
    in_two_rows = backbone.config._attn_implementation == ATTEND_IN_TWO_ROWS
    if in_two_rows:
        pair = torch.arange(B, device=ids.device)[:, None]
        to_rows = moved + W * pair.repeat(2, 1)  # (2B, E), indices into B W columns
        to_pairs = token + E * (pair + B * in_rejected)  # (B, W), indices into 2B E tokens
        seen = None if mask is None else (t[:, None] >= t) & mask[:, None, :]  # (2B, query, key)
    else:
        in_chosen_tail = (column >= prefix) & ~in_rejected
        hidden = in_rejected[:, :, None] & in_chosen_tail[:, None, :]  # (B, query, key)
        seen = (column[:, :, None] >= column[:, None, :]) & ~hidden
        if mask is not None:
            seen &= lay_out(mask, False)[:, None, :]
    additive = None
    if seen is not None:
        # In the backbone's dtype, made once: sdpa would turn a boolean mask into this in every layer, and
        # eager attention adds what it is given.
        additive = torch.zeros_like(seen, dtype=backbone.dtype)
        additive = additive.masked_fill_(~seen, torch.finfo(backbone.dtype).min)[:, None]
    if not in_two_rows:
        return inputs | {"attention_mask": additive}, moved
    # 4-D, so that the backbone makes no mask of its own; sdpa refuses integers, should one drop `two_rows`.
    unread = ids.new_ones(1, 1, 1, 1)
    return inputs | {"attention_mask": unread, "two_rows": (to_rows, to_pairs, additive)}, moved


def attend_in_two_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    two_rows: tuple[Tensor, Tensor, Tensor | None] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, but a pair in one row attends as its two rows: the same sums without the dead blocks.

    Under the W x W mask of `pair_in_one_row` a kernel computes what the mask hides: (2e - p)^2 products a
    pair, where two rows of e need 2 e^2. So everything that works a token at a time, which is all else in a
    layer, runs on the pair's W columns, and for attention alone the columns are copied to where two rows have
    them, and back.

    Args:
        query, key, value (B, heads, W, D), position embeddings applied. Without `two_rows` rows of any kind.
        two_rows: (2B, E) and (B, W), indices into all columns and into all rows, flat; the rows' additive mask
            (2B, 1, E, E), or None where nothing but causality hides a key.

    Returns:
        (B, W, heads, D), and None for the attention weights.
    """
    sdpa = AttentionInterface()["sdpa"]
    if two_rows is None:
        return sdpa(module, query, key, value, attention_mask, **options)
    to_rows, to_pairs, mask = two_rows

    def copied(x: Tensor, index: Tensor) -> Tensor:  # x (rows, columns, heads, D)
        return x.flatten(2).flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *x.shape[2:])

    query, key, value = (copied(x.transpose(1, 2), to_rows).transpose(1, 2) for x in (query, key, value))
    options["is_causal"] = mask is None
    attended, _ = sdpa(module, query, key, value, mask, **options)  # (2B, E, heads, D)
    return copied(attended, to_pairs), None


AttentionInterface.register(ATTEND_IN_TWO_ROWS, attend_in_two_rows)
AttentionMaskInterface.register(ATTEND_IN_TWO_ROWS, AttentionMaskInterface()["sdpa"])


def ranking_loss(rewards: Tensor, length: Tensor, divergence: Tensor, loss_on: str) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss of B pairs, `-log sigmoid(chosen - rejected)`.

    "tokens" averages it over every position from the divergence to the longer row's end, as DeepSpeed-Chat
    does; the shorter row's padding takes part (DeepSpeedExamples #316). "end" takes the two end scores alone,
    as InstructGPT (arXiv:2203.02155). An identical pair gives log 2 and no gradient.

    Args:
        rewards (2B, E): aligned at column 0. length (2B,). divergence (B,): the row's end for an identical pair.

    Returns:
        loss (), end scores (2B,).
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

    The cast lies in the module's own forward because ZeRO-3 gathers its weight only there.
    """

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
        share_prefix: run a pair as one row where that is known to be equal: see `pair_in_one_row`.

    Raises:
        ValueError: a tokenizer without a padding token, or a config that does not tell the decoder's width.
    """

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        num_padding_at_beginning: int = 0,
        compute_fp32_loss: bool = False,
    ) -> None:
        super().__init__()
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer has no pad_token_id: set tokenizer.pad_token to a token that differs from EOS"
            )
        self.config = base_model.config
        # OPT-350m's output is narrower than its hidden_size; GPT-2 once called it n_embd.
        widths = (
            getattr(self.config, name, None) for name in ("word_embed_proj_dim", "hidden_size", "n_embd")
        )
        width = next((width for width in widths if width), None)
        if width is None:
            raise ValueError(
                f"{type(self.config).__name__} has none of word_embed_proj_dim, hidden_size, n_embd"
            )
        self.PAD_ID = tokenizer.pad_token_id
        self.num_padding_at_beginning = num_padding_at_beginning
        self.compute_fp32_loss = compute_fp32_loss
        self.loss_on = "tokens"
        self.share_prefix = True
        backend = self.config.model_type in SHARED_PREFIX_FAMILIES and getattr(
            base_model, "_supports_attention_backend", False
        )
        if backend and self.config._attn_implementation == "sdpa":
            base_model.set_attn_implementation(ATTEND_IN_TWO_ROWS)  # sdpa where a pair is two rows anyway
        self.rwtransformer = base_model
        self.v_head = ValueHead(width, compute_fp32_loss, dtype=base_model.dtype, device=base_model.device)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.rwtransformer.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )

    def gradient_checkpointing_disable(self) -> None:
        self.rwtransformer.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
    ) -> dict[str, Tensor]:
        """The ranking loss of B pairs. Left, right and no padding are three ways to write the same row.

        Args:
            input_ids (2B, T): chosen rows, then the rejected ones in the same order.
            attention_mask (2B, T): 1 at content. Without one padding is told by PAD, and is seen as a key.
            position_ids (2B, T), inputs_embeds (2B, T, H), use_cache: as the backbone takes them.

        Returns:
            loss (), and the end scores chosen_mean_scores and rejected_mean_scores (B,).

        Raises:
            ValueError: names the argument or the row, and what to do.
        """
        if self.loss_on not in ("tokens", "end"):
            raise ValueError(f"loss_on is {self.loss_on!r}: use 'tokens' or 'end'")
        options = self._options(
            input_ids, attention_mask, past_key_values, position_ids, head_mask, inputs_embeds
        )
        if len(input_ids) % 2:
            raise ValueError(
                f"input_ids has {len(input_ids)} rows: pass B chosen rows, then their B rejected ones"
            )
        ids, mask, columns, length = align(
            input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning
        )
        T = ids.size(1)
        t = torch.arange(T, device=ids.device)
        shorter, longer = torch.aminmax(torch.stack(length.chunk(2)), dim=0)  # (B,) each
        chosen, rejected = ids.chunk(2)
        differs = (chosen != rejected) | (t >= shorter[:, None])  # (B, T)
        divergence = torch.where(differs.any(1), differs.int().argmax(1), T)  # (B,)
        tail = (longer.repeat(2) if self.loss_on == "tokens" else length) - divergence.repeat(2)  # (2B,)
        whole = torch.ones((), dtype=torch.bool, device=ids.device)  # no holes in the mask
        if mask is not None:
            whole = (mask == (t < length[:, None])).all()
        # The one device-to-host sync: what the shapes below depend on, and whether a row is empty.
        pair_tokens = divergence + tail.view(2, -1).sum(0)  # (B,)
        facts = longer.max(), pair_tokens.max(), length.min(), length.argmin(), whole.long()
        longest, pair_tokens, least, least_row, whole = torch.stack(facts).tolist()
        self._require_content(least, least_row)

        E, W = row_columns(self.config, longest, T), round_up(pair_tokens)
        ids, mask = ids[:, :E], None if mask is None else mask[:, :E]
        if self.share_prefix and not options and whole and can_share_prefix(self.config, longest, W):
            if self.loss_on == "end":
                mask = None  # it hides padding, which comes last, from padding alone, and nothing reads that
            inputs, moved = pair_in_one_row(self.rwtransformer, ids, mask, divergence, tail, W)
            rewards = self._rewards(use_cache=use_cache, **inputs)  # (B, W)
            rewards = rewards.repeat(2, 1).gather(1, moved)  # (2B, E)
        else:
            options = {name: rotate(value, columns)[:, :E] for name, value in options.items()}
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": use_cache}
            rewards = self._rewards(**inputs, **options)  # (2B, E)
        loss, end_scores = ranking_loss(rewards, length, divergence, self.loss_on)
        chosen_scores, rejected_scores = end_scores.chunk(2)
        return {"loss": loss, "chosen_mean_scores": chosen_scores, "rejected_mean_scores": rejected_scores}

    def forward_value(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_value_only: bool = False,
        prompt_length: int = 0,
        use_cache: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The values of B rows, one a token: what PPO's critic and the frozen reward model give.

        Args:
            input_ids, attention_mask (B, T): as in `forward`; PPO pads prompts left, answers right.
            prompt_length: columns before the answer, in (1, T]; read unless `return_value_only`.

        Returns:
            values (B, T); at padding what the backbone makes of PAD after the content, or 0. Unless
            `return_value_only`, a dict of `values` and `chosen_end_scores` (B,), the rewards at each row's
            last content token.

        Raises:
            ValueError: names the argument or the row, and what to do.
        """
        options = self._options(
            input_ids, attention_mask, past_key_values, position_ids, head_mask, inputs_embeds
        )
        T = input_ids.size(1)
        if not return_value_only and not 1 < prompt_length <= T:
            raise ValueError(
                f"prompt_length is {prompt_length}: it must be greater than 1 and at most {T}, the row length"
            )
        ids, mask, columns, length = align(
            input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning
        )
        longest, *least = torch.stack([length.max(), length.min(), length.argmin()]).tolist()
        self._require_content(*least)
        E = row_columns(self.config, longest, T)
        inputs = {"input_ids": ids[:, :E], "attention_mask": None if mask is None else mask[:, :E]}
        options = {name: rotate(value, columns)[:, :E] for name, value in options.items()}
        aligned = self._rewards(**inputs, use_cache=use_cache, **options)  # (B, E)
        back = columns.argsort(1)  # to where the tokens came from
        values = F.pad(aligned, (0, T - E)).gather(1, back)  # (B, T)
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": aligned.gather(1, length[:, None] - 1).squeeze(1)}

    def _options(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Any,
        position_ids: Tensor | None,
        head_mask: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> dict[str, Tensor]:
        """Check shapes, and keep those of the original's other arguments that the backbone takes."""
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ValueError(f"input_ids has shape {tuple(input_ids.shape)}: pass (rows, tokens)")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            shapes = f"{tuple(attention_mask.shape)}, input_ids {tuple(input_ids.shape)}"
            raise ValueError(f"attention_mask has shape {shapes}: pass the same shape")
        for name, value in (("past_key_values", past_key_values), ("head_mask", head_mask)):
            if value is not None:
                raise ValueError(
                    f"{name} is not supported: a row is scored whole, by all heads; leave it out"
                )
        options = {"position_ids": position_ids, "inputs_embeds": inputs_embeds}
        options = {name: value for name, value in options.items() if value is not None}
        for name, value in options.items():
            if name not in inspect.signature(self.rwtransformer.forward).parameters:
                raise ValueError(f"{type(self.rwtransformer).__name__} takes no {name}: leave it out")
            if value.shape[:2] != input_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: it must begin with {tuple(input_ids.shape)}"
                )
        return options

    @staticmethod
    def _require_content(length: int, row: int) -> None:
        if length < 1:
            raise ValueError(f"row {row} of input_ids is only padding: drop the row, or its pair")

    def _rewards(self, *, input_ids: Tensor, attention_mask: Tensor | None, **options: Any) -> Tensor:
        """r(t) of rows as they lie. A boolean 2-D mask goes in as the integers that tokenizers give."""
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask.long()
        if "inputs_embeds" not in options:
            options["input_ids"] = input_ids
        hidden = self.rwtransformer(attention_mask=attention_mask, **options)[0]  # (R, T, H)
        return self.v_head(hidden).squeeze(-1)  # (R, T)


def checkpoint_keys(model_name_or_path: str) -> dict[str, tuple[str, torch.Size]]:
    """Every tensor's name in a checkpoint, with the file it lies in and its shape; no weight is read.

    Raises:
        ValueError: no weights, or a file that cannot be read, a pickle that carries code among them.
    """
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    found = (
        cached_file(model_name_or_path, name, _raise_exceptions_for_missing_entries=False) for name in names
    )
    path = next((path for path in found if path is not None), None)
    if path is None:
        raise ValueError(f"{model_name_or_path} holds no weights: none of {', '.join(names)}")
    files = get_checkpoint_shard_files(model_name_or_path, path)[0] if path.endswith(".json") else [path]
    keys = {}
    for file in files:
        try:
            keys |= {
                key: (file, tensor.shape)
                for key, tensor in load_state_dict(file, map_location="meta").items()
            }
        except Exception as error:  # each format has its own: say which file, and keep the reason
            raise ValueError(
                f"{file} cannot be read as a dict of tensors: fetch or save it again ({error})"
            ) from error
    return keys


def load_backbone(
    path: str, config: PretrainedConfig, dtype: torch.dtype, allowed: set[str] | None
) -> PreTrainedModel:
    """The decoder through `AutoModel`, which maps the file and initialises nothing that it then overwrites.

    Raises:
        ValueError: lists each missing or mis-shaped key, and each key that is neither the decoder's nor in
            `allowed` (None: any, since a pretrained checkpoint has a language-model head).
    """
    renamed = {r"^rwtra(?:nsformer|nrsformer)\.": ""}  # DeepSpeed-Chat's prefix, and its older spelling
    if not MODEL_MAPPING[type(config)].base_model_prefix:
        renamed[r"^model\."] = ""  # Gemma 3 in transformers 4.57 does not know its own
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report would call the head unexpected; what is wrong is raised below
    try:
        backbone, info = AutoModel.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            key_mapping=renamed,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(verbosity)
    unexpected = set() if allowed is None else set(info["unexpected_keys"]) - allowed
    # Causal masks, which transformers once saved with GPT-2, GPT-J, GPT-Neo and GPT-BigCode.
    unexpected = {key for key in unexpected if not re.search(r"\.attn(\.attention)?\.(masked_)?bias$", key)}
    problems = [f"missing {key}" for key in sorted(info["missing_keys"])]
    problems += [f"unexpected {key}" for key in sorted(unexpected)]
    for key in sorted(info["mismatched_keys"]):  # transformers 5 tells the shapes too
        name, *shapes = (key,) if isinstance(key, str) else key
        problems.append(" ".join([f"mis-shaped {name}", *(f"{tuple(shape)}" for shape in shapes)]))
    if problems:
        raise ValueError(
            f"the weights in {path} do not fit its config.json, correct one of them: {'; '.join(problems)}"
        )
    return backbone


def read_precision_and_stage(ds_config: dict[str, Any]) -> tuple[torch.dtype, int]:
    """What a DeepSpeed config says of the weights. Raises ValueError where it says it in no known way."""
    dtypes = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16}
    sections = {name: ds_config.get(name) or {} for name in (*dtypes, "zero_optimization")}
    for name, section in sections.items():
        if not (isinstance(section, dict) and section.get("enabled", False) in (True, False)):
            raise ValueError(f'ds_config has {name}: {section!r}; "enabled" must be true or false')
    found = [dtype for name, dtype in dtypes.items() if sections[name].get("enabled")]
    stage = sections["zero_optimization"].get("stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool) or len(found) > 1:
        raise ValueError(
            f"ds_config has stage {stage!r} and {found}: use a stage from 0 to 3, and one precision"
        )
    return found[0] if found else torch.float32, stage


@contextlib.contextmanager
def zero3_init(ds_config: dict[str, Any]):
    """Parameters made inside are born partitioned, by transformers' loading too."""
    import deepspeed

    names = {"zero_optimization", "bf16", "bfloat16", "fp16"}  # the rest is for deepspeed.initialize
    config = {"train_micro_batch_size_per_gpu": 1} | {
        name: ds_config[name] for name in names & set(ds_config)
    }
    # What transformers asks of its HfDeepSpeedConfig, which needs accelerate; it keeps a weak reference only.
    holder = type("ZeRO3", (), {"config": config, "is_zero3": lambda self: True})()
    set_hf_deepspeed_config(holder)
    try:
        yield lambda **module: deepspeed.zero.Init(config_dict_or_path=config, **module)
    finally:
        unset_hf_deepspeed_config()


def head_names(config: PretrainedConfig) -> list[str]:
    """What DeepSpeed-Chat, transformers and OpenRLHF call the value head's weight."""
    return ["v_head.weight", "score.weight", f"{getattr(config, 'value_head_prefix', 'score')}.weight"]


def find_head(path: str, config: PretrainedConfig, keys: dict[str, tuple[str, torch.Size]]) -> str:
    """The value head's name in a reward checkpoint.

    Raises:
        ValueError: no head, as in a base model (DeepSpeedExamples #376), or one with several outputs.
    """
    names = head_names(config)
    name = next((name for name in names if name in keys), None)
    if name is None:
        raise ValueError(
            f"{path} has no value head (none of {', '.join(dict.fromkeys(names))}): it looks like a base model; "
            "pass rlhf_training=False to train a fresh head on it"
        )
    file, shape = keys[name]
    if shape[0] != 1:
        raise ValueError(
            f"{name} in {file} has shape {tuple(shape)}: a reward model has one row, not a class each"
        )
    return name


def read_head(model: RewardModel, file: str, name: str) -> None:
    """Copy the head out of the one file that holds it; under ZeRO-3 rank 0's copy is what all ranks get."""
    if file.endswith(".safetensors"):
        with safe_open(file, "pt") as tensors:
            weight = tensors.get_tensor(name)
    else:
        weight = load_state_dict(file)[name]
    with gathered(model.v_head.weight, modifier_rank=0), torch.no_grad():
        if model.v_head.weight.numel():
            model.v_head.weight.copy_(weight)


def create_critic_model(
    model_name_or_path: str,
    tokenizer: PreTrainedTokenizerBase,
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

    Raises:
        ValueError: names the argument, file or key at fault and the remedy. OSError: no such folder or id.
    """
    dtype, stage = read_precision_and_stage(ds_config or {})
    if zero_stage not in (0, stage):
        raise ValueError(
            f"zero_stage is {zero_stage}, the stage in ds_config {stage}: pass the same, or leave zero_stage out"
        )
    config = AutoConfig.from_pretrained(model_name_or_path)
    if (
        config.is_encoder_decoder
        or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
        or type(config) in MODEL_FOR_MASKED_LM_MAPPING
        or getattr(config, "is_causal", True) is False
        or getattr(config, "use_bidirectional_attention", None)
    ):
        raise ValueError(
            f"{model_name_or_path} is a {config.model_type} model: a critic needs a causal decoder: OPT, Llama, ..."
        )
    if dropout is not None:
        override_dropout(config, dropout)
    keys = checkpoint_keys(model_name_or_path)
    head = find_head(model_name_or_path, config, keys) if rlhf_training else None
    if rlhf_training and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the checkpoint {config.vocab_size}: use the tokenizer "
            f"saved in {model_name_or_path}"
        )
    if not rlhf_training and keys.keys() & head_names(config):
        warnings.warn(
            f"{model_name_or_path} has a head, which a fresh one replaces: rlhf_training=True keeps it"
        )
    arguments = (model_name_or_path, config, dtype, {head} if rlhf_training else None)

    with contextlib.ExitStack() as stack:
        zero_init = contextlib.nullcontext
        if stage == 3:
            # Under ZeRO-3 transformers reports no unexpected key, and a mis-shaped one on rank 0 alone: a
            # hang. So rank 0 first loads the plain way, where the file is only mapped, and tells all ranks.
            verdict = [None]
            if dist.get_rank() == 0:
                try:
                    load_backbone(*arguments)
                except (ValueError, OSError, RuntimeError) as error:
                    verdict = [str(error)]
            dist.broadcast_object_list(verdict)
            if verdict[0] is not None:
                raise ValueError(verdict[0])
            zero_init = stack.enter_context(zero3_init(ds_config))
            arguments = (*arguments[:3], None)
        backbone = load_backbone(*arguments)
        if len(tokenizer) > backbone.get_input_embeddings().num_embeddings:
            backbone.resize_token_embeddings(round_up(len(tokenizer), 8), mean_resizing=False)
            if stage == 3:  # the grown embedding was born whole
                zero_init(module=backbone.get_input_embeddings())
        with zero_init():
            model = RewardModel(backbone, tokenizer, num_padding_at_beginning, compute_fp32_loss)
    model.config.pad_token_id = tokenizer.pad_token_id
    if rlhf_training:
        read_head(model, keys[head][0], head)
    return model


def override_dropout(config: PretrainedConfig, dropout: float) -> None:
    """Set every dropout probability of a config, nested ones too: `dropout`, `resid_pdrop`, ..."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and less than 1")
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            override_dropout(value, dropout)
        elif (
            ("dropout" in name or name.endswith("_pdrop"))
            and isinstance(value, (int, float))
            and not isinstance(value, bool)
        ):
            # Past transformers' validation, which types MPT's as an integer.
            vars(config)[name] = dropout or type(value)(0)


def gathered(parameter: Tensor, modifier_rank: int | None = None) -> contextlib.AbstractContextManager:
    """The whole of a parameter that ZeRO-3 has partitioned; any other is whole already."""
    if not hasattr(parameter, "ds_id"):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def save_critic_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, output_dir: str | os.PathLike
) -> None:
    """Write the critic as transformers' `AutoModelForSequenceClassification` reads it; so do TRL and vLLM.

    Every rank calls it; under ZeRO-3 parameters are gathered one by one, and rank 0 alone writes. The folder
    is written beside its place and moved in, the weights last: what `output_dir` held stays whole until then.

    Args:
        model: a RewardModel or the DeepSpeed engine around it, at any ZeRO stage.

    Raises:
        OSError: `output_dir` cannot be written.
    """
    model = getattr(model, "module", model)
    writes = not dist.is_initialized() or dist.get_rank() == 0
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        with gathered(value):
            if writes:
                state[name] = value.detach().to("cpu", copy=True)
    if writes:
        config = copy.deepcopy(model.config)
        config.num_labels, config.pad_token_id = 1, model.PAD_ID
        theirs = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
        with torch.device("meta"):  # a shell knows names, shards and config, and holds no data
            shell = theirs(config) if theirs else AutoModel.from_config(config)
            prefix = f"{shell.base_model_prefix or 'model'}."
            state = {
                name.replace("rwtransformer.", prefix, 1).replace("v_head.", "score.", 1): value
                for name, value in state.items()
            }
            if not theirs or shell.state_dict().keys() != state.keys():
                shell = AutoModel.from_config(config)
                warnings.warn(
                    f"transformers has no sequence classification with one linear head for {config.model_type}: "
                    "only create_critic_model(..., rlhf_training=True) will load what is written"
                )
            shell.to(state["score.weight"].dtype)
        final, beside = Path(output_dir), Path(output_dir, ".writing")
        try:
            shutil.rmtree(beside, ignore_errors=True)
            shell.save_pretrained(beside, state_dict=state)
            tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else one set later is not saved
            tokenizer.save_pretrained(beside)
            new = sorted(beside.iterdir(), key=lambda file: (".safetensors" in file.name, file.name))
            for file in new:
                os.replace(file, final / file.name)
            # What an earlier model left would be read instead of these files, or with them.
            names, older = {file.name for file in new}, r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)"
            older += r"(\.index\.json)?|chat_template\.jinja|added_tokens\.json|special_tokens_map\.json"
            for file in final.glob("*"):
                if file.name not in names and re.fullmatch(older, file.name):
                    file.unlink()
        except Exception as error:  # safetensors has an error of its own for a full disk
            raise OSError(f"{final} cannot be written, free or change the place ({error})") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    if dist.is_initialized():
        dist.barrier()
