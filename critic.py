# SPDX-License-Identifier: MIT
# The reward/critic model of RLHF, after DeepSpeed-Chat's `create_critic_model` and `RewardModel`.
"""A pretrained decoder with a linear value head, for reward modelling and as PPO's critic.

Chapter 1 is the whole model on a padded batch. Chapter 2, the prefix tree, makes it fast.
Letters in shape comments: B pairs; R rows (2B in training: B chosen, then B rejected); U distinct
rows; T columns of the input; E columns whose reward is needed; H hidden size; N nodes of the tree;
Q queries and K keys of a row; D head size.
"""

import functools
import math
import os
import pickle
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.modeling_layers import GenericForSequenceClassification

# ---- Chapter 1: the reward model on a padded batch ----

# All but cuDNN's, which gives NaN gradients on Hopper with an explicit mask (pytorch#196678).
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def align(
    input_ids: Tensor, attention_mask: Tensor | None, pad_id: int, num_padding_at_beginning: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Move the content of each row to column 0, so that all kinds of padding become one.

    With a mask, content is where the mask is 1. Without one, it runs from the first to the last id
    that is not PAD, plus the `num_padding_at_beginning` ids before it: OPT starts every text with
    BOS, which has PAD's id once pad = eos is set (DeepSpeedExamples #455).

    Returns, on the CPU: ids (R, T), content, then PAD; visible (R, T), what attention may see,
    which is content, or without a mask everything, as in DeepSpeed-Chat; source (R, T), the column
    of each id in input_ids; length (R,), content tokens. Raises ValueError for bad shapes and
    empty rows.
    """
    ids = input_ids.cpu().long()
    content = ids != pad_id if attention_mask is None else attention_mask.cpu().bool()
    if ids.dim() != 2 or not ids.numel() or content.shape != ids.shape:
        shapes = f"input_ids {tuple(ids.shape)}, mask {tuple(content.shape)}"
        raise ValueError(f"{shapes}: pass (rows, tokens) for both")
    has_content = content.any(1)
    if not has_content.all():
        row = has_content.int().argmin()
        raise ValueError(f"row {row} of input_ids is only padding: drop the row, or its pair")
    t = torch.arange(ids.size(1), device=ids.device)
    if attention_mask is None:
        first = content.int().argmax(1) - num_padding_at_beginning
        last = t[-1] - content.flip(1).int().argmax(1)
        content = (t >= first[:, None]) & (t <= last[:, None])
    length = content.sum(1)
    source = (~content).int().argsort(dim=1, stable=True)  # content first, in its order
    inside = t < length[:, None]
    visible = inside | (attention_mask is None)
    return ids.gather(1, source).where(inside, pad_id), visible, source, length


def ranking_loss(
    rewards: Tensor, length: Tensor, divergence: Tensor, loss_on: str
) -> tuple[Tensor, Tensor]:
    """The Bradley-Terry loss of B pairs, `-log sigmoid(chosen - rejected)`, and end scores (2B,).

    "tokens" averages it over the positions [p, e), from the divergence p to the end e of the longer
    row, as DeepSpeed-Chat does, with padding of the shorter row (DeepSpeedExamples #316). "end"
    compares the end scores (InstructGPT, arXiv:2203.02155). Identical texts, for which p is e, give
    log 2 and no gradient.

    Args: rewards (2B, E), aligned at column 0; length (2B,), content tokens; divergence (B,), p.
    """
    end_scores = rewards.gather(1, length[:, None] - 1).squeeze(1)  # (2B,)
    end = torch.maximum(*length.chunk(2))  # (B,)
    if loss_on == "end":
        chosen, rejected = end_scores.chunk(2)  # (B,)
        loss = -F.logsigmoid(chosen - rejected)
    else:
        chosen, rejected = rewards.chunk(2)  # (B, E)
        t = torch.arange(rewards.size(1), device=rewards.device)
        counted = (t >= divergence[:, None]) & (t < end[:, None])  # (B, E)
        per_token = -F.logsigmoid(chosen - rejected).where(counted, 0)
        # In float32, because a sum in fp16 could overflow.
        loss = per_token.sum(1, dtype=torch.float32) / counted.sum(1).clamp(min=1)
    loss = loss.where(divergence < end, math.log(2))  # (B,)
    return loss.mean().to(rewards.dtype), end_scores


class ValueHead(nn.Linear):
    """`nn.Linear(H, 1)`, in float32 if `in_float32`: bf16 has steps of 0.03 above 4, so scores tie.

    The cast is in the module's own forward, because ZeRO-3 gathers the weight only there.
    """

    in_float32 = False

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.in_float32:
            return super().forward(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight.float())


class RewardModel(nn.Module):
    """A decoder with a value head: r(t), one scalar per token. Names are DeepSpeed-Chat's.

    Args:
        base_model: the decoder without its language-model head, as AutoModel returns it.
        tokenizer: its pad_token_id should not be EOS, and must have an embedding.
        num_padding_at_beginning: leading PAD ids of every text: 1 for OPT with pad = eos, no mask.
        compute_fp32_loss: compute the value head and the loss in float32.
        loss_on: "tokens", a loss at every response token, or "end", at the last (`ranking_loss`).
        share_prefix: compute a prefix that rows share once, where that is exact (chapter 2). This
            sets base_model's attention to "prefix_tree", which is sdpa in every call without a
            tree, so that an actor may share base_model. Continuous batching needs False.
    """

    prepare_inputs_for_generation = None  # PEFT reads it with task_type="CAUSAL_LM"

    def __init__(
        self,
        base_model: PreTrainedModel,
        tokenizer: Tokenizer,
        num_padding_at_beginning: int = 0,
        compute_fp32_loss: bool = False,
        loss_on: str = "tokens",
        share_prefix: bool = True,
    ) -> None:
        super().__init__()
        config = base_model.config
        name = type(base_model).__name__
        check_decoder(config, name)
        if isinstance(base_model, PreTrainedModel) and base_model.base_model is not base_model:
            raise ValueError(f"{name} has a head: pass its base_model, or load it with AutoModel")
        if loss_on not in ("tokens", "end"):
            raise ValueError(f"loss_on is {loss_on!r}: use 'tokens' or 'end'")
        self.PAD_ID = tokenizer.pad_token_id
        if self.PAD_ID is None:
            raise ValueError("the tokenizer has no pad_token_id: set pad_token, but not to EOS")
        if self.PAD_ID >= config.vocab_size:
            raise ValueError(
                f"PAD's id {self.PAD_ID} has no embedding, the model has {config.vocab_size}: "
                "call base_model.resize_token_embeddings(len(tokenizer))"
            )
        self.config = config
        self.num_padding_at_beginning = num_padding_at_beginning
        self.loss_on = loss_on
        self.share_prefix = share_prefix and supports_tree(base_model)  # chapter 2
        if self.share_prefix:  # chapter 2
            base_model.set_attn_implementation(TREE_ATTENTION)  # chapter 2
        self.rwtransformer = base_model
        width = getattr(config, "word_embed_proj_dim", config.hidden_size)  # OPT-350m's is narrower
        place = {"dtype": base_model.dtype, "device": base_model.device}
        self.v_head = ValueHead(width, 1, bias=False, **place)
        self.v_head.in_float32 = compute_fp32_loss
        # Its device is the model's: with ZeRO-3 offload the parameters are on the CPU.
        self.register_buffer("on_device", torch.empty(0, **place), persistent=False)

    def __getattr__(self, name: str) -> Any:
        # What Trainer, PEFT and NEFTune look for: gradient_checkpointing_enable and its relatives.
        if "_checkpointing_" in name or name in ("device", "get_input_embeddings"):
            return getattr(self.rwtransformer, name)
        return super().__getattr__(name)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_loss: bool = True,
        **others: Any,
    ) -> dict[str, Tensor]:
        """The ranking loss of B pairs, however the rows are padded.

        Args:
            input_ids: (2B, T), B chosen rows, then the B rejected ones. On the CPU nothing is read
                back from the model's device. Never slice this dimension (nn.DataParallel,
                accelerate's dispatch_batches): run one process per device, each with its pairs.
            attention_mask: (2B, T), 1 at content. If None, PAD is padding, but attention sees it.
            return_loss: ignored. Trainer evaluates only if it is True by default.
            others: trainers' extras are ignored, any other must be None.
        Returns loss () and the end scores chosen_mean_scores and rejected_mean_scores (B,), all
        with gradients. Raises ValueError, which names the argument or row, and the fix.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError("nn.DataParallel tears pairs apart: launch one process per device")
        ids, visible, _, length = self._align(
            input_ids, attention_mask, others
        )  # (2B, T), ..., (2B,)
        if len(ids) % 2:
            raise ValueError(
                f"input_ids has {len(ids)} rows: pass B chosen, then the B rejected ones"
            )
        chosen, rejected = ids.chunk(2)  # (B, T)
        shorter = torch.minimum(*length.chunk(2))  # (B,)
        longer = torch.maximum(*length.chunk(2))
        in_both = torch.arange(ids.size(1), device=ids.device) < shorter[:, None]
        same = (chosen == rejected) & in_both
        divergence = same.int().cumprod(1).sum(1)  # (B,); e where the texts are identical
        needed = length if self.loss_on == "end" else longer.repeat(2)  # (2B,)
        rewards = self._rewards(ids, visible, needed)  # (2B, E)
        length = self._send(length)
        loss, scores = ranking_loss(rewards, length, self._send(divergence), self.loss_on)
        chosen_scores, rejected_scores = scores.chunk(2)
        return {
            "loss": loss,
            "chosen_mean_scores": chosen_scores,
            "rejected_mean_scores": rejected_scores,
        }

    def forward_value(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_value_only: bool = False,
        **others: Any,
    ) -> Tensor | dict[str, Tensor]:
        """One value per token of R rows, for PPO's critic and the frozen reward model.

        Args: as in `forward`, but R rows, padded on any side. `prompt_length` is ignored.
        Returns values (R, T), 0 at padding; unless return_value_only, in a dict with
        chosen_end_scores (R,).
        """
        ids, visible, source, length = self._align(input_ids, attention_mask, others)
        rewards = self._rewards(ids, visible, length)  # (R, E)
        E = rewards.size(1)
        last = self._send(length[:, None] - 1)
        rewards_of_content = rewards.where(torch.arange(E, device=rewards.device) <= last, 0)
        values = rewards.new_zeros(ids.shape)
        values = values.scatter(1, self._send(source[:, :E]), rewards_of_content)
        if return_value_only:
            return values
        return {"values": values, "chosen_end_scores": rewards.gather(1, last).squeeze(1)}

    def _align(self, input_ids, attention_mask, others):
        ignored = ("return_dict", "num_items_in_batch", "prompt_length")
        for name, value in others.items():
            if name not in ignored and value is not None and value is not False:
                raise ValueError(f"{name}: not supported, leave it out")
        return align(input_ids, attention_mask, self.PAD_ID, self.num_padding_at_beginning)

    def _rewards(self, ids, visible, needed):
        """r(t) for the first needed[i] tokens of aligned row i: (R, E) with E = max(needed)."""
        E = needed.max()
        ids = ids[:, :E]
        visible = visible[:, :E]
        if self.share_prefix:  # chapter 2
            return tree_rewards(self, ids, visible, needed)  # chapter 2
        return self._score(input_ids=self._send(ids), attention_mask=self._send(visible.long()))

    def _score(self, **inputs):
        """Backbone and value head.

        Gradient checkpointing recomputes outside of this call: with it, switch cuDNN's attention
        off for the process, as train_reward.py does.
        """
        with sdpa_kernel(KERNELS):
            hidden = self.rwtransformer(**inputs, use_cache=False)[0]  # (rows, columns, H)
        return self.v_head(hidden).squeeze(-1)

    def _send(self, x):
        """Copy to the model's device, from pinned memory, so that the copy does not block."""
        if self.on_device.is_cuda:
            x = x.pin_memory()
        return x.to(self.on_device.device, non_blocking=True)


def check_decoder(config: PretrainedConfig, name: str) -> None:
    """Raise ValueError unless the config is that of a causal text decoder."""
    kind = config.model_type
    is_decoder = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    is_decoder |= kind.endswith("_text") or kind == "mistral4"  # of multimodal models
    is_decoder &= type(config) in transformers.MODEL_MAPPING
    is_decoder &= config.get_text_config(decoder=True) is config
    two_way = kind in ("xlnet", "embedding_gemma2_text") or config.is_encoder_decoder
    two_way |= type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    two_way |= type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    two_way |= getattr(config, "is_causal", True) is False
    # Gemma's "vision" attends in both directions within images only.
    two_way |= getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision")
    if two_way or not is_decoder:
        raise ValueError(f"{name} is a {kind} model: a critic needs a causal text decoder")


def reward_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """transformers' `...ForSequenceClassification` of a family, built here if it has none."""
    hf_class = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if hf_class is not None:
        return hf_class
    decoder = transformers.MODEL_MAPPING[type(config)]
    base = decoder.__base__  # GranitePreTrainedModel, ...
    name = base.__name__.replace("PreTrainedModel", "ForSequenceClassification")
    warnings.warn(f"transformers has no {name}: only create_critic_model can load the saved critic")
    # transformers reads the `__module__` of a class when it looks for experts.
    parts = {
        "__module__": base.__module__,
        "base_model_prefix": decoder.base_model_prefix or "model",
    }
    return type(name, (GenericForSequenceClassification, base), parts)


def unpartitioned():
    """A context without an HfDeepSpeedConfig, for which transformers would partition by itself."""
    hf_deepspeed = transformers.integrations.deepspeed
    return mock.patch.object(hf_deepspeed, "_hf_deepspeed_config_weak_ref", None)


def load_weights(path, config, dtype, needs_head):
    """Memory-map a checkpoint. Returns transformers' reward model, and whether its head was there.

    Raises ValueError, which lists the keys, unless they match: all of them, or without `needs_head`
    those of the decoder.
    """
    hf_class = reward_class(config)
    prefix = hf_class.base_model_prefix
    openrlhf = getattr(config, "value_head_prefix", "score")
    key_mapping = {
        # The text decoder of a multimodal model; DeepSpeed-Chat's name, and its older spelling.
        r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": f"{prefix}.",
        r"^rwtra(?:nsformer|nrsformer)\.": f"{prefix}.",
        # Heads of DeepSpeed-Chat (v), OpenRLHF (value), UltraRM (regression) and Beaver (score).
        rf"^({openrlhf}|(v|value|regression|score)_head)\.": "score.",
        rf"^(?!{prefix}\.|score\.)(.+)": rf"{prefix}.\1",  # a bare decoder
    }
    options = {"config": config, "dtype": dtype, "key_mapping": key_mapping}
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        with unpartitioned():
            model, info = hf_class.from_pretrained(path, **options)
    except (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"the weights in {path} cannot be read, download them again: {error}"
        ) from error
    kinds = ("missing", "mismatched", "unexpected")
    found = [f"{kind} {key}" for kind in kinds for key in sorted(map(str, info[f"{kind}_keys"]))]
    has_head = not re.search(r"(missing|mismatched) \W*score\.weight", str(found))
    if needs_head:  # old versions of transformers saved masks with GPT-2, GPT-J and GPT-Neo
        ignored = r"unexpected .*\.attn(\.attention)?\.(masked_)?bias$"
    else:  # a vision tower and the language model's head are not used
        ignored = r"unexpected|score\.weight"
    problems = [problem for problem in found if not re.search(ignored, problem)]
    if problems:
        fix = "download its files again"
        if "score." in str(problems):
            fix = "a critic's head is score.weight, one row and no bias; train a base model first"
        problems = "; ".join(problems[:5])
        raise ValueError(f"the weights in {path} do not match its config.json: {problems}; {fix}")
    return model, has_head


def set_dropout(config, dropout):
    """Override every dropout probability of a config."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}: it must be at least 0 and less than 1")
    for part in (config, getattr(config, "attn_config", config)):  # MPT nests it
        for name, value in vars(part).items():
            if re.search("dropout|pdrop$", name) and type(value) in (int, float):
                vars(part)[name] = dropout or type(value)(0)  # MPT's must be an int


def training_dtype(ds_config):
    """The dtype of the parameters that DeepSpeed expects."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = (ds_config.get(name) or {}).get("enabled")
        if enabled == "auto":
            raise ValueError(f'{name} in ds_config has "enabled": "auto": write true or false')
        if enabled:
            return dtype
    return torch.float32


def create_critic_model(
    model_name_or_path: str,
    tokenizer: Tokenizer,
    ds_config: dict[str, Any] | None = None,
    num_padding_at_beginning: int = 0,
    rlhf_training: bool = False,
    dropout: float | None = None,
    zero_stage: int = 0,
    compute_fp32_loss: bool = False,
    loss_on: str = "tokens",
    share_prefix: bool = True,
    dtype: torch.dtype | None = None,
) -> RewardModel:
    """Make the critic from a pretrained decoder (step 2), or load a reward checkpoint (step 3).

    Args:
        model_name_or_path: a local folder or a hub id; safetensors or pickle, complete or sharded.
        tokenizer: if it has more tokens than a base model, the embeddings grow, to a multiple of 8.
        ds_config: DeepSpeed's; bf16 or fp16 sets the dtype (else float32), stage 3 partitions.
        rlhf_training: require a trained head, from a reward checkpoint of DeepSpeed-Chat
            (`rwtransformer.*`) or transformers' `AutoModelForSequenceClassification` with one
            label. Otherwise such a head is trained further, and a base model gets a newly
            initialised one.
        dropout: in [0, 1), overrides every dropout probability of the config; None leaves them.
        zero_stage: kept from DeepSpeed-Chat; may only repeat the stage in `ds_config`.
        dtype: overrides that of `ds_config`.
        num_padding_at_beginning, compute_fp32_loss, loss_on, share_prefix: see RewardModel.
    Raises ValueError, which names the argument, file or key, and the fix; OSError without a model.
    """
    path = model_name_or_path
    ds_config = ds_config or {}
    stage = (ds_config.get("zero_optimization") or {}).get("stage", 0)
    if zero_stage not in (0, stage):
        raise ValueError(
            f"zero_stage is {zero_stage}, but ds_config has stage {stage}: leave it out"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)  # custom code would prompt
    if not config.is_encoder_decoder:
        config = config.get_text_config(decoder=True)  # of a multimodal model
    check_decoder(config, path)
    config.num_labels = 1
    if dropout is not None:
        set_dropout(config, dropout)
    grows = len(tokenizer) > config.vocab_size
    if grows and rlhf_training:
        raise ValueError(
            f"the tokenizer has more tokens than {path}: use the tokenizer saved there"
        )
    dtype = dtype or training_dtype(ds_config)
    hf_model, has_head = load_weights(path, config, dtype, needs_head=rlhf_training)
    if grows:
        size = len(tokenizer)
        hf_model.resize_token_embeddings(size, pad_to_multiple_of=8, mean_resizing=False)
    options = (num_padding_at_beginning, compute_fp32_loss, loss_on, share_prefix)
    model = RewardModel(hf_model.base_model, tokenizer, *options)
    if has_head:
        model.v_head.weight = hf_model.score.weight
        if not rlhf_training:
            warnings.warn(f"{path} has a value head, which is trained further")
    if stage == 3:
        partition_zero3(model, ds_config)
    return model


def save_critic_model(
    model: nn.Module, tokenizer: Tokenizer, output_dir: str | os.PathLike
) -> None:
    """Write the critic for transformers' `AutoModelForSequenceClassification`, TRL and vLLM.

    Every rank calls it, with a RewardModel or the DeepSpeed engine around it; rank 0 writes, and
    an error there is raised on every rank. A save that fails or is killed leaves a folder that
    does not load, and an older critic in it is lost. Raises ValueError, before anything is
    written, if names and shapes are not a critic's.
    """
    model = getattr(model, "module", model)
    if model.PAD_ID == tokenizer.eos_token_id:
        warnings.warn(
            "PAD is EOS, so that transformers scores the token before EOS: call "
            'tokenizer.add_special_tokens({"pad_token": "[PAD]"}) before create_critic_model'
        )
    config = type(model.config).from_dict(model.config.to_dict())  # a copy
    # "regression": else transformers' pipeline returns the sigmoid of the score.
    config.update({"num_labels": 1, "pad_token_id": model.PAD_ID, "problem_type": "regression"})
    with torch.device("meta"), unpartitioned():  # a template without data, for names and config
        template = reward_class(config)(config).to(model.rwtransformer.dtype)
    names = {"rwtransformer": template.base_model_prefix, "v_head": "score"}
    state = {}
    for key, value in model.state_dict(keep_vars=True).items():
        first, _, rest = key.partition(".")
        state[f"{names.get(first, first)}.{rest}"] = value
    shapes = {key: getattr(value, "ds_shape", value.shape) for key, value in state.items()}
    expected = {key: value.shape for key, value in template.state_dict().items()}
    differing = sorted({key for key, _ in shapes.items() ^ expected.items()})
    if differing:
        raise ValueError(
            f"not saved as {type(template).__name__}, these differ: {', '.join(differing[:3])}; "
            "merge adapters (merge_and_unload), unwrap a compiled model (_orig_mod), gather FSDP1 "
            "(summon_full_params)"
        )
    folder = Path(output_dir)
    if dist.is_initialized():  # collective: every rank
        whole = gather_on_rank_0(state)
        on_rank_0(lambda: write_folder(folder, template, tokenizer, whole))
    else:
        write_folder(folder, template, tokenizer, state)


def write_folder(folder, template, tokenizer, state):
    """Replace the critic in a folder. Without weights it does not load, so they come last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in OLDER_FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    tokenizer.init_kwargs["padding_side"] = tokenizer.padding_side  # else one set later is lost
    tokenizer.save_pretrained(folder)
    template.save_pretrained(folder, state_dict=state)


# What a loader would read of an older critic. save_pretrained removes older shards itself.
OLDER_FILES = """
model.safetensors model.safetensors.index.json pytorch_model.bin pytorch_model.bin.index.json
special_tokens_map.json added_tokens.json chat_template.jinja
""".split()


# ---- Chapter 2: the prefix tree, and several ranks ----

# Families that a test saw match a padded batch: attention is causal over given position ids, full
# or in a window, and goes through transformers' AttentionInterface. Others run padded batches:
# BLOOM and MPT (ALiBi), Llama 4 (chunked), Qwen3-Next (linear), GPT-OSS (sinks), Gemma 2
# (soft-capped), ...
TREE_FAMILIES = """
afmoe apertus arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm deepseek_v2 deepseek_v3
diffllama dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe flex_olmo gemma gemma3_text gemma3n_text
gemma4_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox granite granitemoe
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder
jais2 jetmoe kolibri1 laguna llama longcat_flash mellum minicpm3 minimax_m2 ministral ministral3
mistral mixtral modernbert-decoder moshi nanochat olmo olmo2 olmo3 olmoe opt persimmon phi phi3
qwen2 qwen2_moe qwen2_vl_text qwen2_5_vl_text qwen3 qwen3_moe qwen3_vl_text qwen3_vl_moe_text
seed_oss smollm3 solar_open starcoder2 youtu
""".split()
CAUSAL_FROM = 512  # tokens; below, more sdpa calls cost more than causal attention saves
TREE_ATTENTION = "prefix_tree"  # the name of `tree_attention` in transformers' registry


def supports_tree(backbone):
    """Whether the tree is exact for this backbone, on the one device where its tensors are."""
    config = backbone.config
    devices = set(getattr(backbone, "hf_device_map", {}).values())
    by_interface = config._attn_implementation in ("sdpa", TREE_ATTENTION)
    by_interface = by_interface and getattr(backbone, "_supports_attention_backend", False)
    return by_interface and config.model_type in TREE_FAMILIES and len(devices) < 2


def tree_rewards(model, ids, visible, needed):
    """`RewardModel._rewards` with each distinct (prefix, token) computed once."""
    tree = PrefixTree(ids, visible, needed, model._send)
    # The backbone passes unknown keyword arguments down to its attention, so `tree` gets there.
    # transformers uses a 4-D mask as it is. This one holds integers, so that sdpa raises
    # an error if `tree` is lost.
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.long, device=tree.ids.device)
    position_ids = tree.columns
    if model.config.model_type == "opt":  # transformers' OPT gives masked padding position -1
        position_ids = position_ids.where(tree.visible, -1)
    rewards = model._score(
        input_ids=tree.ids[None],
        position_ids=position_ids[None],
        attention_mask=placeholder,
        tree=tree,
    )  # (1, N)
    return rewards[0, tree.node_index]  # (R, E)


class Block(NamedTuple):
    """Rows whose attention is one sdpa call: their queries, and their keys from column 0 on.

    A causal block without a window needs no mask, because its queries are its keys. Shorter rows
    are padded at the end: by copies of the last query, whose outputs are not read, and by keys that
    the last query does not see.
    """

    query_nodes: Tensor  # (rows, Q)
    key_nodes: Tensor  # (rows, K)
    is_causal: bool


class PrefixTree:
    """Each distinct (prefix, token) of a batch, once: all that a causal model has to compute.

    A token's hidden state depends only on itself and the tokens before it in its row, so rows with
    a common prefix share its states. Sorting makes such rows neighbours. A row's tokens from where
    it first differs from the row above are new; the new tokens of all rows are the N nodes:

        rows    P Q a b      new    P Q a b      nodes, N = 7    P Q a b c d R
                P Q a c d           . . . c d    columns         0 1 2 3 3 4 1
                P R                 . R

    Args:
        ids, visible: (R, E), as from `align`.
        needed: (R,), tokens of each row; with the "tokens" loss also padding of the shorter row.
        send: moves a tensor to the model's device.
    Attributes:
        ids: (N,), the packed sequence.
        columns: (N,), each node's column: its position id, and the last column that it may see.
        visible: (N,), whether attention may see the node; False at masked padding.
        node_index: (R, E), the node of each token, to read rewards back; arbitrary beyond `needed`.
        blocks: the attention of all distinct rows.
        output_index: (N,), where each node's output is in the concatenated outputs of the blocks.
    """

    @torch.compiler.disable  # its shapes differ from batch to batch
    def __init__(
        self, ids: Tensor, visible: Tensor, needed: Tensor, send: Callable[[Tensor], Tensor]
    ) -> None:
        t = torch.arange(ids.size(1), device=ids.device)
        # One number per token, which is odd where the token is visible. Columns that are not needed
        # get the smallest number, an even one: a row sorts before its extensions.
        unneeded = torch.iinfo(torch.long).min
        symbols = (2 * ids + visible).masked_fill(t >= needed[:, None], unneeded)  # (R, E)
        rows, row_of = torch.unique(symbols, dim=0, return_inverse=True)  # (U, E); (R,)
        is_needed = rows != unneeded
        is_visible = rows % 2 == 1
        differs = F.pad(rows[1:] != rows[:-1], (0, 0, 1, 0), value=True)  # all of row 0 is new
        is_new = (differs.cumsum(1) > 0) & is_needed  # (U, E)
        # Numbers grow from row to row, so the running maximum is the newest node at or above.
        number = torch.zeros_like(rows)
        number[is_new] = torch.arange(int(is_new.sum()), device=ids.device)
        nodes = number.cummax(0).values  # (U, E)
        self.ids = send(rows[is_new] // 2)
        self.visible = send(is_visible[is_new])
        self.columns = send(t.expand_as(rows)[is_new])
        self.node_index = send(nodes[row_of])
        end = is_needed.sum(1)
        blocks, output_index = make_blocks(nodes, is_new, is_visible.sum(1), end, self.ids.is_cpu)
        self.blocks = [Block(send(q), send(k), is_causal) for q, k, is_causal in blocks]
        self.output_index = send(output_index)
        self._masks = {}

    def masks(self, window: int | None, repeats: int, dtype: torch.dtype) -> list[Tensor | None]:
        """One additive mask per block, (rows, 1, repeats * Q, K): 0 where a key is seen, else -inf.

        None for a causal block without a window. `repeats`: query heads per KV head. Cached, so
        that autograd keeps one copy for all layers.
        """
        layer = window, repeats, dtype
        if layer not in self._masks:
            self._masks[layer] = [self._mask(block, *layer) for block in self.blocks]
        return self._masks[layer]

    def _mask(self, block, window, repeats, dtype):
        K = block.key_nodes.size(1)
        if block.is_causal and (window is None or window >= K):
            return None
        t = torch.arange(K, device=self.columns.device)  # the column of each key
        column = self.columns[block.query_nodes][:, :, None]  # (rows, Q, 1)
        seen = self.visible[block.key_nodes][:, None] & (t <= column)  # (rows, Q, K)
        if window is not None:
            seen &= t > column - window
        return seen.to(dtype).log().repeat(1, repeats, 1)[:, None]  # log(0) is -inf


def make_blocks(nodes, is_new, content, end, on_cpu):
    """Lay out the attention of U rows, such that the output of each node is computed.

    Where more than half of a long row's content is new, causal attention over all of it costs no
    more than a rectangle of new queries by all keys, and needs no mask. Padding of such a row,
    which sees its content and no padding, is then a span of its own in another block.

    Args:
        nodes, is_new: (U, E), the node of each token, and whether the row introduces it.
        content, end: (U,), the columns where visible tokens and needed tokens end.
        on_cpu: padding costs most there, so Q and K differ by less than 64 in a block. On an
            accelerator calls cost most, so there is one block of each kind.
    Returns the blocks and output_index (N,), as in PrefixTree, on the CPU.
    """
    step = 64 if on_cpu else 1 << 30
    # Counts of new nodes differ, so that one rectangle for many rows would be mostly padding.
    many = not on_cpu and len(nodes) * content.max() > 8192
    groups = defaultdict(list)
    counts = torch.stack([is_new.sum(1), content, end], 1).tolist()
    for row, (new, length, stop) in enumerate(counts):
        is_causal = (length >= CAUSAL_FROM or many) and 2 * (stop - new) < length
        spans = [(stop - new, stop)]  # columns of queries
        if is_causal:
            spans = [(0, length), (length, stop)]
        for first, last in spans:
            kind = (is_causal and first == 0, (last - first) // step, length // step)
            if first < last:
                groups[kind].append((row, first, last, length))
    nodes = F.pad(nodes, (0, 7))  # so that K can round up to a multiple of 8, for the kernels
    blocks = []
    for (causal, *_), group in groups.items():
        row, first, last, length = torch.tensor(group, device=nodes.device).T[:, :, None]
        Q = int((last - first).max() + 7) // 8 * 8
        K = int(length.max() + 7) // 8 * 8
        column = first + torch.arange(Q, device=nodes.device)  # (rows, Q)
        paths = nodes[row.squeeze(1)]
        blocks.append(Block(paths.gather(1, column.minimum(last - 1)), paths[:, :K], causal))
    # Of the queries with the same node the first is right: in a row, the others are its padding.
    queries = torch.cat([block.query_nodes.flatten() for block in blocks])
    output_index = nodes.new_full([int(is_new.sum())], len(queries))
    place = torch.arange(len(queries), device=nodes.device)
    output_index.scatter_reduce_(0, queries, place, "amin")
    return blocks, output_index


@torch.compiler.disable  # its shapes differ from batch to batch
def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    tree: PrefixTree | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention, the only operation that mixes tokens: a row's new nodes are queries, all are keys.

    Args:
        query: (1, heads, N, D).
        key, value: (1, KV heads, N, D), grouped as in arXiv:2305.13245.
        tree: without it this is sdpa.
        options: the layer's; `sliding_window` is how many columns a query sees.
    Returns (1, N, heads, D) with value's D, and no attention weights. Raises ValueError for an
    option that could change the result and is not known here.
    """
    if tree is None:
        return SDPA(module, query, key, value, attention_mask, **options)
    # sliding_window=None: full attention (EXAONE 4). No option: the module's window (Qwen2-MoE).
    window = options.pop("sliding_window", getattr(module, "sliding_window", None))
    settings = {"dropout_p": options.pop("dropout", 0.0), "scale": options.pop("scaling", None)}
    for name, option in options.items():
        if name not in ("position_ids", "use_cache", "output_attentions") and option is not None:
            raise ValueError(f"the prefix tree does not know {name}: pass share_prefix=False")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    heads = query.size(1)
    kv_heads = key.size(1)
    outputs = []
    masks = tree.masks(window, heads // kv_heads, query.dtype)
    for block, mask in zip(tree.blocks, masks):
        q = take(query, block.query_nodes)  # (rows, heads, Q, D)
        k = take(key, block.key_nodes)  # (rows, KV heads, K, D)
        v = take(value, block.key_nodes)
        if mask is None:
            settings |= {"is_causal": True, "enable_gqa": heads > kv_heads}
        else:  # few kernels support it with grouped heads: those of a KV head become more queries
            settings |= {"is_causal": False, "enable_gqa": False}
            q = q.reshape(len(q), kv_heads, -1, q.size(3))
        output = F.scaled_dot_product_attention(q, k, v, mask, **settings)
        output = output.reshape(len(q), heads, -1, v.size(3)).transpose(1, 2)
        outputs.append(output.flatten(0, 1))  # (rows * Q, heads, D)
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return output.index_select(0, tree.output_index)[None], None


def take(x, nodes):
    """(N, heads, D) at nodes (rows, L): (rows, heads, L, D)."""
    return x.index_select(0, nodes.flatten()).unflatten(0, nodes.shape).transpose(1, 2)


SDPA = transformers.AttentionInterface()["sdpa"]
transformers.AttentionInterface.register(TREE_ATTENTION, tree_attention)
SDPA_MASK = transformers.AttentionMaskInterface()["sdpa"]
transformers.AttentionMaskInterface.register(TREE_ATTENTION, SDPA_MASK)


def partition_zero3(model, ds_config):
    """Broadcast rank 0's parameters, since new weights differ between ranks, and partition them."""
    import deepspeed

    if "LOCAL_RANK" not in os.environ:
        raise ValueError(
            "ds_config has ZeRO stage 3, which partitions over ranks: launch with deepspeed"
        )
    accelerator = deepspeed.get_accelerator()
    accelerator.set_device(int(os.environ["LOCAL_RANK"]))  # which receives rank 0's broadcast
    settings = {"zero_optimization": ds_config["zero_optimization"]}
    settings["train_micro_batch_size_per_gpu"] = 1
    dtype = model.rwtransformer.dtype
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)
    for buffer in model.buffers():  # zero.Init does not move them
        buffer.data = buffer.to(accelerator.current_device_name())


def gather_on_rank_0(state):
    """Copy a state dict to rank 0's CPU, one whole tensor after the other. Every rank calls it."""
    gathered = {}
    for key, value in state.items():
        is_zero3 = hasattr(value, "ds_id")
        if is_zero3:
            value.all_gather()
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # FSDP2's DTensor
        if dist.get_rank() == 0:
            gathered[key] = whole.detach().to("cpu", copy=True)
        if is_zero3:
            value.partition()
    return gathered


@functools.cache
def patient_group(world):
    """Ranks may wait for hours until rank 0 has written 140 GB. Only these waits may be long.

    `world` is the default group, so that a new one gets a new patient group.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(hours=6))


def on_rank_0(run: Callable[[], Any]) -> Any:
    """Run on rank 0; every rank returns its result or raises its error, so that no rank hangs."""
    outcome = [None, None]  # result, error
    if dist.get_rank() == 0:
        try:
            outcome[0] = run()
        except (Exception, SystemExit) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, group=patient_group(dist.group.WORLD))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
